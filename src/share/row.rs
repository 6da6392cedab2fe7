//! The account of one context path in one process: what its contexts hold now and held at the latest walks.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::*, fence};

use super::patience;
use crate::ledger::account::HISTORY;

/// What one walk saw of a path.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    pub contexts: u32,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// Ordinal of the allocator.
    pub kind: u32,
    pub watched: bool,
}

#[derive(Default)]
#[repr(C, align(64))]
pub struct Row {
    sequence: AtomicU32,
    /// 0: unused.
    path: AtomicU32,
    contexts: AtomicU32,
    kind: AtomicU32,
    watched: AtomicU32,
    /// Walks that saw it or the lack of it since it was first seen.
    walks: AtomicU32,
    total_bytes: AtomicU64,
    free_bytes: AtomicU64,
    baseline_bytes: AtomicU64,
    times: [AtomicI64; HISTORY],
    used: [AtomicU64; HISTORY],
}

#[derive(Clone, Debug)]
pub struct RowCopy {
    pub path: u32,
    pub seen: Seen,
    pub baseline_bytes: u64,
    /// (time, used bytes), oldest first.
    pub series: Vec<(i64, u64)>,
}

impl Row {
    /// Adds a walk's finding. Owner only. `baseline` says that the process is still starting; a path that appears
    /// later had nothing before.
    pub fn publish(&self, path: u32, seen: Seen, now: i64, baseline: bool) {
        let sequence = self.sequence.load(Relaxed) | 1;
        self.sequence.store(sequence, Relaxed);
        fence(Release);
        let used = seen.total_bytes - seen.free_bytes;
        if self.path.load(Relaxed) == 0 {
            self.path.store(path, Relaxed);
            self.walks.store(0, Relaxed);
            self.baseline_bytes.store(0, Relaxed);
        }
        if baseline {
            self.baseline_bytes.store(used, Relaxed);
        }
        let at = self.walks.load(Relaxed) as usize % HISTORY;
        self.times[at].store(now, Relaxed);
        self.used[at].store(used, Relaxed);
        self.walks.store(self.walks.load(Relaxed) + 1, Relaxed);
        self.contexts.store(seen.contexts, Relaxed);
        self.kind.store(seen.kind, Relaxed);
        self.watched.store(seen.watched as u32, Relaxed);
        self.total_bytes.store(seen.total_bytes, Relaxed);
        self.free_bytes.store(seen.free_bytes, Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Release);
    }

    /// Path and used bytes at the last walk, as they stand: for a row whose writer is no more.
    pub fn held(&self) -> (u32, u64) {
        let used = self.total_bytes.load(Relaxed).saturating_sub(self.free_bytes.load(Relaxed));
        (self.path.load(Relaxed), used)
    }

    pub fn close(&self) {
        self.path.store(0, Relaxed);
    }

    pub fn copy(&self) -> Option<RowCopy> {
        for attempt in 0.. {
            let before = self.sequence.load(Acquire);
            if before & 1 == 0 {
                let copy = self.copy_unchecked();
                fence(Acquire);
                if self.sequence.load(Relaxed) == before {
                    return (copy.path != 0).then_some(copy);
                }
            }
            if !patience(attempt) {
                break;
            }
        }
        None
    }

    fn copy_unchecked(&self) -> RowCopy {
        let walks = self.walks.load(Relaxed) as usize;
        RowCopy {
            path: self.path.load(Relaxed),
            seen: Seen {
                contexts: self.contexts.load(Relaxed),
                total_bytes: self.total_bytes.load(Relaxed),
                free_bytes: self.free_bytes.load(Relaxed),
                kind: self.kind.load(Relaxed),
                watched: self.watched.load(Relaxed) != 0,
            },
            baseline_bytes: self.baseline_bytes.load(Relaxed),
            series: (walks.saturating_sub(HISTORY)..walks)
                .map(|w| (self.times[w % HISTORY].load(Relaxed), self.used[w % HISTORY].load(Relaxed)))
                .collect(),
        }
    }
}
