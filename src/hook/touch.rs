//! The first palloc of a context: does it outlive the transaction?

use core::ffi::CStr;
use pgrx::pg_sys;

use super::tables::{self, Table};
use crate::pg_compat::MemoryContext;
use crate::settings;

/// Roots of what ends with a message, a transaction or a portal.
///
/// # Safety
/// A live context.
unsafe fn is_transient_root(context: MemoryContext) -> bool {
    // SAFETY: plain reads of the server's globals and of a live context, whose name is a static string.
    unsafe {
        context == pg_sys::MessageContext
            || context == pg_sys::TopTransactionContext
            || context == pg_sys::ErrorContext
            || ((*context).parent == pg_sys::TopMemoryContext
                && !(*context).name.is_null()
                // The server keeps this one in a static variable of portalmem.c.
                && CStr::from_ptr((*context).name) == c"TopPortalContext")
    }
}

/// Whether a context ends with a message, a transaction or a portal, judged by the tree as it is now.
///
/// # Safety
/// A live context in a consistent tree.
pub unsafe fn is_transient(context: MemoryContext) -> bool {
    // SAFETY: the parents of a live context are live.
    unsafe {
        let (mut at, mut below) = (context, context);
        while !at.is_null() {
            if is_transient_root(at) {
                return !is_kept_by_cursor(below);
            }
            if is_replication(at) {
                return false;
            }
            // One comparison settles it as soon as an ancestor has been touched.
            if at != context {
                match tables::table_of(at) {
                    Table::Pass => return true,
                    Table::Watch => return false,
                    Table::Base | Table::Foreign => (),
                }
            }
            below = at;
            at = (*at).parent;
        }
        false
    }
}

/// Whether a context holds the rows of a cursor WITH HOLD: among the portals, but not for one transaction.
///
/// # Safety
/// A live context.
unsafe fn is_kept_by_cursor(context: MemoryContext) -> bool {
    // SAFETY: a plain read of a live context, whose name is a static string.
    unsafe { !(*context).name.is_null() && CStr::from_ptr((*context).name) == c"PortalHoldContext" }
}

/// Whether a context is that of a command of replication: a sender runs one, for as long as it lives, within a message
/// that never ends.
///
/// # Safety
/// A live context.
unsafe fn is_replication(context: MemoryContext) -> bool {
    // SAFETY: a plain read of a live context, whose name is a static string.
    unsafe { !(*context).name.is_null() && CStr::from_ptr((*context).name) == c"Replication command context" }
}

/// Whether a context that is not watched outlives the transaction after all: it has been moved since.
///
/// # Safety
/// A live context in a consistent tree.
pub unsafe fn long_lived(context: MemoryContext) -> bool {
    // SAFETY: the caller's promise.
    unsafe { tables::table_of(context) == Table::Pass && !is_transient(context) }
}

/// Chooses the table of a context that points at its base table.
///
/// # Safety
/// A live context in a consistent tree.
pub unsafe fn decide(context: MemoryContext) {
    // SAFETY: the caller's promise.
    unsafe {
        if tables::table_of(context) != Table::Base {
            return;
        }
        let transient = match () {
            _ if settings::scope_all() => context == pg_sys::ErrorContext,
            _ => is_transient(context) && !tables::is_learned((*context).name),
        };
        if transient {
            tables::pass(context);
            if context == pg_sys::MessageContext {
                crate::process::first_message();
            }
        } else {
            tables::watch(context);
        }
    }
}
