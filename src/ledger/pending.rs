//! Chunks that were allocated a moment ago. Nearly all of them are freed before the statement ends: such a pair is
//! settled here, at the price of two cache lines, and only what stays is given a record.

/// A power of two; more chunks than this at once only cost records that would not have been needed.
const PLACES: usize = 256;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Chunk {
    pub address: u64,
    pub size: u64,
    pub site: u32,
    pub context: u32,
    pub epoch: u32,
    pub cell: u16,
    /// Index of the sampling rate.
    pub level: u8,
}

pub struct Pending {
    /// Apart from the rest, so that a flush reads little; 0: free.
    addresses: [u64; PLACES],
    chunks: [Chunk; PLACES],
    count: u32,
}

impl Pending {
    pub const fn new() -> Self {
        const NONE: Chunk = Chunk { address: 0, size: 0, site: 0, context: 0, epoch: 0, cell: 0, level: 0 };
        Pending { addresses: [0; PLACES], chunks: [NONE; PLACES], count: 0 }
    }

    #[inline]
    fn place(address: u64) -> usize {
        ((address >> 4) ^ (address >> 12)) as usize % PLACES
    }

    /// Takes a chunk in, and returns the one that it displaces.
    #[inline]
    pub fn put(&mut self, chunk: Chunk) -> Option<Chunk> {
        let place = Self::place(chunk.address);
        let old = self.addresses[place];
        let displaced = if old != 0 { Some(self.chunks[place]) } else { None };
        self.count += (old == 0) as u32;
        self.addresses[place] = chunk.address;
        self.chunks[place] = chunk;
        displaced
    }

    /// Gives the chunk at an address out, if it is here.
    #[inline]
    pub fn take(&mut self, address: u64) -> Option<&Chunk> {
        let place = Self::place(address);
        if self.addresses[place] != address {
            return None;
        }
        self.addresses[place] = 0;
        self.count -= 1;
        Some(&self.chunks[place])
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes out any one chunk that `wanted` accepts, looking from place `from` on; the next look starts behind it.
    pub fn next(&mut self, from: &mut usize, wanted: impl Fn(&Chunk) -> bool) -> Option<Chunk> {
        while self.count > 0 && *from < PLACES {
            let place = *from;
            *from += 1;
            if self.addresses[place] != 0 && wanted(&self.chunks[place]) {
                self.addresses[place] = 0;
                self.count -= 1;
                return Some(self.chunks[place]);
            }
        }
        None
    }

    pub fn clear(&mut self) {
        self.addresses.fill(0);
        self.count = 0;
    }
}
