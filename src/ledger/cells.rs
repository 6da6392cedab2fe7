//! How precisely each caller of the allocator is followed in `sampled` mode.
//!
//! Callers share cells by a hash of their return addresses. A cell is exact while it is cheap: for its first
//! allocations, and for as long as it allocates no more often than the process has work; all of that within a budget
//! for the process, which grows with its work. Then it is sampled, and sparsely once all that it allocates is freed at
//! once: nobody looks for a leak in the lock that each statement takes and releases. The first chunk that such a cell
//! keeps ends that for long; not for ever, since the cell may be shared with a cache that was filled and is full.
//!
//! The rate changes only at moments that do not depend on the allocation at hand, so estimates stay unbiased.

use super::sampling::{Rate, Rates, Rng};

pub const CELLS: usize = 1024;

/// Allocations that every cell has recorded before it may be sampled.
const FIRST: u32 = 128;
/// Exact records that a process may make before it has done any work, and for each unit of it, and save up.
const BUDGET: u32 = 8;
const GRANT: u32 = 16;
const SAVINGS: u32 = 512;
/// Recorded allocations between two judgements.
const WINDOW: u32 = 64;
/// Recorded allocations after the last one that was kept, until a cell may be sampled sparsely again. A leak of one
/// allocation in a thousand is likely met again before.
const QUIET: u32 = 1024;
/// What comes and goes is sampled this many powers of two more sparsely.
pub const SETTLED: u32 = 5;

#[derive(Clone, Copy)]
struct Cell {
    /// Recorded since the cell was made.
    recorded: u32,
    /// `recorded` when a window began.
    since: u32,
    /// Of this window, freed before their statement ended.
    paired: u32,
    /// `recorded` must come here before the cell is sparse: something was still held when its statement ended.
    quiet_at: u32,
    /// The process's epoch at the last judgement.
    epoch: u32,
    /// Index of the rate by which the gap at hand was drawn; 0: exact.
    level: u8,
}

impl Cell {
    /// Something was kept lately.
    fn keeps(&self) -> bool {
        self.recorded < self.quiet_at
    }

    /// Ends a window: nothing was kept lately, and nearly all of the window is known to have been freed at once.
    fn settles(&mut self) -> bool {
        let recorded = self.recorded - std::mem::replace(&mut self.since, self.recorded);
        let paired = std::mem::take(&mut self.paired);
        !self.keeps() && paired >= recorded - recorded / 16
    }
}

const NEW: Cell = Cell { recorded: 0, since: 0, paired: 0, quiet_at: 0, epoch: 0, level: 0 };

#[repr(C, align(64))]
pub struct Cells {
    /// Bytes that each cell may still allocate before it is asked; at or below 0 it is asked. The hook's entry
    /// counts them down by itself.
    pub gaps: [i64; CELLS],
    /// Not all zero.
    used: bool,
    /// Exact records that may still be made, for the work up to an epoch of the process.
    budget: u32,
    granted: u32,
    /// The mode's own rate.
    rate: Rate,
    /// No cell is followed more densely than this: the memory is used up.
    floor: Rate,
    cells: [Cell; CELLS],
}

impl Cells {
    pub const fn new() -> Self {
        Cells { gaps: [0; CELLS], cells: [NEW; CELLS], used: false, budget: 0, granted: 0, rate: 0, floor: 0 }
    }

    /// Cells begin anew, exact at first.
    pub fn sampled(&mut self, rate: Rate) {
        self.clear();
        (self.rate, self.used) = (rate, true);
    }

    /// Back to zero, which the pages of most processes never leave.
    pub fn clear(&mut self) {
        // A forked child's are, and to write here would cost it the copy of a page.
        if self.are_clear() {
            return;
        }
        if std::mem::replace(&mut self.used, false) {
            self.gaps.fill(0);
            self.cells.fill(NEW);
        }
        (self.rate, self.floor) = (0, 0);
        // Work done until now counts for nothing.
        (self.budget, self.granted) = (BUDGET, u32::MAX);
    }

    /// As `clear` leaves them.
    fn are_clear(&self) -> bool {
        !self.used && (self.rate, self.floor, self.budget, self.granted) == (0, 0, BUDGET, u32::MAX)
    }

    /// No cell shall be followed more densely than this from now on.
    pub fn raise_floor(&mut self, floor: Rate, rates: &mut Rates, rng: &mut Rng) {
        self.floor = floor;
        for i in 0..CELLS {
            if rates.rate(self.cells[i].level) < floor {
                self.draw(i, floor, rates, rng);
            }
        }
    }

    pub fn floor(&self) -> Rate {
        self.floor
    }

    fn draw(&mut self, cell: usize, rate: Rate, rates: &mut Rates, rng: &mut Rng) {
        let level = rates.level(rate);
        self.cells[cell].level = level;
        self.gaps[cell] = if rates.rate(level) == 0 { 0 } else { rates.gap(level, rng) };
    }

    /// Whether a site of this cell may have lost allocations.
    pub fn is_sampled(&self, cell: u16) -> bool {
        self.used && self.cells[cell as usize % CELLS].level != 0
    }

    /// Grants what the work since the last time is worth.
    #[inline]
    fn grant(&mut self, epoch: u32) {
        let work = epoch.saturating_sub(std::mem::replace(&mut self.granted, epoch));
        self.budget = work.saturating_mul(GRANT).saturating_add(self.budget).min(SAVINGS);
    }

    /// An allocation whose cell's gap is used up: returns the level to record it with, or None to let it pass; and
    /// whether the cell has just turned from exact to sampled.
    #[inline]
    pub fn ask(&mut self, cell: u16, size: u64, epoch: u32, rates: &mut Rates, rng: &mut Rng) -> (Option<u8>, bool) {
        let index = cell as usize % CELLS;
        self.grant(epoch);
        let c = &mut self.cells[index];
        let level = c.level;
        if level == 0 && self.budget == 0 {
            self.draw(index, self.rate.max(self.floor), rates, rng);
            self.gaps[index] -= size as i64;
            if self.gaps[index] > 0 {
                return (None, true);
            }
            return (Some(self.ask(cell, size, epoch, rates, rng).0.unwrap_or(0)), true);
        }
        c.recorded += 1;
        if level == 0 {
            self.budget -= 1;
            if !c.recorded.is_multiple_of(WINDOW) {
                return (Some(0), false);
            }
        }
        let rate = self.judge(index, epoch, rates);
        self.draw(index, rate, rates, rng);
        (Some(level), level == 0 && self.cells[index].level != 0)
    }

    /// The rate of a cell for what it allocates from now on.
    fn judge(&mut self, index: usize, epoch: u32, rates: &Rates) -> Rate {
        let c = &mut self.cells[index];
        if c.level != 0 {
            let rate = rates.rate(c.level);
            return match () {
                _ if c.keeps() && rate > self.rate => self.rate.max(self.floor),
                _ if rate == self.rate && c.recorded - c.since >= WINDOW && c.settles() => rate << SETTLED,
                _ => rate,
            };
        }
        let epochs = epoch.saturating_sub(std::mem::replace(&mut c.epoch, epoch));
        let settles = c.settles();
        let own = if c.recorded < FIRST {
            0
        } else if settles {
            self.rate << SETTLED
        } else if epochs >= WINDOW {
            0
        } else {
            self.rate
        };
        own.max(self.floor)
    }

    /// A recorded chunk of this cell was freed at once.
    #[inline]
    pub fn paired(&mut self, cell: u16) {
        if self.used {
            self.cells[cell as usize % CELLS].paired += 1;
        }
    }

    /// A recorded chunk of this cell outlived its statement.
    #[inline]
    pub fn kept(&mut self, cell: u16) {
        if self.used {
            let c = &mut self.cells[cell as usize % CELLS];
            c.quiet_at = c.recorded.saturating_add(QUIET);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = 4096;

    struct Bench {
        cells: Cells,
        rates: Rates,
        rng: Rng,
        epoch: u32,
    }

    impl Bench {
        fn new() -> Box<Self> {
            let mut bench = Box::new(Bench { cells: Cells::new(), rates: Rates::new(), rng: Rng::new(7), epoch: 100 });
            bench.cells.sampled(RATE);
            bench.cells.budget = SAVINGS;
            bench
        }

        /// Allocates in cell 5 as the hook's entry would; the rate of the record, if it gets one.
        fn alloc(&mut self, size: i64, epoch: u32) -> Option<Rate> {
            self.cells.gaps[5] -= size;
            if self.cells.gaps[5] > 0 {
                return None;
            }
            let (level, _) = self.cells.ask(5, size as u64, epoch, &mut self.rates, &mut self.rng);
            level.map(|level| self.rates.rate(level))
        }

        /// Allocates and frees so often, once for each unit of work; the rates of the records.
        fn pairs(&mut self, times: u32) -> Vec<Rate> {
            let mut rates = Vec::new();
            for _ in 0..times {
                self.epoch += 1;
                if let Some(rate) = self.alloc(100, self.epoch) {
                    self.cells.paired(5);
                    rates.push(rate);
                }
            }
            rates
        }
    }

    #[test]
    fn a_rare_site_stays_exact_and_a_hot_one_is_sampled() {
        let mut rare = Bench::new();
        assert!((1..5000).all(|epoch| {
            let rate = rare.alloc(100, epoch);
            rare.cells.kept(5);
            rate == Some(0)
        }));
        let mut hot = Bench::new();
        let exact = (0..5000).filter(|_| hot.alloc(100, 1) == Some(0)).count();
        assert_eq!(exact, FIRST as usize);
        assert!(hot.cells.is_sampled(5));
        assert!((0..5000).any(|_| hot.alloc(100, 1) == Some(RATE)));
    }

    #[test]
    fn no_more_is_exact_than_the_budget_allows() {
        let mut bench = Bench::new();
        bench.cells.budget = BUDGET;
        let exact = (0..100).filter(|_| bench.alloc(100, 1) == Some(0)).count();
        assert_eq!(exact, BUDGET as usize);
        assert!(bench.cells.is_sampled(5));
    }

    #[test]
    fn what_comes_and_goes_is_sampled_sparsely_until_something_stays() {
        let mut bench = Bench::new();
        // A start of which not all is seen to go.
        for epoch in 0..40 {
            let _ = bench.alloc(100, epoch);
        }
        bench.pairs(4000);
        let rates = bench.pairs(20_000);
        assert!(!rates.is_empty() && rates.iter().all(|&r| r == RATE << SETTLED), "{rates:?}");
        bench.cells.kept(5);
        let rates = bench.pairs(100_000);
        let dense = rates.iter().filter(|&&r| r == RATE).count();
        // The gap at hand was drawn before, and windows are whole.
        assert!((QUIET..QUIET + WINDOW).contains(&(dense as u32)), "{dense}");
        assert!(rates[dense + 1..].iter().all(|&r| r == RATE << SETTLED), "{rates:?}");
    }

    #[test]
    fn a_leak_of_one_in_a_hundred_is_followed_densely_for_as_long_as_it_leaks() {
        let mut bench = Bench::new();
        bench.pairs(4000);
        bench.cells.kept(5);
        let mut sparse = 0;
        for i in 0..200_000 {
            let Some(rate) = bench.alloc(100, 10_000 + i) else { continue };
            sparse += (rate > RATE) as u32;
            if i % 100 == 0 { bench.cells.kept(5) } else { bench.cells.paired(5) }
        }
        assert_eq!(sparse, 1, "the one whose gap was drawn before");
    }

    #[test]
    fn nothing_is_followed_more_densely_than_the_memory_allows() {
        let mut bench = Bench::new();
        let Bench { cells, rates, rng, .. } = &mut *bench;
        cells.raise_floor(1 << 20, rates, rng);
        assert!((0..100_000).filter_map(|_| bench.alloc(100, 1)).all(|r| r == 1 << 20));
    }
}
