//! The walk itself: two loads per frame where frame pointers are kept, a cached rule per frame elsewhere.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::modules::Modules;
use super::rules::{self, Kind, Rule};
use crate::share::dictionary::Dictionary;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("rheap walks stacks on Linux x86_64 only");

pub const MAX_FRAMES: usize = 64;

/// The registers at the entry of the hook, before it has a frame of its own; passed as two arguments.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Regs {
    /// Points to the return address of the call that was hooked.
    pub sp: u64,
    pub bp: u64,
}

/// A walked stack: its return addresses, innermost first, and the places where they lie. Lives on the stack, where
/// nothing that has not been written need be cleared, or copied for a forked child.
pub struct Trace {
    addresses: [MaybeUninit<u64>; MAX_FRAMES],
    slots: [MaybeUninit<u64>; MAX_FRAMES],
    /// So many of both have been written.
    frames: usize,
    /// The walk ended before the process's first frame.
    pub cut: bool,
}

impl Trace {
    pub const fn new() -> Self {
        let nothing = [MaybeUninit::uninit(); MAX_FRAMES];
        Trace { addresses: nothing, slots: nothing, frames: 0, cut: false }
    }

    pub fn frames(&self) -> usize {
        self.frames
    }

    pub fn addresses(&self) -> &[u64] {
        // SAFETY: `push` has written those before `frames`.
        unsafe { &*(&raw const self.addresses[..self.frames] as *const [u64]) }
    }

    pub fn slots(&self) -> &[u64] {
        // SAFETY: as for the addresses.
        unsafe { &*(&raw const self.slots[..self.frames] as *const [u64]) }
    }

    /// The caller counts, in a register.
    #[inline(always)]
    fn put(&mut self, frame: usize, address: u64, slot: u64) {
        self.addresses[frame].write(address);
        self.slots[frame].write(slot);
    }
}

const RULES: usize = 2048;

#[derive(Clone, Copy)]
struct Cached {
    return_address: u64,
    rule: Rule,
    /// The address lies in a module that keeps frame pointers.
    frame_pointers: bool,
}

/// Begins with what walks write.
#[repr(C)]
pub struct Unwinder {
    pub modules: Modules,
    /// Rules of return addresses in the executable, which lies at the same place in all processes of a cluster: what
    /// one has read, none has to read again, and its memory is not copied for it.
    shared: Option<&'static [AtomicU64]>,
    /// The executable.
    main: (u64, u64),
    /// Some have been put into `rules`.
    has_rules: bool,
    /// All others.
    rules: [Cached; RULES],
    /// The ends of the stack that the process started on.
    lowest: u64,
    top: u64,
    /// The module walked most, the server itself, if it keeps frame pointers.
    fast: (u64, u64),
    /// The server's loop of statements, `PostgresMain`; (0, 0) if unknown.
    pub statement_loop: (u64, u64),
}

impl Unwinder {
    pub const fn new() -> Self {
        let empty = Cached {
            return_address: 0,
            rule: Rule { kind: Kind::Unknown, cfa_offset: 0, bp_offset: 0 },
            frame_pointers: false,
        };
        Unwinder {
            modules: Modules::new(),
            shared: None,
            main: (0, 0),
            has_rules: false,
            rules: [empty; RULES],
            lowest: 0,
            top: 0,
            fast: (0, 0),
            statement_loop: (0, 0),
        }
    }

    /// Reads the process's modules and the ends of its stack. Allocates: at load only.
    pub fn prepare(&mut self, statement_loop: u64, shared: &'static [AtomicU64], names: &Dictionary) {
        self.modules.set_main_path();
        self.modules.refresh(names);
        // Every process comes through `main`, so the executable is what the process's own entry point lies in.
        // SAFETY: a look-up in the process's own auxiliary vector.
        let entry = unsafe { libc::getauxval(libc::AT_ENTRY) };
        self.main = self.modules.find(entry, names).map_or((0, 0), |main| (main.start, main.end));
        self.shared = Some(shared);
        let (lowest, top) = stack_ends().unwrap_or((0, 0));
        (self.lowest, self.top) = (lowest, top);
        self.statement_loop =
            self.modules.find(statement_loop, names).and_then(|m| rules::function(m, statement_loop)).unwrap_or((0, 0));
        self.trust_frame_pointers(true, names);
    }

    /// Whether to use frame pointers at all, where modules keep them.
    pub fn trust_frame_pointers(&mut self, trust: bool, names: &Dictionary) {
        self.modules.dwarf_only = !trust;
        self.forget_rules();
        self.fast = (0, 0);
        if let Some(main) = self.modules.find(self.main.0, names)
            && main.frame_pointers
            && trust
        {
            self.fast = (main.start, main.end);
        }
    }

    /// From now on, and without a check, code in this range is walked by frame pointer. For benchmarks.
    pub fn assume_frame_pointers(&mut self, start: u64, end: u64) {
        self.fast = (start, end);
    }

    /// Whether the executable's frames are walked by frame pointer.
    pub fn uses_frame_pointers(&self) -> bool {
        self.fast.1 != 0
    }

    /// Walks the stack at these registers into `trace`, at most `depth` frames of it.
    #[inline]
    pub fn walk(&mut self, regs: Regs, depth: usize, trace: &mut Trace, names: &Dictionary) {
        let (frames, complete) = self.follow(regs, depth, trace, names);
        (trace.frames, trace.cut) = (frames, !complete);
    }

    /// How many frames there are, and whether they go to the process's first.
    #[inline]
    fn follow(&mut self, regs: Regs, depth: usize, trace: &mut Trace, names: &Dictionary) -> (usize, bool) {
        let Regs { mut sp, mut bp } = regs;
        let (top, fast) = (self.top, self.fast);
        if sp < self.lowest || sp >= top || sp % 8 != 0 {
            return (0, false);
        }
        let mut slot = sp;
        // SAFETY: sp lies in the process's stack, above the current stack pointer: mapped up to the top.
        let mut ip = unsafe { *(sp as *const u64) };
        sp += 8;
        let mut frames = 0;
        while frames < depth.min(MAX_FRAMES) {
            trace.put(frames, ip, slot);
            frames += 1;
            if ip.wrapping_sub(fast.0) < fast.1 - fast.0 {
                // A frame lies above the one that it called, all of it inside the stack.
                if bp < sp || bp >= top - 8 || bp % 8 != 0 {
                    // By the ABI: the process's entry point clears the register.
                    return (frames, bp == 0);
                }
                slot = bp + 8;
                sp = bp + 16;
                // SAFETY: above the stack pointer, below the top: both words are inside the mapped stack.
                (bp, ip) = unsafe { (*(bp as *const u64), *(slot as *const u64)) };
                if ip == 0 {
                    return (frames, true);
                }
                continue;
            }
            let cached = self.rule(ip, names);
            let cfa = match cached.rule.kind {
                _ if cached.frame_pointers => bp.wrapping_add(16),
                Kind::Sp => sp.wrapping_add_signed(cached.rule.cfa_offset as i64),
                Kind::Bp => bp.wrapping_add_signed(cached.rule.cfa_offset as i64),
                Kind::Outermost => return (frames, true),
                Kind::Unknown => return (frames, false),
            };
            let bp_at = match cached.rule.bp_offset {
                _ if cached.frame_pointers => bp,
                0 => 0,
                offset => cfa.wrapping_add_signed(offset as i64),
            };
            // As above.
            if cfa < sp + 8 || cfa > top || cfa % 8 != 0 {
                return (frames, false);
            }
            slot = cfa - 8;
            // SAFETY: sp <= slot < top, so the slot of the return address is inside the mapped stack.
            ip = unsafe { *(slot as *const u64) };
            if bp_at != 0 {
                if bp_at < sp || bp_at > slot || bp_at % 8 != 0 {
                    return (frames, false);
                }
                // SAFETY: sp <= bp_at <= slot, as for the return address.
                bp = unsafe { *(bp_at as *const u64) };
            }
            sp = cfa;
            if ip == 0 {
                return (frames, true);
            }
        }
        (frames, false)
    }

    /// Notices what was loaded and unloaded since the last look. Takes no memory, and hardly time when that is nothing.
    pub fn refresh(&mut self, names: &Dictionary) {
        self.modules.refresh(names);
        if self.modules.unloaded {
            self.forget_rules();
        }
    }

    /// Those of the executable hold for ever. Memory that holds no rule is not touched, so that a child need not copy it.
    fn forget_rules(&mut self) {
        if std::mem::take(&mut self.has_rules) {
            self.rules.iter_mut().filter(|r| r.return_address != 0).for_each(|r| r.return_address = 0);
        }
    }

    #[inline]
    fn rule(&mut self, ip: u64, names: &Dictionary) -> Cached {
        let hash = (ip ^ (ip >> 12)) as usize;
        let place = ip.wrapping_sub(self.main.0);
        if place < self.main.1 - self.main.0
            && let Some(shared) = self.shared
        {
            let word = &shared[hash % shared.len()];
            return match Rule::unpack(word.load(Relaxed), place) {
                // Where its frame pointers are used, nobody asks.
                Some(rule) => Cached { return_address: ip, rule, frame_pointers: false },
                None => self.read_shared_rule(ip, word, names),
            };
        }
        let index = hash % RULES;
        let cached = self.rules[index];
        if cached.return_address == ip { cached } else { self.read_rule(ip, index, names) }
    }

    #[cold]
    fn read_shared_rule(&mut self, ip: u64, word: &AtomicU64, names: &Dictionary) -> Cached {
        let rule = self.modules.find(ip, names).map_or(Rule::default(), |main| rules::find(main, ip));
        if let Some(packed) = rule.pack(ip - self.main.0) {
            word.store(packed, Relaxed);
        }
        Cached { return_address: ip, rule, frame_pointers: false }
    }

    #[cold]
    fn read_rule(&mut self, ip: u64, index: usize, names: &Dictionary) -> Cached {
        // The tables of a library that has been unloaded since the last look may not be there to be read.
        self.refresh(names);
        let dwarf_only = self.modules.dwarf_only;
        let (rule, frame_pointers) = match self.modules.find(ip, names) {
            Some(module) => (rules::find(module, ip), module.frame_pointers && !dwarf_only),
            None => (Rule::default(), false),
        };
        let cached = Cached { return_address: ip, rule, frame_pointers };
        // An address without a module may get one when a library is loaded there.
        if rule.kind != Kind::Unknown {
            self.rules[index] = cached;
            self.has_rules = true;
        }
        cached
    }
}

/// Lowest and highest address of the stack that this runs on, as far as it may grow.
fn stack_ends() -> Option<(u64, u64)> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let here = &raw const maps as u64;
    let top = crate::proc_maps::parse(&maps).find(|m| (m.start..m.end).contains(&here))?.end;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes to a local.
    unsafe { libc::getrlimit(libc::RLIMIT_STACK, &mut limit) };
    // Without a limit a gigabyte is more than any server process uses.
    Some((top.saturating_sub(limit.rlim_cur.min(1 << 30)), top))
}

/// The registers of the caller, for use outside the hook's own entry.
#[inline(never)]
pub fn with_registers<R>(f: &mut dyn FnMut(Regs) -> R) -> R {
    #[unsafe(naked)]
    unsafe extern "C" fn enter(f: *mut u8, call: unsafe extern "C" fn(*mut u8, u64, u64)) {
        std::arch::naked_asm!("mov rax, rsi", "mov rsi, rsp", "mov rdx, rbp", "jmp rax",)
    }
    struct Call<'a, R> {
        f: &'a mut dyn FnMut(Regs) -> R,
        result: Option<R>,
    }
    unsafe extern "C" fn run<R>(call: *mut u8, sp: u64, bp: u64) {
        // SAFETY: `with_registers` passes its own Call.
        let call = unsafe { &mut *call.cast::<Call<R>>() };
        call.result = Some((call.f)(Regs { sp, bp }));
    }
    let mut call = Call { f, result: None };
    // SAFETY: `run` gets the Call that it expects; the naked function only rearranges registers.
    unsafe { enter((&raw mut call).cast(), run::<R>) };
    call.result.expect("run stores a result")
}

#[cfg(test)]
mod tests;
