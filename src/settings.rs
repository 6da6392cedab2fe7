//! The `rheap.*` settings.

use core::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering::*};

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum, pg_sys};

#[derive(Clone, Copy, Debug, PartialEq, PostgresGucEnum)]
pub enum Mode {
    #[name = c"off"]
    Off,
    #[name = c"sampled"]
    Sampled,
    #[name = c"exact"]
    Exact,
}

impl Mode {
    pub fn parse(name: &str) -> Option<Mode> {
        [Mode::Off, Mode::Sampled, Mode::Exact].into_iter().find(|&m| Mode::name(m as u32) == name)
    }

    pub fn name(ordinal: u32) -> &'static str {
        ["off", "sampled", "exact"].get(ordinal as usize).copied().unwrap_or("off")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, PostgresGucEnum)]
pub enum Scope {
    #[name = c"session"]
    Session,
    #[name = c"all"]
    All,
}

static MODE: GucSetting<Mode> = GucSetting::<Mode>::new(Mode::Sampled);
static SCOPE: GucSetting<Scope> = GucSetting::<Scope>::new(Scope::Session);
static SAMPLE_BYTES: GucSetting<i32> = GucSetting::<i32>::new(4096);
static ADOPT_KB: GucSetting<i32> = GucSetting::<i32>::new(64 * 1024);
static WALK_INTERVAL_MS: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static MIN_LEAK_KB: GucSetting<i32> = GucSetting::<i32>::new(64);
static STACK_DEPTH: GucSetting<i32> = GucSetting::<i32>::new(48);
static MEMORY_LIMIT_KB: GucSetting<i32> = GucSetting::<i32>::new(32 * 1024);
static MAX_CALL_SITES: GucSetting<i32> = GucSetting::<i32>::new(131_072);
static LOG_LEAKS: GucSetting<bool> = GucSetting::<bool>::new(false);

/// The settings that a process follows between statements.
#[derive(Clone, Copy)]
pub struct Followed {
    pub mode: u32,
    pub sample_bytes: i32,
    /// In kB.
    pub memory_limit: i32,
    pub stack_depth: i32,
    /// In ms.
    pub walk_interval: i32,
    pub scope_all: bool,
}

impl Followed {
    /// Before anything is followed.
    pub const NONE: Followed =
        Followed { mode: 0, sample_bytes: 0, memory_limit: 0, stack_depth: 0, walk_interval: 0, scope_all: false };

    #[inline]
    pub fn now() -> Self {
        Followed {
            mode: raw(MODE.as_ptr()) as u32,
            sample_bytes: raw(SAMPLE_BYTES.as_ptr()),
            memory_limit: raw(MEMORY_LIMIT_KB.as_ptr()),
            stack_depth: raw(STACK_DEPTH.as_ptr()),
            walk_interval: raw(WALK_INTERVAL_MS.as_ptr()),
            scope_all: scope_all(),
        }
    }
}

/// So many wishes of others, and one, when this process last followed them and the settings; 0: a setting that processes
/// follow has been assigned since, or that has been undone.
static FOLLOWED: AtomicU64 = AtomicU64::new(0);

/// Whether the settings as they are, and so many wishes, are followed.
#[inline(always)]
pub fn are_followed(wishes: u32) -> bool {
    FOLLOWED.load(Relaxed) == wishes as u64 + 1
}

/// They are about to be.
pub fn follow(wishes: u32) {
    FOLLOWED.store(wishes as u64 + 1, Relaxed);
}

/// A process begins in which nobody has followed them yet.
pub fn begin() {
    FOLLOWED.store(0, Relaxed);
}

unsafe extern "C-unwind" fn assign(_value: c_int, _extra: *mut c_void) {
    FOLLOWED.store(0, Relaxed);
}

/// Reads the variable behind a setting without the thread check of `get`, which the hot path cannot afford.
fn raw<T: Copy>(pointer: *mut T) -> T {
    // SAFETY: the variable is a static of this library that the server writes between statements of this thread.
    unsafe { pointer.read_volatile() }
}

pub fn sample_bytes() -> u64 {
    raw(SAMPLE_BYTES.as_ptr()) as u64
}
pub fn scope_all() -> bool {
    raw(SCOPE.as_ptr()) == Scope::All as i32
}
pub fn adopt_bytes() -> u64 {
    raw(ADOPT_KB.as_ptr()) as u64 * 1024
}
pub fn walk_interval_ms() -> u64 {
    raw(WALK_INTERVAL_MS.as_ptr()) as u64
}
pub fn min_leak_bytes() -> u64 {
    raw(MIN_LEAK_KB.as_ptr()) as u64 * 1024
}
pub fn stack_depth() -> usize {
    raw(STACK_DEPTH.as_ptr()) as usize
}
pub fn memory_limit() -> usize {
    raw(MEMORY_LIMIT_KB.as_ptr()) as usize * 1024
}
pub fn max_call_sites() -> usize {
    raw(MAX_CALL_SITES.as_ptr()) as usize
}
pub fn log_leaks() -> bool {
    raw(LOG_LEAKS.as_ptr())
}

/// A lower bound with a hint, which the server's own range check does not give. The bounds that `define` passes to
/// the server are wide, so that this check speaks first.
struct Bounds {
    lowest: i32,
    highest: i32,
    hint: &'static core::ffi::CStr,
}

/// Copies a text into memory that outlives the check; the server frees nothing of it.
unsafe fn check(value: *mut c_int, bounds: &Bounds) -> bool {
    // SAFETY: the server passes the address of the proposed value; the strings that it reports are palloc'd in the
    // current context, as GUC_check_errhint does.
    unsafe {
        if (bounds.lowest..=bounds.highest).contains(&*value) {
            return true;
        }
        pg_sys::GUC_check_errhint_string = pg_sys::pstrdup(bounds.hint.as_ptr());
        false
    }
}

macro_rules! bounded {
    ($check:ident, $lowest:expr, $highest:expr, $hint:literal) => {
        unsafe extern "C-unwind" fn $check(
            value: *mut c_int,
            _extra: *mut *mut c_void,
            _source: pg_sys::GucSource::Type,
        ) -> bool {
            // SAFETY: the arguments are the server's.
            unsafe { check(value, &Bounds { lowest: $lowest, highest: $highest, hint: $hint }) }
        }
    };
}

bounded!(
    check_sample_bytes,
    1,
    1 << 30,
    c"Write a size from 1B to 1GB, for example '4kB'; 1B records nearly everything."
);
bounded!(check_adopt_bytes, 64, i32::MAX, c"Write a size of at least 64kB, for example '64MB'.");
bounded!(check_walk_interval, 10, 86_400_000, c"Write a time from 10ms to 1d, for example '10s'.");
bounded!(check_min_leak_bytes, 0, i32::MAX, c"Write a size of 0 or more, for example '64kB'.");
bounded!(check_stack_depth, 1, 64, c"Write a number of frames from 1 to 64.");
bounded!(check_memory_limit, 4096, i32::MAX, c"Write a size of at least 4MB, for example '32MB'.");
bounded!(
    check_max_call_sites,
    1024,
    1 << 24,
    c"Write a number from 1024 to 16777216; each takes about half a kilobyte when used."
);

/// Defines all settings. Called once, from `_PG_init`; `startup` says that the postmaster is starting.
pub fn define(startup: bool) {
    // SAFETY: for both, the assign hook only raises a flag.
    unsafe {
        GucRegistry::define_enum_guc_with_hooks(
            c"rheap.mode",
            c"Which allocations in watched memory contexts get a call stack.",
            c"off: none; sampled: a random sample by bytes, with unbiased estimates; exact: all.",
            &MODE,
            GucContext::Suset,
            GucFlags::default(),
            None,
            Some(assign),
            None,
        );
        GucRegistry::define_enum_guc_with_hooks(
            c"rheap.scope",
            c"Which memory contexts are watched.",
            c"session: those that outlive a transaction; all: transient contexts too, at a price.",
            &SCOPE,
            GucContext::Suset,
            GucFlags::default(),
            None,
            Some(assign),
            None,
        );
    }
    let integer = |name, short, long, setting, context, flags, check: pg_sys::GucIntCheckHook| {
        // SAFETY: the check hooks above follow the protocol of the server's check hooks.
        unsafe {
            GucRegistry::define_int_guc_with_hooks(
                name,
                short,
                long,
                setting,
                i32::MIN,
                i32::MAX,
                context,
                flags,
                check,
                Some(assign),
                None,
            )
        }
    };
    integer(
        c"rheap.sample_bytes",
        c"Mean number of bytes between two samples in sampled mode.",
        c"",
        &SAMPLE_BYTES,
        GucContext::Suset,
        GucFlags::UNIT_BYTE,
        Some(check_sample_bytes),
    );
    integer(
        c"rheap.adopt_bytes",
        c"A transient memory context that grows past this is watched from then on.",
        c"",
        &ADOPT_KB,
        GucContext::Suset,
        GucFlags::UNIT_KB,
        Some(check_adopt_bytes),
    );
    integer(
        c"rheap.walk_interval",
        c"How often a busy process walks its memory context tree.",
        c"",
        &WALK_INTERVAL_MS,
        GucContext::Suset,
        GucFlags::UNIT_MS,
        Some(check_walk_interval),
    );
    integer(
        c"rheap.min_leak_bytes",
        c"What holds less than this is not reported as a leak.",
        c"",
        &MIN_LEAK_KB,
        GucContext::Suset,
        GucFlags::UNIT_KB,
        Some(check_min_leak_bytes),
    );
    integer(
        c"rheap.stack_depth",
        c"Frames kept per call stack.",
        c"",
        &STACK_DEPTH,
        GucContext::Suset,
        GucFlags::default(),
        Some(check_stack_depth),
    );
    integer(
        c"rheap.memory_limit",
        c"Upper bound of rheap's own memory per process.",
        c"Past it, rheap follows a random part of the allocations and says so in rheap_processes.dropped.",
        &MEMORY_LIMIT_KB,
        GucContext::Suset,
        GucFlags::UNIT_KB,
        Some(check_memory_limit),
    );
    integer(
        c"rheap.max_call_sites",
        c"Capacity of the table of call sites that all processes share.",
        c"",
        &MAX_CALL_SITES,
        // The server refuses to define a postmaster's setting in a session, where it is fixed as well.
        if startup { GucContext::Postmaster } else { GucContext::SuBackend },
        GucFlags::default(),
        Some(check_max_call_sites),
    );
    GucRegistry::define_bool_guc(
        c"rheap.log_leaks",
        c"Write a line to the server log when a leak is first confirmed.",
        c"",
        &LOG_LEAKS,
        GucContext::Suset,
        GucFlags::default(),
    );
    // SAFETY: a plain call. Unknown settings of ours get a warning, as for every extension.
    unsafe { pg_sys::MarkGUCPrefixReserved(c"rheap".as_ptr()) };
}
