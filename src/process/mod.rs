//! This process: what the hooks report goes through here into the ledger and the process's slot.
//!
//! Everything is reached through one static, because a palloc hook has no argument to carry it. Server processes have
//! a single thread; the state guards against the one thing that can come in between, a signal handler that pallocs.

mod chunks;
mod ending;
mod life;
mod out_of_memory;
mod statements;

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering::*, compiler_fence};

use pgrx::pg_sys;

use crate::ledger::Ledger;
use crate::ledger::account::{Site, Stamp};
use crate::ledger::region::Budget;
use crate::pg_compat;
use crate::settings::{self, Mode};
use crate::share::Share;
use crate::share::pool::{CHUNK, Cursor};
use crate::share::row::Row;
use crate::share::slot::{POSTMASTER, Slot};
use crate::stack::{Stacks, Unwinder};
use crate::walk::Walk;
pub use chunks::*;
pub use ending::{Text, bury_dead, install, postmaster_logs};
pub use life::{check, prepare, uses_frame_pointers};
pub use out_of_memory::{top_call_sites, write_address};
pub use statements::*;

/// Of `rheap.memory_limit`, what is set aside for everything but the ledger.
const ASIDE: usize = 2 << 20;
/// Of the rest, the part for accounts of call sites, in the shared table, that ASIDE has no room for.
const SITES_PART: usize = 8;

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

/// Why an allocation could not be recorded.
#[derive(Clone, Copy)]
enum Full {
    /// The process's own memory, or its part of the shared tables.
    Memory = 1,
    /// The shared table of call stacks.
    Stacks,
    /// The shared table of call sites.
    Sites,
}

/// In this order, so that what every process writes lies on one page with what it writes of the hook's tables: all up
/// to the ledger's pending chunks. What each statement needs comes first, is the beginning of the walk, and the end of
/// that part of the ledger. Those that have to walk a stack write the end of the stacks and the beginning of the
/// unwinder, too.
#[repr(C, align(64))]
pub struct Process {
    state: State,
    /// Ready, and all allocations are recorded: the commonest cases take a shorter way.
    quick: bool,
    /// The first walk is to be made before anything else is allocated.
    baseline_due: bool,
    /// SQL functions have answered since the last message.
    has_answered: bool,
    /// After this message the log may have to hear of something, or memory goes back.
    pub has_afterwards: bool,
    /// Set once messages arrive: then they are the epochs of work.
    has_messages: bool,
    /// The first of them has been dealt with.
    has_served: bool,
    /// A check is going on in this session: everything is recorded, whatever the settings say.
    checking: bool,
    /// Set while this process keeps books.
    own_slot: Option<&'static Slot>,
    now: i64,
    /// What the ledger held after the last statement.
    held: u64,
    /// Allocations that passed the hook's entry because their cell did not ask for them.
    pub passed: u64,
    /// Allocations that were recorded, or counted, without being pending first.
    at_once: u64,
    /// Recorded allocations until the next look at the clock, and between two looks.
    looks: u32,
    look_every: u32,
    /// The wish of `rheap_track` that is followed.
    tracked: u32,
    /// The ledger's epoch at the last walk.
    walked_epoch: u32,
    pub walk: Walk,
    /// Where the server keeps the id of the statement at hand.
    query_id: *const i64,
    pub slot: u32,
    pid: i32,
    /// For the tables beside the ledger.
    pub aside: Budget,
    pub sites: Cursor,
    pub rows: Cursor,
    pub share: Option<Share>,
    /// `MyBackendType` as last seen: a child says who it is only some allocations after its start.
    kind: pg_sys::BackendType::Type,
    followed: settings::Followed,
    /// Milliseconds of processor time between two ticks; 0: none.
    ticks: i32,
    /// Allocations that no table had room for.
    unseen: u64,
    /// What was full, which the log may still have to hear.
    full: Option<Full>,
    pub ledger: Ledger,
    pub stacks: Stacks,
    unwinder: Unwinder,
}

#[repr(transparent)]
pub struct Global(UnsafeCell<Process>);
// SAFETY: one thread per server process; see the module's comment on signal handlers.
unsafe impl Sync for Global {}
/// All zero bytes, so that the library's file need not hold it and the kernel need not copy it; `prepare` does the rest.
/// Named for the hook's entries, which count down the gaps of the cells by themselves.
pub static PROCESS: Global = Global(UnsafeCell::new(Process {
    share: None,
    state: State::Detached,
    quick: false,
    own_slot: None,
    query_id: std::ptr::null(),
    slot: 0,
    pid: 0,
    ledger: Ledger::unborn(),
    aside: Budget::new(0),
    unwinder: Unwinder::new(),
    stacks: Stacks::new(),
    sites: Cursor { next: 0, end: 0, chunks: 0, most: 0 },
    rows: Cursor { next: 0, end: 0, chunks: 0, most: 0 },
    walk: Walk::new(),
    walked_epoch: 0,
    kind: 0,
    has_messages: false,
    has_served: false,
    checking: false,
    tracked: 0,
    baseline_due: false,
    followed: settings::Followed::NONE,
    looks: 0,
    look_every: 0,
    ticks: 0,
    now: 0,
    held: 0,
    passed: 0,
    at_once: 0,
    unseen: 0,
    full: None,
    has_answered: false,
    has_afterwards: false,
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

/// Where all processes find what one has found out: see [`Share`].
pub fn name_of_portals() -> Option<&'static AtomicU64> {
    // SAFETY: this only reads.
    unsafe { current() }.share.as_ref().and_then(|share| share.name_of_portals.first())
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
        self.set_state(State::Busy, false);
        compiler_fence(SeqCst);
    }

    #[inline]
    fn leave(&mut self, state: State) {
        compiler_fence(SeqCst);
        self.set_state(state, state == State::Ready && self.ledger.is_exact());
    }

    /// For a signal handler to see, whatever the compiler thinks of who looks.
    #[inline(always)]
    fn set_state(&mut self, state: State, quick: bool) {
        // SAFETY: plain stores into fields of this struct.
        unsafe {
            (&raw mut self.state).write_volatile(state);
            (&raw mut self.quick).write_volatile(quick);
        }
    }

    #[inline]
    fn next_epoch(&mut self, slot: &Slot) -> u32 {
        // 0 would mean none; no process gets through them twice.
        let epoch = self.ledger.epoch.wrapping_add(1);
        self.ledger.epoch = epoch;
        slot.epoch.store(epoch, Relaxed);
        epoch
    }

    fn own_bytes(&self) -> u64 {
        let shared = self.sites.chunks * CHUNK * size_of::<Site>() + self.rows.chunks * CHUNK * size_of::<Row>();
        (self.ledger.own_bytes() + self.aside.used + shared + size_of::<Process>()) as u64
    }

    /// What is counted as freed or captured is counted as allocated before: see `Slot::figures`.
    #[inline]
    fn publish(&self, slot: &Slot) {
        let captures = self.ledger.holds() + self.at_once;
        store(&slot.allocations, self.passed + captures);
        slot.frees.store(self.ledger.frees(), Release);
        slot.captures.store(captures, Release);
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

    /// Reads every page of the filter, which frees look at all over: what has never been touched costs each forked child
    /// a fault when it looks there, and what the parent has mapped, if only as zeros, costs none.
    fn touch(&self) {
        for byte in self.ledger.filter.0.iter().step_by(4096).chain(self.ledger.filter.0.last()) {
            // SAFETY: a reference.
            unsafe { (&raw const *byte).read_volatile() };
        }
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
        Stamp { epoch: self.ledger.epoch, now: self.now, query_id: pg_compat::query_id() }
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
