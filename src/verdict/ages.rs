//! How old what is alive is, in epochs.

use super::Evidence;
use crate::ledger::account::Age;

/// Of what is alive, the part that may be older than what counts as its oldest: one chunk that was made at the start and
/// is kept for good does not tell how long the others live.
const ODD: f64 = 0.1;

pub struct Ages {
    /// Distinct epochs of which something is alive.
    pub generations: u32,
    /// Records alive.
    pub records: u64,
    /// The first and the last epoch that something alive can be of.
    pub first: u32,
    pub last: u32,
    /// At the latest allocation, the age that nine tenths of what is alive do not exceed, as far as it is certain.
    pub certain_age: u64,
    /// Bytes alive of the earlier and of the later half of the epochs between `first` and `last`.
    pub earlier_bytes: f64,
    pub later_bytes: f64,
    /// By how many standard errors the earlier half has joined more bytes per bin than the later, as the bins of each
    /// half scatter: a few samples that stand for much make no difference of it. Infinite where a half has too few bins.
    pub contrast: f64,
}

/// Bins that tell how they scatter.
const SCATTER: usize = 3;

/// Mean and variance of the mean.
fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0) / n)
}

fn contrast(earlier: &[f64], later: &[f64]) -> f64 {
    if earlier.len().min(later.len()) < SCATTER {
        return f64::INFINITY;
    }
    let ((earlier, its), (later, theirs)) = (mean(earlier), mean(later));
    (earlier - later) / (its + theirs).sqrt()
}

impl Ages {
    pub fn of(e: &Evidence) -> Ages {
        let epoch = |bin: usize| e.first_epoch as u64 + bin as u64 * e.bin_width;
        let alive = |age: &Age| age.records > 0;
        let first = epoch(e.ages.iter().position(alive).unwrap_or(0)) as u32;
        let newest = e.ages.iter().rposition(alive).unwrap_or(0);
        let last = (epoch(newest + 1) - 1).min(e.last_epoch as u64) as u32;

        let all: f64 = e.ages.iter().map(|age| age.bytes as f64).sum();
        let mut before = 0.0;
        let oldest = e.ages.iter().position(|age| {
            before += age.bytes as f64;
            before > all * ODD
        });
        let certain_age = (e.last_epoch as u64).saturating_sub(epoch(oldest.unwrap_or(0) + 1) - 1);

        let middle = (first as f64 + last as f64 + 1.0) / 2.0;
        let mut earlier_bytes = 0.0;
        for (bin, age) in e.ages.iter().enumerate().filter(|(_, age)| alive(age)) {
            let (start, end) = (epoch(bin) as f64, (epoch(bin + 1) as f64).min(last as f64 + 1.0));
            earlier_bytes += age.bytes as f64 * ((middle - start) / (end - start)).clamp(0.0, 1.0);
        }
        let whole = |from: f64, to: f64| -> Vec<f64> {
            let bins = (0..=newest).filter(|&bin| epoch(bin) as f64 >= from && epoch(bin + 1) as f64 <= to);
            bins.map(|bin| e.ages[bin].bytes as f64).collect()
        };
        let contrast = contrast(&whole(first as f64, middle), &whole(middle, last as f64 + 1.0));
        Ages {
            generations: e.ages.iter().fold(0, |sum, age| age.generations.saturating_add(sum)),
            records: e.ages.iter().map(|age| age.records as u64).sum(),
            first,
            last,
            certain_age,
            earlier_bytes,
            later_bytes: all - earlier_bytes,
            contrast,
        }
    }

    /// Epochs in which what is alive was allocated.
    pub fn span(&self) -> f64 {
        (self.last - self.first.min(self.last)) as f64
    }
}
