//! Memory of rheap's own: anonymous private mappings that grow in place or by `mremap`, under one budget.
//!
//! The hot path must not malloc, and a mapping can be dropped in a forked child by one system call.

use std::ptr::NonNull;

/// What all regions of one process may use together, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    pub limit: usize,
    pub used: usize,
}

impl Budget {
    pub const fn new(limit: usize) -> Self {
        Budget { limit, used: 0 }
    }
}

const PAGE: usize = 4096;
const FIRST_GROWTH: usize = 4 * PAGE;
const HUGE: usize = 2 << 20;
/// A region of this size is worth huge pages.
const HUGE_FROM: usize = 8 << 20;

/// A new private mapping, or MAP_FAILED.
fn map(bytes: usize, access: libc::c_int) -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a plain system call that touches nothing there is.
    unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) }
}

/// A growable array of `T`. A fresh element is all zero bytes; `T` must allow that.
pub struct Region<T> {
    base: Option<NonNull<T>>,
    bytes: usize,
    capacity: usize,
}

impl<T: Copy> Region<T> {
    pub const fn new() -> Self {
        Region { base: None, bytes: 0, capacity: 0 }
    }

    /// Number of elements that are mapped.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    #[inline]
    pub fn get(&self, index: usize) -> &T {
        assert!(index < self.capacity);
        // SAFETY: the index is inside the mapping, which only `&mut self` moves, and zeroed bytes are a valid T.
        unsafe { &*self.base.unwrap_unchecked().as_ptr().add(index) }
    }

    #[inline]
    pub fn get_mut(&mut self, index: usize) -> &mut T {
        assert!(index < self.capacity);
        // SAFETY: as in `get`, and the borrow of self is exclusive.
        unsafe { &mut *self.base.unwrap_unchecked().as_ptr().add(index) }
    }

    /// Makes room for at least one element more than now, by about an eighth, within the budget.
    /// False when the budget or the system has no memory left; nothing has changed then.
    pub fn grow(&mut self, budget: &mut Budget) -> bool {
        let left = budget.limit.saturating_sub(budget.used) / PAGE * PAGE;
        let unit = if self.bytes < HUGE_FROM { PAGE } else { HUGE };
        let wanted =
            (self.bytes / 8).next_multiple_of(unit).max(FIRST_GROWTH.max(size_of::<T>().next_multiple_of(PAGE)));
        let more = wanted.min(left);
        if more < PAGE || more < size_of::<T>() {
            return false;
        }
        let bytes = self.bytes + more;
        // SAFETY: the mapping belongs to this region alone. That it moves is fine because elements are reached through
        // the base only, never by a kept reference.
        let base = unsafe { if bytes < HUGE_FROM { self.remap(bytes) } else { self.remap_huge(bytes) } };
        if base == libc::MAP_FAILED {
            return false;
        }
        self.base = NonNull::new(base.cast());
        self.bytes = bytes;
        self.capacity = bytes / size_of::<T>();
        budget.used += more;
        true
    }

    /// The mapping with another length, or MAP_FAILED.
    unsafe fn remap(&self, bytes: usize) -> *mut libc::c_void {
        // SAFETY: the caller's promise.
        unsafe {
            match self.base {
                None => map(bytes, libc::PROT_READ | libc::PROT_WRITE),
                Some(base) => libc::mremap(base.as_ptr().cast(), self.bytes, bytes, libc::MREMAP_MAYMOVE),
            }
        }
    }

    /// The same at an address where the system can use huge pages, so that a table of many megabytes costs hundreds of
    /// page faults and not a hundred thousand, and its look-ups fewer misses of the TLB.
    unsafe fn remap_huge(&self, bytes: usize) -> *mut libc::c_void {
        let Some(base) = self.base else {
            // SAFETY: the caller's promise.
            return unsafe { self.remap(bytes) };
        };
        let old: *mut libc::c_void = base.as_ptr().cast();
        // SAFETY: the new range is reserved first, so that the move replaces nothing; what of it is not used goes back.
        unsafe {
            if (old as usize).is_multiple_of(HUGE) && libc::mremap(old, self.bytes, bytes, 0) != libc::MAP_FAILED {
                return old;
            }
            let reserved = map(bytes + HUGE, libc::PROT_NONE);
            if reserved == libc::MAP_FAILED {
                return self.remap(bytes);
            }
            let before = (reserved as usize).next_multiple_of(HUGE) - reserved as usize;
            let start = reserved.byte_add(before);
            let moved = libc::mremap(old, self.bytes, bytes, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, start);
            if before > 0 {
                libc::munmap(reserved, before);
            }
            libc::munmap(start.byte_add(bytes), HUGE - before);
            if moved == libc::MAP_FAILED {
                libc::munmap(start, bytes);
                return moved;
            }
            libc::madvise(moved, bytes, libc::MADV_HUGEPAGE);
            moved
        }
    }

    /// Forgets a mapping that belongs to the parent of a forked process: it costs the child nothing, and giving it back
    /// would.
    pub fn abandon(&mut self, budget: &mut Budget) {
        budget.used -= self.bytes;
        (self.base, self.bytes, self.capacity) = (None, 0, 0);
    }

    /// Gives all memory back. The next element starts from zero.
    pub fn release(&mut self, budget: &mut Budget) {
        if let Some(base) = self.base.take() {
            // SAFETY: the mapping belongs to this region alone, and `take` forgot its address.
            unsafe { libc::munmap(base.as_ptr().cast(), self.bytes) };
            budget.used -= self.bytes;
            self.bytes = 0;
            self.capacity = 0;
        }
    }
}

impl<T> Drop for Region<T> {
    fn drop(&mut self) {
        if let Some(base) = self.base {
            // SAFETY: as in `release`.
            unsafe { libc::munmap(base.as_ptr().cast(), self.bytes) };
        }
    }
}
