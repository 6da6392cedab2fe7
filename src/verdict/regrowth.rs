//! A chunk that is made larger again and again: an array that only gets elements, a buffer that nobody empties. It is
//! always young, so its ages tell nothing; its size at the latest walks does.

use super::Evidence;

/// Fewer windows in which it grew show no trend.
const TREND: usize = 4;
/// The latest windows, as many as a trend is looked for in.
const LATEST: usize = 8;
/// Where the size doubles, growth is seldom: so many times, and by this factor all in all.
const DOUBLINGS: usize = 3;
const FACTOR: u64 = 4;

/// Confidence that it is a leak, and how it grows.
pub fn found(e: &Evidence) -> Option<(f64, String)> {
    let replaced = e.alloc_count.saturating_sub(e.live_count);
    // Several sizes for each chunk that is there, and what is there is larger than they were.
    let mean = |bytes: u64, count: u64| bytes as f64 / count.max(1) as f64;
    if replaced < 3 * e.live_count || mean(e.live_bytes, e.live_count) < 1.4 * mean(e.alloc_bytes, e.alloc_count) {
        return None;
    }
    // What was before the first allocation does not count, but for the last window of it.
    let begun = e.series.iter().position(|&(_, bytes)| bytes > 0).unwrap_or(e.series.len());
    let sizes: Vec<u64> = e.series[begun.saturating_sub(1)..].iter().map(|&(_, bytes)| bytes).collect();
    if sizes.is_empty() || !sizes.is_sorted() {
        return None;
    }
    let steps: Vec<u64> = sizes.windows(2).map(|w| w[1] - w[0]).collect();
    let grown = |steps: &[u64]| steps.iter().filter(|&&step| step > 0).count();
    let latest = &steps[steps.len().saturating_sub(LATEST)..];
    let (earlier, later) = latest.split_at(latest.len() / 2);
    let keeps_pace = 2 * later.iter().sum::<u64>() >= earlier.iter().sum::<u64>();
    let often = grown(latest);
    if often >= TREND && often * 4 >= latest.len() * 3 && keeps_pace {
        let confidence = 1.0 - (-(often as f64) / 3.0).exp();
        return Some((confidence.min(0.99), format!("made larger again and again: more in {often} windows")));
    }
    let first = sizes.iter().find(|&&size| size > 0)?;
    let is_recent = steps.iter().rposition(|&step| step > 0)? >= steps.len() / 2;
    if grown(&steps) >= DOUBLINGS && first * FACTOR <= e.live_bytes && is_recent {
        let times = grown(&steps);
        return Some((0.6, format!("made larger in {times} of {} windows, never smaller", steps.len())));
    }
    None
}
