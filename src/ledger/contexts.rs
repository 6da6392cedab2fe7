//! Memory contexts: what they hold, and what happens to it when they are reset, deleted or moved.

use super::account::Stamp;
use super::entries::Context;
use super::{Chunk, Ledger, Sites};

impl Ledger {
    /// What was learned of a context holds as long as this stays the same.
    #[inline]
    pub fn context_changes(&self) -> u32 {
        self.context_changes
    }

    /// Id of a context, or 0 if it has none yet.
    #[inline]
    pub fn context(&mut self, address: u64) -> u32 {
        if self.last_context != 0 && self.contexts.get(self.last_context).address == address {
            return self.last_context;
        }
        self.last_context = self.contexts.find(address);
        self.last_context
    }

    /// Registers a context. 0 when there is no memory for it.
    pub fn add_context(&mut self, address: u64, path: u32) -> u32 {
        let context = Context { address, path, passed: self.pending.put, ..Context::default() };
        self.contexts.insert(context, &mut self.budget)
    }

    pub fn context_path(&self, context: u32) -> u32 {
        self.contexts.get(context).path
    }

    /// (followed chunks, their requested bytes) of a context.
    pub fn context_holds(&self, address: u64) -> (u32, u64) {
        match self.contexts.find(address) {
            0 => (0, 0),
            id => (self.contexts.get(id).chunks, self.contexts.get(id).bytes),
        }
    }

    /// Everything in the context is gone. Returns the number of followed chunks that ended.
    pub fn reset(&mut self, address: u64, stamp: Stamp, sites: &impl Sites) -> u32 {
        let context = self.contexts.find(address);
        if context == 0 {
            return 0;
        }
        let (mut ended, mut from) = (0, 0);
        let mut passed = self.contexts.get(context).passed;
        let of_it = |chunk: &Chunk| chunk.holder.context() == context;
        while let Some((address, chunk)) = self.pending.next_since(&mut passed, &mut from, of_it) {
            self.pair(address, &chunk, stamp, sites);
            ended += 1;
        }
        self.contexts.get_mut(context).passed = passed;
        while let head @ 1.. = self.contexts.get(context).head {
            let record = *self.records.get(head);
            for address in record.addresses() {
                self.end(head, address, sites);
            }
            self.balance = self.balance.wrapping_add(record.count() as u64);
            ended += record.count();
        }
        ended
    }

    /// The context is gone; its header may be another context tomorrow.
    pub fn delete(&mut self, address: u64, stamp: Stamp, sites: &impl Sites) -> u32 {
        let ended = self.reset(address, stamp, sites);
        let context = self.contexts.find(address);
        if context != 0 {
            self.contexts.remove(context, Context::default());
            self.last_context = 0;
            self.context_changes = self.context_changes.wrapping_add(1);
        }
        ended
    }

    /// The context lies under another parent now: what it holds moves to the accounts of the new path.
    /// `open` finds or makes the account of a stack, a path and a cell; None leaves a record where it is. Nothing
    /// may be pending.
    pub fn reparent(
        &mut self,
        address: u64,
        path: u32,
        sites: &impl Sites,
        mut open: impl FnMut(&mut Self, u32, u32, u16) -> Option<u32>,
    ) {
        debug_assert!(self.pending.is_empty());
        let context = self.contexts.find(address);
        if context == 0 || self.contexts.get(context).path == path {
            return;
        }
        let old_path = std::mem::replace(&mut self.contexts.get_mut(context).path, path);
        self.context_changes = self.context_changes.wrapping_add(1);
        let mut id = self.contexts.get(context).head;
        while id != 0 {
            let record = *self.records.get(id);
            let from = sites.site(record.site);
            let cell = self.cell_of(from.stack(), old_path);
            if let Some(site) = open(self, from.stack(), path, cell) {
                for _ in 0..record.count() {
                    from.hand_over(sites.site(site), record.size(), self.live_weight(&record), record.epoch);
                }
                self.records.get_mut(id).site = site;
            }
            id = record.next;
        }
    }
}
