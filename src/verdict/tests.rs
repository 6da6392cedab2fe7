use super::*;

/// A site that keeps `kept(epoch)` of `made(epoch)` chunks of 1000 bytes in each epoch, as its bins would show it.
fn site(epochs: u32, made: impl Fn(u32) -> u64, kept: impl Fn(u32) -> u64) -> Evidence {
    let mut e =
        Evidence { bin_width: 1, first_epoch: 1, unit: "messages", min_leak_bytes: 64 << 10, ..Evidence::default() };
    while epochs as u64 > e.bin_width * BINS as u64 {
        e.bin_width *= 2;
    }
    for epoch in 1..=epochs {
        let bin = &mut e.bins[((epoch - 1) as u64 / e.bin_width) as usize];
        bin.0 += kept(epoch) as u32;
        bin.1 += (kept(epoch) > 0) as u32;
        e.live_count += kept(epoch);
        e.alloc_count += made(epoch);
        if made(epoch) > 0 {
            e.last_epoch = epoch;
        }
    }
    e.epoch = epochs;
    e.live_bytes = e.live_count * 1000;
    e.last_seen = epochs as i64 * 1_000_000;
    e
}

#[test]
fn a_leak_in_each_epoch_is_a_leak() {
    let j = judge(&site(1000, |_| 1, |_| 1));
    assert_eq!((j.verdict, j.generations), (Verdict::Leak, 1000));
    assert!(j.confidence > 0.9);
    assert_eq!(
        j.reason,
        "nothing of 1000 allocations freed, 1000 B per message, 1000 generations of survivors in 1000 messages"
    );
}

#[test]
fn a_rare_leak_among_much_churn_is_a_leak() {
    assert_eq!(judge(&site(10_000, |_| 50, |e| (e % 50 == 0) as u64)).verdict, Verdict::Leak);
}

#[test]
fn a_few_large_statements_that_free_nothing_are_a_leak() {
    assert_eq!(judge(&site(4, |_| 100_000, |_| 100_000)).verdict, Verdict::Leak);
}

#[test]
fn one_burst_is_suspect_at_most() {
    assert_eq!(judge(&site(1, |_| 100_000, |_| 100_000)).verdict, Verdict::Suspect);
    assert_eq!(judge(&site(1, |_| 500, |_| 500)).verdict, Verdict::Steady);
}

#[test]
fn a_cache_that_fills_and_stops_is_a_cache() {
    let j = judge(&site(5000, |_| 10, |e| if e < 100 { 10 } else { 0 }));
    assert_eq!(j.verdict, Verdict::Cache);
    let slowing = judge(&site(4096, |_| 10, |e| (e < 100 || (e < 3000 && e % 500 == 0)) as u64 * 10));
    assert_eq!(slowing.verdict, Verdict::Cache);
}

#[test]
fn a_queue_that_forgets_its_oldest_is_no_leak() {
    let j = judge(&site(5000, |_| 1, |e| (e > 4900) as u64));
    assert_eq!(j.verdict, Verdict::Cache);
}

#[test]
fn what_is_freed_again_is_steady() {
    assert_eq!(judge(&site(100, |_| 1000, |_| 0)).verdict, Verdict::Steady);
}

#[test]
fn what_is_small_is_not_reported() {
    let j = judge(&site(60, |_| 1, |_| 1));
    assert_eq!(j.verdict, Verdict::Steady);
    assert!(j.reason.contains("less than rheap.min_leak_bytes"), "{}", j.reason);
}

#[test]
fn a_known_cache_is_a_cache_until_it_outgrows_its_history() {
    let mut young = site(30, |_| 100, |_| 100);
    young.known_cache = caches::known("TopMemoryContext/CacheMemoryContext/CachedPlan");
    assert_eq!(judge(&young).verdict, Verdict::Cache);
    let mut old = site(500, |_| 100, |_| 100);
    old.known_cache = young.known_cache;
    assert_eq!(judge(&old).verdict, Verdict::Leak);
    assert_eq!(caches::known("TopMemoryContext/CacheMemoryContextual"), None);
    assert_eq!(caches::known("TopMemoryContext"), None);
}

#[test]
fn the_slope_is_in_bytes_per_second() {
    let mut e = site(100, |_| 10, |_| 10);
    e.series = (0..10).map(|i| (i * 2_000_000, 500 * i as u64)).collect();
    assert_eq!(judge(&e).growth_bytes_per_s, 250.0);
}
