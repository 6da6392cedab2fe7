//! The report for a terminal, in the order that users of heaptrack know.

use std::fmt::Write;

use super::Model;
use super::metric::Metric;
use super::tree::{Node, merge};
use crate::moment;
use crate::symbols::Frame;
use crate::units::{bytes, count, signed_bytes};

const WIDTH: usize = 110;
/// Entries of a section; more are counted, not listed.
const ENTRIES: usize = 10;
/// Frames of a tree that are listed in a row.
const FRAMES: usize = 6;
/// Levels at which callers that go apart are listed.
const BRANCHES: usize = 1;
/// Callers of one place that are listed, the greatest first; more are counted.
const CALLERS: usize = 3;

/// The report: UTF-8 lines of at most 110 columns.
pub fn text(model: &Model) -> String {
    let mut page = Page::default();
    page.line(0, &format!("rheap {}: {}", env!("CARGO_PKG_VERSION"), model.subject()));
    page.line(0, &format!("{}, {}", moment::text(model.taken_at), model.server));
    if model.sites.iter().any(|s| !s.exact) {
        page.line(0, "Figures with ~ are unbiased estimates from a sample.");
    }
    page.line(0, "Trees begin where the allocator and its helpers are called; callers are below what they call. Whole stacks are in the rows of rheap_call_sites().");
    leaks(&mut page, model);
    let sections = [
        ("WHAT HOLDS MOST", Metric::Live),
        ("MOST CALLS TO THE ALLOCATOR", Metric::Allocations),
        ("MOST TEMPORARY ALLOCATIONS (freed again)", Metric::Temporary),
    ];
    for (title, metric) in sections {
        page.title(title);
        let roots = merge(model, &model.sites, metric);
        let total: u64 = roots.iter().map(|r| r.value).sum();
        for root in roots.iter().take(ENTRIES) {
            let about = about(root.exact);
            let share = 100.0 * root.value as f64 / total.max(1) as f64;
            let sum = match metric {
                Metric::Live => format!("{about}{} in {about}{} allocations", bytes(root.bytes), count(root.count)),
                _ => format!("{about}{} allocations of {about}{} together", count(root.count), bytes(root.bytes)),
            };
            page.line(0, &format!("{sum} ({share:.1} %) from"));
            page.tree(root, 2, metric, BRANCHES);
        }
        page.more(roots.len(), "places");
    }
    totals(&mut page, model);
    contexts(&mut page, model);
    outside(&mut page, model);
    page.text
}

fn leaks(page: &mut Page, model: &Model) {
    page.title("LEAKS");
    for leak in model.leaks.iter().take(ENTRIES) {
        let site = &leak.facts;
        let about = about(site.exact);
        let place = leak.culprit().map_or("(unknown)".into(), Frame::describe);
        let whose = match site.processes {
            0 | 1 => format!("{}, pid {}", site.backend_type, site.pid),
            n => format!("{}, {n} processes, most in pid {}", site.backend_type, site.pid),
        };
        page.line(0, &format!("{} ({:.0} %): {place}", site.verdict.name().to_uppercase(), site.confidence * 100.0));
        let (live, number) = (bytes(site.live_bytes), count(site.live_count));
        page.line(2, &format!("{about}{live} in {about}{number} allocations; {whose}"));
        page.line(2, &format!("in {}", site.context));
        if let Some(id) = site.query_id {
            page.line(2, &format!("allocated most recently by query id {id}"));
        }
        page.line(2, &site.reason);
        for (index, frame) in leak.frames.iter().enumerate().skip(site.culprit) {
            let inlined = if leak.is_inlined(index) { "  [inlined]" } else { "" };
            page.line(4, &format!("{}{inlined}", frame.describe()));
        }
    }
    if model.leaks.is_empty() {
        page.line(0, "none: nothing here keeps growing");
    }
    page.more(model.leaks.len(), "leaks, which rheap_leaks() lists");
}

fn totals(page: &mut Page, model: &Model) {
    let t = model.totals();
    page.title("TOTALS of watched contexts");
    let about = about(model.sites.iter().all(|s| s.exact));
    let mut row = |name: &str, number: u64, size: u64| {
        let (number, size) = (format!("{about}{}", count(number)), format!("{about}{}", bytes(size)));
        page.line(0, &format!("{name:<16}{number:>18} allocations {size:>12}"));
    };
    row("allocated", t.alloc_count, t.alloc_bytes);
    row("freed again", t.free_count, t.free_bytes);
    row("alive", t.live_count, t.live_bytes);
    page.line(0, &format!("{:<16}{:>18}", "call sites", count(model.sites.len() as u64)));
    let dropped: u64 = model.processes.iter().map(|p| p.dropped).sum();
    if dropped > 0 {
        let advice = "raise rheap.memory_limit or rheap.max_call_sites";
        page.line(0, &format!("{} records were given up for want of room: {advice}", count(dropped)));
    }
    let own: u64 = model.processes.iter().map(|p| p.own_bytes).sum();
    page.line(0, &format!("rheap itself uses {} in {} processes", bytes(own), model.processes.len()));
}

fn contexts(page: &mut Page, model: &Model) {
    page.title("MEMORY CONTEXTS, what grew most first");
    page.line(0, &format!("{:>10} {:>11} {:>12} {:>8}  {:<8} path", "used", "growth", "per second", "pid", "verdict"));
    for c in model.contexts.iter().take(ENTRIES) {
        let rate = signed_bytes(c.growth_bytes_per_s as i64);
        let figures = format!(
            "{:>10} {:>11} {:>12} {:>8}  {:<8} ",
            bytes(c.used_bytes),
            signed_bytes(c.growth_bytes),
            rate,
            c.pid,
            c.verdict.name()
        );
        page.hanging(&figures, 55, &c.path);
    }
    page.more(model.contexts.len(), "context paths, which rheap_contexts() lists");
}

fn outside(page: &mut Page, model: &Model) {
    page.title("OUTSIDE CONTEXTS: private memory that neither contexts nor rheap explain (malloc in libraries)");
    page.line(0, &format!("{:>10} {:>10} {:>10} {:>10}  process", "outside", "contexts", "rheap", "resident"));
    let mut processes: Vec<_> = model.processes.iter().collect();
    processes.sort_by_key(|p| std::cmp::Reverse((p.unattributed_bytes, p.pid)));
    let size = |n: Option<i64>| n.map_or("?".into(), |n| bytes(n as u64));
    for p in processes.iter().take(ENTRIES) {
        page.line(
            0,
            &format!(
                "{:>10} {:>10} {:>10} {:>10}  pid {}, {}, {}",
                size(p.unattributed_bytes),
                bytes(p.context_bytes),
                bytes(p.own_bytes),
                size(p.rss_bytes),
                p.pid,
                p.backend_type,
                p.mode
            ),
        );
    }
    page.more(processes.len(), "processes, which rheap_processes lists");
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn title(&mut self, title: &str) {
        let _ = writeln!(self.text, "\n{title}");
    }

    /// A line, or several: what does not fit goes on below, further in, and nothing is left out.
    fn line(&mut self, indent: usize, text: &str) {
        self.hanging(&" ".repeat(indent), indent + 4, text);
    }

    fn hanging(&mut self, first: &str, hang: usize, text: &str) {
        self.text.push_str(first);
        let mut column = first.chars().count();
        let mut fresh = true;
        for word in text.split_inclusive([' ', '/']) {
            let length = word.trim_end().chars().count();
            if column + length > WIDTH && !fresh {
                self.text.truncate(self.text.trim_end_matches(' ').len());
                let _ = write!(self.text, "\n{:hang$}", "");
                column = hang;
            }
            fresh = false;
            for c in word.chars() {
                let c = if c.is_control() { ' ' } else { c };
                // A single word that is longer than a line.
                if column >= WIDTH && c != ' ' {
                    let _ = write!(self.text, "\n{:hang$}", "");
                    column = hang;
                }
                self.text.push(c);
                column += 1;
            }
        }
        self.text.truncate(self.text.trim_end_matches(' ').len());
        self.text.push('\n');
    }

    fn more(&mut self, all: usize, what: &str) {
        if all > ENTRIES {
            let _ = writeln!(self.text, "... and {} more {what}", all - ENTRIES);
        }
    }

    /// A place and its callers. Those that are called from one place only go straight down; where several call, each
    /// has its sum and goes further in. What is left out is counted.
    fn tree(&mut self, node: &Node, indent: usize, metric: Metric, branches: usize) {
        let (mut at, mut listed) = (node, 0);
        loop {
            let inlined = if at.inlined { "  [inlined]" } else { "" };
            self.line(indent, &format!("{}{inlined}", at.frame.describe()));
            listed += 1;
            let (frames, last) = straight(at);
            if listed >= FRAMES && frames > 1 {
                self.line(indent, &format!("... and {frames} callers of these"));
                at = last;
            }
            match at.callers.as_slice() {
                [] => return,
                [one] if one.value == at.value => at = one,
                several => {
                    let worth = if branches == 0 { 0 } else { CALLERS };
                    for caller in several.iter().take(worth) {
                        self.line(indent + 2, &format!("{} from", value(metric, caller)));
                        self.tree(caller, indent + 4, metric, branches - 1);
                    }
                    if several.len() > worth {
                        let left_out = several.iter().skip(worth);
                        let rest: u64 = left_out.clone().map(|c| c.value).sum();
                        let about = about(left_out.clone().all(|c| c.exact));
                        let unit = metric.unit();
                        let rest = if unit == "bytes" { bytes(rest) } else { format!("{} {unit}", count(rest)) };
                        let more = if worth > 0 { "more " } else { "" };
                        self.line(
                            indent + 2,
                            &format!("... and {} {more}callers: {about}{rest}", several.len() - worth),
                        );
                    }
                    return;
                }
            }
        }
    }
}

/// How many callers follow one by one until they go apart or the stack ends, and the last of them.
fn straight<'n, 'm>(node: &'n Node<'m>) -> (usize, &'n Node<'m>) {
    let (mut frames, mut at) = (0, node);
    while let [one] = at.callers.as_slice()
        && one.value == at.value
    {
        (frames, at) = (frames + 1, one);
    }
    (frames, at)
}

/// Stands before an estimate.
fn about(exact: bool) -> &'static str {
    if exact { "" } else { "~" }
}

fn value(metric: Metric, node: &Node) -> String {
    let about = about(node.exact);
    match metric {
        Metric::Live | Metric::Allocated => format!("{about}{} in {about}{}", bytes(node.value), count(node.count)),
        _ => format!("{about}{} of {about}{}", count(node.value), bytes(node.bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{large, small};
    use super::*;

    #[test]
    fn every_section_is_there_and_true() {
        let text = text(&small());
        for expected in [
            "rheap 0.1.0: pid 7 (client backend, exact)",
            "LEAK (99 %): inner at src/inner.c:32",
            "2.93 kB in 30 allocations; client backend, pid 7",
            "    inner at src/inner.c:32  [inlined]\n    run at src/run.c:32\n    main at src/main.c:48\n",
            "WHAT HOLDS MOST\n2.93 kB in 30 allocations (98.4 %) from\n  inner at",
            "MOST CALLS TO THE ALLOCATOR\n100 allocations of 1007 B together (76.9 %) from\n  other at",
            "freed again                     95 allocations        957 B",
            "TopMemoryContext",
            "  977 kB",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }

    #[test]
    fn lines_are_not_longer_than_promised_and_what_is_left_out_is_counted() {
        let mut model = large();
        model.leaks[0].facts.reason = "§".repeat(300);
        model.calls[0].frames[0].function = Some("long ".repeat(60));
        let start = std::time::Instant::now();
        let text = text(&model);
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
        let longest = text.lines().map(|l| l.chars().count()).max().unwrap();
        assert!(longest <= WIDTH, "{longest}");
        assert_eq!(text.matches('§').count(), 300);
        assert!(text.contains("... and 9590 more context paths") && text.contains("... and 90 more processes"));
    }

    #[test]
    fn callers_that_go_apart_below_a_long_run_are_not_hidden() {
        let mut model = small();
        let mut call = model.calls[3].clone();
        let mut numbered = |name: String| {
            call.frames[0].function = Some(name);
            model.calls.push(call.clone());
            model.calls.len() as u32 - 1
        };
        let run: Vec<u32> = (0..9).map(|i| numbered(format!("step_{i}"))).collect();
        let ends = ["left", "right"].map(|name| numbered(name.into()));
        for (site, end) in model.sites.iter_mut().zip(ends) {
            (site.stack, site.culprit) = ([&run[..], &[end]].concat(), 0);
        }
        let text = text(&model);
        let expected = "from
  step_0 at src/other.c:64
  step_1 at src/other.c:64
  step_2 at src/other.c:64
  step_3 at src/other.c:64
  step_4 at src/other.c:64
  step_5 at src/other.c:64
  ... and 3 callers of these
    2.93 kB in 30 from
      left at src/other.c:64
    50 B in 5 from
      right at src/other.c:64
";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn estimates_are_marked_wherever_they_go_into_a_sum() {
        let mut model = small();
        model.sites[1].exact = false;
        model.sites[1].stack = vec![1, 3, 2];
        model.sites[1].culprit = 0;
        let text = text(&model);
        for expected in [
            "~2.98 kB in ~35 allocations (100.0 %) from\n  inner at",
            "    2.93 kB in 30 from\n      main",
            "    ~50 B in ~5 from\n      other",
            "allocated                     ~130 allocations     ~3.91 kB",
            "alive                          ~35 allocations     ~2.98 kB",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }

    #[test]
    fn a_name_cannot_write_lines_or_colours() {
        let mut model = small();
        model.contexts[0].path = "Top\u{1b}[31m\nfake".into();
        let text = text(&model);
        assert!(text.contains("Top [31m fake\n") && !text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn nothing_is_a_report_too() {
        assert!(text(&Model::default()).contains("none: nothing here keeps growing"));
    }
}
