//! From the account of a call site to a verdict with a reason. Pure: numbers in, words out.
//!
//! Size alone says little. What tells a leak is *surviving generations*: of how many distinct epochs of work (messages,
//! forks, windows of time) something is still alive, whether new ones keep joining at the pace of the old, and whether
//! they have outlived everything that was ever freed here. A cache fills and stops; a queue forgets its oldest; a leak
//! does neither.

mod ages;
pub mod caches;
pub mod proportion;
mod regrowth;
pub mod suppression;

use std::sync::atomic::Ordering::*;

use crate::ledger::account::{Age, BINS, HISTORY, SiteCopy};
use crate::moment;
use crate::share::slot::Slot;
use crate::units::bytes;
use ages::Ages;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Steady,
    Cache,
    Suspect,
    Leak,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Steady => "steady",
            Verdict::Cache => "cache",
            Verdict::Suspect => "suspect",
            Verdict::Leak => "leak",
        }
    }
}

/// What is known of one call site in one process.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    pub live_bytes: u64,
    pub live_count: u64,
    pub alloc_bytes: u64,
    pub alloc_count: u64,
    /// What is known of chunks is known of a sample of them.
    pub sampled: bool,
    /// What is alive, by bins of `bin_width` epochs from `first_epoch` on.
    pub ages: [Age; BINS],
    pub bin_width: u64,
    pub first_epoch: u32,
    /// Of the latest allocation.
    pub last_epoch: u32,
    /// The process's epoch now.
    pub epoch: u32,
    /// The first epoch of the transaction at hand; 0: none is known of.
    pub transaction: u32,
    /// Chunks that outlived their statement and were freed then, and the longest of their lives in epochs.
    pub ended: u32,
    pub longest_life: u32,
    /// (microseconds, live bytes) at the latest walks and now, oldest first.
    pub series: Vec<(i64, u64)>,
    pub first_seen: i64,
    pub last_seen: i64,
    pub now: i64,
    /// What an epoch is in this process, in the plural.
    pub unit: &'static str,
    /// Epochs are counted by the clock.
    pub timed: bool,
    /// When the first allocation was, as people read it; empty where nobody does.
    pub since: String,
    /// So many contexts of one kind hold it, with so many bytes of blocks; 0: it is not about contexts.
    pub contexts: u32,
    pub context_bytes: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// 0..1, that it is a leak.
    pub confidence: f64,
    pub generations: u32,
    pub growth_bytes_per_s: f64,
    pub reason: String,
    /// All that is alive was allocated in the transaction at hand, as far as ages tell.
    pub of_transaction: bool,
}

/// Fewer surviving generations than this are a burst, not a habit.
const HABIT: u32 = 3;
/// A burst that is worth a look: this many bytes in this many chunks; and so many, or so few epochs ago, that it stays
/// worth one.
const BURST_BYTES: u64 = 1 << 20;
const BURST_COUNT: u64 = 1000;
/// Fewer samples than this may be chance.
const BURST_SAMPLES: u64 = 8;
const LARGE_BURST: u64 = 16 << 20;
const RECENT_BURST: u32 = 64;
/// Of the pace in the earlier half of its life, what a growth has lost that saturates, or may be about to.
const SATURATED: f64 = 0.2;
const SATURATING: f64 = 0.45;
/// Of a sample, the halves must differ by so many times what chance makes of it.
const SIGNIFICANT: f64 = 3.0;
/// One chunk freed among so many alive says how long chunks live here.
const TURNOVER: u64 = 16;
/// What a process that has no messages did not add to for so long, it may not add to again; microseconds.
const LONG_QUIET: i64 = 60_000_000;

/// The verdict on a call site, whatever its size.
pub fn judge(e: &Evidence) -> Judgement {
    let ages = Ages::of(e);
    let generations = ages.generations;
    let done = |verdict, confidence: f64, reason: String| Judgement {
        verdict,
        confidence: (confidence * 100.0).round() / 100.0,
        generations,
        growth_bytes_per_s: slope(e),
        reason,
        // A bin that the transaction begins in counts as its own: what was there before may be long gone.
        of_transaction: e.transaction != 0 && ages.first as u64 + e.bin_width > e.transaction as u64,
    };
    let fate = e.fate();
    if e.live_count == 0 {
        return done(Verdict::Steady, 0.0, format!("nothing is held: all {} allocations were freed", e.alloc_count));
    }
    let survivors = format!("{generations} generations of survivors in {} {}", e.span(), e.unit);
    if let Some((confidence, how)) = regrowth::found(e) {
        let rate = bytes(slope(e).max(0.0) as u64);
        return done(Verdict::Leak, confidence, format!("{how}, {rate} per second{}", e.since()));
    }
    if generations < HABIT {
        let settled = e.epoch.saturating_sub(e.last_epoch);
        let freed = e.alloc_count.saturating_sub(e.live_count);
        let burst = e.live_bytes >= BURST_BYTES && e.live_count >= BURST_COUNT && freed * 10 < e.alloc_count;
        let burst = burst && (!e.sampled || ages.records >= BURST_SAMPLES);
        return if burst && (settled < RECENT_BURST || e.live_bytes >= LARGE_BURST) {
            done(
                Verdict::Suspect,
                0.3,
                format!("{} in one burst, {settled} {} ago, and still held; {fate}", bytes(e.live_bytes), e.unit),
            )
        } else {
            done(Verdict::Steady, 0.1, format!("allocated at one time, {settled} {} ago; {fate}", e.unit))
        };
    }
    // How often a generation stays, and for how long none has.
    let pace = ages.span() / generations as f64;
    let quiet = e.epoch.saturating_sub(ages.last) as f64;
    let quiet_time = e.now - e.last_seen;
    if quiet > 8.0 * pace + 8.0 && quiet > ages.span() / 2.0
        || e.timed && quiet_time > LONG_QUIET.max(2 * (e.last_seen - e.first_seen))
    {
        let ago = if e.timed { format!("{} s", quiet_time / 1_000_000) } else { format!("{quiet:.0} {}", e.unit) };
        return done(Verdict::Cache, 0.1, format!("stopped growing {ago} ago; {survivors}; {fate}"));
    }
    // What is alive has not outlived what was freed here: the oldest make room.
    if e.ended as u64 * TURNOVER >= ages.records && ages.certain_age <= 2 * e.longest_life as u64 + 2 {
        let lives = format!("chunks live up to {} {} here and are freed then", e.longest_life, e.unit);
        return done(Verdict::Cache, 0.1, format!("{lives}, and none alive is much older; {fate}"));
    }
    let (earlier, later) = halves(e, &ages);
    let kept_pace = later / earlier.max(1.0);
    if kept_pace < SATURATED {
        let halves = format!(
            "{} joined in the later half of its life, {} in the earlier",
            bytes(later as u64),
            bytes(earlier as u64)
        );
        return done(Verdict::Cache, 0.2, format!("growth saturates: {halves}; {fate}"));
    }
    let kept = e.live_count as f64 / e.alloc_count.max(1) as f64;
    // Three generations of a site that frees nothing are worth as much as a dozen of one that frees most.
    let weight = generations as f64 * kept_pace.min(1.0) * (0.25 + 0.75 * kept);
    let confidence = 1.0 - (-weight / 3.0).exp();
    let windows = e.series.len();
    let held = e.series.iter().filter(|&&(_, bytes)| bytes > 0).count();
    let held = if windows > 1 { format!("held in {held} of the last {windows} windows, ") } else { String::new() };
    let units = e.span().max(1);
    let per_unit = bytes((e.size() + units / 2) / units);
    let unit = e.unit.split(' ').next().unwrap_or_default().trim_end_matches('s');
    let many = match e.contexts {
        0 => String::new(),
        n => format!("{n} contexts of one kind in {}, ", bytes(e.context_bytes)),
    };
    let reason = format!("{many}{held}{fate}, {per_unit} per {unit}, {survivors}{}", e.since());
    // Of the work that there was, windows of time are a sample too.
    let enough = match e.sampled || e.timed {
        false => ages.records >= 16,
        true => {
            let of_generations = (1.0 - kept_pace) / (1.0 + kept_pace) * (generations as f64).sqrt();
            of_generations.min(ages.contrast) > SIGNIFICANT
        }
    };
    if kept_pace < SATURATING && enough {
        let slower = format!("growth slows down, to {:.0} % of what it was; {reason}", kept_pace * 100.0);
        return done(Verdict::Suspect, confidence.min(0.45), slower);
    }
    done(if confidence >= 0.5 { Verdict::Leak } else { Verdict::Suspect }, confidence.min(0.99), reason)
}

impl Judgement {
    /// Of what is too small to matter.
    pub fn small(self, bytes_held: u64) -> Judgement {
        let reason = format!("holds {}, less than rheap.min_leak_bytes; {}", bytes(bytes_held), self.reason);
        Judgement { verdict: Verdict::Steady, confidence: 0.0, reason, ..self }
    }

    /// Of what has a reason to grow.
    pub fn cache(self, why: &str) -> Judgement {
        let reason = format!("{why}; {}", self.reason);
        Judgement { verdict: Verdict::Cache, confidence: 0.05, reason, ..self }
    }
}

impl Evidence {
    /// What it takes, all in all.
    pub fn size(&self) -> u64 {
        self.live_bytes.max(self.context_bytes)
    }

    fn fate(&self) -> String {
        match self.alloc_count.saturating_sub(self.live_count) {
            0 => format!("nothing of {} allocations freed", self.alloc_count),
            freed => format!("{freed} of {} allocations freed", self.alloc_count),
        }
    }

    fn since(&self) -> String {
        if self.since.is_empty() { String::new() } else { format!(", since {}", self.since) }
    }

    /// Epochs from the first allocation to now.
    fn span(&self) -> u64 {
        self.epoch.max(self.last_epoch).saturating_sub(self.first_epoch) as u64 + 1
    }
}

/// Bytes alive that joined in the earlier half of its life, and in the later. Windows of time are of any length on a busy
/// machine, so where they are the epochs, the halves are of time, as long as the walks go back to its middle.
fn halves(e: &Evidence, ages: &Ages) -> (f64, f64) {
    let by_age = (ages.earlier_bytes, ages.later_bytes);
    let (true, Some(&(oldest, _)), Some(&(end, alive))) = (e.timed, e.series.first(), e.series.last()) else {
        return by_age;
    };
    let middle = e.first_seen + (end - e.first_seen) / 2;
    let Some(next) = e.series.iter().position(|&(t, _)| t > middle) else { return by_age };
    if middle < oldest {
        return by_age;
    }
    let (t0, b0) = if e.series[next - 1].0 < e.first_seen { (e.first_seen, 0) } else { e.series[next - 1] };
    let (t1, b1) = e.series[next];
    let at_middle = b0 as f64 + (b1 as f64 - b0 as f64) * (middle - t0) as f64 / (t1 - t0) as f64;
    (at_middle, (alive as f64 - at_middle).max(0.0))
}

/// Bytes per second by least squares over the windows, or over the site's life where there are none yet.
fn slope(e: &Evidence) -> f64 {
    if e.series.len() < 3 {
        let life = e.last_seen - e.first_seen;
        return if life > 0 { e.live_bytes as f64 / (life as f64 / 1e6) } else { 0.0 };
    }
    let n = e.series.len() as f64;
    let t0 = e.series[0].0;
    let points = e.series.iter().map(|&(t, b)| ((t - t0) as f64 / 1e6, b as f64));
    let (st, sb) = points.clone().fold((0.0, 0.0), |a, p| (a.0 + p.0, a.1 + p.1));
    let (mt, mb) = (st / n, sb / n);
    let (cov, var) = points.fold((0.0, 0.0), |a, p| (a.0 + (p.0 - mt) * (p.1 - mb), a.1 + (p.0 - mt).powi(2)));
    if var > 0.0 { cov / var } else { 0.0 }
}

/// How far a process has come with its work, at the moment that its accounts are of.
pub struct Progress {
    epoch: u32,
    transaction: u32,
    /// What an epoch is there, in the plural.
    unit: &'static str,
    timed: bool,
    now: i64,
    walks: usize,
    walk_times: [i64; HISTORY],
}

impl Progress {
    pub fn of(slot: &Slot) -> Self {
        Progress {
            epoch: slot.epoch.load(Relaxed),
            transaction: slot.transaction.load(Relaxed),
            unit: slot.work_unit(),
            timed: slot.is_timed(),
            now: crate::process::now(),
            walks: slot.walks.load(Acquire) as usize,
            walk_times: std::array::from_fn(|i| slot.walk_times[i].load(Relaxed)),
        }
    }
}

/// Gathers the evidence of a call site, or of all that so many contexts of one kind hold, in so many bytes of blocks and
/// summed up in one account, and judges it. `contexts` is 0 where it is not about contexts.
pub fn judge_account(progress: &Progress, copy: &SiteCopy, contexts: u32, context_bytes: u64) -> Judgement {
    let walks = progress.walks;
    let mut series: Vec<(i64, u64)> = (walks.saturating_sub(HISTORY - 1) + 1..=walks)
        .map(|w| (progress.walk_times[w % HISTORY], copy.history[w % HISTORY]))
        .filter(|&(t, _)| t != 0)
        .collect();
    if series.last().is_none_or(|&(t, _)| t < copy.last_seen) {
        series.push((copy.last_seen, copy.live_bytes));
    }
    judge(&Evidence {
        live_bytes: copy.live_bytes,
        live_count: copy.live_count,
        alloc_bytes: copy.alloc_bytes,
        alloc_count: copy.alloc_count,
        sampled: !copy.exact,
        ages: copy.ages,
        bin_width: copy.bin_width,
        first_epoch: copy.first_epoch,
        last_epoch: copy.last_epoch,
        epoch: progress.epoch,
        transaction: progress.transaction,
        ended: copy.ended,
        longest_life: copy.longest_life,
        series,
        first_seen: copy.first_seen,
        last_seen: copy.last_seen,
        now: progress.now,
        unit: progress.unit,
        timed: progress.timed,
        since: moment::since(copy.first_seen, progress.now),
        contexts,
        context_bytes,
    })
}

#[cfg(test)]
mod tests;
