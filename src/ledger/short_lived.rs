//! Chunks that are pending: held apart until they are freed, which most are within their statement, or until it ends.

use super::account::Stamp;
use super::pending::{Chunk, Holder};
use super::sampling::ONE;
use super::{Ledger, Precision, Sites};

/// Whether frees come through the filter even where all allocations are recorded: from 16 on they do, since the hook
/// sees those of all contexts.
const FILTERED: bool = cfg!(not(feature = "pg15"));

/// Why pending chunks get their records.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Due {
    /// Somebody looks.
    Look,
    /// A statement has ended.
    Statement,
    /// A message has, within a transaction block. A statement may take four, and what runs it lives on from one to
    /// the next: chunks of call sites that have freed everything so far stay pending.
    Message,
}

impl Ledger {
    /// Every allocation is recorded: there is nothing to ask.
    #[inline(always)]
    pub fn is_exact(&self) -> bool {
        self.quick
    }

    /// Follows an allocation for which `ask` said [`Decision::Record`], as pending: it is in no account before it
    /// is freed or flushed.
    #[inline]
    pub fn hold(
        &mut self,
        address: u64,
        size: u64,
        holder: Holder,
        cell: u16,
        level: u8,
        stamp: Stamp,
        sites: &impl Sites,
    ) {
        let chunk = Chunk { size, holder, epoch: stamp.epoch, cell, level: level as u16 };
        self.expect(address);
        if let Some((displaced, chunk)) = self.pending.put(address, chunk) {
            self.displaced(displaced, chunk, address, stamp, sites);
        }
    }

    /// `hold` in the commonest case of exact mode; false, and nothing done, in any other.
    #[inline(always)]
    pub fn hold_exactly(&mut self, address: u64, size: u64, holder: Holder) -> bool {
        let held = self.pending.put_free(address, Chunk { size, holder, epoch: self.epoch, cell: 0, level: 0 });
        if held && FILTERED {
            self.filter.add(address);
        }
        held
    }

    /// `hold` in exact mode where `hold_exactly` would displace a chunk: that gets its record.
    #[inline]
    pub fn hold_displacing(&mut self, address: u64, size: u64, holder: Holder, stamp: Stamp, sites: &impl Sites) {
        self.expect(address);
        let chunk = Chunk { size, holder, epoch: stamp.epoch, cell: 0, level: 0 };
        match self.pending.put(address, chunk) {
            Some((displaced, chunk)) if displaced != address => self.settle(displaced, chunk, stamp, sites),
            Some((_, chunk)) => self.pair(address, &chunk, stamp, sites),
            None => (),
        }
    }

    #[inline(never)]
    fn displaced(&mut self, address: u64, chunk: Chunk, by: u64, stamp: Stamp, sites: &impl Sites) {
        if address == by {
            // The address is alive again: the free of its last chunk was missed.
            self.pair(address, &chunk, stamp, sites);
        } else {
            self.settle(address, chunk, stamp, sites);
        }
    }

    /// `free` in the commonest case of exact mode; false, and nothing done, in any other. `now` tells the time and the
    /// query's id.
    #[inline(always)]
    pub fn free_exactly(&mut self, address: u64, now: impl FnOnce() -> (i64, i64), sites: &impl Sites) -> bool {
        let Some(chunk) = self.pending.take(address) else { return false };
        if FILTERED {
            self.filter.remove(address);
        }
        sites.site(chunk.holder.site()).pair(chunk.size, ONE, chunk.epoch, now);
        true
    }

    /// Nothing is pending.
    #[inline]
    pub fn is_settled(&self) -> bool {
        self.pending.is_empty()
    }

    /// Chunks that were held as pending so far.
    pub fn holds(&self) -> u64 {
        self.pending.put
    }

    /// What is pending gets its record.
    pub fn flush(&mut self, due: Due, stamp: Stamp, sites: &impl Sites) {
        let mut from = 0;
        if due == Due::Message {
            let stays = |chunk: &Chunk| !sites.site(chunk.holder.site()).frees_all();
            let mut passed = self.pending.passed;
            while let Some((address, chunk)) = self.pending.next_since(&mut passed, &mut from, stays) {
                self.settle(address, chunk, stamp, sites);
            }
            self.pending.passed = passed;
            return;
        }
        while let Some((address, chunk)) = self.pending.next(&mut from, |_| true) {
            if due == Due::Statement {
                self.cells.kept(chunk.cell);
            }
            self.settle(address, chunk, stamp, sites);
        }
    }

    fn settle(&mut self, address: u64, chunk: Chunk, stamp: Stamp, sites: &impl Sites) {
        self.balance = self.balance.wrapping_sub(1);
        self.enter(address, &chunk, self.expects(), stamp, sites);
    }

    /// Whether the frees of pending chunks have to come through the filter.
    #[inline]
    fn expects(&self) -> bool {
        FILTERED || self.precision != Precision::Exact
    }

    #[inline]
    fn expect(&mut self, address: u64) {
        if self.expects() {
            self.filter.add(address);
        }
    }

    #[inline]
    fn unexpect(&mut self, address: u64) {
        if self.expects() {
            self.filter.remove(address);
        }
    }

    /// A pending chunk is gone: it has been allocated and freed in one.
    #[inline]
    pub(super) fn pair(&mut self, address: u64, chunk: &Chunk, stamp: Stamp, sites: &impl Sites) {
        self.unexpect(address);
        self.cells.paired(chunk.cell);
        let weight = self.rates.weight(chunk.size, chunk.level as u8);
        let alloc_weight = if self.precision == Precision::Exact { ONE } else { weight };
        sites.site(chunk.holder.site()).pair(chunk.size, alloc_weight, chunk.epoch, || (stamp.now, stamp.query_id));
    }
}
