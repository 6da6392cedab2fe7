//! The few functions that sampling needs, as precise as it needs them. The C library's lie in tables and code of many
//! pages, and each of these is a page fault in a new process.

use std::f64::consts::{LN_2, SQRT_2};

/// The natural logarithm of a positive number.
pub fn ln(x: f64) -> f64 {
    const FRACTION: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    let (mut exponent, mut part) = ((bits >> 52) as i64 - 1023, f64::from_bits(bits & FRACTION | 1023 << 52));
    if part > SQRT_2 {
        (exponent, part) = (exponent + 1, part / 2.0);
    }
    exponent as f64 * LN_2 + 2.0 * artanh((part - 1.0) / (part + 1.0))
}

/// ln(1 - x) for a positive x of at most a half.
pub fn ln_one_less(x: f64) -> f64 {
    -2.0 * artanh(x / (2.0 - x))
}

/// 1 - exp(-x) for a positive x.
pub fn one_less_exp(x: f64) -> f64 {
    if x > 64.0 {
        return 1.0;
    }
    let halvings = (x / LN_2 + 0.5) as u64;
    let rest = halvings as f64 * LN_2 - x;
    // exp(rest) - 1, where the rest is no further from 0 than half a ln 2.
    // The first term that is left out is below 1e-11 of the sum.
    let terms = if rest.abs() < 1.0 / 16.0 { 6 } else { 10 };
    let mut series = 0.0;
    for n in (1..=terms).rev() {
        series = (series + 1.0) * rest / n as f64;
    }
    if halvings == 0 { -series } else { 1.0 - (1.0 + series) * f64::from_bits((1023 - halvings) << 52) }
}

/// For arguments up to a third.
fn artanh(x: f64) -> f64 {
    let square = x * x;
    let mut series = 0.0;
    for n in (0..10).rev() {
        series = series * square + 1.0 / (2 * n + 1) as f64;
    }
    x * series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_what_the_library_says() {
        let near = |ours: f64, right: f64| assert!((ours - right).abs() <= right.abs() * 1e-10, "{ours} {right}");
        for i in 1..100_000 {
            let x = (i as f64 / 99_999.0).powi(5);
            near(ln(x), x.ln());
            near(ln(x * 1e6), (x * 1e6).ln());
            near(ln_one_less(x / 2.0), (-x / 2.0).ln_1p());
            near(one_less_exp(x * 70.0), -(-x * 70.0).exp_m1());
        }
        near(ln(2f64.powi(-53)), 2f64.powi(-53).ln());
        near(one_less_exp(1e-12), 1e-12);
    }
}
