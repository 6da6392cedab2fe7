//! Chunks that were allocated a moment ago. Nearly all of them are freed before the statement ends: such a pair is
//! settled here, at the price of two cache lines, and only what stays is given a record.

/// A power of two; more chunks than this at once only cost records that would not have been needed.
const PLACES: usize = 256;
/// A power of two; of so many chunks it is remembered where they were put.
const RECENT: usize = 64;

/// The context, by its id in the ledger, and the account of a chunk: one word, since it is copied for each.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(transparent)]
pub struct Holder(u64);

impl Holder {
    #[inline(always)]
    pub const fn new(context: u32, site: u32) -> Self {
        Holder((site as u64) << 32 | context as u64)
    }

    #[inline(always)]
    pub fn context(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    pub fn site(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A chunk, but for its address.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Chunk {
    pub size: u64,
    pub holder: Holder,
    pub epoch: u32,
    pub cell: u16,
    /// Index of the sampling rate.
    pub level: u16,
}

#[repr(C)]
pub struct Pending {
    /// Chunks taken in and given out, ever.
    pub put: u64,
    pub taken: u64,
    /// Chunks that a flush between two messages of a statement has passed.
    pub passed: u64,
    /// Places of the latest chunks, by their number.
    recent: [u8; RECENT],
    /// Apart from the rest, so that a flush reads little; 0: free.
    addresses: [u64; PLACES],
    chunks: [Chunk; PLACES],
}

impl Pending {
    pub const fn new() -> Self {
        const NONE: Chunk = Chunk { size: 0, holder: Holder(0), epoch: 0, cell: 0, level: 0 };
        Pending { addresses: [0; PLACES], chunks: [NONE; PLACES], put: 0, taken: 0, recent: [0; RECENT], passed: 0 }
    }

    #[inline(always)]
    fn place(address: u64) -> usize {
        (address >> 4) as usize % PLACES
    }

    /// Where a chunk goes that finds its place taken.
    #[inline(always)]
    fn other(place: usize) -> usize {
        place ^ (PLACES / 2)
    }

    /// Where the chunk at an address is.
    #[inline(always)]
    fn find(&self, address: u64) -> Option<usize> {
        let place = Self::place(address);
        if self.addresses[place] == address {
            return Some(place);
        }
        let other = Self::other(place);
        (self.addresses[other] == address).then_some(other)
    }

    /// Takes a chunk in if its place is free. One whose free was missed may then be in the other place of its address:
    /// it ends when it gets a record, or the next time that the address does.
    #[inline(always)]
    pub fn put_free(&mut self, address: u64, chunk: Chunk) -> bool {
        let place = Self::place(address);
        if self.addresses[place] != 0 {
            return false;
        }
        self.fill(place, address, chunk);
        true
    }

    /// Takes a chunk in, and returns the one that it displaces, with its address.
    #[inline]
    pub fn put(&mut self, address: u64, chunk: Chunk) -> Option<(u64, Chunk)> {
        let place = self.find(address).unwrap_or_else(|| {
            let place = Self::place(address);
            let other = Self::other(place);
            if self.addresses[place] != 0 && self.addresses[other] == 0 { other } else { place }
        });
        let old = self.addresses[place];
        let displaced = if old != 0 { Some((old, self.chunks[place])) } else { None };
        self.taken += (old != 0) as u64;
        self.fill(place, address, chunk);
        displaced
    }

    #[inline(always)]
    fn fill(&mut self, place: usize, address: u64, chunk: Chunk) {
        self.recent[self.put as usize % RECENT] = place as u8;
        self.put += 1;
        self.addresses[place] = address;
        self.chunks[place] = chunk;
    }

    #[inline(always)]
    pub fn has(&self, address: u64) -> bool {
        self.find(address).is_some()
    }

    /// Gives the chunk at an address out, if it is here.
    #[inline(always)]
    pub fn take(&mut self, address: u64) -> Option<&Chunk> {
        let place = self.find(address)?;
        self.addresses[place] = 0;
        self.taken += 1;
        Some(&self.chunks[place])
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.put == self.taken
    }

    /// Takes out any one chunk that `wanted` accepts, looking from place `from` on; the next look starts behind it.
    pub fn next(&mut self, from: &mut usize, wanted: impl Fn(&Chunk) -> bool) -> Option<(u64, Chunk)> {
        while !self.is_empty() && *from < PLACES {
            let place = *from;
            *from += 1;
            if self.addresses[place] != 0 && wanted(&self.chunks[place]) {
                let address = std::mem::take(&mut self.addresses[place]);
                self.taken += 1;
                return Some((address, self.chunks[place]));
            }
        }
        None
    }

    /// The same among the chunks that were taken in since `passed` had been, which it counts up; where those are too
    /// many to remember, it may pass some that were passed before. `from` as for `next`.
    pub fn next_since(
        &mut self,
        passed: &mut u64,
        from: &mut usize,
        wanted: impl Fn(&Chunk) -> bool,
    ) -> Option<(u64, Chunk)> {
        if self.put - *passed > RECENT as u64 {
            let found = self.next(from, wanted);
            if found.is_none() {
                *passed = self.put;
            }
            return found;
        }
        while *passed < self.put {
            let place = self.recent[*passed as usize % RECENT] as usize;
            *passed += 1;
            if self.addresses[place] != 0 && wanted(&self.chunks[place]) {
                self.taken += 1;
                return Some((std::mem::take(&mut self.addresses[place]), self.chunks[place]));
            }
        }
        None
    }

    pub fn clear(&mut self) {
        if !self.is_empty() {
            self.addresses.fill(0);
        }
        // A new process has no page of its own for it yet, and seldom needs one.
        if self.put != 0 {
            (self.put, self.taken, self.passed) = (0, 0, 0);
        }
    }
}
