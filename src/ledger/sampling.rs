//! Poisson sampling by bytes, and the weights that make its estimates unbiased.
//!
//! Each byte starts a sample with probability 1/R. An allocation of s bytes is therefore recorded with
//! p = 1 - exp(-s/R), and its record stands for 1/p allocations and s/p bytes. Weights are 48.16 fixed point, so
//! that what was added is subtracted to the bit.

use super::series;

/// One allocation, in the fixed point of the accounts.
pub const ONE: u64 = 1 << 16;

/// A sampling rate: 0 records everything, else the mean number of bytes between two samples.
pub type Rate = u64;

/// The chance that an allocation of `size` bytes gets a record at this rate.
pub fn probability(size: u64, rate: Rate) -> f64 {
    if rate == 0 { 1.0 } else { series::one_less_exp(size.max(1) as f64 / rate as f64) }
}

/// How many allocations a record of this size and rate stands for, in units of 1/[`ONE`].
#[inline]
pub fn weight(size: u64, rate: Rate) -> u64 {
    if rate == 0 { ONE } else { (ONE as f64 / probability(size, rate) + 0.5) as u64 }
}

/// A small generator (xorshift64*): sampling needs speed and no secrets.
pub struct Rng(u64);

impl Rng {
    /// All zero, and not to be asked.
    pub const fn unseeded() -> Self {
        Rng(0)
    }

    pub const fn new(seed: u64) -> Self {
        Rng(seed ^ 0x9E37_79B9_7F4A_7C15 | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Uniform in (0, 1].
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

/// At most this many distinct rates in the life of a process; one beyond it becomes the last of them.
const LEVELS: usize = 160;

/// The rates that records were made with. A record keeps an index only, so that what was added with a rate is
/// subtracted with the same.
pub struct Rates {
    /// Beside the first.
    more: usize,
    levels: [Level; LEVELS],
}

#[derive(Clone, Copy)]
struct Level {
    rate: Rate,
    /// What turns ln u into a gap.
    factor: f64,
}

impl Rates {
    /// Level 0 is exact.
    pub const fn new() -> Self {
        Rates { more: 0, levels: [Level { rate: 0, factor: 0.0 }; LEVELS] }
    }

    #[inline]
    pub fn rate(&self, level: u8) -> Rate {
        self.levels[level as usize].rate
    }

    pub fn level(&mut self, rate: Rate) -> u8 {
        if let Some(level) = self.levels[..=self.more].iter().position(|l| l.rate == rate) {
            return level as u8;
        }
        if self.more < LEVELS - 1 {
            let factor = if rate > 1 { 1.0 / series::ln_one_less(1.0 / rate as f64) } else { 0.0 };
            self.more += 1;
            self.levels[self.more] = Level { rate, factor };
        }
        self.more as u8
    }

    /// Bytes until the next sample: geometric with the level's rate as its mean.
    pub fn gap(&self, level: u8, rng: &mut Rng) -> i64 {
        let gap = series::ln(rng.unit()) * self.levels[level as usize].factor;
        gap.min(i64::MAX as f64 / 4.0) as i64 + 1
    }

    /// How many allocations a record of this size and level stands for, in units of 1/[`ONE`].
    #[inline]
    pub fn weight(&self, size: u64, level: u8) -> u64 {
        if level == 0 { ONE } else { weight(size, self.rate(level)) }
    }
}
