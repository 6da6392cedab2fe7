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
        let wanted =
            (self.bytes / 8).next_multiple_of(PAGE).max(FIRST_GROWTH.max(size_of::<T>().next_multiple_of(PAGE)));
        let more = wanted.min(left);
        if more < PAGE || more < size_of::<T>() {
            return false;
        }
        let bytes = self.bytes + more;
        // SAFETY: plain system calls on a mapping that belongs to this region alone. MAYMOVE is fine because
        // elements are reached through the base only, never by a kept reference.
        let base = unsafe {
            match self.base {
                None => libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                ),
                Some(base) => libc::mremap(base.as_ptr().cast(), self.bytes, bytes, libc::MREMAP_MAYMOVE),
            }
        };
        if base == libc::MAP_FAILED {
            return false;
        }
        self.base = NonNull::new(base.cast());
        self.bytes = bytes;
        self.capacity = bytes / size_of::<T>();
        budget.used += more;
        true
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
