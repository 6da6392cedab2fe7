//! Ids of statements, as pg_stat_statements shows them.
//!
//! The server computes them for every statement once a module asks with `EnableQueryId`, for each EXECUTE too, which
//! nobody looks up: what it executes has an id of its own. rheap therefore computes them itself, where nobody else
//! does, and leaves these out.

use core::ffi::c_int;
use std::sync::atomic::{AtomicPtr, Ordering::*};

use pgrx::pg_sys::{self, CmdType, JumbleState, NodeTag, ParseState, Query};

use crate::pg_compat;

type Hook = unsafe extern "C-unwind" fn(*mut ParseState, *mut Query, *mut JumbleState);
/// What was there before, or `nothing`.
static PREVIOUS: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// Hooks into parse analysis. Called once, from `_PG_init`.
pub fn install() {
    // SAFETY: the hook is a global of the server, set while libraries load, in its only thread.
    unsafe {
        PREVIOUS.store(pg_sys::post_parse_analyze_hook.unwrap_or(nothing) as *mut (), Relaxed);
        pg_sys::post_parse_analyze_hook = Some(analyzed);
    }
}

/// What most statements need, an EXECUTE among them, takes no frame: the rest is jumped to.
unsafe extern "C-unwind" fn analyzed(state: *mut ParseState, query: *mut Query, jumble: *mut JumbleState) {
    // SAFETY: the server passes a fresh query tree.
    unsafe {
        if crate::process::has_wish() || is_to_be_computed(query, jumble) {
            return analyzed_with_id(state, query, jumble);
        }
        go_on(state, query, jumble)
    }
}

#[inline(never)]
unsafe extern "C-unwind" fn analyzed_with_id(state: *mut ParseState, query: *mut Query, jumble: *mut JumbleState) {
    crate::process::follow_wish();
    // SAFETY: the caller's promise. No value with a destructor is alive when a call may raise.
    unsafe {
        let jumble = if is_to_be_computed(query, jumble) { pg_compat::jumble(state, query) } else { jumble };
        go_on(state, query, jumble)
    }
}

#[inline(always)]
unsafe fn go_on(state: *mut ParseState, query: *mut Query, jumble: *mut JumbleState) {
    // SAFETY: what was there before is a hook of this type; `install` has stored it.
    unsafe {
        let previous: Hook = std::mem::transmute(PREVIOUS.load(Relaxed));
        previous(state, query, jumble)
    }
}

unsafe extern "C-unwind" fn nothing(_state: *mut ParseState, _query: *mut Query, _jumble: *mut JumbleState) {}

/// # Safety
/// A query tree.
#[inline(always)]
unsafe fn is_to_be_computed(query: *const Query, jumble: *const JumbleState) -> bool {
    // SAFETY: the caller's promise; a plain read of the server's setting.
    unsafe {
        jumble.is_null()
            && is_looked_up(query)
            && (*query).queryId == 0
            && pg_sys::compute_query_id != pg_sys::ComputeQueryIdType::COMPUTE_QUERY_ID_OFF as c_int
    }
}

/// # Safety
/// A query tree.
#[inline(always)]
unsafe fn is_looked_up(query: *const Query) -> bool {
    // SAFETY: the caller's promise; a utility query has its statement.
    unsafe {
        (*query).commandType != CmdType::CMD_UTILITY
            || !matches!(
                (*(*query).utilityStmt).type_,
                NodeTag::T_ExecuteStmt | NodeTag::T_PrepareStmt | NodeTag::T_DeallocateStmt
            )
    }
}
