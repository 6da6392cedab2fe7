//! What the ledger's tables are made of.

use super::table::Entry;

/// A chunk that is followed until it is freed or its context is reset or deleted.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Record {
    pub address: u64,
    /// Requested bytes in the low 56 bits, index of the sampling rate in the high 8.
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
    pub fn size(&self) -> u64 {
        self.size_level & ((1 << 56) - 1)
    }

    pub fn level(&self) -> u8 {
        (self.size_level >> 56) as u8
    }
}

/// A context that holds records, or held some since it was made.
#[derive(Clone, Copy, Default)]
pub struct Context {
    pub address: u64,
    /// Of live records, as they stand: neither scaled nor rounded.
    pub bytes: u64,
    pub path: u32,
    pub records: u32,
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
