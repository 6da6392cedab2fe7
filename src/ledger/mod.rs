//! What is alive: a record per followed chunk, an account per call site, a list of chunks per context.
//!
//! A chunk is *pending* first: if it is freed within its statement, as nearly all are, it never gets a record. What
//! is pending is in no account yet; `flush` puts it there.
//!
//! Pure logic. It knows addresses as numbers, stacks and context paths as ids, and takes no memory but its own
//! bounded mappings, so it may run inside any palloc.

pub mod account;
pub mod cells;
mod entries;
pub mod filter;
mod index;
mod pending;
pub mod region;
pub mod sampling;
pub mod table;

use account::{Site, Stamp};
use cells::Cells;
use entries::{Context, Record, SiteKey};
use filter::Filter;
use index::Index;
use pending::{Chunk, Pending};
use region::Budget;
use sampling::{ONE, Rate, Rates, Rng};
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
    /// None; yet each may still be asked for, so that the process notices when that changes.
    None { ask: bool },
    /// All, as long as there is memory; past it all are counted and a sample is followed.
    Exact,
    /// A sample of where it would cost to follow all; see [`cells`].
    Sampled(Rate),
    /// A sample everywhere.
    SampledAtOnce(Rate),
}

/// Whether frees come through the filter even where all allocations are recorded: from 16 on they do, since the hook
/// sees those of all contexts.
const FILTERED: bool = cfg!(not(feature = "pg15"));

pub struct Ledger {
    budget: Budget,
    records: Index,
    contexts: Table<Context>,
    sites: Table<SiteKey>,
    pub cells: Cells,
    pub filter: Filter,
    pending: Pending,
    precision: Precision,
    /// Exact, and within the memory.
    quick: bool,
    rates: Rates,
    rng: Rng,
    /// In exact mode past the memory: level of new records, and bytes until the next.
    level: u8,
    gap: i64,
    /// Records given up because the budget was exhausted.
    dropped: u64,
    /// Bytes that all accounts together hold, in the fixed point of the accounts.
    held: u64,
    /// Pending chunks that were given a record.
    settled: u64,
    /// Records whose chunk was freed.
    ended: u64,
    last_context: u32,
    /// Grows whenever a context's id or path ceases to hold.
    context_changes: u32,
}

impl Ledger {
    /// An empty ledger that follows every allocation and uses at most `limit` bytes.
    pub const fn new(limit: usize, seed: u64) -> Self {
        Ledger {
            budget: Budget::new(limit),
            records: Index::new(),
            contexts: Table::new(),
            sites: Table::new(),
            cells: Cells::new(),
            filter: Filter::new(),
            pending: Pending::new(),
            precision: Precision::Exact,
            quick: true,
            rates: Rates::new(),
            rng: Rng::new(seed),
            level: 0,
            gap: 0,
            dropped: 0,
            held: 0,
            settled: 0,
            ended: 0,
            last_context: 0,
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

    /// Chunks that were held as pending so far.
    pub fn holds(&self) -> u64 {
        self.pending.put
    }

    /// Followed chunks that were freed so far.
    pub fn frees(&self) -> u64 {
        self.pending.taken - self.settled + self.ended
    }

    /// Bytes alive, as estimated from the records.
    #[inline]
    pub fn held_bytes(&self) -> u64 {
        self.held / ONE
    }

    /// Records alive.
    pub fn records(&self) -> usize {
        self.records.count()
    }

    /// What was learned of a context holds as long as this stays the same.
    #[inline]
    pub fn context_changes(&self) -> u32 {
        self.context_changes
    }

    /// A smaller limit takes effect on the next growth: what is mapped stays until the ledger is cleared.
    pub fn set_limit(&mut self, limit: usize) {
        self.budget.limit = limit;
    }

    /// Records keep the rate they were made with. Nothing may be pending.
    pub fn set_precision(&mut self, precision: Precision) {
        debug_assert!(self.pending.is_empty());
        self.precision = precision;
        self.quick = precision == Precision::Exact;
        (self.level, self.gap) = (0, 0);
        match precision {
            Precision::None { ask: false } => self.cells.none(),
            Precision::None { ask: true } | Precision::Exact => self.cells.all(),
            Precision::Sampled(rate) => self.cells.sampled(rate),
            Precision::SampledAtOnce(rate) => self.cells.sampled_at_once(rate, &mut self.rates, &mut self.rng),
        }
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns to the mode's own precision when the memory allows it again.
    pub fn relax(&mut self) {
        if (self.level != 0 || self.cells.floor() != 0) && self.budget.used - self.spare() < self.budget.limit / 4 {
            self.set_precision(self.precision);
        }
    }

    fn spare(&self) -> usize {
        (self.records.high() as usize - self.records.count()) * size_of::<Record>()
    }

    /// Takes an allocation off its cell's gap; true when that is used up. The hook's entry does the same by itself.
    #[inline]
    pub fn spend(&mut self, cell: u16, size: u64) -> bool {
        let gap = &mut self.cells.gaps[cell as usize % cells::CELLS];
        *gap = gap.wrapping_sub(size as i64);
        *gap <= 0
    }

    /// What to do with an allocation that has used up its cell's gap. To be asked once for each.
    #[inline]
    pub fn ask(&mut self, cell: u16, size: u64, epoch: u32, sites: &impl Sites) -> Decision {
        if self.precision == Precision::Exact {
            if self.level == 0 {
                return Decision::Record(0);
            }
            self.gap -= size.max(1) as i64;
            if self.gap > 0 {
                return Decision::Count;
            }
            self.gap = self.rates.gap(self.level, &mut self.rng);
            return Decision::Record(self.level);
        }
        if let Precision::None { .. } = self.precision {
            return Decision::Skip;
        }
        let (level, turned) = self.cells.ask(cell, size, epoch, &mut self.rates, &mut self.rng);
        if turned {
            self.each_site_of(|key| key.cell == cell, |site| sites.site(site).set_inexact());
        }
        level.map_or(Decision::Skip, Decision::Record)
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
        let context = Context { address, path, ..Context::default() };
        self.contexts.insert(context, &mut self.budget)
    }

    pub fn context_path(&self, context: u32) -> u32 {
        self.contexts.get(context).path
    }

    /// (records alive, their requested bytes) of a context.
    pub fn context_holds(&self, address: u64) -> (u32, u64) {
        match self.contexts.find(address) {
            0 => (0, 0),
            id => (self.contexts.get(id).records, self.contexts.get(id).bytes),
        }
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
        if self.cells.is_sampled(cell) {
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

    /// Every allocation is recorded: there is nothing to ask.
    #[inline(always)]
    pub fn is_exact(&self) -> bool {
        self.quick
    }

    /// `hold` in exact mode where `hold_exactly` would displace a chunk: that gets its record.
    #[inline]
    pub fn hold_displacing(
        &mut self,
        address: u64,
        size: u64,
        context: u32,
        site: u32,
        stamp: Stamp,
        sites: &impl Sites,
    ) {
        self.expect(address);
        let chunk = Chunk { size, site, context, epoch: stamp.epoch, cell: 0, level: 0 };
        match self.pending.put(address, chunk) {
            Some((displaced, chunk)) if displaced != address => self.settle(displaced, chunk, stamp, sites),
            Some((_, chunk)) => self.pair(address, &chunk, stamp, sites),
            None => (),
        }
    }

    /// `hold` in the commonest case of exact mode; false, and nothing done, in any other.
    #[inline(always)]
    pub fn hold_exactly(&mut self, address: u64, size: u64, context: u32, site: u32, epoch: u32) -> bool {
        let held = self.pending.put_free(address, Chunk { size, site, context, epoch, cell: 0, level: 0 });
        if held && FILTERED {
            self.filter.add(address);
        }
        held
    }

    /// `free` in the commonest case of exact mode; false, and nothing done, in any other.
    #[inline(always)]
    pub fn free_exactly(&mut self, address: u64, now: i64, query_id: impl FnOnce() -> i64, sites: &impl Sites) -> bool {
        let Some(chunk) = self.pending.take(address) else { return false };
        if FILTERED {
            self.filter.remove(address);
        }
        sites.site(chunk.site).pair(chunk.size, ONE, chunk.epoch, now, query_id);
        true
    }

    /// Nothing is pending.
    #[inline]
    pub fn is_settled(&self) -> bool {
        self.pending.is_empty()
    }

    /// Follows an allocation for which `ask` said [`Decision::Record`], as pending: it is in no account before it
    /// is freed or flushed.
    #[inline]
    pub fn hold(
        &mut self,
        address: u64,
        size: u64,
        context: u32,
        site: u32,
        cell: u16,
        level: u8,
        stamp: Stamp,
        sites: &impl Sites,
    ) {
        let chunk = Chunk { size, site, context, epoch: stamp.epoch, cell, level: level as u16 };
        self.expect(address);
        if let Some((displaced, chunk)) = self.pending.put(address, chunk) {
            self.displaced(displaced, chunk, address, stamp, sites);
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

    /// Everything that is pending gets its record. Due when a statement has `ended`, and before anybody looks.
    pub fn flush(&mut self, ended: bool, stamp: Stamp, sites: &impl Sites) {
        let mut from = 0;
        while let Some((address, chunk)) = self.pending.next(&mut from, |_| true) {
            if ended {
                self.cells.kept(chunk.cell);
            }
            self.settle(address, chunk, stamp, sites);
        }
    }

    fn settle(&mut self, address: u64, chunk: Chunk, stamp: Stamp, sites: &impl Sites) {
        let Chunk { size, context, site, level, epoch, .. } = chunk;
        self.settled += 1;
        self.unexpect(address);
        self.record(address, size, context, site, level as u8, Stamp { epoch, ..stamp }, sites);
    }

    /// The free of a pending chunk has to come through the filter.
    #[inline]
    fn expect(&mut self, address: u64) {
        if FILTERED || self.precision != Precision::Exact {
            self.filter.add(address);
        }
    }

    #[inline]
    fn unexpect(&mut self, address: u64) {
        if FILTERED || self.precision != Precision::Exact {
            self.filter.remove(address);
        }
    }

    /// A pending chunk is gone: it has been allocated and freed in one.
    #[inline]
    fn pair(&mut self, address: u64, chunk: &Chunk, stamp: Stamp, sites: &impl Sites) {
        self.unexpect(address);
        self.cells.paired(chunk.cell);
        let weight = self.rates.weight(chunk.size, chunk.level as u8);
        let alloc_weight = if self.precision == Precision::Exact { ONE } else { weight };
        sites.site(chunk.site).pair(chunk.size, alloc_weight, chunk.epoch, stamp.now, || stamp.query_id);
    }

    /// Follows an allocation at once, without a time as pending. A record that the address still has is of a chunk
    /// whose free was missed: it ends now.
    pub fn record(
        &mut self,
        address: u64,
        size: u64,
        context: u32,
        site: u32,
        level: u8,
        stamp: Stamp,
        sites: &impl Sites,
    ) {
        if self.filter.may_have(address) {
            self.free_record(address, sites);
        }
        let mut id = self.insert(address, size, context, site, level, stamp);
        if id == 0 {
            self.thin(sites);
            id = self.insert(address, size, context, site, level, stamp);
        }
        let weight = self.rates.weight(size, level);
        let alloc_weight = if self.precision == Precision::Exact { ONE } else { weight };
        let account = sites.site(site);
        if level != 0 {
            account.set_inexact();
        }
        if id == 0 {
            self.dropped += 1;
            account.count(size, alloc_weight, stamp);
            account.set_inexact();
            return;
        }
        self.filter.add(address);
        self.held = self.held.wrapping_add(weight * size);
        account.record(size, alloc_weight, weight, stamp);
    }

    fn insert(&mut self, address: u64, size: u64, context: u32, site: u32, level: u8, stamp: Stamp) -> u32 {
        let head = self.contexts.get(context).head;
        let record = Record {
            address,
            size_level: size & ((1 << 56) - 1) | (level as u64) << 56,
            site,
            context,
            epoch: stamp.epoch,
            previous: 0,
            next: head,
            chain: 0,
        };
        let id = self.records.insert(record, &mut self.budget);
        if id != 0 {
            if head != 0 {
                self.records.get_mut(head).previous = id;
            }
            let context = self.contexts.get_mut(context);
            context.head = id;
            context.records += 1;
            context.bytes += size;
        }
        id
    }

    /// Takes a record out of the table and of its context's list. The account is the caller's.
    fn take(&mut self, id: u32) -> Record {
        let record = *self.records.get(id);
        if record.previous != 0 {
            self.records.get_mut(record.previous).next = record.next;
        } else {
            self.contexts.get_mut(record.context).head = record.next;
        }
        if record.next != 0 {
            self.records.get_mut(record.next).previous = record.previous;
        }
        let context = self.contexts.get_mut(record.context);
        context.records -= 1;
        context.bytes -= record.size();
        self.records.remove(id);
        record
    }

    fn live_weight(&self, record: &Record) -> u64 {
        self.rates.weight(record.size(), record.level())
    }

    #[inline(never)]
    fn end(&mut self, id: u32, sites: &impl Sites) {
        let record = self.take(id);
        self.filter.remove(record.address);
        let weight = self.live_weight(&record);
        self.held = self.held.wrapping_sub(weight * record.size());
        sites.site(record.site).end(record.size(), weight, record.epoch);
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
        self.end(id, sites);
        self.ended += 1;
        true
    }

    /// Everything in the context is gone. Returns the number of followed chunks that ended.
    pub fn reset(&mut self, address: u64, stamp: Stamp, sites: &impl Sites) -> u32 {
        let context = self.contexts.find(address);
        if context == 0 {
            return 0;
        }
        let (mut ended, mut from) = (0, 0);
        while let Some((address, chunk)) = self.pending.next(&mut from, |c| c.context == context) {
            self.pair(address, &chunk, stamp, sites);
            ended += 1;
        }
        while self.contexts.get(context).head != 0 {
            self.end(self.contexts.get(context).head, sites);
            self.ended += 1;
            ended += 1;
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
                from.hand_over(sites.site(site), record.size(), self.live_weight(&record), record.epoch);
                self.records.get_mut(id).site = site;
            }
            id = record.next;
        }
    }

    /// The budget is exhausted: follow fewer chunks from now on, and give up a part of those that are followed,
    /// each with the same chance as if the new rate had held when it was made.
    #[cold]
    fn thin(&mut self, sites: &impl Sites) {
        let live = self.records.count() as u64;
        if live == 0 {
            return;
        }
        let bytes: u64 = (1..=self.records.high())
            .map(|id| self.records.get(id))
            .filter(|r| r.address != 0)
            .map(Record::size)
            .fold(0, u64::saturating_add);
        let mean = (bytes / live).max(1);
        // About half of the records of mean size survive the first time, and half of those the next time.
        let before = self.rates.rate(self.level).max(self.cells.floor());
        let level = self.rates.level((before.max(mean * 3 / 4) * 2).max(2));
        let rate = self.rates.rate(level);
        if rate <= before {
            return;
        }
        if self.precision == Precision::Exact {
            self.level = level;
            self.quick = false;
            self.gap = self.rates.gap(level, &mut self.rng);
        } else {
            self.cells.raise_floor(rate, &mut self.rates, &mut self.rng);
            self.each_site(|site| sites.site(site).set_inexact());
        }
        for id in 1..=self.records.high() {
            let record = *self.records.get(id);
            let old = self.rates.rate(record.level());
            if record.address == 0 || old >= rate {
                continue;
            }
            let keep = sampling::probability(record.size(), rate) / sampling::probability(record.size(), old);
            if self.rng.unit() <= keep {
                let (old, new) = (self.live_weight(&record), sampling::weight(record.size(), rate));
                self.records.get_mut(id).size_level = record.size() | (level as u64) << 56;
                self.held = self.held.wrapping_add((new - old) * record.size());
                sites.site(record.site).reweigh(record.size(), old, new);
            } else {
                self.end(id, sites);
                sites.site(record.site).set_inexact();
                self.dropped += 1;
            }
        }
    }

    /// Forgets everything and gives the memory back; the rates stay.
    pub fn clear(&mut self) {
        self.filter.clear();
        self.empty();
    }

    /// Forgets what a process has from its parent. Marks in the filter stay if they are few: they do no harm, and most
    /// of its memory is not the child's own yet and should not become so.
    pub fn forget_parents(&mut self) {
        if self.records.count() > filter::PLACES / 64 {
            self.filter.clear();
        }
        self.records.abandon(&mut self.budget);
        self.contexts.abandon(&mut self.budget);
        self.sites.abandon(&mut self.budget);
        self.empty();
    }

    fn empty(&mut self) {
        self.records.clear(&mut self.budget);
        self.contexts.clear(&mut self.budget);
        self.sites.clear(&mut self.budget);
        self.pending.clear();
        self.last_context = 0;
        self.context_changes = self.context_changes.wrapping_add(1);
        self.held = 0;
        self.dropped = 0;
        (self.settled, self.ended) = (0, 0);
        if self.precision != Precision::Exact || self.level != 0 {
            self.set_precision(self.precision);
        }
    }
}

#[cfg(test)]
mod tests;
