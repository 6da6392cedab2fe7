use super::*;

/// What one site does in one epoch, or several: sizes of the chunks that it allocates, and which older ones it frees.
#[derive(Default)]
struct Bench {
    /// (epoch, bytes)
    live: Vec<(u32, u64)>,
    epoch: u32,
    e: Evidence,
}

/// Bytes of a chunk.
const CHUNK: u64 = 1000;
/// Epochs between two walks.
const WINDOW: u32 = 10;

impl Bench {
    fn new() -> Self {
        Bench { e: Evidence { unit: "messages", ..Evidence::default() }, ..Bench::default() }
    }

    fn allocate(&mut self, size: u64) {
        self.e.alloc_count += 1;
        self.e.alloc_bytes += size;
        self.e.first_epoch = if self.e.first_epoch == 0 { self.epoch } else { self.e.first_epoch };
        self.e.last_epoch = self.epoch;
        self.live.push((self.epoch, size));
    }

    fn free(&mut self, index: usize) {
        let (epoch, _) = self.live.swap_remove(index);
        if epoch < self.epoch {
            self.e.ended += 1;
            self.e.longest_life = self.e.longest_life.max(self.epoch - epoch);
        }
    }

    fn bytes(&self) -> u64 {
        self.live.iter().map(|c| c.1).sum()
    }

    /// Runs `work` once for each of so many epochs.
    fn run(&mut self, epochs: u32, mut work: impl FnMut(&mut Self)) -> Judgement {
        for _ in 0..epochs {
            self.epoch += 1;
            work(self);
            if self.epoch.is_multiple_of(WINDOW) {
                self.e.series.push((self.epoch as i64 * 100_000, self.bytes()));
                self.e.series.drain(..self.e.series.len().saturating_sub(HISTORY));
            }
        }
        self.judge()
    }

    fn judge(&self) -> Judgement {
        let mut e = self.e.clone();
        e.epoch = self.epoch;
        (e.live_count, e.live_bytes) = (self.live.len() as u64, self.bytes());
        e.last_seen = e.last_epoch as i64 * 100_000;
        e.now = self.epoch as i64 * 100_000;
        e.bin_width = 1;
        while (e.last_epoch - e.first_epoch) as u64 >= e.bin_width * BINS as u64 {
            e.bin_width *= 2;
        }
        let mut seen = std::collections::HashSet::new();
        for &(epoch, size) in &self.live {
            let age = &mut e.ages[((epoch - e.first_epoch) as u64 / e.bin_width) as usize];
            age.records += 1;
            age.bytes += size;
            age.generations += seen.insert(epoch) as u32;
        }
        judge(&e)
    }
}

/// So many epochs of so many chunks each, of which those stay that `stays` says.
fn site(epochs: u32, made: u32, stays: impl Fn(u32) -> u32) -> Judgement {
    Bench::new().run(epochs, |b| {
        for i in 0..made {
            b.allocate(CHUNK);
            if i >= stays(b.epoch) {
                b.free(b.live.len() - 1);
            }
        }
    })
}

/// The same numbers each time, spread over all of them.
fn random(n: &mut u64) -> usize {
    *n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*n >> 33) as usize
}

#[test]
fn a_leak_in_each_epoch_is_a_leak() {
    let j = site(1000, 1, |_| 1);
    assert_eq!((j.verdict, j.generations), (Verdict::Leak, 1000));
    assert!(j.confidence > 0.9);
    assert_eq!(
        j.reason,
        "held in 16 of the last 16 windows, nothing of 1000 allocations freed, 1000 B per message, 1000 generations of \
         survivors in 1000 messages"
    );
}

#[test]
fn what_chance_makes_of_a_small_sample_or_of_few_windows_is_no_saturation() {
    // A third of what the earlier half has joined in the later.
    let slower = |(sampled, timed): (bool, bool), rate: u32| {
        let mut b = Bench::new();
        (b.e.sampled, b.e.timed) = (sampled, timed);
        b.run(2400, |b| {
            let pace = if b.epoch <= 1200 { 90 / rate } else { 270 / rate };
            if b.epoch.is_multiple_of(pace) {
                b.allocate(CHUNK);
            }
        })
    };
    assert_eq!(slower((false, false), 1).verdict, Verdict::Suspect);
    for kind in [(true, false), (false, true)] {
        let verdicts = [1, 10].map(|rate| slower(kind, rate));
        assert_eq!(verdicts.clone().map(|j| j.generations), [17, 177]);
        assert_eq!(verdicts.map(|j| j.verdict), [Verdict::Leak, Verdict::Suspect]);
    }
}

#[test]
fn windows_of_time_of_any_length_are_judged_by_the_time_that_they_took() {
    // Kilobytes at the ends of four windows of 25, 20, 10 seconds and one that has just begun.
    let of = |timed: bool, walks: [(i64, u64); 5]| {
        let mut e = Evidence { unit: "windows of time", timed, sampled: true, bin_width: 1, ..Evidence::default() };
        (e.first_epoch, e.last_epoch, e.epoch, e.first_seen) = (1, 4, 4, 1);
        e.series = walks.iter().map(|&(s, kilobytes)| (s * 1_000_000 + 1, kilobytes * 1000)).collect();
        for (i, pair) in walks.windows(2).enumerate() {
            let kilobytes = pair[1].1 - pair[0].1;
            e.ages[i] = Age { records: kilobytes as u32, generations: 1, bytes: kilobytes * 1000 };
        }
        let (now, alive) = *e.series.last().unwrap();
        (e.now, e.last_seen, e.live_bytes, e.alloc_bytes) = (now, now, alive, alive);
        (e.live_count, e.alloc_count) = (alive / CHUNK, alive / CHUNK);
        judge(&e)
    };
    let steady = [(0, 0), (25, 2500), (45, 4500), (55, 5500), (56, 5600)];
    let j = of(true, steady);
    assert_eq!((j.verdict, j.confidence, j.generations), (Verdict::Leak, 0.74, 4), "{j:?}");
    assert_eq!(of(false, steady).verdict, Verdict::Suspect);
    let j = of(true, [(0, 0), (25, 2500), (45, 2600), (55, 2700), (56, 2710)]);
    assert_eq!(j.verdict, Verdict::Cache, "{j:?}");
    assert!(j.reason.starts_with("growth saturates: 190 kB joined in the later half of its life, 2.40 MB in"), "{j:?}");
}

#[test]
fn a_few_samples_that_stand_for_much_are_no_saturation() {
    let mut b = Bench::new();
    b.e.sampled = true;
    let j = b.run(900, |b| {
        if b.epoch.is_multiple_of(3) {
            b.allocate(CHUNK / 10);
        }
        // Six in the earlier half, two in the later.
        if [30, 130, 210, 290, 370, 440, 600, 800].contains(&b.epoch) {
            b.allocate(100 * CHUNK);
        }
    });
    assert_eq!(j.verdict, Verdict::Leak, "{j:?}");
}

#[test]
fn a_rare_leak_among_much_churn_is_a_leak() {
    assert_eq!(site(5000, 50, |epoch| epoch.is_multiple_of(50) as u32).verdict, Verdict::Leak);
}

#[test]
fn a_few_large_statements_that_free_nothing_are_a_leak() {
    assert_eq!(site(4, 10_000, |_| 10_000).verdict, Verdict::Leak);
}

#[test]
fn a_leak_that_begins_late_is_a_leak_at_once() {
    let j = site(1100, 10, |epoch| (epoch > 1000) as u32);
    assert_eq!(j.verdict, Verdict::Leak, "{j:?}");
    // The others live for a while, and these outlive them.
    let mut b = Bench::new();
    let j = b.run(1100, |b| {
        b.allocate(CHUNK);
        if b.epoch > 20 && (b.epoch <= 1000 || b.epoch.is_multiple_of(2)) {
            b.free(0);
        }
    });
    assert_eq!(j.verdict, Verdict::Leak, "{j:?}");
}

#[test]
fn one_burst_is_suspect_at_most() {
    assert_eq!(site(1, 10_000, |_| 10_000).verdict, Verdict::Suspect);
    assert_eq!(site(1, 500, |_| 500).verdict, Verdict::Steady);
    let mut b = Bench::new();
    b.run(1, |b| (0..5000).for_each(|_| b.allocate(CHUNK)));
    assert_eq!(b.run(100, |_| ()).verdict, Verdict::Steady, "made once");
    b.run(1, |b| (0..20_000).for_each(|_| b.allocate(CHUNK)));
    assert_eq!(b.run(100, |_| ()).verdict, Verdict::Suspect, "much, and made once");
}

#[test]
fn a_burst_of_a_few_samples_is_none() {
    let judged = |records: u32| {
        let counts = Evidence { live_bytes: 2 << 20, live_count: 20_000, alloc_count: 20_000, ..Evidence::default() };
        let mut e = Evidence { sampled: true, first_epoch: 1, last_epoch: 1, epoch: 2, bin_width: 1, ..counts };
        e.ages[0] = Age { records, generations: 1, bytes: 2 << 20 };
        judge(&e)
    };
    assert_eq!((judged(7).verdict, judged(8).verdict), (Verdict::Steady, Verdict::Suspect));
}

#[test]
fn a_cache_that_fills_and_stops_is_a_cache() {
    assert_eq!(site(2000, 10, |epoch| if epoch < 100 { 10 } else { 0 }).verdict, Verdict::Cache);
    let slowing = site(4096, 10, |epoch| (epoch < 100 || (epoch < 3000 && epoch % 500 == 0)) as u32 * 10);
    assert_eq!(slowing.verdict, Verdict::Cache);
}

#[test]
fn a_cache_of_random_keys_is_none_to_complain_of_when_it_is_nearly_full() {
    let (mut keys, mut n) = (vec![false; 2000], 7);
    let mut b = Bench::new();
    let mut step = |b: &mut Bench| {
        for _ in 0..20 {
            if !std::mem::replace(&mut keys[random(&mut n) % 2000], true) {
                b.allocate(CHUNK);
            }
        }
    };
    assert_eq!(b.run(20, &mut step).verdict, Verdict::Leak, "nobody can know yet");
    assert_eq!(b.run(230, &mut step).verdict, Verdict::Suspect, "nine tenths");
    b.run(100, &mut step);
    for _ in 0..20 {
        let j = b.run(50, &mut step);
        assert_eq!(j.verdict, Verdict::Cache, "{j:?}");
    }
}

#[test]
fn a_ring_is_no_leak_from_its_second_round_on() {
    for slots in [40, 512] {
        let mut b = Bench::new();
        b.run(slots + slots / 8, |b| {
            b.allocate(CHUNK);
            if b.live.len() > slots as usize {
                b.live.sort_by_key(|c| std::cmp::Reverse(c.0));
                b.free(b.live.len() - 1);
            }
        });
        for _ in 0..30 {
            let j = b.run(97, |b| {
                b.allocate(CHUNK);
                b.live.sort_by_key(|c| std::cmp::Reverse(c.0));
                b.free(b.live.len() - 1);
            });
            assert_eq!(j.verdict, Verdict::Cache, "{slots} slots: {j:?}");
        }
    }
}

#[test]
fn a_cache_that_replaces_at_random_is_no_leak() {
    let mut n = 3;
    let mut b = Bench::new();
    let mut step = |b: &mut Bench| {
        for _ in 0..60 {
            let slot = random(&mut n) % 1000;
            if slot < b.live.len() {
                b.free(slot);
            }
            b.allocate(CHUNK);
        }
    };
    b.run(15, &mut step);
    for _ in 0..40 {
        let j = b.run(23, &mut step);
        assert_eq!(j.verdict, Verdict::Cache, "{j:?}");
    }
}

#[test]
fn what_is_given_back_from_time_to_time_is_no_leak() {
    let mut b = Bench::new();
    let mut step = |b: &mut Bench| {
        if b.live.len() == 400 {
            (0..400).for_each(|_| b.free(0));
        }
        (0..20).for_each(|_| b.allocate(CHUNK));
    };
    b.run(22, &mut step);
    for _ in 0..100 {
        let j = b.run(7, &mut step);
        assert!(j.verdict <= Verdict::Cache, "{j:?}");
    }
}

#[test]
fn what_is_freed_again_is_steady() {
    assert_eq!(site(100, 100, |_| 0).verdict, Verdict::Steady);
}

#[test]
fn an_array_that_grows_for_ever_is_a_leak_and_a_buffer_that_has_grown_is_none() {
    let array = |calm: u32, by: fn(u64) -> u64| {
        let mut b = Bench::new();
        b.run(calm, |b| {
            if b.live.is_empty() {
                b.allocate(64);
            }
        });
        b.run(150, |b| {
            let size = by(b.live.first().map_or(64, |c| c.1));
            if b.live.first().is_none_or(|c| c.1 != size) {
                b.live.clear();
                b.allocate(size);
            }
        })
    };
    assert_eq!(array(0, |size| size + 3000).verdict, Verdict::Leak);
    assert_eq!(array(300, |size| size + 3000).verdict, Verdict::Leak, "it grows later");
    // Elements that come evenly double it ever more seldom.
    let mut b = Bench::new();
    let j = b.run(150, |b| {
        let wanted = (b.epoch as u64 * 4000).next_power_of_two();
        if b.live.first().is_none_or(|c| c.1 != wanted) {
            b.live.clear();
            b.allocate(wanted);
        }
    });
    assert_eq!((j.verdict, j.confidence), (Verdict::Leak, 0.6), "{j:?}");
    let mut n = 5;
    let mut b = Bench::new();
    let j = b.run(150, |b| {
        let wanted = (random(&mut n) as u64 % 500_000).next_power_of_two();
        if b.live.first().is_none_or(|c| c.1 < wanted) {
            b.live.clear();
            b.allocate(wanted);
        }
    });
    assert_eq!(j.verdict, Verdict::Steady, "{j:?}");
}

#[test]
fn what_is_small_is_not_reported() {
    let j = site(60, 1, |_| 1).small(60_000);
    assert_eq!(j.verdict, Verdict::Steady);
    assert!(j.reason.contains("less than rheap.min_leak_bytes"), "{}", j.reason);
}

#[test]
fn a_leak_is_one_for_some_time_after_its_last_message() {
    let mut b = Bench::new();
    b.run(100, |b| b.allocate(CHUNK));
    assert_eq!(b.run(15, |_| ()).verdict, Verdict::Leak);
    let j = b.run(40, |_| ());
    assert_eq!(j.verdict, Verdict::Cache);
    assert!(j.reason.starts_with("stopped growing 55 messages ago"), "{}", j.reason);
}

#[test]
fn what_a_transaction_has_allocated_is_told_apart() {
    let mut b = Bench::new();
    b.run(100, |b| {
        if b.epoch > 50 {
            b.allocate(CHUNK)
        }
    });
    let of_transaction = |b: &Bench, transaction: u32| {
        let mut b = Bench { e: Evidence { transaction, ..b.e.clone() }, live: b.live.clone(), epoch: b.epoch };
        b.run(0, |_| ()).of_transaction
    };
    // Fifty epochs in sixteen bins: four to each.
    assert!(of_transaction(&b, 51) && of_transaction(&b, 54) && !of_transaction(&b, 55) && !of_transaction(&b, 0));
}

#[test]
fn a_sort_in_a_long_statement_is_of_its_transaction() {
    // Sorts of earlier statements at the same place; then one that many walks look at, each the end of an epoch.
    let mut b = Bench::new();
    b.run(1000, |b| {
        b.allocate(CHUNK);
        b.live.clear();
    });
    b.e.transaction = 1001;
    let j = b.run(15, |b| b.allocate(CHUNK));
    assert!(j.of_transaction, "{j:?}");
}

#[test]
fn the_slope_is_in_bytes_per_second() {
    let mut b = Bench::new();
    b.run(100, |b| b.allocate(CHUNK));
    b.e.series = (0..10).map(|i| (i * 2_000_000, 500 * i as u64)).collect();
    assert_eq!(b.judge().growth_bytes_per_s, 250.0);
}
