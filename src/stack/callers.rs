//! Who called the allocator, told cheaply: the first return address, mixed with the second where that is known to lie
//! at a fixed place.

use super::Regs;

pub const CALLERS: usize = 256;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Caller {
    pub return_address: u64,
    /// Where the next return address lies, from the stack pointer.
    pub offset: u64,
}

/// Looked up by the low bits of the return address. An entry, once made, stays: the key of a caller never changes.
pub struct Callers(pub [Caller; CALLERS]);

impl Callers {
    pub const fn new() -> Self {
        Callers([Caller { return_address: 0, offset: 0 }; CALLERS])
    }

    /// The key of the caller at these registers. The hook's entry computes the same by itself.
    ///
    /// # Safety
    /// `regs` are those of a call in progress on this stack.
    #[inline]
    pub unsafe fn key(&self, regs: Regs) -> u64 {
        // SAFETY: the stack pointer points at the return address; the next lies above it, where it was found before
        // in a frame of the same function.
        unsafe {
            let address = *(regs.sp as *const u64);
            let caller = self.0[address as usize % CALLERS];
            if caller.return_address != address {
                return address;
            }
            address ^ *((regs.sp + caller.offset) as *const u64)
        }
    }

    /// Learns where the second return address lies. Frames larger than a page are left alone.
    pub fn learn(&mut self, return_address: u64, offset: u64) {
        let caller = &mut self.0[return_address as usize % CALLERS];
        if caller.return_address == 0 && offset < 4096 {
            *caller = Caller { return_address, offset };
        }
    }
}
