//! `rheap_track`.

use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use super::text::Text;
use crate::settings::Mode;

/// Lets one process record in a mode of its own while it runs: `off`, `sampled` or `exact`; `default` goes back to
/// `rheap.mode`. It follows with its next statement, and in the middle of one within half a second of processor time:
/// the wish is a word in shared memory that it looks at, and nobody is signalled.
#[pg_extern(volatile, parallel_unsafe)]
pub fn rheap_track(pid: Option<i32>, mode: Option<Text>) {
    const MODES: &str = "Write one of: off, sampled, exact, or default for what rheap.mode says.";
    let pid = super::given(
        pid,
        "rheap_track needs the pid of a process",
        "SELECT pid, backend_type FROM rheap_processes lists them; SET rheap.mode is for all.",
    );
    let Text(mode) = super::given(mode, "rheap_track needs a mode", MODES);
    let wish = match (mode.as_str(), Mode::parse(&mode)) {
        (_, Some(mode)) => mode as u32 + 1,
        ("default", None) => 0,
        _ => super::refuse(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("there is no mode \"{mode}\""),
            MODES,
        ),
    };
    let (_, slots) = super::slots("rheap_track", Some(pid));
    for (_, _, slot) in slots {
        slot.wish_mode(wish);
    }
}
