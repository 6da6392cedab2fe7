//! Gathers, from the tables in shared memory, the one model that all reports of a call are written from.

use std::collections::HashMap;

use pgrx::pg_sys;

use super::gather::{Fold, gather};
use super::leaks::{Named, Namer, leaks};
use super::look::Look;
use super::{contexts::contexts, processes::processes};
use crate::exports::{Call, Leak, Model, Site};
use crate::symbols::helpers::innermost;
use crate::symbols::{Frame, place};

/// Writes something from what is known of one process or of all now.
pub fn with_model<T>(function: &str, pid: Option<i32>, write: impl FnOnce(&Model) -> T) -> T {
    let model = model(function, pid);
    super::pause();
    write(&model)
}

fn model(function: &str, pid: Option<i32>) -> Model {
    let look = Look::take(function, pid);
    let taken_at = crate::process::now();
    let share = look.share;
    let processes = processes(look.processes.iter().map(|held| (held.pid, held.slot)));
    let mut namer = Namer::new(&share);
    let contexts = contexts(&look, &mut namer);
    let leaks = leaks(&look, &mut namer).into_iter().map(|named| {
        let (facts, frames) = site(named, Vec::new());
        Leak { facts, frames }
    });
    let leaks = leaks.collect();
    let rows = gather(&look, Fold::Nothing, |_| true);
    namer.weigh(&rows);
    drop(look);
    let (mut calls, mut modules) = (Vec::new(), Vec::new());
    let mut known_calls: HashMap<u64, u32> = HashMap::new();
    let mut known_modules: HashMap<String, u32> = HashMap::new();
    let mut sites = Vec::with_capacity(rows.len());
    for row in rows {
        super::pause();
        let mut stack = Vec::new();
        for word in share.stacks.get(row.copy.stack) {
            let index = *known_calls.entry(word).or_insert_with(|| {
                let place = place(&share, word);
                let module = place.as_ref().map(|(path, _)| {
                    *known_modules.entry(path.clone()).or_insert_with(|| {
                        modules.push(path.clone());
                        modules.len() as u32 - 1
                    })
                });
                calls.push(Call { module, offset: place.map_or(0, |p| p.1), frames: namer.symbols.frames(word) });
                calls.len() as u32 - 1
            });
            stack.push(index);
            if calls[index as usize].frames.iter().any(|f| f.function.as_deref() == Some("main")) {
                break;
            }
        }
        let frames: Vec<Frame> = stack.iter().flat_map(|&call| calls[call as usize].frames.clone()).collect();
        let culprit = innermost(&frames);
        sites.push(site(namer.named(row, frames, culprit), stack).0);
    }
    Model {
        taken_at,
        pid,
        server: server(),
        sample_bytes: crate::settings::sample_bytes(),
        calls,
        modules,
        leaks,
        sites,
        contexts,
        processes,
    }
}

/// The facts of a row, and its frames.
fn site(named: Named, stack: Vec<u32>) -> (Site, Vec<Frame>) {
    let Named { gathered: g, path, frames, at, query_id } = named;
    let facts = Site {
        verdict: g.judgement.verdict,
        confidence: g.judgement.confidence,
        reason: g.judgement.reason,
        generations: g.judgement.generations,
        growth_bytes_per_s: g.judgement.growth_bytes_per_s,
        backend_type: g.backend_type.to_string(),
        context: path,
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
        culprit: at,
    };
    (facts, frames)
}

fn server() -> String {
    // SAFETY: the setting exists in every server, and its text is copied.
    let version = unsafe { pg_sys::GetConfigOption(c"server_version".as_ptr(), true, false) };
    // SAFETY: a C string of the server's, or NULL.
    let version = (!version.is_null()).then(|| unsafe { std::ffi::CStr::from_ptr(version) }.to_string_lossy());
    format!("PostgreSQL {}", version.as_deref().and_then(|v| v.split(' ').next()).unwrap_or("?"))
}
