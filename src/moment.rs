//! Times as text, the same for every reader, whatever the session's settings say.

/// Days from 1970-01-01 to 2000-01-01.
const EPOCH_DAYS: i64 = 10_957;
const DAY: i64 = 86_400;

/// `2026-05-08 14:13:22 UTC`.
pub fn text(micros: i64) -> String {
    let [year, month, day, hour, minute, second] = fields(micros);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// `04:33 UTC`, with a date in front when that is more than a day before `now`.
pub fn since(micros: i64, now: i64) -> String {
    let [year, month, day, hour, minute, _] = fields(micros);
    let date = if now - micros > DAY * 1_000_000 { format!("{year:04}-{month:02}-{day:02} ") } else { String::new() };
    format!("{date}{hour:02}:{minute:02} UTC")
}

/// ISO 8601 to the microsecond: `2026-05-08T14:13:22.000001Z`.
pub fn iso(micros: i64) -> String {
    let [year, month, day, hour, minute, second] = fields(micros);
    let rest = micros.rem_euclid(1_000_000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{rest:06}Z")
}

/// Nanoseconds since 1970.
pub fn unix_nanos(micros: i64) -> i64 {
    (micros + EPOCH_DAYS * DAY * 1_000_000) * 1000
}

/// Of the Gregorian calendar, by way of years that begin in March, so that the leap day is a year's last.
fn fields(micros: i64) -> [i64; 6] {
    let seconds = micros.div_euclid(1_000_000);
    let days = seconds.div_euclid(DAY) + EPOCH_DAYS + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + (month <= 2) as i64;
    let in_day = seconds.rem_euclid(DAY);
    [year, month, of_year - (153 * from_march + 2) / 5 + 1, in_day / 3600, in_day / 60 % 60, in_day % 60]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_calendar() {
        assert_eq!(text(0), "2000-01-01 00:00:00 UTC");
        assert_eq!(text(-1), "1999-12-31 23:59:59 UTC");
        assert_eq!(iso(5_097_599_000_001), "2000-02-28T23:59:59.000001Z");
        assert_eq!(text(5_097_600_000_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(text(800_000_002_000_000), "2025-05-08 06:13:22 UTC");
        assert_eq!(unix_nanos(0), 946_684_800_000_000_000);
        let day = DAY * 1_000_000;
        assert_eq!(since(800_000_002_000_000, 800_000_002_000_000 + day), "06:13 UTC");
        assert_eq!(since(800_000_002_000_000, 800_000_002_000_001 + day), "2025-05-08 06:13 UTC");
    }
}
