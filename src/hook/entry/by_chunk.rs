//! The free and the realloc of a server that finds them through the header of the chunk: from 16 on.

use super::*;

// Which allocator a chunk belongs to is in its header; the base table that the server found through it is
// known to the entry by its name alone.
macro_rules! entries {
    ($($kind:literal $free:ident $free_followed:ident $realloc:ident $realloc_from:ident),*) => {
        $(
            free!(
                $free(chunk: *mut c_void),
                "edi",
                $free_followed,
                "jmp [rip + {tables} + {original_free}]",
                tables = sym TABLES,
                original_free = const offset_of!(Tables, original) + $kind * size_of::<Methods>()
                    + offset_of!(Methods, free_p)
            );
            unsafe extern "C-unwind" fn $free_followed(chunk: *mut c_void) {
                // SAFETY: the server calls with a chunk of this allocator. Whether anybody follows it, the
                // ledger knows.
                unsafe {
                    if !process::freed_at_once(chunk as u64) && process::follows(chunk as u64) {
                        process::freed(chunk as u64);
                    }
                    let original: Free = tables::original($kind).free_p.unwrap_unchecked();
                    original(chunk)
                }
            }
            with_registers!($realloc => $realloc_from);
            unsafe extern "C-unwind" fn $realloc_from(chunk: *mut c_void, size: usize, flags: c_int, regs: Regs) -> *mut c_void {
                // SAFETY: as for free; the context is asked for before the chunk may be gone.
                unsafe {
                    let methods = tables::original($kind);
                    let context = methods.get_chunk_context.unwrap_unchecked()(chunk);
                    let original: Realloc = std::mem::transmute(methods.realloc);
                    let new = original(chunk, size, flags);
                    if !new.is_null() && tables::table_of(context) == tables::Table::Watch {
                        process::reallocated(context, chunk as u64, new as u64, size as u64, regs);
                    }
                    new
                }
            }
        )*
    };
}
entries!(
    0 free_0 free_followed_0 realloc_0 realloc_0_from,
    1 free_1 free_followed_1 realloc_1 realloc_1_from,
    2 free_2 free_followed_2 realloc_2 realloc_2_from
);

// Bump has no free and no realloc to replace: its places repeat the last and are not used.
pub const FREE: [Free; KIND_COUNT] = {
    let mut all = [free_2 as Free; KIND_COUNT];
    all[0] = free_0;
    all[1] = free_1;
    all
};
/// Chunks of watched contexts are freed like all others.
pub const FREE_EXACT: [Free; KIND_COUNT] = FREE;
pub const REALLOC: [*const (); KIND_COUNT] = {
    let mut all = [realloc_2 as *const (); KIND_COUNT];
    all[0] = realloc_0 as *const ();
    all[1] = realloc_1 as *const ();
    all
};
