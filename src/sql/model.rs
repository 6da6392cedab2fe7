//! Gathers, from the tables in shared memory, the one model that all reports of a call are written from.

use std::collections::HashMap;

use pgrx::pg_sys;

use super::gather::{Fold, Gathered, gather, innermost};
use super::{contexts::contexts, processes::processes};
use crate::exports::{Call, Leak, Model, Site};
use crate::symbols::{Frame, Symbols, place};

/// Writes something from what is known of one process or of all now.
pub fn with_model<T>(function: &str, pid: Option<i32>, write: impl FnOnce(&Model) -> T) -> T {
    write(&model(function, pid))
}

fn model(function: &str, pid: Option<i32>) -> Model {
    let taken_at = crate::process::now();
    let rows = gather(function, pid, Fold::Nothing, |_| true);
    let (contexts, processes) = (contexts(function, pid), processes(function, pid));
    let share = super::share();
    let mut symbols = Symbols::new(&share);
    let all_stats = super::reads_all_stats();
    let suppressions = super::suppress::all();
    let (mut calls, mut modules) = (Vec::new(), Vec::new());
    let mut known_calls: HashMap<u64, u32> = HashMap::new();
    let mut known_modules: HashMap<String, u32> = HashMap::new();
    let mut sites = Vec::with_capacity(rows.len());
    for mut g in rows {
        let mut stack = Vec::new();
        for word in share.stacks.get(g.copy.stack) {
            let index = *known_calls.entry(word).or_insert_with(|| {
                let place = place(&share, word);
                let module = place.as_ref().map(|(path, _)| {
                    *known_modules.entry(path.clone()).or_insert_with(|| {
                        modules.push(path.clone());
                        modules.len() as u32 - 1
                    })
                });
                calls.push(Call { module, offset: place.map_or(0, |p| p.1), frames: symbols.frames(word) });
                calls.len() as u32 - 1
            });
            stack.push(index);
            if calls[index as usize].frames.iter().any(|f| f.function.as_deref() == Some("main")) {
                break;
            }
        }
        let frames: Vec<Frame> = stack.iter().flat_map(|&call| calls[call as usize].frames.clone()).collect();
        if let Some(found) = suppressions.iter().find(|s| s.covers(&g.path, &frames)) {
            g.judgement = found.judgement(g.judgement);
        }
        let query_id = Some(g.copy.query_id).filter(|&id| id != 0 && all_stats);
        sites.push(site(g, stack, innermost(&frames), query_id));
    }
    let leaks = super::leaks::leaks(function, pid)
        .into_iter()
        .map(|(g, frames, culprit, query_id)| Leak { facts: site(g, Vec::new(), culprit, query_id), frames });
    Model {
        taken_at,
        pid,
        server: server(),
        sample_bytes: crate::settings::sample_bytes(),
        calls,
        modules,
        leaks: leaks.collect(),
        sites,
        contexts,
        processes,
    }
}

fn site(g: Gathered, stack: Vec<u32>, culprit: usize, query_id: Option<i64>) -> Site {
    Site {
        verdict: g.judgement.verdict,
        confidence: g.judgement.confidence,
        reason: g.judgement.reason,
        generations: g.judgement.generations,
        growth_bytes_per_s: g.judgement.growth_bytes_per_s,
        backend_type: g.backend_type,
        context: g.path,
        processes: g.processes,
        pid: g.pid,
        query_id,
        exact: g.copy.exact,
        alloc_count: g.copy.alloc_count,
        alloc_bytes: g.copy.alloc_bytes,
        live_count: g.copy.live_count,
        live_bytes: g.copy.live_bytes,
        first_seen: g.copy.first_seen,
        last_seen: g.copy.last_seen,
        stack,
        culprit,
    }
}

fn server() -> String {
    // SAFETY: the setting exists in every server, and its text is copied.
    let version = unsafe { pg_sys::GetConfigOption(c"server_version".as_ptr(), true, false) };
    // SAFETY: a C string of the server's, or NULL.
    let version = (!version.is_null()).then(|| unsafe { std::ffi::CStr::from_ptr(version) }.to_string_lossy());
    format!("PostgreSQL {}", version.as_deref().and_then(|v| v.split(' ').next()).unwrap_or("?"))
}
