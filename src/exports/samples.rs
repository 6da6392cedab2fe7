//! Models for tests.

use super::*;

fn frame(function: &str, location: &str, address: String) -> Frame {
    Frame { function: Some(function.into()), location: location.into(), address }
}

fn call(offset: u64, functions: &[&str]) -> Call {
    let frames =
        functions.iter().map(|f| frame(f, &format!("src/{f}.c:{offset}"), format!("postgres+{offset:#x}"))).collect();
    Call { module: Some(0), offset, frames }
}

fn site(stack: Vec<u32>, culprit: usize, counts: [u64; 4]) -> Site {
    let [alloc_count, alloc_bytes, live_count, live_bytes] = counts;
    Site {
        verdict: Verdict::Steady,
        confidence: 0.1,
        reason: "allocated at one time".into(),
        generations: 1,
        growth_bytes_per_s: 0.0,
        backend_type: "client backend".into(),
        context: "TopMemoryContext".into(),
        processes: 1,
        pid: 7,
        query_id: Some(-5),
        exact: true,
        alloc_count,
        alloc_bytes,
        live_count,
        live_bytes,
        first_seen: 800_000_000_000_000,
        last_seen: 800_000_001_000_000,
        stack,
        culprit,
    }
}

fn process(pid: i32) -> Process {
    Process {
        pid,
        backend_type: "client backend".into(),
        mode: "exact",
        watched_contexts: 3,
        allocations: 130,
        frees: 95,
        captures: 130,
        dropped: 0,
        own_bytes: 800_000,
        context_bytes: 2_000_000,
        rss_bytes: Some(20_000_000),
        unattributed_bytes: Some(1_000_000),
        walks: 3,
        last_walk: 800_000_001_000_000,
    }
}

/// One process with a leak of 30 times 100 bytes, in an inlined function through a helper, and with something that is
/// mostly freed again.
pub fn small() -> Model {
    let mut leak = site(vec![0, 1, 2], 1, [30, 3000, 30, 3000]);
    leak.verdict = Verdict::Leak;
    leak.confidence = 0.99;
    leak.generations = 30;
    leak.growth_bytes_per_s = 300.4;
    leak.reason = "grows by 100 B for each of 30 messages".into();
    Model {
        taken_at: 800_000_002_000_000,
        pid: Some(7),
        server: "PostgreSQL 17.11".into(),
        sample_bytes: 4096,
        calls: vec![
            call(0x10, &["lappend"]),
            call(0x20, &["inner", "run"]),
            call(0x30, &["main"]),
            call(0x40, &["other"]),
            call(0x50, &["run"]),
        ],
        modules: vec!["/usr/lib/postgresql/bin/postgres".into()],
        leaks: vec![Leak {
            facts: leak.clone(),
            frames: [&["lappend"][..], &["inner", "run"], &["main"]]
                .iter()
                .zip([0x10, 0x20, 0x30])
                .flat_map(|(f, at)| call(at, f).frames)
                .collect(),
        }],
        sites: vec![leak, site(vec![3, 4, 2], 0, [100, 1007, 5, 50])],
        contexts: vec![Context {
            pid: 7,
            backend_type: "client backend".into(),
            path: "TopMemoryContext".into(),
            name: "TopMemoryContext".into(),
            kind: Some("AllocSet"),
            contexts: 1,
            total_bytes: 100_000,
            used_bytes: 90_000,
            free_bytes: 10_000,
            baseline_bytes: 60_000,
            growth_bytes: 30_000,
            growth_bytes_per_s: 300.0,
            watched: true,
            verdict: Verdict::Leak,
            series: vec![(800_000_000_000_000, 60_000), (800_000_001_000_000, 75_000), (800_000_002_000_000, 90_000)],
        }],
        processes: vec![process(7)],
    }
}

/// A hundred processes and 10,000 call sites with stacks of 24 calls.
pub fn large() -> Model {
    let mut model = small();
    model.pid = None;
    model.processes = (1..=100).map(process).collect();
    model.calls = (0..5000).map(|i| call(0x1000 + i * 16, &[&format!("function_{i}")])).collect();
    model.sites = (0..10_000u32)
        .map(|i| {
            let depth = |d: u32| {
                if d < 12 { (i * 7919 + d * 104_729) % 4000 } else { 4000 + (i >> (2 * (d - 12)).min(31)) % 1000 }
            };
            let count = 10 + i as u64 / 100;
            let mut site = site((0..24).map(depth).collect(), 0, [count * 10, count * 700, count, count * 70]);
            site.pid = 1 + i as i32 % 100;
            site
        })
        .collect();
    let context = model.contexts[0].clone();
    let path = |i: i32| format!("TopMemoryContext/CacheMemoryContext/context {i}");
    model.contexts = (0..9600).map(|i| Context { pid: 1 + i % 100, path: path(i / 100), ..context.clone() }).collect();
    model
}
