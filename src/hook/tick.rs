//! A look into the middle of a long statement. Contexts on a pass table have no hook to run; but the table is
//! rheap's own and can be written: a timer's signal handler puts a function into it that the next palloc of any
//! transient context meets, once, where it is safe to walk the tree. Between ticks this costs nothing.
//!
//! Whoever takes the signal for himself in a process where the timer runs gets its ticks until the process's next walk,
//! which stops it; one that sets the signal to its default, which is to end the process, has only that long. Nobody in
//! the server or its languages does so unasked.

use std::sync::atomic::{AtomicBool, Ordering::*};

use super::tables;

/// Whether the signal's handler is ours in this process or an ancestor.
static INSTALLED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_signal: libc::c_int) {
    tables::arm();
}

/// Takes the signal, unless somebody else has it: then long statements are only looked into where they touch watched
/// contexts.
///
/// # Safety
/// Called once per process tree, from `_PG_init`.
pub unsafe fn install() {
    // SAFETY: the handler stores a few pointers and does nothing else.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGVTALRM, std::ptr::null(), &mut action) != 0 || action.sa_sigaction != libc::SIG_DFL
        {
            return;
        }
        action.sa_sigaction = on_signal as *const () as usize;
        // On the stack of whoever has put one up for signals.
        action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        INSTALLED.store(libc::sigaction(libc::SIGVTALRM, &action, std::ptr::null_mut()) == 0, Relaxed);
    }
}

/// From now on ticks as often as the process has used this much processor time: an idle one is never woken.
/// 0: never.
pub fn every(milliseconds: u64) {
    if is_ours() {
        set(milliseconds);
    }
}

/// Whether the signal is still ours. If somebody else has taken it meanwhile, there are no more ticks, for good.
pub fn is_ours() -> bool {
    if !INSTALLED.load(Relaxed) {
        return false;
    }
    // SAFETY: only asks, into a local.
    let ours = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGVTALRM, std::ptr::null(), &mut action) == 0
            && action.sa_sigaction == on_signal as *const () as usize
    };
    if !ours {
        INSTALLED.store(false, Relaxed);
        set(0);
    }
    ours
}

fn set(milliseconds: u64) {
    let time = libc::timeval { tv_sec: (milliseconds / 1000) as i64, tv_usec: (milliseconds % 1000 * 1000) as i64 };
    let timer = libc::itimerval { it_interval: time, it_value: time };
    // SAFETY: a plain system call. The timer ends with the process, and does not survive a fork.
    unsafe { libc::setitimer(libc::ITIMER_VIRTUAL, &timer, std::ptr::null_mut()) };
}
