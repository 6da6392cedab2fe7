//! The ledger against a model that is too simple to be wrong, and the estimates against the truth.

use super::account::{Age, BINS, Site, SiteCopy, Stamp};
use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

struct Accounts(Vec<Site>);

impl Sites for Accounts {
    fn site(&self, id: u32) -> &Site {
        &self.0[id as usize]
    }
}

fn accounts() -> Accounts {
    Accounts((0..64).map(|_| Site::default()).collect())
}

/// Account of (stack, path) by arithmetic, opened on first use. Stacks have cells of their own.
fn open(ledger: &mut Ledger, sites: &Accounts, stack: u32, path: u32) -> u32 {
    ledger.site(stack, path).unwrap_or_else(|| {
        let id = stack * 8 + path;
        sites.site(id).open(stack, path);
        assert!(ledger.add_site(stack, path, id, stack as u16, sites));
        id
    })
}

fn at(epoch: u32) -> Stamp {
    Stamp { epoch, now: epoch as i64, query_id: 0 }
}

fn alloc(
    ledger: &mut Ledger,
    sites: &Accounts,
    address: u64,
    size: u64,
    context: u64,
    path: u32,
    stack: u32,
    epoch: u32,
) {
    let cell = stack as u16;
    if !ledger.spend(cell, size) {
        return;
    }
    ledger.epoch = epoch;
    match ledger.ask(cell, size, sites) {
        Decision::Skip => (),
        Decision::Count => {
            let site = open(ledger, sites, stack, path);
            ledger.count(size, site, at(epoch), sites);
        }
        Decision::Record(level) => {
            let mut id = ledger.context(context);
            if id == 0 {
                id = ledger.add_context(context, path);
            }
            let path = ledger.context_path(id);
            let site = open(ledger, sites, stack, path);
            ledger.hold(address, size, Holder::new(id, site), cell, level, at(epoch), sites);
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        chunk: u64,
        size: u64,
        context: u64,
        stack: u32,
    },
    /// Free of a chunk that may or may not be alive.
    Free {
        chunk: u64,
    },
    Realloc {
        chunk: u64,
        to: u64,
        size: u64,
        stack: u32,
    },
    Reset {
        context: u64,
    },
    Delete {
        context: u64,
    },
    Reparent {
        context: u64,
        path: u32,
    },
    /// A message of several that make a statement.
    Message,
    Work,
}

fn op() -> impl Strategy<Value = Op> {
    let (chunk, context, stack) = (|| 1..200u64, || 1..6u64, || 1..7u32);
    // Many alike, whose chunks share records.
    let size = || prop_oneof![3 => Just(16), 1 => 0..10_000u64];
    prop_oneof![
        8 => (chunk(), size(), context(), stack())
            .prop_map(|(chunk, size, context, stack)| Op::Alloc { chunk, size, context, stack }),
        5 => chunk().prop_map(|chunk| Op::Free { chunk }),
        3 => (chunk(), chunk(), size(), stack())
            .prop_map(|(chunk, to, size, stack)| Op::Realloc { chunk, to, size, stack }),
        1 => context().prop_map(|context| Op::Reset { context }),
        1 => context().prop_map(|context| Op::Delete { context }),
        1 => (context(), 1..7u32).prop_map(|(context, path)| Op::Reparent { context, path }),
        2 => Just(Op::Message),
        2 => Just(Op::Work),
    ]
}

#[derive(Clone, Copy)]
struct Chunk {
    size: u64,
    context: u64,
    stack: u32,
    path: u32,
}

#[derive(Default)]
struct Model {
    live: HashMap<u64, Chunk>,
    paths: HashMap<u64, u32>,
    /// (stack, path) -> allocations and their bytes.
    allocs: HashMap<(u32, u32), (u64, u64)>,
}

impl Model {
    fn alloc(&mut self, address: u64, size: u64, context: u64, stack: u32) {
        let path = *self.paths.entry(context).or_insert(context as u32);
        self.live.insert(address, Chunk { size, context, stack, path });
        let allocs = self.allocs.entry((stack, path)).or_default();
        *allocs = (allocs.0 + 1, allocs.1 + size);
    }

    fn reparent(&mut self, context: u64, path: u32) {
        // The ledger learns of contexts with their first allocation.
        let Some(known) = self.paths.get_mut(&context) else { return };
        *known = path;
        for chunk in self.live.values_mut().filter(|c| c.context == context && c.path != path) {
            for (key, sign) in [((chunk.stack, chunk.path), -1), ((chunk.stack, path), 1)] {
                let allocs = self.allocs.entry(key).or_default();
                *allocs = ((allocs.0 as i64 + sign) as u64, (allocs.1 as i64 + sign * chunk.size as i64) as u64);
            }
            chunk.path = path;
        }
    }
}

fn address(chunk: u64) -> u64 {
    0x7f00_0000_0000 + chunk * 24
}

proptest! {
    #[test]
    fn exact_books_equal_the_naive_model(ops in prop::collection::vec(op(), 1..600)) {
        let sites = accounts();
        let mut ledger = Ledger::new(1 << 24, 1);
        let mut model = Model::default();
        let mut epoch = 1;
        for op in ops {
            match op {
                Op::Alloc { chunk, size, context, stack } => {
                    alloc(&mut ledger, &sites, address(chunk), size, context * 64, context as u32, stack, epoch);
                    if model.live.contains_key(&address(chunk)) {
                        // A free was missed: the old record goes when the new one is made.
                        ledger.flush(Due::Statement, at(epoch), &sites);
                    }
                    model.alloc(address(chunk), size, context, stack);
                }
                Op::Free { chunk } => {
                    let known = model.live.remove(&address(chunk)).is_some();
                    prop_assert_eq!(ledger.free(address(chunk), at(epoch), &sites), known);
                }
                Op::Realloc { chunk, to, size, stack } => {
                    if let Some(old) = model.live.remove(&address(chunk)) {
                        ledger.free(address(chunk), at(epoch), &sites);
                        alloc(&mut ledger, &sites, address(to), size, old.context * 64, old.path, stack, epoch);
                        ledger.flush(Due::Statement, at(epoch), &sites);
                        model.alloc(address(to), size, old.context, stack);
                    }
                }
                Op::Reset { context } => {
                    let before = model.live.len();
                    model.live.retain(|_, c| c.context != context);
                    prop_assert_eq!(ledger.reset(context * 64, at(epoch), &sites) as usize, before - model.live.len());
                }
                Op::Delete { context } => {
                    model.live.retain(|_, c| c.context != context);
                    model.paths.remove(&context);
                    ledger.delete(context * 64, at(epoch), &sites);
                }
                Op::Reparent { context, path } => {
                    model.reparent(context, path);
                    ledger.flush(Due::Statement, at(epoch), &sites);
                    ledger.reparent(context * 64, path, &sites, |l, s, p, _| Some(open(l, &sites, s, p)));
                }
                Op::Message => {
                    ledger.flush(Due::Message, at(epoch), &sites);
                    epoch += 1;
                }
                Op::Work => {
                    ledger.flush(Due::Statement, at(epoch), &sites);
                    epoch += 1;
                }
            }
        }
        ledger.flush(Due::Statement, at(epoch), &sites);
        prop_assert!(model.live.keys().all(|&a| ledger.filter.may_have(a)));
        prop_assert_eq!(ledger.records(), model.live.len());
        prop_assert_eq!(ledger.held_bytes(), model.live.values().map(|c| c.size).sum::<u64>());
        for stack in 1..7 {
            for path in 1..7 {
                let of_site = |c: &&Chunk| c.stack == stack && c.path == path;
                let count = model.live.values().filter(of_site).count() as u64;
                let bytes: u64 = model.live.values().filter(of_site).map(|c| c.size).sum();
                let (allocs, alloc_bytes) = model.allocs.get(&(stack, path)).copied().unwrap_or_default();
                let copy = ledger.site(stack, path).and_then(|id| sites.site(id).copy()).unwrap_or_default();
                prop_assert_eq!((copy.live_count, copy.live_bytes), (count, bytes));
                prop_assert_eq!((copy.alloc_count, copy.alloc_bytes), (allocs, alloc_bytes));
                prop_assert_eq!(copy.ages.iter().map(|age| age.records as u64).sum::<u64>(), count);
                prop_assert_eq!(copy.ages.iter().map(|age| age.bytes).sum::<u64>(), bytes);
                prop_assert!(copy.ages.iter().all(|age| age.generations <= age.records));
                prop_assert!(copy.exact || copy == SiteCopy::default());
            }
        }
        for context in 1..6 {
            let of_context = |c: &&Chunk| c.context == context;
            let count = model.live.values().filter(of_context).count() as u32;
            let bytes: u64 = model.live.values().filter(of_context).map(|c| c.size).sum();
            prop_assert_eq!(ledger.context_holds(context * 64), (count, bytes));
        }
    }

    #[test]
    fn books_balance_at_any_rate_and_limit(
        ops in prop::collection::vec(op(), 1..2000), rate in prop_oneof![Just(0), 1..100_000u64], pages in 100..140usize
    ) {
        let sites = accounts();
        let mut ledger = Ledger::new(pages * 4096, 7);
        ledger.set_precision(if rate == 0 { Precision::Exact } else { Precision::SampledAfter { bytes: rate, rate: rate / 16 + 1 } });
        for (i, op) in ops.into_iter().enumerate() {
            match op {
                // Addresses of their own, so that the tiny limit is reached.
                Op::Alloc { chunk, size, context, stack } => alloc(
                    &mut ledger, &sites, address(chunk + 1000 * i as u64), size, 64, 1, stack, context as u32),
                Op::Reset { context: 1 } => { ledger.reset(64, at(1), &sites); }
                _ => (),
            }
            prop_assert!(ledger.own_bytes() <= pages * 4096);
        }
        ledger.delete(64, at(1), &sites);
        prop_assert_eq!((ledger.records(), ledger.held_bytes()), (0, 0));
        for site in &sites.0 {
            if let Some(copy) = site.copy() {
                // What was added with a weight was subtracted with the same weight, thinned or not.
                prop_assert_eq!((copy.live_count, copy.live_bytes), (0, 0));
                prop_assert!(copy.ages.iter().all(|age| *age == Age::default()));
            }
        }
    }
}

/// `n` allocations of which every second one of site 1 stays; sizes differ between the two sites.
fn churn(ledger: &mut Ledger, sites: &Accounts, n: u64) -> [(u64, u64); 2] {
    for i in 0..n {
        alloc(ledger, sites, address(i), 120, 64, 1, 1, 1 + (i / 1000) as u32);
        alloc(ledger, sites, address(n + i), 24 + i % 500, 64, 1, 2, 1 + (i / 1000) as u32);
        if i % 2 == 0 {
            ledger.free(address(i), at(1), sites);
        }
        ledger.free(address(n + i), at(1), sites);
    }
    ledger.flush(Due::Statement, at(1), sites);
    [(n / 2, n / 2 * 120), (0, 0)]
}

fn within(estimate: u64, truth: u64, relative: f64) -> bool {
    (estimate as f64 - truth as f64).abs() <= truth as f64 * relative
}

#[test]
fn of_a_start_nothing_is_followed_and_the_rest_is_estimated_without_bias() {
    const START: u64 = 64 << 10;
    const RUNS: u64 = 300;
    let sites = accounts();
    let mut ledger = Ledger::new(64 << 20, 7);
    for n in [256, START / 128, 1024, 10_240] {
        let (mut estimate, mut most) = (0, 0);
        for _ in 0..RUNS {
            ledger.set_precision(Precision::SampledAfter { bytes: START, rate: 4 << 10 });
            (0..n).for_each(|i| alloc(&mut ledger, &sites, address(i), 128, 64, 1, 1, 1));
            ledger.flush(Due::Statement, at(1), &sites);
            estimate += ledger.held_bytes();
            most = most.max(ledger.records());
            ledger.delete(64, at(1), &sites);
        }
        let truth = (n * 128).saturating_sub(START);
        assert_eq!(most == 0, truth == 0, "{n}");
        // At least 300 * 64 kB / 4 kB samples: a standard error of 1.5 %.
        assert!(within(estimate, RUNS * truth, 0.06), "{n}: {estimate}");
    }
}

#[test]
fn sampled_estimates_are_unbiased() {
    let sites = accounts();
    let mut ledger = Ledger::new(1 << 24, 42);
    ledger.set_precision(Precision::Sampled(4096));
    let n = 1_000_000;
    let [(count, bytes), _] = churn(&mut ledger, &sites, n);
    let copy = sites.site(open(&mut ledger, &sites, 1, 1)).copy().unwrap();
    // 500,000 * 120 B / 4 kB are 14,600 samples: a standard error of 0.8 %.
    assert!(within(copy.live_count, count, 0.03) && within(copy.live_bytes, bytes, 0.03), "{copy:?}");
    assert!(within(copy.alloc_count, n, 0.03));
    assert!(!copy.exact);
    let freed = sites.site(open(&mut ledger, &sites, 2, 1)).copy().unwrap();
    assert_eq!((freed.live_count, freed.live_bytes), (0, 0));
    assert!(within(freed.alloc_bytes, (0..n).map(|i| 24 + i % 500).sum(), 0.03));
}

#[test]
fn past_the_limit_records_thin_out_and_stay_unbiased() {
    let sites = accounts();
    let limit = 1 << 20;
    let mut ledger = Ledger::new(limit, 3);
    let n = 1_000_000;
    let [(count, bytes), _] = churn(&mut ledger, &sites, n);
    assert!(ledger.own_bytes() <= limit);
    assert!(ledger.dropped() > 0);
    let copy = sites.site(open(&mut ledger, &sites, 1, 1)).copy().unwrap();
    assert_eq!((copy.alloc_count, copy.alloc_bytes, copy.exact), (n, n * 120, false), "all allocations are counted");
    // At least 5,000 of the 20,000 records that fit survive each thinning: a standard error of 1.4 %.
    assert!(within(copy.live_count, count, 0.05) && within(copy.live_bytes, bytes, 0.05), "{copy:?}");
    assert_eq!(sites.site(open(&mut ledger, &sites, 2, 1)).copy().unwrap().live_count, 0);
}

#[test]
fn an_address_that_is_allocated_again_ends_the_record_whose_free_was_missed() {
    let sites = accounts();
    let mut ledger = Ledger::new(1 << 22, 1);
    alloc(&mut ledger, &sites, address(1), 100, 64, 1, 1, 1);
    alloc(&mut ledger, &sites, address(1), 50, 64, 1, 2, 1);
    ledger.flush(Due::Statement, at(1), &sites);
    alloc(&mut ledger, &sites, address(1), 50, 64, 1, 2, 2);
    ledger.flush(Due::Statement, at(2), &sites);
    assert_eq!(ledger.records(), 1);
    assert_eq!(sites.site(9).copy().map(|c| (c.live_count, c.live_bytes)), Some((0, 0)));
    assert_eq!(sites.site(17).copy().map(|c| (c.live_count, c.live_bytes)), Some((1, 50)));
}

#[test]
fn between_messages_of_a_statement_only_what_was_always_freed_stays_pending() {
    for others in [0, 100] {
        let sites = accounts();
        let mut ledger = Ledger::new(1 << 22, 1);
        let live = |site: u32| sites.site(site).copy().map(|c| c.live_count);
        // Stack 1 frees what it allocates, stack 2 is new, and so are more than are remembered one by one.
        alloc(&mut ledger, &sites, address(1), 10, 64, 1, 1, 1);
        ledger.free(address(1), at(1), &sites);
        for i in 0..others {
            alloc(&mut ledger, &sites, address(100 + i), 10, 64, 1, 3, 1);
        }
        alloc(&mut ledger, &sites, address(1), 10, 64, 1, 1, 1);
        alloc(&mut ledger, &sites, address(2), 10, 64, 1, 2, 1);
        ledger.flush(Due::Message, at(1), &sites);
        assert_eq!((live(9), live(17), ledger.records()), (Some(0), Some(1), 1 + others as usize));
        ledger.flush(Due::Message, at(2), &sites);
        assert_eq!(live(9), Some(0));
        ledger.flush(Due::Statement, at(3), &sites);
        assert_eq!((live(9), ledger.records()), (Some(1), 2 + others as usize));
    }
}

#[test]
fn a_recycled_header_is_a_new_context() {
    let sites = accounts();
    let mut ledger = Ledger::new(1 << 22, 1);
    alloc(&mut ledger, &sites, address(1), 100, 64, 1, 1, 1);
    ledger.delete(64, at(1), &sites);
    assert_eq!(ledger.reset(64, at(1), &sites), 0, "the nested reset of a deleted context finds nothing");
    alloc(&mut ledger, &sites, address(2), 10, 64, 2, 1, 1);
    ledger.flush(Due::Statement, at(1), &sites);
    let id = ledger.context(64);
    assert_eq!(ledger.context_path(id), 2);
    assert_eq!(ledger.context_holds(64), (1, 10));
}

#[test]
fn generations_count_distinct_epochs_with_survivors() {
    let sites = accounts();
    let mut ledger = Ledger::new(1 << 22, 1);
    for epoch in 1..=1000u32 {
        ledger.epoch = epoch;
        // Two leaked per epoch at stack 1; at stack 2 each chunk is freed one epoch later.
        alloc(&mut ledger, &sites, address(4 * epoch as u64), 8, 64, 1, 1, epoch);
        alloc(&mut ledger, &sites, address(4 * epoch as u64 + 1), 8, 64, 1, 1, epoch);
        alloc(&mut ledger, &sites, address(4 * epoch as u64 + 2), 8, 64, 1, 2, epoch);
        ledger.flush(Due::Statement, at(epoch), &sites);
        ledger.free(address(4 * (epoch as u64 - 1) + 2), at(epoch), &sites);
    }
    let generations = |site: u32| sites.site(site).copy().unwrap().ages.iter().map(|age| age.generations).sum::<u32>();
    assert_eq!(generations(9), 1000);
    assert_eq!(generations(17), 1);
    assert_eq!(sites.site(9).copy().map(|copy| (copy.ended, copy.longest_life)), Some((0, 0)));
    assert_eq!(sites.site(17).copy().map(|copy| (copy.ended, copy.longest_life)), Some((999, 1)));
    let copy = sites.site(9).copy().unwrap();
    assert!(copy.bin_width as usize * BINS >= 1000 && copy.bin_width as usize * BINS < 4000);
}

#[test]
fn sites_that_joined_something_in_the_same_epochs_are_summed_up_without_counting_those_twice() {
    let of = |epochs: &[u32], size: u64| {
        let site = Site::default();
        site.open(1, 1);
        for &epoch in epochs {
            site.record(size, sampling::ONE, sampling::ONE, at(epoch));
        }
        site.end(size, sampling::ONE, epochs[0], epochs[0] + epochs.len() as u32);
        site.copy().unwrap()
    };
    let all: Vec<u32> = (10..210).collect();
    let some: Vec<u32> = (101..140).step_by(2).collect();
    let (many, few) = (of(&all, 8), of(&some, 100));
    assert_eq!((many.bin_width, few.bin_width), (16, 4));
    let mut sum = few.clone();
    sum.join(&many);
    let mut reverse = many.clone();
    reverse.join(&few);
    assert_eq!(sum, SiteCopy { stack: few.stack, ..reverse });
    assert_eq!((sum.first_epoch, sum.last_epoch, sum.bin_width), (10, 209, 16));
    assert_eq!((sum.live_count, sum.live_bytes), (199 + 19, 199 * 8 + 19 * 100));
    assert_eq!((sum.ended, sum.longest_life, sum.first_seen, sum.last_seen), (2, 200, 10, 209));
    let records: Vec<u32> = sum.ages.iter().map(|age| age.records).collect();
    // Those of `few` are of 103, 105 and so on, in bins of four epochs from 101 on.
    assert_eq!(records, [15, 16, 16, 16, 16, 19, 24, 24, 16, 16, 16, 16, 8, 0, 0, 0]);
    assert_eq!(sum.ages.iter().map(|age| age.generations).sum::<u32>(), 199);
}

#[test]
fn chunks_side_by_side_that_are_alike_share_a_record() {
    let sites = accounts();
    let mut ledger = Ledger::new(1 << 26, 1);
    let n = 100_000;
    for i in 0..n {
        alloc(&mut ledger, &sites, 0x7f00_0000_0000 + i * 136, 120, 64, 1, 1, 1);
    }
    ledger.flush(Due::Statement, at(1), &sites);
    assert_eq!((ledger.records(), ledger.context_holds(64)), (n as usize, (n as u32, n * 120)));
    // Of each stretch of 1 kB two records, by the low bits of the addresses, and the stretch.
    assert!(ledger.own_bytes() < n as usize * 24, "{}", ledger.own_bytes());
}

#[test]
fn clearing_gives_all_memory_back() {
    let sites = accounts();
    let mut ledger = Ledger::new(1 << 26, 1);
    churn(&mut ledger, &sites, 50_000);
    assert!(ledger.own_bytes() > 1 << 16);
    ledger.clear();
    assert_eq!((ledger.own_bytes(), ledger.records()), (0, 0));
    alloc(&mut ledger, &sites, address(1), 10, 64, 1, 1, 1);
    ledger.flush(Due::Statement, at(1), &sites);
    assert_eq!(ledger.context_holds(64), (1, 10));
}
