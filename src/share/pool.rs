//! Shared tables whose rows belong to one process at a time, in chunks.
//!
//! A chunk is owned by whoever's slot number stands in its owner word: one compare-and-swap takes it, so a process
//! that dies at any moment leaves nothing half-claimed, and its slot's successor finds what to give back.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::*, fence};

pub const CHUNK: usize = 16;

pub struct Pool<T: 'static> {
    pub owners: &'static [AtomicU32],
    pub rows: &'static [T],
}

impl<T> Clone for Pool<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Pool<T> {}

impl<T> Pool<T> {
    /// Takes a free chunk for a slot and returns its number. None when every chunk has an owner.
    pub fn claim(&self, slot: u32) -> Option<usize> {
        self.order(slot).find(|&chunk| {
            self.owners[chunk].load(Relaxed) == 0
                && self.owners[chunk].compare_exchange(0, slot + 1, AcqRel, Relaxed).is_ok()
        })
    }

    /// Numbers of the chunks that a slot owns, in the order in which they are found free.
    pub fn owned(&self, slot: u32) -> impl Iterator<Item = usize> + '_ {
        self.order(slot).filter(move |&chunk| self.owners[chunk].load(Acquire) == slot + 1)
    }

    /// Slots start their search at different places, so that they seldom meet.
    fn order(&self, slot: u32) -> impl Iterator<Item = usize> + '_ {
        let start = slot as usize * 7;
        (0..self.owners.len()).map(move |i| (start + i) % self.owners.len())
    }

    /// Copies of the rows that a slot owns, as `copy` makes them.
    pub fn copies<C>(&self, slot: u32, copy: impl Fn(&T) -> Option<C>) -> Vec<C> {
        let mut all = Vec::new();
        for chunk in self.owned(slot) {
            let before = all.len();
            all.extend(self.rows_of(chunk).filter_map(|(_, row)| copy(row)));
            // Given back meanwhile: some may be the next owner's already.
            fence(Acquire);
            if self.owners[chunk].load(Relaxed) != slot + 1 {
                all.truncate(before);
            }
        }
        all
    }

    /// The rows of a chunk, with their ids.
    pub fn rows_of(&self, chunk: usize) -> impl Iterator<Item = (u32, &'static T)> + '_ {
        (chunk * CHUNK..(chunk + 1) * CHUNK).map(|id| (id as u32, &self.rows[id]))
    }

    /// Gives back the chunks of a slot whose process is gone, each after `close` has been called with its rows.
    pub fn release(&self, slot: u32, close: impl Fn(&T)) {
        self.release_some(slot, usize::MAX, 0..0, close);
    }

    /// The same for no more than `most` chunks, and without a look at what is `unused`.
    fn release_some(&self, slot: u32, most: usize, unused: Range<u32>, close: impl Fn(&T)) {
        for chunk in self.owned(slot).take(most) {
            self.rows_of(chunk).filter(|(id, _)| !unused.contains(id)).for_each(|(_, row)| close(row));
            self.owners[chunk].store(0, Release);
        }
    }
}

/// The chunks of one pool that this process owns, used one row after another.
#[derive(Clone, Copy, Default)]
pub struct Cursor {
    pub next: u32,
    pub end: u32,
    /// Chunks taken so far.
    pub chunks: usize,
    /// No more than this many; 0: as many as there are.
    pub most: usize,
}

impl Cursor {
    /// Its process may take no more.
    pub fn is_at_its_most(&self) -> bool {
        self.most != 0 && self.chunks >= self.most
    }

    /// Gives all chunks back, each after `close` has been called with those of its rows that were used. The search for
    /// chunks that it has not, and the pages of rows that nobody used, would cost a process that has few of either as
    /// much as all else that it does at its end.
    pub fn release<T>(&mut self, pool: &Pool<T>, slot: u32, close: impl Fn(&T)) {
        pool.release_some(slot, self.chunks, self.next..self.end, close);
        *self = Cursor { most: self.most, ..Cursor::default() };
    }

    /// A row that nobody uses. None when the pool is exhausted.
    pub fn take<T>(&mut self, pool: &Pool<T>, slot: u32) -> Option<u32> {
        if self.next == self.end {
            if self.is_at_its_most() {
                return None;
            }
            // Before it is taken, so that none is forgotten whatever comes in between.
            self.chunks += 1;
            let Some(chunk) = pool.claim(slot) else {
                self.chunks -= 1;
                return None;
            };
            self.next = (chunk * CHUNK) as u32;
            self.end = self.next + CHUNK as u32;
        }
        self.next += 1;
        Some(self.next - 1)
    }
}
