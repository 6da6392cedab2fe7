//! How the ledger keeps within its memory: records thin out when it is used up, and everything can be given back.

use super::{Ledger, Precision, Sites, filter, sampling};

impl Ledger {
    /// A smaller limit takes effect on the next growth: what is mapped stays until the ledger is cleared.
    pub fn set_limit(&mut self, limit: usize) {
        self.budget.limit = limit;
    }

    /// Returns to the mode's own precision when the memory allows it again.
    pub fn relax(&mut self) {
        if self.thinned && self.budget.used - self.records.spare() < self.budget.limit / 4 {
            self.set_precision(self.precision);
        }
    }

    /// The budget is exhausted: follow fewer chunks from now on, and give up a part of those that are followed,
    /// each with the same chance as if the new rate had held when it was made.
    #[cold]
    pub(super) fn thin(&mut self, sites: &impl Sites) {
        let live = self.records.count() as u64;
        if live == 0 {
            return;
        }
        let bytes: u64 = (1..=self.records.high())
            .map(|id| self.records.get(id))
            .map(|record| record.size().saturating_mul(record.count() as u64))
            .fold(0, u64::saturating_add);
        let mean = (bytes / live).max(1);
        // About half of the records of mean size survive the first time, and half of those the next time: a record goes
        // with the last of its chunks.
        let before = self.rates.rate(self.level).max(self.cells.floor());
        let fewer = self.records.shared_by().saturating_mul(2);
        let level = self.rates.level(before.max(mean * 3 / 4).saturating_mul(fewer).max(2));
        let rate = self.rates.rate(level);
        if rate <= before {
            return;
        }
        self.thinned = true;
        if let Precision::Sampled(_) = self.precision {
            self.cells.raise_floor(rate, &mut self.rates, &mut self.rng);
            self.each_site(|site| sites.site(site).set_inexact());
        } else {
            self.quick = false;
            self.follow_at(level);
        }
        for id in 1..=self.records.high() {
            let record = *self.records.get(id);
            let old = self.rates.rate(record.level());
            if record.chunks == 0 || old >= rate {
                continue;
            }
            let keep = sampling::probability(record.size(), rate) / sampling::probability(record.size(), old);
            let (old, new) = (self.live_weight(&record), sampling::weight(record.size(), rate));
            let mut kept = false;
            for address in record.addresses() {
                if self.rng.unit() <= keep {
                    kept = true;
                    self.held = self.held.wrapping_add((new - old) * record.size());
                    sites.site(record.site).reweigh(record.size(), old, new, record.epoch);
                } else {
                    self.give_up(id, address, sites);
                }
            }
            if kept {
                self.records.get_mut(id).size_level = record.size() | (level as u64) << 56;
            }
        }
    }

    /// Forgets everything and gives the memory back; the rates stay.
    pub fn clear(&mut self) {
        self.filter.clear();
        self.empty();
    }

    /// Forgets the tables that a process has from its parent, whose memory it does not have: to be called before
    /// anything else after a fork. Marks in the filter stay if they are few: they do no harm, and most of its memory is
    /// not the child's own yet and should not become so.
    pub fn abandon(&mut self) {
        if self.records.count() > filter::PLACES / 64 {
            self.filter.clear();
        }
        self.records.abandon(&mut self.budget);
        self.contexts.abandon(&mut self.budget);
        self.sites.abandon(&mut self.budget);
        self.budget.abandon();
    }

    /// Begins a process's own books.
    pub fn begin(&mut self) {
        self.abandon();
        self.empty();
    }

    fn empty(&mut self) {
        self.records.clear(&mut self.budget);
        self.contexts.clear(&mut self.budget);
        self.sites.clear(&mut self.budget);
        self.budget.release();
        self.pending.clear();
        self.last_context = 0;
        self.context_changes = self.context_changes.wrapping_add(1);
        self.held = 0;
        self.dropped = 0;
        self.balance = 0;
        if self.precision != Precision::Exact || self.level != 0 {
            self.set_precision(self.precision);
        }
    }
}
