//! This process: what the hooks report goes through here into the ledger and the process's slot.
//!
//! Everything is reached through one static, because a palloc hook has no argument to carry it. Server processes have
//! a single thread; a flag guards against the one thing that can come in between, a signal handler that pallocs.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering::*};

use pgrx::pg_sys;

use crate::ledger::account::{Site, Stamp};
use crate::ledger::region::Budget;
use crate::ledger::{Decision, Ledger};
use crate::pg_compat::{self, MemoryContext};
use crate::settings::{self, Mode};
use crate::share::Share;
use crate::share::pool::{CHUNK, Cursor};
use crate::share::row::Row;
use crate::share::slot::{POSTMASTER, Slot};
use crate::stack::{Regs, Stacks, Unwinder};
use crate::walk::{Walk, path};

/// Of `rheap.memory_limit`, what is set aside for everything but the ledger.
const ASIDE: usize = 2 << 20;
/// Watched allocations between two looks at the clock in a process that has no messages to tell its work by.
const LOOK: u32 = 256;

pub struct Process {
    pub share: Option<Share>,
    /// A hook is at work: whatever pallocs meanwhile is a signal handler's, and is let pass.
    busy: bool,
    /// Set while this process has one, which is to say while it keeps books.
    own_slot: Option<&'static Slot>,
    /// No slot was to be had; try again no earlier than at the next message.
    refused: bool,
    pub slot: u32,
    pid: i32,
    pub ledger: Ledger,
    /// For the tables beside the ledger.
    pub aside: Budget,
    unwinder: Unwinder,
    stacks: Stacks,
    pub sites: Cursor,
    pub rows: Cursor,
    pub walk: Walk,
    epoch: u32,
    /// `MyBackendType` as last seen: a child says who it is only some allocations after its start.
    kind: pg_sys::BackendType::Type,
    /// Set once messages arrive: then they are the epochs of work, and the safe points for walks.
    has_messages: bool,
    looks: u32,
    now: i64,
    /// Of the ledger, when the slot was last told.
    published: usize,
    /// Allocations that no table had room for.
    unseen: u64,
    /// Some table was full, which the log may still have to hear.
    full: bool,
}

struct Global(UnsafeCell<Process>);
// SAFETY: one thread per server process; see the module's comment on signal handlers.
unsafe impl Sync for Global {}
static PROCESS: Global = Global(UnsafeCell::new(Process {
    share: None,
    busy: false,
    own_slot: None,
    refused: false,
    slot: 0,
    pid: 0,
    ledger: Ledger::new(32 << 20, 0),
    aside: Budget::new(ASIDE / 2),
    unwinder: Unwinder::new(),
    stacks: Stacks::new(),
    sites: Cursor { next: 0, end: 0, chunks: 0 },
    rows: Cursor { next: 0, end: 0, chunks: 0 },
    walk: Walk::new(),
    epoch: 0,
    kind: 0,
    has_messages: false,
    looks: 0,
    now: 0,
    published: 0,
    unseen: 0,
    full: false,
}));

/// This process's state.
///
/// # Safety
/// From the server's thread, one reference at a time: hooks hold one only while `busy` is set.
#[inline]
pub unsafe fn current() -> &'static mut Process {
    // SAFETY: the caller's promise.
    unsafe { &mut *PROCESS.0.get() }
}

/// Microseconds since 2000-01-01, to the kernel's tick.
pub fn now() -> i64 {
    const EPOCH: i64 = 946_684_800;
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to a local; answered without entering the kernel.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &mut t) };
    (t.tv_sec - EPOCH) * 1_000_000 + t.tv_nsec / 1000
}

/// The type of this process, or [`POSTMASTER`].
#[inline]
pub fn backend_type() -> i32 {
    // SAFETY: plain reads of the server's globals.
    unsafe {
        // Without a type: the postmaster, a child that has not got so far yet, or single-user mode.
        if pg_sys::MyBackendType == pg_sys::BackendType::B_INVALID && pg_sys::PostmasterPid == libc::getpid() {
            POSTMASTER
        } else {
            pg_sys::MyBackendType as i32
        }
    }
}

#[inline]
fn bump(cell: &AtomicU64) {
    cell.store(cell.load(Relaxed) + 1, Relaxed);
}

/// Maps the shared tables, reads the modules, and registers what has to happen at fork and exit.
/// Called once per process tree, before the hooks are installed.
///
/// # Safety
/// From `_PG_init`.
pub unsafe fn prepare(processes: usize, cluster: bool) -> Result<(), String> {
    let share = Share::map(processes, settings::max_call_sites(), cluster)
        .map_err(|e| format!("the shared mapping is refused: {e}"))?;
    // SAFETY: no hook runs yet.
    let process = unsafe { current() };
    process.share = Some(share);
    process.unwinder.prepare(&share.modules);
    if process.unwinder.uses_frame_pointers() && !frame_pointers_agree(process, &share) {
        process.unwinder.trust_frame_pointers(false, &share.modules);
    }
    // SAFETY: the handlers are plain functions of this library, which is never unloaded.
    unsafe {
        libc::pthread_atfork(None, Some(forked_in_parent), Some(forked_in_child));
        libc::atexit(exiting);
    }
    Ok(())
}

/// Whether stacks in the server's own code are walked by frame pointer.
pub fn uses_frame_pointers() -> bool {
    // SAFETY: read once at load, when no hook runs.
    unsafe { current() }.unwinder.uses_frame_pointers()
}

/// Frame pointers are trusted once they have given the same stack as the C runtime's unwinder, from here up.
fn frame_pointers_agree(process: &mut Process, share: &Share) -> bool {
    let mut ours = [0u64; 64];
    let mut theirs = Vec::new();
    let (frames, cut) = crate::stack::unwind::with_registers(&mut |regs| {
        backtrace::trace(|frame| {
            theirs.push(frame.ip() as u64);
            true
        });
        process.unwinder.walk(regs, &mut ours, &share.modules)
    });
    let Some(start) = theirs.iter().position(|&ip| frames > 1 && ip == ours[1]) else { return false };
    !cut && theirs[start..].iter().zip(&ours[1..frames]).all(|(a, b)| a == b) && theirs.len() - start >= frames - 1
}

unsafe extern "C" fn forked_in_parent() {
    // SAFETY: runs in the thread that forked, between two statements of it.
    let process = unsafe { current() };
    if process.own_slot.is_some() && !process.has_messages {
        process.next_epoch();
    }
}

unsafe extern "C" fn forked_in_child() {
    // SAFETY: the child's only thread.
    let process = unsafe { current() };
    process.own_slot = None;
    process.refused = false;
    process.busy = false;
    process.has_messages = false;
}

extern "C" fn exiting() {
    // SAFETY: the process's last moments; nothing else runs.
    let process = unsafe { current() };
    if process.own_slot.is_some() && std::process::id() as i32 == process.pid {
        process.own_slot = None;
        process.refused = true;
        if let Some(share) = process.share {
            share.release_slot(process.slot, process.pid);
        }
    }
}

impl Process {
    #[inline]
    pub fn slot(&self) -> Option<&'static Slot> {
        self.own_slot
    }

    /// Starts this process's own books: the parent's, if it was forked, are not its own.
    #[cold]
    fn attach(&mut self) -> bool {
        if self.refused {
            return false;
        }
        let Some(share) = self.share else { return false };
        // SAFETY: a plain system call; the server's own variable is not set yet this early.
        self.pid = unsafe { libc::getpid() };
        self.now = now();
        self.ledger.clear();
        self.ledger.seed(self.pid as u64 ^ (self.now as u64) << 20);
        self.walk.forget(self.now, &mut self.aside);
        self.sites = Cursor::default();
        self.rows = Cursor::default();
        self.epoch = 1;
        self.looks = 0;
        self.published = 0;
        (self.unseen, self.full) = (0, false);
        let Some(slot) = share.claim_slot(self.pid, backend_type()) else {
            self.refused = true;
            return false;
        };
        self.slot = slot;
        self.own_slot = Some(&share.slots[slot as usize]);
        self.follow_settings();
        true
    }

    /// Settings may have changed: between two messages, or after a reload.
    #[inline(never)]
    fn follow_settings(&mut self) {
        let Some(slot) = self.slot() else { return };
        let kind = backend_type();
        let mode = settings::mode();
        // SAFETY: a plain read of the server's global.
        self.kind = unsafe { pg_sys::MyBackendType };
        slot.backend_type.store(kind, Relaxed);
        slot.without_messages.store(pg_compat::has_no_messages(kind) as u32, Relaxed);
        slot.mode.store(mode, Relaxed);
        // What allocates little can always be exact.
        let exact = mode == Mode::Exact as u32 || !pg_compat::allocates_much(kind as _);
        self.ledger.set_base(if exact { 0 } else { settings::sample_bytes() });
        self.ledger.set_limit(settings::memory_limit() - ASIDE);
        self.ledger.relax();
    }

    fn next_epoch(&mut self) {
        self.epoch = self.epoch.saturating_add(1);
        if let Some(slot) = self.slot() {
            slot.epoch.store(self.epoch, Relaxed);
        }
    }

    /// Somebody asked to forget: start again, with now as the baseline.
    #[cold]
    fn forget(&mut self, share: &Share, slot: &Slot) {
        let wanted = slot.resets_wanted.load(Acquire);
        self.ledger.clear();
        self.walk.forget(self.now, &mut self.aside);
        share.sites.release(self.slot, Site::close);
        share.rows.release(self.slot, Row::close);
        self.sites = Cursor::default();
        self.rows = Cursor::default();
        slot.open(slot.backend_type.load(Relaxed));
        self.epoch = 1;
        slot.resets_done.store(wanted, Release);
        self.follow_settings();
    }

    fn own_bytes(&self) -> u64 {
        let shared = self.sites.chunks * CHUNK * size_of::<Site>() + self.rows.chunks * CHUNK * size_of::<Row>();
        (self.ledger.own_bytes() + self.aside.used + shared + size_of::<Process>()) as u64
    }

    fn publish(&self, slot: &Slot) {
        slot.own_bytes.store(self.own_bytes(), Relaxed);
        slot.dropped.store(self.ledger.dropped() + self.unseen, Relaxed);
    }

    #[inline]
    fn stamp(&self) -> Stamp {
        Stamp { epoch: self.epoch, now: self.now, query_id: pg_compat::query_id() }
    }

    /// The account of a stack and a context path, opened if it is new.
    pub fn open_site(
        ledger: &mut Ledger,
        cursor: &mut Cursor,
        share: &Share,
        slot: u32,
        stack: u32,
        path: u32,
    ) -> Option<u32> {
        if let Some(site) = ledger.site(stack, path) {
            return Some(site);
        }
        let site = cursor.take(&share.sites, slot)?;
        share.sites.rows[site as usize].open(stack, path);
        ledger.add_site(stack, path, site).then_some(site)
    }

    // Not inlined, so that the many allocations that need no record save no registers for it.
    #[inline(never)]
    fn record(&mut self, context: MemoryContext, chunk: u64, size: u64, regs: Regs, decision: Decision) {
        let Some(share) = self.share else { return };
        let Some(slot) = self.slot() else { return };
        bump(&slot.captures);
        let mut id = self.ledger.context(context as u64);
        if id == 0 {
            // SAFETY: inside a palloc of this live context.
            let path = unsafe { path::path_of(context, &share) };
            id = self.ledger.add_context(context as u64, path);
        }
        let stack = self.stacks.capture(&mut self.unwinder, regs, settings::stack_depth(), &share, &mut self.aside);
        let path = if id == 0 { 0 } else { self.ledger.context_path(id) };
        let site = if id == 0 || stack == 0 {
            None
        } else {
            Self::open_site(&mut self.ledger, &mut self.sites, &share, self.slot, stack, path)
        };
        let Some(site) = site else {
            // Some table is full: this allocation goes unseen, and the process says that it is not exact.
            self.unseen += 1;
            self.full = true;
            self.ledger.free(chunk, &share);
            return;
        };
        self.now = now();
        let stamp = self.stamp();
        match decision {
            Decision::Record => self.ledger.record(chunk, size, id, site, stamp, &share),
            Decision::Count => self.ledger.count(size, site, stamp, &share),
            Decision::Skip => (),
        }
        if self.ledger.own_bytes() != self.published || self.ledger.dropped() != 0 {
            self.published = self.ledger.own_bytes();
            self.publish(slot);
        }
    }

    fn allocated(&mut self, context: MemoryContext, chunk: u64, size: u64, regs: Regs) {
        if self.own_slot.is_none() && !self.attach() {
            return;
        }
        let Some(slot) = self.slot() else { return };
        if slot.reset_pending()
            && let Some(share) = self.share
        {
            self.forget(&share, slot);
        }
        // SAFETY: a plain read of the server's global.
        if self.kind != unsafe { pg_sys::MyBackendType } {
            self.follow_settings();
        }
        if settings::mode() != Mode::Off as u32 {
            bump(&slot.allocations);
            match self.ledger.decide(size) {
                Decision::Skip => {
                    // The address is alive again: an older record of it missed its free.
                    if pg_compat::DISPATCH_BY_CHUNK
                        && let Some(share) = &self.share
                    {
                        self.ledger.free(chunk, share);
                    }
                }
                decision => self.record(context, chunk, size, regs, decision),
            }
        }
        self.looks = self.looks.wrapping_add(1);
        if self.has_messages {
            if self.looks.is_multiple_of(LOOK) {
                self.look(slot);
            }
            return;
        }
        // Without messages a process allocates little, and may not do so again for long: look each time. While it
        // starts, it is walked each time that it has allocated twice as much as before.
        if self.looks.is_power_of_two() && self.looks >= 8 && slot.has_no_messages() && self.walk.is_starting() {
            self.walk.hurry();
        }
        self.look(slot);
    }

    /// Looks at the clock, and walks if it is time.
    #[inline(never)]
    fn look(&mut self, slot: &Slot) {
        self.now = now();
        if self.walk.is_due(self.now) {
            self.follow_settings();
            if !self.has_messages && slot.backend_type.load(Relaxed) != POSTMASTER {
                self.next_epoch();
            }
            // SAFETY: at the exit of a palloc or between two messages, where the tree is consistent.
            unsafe { crate::walk::walk(self, slot) };
            self.publish(slot);
        }
    }
}

/// Runs a hook's work unless one is at work already.
#[inline]
fn guarded(work: impl FnOnce(&mut Process)) {
    // SAFETY: the flag makes this the only reference; the work neither raises errors nor longjmps.
    let process = unsafe { current() };
    if process.busy {
        return;
    }
    process.busy = true;
    work(process);
    process.busy = false;
}

/// A chunk has been allocated in a watched context.
#[inline]
pub fn allocated(context: MemoryContext, chunk: u64, size: u64, regs: Regs) {
    guarded(|p| p.allocated(context, chunk, size, regs));
    // Between messages there is a better place for it; who gets none logs here, unless an error must not happen.
    // SAFETY: the guard is released; plain reads.
    unsafe {
        if !current().has_messages && current().walk.has_news() && pg_sys::CritSectionCount == 0 {
            crate::walk::log_new_leaks();
        }
    }
}

/// A chunk is about to be freed.
#[inline]
pub fn freed(chunk: u64) {
    guarded(|p| {
        if let (Some(slot), Some(share)) = (p.own_slot, &p.share)
            && p.ledger.free(chunk, share)
        {
            bump(&slot.frees);
        }
    });
}

/// A chunk of a watched context has been given another size, and perhaps another place.
#[inline]
pub fn reallocated(context: MemoryContext, old: u64, new: u64, size: u64, regs: Regs) {
    freed(old);
    allocated(context, new, size, regs);
}

/// Everything in a watched context is about to go.
pub fn context_reset(context: MemoryContext) {
    guarded(|p| {
        if let (Some(_), Some(share)) = (p.own_slot, &p.share) {
            let ended = p.ledger.reset(context as u64, share);
            if let Some(slot) = p.slot() {
                slot.frees.store(slot.frees.load(Relaxed) + ended as u64, Relaxed);
            }
        }
    });
}

/// A watched context is about to go.
pub fn context_deleted(context: MemoryContext) {
    guarded(|p| {
        if let (Some(_), Some(share)) = (p.own_slot, &p.share) {
            let ended = p.ledger.delete(context as u64, share);
            if let Some(slot) = p.slot() {
                slot.frees.store(slot.frees.load(Relaxed) + ended as u64, Relaxed);
            }
        }
    });
}

/// A client's message has been dealt with: between two statements, the best moment for everything that takes time.
pub fn message_done() {
    guarded(|p| {
        p.refused = false;
        if p.own_slot.is_none() && !p.attach() {
            return;
        }
        let Some(slot) = p.slot() else { return };
        if slot.reset_pending()
            && let Some(share) = p.share
        {
            p.forget(&share, slot);
        }
        if slot.walks.load(Relaxed) == 0 {
            p.walk.hurry();
        }
        p.has_messages = true;
        slot.has_messages.store(1, Relaxed);
        p.next_epoch();
        p.follow_settings();
        p.walk.note_held(p.ledger.held_bytes(), now());
        p.look(slot);
        p.publish(slot);
    });
    crate::walk::log_new_leaks();
    say_if_full();
}

/// The log hears once of a table that is too small.
fn say_if_full() {
    // SAFETY: the guard is released.
    let process = unsafe { current() };
    if std::mem::take(&mut process.full) && process.share.is_some_and(|s| s.full_logged.swap(1, AcqRel) == 0) {
        pgrx::log!(
            "rheap: a table is full, and call sites that are new go unseen; raise rheap.max_call_sites (now {}) or rheap.memory_limit",
            settings::max_call_sites()
        );
    }
}
