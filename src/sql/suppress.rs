//! `rheap_suppress` and `rheap_unsuppress`: what the user has said is no leak, in a table of the extension. A table,
//! not shared memory: it is kept across restarts, dumped with the database, and read and written by plain SQL.

use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, Spi};

use crate::verdict::suppression::Suppression;

/// Longer patterns are a mistake.
const LONGEST: usize = 1000;

/// The table's qualified name, or None where the extension is loaded but not created in this database.
fn table() -> Option<String> {
    Spi::connect(|client| {
        let name = "SELECT pg_catalog.quote_ident(n.nspname) || '.rheap_suppressions' FROM pg_catalog.pg_extension e \
                    JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'rheap'";
        client.select(name, Some(1), &[]).ok()?.first().get_one().ok()?
    })
}

/// All suppressions of this database. Reading must do without a transaction id, which a standby and a parallel plan
/// refuse: `Spi::get_one` takes one, `select` does not.
pub fn all() -> Vec<Suppression> {
    let Some(table) = table() else { return Vec::new() };
    Spi::connect(|client| {
        // Somebody may read leaks without being allowed to read this.
        let may_read = "SELECT pg_catalog.has_table_privilege($1, 'SELECT')";
        match client.select(may_read, Some(1), &[table.as_str().into()]).map(|rows| rows.first().get_one()) {
            Ok(Ok(Some(true))) => {}
            _ => return Vec::new(),
        }
        let rows = client.select(&format!("SELECT pattern, reason FROM {table} ORDER BY created, pattern"), None, &[]);
        let Ok(rows) = rows else { return Vec::new() };
        rows.filter_map(|row| Some(Suppression { pattern: row.get(1).ok()??, reason: row.get(2).ok()?? })).collect()
    })
}

/// Call sites with a function on their stack, or a memory context, that the pattern describes are no leaks from now
/// on: they are `steady` in `rheap_call_sites`, with this reason. `*` in the pattern stands for any text. A pattern that
/// is there already gets the new reason.
#[pg_extern(volatile, parallel_unsafe)]
fn rheap_suppress(pattern: &str, reason: &str) {
    let invalid = |message: &str, hint: &str| {
        super::refuse(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message.into(), hint)
    };
    if pattern.trim().is_empty() || pattern.len() > LONGEST {
        invalid(
            "a suppression needs a pattern of 1 to 1000 bytes",
            "Write the name of a function or of a memory context, for example 'my_cache_*'.",
        );
    }
    if pattern.chars().all(|c| c == '*') {
        invalid(
            "the pattern would suppress every leak",
            "Write a part of a name beside '*', or SET rheap.mode = 'off'.",
        );
    }
    if reason.trim().is_empty() {
        invalid("a suppression needs a reason", "Write why this is no leak: the next reader of this list will ask.");
    }
    let Some(table) = table() else { return };
    let insert = format!(
        "INSERT INTO {table} (pattern, reason) VALUES ($1, $2) \
         ON CONFLICT (pattern) DO UPDATE SET reason = excluded.reason, created_by = DEFAULT, created = DEFAULT"
    );
    if let Err(error) = Spi::run_with_args(&insert, &[pattern.into(), reason.into()]) {
        pgrx::error!("could not write the suppression: {error}");
    }
}

/// Removes a suppression; false if there is none with this pattern.
#[pg_extern(volatile, parallel_unsafe)]
fn rheap_unsuppress(pattern: &str) -> bool {
    let Some(table) = table() else { return false };
    let delete = format!("WITH gone AS (DELETE FROM {table} WHERE pattern = $1 RETURNING 1) SELECT count(*) FROM gone");
    match Spi::get_one_with_args::<i64>(&delete, &[pattern.into()]) {
        Ok(count) => count == Some(1),
        Err(error) => pgrx::error!("could not remove the suppression: {error}"),
    }
}
