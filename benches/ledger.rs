//! What the ledger takes per chunk, by how many are alive: it should not grow with them.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use rheap::ledger::account::{Site, Stamp};
use rheap::ledger::{Decision, Due, Holder, Ledger, Sites};

struct Accounts(Vec<Site>);

impl Sites for Accounts {
    fn site(&self, id: u32) -> &Site {
        &self.0[id as usize]
    }
}

const STAMP: Stamp = Stamp { epoch: 1, now: 1, query_id: 0 };
const BASE: u64 = 0x7f00_0000_0000;

fn alloc(ledger: &mut Ledger, sites: &Accounts, address: u64) {
    if let Decision::Record(level) = ledger.ask(1, 120, sites) {
        ledger.hold(address, 120, Holder::new(1, 1), 1, level, STAMP, sites);
    }
}

/// A ledger with so many records of chunks that lie side by side.
fn filled(sites: &Accounts, records: u64) -> Ledger {
    let mut ledger = Ledger::new(1 << 30, 1);
    assert_eq!(ledger.add_context(64, 1), 1);
    sites.site(1).open(1, 1);
    assert!(ledger.add_site(1, 1, 1, 1, sites));
    for i in 0..records {
        alloc(&mut ledger, sites, BASE + i * 136);
    }
    ledger.flush(Due::Statement, STAMP, sites);
    ledger
}

fn ledger(c: &mut Criterion) {
    let sites = Accounts((0..2).map(|_| Site::default()).collect());
    let mut group = c.benchmark_group("ledger");
    for records in [1_000, 10_000, 100_000, 1_000_000, 10_000_000] {
        let mut ledger = filled(&sites, records);
        group.bench_function(format!("a chunk that comes and goes, {records} alive"), |b| {
            b.iter(|| {
                alloc(&mut ledger, &sites, black_box(BASE - 4096));
                ledger.free(black_box(BASE - 4096), STAMP, &sites);
            })
        });
        let mut next = records;
        group.bench_function(format!("a thousand that stay and are freed, {records} alive"), |b| {
            b.iter_batched(
                || {
                    next += 1000;
                    next
                },
                |from| {
                    for i in from..from + 1000 {
                        alloc(&mut ledger, &sites, BASE + i * 136);
                    }
                    ledger.flush(Due::Statement, STAMP, &sites);
                    for i in from..from + 1000 {
                        ledger.free(BASE + i * 136, STAMP, &sites);
                    }
                },
                BatchSize::SmallInput,
            )
        });
    }
    group.finish();
}

criterion_group! {
    name = all;
    config = Criterion::default().warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_secs(1)).sample_size(20);
    targets = ledger
}
criterion_main!(all);
