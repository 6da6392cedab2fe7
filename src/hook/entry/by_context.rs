//! The free and the realloc of a server that finds them through the context: up to 15.

use super::*;

with_registers!(realloc => realloc_from);
pub const FREE: [Free; KIND_COUNT] = [free; KIND_COUNT];
pub const FREE_EXACT: [Free; KIND_COUNT] = [free_exact; KIND_COUNT];
pub const REALLOC: [*const (); KIND_COUNT] = [realloc as *const (); KIND_COUNT];

free!(
    free(context: MemoryContext, chunk: *mut c_void),
    "esi",
    free_followed,
    "mov rax, [rdi + {methods}]",
    "jmp [rax + {original_free}]",
    methods = const METHODS,
    original_free = const ORIGINAL + offset_of!(Methods, free_p)
);

unsafe extern "C-unwind" fn free_followed(context: MemoryContext, chunk: *mut c_void) {
    // SAFETY: the server calls with a live context on a watch table and a chunk of it.
    unsafe {
        if process::follows(chunk as u64) {
            process::freed(chunk as u64);
        }
        let original: Free = tables::original_of(context).free_p.unwrap_unchecked();
        original(context, chunk);
    }
}

unsafe extern "C-unwind" fn free_exact(context: MemoryContext, chunk: *mut c_void) {
    // SAFETY: as for `free_followed`.
    unsafe {
        if !process::freed_at_once(chunk as u64) {
            return free_followed(context, chunk);
        }
        let original: Free = tables::original_of(context).free_p.unwrap_unchecked();
        original(context, chunk);
    }
}

unsafe extern "C-unwind" fn realloc_from(
    context: MemoryContext,
    chunk: *mut c_void,
    size: usize,
    regs: Regs,
) -> *mut c_void {
    // SAFETY: as for free. On NULL the old chunk is still there.
    unsafe {
        let original: Realloc = tables::original_of(context).realloc.unwrap_unchecked();
        let new = original(context, chunk, size);
        if !new.is_null() {
            process::reallocated(context, chunk as u64, new as u64, size as u64, regs);
        }
        new
    }
}
