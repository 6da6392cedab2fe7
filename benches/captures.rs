//! What one capture of a call stack takes, twenty frames deep, next to what others take for the same stack.
//!
//! "one stack" captures the same stack again and again; "a dozen stacks" takes twelve of them in turn.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use framehop::Unwinder as _;
use rheap::ledger::region::Budget;
use rheap::share::Share;
use rheap::stack::unwind::with_registers;
use rheap::stack::{Regs, Stacks, Trace, Unwinder};

const FRAMES: usize = 20;
const DEPTH: usize = 24;

/// Functions with frame pointers, as a server that keeps them is compiled: `levels` calls, then `f`, which is told the
/// stack and frame pointers that it is entered with, as the hooks are.
#[unsafe(naked)]
unsafe extern "C" fn with_frame_pointers(f: extern "C" fn(*mut u8, u64, u64), argument: *mut u8, levels: u64) {
    std::arch::naked_asm!(
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "test rdx, rdx",
        "jz 2f",
        "dec rdx",
        "call {this}",
        "jmp 3f",
        "2:",
        "mov rax, rdi",
        "mov rdi, rsi",
        "lea rsi, [rsp - 8]",
        "mov rdx, rbp",
        "call rax",
        "3:",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
        this = sym with_frame_pointers,
    )
}

/// Calls `f` with the stack that `way` leads to: the bits of it choose between two functions at each level.
fn on_way(way: usize, level: usize, f: &mut dyn FnMut()) {
    #[inline(never)]
    fn even(way: usize, level: usize, f: &mut dyn FnMut()) {
        on_way(way >> 1, level - 1, f);
        black_box(0);
    }
    #[inline(never)]
    fn odd(way: usize, level: usize, f: &mut dyn FnMut()) {
        on_way(way >> 1, level - 1, f);
        black_box(1);
    }
    if level == 0 {
        f()
    } else if way & 1 == 0 {
        even(way, level, f)
    } else {
        odd(way, level, f)
    }
}

struct Rheap {
    share: Share,
    unwinder: Box<Unwinder>,
    stacks: Box<Stacks>,
    budget: Budget,
    trace: Trace,
    gathers: bool,
}

impl Rheap {
    fn new() -> Self {
        let share = Share::map(1, 4096).unwrap();
        let mut unwinder = Box::new(Unwinder::new());
        unwinder.prepare(0, share.rules, &share.modules);
        let (stacks, budget) = (Box::new(Stacks::new()), Budget::new(1 << 20));
        Rheap { share, unwinder, stacks, budget, trace: Trace::new(), gathers: Stacks::gathers() }
    }

    /// As the hooks do it: recalled, or else walked and remembered.
    #[inline(always)]
    fn capture(&mut self, regs: Regs) -> u32 {
        // SAFETY: the registers of the caller's own frame; AVX2 was looked for.
        unsafe {
            if self.gathers {
                if let Some(known) = self.stacks.recall_next::<true>(regs.sp) {
                    return known.stack;
                }
                if let Some(known) = self.stacks.recall::<true>(regs.sp) {
                    return known.stack;
                }
            }
            match self.stacks.recall::<false>(regs.sp) {
                Some(known) => known.stack,
                None => self.stacks.capture(&mut self.unwinder, regs, FRAMES, true, &self.share, &mut self.budget).0,
            }
        }
    }
}

/// framehop over this process's own modules, with its cache.
struct Framehop {
    unwinder: framehop::x86_64::UnwinderX86_64<Vec<u8>>,
    cache: framehop::x86_64::CacheX86_64,
}

impl Framehop {
    fn new() -> Self {
        let mut unwinder = framehop::x86_64::UnwinderX86_64::new();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut seen = std::collections::HashSet::new();
        for path in maps
            .lines()
            .filter_map(|l| l.split_whitespace().nth(5))
            .filter(|p| p.starts_with('/') && !p.starts_with("/dev"))
        {
            if !seen.insert(path.to_string()) {
                continue;
            }
            let Ok(data) = std::fs::read(path) else { continue };
            let Ok(file) = object::File::parse(&*data) else { continue };
            use object::{Object, ObjectSection, ObjectSegment};
            let base = maps.lines().find(|l| l.ends_with(path)).and_then(|l| l.split('-').next()).unwrap();
            let base = u64::from_str_radix(base, 16).unwrap();
            let section = |name: &[u8]| file.section_by_name_bytes(name);
            let range = |name: &[u8]| section(name).map(|s| s.address()..s.address() + s.size());
            let bytes = |name: &[u8]| section(name).and_then(|s| s.uncompressed_data().ok()).map(|d| d.to_vec());
            let end = file.segments().map(|s| s.address() + s.size()).max().unwrap_or(0);
            let info = framehop::ExplicitModuleSectionInfo {
                base_svma: 0,
                text_svma: range(b".text"),
                text: bytes(b".text"),
                got_svma: range(b".got"),
                eh_frame_svma: range(b".eh_frame"),
                eh_frame: bytes(b".eh_frame"),
                eh_frame_hdr_svma: range(b".eh_frame_hdr"),
                eh_frame_hdr: bytes(b".eh_frame_hdr"),
                ..Default::default()
            };
            unwinder.add_module(framehop::Module::new(path.into(), base..base + end, base, info));
        }
        Framehop { unwinder, cache: framehop::x86_64::CacheX86_64::new() }
    }

    fn walk(&mut self, regs: Regs, out: &mut [u64; FRAMES]) -> usize {
        let mut read = |address: u64| {
            let inside = (regs.sp..regs.sp + (1 << 14)).contains(&address);
            // SAFETY: within this thread's stack, of which so much lies above every measured frame.
            inside.then(|| unsafe { *(address as *const u64) }).ok_or(())
        };
        let ip = read(regs.sp).unwrap();
        let registers = framehop::x86_64::UnwindRegsX86_64::new(ip, regs.sp + 8, regs.bp);
        let mut frames = self.unwinder.iter_frames(ip, registers, &mut self.cache, &mut read);
        let mut n = 0;
        while n < FRAMES
            && let Ok(Some(frame)) = frames.next()
        {
            out[n] = frame.address();
            n += 1;
        }
        n
    }
}

unsafe extern "C" {
    fn backtrace(buffer: *mut *mut u8, size: i32) -> i32;
}

fn others(c: &mut Criterion, ways: usize) {
    let name = if ways == 1 { "one stack" } else { "a dozen stacks" };
    let mut group = c.benchmark_group(format!("capture, DWARF, {name}"));
    // Each measures what `f` takes on each of the ways, in turn, from a stack that stands still meanwhile.
    let mut measure = |label: &str, f: &mut dyn FnMut(Regs)| {
        group.bench_function(label, |b| {
            b.iter_custom(|iterations| {
                let mut spent = std::time::Duration::ZERO;
                for round in 0..iterations.div_ceil(64) {
                    for way in 0..ways {
                        let times = (iterations - round * 64).min(64).div_ceil(ways as u64);
                        on_way(way, DEPTH, &mut || {
                            with_registers(&mut |regs| {
                                let start = std::time::Instant::now();
                                for _ in 0..times {
                                    f(black_box(regs));
                                }
                                spent += start.elapsed();
                            })
                        });
                    }
                }
                spent
            })
        });
    };
    let mut rheap = Rheap::new();
    measure("rheap", &mut |regs| {
        black_box(rheap.capture(regs));
    });
    let mut rheap = Rheap::new();
    measure("rheap, walked anew", &mut |regs| {
        rheap.unwinder.walk(regs, FRAMES, &mut rheap.trace, &rheap.share.modules);
        black_box(&rheap.trace);
    });
    let mut framehop = Framehop::new();
    let mut out = [0; FRAMES];
    measure("framehop", &mut |regs| {
        let frames = framehop.walk(regs, &mut out);
        assert_eq!(frames, FRAMES, "framehop does not get through");
    });
    measure("the backtrace crate", &mut |_| {
        let mut n = 0;
        ::backtrace::trace(|frame| {
            black_box(frame.ip());
            n += 1;
            n < FRAMES
        });
    });
    let mut buffer = [std::ptr::null_mut(); FRAMES];
    measure("glibc's backtrace()", &mut |_| {
        // SAFETY: the buffer is as large as it says.
        black_box(unsafe { backtrace(buffer.as_mut_ptr(), FRAMES as i32) });
    });
    group.finish();
}

fn dwarf(c: &mut Criterion) {
    others(c, 1);
    others(c, 12);
}

fn frame_pointers(c: &mut Criterion) {
    struct Bench<'a> {
        c: &'a mut Criterion,
        rheap: Rheap,
    }
    extern "C" fn measure(bench: *mut u8, sp: u64, bp: u64) {
        // SAFETY: `frame_pointers` passes its own Bench.
        let bench = unsafe { &mut *bench.cast::<Bench>() };
        let regs = Regs { sp, bp };
        let start = with_frame_pointers as *const () as u64;
        bench.rheap.unwinder.assume_frame_pointers(start, start + 64);
        let mut group = bench.c.benchmark_group("capture, frame pointers, one stack");
        group.bench_function("rheap", |b| b.iter(|| black_box(bench.rheap.capture(black_box(regs)))));
        group.bench_function("rheap, walked anew", |b| {
            b.iter(|| {
                let Rheap { unwinder, share, trace, .. } = &mut bench.rheap;
                unwinder.walk(black_box(regs), FRAMES, trace, &share.modules);
                black_box(&*trace);
            })
        });
        assert_eq!(bench.rheap.trace.frames(), FRAMES, "the frame pointers lead nowhere");
        group.finish();
    }
    let mut bench = Bench { c, rheap: Rheap::new() };
    // SAFETY: the naked function passes the pointer on to `measure` and touches nothing else.
    unsafe { with_frame_pointers(measure, (&raw mut bench).cast(), DEPTH as u64) };
}

criterion_group! {
    name = captures;
    config = Criterion::default().warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(2)).sample_size(40);
    targets = frame_pointers, dwarf
}
criterion_main!(captures);
