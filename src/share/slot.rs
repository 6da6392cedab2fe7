//! What one process says about itself. Written by that process only.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering::*};

use pgrx::pg_sys::BackendType;

use crate::ledger::account::HISTORY;

/// All zero bytes are a new one. What each statement reads and writes lies on the first cache line.
#[derive(Default)]
#[repr(C, align(128))]
pub struct Slot {
    /// `BackendType` of the server, as far as known; [`POSTMASTER`] for the postmaster.
    pub backend_type: AtomicI32,
    /// Ordinal of `rheap.mode` as it is in effect.
    pub mode: AtomicU32,
    /// The process's count of work.
    pub epoch: AtomicU32,
    /// The epoch in which the transaction at hand began, or will begin; 0 where there are no messages.
    pub transaction: AtomicU32,
    /// 1 once a client's message has been dealt with.
    pub has_messages: AtomicU32,
    /// 1 for a process that never gets messages.
    pub without_messages: AtomicU32,
    /// How often somebody has wished for anything: `resets` and `track`.
    pub wishes: AtomicU32,
    /// What `rheap_track` wishes: the ordinal of a mode plus 1; 0: what the setting says. The owner follows when it
    /// next works.
    pub track: AtomicU32,
    pub allocations: AtomicU64,
    pub frees: AtomicU64,
    pub captures: AtomicU64,
    pub watched_contexts: AtomicU32,
    pub walks: AtomicU32,
    pub dropped: AtomicU64,
    pub own_bytes: AtomicU64,
    pub context_bytes: AtomicU64,
    pub walk_times: [AtomicI64; HISTORY],
    /// How often somebody has wished, since the owner last did so, that it forgets its history.
    pub resets: AtomicU32,
    /// When the owner took it; microseconds since 2000-01-01.
    pub opened: AtomicI64,
    /// The dead owner whose holdings have been put down.
    pub buried: AtomicI32,
}

pub const POSTMASTER: i32 = -1;

impl Slot {
    /// Whether the owner still has to follow a wish to forget; its accounts count as empty until then.
    #[inline(always)]
    pub fn reset_pending(&self) -> bool {
        self.resets.load(Acquire) != 0
    }

    /// Wishes that the owner forgets its history.
    pub fn wish_reset(&self) {
        self.resets.fetch_add(1, AcqRel);
        self.wishes.fetch_add(1, Release);
    }

    /// Wishes that the owner follows a mode; see `track`.
    pub fn wish_mode(&self, mode: u32) {
        self.track.store(mode, Relaxed);
        self.wishes.fetch_add(1, Release);
    }

    #[inline]
    pub fn has_no_messages(&self) -> bool {
        self.without_messages.load(Relaxed) != 0
    }

    /// The process's count of work counts windows of time. A sender stays in one message for as long as it streams.
    pub fn is_timed(&self) -> bool {
        match self.backend_type.load(Relaxed) {
            POSTMASTER => false,
            kind => self.has_messages.load(Relaxed) == 0 || kind == BackendType::B_WAL_SENDER as i32,
        }
    }

    /// What the process's count of work counts, in the plural.
    pub fn work_unit(&self) -> &'static str {
        match self.backend_type.load(Relaxed) {
            POSTMASTER => "forks",
            _ if self.is_timed() => "windows of time",
            _ => "messages",
        }
    }

    /// (allocations, frees, captures) so far; never fewer allocations than of the others.
    pub fn figures(&self) -> (u64, u64, u64) {
        let (frees, captures) = (self.frees.load(Acquire), self.captures.load(Acquire));
        (self.allocations.load(Relaxed), frees, captures)
    }

    /// A new owner has it from now on.
    pub fn begin(&self, now: i64) {
        self.opened.store(now, Relaxed);
        self.buried.store(0, Release);
    }

    /// Empties everything but the owner and what is wished of it.
    pub fn open(&self, backend_type: i32) {
        self.backend_type.store(backend_type, Relaxed);
        for cell in [&self.mode, &self.transaction, &self.has_messages, &self.watched_contexts, &self.walks] {
            cell.store(0, Relaxed);
        }
        for cell in
            [&self.allocations, &self.frees, &self.captures, &self.dropped, &self.own_bytes, &self.context_bytes]
        {
            cell.store(0, Relaxed);
        }
        for cell in &self.walk_times {
            cell.store(0, Relaxed);
        }
        self.epoch.store(1, Relaxed);
    }
}

/// True while a process of this id exists.
pub fn alive(pid: i32) -> bool {
    // SAFETY: signal 0 only asks.
    pid > 0
        && (unsafe { libc::kill(pid, 0) } == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM))
}

/// True for a process that has ended, and whose parent does not know yet. Allocates nothing.
pub fn is_zombie(pid: i32) -> bool {
    use std::io::Write;
    let (mut path, mut text) = ([0u8; 32], [0u8; 512]);
    if write!(&mut path[..31], "/proc/{pid}/stat").is_err() {
        return false;
    }
    // SAFETY: the path ends with a zero, and the kernel writes no more than the buffer holds.
    let length = unsafe {
        let file = libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return false;
        }
        let length = libc::read(file, text.as_mut_ptr().cast(), text.len());
        libc::close(file);
        length
    };
    let text = &text[..length.max(0) as usize];
    // The state follows the name in brackets, which may hold anything.
    text.iter().rposition(|&b| b == b')').is_some_and(|at| text.get(at + 2) == Some(&b'Z'))
}
