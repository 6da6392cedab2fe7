//! The only part that touches the server's method tables.
//!
//! `context->methods` of every memory context points at a table that is constant in the server's binary. rheap
//! replaces a few entries of these base tables in place, and keeps two copies of each: *pass*, untouched, for
//! contexts that cost nothing any more, and *watch*, for those that are recorded. A context starts at its base
//! table, and its first palloc decides, once, which of the two it points at from then on.

mod entry;
mod selfcheck;
mod tables;
pub mod tick;
mod touch;

pub use tables::{Gap, Table, ask_about_all, is_hooked, is_learned, learn, record_by, table_of, watch};
pub use touch::long_lived;

use crate::pg_compat::{self, MemoryContext};
use pgrx::pg_sys;

/// Patches the tables, or says why not; nothing has been changed then.
///
/// # Safety
/// Called once per process tree, from `_PG_init`.
pub unsafe fn install() -> Result<(), String> {
    pg_compat::layout_fits()?;
    // SAFETY: the server has set TopMemoryContext before it loads any library.
    unsafe {
        let bases = pg_compat::base_tables();
        selfcheck::check(&bases)?;
        tables::patch(bases, &entry::ENTRIES)?;
        tick::install();
        each_context(|context, _| {
            touch::decide(context);
            true
        });
    }
    Ok(())
}

/// Visits all contexts, parents first, with their depth below TopMemoryContext. `visit` says whether to descend.
///
/// # Safety
/// The tree is consistent: at the entry or exit of a palloc, not in a signal handler.
pub unsafe fn each_context(visit: impl FnMut(MemoryContext, usize) -> bool) {
    // SAFETY: the caller's promise; the server has set TopMemoryContext.
    unsafe { each_context_from(pg_sys::TopMemoryContext, visit) }
}

/// The same for one context and all below it. Without recursion, for which there may not be the stack.
///
/// # Safety
/// As for `each_context`, with a live context.
pub unsafe fn each_context_from(top: MemoryContext, mut visit: impl FnMut(MemoryContext, usize) -> bool) {
    // SAFETY: the links of a consistent tree; contexts are not changed by the visitor.
    unsafe {
        let (mut context, mut depth) = (top, 0);
        while !context.is_null() {
            if visit(context, depth) && !(*context).firstchild.is_null() {
                context = (*context).firstchild;
                depth += 1;
                continue;
            }
            while context != top && (*context).nextchild.is_null() {
                context = (*context).parent;
                depth -= 1;
            }
            if context == top {
                return;
            }
            context = (*context).nextchild;
        }
    }
}
