//! What the log gets beside an out-of-memory error: who has the memory. Everything here works without any.

use std::cell::UnsafeCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Write;

use super::ending::Text;
use super::{current, now, settle};
use crate::share::Share;
use crate::share::dictionary;
use crate::share::ending::{HeldSite, KEPT};
use crate::stack::{CUT, unframe};
use crate::symbols::helpers::is_helper;

/// Call sites and frames of each that the block names.
const SITES: usize = 5;
const FRAMES: usize = 4;
/// Between two blocks of one process, in microseconds.
const PAUSE: i64 = 1_000_000;

struct Block {
    text: Text<4096>,
    last: i64,
}

struct Global(UnsafeCell<Block>);
// SAFETY: a server process has one thread; its reports do not come in between one another here.
unsafe impl Sync for Global {}
static BLOCK: Global = Global(UnsafeCell::new(Block { text: Text::new(), last: 0 }));

/// The call sites of this process that hold most, after the server's own `detail`, as a text that lives until the
/// next call. None when nothing is known, or when the log had one a moment ago.
pub fn top_call_sites(detail: &CStr) -> Option<&'static CStr> {
    settle();
    // SAFETY: the guard of `settle` is released, and nothing below runs a hook.
    let (process, block) = unsafe { (current(), &mut *BLOCK.0.get()) };
    let (share, _) = (process.share?, process.own_slot?);
    let time = now();
    if time - block.last < PAUSE {
        return None;
    }
    let (mut sites, mut total) = ([HeldSite::default(); KEPT], 0u64);
    process.ledger.each_site(|id| {
        let held = share.sites.rows[id as usize].held();
        total += held.live_bytes;
        let at = sites.partition_point(|s| s.live_bytes >= held.live_bytes);
        if at < KEPT && held.live_bytes > 0 {
            sites.copy_within(at..KEPT - 1, at + 1);
            sites[at] = held;
        }
    });
    if total == 0 {
        return None;
    }
    block.last = time;
    block.text.clear();
    // A block that is cut short is still one.
    let _ = write_block(&mut block.text, process, &share, detail, &sites[..SITES], total);
    Some(block.text.as_c_str())
}

fn write_block(
    out: &mut impl Write,
    process: &super::Process,
    share: &Share,
    detail: &CStr,
    sites: &[HeldSite],
    total: u64,
) -> std::fmt::Result {
    if !detail.is_empty() {
        writeln!(out, "{}", detail.to_str().unwrap_or(""))?;
    }
    write!(out, "rheap: watched call sites of this process hold {total} bytes, most of it:")?;
    for site in sites.iter().filter(|s| s.stack != 0) {
        write!(out, "\n  {} bytes in {} allocations in ", site.live_bytes, site.live_count)?;
        share.write_path(site.path, out)?;
        let mut shown = 0;
        for word in share.stacks.words_of(site.stack) {
            let word = word.load(std::sync::atomic::Ordering::Relaxed);
            let (module, offset) = unframe(word);
            let name = if word == CUT { None } else { exported(process, module, offset) };
            if shown == 0 && name.is_some_and(is_helper) {
                continue;
            }
            out.write_str(if shown == 0 { " at " } else { " < " })?;
            match name {
                Some(name) => out.write_str(name)?,
                None if word == CUT => out.write_str("(cut)")?,
                None => write_address(out, share, module, offset)?,
            }
            shown += 1;
            if shown == FRAMES {
                break;
            }
        }
    }
    Ok(())
}

/// `module+0xoffset`, without memory. Error: that of `out`.
pub fn write_address(out: &mut impl Write, share: &Share, module: u32, offset: u64) -> std::fmt::Result {
    let mut path = Text::<512>::new();
    let _ = dictionary::write_text(share.modules.words_of(module), &mut path);
    let name = path.as_str().rsplit('/').next().unwrap_or("");
    write!(out, "{name}+{offset:#x}")
}

/// The exported function that a return address lies in, from the dynamic linker, which takes no memory for it. Its
/// size must cover the address: the nearest one before it may be another's.
fn exported(process: &super::Process, module: u32, offset: u64) -> Option<&'static str> {
    const SYMBOL: c_int = 1;
    #[repr(C)]
    struct ElfSymbol {
        name: u32,
        info: u8,
        other: u8,
        section: u16,
        value: u64,
        size: u64,
    }
    unsafe extern "C" {
        fn dladdr1(address: *const c_void, info: *mut libc::Dl_info, extra: *mut *mut c_void, flags: c_int) -> c_int;
    }
    let address = process.unwinder.modules.by_id(module)?.bias + offset - 1;
    // SAFETY: the linker fills in both, whose texts live as long as the library, which is never unloaded.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        let mut symbol: *mut c_void = std::ptr::null_mut();
        if dladdr1(address as *const c_void, &mut info, &mut symbol, SYMBOL) == 0 || symbol.is_null() {
            return None;
        }
        let size = (*symbol.cast::<ElfSymbol>()).size;
        if info.dli_sname.is_null() || address - info.dli_saddr as u64 >= size {
            return None;
        }
        CStr::from_ptr(info.dli_sname.cast::<c_char>()).to_str().ok()
    }
}
