//! `rheap_ended`.

use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;
use pgrx::{JsonB, PgSqlErrorCode};

use super::gather::culprit;
use crate::symbols::{Frame, Symbols};

/// What processes held when they ended, newest first: a row for each of the largest call sites.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn rheap_ended() -> TableIterator<
    'static,
    (
        name!(pid, i32),
        name!(backend_type, String),
        name!(ended_at, Option<TimestampWithTimeZone>),
        name!(how, String),
        name!(context_bytes, i64),
        name!(function, String),
        name!(location, String),
        name!(context, String),
        name!(live_bytes, i64),
        name!(live_count, i64),
        name!(query_id, Option<i64>),
        name!(stack, Vec<String>),
        name!(contexts, JsonB),
    ),
> {
    let share = super::share();
    if !share.cluster {
        super::refuse(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "rheap_ended needs the data of other processes, and rheap was loaded in this session only".into(),
            "Set shared_preload_libraries = 'rheap' and restart the server.",
        );
    }
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
            let (frames, at) = culprit(&mut symbols, held.stack);
            let query_id = if held.query_id != 0 { held.query_id } else { ending.query_id };
            rows.push((
                ending.pid,
                super::backend_type_name(ending.backend_type),
                super::timestamp(ending.ended_at),
                ending.how.name().to_string(),
                ending.context_bytes as i64,
                frames.get(at).map_or("(unknown)", Frame::name).to_string(),
                frames.get(at).map_or("(unknown)", |f| f.location.as_str()).to_string(),
                share.path_name(held.path),
                held.live_bytes as i64,
                held.live_count as i64,
                Some(query_id).filter(|&id| id != 0 && all_stats),
                frames.iter().map(Frame::describe).collect::<Vec<_>>(),
                JsonB(serde_json::Value::Object(contexts.clone())),
            ));
        }
    }
    TableIterator::new(rows)
}
