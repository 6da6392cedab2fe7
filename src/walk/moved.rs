//! Contexts that were built under a transient parent and then moved below a long-lived one: cached plans, relation
//! descriptors. The first of a name is found here, already filled; its name is learned, so that all later ones are
//! watched from birth, and their books move with them.

use crate::hook;
use crate::ledger::Due;
use crate::pg_compat::MemoryContext;
use crate::process::Process;
use pgrx::pg_sys;

/// A move puts a context before its new siblings: as many of them as are looked at.
const NEIGHBOURS: usize = 16;

/// The first children of the long-lived contexts that others move to, as last seen.
pub struct Moved([MemoryContext; 2]);

impl Moved {
    pub const fn new() -> Self {
        Moved([std::ptr::null_mut(); 2])
    }
}

/// Learns from what has moved since the last look. Between two statements; a few loads when nothing has moved.
///
/// # Safety
/// The tree is consistent.
#[inline(always)]
pub unsafe fn look(process: &mut Process) {
    // SAFETY: the links of a consistent tree, which has a root.
    unsafe {
        let (caches, [of_caches, of_top]) = (pg_sys::CacheMemoryContext, process.walk.moved.0);
        if (caches.is_null() || (*caches).firstchild == of_caches) && (*pg_sys::TopMemoryContext).firstchild == of_top {
            return;
        }
        look_closer(process);
    }
}

/// # Safety
/// As for `look`.
#[inline(never)]
unsafe fn look_closer(process: &mut Process) {
    // SAFETY: the links of a consistent tree.
    unsafe {
        for (i, parent) in [pg_sys::CacheMemoryContext, pg_sys::TopMemoryContext].into_iter().enumerate() {
            if parent.is_null() {
                continue;
            }
            let last = process.walk.moved.0[i];
            let mut first = (*parent).firstchild;
            if first == last {
                continue;
            }
            // It comes and goes with each transaction.
            if !first.is_null() && first == pg_sys::TopTransactionContext {
                first = (*first).nextchild;
            }
            if first != last {
                process.walk.moved.0[i] = first;
                look_at_new(process, first, last);
            }
        }
    }
}

/// # Safety
/// As for `look`.
#[cold]
unsafe fn look_at_new(process: &mut Process, first: MemoryContext, last: MemoryContext) {
    // SAFETY: the caller's promise.
    unsafe {
        // What a moved context holds can move with it only where it has records.
        process.flush(Due::Look);
        let mut context = first;
        for _ in 0..NEIGHBOURS {
            if context.is_null() || context == last {
                return;
            }
            if hook::long_lived(context) {
                adopt(context);
            }
            if hook::is_learned((*context).name) {
                follow(process, context);
            }
            context = (*context).nextchild;
        }
    }
}

/// The books of a context and its children go where these are now.
///
/// # Safety
/// As for `look`.
unsafe fn follow(process: &mut Process, context: MemoryContext) {
    let Some(share) = process.share else { return };
    // SAFETY: the caller's promise.
    unsafe {
        hook::each_context_from(context, |context, _| {
            let watched = hook::table_of(context) == hook::Table::Watch;
            if watched {
                let path = super::path::path_of(context, &share);
                super::reparent(process, context, path);
            }
            watched
        });
    }
}

/// Watches a context that has moved, and its children.
///
/// # Safety
/// A live context in a consistent tree, on its pass table though it is long-lived.
pub unsafe fn adopt(context: MemoryContext) {
    // SAFETY: the caller's promise; a parent is watched before its children are asked about.
    unsafe {
        hook::each_context_from(context, |child, _| {
            let adopted = child == context || hook::long_lived(child);
            if adopted {
                hook::learn((*child).name);
                hook::watch(child);
            }
            adopted
        });
    }
}
