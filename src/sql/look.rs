//! One look at the shared tables. What each process holds is copied once, and everything that a call answers is derived
//! from the copies: the processes work on meanwhile, and figures of two moments would not agree.

use std::rc::Rc;

use crate::ledger::account::SiteCopy;
use crate::share::Share;
use crate::share::row::RowCopy;
use crate::share::slot::Slot;
use crate::verdict::Progress;

pub struct Look {
    pub share: Share,
    pub processes: Vec<Held>,
}

/// What one process held.
pub struct Held {
    pub slot: &'static Slot,
    pub pid: i32,
    pub backend_type: Rc<str>,
    pub progress: Progress,
    pub sites: Vec<SiteCopy>,
    pub rows: Vec<RowCopy>,
}

impl Look {
    /// At one process or at all, or the ERROR that says what to do instead.
    pub fn take(function: &str, pid: Option<i32>) -> Self {
        let (share, slots) = super::slots(function, pid);
        let held = |(index, pid, slot): (u32, i32, &'static Slot)| {
            super::pause();
            // Before the books: a transaction that ends meanwhile must not make its rows look like an older one's.
            let progress = Progress::of(slot);
            // Who still has to forget holds nothing already.
            let counts = !slot.reset_pending();
            let (sites, rows) = if counts { share.held_by(index, pid) } else { (Vec::new(), Vec::new()) };
            Held { slot, pid, backend_type: super::backend_type(pid, slot).into(), progress, sites, rows }
        };
        Look { share, processes: slots.into_iter().map(held).collect() }
    }
}
