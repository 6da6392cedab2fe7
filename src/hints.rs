//! What rheap adds to the server's own log messages. A role that may not use rheap is refused by the server, whose
//! error has no hint; a process without memory says how much it wanted, not who has it. And when the postmaster logs,
//! it may be that it has just found a process killed.

use core::ffi::{CStr, c_int, c_void};
use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, pg_sys};

use crate::process;
use std::sync::atomic::{AtomicPtr, Ordering::*};

type Hook = unsafe extern "C-unwind" fn(*mut pg_sys::ErrorData);
static PREVIOUS: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// Hooks into the server's error reports. Called once, from `_PG_init`.
pub fn install() {
    // SAFETY: the hook is a global of the server, set while libraries load, in its only thread.
    unsafe {
        PREVIOUS.store(pg_sys::emit_log_hook.map_or(std::ptr::null_mut(), |h| h as *mut ()), Relaxed);
        pg_sys::emit_log_hook = Some(reported);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn reported(report: *mut pg_sys::ErrorData) {
    // SAFETY: the server passes a valid report; its texts are C strings in its own context, which is freed with it.
    unsafe {
        if (*report).sqlerrcode == PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE as i32
            && (*report).hint.is_null()
            && !(*report).message.is_null()
            && let Some(hint) = hint(CStr::from_ptr((*report).message))
        {
            (*report).hint = copy((*report).assoc_context, hint);
        }
        if (*report).sqlerrcode == PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY as i32
            && (*report).elevel >= pgrx::PgLogLevel::ERROR as i32
            && is_out_of_memory((*report).message_id)
            && (*report).detail_log.is_null()
        {
            // For the log alone, where it takes the place of the detail, which it repeats.
            let detail = if (*report).detail.is_null() { c"" } else { CStr::from_ptr((*report).detail) };
            if let Some(block) = process::top_call_sites(detail) {
                (*report).detail_log = copy((*report).assoc_context, block);
            }
        }
        if pg_sys::PostmasterPid == libc::getpid() && !(*report).message_id.is_null() {
            process::postmaster_logs(CStr::from_ptr((*report).message_id).to_bytes());
        }
        let previous = PREVIOUS.load(Relaxed);
        if !previous.is_null() {
            let previous: Hook = std::mem::transmute(previous);
            previous(report);
        }
    }
}

/// A copy that the server may free, as it does after a FATAL; NULL when there is no memory for it, which must not become
/// an error of its own.
///
/// # Safety
/// A live context.
unsafe fn copy(context: pg_sys::MemoryContext, text: &CStr) -> *mut core::ffi::c_char {
    // Declared here: the bindings' wrapper would make a panic of an error, and needs memory for that.
    unsafe extern "C-unwind" {
        fn MemoryContextAllocExtended(context: pg_sys::MemoryContext, size: usize, flags: c_int) -> *mut c_void;
    }
    let bytes = text.to_bytes_with_nul();
    // SAFETY: the caller's promise; the new chunk has room for the text.
    unsafe {
        let new = MemoryContextAllocExtended(context, bytes.len(), pg_sys::MCXT_ALLOC_NO_OOM as c_int);
        if !new.is_null() {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), new.cast(), bytes.len());
        }
        new.cast()
    }
}

/// Whether a message, untranslated, is about this process's memory: what is shared has the same SQLSTATE.
///
/// # Safety
/// NULL or a C string.
unsafe fn is_out_of_memory(message_id: *const core::ffi::c_char) -> bool {
    // SAFETY: the caller's promise.
    !message_id.is_null() && unsafe { CStr::from_ptr(message_id) }.to_bytes().starts_with(b"out of memory")
}

/// What pg_monitor may read.
const READ: &[&str] = &[
    "rheap_leaks",
    "rheap_call_sites",
    "rheap_contexts",
    "rheap_processes",
    "rheap_ended",
    "rheap_report",
    "rheap_report_json",
    "rheap_folded",
    "rheap_flamegraph",
    "rheap_html",
    "rheap_pprof",
    "rheap_heaptrack",
    "rheap_snapshot",
    "rheap_diff",
    "rheap_snapshots",
    "rheap_snapshot_call_sites",
    "rheap_snapshot_contexts",
    "rheap_suppressions",
];

/// What pg_monitor may run.
const RUN: &[&str] = &["rheap_check", "rheap_assert_no_leaks"];

/// What to write instead, by the object that the message names, in whatever language.
fn hint(message: &CStr) -> Option<&'static CStr> {
    // In whatever encoding; the names are ASCII in each.
    let message = message.to_string_lossy();
    let names = |name: &str| message.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name);
    if names("rheap_reset") {
        Some(c"What changes state is the superuser's: GRANT EXECUTE ON FUNCTION rheap_reset(int) TO the role.")
    } else if names("rheap_track") {
        Some(c"What changes state is the superuser's: GRANT EXECUTE ON FUNCTION rheap_track(int, text) TO the role.")
    } else if names("rheap_suppress") {
        Some(c"What changes state is the superuser's: GRANT EXECUTE ON FUNCTION rheap_suppress(text, text) TO the role, and INSERT, UPDATE and SELECT ON rheap_suppressions.")
    } else if names("rheap_unsuppress") {
        Some(c"What changes state is the superuser's: GRANT EXECUTE ON FUNCTION rheap_unsuppress(text) TO the role, and DELETE and SELECT ON rheap_suppressions.")
    } else if RUN.iter().any(|name| names(name)) {
        Some(c"Members of pg_monitor may run it: GRANT pg_monitor TO the role.")
    } else if READ.iter().any(|name| names(name)) {
        Some(c"Members of pg_monitor may read it: GRANT pg_monitor TO the role.")
    } else if message.contains("\"rheap.") {
        Some(c"Settings of rheap are the superuser's: GRANT SET ON PARAMETER to the role, or ALTER SYSTEM as a superuser.")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::hint;

    #[test]
    fn only_messages_about_rheap_get_a_hint() {
        assert!(hint(c"permission denied for view rheap_leaks").is_some());
        assert!(hint(c"permission denied for function rheap_reset").is_some());
        assert!(
            hint(c"droit refus\xe9 pour la fonction rheap_check").unwrap().to_str().unwrap().contains("pg_monitor")
        );
        assert!(hint(c"permission denied to set parameter \"rheap.mode\"").is_some());
        assert!(hint(c"permission denied for table rheap_leaks_archive").is_none());
        assert!(hint(c"permission denied for table accounts").is_none());
    }
}
