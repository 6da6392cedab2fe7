//! `rheap_suppress` and `rheap_unsuppress`: what the user has said is no leak, in a table of the extension. A table,
//! not shared memory: it is kept across restarts, dumped with the database, and read and written by plain SQL.

use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, Spi};

use super::text::{Text, identifier};
use crate::verdict::suppression::Suppression;

/// Longer patterns are a mistake.
const LONGEST: usize = 1000;

const NO_PATTERN: &str = "a suppression needs a pattern of 1 to 1000 bytes";
const PATTERN: &str = "Write the name of a function or of a memory context, for example 'my_cache_*'.";
const NO_REASON: &str = "a suppression needs a reason";
const REASON: &str = "Write why this is no leak: the next reader of this list will ask.";

/// The table's qualified name and whether the caller may read it, or None where the extension is loaded but not created
/// in this database.
fn table() -> Option<(String, bool)> {
    Spi::connect(|client| {
        let table = "SELECT n.nspname::pg_catalog.text, pg_catalog.has_table_privilege(c.oid, 'SELECT') \
                     FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace \
                     JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'rheap_suppressions' \
                     WHERE e.extname = 'rheap'";
        let row = client.select(table, Some(1), &[]).ok()?.first();
        let (Text(schema), may_read) = (row.get(1).ok()??, row.get(2).ok()??);
        Some((format!("{}.rheap_suppressions", identifier(&schema)), may_read))
    })
}

/// All suppressions of this database. Reading must do without a transaction id, which a standby and a parallel plan
/// refuse: `Spi::get_one` takes one, `select` does not.
pub fn all() -> Vec<Suppression> {
    // Somebody may read leaks without being allowed to read this.
    let Some((table, true)) = table() else { return Vec::new() };
    Spi::connect(|client| {
        let rows = client.select(&format!("SELECT pattern, reason FROM {table} ORDER BY created, pattern"), None, &[]);
        let Ok(rows) = rows else { return Vec::new() };
        let text = |found: Result<Option<Text>, _>| found.ok().flatten().map(|Text(text)| text);
        rows.filter_map(|row| Some(Suppression { pattern: text(row.get(1))?, reason: text(row.get(2))? })).collect()
    })
}

/// Call sites with a function on their stack, or a memory context, that the pattern describes are no leaks from now
/// on: they are `steady` in `rheap_call_sites`, with this reason. `*` in the pattern stands for any text. A pattern that
/// is there already gets the new reason.
#[pg_extern(volatile, parallel_unsafe)]
fn rheap_suppress(pattern: Option<Text>, reason: Option<Text>) {
    let Text(pattern) = super::given(pattern, NO_PATTERN, PATTERN);
    let Text(reason) = super::given(reason, NO_REASON, REASON);
    let invalid = |message: &str, hint: &str| {
        super::refuse(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message.into(), hint)
    };
    if pattern.trim().is_empty() || pattern.len() > LONGEST {
        invalid(NO_PATTERN, PATTERN);
    }
    if pattern.chars().all(|c| c == '*') {
        invalid(
            "the pattern would suppress every leak",
            "Write a part of a name beside '*', or SET rheap.mode = 'off'.",
        );
    }
    if reason.trim().is_empty() {
        invalid(NO_REASON, REASON);
    }
    let Some((table, _)) = table() else { return };
    let insert = format!(
        "INSERT INTO {table} (pattern, reason) VALUES ($1, $2) \
         ON CONFLICT (pattern) DO UPDATE SET reason = excluded.reason, created_by = DEFAULT, created = DEFAULT"
    );
    if let Err(error) = Spi::run_with_args(&insert, &[Text(pattern).into(), Text(reason).into()]) {
        pgrx::error!("could not write the suppression: {error}");
    }
}

/// Removes a suppression; false if there is none with this pattern.
#[pg_extern(volatile, parallel_unsafe)]
fn rheap_unsuppress(pattern: Option<Text>) -> bool {
    let pattern = super::given(
        pattern,
        "rheap_unsuppress needs a pattern",
        "SELECT pattern, reason FROM rheap_suppressions lists them.",
    );
    let Some((table, _)) = table() else { return false };
    let delete = format!("WITH gone AS (DELETE FROM {table} WHERE pattern = $1 RETURNING 1) SELECT count(*) FROM gone");
    match Spi::get_one_with_args::<i64>(&delete, &[pattern.into()]) {
        Ok(count) => count == Some(1),
        Err(error) => pgrx::error!("could not remove the suppression: {error}"),
    }
}
