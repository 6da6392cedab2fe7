//! The account of one call site: what it allocated, what is still alive, and of which ages.
//!
//! One writer, the process that owns the account; any number of readers in other processes, which copy it under a
//! sequence lock and never make the writer wait.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::*, fence};

use crate::share::ending::HeldSite;
use crate::share::patience;

/// Ages are kept in this many bins of equal width, which doubles when the site outlives them.
pub const BINS: usize = 16;
/// Live bytes at the latest walks are kept for this many walks.
pub const HISTORY: usize = 16;

/// Who, when and for which statement an allocation was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    /// The process's count of work: statements, forks or windows, from 1.
    pub epoch: u32,
    /// Microseconds since 2000-01-01, as a `timestamptz`.
    pub now: i64,
    /// 0 where unknown.
    pub query_id: i64,
}

#[derive(Default)]
#[repr(C)]
struct Bin {
    /// Records alive of these epochs.
    live: AtomicU32,
    /// Distinct epochs among them; exact until some of them are freed, never above `live`.
    generations: AtomicU32,
    /// Bytes that they stand for, in the fixed point of the weights.
    bytes: AtomicU64,
}

/// What is alive of the epochs of one bin.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Age {
    pub records: u32,
    /// Distinct epochs among them.
    pub generations: u32,
    pub bytes: u64,
}

/// In shared memory; all zero bytes are an unused account.
#[derive(Default)]
#[repr(C, align(64))]
pub struct Site {
    sequence: AtomicU32,
    inexact: AtomicU32,
    stack: AtomicU32,
    path: AtomicU32,
    alloc_count: AtomicU64,
    alloc_bytes: AtomicU64,
    live_count: AtomicU64,
    live_bytes: AtomicU64,
    first_seen: AtomicI64,
    last_seen: AtomicI64,
    query_id: AtomicI64,
    first_epoch: AtomicU32,
    last_epoch: AtomicU32,
    bin_shift: AtomicU32,
    reported: AtomicU32,
    /// Of the latest record, which is what generations count; pairs that are freed at once do not matter to them.
    recorded_epoch: AtomicU32,
    /// Records that were freed, and the longest of their lives, in epochs.
    ended: AtomicU32,
    longest_life: AtomicU32,
    bins: [Bin; BINS],
    history: [AtomicU64; HISTORY],
}

/// A consistent copy of a [`Site`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SiteCopy {
    pub stack: u32,
    pub path: u32,
    /// False once a record was thinned out or sampled.
    pub exact: bool,
    pub alloc_count: u64,
    pub alloc_bytes: u64,
    pub live_count: u64,
    pub live_bytes: u64,
    pub first_seen: i64,
    pub last_seen: i64,
    pub query_id: i64,
    pub first_epoch: u32,
    pub last_epoch: u32,
    /// Epochs per bin.
    pub bin_width: u64,
    /// Oldest first.
    pub ages: [Age; BINS],
    /// Records that were freed, which does not count what was freed within its statement.
    pub ended: u32,
    /// Of these, the one that lived through most epochs.
    pub longest_life: u32,
    /// Live bytes at the latest walks, indexed by the process's walk number modulo [`HISTORY`].
    pub history: [u64; HISTORY],
}

#[inline]
fn add(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Relaxed).wrapping_add(by), Relaxed);
}

#[inline]
fn sub(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Relaxed).saturating_sub(by), Relaxed);
}

const SHIFT: u32 = super::sampling::ONE.trailing_zeros();

fn whole(fixed: u64) -> u64 {
    (fixed + (1 << (SHIFT - 1))) >> SHIFT
}

impl Site {
    /// Makes a fresh account of it. Owner only.
    pub fn open(&self, stack: u32, path: u32) {
        self.sequence.store(self.sequence.load(Relaxed) & !1, Relaxed);
        let write = self.write();
        for cell in [&self.alloc_count, &self.alloc_bytes, &self.live_count, &self.live_bytes] {
            cell.store(0, Relaxed);
        }
        for cell in [&self.first_seen, &self.last_seen, &self.query_id] {
            cell.store(0, Relaxed);
        }
        for cell in [
            &self.inexact,
            &self.first_epoch,
            &self.last_epoch,
            &self.bin_shift,
            &self.reported,
            &self.recorded_epoch,
            &self.ended,
            &self.longest_life,
        ] {
            cell.store(0, Relaxed);
        }
        for bin in &self.bins {
            bin.live.store(0, Relaxed);
            bin.generations.store(0, Relaxed);
            bin.bytes.store(0, Relaxed);
        }
        for cell in &self.history {
            cell.store(0, Relaxed);
        }
        self.stack.store(stack, Relaxed);
        self.path.store(path, Relaxed);
        drop(write);
    }

    /// Closes it: readers skip it from now on.
    pub fn close(&self) {
        self.sequence.store(self.sequence.load(Relaxed) & !1, Relaxed);
        let write = self.write();
        self.stack.store(0, Relaxed);
        drop(write);
    }

    #[inline]
    fn write(&self) -> Write<'_> {
        // Even before and after, unless a writer died in between: `open` mends that.
        self.sequence.store(self.sequence.load(Relaxed).wrapping_add(1), Relaxed);
        fence(Release);
        Write { sequence: &self.sequence }
    }

    /// Counts an allocation that gets no record.
    #[inline]
    pub fn count(&self, size: u64, weight: u64, stamp: Stamp) {
        let _write = self.write();
        self.note(size, weight, stamp);
    }

    /// Counts an allocation and its record. `alloc_weight` is what it stands for among all allocations,
    /// `live_weight` among those alive: they differ when every allocation is counted but not every one recorded.
    #[inline(always)]
    pub fn record(&self, size: u64, alloc_weight: u64, live_weight: u64, stamp: Stamp) {
        let _write = self.write();
        let fresh = self.recorded_epoch.load(Relaxed) != stamp.epoch;
        self.recorded_epoch.store(stamp.epoch, Relaxed);
        self.note(size, alloc_weight, stamp);
        add(&self.live_count, live_weight);
        add(&self.live_bytes, live_weight * size);
        let bin = self.bin_for(stamp.epoch);
        add(&bin.bytes, live_weight * size);
        bin.live.store(bin.live.load(Relaxed).saturating_add(1), Relaxed);
        let generations = bin.generations.load(Relaxed);
        if fresh || generations == 0 {
            bin.generations.store(generations + 1, Relaxed);
        }
    }

    /// Whether everything that was allocated here has been freed. Owner only.
    pub fn frees_all(&self) -> bool {
        self.alloc_count.load(Relaxed) > 0 && self.live_count.load(Relaxed) == 0
    }

    /// Notes when the first allocation was. To be called before `pair`.
    pub fn begin(&self, epoch: u32, now: i64) {
        if self.first_epoch.load(Relaxed) == 0 {
            self.first_epoch.store(epoch, Relaxed);
            self.first_seen.store(now, Relaxed);
        }
    }

    /// Counts an allocation that is freed again already. `now` tells the time and the query's id.
    #[inline(always)]
    pub fn pair(&self, size: u64, weight: u64, epoch: u32, now: impl FnOnce() -> (i64, i64)) {
        let _write = self.write();
        if self.last_epoch.load(Relaxed) != epoch {
            self.last_epoch.store(epoch, Relaxed);
            let (now, query_id) = now();
            self.last_seen.store(now, Relaxed);
            self.query_id.store(query_id, Relaxed);
        }
        add(&self.alloc_count, weight);
        add(&self.alloc_bytes, weight * size);
    }

    #[inline]
    fn note(&self, size: u64, weight: u64, stamp: Stamp) {
        self.begin(stamp.epoch, stamp.now);
        self.last_epoch.store(stamp.epoch, Relaxed);
        self.last_seen.store(stamp.now, Relaxed);
        self.query_id.store(stamp.query_id, Relaxed);
        add(&self.alloc_count, weight);
        add(&self.alloc_bytes, weight * size);
    }

    /// Ends a record that was alive since `epoch`: its chunk was freed in the epoch `now`.
    #[inline]
    pub fn end(&self, size: u64, live_weight: u64, epoch: u32, now: u32) {
        let _write = self.write();
        self.leave(size, live_weight, epoch);
        self.ended.store(self.ended.load(Relaxed).saturating_add(1), Relaxed);
        let life = now.saturating_sub(epoch);
        if life > self.longest_life.load(Relaxed) {
            self.longest_life.store(life, Relaxed);
        }
    }

    /// A record is given up, though its chunk lives on.
    pub fn give_up(&self, size: u64, live_weight: u64, epoch: u32) {
        let _write = self.write();
        self.leave(size, live_weight, epoch);
        self.inexact.store(1, Relaxed);
    }

    /// A record of `epoch` now stands for more, since others like it were thinned out.
    pub fn reweigh(&self, size: u64, old: u64, new: u64, epoch: u32) {
        let _write = self.write();
        let bin = self.bin_of(epoch);
        for (cell, by) in [(&self.live_count, 1), (&self.live_bytes, size), (&bin.bytes, size)] {
            sub(cell, old * by);
            add(cell, new * by);
        }
        self.inexact.store(1, Relaxed);
    }

    pub fn set_inexact(&self) {
        self.inexact.store(1, Relaxed);
    }

    /// Moves one record and its allocation from this account to another: its context changed its path.
    pub fn hand_over(&self, to: &Site, size: u64, weight: u64, epoch: u32) {
        let (now, query_id, inexact) =
            (self.last_seen.load(Relaxed), self.query_id.load(Relaxed), self.inexact.load(Relaxed));
        {
            let _write = self.write();
            sub(&self.alloc_count, weight);
            sub(&self.alloc_bytes, weight * size);
            self.leave(size, weight, epoch);
        }
        // An account's bins start at its first epoch, so an older record joins the oldest bin.
        let first = to.first_epoch.load(Relaxed);
        let last = to.last_epoch.load(Relaxed);
        to.record(size, weight, weight, Stamp { epoch: epoch.max(first), now, query_id });
        to.last_epoch.store(last.max(epoch), Relaxed);
        if inexact != 0 {
            to.set_inexact();
        }
    }

    fn leave(&self, size: u64, live_weight: u64, epoch: u32) {
        sub(&self.live_count, live_weight);
        sub(&self.live_bytes, live_weight * size);
        let bin = self.bin_of(epoch);
        sub(&bin.bytes, live_weight * size);
        let live = bin.live.load(Relaxed).saturating_sub(1);
        bin.live.store(live, Relaxed);
        if bin.generations.load(Relaxed) > live {
            bin.generations.store(live, Relaxed);
        }
    }

    /// The bin of a record that is in the account.
    fn bin_of(&self, epoch: u32) -> &Bin {
        let age = epoch.saturating_sub(self.first_epoch.load(Relaxed)) >> self.bin_shift.load(Relaxed);
        &self.bins[(age as usize).min(BINS - 1)]
    }

    #[inline]
    fn bin_for(&self, epoch: u32) -> &Bin {
        let age = epoch.saturating_sub(self.first_epoch.load(Relaxed));
        while (age >> self.bin_shift.load(Relaxed)) as usize >= BINS {
            self.widen();
        }
        &self.bins[(age >> self.bin_shift.load(Relaxed)) as usize]
    }

    #[cold]
    fn widen(&self) {
        for i in 0..BINS {
            let (mut live, mut generations, mut bytes) = (0, 0, 0);
            for bin in self.bins.iter().skip(2 * i).take(2) {
                live = u32::saturating_add(live, bin.live.load(Relaxed));
                generations = u32::saturating_add(generations, bin.generations.load(Relaxed));
                bytes = u64::saturating_add(bytes, bin.bytes.load(Relaxed));
            }
            self.bins[i].live.store(live, Relaxed);
            self.bins[i].generations.store(generations, Relaxed);
            self.bins[i].bytes.store(bytes, Relaxed);
        }
        self.bin_shift.store(self.bin_shift.load(Relaxed) + 1, Relaxed);
    }

    /// Notes the live bytes at the process's walk of this number.
    pub fn walked(&self, walk: u32) {
        let bytes = whole(self.live_bytes.load(Relaxed));
        // A site that is younger than the window had nothing before.
        self.history[walk as usize % HISTORY].store(bytes, Relaxed);
    }

    /// True the first time it is called.
    pub fn first_report(&self) -> bool {
        self.reported.swap(1, Relaxed) == 0
    }

    pub fn stack(&self) -> u32 {
        self.stack.load(Relaxed)
    }

    pub fn path(&self) -> u32 {
        self.path.load(Relaxed)
    }

    /// Allocations of it that are alive, rounded.
    pub fn live_count(&self) -> u64 {
        whole(self.live_count.load(Relaxed))
    }

    /// Of the latest allocation; microseconds since 2000-01-01.
    pub fn last_seen(&self) -> i64 {
        self.last_seen.load(Relaxed)
    }

    /// Distinct epochs of which it holds something.
    pub fn generations(&self) -> u32 {
        self.bins.iter().fold(0, |sum, bin| bin.generations.load(Relaxed).saturating_add(sum))
    }

    /// What it holds as it stands, torn by at most one write: for an account whose writer is no more.
    pub fn held(&self) -> HeldSite {
        HeldSite {
            stack: self.stack.load(Relaxed),
            path: self.path.load(Relaxed),
            live_bytes: whole(self.live_bytes.load(Relaxed).min(self.alloc_bytes.load(Relaxed))),
            live_count: whole(self.live_count.load(Relaxed).min(self.alloc_count.load(Relaxed))),
            query_id: self.query_id.load(Relaxed),
        }
    }

    /// A copy that no write tore, or None for an unused account and one whose writer died within a write.
    pub fn copy(&self) -> Option<SiteCopy> {
        for attempt in 0.. {
            let before = self.sequence.load(Acquire);
            if before & 1 == 0 {
                let copy = self.copy_unchecked();
                fence(Acquire);
                if self.sequence.load(Relaxed) == before {
                    return (copy.stack != 0).then_some(copy);
                }
            }
            if !patience(attempt) {
                break;
            }
        }
        None
    }

    fn copy_unchecked(&self) -> SiteCopy {
        let count = |c: &AtomicU64| whole(c.load(Relaxed));
        let (alloc_count, alloc_bytes) = (count(&self.alloc_count), count(&self.alloc_bytes));
        let (first_seen, last_seen) = (self.first_seen.load(Relaxed), self.last_seen.load(Relaxed));
        SiteCopy {
            stack: self.stack.load(Relaxed),
            path: self.path.load(Relaxed),
            exact: self.inexact.load(Relaxed) == 0,
            alloc_count,
            alloc_bytes,
            // Where every allocation is counted but only a sample is followed, the estimate of what is alive may
            // exceed the truth of what there was.
            live_count: count(&self.live_count).min(alloc_count),
            live_bytes: count(&self.live_bytes).min(alloc_bytes),
            first_seen,
            // The clock that is cheap lags behind the other by some milliseconds.
            last_seen: if last_seen == 0 { 0 } else { last_seen.max(first_seen) },
            query_id: self.query_id.load(Relaxed),
            first_epoch: self.first_epoch.load(Relaxed),
            last_epoch: self.last_epoch.load(Relaxed),
            bin_width: 1 << self.bin_shift.load(Relaxed).min(63),
            ages: std::array::from_fn(|i| Age {
                records: self.bins[i].live.load(Relaxed),
                generations: self.bins[i].generations.load(Relaxed),
                bytes: count(&self.bins[i].bytes),
            }),
            ended: self.ended.load(Relaxed),
            longest_life: self.longest_life.load(Relaxed),
            history: std::array::from_fn(|i| self.history[i].load(Relaxed)),
        }
    }
}

impl SiteCopy {
    /// Adds what another site holds of the same things. Of an epoch in which both joined something there is one
    /// generation, so in each bin the site that has more of them tells how many there are at least.
    pub fn join(&mut self, other: &SiteCopy) {
        let first = self.first_epoch.min(other.first_epoch);
        let last = self.last_epoch.max(other.last_epoch);
        let mut width = self.bin_width.max(other.bin_width).max(1);
        while last.saturating_sub(first) as u64 / width >= BINS as u64 {
            width *= 2;
        }
        let (ours, theirs) = (self.ages_in(first, width), other.ages_in(first, width));
        if other.last_seen > self.last_seen {
            (self.last_seen, self.query_id) = (other.last_seen, other.query_id);
        }
        self.exact &= other.exact;
        self.alloc_count += other.alloc_count;
        self.alloc_bytes += other.alloc_bytes;
        self.live_count += other.live_count;
        self.live_bytes += other.live_bytes;
        self.first_seen = self.first_seen.min(other.first_seen);
        (self.first_epoch, self.last_epoch, self.bin_width) = (first, last, width);
        self.ages = std::array::from_fn(|i| Age {
            records: ours[i].records.saturating_add(theirs[i].records),
            generations: ours[i].generations.max(theirs[i].generations),
            bytes: ours[i].bytes + theirs[i].bytes,
        });
        self.ended = self.ended.saturating_add(other.ended);
        self.longest_life = self.longest_life.max(other.longest_life);
        self.history = std::array::from_fn(|i| self.history[i] + other.history[i]);
    }

    /// The ages by bins that begin at another epoch, none later, and are as wide or wider.
    fn ages_in(&self, first: u32, width: u64) -> [Age; BINS] {
        let mut ages = [Age::default(); BINS];
        for (i, age) in self.ages.iter().enumerate() {
            let epochs = (self.first_epoch - first) as u64 + i as u64 * self.bin_width;
            let into = &mut ages[(epochs / width).min(BINS as u64 - 1) as usize];
            into.records = into.records.saturating_add(age.records);
            into.generations = into.generations.saturating_add(age.generations);
            into.bytes += age.bytes;
        }
        ages
    }
}

/// The odd phase of the sequence lock.
struct Write<'a> {
    sequence: &'a AtomicU32,
}

impl Drop for Write<'_> {
    #[inline]
    fn drop(&mut self) {
        self.sequence.store(self.sequence.load(Relaxed).wrapping_add(1), Release);
    }
}
