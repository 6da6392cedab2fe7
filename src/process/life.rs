//! The life of a process's books: made at load, empty again after fork, in step with the settings, given back at exit.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::Ordering::*;

use pgrx::pg_sys;

use super::ending::Text;
use super::statements::{LOOK, SENDERS_LOOK};
use super::{ASIDE, Full, Process, SITES_PART, State, backend_type, current, now};
use crate::hook::{self, Gap};
use crate::ledger::account::Site;
use crate::ledger::region::Budget;
use crate::ledger::{Due, Precision, cells};
use crate::pg_compat;
use crate::settings::{self, Mode};
use crate::share::Share;
use crate::share::pool::{CHUNK, Cursor};
use crate::share::row::Row;
use crate::share::slot::POSTMASTER;
use crate::stack::Trace;
use crate::verdict::proportion::Held;

/// What a backend's first message allocates fills caches, and no more than this many times `rheap.sample_bytes` in most
/// sessions: like what came before, that much is the baseline.
const BASELINE: u64 = 64;
/// What it allocates beyond that is sampled this many times more sparsely.
const FILLS: u64 = 16;

/// Milliseconds of processor time within which a busy process notices what `rheap_track` wishes.
const WISH: i32 = 500;

/// Maps the shared tables, reads the modules, and registers what has to happen at fork and exit.
/// Called once per process tree, before the hooks are installed.
///
/// # Safety
/// From `_PG_init`.
pub unsafe fn prepare(processes: usize) -> Result<(), String> {
    let sites = settings::max_call_sites();
    // Who has it alone needs no more than it may fill.
    let sites = if processes > 1 { sites } else { sites.min((most_chunks(settings::memory_limit()) + 1) * CHUNK) };
    let share = Share::map(processes, sites).map_err(|e| format!("the shared mapping is refused: {e}"))?;
    // SAFETY: no hook runs yet.
    let process = unsafe { current() };
    process.touch();
    process.share = Some(share);
    // SAFETY: called once per process tree.
    process.aside = unsafe { Budget::inherited(ASIDE / 2) };
    process.query_id = pg_compat::query_id_place();
    process.ledger.set_precision(Precision::Exact);
    process.unwinder.prepare(pg_sys::PostgresMain as *const () as u64, share.rules, &share.modules);
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

/// Chunks of accounts that a process may take under a memory limit.
fn most_chunks(limit: usize) -> usize {
    // Half of what is aside is for stacks, and an eighth is left to the rows of contexts.
    let sites = (limit - ASIDE) / SITES_PART + ASIDE * 3 / 8 - size_of::<Process>().min(ASIDE / 4);
    sites / (CHUNK * size_of::<Site>())
}

/// Whether stacks in the server's own code are walked by frame pointer.
pub fn uses_frame_pointers() -> bool {
    // SAFETY: read once at load, when no hook runs.
    unsafe { current() }.unwinder.uses_frame_pointers()
}

/// Frame pointers are trusted once they have given the same stack as the C runtime's unwinder, from here up.
fn frame_pointers_agree(process: &mut Process, share: &Share) -> bool {
    let mut ours = Trace::new();
    let mut theirs = Vec::new();
    crate::stack::unwind::with_registers(&mut |regs| {
        backtrace::trace(|frame| {
            theirs.push(frame.ip() as u64);
            true
        });
        process.unwinder.walk(regs, 64, &mut ours, &share.modules)
    });
    let walked = ours.addresses();
    let Some(start) = theirs.iter().position(|&ip| walked.len() > 1 && ip == walked[1]) else { return false };
    !ours.cut
        && theirs[start..].iter().zip(&walked[1..]).all(|(a, b)| a == b)
        && theirs.len() - start >= walked.len() - 1
}

unsafe extern "C" fn forked_in_parent() {
    // SAFETY: runs in the thread that forked, between two statements of it.
    let process = unsafe { current() };
    if let Some(slot) = process.slot()
        && !process.has_messages
    {
        process.next_epoch(slot);
    }
}

unsafe extern "C" fn forked_in_child() {
    // SAFETY: the child's only thread.
    let process = unsafe { current() };
    process.own_slot = None;
    process.state = State::Detached;
    process.quick = false;
    process.ticks = 0;
    // A free may ask the ledger before this process's own books begin.
    process.ledger.abandon();
    settings::begin();
    if process.has_messages {
        process.stacks.forget();
    }
    (process.has_messages, process.has_served, process.has_afterwards) = (false, false, false);
    // Every allocation asks, so that the first one attaches.
    if process.ledger.precision() != Precision::Exact {
        process.ledger.set_precision(Precision::Exact);
    }
}

extern "C" fn exiting() {
    // SAFETY: the process's last moments; nothing else runs. A plain system call.
    let (process, pid) = unsafe { (current(), libc::getpid()) };
    if process.own_slot.is_some() && pid == process.pid {
        process.keep_what_is_held();
        process.own_slot = None;
        process.state = State::Refused;
        if let Some(share) = process.share {
            share.release_slot(process.slot, process.pid, &mut process.sites, &mut process.rows);
        }
    }
}

impl Process {
    /// The state between two hooks of a process that keeps books.
    pub fn state_at_rest(&self) -> State {
        if self.own_slot.is_none() {
            State::Refused
        } else if self.has_messages || self.expects_messages() {
            State::Ready
        } else {
            State::Alone
        }
    }

    /// Whether this process has said that it will serve a client.
    pub(super) fn expects_messages(&self) -> bool {
        self.kind != pg_sys::BackendType::B_INVALID && !pg_compat::has_no_messages(self.kind as i32)
    }

    /// Starts this process's own books: the parent's, if it was forked, are not its own.
    #[cold]
    pub fn attach(&mut self) -> bool {
        let Some(share) = self.share else { return false };
        // SAFETY: a plain system call; the server's own variable is not set yet this early.
        self.pid = unsafe { libc::getpid() };
        self.now = now();
        self.ledger.begin();
        self.ledger.seed(self.pid as u64 ^ (self.now as u64) << 20);
        self.walk.forget_parents(self.now, &mut self.aside);
        self.sites = Cursor::default();
        self.rows = Cursor::default();
        self.ledger.epoch = 1;
        (self.looks, self.unseen, self.full) = (1, 0, None);
        (self.passed, self.at_once) = (0, 0);
        let Some(slot) = share.claim_slot(self.pid, backend_type()) else { return false };
        self.slot = slot;
        self.query_id = pg_compat::query_id_place();
        self.own_slot = Some(&share.slots[slot as usize]);
        self.followed = settings::Followed::NONE;
        self.follow_settings();
        true
    }

    /// Settings may have changed, or what is known of the process.
    #[inline(never)]
    pub fn follow_settings(&mut self) {
        let Some(slot) = self.slot() else { return };
        let kind = backend_type();
        // SAFETY: a plain read of the server's global.
        self.kind = unsafe { pg_sys::MyBackendType };
        self.look_every = if self.kind == pg_sys::BackendType::B_WAL_SENDER { SENDERS_LOOK } else { LOOK };
        let mut followed = settings::Followed::now();
        self.tracked = slot.track.load(Relaxed);
        if self.tracked != 0 {
            followed.mode = self.tracked - 1;
        }
        if followed.stack_depth != self.followed.stack_depth && self.followed.stack_depth != 0 {
            self.stacks.forget();
        }
        // A sender's long command looks like a message.
        let is_sender = kind == pg_sys::BackendType::B_WAL_SENDER as i32;
        hook::ask_about_all(followed.scope_all || is_sender || self.baseline_due);
        self.followed = followed;
        slot.backend_type.store(kind, Relaxed);
        slot.without_messages.store(pg_compat::has_no_messages(kind) as u32, Relaxed);
        let has_work = self.has_messages || slot.has_no_messages();
        // Also in a process that records nothing: rheap_track may have asked for it in the middle of a statement.
        let ticks = if has_work && pg_compat::allocates_much(kind as _) { followed.walk_interval.min(WISH) } else { 0 };
        if std::mem::replace(&mut self.ticks, ticks) != ticks {
            hook::tick::every(ticks as u64);
        }
        let rate = followed.sample_bytes as u64;
        if kind == POSTMASTER {
            self.ledger.prepare_rates([rate, rate * FILLS, rate << cells::SETTLED]);
        }
        let precision = match () {
            _ if self.checking => Precision::Exact,
            _ if followed.mode == Mode::Off as u32 => {
                Precision::None { ask: !self.has_messages && !self.expects_messages() }
            }
            // What allocates little can always be exact.
            _ if followed.mode == Mode::Exact as u32 || !pg_compat::allocates_much(kind as _) => Precision::Exact,
            _ if slot.has_no_messages() || self.has_served && !self.baseline_due => Precision::Sampled(rate),
            // The first statement fills caches; the many sessions that have no other should not pay for more.
            _ if self.has_messages => Precision::SampledAfter { bytes: rate * BASELINE, rate: rate * FILLS },
            // A child that has not said yet what it is: its books begin when it has.
            _ if !self.expects_messages() => Precision::None { ask: true },
            // What a backend allocates before its first message is much, and its baseline.
            _ => Precision::None { ask: false },
        };
        if precision != self.ledger.precision() {
            self.flush(Due::Look);
            self.ledger.set_precision(precision);
        }
        // Whoever reads this finds accounts that follow it.
        slot.mode.store(followed.mode, Release);
        hook::record_by(match precision {
            Precision::Exact => Gap::None,
            Precision::Sampled(_) => Gap::OfCell,
            Precision::SampledAfter { .. } | Precision::None { .. } => Gap::OfProcess,
        });
        let limit = followed.memory_limit as usize * 1024;
        let rest = limit - ASIDE;
        self.ledger.set_limit(rest - rest / SITES_PART);
        self.sites.most = most_chunks(limit);
        self.ledger.relax();
    }

    /// What this process's call sites hold now. Nothing is pending.
    pub fn held_by_site(&self) -> HashMap<u32, Held> {
        let mut held = HashMap::new();
        if let Some(share) = self.share {
            self.ledger.each_site(|id| {
                if let Some(copy) = share.sites.rows[id as usize].copy() {
                    held.insert(id, Held { bytes: copy.live_bytes as i64, count: copy.live_count as i64 });
                }
            });
        }
        held
    }

    /// Somebody asked to forget: start again, with now as the baseline.
    #[cold]
    pub fn forget(&mut self) {
        let (Some(share), Some(slot)) = (self.share, self.slot()) else { return };
        let wanted = slot.resets.load(Acquire);
        self.ledger.clear();
        self.walk.forget(self.now, &mut self.aside);
        self.sites.release(&share.sites, self.slot, Site::close);
        self.rows.release(&share.rows, self.slot, Row::close);
        slot.open(slot.backend_type.load(Relaxed));
        (self.passed, self.at_once) = (0, 0);
        self.ledger.epoch = 1;
        slot.resets.fetch_sub(wanted, AcqRel);
        self.follow_settings();
        if self.has_messages {
            slot.transaction.store(self.ledger.epoch, Relaxed);
            // The baseline is what is there when the statement at hand is done.
            self.walk.hurry();
        }
    }
}

/// Begins or ends a check: everything is recorded, whatever the settings say. False when no books can be kept.
pub fn check(on: bool) -> bool {
    // SAFETY: called by the server's thread from a function of ours, when no hook is at work.
    let process = unsafe { current() };
    process.enter();
    let possible = process.own_slot.is_some() || process.attach();
    if possible {
        process.checking = on;
        process.flush(Due::Look);
        process.follow_settings();
    }
    process.leave(process.state_at_rest());
    possible
}

/// The log hears once of a table that is too small.
pub fn say_if_full() {
    // SAFETY: the guard is released.
    let process = unsafe { current() };
    let Some(full) = process.full.take() else { return };
    if process.share.is_none_or(|s| s.full_logged.swap(1, AcqRel) != 0) {
        return;
    }
    let mut line = Text::<256>::new();
    let _ = match full {
        Full::Memory => line.write_str(
            "rheap: this process has used up its rheap.memory_limit, and its new call sites go unseen; raise the limit",
        ),
        Full::Stacks => write!(
            line,
            "rheap: the table of call stacks is full, and new call sites go unseen; raise rheap.max_call_sites (now {})",
            settings::max_call_sites()
        ),
        Full::Sites => write!(
            line,
            "rheap: the table of call sites is full, and new call sites go unseen; raise rheap.max_call_sites (now {})",
            settings::max_call_sites()
        ),
    };
    pg_compat::log(line.as_c_str());
}
