//! The names from TopMemoryContext down to a context, as one id. Contexts of one name below one path share it.

use crate::pg_compat::MemoryContext;
use crate::share::{Share, dictionary};

/// Names deeper than this are counted with their ancestor at this depth.
pub const DEEPEST: usize = 32;

/// The id of a name under a path, 0 when the dictionary is full.
///
/// # Safety
/// A live context, whose name is a static string.
pub unsafe fn path_under(parent: u32, context: MemoryContext, share: &Share) -> u32 {
    let mut words = [0; 64];
    // SAFETY: the caller's promise.
    let name = unsafe { if (*context).name.is_null() { c"?" } else { core::ffi::CStr::from_ptr((*context).name) } };
    let n = dictionary::pack(parent as u64, name.to_bytes(), &mut words);
    share.paths.intern(&words[..n])
}

/// The id of a context's path.
///
/// # Safety
/// A live context in a consistent tree.
pub unsafe fn path_of(context: MemoryContext, share: &Share) -> u32 {
    // SAFETY: the parents of a live context are live.
    unsafe {
        let mut depth = 0;
        let mut at = context;
        while !(*at).parent.is_null() {
            at = (*at).parent;
            depth += 1;
        }
        let mut chain = [std::ptr::null_mut(); DEEPEST];
        at = context;
        while !at.is_null() {
            if depth < DEEPEST {
                chain[depth] = at;
            }
            at = (*at).parent;
            depth = depth.wrapping_sub(1);
        }
        chain.iter().take_while(|c| !c.is_null()).fold(0, |parent, &c| path_under(parent, c, share))
    }
}
