//! Call sites of one process or of all, folded by backend type, context path and call stack.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::look::{Held, Look};
use crate::ledger::account::SiteCopy;
use crate::share::Share;
use crate::share::row::Seen;
use crate::symbols::helpers::{innermost, is_helper};
use crate::symbols::{Frame, Symbols};
use crate::verdict::{Judgement, Verdict, caches, judge_account};
use crate::walk::path::DEEPEST;

/// One row of `rheap_leaks` and `rheap_call_sites`, before names.
pub struct Gathered {
    pub judgement: Judgement,
    pub copy: SiteCopy,
    pub backend_type: Rc<str>,
    pub processes: i32,
    pub pid: i32,
    /// More than one where rows were folded.
    pub stacks: Vec<u32>,
    /// Live bytes, or the blocks of contexts that multiply: what `rheap.min_leak_bytes` is about.
    pub size: u64,
    /// Allocations alive in the process that has most of them, or entries of its hash table, or contexts that multiply.
    objects: u64,
    /// Live bytes of the process that holds most.
    most: u64,
}

impl Gathered {
    /// The worst first.
    pub fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let (ours, theirs) = (self.rank(), other.rank());
        theirs
            .partial_cmp(&ours)
            .unwrap_or(std::cmp::Ordering::Equal)
            .then(other.copy.live_bytes.cmp(&self.copy.live_bytes))
    }

    fn rank(&self) -> (Verdict, f64) {
        (self.judgement.verdict, self.judgement.confidence * self.size as f64)
    }

    /// Takes in what another site of the same leak holds in the same processes.
    pub fn absorb(&mut self, other: Gathered) {
        let processes = self.processes.max(other.processes);
        self.stacks.extend(&other.stacks);
        self.merge(other);
        self.processes = processes;
    }

    /// The row of what is one row of one process.
    pub fn of(held: &Held, group: Group) -> Self {
        let Group { copy, contexts, context_bytes, stacks, .. } = group;
        Gathered {
            judgement: judge_account(&held.progress, &copy, contexts, context_bytes),
            backend_type: held.backend_type.clone(),
            processes: (copy.live_count > 0) as i32,
            pid: held.pid,
            stacks,
            size: copy.live_bytes.max(context_bytes),
            // A hash table allocates for many entries at a time.
            objects: if contexts == 0 { copy.live_count.max(copy.live_bytes / ENTRY) } else { contexts as u64 },
            most: copy.live_bytes,
            copy,
        }
    }

    /// Why all of it may be kept without a leak, as the names on nearly all of its stacks tell. Of one stack the frames are
    /// given.
    pub fn reason_to_grow(&self, path: &str, frames: &[Frame], symbols: &mut Symbols) -> Option<String> {
        let [_] = self.stacks[..] else {
            // Contexts of a cache are made by many ways, with nothing in common but the cache.
            let reasons = self.stacks.iter().map(|&stack| self.reason_of(path, &symbols.stack(stack)));
            let reasons: Vec<String> = reasons.flatten().collect();
            return nearly_all(reasons.len(), self.stacks.len()).then(|| reasons.into_iter().next()).flatten();
        };
        self.reason_of(path, frames)
    }

    fn reason_of(&self, path: &str, frames: &[Frame]) -> Option<String> {
        if self.judgement.of_transaction {
            // Resource owners, for one, have no exported names: a stripped server has the benefit of the doubt, for so long.
            let doubt = || caches::is_nameless(frames).then_some("something of the server's");
            if let Some(what) = caches::until_transaction_ends(frames).or_else(doubt) {
                return Some(format!("kept until the transaction ends: {what}"));
            }
        }
        caches::known(path, frames, self.objects, self.judgement.generations).map(str::to_string)
    }

    fn merge(&mut self, other: Gathered) {
        let (ours, theirs) = (&mut self.judgement, other.judgement);
        let growth = ours.growth_bytes_per_s + theirs.growth_bytes_per_s;
        let generations = ours.generations.max(theirs.generations);
        // Of a process that holds nothing suspect, no matter how old.
        let may_stay = |judgement: &Judgement| judgement.verdict < Verdict::Suspect || judgement.of_transaction;
        let of_transaction = may_stay(ours) && may_stay(&theirs);
        // The strongest evidence of any one process decides.
        if (theirs.verdict, theirs.confidence) > (ours.verdict, ours.confidence) {
            *ours = theirs;
        }
        ours.growth_bytes_per_s = growth;
        ours.generations = generations;
        ours.of_transaction = of_transaction;
        if other.copy.live_bytes > self.most {
            (self.most, self.pid) = (other.copy.live_bytes, other.pid);
        }
        self.processes += other.processes;
        self.size += other.size;
        self.objects = self.objects.max(other.objects);
        let (all, copy) = (&mut self.copy, other.copy);
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

/// What of one process is one row: a call site, or all that the contexts of a kind that multiplies hold.
pub struct Group {
    pub copy: SiteCopy,
    pub contexts: u32,
    /// Of their blocks.
    pub context_bytes: u64,
    pub stacks: Vec<u32>,
    /// The paths that its sites allocate in.
    pub paths: Vec<u32>,
}

impl From<SiteCopy> for Group {
    fn from(copy: SiteCopy) -> Self {
        Group { stacks: vec![copy.stack], paths: vec![copy.path], contexts: 0, context_bytes: 0, copy }
    }
}

/// Which call sites of a process make one row.
#[derive(Clone, Copy, PartialEq)]
pub enum Fold {
    Nothing,
    /// Those that allocate in contexts that multiply, since the leak is one of contexts.
    Contexts,
}

/// About as large is an entry of a hash table.
const ENTRY: u64 = 512;

/// So many contexts of one path are many.
const MANY: u32 = 32;

/// Into so many sites a loop may have been unrolled.
const UNROLLED: u64 = 16;

/// Sums up the sites that allocate in contexts that multiply, under the outermost path that does. A site belongs to
/// them if it has chunks in a good part of them (a loop that was unrolled makes several sites of one): what leaks within
/// a few of many contexts is a leak of its own.
pub fn multiplied(share: &Share, held: &Held) -> Vec<Group> {
    let many: HashMap<u32, &Seen> =
        held.rows.iter().filter(|row| row.seen.contexts >= MANY).map(|row| (row.path, &row.seen)).collect();
    let mut groups: Vec<Group> = Vec::new();
    let mut of_path: HashMap<u32, usize> = HashMap::new();
    for copy in held.sites.iter().cloned() {
        let mut outermost = None;
        let mut path = copy.path;
        // No path is deeper, unless a dying writer has left one that never ends.
        for _ in 0..DEEPEST {
            if path == 0 {
                break;
            }
            if let Some(&seen) = many.get(&path)
                && copy.live_count * UNROLLED >= seen.contexts as u64
            {
                outermost = Some((path, seen));
            }
            path = share.parent(path);
        }
        let Some((path, seen)) = outermost else {
            groups.push(copy.into());
            continue;
        };
        match of_path.get(&path) {
            Some(&known) => groups[known].join(copy),
            None => {
                of_path.insert(path, groups.len());
                let (stacks, paths) = (vec![copy.stack], vec![path, copy.path]);
                groups.push(Group {
                    stacks,
                    paths,
                    contexts: seen.contexts,
                    context_bytes: seen.total_bytes,
                    copy: SiteCopy { path, ..copy },
                });
            }
        }
    }
    groups
}

impl Group {
    fn join(&mut self, other: SiteCopy) {
        self.stacks.push(other.stack);
        self.paths.push(other.path);
        self.copy.join(&other);
    }
}

/// Worst first.
pub fn gather(look: &Look, fold: Fold, wanted: impl Fn(&Gathered) -> bool) -> Vec<Gathered> {
    let mut folded: HashMap<(Rc<str>, u32, u32), Gathered> = HashMap::new();
    for held in &look.processes {
        let groups = match fold {
            Fold::Nothing => held.sites.iter().cloned().map(Group::from).collect(),
            Fold::Contexts => multiplied(&look.share, held),
        };
        for group in groups {
            let stack = if group.contexts == 0 { group.copy.stack } else { 0 };
            match folded.entry((held.backend_type.clone(), group.copy.path, stack)) {
                Entry::Occupied(mut known) => known.get_mut().merge(Gathered::of(held, group)),
                Entry::Vacant(free) => drop(free.insert(Gathered::of(held, group))),
            }
        }
    }
    let mut rows: Vec<Gathered> = folded.into_values().filter(wanted).collect();
    rows.sort_by(Gathered::cmp);
    rows
}

impl Gathered {
    /// The frames of the row, and the index of the culprit among them.
    pub fn frames(&self, symbols: &mut Symbols) -> (Vec<Frame>, usize) {
        match &self.stacks[..] {
            [stack] => culprit(symbols, *stack),
            stacks => common(stacks.iter().map(|&stack| symbols.stack(stack)).collect()),
        }
    }
}

/// The frames of a stack, and which of them is the culprit: the innermost that does not only allocate for
/// its caller.
pub fn culprit(symbols: &mut Symbols, stack: u32) -> (Vec<Frame>, usize) {
    let frames = symbols.stack(stack);
    let index = innermost(&frames);
    (frames, index)
}

/// What is said of all stacks of a row must hold for nine of ten.
fn nearly_all(some: usize, all: usize) -> bool {
    some * 10 >= all * 9
}

/// Who made the contexts that all these stacks allocate in: the innermost function that nearly all of them have, at
/// whatever depth, and the frames from there on of a stack that has it.
pub fn common(stacks: Vec<Vec<Frame>>) -> (Vec<Frame>, usize) {
    let culprits = |frames: &[Frame]| -> Vec<String> {
        frames.iter().filter_map(|f| f.function.clone()).filter(|f| !is_helper(f)).collect()
    };
    let functions: Vec<Vec<String>> = stacks.iter().map(|frames| culprits(frames)).collect();
    let mut having: HashMap<&str, usize> = HashMap::new();
    for of_stack in &functions {
        for function in of_stack.iter().map(String::as_str).collect::<HashSet<_>>() {
            *having.entry(function).or_default() += 1;
        }
    }
    let innermost_of: Vec<Option<&str>> = functions
        .iter()
        .map(|of_stack| of_stack.iter().map(String::as_str).find(|f| nearly_all(having[f], stacks.len())))
        .collect();
    let votes = |function: &str| innermost_of.iter().filter(|&&f| f == Some(function)).count();
    // The first of equals.
    let best = innermost_of.iter().flatten().rev().copied().max_by_key(|function| votes(function));
    let chosen = best.and_then(|best| {
        let stack = innermost_of.iter().position(|&f| f == Some(best))?;
        let from = stacks[stack].iter().position(|f| f.function.as_deref() == Some(best))?;
        Some(stacks[stack][from..].to_vec())
    });
    (chosen.unwrap_or_else(|| stacks.into_iter().next().unwrap_or_default()), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stack(functions: &[&str]) -> Vec<Frame> {
        let frame =
            |&f: &&str| Frame { function: Some(f.into()), location: format!("{f}.c:1"), address: String::new() };
        functions.iter().map(frame).collect()
    }

    fn culprit_of(stacks: &[&[&str]]) -> String {
        let (frames, at) = common(stacks.iter().map(|s| stack(s)).collect());
        assert_eq!((frames[frames.len() - 1].name(), at), ("main", 0));
        frames[at].name().into()
    }

    #[test]
    fn who_makes_contexts_is_found_at_whatever_depth() {
        let direct: &[&str] = &["palloc", "compile", "do_compile", "call_handler", "main"];
        let nested: &[&str] =
            &["palloc", "copyObjectImpl", "add", "do_compile", "call_handler", "loop", "call", "main"];
        assert_eq!(culprit_of(&[direct, nested]), "do_compile");
        assert_eq!(culprit_of(&[direct, direct]), "compile");
        // One that has nothing to do with it is outvoted by nine, not by one.
        let other: &[&str] = &["palloc", "do_prepare", "main"];
        assert_eq!(culprit_of(&[other, direct]), "main");
        assert_eq!(culprit_of(&[&[other][..], &[nested, direct].repeat(5)].concat()), "do_compile");
    }
}
