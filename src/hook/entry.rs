//! What the server calls in place of its own entries. Every word here runs inside somebody's palloc: no palloc, no
//! malloc, no lock, no value with a destructor across the original call, which may raise an error and not return.
//!
//! The commonest case of each entry is decided in a handful of instructions, without a frame: the server's own
//! function is jumped to, and returns to the server. Everything else goes to a function of Rust, which is told where
//! the caller's frame is: the registers are still the caller's, so no frame of rheap's own has to be unwound.

use core::ffi::{c_int, c_void};
use core::mem::offset_of;
use pgrx::pg_sys::{self, MemoryContextData};

use super::tables::{self, Entries, Pair, TABLES, Tables};
use super::touch;
use crate::ledger::{Ledger, cells, filter};
use crate::pg_compat::{Alloc, Free, KIND_COUNT, MemoryContext, Methods, Realloc};
use crate::process::{self, PROCESS, Process};
use crate::stack::{Regs, Stacks, callers};

const METHODS: usize = offset_of!(MemoryContextData, methods);
const ORIGINAL: usize = offset_of!(Pair, original);
const ORIGINAL_ALLOC: usize = ORIGINAL + offset_of!(Methods, alloc);
const GAP: usize = offset_of!(Process, ledger) + offset_of!(Ledger, gap);
const GAPS: usize = offset_of!(Process, ledger) + offset_of!(Ledger, cells) + offset_of!(cells::Cells, gaps);
const FILTER: usize = offset_of!(Process, ledger) + offset_of!(Ledger, filter);
const CALLERS: usize = offset_of!(Process, stacks) + offset_of!(Stacks, callers);
/// The place of an address in the filter is its low 32 bits, times the one, shifted right by the other.
const FILTER_LEFT: u32 = 1 << (32 - filter::GRAIN - filter::PLACES.ilog2());
const FILTER_RIGHT: u32 = 32 - filter::PLACES.ilog2();
// On one page, with a line to spare for what else lies between the two: see hot.ld.
const _: () = assert!(
    offset_of!(Tables, may_be_learned).is_multiple_of(4096)
        && size_of::<Tables>() - offset_of!(Tables, may_be_learned)
            + offset_of!(Process, ledger)
            + offset_of!(Ledger, pending)
            < 4096 - 64
);
// The entries below compute by shifts and masks.
const _: () = assert!(callers::CALLERS == 256);
const _: () = assert!(cells::CELLS.is_power_of_two() && filter::PLACES.is_power_of_two());

/// An entry that hands its arguments on, and with them where the caller's frame is.
macro_rules! with_registers {
    ($name:ident => $to:path) => {
        #[unsafe(naked)]
        unsafe extern "C-unwind" fn $name() {
            core::arch::naked_asm!("mov rcx, rsp", "mov r8, rbp", "jmp {to}", to = sym $to)
        }
    };
}

/// The first palloc of a context of one allocator: a context whose parent is transient, and whose name is not one of
/// those that outlived their parents before, points at its pass table from now on; one among the caches, as most that a
/// session makes at its start, at its watch table. What that table has is called then, as it will be the next time.
macro_rules! first_touch {
    ($name:ident, $kind:literal) => {
        #[unsafe(naked)]
        unsafe extern "C-unwind" fn $name() {
            core::arch::naked_asm!(
                "mov rcx, [rdi + {parent}]",
                "test rcx, rcx",
                "jz 4f",
                "mov rax, [rcx + {methods}]",
                "lea r9, [rip + {tables} + {pass}]",
                "sub rax, r9",
                "cmp rax, [rip + {tables} + {span}]",
                "jae 2f",
                "movzx eax, byte ptr [rdi + {context_name}]",
                "cmp byte ptr [r9 + rax + {may_be_learned}], 0",
                "jne 5f",
                "1:",
                ".if {pair}",
                "add r9, {pair}",
                ".endif",
                "mov [rdi + {methods}], r9",
                "jmp [r9 + {active_alloc}]",
                "2:",
                "cmp qword ptr [rip + {tables} + {span}], 0",
                "je 4f",
                // The one context of each statement whose parent does not tell.
                "mov rax, [rip + {transaction}@GOTPCREL]",
                "cmp rdi, [rax]",
                "jne 3f",
                "lea rax, [rip + {tables} + {pass} + {pair}]",
                "mov [rdi + {methods}], rax",
                "jmp [rax + {active_alloc}]",
                "3:",
                "mov rax, [rip + {caches}@GOTPCREL]",
                "cmp rcx, [rax]",
                "jne 4f",
                "lea rax, [rip + {tables} + {watch} + {pair}]",
                "mov [rdi + {methods}], rax",
                "jmp [rax + {active_alloc}]",
                "5:",
                "mov r10, [rdi + {context_name}]",
                "mov eax, r10d",
                "and eax, {learned_mask}",
                "cmp [r9 + rax * 8 + {learned}], r10",
                "jne 1b",
                "4:",
                "mov rcx, rsp",
                "mov r8, rbp",
                "jmp {slow}",
                transaction = sym pg_sys::TopTransactionContext,
                caches = sym pg_sys::CacheMemoryContext,
                parent = const offset_of!(MemoryContextData, parent),
                context_name = const offset_of!(MemoryContextData, name),
                methods = const METHODS,
                tables = sym TABLES,
                pass = const offset_of!(Tables, pass),
                watch = const offset_of!(Tables, watch),
                span = const offset_of!(Tables, pass_span),
                learned = const offset_of!(Tables, learned) as isize - offset_of!(Tables, pass) as isize,
                may_be_learned = const offset_of!(Tables, may_be_learned) as isize - offset_of!(Tables, pass) as isize,
                learned_mask = const tables::LEARNED - 1,
                pair = const $kind * size_of::<Pair>(),
                active_alloc = const offset_of!(Pair, active) + offset_of!(Methods, alloc),
                slow = sym first_touch_from,
            )
        }
    };
}
first_touch!(first_touch_0, 0);
first_touch!(first_touch_1, 1);
first_touch!(first_touch_2, 2);
#[cfg(not(any(feature = "pg15", feature = "pg16")))]
first_touch!(first_touch_3, 3);

/// An allocation in a watched context where one gap is for all: takes it off that, and is done if some is left.
#[unsafe(naked)]
unsafe extern "C-unwind" fn alloc() {
    core::arch::naked_asm!(
        "sub qword ptr [rip + {process} + {gap}], rsi",
        "jle 3f",
        "inc qword ptr [rip + {process} + {passed}]",
        "mov rax, [rdi + {methods}]",
        "jmp [rax + {original_alloc}]",
        "3:",
        "mov rcx, rsp",
        "mov r8, rbp",
        "jmp {slow}",
        process = sym PROCESS,
        gap = const GAP,
        passed = const offset_of!(Process, passed),
        methods = const METHODS,
        original_alloc = const ORIGINAL_ALLOC,
        slow = sym alloc_from_process,
    )
}

/// The same where each cell has a gap.
///
/// The cell is that of `Callers::key`: the first return address, mixed with the second if that lies at a known place.
#[unsafe(naked)]
unsafe extern "C-unwind" fn alloc_by_cell() {
    core::arch::naked_asm!(
        "mov rax, [rsp]",
        "lea r10, [rip + {process}]",
        "movzx r9d, al",
        "cmp [r10 + r9 * 8 + {addresses}], rax",
        "jne 2f",
        "movzx r9d, word ptr [r10 + r9 * 2 + {offsets}]",
        "xor rax, [rsp + r9]",
        "2:",
        "and eax, {cell_mask}",
        "sub [r10 + rax * 8 + {gaps}], rsi",
        "jle 3f",
        "inc qword ptr [r10 + {passed}]",
        "mov rax, [rdi + {methods}]",
        "jmp [rax + {original_alloc}]",
        "3:",
        "mov rcx, rsp",
        "mov r8, rbp",
        "mov r9d, eax",
        "jmp {slow}",
        process = sym PROCESS,
        addresses = const CALLERS + offset_of!(callers::Callers, addresses),
        offsets = const CALLERS + offset_of!(callers::Callers, offsets),
        cell_mask = const cells::CELLS - 1,
        gaps = const GAPS,
        passed = const offset_of!(Process, passed),
        methods = const METHODS,
        original_alloc = const ORIGINAL_ALLOC,
        slow = sym alloc_from,
    )
}

/// An allocation in a watched context when all of them are recorded. No register but the stack pointer has to be saved
/// across the original call for what follows, so the frame pointer is still the caller's then.
macro_rules! alloc_exact {
    ($name:ident => $to:path) => {
        #[unsafe(naked)]
        unsafe extern "C-unwind" fn $name() {
            core::arch::naked_asm!(
                ".cfi_startproc",
                "sub rsp, 24",
                ".cfi_adjust_cfa_offset 24",
                "mov [rsp], rdi",
                "mov [rsp + 8], rsi",
                "mov rax, [rdi + {methods}]",
                "call [rax + {original_alloc}]",
                "mov rdi, [rsp]",
                "mov rsi, [rsp + 8]",
                "add rsp, 24",
                ".cfi_adjust_cfa_offset -24",
                "mov rdx, rax",
                "mov rcx, rsp",
                "mov r8, rbp",
                "jmp {to}",
                ".cfi_endproc",
                methods = const METHODS,
                original_alloc = const ORIGINAL_ALLOC,
                to = sym $to,
            )
        }
    };
}
alloc_exact!(alloc_exact => allocated_exact::<false>);
alloc_exact!(alloc_exact_gathering => allocated_exact::<true>);

/// The free of a chunk, which is in `$chunk`: the server's own, by `$original`, if the filter says that nobody follows it.
macro_rules! free {
    ($name:ident($($argument:ident: $type:ty),*), $chunk:literal, $followed:path, $($original:tt)*) => {
        #[unsafe(naked)]
        unsafe extern "C-unwind" fn $name($($argument: $type),*) {
            core::arch::naked_asm!(
                // The bits above the place's are shifted out at the left.
                concat!("imul eax, ", $chunk, ", {left}"),
                "shr eax, {right}",
                "lea rcx, [rip + {process} + {filter}]",
                "cmp byte ptr [rcx + rax], 0",
                "jne {followed}",
                $($original)*,
                left = const FILTER_LEFT,
                right = const FILTER_RIGHT,
                process = sym PROCESS,
                filter = const FILTER,
                followed = sym $followed,
            )
        }
    };
}

pub static ENTRIES: Entries = Entries {
    first_touch: [
        first_touch_0 as *const (),
        first_touch_1 as *const (),
        first_touch_2 as *const (),
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        (first_touch_3 as *const ()),
    ],
    alloc: alloc as *const (),
    alloc_by_cell: alloc_by_cell as *const (),
    alloc_exact: [alloc_exact as *const (), alloc_exact_gathering as *const ()],
    tick: tick as *const (),
    boundary,
    reset,
    delete,
    free: FREE,
    free_exact: FREE_EXACT,
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
    regs: Regs,
) -> *mut c_void {
    // SAFETY: the server calls with a live context whose table is a base table; `decide` changes that.
    unsafe {
        process::touched();
        match touch::decide(context) {
            tables::Table::Watch => {
                let chunk = original_alloc(context, size, flags);
                if !chunk.is_null() {
                    process::allocated_unspent(context, chunk as u64, size as u64, regs);
                }
                chunk
            }
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

unsafe extern "C-unwind" fn alloc_from_process(
    context: MemoryContext,
    size: usize,
    flags: c_int,
    regs: Regs,
) -> *mut c_void {
    // SAFETY: the server calls with a live context on a watch table; the registers are the caller's.
    unsafe { alloc_from(context, size, flags, regs, process::cell(regs) as u32) }
}

unsafe extern "C-unwind" fn alloc_from(
    context: MemoryContext,
    size: usize,
    flags: c_int,
    regs: Regs,
    cell: u32,
) -> *mut c_void {
    // SAFETY: the server calls with a live context on a watch table. Up to 16 NULL means out of memory.
    unsafe {
        let chunk = original_alloc(context, size, flags);
        if !chunk.is_null() {
            process::allocated(context, chunk as u64, size as u64, regs, cell as u16);
        }
        chunk
    }
}

/// After the original call, which has returned `chunk`. All that is not the commonest case is jumped to, so that no
/// register has to be saved for it.
unsafe extern "C-unwind" fn allocated_exact<const GATHER: bool>(
    context: MemoryContext,
    size: usize,
    chunk: *mut c_void,
    regs: Regs,
) -> *mut c_void {
    if chunk.is_null() {
        return chunk;
    }
    // SAFETY: as for `alloc_from`. The frame pointer is the caller's.
    unsafe { process::allocated_again::<GATHER>(context, chunk, size as u64, regs) }
}

/// A palloc in a context that passes, after the timer has armed the pass tables.
unsafe extern "C-unwind" fn tick(context: MemoryContext, size: usize, flags: c_int) -> *mut c_void {
    // SAFETY: the server calls with a live context on a pass table; at the exit of a palloc the tree is consistent.
    unsafe {
        tables::disarm();
        let chunk = original_alloc(context, size, flags);
        process::tick();
        chunk
    }
}

/// Between two statements: MessageContext is reset.
unsafe extern "C-unwind" fn boundary(context: MemoryContext) {
    // SAFETY: the server calls with MessageContext, on its boundary table.
    unsafe {
        let original = tables::original_of(context).reset.unwrap_unchecked();
        original(context);
        process::message_done();
    }
}

/// Any other context on a watch table is reset.
unsafe extern "C-unwind" fn reset(context: MemoryContext) {
    // SAFETY: the server calls with a live context on a watch table.
    unsafe {
        let original = tables::original_of(context).reset.unwrap_unchecked();
        process::context_reset(context);
        original(context);
        // With scope `all` it is watched like any other.
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

#[cfg(not(feature = "pg15"))]
mod by_chunk;
#[cfg(feature = "pg15")]
mod by_context;
#[cfg(not(feature = "pg15"))]
use by_chunk::{FREE, FREE_EXACT, REALLOC};
#[cfg(feature = "pg15")]
use by_context::{FREE, FREE_EXACT, REALLOC};
