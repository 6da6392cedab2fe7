//! The reports and the files for other tools.

use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use super::model::with_model;
use super::text::{Document, Text};
use crate::exports::metric::Metric;
use crate::exports::{flame, heaptrack, html, json, pprof, report};

/// The metric of this name, the first where none is named, or the ERROR that lists those there are.
fn metric(name: Option<Text>) -> Metric {
    let Some(Text(name)) = name else { return Metric::Live };
    Metric::parse(&name).unwrap_or_else(|| {
        super::refuse(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("there is no metric \"{name}\""),
            &format!("Write one of: {}.", Metric::ALL.map(Metric::name).join(", ")),
        )
    })
}

/// A report for a terminal: leaks, what holds most, most calls, most temporary allocations, totals, contexts.
#[pg_extern(volatile, parallel_restricted)]
pub fn rheap_report(pid: default!(Option<i32>, "NULL")) -> Text {
    with_model("rheap_report", pid, report::text).into()
}

/// The same facts for programs, as docs/report.schema.json describes them.
#[pg_extern(volatile, parallel_restricted)]
pub fn rheap_report_json(pid: default!(Option<i32>, "NULL")) -> Document {
    with_model("rheap_report_json", pid, |model| {
        Document(serde_json::to_value(json::report(model)).expect("numbers and strings are JSON"))
    })
}

/// Collapsed stacks, `frame;frame;frame value` in lines, root first.
#[pg_extern(volatile, parallel_restricted)]
pub fn rheap_folded(pid: default!(Option<i32>, "NULL"), metric: default!(Option<Text>, "'live'")) -> Text {
    let metric = self::metric(metric);
    with_model("rheap_folded", pid, |model| flame::folded(model, metric)).into()
}

/// A flame graph as an SVG, which searches and zooms in a browser.
#[pg_extern(volatile, parallel_restricted)]
pub fn rheap_flamegraph(pid: default!(Option<i32>, "NULL"), metric: default!(Option<Text>, "'live'")) -> Text {
    let metric = self::metric(metric);
    with_model("rheap_flamegraph", pid, |model| flame::svg(model, metric)).into()
}

/// One self-contained page: leaks with reasons, growth charts, flame graph, call sites, processes.
#[pg_extern(volatile, parallel_restricted)]
pub fn rheap_html(pid: default!(Option<i32>, "NULL")) -> Text {
    with_model("rheap_html", pid, html::page).into()
}

/// A gzipped profile.proto, as `go tool pprof` reads it.
#[pg_extern(volatile, parallel_restricted)]
pub fn rheap_pprof(pid: default!(Option<i32>, "NULL")) -> Vec<u8> {
    let profile = with_model("rheap_pprof", pid, pprof::profile);
    super::require(profile.len());
    profile
}

/// A data file of heaptrack, for heaptrack_print and heaptrack_gui.
#[pg_extern(volatile, parallel_restricted)]
pub fn rheap_heaptrack(pid: Option<i32>) -> Text {
    let pid = super::given(
        pid,
        "rheap_heaptrack needs the pid of a process",
        "SELECT pid, backend_type FROM rheap_processes lists them; rheap_pprof() is of all together.",
    );
    with_model("rheap_heaptrack", Some(pid), heaptrack::file).into()
}
