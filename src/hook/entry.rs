//! What the server calls in place of its own entries. Every word here runs inside somebody's palloc: no palloc, no
//! malloc, no lock, no value with a destructor across the original call, which may raise an error and not return.

use core::ffi::{c_int, c_void};
use pgrx::pg_sys;

use super::tables::{self, Entries};
use super::touch;
use crate::pg_compat::{Alloc, Free, KIND_COUNT, MemoryContext, Realloc};
use crate::process;
use crate::stack::Regs;

/// An entry that hands its arguments on, and with them where the caller's frame is: the registers are still the
/// caller's, so no frame of rheap's own has to be unwound.
macro_rules! with_registers {
    ($name:ident => $to:path) => {
        #[unsafe(naked)]
        unsafe extern "C-unwind" fn $name() {
            core::arch::naked_asm!("mov rcx, rsp", "mov r8, rbp", "jmp {to}", to = sym $to)
        }
    };
}

with_registers!(first_touch => first_touch_from);
with_registers!(alloc => alloc_from);

pub static ENTRIES: Entries = Entries {
    first_touch: first_touch as *const (),
    alloc: alloc as *const (),
    reset,
    delete,
    free: FREE,
    realloc: REALLOC,
};

/// The server's own `alloc` of a context that points at one of our tables.
///
/// # Safety
/// As for `original_of`.
#[inline(always)]
unsafe fn original_alloc(context: MemoryContext, size: usize, flags: c_int) -> *mut c_void {
    // SAFETY: the member is a function of this ABI, never NULL in a table that passed the self-check.
    unsafe {
        let alloc: Alloc = std::mem::transmute(tables::original_of(context).alloc);
        alloc(context, size, flags)
    }
}

unsafe extern "C-unwind" fn first_touch_from(
    context: MemoryContext,
    size: usize,
    flags: c_int,
    sp: u64,
    bp: u64,
) -> *mut c_void {
    // SAFETY: the server calls with a live context whose table is a base table; `decide` changes that.
    unsafe {
        touch::decide(context);
        match tables::table_of(context) {
            tables::Table::Watch => alloc_from(context, size, flags, sp, bp),
            tables::Table::Pass => original_alloc(context, size, flags),
            // Somebody copied a base table after us and points contexts at the copy.
            tables::Table::Base | tables::Table::Foreign => {
                let kind = crate::pg_compat::kind_of(context).unwrap_or(0);
                let alloc: Alloc = std::mem::transmute(tables::original(kind).alloc);
                alloc(context, size, flags)
            }
        }
    }
}

unsafe extern "C-unwind" fn alloc_from(
    context: MemoryContext,
    size: usize,
    flags: c_int,
    sp: u64,
    bp: u64,
) -> *mut c_void {
    // SAFETY: the server calls with a live context on a watch table. Up to 16 NULL means out of memory.
    unsafe {
        let chunk = original_alloc(context, size, flags);
        if !chunk.is_null() {
            process::allocated(context, chunk as u64, size as u64, Regs { sp, bp });
        }
        chunk
    }
}

unsafe extern "C-unwind" fn reset(context: MemoryContext) {
    // SAFETY: the server calls with a live context on a watch or boundary table.
    unsafe {
        let original = tables::original_of(context).reset.unwrap_unchecked();
        process::context_reset(context);
        original(context);
        if context == pg_sys::MessageContext {
            process::message_done();
        }
    }
}

unsafe extern "C-unwind" fn delete(context: MemoryContext) {
    // SAFETY: as for reset. The original may call reset on the same context, which is unknown by then.
    unsafe {
        let original = tables::original_of(context).delete_context.unwrap_unchecked();
        process::context_deleted(context);
        original(context);
    }
}

#[cfg(feature = "pg15")]
mod dispatch {
    use super::*;

    with_registers!(realloc => realloc_from);
    pub const FREE: [Free; KIND_COUNT] = [free; KIND_COUNT];
    pub const REALLOC: [*const (); KIND_COUNT] = [realloc as *const (); KIND_COUNT];

    unsafe extern "C-unwind" fn free(context: MemoryContext, chunk: *mut c_void) {
        // SAFETY: the server calls with a live context on a watch table and a chunk of it.
        unsafe {
            let original: Free = tables::original_of(context).free_p.unwrap_unchecked();
            process::freed(chunk as u64);
            original(context, chunk);
        }
    }

    unsafe extern "C-unwind" fn realloc_from(
        context: MemoryContext,
        chunk: *mut c_void,
        size: usize,
        sp: u64,
        bp: u64,
    ) -> *mut c_void {
        // SAFETY: as for free. On NULL the old chunk is still there.
        unsafe {
            let original: Realloc = tables::original_of(context).realloc.unwrap_unchecked();
            let new = original(context, chunk, size);
            if !new.is_null() {
                process::reallocated(context, chunk as u64, new as u64, size as u64, Regs { sp, bp });
            }
            new
        }
    }
}

#[cfg(not(feature = "pg15"))]
mod dispatch {
    use super::*;

    // Which allocator a chunk belongs to is in its header; the base table that the server found through it is
    // known to the entry by its name alone.
    macro_rules! entries {
        ($($kind:literal $free:ident $realloc:ident $realloc_from:ident),*) => {
            $(
                unsafe extern "C-unwind" fn $free(chunk: *mut c_void) {
                    // SAFETY: the server calls with a chunk of this allocator. Whether anybody watches it, the
                    // ledger knows: a chunk without a record has nothing to end.
                    unsafe {
                        process::freed(chunk as u64);
                        let original: Free = tables::original($kind).free_p.unwrap_unchecked();
                        original(chunk)
                    }
                }
                with_registers!($realloc => $realloc_from);
                unsafe extern "C-unwind" fn $realloc_from(chunk: *mut c_void, size: usize, flags: c_int, sp: u64, bp: u64) -> *mut c_void {
                    // SAFETY: as for free; the context is asked for before the chunk may be gone.
                    unsafe {
                        let methods = tables::original($kind);
                        let context = methods.get_chunk_context.unwrap_unchecked()(chunk);
                        let original: Realloc = std::mem::transmute(methods.realloc);
                        let new = original(chunk, size, flags);
                        if !new.is_null() && tables::table_of(context) == tables::Table::Watch {
                            process::reallocated(context, chunk as u64, new as u64, size as u64, Regs { sp, bp });
                        }
                        new
                    }
                }
            )*
        };
    }
    entries!(0 free_0 realloc_0 realloc_0_from, 1 free_1 realloc_1 realloc_1_from, 2 free_2 realloc_2 realloc_2_from);

    // Bump has no free and no realloc to replace: its places repeat the last and are not used.
    pub const FREE: [Free; KIND_COUNT] = {
        let mut all = [free_2 as Free; KIND_COUNT];
        all[0] = free_0;
        all[1] = free_1;
        all
    };
    pub const REALLOC: [*const (); KIND_COUNT] = {
        let mut all = [realloc_2 as *const (); KIND_COUNT];
        all[0] = realloc_0 as *const ();
        all[1] = realloc_1 as *const ();
        all
    };
}
use dispatch::{FREE, REALLOC};
