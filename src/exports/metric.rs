//! What the width of a frame can mean.

use super::Site;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Metric {
    Live,
    LiveCount,
    Allocated,
    Allocations,
    Temporary,
    Growth,
}

impl Metric {
    pub const ALL: [Metric; 6] =
        [Metric::Live, Metric::LiveCount, Metric::Allocated, Metric::Allocations, Metric::Temporary, Metric::Growth];

    pub fn name(self) -> &'static str {
        match self {
            Metric::Live => "live",
            Metric::LiveCount => "live_count",
            Metric::Allocated => "allocated",
            Metric::Allocations => "allocations",
            Metric::Temporary => "temporary",
            Metric::Growth => "growth",
        }
    }

    pub fn parse(name: &str) -> Option<Metric> {
        Self::ALL.into_iter().find(|m| m.name() == name)
    }

    /// In words, for a title.
    pub fn title(self) -> &'static str {
        match self {
            Metric::Live => "live bytes",
            Metric::LiveCount => "live allocations",
            Metric::Allocated => "bytes allocated",
            Metric::Allocations => "allocations",
            Metric::Temporary => "allocations that were freed again",
            Metric::Growth => "growth in bytes per second",
        }
    }

    /// What the numbers count.
    pub fn unit(self) -> &'static str {
        match self {
            Metric::Live | Metric::Allocated => "bytes",
            Metric::LiveCount | Metric::Allocations | Metric::Temporary => "allocations",
            Metric::Growth => "bytes per second",
        }
    }

    /// Of a call site. What shrinks has no growth. Rates are rounded as SQL's `round` does, so that sums are the views'.
    pub fn of(self, site: &Site) -> u64 {
        match self {
            Metric::Live => site.live_bytes,
            Metric::LiveCount => site.live_count,
            Metric::Allocated => site.alloc_bytes,
            Metric::Allocations => site.alloc_count,
            Metric::Temporary => site.free_count(),
            Metric::Growth => site.growth_bytes_per_s.max(0.0).round_ties_even() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_rounded_as_sql_does() {
        let mut site = crate::exports::samples::small().sites.swap_remove(0);
        let mut rounded = |rate| {
            site.growth_bytes_per_s = rate;
            Metric::Growth.of(&site)
        };
        assert_eq!([-3.7, 0.49, 2.5, 3.5].map(&mut rounded), [0, 0, 2, 4]);
    }
}
