//! Loading: by `shared_preload_libraries` in the postmaster, by `session_preload_libraries` or `LOAD` in a session.

use core::ffi::CStr;
use once_cell::sync::OnceCell;
use pgrx::{pg_sys, warning};

use crate::{hints, hook, process, query_ids, reserve, settings};

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
        let _held = reserve::hold();
        let cluster = startup && pg_sys::PostmasterPid == libc::getpid();
        let processes = if cluster { most_processes() } else { 1 };
        process::prepare(processes).and_then(|()| hook::install())
    };
    let way = if process::uses_frame_pointers() { "frame pointers" } else { "unwind tables" };
    pgrx::debug1!("rheap walks the server's stacks by {way}");
    if result.is_ok() {
        query_ids::install();
        process::install();
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
    // SAFETY: the server computes its own total only later.
    let sum = unsafe { pg_sys::MaxConnections + pg_sys::max_worker_processes + pg_sys::max_wal_senders } as usize;
    // 18 has slots for more workers than may run at once, so that their number can be raised.
    let autovacuum = setting(c"autovacuum_worker_slots").or_else(|| setting(c"autovacuum_max_workers")).unwrap_or(3);
    // Since 18 as well; their number may be raised while the server runs.
    let io = if setting(c"io_workers").is_some() { MOST_IO_WORKERS } else { 0 };
    sum + autovacuum.min(1000) + io + OTHERS
}

/// MAX_IO_WORKERS of the server.
const MOST_IO_WORKERS: usize = 32;

/// A number among the server's settings; None in a version that does not have it.
fn setting(name: &CStr) -> Option<usize> {
    // SAFETY: a setting that is missing gives NULL; the text is read at once.
    unsafe {
        let value = pg_sys::GetConfigOption(name.as_ptr(), true, false);
        if value.is_null() { None } else { CStr::from_ptr(value).to_str().ok()?.parse().ok() }
    }
}
