//! What the hooks report of chunks and contexts, into the ledger.

use core::ffi::c_void;
use pgrx::pg_sys;

use super::{Full, Process, State, current, guarded, now};
use crate::ledger::account::Stamp;
use crate::ledger::{Chunk, Decision, Holder, Ledger};
use crate::pg_compat::{self, MemoryContext};
use crate::settings;
use crate::share::Share;
use crate::share::pool::Cursor;
use crate::stack::Regs;
use crate::stack::memory::Home;
use crate::walk::path;

impl Process {
    /// An allocation whose cell asks for it. `pending`: its end may come before anybody looks.
    #[inline]
    fn follow(&mut self, context: MemoryContext, chunk: u64, size: u64, regs: Regs, cell: u16, pending: bool) {
        if self.must_forget() {
            self.forget();
        }
        let Some(share) = &self.share else { return };
        // Of what a process allocates on its way out nobody can look at anything.
        let decision = if pg_compat::is_exiting() { Decision::Skip } else { self.ledger.ask(cell, size, share) };
        if decision == Decision::Skip {
            self.passed += 1;
            return;
        }
        if let Decision::Record(level) = decision
            && pending
            // SAFETY: the registers are those of the call that was hooked.
            && let Some(home) = unsafe { self.stacks.recall::<false>(regs.sp) }.map(|known| known.home)
            && self.is_home(home, context)
        {
            let stamp = self.stamp();
            self.ledger.hold(chunk, size, home.holder, cell, level, stamp, share);
            return;
        }
        self.follow_anew(context, chunk, size, regs, cell, decision, pending);
    }

    /// The same when the stack, or what it allocates in, is not known from a moment ago.
    #[inline(never)]
    fn follow_anew(
        &mut self,
        context: MemoryContext,
        chunk: u64,
        size: u64,
        regs: Regs,
        cell: u16,
        decision: Decision,
        pending: bool,
    ) {
        let Some(share) = self.share else { return };
        let mut id = self.ledger.context(context as u64);
        if id == 0 {
            // SAFETY: inside a palloc of this live context.
            let path = unsafe { path::path_of(context, &share) };
            id = self.ledger.add_context(context as u64, path);
        }
        let path = if id == 0 { 0 } else { self.ledger.context_path(id) };
        let recurs = self.is_started();
        // SAFETY: the registers are those of the call that was hooked.
        let (stack, home) = unsafe {
            match if recurs { self.stacks.look_up(regs.sp) } else { None } {
                Some(known) => (known.stack, Some(&mut known.home)),
                None => self.stacks.capture(
                    &mut self.unwinder,
                    regs,
                    settings::stack_depth(),
                    recurs,
                    &share,
                    &mut self.aside,
                ),
            }
        };
        let site = if id == 0 || stack == 0 {
            None
        } else {
            Self::open_site(&mut self.ledger, &mut self.sites, &share, self.slot, stack, path, cell)
        };
        let Some(site) = site else {
            // This allocation goes unseen, and the process says that it is not exact.
            self.unseen += 1;
            self.at_once += 1;
            self.has_afterwards = true;
            self.full = Some(match id {
                0 => Full::Memory,
                _ if stack == 0 => Full::Stacks,
                _ if self.sites.is_at_its_most() => Full::Memory,
                _ => Full::Sites,
            });
            self.ledger.free(chunk, Stamp::default(), &share);
            return;
        };
        share.sites.rows[site as usize].begin(self.ledger.epoch, self.now);
        let holder = Holder::new(id, site);
        let here = Home { context: context as u64, changes: self.ledger.context_changes(), holder };
        // The postmaster's memory is copied when it is written after a fork.
        if let Some(home) = home
            && *home != here
        {
            *home = here;
        }
        let stamp = self.stamp();
        match decision {
            Decision::Record(level) if pending => {
                return self.ledger.hold(chunk, size, holder, cell, level, stamp, &share);
            }
            Decision::Record(level) => {
                let new = Chunk { size, holder, epoch: stamp.epoch, cell, level: level as u16 };
                self.ledger.record(chunk, new, stamp, &share);
            }
            Decision::Count => self.ledger.count(size, site, stamp, &share),
            Decision::Skip => return,
        }
        self.at_once += 1;
    }

    /// Whether what the process does now is likely to recur: not what it needs to start, and not its first message.
    fn is_started(&self) -> bool {
        self.has_served || !self.expects_messages() && self.ledger.epoch > 1
    }

    /// Whether what was found out about a stack holds for an allocation in this context.
    #[inline(always)]
    fn is_home(&self, home: Home, context: MemoryContext) -> bool {
        home.context == context as u64 && home.changes == self.ledger.context_changes()
    }

    /// Time for a look at the clock in the middle of the short way.
    #[cold]
    fn pause(&mut self) {
        if let Some(slot) = self.slot() {
            self.look(slot);
        }
        self.leave(State::Ready);
    }

    /// An allocation in a process that is not driven by messages, or not yet.
    #[cold]
    fn allocated_alone(&mut self, context: MemoryContext, chunk: u64, size: u64, regs: Regs, cell: u16) {
        if self.own_slot.is_none() && !self.attach() {
            return;
        }
        let Some(slot) = self.slot() else { return };
        // SAFETY: a plain read of the server's global.
        if self.kind != unsafe { pg_sys::MyBackendType } {
            self.follow_settings();
        }
        self.now = now();
        self.follow(context, chunk, size, regs, cell, self.state_at_rest() == State::Ready);
        // Such a process allocates little, and may not do so again for long: look each time. While it starts, it is
        // walked each time that it has allocated twice as much as before.
        if self.at_once.is_power_of_two() && self.at_once >= 8 && slot.has_no_messages() && self.walk.is_starting() {
            self.walk.hurry();
        }
        self.look(slot);
        self.publish_all(slot);
    }

    /// The account of a stack and a context path, opened if it is new.
    pub fn open_site(
        ledger: &mut Ledger,
        cursor: &mut Cursor,
        share: &Share,
        slot: u32,
        stack: u32,
        path: u32,
        cell: u16,
    ) -> Option<u32> {
        if let Some(site) = ledger.site(stack, path) {
            return Some(site);
        }
        let site = cursor.take(&share.sites, slot)?;
        share.sites.rows[site as usize].open(stack, path);
        ledger.add_site(stack, path, site, cell, share).then_some(site)
    }
}

/// The cell of the caller of the allocator.
///
/// # Safety
/// `regs` are those of the call that was hooked.
pub unsafe fn cell(regs: Regs) -> u16 {
    // SAFETY: the caller's promise.
    unsafe { current().stacks.callers.key(regs.sp) as u16 % crate::ledger::cells::CELLS as u16 }
}

/// A chunk has been allocated in a watched context, past the hook's entry: `cell` may not have asked for it yet.
///
/// # Safety
/// `regs` are those of the call that was hooked.
pub unsafe fn allocated_unspent(context: MemoryContext, chunk: u64, size: u64, regs: Regs) {
    // SAFETY: the caller's promise.
    let (process, cell) = unsafe { (current(), cell(regs)) };
    if process.ledger.spend(cell, size) {
        allocated(context, chunk, size, regs, cell);
    } else {
        process.passed += 1;
    }
}

/// A chunk has been allocated in a watched context, and its cell asks for it.
#[inline(always)]
pub fn allocated(context: MemoryContext, chunk: u64, size: u64, regs: Regs, cell: u16) {
    // SAFETY: as for `guarded`.
    let process = unsafe { current() };
    if process.state == State::Ready {
        process.enter();
        process.follow(context, chunk, size, regs, cell, true);
        process.looks = process.looks.wrapping_sub(1);
        if process.looks == 0
            && let Some(slot) = process.slot()
        {
            process.look(slot);
        }
        process.leave(State::Ready);
    } else {
        otherwise(context, chunk, size, regs, cell);
    }
}

#[cold]
#[inline(never)]
fn otherwise(context: MemoryContext, chunk: u64, size: u64, regs: Regs, cell: u16) {
    // SAFETY: as for `guarded`.
    let process = unsafe { current() };
    if process.state == State::Busy || process.state == State::Refused {
        return;
    }
    process.enter();
    process.allocated_alone(context, chunk, size, regs, cell);
    process.leave(process.state_at_rest());
    // Between messages there is a better place for it; who gets none logs here, unless an error must not happen.
    // SAFETY: the guard is released; a plain read.
    if !process.has_messages && process.walk.has_news() && unsafe { pg_sys::CritSectionCount } == 0 {
        crate::walk::log_new_leaks();
    }
}

/// A chunk has been allocated in a watched context, and all of them are recorded. Returns the chunk, as do the functions
/// that this ends in: with the ABI of the hook they are jumped to.
///
/// # Safety
/// `regs` are those of the call that was hooked. With `GATHER` the processor gathers.
#[inline(always)]
pub unsafe fn allocated_again<const GATHER: bool>(
    context: MemoryContext,
    chunk: *mut c_void,
    size: u64,
    regs: Regs,
) -> *mut c_void {
    // SAFETY: as for `guarded`: what follows does not call anything that could palloc. Who is quick has a slot.
    unsafe {
        let process = current();
        if !process.quick || process.own_slot.unwrap_unchecked().reset_pending() {
            return allocated_otherwise(context, chunk, size, regs);
        }
        match process.stacks.recall_next::<GATHER>(regs.sp).map(|known| known.home) {
            Some(home) if process.is_home(home, context) => hold_at(home, chunk, size),
            Some(_) => allocated_otherwise(context, chunk, size, regs),
            None => allocated_elsewhere::<GATHER>(context, chunk, size, regs),
        }
    }
}

/// The same for a stack that does not follow the last one as it did before.
#[inline(never)]
unsafe extern "C-unwind" fn allocated_elsewhere<const GATHER: bool>(
    context: MemoryContext,
    chunk: *mut c_void,
    size: u64,
    regs: Regs,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe {
        let process = current();
        match process.stacks.recall::<GATHER>(regs.sp).map(|known| known.home) {
            Some(home) if process.is_home(home, context) => hold_at(home, chunk, size),
            _ => allocated_otherwise(context, chunk, size, regs),
        }
    }
}

#[inline(always)]
fn hold_at(home: Home, chunk: *mut c_void, size: u64) -> *mut c_void {
    // SAFETY: as for `guarded`.
    let process = unsafe { current() };
    if process.ledger.hold_exactly(chunk as u64, size, home.holder) {
        return chunk;
    }
    hold_displacing(chunk, size, home.holder)
}

/// The same where many chunks stay.
#[inline(never)]
extern "C-unwind" fn hold_displacing(chunk: *mut c_void, size: u64, holder: Holder) -> *mut c_void {
    // SAFETY: as for `guarded`.
    let process = unsafe { current() };
    let stamp = process.stamp();
    // A signal handler that comes in between must not meet the tables half-changed.
    process.enter();
    if let Some(share) = &process.share {
        process.ledger.hold_displacing(chunk as u64, size, holder, stamp, share);
        process.looks = process.looks.wrapping_sub(1);
    }
    if process.looks == 0 || !process.ledger.is_exact() {
        process.pause();
    } else {
        process.leave(State::Ready);
    }
    returned(chunk)
}

/// The same by the way that all allocations take where not all are recorded.
#[cold]
#[inline(never)]
unsafe extern "C-unwind" fn allocated_otherwise(
    context: MemoryContext,
    chunk: *mut c_void,
    size: u64,
    regs: Regs,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { allocated(context, chunk as u64, size, regs, cell(regs)) };
    returned(chunk)
}

/// A compiler that knew what these functions return would call them and keep it at hand, for which it would save a
/// register of each caller.
fn returned(chunk: *mut c_void) -> *mut c_void {
    std::hint::black_box(chunk)
}

/// A chunk that was allocated a moment ago, with all of them recorded, is about to be freed. False as above.
#[inline(always)]
pub fn freed_at_once(chunk: u64) -> bool {
    // SAFETY: as for `guarded`: what follows does not call anything that could palloc.
    let process = unsafe { current() };
    // SAFETY: who is quick has attached, for which there must be a mapping; the query's id is this process's own.
    process.quick && {
        let share = unsafe { process.share.as_ref().unwrap_unchecked() };
        process.ledger.free_exactly(chunk, || (process.now, unsafe { *process.query_id }), share)
    }
}

/// Whether a chunk that is about to be freed is followed. While a hook is at work the tables cannot be asked.
#[inline(always)]
pub fn follows(chunk: u64) -> bool {
    // SAFETY: as for `guarded`: this only reads.
    let process = unsafe { current() };
    matches!(process.state, State::Ready | State::Alone) && process.ledger.follows(chunk)
}

/// A followed chunk is about to be freed.
#[inline(never)]
pub fn freed(chunk: u64) {
    guarded(|p| {
        if let Some(share) = &p.share {
            p.ledger.free(chunk, p.stamp(), share);
        }
    });
}

/// A chunk of a watched context has been given another size, and perhaps another place.
///
/// # Safety
/// `regs` are those of the call that was hooked.
pub unsafe fn reallocated(context: MemoryContext, old: u64, new: u64, size: u64, regs: Regs) {
    freed(old);
    // SAFETY: the caller's promise.
    unsafe { allocated_unspent(context, new, size, regs) };
}

/// Everything in a watched context is about to go.
pub fn context_reset(context: MemoryContext) {
    guarded(|p| {
        if let Some(share) = &p.share {
            p.ledger.reset(context as u64, p.stamp(), share);
        }
    });
}

/// A watched context is about to go.
pub fn context_deleted(context: MemoryContext) {
    guarded(|p| {
        if let Some(share) = &p.share {
            p.ledger.delete(context as u64, p.stamp(), share);
        }
    });
}
