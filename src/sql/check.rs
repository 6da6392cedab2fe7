//! `rheap_check` and `rheap_assert_no_leaks`: does a statement keep memory of each call? For the regression tests of
//! extensions: exact, deterministic, within the session that asks.

use std::collections::HashMap;
use std::ffi::CString;

use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, pg_sys};

use super::gather::culprit;
use super::text::{Text, for_message, to_server};
use crate::symbols::{Frame, Symbols};
use crate::verdict::caches;
use crate::verdict::proportion::{Held, kept};
use crate::{process, walk};

/// Into so many parts the repeats are cut, if they are as many, with a look at the books after each.
const BATCHES: i32 = 10;

/// What to write, for those who wrote something else.
const STATEMENT: &str = "Write it as text, for example 'SELECT my_function(1)'.";
const REPEAT: &str = "Write a number from 2 to 10000000; 100 is the default.";
const WARMUP: &str = "Write a number from 0 to 10000000; 10 is the default.";

/// A call site that keeps memory, or all call sites in contexts that multiply.
struct Finding {
    function: String,
    location: String,
    context: String,
    kept: Held,
    stack: Vec<String>,
}

/// Everything is recorded while one of these lives, also if the statement raises an error.
struct Recording;

impl Recording {
    fn start() -> Self {
        if !process::check(true) {
            super::refuse(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "this session has no place in rheap's table of processes".into(),
                "End other sessions, or restart the server with a larger max_connections.",
            );
        }
        Recording
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        process::check(false);
    }
}

/// What the session holds at one moment.
struct Books {
    sites: HashMap<u32, Held>,
    /// Number and bytes of the contexts of each path.
    contexts: HashMap<u32, Held>,
}

impl Books {
    fn now() -> Self {
        process::look_at_all();
        process::settle();
        // SAFETY: between two statements of this session; the tree is consistent, and the reference ends here.
        unsafe { Books { sites: process::current().held_by_site(), contexts: walk::census(process::current()) } }
    }
}

/// The stack as far as it is the statement's: below it are the calls of this module and of the session.
fn stack(frames: &[Frame]) -> Vec<String> {
    let ours = frames.iter().position(|f| f.name() == "run" && f.location.contains("sql/check.rs"));
    let execute = ours
        .and_then(|end| frames[..end].iter().rposition(|f| f.name() == "SPI_execute" && !f.location.contains(".rs:")));
    frames[..execute.unwrap_or(frames.len())].iter().map(Frame::describe).collect()
}

#[inline(never)]
fn run(statement: &CString, times: i32) {
    for _ in 0..times {
        pgrx::check_for_interrupts!();
        // SAFETY: connected to SPI; an error of the statement goes through here as it does everywhere.
        let code = unsafe {
            let code = pg_sys::SPI_execute(statement.as_ptr(), false, 0);
            pg_sys::SPI_freetuptable(pg_sys::SPI_tuptable);
            code
        };
        if code < 0 {
            super::refuse(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                "rheap_check cannot run transaction control or COPY to the client".into(),
                "Write a statement that may stand in a function, without BEGIN, COMMIT, ROLLBACK or COPY FROM STDIN.",
            );
        }
    }
}

/// What to run and how often, as it was asked for.
struct Wanted {
    statement: Option<Text>,
    repeat: Option<i32>,
    warmup: Option<i32>,
}

/// The findings, and the number of repeats.
fn check(function: &str, wanted: Wanted) -> (Vec<Finding>, i32) {
    let null = |what: &str, hint: &str| -> ! {
        super::refuse(PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED, format!("{function} needs a {what}"), hint)
    };
    let Some(Text(statement)) = wanted.statement else { null("statement", STATEMENT) };
    let Some(repeat) = wanted.repeat else { null("number of repeats", REPEAT) };
    let Some(warmup) = wanted.warmup else { null("number of calls to warm up", WARMUP) };
    let invalid =
        |message: String, hint: &str| super::refuse(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message, hint);
    if statement.trim().is_empty() {
        invalid(format!("{function} needs a statement"), STATEMENT);
    }
    if !(2..=10_000_000).contains(&repeat) {
        invalid(format!("{repeat} repeats are not possible"), REPEAT);
    }
    if !(0..=10_000_000).contains(&warmup) {
        invalid(format!("{warmup} calls to warm up are not possible"), WARMUP);
    }
    let share = super::share();
    let statement = CString::new(to_server(&statement, "\\").into_owned()).unwrap_or_default();
    let mut books = Vec::new();
    {
        let _recording = Recording::start();
        // SAFETY: a pair around what runs; an error in between ends the connection with its transaction.
        unsafe { pg_sys::SPI_connect() };
        let batches = repeat.min(BATCHES);
        let done = |batch: i32| (repeat as i64 * batch as i64 / batches as i64) as i32;
        let repeats = (1..=batches).map(|batch| done(batch) - done(batch - 1));
        let times: Vec<i32> = std::iter::once(warmup).chain(repeats).collect();
        // One place that calls for all of them: what is allocated in them has the same stack, so the same site. Of a list
        // that it knows, the compiler would make several places.
        for times in std::hint::black_box(times) {
            run(&statement, times);
            books.push(Books::now());
        }
        // SAFETY: as above.
        unsafe { pg_sys::SPI_finish() };
    }
    let (start, end) = (&books[0], &books[books.len() - 1]);

    // Contexts that multiply are one finding, with everything in them.
    let many: Vec<(String, Held)> = (end.contexts.iter())
        .filter_map(|(path, held)| {
            let at = |books: &Books| books.contexts.get(path).copied().unwrap_or_default();
            let numbers: Vec<Held> = books.iter().map(|b| Held { bytes: at(b).count, count: 0 }).collect();
            kept(&numbers)?;
            let before = at(start);
            let grown = Held { bytes: held.bytes - before.bytes, count: held.count - before.count };
            Some((share.path_name(*path), grown))
        })
        .collect();
    let outermost = |path: &str| {
        let above = many
            .iter()
            .filter(|(of, _)| path == of || path.strip_prefix(of.as_str()).is_some_and(|p| p.starts_with('/')));
        above.min_by_key(|(of, _)| of.len())
    };
    let mut symbols = Symbols::new(&share);
    let mut findings = Vec::new();
    let mut inside: HashMap<String, (Held, Vec<Vec<Frame>>)> = HashMap::new();
    for &id in end.sites.keys() {
        let held: Vec<Held> = books.iter().map(|b| b.sites.get(&id).copied().unwrap_or_default()).collect();
        let Some(kept) = kept(&held) else { continue };
        let Some(site) = share.sites.rows[id as usize].copy() else { continue };
        let path = share.path_name(site.path);
        let (frames, at) = culprit(&mut symbols, site.stack);
        if caches::until_transaction_ends(&frames).is_some() || caches::goes_with_relation(&path) {
            continue;
        }
        if let Some((context, _)) = outermost(&path) {
            let (sum, stacks) = inside.entry(context.clone()).or_default();
            *sum = Held { bytes: sum.bytes + kept.bytes, count: sum.count + kept.count };
            stacks.push(frames);
            continue;
        }
        findings.push(Finding {
            function: super::leaks::name(&frames, at),
            location: super::leaks::location(&frames, at),
            context: path,
            kept,
            stack: stack(&frames),
        });
    }
    for (path, grown) in many.iter().filter(|(path, _)| outermost(path).is_some_and(|(top, _)| top == path)) {
        if caches::goes_with_relation(path) {
            continue;
        }
        let (kept, stacks) = inside.remove(path).unwrap_or((*grown, Vec::new()));
        let (frames, at) = super::gather::common(stacks);
        findings.push(Finding {
            function: super::leaks::name(&frames, at),
            location: super::leaks::location(&frames, at),
            context: path.clone(),
            kept,
            stack: stack(&frames),
        });
    }
    findings.sort_by(|a, b| b.kept.bytes.cmp(&a.kept.bytes).then_with(|| a.function.cmp(&b.function)));
    (findings, repeat)
}

/// Runs a statement `warmup + repeat` times in this session and returns the call sites that keep memory in proportion
/// to the repeats. Bytes are as requested from palloc. In contexts that multiply, a row is all that they hold; for
/// those that nothing was allocated in, it is the contexts themselves.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn rheap_check(
    statement: Option<Text>,
    repeat: default!(Option<i32>, 100),
    warmup: default!(Option<i32>, 10),
) -> TableIterator<
    'static,
    (
        name!(function, Text),
        name!(location, Text),
        name!(context, Text),
        name!(bytes_per_call, f64),
        name!(count_per_call, f64),
        name!(kept_bytes, i64),
        name!(kept_count, i64),
        name!(stack, Vec<Text>),
    ),
> {
    let (findings, repeat) = check("rheap_check", Wanted { statement, repeat, warmup });
    TableIterator::new(findings.into_iter().map(move |f| {
        let per_call = |n: i64| n as f64 / repeat as f64;
        let (bytes, count) = (f.kept.bytes, f.kept.count);
        let stack = f.stack.into_iter().map(Text).collect();
        let names = (f.function.into(), f.location.into(), f.context.into());
        (names.0, names.1, names.2, per_call(bytes), per_call(count), bytes, count, stack)
    }))
}

/// Raises an ERROR that lists the call sites that [`rheap_check`] returns, if there are any.
#[pg_extern(volatile, parallel_unsafe)]
fn rheap_assert_no_leaks(
    statement: Option<Text>,
    repeat: default!(Option<i32>, 100),
    warmup: default!(Option<i32>, 10),
) {
    let (findings, repeat) = check("rheap_assert_no_leaks", Wanted { statement, repeat, warmup });
    if findings.is_empty() {
        return;
    }
    let lines: Vec<String> = findings
        .iter()
        .map(|f| {
            format!(
                "{} at {} in {}: {} bytes in {} allocations kept by {repeat} calls",
                f.function, f.location, f.context, f.kept.bytes, f.kept.count
            )
        })
        .collect();
    pgrx::pg_sys::panic::ErrorReport::new(
        PgSqlErrorCode::ERRCODE_ASSERT_FAILURE,
        match findings.len() {
            1 => "the statement leaks memory at one call site".into(),
            n => format!("the statement leaks memory at {n} call sites"),
        },
        "rheap_assert_no_leaks",
    )
    .set_detail(for_message(lines.join("\n")))
    .set_hint("SELECT * FROM rheap_check(...) with the same arguments shows the call stacks.")
    .report(pgrx::PgLogLevel::ERROR);
}
