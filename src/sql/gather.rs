//! Call sites of one process or of all, folded by backend type, context path and call stack.

use std::collections::HashMap;
use std::sync::atomic::Ordering::*;

use crate::ledger::account::SiteCopy;
use crate::symbols::helpers::is_helper;
use crate::symbols::{Frame, Symbols};
use crate::verdict::{Judgement, Verdict, judge_site};

/// One row of `rheap_leaks` and `rheap_call_sites`, before names.
pub struct Gathered {
    pub judgement: Judgement,
    pub copy: SiteCopy,
    pub backend_type: String,
    pub path: String,
    pub processes: i32,
    pub pid: i32,
    /// Live bytes of the process that holds most.
    most: u64,
}

impl Gathered {
    fn rank(&self) -> (Verdict, f64) {
        (self.judgement.verdict, self.judgement.confidence * self.copy.live_bytes as f64)
    }

    fn merge(&mut self, judgement: Judgement, copy: SiteCopy, pid: i32) {
        let growth = self.judgement.growth_bytes_per_s + judgement.growth_bytes_per_s;
        let generations = self.judgement.generations.max(judgement.generations);
        // The strongest evidence of any one process decides.
        if (judgement.verdict, judgement.confidence) > (self.judgement.verdict, self.judgement.confidence) {
            self.judgement = judgement;
        }
        self.judgement.growth_bytes_per_s = growth;
        self.judgement.generations = generations;
        if copy.live_bytes > self.most {
            (self.most, self.pid) = (copy.live_bytes, pid);
        }
        self.processes += (copy.live_count > 0) as i32;
        let all = &mut self.copy;
        all.alloc_count += copy.alloc_count;
        all.alloc_bytes += copy.alloc_bytes;
        all.live_count += copy.live_count;
        all.live_bytes += copy.live_bytes;
        all.exact &= copy.exact;
        all.first_seen = all.first_seen.min(copy.first_seen);
        if copy.last_seen > all.last_seen {
            (all.last_seen, all.query_id) = (copy.last_seen, copy.query_id);
        }
    }
}

/// Worst first.
pub fn gather(function: &str, pid: Option<i32>, wanted: impl Fn(Verdict) -> bool) -> Vec<Gathered> {
    let (share, slots) = super::slots(function, pid);
    let mut folded: HashMap<(String, u32, u32), Gathered> = HashMap::new();
    for (index, slot) in slots {
        if slot.reset_pending() {
            continue;
        }
        let (pid, backend_type) = (slot.pid.load(Acquire), super::backend_type(slot));
        for chunk in share.sites.owned(index) {
            for (_, site) in share.sites.rows_of(chunk) {
                let Some(copy) = site.copy() else { continue };
                let judgement = judge_site(&share, slot, &copy);
                match folded.entry((backend_type.clone(), copy.path, copy.stack)) {
                    std::collections::hash_map::Entry::Occupied(mut known) => {
                        known.get_mut().merge(judgement, copy, pid)
                    }
                    std::collections::hash_map::Entry::Vacant(free) => {
                        free.insert(Gathered {
                            judgement,
                            backend_type: backend_type.clone(),
                            path: share.path_name(copy.path),
                            processes: (copy.live_count > 0) as i32,
                            pid,
                            most: copy.live_bytes,
                            copy,
                        });
                    }
                }
            }
        }
    }
    let mut rows: Vec<Gathered> = folded.into_values().filter(|g| wanted(g.judgement.verdict)).collect();
    rows.sort_by(|a, b| {
        b.rank()
            .partial_cmp(&a.rank())
            .unwrap_or(std::cmp::Ordering::Equal)
            .then(b.copy.live_bytes.cmp(&a.copy.live_bytes))
    });
    rows
}

/// The frames of a row's stack, and which of them is the culprit: the innermost that does not only allocate for
/// its caller.
pub fn culprit(symbols: &mut Symbols, stack: u32) -> (Vec<Frame>, usize) {
    let frames = symbols.stack(stack);
    let index = innermost(&frames);
    (frames, index)
}

fn innermost(frames: &[Frame]) -> usize {
    frames.iter().position(|f| !f.function.as_deref().is_some_and(is_helper)).unwrap_or(0)
}

/// The frames that stacks have in common, from `main` on, and the culprit among them: who made the contexts that
/// these stacks allocate in. Of a function that allocates at several of its lines, one line is shown.
pub fn common(stacks: Vec<Vec<Frame>>) -> (Vec<Frame>, usize) {
    let mut stacks = stacks.into_iter();
    let mut shared: Vec<Frame> = stacks.next().unwrap_or_default();
    for other in stacks {
        let same = shared.iter().rev().zip(other.iter().rev()).take_while(|(a, b)| a == b).count();
        let function = |frames: &[Frame]| frames.iter().rev().nth(same).and_then(|f| f.function.clone());
        let split = function(&shared).is_some() && function(&shared) == function(&other);
        shared.drain(..shared.len() - same - split as usize);
    }
    let index = innermost(&shared);
    (shared, index)
}
