//! The SQL surface: one thin file per function, and what they share.

mod check;
mod contexts;
mod ended;
mod exports;
mod gather;
mod install;
mod install_reports;
mod leaks;
mod look;
mod model;
mod processes;
mod reset;
mod snapshots;
mod suppress;
mod text;
mod track;

use core::ffi::CStr;
use std::sync::atomic::Ordering::*;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use crate::share::Share;
use crate::share::slot::{POSTMASTER, Slot};
use crate::{hook, load, pg_compat, process, reserve};

/// Raises an ERROR.
fn refuse(code: PgSqlErrorCode, message: String, hint: &str) -> ! {
    ErrorReport::new(code, text::for_message(message), "rheap").set_hint(hint).report(PgLogLevel::ERROR);
    unreachable!("an ERROR does not return")
}

/// The argument, or the ERROR that says that NULL is none.
fn given<T>(argument: Option<T>, message: &str, hint: &str) -> T {
    argument.unwrap_or_else(|| refuse(PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED, message.into(), hint))
}

/// A safe place in a long answer: it ends here if somebody has cancelled it, or if there is no memory for it.
fn pause() {
    require(0);
    pgrx::check_for_interrupts!();
}

/// The server is about to allocate so many bytes for an answer.
fn require(bytes: usize) {
    if reserve::is_touched() || !reserve::has_room(bytes) {
        reserve::lighten();
        refuse(
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
            "out of memory".into(),
            pg_compat::NO_MEMORY_HINT.to_str().unwrap_or_default(),
        );
    }
}

/// The slots of one process or of all, or the ERROR that says what to do instead.
fn slots(function: &str, pid: Option<i32>) -> (Share, Vec<(u32, i32, &'static Slot)>) {
    let share = share();
    crate::process::settle();
    // SAFETY: a plain system call.
    let own = unsafe { libc::getpid() };
    if !share.is_cluster_wide() && pid != Some(own) {
        refuse_session(function, &format!("{ASK_PRELOAD} For this session alone, write {function}(pg_backend_pid())."));
    }
    let mut live: Vec<_> = share.live_slots().collect();
    if let Some(pid) = pid {
        live.retain(|&(_, owner, _)| owner == pid);
        if live.is_empty() && pid != own {
            refuse(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("no process of this cluster has the pid {pid}"),
                "SELECT pid, backend_type FROM rheap_processes lists the processes that rheap knows.",
            );
        }
    }
    (share, live)
}

/// What to do where rheap was loaded in one session only.
const ASK_PRELOAD: &str = "Set shared_preload_libraries = 'rheap' and restart the server.";

fn refuse_session(function: &str, hint: &str) -> ! {
    refuse(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("{function} needs the data of other processes, and rheap was loaded in this session only"),
        hint,
    )
}

fn require_cluster(share: &Share, function: &str) {
    if !share.is_cluster_wide() {
        refuse_session(function, ASK_PRELOAD);
    }
}

fn share() -> Share {
    if let Some(reason) = load::refusal() {
        refuse(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("rheap records nothing: {reason}"),
            "Remove the other hook or use a build of rheap for this server, then restart; the server log has the warning from the start.",
        );
    }
    // SAFETY: between two hooks; only copied.
    match unsafe { process::current() }.share {
        Some(share) if hook::is_hooked() => {
            process::answers();
            if !reserve::begin() {
                pg_compat::raise_out_of_memory();
            }
            pause();
            share
        }
        _ => refuse(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "rheap is not loaded".into(),
            "Write LOAD 'rheap', or set shared_preload_libraries = 'rheap' and restart the server.",
        ),
    }
}

/// As in `pg_stat_activity`.
fn backend_type(pid: i32, slot: &Slot) -> String {
    let kind = slot.backend_type.load(Relaxed);
    if kind == POSTMASTER {
        return "postmaster".into();
    }
    // SAFETY: both return static or shared strings, or NULL for a worker that has just ended.
    unsafe {
        let worker = if kind == pg_sys::BackendType::B_BG_WORKER as i32 {
            pg_sys::GetBackgroundWorkerTypeByPid(pid)
        } else {
            std::ptr::null()
        };
        let name = if worker.is_null() { pg_sys::GetBackendTypeDesc(kind as _) } else { worker };
        CStr::from_ptr(name).to_string_lossy().into_owned()
    }
}

/// Whether the caller may see what statements run.
fn reads_all_stats() -> bool {
    // SAFETY: plain catalog look-ups of the current user.
    unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), pg_sys::Oid::from(ROLE_PG_READ_ALL_STATS)) }
}

/// `pg_read_all_stats` in pg_authid.dat.
const ROLE_PG_READ_ALL_STATS: u32 = 3375;

/// The type of a process that is no more.
fn backend_type_name(kind: i32) -> String {
    if kind == POSTMASTER {
        return "postmaster".into();
    }
    // SAFETY: returns a static string for any number.
    unsafe { CStr::from_ptr(pg_sys::GetBackendTypeDesc(kind as _)) }.to_string_lossy().into_owned()
}

fn timestamp(micros: i64) -> Option<TimestampWithTimeZone> {
    if micros == 0 { None } else { TimestampWithTimeZone::try_from(micros).ok() }
}
