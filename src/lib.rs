//! rheap finds memory leaks inside a running PostgreSQL server.
//!
//! Loaded by `shared_preload_libraries = 'rheap'`, it hooks the server's allocators, follows what is allocated in
//! memory contexts that outlive a transaction, and answers in SQL: `SELECT * FROM rheap_leaks();`
//!
//! The modules follow the way of the data: `hook` → `stack` → `ledger` → `walk` → `share` → `verdict` → `symbols` →
//! `sql`, and `exports` for what people and other tools read. `process` holds what one server process knows, `pg_compat` what differs between server versions.

pub mod exports;
mod hints;
mod hook;
pub mod ledger;
mod load;
mod pg_compat;
mod process;
mod query_ids;
mod settings;
pub mod share;
mod sql;
pub mod stack;
pub mod symbols;
pub mod verdict;
mod walk;

use pgrx::prelude::*;

::pgrx::pg_module_magic!(name, version);

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    load::init();
}
