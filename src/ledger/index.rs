//! The records of followed chunks, found by address.
//!
//! Chunks that are allocated one after another lie near each other, and their records should too: addresses are
//! hashed by the stretch of memory that they lie in, and each stretch has a short list of its records. An allocation
//! therefore touches memory that the last one touched, and so does the free of its neighbour.

use super::entries::{Record, STRETCH, grain};
use super::region::{Budget, Region};
use super::table::{Entry, Table, mix};

/// So many records of a stretch are looked at for one that a chunk is like.
const ALIKE: usize = 4;
const LATELY: usize = 16;

#[derive(Clone, Copy, Default)]
struct Stretch {
    /// Plus 1, so that it is never 0.
    number: u64,
    /// Where in it chunks have had records: a bit for each grain.
    seen: u64,
    /// Id of its first record; there is one as long as the stretch is known.
    head: u32,
    chain: u32,
}

impl Entry for Stretch {
    fn key(&self) -> u64 {
        self.number
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }

    /// Neighbours have their buckets, and with them what else hangs there, on one cache line.
    #[inline]
    fn hash(key: u64) -> usize {
        const NEAR: u64 = 16;
        mix(key / NEAR).wrapping_mul(NEAR as usize) + (key % NEAR) as usize
    }
}

/// Records by the addresses of their chunks. Ids start at 1; 0 is "none".
pub struct Index {
    records: Region<Record>,
    stretches: Table<Stretch>,
    /// Ids of the stretches that were used last, by the low bits of their numbers: chunks come in a few rows at once.
    lately: [u32; LATELY],
    high: u32,
    free: u32,
    used: u32,
    /// Chunks in them.
    live: usize,
}

#[inline]
fn number(address: u64) -> u64 {
    (address >> STRETCH) + 1
}

#[inline]
fn lately(number: u64) -> usize {
    number as usize % LATELY
}

impl Index {
    pub const fn new() -> Self {
        Index {
            records: Region::new(),
            stretches: Table::new(),
            lately: [0; LATELY],
            high: 0,
            free: 0,
            used: 0,
            live: 0,
        }
    }

    /// Chunks that have a record.
    pub fn count(&self) -> usize {
        self.live
    }

    /// Bytes of records that are not in use.
    pub fn spare(&self) -> usize {
        (self.high - self.used) as usize * size_of::<Record>()
    }

    /// The highest id given out so far; ids up to here may be unused.
    pub fn high(&self) -> u32 {
        self.high
    }

    #[inline]
    pub fn get(&self, id: u32) -> &Record {
        self.records.get(id as usize)
    }

    #[inline]
    pub fn get_mut(&mut self, id: u32) -> &mut Record {
        self.records.get_mut(id as usize)
    }

    /// Id of the stretch of an address, or 0 if it has no records.
    #[inline(always)]
    pub fn stretch(&self, address: u64) -> u32 {
        let number = number(address);
        let last = self.lately[lately(number)];
        if last != 0 && self.stretches.get(last).number == number {
            return last;
        }
        self.stretches.find(number)
    }

    /// Id of the record of a chunk, or 0.
    #[inline]
    pub fn find(&self, address: u64) -> u32 {
        self.find_in(self.stretch(address), address)
    }

    /// The same where the stretch is known.
    #[inline]
    pub fn find_in(&self, stretch: u32, address: u64) -> u32 {
        if stretch == 0 {
            return 0;
        }
        let Stretch { seen, head, .. } = *self.stretches.get(stretch);
        if seen & grain(address) == 0 {
            return 0;
        }
        let mut id = head;
        while id != 0 {
            let record = self.records.get(id as usize);
            if record.has(address) {
                return id;
            }
            id = record.chain;
        }
        0
    }

    /// Lets the chunk of a record, whose stretch is known, join those of one that it is like. False if there is none.
    #[inline]
    pub fn join(&mut self, record: &Record, stretch: u32) -> bool {
        if stretch == 0 {
            return false;
        }
        let mut id = self.stretches.get(stretch).head;
        for _ in 0..ALIKE {
            if id == 0 {
                break;
            }
            let known = self.records.get_mut(id as usize);
            if known.is_like(record) {
                known.chunks |= record.chunks;
                self.stretches.get_mut(stretch).seen |= record.chunks;
                self.live += 1;
                return true;
            }
            id = known.chain;
        }
        false
    }

    /// Adds a record of one chunk, whose stretch is known, and returns its id, or 0 when the budget is exhausted.
    #[inline]
    pub fn insert(&mut self, mut record: Record, stretch: u32, budget: &mut Budget) -> u32 {
        let id = if self.free != 0 {
            self.free
        } else {
            let id = self.high + 1;
            if id as usize >= self.records.capacity() && !self.records.grow(budget) {
                return 0;
            }
            id
        };
        if stretch != 0 {
            let known = self.stretches.get_mut(stretch);
            record.chain = known.head;
            known.head = id;
            known.seen |= record.chunks;
            self.lately[lately(number(record.base))] = stretch;
        } else {
            record.chain = 0;
            if !self.insert_stretch(&record, id, budget) {
                return 0;
            }
        }
        if id == self.free {
            self.free = self.records.get(id as usize).chain;
        } else {
            self.high = id;
        }
        *self.records.get_mut(id as usize) = record;
        self.used += 1;
        self.live += 1;
        id
    }

    /// A stretch with its first record. False when the budget is exhausted.
    #[inline(never)]
    fn insert_stretch(&mut self, record: &Record, head: u32, budget: &mut Budget) -> bool {
        let number = number(record.base);
        let stretch = self.stretches.insert(Stretch { number, seen: record.chunks, head, chain: 0 }, budget);
        self.lately[lately(number)] = stretch;
        stretch != 0
    }

    /// Takes a chunk out of its record. True if it was the last: then the record is to be removed.
    #[inline]
    pub fn leave(&mut self, id: u32, address: u64) -> bool {
        let record = self.records.get_mut(id as usize);
        record.chunks &= !grain(address);
        self.live -= 1;
        record.chunks == 0
    }

    /// Removes an empty record by its id.
    pub fn remove(&mut self, id: u32) {
        let record = *self.records.get(id as usize);
        let stretch = self.stretch(record.base);
        debug_assert!(stretch != 0, "a record's stretch is known");
        if stretch == 0 {
            return;
        }
        let head = self.stretches.get(stretch).head;
        if head != id {
            let mut at = head;
            while at != 0 && self.records.get(at as usize).chain != id {
                at = self.records.get(at as usize).chain;
            }
            debug_assert!(at != 0, "a record is in the list of its stretch");
            // The end of the list, rather than no end of looking for what is not there.
            if at != 0 {
                self.records.get_mut(at as usize).chain = record.chain;
            }
        } else if record.chain != 0 {
            self.stretches.get_mut(stretch).head = record.chain;
        } else {
            self.stretches.remove(stretch, Stretch::default());
        }
        *self.records.get_mut(id as usize) = Record { chain: self.free, ..Record::default() };
        self.free = id;
        self.used -= 1;
    }

    /// Forgets everything that is a parent's.
    pub fn abandon(&mut self, budget: &mut Budget) {
        self.records.abandon(budget);
        self.stretches.abandon(budget);
        (self.lately, self.high, self.free, self.used, self.live) = ([0; LATELY], 0, 0, 0, 0);
    }

    /// Forgets everything and gives the memory back.
    pub fn clear(&mut self, budget: &mut Budget) {
        self.records.release(budget);
        self.stretches.clear(budget);
        (self.lately, self.high, self.free, self.used, self.live) = ([0; LATELY], 0, 0, 0, 0);
    }
}
