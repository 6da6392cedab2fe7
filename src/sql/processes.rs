//! `rheap_processes`.

use std::sync::atomic::Ordering::*;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;

use super::text::Text;
use crate::exports::Process;
use crate::ledger::account::HISTORY;
use crate::settings::Mode;
use crate::share::slot::Slot;

/// What rheap knows of each process, and what it costs there.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn rheap_processes(
    pid: default!(Option<i32>, "NULL"),
) -> TableIterator<
    'static,
    (
        name!(pid, i32),
        name!(backend_type, Text),
        name!(mode, Text),
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
    let rows = processes(slots.into_iter().map(|(_, pid, slot)| (pid, slot)));
    TableIterator::new(rows.into_iter().map(|p| {
        (
            p.pid,
            p.backend_type.into(),
            p.mode.into(),
            p.watched_contexts as i32,
            p.allocations as i64,
            p.frees as i64,
            p.captures as i64,
            p.dropped as i64,
            p.own_bytes as i64,
            p.context_bytes as i64,
            p.rss_bytes,
            p.unattributed_bytes,
            p.walks as i32,
            super::timestamp(p.last_walk),
        )
    }))
}

/// The rows of the view.
pub fn processes(slots: impl Iterator<Item = (i32, &'static Slot)>) -> Vec<Process> {
    let process = |(pid, slot): (i32, &Slot)| {
        super::pause();
        let (own_bytes, context_bytes) = (slot.own_bytes.load(Relaxed), slot.context_bytes.load(Relaxed));
        let (allocations, frees, captures) = slot.figures();
        let resident = Resident::of(pid);
        let walks = slot.walks.load(Acquire);
        Process {
            pid,
            backend_type: super::backend_type(pid, slot),
            mode: Mode::name(slot.mode.load(Acquire)),
            watched_contexts: slot.watched_contexts.load(Relaxed),
            allocations,
            frees,
            captures,
            dropped: slot.dropped.load(Relaxed),
            own_bytes,
            context_bytes,
            rss_bytes: resident.as_ref().map(|r| r.all),
            unattributed_bytes: resident
                .as_ref()
                .map(|r| (r.anonymous - own_bytes as i64 - context_bytes as i64).max(0)),
            walks,
            last_walk: slot.walk_times[walks as usize % HISTORY].load(Relaxed),
        }
    };
    slots.map(process).collect()
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
