//! `rheap_ended`.

use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;

use super::gather::culprit;
use super::text::{Document, Text};
use crate::symbols::Symbols;

/// What processes held when they ended, newest first: a row for each of the largest call sites.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn rheap_ended() -> TableIterator<
    'static,
    (
        name!(pid, i32),
        name!(backend_type, Text),
        name!(ended_at, Option<TimestampWithTimeZone>),
        name!(how, Text),
        name!(context_bytes, i64),
        name!(function, Text),
        name!(location, Text),
        name!(context, Text),
        name!(live_bytes, i64),
        name!(live_count, i64),
        name!(query_id, Option<i64>),
        name!(stack, Vec<Text>),
        name!(contexts, Document),
    ),
> {
    let share = super::share();
    super::require_cluster(&share, "rheap_ended");
    crate::process::bury_dead();
    let all_stats = super::reads_all_stats();
    let mut symbols = Symbols::new(&share);
    let mut rows = Vec::new();
    for ending in share.endings.all() {
        let contexts: serde_json::Map<String, serde_json::Value> = ending
            .paths
            .iter()
            .filter(|held| held.path != 0)
            .map(|held| (share.path_name(held.path), held.used_bytes.into()))
            .collect();
        for held in ending.sites.iter().filter(|held| held.stack != 0) {
            super::pause();
            let (frames, at) = culprit(&mut symbols, held.stack);
            let query_id = if held.query_id != 0 { held.query_id } else { ending.query_id };
            rows.push((
                ending.pid,
                Text(super::backend_type_name(ending.backend_type)),
                super::timestamp(ending.ended_at),
                Text::from(ending.how.name()),
                ending.context_bytes as i64,
                Text(super::leaks::name(&frames, at)),
                Text(super::leaks::location(&frames, at)),
                Text(share.path_name(held.path)),
                held.live_bytes as i64,
                held.live_count as i64,
                Some(query_id).filter(|&id| id != 0 && all_stats),
                frames.iter().map(|f| Text(f.describe())).collect::<Vec<_>>(),
                Document(serde_json::Value::Object(contexts.clone())),
            ));
        }
    }
    TableIterator::new(rows)
}
