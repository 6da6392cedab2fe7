//! This process: what the hooks report goes through here into the ledger and the process's slot.
//!
//! Everything is reached through one static, because a palloc hook has no argument to carry it. Server processes have
//! a single thread; the state guards against the one thing that can come in between, a signal handler that pallocs.

mod ending;
mod life;
mod out_of_memory;

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering::*};

use pgrx::pg_sys;

use crate::hook;
use crate::ledger::account::{Site, Stamp};
use crate::ledger::region::Budget;
use crate::ledger::{Decision, Ledger};
use crate::pg_compat::{self, MemoryContext};
use crate::settings::{self, Mode};
use crate::share::Share;
use crate::share::pool::{CHUNK, Cursor};
use crate::share::row::Row;
use crate::share::slot::{POSTMASTER, Slot};
use crate::stack::memory::Home;
use crate::stack::{Regs, Stacks, Unwinder};
use crate::walk::{Walk, path};
pub use ending::{bury_dead, postmaster_logs};
pub use life::{check, prepare, uses_frame_pointers};
pub use out_of_memory::top_call_sites;

/// Of `rheap.memory_limit`, what is set aside for everything but the ledger.
const ASIDE: usize = 2 << 20;
/// Of the rest, the part for accounts of call sites, in the shared table, that ASIDE has no room for.
const SITES_PART: usize = 8;
/// Recorded allocations between two looks at the clock within a statement.
const LOOK: u32 = 256;

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum State {
    /// No books are kept yet.
    Detached,
    /// No slot was to be had; try again no earlier than at the next message.
    Refused,
    /// Messages tell when a statement ends, and are the safe points for everything that takes time.
    Ready,
    /// There are no messages, or none are known of yet: each allocation is recorded at once, and the clock looked at.
    Alone,
    /// A hook is at work: whatever pallocs meanwhile is a signal handler's, and is let pass.
    Busy,
}

pub struct Process {
    pub share: Option<Share>,
    state: State,
    /// Ready, and all allocations are recorded: the commonest cases take a shorter way.
    quick: bool,
    /// Set while this process keeps books.
    own_slot: Option<&'static Slot>,
    /// Where the server keeps the id of the statement at hand.
    query_id: *const i64,
    pub slot: u32,
    pid: i32,
    pub ledger: Ledger,
    /// For the tables beside the ledger.
    pub aside: Budget,
    unwinder: Unwinder,
    pub stacks: Stacks,
    pub sites: Cursor,
    pub rows: Cursor,
    pub walk: Walk,
    epoch: u32,
    /// The epoch at the last walk.
    walked_epoch: u32,
    /// `MyBackendType` as last seen: a child says who it is only some allocations after its start.
    kind: pg_sys::BackendType::Type,
    /// Set once messages arrive: then they are the epochs of work.
    has_messages: bool,
    /// The first of them has been dealt with.
    has_served: bool,
    /// A check is going on in this session: everything is recorded, whatever the settings say.
    checking: bool,
    /// The wish of `rheap_track` that is followed.
    tracked: u32,
    /// The first walk is to be made before anything else is allocated.
    baseline_due: bool,
    followed: settings::Followed,
    looks: u32,
    /// Milliseconds of processor time between two ticks; 0: none.
    ticks: i32,
    now: i64,
    /// Bytes alive in the ledger after the last statement.
    held: u64,
    /// Allocations that passed the hook's entry because their cell did not ask for them.
    pub passed: u64,
    /// Allocations that were recorded, or counted, without being pending first.
    at_once: u64,
    /// The frame pointer at the entry of the exact mode's `alloc`, for the few allocations that need it.
    pub bp: u64,
    /// Allocations that no table had room for.
    unseen: u64,
    /// Some table was full, which the log may still have to hear.
    full: bool,
}

#[repr(transparent)]
pub struct Global(UnsafeCell<Process>);
// SAFETY: one thread per server process; see the module's comment on signal handlers.
unsafe impl Sync for Global {}
/// Named for the hook's entries, which count down the gaps of the cells by themselves.
pub static PROCESS: Global = Global(UnsafeCell::new(Process {
    share: None,
    state: State::Detached,
    quick: false,
    own_slot: None,
    query_id: &raw const pg_compat::NO_QUERY_ID,
    slot: 0,
    pid: 0,
    ledger: Ledger::new(32 << 20, 0),
    aside: Budget::new(ASIDE / 2),
    unwinder: Unwinder::new(),
    stacks: Stacks::new(),
    sites: Cursor { next: 0, end: 0, chunks: 0, most: 0 },
    rows: Cursor { next: 0, end: 0, chunks: 0, most: 0 },
    walk: Walk::new(),
    epoch: 0,
    walked_epoch: 0,
    kind: 0,
    has_messages: false,
    has_served: false,
    checking: false,
    tracked: 0,
    baseline_due: false,
    followed: settings::Followed::NONE,
    looks: 0,
    ticks: 0,
    now: 0,
    held: 0,
    passed: 0,
    at_once: 0,
    bp: 0,
    unseen: 0,
    full: false,
}));

/// This process's state.
///
/// # Safety
/// From the server's thread, one reference at a time: hooks hold one only while the state is busy.
#[inline]
pub unsafe fn current() -> &'static mut Process {
    // SAFETY: the caller's promise.
    unsafe { &mut *PROCESS.0.get() }
}

/// Microseconds since 2000-01-01, to the kernel's tick.
pub fn now() -> i64 {
    time_by(libc::CLOCK_REALTIME_COARSE)
}

/// The same to the microsecond, for what is to be compared with other clocks.
pub fn precisely_now() -> i64 {
    time_by(libc::CLOCK_REALTIME)
}

fn time_by(clock: libc::clockid_t) -> i64 {
    const EPOCH: i64 = 946_684_800;
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to a local; answered without entering the kernel.
    unsafe { libc::clock_gettime(clock, &mut t) };
    (t.tv_sec - EPOCH) * 1_000_000 + t.tv_nsec / 1000
}

/// The type of this process, or [`POSTMASTER`].
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

fn store(cell: &AtomicU64, value: u64) {
    cell.store(value, Relaxed);
}

impl Process {
    #[inline]
    pub fn slot(&self) -> Option<&'static Slot> {
        self.own_slot
    }

    #[inline]
    fn enter(&mut self) {
        self.state = State::Busy;
        self.quick = false;
    }

    #[inline]
    fn leave(&mut self, state: State) {
        self.state = state;
        self.quick = state == State::Ready && self.ledger.is_exact();
    }

    #[inline]
    fn next_epoch(&mut self, slot: &Slot) {
        // 0 would mean none; no process gets through them twice.
        self.epoch = self.epoch.wrapping_add(1);
        self.ledger.cells.grant();
        slot.epoch.store(self.epoch, Relaxed);
    }

    fn own_bytes(&self) -> u64 {
        let shared = self.sites.chunks * CHUNK * size_of::<Site>() + self.rows.chunks * CHUNK * size_of::<Row>();
        (self.ledger.own_bytes() + self.aside.used + shared + size_of::<Process>()) as u64
    }

    #[inline]
    fn publish(&self, slot: &Slot) {
        let captures = self.ledger.holds() + self.at_once;
        store(&slot.allocations, self.passed + captures);
        store(&slot.frees, self.ledger.frees());
        store(&slot.captures, captures);
    }

    /// Somebody wants the history forgotten, which must come before what is allocated from now on.
    #[inline(always)]
    fn must_forget(&self) -> bool {
        self.own_slot.is_some_and(Slot::reset_pending)
    }

    /// `rheap_track` wishes for another mode than the one that is followed.
    #[inline(always)]
    fn must_follow_wish(&self, slot: &Slot) -> bool {
        slot.track.load(Relaxed) != self.tracked
    }

    /// Whether anything is recorded.
    pub fn is_on(&self) -> bool {
        self.followed.mode != Mode::Off as u32
    }

    /// What seldom changes.
    fn publish_all(&self, slot: &Slot) {
        self.publish(slot);
        store(&slot.own_bytes, self.own_bytes());
        store(&slot.dropped, self.ledger.dropped() + self.unseen);
    }

    #[inline(always)]
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
        cell: u16,
    ) -> Option<u32> {
        if let Some(site) = ledger.site(stack, path) {
            return Some(site);
        }
        let site = cursor.take(&share.sites, slot)?;
        share.sites.rows[site as usize].open(stack, path);
        ledger.add_site(stack, path, site, cell, share).then_some(site)
    }

    /// An allocation whose cell asks for it. `pending`: its end may come before anybody looks.
    #[inline]
    fn follow(&mut self, context: MemoryContext, chunk: u64, size: u64, regs: Regs, cell: u16, pending: bool) {
        if self.must_forget() {
            self.forget();
        }
        let Some(share) = &self.share else { return };
        let decision = self.ledger.ask(cell, size, self.epoch, share);
        if decision == Decision::Skip {
            self.passed += 1;
            return;
        }
        if let Decision::Record(level) = decision
            && pending
            // SAFETY: the registers are those of the call that was hooked.
            && let Some(known) = unsafe { self.stacks.recall(regs.sp) }
            && known.home.context == context as u64
            && known.home.changes == self.ledger.context_changes()
        {
            let home = known.home;
            let stamp = Stamp { epoch: self.epoch, now: self.now, query_id: pg_compat::query_id() };
            self.ledger.hold(chunk, size, home.context_id, home.site, cell, level, stamp, share);
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
        // SAFETY: the registers are those of the call that was hooked.
        let (stack, home) = unsafe {
            match self.stacks.recall(regs.sp) {
                Some(known) => (known.stack, Some(&mut known.home)),
                // What a process allocates before its second message hardly recurs.
                None => self.stacks.capture(
                    &mut self.unwinder,
                    regs,
                    settings::stack_depth(),
                    self.has_served,
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
            // Some table is full: this allocation goes unseen, and the process says that it is not exact.
            self.unseen += 1;
            self.at_once += 1;
            self.full = true;
            self.ledger.free(chunk, Stamp::default(), &share);
            return;
        };
        share.sites.rows[site as usize].begin(self.epoch, self.now);
        if let Some(home) = home {
            *home = Home { context: context as u64, changes: self.ledger.context_changes(), context_id: id, site };
        }
        let stamp = self.stamp();
        match decision {
            Decision::Record(level) if pending => {
                return self.ledger.hold(chunk, size, id, site, cell, level, stamp, &share);
            }
            Decision::Record(level) => self.ledger.record(chunk, size, id, site, level, stamp, &share),
            Decision::Count => self.ledger.count(size, site, stamp, &share),
            Decision::Skip => return,
        }
        self.at_once += 1;
    }

    /// `allocated_again` where many chunks stay.
    #[inline(never)]
    fn hold_displacing(&mut self, chunk: u64, size: u64, context: u32, site: u32) {
        let stamp = self.stamp();
        let Some(share) = &self.share else { return };
        self.ledger.hold_displacing(chunk, size, context, site, stamp, share);
        self.looks = self.looks.wrapping_sub(1);
        if self.looks == 0 || !self.ledger.is_exact() {
            self.pause();
        }
    }

    /// Time for a look at the clock in the middle of the short way.
    #[cold]
    fn pause(&mut self) {
        self.enter();
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

    /// Looks at the clock, and walks if it is time.
    #[inline(never)]
    fn look(&mut self, slot: &Slot) {
        self.looks = LOOK;
        self.now = now();
        if self.must_follow_wish(slot) {
            self.follow_settings();
        }
        if self.walk.is_due(self.now) {
            self.follow_settings();
            // Where no work has begun since the last walk, as in a long statement and in processes without messages,
            // the time between two walks is the unit.
            if self.epoch == self.walked_epoch && slot.backend_type.load(Relaxed) != POSTMASTER {
                self.next_epoch(slot);
            }
            self.walked_epoch = self.epoch;
            self.flush(false);
            // SAFETY: at the exit of a palloc or between two messages, where the tree is consistent.
            unsafe { crate::walk::walk(self, slot) };
            self.publish_all(slot);
        }
    }

    /// Puts everything into the accounts that is not there yet.
    #[inline(always)]
    pub fn flush(&mut self, ended: bool) {
        if !self.ledger.is_settled() {
            self.flush_some(ended);
        }
    }

    #[inline(never)]
    fn flush_some(&mut self, ended: bool) {
        let stamp = self.stamp();
        if let Some(share) = &self.share {
            self.ledger.flush(ended, stamp, share);
        }
    }

    /// A client's message has been dealt with.
    #[inline]
    fn statement_done(&mut self, slot: &'static Slot, regs: Regs) {
        // When the statement began is near enough, and known already.
        self.now = pg_compat::statement_start();
        self.flush(true);
        self.next_epoch(slot);
        if slot.reset_pending() || !self.has_served || settings::changed() || self.must_follow_wish(slot) {
            self.between_statements(slot, regs);
        }
        // SAFETY: between two statements the tree is consistent.
        unsafe { crate::walk::moved::look(self) };
        if self.ledger.held_bytes() != self.held {
            self.held = self.ledger.held_bytes();
            // The statement may have taken long.
            self.now = now();
            self.walk.note_held(self.held, self.now);
        }
        if self.walk.is_due(self.now) {
            self.look(slot);
        }
        self.looks = LOOK;
        self.publish(slot);
    }

    /// What seldom has to be done.
    #[cold]
    fn between_statements(&mut self, slot: &'static Slot, regs: Regs) {
        if let Some(share) = &self.share {
            self.stacks.anchor(&mut self.unwinder, regs, share);
        }
        if slot.reset_pending() {
            self.forget();
        }
        self.query_id = pg_compat::query_id_place();
        let first = !std::mem::replace(&mut self.has_served, true);
        self.has_messages = true;
        slot.has_messages.store(1, Relaxed);
        self.follow_settings();
        if first {
            // The baseline is taken when the next statement begins, if there is one.
            self.baseline_due = true;
            hook::ask_about_all(true);
        }
    }
}

/// Runs a hook's work unless one is at work already, or no books are kept.
#[inline(always)]
fn guarded(work: impl FnOnce(&mut Process)) {
    // SAFETY: the state makes this the only reference; the work neither raises errors nor longjmps.
    let process = unsafe { current() };
    if process.state != State::Ready && process.state != State::Alone {
        return;
    }
    let state = process.state;
    process.enter();
    work(process);
    process.leave(state);
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

/// A chunk has been allocated in a watched context, and all of them are recorded. False when this takes more than
/// the commonest case does: then nothing has been done.
///
/// # Safety
/// `sp` is that of the call that was hooked. With `GATHER` the processor gathers.
#[inline(always)]
pub unsafe fn allocated_again<const GATHER: bool>(context: MemoryContext, chunk: u64, size: u64, sp: u64) -> bool {
    // SAFETY: as for `guarded`: what follows does not call anything that could palloc.
    let process = unsafe { current() };
    // SAFETY: the caller's promise.
    if process.quick
        && !process.must_forget()
        && let Some(known) = unsafe { process.stacks.recall_first::<GATHER>(sp) }
        && known.home.context == context as u64
        && known.home.changes == process.ledger.context_changes()
    {
        let (context, site) = (known.home.context_id, known.home.site);
        if !process.ledger.hold_exactly(chunk, size, context, site, process.epoch) {
            process.hold_displacing(chunk, size, context, site);
        }
        return true;
    }
    false
}

/// A chunk that was allocated a moment ago, with all of them recorded, is about to be freed. False as above.
#[inline(always)]
pub fn freed_at_once(chunk: u64) -> bool {
    // SAFETY: as for `guarded`: what follows does not call anything that could palloc.
    let process = unsafe { current() };
    // SAFETY: who is quick has attached, for which there must be a mapping; the query's id is this process's own.
    process.quick && {
        let share = unsafe { process.share.as_ref().unwrap_unchecked() };
        process.ledger.free_exactly(chunk, process.now, || unsafe { *process.query_id }, share)
    }
}

/// Whether a chunk that is about to be freed is followed.
#[inline(always)]
pub fn follows(chunk: u64) -> bool {
    // SAFETY: as for `guarded`: this only reads.
    unsafe { current() }.ledger.follows(chunk)
}

/// A followed chunk is about to be freed.
#[inline(never)]
pub fn freed(chunk: u64) {
    guarded(|p| {
        if let Some(share) = &p.share {
            let stamp = Stamp { epoch: p.epoch, now: p.now, query_id: pg_compat::query_id() };
            p.ledger.free(chunk, stamp, share);
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

/// Before this process reads its own accounts.
pub fn settle() {
    guarded(|p| {
        p.flush(false);
        if let Some(slot) = p.slot() {
            p.publish_all(slot);
        }
    });
}

/// A statement has been parsed and is about to run.
pub fn follow_wish() {
    // SAFETY: as for `guarded`; most statements find nothing to do.
    let process = unsafe { current() };
    if process.slot().is_some_and(|slot| process.must_follow_wish(slot)) {
        guarded(Process::follow_settings);
    }
}

/// Everything is looked at now, at any moment between two statements: names are learned of contexts that were built
/// to go away and then kept, and what they hold moves to the accounts of where they are.
pub fn look_at_all() {
    guarded(|p| {
        if let Some(slot) = p.slot() {
            // SAFETY: the caller runs SQL, between two statements of it: the tree is consistent.
            unsafe { crate::walk::moved::look(p) };
            p.walk.hurry();
            p.look(slot);
        }
    });
}

/// In the middle of a long statement.
pub fn tick() {
    guarded(|p| {
        if let Some(slot) = p.slot() {
            p.look(slot);
        }
    });
}

/// A context is touched for the first time: in a session's second message, before anything of it is allocated in
/// contexts that stay, the tree is walked for the baseline.
#[inline]
pub fn touched() {
    // SAFETY: as for `guarded`.
    if unsafe { current() }.baseline_due {
        guarded(|p| {
            p.baseline_due = false;
            p.follow_settings();
            p.walk.hurry();
            if let Some(slot) = p.slot() {
                p.look(slot);
            }
        });
    }
}

/// The start is over, and a client's first message is about to be read.
pub fn first_message() {
    guarded(|p| {
        if let Some(slot) = p.slot()
            && !p.has_messages
        {
            p.has_messages = true;
            slot.has_messages.store(1, Relaxed);
            p.follow_settings();
        }
    });
}

/// A client's message has been dealt with: between two statements, the best moment for everything that takes time.
///
/// # Safety
/// `regs` are those of a call in progress.
pub unsafe fn message_done(regs: Regs) {
    // SAFETY: as for `guarded`.
    let process = unsafe { current() };
    if process.state == State::Busy {
        return;
    }
    process.enter();
    let mut state = State::Refused;
    if process.own_slot.is_some() || process.attach() {
        state = State::Ready;
        if let Some(slot) = process.slot() {
            process.statement_done(slot, regs);
        }
    }
    process.leave(state);
    if process.walk.has_news() || process.full {
        tell_the_log();
    }
}

#[cold]
#[inline(never)]
fn tell_the_log() {
    crate::walk::log_new_leaks();
    life::say_if_full();
}
