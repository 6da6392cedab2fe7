//! A hash table of fixed-size entries with stable ids, in rheap's own memory, that grows a bucket at a time.
//!
//! Linear hashing: no allocation ever rehashes the whole table, so none of the user's pallocs waits for that.

use super::region::{Budget, Region};

/// Something that lives in a [`Table`]. All zero bytes must be a valid, unused entry.
pub trait Entry: Copy {
    /// Never 0 for an entry in use.
    fn key(&self) -> u64;
    /// Id of the next entry in the same bucket, 0 at the end.
    fn chain(&self) -> u32;
    fn set_chain(&mut self, next: u32);
}

/// Entries by key. Ids start at 1; 0 is "none".
pub struct Table<E> {
    entries: Region<E>,
    buckets: Region<u32>,
    bucket_count: usize,
    /// The smallest power of two that is not below `bucket_count`, less one.
    mask: usize,
    high: u32,
    free: u32,
    live: u32,
}

/// Few, since most processes fill few tables with much: a split for each entry more is soon made.
const FIRST_BUCKETS: usize = 128;

/// So many keys in a row have buckets in a row, and so do those that are looked at when a bucket is split: what grows
/// side by side is found and added without a miss of the cache for each.
const NEAR: u64 = 256;

#[inline]
fn hash(key: u64) -> usize {
    let x = (key / NEAR).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x ^ (x >> 32)).wrapping_add(key % NEAR) as usize
}

impl<E: Entry> Table<E> {
    pub const fn new() -> Self {
        Table { entries: Region::new(), buckets: Region::new(), bucket_count: 0, mask: 0, high: 0, free: 0, live: 0 }
    }

    /// Entries in use.
    pub fn count(&self) -> usize {
        self.live as usize
    }

    /// The highest id given out so far; ids up to here may be unused, which their key 0 tells.
    pub fn high(&self) -> u32 {
        self.high
    }

    #[inline]
    fn bucket(&self, key: u64) -> usize {
        let h = hash(key);
        let bucket = h & self.mask;
        if bucket < self.bucket_count { bucket } else { h & (self.mask >> 1) }
    }

    #[inline]
    pub fn get(&self, id: u32) -> &E {
        self.entries.get(id as usize)
    }

    #[inline]
    pub fn get_mut(&mut self, id: u32) -> &mut E {
        self.entries.get_mut(id as usize)
    }

    /// Id of the entry with this key, or 0.
    #[inline]
    pub fn find(&self, key: u64) -> u32 {
        if self.bucket_count == 0 {
            return 0;
        }
        let mut id = *self.buckets.get(self.bucket(key));
        while id != 0 {
            let e = self.entries.get(id as usize);
            if e.key() == key {
                return id;
            }
            id = e.chain();
        }
        0
    }

    /// Adds an entry and returns its id, or 0 when the budget is exhausted.
    pub fn insert(&mut self, mut entry: E, budget: &mut Budget) -> u32 {
        let id = if self.free != 0 {
            let id = self.free;
            self.free = self.entries.get(id as usize).chain();
            id
        } else {
            let id = self.high + 1;
            if id as usize >= self.entries.capacity() && !self.entries.grow(budget) {
                return 0;
            }
            self.high = id;
            id
        };
        if !self.reserve_bucket(budget) {
            self.entries.get_mut(id as usize).set_chain(self.free);
            self.free = id;
            return 0;
        }
        let bucket = self.bucket(entry.key());
        let head = self.buckets.get_mut(bucket);
        entry.set_chain(*head);
        *head = id;
        *self.entries.get_mut(id as usize) = entry;
        self.live += 1;
        id
    }

    /// Removes an entry by id. `cleared` is what an unused entry looks like (key 0).
    pub fn remove(&mut self, id: u32, mut cleared: E) {
        let entry = *self.entries.get(id as usize);
        let bucket = self.bucket(entry.key());
        let mut at = *self.buckets.get(bucket);
        if at == id {
            *self.buckets.get_mut(bucket) = entry.chain();
        } else {
            while at != 0 && self.entries.get(at as usize).chain() != id {
                at = self.entries.get(at as usize).chain();
            }
            debug_assert!(at != 0, "an entry is always in its bucket");
            if at != 0 {
                self.entries.get_mut(at as usize).set_chain(entry.chain());
            }
        }
        cleared.set_chain(self.free);
        *self.entries.get_mut(id as usize) = cleared;
        self.free = id;
        self.live -= 1;
    }

    /// Keeps about one entry a bucket by splitting the next bucket in turn.
    fn reserve_bucket(&mut self, budget: &mut Budget) -> bool {
        if self.bucket_count == 0 {
            while self.buckets.capacity() < FIRST_BUCKETS {
                if !self.buckets.grow(budget) {
                    return false;
                }
            }
            self.bucket_count = FIRST_BUCKETS;
            self.mask = FIRST_BUCKETS - 1;
        } else if (self.live as usize) >= self.bucket_count
            && (self.bucket_count < self.buckets.capacity() || self.buckets.grow(budget))
        {
            // A table that cannot grow its buckets still works: the chains get longer.
            self.split();
        }
        true
    }

    fn split(&mut self) {
        let new = self.bucket_count;
        let old = if new.is_power_of_two() { 0 } else { new - (new.next_power_of_two() >> 1) };
        self.bucket_count += 1;
        self.mask = self.bucket_count.next_power_of_two() - 1;
        let mut id = *self.buckets.get(old);
        let (mut stay, mut go) = (0, 0);
        while id != 0 {
            let next = self.entries.get(id as usize).chain();
            let key = self.entries.get(id as usize).key();
            let list = if self.bucket(key) == new { &mut go } else { &mut stay };
            self.entries.get_mut(id as usize).set_chain(*list);
            *list = id;
            id = next;
        }
        *self.buckets.get_mut(old) = stay;
        *self.buckets.get_mut(new) = go;
    }

    /// Forgets everything that is a parent's.
    pub fn abandon(&mut self, budget: &mut Budget) {
        self.entries.abandon(budget);
        self.buckets.abandon(budget);
        (self.bucket_count, self.high, self.free, self.live) = (0, 0, 0, 0);
    }

    /// Forgets everything and gives the memory back.
    pub fn clear(&mut self, budget: &mut Budget) {
        self.entries.release(budget);
        self.buckets.release(budget);
        (self.bucket_count, self.high, self.free, self.live) = (0, 0, 0, 0);
    }
}
