//! The mapping that all processes of a cluster see: a slot per process, tables of accounts, three dictionaries, and the
//! executable's unwind rules.
//!
//! It is rheap's own, made before the first fork, and not the server's shared memory: the postmaster may not depend
//! on what a crashing backend can corrupt, and the server empties its own just when the evidence is needed.

pub mod dictionary;
pub mod ending;
pub mod pool;
pub mod row;
pub mod slot;

use std::fmt::Write;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::*, fence};

use crate::ledger::Sites;
use crate::ledger::account::{Site, SiteCopy};
use dictionary::Dictionary;
use ending::{EndingCopy, Endings, HeldPath, HeldSite, How};
use pool::{CHUNK, Cursor, Pool};
use row::{Row, RowCopy};
use slot::Slot;

/// Rows of context paths that a process needs on average.
const ROWS_PER_PROCESS: usize = 96;
const PATHS: usize = 16384;
const MODULES: usize = 512;
/// Places for unwind rules: several times the return addresses of a busy server.
const RULES: usize = 8192;

#[derive(Clone, Copy)]
pub struct Share {
    /// Where the server has the name of the root of its portals; 0: nobody has met it yet. One word, on the page that
    /// each new process touches anyway.
    pub name_of_portals: &'static [AtomicU64],
    /// Who owns each slot: a pid; 0: nobody. By themselves, since a new process looks at all of them.
    pub owners: &'static [AtomicI32],
    pub slots: &'static [Slot],
    pub sites: Pool<Site>,
    pub rows: Pool<Row>,
    /// Words: (module << 48 | offset) for each return address, innermost first; see `stack`.
    pub stacks: Dictionary,
    /// Words: the id of the parent's path, then the packed name.
    pub paths: Dictionary,
    /// Words: the packed path of the file.
    pub modules: Dictionary,
    /// How to get from frames of the executable to their callers; see `stack::unwind`.
    pub rules: &'static [AtomicU64],
    /// What processes held that are no more.
    pub endings: Endings,
    /// Set by the first process that has told the log of a full table.
    pub full_logged: &'static AtomicU32,
}

impl Sites for Share {
    #[inline(always)]
    fn site(&self, id: u32) -> &Site {
        debug_assert!((id as usize) < self.sites.rows.len());
        // SAFETY: ids of accounts come from the pool of these rows alone.
        unsafe { self.sites.rows.get_unchecked(id as usize) }
    }
}

/// Cuts a mapping into arrays.
struct Cutter {
    at: usize,
    base: *mut u8,
}

impl Cutter {
    fn cut<T>(&mut self, count: usize) -> &'static [T] {
        self.at = self.at.next_multiple_of(align_of::<T>());
        let start = self.at;
        self.at += count * size_of::<T>();
        if self.base.is_null() {
            return &[];
        }
        // SAFETY: the mapping is as large as the first, dry cut found, is never unmapped, and all types cut from it
        // are made of atomics, for which zeroed memory is valid and sharing is defined.
        unsafe { std::slice::from_raw_parts(self.base.add(start).cast(), count) }
    }

    /// A word by itself; the dry cut, which has no memory yet, gets a stand-in.
    fn one(&mut self) -> &'static AtomicU32 {
        static NONE: AtomicU32 = AtomicU32::new(0);
        self.cut(1).first().unwrap_or(&NONE)
    }

    fn dictionary(&mut self, entries: usize, words: usize) -> Dictionary {
        Dictionary { entries: self.cut(entries), words: self.cut(words), used: self.one() }
    }

    fn pool<T>(&mut self, rows: usize) -> Pool<T> {
        let chunks = rows.div_ceil(CHUNK);
        Pool { owners: self.cut(chunks), rows: self.cut(chunks * CHUNK) }
    }

    fn share(&mut self, processes: usize, call_sites: usize) -> Share {
        Share {
            name_of_portals: self.cut(1),
            owners: self.cut(processes),
            slots: self.cut(processes),
            sites: self.pool(call_sites),
            rows: self.pool(processes * ROWS_PER_PROCESS),
            stacks: self.dictionary(call_sites * 2, call_sites * 32),
            paths: self.dictionary(PATHS, PATHS * 8),
            modules: self.dictionary(MODULES, MODULES * 16),
            rules: self.cut(RULES),
            endings: Endings { places: self.cut(2 * ending::ENDINGS), written: self.cut(2), last_kill: self.cut(1) },
            full_logged: self.one(),
        }
    }
}

impl Share {
    /// Whether the whole cluster shares it, or this session has it for itself.
    pub fn is_cluster_wide(&self) -> bool {
        self.slots.len() > 1
    }

    /// Maps it, for one process or for all of a cluster. Pages are used when touched. Error: what the system said.
    pub fn map(processes: usize, call_sites: usize) -> std::io::Result<Share> {
        let mut dry = Cutter { at: 0, base: std::ptr::null_mut() };
        dry.share(processes, call_sites);
        // SAFETY: a fresh anonymous mapping.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                dry.at,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Cutter { at: 0, base: base.cast() }.share(processes, call_sites))
    }

    /// Writes down what a slot's process holds. `preferred` says which call sites come first, whatever they hold; None
    /// when nothing is to be kept of it. Allocates nothing.
    pub fn ending_of(
        &self,
        index: u32,
        pid: i32,
        how: How,
        ended_at: i64,
        preferred: impl Fn(&Site) -> bool,
    ) -> Option<EndingCopy> {
        let slot = &self.slots[index as usize];
        let mut ending = EndingCopy::new(how, pid, slot.backend_type.load(Relaxed), ended_at);
        ending.context_bytes = slot.context_bytes.load(Relaxed);
        let (mut sites, mut paths) = ([0; ending::KEPT], [0; ending::KEPT]);
        let mut latest = 0;
        for (_, site) in self.sites.owned(index).flat_map(|chunk| self.sites.rows_of(chunk)) {
            // Whoever died within a write has left the truth but for one allocation.
            let held = site.held();
            if held.stack == 0 || held.live_count == 0 {
                continue;
            }
            if site.last_seen() >= latest && held.query_id != 0 {
                (latest, ending.query_id) = (site.last_seen(), held.query_id);
            }
            ending.add_site(held, &mut sites, preferred(site));
        }
        for (_, row) in self.rows.owned(index).flat_map(|chunk| self.rows.rows_of(chunk)) {
            let (path, used_bytes) = row.held();
            if path != 0 {
                ending.add_path(HeldPath { path, used_bytes }, &mut paths);
            }
        }
        (ending.sites[0] != HeldSite::default()).then_some(ending)
    }

    /// Keeps what a dead process held, once. `holder`: whose the slot is now, the dead one's still or a successor's that
    /// has not used it yet. `last_kill`: when the postmaster last said that somebody was killed.
    pub fn bury(&self, index: u32, pid: i32, holder: i32, now: i64, last_kill: i64) {
        let slot = &self.slots[index as usize];
        if slot.buried.load(Acquire) == pid || slot.reset_pending() {
            return;
        }
        // The server ends all others when one was killed, and they have no time for words either.
        let (how, at) = if slot.opened.load(Relaxed) < last_kill { (How::Exit, last_kill) } else { (How::Killed, now) };
        let ending = self.ending_of(index, pid, how, at, |_| false);
        // Whoever takes the slot meanwhile does it instead; of two who get here, the first is heard.
        fence(Acquire);
        if self.owners[index as usize].load(Acquire) != holder || slot.buried.swap(pid, AcqRel) == pid {
            return;
        }
        if let Some(ending) = ending
            && (how == How::Killed || ending.sites[0].live_bytes >= ending::MUCH)
        {
            self.endings.push(&ending);
        }
    }

    /// Buries all that are dead. Those found together count as dead by themselves; those that the server ends because
    /// of them are found later. Takes no memory and no lock.
    pub fn bury_dead(&self, now: i64) {
        let unburied = || {
            let owned = self.owners.iter().zip(self.slots).enumerate();
            let pids = owned.map(|(i, (owner, slot))| (i as u32, owner.load(Acquire), slot.buried.load(Relaxed)));
            pids.filter(|&(_, pid, buried)| pid != 0 && pid != buried)
        };
        if unburied().all(|(_, pid, _)| slot::alive(pid)) {
            return;
        }
        let last_kill = self.endings.last_kill();
        for (index, pid, _) in unburied() {
            if !slot::alive(pid) || slot::is_zombie(pid) {
                self.bury(index, pid, pid, now, last_kill);
            }
        }
    }

    /// The mapping as it is, for tests that damage it.
    #[cfg(test)]
    pub fn raw_words(&self) -> &'static [std::sync::atomic::AtomicU64] {
        let start = self.owners.as_ptr() as usize;
        let end = &raw const *self.full_logged as usize + size_of::<AtomicU32>();
        // SAFETY: from the first to the last of what is cut from the mapping; all of it is atomics.
        unsafe { std::slice::from_raw_parts(start as *const _, (end - start) / 8) }
    }

    /// Takes a slot for this process: a free one, else one whose process is gone.
    pub fn claim_slot(&self, pid: i32, backend_type: i32) -> Option<u32> {
        let take = |index: usize, expected: i32| {
            let slot = &self.slots[index];
            self.owners[index].compare_exchange(expected, pid, AcqRel, Relaxed).is_ok().then(|| {
                // What a predecessor left that never said goodbye.
                if expected != 0 {
                    let (now, last_kill) = (crate::process::precisely_now(), self.endings.last_kill());
                    self.bury(index as u32, expected, pid, now, last_kill);
                    self.release_chunks(index as u32);
                }
                slot.open(backend_type);
                slot.begin(crate::process::precisely_now());
                // Wishes were for the process that was here before.
                slot.track.store(0, Relaxed);
                slot.resets.store(0, Relaxed);
                index as u32
            })
        };
        let start = pid as usize % self.owners.len();
        // Of an earlier process of the same id, which was killed; else a free one; else one of any dead process.
        // The owner is looked up once: who was judged is who is replaced.
        let find = |judge: &dyn Fn(i32) -> bool| {
            for index in (start..self.owners.len()).chain(0..start) {
                let owner = self.owners[index].load(Relaxed);
                if judge(owner)
                    && let Some(slot) = take(index, owner)
                {
                    return Some(slot);
                }
            }
            None
        };
        find(&|owner| owner == pid).or_else(|| find(&|owner| owner == 0)).or_else(|| find(&|owner| !slot::alive(owner)))
    }

    /// Gives a process's own slot back with all that belongs to it, if `pid` owns it.
    pub fn release_slot(&self, index: u32, pid: i32, sites: &mut Cursor, rows: &mut Cursor) {
        self.release_slot_after(index, pid, || {
            sites.release(&self.sites, index, Site::close);
            rows.release(&self.rows, index, Row::close);
        });
    }

    fn release_slot_after(&self, index: u32, pid: i32, release: impl FnOnce()) {
        let owner = &self.owners[index as usize];
        if owner.load(Acquire) == pid {
            release();
            owner.store(0, Release);
        }
    }

    /// Gives back all chunks of a slot whose process is gone.
    fn release_chunks(&self, index: u32) {
        self.sites.release(index, Site::close);
        self.rows.release(index, Row::close);
    }

    /// Gives back all slots of dead processes, whose books would keep others from theirs. Only while nobody but the
    /// caller can claim a slot.
    pub fn release_dead(&self, own: Option<u32>) {
        for (index, owner) in self.owners.iter().enumerate() {
            let pid = owner.load(Acquire);
            if own != Some(index as u32) && pid != 0 && !slot::alive(pid) {
                self.release_slot_after(index as u32, pid, || self.release_chunks(index as u32));
            }
        }
    }

    /// Slots of processes that live, with their numbers and their owners: a look later it may be somebody else's.
    pub fn live_slots(&self) -> impl Iterator<Item = (u32, i32, &'static Slot)> + '_ {
        let slots = self.owners.iter().zip(self.slots).enumerate();
        let owned = slots.map(|(i, (owner, slot))| (i as u32, owner.load(Acquire), slot));
        owned.filter(|&(_, pid, _)| slot::alive(pid))
    }

    /// Copies of the accounts and of the rows of context paths of a slot's owner. Empty if that is not `pid` any more.
    pub fn held_by(&self, index: u32, pid: i32) -> (Vec<SiteCopy>, Vec<RowCopy>) {
        let (sites, rows) = (self.sites.copies(index, Site::copy), self.rows.copies(index, Row::copy));
        fence(Acquire);
        if self.owners[index as usize].load(Acquire) == pid { (sites, rows) } else { (Vec::new(), Vec::new()) }
    }

    /// The path of a context's parent; 0 at the top.
    pub fn parent(&self, path: u32) -> u32 {
        dictionary::unpack(&self.paths.get(path)).map_or(0, |(parent, _)| parent as u32)
    }

    /// The names along a context path, from the top, joined by `/`.
    pub fn path_name(&self, path: u32) -> String {
        let mut name = String::new();
        let _ = self.write_path(path, &mut name);
        name
    }

    /// The last name of a context path. Names may have a `/` in them, as `PL/pgSQL function` has.
    pub fn last_name(&self, path: u32) -> String {
        dictionary::unpack(&self.paths.get(path)).map_or(String::new(), |(_, name)| name)
    }

    /// The path's name without memory, into whatever takes it. Error: that of `out`.
    pub fn write_path(&self, path: u32, out: &mut impl Write) -> std::fmt::Result {
        let mut chain = [0u32; 64];
        let mut depth = 0;
        let mut id = path;
        while id != 0 && depth < chain.len() {
            let Some(parent) = self.paths.words_of(id).first() else { break };
            chain[depth] = id;
            depth += 1;
            id = parent.load(Relaxed) as u32;
        }
        for (i, &id) in chain[..depth].iter().rev().enumerate() {
            if i > 0 {
                out.write_char('/')?;
            }
            dictionary::write_text(self.paths.words_of(id), out)?;
        }
        Ok(())
    }
}

/// Lets a writer finish who is at it: a moment of spinning, then a few naps, for it may have lost its processor in
/// between. False when it has had its time: a hundredth of a second, or more where many wait for a processor.
pub fn patience(attempt: u32) -> bool {
    match attempt {
        0..1000 => std::hint::spin_loop(),
        1000..1100 => std::thread::sleep(std::time::Duration::from_micros(100)),
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::account::Stamp;
    use crate::ledger::sampling::ONE;

    #[test]
    fn a_slot_is_recycled_when_its_process_is_gone() {
        let share = Share::map(3, 64).unwrap();
        let me = std::process::id() as i32;
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let gone = child.id() as i32;
        child.wait().unwrap();
        let first = share.claim_slot(gone, 4).unwrap();
        let chunk = share.sites.claim(first).unwrap();
        share.sites.rows[chunk * CHUNK].open(7, 8);
        let parent = std::os::unix::process::parent_id() as i32;
        assert!(share.claim_slot(me, 4).is_some() && share.claim_slot(parent, 4).is_some());
        assert_eq!(share.live_slots().count(), 2);
        assert_eq!(share.claim_slot(1, 4), Some(first));
        assert_eq!(share.sites.owned(first).count(), 0);
        assert_eq!(share.sites.rows[chunk * CHUNK].copy(), None);
        assert_eq!(share.claim_slot(gone, 4), None, "every slot belongs to a live process");
    }

    /// A slot of a process that is gone, which held a call site of so many bytes.
    fn dead(share: &Share, bytes: u64) -> (u32, i32) {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        child.wait().unwrap();
        let index = share.claim_slot(pid, 4).unwrap();
        let site = &share.sites.rows[share.sites.claim(index).unwrap() * CHUNK];
        site.open(7, 8);
        site.record(bytes, ONE, ONE, Stamp { epoch: 1, now: 1, query_id: 0 });
        (index, pid)
    }

    #[test]
    fn what_a_dead_process_held_is_kept_once_and_under_its_own_name() {
        let share = Share::map(4, 256).unwrap();
        let (index, pid) = dead(&share, 100);
        let kept = || share.endings.all().iter().map(|e| (e.pid, e.how)).collect::<Vec<_>>();
        share.bury(index, pid, 1, 5, 0);
        assert_eq!(kept(), [], "the slot is somebody else's meanwhile");
        share.bury(index, pid, pid, 5, 0);
        share.bury(index, pid, pid, 6, 0);
        assert_eq!(kept(), [(pid, How::Killed)]);
        // Of its successor it is not said that he is buried already.
        share.owners[index as usize].store(pid + 1, Relaxed);
        share.bury(index, pid + 1, pid + 1, 7, 0);
        assert_eq!(kept().len(), 2);
    }

    #[test]
    fn who_is_ended_because_another_was_killed_does_not_count_as_killed() {
        let share = Share::map(4, 256).unwrap();
        let (victim, others) = (dead(&share, 100), [dead(&share, 100), dead(&share, ending::MUCH)]);
        share.bury(victim.0, victim.1, victim.1, 5, share.endings.last_kill());
        // A death alone is no word of the postmaster's.
        assert_eq!(share.endings.last_kill(), 0);
        share.endings.killed(i64::MAX - 1);
        for (index, pid) in others {
            share.bury(index, pid, pid, 6, share.endings.last_kill());
        }
        let kept: Vec<_> = share.endings.all().iter().map(|e| (e.pid, e.how)).collect();
        assert_eq!(kept.len(), 2, "what held little is not worth a place");
        assert!(kept.contains(&(victim.1, How::Killed)) && kept.contains(&(others[1].1, How::Exit)));
    }

    #[test]
    fn a_slot_that_has_changed_hands_shows_nothing_of_its_new_owner() {
        let share = Share::map(4, 256).unwrap();
        let (index, pid) = dead(&share, 100);
        assert_eq!(share.held_by(index, pid).0.len(), 1);
        assert!(share.held_by(index, pid + 1).0.is_empty());
        // A chunk that is given back while it is read.
        let chunk = share.sites.owned(index).next().unwrap();
        let copies = share.sites.copies(index, |site: &Site| {
            share.sites.owners[chunk].store(index + 2, Relaxed);
            site.copy()
        });
        assert!(copies.is_empty());
    }

    #[test]
    fn a_process_whose_id_was_used_before_takes_that_ones_slot() {
        let share = Share::map(3, 64).unwrap();
        let me = std::process::id() as i32;
        let slot = share.claim_slot(me, 4);
        share.slots[slot.unwrap() as usize].allocations.store(5, Relaxed);
        assert_eq!(share.claim_slot(me, 4), slot);
        assert_eq!(share.slots[slot.unwrap() as usize].allocations.load(Relaxed), 0);
        assert_eq!(share.live_slots().count(), 1);
    }

    #[test]
    fn chunks_run_out_and_come_back() {
        let share = Share::map(4, 2 * CHUNK).unwrap();
        let mut cursor = Cursor::default();
        let rows: Vec<u32> = std::iter::from_fn(|| cursor.take(&share.sites, 1)).collect();
        assert_eq!(rows.len(), 2 * CHUNK);
        assert_eq!(share.sites.owned(1).count(), 2);
        share.sites.release(1, Site::close);
        assert!(share.sites.claim(2).is_some());
    }

    #[test]
    fn only_rows_that_were_used_are_closed() {
        let share = Share::map(4, 3 * CHUNK).unwrap();
        let mut cursor = Cursor { most: 2, ..Cursor::default() };
        let used: Vec<u32> = (0..CHUNK + 3).filter_map(|_| cursor.take(&share.sites, 1)).collect();
        let closed = std::cell::RefCell::new(Vec::new());
        let id = |row: &Site| (&raw const *row as usize - share.sites.rows.as_ptr() as usize) / size_of::<Site>();
        cursor.release(&share.sites, 1, |row| closed.borrow_mut().push(id(row) as u32));
        assert_eq!(closed.into_inner(), used);
        assert_eq!((share.sites.owned(1).count(), cursor.chunks, cursor.most), (0, 0, 2));
        assert!(cursor.take(&share.sites, 1).is_some());
    }

    #[test]
    fn a_path_reads_from_the_top() {
        let share = Share::map(1, 16).unwrap();
        let mut words = [0; 64];
        let mut parent = 0;
        for name in ["TopMemoryContext", "CacheMemoryContext", "PL/pgSQL function"] {
            let n = dictionary::pack(parent as u64, name.as_bytes(), &mut words);
            parent = share.paths.intern(&words[..n]);
        }
        assert_eq!(share.path_name(parent), "TopMemoryContext/CacheMemoryContext/PL/pgSQL function");
        assert_eq!(share.last_name(parent), "PL/pgSQL function");
    }
}
