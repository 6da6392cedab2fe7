//! What is done between two statements, and on the clock within a long one.

use std::sync::atomic::Ordering::*;

use super::{Process, State, current, guarded, life, now};
use crate::ledger::Due;
use crate::pg_compat::Transaction;
use crate::share::slot::{POSTMASTER, Slot};
use crate::{pg_compat, settings};

/// Recorded allocations between two looks at the clock within a statement, and within a sender's command, which has no
/// end and uses little processor time.
pub(super) const LOOK: u32 = 256;
pub(super) const SENDERS_LOOK: u32 = 4;

impl Process {
    /// Looks at the clock, and walks if it is time.
    pub(super) fn look(&mut self, slot: &Slot) {
        self.look_at(slot, true);
    }

    /// `within` a statement, or between two.
    #[inline(never)]
    fn look_at(&mut self, slot: &Slot, within: bool) {
        self.looks = self.look_every;
        self.now = now();
        if self.must_follow_wish(slot) {
            self.follow_settings();
        }
        if self.walk.is_due(self.now) {
            self.walk_now(slot, within);
        }
    }

    /// By itself, since it needs much of the stack, of which a new process has little yet.
    #[inline(never)]
    fn walk_now(&mut self, slot: &Slot, within: bool) {
        self.follow_settings();
        // Where no work has begun since the last walk, as in a long statement and in processes without messages, the
        // time between two walks is the unit. What a process needs to start is of one age, however often it is looked
        // at meanwhile.
        let starts = slot.has_no_messages() && self.walk.is_starting();
        if self.ledger.epoch == self.walked_epoch && slot.backend_type.load(Relaxed) != POSTMASTER && !starts {
            self.next_epoch(slot);
        }
        self.walked_epoch = self.ledger.epoch;
        self.flush(Due::Look);
        if let Some(share) = &self.share {
            self.stacks.look_for_unloaded(&mut self.unwinder, share, &mut self.aside);
        }
        // SAFETY: at the exit of a palloc or between two messages, where the tree is consistent.
        unsafe { crate::walk::walk(self, slot, within) };
        self.publish_all(slot);
    }

    /// Puts what is not there yet into the accounts.
    #[inline(always)]
    pub fn flush(&mut self, due: Due) {
        if !self.ledger.is_settled() {
            self.flush_some(due);
        }
    }

    #[inline(never)]
    fn flush_some(&mut self, due: Due) {
        let stamp = self.stamp();
        if let Some(share) = &self.share {
            self.ledger.flush(due, stamp, share);
        }
    }

    /// A client's message has been dealt with.
    #[inline(always)]
    fn statement_done(&mut self, slot: &'static Slot, in_block: bool) {
        // When the statement began is near enough, and known already.
        self.now = pg_compat::statement_start();
        self.flush(if in_block { Due::Message } else { Due::Statement });
        // Who watches the process does not change its work.
        let epoch = if self.has_answered { self.ledger.epoch } else { self.next_epoch(slot) };
        if !in_block {
            slot.transaction.store(epoch, Relaxed);
        }
        if !settings::are_followed(slot.wishes.load(Relaxed)) {
            self.between_statements(slot);
        }
        // The walk for the baseline sees it too, and is never made in the many sessions that have one message.
        if !self.baseline_due {
            // SAFETY: between two statements the tree is consistent.
            unsafe { crate::walk::moved::look(self) };
        }
        if self.ledger.held != self.held {
            self.note_held();
        }
        if self.walk.is_due(self.now) {
            self.look_at(slot, false);
        }
        // What a walk within a statement sees is gone soon.
        self.looks = self.look_every;
        self.publish(slot);
    }

    /// Something was kept, or given back. By itself, so that most statements need no room for it.
    #[inline(never)]
    fn note_held(&mut self) {
        self.held = self.ledger.held;
        // The statement may have taken long.
        self.now = now();
        self.walk.note_held(self.ledger.held_bytes(), self.now);
    }

    /// What seldom has to be done, and after the first message.
    #[cold]
    fn between_statements(&mut self, slot: &'static Slot) {
        settings::follow(slot.wishes.load(Acquire));
        if slot.reset_pending() {
            self.forget();
        }
        self.query_id = pg_compat::query_id_place();
        if !std::mem::replace(&mut self.has_served, true) {
            // The baseline is taken when the next statement begins, if there is one.
            self.baseline_due = true;
        }
        self.has_messages = true;
        slot.has_messages.store(1, Relaxed);
        self.follow_settings();
    }
}

/// Before this process reads its own accounts.
pub fn settle() {
    guarded(|p| {
        p.flush(Due::Look);
        if let Some(slot) = p.slot() {
            p.publish_all(slot);
        }
    });
}

/// Everything is looked at now, at any moment between two statements: names are learned of contexts that were built
/// to go away and then kept, and what they hold moves to the accounts of where they are.
pub fn look_at_all() {
    guarded(|p| {
        if let Some(slot) = p.slot() {
            // SAFETY: the caller runs SQL, between two statements of it: the tree is consistent.
            unsafe { crate::walk::moved::look(p) };
            p.walk.hurry();
            p.look_at(slot, false);
        }
    });
}

/// Whether `rheap_track` wishes for another mode than the one that is followed.
#[inline(always)]
pub fn has_wish() -> bool {
    // SAFETY: as for `guarded`: this only reads.
    let process = unsafe { current() };
    process.slot().is_some_and(|slot| process.must_follow_wish(slot))
}

/// A statement has been parsed and is about to run.
pub fn follow_wish() {
    if has_wish() {
        guarded(Process::follow_settings);
    }
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
            slot.transaction.store(p.ledger.epoch, Relaxed);
            p.follow_settings();
        }
    });
}

/// A client's message has been dealt with: between two statements, the best moment for everything that takes time.
pub fn message_done() {
    // SAFETY: as for `guarded`.
    let process = unsafe { current() };
    if process.state == State::Busy {
        return;
    }
    if pg_compat::is_without_transaction() {
        done(process, false);
    } else {
        message_done_within();
    }
}

/// The same within a transaction.
#[inline(never)]
fn message_done_within() {
    // SAFETY: as for `guarded`.
    let process = unsafe { current() };
    match pg_compat::transaction() {
        Transaction::Implicit if process.has_served => (),
        transaction => done(process, transaction == Transaction::Block),
    }
}

#[inline(always)]
fn done(process: &mut Process, in_block: bool) {
    process.enter();
    let mut state = State::Refused;
    if process.own_slot.is_some() || process.attach() {
        state = State::Ready;
        if let Some(slot) = process.slot() {
            process.statement_done(slot, in_block);
        }
    }
    process.leave(state);
    if process.has_afterwards {
        afterwards();
    }
}

/// A SQL function of rheap's is about to answer, which takes memory: symbols, rows, pages.
pub fn answers() {
    // SAFETY: as for `guarded`; plain writes.
    let process = unsafe { current() };
    (process.has_answered, process.has_afterwards) = (true, true);
}

/// The statement that asked is over, and so are the tables that the server had its answer in: their pages go back to
/// the system. The C library would keep what lies below anything that the session has allocated since.
fn give_back() {
    crate::reserve::end();
    // SAFETY: touches nothing in use.
    unsafe { libc::malloc_trim(0) };
}

/// What must not be done while the hook is at work: it may palloc.
#[cold]
#[inline(never)]
fn afterwards() {
    // SAFETY: as for `guarded`; plain writes.
    let process = unsafe { current() };
    process.has_afterwards = false;
    let has_answered = std::mem::take(&mut process.has_answered);
    crate::walk::log_new_leaks();
    life::say_if_full();
    if has_answered {
        give_back();
    }
}
