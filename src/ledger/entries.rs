//! What the ledger's tables are made of.

use super::table::Entry;

/// Addresses of a stretch of memory share all bits from this one on.
pub const STRETCH: u32 = 10;
const GRAIN: u64 = 1 << super::filter::GRAIN;

/// The bit of an address's grain among those of its stretch.
#[inline]
pub fn grain(address: u64) -> u64 {
    const _: () = assert!(1 << STRETCH == 64 * GRAIN);
    1 << (address / GRAIN % 64)
}

/// What the addresses of a stretch have in common that lie at the same place in their grains.
#[inline]
fn base(address: u64) -> u64 {
    address & !(63 * GRAIN)
}

/// Chunks that are followed until they are freed or their context is reset or deleted: those of one stretch that are
/// alike in all but their grain. What leaks, leaks side by side, so that eight of them need no more room than one.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Record {
    pub base: u64,
    /// A bit for each grain in which one begins; 0: unused.
    pub chunks: u64,
    /// Requested bytes of each in the low 56 bits, index of the sampling rate in the high 8.
    pub size_level: u64,
    pub site: u32,
    pub context: u32,
    pub epoch: u32,
    /// Neighbours in the list of the context, 0 at the ends.
    pub previous: u32,
    pub next: u32,
    pub chain: u32,
}

impl Record {
    /// Of one chunk.
    #[inline(always)]
    pub fn of(address: u64, size: u64, level: u8, site: u32, context: u32, epoch: u32) -> Self {
        let size_level = size & ((1 << 56) - 1) | (level as u64) << 56;
        let (base, chunks) = (base(address), grain(address));
        Record { base, chunks, size_level, site, context, epoch, previous: 0, next: 0, chain: 0 }
    }

    #[inline]
    pub fn has(&self, address: u64) -> bool {
        self.base == base(address) && self.chunks & grain(address) != 0
    }

    #[inline]
    pub fn is_like(&self, other: &Record) -> bool {
        (self.base, self.size_level, self.site, self.context, self.epoch)
            == (other.base, other.size_level, other.site, other.context, other.epoch)
    }

    /// Chunks in it.
    pub fn count(&self) -> u32 {
        self.chunks.count_ones()
    }

    /// Of its chunks.
    pub fn addresses(&self) -> impl Iterator<Item = u64> + use<> {
        let (base, chunks) = (self.base, self.chunks);
        (0..64).filter(move |grain| chunks >> grain & 1 != 0).map(move |grain| base + grain * GRAIN)
    }

    pub fn size(&self) -> u64 {
        self.size_level & ((1 << 56) - 1)
    }

    pub fn level(&self) -> u8 {
        (self.size_level >> 56) as u8
    }
}

/// A context that holds chunks, or held some since it was made.
#[derive(Clone, Copy, Default)]
pub struct Context {
    pub address: u64,
    /// Of the chunks in it that are followed: neither scaled nor rounded.
    pub bytes: u64,
    /// So many chunks had been taken in as pending when it was last reset, or made: none of them is one of its own.
    pub passed: u64,
    pub path: u32,
    pub chunks: u32,
    /// Of its records.
    pub head: u32,
    pub chain: u32,
}

impl Entry for Context {
    fn key(&self) -> u64 {
        self.address
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }
}

/// From (stack, path) to the id of the account.
#[derive(Clone, Copy, Default)]
pub struct SiteKey {
    pub stack_path: u64,
    pub site: u32,
    pub chain: u32,
    pub cell: u16,
}

impl Entry for SiteKey {
    fn key(&self) -> u64 {
        self.stack_path
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }
}
