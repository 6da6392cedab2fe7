//! The report for programs, and the data of the page. `docs/report.schema.json` describes each key.

use std::collections::HashMap;

use serde::Serialize;

use super::{Model, Process, Site, Totals};
use crate::moment;
use crate::symbols::Frame;

#[derive(Serialize)]
pub struct Report<'a> {
    /// Version of rheap.
    pub rheap: &'static str,
    /// Version of this format: it changes when a key changes its meaning or goes.
    pub format: u32,
    pub server: &'a str,
    pub taken_at: String,
    pub pid: Option<i32>,
    pub subject: String,
    pub totals: Totals,
    pub leaks: Vec<Leak<'a>>,
    pub call_sites: Vec<CallSite<'a>>,
    pub frames: Vec<StackFrame<'a>>,
    pub contexts: Vec<Context<'a>>,
    pub processes: Vec<ProcessRow<'a>>,
}

#[derive(Serialize)]
pub struct Leak<'a> {
    #[serde(flatten)]
    facts: Facts<'a>,
    /// Index of the culprit in `stack`.
    culprit: usize,
    stack: Stack<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Stack<'a> {
    Frames(Vec<StackFrame<'a>>),
    /// Into the report's `frames`.
    Indexes(Vec<u32>),
}

#[derive(Serialize)]
pub struct CallSite<'a> {
    #[serde(flatten)]
    facts: Facts<'a>,
    culprit: usize,
    /// Indexes into `frames`, innermost first.
    stack: Vec<u32>,
}

#[derive(Serialize)]
struct Facts<'a> {
    verdict: &'static str,
    confidence: f64,
    reason: &'a str,
    function: &'a str,
    location: &'a str,
    context: &'a str,
    backend_type: &'a str,
    processes: i32,
    pid: i32,
    /// As text: most readers of JSON would round such a number.
    query_id: Option<String>,
    exact: bool,
    live_bytes: u64,
    live_count: u64,
    alloc_bytes: u64,
    alloc_count: u64,
    free_bytes: u64,
    free_count: u64,
    growth_bytes_per_s: f64,
    generations: u32,
    first_seen: Option<String>,
    last_seen: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct StackFrame<'a> {
    #[serde(flatten)]
    frame: &'a Frame,
    inlined: bool,
}

#[derive(Serialize)]
pub struct Context<'a> {
    pid: i32,
    backend_type: &'a str,
    path: &'a str,
    name: &'a str,
    r#type: Option<&'static str>,
    contexts: u32,
    total_bytes: u64,
    used_bytes: u64,
    free_bytes: u64,
    baseline_bytes: u64,
    growth_bytes: i64,
    growth_bytes_per_s: f64,
    watched: bool,
    verdict: &'static str,
    /// (milliseconds before `taken_at`, as a negative number; used bytes), oldest first.
    series: Vec<(i64, u64)>,
}

#[derive(Serialize)]
pub struct ProcessRow<'a> {
    pid: i32,
    backend_type: &'a str,
    mode: &'static str,
    watched_contexts: u32,
    allocations: u64,
    frees: u64,
    captures: u64,
    dropped: u64,
    own_bytes: u64,
    context_bytes: u64,
    rss_bytes: Option<i64>,
    unattributed_bytes: Option<i64>,
    walks: u32,
    last_walk: Option<String>,
}

fn time(micros: i64) -> Option<String> {
    (micros != 0).then(|| moment::iso(micros))
}

fn facts<'a>(culprit: Option<&'a Frame>, s: &'a Site) -> Facts<'a> {
    Facts {
        verdict: s.verdict.name(),
        confidence: s.confidence,
        reason: &s.reason,
        function: culprit.map_or("(unknown)", Frame::name),
        location: culprit.map_or("(unknown)", |f| &f.location),
        context: &s.context,
        backend_type: &s.backend_type,
        processes: s.processes,
        pid: s.pid,
        query_id: s.query_id.map(|id| id.to_string()),
        exact: s.exact,
        live_bytes: s.live_bytes,
        live_count: s.live_count,
        alloc_bytes: s.alloc_bytes,
        alloc_count: s.alloc_count,
        free_bytes: s.free_bytes(),
        free_count: s.free_count(),
        growth_bytes_per_s: s.growth_bytes_per_s,
        generations: s.generations,
        first_seen: time(s.first_seen),
        last_seen: time(s.last_seen),
    }
}

/// The whole model. Frames are listed once and stacks refer to them, except those of leaks, which are few and read
/// by people too.
pub fn report(model: &Model) -> Report<'_> {
    written(model, false)
}

/// The same for the page, where ten thousand leaks must not make tens of megabytes: their stacks refer to frames too.
pub fn compact(model: &Model) -> Report<'_> {
    written(model, true)
}

fn written(model: &Model, compact: bool) -> Report<'_> {
    let mut frames = Vec::new();
    let mut known: HashMap<(u32, usize), u32> = HashMap::new();
    let call_sites = model.sites.iter().map(|site| {
        let stack = model.frames(site).map(|p| {
            *known.entry((p.call, p.index)).or_insert_with(|| {
                frames.push(StackFrame { frame: p.frame, inlined: p.inlined });
                frames.len() as u32 - 1
            })
        });
        CallSite { facts: facts(model.culprit(site), site), culprit: site.culprit, stack: stack.collect() }
    });
    let call_sites = call_sites.collect();
    let mut known: HashMap<StackFrame, u32> = HashMap::new();
    let leaks = model.leaks.iter().map(|leak| {
        let inlined = |(index, frame)| StackFrame { frame, inlined: leak.is_inlined(index) };
        let stack = leak.frames.iter().enumerate().map(inlined);
        let stack = match compact {
            false => Stack::Frames(stack.collect()),
            true => Stack::Indexes(
                stack
                    .map(|frame| {
                        *known.entry(frame).or_insert_with(|| {
                            frames.push(frame);
                            frames.len() as u32 - 1
                        })
                    })
                    .collect(),
            ),
        };
        Leak { facts: facts(leak.culprit(), &leak.facts), culprit: leak.facts.culprit, stack }
    });
    let leaks = leaks.collect();
    Report {
        rheap: env!("CARGO_PKG_VERSION"),
        format: 1,
        server: &model.server,
        taken_at: moment::iso(model.taken_at),
        pid: model.pid,
        subject: model.subject(),
        totals: model.totals(),
        leaks,
        call_sites,
        frames,
        contexts: model.contexts.iter().map(|c| context(model, c)).collect(),
        processes: model.processes.iter().map(process).collect(),
    }
}

fn context<'a>(model: &Model, c: &'a super::Context) -> Context<'a> {
    Context {
        pid: c.pid,
        backend_type: &c.backend_type,
        path: &c.path,
        name: &c.name,
        r#type: c.kind,
        contexts: c.contexts,
        total_bytes: c.total_bytes,
        used_bytes: c.used_bytes,
        free_bytes: c.free_bytes,
        baseline_bytes: c.baseline_bytes,
        growth_bytes: c.growth_bytes,
        growth_bytes_per_s: c.growth_bytes_per_s,
        watched: c.watched,
        verdict: c.verdict.name(),
        series: c.series.iter().map(|&(t, used)| ((t - model.taken_at) / 1000, used)).collect(),
    }
}

fn process(p: &Process) -> ProcessRow<'_> {
    ProcessRow {
        pid: p.pid,
        backend_type: &p.backend_type,
        mode: p.mode,
        watched_contexts: p.watched_contexts,
        allocations: p.allocations,
        frees: p.frees,
        captures: p.captures,
        dropped: p.dropped,
        own_bytes: p.own_bytes,
        context_bytes: p.context_bytes,
        rss_bytes: p.rss_bytes,
        unattributed_bytes: p.unattributed_bytes,
        walks: p.walks,
        last_walk: time(p.last_walk),
    }
}
