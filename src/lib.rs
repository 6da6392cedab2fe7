//! rheap finds memory leaks inside a running PostgreSQL server.
//!
//! Loaded by `shared_preload_libraries = 'rheap'`, it hooks the server's allocators, follows what is allocated in
//! memory contexts that outlive a transaction, and answers in SQL: `SELECT * FROM rheap_leaks();`
//!
//! The modules follow the way of the data: `hook` → `stack` → `ledger` → `walk` → `share` → `verdict` → `symbols` →
//! `sql`, and `exports` for what people and other tools read. `process` holds what one server process knows, `pg_compat`
//! what differs between server versions; `units` and `moment` write numbers and times as people read them.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64", target_pointer_width = "64")))]
compile_error!(
    "rheap supports Linux on x86_64 only: it replaces entries of the server's method tables in place and walks stacks \
     by the rules of that platform. It does not build on Windows, macOS, or for 32 bits."
);
#[cfg(all(target_os = "linux", not(target_env = "gnu")))]
compile_error!(
    "rheap needs the GNU C library: it gives memory back with malloc_trim and asks the dynamic linker for symbols with \
     dladdr1, which musl does not have"
);
#[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
compile_error!(
    "rheap must know the server's major version: make install PG_CONFIG=..., or --features pg15, pg16, pg17 or pg18"
);

pub mod exports;
#[cfg(test)]
mod fuzz;
mod hints;
mod hook;
pub mod ledger;
mod load;
mod moment;
mod pg_compat;
mod proc_maps;
mod process;
mod query_ids;
mod reserve;
mod settings;
pub mod share;
mod sql;
pub mod stack;
pub mod symbols;
mod units;
pub mod verdict;
mod walk;

use pgrx::prelude::*;

::pgrx::pg_module_magic!(name, version);

#[global_allocator]
static HEAP: reserve::Heap = reserve::Heap;

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    load::init();
}
