//! Loading: by `shared_preload_libraries` in the postmaster, by `session_preload_libraries` or `LOAD` in a session.

use core::ffi::CStr;
use once_cell::sync::OnceCell;
use pgrx::{pg_sys, warning};

use crate::{hints, hook, process, query_ids, settings};

/// Why rheap runs without its hooks, if it does.
static REFUSAL: OnceCell<String> = OnceCell::new();

/// Processes beside those that settings bound: the postmaster, auxiliary processes, and those that are just ending.
const OTHERS: usize = 48;

pub fn init() {
    // SAFETY: a plain read of the server's global.
    let startup = unsafe { pg_sys::process_shared_preload_libraries_in_progress };
    settings::define(startup);
    hints::install();
    // SAFETY: plain reads of the server's globals, and calls that are meant for `_PG_init`.
    let result = unsafe {
        let cluster = startup && pg_sys::PostmasterPid == libc::getpid();
        let processes = if cluster { most_processes() } else { 1 };
        process::prepare(processes, cluster).and_then(|()| hook::install())
    };
    let way = if process::uses_frame_pointers() { "frame pointers" } else { "unwind tables" };
    pgrx::debug1!("rheap walks the server's stacks by {way}");
    if result.is_ok() {
        query_ids::install();
    }
    if let Err(reason) = result {
        warning!("rheap runs without its hooks and records nothing: {reason}");
        let _ = REFUSAL.set(reason);
    }
}

/// Why nothing is recorded in this process tree, if so.
pub fn refusal() -> Option<&'static str> {
    REFUSAL.get().map(String::as_str)
}

/// # Safety
/// In a server process.
unsafe fn most_processes() -> usize {
    // SAFETY: the setting exists in every supported version; the server computes its own total only later.
    unsafe {
        let workers = pg_sys::GetConfigOption(c"autovacuum_max_workers".as_ptr(), true, false);
        let workers: usize = if workers.is_null() {
            3
        } else {
            CStr::from_ptr(workers).to_str().ok().and_then(|w| w.parse().ok()).unwrap_or(3)
        };
        let sum = pg_sys::MaxConnections + pg_sys::max_worker_processes + pg_sys::max_wal_senders;
        sum as usize + workers.min(1000) + OTHERS
    }
}
