//! Reports for people and files for other tools. Pure: a [`Model`] goes in, text or bytes come out.
//!
//! One model is gathered for each call and all formats are written from it, by one file each, so that their figures
//! agree with each other and with the views.

pub mod flame;
pub mod heaptrack;
pub mod html;
pub mod json;
pub mod metric;
pub mod pprof;
pub mod report;
#[cfg(test)]
pub mod samples;
pub mod tree;

use crate::symbols::Frame;
use crate::verdict::Verdict;

/// What rheap knew at one moment of one process or of all.
#[derive(Default)]
pub struct Model {
    /// Microseconds since 2000-01-01, as a `timestamptz`; so are all times here.
    pub taken_at: i64,
    /// The process that was asked for; None: all.
    pub pid: Option<i32>,
    /// `PostgreSQL 17.11`.
    pub server: String,
    /// Mean bytes between two samples, where a process samples.
    pub sample_bytes: u64,
    /// What appears in stacks, each once.
    pub calls: Vec<Call>,
    /// Files of the modules that the calls are in.
    pub modules: Vec<String>,
    /// As in `rheap_leaks`: what is one leak is one row there, though it may be several call sites.
    pub leaks: Vec<Leak>,
    /// By severity, worst first, as in `rheap_call_sites`.
    pub sites: Vec<Site>,
    /// What grew most first, as in `rheap_contexts`.
    pub contexts: Vec<Context>,
    pub processes: Vec<Process>,
}

/// One return address.
#[derive(Clone, Debug)]
pub struct Call {
    /// Index into `modules`; None for the end of a stack that was cut.
    pub module: Option<u32>,
    pub offset: u64,
    /// The functions there: several that are inlined into each other, innermost first. Never empty.
    pub frames: Vec<Frame>,
}

/// A row of `rheap_call_sites`.
#[derive(Clone, Debug)]
pub struct Site {
    pub verdict: Verdict,
    pub confidence: f64,
    pub reason: String,
    pub generations: u32,
    pub growth_bytes_per_s: f64,
    pub backend_type: String,
    pub context: String,
    pub processes: i32,
    /// Of the process that holds most.
    pub pid: i32,
    /// None where unknown, or not for the reader's eyes.
    pub query_id: Option<i64>,
    pub exact: bool,
    pub alloc_count: u64,
    pub alloc_bytes: u64,
    pub live_count: u64,
    pub live_bytes: u64,
    pub first_seen: i64,
    pub last_seen: i64,
    /// Indexes into the model's `calls`, innermost first.
    pub stack: Vec<u32>,
    /// The innermost frame that does not only allocate for its caller, counted over the frames of all calls.
    pub culprit: usize,
}

/// A row of `rheap_leaks`.
#[derive(Clone, Debug)]
pub struct Leak {
    /// Without a stack.
    pub facts: Site,
    /// What the stacks of its call sites have in common, innermost first; the facts' culprit is an index into it.
    pub frames: Vec<Frame>,
}

impl Leak {
    pub fn culprit(&self) -> Option<&Frame> {
        self.frames.get(self.facts.culprit)
    }

    /// Whether a frame is inlined into the next. Functions at one address are inlined into the last of them. Where one
    /// recurses the address recurs too.
    pub fn is_inlined(&self, index: usize) -> bool {
        let (frame, next) = (self.frames.get(index), self.frames.get(index + 1));
        frame.zip(next).is_some_and(|(f, next)| next.address == f.address && next.function != f.function)
    }
}

impl Site {
    pub fn free_count(&self) -> u64 {
        self.alloc_count - self.live_count
    }

    pub fn free_bytes(&self) -> u64 {
        self.alloc_bytes - self.live_bytes
    }
}

/// A row of `rheap_contexts`.
#[derive(Clone, Debug)]
pub struct Context {
    pub pid: i32,
    pub backend_type: String,
    pub path: String,
    pub name: String,
    /// The allocator.
    pub kind: Option<&'static str>,
    pub contexts: u32,
    pub total_bytes: u64,
    pub used_bytes: u64,
    pub free_bytes: u64,
    pub baseline_bytes: u64,
    pub growth_bytes: i64,
    pub growth_bytes_per_s: f64,
    pub watched: bool,
    pub verdict: Verdict,
    /// (time, used bytes) at the latest walks, oldest first.
    pub series: Vec<(i64, u64)>,
}

/// A row of `rheap_processes`.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: i32,
    pub backend_type: String,
    pub mode: &'static str,
    pub watched_contexts: u32,
    pub allocations: u64,
    pub frees: u64,
    pub captures: u64,
    pub dropped: u64,
    pub own_bytes: u64,
    pub context_bytes: u64,
    pub rss_bytes: Option<i64>,
    pub unattributed_bytes: Option<i64>,
    pub walks: u32,
    /// 0: never.
    pub last_walk: i64,
}

/// Sums over all call sites.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Totals {
    pub alloc_count: u64,
    pub alloc_bytes: u64,
    pub live_count: u64,
    pub live_bytes: u64,
    pub free_count: u64,
    pub free_bytes: u64,
}

/// One frame of a stack, with its place in it.
#[derive(Clone, Copy)]
pub struct Placed<'a> {
    pub frame: &'a Frame,
    /// Index of its call.
    pub call: u32,
    /// Index within its call.
    pub index: usize,
    /// Whether it is inlined into the next.
    pub inlined: bool,
}

impl Model {
    /// The frames of a stack, innermost first.
    pub fn frames<'a>(&'a self, site: &'a Site) -> impl DoubleEndedIterator<Item = Placed<'a>> + 'a {
        site.stack.iter().flat_map(|&call| {
            let frames = &self.calls[call as usize].frames;
            frames.iter().enumerate().map(move |(index, frame)| Placed {
                frame,
                call,
                index,
                inlined: index + 1 < frames.len(),
            })
        })
    }

    pub fn culprit<'a>(&'a self, site: &'a Site) -> Option<&'a Frame> {
        self.frames(site).nth(site.culprit).map(|p| p.frame)
    }

    pub fn totals(&self) -> Totals {
        let mut all = Totals::default();
        for s in &self.sites {
            all.alloc_count += s.alloc_count;
            all.alloc_bytes += s.alloc_bytes;
            all.live_count += s.live_count;
            all.live_bytes += s.live_bytes;
            all.free_count += s.free_count();
            all.free_bytes += s.free_bytes();
        }
        all
    }

    /// `pid 123 (client backend, exact)`, or how many processes there are.
    pub fn subject(&self) -> String {
        match (self.pid, self.processes.as_slice()) {
            (Some(pid), [p, ..]) => format!("pid {pid} ({}, {})", p.backend_type, p.mode),
            (Some(pid), []) => format!("pid {pid}"),
            (None, all) => {
                let mut modes: Vec<&str> = all.iter().map(|p| p.mode).collect();
                modes.sort_unstable();
                modes.dedup();
                format!("{} processes ({})", all.len(), modes.join(", "))
            }
        }
    }
}
