//! Memory for when there is none. Rust ends the process when its heap cannot grow, and a server process that ends so
//! takes all others with it. Therefore, while rheap answers, a mapping is held in reserve (address space alone, until
//! it is touched): what the heap has no room for is taken from there, and at the next safe place the answer is given up
//! with an ERROR like any other for want of memory.
//!
//! What the server allocates for the answer meets its own limit, and there pgrx must be able to copy the server's error,
//! or it tries for ever until the server panics. So at each safe place there has to be room for that and for all that is
//! small; what is large is asked for before; and a ballast is let go when there is not, so that the ERROR has room itself.
//!
//! Only what is larger than all of the reserve is refused at once: then the ERROR is raised from where it is, and what
//! the answer had in memory until then stays lost to the session. That is still better than the end of all sessions.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::*};

/// More than any answer takes between two safe places.
const SIZE: usize = 64 << 20;

/// Bytes that the server takes between two safe places, for all that is small.
const ROOM: usize = 512 << 10;
const BALLAST: usize = 2 * ROOM;

/// The heap of this library, and of nobody else in the process.
pub struct Heap;

struct Reserve {
    /// Null: there is none.
    base: AtomicPtr<u8>,
    /// From here on it is unused.
    used: AtomicUsize,
    /// Pieces of it that are in use.
    pieces: AtomicUsize,
    /// Something was taken from it.
    touched: AtomicBool,
    /// Null: there is none.
    ballast: AtomicPtr<u8>,
    /// In an answer, what raises the ERROR; null: none may be raised. By this way, since tests have no server to link.
    raise: AtomicPtr<()>,
}

static RESERVE: Reserve = Reserve::new();

impl Reserve {
    const fn new() -> Self {
        Reserve {
            base: AtomicPtr::new(std::ptr::null_mut()),
            used: AtomicUsize::new(0),
            pieces: AtomicUsize::new(0),
            touched: AtomicBool::new(false),
            ballast: AtomicPtr::new(std::ptr::null_mut()),
            raise: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// False when there is no address space for it, or when too much of it is lost.
    fn map(&self) -> bool {
        if !self.base.load(Relaxed).is_null() {
            return self.pieces.load(Relaxed) == 0 || self.used.load(Relaxed) < SIZE / 2;
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return false;
        }
        self.used.store(0, Relaxed);
        self.base.store(base.cast(), Relaxed);
        true
    }

    /// Gives it back, unless something that lives lies in it.
    fn unmap(&self) {
        self.touched.store(false, Relaxed);
        if self.pieces.load(Relaxed) == 0 {
            let base = self.base.swap(std::ptr::null_mut(), Relaxed);
            if !base.is_null() {
                // SAFETY: it is this reserve's alone, and nothing in it is in use.
                unsafe { libc::munmap(base.cast(), SIZE) };
            }
        }
    }

    /// Null when it has no room.
    #[cold]
    fn take(&self, layout: Layout) -> *mut u8 {
        let base = self.base.load(Relaxed);
        if base.is_null() {
            return base;
        }
        self.touched.store(true, Relaxed);
        let start = self.used.load(Relaxed).next_multiple_of(layout.align());
        match start.checked_add(layout.size()).filter(|&end| end <= SIZE) {
            Some(end) => {
                self.used.store(end, Relaxed);
                self.pieces.fetch_add(1, Relaxed);
                base.wrapping_add(start)
            }
            None => std::ptr::null_mut(),
        }
    }

    /// What was taken last makes room again; the rest when the last piece of all is given back.
    #[cold]
    fn give_back(&self, pointer: *mut u8, size: usize) {
        if self.is_last(pointer, size) {
            self.used.fetch_sub(size, Relaxed);
        }
        if self.pieces.fetch_sub(1, Relaxed) == 1 {
            self.used.store(0, Relaxed);
        }
    }

    /// Whether a piece has another size now, in its place.
    #[cold]
    fn resize(&self, pointer: *mut u8, from: usize, to: usize) -> bool {
        let fits = self.is_last(pointer, from) && to <= SIZE - (self.used.load(Relaxed) - from);
        if fits {
            self.used.store(self.used.load(Relaxed) - from + to, Relaxed);
        }
        fits
    }

    fn is_last(&self, pointer: *mut u8, size: usize) -> bool {
        pointer as usize + size == self.base.load(Relaxed) as usize + self.used.load(Relaxed)
    }

    #[inline]
    fn has(&self, pointer: *mut u8) -> bool {
        let base = self.base.load(Relaxed);
        !base.is_null() && (pointer as usize).wrapping_sub(base as usize) < SIZE
    }
}

/// Where the heap itself has failed.
#[cold]
fn instead(layout: Layout) -> *mut u8 {
    let pointer = RESERVE.take(layout);
    let raise = RESERVE.raise.load(Relaxed);
    if pointer.is_null() && !raise.is_null() {
        // SAFETY: `begin` has put such a function there.
        let raise: fn() = unsafe { std::mem::transmute(raise) };
        raise();
    }
    pointer
}

// SAFETY: everything is the system's heap, but for pieces of the reserve, which no one else is given while they are in
// use. A server process has one thread; where there are more, as in tests, there is no reserve.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let pointer = unsafe { System.alloc(layout) };
        if pointer.is_null() { instead(layout) } else { pointer }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise; a piece has the size that was asked for.
        unsafe {
            let mut pointer = System.alloc_zeroed(layout);
            if pointer.is_null() {
                pointer = instead(layout);
                if !pointer.is_null() {
                    pointer.write_bytes(0, layout.size());
                }
            }
            pointer
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if RESERVE.has(pointer) {
            RESERVE.give_back(pointer, layout.size());
        } else {
            // SAFETY: the caller's promise.
            unsafe { System.dealloc(pointer, layout) };
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise; both old and new have room for what is copied.
        unsafe {
            if !RESERVE.has(pointer) {
                let new = System.realloc(pointer, layout, size);
                if !new.is_null() {
                    return new;
                }
            } else if RESERVE.resize(pointer, layout.size(), size) {
                return pointer;
            }
            let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !new.is_null() {
                new.copy_from_nonoverlapping(pointer, size.min(layout.size()));
                self.dealloc(pointer, layout);
            }
            new
        }
    }
}

/// Holds the reserve for as long as it lives, where an ERROR must not be raised. None when there is no room for it.
pub struct Held;

pub fn hold() -> Option<Held> {
    RESERVE.map().then_some(Held)
}

impl Drop for Held {
    fn drop(&mut self) {
        if RESERVE.raise.load(Relaxed).is_null() {
            RESERVE.unmap();
        }
    }
}

/// Whether the server's heap has so many bytes, and room for what is small.
pub fn has_room(bytes: usize) -> bool {
    // SAFETY: given back at once, untouched.
    unsafe {
        let memory = libc::malloc(bytes + ROOM);
        libc::free(memory);
        !memory.is_null()
    }
}

/// Lets the ballast go: what there is no room for otherwise is the ERROR that says so.
pub fn lighten() {
    // SAFETY: from malloc, and nobody else's; free takes NULL.
    unsafe { libc::free(RESERVE.ballast.swap(std::ptr::null_mut(), Relaxed).cast()) };
}

/// An answer begins. False when there is no room for the reserve: then it must not.
pub fn begin() -> bool {
    let mut mapped = RESERVE.map();
    if mapped && RESERVE.ballast.load(Relaxed).is_null() {
        // SAFETY: it is never touched.
        RESERVE.ballast.store(unsafe { libc::malloc(BALLAST) }.cast(), Relaxed);
        mapped = !RESERVE.ballast.load(Relaxed).is_null();
    }
    RESERVE.touched.store(false, Relaxed);
    let raise = if mapped { crate::pg_compat::raise_out_of_memory as *mut () } else { std::ptr::null_mut() };
    RESERVE.raise.store(raise, Relaxed);
    mapped
}

/// All answers of the statement have been given.
pub fn end() {
    RESERVE.raise.store(std::ptr::null_mut(), Relaxed);
    lighten();
    RESERVE.unmap();
}

/// The heap has failed since the answer began.
pub fn is_touched() -> bool {
    RESERVE.touched.load(Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_used_up_and_comes_back() {
        let reserve = Reserve::new();
        let layout = |size, align| Layout::from_size_align(size, align).unwrap();
        assert!(reserve.take(layout(8, 8)).is_null(), "there is none");
        assert!(reserve.map() && reserve.map());
        let (a, b) = (reserve.take(layout(3, 1)), reserve.take(layout(64, 64)));
        assert!(reserve.has(a) && reserve.has(b) && (b as usize).is_multiple_of(64) && b > a);
        // SAFETY: a piece of this size.
        unsafe { b.write_bytes(7, 64) };
        assert!(reserve.take(layout(SIZE, 1)).is_null());
        assert!(!reserve.take(layout(SIZE - 128, 1)).is_null());
        assert!(reserve.touched.load(Relaxed));
        reserve.unmap();
        assert!(reserve.has(a), "something in it is in use");
        assert!(!reserve.map(), "most of it is lost");
        reserve.pieces.store(0, Relaxed);
        reserve.used.store(0, Relaxed);
        let pieces: Vec<_> = (0..4).map(|_| reserve.take(layout(1024, 8))).collect();
        assert!(reserve.map() && pieces[0] == a);
        assert!(reserve.resize(pieces[3], 1024, 2048) && !reserve.resize(pieces[2], 1024, 2048));
        assert!(!reserve.resize(pieces[3], 2048, SIZE), "so much is not there");
        reserve.give_back(pieces[3], 2048);
        assert_eq!(reserve.take(layout(8, 8)), pieces[3], "what was taken last is free again");
        for (&piece, size) in pieces.iter().zip([1024, 1024, 1024, 8]) {
            reserve.give_back(piece, size);
        }
        assert_eq!(reserve.take(layout(3, 1)), a, "all of it is free again");
        reserve.give_back(a, 3);
        reserve.unmap();
        assert!(!reserve.has(a));
    }

    #[test]
    fn a_heap_that_grows_keeps_what_is_in_it() {
        let mut text = String::new();
        for i in 0..10_000 {
            text.push_str(&i.to_string());
        }
        assert!(text.starts_with("0123456789101112") && text.ends_with("99989999"));
    }
}
