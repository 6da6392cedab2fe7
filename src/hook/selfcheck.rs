//! Is this the server that rheap was built for, with its allocators as it left them? If not, hands off.

use crate::pg_compat::{self, KIND_COUNT, KINDS, Methods};
use pgrx::pg_sys;

/// Error: what does not fit, in words for the log.
///
/// # Safety
/// `bases` point at readable memory of the size of a table.
pub unsafe fn check(bases: &[*mut Methods; KIND_COUNT]) -> Result<(), String> {
    // SAFETY: set before any library is loaded.
    if unsafe { (*pg_sys::TopMemoryContext).type_ } != pg_sys::NodeTag::T_AllocSetContext {
        return Err("TopMemoryContext is not an AllocSet".into());
    }
    let text = server_text().ok_or("the server's code cannot be found in /proc/self/maps")?;
    let mapped = readable();
    for (kind, &base) in bases.iter().enumerate() {
        let (start, end) = (base as u64, base as u64 + size_of::<Methods>() as u64);
        if !mapped.iter().any(|r| r.0 <= start && end <= r.1) {
            return Err(format!("the method table of {} is not where it should be", KINDS[kind]));
        }
        // SAFETY: just found mapped and readable. Entries are code pointers, which an integer holds as well.
        let entries = unsafe { std::slice::from_raw_parts(base.cast::<u64>(), size_of::<Methods>() / 8) };
        if let Some(foreign) = entries.iter().find(|&&e| !(text.0..text.1).contains(&e)) {
            return Err(format!(
                "the method table of {} holds {foreign:#x}, which is not code of the server: another hook, or a server of another layout",
                KINDS[kind]
            ));
        }
    }
    // SAFETY: the tables that are called through have just been found to be the server's own.
    let met = unsafe { pg_compat::tables_of_throw_away_contexts() };
    match (0..KIND_COUNT).find(|&kind| met[kind] != bases[kind]) {
        Some(kind) => Err(format!("the method table of {} is not where its contexts have it", KINDS[kind])),
        None => Ok(()),
    }
}

fn ranges(wanted: impl Fn(&str, &str) -> bool) -> Vec<(u64, u64)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    crate::proc_maps::parse(&maps).filter(|m| wanted(m.access, m.path)).map(|m| (m.start, m.end)).collect()
}

fn readable() -> Vec<(u64, u64)> {
    // Neighbouring ranges count as one: a table may lie across a border of protections.
    let mut all: Vec<(u64, u64)> = Vec::new();
    for range in ranges(|access, _| access.starts_with('r')) {
        match all.last_mut() {
            Some(last) if last.1 == range.0 => last.1 = range.1,
            _ => all.push(range),
        }
    }
    all
}

fn server_text() -> Option<(u64, u64)> {
    let exe = std::fs::read_link("/proc/self/exe").ok()?;
    let exe = exe.to_str()?;
    ranges(|access, path| access.contains('x') && path == exe).into_iter().next()
}
