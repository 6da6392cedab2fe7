//! The first palloc of a context: does it outlive the transaction?

use core::ffi::CStr;
use std::sync::atomic::Ordering::Relaxed;

use pgrx::pg_sys;

use super::tables::{self, Table};
use crate::pg_compat::MemoryContext;
use crate::settings;

/// Whether a context has this name. A name is a text of the server's, which costs a new process page faults to read
/// where it needs nothing else of these pages: only to be asked where nothing else tells.
///
/// # Safety
/// A live context.
unsafe fn is_named(context: MemoryContext, name: &CStr) -> bool {
    // SAFETY: a plain read of a live context, whose name is a static string.
    unsafe { !(*context).name.is_null() && CStr::from_ptr((*context).name) == name }
}

/// Whether a context is the root of all portals, which the server keeps in a static variable of portalmem.c. It is told
/// by its name, and that, once a process has met it, by its place, which is the same in all.
///
/// # Safety
/// A live context.
unsafe fn is_of_portals(context: MemoryContext) -> bool {
    // SAFETY: plain reads of the server's globals and of a live context.
    unsafe {
        if (*context).parent != pg_sys::TopMemoryContext {
            return false;
        }
        let Some(known) = crate::process::name_of_portals() else { return false };
        let name = (*context).name as u64;
        let place = known.load(Relaxed);
        if place != 0 {
            return name == place;
        }
        let found = is_named(context, c"TopPortalContext");
        if found {
            known.store(name, Relaxed);
        }
        found
    }
}

/// Whether a context among the portals is for rows: those of a cursor WITH HOLD, or of a command like EXECUTE or SHOW,
/// which go when it is done.
///
/// # Safety
/// A live context.
unsafe fn is_store(context: MemoryContext) -> bool {
    // SAFETY: the caller's promise.
    unsafe { is_named(context, c"PortalHoldContext") }
}

/// A cursor WITH HOLD gets its store at the end of the transaction, when no portal runs. Nothing else tells the two kinds
/// of stores apart.
fn runs_portal() -> bool {
    // SAFETY: a plain read of the server's global.
    unsafe { !pg_sys::ActivePortal.is_null() }
}

/// Whether a context ends with a message, a transaction or a portal, judged by the tree as it is now.
///
/// # Safety
/// A live context in a consistent tree.
pub unsafe fn is_transient(context: MemoryContext) -> bool {
    // SAFETY: plain reads of the server's globals; the parents of a live context are live.
    unsafe {
        let (mut at, mut below) = (context, context);
        while !at.is_null() {
            if at == pg_sys::MessageContext || at == pg_sys::TopTransactionContext || at == pg_sys::ErrorContext {
                return true;
            }
            if is_of_portals(at) {
                return below == at || !is_store(below) || runs_portal();
            }
            // A sender runs one command, for as long as it lives, within a message that never ends.
            if pg_sys::MyBackendType == pg_sys::BackendType::B_WAL_SENDER
                && is_named(at, c"Replication command context")
            {
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

/// Whether a context that is not watched outlives the transaction after all: it has been moved since.
///
/// # Safety
/// A live context in a consistent tree.
pub unsafe fn long_lived(context: MemoryContext) -> bool {
    // SAFETY: the caller's promise.
    unsafe { tables::table_of(context) == Table::Pass && !is_transient(context) }
}

/// Chooses the table of a context that points at its base table. Returns which it points at.
///
/// # Safety
/// A live context in a consistent tree.
pub unsafe fn decide(context: MemoryContext) -> Table {
    // SAFETY: the caller's promise.
    unsafe {
        let table = tables::table_of(context);
        if table != Table::Base {
            return table;
        }
        let transient = match () {
            _ if settings::scope_all() => context == pg_sys::ErrorContext,
            _ => is_transient(context) && (!tables::is_learned((*context).name) || is_store(context)),
        };
        if context == pg_sys::MessageContext {
            crate::process::first_message();
        }
        if transient {
            tables::pass(context);
            Table::Pass
        } else {
            tables::watch(context);
            Table::Watch
        }
    }
}
