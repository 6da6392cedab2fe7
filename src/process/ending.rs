//! The last words of a process, and those that others say for one that was killed.

use std::ffi::CStr;
use std::fmt::Write;
use std::sync::atomic::{AtomicPtr, Ordering::*};

use pgrx::pg_sys;

use super::{Process, State, current, precisely_now};
use crate::ledger::Due;
use crate::ledger::account::Site;
use crate::settings;
use crate::share::Share;
use crate::share::ending::How;
use crate::verdict::caches;

impl Process {
    /// At exit: what is held by call sites that are no known cache, if it is worth a report, stays on record. Takes no
    /// memory, of which the process may have died for lack.
    pub fn keep_what_is_held(&mut self) {
        let (Some(share), Some(slot)) = (self.share, self.slot()) else { return };
        // A signal handler may have ended the process in the middle of a hook.
        if self.state == State::Ready || self.state == State::Alone {
            self.flush(Due::Look);
        }
        if slot.reset_pending() || slot.mode.load(Relaxed) == settings::Mode::Off as u32 {
            return;
        }
        let least = settings::min_leak_bytes().max(1);
        let remarkable = |site: &Site| site.held().live_bytes >= least && !is_hearsay(site) && !is_cache(&share, site);
        let mut any = false;
        self.ledger.each_site(|id| any |= remarkable(&share.sites.rows[id as usize]));
        if any && let Some(ending) = share.ending_of(self.slot, self.pid, How::Exit, precisely_now(), remarkable) {
            share.endings.push(&ending);
        }
    }
}

/// Whether all that is known of a call site is one sample that stands for many allocations.
fn is_hearsay(site: &Site) -> bool {
    site.live_count() > 1 && site.copy().is_some_and(|copy| copy.ages.iter().map(|age| age.records).sum::<u32>() == 1)
}

/// Whether what a call site holds may be one of the server's caches.
fn is_cache(share: &Share, site: &Site) -> bool {
    let mut path = Text::<1024>::new();
    let _ = share.write_path(site.path(), &mut path);
    caches::may_be_cache(path.as_str(), site.generations())
}

/// Keeps what those held that ended without a word. In the postmaster, and in whoever asks.
pub fn bury_dead() {
    // SAFETY: only copied.
    if let Some(share) = unsafe { current() }.share
        && share.is_cluster_wide()
    {
        share.bury_dead(precisely_now());
    }
}

/// The postmaster logs a message, untranslated here. Before it ends the others it says who was killed: whoever is dead
/// now is a victim, whoever is found dead later was ended because of that. With `log_min_messages` at `fatal` it says
/// nothing, and all of them count as killed.
pub fn postmaster_logs(message: &[u8]) {
    bury_dead();
    // SAFETY: only copied.
    let share = unsafe { current() }.share.filter(|share| share.is_cluster_wide());
    if message == b"terminating any other active server processes"
        && let Some(share) = share
    {
        share.endings.killed(precisely_now());
    }
}

static PREVIOUS_STARTUP: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// Hooks into the making of the server's shared memory, which the postmaster does again after a crash. Called once, from
/// `_PG_init`.
pub fn install() {
    // SAFETY: the hook is a global of the server, set while libraries load, in its only thread.
    unsafe {
        PREVIOUS_STARTUP.store(pg_sys::shmem_startup_hook.map_or(std::ptr::null_mut(), |h| h as *mut ()), Relaxed);
        pg_sys::shmem_startup_hook = Some(starts);
    }
}

/// The server starts, perhaps anew: nobody else is there now, but for a collector of logs, which lives.
unsafe extern "C-unwind" fn starts() {
    // SAFETY: what stood in the hook before is called as the server would; the rest only copies.
    unsafe {
        let previous = PREVIOUS_STARTUP.load(Relaxed);
        if !previous.is_null() {
            let previous: unsafe extern "C-unwind" fn() = std::mem::transmute(previous);
            previous();
        }
        let process = current();
        if pg_sys::PostmasterPid == libc::getpid()
            && let Some(share) = process.share.filter(|share| share.is_cluster_wide())
        {
            bury_dead();
            share.release_dead(process.own_slot.map(|_| process.slot));
        }
    }
}

/// A text of bounded length that takes no memory; what is too much is left out, from a character's start on.
pub struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    pub const fn new() -> Self {
        Text { bytes: [0; N], length: 0 }
    }

    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.bytes[..self.length]).unwrap_or("")
    }

    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }

    pub fn clear(&mut self) {
        self.length = 0;
        self.bytes[0] = 0;
    }
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        // One byte stays free, for a zero at the end.
        let mut room = text.len().min(N - 1 - self.length);
        while !text.is_char_boundary(room) {
            room -= 1;
        }
        self.bytes[self.length..self.length + room].copy_from_slice(&text.as_bytes()[..room]);
        self.length += room;
        self.bytes[self.length] = 0;
        if room == text.len() { Ok(()) } else { Err(std::fmt::Error) }
    }
}
