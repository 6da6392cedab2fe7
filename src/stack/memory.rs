//! The stacks met lately, each with the places of its return addresses: a stack that recurs is recognised by looking
//! at these places instead of being walked.
//!
//! From one return address to the next, a walk depends on the addresses alone (a frame has the size that the
//! compiler gave it there). So when the stack pointer and every return address are the same, the walk would be too.
//!
//! Of an address its low half is looked at. To be taken for another, a function would have to be called at the same
//! depth of the same stack from two places that lie a multiple of 4 GiB apart, to the byte.

use std::mem::offset_of;

use super::unwind::Trace;
use crate::ledger::Holder;

/// Longer stacks are walked each time.
const LONGEST: usize = 48;
const ENTRIES: usize = 512;
const WAYS: usize = 4;
/// Places are compared in groups of this many.
const GROUP: usize = 8;
/// All of them, and the innermost.
const PLACES: usize = LONGEST + GROUP;

/// What the ledger has found out about a stack in the context that it last allocated in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Home {
    pub context: u64,
    /// Of the ledger, when it was found out.
    pub changes: u32,
    pub holder: Holder,
}

#[repr(C, align(64))]
pub struct Remembered {
    /// From the stack pointer; the first is that of the innermost address.
    offsets: [i32; PLACES],
    /// The low halves of the addresses that lie there.
    expected: [u32; PLACES],
    sp: u64,
    /// Places, in whole groups.
    places: u32,
    pub stack: u32,
    pub home: Home,
    /// The stack that was met after this one lately: where it lies among the entries, in bytes.
    next: usize,
}

#[repr(C)]
pub struct Memory {
    entries: [Remembered; ENTRIES],
    /// Tells which of four is given away next.
    turn: usize,
    /// The stack that was met last: where it lies among the entries, in bytes.
    last: usize,
    /// Return addresses at and above this place stay what they are for as long as the process lives; 0: unknown.
    anchor: u64,
}

const NOTHING: Remembered = Remembered {
    offsets: [0; PLACES],
    expected: [0; PLACES],
    sp: 0,
    places: 0,
    stack: 0,
    home: Home { context: 0, changes: 0, holder: Holder::new(0, 0) },
    next: 0,
};

impl Memory {
    pub const fn new() -> Self {
        Memory { entries: [NOTHING; ENTRIES], turn: 0, last: 0, anchor: 0 }
    }

    /// The first of the places of a stack; the others are its neighbours.
    #[inline(always)]
    fn place(sp: u64, key: u64) -> usize {
        ((key ^ sp).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 55) as usize % ENTRIES
    }

    /// The stack from this stack pointer on, if it is the one that followed the last one before, as
    /// it does where one statement is like another.
    ///
    /// # Safety
    /// `sp` is that of a call in progress on this process's stack. With `GATHER` the processor gathers.
    #[inline(always)]
    pub unsafe fn recall_next<const GATHER: bool>(&mut self, sp: u64) -> Option<&Remembered> {
        // SAFETY: `last` and every `next` are those of entries. The places were inside this process's stack when it was
        // walked from the same stack pointer, and what is above a stack pointer stays mapped.
        unsafe {
            let entries = self.entries.as_mut_ptr();
            let next = (*entries.byte_add(self.last)).next;
            let entry = &*entries.byte_add(next);
            if entry.sp != sp || !entry.still_there::<GATHER>(sp) {
                return None;
            }
            self.last = next;
            Some(entry)
        }
    }

    /// The same if it was met before with the same `key`, at any time lately. From now on it is what follows the last one.
    ///
    /// # Safety
    /// As for `recall_next`.
    #[inline(always)]
    pub unsafe fn recall<const GATHER: bool>(&mut self, sp: u64, key: u64) -> Option<&mut Remembered> {
        // SAFETY: the caller's promise.
        let at = unsafe { self.find::<GATHER>(sp, key) }?;
        self.meet(at);
        Some(&mut self.entries[at % ENTRIES])
    }

    /// The same where nothing follows anything: only reads.
    ///
    /// # Safety
    /// As for `recall_next`.
    pub unsafe fn look_up(&mut self, sp: u64, key: u64) -> Option<&mut Remembered> {
        // SAFETY: the caller's promise.
        let at = unsafe { self.find::<false>(sp, key) }?;
        Some(&mut self.entries[at % ENTRIES])
    }

    /// # Safety
    /// As for `recall_next`.
    #[inline(always)]
    unsafe fn find<const GATHER: bool>(&self, sp: u64, key: u64) -> Option<usize> {
        let place = Self::place(sp, key);
        // SAFETY: as in `recall_next`.
        (0..WAYS).map(|way| place ^ way).find(|at| unsafe {
            let entry = &self.entries[at % ENTRIES];
            entry.sp == sp && entry.still_there::<GATHER>(sp)
        })
    }

    /// From now on this stack is what follows the last one, and is the last one.
    #[inline(always)]
    fn meet(&mut self, at: usize) {
        let there = at * size_of::<Remembered>();
        // SAFETY: `last` is that of an entry.
        unsafe { (*self.entries.as_mut_ptr().byte_add(self.last)).next = there };
        self.last = there;
    }

    /// Remembers a walked stack under its id, unless it is too long.
    pub fn learn(&mut self, sp: u64, key: u64, trace: &Trace, stack: u32) -> Option<&mut Remembered> {
        if trace.frames() > LONGEST {
            return None;
        }
        let place = Self::place(sp, key);
        let free = (0..WAYS).map(|way| place ^ way).find(|&i| self.entries[i].sp == 0);
        self.turn = self.turn.wrapping_add(1);
        let entry = &mut self.entries[free.unwrap_or(place ^ (self.turn % WAYS))];
        entry.sp = 0;
        entry.stack = stack;
        entry.home = Home::default();
        // The innermost address fills the last group.
        entry.offsets.fill(0);
        entry.expected.fill(trace.addresses()[0] as u32);
        let mut places = 0;
        for (&address, &slot) in trace.addresses().iter().zip(trace.slots()) {
            if self.anchor != 0 && slot >= self.anchor {
                break;
            }
            entry.offsets[places] = i32::try_from(slot - sp).ok()?;
            entry.expected[places] = address as u32;
            places += 1;
        }
        entry.places = places.next_multiple_of(GROUP) as u32;
        entry.sp = sp;
        Some(entry)
    }

    /// What is learned from now on is only looked at below `anchor`.
    pub fn set_anchor(&mut self, anchor: u64) {
        self.anchor = anchor;
    }

    pub fn has_anchor(&self) -> bool {
        self.anchor != 0
    }

    /// Forgets all, the anchor too.
    pub fn clear(&mut self) {
        self.anchor = 0;
        self.forget();
    }

    /// Forgets the stacks. The anchor is the server's own code, which is never unloaded.
    pub fn forget(&mut self) {
        // Memory that a child has from its parent and has not touched yet should stay so.
        self.entries.iter_mut().filter(|entry| entry.sp != 0).for_each(|entry| entry.sp = 0);
    }
}

impl Remembered {
    /// # Safety
    /// All places are readable from this stack pointer. With `GATHER` the processor gathers.
    #[inline(always)]
    unsafe fn still_there<const GATHER: bool>(&self, sp: u64) -> bool {
        // SAFETY: `places` is at most PLACES; the caller's promise holds for each.
        unsafe {
            if GATHER {
                return self.gather(sp);
            }
            let mut differ = 0;
            for i in 0..self.places as usize {
                let place = sp.wrapping_add_signed(*self.offsets.get_unchecked(i) as i64) as *const u32;
                differ |= place.read() ^ *self.expected.get_unchecked(i);
            }
            differ == 0
        }
    }

    /// # Safety
    /// As for `still_there`, on a processor with AVX2.
    #[inline(always)]
    unsafe fn gather(&self, sp: u64) -> bool {
        // In what a group of places differs, from place `i` on or from the first on. A group is read at once.
        macro_rules! group {
            ($into:literal, $i:literal) => {
                concat!(
                    concat!("vmovdqu ymm1, [{entry} + ", $i, "{offsets}]\n"),
                    "vpcmpeqd ymm2, ymm2, ymm2\n",
                    concat!("vpgatherdd ", $into, ", [{sp} + ymm1], ymm2\n"),
                    concat!("vpxor ", $into, ", ", $into, ", [{entry} + ", $i, "{expected}]\n"),
                )
            };
        }
        let different: u8;
        // SAFETY: reads the places and the two arrays, a group at a time and at least one group; writes registers.
        unsafe {
            std::arch::asm!(
                group!("ymm0", ""),
                "mov {i:e}, 8",
                "cmp [{entry} + {places}], {i:e}",
                "jbe 3f",
                "2:",
                group!("ymm3", "{i} * 4 + "),
                "vpor ymm0, ymm0, ymm3",
                "add {i:e}, 8",
                "cmp [{entry} + {places}], {i:e}",
                "ja 2b",
                "3:",
                "vptest ymm0, ymm0",
                "setnz {different}",
                "vzeroupper",
                entry = in(reg) self,
                sp = in(reg) sp,
                i = out(reg) _,
                offsets = const offset_of!(Remembered, offsets),
                expected = const offset_of!(Remembered, expected),
                places = const offset_of!(Remembered, places),
                different = lateout(reg_byte) different,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                options(nostack, readonly),
            );
        }
        different == 0
    }
}

/// Whether the processor reads scattered places faster with one instruction than with several. Allocates: at load
/// only.
pub fn gathers() -> bool {
    // Some processors have it mended in microcode, which made it many times slower.
    let mended = std::fs::read_to_string("/sys/devices/system/cpu/vulnerabilities/gather_data_sampling")
        .is_ok_and(|state| state.contains("Microcode"));
    std::arch::is_x86_feature_detected!("avx2") && !mended
}
