//! heaptrack's interpreted data, file version 3, which heaptrack_print and heaptrack_gui open.
//!
//! Such a file has a line for each event, so what rheap knows as sums is played back: for each call site first what
//! was freed again, each allocation directly before its release, then what is alive, which the tools call leaked.
//! Their peak is therefore what is alive now, and their temporary allocations are those that were freed again.

use std::collections::HashMap;
use std::fmt::Write;

use super::{Model, Site};
use crate::symbols::helpers::is_allocator;

/// Lines of events, of which a file has about so many at most: 30 MB that the tools read in seconds.
const EVENTS: u64 = 4_000_000;

/// The file. Where rheap has sums only, sizes are their mean, so that counts and bytes are true. Past [`EVENTS`] the
/// freed allocations are thinned out evenly, and several that are alive share a line, with all their bytes; the line of
/// the command says so.
pub fn file(model: &Model) -> String {
    file_within(model, EVENTS)
}

fn file_within(model: &Model, most: u64) -> String {
    let totals = model.totals();
    let alive_in_line = totals.live_count.div_ceil(most / 2).max(1);
    let lines_alive = totals.live_count.div_ceil(alive_in_line);
    let one_in = (2 * totals.free_count).div_ceil(most - lines_alive).max(1);
    let mut file = File { alive_in_line, ..File::default() };
    let _ = writeln!(file.text, "v 10400 3");
    let mut command = format!("rheap, {}, {}", model.subject(), model.server);
    if one_in > 1 {
        let _ = write!(command, ", one of {one_in} freed allocations is shown");
    }
    if alive_in_line > 1 {
        let _ = write!(command, ", {alive_in_line} allocations that are alive are shown as one");
    }
    let _ = writeln!(file.text, "X {command}");
    // SAFETY: plain questions to the system.
    let (page, pages) = unsafe { (libc::sysconf(libc::_SC_PAGESIZE), libc::sysconf(libc::_SC_PHYS_PAGES)) };
    let _ = writeln!(file.text, "I {page:x} {pages:x}");
    let resident: i64 = model.processes.iter().filter_map(|p| p.rss_bytes).sum();
    file.text.push_str("c 0\n");
    let traces: Vec<u64> = model.sites.iter().map(|site| file.trace(model, site)).collect();
    // Number 0 has a meaning of its own in the tools' account of temporary allocations: it is never freed.
    if totals.free_count > 0 {
        file.spare_zero(model, &traces);
    }
    for (site, &trace) in model.sites.iter().zip(&traces) {
        let count = site.free_count();
        for (count, size) in split(count.div_ceil(one_in).min(count), count, site.free_bytes()) {
            let a = file.allocation(size, trace);
            let pair = format!("+ {a:x}\n- {a:x}\n");
            (0..count).for_each(|_| file.text.push_str(&pair));
        }
    }
    for (index, (site, &trace)) in model.sites.iter().zip(&traces).enumerate() {
        let spared = (file.spared == Some(index)) as u64;
        for (place, (count, size)) in file.alive(site).into_iter().enumerate() {
            let a = file.allocation(size, trace);
            let line = format!("+ {a:x}\n");
            (0..count - if place == 0 { spared } else { 0 }).for_each(|_| file.text.push_str(&line));
        }
    }
    let first = model.sites.iter().map(|s| s.first_seen).filter(|&t| t > 0).min().unwrap_or(model.taken_at);
    let _ = writeln!(file.text, "c {:x}\nR {:x}", (model.taken_at - first).max(0) / 1000, resident / page.max(1));
    file.text
}

/// `count` of `all` allocations that have `bytes` together: (number, size) of at most two sizes that differ by one.
fn split(count: u64, all: u64, bytes: u64) -> Vec<(u64, u64)> {
    let (size, larger) = (bytes / all.max(1), bytes % all.max(1));
    let larger = if count == all { larger } else { 0 };
    [(larger, size + 1), (count - larger, size)].into_iter().filter(|p| p.0 > 0).collect()
}

#[derive(Default)]
struct File {
    text: String,
    strings: HashMap<String, u64>,
    pointers: HashMap<u32, u64>,
    /// (pointer, parent) → trace.
    traces: HashMap<(u64, u64), u64>,
    /// (size, trace) → number.
    allocations: HashMap<(u64, u64), u64>,
    /// So many that are alive share a line.
    alive_in_line: u64,
    /// The call site whose first live allocation is played before everything else.
    spared: Option<usize>,
}

impl File {
    /// The lines of what is alive: (number, size).
    fn alive(&self, site: &Site) -> Vec<(u64, u64)> {
        let lines = site.live_count.div_ceil(self.alive_in_line);
        split(lines, lines, site.live_bytes)
    }

    fn string(&mut self, text: &str) -> u64 {
        if let Some(&id) = self.strings.get(text) {
            return id;
        }
        // Lengths are bytes, and the file may be kept in any encoding: no character may have more than one.
        let mut clean = String::new();
        for c in text.chars() {
            match c {
                c if c.is_control() => clean.push(' '),
                c if c.is_ascii() => clean.push(c),
                c => clean.extend(c.escape_unicode()),
            }
        }
        let _ = writeln!(self.text, "s {:x} {clean}", clean.len());
        let id = self.strings.len() as u64 + 1;
        self.strings.insert(text.into(), id);
        id
    }

    fn pointer(&mut self, model: &Model, call: u32) -> u64 {
        if let Some(&id) = self.pointers.get(&call) {
            return id;
        }
        let known = &model.calls[call as usize];
        // One module after another in an address space of its own; the instruction that calls, not the next.
        let ip = known.module.map_or(1, |m| (m as u64 + 1) << 40 | known.offset.saturating_sub(1));
        let module = known.module.map_or("(cut)", |m| model.modules[m as usize].as_str());
        let mut line = format!("i {ip:x} {:x}", self.string(module));
        for (index, frame) in known.frames.iter().enumerate() {
            let place = frame.file_and_line();
            // The first may do without a name, or without a line; what is inlined has both.
            if index == 0 && known.frames.len() == 1 && frame.function.is_none() {
                break;
            }
            let _ = write!(line, " {:x}", self.string(frame.name()));
            if place.is_some() || known.frames.len() > 1 {
                let (file, number) = place.unwrap_or(("?", 0));
                let _ = write!(line, " {:x} {number:x}", self.string(file));
            }
        }
        self.text.push_str(&line);
        self.text.push('\n');
        let id = self.pointers.len() as u64 + 1;
        self.pointers.insert(call, id);
        id
    }

    /// The trace of a stack: callers before what they call. Its end is the caller of palloc, as it is the caller of
    /// malloc in heaptrack's own files: the tools group by that function.
    fn trace(&mut self, model: &Model, site: &Site) -> u64 {
        let mut parent = 0;
        let of_allocator = |call: &&u32| {
            let frames = &model.calls[**call as usize].frames;
            frames.iter().all(|f| f.function.as_deref().is_some_and(is_allocator))
        };
        let inner = site.stack.iter().take_while(of_allocator).count();
        for &call in site.stack[inner..].iter().rev() {
            let pointer = self.pointer(model, call);
            let next = self.traces.len() as u64 + 1;
            parent = *self.traces.entry((pointer, parent)).or_insert_with(|| {
                let _ = writeln!(self.text, "t {pointer:x} {parent:x}");
                next
            });
        }
        parent
    }

    /// Its number; announced just before its first event.
    fn allocation(&mut self, size: u64, trace: u64) -> u64 {
        let next = self.allocations.len() as u64;
        *self.allocations.entry((size, trace)).or_insert_with(|| {
            let _ = writeln!(self.text, "a {size:x} {trace:x}");
            next
        })
    }

    /// Gives number 0 to something that stays alive, or to nothing, if nothing does.
    fn spare_zero(&mut self, model: &Model, traces: &[u64]) {
        // Not to a size that is freed as well at the same trace.
        let sizes = |s: &Site| self.alive(s);
        let freed = |s: &Site| split(s.free_count(), s.free_count(), s.free_bytes());
        let apart = |s: &Site| sizes(s).first().is_some_and(|l| freed(s).iter().all(|f| f.1.abs_diff(l.1) > 1));
        let lone = |i: usize| traces.iter().filter(|&&t| t == traces[i]).count() == 1;
        match (0..model.sites.len()).find(|&i| apart(&model.sites[i]) && lone(i)) {
            Some(index) => {
                let a = self.allocation(sizes(&model.sites[index])[0].1, traces[index]);
                let _ = writeln!(self.text, "+ {a:x}");
                self.spared = Some(index);
            }
            None => {
                self.allocation(0, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{large, small};
    use super::*;

    /// (allocations, bytes allocated, bytes alive at the end) of a file.
    fn played(file: &str) -> (u64, u64, u64) {
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (mut sizes, mut sums) = (Vec::new(), (0, 0, 0));
        for line in file.lines() {
            let mut words = line.split(' ');
            match (words.next(), words.next()) {
                (Some("a"), Some(size)) => sizes.push(hex(size)),
                (Some("+"), Some(a)) => {
                    let size = sizes[hex(a) as usize];
                    sums = (sums.0 + 1, sums.1 + size, sums.2 + size);
                }
                (Some("-"), Some(a)) => {
                    assert_ne!(hex(a), 0, "number 0 is never freed");
                    sums.2 -= sizes[hex(a) as usize];
                }
                _ => (),
            }
        }
        sums
    }

    #[test]
    fn what_is_played_back_are_the_true_sums() {
        let text = file(&small());
        assert!(text.starts_with("v 10400 3\nX rheap, pid 7 (client backend, exact), PostgreSQL 17.11\n"));
        assert_eq!(played(&text), (130, 4007, 3050));
        // Innermost first, and main, the root, before what it calls.
        let (run, inner) = (text.find("s 3 run").unwrap(), text.find("s 5 inner").unwrap());
        assert!(inner < run, "{text}");
        assert!(text.find("s 4 main").unwrap() < inner);
    }

    #[test]
    fn what_does_not_fit_is_thinned_out_and_says_so() {
        let text = file_within(&small(), 100);
        assert!(text.contains("17.11, one of 3 freed allocations is shown\n"), "{text}");
        assert_eq!(played(&text), (35 + 32, 3050 + 32 * 10, 3050));
        // Of 30 allocations that are alive ten lines are written, of 5 two.
        let text = file_within(&small(), 30);
        assert!(text.contains(", 3 allocations that are alive are shown as one\n"), "{text}");
        assert_eq!((played(&text).2, text.matches("\n+ ").count() - text.matches("\n- ").count()), (3050, 12));
    }

    #[test]
    fn lengths_hold_in_every_encoding() {
        let mut model = small();
        model.calls[0].frames[0].function = Some("gr\u{f6}\u{df}e\n".into());
        let text = file(&model);
        assert!(text.is_ascii() && text.contains("\ns 10 gr\\u{f6}\\u{df}e \n"), "{text}");
    }

    #[test]
    fn nothing_is_a_file_too() {
        assert_eq!(played(&file(&Model::default())), (0, 0, 0));
    }

    #[test]
    fn ten_thousand_stacks_take_seconds() {
        let model = large();
        let start = std::time::Instant::now();
        let text = file(&model);
        assert_eq!(played(&text).2, model.totals().live_bytes);
        assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
    }
}
