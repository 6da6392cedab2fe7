//! The base, pass and watch tables.

use std::cell::UnsafeCell;
use std::ptr;

use pgrx::pg_sys;

use crate::pg_compat::{DISPATCH_BY_CHUNK, Free, KIND_COUNT, MemoryContext, Methods, kind_of};

/// A table that contexts point at, and behind it what the server had there: an entry finds its original through
/// the context alone, without knowing the allocator.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Pair {
    pub active: Methods,
    pub original: Methods,
}

/// Among the pass tables, the one of MessageContext.
const BOUNDARY: usize = KIND_COUNT;
/// And that of ErrorContext.
const ERRORS: usize = KIND_COUNT + 1;

/// Names of contexts, as the server's pointers to them, that outlived their transient parent before.
pub const LEARNED: usize = 1024;

/// What each process writes comes last, before [`crate::process::PROCESS`].
#[repr(C)]
pub struct Tables {
    /// By the low bits of the pointer.
    pub learned: [*const core::ffi::c_char; LEARNED],
    /// By the lowest byte of the pointer, whether any such is learned: hardly ever, so that the names, on pages of their
    /// own, are not looked at.
    pub may_be_learned: [bool; 256],
    /// Bytes of the pass tables, behind `pass`: a context whose parent points in there is transient, without
    /// further questions. 0 when such questions must be asked.
    pub pass_span: usize,
    tick: *const (),
    /// The watch tables' `alloc` by [`Gap`], and their `free_p` where that is theirs.
    alloc: [*const (); 3],
    free: [Option<[Free; KIND_COUNT]>; 3],
    base: [*mut Methods; KIND_COUNT],
    /// What the base tables held before the patch.
    pub original: [Methods; KIND_COUNT],
    /// Behind those of the allocators that of MessageContext, an AllocSet's whose reset is noticed, and that of
    /// ErrorContext, which no tick gets into: signal handlers use it, at moments when the tree cannot be walked.
    pub pass: [Pair; KIND_COUNT + 2],
    pub watch: [Pair; KIND_COUNT],
    installed: bool,
}

#[repr(transparent)]
pub struct Global(UnsafeCell<std::mem::MaybeUninit<Tables>>);
// SAFETY: written by `patch`, `learn` and `ask_about_all`, in the single thread of a server process.
unsafe impl Sync for Global {}
/// Named for the hook's entries, which decide the commonest case by themselves.
pub static TABLES: Global = Global(UnsafeCell::new(std::mem::MaybeUninit::zeroed()));

#[inline]
fn tables() -> &'static Tables {
    // SAFETY: zeroed memory is a valid Tables (null pointers, None entries), and `patch` completes before any use.
    unsafe { (*TABLES.0.get()).assume_init_ref() }
}

/// What the hooks put into the tables, by allocator where the entry must know it.
pub struct Entries {
    pub first_touch: [*const (); KIND_COUNT],
    /// By one gap, and by the cell's.
    pub alloc: *const (),
    pub alloc_by_cell: *const (),
    /// The same where all are recorded; the second on processors that gather.
    pub alloc_exact: [*const (); 2],
    /// Met once by the next palloc in a context that passes, after `arm`.
    pub tick: *const (),
    /// For MessageContext.
    pub boundary: unsafe extern "C-unwind" fn(MemoryContext),
    pub reset: unsafe extern "C-unwind" fn(MemoryContext),
    pub delete: unsafe extern "C-unwind" fn(MemoryContext),
    pub free: [Free; KIND_COUNT],
    /// The same for chunks of watched contexts where all are recorded.
    pub free_exact: [Free; KIND_COUNT],
    pub realloc: [*const (); KIND_COUNT],
}
// SAFETY: pointers to functions.
unsafe impl Sync for Entries {}

/// Whether `patch` has succeeded in this process or an ancestor.
pub fn is_hooked() -> bool {
    tables().installed
}

/// Fills the copies and replaces the entries of the base tables.
///
/// # Safety
/// `bases` are the server's tables, checked; nothing is inside them now.
pub unsafe fn patch(bases: [*mut Methods; KIND_COUNT], entries: &Entries) -> Result<(), String> {
    // SAFETY: single-threaded; no context points at our copies yet.
    let tables = unsafe { (*TABLES.0.get()).assume_init_mut() };
    let as_alloc = |p: *const ()| {
        // SAFETY: the entry has the C ABI of the table's member; one argument more does no harm (see pg_compat).
        unsafe { std::mem::transmute_copy(&p) }
    };
    // A child has what its parent has written, and need not be given it when it looks there.
    tables.learned.fill(ptr::null());
    tables.base = bases;
    tables.tick = entries.tick;
    let alloc_exact = entries.alloc_exact[crate::stack::Stacks::gathers() as usize];
    tables.alloc = [entries.alloc, entries.alloc_by_cell, alloc_exact];
    if !DISPATCH_BY_CHUNK {
        tables.free = [Some(entries.free), Some(entries.free), Some(entries.free_exact)];
    }
    for (kind, base) in bases.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        let original = unsafe { *base };
        tables.original[kind] = original;
        tables.pass[kind] = Pair { active: original, original };
        let mut watch = original;
        watch.alloc = as_alloc(entries.alloc);
        watch.reset = Some(entries.reset);
        watch.delete_context = Some(entries.delete);
        if !DISPATCH_BY_CHUNK {
            watch.free_p = Some(entries.free[kind]);
            watch.realloc = realloc_entry(entries.realloc[kind]);
        }
        tables.watch[kind] = Pair { active: watch, original };
    }
    tables.pass[BOUNDARY] = tables.pass[0];
    tables.pass[BOUNDARY].active.reset = Some(entries.boundary);
    tables.pass[ERRORS] = tables.pass[0];
    tables.pass_span = size_of_val(&tables.pass);

    let before = bases.map(protection_of);
    // All pages first, so that a refusal leaves every table as it was.
    for base in bases {
        protect(base, libc::PROT_READ | libc::PROT_WRITE)?;
    }
    for (kind, base) in bases.into_iter().enumerate() {
        // SAFETY: the page is writable now; each store is one aligned pointer, so a signal handler that pallocs
        // meets either the old or the new entry.
        unsafe {
            ptr::addr_of_mut!((*base).alloc).write_volatile(as_alloc(entries.first_touch[kind]));
            // Bump has neither: its entries only raise an error.
            if DISPATCH_BY_CHUNK && kind < 3 {
                ptr::addr_of_mut!((*base).free_p).write_volatile(Some(entries.free[kind]));
                ptr::addr_of_mut!((*base).realloc).write_volatile(realloc_entry(entries.realloc[kind]));
            }
        }
    }
    for (base, before) in bases.into_iter().zip(before) {
        protect(base, before)?;
    }
    tables.installed = true;
    Ok(())
}

type ReallocMember = Option<<ReallocOf as Member>::F>;
/// The exact type of the table's `realloc` member, which differs between versions in its number of arguments.
trait Member {
    type F;
}
struct ReallocOf;
#[cfg(any(feature = "pg15", feature = "pg17", feature = "pg18"))]
impl Member for ReallocOf {
    type F = crate::pg_compat::Realloc;
}
#[cfg(feature = "pg16")]
impl Member for ReallocOf {
    type F = unsafe extern "C-unwind" fn(*mut core::ffi::c_void, usize) -> *mut core::ffi::c_void;
}

fn realloc_entry(entry: *const ()) -> ReallocMember {
    // SAFETY: a function pointer of the same ABI; see pg_compat on the number of arguments.
    unsafe { std::mem::transmute(entry) }
}

/// How the page that a table begins on is protected. What is not known for certain becomes a constant's.
fn protection_of(table: *mut Methods) -> libc::c_int {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mapping = crate::proc_maps::parse(&maps).find(|m| (m.start..m.end).contains(&(table as u64)));
    let allows = |letter| mapping.as_ref().is_some_and(|m| m.access.contains(letter));
    let protection = |letter, protection| if allows(letter) { protection } else { 0 };
    libc::PROT_READ | protection('w', libc::PROT_WRITE) | protection('x', libc::PROT_EXEC)
}

fn protect(table: *mut Methods, protection: libc::c_int) -> Result<(), String> {
    let page = 4096;
    let start = table as usize / page * page;
    let end = (table as usize + size_of::<Methods>()).next_multiple_of(page);
    // SAFETY: changes only the protection of pages that hold the server's constants.
    if unsafe { libc::mprotect(start as *mut _, end - start, protection) } != 0 {
        return Err(format!("the server's method table cannot be made writable: {}", std::io::Error::last_os_error()));
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
pub enum Table {
    Base,
    Pass,
    Watch,
    /// Not one of ours: somebody else's hook. Left alone.
    Foreign,
}

/// Whether first touch must look at every context by itself: none is transient for its parent's sake.
pub fn ask_about_all(all: bool) {
    // SAFETY: the server's thread; the hook's entries only read it.
    let tables = unsafe { (*TABLES.0.get()).assume_init_mut() };
    tables.pass_span = if all { 0 } else { size_of_val(&tables.pass) };
}

/// What tells that an allocation in a watched context is to be recorded.
#[derive(Clone, Copy)]
pub enum Gap {
    /// One count of bytes for all of the process's.
    OfProcess,
    /// One for each cell of callers.
    OfCell,
    /// Nothing: all are recorded.
    None,
}

/// From now on this tells which allocations are recorded.
pub fn record_by(gap: Gap) {
    // SAFETY: the server's thread, outside the entries that this replaces.
    let tables = unsafe { (*TABLES.0.get()).assume_init_mut() };
    if !tables.installed {
        return;
    }
    for kind in 0..KIND_COUNT {
        let watch = &mut tables.watch[kind].active;
        // SAFETY: as in `patch`.
        watch.alloc = unsafe { std::mem::transmute_copy(&tables.alloc[gap as usize]) };
        if let Some(free) = &tables.free[gap as usize] {
            // SAFETY: the member has this type where the table has its own frees; see `patch`.
            watch.free_p = unsafe { std::mem::transmute_copy(&free[kind]) };
        }
    }
}

/// Puts the tick into the pass tables, or takes it out again.
fn set_pass_alloc(armed: bool) {
    let tables = TABLES.0.get().cast::<Tables>();
    for kind in 0..ERRORS {
        // SAFETY: `patch` has filled the tables. Each store is one aligned pointer, so that a palloc in progress meets
        // the one or the other; nothing else reads the entry.
        unsafe {
            let pair = ptr::addr_of_mut!((*tables).pass[kind]);
            let alloc = if armed { std::mem::transmute_copy(&(*tables).tick) } else { (*pair).original.alloc };
            ptr::addr_of_mut!((*pair).active.alloc).write_volatile(alloc);
        }
    }
}

/// The next palloc in a context that passes is a tick. Safe in a signal handler.
pub fn arm() {
    set_pass_alloc(true);
}

/// Contexts that pass are left alone again.
pub fn disarm() {
    set_pass_alloc(false);
}

/// From now on contexts of this name are watched from birth. Of two names that fall into one place the first stays.
pub fn learn(name: *const core::ffi::c_char) {
    // SAFETY: as for `ask_about_all`.
    let tables = unsafe { (*TABLES.0.get()).assume_init_mut() };
    let place = &mut tables.learned[name as usize % LEARNED];
    if place.is_null() {
        *place = name;
        tables.may_be_learned[name as usize % 256] = true;
    }
}

/// Whether contexts of this name outlived their transient parent before.
#[inline]
pub fn is_learned(name: *const core::ffi::c_char) -> bool {
    !name.is_null() && tables().learned[name as usize % LEARNED] == name
}

/// Which table a context points at.
///
/// # Safety
/// A live context.
#[inline]
pub unsafe fn table_of(context: MemoryContext) -> Table {
    let t = tables();
    // SAFETY: the caller's promise.
    let methods = unsafe { (*context).methods } as usize;
    let within = |pairs: &[Pair]| methods.wrapping_sub(pairs.as_ptr() as usize) < size_of_val(pairs);
    if within(&t.pass) {
        Table::Pass
    } else if within(&t.watch) {
        Table::Watch
    } else if t.base.iter().any(|&b| b as usize == methods) {
        Table::Base
    } else {
        Table::Foreign
    }
}

/// Points a context of ours at its watch table.
///
/// # Safety
/// A live context.
pub unsafe fn watch(context: MemoryContext) {
    // SAFETY: the caller's promise; the copies live as long as the process.
    unsafe {
        if let Some(kind) = kind_of(context) {
            (*context).methods = &tables().watch[kind].active;
        }
    }
}

/// Points a context of ours at its pass table.
///
/// # Safety
/// A live context.
pub unsafe fn pass(context: MemoryContext) {
    // SAFETY: the caller's promise; plain reads of the server's globals.
    unsafe {
        let table = match kind_of(context) {
            Some(0) if context == pg_sys::MessageContext => BOUNDARY,
            Some(0) if context == pg_sys::ErrorContext => ERRORS,
            Some(kind) => kind,
            None => return,
        };
        (*context).methods = &tables().pass[table].active;
    }
}

/// What the server had in the table that a context points at; for contexts on pass or watch.
///
/// # Safety
/// A live context that `table_of` says is on pass or watch.
#[inline]
pub unsafe fn original_of(context: MemoryContext) -> &'static Methods {
    // SAFETY: both kinds of table are the first half of a Pair.
    unsafe { &(*(*context).methods.cast::<Pair>()).original }
}

/// What the server had in the base table of an allocator.
#[inline]
pub fn original(kind: usize) -> &'static Methods {
    &tables().original[kind]
}
