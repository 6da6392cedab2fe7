//! Chunks that were allocated a moment ago. Nearly all of them are freed before the statement ends: such a pair is
//! settled here, at the price of two cache lines, and only what stays is given a record.

/// A power of two; more chunks than this at once only cost records that would not have been needed.
const PLACES: usize = 256;

/// A chunk, but for its address.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Chunk {
    pub size: u64,
    pub context: u32,
    pub site: u32,
    pub epoch: u32,
    pub cell: u16,
    /// Index of the sampling rate.
    pub level: u16,
}

pub struct Pending {
    /// Apart from the rest, so that a flush reads little; 0: free.
    addresses: [u64; PLACES],
    chunks: [Chunk; PLACES],
    /// Chunks taken in and given out, ever.
    pub put: u64,
    pub taken: u64,
}

impl Pending {
    pub const fn new() -> Self {
        const NONE: Chunk = Chunk { size: 0, context: 0, site: 0, epoch: 0, cell: 0, level: 0 };
        Pending { addresses: [0; PLACES], chunks: [NONE; PLACES], put: 0, taken: 0 }
    }

    #[inline(always)]
    fn place(address: u64) -> usize {
        (address >> 4) as usize % PLACES
    }

    /// Takes a chunk in if that displaces none.
    #[inline(always)]
    pub fn put_free(&mut self, address: u64, chunk: Chunk) -> bool {
        let place = Self::place(address);
        if self.addresses[place] != 0 {
            return false;
        }
        self.put += 1;
        self.addresses[place] = address;
        self.chunks[place] = chunk;
        true
    }

    /// Takes a chunk in, and returns the one that it displaces, with its address.
    #[inline]
    pub fn put(&mut self, address: u64, chunk: Chunk) -> Option<(u64, Chunk)> {
        let place = Self::place(address);
        let old = self.addresses[place];
        let displaced = if old != 0 { Some((old, self.chunks[place])) } else { None };
        self.put += 1;
        self.taken += (old != 0) as u64;
        self.addresses[place] = address;
        self.chunks[place] = chunk;
        displaced
    }

    #[inline(always)]
    pub fn has(&self, address: u64) -> bool {
        self.addresses[Self::place(address)] == address
    }

    /// Gives the chunk at an address out, if it is here.
    #[inline(always)]
    pub fn take(&mut self, address: u64) -> Option<&Chunk> {
        let place = Self::place(address);
        if self.addresses[place] != address {
            return None;
        }
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

    pub fn clear(&mut self) {
        if !self.is_empty() {
            self.addresses.fill(0);
        }
        (self.put, self.taken) = (0, 0);
    }
}
