//! Contexts that were built under a transient parent and then moved below a long-lived one: cached plans, relation
//! descriptors. The first of a name is found here, already filled; its name is learned, so that all later ones are
//! watched from birth.

use crate::hook;
use crate::pg_compat::MemoryContext;
use pgrx::pg_sys;

/// A move puts a context before its new siblings: as many of them as are looked at.
const NEIGHBOURS: usize = 16;

/// The first children of the long-lived contexts that others move to, as last seen.
pub struct Moved([MemoryContext; 2]);

impl Moved {
    pub const fn new() -> Self {
        Moved([std::ptr::null_mut(); 2])
    }

    /// Learns from what has moved since the last look. Between two statements; a few loads when nothing has.
    ///
    /// # Safety
    /// The tree is consistent.
    #[inline]
    pub unsafe fn look(&mut self) {
        // SAFETY: the links of a consistent tree.
        unsafe {
            for (last, parent) in self.0.iter_mut().zip([pg_sys::CacheMemoryContext, pg_sys::TopMemoryContext]) {
                if !parent.is_null() && *last != (*parent).firstchild {
                    *last = (*parent).firstchild;
                    learn_from(*last);
                }
            }
        }
    }
}

/// # Safety
/// As for `look`.
#[cold]
unsafe fn learn_from(first: MemoryContext) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut context = first;
        for _ in 0..NEIGHBOURS {
            if context.is_null() {
                return;
            }
            if hook::long_lived(context) {
                adopt(context);
            }
            context = (*context).nextchild;
        }
    }
}

/// Watches a context that has moved, and its children.
///
/// # Safety
/// A live context in a consistent tree, on its pass table though it is long-lived.
pub unsafe fn adopt(context: MemoryContext) {
    // SAFETY: the caller's promise.
    unsafe {
        hook::learn((*context).name);
        hook::watch(context);
        let mut child = (*context).firstchild;
        while !child.is_null() {
            if hook::long_lived(child) {
                adopt(child);
            }
            child = (*child).nextchild;
        }
    }
}
