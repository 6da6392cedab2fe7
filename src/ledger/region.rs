//! Memory of rheap's own: anonymous private mappings that grow in place or by `mremap`, under one budget.
//!
//! The hot path must not malloc, and a mapping can be dropped in a forked child by one system call.

use std::cell::UnsafeCell;
use std::ptr::NonNull;

/// What all regions of one process may use together, in bytes; and the nursery, in which the small ones lie together:
/// most processes fill few of them with little, and each mapping costs a system call, page faults of its own, and a
/// part of every later fork.
#[derive(Debug)]
pub struct Budget {
    pub limit: usize,
    pub used: usize,
    /// Forked children have it too.
    inherited: bool,
    nursery: Option<NonNull<u8>>,
    /// Bytes given out of it.
    taken: usize,
}

const PAGE: usize = 4096;
const FIRST_GROWTH: usize = 4 * PAGE;
const HUGE: usize = 2 << 20;
/// A region of this size is worth huge pages.
const HUGE_FROM: usize = 8 << 20;
const NURSERY: usize = 8 * PAGE;
/// A region in the nursery starts with this, doubles, and leaves when it needs more than the other.
const SMALLEST: usize = 512;
const LARGEST: usize = PAGE;

#[repr(align(64))]
struct Inherited(UnsafeCell<[u8; NURSERY]>);
// SAFETY: belongs to the one budget that is inherited.
unsafe impl Sync for Inherited {}
static INHERITED: Inherited = Inherited(UnsafeCell::new([0; NURSERY]));

impl Budget {
    /// For regions that are of no use to forked children, who do not get them: see [`Region::abandon`].
    pub const fn new(limit: usize) -> Self {
        Budget { limit, used: 0, inherited: false, nursery: None, taken: 0 }
    }

    /// For regions that forked children go on using. Its nursery is a part of the library's own memory, of which they
    /// have a copy anyway.
    ///
    /// # Safety
    /// The only one in the process.
    pub unsafe fn inherited(limit: usize) -> Self {
        Budget { limit, used: NURSERY, inherited: true, nursery: NonNull::new(INHERITED.0.get().cast()), taken: 0 }
    }

    fn left(&self) -> usize {
        self.limit.saturating_sub(self.used) / PAGE * PAGE
    }

    /// Zeroed bytes out of the nursery, or None when it has no more.
    fn nurse(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        if self.nursery.is_none() && self.left() >= NURSERY {
            self.nursery = self.map(NURSERY);
            self.used += if self.nursery.is_some() { NURSERY } else { 0 };
            self.taken = 0;
        }
        let nursery = self.nursery?;
        if self.taken == 0 {
            // A page that is read first costs another fault when it is written.
            // SAFETY: inside the mapping.
            unsafe { nursery.write_volatile(0) };
        }
        if self.taken + bytes > NURSERY {
            return None;
        }
        // SAFETY: inside the mapping.
        let given = unsafe { nursery.add(self.taken) };
        self.taken += bytes;
        Some(given)
    }

    /// A new private mapping.
    fn map(&self, bytes: usize) -> Option<NonNull<u8>> {
        let base = map(bytes, libc::PROT_READ | libc::PROT_WRITE);
        if base == libc::MAP_FAILED {
            return None;
        }
        if !self.inherited {
            // SAFETY: changes only what a fork does with the new mapping.
            unsafe { libc::madvise(base, bytes, libc::MADV_DONTFORK) };
        }
        NonNull::new(base.cast())
    }

    /// Forgets a nursery that belongs to the parent of a forked process, after its regions.
    pub fn abandon(&mut self) {
        self.used -= if self.nursery.take().is_some() { NURSERY } else { 0 };
    }

    /// Gives the nursery back, after its regions.
    pub fn release(&mut self) {
        if let Some(nursery) = self.nursery
            && !self.inherited
        {
            // SAFETY: the mapping belongs to this budget alone, and no region lies in it any more.
            unsafe { libc::munmap(nursery.as_ptr().cast(), NURSERY) };
            self.abandon();
        }
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.release();
    }
}

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
    /// It has a mapping of its own.
    mapped: bool,
}

impl<T: Copy> Region<T> {
    pub const fn new() -> Self {
        Region { base: None, bytes: 0, capacity: 0, mapped: false }
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
        if !self.mapped && self.grow_in_nursery(budget) {
            return true;
        }
        let unit = if self.bytes < HUGE_FROM { PAGE } else { HUGE };
        let wanted =
            (self.bytes / 8).next_multiple_of(unit).max(FIRST_GROWTH.max(size_of::<T>().next_multiple_of(PAGE)));
        let more = wanted.min(budget.left());
        let bytes = if self.mapped { self.bytes + more } else { more };
        if more < PAGE || bytes < self.bytes + size_of::<T>() {
            return false;
        }
        // SAFETY: the mapping belongs to this region alone. That it moves is fine because elements are reached through
        // the base only, never by a kept reference.
        let base = unsafe {
            match self.base {
                Some(base) if self.mapped && bytes >= HUGE_FROM => remap_huge(base.cast(), self.bytes, bytes),
                Some(base) if self.mapped => remap(base.cast(), self.bytes, bytes),
                _ => budget.map(bytes),
            }
        };
        let Some(base) = base else { return false };
        if !self.mapped {
            self.copy_to(base);
        }
        self.mapped = true;
        self.lie(base, bytes);
        budget.used += more;
        true
    }

    /// Twice the room, in the nursery.
    fn grow_in_nursery(&mut self, budget: &mut Budget) -> bool {
        let bytes = (self.bytes * 2).max(SMALLEST);
        if bytes > LARGEST || bytes < self.bytes + size_of::<T>() || align_of::<T>() > 8 {
            return false;
        }
        let Some(base) = budget.nurse(bytes) else { return false };
        self.copy_to(base);
        self.lie(base, bytes);
        true
    }

    fn copy_to(&self, to: NonNull<u8>) {
        if let Some(base) = self.base {
            // SAFETY: callers give new memory that is larger than what there is.
            unsafe { to.copy_from_nonoverlapping(base.cast(), self.bytes) };
        }
    }

    fn lie(&mut self, base: NonNull<u8>, bytes: usize) {
        self.base = Some(base.cast());
        self.bytes = bytes;
        self.capacity = bytes / size_of::<T>();
    }

    /// Forgets what belongs to the parent of a forked process, and which the child does not have: see [`Budget::new`].
    pub fn abandon(&mut self, budget: &mut Budget) {
        budget.used -= if self.mapped { self.bytes } else { 0 };
        (self.base, self.bytes, self.capacity, self.mapped) = (None, 0, 0, false);
    }

    /// Gives all memory back, but for what lies in the nursery. The next element starts from zero.
    pub fn release(&mut self, budget: &mut Budget) {
        if let Some(base) = self.base
            && self.mapped
        {
            // SAFETY: the mapping belongs to this region alone, and `abandon` forgets its address.
            unsafe { libc::munmap(base.as_ptr().cast(), self.bytes) };
        }
        self.abandon(budget);
    }
}

impl<T> Drop for Region<T> {
    fn drop(&mut self) {
        if let Some(base) = self.base
            && self.mapped
        {
            // SAFETY: as in `release`.
            unsafe { libc::munmap(base.as_ptr().cast(), self.bytes) };
        }
    }
}

/// A mapping with another length.
///
/// # Safety
/// It is the caller's alone.
unsafe fn remap(old: NonNull<u8>, bytes: usize, new: usize) -> Option<NonNull<u8>> {
    // SAFETY: the caller's promise.
    let base = unsafe { libc::mremap(old.as_ptr().cast(), bytes, new, libc::MREMAP_MAYMOVE) };
    if base == libc::MAP_FAILED { None } else { NonNull::new(base.cast()) }
}

/// The same at an address where the system can use huge pages, so that a table of many megabytes costs hundreds of page
/// faults and not a hundred thousand, and its look-ups fewer misses of the TLB.
///
/// # Safety
/// As for `remap`.
unsafe fn remap_huge(old: NonNull<u8>, bytes: usize, new: usize) -> Option<NonNull<u8>> {
    let from: *mut libc::c_void = old.as_ptr().cast();
    // SAFETY: the new range is reserved first, so that the move replaces nothing; what of it is not used goes back.
    unsafe {
        if (from as usize).is_multiple_of(HUGE) && libc::mremap(from, bytes, new, 0) != libc::MAP_FAILED {
            return Some(old);
        }
        let reserved = map(new + HUGE, libc::PROT_NONE);
        if reserved == libc::MAP_FAILED {
            return remap(old, bytes, new);
        }
        let before = (reserved as usize).next_multiple_of(HUGE) - reserved as usize;
        let start = reserved.byte_add(before);
        let moved = libc::mremap(from, bytes, new, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, start);
        if before > 0 {
            libc::munmap(reserved, before);
        }
        libc::munmap(start.byte_add(new), HUGE - before);
        if moved == libc::MAP_FAILED {
            libc::munmap(start, new);
            return None;
        }
        libc::madvise(moved, new, libc::MADV_HUGEPAGE);
        NonNull::new(moved.cast())
    }
}
