//! From the account of a call site to a verdict with a reason. Pure: numbers in, words out.
//!
//! Size alone says little. What tells a leak is *surviving generations*: of how many distinct epochs of work (messages,
//! forks, windows of time) something is still alive, and whether new ones keep joining while old ones stay. A cache
//! fills and stops; a queue forgets its oldest; a leak does neither.

pub mod caches;
pub mod proportion;
pub mod suppression;

use std::sync::atomic::Ordering::*;

use crate::ledger::account::{BINS, HISTORY, SiteCopy};
use crate::share::Share;
use crate::share::slot::Slot;

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
    pub alloc_count: u64,
    /// (records alive, distinct epochs among them) per bin of `bin_width` epochs, from `first_epoch` on.
    pub bins: [(u32, u32); BINS],
    pub bin_width: u64,
    pub first_epoch: u32,
    /// Of the latest allocation.
    pub last_epoch: u32,
    /// The process's epoch now.
    pub epoch: u32,
    /// (microseconds, live bytes) at the latest walks and now, oldest first.
    pub series: Vec<(i64, u64)>,
    pub first_seen: i64,
    pub last_seen: i64,
    pub min_leak_bytes: u64,
    /// What an epoch is in this process, in the plural.
    pub unit: &'static str,
    /// Why growth here is expected at first, from the table of known caches.
    pub known_cache: Option<&'static str>,
    /// The time of day of the first allocation, as people read it; empty where nobody does.
    pub since: String,
    /// So many contexts of one kind hold it; 0: it is not about contexts.
    pub contexts: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// 0..1, that it is a leak.
    pub confidence: f64,
    pub generations: u32,
    pub growth_bytes_per_s: f64,
    pub reason: String,
}

/// Fewer surviving generations than this are a burst, not a habit.
const HABIT: u32 = 3;
/// A known cache must outgrow this many generations before it is anything else.
pub const CACHE_HABIT: u32 = 64;
/// Hash tables allocate for many entries at a time, in chunks of at least this size: fewer generations say as much.
const BATCH_BYTES: u64 = 4096;
const BATCH_HABIT: u32 = 12;
/// Fewer windows than this show no trend.
const TREND: usize = 4;
/// A burst that is worth a look: this many bytes in this many chunks.
const BURST_BYTES: u64 = 1 << 20;
const BURST_COUNT: u64 = 1000;

pub fn judge(e: &Evidence) -> Judgement {
    let generations: u32 = e.bins.iter().map(|b| b.1).sum();
    let growth_bytes_per_s = slope(e);
    let freed = e.alloc_count.saturating_sub(e.live_count);
    let done = |verdict, confidence: f64, reason: String| Judgement {
        verdict,
        confidence: (confidence * 100.0).round() / 100.0,
        generations,
        growth_bytes_per_s,
        reason,
    };
    let fate = if freed == 0 {
        format!("nothing of {} allocations freed", e.alloc_count)
    } else {
        format!("{} of {} allocations freed", freed, e.alloc_count)
    };
    if e.live_count == 0 {
        return done(Verdict::Steady, 0.0, format!("nothing is held: all {} allocations were freed", e.alloc_count));
    }
    let ages = format!("{generations} generations of survivors in {} {}", span(e), e.unit);
    if e.live_bytes < e.min_leak_bytes {
        return done(
            Verdict::Steady,
            0.0,
            format!("holds {}, less than rheap.min_leak_bytes; {fate}", bytes(e.live_bytes)),
        );
    }
    let batches = e.live_bytes / e.live_count >= BATCH_BYTES;
    if let Some(why) = e.known_cache
        && generations < if batches { BATCH_HABIT } else { CACHE_HABIT }
    {
        return done(Verdict::Cache, 0.05, format!("{why}; {fate}; {ages}"));
    }
    if generations < HABIT {
        if let Some(windows) = trend(e)
            && freed > 0
        {
            let confidence = 1.0 - (-(windows as f64) / 3.0).exp();
            let rate = bytes(growth_bytes_per_s.max(0.0) as u64);
            return done(
                Verdict::Leak,
                confidence.min(0.99),
                format!("made larger again and again: more in {windows} windows, {rate} per second{}", e.since()),
            );
        }
        let settled = e.epoch.saturating_sub(e.last_epoch);
        return if e.live_bytes >= BURST_BYTES && e.live_count >= BURST_COUNT && freed * 10 < e.alloc_count {
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
    let pace = (e.last_epoch - e.first_epoch) as f64 / generations as f64;
    let quiet = e.epoch.saturating_sub(newest_survivor(e)) as f64;
    if quiet > 8.0 * pace + 8.0 {
        return done(Verdict::Cache, 0.1, format!("stopped growing {quiet:.0} {} ago; {ages}; {fate}", e.unit));
    }
    let (old, new) = halves(e);
    if old == 0 {
        return done(Verdict::Cache, 0.1, format!("only recent allocations are alive; {fate}; {ages}"));
    }
    // Generations that joined in the later half of its life, against those of the earlier half: a leak keeps its
    // pace, a cache slows down as it fills.
    let pace_kept = (new as f64 / old as f64).min(1.0);
    if pace_kept < 0.2 {
        return done(
            Verdict::Cache,
            0.2,
            format!(
                "growth saturates: {new} generations joined in the later half of its life, {old} in the earlier; {fate}"
            ),
        );
    }
    let kept = e.live_count as f64 / e.alloc_count.max(1) as f64;
    // Three generations of a site that frees nothing are worth as much as a dozen of one that frees most.
    let weight = generations as f64 * pace_kept * (0.25 + 0.75 * kept);
    let confidence = 1.0 - (-weight / 3.0).exp();
    let windows = e.series.len();
    let held = e.series.iter().filter(|&&(_, bytes)| bytes > 0).count();
    let held = if windows > 1 { format!("held in {held} of the last {windows} windows, ") } else { String::new() };
    let many = if e.contexts > 0 { format!("{} contexts of one kind, ", e.contexts) } else { String::new() };
    let units = span(e).max(1);
    let per_unit = bytes((e.live_bytes + units / 2) / units);
    let unit = e.unit.split(' ').next().unwrap_or_default().trim_end_matches('s');
    let reason = format!("{many}{held}{fate}, {per_unit} per {unit}, {ages}{}", e.since());
    done(if confidence >= 0.5 { Verdict::Leak } else { Verdict::Suspect }, confidence.min(0.99), reason)
}

impl Evidence {
    fn since(&self) -> String {
        if self.since.is_empty() { String::new() } else { format!(", since {}", self.since) }
    }
}

/// In how many windows there was more than in the one before, if that is nearly all of them, and the later ones add
/// about as much as the earlier: what a buffer that doubles, or grows to the largest message, does not do.
fn trend(e: &Evidence) -> Option<usize> {
    let steps: Vec<i64> = e.series.windows(2).map(|w| w[1].1 as i64 - w[0].1 as i64).collect();
    let grown = steps.iter().filter(|&&step| step > 0).count();
    let (earlier, later) = steps.split_at(steps.len() / 2);
    let keeps_pace = 2 * later.iter().sum::<i64>() >= earlier.iter().sum::<i64>();
    (grown >= TREND && grown * 4 >= steps.len() * 3 && keeps_pace).then_some(grown)
}

/// Epochs from the first allocation to now.
fn span(e: &Evidence) -> u64 {
    e.epoch.max(e.last_epoch).saturating_sub(e.first_epoch) as u64 + 1
}

/// The latest epoch that something alive can be of.
fn newest_survivor(e: &Evidence) -> u32 {
    let bin = e.bins.iter().rposition(|b| b.0 > 0).unwrap_or(0) as u64;
    e.last_epoch.min((e.first_epoch as u64 + (bin + 1) * e.bin_width - 1).min(u32::MAX as u64) as u32)
}

/// Surviving generations of the earlier and of the later half of the time in which the site has allocated.
fn halves(e: &Evidence) -> (u32, u32) {
    let used = ((e.last_epoch - e.first_epoch) as u64 / e.bin_width) as usize + 1;
    let used = used.min(BINS);
    let sum = |bins: &[(u32, u32)]| bins.iter().map(|b| b.1).sum();
    if used == 1 {
        return (e.bins[0].1, e.bins[0].1);
    }
    (sum(&e.bins[..used / 2]), sum(&e.bins[used / 2..used]))
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

/// A size as people write it.
pub fn bytes(n: u64) -> String {
    match n {
        0..10_240 => format!("{n} B"),
        10_240..10_485_760 => format!("{} kB", n / 1024),
        10_485_760..10_737_418_240 => format!("{} MB", n / 1_048_576),
        _ => format!("{} GB", n / 1_073_741_824),
    }
}

/// How far a process has come with its work, at the moment that its accounts are of.
pub struct Progress {
    epoch: u32,
    /// What an epoch is there, in the plural.
    unit: &'static str,
    walks: usize,
    walk_times: [i64; HISTORY],
}

impl Progress {
    pub fn of(slot: &Slot) -> Self {
        Progress {
            epoch: slot.epoch.load(Relaxed),
            unit: slot.work_unit(),
            walks: slot.walks.load(Acquire) as usize,
            walk_times: std::array::from_fn(|i| slot.walk_times[i].load(Relaxed)),
        }
    }
}

/// Gathers the evidence of a call site, or of all that so many contexts of one kind hold, summed up in one account, and
/// judges it. `contexts` is 0 where it is not about contexts.
pub fn judge_account(share: &Share, progress: &Progress, copy: &SiteCopy, contexts: u32) -> Judgement {
    let walks = progress.walks;
    let mut series: Vec<(i64, u64)> = (walks.saturating_sub(HISTORY - 1) + 1..=walks)
        .map(|w| (progress.walk_times[w % HISTORY], copy.history[w % HISTORY]))
        .filter(|&(t, _)| t != 0)
        .collect();
    if series.last().is_none_or(|&(t, _)| t < copy.last_seen) {
        series.push((copy.last_seen, copy.live_bytes));
    }
    let path = share.path_name(copy.path);
    judge(&Evidence {
        live_bytes: copy.live_bytes,
        live_count: copy.live_count,
        alloc_count: copy.alloc_count,
        bins: copy.bins,
        bin_width: copy.bin_width,
        first_epoch: copy.first_epoch,
        last_epoch: copy.last_epoch,
        epoch: progress.epoch,
        series,
        first_seen: copy.first_seen,
        last_seen: copy.last_seen,
        min_leak_bytes: crate::settings::min_leak_bytes(),
        unit: progress.unit,
        known_cache: caches::known(&path),
        since: crate::pg_compat::time_of_day(copy.first_seen),
        contexts,
    })
}

#[cfg(test)]
mod tests;
