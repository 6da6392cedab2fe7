//! What is alive: a record per followed chunk, an account per call site, a list of chunks per context.
//!
//! A chunk is *pending* first: if it is freed within its statement, as nearly all are, it never gets a record. What
//! is pending is in no account yet; `flush` puts it there.
//!
//! Pure logic. It knows addresses as numbers, stacks and context paths as ids, and takes no memory but its own
//! bounded mappings, so it may run inside any palloc.

pub mod account;
mod bounds;
pub mod cells;
mod contexts;
mod entries;
pub mod filter;
mod index;
mod pending;
pub mod region;
pub mod sampling;
mod series;
mod short_lived;
pub mod table;

use account::{Site, Stamp};
use cells::Cells;
use entries::{Context, Record, SiteKey};
use filter::Filter;
use index::Index;
use pending::Pending;
pub use pending::{Chunk, Holder};
use region::Budget;
use sampling::{ONE, Rate, Rates, Rng};
pub use short_lived::Due;
use table::Table;

/// Where the accounts lie: in shared memory for a server process, in a vector for a test.
pub trait Sites {
    fn site(&self, id: u32) -> &Site;
}

fn site_key(stack: u32, path: u32) -> u64 {
    (stack as u64) << 32 | path as u64
}

/// What to do with an allocation that its cell asks about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Nothing.
    Skip,
    /// Count it at its site, without a record.
    Count,
    /// Count it and follow it; with the level of its sampling rate.
    Record(u8),
}

/// Which allocations are followed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Precision {
    /// All, as long as there is memory; past it all are counted and a sample is followed.
    Exact,
    /// None; yet each may still be asked for, so that the process notices when that changes.
    None { ask: bool },
    /// A sample of where it would cost to follow all; see [`cells`].
    Sampled(Rate),
    /// A sample of all by one gap, but none of the first bytes: for a start, in which caches are filled that nobody calls
    /// a leak, so that most processes need not look at any of it.
    SampledAfter { bytes: u64, rate: Rate },
}

/// In this order: first what every process writes, so that a short life touches few pages.
#[repr(C)]
pub struct Ledger {
    precision: Precision,
    /// Records given up because the budget was exhausted.
    dropped: u64,
    last_context: u32,
    /// Grows whenever a context's id or path ceases to hold.
    context_changes: u32,
    rng: Rng,
    budget: Budget,
    records: Index,
    contexts: Table<Context>,
    sites: Table<SiteKey>,
    /// Exact, and within the memory.
    quick: bool,
    /// The memory is used up: less is followed than the mode says.
    thinned: bool,
    level: u8,
    /// The process's count of work.
    pub epoch: u32,
    /// Where not all are recorded, and all by one gap: bytes until the next, and its level. The hook's entry counts down
    /// by itself, but for exact mode past the memory.
    pub gap: i64,
    /// Bytes that all accounts together hold, in the fixed point of the accounts.
    pub held: u64,
    /// Chunks with a record that were freed, less the pending chunks that were given one.
    balance: u64,
    pub pending: Pending,
    pub cells: Cells,
    rates: Rates,
    pub filter: Filter,
}

impl Ledger {
    /// An empty ledger that follows every allocation and uses at most `limit` bytes.
    pub fn new(limit: usize, seed: u64) -> Self {
        let mut ledger = Self::unborn();
        ledger.set_limit(limit);
        ledger.seed(seed);
        ledger.set_precision(Precision::Exact);
        ledger
    }

    /// A ledger of which nothing but zero bytes has to be stored. It has no memory, seed or precision yet.
    pub const fn unborn() -> Self {
        Ledger {
            budget: Budget::new(0),
            records: Index::new(),
            contexts: Table::new(),
            sites: Table::new(),
            cells: Cells::new(),
            filter: Filter::new(),
            pending: Pending::new(),
            precision: Precision::Exact,
            quick: false,
            rates: Rates::new(),
            rng: Rng::unseeded(),
            gap: 0,
            level: 0,
            thinned: false,
            dropped: 0,
            held: 0,
            balance: 0,
            last_context: 0,
            epoch: 0,
            context_changes: 0,
        }
    }

    pub fn seed(&mut self, seed: u64) {
        self.rng = Rng::new(seed);
    }

    /// Bytes of memory that the ledger has mapped.
    pub fn own_bytes(&self) -> usize {
        self.budget.used
    }

    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Followed chunks that were freed so far.
    pub fn frees(&self) -> u64 {
        self.pending.taken.wrapping_add(self.balance)
    }

    /// Bytes alive, as estimated from the records.
    #[inline]
    pub fn held_bytes(&self) -> u64 {
        self.held / ONE
    }

    /// Chunks that have a record.
    pub fn records(&self) -> usize {
        self.records.count()
    }

    /// Records keep the rate they were made with. Nothing may be pending.
    pub fn set_precision(&mut self, precision: Precision) {
        debug_assert!(self.pending.is_empty());
        self.precision = precision;
        self.quick = precision == Precision::Exact;
        (self.gap, self.level, self.thinned) = (0, 0, false);
        self.cells.clear();
        match precision {
            Precision::None { ask: false } => self.gap = i64::MAX,
            Precision::None { ask: true } | Precision::Exact => (),
            Precision::Sampled(rate) => self.cells.sampled(rate),
            Precision::SampledAfter { bytes, rate } => {
                let level = self.rates.level(rate);
                self.follow_at(level);
                self.gap += bytes as i64;
            }
        }
    }

    /// These rates will be asked for by forked children, who then have them already.
    pub fn prepare_rates(&mut self, rates: [Rate; 3]) {
        for rate in rates {
            self.rates.level(rate);
        }
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// All by one gap of this level from now on.
    fn follow_at(&mut self, level: u8) {
        self.level = level;
        self.gap = self.rates.gap(level, &mut self.rng);
    }

    /// Takes an allocation off its gap; true when that is used up. The hook's entries do the same by themselves.
    #[inline]
    pub fn spend(&mut self, cell: u16, size: u64) -> bool {
        let gap = match self.precision {
            Precision::Exact => return true,
            Precision::Sampled(_) => &mut self.cells.gaps[cell as usize % cells::CELLS],
            Precision::None { .. } | Precision::SampledAfter { .. } => &mut self.gap,
        };
        *gap = gap.wrapping_sub(size as i64);
        *gap <= 0
    }

    /// What to do with an allocation that has used up its gap. To be asked once for each.
    #[inline]
    pub fn ask(&mut self, cell: u16, size: u64, sites: &impl Sites) -> Decision {
        match self.precision {
            Precision::Sampled(_) => return self.ask_cell(cell, size, sites),
            Precision::None { .. } => return Decision::Skip,
            Precision::Exact if !self.thinned => return Decision::Record(0),
            Precision::Exact => {
                self.gap -= size.max(1) as i64;
                if self.gap > 0 {
                    return Decision::Count;
                }
            }
            Precision::SampledAfter { .. } => (),
        }
        self.follow_at(self.level);
        Decision::Record(self.level)
    }

    #[inline]
    fn ask_cell(&mut self, cell: u16, size: u64, sites: &impl Sites) -> Decision {
        let (level, turned) = self.cells.ask(cell, size, self.epoch, &mut self.rates, &mut self.rng);
        if turned {
            self.each_site_of(|key| key.cell == cell, |site| sites.site(site).set_inexact());
        }
        level.map_or(Decision::Skip, Decision::Record)
    }

    /// The account of a stack and a path, or None if it has none yet.
    #[inline]
    pub fn site(&self, stack: u32, path: u32) -> Option<u32> {
        match self.sites.find(site_key(stack, path)) {
            0 => None,
            id => Some(self.sites.get(id).site),
        }
    }

    /// Remembers the account of a stack and a path, whose allocations come through `cell`. False when there is no
    /// memory for it.
    pub fn add_site(&mut self, stack: u32, path: u32, site: u32, cell: u16, sites: &impl Sites) -> bool {
        if matches!(self.precision, Precision::SampledAfter { .. }) || self.cells.is_sampled(cell) {
            sites.site(site).set_inexact();
        }
        let key = SiteKey { stack_path: site_key(stack, path), site, cell, chain: 0 };
        self.sites.insert(key, &mut self.budget) != 0
    }

    /// The cell of an account, for another one of the same stack.
    fn cell_of(&self, stack: u32, path: u32) -> u16 {
        self.sites.get(self.sites.find(site_key(stack, path))).cell
    }

    /// Calls `f` with each account.
    pub fn each_site(&self, f: impl FnMut(u32)) {
        self.each_site_of(|_| true, f);
    }

    fn each_site_of(&self, wanted: impl Fn(&SiteKey) -> bool, mut f: impl FnMut(u32)) {
        for id in 1..=self.sites.high() {
            let key = self.sites.get(id);
            if key.stack_path != 0 && wanted(key) {
                f(key.site);
            }
        }
    }

    /// Counts an allocation for which `ask` said [`Decision::Count`].
    pub fn count(&mut self, size: u64, site: u32, stamp: Stamp, sites: &impl Sites) {
        let account = sites.site(site);
        account.count(size, ONE, stamp);
        account.set_inexact();
    }

    /// Follows an allocation at once, without a time as pending.
    pub fn record(&mut self, address: u64, chunk: Chunk, stamp: Stamp, sites: &impl Sites) {
        self.enter(address, &chunk, false, stamp, sites);
    }

    /// Makes the record of a chunk that is none of those pending any more; `expected`: the filter still counts it. A
    /// record that the address still has is of a chunk whose free was missed: it ends now.
    fn enter(&mut self, address: u64, chunk: &Chunk, expected: bool, stamp: Stamp, sites: &impl Sites) {
        // Looked for once: an area that is not known yet costs two lines of memory that nothing else needs.
        let mut area = self.records.area(address);
        let old = self.records.find_in(area, address);
        if old != 0 {
            self.end(old, address, sites);
            self.balance = self.balance.wrapping_add(1);
            area = self.records.area(address);
        }
        let inserted = self.insert(address, chunk, area) || self.insert_at_last(address, chunk, sites);
        let Chunk { size, level, .. } = *chunk;
        let stamp = Stamp { epoch: chunk.epoch, ..stamp };
        let weight = self.rates.weight(size, level as u8);
        let alloc_weight = if self.precision == Precision::Exact { ONE } else { weight };
        let account = sites.site(chunk.holder.site());
        if level != 0 {
            account.set_inexact();
        }
        if !inserted {
            if expected {
                self.filter.remove(address);
            }
            self.dropped += 1;
            account.count(size, alloc_weight, stamp);
            account.set_inexact();
            return;
        }
        if !expected {
            self.filter.add(address);
        }
        self.held = self.held.wrapping_add(weight * size);
        account.record(size, alloc_weight, weight, stamp);
    }

    /// False when there is no memory for the record.
    #[inline(always)]
    fn insert(&mut self, address: u64, chunk: &Chunk, area: u32) -> bool {
        let (id, site) = (chunk.holder.context(), chunk.holder.site());
        let record = Record::of(address, chunk.size, chunk.level as u8, site, id, chunk.epoch);
        if !self.records.join(&record, area) && !self.insert_record(record, area) {
            return false;
        }
        let context = self.contexts.get_mut(id);
        context.chunks += 1;
        context.bytes += chunk.size;
        true
    }

    /// A record of its own, in its context's list.
    #[inline(always)]
    fn insert_record(&mut self, record: Record, area: u32) -> bool {
        let head = self.contexts.get(record.context).head;
        let id = self.records.insert(Record { next: head, ..record }, area, &mut self.budget);
        if id != 0 {
            if head != 0 {
                self.records.get_mut(head).previous = id;
            }
            self.contexts.get_mut(record.context).head = id;
        }
        id != 0
    }

    /// The same after others have made room.
    #[cold]
    #[inline(never)]
    fn insert_at_last(&mut self, address: u64, chunk: &Chunk, sites: &impl Sites) -> bool {
        self.thin(sites);
        self.insert(address, chunk, self.records.area(address))
    }

    /// Takes a chunk out of its record, which goes with the last. The account is the caller's.
    fn take(&mut self, id: u32, address: u64) -> Record {
        let record = *self.records.get(id);
        let context = self.contexts.get_mut(record.context);
        context.chunks -= 1;
        context.bytes -= record.size();
        if self.records.leave(id, address) {
            self.remove_record(id, &record);
        }
        record
    }

    fn remove_record(&mut self, id: u32, record: &Record) {
        if record.previous != 0 {
            self.records.get_mut(record.previous).next = record.next;
        } else {
            self.contexts.get_mut(record.context).head = record.next;
        }
        if record.next != 0 {
            self.records.get_mut(record.next).previous = record.previous;
        }
        self.records.remove(id);
    }

    fn live_weight(&self, record: &Record) -> u64 {
        self.rates.weight(record.size(), record.level())
    }

    /// A chunk of a record is gone.
    #[inline(never)]
    fn end(&mut self, id: u32, address: u64, sites: &impl Sites) {
        let (record, weight) = self.close(id, address);
        sites.site(record.site).end(record.size(), weight, record.epoch, self.epoch);
    }

    /// A chunk is given up for want of memory, though it lives on.
    fn give_up(&mut self, id: u32, address: u64, sites: &impl Sites) {
        let (record, weight) = self.close(id, address);
        sites.site(record.site).give_up(record.size(), weight, record.epoch);
        self.dropped += 1;
    }

    /// Takes a chunk out of everything but its account; and what it stood for.
    fn close(&mut self, id: u32, address: u64) -> (Record, u64) {
        let record = self.take(id, address);
        self.filter.remove(address);
        let weight = self.live_weight(&record);
        self.held = self.held.wrapping_sub(weight * record.size());
        (record, weight)
    }

    /// Whether a chunk is followed, which the filter only suspects.
    #[inline(always)]
    pub fn follows(&self, address: u64) -> bool {
        self.pending.has(address) || self.records.find(address) != 0
    }

    /// Ends a chunk. False when nobody follows it: it was not sampled, or is older than rheap.
    #[inline]
    pub fn free(&mut self, address: u64, stamp: Stamp, sites: &impl Sites) -> bool {
        if let Some(&chunk) = self.pending.take(address) {
            self.pair(address, &chunk, stamp, sites);
            return true;
        }
        self.free_record(address, sites)
    }

    fn free_record(&mut self, address: u64, sites: &impl Sites) -> bool {
        let id = self.records.find(address);
        if id == 0 {
            return false;
        }
        self.end(id, address, sites);
        self.balance = self.balance.wrapping_add(1);
        true
    }
}

#[cfg(test)]
mod tests;
