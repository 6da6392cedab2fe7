//! Does a call site keep memory in proportion to the calls of a statement? For `rheap_check`, which sees a statement
//! from the inside: no time series, no ages, but the books before, in the middle of and after its repeats.

/// What a call site, or all contexts of a path, hold at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    pub bytes: i64,
    pub count: i64,
}

impl Held {
    fn since(self, before: Held) -> Held {
        Held { bytes: self.bytes - before.bytes, count: self.count - before.count }
    }
}

/// What was kept over all repeats, of which `held` has the books before, in between and after, or None where that is not
/// in proportion to them: a cache is filled once, and what fills up while it is watched grows less and less; what is
/// emptied now and then has less at one moment than before.
pub fn kept(held: &[Held]) -> Option<Held> {
    let (start, middle, end) = (*held.first()?, held[held.len() / 2], *held.last()?);
    let (first, second) = (middle.since(start), end.since(middle));
    let all = end.since(start);
    let keeps_on = |first: i64, second: i64| first > 0 && second > 0 && second * 2 >= first;
    // A chunk that is made larger at each call is one chunk for ever; what is empty has no bytes.
    let by_bytes = keeps_on(first.bytes, second.bytes) && held.is_sorted_by_key(|h| h.bytes);
    let by_count = all.bytes == 0 && keeps_on(first.count, second.count) && held.is_sorted_by_key(|h| h.count);
    (by_bytes || by_count).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(held: impl Fn(i64) -> Held) -> Option<Held> {
        kept(&(1..=11).map(|batch| held(10 * batch)).collect::<Vec<_>>())
    }

    fn chunks(count: i64) -> Held {
        Held { bytes: count * 120, count }
    }

    #[test]
    fn what_stays_of_each_call_is_kept() {
        assert_eq!(over(chunks), Some(chunks(100)));
        assert_eq!(over(|call| chunks(call / 50)), Some(chunks(2)), "one call in fifty");
        assert_eq!(
            over(|call| Held { bytes: call * 8, count: 1 }),
            Some(Held { bytes: 800, count: 0 }),
            "one that grows"
        );
        assert_eq!(over(|call| Held { bytes: 16 << call.ilog2(), count: 1 }).map(|k| k.count), Some(0), "by doubling");
        assert_eq!(
            over(|call| Held { bytes: 0, count: call }),
            Some(Held { bytes: 0, count: 100 }),
            "chunks of no size"
        );
    }

    #[test]
    fn what_is_filled_once_or_emptied_is_not() {
        assert_eq!(over(|_| chunks(1)), None);
        assert_eq!(over(|call| chunks(call.min(50))), None, "fills within the first half");
        assert_eq!(over(|call| chunks(call.min(80))), None, "fills within the second half");
        for period in [16, 24, 40, 45, 48, 100] {
            assert_eq!(over(|call| chunks(call % period)), None, "emptied at each {period}th call");
        }
        assert_eq!(over(|call| chunks(1 + call % 2)), None, "one behind");
        assert_eq!(over(|call| chunks(200 - call)), None);
    }
}
