//! What is alive: a record per followed chunk, an account per call site, a list of chunks per context.
//!
//! Pure logic. It knows addresses as numbers, stacks and context paths as ids, and takes no memory but its own
//! bounded mappings, so it may run inside any palloc.

pub mod account;
pub mod region;
pub mod sampling;
pub mod table;

use account::{Site, Stamp};
use region::Budget;
use sampling::{ONE, Rate, Rng};
use table::{Entry, Table};

/// Where the accounts lie: in shared memory for a server process, in a vector for a test.
pub trait Sites {
    fn site(&self, id: u32) -> &Site;
}

/// A chunk that is followed until it is freed or its context is reset or deleted.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Record {
    address: u64,
    /// Requested bytes in the low 56 bits, index of the sampling rate in the high 8.
    size_level: u64,
    site: u32,
    context: u32,
    epoch: u32,
    /// Neighbours in the list of the context, 0 at the ends.
    previous: u32,
    next: u32,
    chain: u32,
}

impl Record {
    fn size(&self) -> u64 {
        self.size_level & ((1 << 56) - 1)
    }

    fn level(&self) -> usize {
        (self.size_level >> 56) as usize
    }
}

impl Entry for Record {
    fn key(&self) -> u64 {
        self.address
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }
}

/// A context that holds records, or held some since it was made.
#[derive(Clone, Copy, Default)]
struct Context {
    address: u64,
    /// Of live records, as they stand: neither scaled nor rounded.
    bytes: u64,
    path: u32,
    records: u32,
    head: u32,
    chain: u32,
}

impl Entry for Context {
    fn key(&self) -> u64 {
        self.address
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }
}

/// From (stack, path) to the id of the account.
#[derive(Clone, Copy, Default)]
struct SiteKey {
    stack_path: u64,
    site: u32,
    chain: u32,
}

impl Entry for SiteKey {
    fn key(&self) -> u64 {
        self.stack_path
    }
    fn chain(&self) -> u32 {
        self.chain
    }
    fn set_chain(&mut self, next: u32) {
        self.chain = next;
    }
}

fn site_key(stack: u32, path: u32) -> u64 {
    (stack as u64) << 32 | path as u64
}

/// What to do with an allocation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Nothing: it is between two samples.
    Skip,
    /// Count it at its site, without a record.
    Count,
    /// Count it and follow it.
    Record,
}

/// At most this many distinct rates in the life of a process; a settings change beyond it keeps the last one.
const LEVELS: usize = 200;

pub struct Ledger {
    budget: Budget,
    records: Table<Record>,
    contexts: Table<Context>,
    sites: Table<SiteKey>,
    rates: [Rate; LEVELS],
    levels: usize,
    /// Index into `rates` for new records.
    level: usize,
    /// The rate that the mode asks for: 0 in exact mode.
    base: Rate,
    gap: i64,
    rng: Rng,
    /// Records given up because the budget was exhausted.
    dropped: u64,
    /// Bytes that all accounts together hold, in the fixed point of the accounts.
    held: u64,
    last_context: u32,
}

impl Ledger {
    /// An empty ledger that follows every allocation and uses at most `limit` bytes.
    pub const fn new(limit: usize, seed: u64) -> Self {
        Ledger {
            budget: Budget::new(limit),
            records: Table::new(),
            contexts: Table::new(),
            sites: Table::new(),
            rates: [0; LEVELS],
            levels: 1,
            level: 0,
            base: 0,
            gap: 0,
            rng: Rng::new(seed),
            dropped: 0,
            held: 0,
            last_context: 0,
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

    /// Bytes alive, as estimated from the records.
    pub fn held_bytes(&self) -> u64 {
        self.held / ONE
    }

    /// Records alive.
    pub fn records(&self) -> usize {
        self.records.count()
    }

    /// A smaller limit takes effect on the next growth: what is mapped stays until the ledger is cleared.
    pub fn set_limit(&mut self, limit: usize) {
        self.budget.limit = limit;
    }

    /// The mode's rate, 0 for exact. Records keep the rate they were made with.
    pub fn set_base(&mut self, rate: Rate) {
        if self.base != rate {
            self.base = rate;
            self.use_rate(rate);
        }
    }

    /// Returns to the mode's own rate when the memory allows it again.
    pub fn relax(&mut self) {
        if self.rates[self.level] != self.base && self.budget.used - self.spare() < self.budget.limit / 4 {
            self.use_rate(self.base);
        }
    }

    fn spare(&self) -> usize {
        (self.records.high() as usize - self.records.count()) * size_of::<Record>()
    }

    fn use_rate(&mut self, rate: Rate) {
        self.level = match self.rates[..self.levels].iter().position(|&r| r == rate) {
            Some(level) => level,
            None if self.levels < LEVELS => {
                self.rates[self.levels] = rate;
                self.levels += 1;
                self.levels - 1
            }
            None => self.level,
        };
        self.gap = self.rng.gap(self.rates[self.level]);
    }

    /// Whether an allocation of this size gets a record. To be asked once for each allocation.
    #[inline]
    pub fn decide(&mut self, size: u64) -> Decision {
        if self.level == 0 {
            return Decision::Record;
        }
        self.gap -= size.max(1) as i64;
        if self.gap > 0 {
            return if self.base == 0 { Decision::Count } else { Decision::Skip };
        }
        self.gap = self.rng.gap(self.rates[self.level]);
        Decision::Record
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

    /// Remembers the account of a stack and a path. False when there is no memory for it.
    pub fn add_site(&mut self, stack: u32, path: u32, site: u32) -> bool {
        let key = SiteKey { stack_path: site_key(stack, path), site, chain: 0 };
        self.sites.insert(key, &mut self.budget) != 0
    }

    /// Calls `f` with each account.
    pub fn each_site(&self, mut f: impl FnMut(u32)) {
        for id in 1..=self.sites.high() {
            let key = self.sites.get(id);
            if key.stack_path != 0 {
                f(key.site);
            }
        }
    }

    /// Counts an allocation for which `decide` said [`Decision::Count`].
    pub fn count(&mut self, size: u64, site: u32, stamp: Stamp, sites: &impl Sites) {
        let account = sites.site(site);
        account.count(size, ONE, stamp);
        account.set_inexact();
    }

    /// Follows an allocation for which `decide` said [`Decision::Record`]. A record that the address still has is
    /// of a chunk whose free was missed: it ends now.
    pub fn record(&mut self, address: u64, size: u64, context: u32, site: u32, stamp: Stamp, sites: &impl Sites) {
        self.free(address, sites);
        let mut id = self.insert(address, size, context, site, stamp);
        if id == 0 {
            self.thin(sites);
            id = self.insert(address, size, context, site, stamp);
        }
        let rate = self.rates[self.level];
        let weight = sampling::weight(size, rate);
        let alloc_weight = if self.base == 0 { ONE } else { weight };
        let account = sites.site(site);
        if rate != 0 {
            account.set_inexact();
        }
        if id == 0 {
            self.dropped += 1;
            account.count(size, alloc_weight, stamp);
            account.set_inexact();
            return;
        }
        self.held = self.held.wrapping_add(weight * size);
        account.record(size, alloc_weight, weight, stamp);
    }

    fn insert(&mut self, address: u64, size: u64, context: u32, site: u32, stamp: Stamp) -> u32 {
        let head = self.contexts.get(context).head;
        let record = Record {
            address,
            size_level: size & ((1 << 56) - 1) | (self.level as u64) << 56,
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
        self.records.remove(id, Record::default());
        record
    }

    fn live_weight(&self, record: &Record) -> u64 {
        sampling::weight(record.size(), self.rates[record.level()])
    }

    #[inline(never)]
    fn end(&mut self, id: u32, sites: &impl Sites) {
        let record = self.take(id);
        let weight = self.live_weight(&record);
        self.held = self.held.wrapping_sub(weight * record.size());
        sites.site(record.site).end(record.size(), weight, record.epoch);
    }

    /// Ends the record of a chunk. False when it has none: it was not sampled, or is older than rheap.
    #[inline]
    pub fn free(&mut self, address: u64, sites: &impl Sites) -> bool {
        let id = self.records.find(address);
        if id == 0 {
            return false;
        }
        self.end(id, sites);
        true
    }

    /// Everything in the context is gone. Returns the number of records that ended.
    pub fn reset(&mut self, address: u64, sites: &impl Sites) -> u32 {
        let context = self.contexts.find(address);
        if context == 0 {
            return 0;
        }
        let mut ended = 0;
        while self.contexts.get(context).head != 0 {
            self.end(self.contexts.get(context).head, sites);
            ended += 1;
        }
        ended
    }

    /// The context is gone; its header may be another context tomorrow.
    pub fn delete(&mut self, address: u64, sites: &impl Sites) -> u32 {
        let ended = self.reset(address, sites);
        let context = self.contexts.find(address);
        if context != 0 {
            self.contexts.remove(context, Context::default());
            self.last_context = 0;
        }
        ended
    }

    /// The context lies under another parent now: what it holds moves to the accounts of the new path.
    /// `open` finds or makes the account of a stack and a path; None leaves a record where it is.
    pub fn reparent(
        &mut self,
        address: u64,
        path: u32,
        sites: &impl Sites,
        mut open: impl FnMut(&mut Self, u32, u32) -> Option<u32>,
    ) {
        let context = self.contexts.find(address);
        if context == 0 || self.contexts.get(context).path == path {
            return;
        }
        self.contexts.get_mut(context).path = path;
        let mut id = self.contexts.get(context).head;
        while id != 0 {
            let record = *self.records.get(id);
            let from = sites.site(record.site);
            if let Some(site) = open(self, from.stack(), path) {
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
        let rate = (self.rates[self.level].max(mean * 3 / 4) * 2).max(2);
        self.use_rate(rate);
        if self.rates[self.level] != rate {
            return;
        }
        for id in 1..=self.records.high() {
            let record = *self.records.get(id);
            if record.address == 0 || self.rates[record.level()] >= rate {
                continue;
            }
            let old = self.rates[record.level()];
            let keep = sampling::probability(record.size(), rate) / sampling::probability(record.size(), old);
            if self.rng.unit() <= keep {
                let (old, new) = (self.live_weight(&record), sampling::weight(record.size(), rate));
                self.records.get_mut(id).size_level = record.size() | (self.level as u64) << 56;
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
        self.records.clear(&mut self.budget);
        self.contexts.clear(&mut self.budget);
        self.sites.clear(&mut self.budget);
        self.last_context = 0;
        self.held = 0;
        self.dropped = 0;
        self.use_rate(self.base);
    }
}

#[cfg(test)]
mod tests;
