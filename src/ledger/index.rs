//! The records of followed chunks, found by address.
//!
//! Chunks that are allocated one after another lie near each other, and their records should too: a stretch of memory has
//! a short list of its records, and neighbouring stretches lie in one entry of the hash table. An allocation therefore
//! touches memory that the last one touched, and so does the free of its neighbour.

use super::entries::{Record, STRETCH, grain};
use super::region::{Budget, Region};
use super::table::{Entry, Table};

/// Stretches of an area: what is known of them fills one cache line.
const STRETCHES: usize = 4;
/// So many records of a stretch are looked at for one that a chunk is like.
const ALIKE: usize = 4;
const LATELY: usize = 16;

#[derive(Clone, Copy, Default)]
struct Area {
    /// Plus 1, so that it is never 0.
    number: u64,
    chain: u32,
    /// Stretches that have records; there is one as long as the area is known.
    used: u32,
    /// Ids of their first records.
    heads: [u32; STRETCHES],
    /// Where in them chunks have had records, since there were none: a bit for each grain.
    seen: [u64; STRETCHES],
}

const _: () = assert!(size_of::<Area>() == 64);

impl Entry for Area {
    fn key(&self) -> u64 {
        self.number
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }
}

impl Area {
    /// Makes a record the first of its stretch. Returns the one that was.
    #[inline]
    fn put(&mut self, id: u32, record: &Record) -> u32 {
        let at = stretch(record.base);
        let head = std::mem::replace(&mut self.heads[at], id);
        self.used += (head == 0) as u32;
        self.seen[at] |= record.chunks;
        head
    }
}

/// Records by the addresses of their chunks. Ids start at 1; 0 is "none".
pub struct Index {
    records: Region<Record>,
    areas: Table<Area>,
    /// Ids of the areas that were used last, by the low bits of their numbers: chunks come in a few rows at once.
    lately: [u32; LATELY],
    high: u32,
    free: u32,
    used: u32,
    /// Chunks in them.
    live: usize,
}

#[inline]
fn number(address: u64) -> u64 {
    (address >> STRETCH) / STRETCHES as u64 + 1
}

/// Which of its area.
#[inline]
fn stretch(address: u64) -> usize {
    (address >> STRETCH) as usize % STRETCHES
}

#[inline]
fn lately(number: u64) -> usize {
    number as usize % LATELY
}

impl Index {
    pub const fn new() -> Self {
        Index { records: Region::new(), areas: Table::new(), lately: [0; LATELY], high: 0, free: 0, used: 0, live: 0 }
    }

    /// Chunks that have a record.
    pub fn count(&self) -> usize {
        self.live
    }

    /// Chunks to a record, rounded; there are some.
    pub fn shared_by(&self) -> u64 {
        (self.live as u64 + self.used as u64 / 2) / self.used as u64
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

    /// Id of the area of an address, or 0 if it has no records.
    #[inline(always)]
    pub fn area(&self, address: u64) -> u32 {
        let number = number(address);
        let last = self.lately[lately(number)];
        if last != 0 && self.areas.get(last).number == number {
            return last;
        }
        self.areas.find(number)
    }

    /// Id of the record of a chunk, or 0.
    #[inline]
    pub fn find(&self, address: u64) -> u32 {
        self.find_in(self.area(address), address)
    }

    /// The same where the area is known.
    #[inline]
    pub fn find_in(&self, area: u32, address: u64) -> u32 {
        if area == 0 {
            return 0;
        }
        let (area, at) = (self.areas.get(area), stretch(address));
        if area.seen[at] & grain(address) == 0 {
            return 0;
        }
        let mut id = area.heads[at];
        while id != 0 {
            let record = self.records.get(id as usize);
            if record.has(address) {
                return id;
            }
            id = record.chain;
        }
        0
    }

    /// Lets the chunk of a record, whose area is known, join those of one that it is like. False if there is none.
    #[inline(always)]
    pub fn join(&mut self, record: &Record, area: u32) -> bool {
        if area == 0 {
            return false;
        }
        let at = stretch(record.base);
        let mut id = self.areas.get(area).heads[at];
        for _ in 0..ALIKE {
            if id == 0 {
                break;
            }
            let known = self.records.get_mut(id as usize);
            if known.is_like(record) {
                known.chunks |= record.chunks;
                self.areas.get_mut(area).seen[at] |= record.chunks;
                self.live += 1;
                return true;
            }
            id = known.chain;
        }
        false
    }

    /// Adds a record of one chunk, whose area is known, and returns its id, or 0 when the budget is exhausted.
    #[inline]
    pub fn insert(&mut self, mut record: Record, area: u32, budget: &mut Budget) -> u32 {
        let id = if self.free != 0 {
            self.free
        } else {
            let id = self.high + 1;
            if id as usize >= self.records.capacity() && !self.records.grow(budget) {
                return 0;
            }
            id
        };
        if area != 0 {
            record.chain = self.areas.get_mut(area).put(id, &record);
            self.lately[lately(number(record.base))] = area;
        } else {
            record.chain = 0;
            if !self.insert_area(&record, id, budget) {
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

    /// An area with its first record. False when the budget is exhausted.
    #[inline(never)]
    fn insert_area(&mut self, record: &Record, head: u32, budget: &mut Budget) -> bool {
        let number = number(record.base);
        let mut area = Area { number, ..Area::default() };
        area.put(head, record);
        let id = self.areas.insert(area, budget);
        self.lately[lately(number)] = id;
        id != 0
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
        let area = self.area(record.base);
        debug_assert!(area != 0, "a record's area is known");
        if area == 0 {
            return;
        }
        let at = stretch(record.base);
        let head = self.areas.get(area).heads[at];
        if head != id {
            let mut before = head;
            while before != 0 && self.records.get(before as usize).chain != id {
                before = self.records.get(before as usize).chain;
            }
            debug_assert!(before != 0, "a record is in the list of its stretch");
            // The end of the list, rather than no end of looking for what is not there.
            if before != 0 {
                self.records.get_mut(before as usize).chain = record.chain;
            }
        } else {
            let known = self.areas.get_mut(area);
            known.heads[at] = record.chain;
            if record.chain == 0 {
                known.seen[at] = 0;
                known.used -= 1;
                if known.used == 0 {
                    self.areas.remove(area, Area::default());
                }
            }
        }
        *self.records.get_mut(id as usize) = Record { chain: self.free, ..Record::default() };
        self.free = id;
        self.used -= 1;
    }

    /// Forgets everything that is a parent's.
    pub fn abandon(&mut self, budget: &mut Budget) {
        self.records.abandon(budget);
        self.areas.abandon(budget);
        (self.lately, self.high, self.free, self.used, self.live) = ([0; LATELY], 0, 0, 0, 0);
    }

    /// Forgets everything and gives the memory back.
    pub fn clear(&mut self, budget: &mut Budget) {
        self.records.release(budget);
        self.areas.clear(budget);
        (self.lately, self.high, self.free, self.used, self.live) = ([0; LATELY], 0, 0, 0, 0);
    }
}
