//! `rheap_contexts`.

use std::collections::HashMap;

use pgrx::prelude::*;

use super::gather::{Gathered, multiplied};
use super::leaks::Namer;
use super::look::Look;
use super::text::Text;
use crate::exports::Context;
use crate::pg_compat::KINDS;
use crate::verdict::Verdict;

/// What the contexts of each path hold in each process, as its latest walk found them.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn rheap_contexts(
    pid: default!(Option<i32>, "NULL"),
) -> TableIterator<
    'static,
    (
        name!(pid, i32),
        name!(backend_type, Text),
        name!(path, Text),
        name!(name, Text),
        name!(type, Option<Text>),
        name!(contexts, i32),
        name!(total_bytes, i64),
        name!(used_bytes, i64),
        name!(free_bytes, i64),
        name!(baseline_bytes, i64),
        name!(growth_bytes, i64),
        name!(growth_bytes_per_s, f64),
        name!(watched, bool),
        name!(verdict, Text),
    ),
> {
    let look = Look::take("rheap_contexts", pid);
    let rows = contexts(&look, &mut Namer::new(&look.share));
    TableIterator::new(rows.into_iter().map(|c| {
        (
            c.pid,
            c.backend_type.into(),
            c.path.into(),
            c.name.into(),
            c.kind.map(Text::from),
            c.contexts as i32,
            c.total_bytes as i64,
            c.used_bytes as i64,
            c.free_bytes as i64,
            c.baseline_bytes as i64,
            c.growth_bytes,
            c.growth_bytes_per_s,
            c.watched,
            c.verdict.name().into(),
        )
    }))
}

/// The rows of the view, what has grown most first.
pub fn contexts(look: &Look, namer: &mut Namer) -> Vec<Context> {
    let share = &look.share;
    let mut rows = Vec::new();
    for held in &look.processes {
        // A path has the worst verdict of what its contexts hold, as `rheap_leaks` of this process judges it.
        let mut worst: HashMap<u32, Verdict> = HashMap::new();
        for group in multiplied(share, held) {
            let paths = group.paths.clone();
            let verdict = namer.verdict(Gathered::of(held, group));
            for path in paths {
                worst.entry(path).and_modify(|w| *w = verdict.max(*w)).or_insert(verdict);
            }
        }
        super::pause();
        for row in &held.rows {
            let path = share.path_name(row.path);
            let used_bytes = row.seen.total_bytes - row.seen.free_bytes;
            let growth_bytes_per_s = match (row.series.first(), row.series.last()) {
                (Some(a), Some(b)) if b.0 > a.0 => (b.1 as f64 - a.1 as f64) / ((b.0 - a.0) as f64 / 1e6),
                _ => 0.0,
            };
            rows.push(Context {
                pid: held.pid,
                backend_type: held.backend_type.to_string(),
                name: share.last_name(row.path),
                path,
                kind: KINDS.get(row.seen.kind as usize).copied(),
                contexts: row.seen.contexts,
                total_bytes: row.seen.total_bytes,
                used_bytes,
                free_bytes: row.seen.free_bytes,
                baseline_bytes: row.baseline_bytes,
                growth_bytes: used_bytes as i64 - row.baseline_bytes as i64,
                growth_bytes_per_s,
                watched: row.seen.watched,
                verdict: worst.get(&row.path).copied().unwrap_or(Verdict::Steady),
                series: row.series.clone(),
            });
        }
    }
    rows.sort_by(|a, b| b.growth_bytes.cmp(&a.growth_bytes).then(b.total_bytes.cmp(&a.total_bytes)));
    rows
}
