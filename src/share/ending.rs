//! What a process held when it ended: copied out of its slot before the slot goes to somebody else, and kept in a ring
//! that the next endings write over.
//!
//! Written by the process itself when it leaves, or by whoever finds it gone. Stacks and paths are ids of dictionaries
//! that only grow, so an ending stays readable for as long as the cluster's postmaster lives.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering::*, fence};

use super::patience;

/// Call sites and context paths that are kept of one process, largest first.
pub const KEPT: usize = 12;
/// Of those that ended only because the server restarted after a crash, those with a call site of this many bytes.
pub const MUCH: u64 = 1 << 20;
/// Endings of each manner that are kept.
pub const ENDINGS: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    /// It left in order, or because the server restarted after the crash of another process.
    Exit,
    /// It never said goodbye.
    Killed,
}

impl How {
    pub fn name(self) -> &'static str {
        match self {
            How::Exit => "exit",
            How::Killed => "killed",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeldSite {
    pub stack: u32,
    pub path: u32,
    pub live_bytes: u64,
    pub live_count: u64,
    pub query_id: i64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeldPath {
    pub path: u32,
    pub used_bytes: u64,
}

/// What is written and read; fixed in size, so that it can be made where nothing may be allocated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EndingCopy {
    pub how: How,
    pub pid: i32,
    pub backend_type: i32,
    /// Microseconds since 2000-01-01.
    pub ended_at: i64,
    /// As of the process's last walk.
    pub context_bytes: u64,
    /// Of the process's latest allocation that is known; 0: none.
    pub query_id: i64,
    /// Unused ones have no stack.
    pub sites: [HeldSite; KEPT],
    /// Unused ones have no path.
    pub paths: [HeldPath; KEPT],
}

impl EndingCopy {
    pub fn new(how: How, pid: i32, backend_type: i32, ended_at: i64) -> Self {
        EndingCopy {
            how,
            pid,
            backend_type,
            ended_at,
            context_bytes: 0,
            query_id: 0,
            sites: [HeldSite::default(); KEPT],
            paths: [HeldPath::default(); KEPT],
        }
    }

    /// Takes the place of the least one, if it holds more. `preferred` ones come before all others.
    pub fn add_site(&mut self, site: HeldSite, ranks: &mut [u64; KEPT], preferred: bool) {
        let rank = (preferred as u64) << 62 | site.live_bytes.min((1 << 62) - 1);
        insert(&mut self.sites, ranks, site, rank);
    }

    pub fn add_path(&mut self, path: HeldPath, ranks: &mut [u64; KEPT]) {
        insert(&mut self.paths, ranks, path, path.used_bytes);
    }
}

/// Keeps both lists sorted by rank, largest first.
fn insert<T: Copy>(kept: &mut [T; KEPT], ranks: &mut [u64; KEPT], new: T, rank: u64) {
    let at = ranks.partition_point(|&r| r >= rank);
    if at < KEPT {
        kept.copy_within(at..KEPT - 1, at + 1);
        ranks.copy_within(at..KEPT - 1, at + 1);
        (kept[at], ranks[at]) = (new, rank);
    }
}

#[derive(Default)]
#[repr(C)]
struct Site {
    stack: AtomicU32,
    path: AtomicU32,
    live_bytes: AtomicU64,
    live_count: AtomicU64,
    query_id: AtomicI64,
}

#[derive(Default)]
#[repr(C)]
struct Path {
    path: AtomicU32,
    used_bytes: AtomicU64,
}

/// In shared memory; all zero bytes are an unused place.
#[derive(Default)]
#[repr(C, align(64))]
pub struct Ending {
    /// Odd while somebody writes; 0: unused.
    sequence: AtomicU32,
    pid: AtomicI32,
    backend_type: AtomicI32,
    ended_at: AtomicI64,
    context_bytes: AtomicU64,
    query_id: AtomicI64,
    sites: [Site; KEPT],
    paths: [Path; KEPT],
}

impl Ending {
    /// False when somebody else writes here, or died doing so: that place is lost.
    fn write(&self, copy: &EndingCopy) -> bool {
        let before = self.sequence.load(Acquire);
        if before & 1 == 1 || self.sequence.compare_exchange(before, before + 1, AcqRel, Relaxed).is_err() {
            return false;
        }
        fence(Release);
        self.pid.store(copy.pid, Relaxed);
        self.backend_type.store(copy.backend_type, Relaxed);
        self.ended_at.store(copy.ended_at, Relaxed);
        self.context_bytes.store(copy.context_bytes, Relaxed);
        self.query_id.store(copy.query_id, Relaxed);
        for (cell, site) in self.sites.iter().zip(&copy.sites) {
            cell.stack.store(site.stack, Relaxed);
            cell.path.store(site.path, Relaxed);
            cell.live_bytes.store(site.live_bytes, Relaxed);
            cell.live_count.store(site.live_count, Relaxed);
            cell.query_id.store(site.query_id, Relaxed);
        }
        for (cell, path) in self.paths.iter().zip(&copy.paths) {
            cell.path.store(path.path, Relaxed);
            cell.used_bytes.store(path.used_bytes, Relaxed);
        }
        // Not 0, which would mean unused.
        self.sequence.store(before.wrapping_add(2).max(2), Release);
        true
    }

    /// A copy that no write tore; None for an unused place and one whose writer is at it or died.
    fn read(&self, how: How) -> Option<EndingCopy> {
        for attempt in 0.. {
            let before = self.sequence.load(Acquire);
            if before == 0 {
                return None;
            }
            if before & 1 == 0 {
                let mut copy = EndingCopy::new(
                    how,
                    self.pid.load(Relaxed),
                    self.backend_type.load(Relaxed),
                    self.ended_at.load(Relaxed),
                );
                copy.context_bytes = self.context_bytes.load(Relaxed);
                copy.query_id = self.query_id.load(Relaxed);
                for (cell, site) in self.sites.iter().zip(&mut copy.sites) {
                    *site = HeldSite {
                        stack: cell.stack.load(Relaxed),
                        path: cell.path.load(Relaxed),
                        live_bytes: cell.live_bytes.load(Relaxed),
                        live_count: cell.live_count.load(Relaxed),
                        query_id: cell.query_id.load(Relaxed),
                    };
                }
                for (cell, path) in self.paths.iter().zip(&mut copy.paths) {
                    *path = HeldPath { path: cell.path.load(Relaxed), used_bytes: cell.used_bytes.load(Relaxed) };
                }
                fence(Acquire);
                if self.sequence.load(Relaxed) == before {
                    return Some(copy);
                }
            }
            if !patience(attempt) {
                break;
            }
        }
        None
    }
}

/// The latest endings: those that were killed apart from the others, so that a busy server does not wash them away.
#[derive(Clone, Copy)]
pub struct Endings {
    /// First those that left, then those that were killed.
    pub places: &'static [Ending],
    /// Endings so far, of either manner.
    pub written: &'static [AtomicU32],
    /// When the postmaster last said that somebody was killed; microseconds since 2000-01-01.
    pub last_kill: &'static [AtomicI64],
}

impl Endings {
    pub fn push(&self, copy: &EndingCopy) {
        let half = (copy.how == How::Killed) as usize;
        // A place that cannot be had is passed over; three in a row are as good as none.
        for _ in 0..3 {
            let ticket = self.written[half].fetch_add(1, AcqRel) as usize;
            if self.places[half * ENDINGS + ticket % ENDINGS].write(copy) {
                return;
            }
        }
    }

    /// The postmaster has said that somebody was killed, and ends all others now. Nothing else tells the one from the
    /// others: a process may end without a word for reasons of its own.
    pub fn killed(&self, at: i64) {
        self.last_kill[0].fetch_max(at, AcqRel);
    }

    /// When that was last, 0: never.
    pub fn last_kill(&self) -> i64 {
        self.last_kill[0].load(Acquire)
    }

    /// All that are kept, newest first.
    pub fn all(&self) -> Vec<EndingCopy> {
        let how = |i: usize| if i < ENDINGS { How::Exit } else { How::Killed };
        let mut all: Vec<_> = self.places.iter().enumerate().filter_map(|(i, place)| place.read(how(i))).collect();
        all.sort_by_key(|e| std::cmp::Reverse(e.ended_at));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endings() -> Endings {
        Endings {
            places: (0..2 * ENDINGS).map(|_| Ending::default()).collect::<Vec<_>>().leak(),
            written: (0..2).map(|_| AtomicU32::new(0)).collect::<Vec<_>>().leak(),
            last_kill: vec![AtomicI64::new(0)].leak(),
        }
    }

    #[test]
    fn the_largest_are_kept_and_preferred_ones_come_first() {
        let mut ending = EndingCopy::new(How::Exit, 7, 4, 1);
        let mut ranks = [0; KEPT];
        for i in 1..=40u64 {
            let bytes = i * 7 % 41;
            let site = HeldSite { stack: i as u32, live_bytes: bytes, ..HeldSite::default() };
            ending.add_site(site, &mut ranks, bytes == 3);
        }
        let bytes: Vec<u64> = ending.sites.iter().map(|s| s.live_bytes).collect();
        assert_eq!(bytes, [3, 40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30]);
    }

    #[test]
    fn exits_do_not_wash_away_those_that_were_killed() {
        let endings = endings();
        endings.push(&EndingCopy::new(How::Killed, 5, 4, 10));
        for i in 0..1000 {
            endings.push(&EndingCopy::new(How::Exit, 1000 + i, 4, 20 + i as i64));
        }
        let all = endings.all();
        assert_eq!(all.len(), ENDINGS + 1);
        assert_eq!((all[0].pid, all[ENDINGS].pid, all[ENDINGS].how), (1999, 5, How::Killed));
    }

    #[test]
    fn a_writer_that_died_costs_its_place_and_nothing_else() {
        let endings = endings();
        endings.places[0].sequence.store(7, Relaxed);
        endings.push(&EndingCopy::new(How::Exit, 9, 4, 10));
        assert_eq!(endings.all().iter().map(|e| e.pid).collect::<Vec<_>>(), [9]);
    }
}
