//! What differs between major versions of the server. Nothing outside this file asks for the version.

use core::ffi::{CStr, c_char, c_int, c_void};
use pgrx::pg_sys;

pub use pg_sys::{MemoryContext, MemoryContextMethods as Methods};

/// Names of the allocators, by the index that rheap gives them.
pub const KINDS: [&str; 4] = ["AllocSet", "Generation", "Slab", "Bump"];

/// Allocators that this version has.
#[cfg(any(feature = "pg15", feature = "pg16"))]
pub const KIND_COUNT: usize = 3;
#[cfg(any(feature = "pg17", feature = "pg18"))]
pub const KIND_COUNT: usize = 4;

// The C ABI lets a caller pass more arguments than the callee takes, so the `flags` of 17 go along everywhere.
pub type Alloc = unsafe extern "C-unwind" fn(MemoryContext, usize, c_int) -> *mut c_void;

/// Up to 15 the context comes with the chunk and methods are looked up through it; from 16 on through the chunk's
/// header, in one array for all.
pub const DISPATCH_BY_CHUNK: bool = cfg!(not(feature = "pg15"));

#[cfg(feature = "pg15")]
pub type Free = unsafe extern "C-unwind" fn(MemoryContext, *mut c_void);
#[cfg(feature = "pg15")]
pub type Realloc = unsafe extern "C-unwind" fn(MemoryContext, *mut c_void, usize) -> *mut c_void;

#[cfg(not(feature = "pg15"))]
pub type Free = unsafe extern "C-unwind" fn(*mut c_void);
#[cfg(not(feature = "pg15"))]
pub type Realloc = unsafe extern "C-unwind" fn(*mut c_void, usize, c_int) -> *mut c_void;

/// The server's own method tables, by allocator.
///
/// # Safety
/// `TopMemoryContext` is set; called outside the hooks, since it may palloc.
#[cfg(feature = "pg15")]
pub unsafe fn base_tables() -> [*mut Methods; KIND_COUNT] {
    // SAFETY: the caller's promise.
    unsafe { tables_of_throw_away_contexts() }
}

#[cfg(not(feature = "pg15"))]
pub unsafe fn base_tables() -> [*mut Methods; KIND_COUNT] {
    // `mcxt_methods` is one array: AllocSet 3, Generation 4, Slab 5, aligned redirect 6, Bump 7.
    const INDEX: [isize; 4] = [3, 4, 5, 7];
    // SAFETY: TopMemoryContext is an AllocSet, so its table is entry 3; the others lie around it.
    let allocset = unsafe { (*pg_sys::TopMemoryContext).methods.cast_mut() };
    std::array::from_fn(|kind| allocset.wrapping_offset(INDEX[kind] - INDEX[0]))
}

/// The tables that a context of each kind points at, which shows where they are.
///
/// # Safety
/// As for `base_tables`.
pub unsafe fn tables_of_throw_away_contexts() -> [*mut Methods; KIND_COUNT] {
    // SAFETY: plain calls of the server's functions.
    unsafe {
        let top = pg_sys::TopMemoryContext;
        let contexts = [
            top,
            pg_sys::GenerationContextCreate(top, c"rheap".as_ptr(), 0, 8192, 8192),
            pg_sys::SlabContextCreate(top, c"rheap".as_ptr(), 8192, 64),
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            pg_sys::BumpContextCreate(top, c"rheap".as_ptr(), 0, 8192, 8192),
        ];
        let tables = contexts.map(|context| (*context).methods.cast_mut());
        contexts[1..].iter().for_each(|&context| pg_sys::MemoryContextDelete(context));
        tables
    }
}

/// Whether the layout of the method table fits the running server, as far as that can be asked: builds with
/// assertions have one member more, which the module magic does not cover.
pub fn layout_fits() -> Result<(), &'static str> {
    // SAFETY: the setting exists in every version; missing_ok makes it NULL otherwise.
    let assertions = unsafe {
        let value = pg_sys::GetConfigOption(c"debug_assertions".as_ptr(), true, false);
        !value.is_null() && CStr::from_ptr(value) == c"on"
    };
    let base = match () {
        _ if cfg!(feature = "pg15") => 8,
        _ => 9,
    };
    if size_of::<Methods>() / size_of::<usize>() == base + assertions as usize {
        Ok(())
    } else {
        Err("rheap was compiled for a server with other debug_assertions")
    }
}

/// Computes the id of a statement into its tree.
///
/// # Safety
/// From parse analysis, with its arguments. May raise an error, as the server's own call may.
pub unsafe fn jumble(state: *mut pg_sys::ParseState, query: *mut pg_sys::Query) -> *mut pg_sys::JumbleState {
    // The server asserts that somebody has asked for ids for every statement. An error in between, for want of memory,
    // leaves it at that: then the server computes them.
    // SAFETY: a variable of the server, in its only thread.
    let enabled = unsafe { std::ptr::replace(&raw mut pg_sys::query_id_enabled, true) };
    // SAFETY: the caller's promise.
    let state = unsafe { call_jumble(state, query) };
    // SAFETY: as above.
    unsafe { pg_sys::query_id_enabled = enabled };
    state
}

/// # Safety
/// As for `jumble`.
#[inline(always)]
unsafe fn call_jumble(state: *mut pg_sys::ParseState, query: *mut pg_sys::Query) -> *mut pg_sys::JumbleState {
    // Declared here, since the bindings' wrapper costs more than a small query's id.
    #[cfg(feature = "pg15")]
    // SAFETY: the caller's promise.
    unsafe {
        unsafe extern "C-unwind" {
            fn JumbleQuery(query: *mut pg_sys::Query, text: *const c_char) -> *mut pg_sys::JumbleState;
        }
        JumbleQuery(query, (*state).p_sourcetext)
    }
    #[cfg(not(feature = "pg15"))]
    // SAFETY: the caller's promise.
    unsafe {
        unsafe extern "C-unwind" {
            fn JumbleQuery(query: *mut pg_sys::Query) -> *mut pg_sys::JumbleState;
        }
        let _ = state;
        JumbleQuery(query)
    }
}

// Declared here, since the bindings' wrappers make panics of errors, which takes memory.
unsafe extern "C-unwind" {
    fn errstart(level: c_int, domain: *const c_char) -> bool;
    fn errcode(code: c_int) -> c_int;
    fn errmsg_internal(format: *const c_char, ...) -> c_int;
    fn errhint(format: *const c_char, ...) -> c_int;
    fn errfinish(file: *const c_char, line: c_int, function: *const c_char);
}

/// Writes a line to the server log, from wherever the server could. Nothing is interrupted for it: the server would
/// look for a cancel afterwards, in the middle of somebody's palloc. Takes no memory of Rust's.
pub fn log(line: &CStr) {
    // The server takes some kilobytes, and the postmaster dies of an error: without them there is no line.
    const ENOUGH: usize = 64 << 10;
    // SAFETY: calls of the server and of the C library with valid texts; the counter is the server's, in its thread.
    unsafe {
        let memory = libc::malloc(ENOUGH);
        if memory.is_null() {
            return;
        }
        libc::free(memory);
        pg_sys::InterruptHoldoffCount += 1;
        if errstart(pgrx::PgLogLevel::LOG as c_int, std::ptr::null()) {
            errmsg_internal(c"%s".as_ptr(), line.as_ptr());
            errfinish(c"rheap".as_ptr(), 0, std::ptr::null());
        }
        pg_sys::InterruptHoldoffCount -= 1;
    }
}

/// Raises the ERROR of a process that has no memory left, without any, and without unwinding: values on the way are
/// lost.
pub fn raise_out_of_memory() {
    // SAFETY: as above. The server's last handler is where it returns to.
    unsafe {
        if errstart(pgrx::PgLogLevel::ERROR as c_int, std::ptr::null()) {
            errcode(pgrx::PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY as c_int);
            errmsg_internal(c"out of memory".as_ptr());
            errhint(NO_MEMORY_HINT.as_ptr());
            errfinish(c"rheap".as_ptr(), 0, std::ptr::null());
        }
    }
}

/// What to do where an answer does not fit into memory.
pub const NO_MEMORY_HINT: &CStr =
    c"An answer takes up to some hundred megabytes for a moment. Ask from another session, or raise the limit of this process's address space.";

/// When the statement at hand began, or the last one; microseconds since 2000-01-01.
#[inline(always)]
pub fn statement_start() -> i64 {
    // Declared here, since the bindings' wrapper does much more than the function.
    unsafe extern "C-unwind" {
        fn GetCurrentStatementStartTimestamp() -> i64;
    }
    // SAFETY: returns a variable of the server.
    unsafe { GetCurrentStatementStartTimestamp() }
}

/// What goes on between two messages.
#[derive(Clone, Copy, PartialEq)]
pub enum Transaction {
    None,
    /// Nobody has begun it with a statement of its own: more messages are to come of a statement that is bound, described
    /// and executed by one each.
    Implicit,
    /// It has begun with BEGIN.
    Block,
}

/// Whether this process is certainly in no transaction at all.
#[inline(always)]
pub fn is_without_transaction() -> bool {
    // SAFETY: a plain read of the server's global.
    unsafe { pg_sys::TopTransactionContext.is_null() }
}

/// The transaction that this process is in.
#[inline(always)]
pub fn transaction() -> Transaction {
    // Declared here as above.
    unsafe extern "C-unwind" {
        fn IsTransactionOrTransactionBlock() -> bool;
        fn IsTransactionBlock() -> bool;
    }
    // SAFETY: both read a variable of the server.
    unsafe {
        match () {
            _ if !IsTransactionOrTransactionBlock() => Transaction::None,
            _ if !IsTransactionBlock() => Transaction::Implicit,
            _ => Transaction::Block,
        }
    }
}

/// This process is on its way out.
#[inline(always)]
pub fn is_exiting() -> bool {
    // SAFETY: a plain read of the server's global.
    unsafe { pg_sys::proc_exit_inprogress }
}

/// Where the id of the statement at hand is to be read before the process has a status entry.
pub static NO_QUERY_ID: i64 = 0;

/// The place of the id of the statement that this process runs.
pub fn query_id_place() -> *const i64 {
    // SAFETY: as for `query_id`.
    unsafe {
        let entry = pg_sys::MyBEEntry;
        if entry.is_null() { &raw const NO_QUERY_ID } else { (&raw const (*entry).st_query_id).cast() }
    }
}

/// Reads the id of the statement that this process runs, 0 where unknown.
#[inline]
pub fn query_id() -> i64 {
    // SAFETY: the entry is set once per process and stays mapped; the field is a plain integer of our own process.
    unsafe {
        let entry = pg_sys::MyBEEntry;
        if entry.is_null() { 0 } else { (*entry).st_query_id as i64 }
    }
}

/// True for processes that serve clients or run their work: many allocations, so that `sampled` samples them.
pub fn allocates_much(backend_type: pg_sys::BackendType::Type) -> bool {
    use pg_sys::BackendType::*;
    // Single-user mode has no type of its own before 16.
    #[cfg(not(feature = "pg15"))]
    if backend_type == B_STANDALONE_BACKEND {
        return true;
    }
    matches!(backend_type, B_INVALID | B_BACKEND | B_BG_WORKER | B_WAL_SENDER | B_AUTOVAC_WORKER)
}

/// The allocator of a context by its node tag; None for one that rheap does not know.
///
/// # Safety
/// A live context.
pub unsafe fn kind_of(context: MemoryContext) -> Option<usize> {
    // SAFETY: the caller's promise.
    match unsafe { (*context).type_ } {
        pg_sys::NodeTag::T_AllocSetContext => Some(0),
        pg_sys::NodeTag::T_GenerationContext => Some(1),
        pg_sys::NodeTag::T_SlabContext => Some(2),
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        pg_sys::NodeTag::T_BumpContext => Some(3),
        _ => None,
    }
}

/// True for processes that never wait for a client's message, so that only their allocations drive rheap.
pub fn has_no_messages(backend_type: i32) -> bool {
    use pg_sys::BackendType::*;
    // By hand: a compiler makes it a table, on a page that no new process has yet.
    const WITH_MESSAGES: u32 = 1 << B_INVALID | 1 << B_BACKEND | 1 << B_WAL_SENDER;
    const _: () = assert!(crate::share::slot::POSTMASTER < 0);
    !(0..32).contains(&backend_type) || WITH_MESSAGES >> backend_type & 1 == 0
}
