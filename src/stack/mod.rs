//! From registers to a stack id: walks the stack without allocation or lock, and stores each stack once.

pub mod callers;
pub mod memory;
pub mod modules;
pub mod rules;
pub mod unwind;

use crate::ledger::region::Budget;
use crate::ledger::table::{Entry, Table};
use crate::share::Share;
use crate::share::dictionary;
use callers::Callers;
use memory::{Home, Memory, Remembered};
pub use unwind::{MAX_FRAMES, Regs, Trace, Unwinder};

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
/// What the first walk of a process writes lies together, at the end.
#[repr(C)]
pub struct Stacks {
    memory: Memory,
    known: Table<Known>,
    pub callers: Callers,
}

impl Stacks {
    pub const fn new() -> Self {
        Stacks { callers: Callers::new(), memory: Memory::new(), known: Table::new() }
    }

    /// The stack from this stack pointer on, if it is one of those met lately.
    ///
    /// # Safety
    /// `sp` is that of a call in progress on this process's stack. With `GATHER` the processor gathers.
    #[inline]
    pub unsafe fn recall<const GATHER: bool>(&mut self, sp: u64) -> Option<&mut Remembered> {
        // SAFETY: the caller's promise.
        unsafe {
            let key = self.callers.key(sp);
            self.memory.recall::<GATHER>(sp, key)
        }
    }

    /// The same where no stack is expected to follow another: only reads, as long as nothing is changed in what it returns.
    ///
    /// # Safety
    /// As for `recall`.
    pub unsafe fn look_up(&mut self, sp: u64) -> Option<&mut Remembered> {
        // SAFETY: the caller's promise.
        unsafe {
            let key = self.callers.key(sp);
            self.memory.look_up(sp, key)
        }
    }

    /// The same where it is most likely found: after the last one.
    ///
    /// # Safety
    /// As for `recall`.
    #[inline(always)]
    pub unsafe fn recall_next<const GATHER: bool>(&mut self, sp: u64) -> Option<&Remembered> {
        // SAFETY: the caller's promise.
        unsafe { self.memory.recall_next::<GATHER>(sp) }
    }

    /// Whether this processor gathers, as `recall_next` may be told. Allocates.
    pub fn gathers() -> bool {
        memory::gathers()
    }

    /// Walks the stack at these registers, and remembers it if that is wanted. Its id, or 0 when the dictionary is full; and the place
    /// for what the ledger finds out about it, unless it is too long to be remembered.
    ///
    /// # Safety
    /// `regs` are those of a call in progress on this process's stack.
    #[inline(never)]
    pub unsafe fn capture(
        &mut self,
        unwinder: &mut Unwinder,
        regs: Regs,
        depth: usize,
        remember: bool,
        share: &Share,
        budget: &mut Budget,
    ) -> (u32, Option<&mut Home>) {
        let mut trace = Trace::new();
        unwinder.walk(regs, depth, &mut trace, &share.modules);
        if unwinder.modules.unloaded {
            self.forget_unloaded(unwinder, budget);
            // Some of its rules may have been of what was there before.
            unwinder.walk(regs, depth, &mut trace, &share.modules);
        }
        if let (&[address, ..], &[_, slot, ..]) = (trace.addresses(), trace.slots()) {
            self.callers.learn(address, slot - regs.sp);
        }
        let hash = dictionary::hash(trace.addresses());
        let stack = match self.known.find(hash) {
            0 => self.learn(unwinder, &trace, hash, share, budget),
            id => self.known.get(id).stack,
        };
        if stack == 0 || trace.frames() == 0 || !remember {
            return (stack, None);
        }
        self.anchor(unwinder, &trace);
        // SAFETY: the caller's promise.
        let key = unsafe { self.callers.key(regs.sp) };
        (stack, self.memory.learn(regs.sp, key, &trace, stack).map(|r| &mut r.home))
    }

    /// The server's loop of statements is never left, so the frames below it, in a process that has such a loop, need
    /// not be looked at again.
    fn anchor(&mut self, unwinder: &Unwinder, trace: &Trace) {
        if self.memory.has_anchor() {
            return;
        }
        let (start, end) = unwinder.statement_loop;
        let inside = trace.addresses().iter().position(|&ip| ip > start && ip <= end);
        // The slot after the loop's own holds where the loop would return to.
        if let Some(anchor) = inside.and_then(|i| trace.slots().get(i + 1)) {
            self.memory.set_anchor(*anchor);
        }
    }

    /// A library was unloaded, and another may lie in its place: no address is what it was for certain.
    #[cold]
    fn forget_unloaded(&mut self, unwinder: &mut Unwinder, budget: &mut Budget) {
        unwinder.modules.unloaded = false;
        self.callers.forget();
        self.memory.forget();
        self.known.clear(budget);
    }

    /// On the clock: a stack that is remembered would not notice by itself that its code has been replaced.
    pub fn look_for_unloaded(&mut self, unwinder: &mut Unwinder, share: &Share, budget: &mut Budget) {
        unwinder.refresh(&share.modules);
        if unwinder.modules.unloaded {
            self.forget_unloaded(unwinder, budget);
        }
    }

    /// What was remembered was walked by other rules, or in another process.
    pub fn forget(&mut self) {
        self.memory.clear();
    }

    #[cold]
    fn learn(&mut self, unwinder: &mut Unwinder, trace: &Trace, hash: u64, share: &Share, budget: &mut Budget) -> u32 {
        let mut words = [0; MAX_FRAMES];
        let mut frames = trace.frames();
        for (word, &address) in words.iter_mut().zip(trace.addresses()) {
            *word =
                unwinder.modules.locate(address, &share.modules).map_or(0, |(module, offset)| frame(module, offset));
        }
        frames = collapse(&mut words[..frames.min(MAX_FRAMES)]);
        if trace.cut {
            frames = frames.min(MAX_FRAMES - 1);
            words[frames] = CUT;
            frames += 1;
        }
        let stack = share.stacks.intern(&words[..frames]);
        if stack != 0 {
            // Without memory for it the stack is only looked up again the slow way.
            self.known.insert(Known { hash, stack, chain: 0 }, budget);
        }
        stack
    }
}

/// The longest chain of functions calling each other that is recognised as one recursion.
const LONGEST_CYCLE: usize = 16;

/// Leaves out what repeats at once, so that recursion of any depth is one stack. Returns how many frames remain.
fn collapse<T: Copy + PartialEq>(frames: &mut [T]) -> usize {
    let mut kept = 0;
    for at in 0..frames.len() {
        frames[kept] = frames[at];
        kept += 1;
        let repeats = |&period: &usize| frames[kept - period..kept] == frames[kept - 2 * period..kept - period];
        if let Some(period) = (1..=LONGEST_CYCLE.min(kept / 2)).find(repeats) {
            kept -= period;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recursion_of_any_depth_is_one_stack() {
        let of = |text: &str| {
            let mut frames = text.as_bytes().to_vec();
            let kept = collapse(&mut frames);
            String::from_utf8(frames[..kept].to_vec()).unwrap()
        };
        assert_eq!(of("abcd"), "abcd");
        assert_eq!(of("abbbbbcd"), "abcd");
        assert_eq!(of("xabcabcabcd"), "xabcd");
        assert_eq!(of("xabab"), "xab");
        assert_eq!(of("aabbaabb"), "ab");
        let longer = "abcdefghijklmnopq".repeat(2);
        assert_eq!(of(&longer), longer, "longer than a recursion that is recognised");
    }
}
