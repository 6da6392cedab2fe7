//! `rheap_leaks` and `rheap_call_sites`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;

use super::gather::{Fold, Gathered, gather};
use crate::symbols::{Frame, Symbols};
use crate::verdict::Verdict;

/// One row per leak, worst first.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn rheap_leaks(
    pid: default!(Option<i32>, "NULL"),
) -> TableIterator<
    'static,
    (
        name!(verdict, String),
        name!(confidence, f64),
        name!(function, String),
        name!(location, String),
        name!(context, String),
        name!(live_bytes, i64),
        name!(live_count, i64),
        name!(growth_bytes_per_s, f64),
        name!(generations, i32),
        name!(backend_type, String),
        name!(processes, i32),
        name!(pid, i32),
        name!(query_id, Option<i64>),
        name!(first_seen, Option<TimestampWithTimeZone>),
        name!(last_seen, Option<TimestampWithTimeZone>),
        name!(reason, String),
        name!(stack, Vec<String>),
    ),
> {
    TableIterator::new(leaks("rheap_leaks", pid).into_iter().map(|(g, frames, at, query_id)| {
        (
            g.judgement.verdict.name().into(),
            g.judgement.confidence,
            name(&frames, at),
            location(&frames, at),
            g.path,
            g.copy.live_bytes as i64,
            g.copy.live_count as i64,
            g.judgement.growth_bytes_per_s,
            g.judgement.generations as i32,
            g.backend_type,
            g.processes,
            g.pid,
            query_id,
            super::timestamp(g.copy.first_seen),
            super::timestamp(g.copy.last_seen),
            g.judgement.reason,
            frames.iter().map(Frame::describe).collect(),
        )
    }))
}

/// Every call site, with all verdicts and counts.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn rheap_call_sites(
    pid: default!(Option<i32>, "NULL"),
) -> TableIterator<
    'static,
    (
        name!(verdict, String),
        name!(confidence, f64),
        name!(function, String),
        name!(location, String),
        name!(context, String),
        name!(live_bytes, i64),
        name!(live_count, i64),
        name!(growth_bytes_per_s, f64),
        name!(generations, i32),
        name!(backend_type, String),
        name!(processes, i32),
        name!(pid, i32),
        name!(query_id, Option<i64>),
        name!(first_seen, Option<TimestampWithTimeZone>),
        name!(last_seen, Option<TimestampWithTimeZone>),
        name!(reason, String),
        name!(stack, Vec<String>),
        name!(alloc_count, i64),
        name!(alloc_bytes, i64),
        name!(free_count, i64),
        name!(free_bytes, i64),
        name!(exact, bool),
    ),
> {
    let rows = gather("rheap_call_sites", pid, Fold::Nothing, |_| true);
    TableIterator::new(named(rows).into_iter().map(|(g, frames, at, query_id)| {
        (
            g.judgement.verdict.name().into(),
            g.judgement.confidence,
            name(&frames, at),
            location(&frames, at),
            g.path,
            g.copy.live_bytes as i64,
            g.copy.live_count as i64,
            g.judgement.growth_bytes_per_s,
            g.judgement.generations as i32,
            g.backend_type,
            g.processes,
            g.pid,
            query_id,
            super::timestamp(g.copy.first_seen),
            super::timestamp(g.copy.last_seen),
            g.judgement.reason,
            frames.iter().map(Frame::describe).collect(),
            g.copy.alloc_count as i64,
            g.copy.alloc_bytes as i64,
            (g.copy.alloc_count - g.copy.live_count) as i64,
            (g.copy.alloc_bytes - g.copy.live_bytes) as i64,
            g.copy.exact,
        )
    }))
}

/// A row with its frames, the culprit's index among them, and the query id where the caller may see it.
pub type Named = (Gathered, Vec<Frame>, usize, Option<i64>);

/// Leaks and suspects that nobody has suppressed, worst first. Sites of one leak that differ in the depth of a recursion
/// or in their place in a loop that was unrolled are one row: their functions are the same, and the culprit's line.
pub fn leaks(function: &str, pid: Option<i32>) -> Vec<Named> {
    let rows = gather(function, pid, Fold::Contexts, |verdict| verdict >= Verdict::Suspect);
    let mut folded: Vec<Named> = Vec::new();
    let mut known: HashMap<(String, u32, String, Vec<String>), usize> = HashMap::new();
    for row in named(rows) {
        let (gathered, frames, at, _) = &row;
        if gathered.judgement.verdict < Verdict::Suspect {
            continue;
        }
        let mut functions: Vec<String> = frames.iter().map(|f| f.name().to_string()).collect();
        functions.dedup();
        let key = (gathered.backend_type.clone(), gathered.copy.path, location(frames, *at), functions);
        match known.entry(key) {
            Entry::Vacant(free) => {
                free.insert(folded.len());
                folded.push(row);
            }
            Entry::Occupied(first) => folded[*first.get()].0.absorb(row.0),
        }
    }
    folded.sort_by(|a, b| a.0.cmp(&b.0));
    folded
}

fn named(rows: Vec<Gathered>) -> Vec<Named> {
    let share = super::share();
    let mut symbols = Symbols::new(&share);
    let all_stats = super::reads_all_stats();
    let suppressions = super::suppress::all();
    let mut rows: Vec<Named> = rows
        .into_iter()
        .map(|mut g| {
            let (frames, at) = g.frames(&mut symbols);
            let query_id = Some(g.copy.query_id).filter(|&id| id != 0 && all_stats);
            if g.judgement.verdict >= Verdict::Suspect {
                if let Some(found) = suppressions.iter().find(|s| s.covers(&g.path, &frames)) {
                    g.judgement = found.judgement(g.judgement);
                } else if let Some(why) = g.reason_to_grow(&frames) {
                    g.judgement = g.judgement.cache(&why);
                }
            }
            (g, frames, at, query_id)
        })
        .collect();
    leave_out_small(&mut rows);
    rows
}

/// What is too small is no leak: a call site, unless others of the same culprit make up for it.
fn leave_out_small(rows: &mut [Named]) {
    let key = |(g, frames, at, _): &Named| (g.backend_type.clone(), g.copy.path, location(frames, *at));
    let mut sizes: HashMap<(String, u32, String), u64> = HashMap::new();
    for row in rows.iter().filter(|row| row.0.judgement.verdict >= Verdict::Suspect) {
        *sizes.entry(key(row)).or_default() += row.0.size;
    }
    for row in rows.iter_mut().filter(|row| row.0.judgement.verdict >= Verdict::Suspect) {
        if sizes[&key(row)] < settings::min_leak_bytes() {
            row.0.judgement = row.0.judgement.clone().small(row.0.size);
        }
    }
}

pub fn name(frames: &[Frame], at: usize) -> String {
    frames.get(at).map_or("(unknown)", Frame::name).into()
}

pub fn location(frames: &[Frame], at: usize) -> String {
    frames.get(at).map_or("(unknown)", |f| f.location.as_str()).into()
}
