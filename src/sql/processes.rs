//! `rheap_processes`.

use std::sync::atomic::Ordering::*;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;

use crate::ledger::account::HISTORY;
use crate::settings::Mode;

/// What rheap knows of each process, and what it costs there.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn rheap_processes(
    pid: default!(Option<i32>, "NULL"),
) -> TableIterator<
    'static,
    (
        name!(pid, i32),
        name!(backend_type, String),
        name!(mode, String),
        name!(watched_contexts, i32),
        name!(allocations, i64),
        name!(frees, i64),
        name!(captures, i64),
        name!(dropped, i64),
        name!(own_bytes, i64),
        name!(context_bytes, i64),
        name!(rss_bytes, Option<i64>),
        name!(unattributed_bytes, Option<i64>),
        name!(walks, i32),
        name!(last_walk, Option<TimestampWithTimeZone>),
    ),
> {
    let (_, slots) = super::slots("rheap_processes", pid);
    TableIterator::new(slots.into_iter().map(|(_, slot)| {
        let pid = slot.pid.load(Acquire);
        let number = |cell: &std::sync::atomic::AtomicU64| cell.load(Relaxed) as i64;
        let (own, contexts) = (number(&slot.own_bytes), number(&slot.context_bytes));
        let resident = Resident::of(pid);
        let walks = slot.walks.load(Acquire);
        (
            pid,
            super::backend_type(slot),
            Mode::name(slot.mode.load(Relaxed)).to_string(),
            slot.watched_contexts.load(Relaxed) as i32,
            number(&slot.allocations),
            number(&slot.frees),
            number(&slot.captures),
            number(&slot.dropped),
            own,
            contexts,
            resident.as_ref().map(|r| r.all),
            resident.as_ref().map(|r| (r.anonymous - own - contexts).max(0)),
            walks as i32,
            super::timestamp(slot.walk_times[walks as usize % HISTORY].load(Relaxed)),
        )
    }))
}

/// Resident memory of a process in bytes, from the kernel.
struct Resident {
    all: i64,
    /// Without files and shared memory: what malloc and the like have.
    anonymous: i64,
}

impl Resident {
    fn of(pid: i32) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name))?;
            line.trim().strip_suffix(" kB")?.parse::<i64>().ok().map(|kb| kb * 1024)
        };
        Some(Resident { all: field("VmRSS:")?, anonymous: field("RssAnon:")? })
    }
}
