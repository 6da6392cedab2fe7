//! `rheap_reset`.

use pgrx::prelude::*;

/// Forgets the history of one process or of all. Takes effect at once for readers; the process itself follows when
/// it next works, and what it held before is not followed any more.
#[pg_extern(volatile, parallel_unsafe)]
fn rheap_reset(pid: default!(Option<i32>, "NULL")) {
    let (_, slots) = super::slots("rheap_reset", pid);
    for (_, _, slot) in slots {
        slot.wish_reset();
    }
}
