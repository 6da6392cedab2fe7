//! Reads the context tree into a bounded time series per context path.

pub mod moved;
pub mod path;

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::Ordering::*;

use crate::hook::{self, Table as MethodTable};
use crate::ledger::account::{HISTORY, SiteCopy};
use crate::ledger::region::Budget;
use crate::ledger::table::{Entry, Table};
use crate::pg_compat::{self, MemoryContext};
use crate::process::{self, Process, Text};
use crate::reserve;
use crate::settings;
use crate::share::Share;
use crate::share::row::Seen;
use crate::share::slot::Slot;
use crate::stack::{CUT, unframe};
use crate::verdict::proportion::Held;
use crate::verdict::{Progress, Verdict, caches, judge_account};
use moved::Moved;
use path::DEEPEST;
use pgrx::pg_sys;

/// What this walk has found of a path so far, and where its row is.
#[derive(Clone, Copy, Default)]
struct Found {
    path: u64,
    seen: Seen,
    walk: u32,
    /// Of what the walk before found, the bytes that were free, in 256ths.
    free_part: u32,
    /// Id of the row plus 1; 0: none yet.
    row: u32,
    chain: u32,
}

impl Entry for Found {
    fn key(&self) -> u64 {
        self.path
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }
}

/// Begins with what each statement asks for.
#[repr(C)]
pub struct Walk {
    pub moved: Moved,
    /// Microseconds, as `process::now`.
    next: i64,
    /// That was decided well after this: if it is before then again, the clock has been set back.
    not_before: i64,
    paths: Table<Found>,
    /// Until this the process counts as starting: what it holds then is its baseline.
    started: i64,
    /// Not before this, whatever has happened.
    earliest: i64,
    /// Bytes alive in the ledger at the last walk.
    held: u64,
    fresh: bool,
}

/// A walk may take this part of the process's time: the next one waits for as many times its duration.
const PART: i64 = 100;
/// The statistics of a context follow each of its free chunks; of this many bytes in blocks, some milliseconds long.
const LARGE: u64 = 16 << 20;
/// Microseconds by which times that belong together may differ: that of a statement is of its beginning.
const SET_BACK: i64 = 60_000_000;
/// A change of this many bytes is worth a walk out of turn.
const NEWS: u64 = 1 << 20;

impl Walk {
    pub const fn new() -> Self {
        Walk {
            paths: Table::new(),
            next: 0,
            not_before: 0,
            started: 0,
            earliest: 0,
            held: 0,
            fresh: false,
            moved: Moved::new(),
        }
    }

    /// The clock is the wall's, which costs nothing where it is read, so it may be set: forward brings a walk early,
    /// and back must not put it off.
    #[inline]
    pub fn is_due(&self, now: i64) -> bool {
        now >= self.next || self.is_set_back(now)
    }

    #[inline]
    fn is_set_back(&self, now: i64) -> bool {
        now < self.not_before
    }

    /// A walk has been made since leaks were last looked for.
    #[inline]
    pub fn has_news(&self) -> bool {
        self.fresh
    }

    /// The next walk is the first, and sets the baseline. It waits, so that what a process needs to start is in it.
    pub fn forget_parents(&mut self, now: i64, budget: &mut Budget) {
        self.paths.abandon(budget);
        self.forget(now, budget);
    }

    /// The same for a process whose history is its own.
    pub fn forget(&mut self, now: i64, budget: &mut Budget) {
        self.paths.clear(budget);
        (self.not_before, self.earliest) = (now - SET_BACK, 0);
        self.next = now + settings::walk_interval_ms() as i64 * 1000;
        self.started = self.next;
    }

    /// No walk interval has passed since the process started.
    pub fn is_starting(&self) -> bool {
        let now = process::now();
        now < self.started && !self.is_set_back(now)
    }

    /// Walks at the next look.
    pub fn hurry(&mut self) {
        self.next = 0;
    }

    /// A statement has ended that changed much: its session may be idle for long from now on, and should not be
    /// seen as it was before.
    pub fn note_held(&mut self, held: u64, now: i64) {
        if held.abs_diff(self.held) >= NEWS && (now >= self.earliest || self.is_set_back(now)) {
            self.hurry();
        }
    }
}

fn clock() -> i64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to a local.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec * 1_000_000 + t.tv_nsec / 1000
}

/// Visits every context once, adds it to its path's row, and adopts what should be watched. `within` a statement, what
/// would take long is estimated: somebody's palloc waits.
///
/// # Safety
/// The tree is consistent: at the entry or exit of a palloc, or between messages; not in a signal handler.
pub unsafe fn walk(process: &mut Process, slot: &Slot, within: bool) {
    let Some(share) = process.share else { return };
    let start = clock();
    let number = slot.walks.load(Relaxed) + 1;
    let baseline = number == 1 || (slot.has_no_messages() && process.walk.is_starting());
    let on = process.is_on();
    let adopt = settings::adopt_bytes();
    let mut trail = [0u32; DEEPEST];
    let (mut total, mut watched) = (0u64, 0u32);
    // SAFETY: the caller's promise; visiting changes only `methods`, which the links do not depend on.
    unsafe {
        hook::each_context(|context, depth| {
            let level = depth.min(DEEPEST - 1);
            let parent = if level == 0 { 0 } else { trail[level - 1] };
            let path = if depth < DEEPEST { path::path_under(parent, context, &share) } else { trail[level] };
            trail[level] = path;
            let size = (*context).mem_allocated as u64;
            if on && hook::long_lived(context) {
                moved::adopt(context);
            } else if on && size > adopt && hook::table_of(context) == MethodTable::Pass {
                hook::watch(context);
            }
            let is_watched = hook::table_of(context) == MethodTable::Watch;
            watched += is_watched as u32;
            if is_watched {
                reparent(process, context, path);
            }
            let seen = if within && size > LARGE {
                let free_part = free_part(&process.walk.paths, path, number);
                let free_bytes = size / 256 * free_part as u64;
                Seen { contexts: 1, total_bytes: size, free_bytes, kind: kind(context), watched: is_watched }
            } else {
                measure(context, is_watched)
            };
            total += seen.total_bytes;
            add(&mut process.walk.paths, &mut process.aside, path, seen, number);
            true
        });
    }
    slot.walk_times[number as usize % HISTORY].store(process::now(), Relaxed);
    process.ledger.each_site(|site| share.sites.rows[site as usize].walked(number));
    for id in 1..=process.walk.paths.high() {
        let found = process.walk.paths.get_mut(id);
        if found.row == 0 {
            let Some(row) = process.rows.take(&share.rows, process.slot) else { break };
            found.row = row + 1;
        }
        // A path that this walk did not meet holds nothing now.
        let seen = if found.walk == number { found.seen } else { Seen { kind: found.seen.kind, ..Seen::default() } };
        share.rows.rows[found.row as usize - 1].publish(found.path as u32, seen, process::now(), baseline);
    }
    slot.context_bytes.store(total, Relaxed);
    slot.watched_contexts.store(watched, Relaxed);
    slot.walks.store(number, Release);
    let duration = clock() - start;
    let now = process::now();
    process.walk.not_before = now - SET_BACK;
    process.walk.earliest = now + duration * PART;
    process.walk.next = process.walk.earliest.max(now + settings::walk_interval_ms() as i64 * 1000);
    process.walk.held = process.ledger.held_bytes();
    (process.walk.fresh, process.has_afterwards) = (true, true);
}

/// Number and bytes of the contexts of each path.
///
/// # Safety
/// As for [`walk`].
pub unsafe fn census(process: &Process) -> HashMap<u32, Held> {
    let mut found: HashMap<u32, Held> = HashMap::new();
    let Some(share) = process.share else { return found };
    let mut trail = [0u32; DEEPEST];
    // SAFETY: the caller's promise.
    unsafe {
        hook::each_context(|context, depth| {
            let level = depth.min(DEEPEST - 1);
            let parent = if level == 0 { 0 } else { trail[level - 1] };
            trail[level] = path::path_under(parent, context, &share);
            let held = found.entry(trail[level]).or_default();
            held.count += 1;
            held.bytes += (*context).mem_allocated as i64;
            true
        });
    }
    found
}

/// What a context holds moves to the accounts of its path, if that has changed. Nothing is pending.
fn reparent(process: &mut Process, context: MemoryContext, path: u32) {
    let Process { ledger, sites, slot, share: Some(share), .. } = process else { return };
    let (slot, share) = (*slot, &*share);
    ledger.reparent(context as u64, path, share, |ledger, stack, path, cell| {
        Process::open_site(ledger, sites, share, slot, stack, path, cell)
    });
}

/// # Safety
/// A live context.
unsafe fn measure(context: MemoryContext, watched: bool) -> Seen {
    let mut counters = pg_sys::MemoryContextCounters { nblocks: 0, freechunks: 0, totalspace: 0, freespace: 0 };
    // SAFETY: `stats` only reads the context's blocks and free lists, and adds to the counters.
    unsafe {
        if let Some(stats) = (*(*context).methods).stats {
            stats(context, None, std::ptr::null_mut(), &mut counters, false);
        }
        Seen {
            contexts: 1,
            total_bytes: counters.totalspace as u64,
            free_bytes: counters.freespace as u64,
            kind: kind(context),
            watched,
        }
    }
}

/// # Safety
/// A live context.
unsafe fn kind(context: MemoryContext) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { pg_compat::kind_of(context) }.map_or(pg_compat::KINDS.len() as u32, |k| k as u32)
}

/// The part of a path's bytes that was free when it was last measured, in 256ths.
fn free_part(paths: &Table<Found>, path: u32, walk: u32) -> u32 {
    match paths.find(path as u64) {
        0 => 0,
        id if paths.get(id).walk == walk => paths.get(id).free_part,
        id => part(&paths.get(id).seen),
    }
}

fn part(seen: &Seen) -> u32 {
    (seen.free_bytes as u128 * 256 / seen.total_bytes.max(1) as u128) as u32
}

fn add(paths: &mut Table<Found>, budget: &mut Budget, path: u32, seen: Seen, walk: u32) {
    let mut id = paths.find(path as u64);
    if id == 0 && path != 0 {
        id = paths.insert(Found { path: path as u64, ..Found::default() }, budget);
    }
    if id == 0 {
        return;
    }
    let found = paths.get_mut(id);
    if found.walk != walk {
        found.walk = walk;
        found.free_part = part(&found.seen);
        found.seen = Seen::default();
    }
    found.seen.contexts += seen.contexts;
    found.seen.total_bytes += seen.total_bytes;
    found.seen.free_bytes += seen.free_bytes;
    found.seen.kind = seen.kind;
    found.seen.watched |= seen.watched;
}

/// Whether a call site leaks, as far as that can be told without the names of functions.
fn is_leak(share: &Share, progress: &Progress, copy: &SiteCopy) -> bool {
    let judgement = judge_account(progress, copy, 0, 0);
    judgement.verdict == Verdict::Leak
        && copy.live_bytes >= settings::min_leak_bytes()
        && !caches::may_be_cache(&share.path_name(copy.path), judgement.generations)
}

/// Leaks that are logged after one walk; others wait for the next.
const LOGGED: usize = 16;

/// After a walk, with `rheap.log_leaks`: one line for each leak that is seen for the first time.
pub fn log_new_leaks() {
    // SAFETY: between two messages; no hook is at work.
    let process = unsafe { process::current() };
    if !std::mem::take(&mut process.walk.fresh) || !settings::log_leaks() {
        return;
    }
    let (Some(share), Some(slot)) = (process.share, process.slot()) else { return };
    // Reasons are texts, which take memory, and there may be none.
    let Some(_held) = reserve::hold() else { return };
    let progress = Progress::of(slot);
    // Noted first: what logs them allocates, and so comes back to these books.
    let (mut leaks, mut found) = ([0; LOGGED], 0);
    process.ledger.each_site(|id| {
        let site = &share.sites.rows[id as usize];
        if found < LOGGED
            && let Some(copy) = site.copy()
            && is_leak(&share, &progress, &copy)
            && site.first_report()
        {
            leaks[found] = id;
            found += 1;
        }
    });
    for copy in leaks[..found].iter().filter_map(|&id| share.sites.rows[id as usize].copy()) {
        let mut line = Text::<2048>::new();
        // One that is cut short is still one.
        let _ = write_leak(&mut line, &share, &copy);
        pg_compat::log(line.as_c_str());
    }
}

fn write_leak(line: &mut impl Write, share: &Share, copy: &SiteCopy) -> std::fmt::Result {
    write!(line, "rheap: leak of {} bytes in {} allocations in ", copy.live_bytes, copy.live_count)?;
    share.write_path(copy.path, line)?;
    for (i, word) in share.stacks.words_of(copy.stack).iter().take(8).enumerate() {
        line.write_str(if i == 0 { " at " } else { " < " })?;
        match word.load(Relaxed) {
            CUT => line.write_str("(cut)")?,
            word => {
                let (module, offset) = unframe(word);
                process::write_address(line, share, module, offset)?;
            }
        }
    }
    write!(line, "; SELECT * FROM rheap_leaks({}) names the functions", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_does_not_put_walks_off() {
        let mut walk = Walk::new();
        let hour = 3_600_000_000;
        (walk.not_before, walk.earliest, walk.next) = (10 * hour - SET_BACK, 10 * hour + 500, 10 * hour + 1000);
        assert!(!walk.is_due(10 * hour + 999) && walk.is_due(10 * hour + 1000));
        assert!(!walk.is_due(10 * hour - 30_000_000), "a statement that began before the walk");
        assert!(walk.is_due(9 * hour), "the clock was set back");
        walk.note_held(NEWS, 10 * hour);
        assert!(!walk.is_due(10 * hour), "too early after the last walk");
        walk.note_held(NEWS, 9 * hour);
        assert_eq!(walk.next, 0);
    }

    #[test]
    fn what_is_not_measured_is_estimated_by_the_walk_before() {
        let (mut paths, mut budget) = (Table::new(), Budget::new(1 << 20));
        let seen = |total_bytes, free_bytes| Seen { contexts: 1, total_bytes, free_bytes, ..Seen::default() };
        assert_eq!(free_part(&paths, 5, 1), 0, "of a path that is new nothing is known");
        add(&mut paths, &mut budget, 5, seen(1000, 250), 1);
        assert_eq!(free_part(&paths, 5, 2), 64);
        // Two contexts of one path in the second walk: both go by what the first has found.
        add(&mut paths, &mut budget, 5, seen(4000, 1000), 2);
        assert_eq!(free_part(&paths, 5, 2), 64);
        add(&mut paths, &mut budget, 5, seen(4000, 4000), 2);
        assert_eq!((free_part(&paths, 5, 2), free_part(&paths, 5, 3)), (64, 160));
    }
}
