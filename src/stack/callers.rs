//! Who called the allocator, told cheaply: the first return address, mixed with the second where that is known to lie
//! at a fixed place.

pub const CALLERS: usize = 256;

/// Looked up by the low bits of the return address. An entry, once made, stays, so that the key of a caller never
/// changes, until some code is unloaded.
#[repr(C)]
pub struct Callers {
    pub addresses: [u64; CALLERS],
    /// Where the next return address lies, from the stack pointer.
    pub offsets: [u16; CALLERS],
}

impl Callers {
    pub const fn new() -> Self {
        Callers { addresses: [0; CALLERS], offsets: [0; CALLERS] }
    }

    /// The key of the caller of the allocator. The hook's entry computes the same by itself.
    ///
    /// # Safety
    /// `sp` is that of a call in progress on this stack.
    #[inline(always)]
    pub unsafe fn key(&self, sp: u64) -> u64 {
        // SAFETY: the stack pointer points at the return address; the next lies above it, where it was found before
        // in a frame of the same function.
        unsafe {
            let address = *(sp as *const u64);
            let place = address as usize % CALLERS;
            if self.addresses[place] != address {
                return address;
            }
            address ^ *((sp + self.offsets[place] as u64) as *const u64)
        }
    }

    /// Other code may lie where some of it lay.
    pub fn forget(&mut self) {
        self.addresses.fill(0);
    }

    /// Learns where the second return address lies. Frames larger than a page are left alone.
    pub fn learn(&mut self, return_address: u64, offset: u64) {
        let place = return_address as usize % CALLERS;
        if self.addresses[place] == 0 && offset < 4096 {
            self.addresses[place] = return_address;
            self.offsets[place] = offset as u16;
        }
    }
}
