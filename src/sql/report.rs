//! `rheap_report_json`: the leaks and what they cost to find, for programs.

use std::sync::atomic::Ordering::*;

use pgrx::prelude::*;
use serde::Serialize;

use crate::settings::Mode;
use crate::symbols::Frame;

#[derive(Serialize)]
struct Report {
    rheap: &'static str,
    leaks: Vec<Leak>,
    processes: Vec<Process>,
}

#[derive(Serialize)]
struct Leak {
    verdict: &'static str,
    confidence: f64,
    reason: String,
    context: String,
    backend_type: String,
    processes: i32,
    pid: i32,
    live_bytes: u64,
    live_count: u64,
    growth_bytes_per_s: f64,
    generations: u32,
    exact: bool,
    /// Index of the culprit in `stack`.
    culprit: usize,
    stack: Vec<Frame>,
}

#[derive(Serialize)]
struct Process {
    pid: i32,
    backend_type: String,
    mode: &'static str,
    allocations: u64,
    captures: u64,
    dropped: u64,
    own_bytes: u64,
    context_bytes: u64,
}

/// The leaks of all live processes or of one, and the processes, as one document.
#[pg_extern(volatile, parallel_restricted)]
fn rheap_report_json(pid: default!(Option<i32>, "NULL")) -> pgrx::JsonB {
    let (_, slots) = super::slots("rheap_report_json", pid);
    let leaks = super::leaks::leaks("rheap_report_json", pid)
        .into_iter()
        .map(|(g, stack, culprit, _)| Leak {
            verdict: g.judgement.verdict.name(),
            confidence: g.judgement.confidence,
            reason: g.judgement.reason,
            context: g.path,
            backend_type: g.backend_type,
            processes: g.processes,
            pid: g.pid,
            live_bytes: g.copy.live_bytes,
            live_count: g.copy.live_count,
            growth_bytes_per_s: g.judgement.growth_bytes_per_s,
            generations: g.judgement.generations,
            exact: g.copy.exact,
            culprit,
            stack,
        })
        .collect();
    let processes = slots
        .into_iter()
        .map(|(_, slot)| Process {
            pid: slot.pid.load(Acquire),
            backend_type: super::backend_type(slot),
            mode: Mode::name(slot.mode.load(Relaxed)),
            allocations: slot.allocations.load(Relaxed),
            captures: slot.captures.load(Relaxed),
            dropped: slot.dropped.load(Relaxed),
            own_bytes: slot.own_bytes.load(Relaxed),
            context_bytes: slot.context_bytes.load(Relaxed),
        })
        .collect();
    let report = Report { rheap: env!("CARGO_PKG_VERSION"), leaks, processes };
    pgrx::JsonB(serde_json::to_value(report).expect("numbers and strings are JSON"))
}
