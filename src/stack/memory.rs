//! The stacks met lately, each with the places of its return addresses: a stack that recurs is recognised by looking
//! at these places instead of being walked.
//!
//! From one return address to the next, a walk depends on the addresses alone (a frame has the size that the
//! compiler gave it there). So when the stack pointer and every return address are the same, the walk would be too.

use super::Regs;
use super::unwind::Trace;

/// Longer stacks are walked each time.
const LONGEST: usize = 64;
const SETS: usize = 128;
const WAYS: usize = 2;
/// Places are compared in groups of this many.
const GROUP: usize = 4;

/// What the ledger has found out about a stack in the context that it last allocated in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Home {
    pub context: u64,
    /// Of the ledger, when it was found out.
    pub changes: u32,
    pub context_id: u32,
    pub site: u32,
}

pub struct Remembered {
    sp: u64,
    innermost: u64,
    pub stack: u32,
    /// Groups of places.
    groups: u32,
    pub home: Home,
    /// From the stack pointer.
    offsets: [i32; LONGEST],
    expected: [u64; LONGEST],
}

pub struct Memory {
    entries: [Remembered; SETS * WAYS],
    /// Which way of a set was given away last.
    turn: [u8; SETS],
}

const NOTHING: Remembered = Remembered {
    sp: 0,
    innermost: 0,
    stack: 0,
    groups: 0,
    home: Home { context: 0, changes: 0, context_id: 0, site: 0 },
    offsets: [0; LONGEST],
    expected: [0; LONGEST],
};

impl Memory {
    pub const fn new() -> Self {
        Memory { entries: [NOTHING; SETS * WAYS], turn: [0; SETS] }
    }

    #[inline]
    fn set(regs: Regs, key: u64) -> usize {
        ((key ^ regs.sp.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 57) as usize % SETS
    }

    /// The entry of the stack at these registers, if it was met before with the same `key`.
    #[inline]
    pub fn recall(&mut self, regs: Regs, innermost: u64, key: u64) -> Option<&mut Remembered> {
        let first = Self::set(regs, key) * WAYS;
        for way in first..first + WAYS {
            let entry = &self.entries[way];
            // SAFETY: the places were inside this process's stack when it was walked from the same stack pointer,
            // and what is above a stack pointer stays mapped.
            if entry.sp == regs.sp && entry.innermost == innermost && unsafe { entry.still_there(regs.sp) } {
                return Some(&mut self.entries[way]);
            }
        }
        None
    }

    /// Remembers a walked stack under its id, unless it is too long.
    pub fn learn(&mut self, regs: Regs, key: u64, trace: &Trace, stack: u32) -> Option<&mut Remembered> {
        if trace.frames > LONGEST {
            return None;
        }
        let set = Self::set(regs, key);
        self.turn[set] = (self.turn[set] + 1) % WAYS as u8;
        let entry = &mut self.entries[set * WAYS + self.turn[set] as usize];
        entry.sp = regs.sp;
        entry.innermost = trace.addresses[0];
        entry.stack = stack;
        entry.home = Home::default();
        // The innermost address stands for itself, and fills the last group.
        entry.offsets.fill(0);
        entry.expected.fill(trace.addresses[0]);
        let others = trace.frames.saturating_sub(1);
        for i in 0..others {
            let Ok(offset) = i32::try_from(trace.slots[i + 1] - regs.sp) else {
                entry.sp = 0;
                return None;
            };
            entry.offsets[i] = offset;
            entry.expected[i] = trace.addresses[i + 1];
        }
        entry.groups = others.div_ceil(GROUP) as u32;
        Some(entry)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.sp = 0);
    }
}

impl Remembered {
    /// # Safety
    /// All places are readable from this stack pointer.
    #[inline(always)]
    unsafe fn still_there(&self, sp: u64) -> bool {
        for group in 0..self.groups as usize {
            let mut differ = 0;
            for i in group * GROUP..(group + 1) * GROUP {
                // SAFETY: there are at most LONGEST places; the caller's promise holds for each.
                unsafe {
                    let place = sp.wrapping_add_signed(*self.offsets.get_unchecked(i) as i64) as *const u64;
                    differ |= place.read() ^ *self.expected.get_unchecked(i);
                }
            }
            if differ != 0 {
                return false;
            }
        }
        true
    }
}
