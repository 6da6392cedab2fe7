//! `rheap_leaks` and `rheap_call_sites`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;

use super::gather::{Fold, Gathered, gather};
use super::look::Look;
use super::text::Text;
use crate::settings;
use crate::share::Share;
use crate::symbols::{Frame, Symbols};
use crate::verdict::suppression::Suppression;
use crate::verdict::{Judgement, Verdict};

/// One row per leak, worst first.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn rheap_leaks(
    pid: default!(Option<i32>, "NULL"),
) -> TableIterator<
    'static,
    (
        name!(verdict, Text),
        name!(confidence, f64),
        name!(function, Text),
        name!(location, Text),
        name!(context, Text),
        name!(live_bytes, i64),
        name!(live_count, i64),
        name!(growth_bytes_per_s, f64),
        name!(generations, i32),
        name!(backend_type, Text),
        name!(processes, i32),
        name!(pid, i32),
        name!(query_id, Option<i64>),
        name!(first_seen, Option<TimestampWithTimeZone>),
        name!(last_seen, Option<TimestampWithTimeZone>),
        name!(reason, Text),
        name!(stack, Vec<Text>),
    ),
> {
    let look = Look::take("rheap_leaks", pid);
    let rows = leaks(&look, &mut Namer::new(&look.share));
    TableIterator::new(rows.into_iter().map(|Named { gathered: g, path, frames, at, query_id }| {
        (
            g.judgement.verdict.name().into(),
            g.judgement.confidence,
            name(&frames, at).into(),
            location(&frames, at).into(),
            path.into(),
            g.copy.live_bytes as i64,
            g.copy.live_count as i64,
            g.judgement.growth_bytes_per_s,
            g.judgement.generations as i32,
            g.backend_type.as_ref().into(),
            g.processes,
            g.pid,
            query_id,
            super::timestamp(g.copy.first_seen),
            super::timestamp(g.copy.last_seen),
            g.judgement.reason.into(),
            frames.iter().map(|f| f.describe().into()).collect(),
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
        name!(verdict, Text),
        name!(confidence, f64),
        name!(function, Text),
        name!(location, Text),
        name!(context, Text),
        name!(live_bytes, i64),
        name!(live_count, i64),
        name!(growth_bytes_per_s, f64),
        name!(generations, i32),
        name!(backend_type, Text),
        name!(processes, i32),
        name!(pid, i32),
        name!(query_id, Option<i64>),
        name!(first_seen, Option<TimestampWithTimeZone>),
        name!(last_seen, Option<TimestampWithTimeZone>),
        name!(reason, Text),
        name!(stack, Vec<Text>),
        name!(alloc_count, i64),
        name!(alloc_bytes, i64),
        name!(free_count, i64),
        name!(free_bytes, i64),
        name!(exact, bool),
    ),
> {
    let look = Look::take("rheap_call_sites", pid);
    let mut namer = Namer::new(&look.share);
    // Each is named when it is asked for: of ten thousand, names and stacks are most of the memory.
    let rows = gather(&look, Fold::Nothing, |_| true);
    namer.weigh(&rows);
    TableIterator::new(rows.into_iter().map(move |row| {
        let Named { gathered: g, path, frames, at, query_id } = namer.name(row);
        (
            g.judgement.verdict.name().into(),
            g.judgement.confidence,
            name(&frames, at).into(),
            location(&frames, at).into(),
            path.into(),
            g.copy.live_bytes as i64,
            g.copy.live_count as i64,
            g.judgement.growth_bytes_per_s,
            g.judgement.generations as i32,
            g.backend_type.as_ref().into(),
            g.processes,
            g.pid,
            query_id,
            super::timestamp(g.copy.first_seen),
            super::timestamp(g.copy.last_seen),
            g.judgement.reason.into(),
            frames.iter().map(|f| f.describe().into()).collect(),
            g.copy.alloc_count as i64,
            g.copy.alloc_bytes as i64,
            (g.copy.alloc_count - g.copy.live_count) as i64,
            (g.copy.alloc_bytes - g.copy.live_bytes) as i64,
            g.copy.exact,
        )
    }))
}

/// A row with its names.
pub struct Named {
    pub gathered: Gathered,
    pub path: String,
    pub frames: Vec<Frame>,
    /// The culprit's index among the frames.
    pub at: usize,
    /// Where the caller may see it.
    pub query_id: Option<i64>,
}

/// Leaks and suspects that nobody has suppressed, worst first. Sites of one leak that differ in the depth of a recursion
/// or in their place in a loop that was unrolled are one row: their functions are the same, and the culprit's line.
pub fn leaks(look: &Look, namer: &mut Namer) -> Vec<Named> {
    let rows = gather(look, Fold::Contexts, is_candidate);
    namer.weigh(&rows);
    let mut folded: Vec<Named> = Vec::new();
    let mut known: HashMap<(Rc<str>, u32, String, Vec<String>), usize> = HashMap::new();
    for row in rows.into_iter().map(|row| namer.name(row)) {
        let gathered = &row.gathered;
        if gathered.judgement.verdict < Verdict::Suspect {
            continue;
        }
        let mut functions: Vec<String> = row.frames.iter().map(|f| f.name().to_string()).collect();
        functions.dedup();
        let key = (gathered.backend_type.clone(), gathered.copy.path, location(&row.frames, row.at), functions);
        match known.entry(key) {
            Entry::Vacant(free) => {
                free.insert(folded.len());
                folded.push(row);
            }
            Entry::Occupied(first) => folded[*first.get()].gathered.absorb(row.gathered),
        }
    }
    folded.sort_by(|a, b| a.gathered.cmp(&b.gathered));
    folded
}

/// What is smaller than this part of `rheap.min_leak_bytes` does not make up for what others of its culprit lack.
const SMALLEST_PART: u64 = 16;

/// Whether a row may be a leak once it has names.
fn is_candidate(row: &Gathered) -> bool {
    row.judgement.verdict >= Verdict::Suspect && row.size * SMALLEST_PART >= settings::min_leak_bytes()
}

/// Backend type, context path, and where the culprit is.
type Culprit = (Rc<str>, u32, String);

/// Names the rows of one call, and judges what takes names: what the user has suppressed, what is a cache of the server's,
/// and what is small.
pub struct Namer {
    pub share: Share,
    pub symbols: Symbols,
    suppressions: Vec<Suppression>,
    all_stats: bool,
    /// What the candidates of one culprit hold, all in all, and the largest of them.
    sizes: HashMap<Culprit, (u64, u64)>,
}

impl Namer {
    pub fn new(share: &Share) -> Self {
        Namer {
            share: *share,
            symbols: Symbols::new(share),
            suppressions: super::suppress::all(),
            all_stats: super::reads_all_stats(),
            sizes: HashMap::new(),
        }
    }

    /// Sums up what rows of one culprit hold, which `named` compares with `rheap.min_leak_bytes` where none of them is large
    /// by itself: a leak that many ways lead to is one leak.
    pub fn weigh(&mut self, rows: &[Gathered]) {
        self.sizes.clear();
        for row in rows.iter().filter(|row| is_candidate(row)) {
            super::pause();
            let (frames, at) = row.frames(&mut self.symbols);
            let path = self.share.path_name(row.copy.path);
            if row.reason_to_grow(&path, &frames, &mut self.symbols).is_none() {
                let (sum, most) = self.sizes.entry(culprit(row, &frames, at)).or_default();
                (*sum, *most) = (*sum + row.size, row.size.max(*most));
            }
        }
    }

    fn name(&mut self, gathered: Gathered) -> Named {
        super::pause();
        let (frames, at) = gathered.frames(&mut self.symbols);
        self.named(gathered, frames, at)
    }

    /// With frames that are known already.
    pub fn named(&mut self, mut gathered: Gathered, frames: Vec<Frame>, at: usize) -> Named {
        let path = self.share.path_name(gathered.copy.path);
        let query_id = Some(gathered.copy.query_id).filter(|&id| id != 0 && self.all_stats);
        gathered.judgement = self.judgement(&gathered, &path, &frames, at);
        Named { gathered, path, frames, at, query_id }
    }

    fn judgement(&mut self, row: &Gathered, path: &str, frames: &[Frame], at: usize) -> Judgement {
        let judgement = row.judgement.clone();
        if let Some(found) = self.suppression(row.copy.path, path, frames) {
            return found.judgement(judgement);
        }
        if judgement.verdict < Verdict::Suspect {
            return judgement;
        }
        if let Some(why) = row.reason_to_grow(path, frames, &mut self.symbols) {
            return judgement.cache(&why);
        }
        let (sum, most) = self.sizes.get(&culprit(row, frames, at)).copied().unwrap_or_default();
        let least = settings::min_leak_bytes();
        if row.size >= least || (most < least && sum >= least) { judgement } else { judgement.small(row.size) }
    }

    /// The verdict on what of one process is one row.
    pub fn verdict(&mut self, row: Gathered) -> Verdict {
        if !is_candidate(&row) && row.judgement.verdict >= Verdict::Suspect {
            return Verdict::Steady;
        }
        if row.judgement.verdict == Verdict::Steady {
            Verdict::Steady
        } else {
            self.name(row).gathered.judgement.verdict
        }
    }

    fn suppression(&self, id: u32, path: &str, frames: &[Frame]) -> Option<&Suppression> {
        if self.suppressions.is_empty() {
            return None;
        }
        let name = self.share.last_name(id);
        self.suppressions.iter().find(|s| s.covers(path, &name, frames))
    }
}

fn culprit(row: &Gathered, frames: &[Frame], at: usize) -> Culprit {
    (row.backend_type.clone(), row.copy.path, location(frames, at))
}

pub fn name(frames: &[Frame], at: usize) -> String {
    frames.get(at).map_or("(unknown)", Frame::name).into()
}

pub fn location(frames: &[Frame], at: usize) -> String {
    frames.get(at).map_or("(unknown)", |f| f.location.as_str()).into()
}
