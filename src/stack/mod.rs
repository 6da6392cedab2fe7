//! From registers to a stack id: walks the stack without allocation or lock, and stores each stack once.

pub mod modules;
pub mod rules;
pub mod unwind;

use crate::ledger::region::Budget;
use crate::ledger::table::{Entry, Table};
use crate::share::Share;
use crate::share::dictionary;
pub use unwind::{MAX_FRAMES, Regs, Unwinder};

/// Last word of a stack whose walk ended before the process's first frame.
pub const CUT: u64 = u64::MAX;

/// Module and offset of a return address, as one word.
pub fn frame(module: u32, offset: u64) -> u64 {
    (module as u64) << 48 | offset & ((1 << 48) - 1)
}

/// Module and offset out of a word.
pub fn unframe(word: u64) -> (u32, u64) {
    ((word >> 48) as u32, word & ((1 << 48) - 1))
}

/// From the hash of raw return addresses to a stack id.
#[derive(Clone, Copy, Default)]
struct Known {
    hash: u64,
    stack: u32,
    chain: u32,
}

impl Entry for Known {
    fn key(&self) -> u64 {
        self.hash
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }
}

/// The stacks that this process has met. Valid in its children too, which have the same modules at the same places.
pub struct Stacks {
    known: Table<Known>,
    /// Return addresses of the walk at hand; kept, so that no capture has to clear it.
    raw: [u64; MAX_FRAMES],
}

impl Stacks {
    pub const fn new() -> Self {
        Stacks { known: Table::new(), raw: [0; MAX_FRAMES] }
    }

    /// The id of the stack at these registers, or 0 when the dictionary is full.
    #[inline]
    pub fn capture(
        &mut self,
        unwinder: &mut Unwinder,
        regs: Regs,
        depth: usize,
        share: &Share,
        budget: &mut Budget,
    ) -> u32 {
        let (frames, cut) = unwinder.walk(regs, &mut self.raw[..depth.min(MAX_FRAMES)], &share.modules);
        let hash = dictionary::hash(&self.raw[..frames]);
        match self.known.find(hash) {
            0 => self.learn(unwinder, frames, cut, hash, share, budget),
            id => self.known.get(id).stack,
        }
    }

    #[cold]
    fn learn(
        &mut self,
        unwinder: &mut Unwinder,
        mut frames: usize,
        cut: bool,
        hash: u64,
        share: &Share,
        budget: &mut Budget,
    ) -> u32 {
        let raw = &mut self.raw;
        for word in &mut raw[..frames] {
            *word = unwinder.modules.locate(*word, &share.modules).map_or(0, |(module, offset)| frame(module, offset));
        }
        if cut {
            frames = frames.min(MAX_FRAMES - 1);
            raw[frames] = CUT;
            frames += 1;
        }
        let stack = share.stacks.intern(&raw[..frames]);
        if stack != 0 {
            // Without memory for it the stack is only looked up again the slow way.
            self.known.insert(Known { hash, stack, chain: 0 }, budget);
        }
        stack
    }
}
