use super::*;
use crate::share::Share;

/// One test unloads libraries, upon which another would forget what it counts.
static LOADS: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn unwinder(share: &Share) -> Box<Unwinder> {
    let mut unwinder = Box::new(Unwinder::new());
    unwinder.prepare(0, share.rules, &share.modules);
    unwinder
}

#[inline(never)]
fn deep(levels: u32, f: &mut dyn FnMut()) {
    if levels == 0 {
        f()
    } else {
        deep(levels - 1, f)
    }
    std::hint::black_box(levels);
}

#[test]
fn the_dwarf_walk_agrees_with_the_backtrace_crate() {
    let share = Share::map(1, 64).unwrap();
    let mut unwinder = unwinder(&share);
    deep(20, &mut || {
        let mut ours = Trace::new();
        let mut theirs = Vec::new();
        with_registers(&mut |regs| {
            backtrace::trace(|frame| {
                theirs.push(frame.ip() as u64);
                true
            });
            unwinder.walk(regs, MAX_FRAMES, &mut ours, &share.modules)
        });
        assert!(!ours.cut);
        let ours = ours.addresses();
        // The innermost frames are of the two walkers themselves; from a common caller on they are equal.
        let start = theirs.iter().position(|&ip| ip == ours[1]).expect("our caller is in their walk");
        let theirs: Vec<u64> = theirs[start..].iter().copied().filter(|&ip| ip != 0).collect();
        let common = theirs.len().min(ours.len() - 1);
        assert!(common > 20);
        assert_eq!(&ours[1..=common], &theirs[..common]);
    });
}

#[test]
fn a_foreign_stack_is_not_read() {
    let share = Share::map(1, 64).unwrap();
    let mut unwinder = unwinder(&share);
    let mut trace = Trace::new();
    for sp in [0, 8, 7, unwinder.top, unwinder.top - 7, u64::MAX - 7, 1 << 47] {
        unwinder.walk(Regs { sp, bp: sp }, MAX_FRAMES, &mut trace, &share.modules);
        assert_eq!((trace.frames(), trace.cut), (0, true));
    }
}

#[test]
fn a_broken_frame_pointer_cuts_the_walk() {
    let share = Share::map(1, 64).unwrap();
    let mut unwinder = unwinder(&share);
    let mut trace = Trace::new();
    with_registers(&mut |regs| {
        // As if every module kept frame pointers: whatever the register holds, no read leaves the stack.
        unwinder.fast = (1, u64::MAX);
        for bp in [1, 8, regs.sp - 4096, unwinder.top - 8, unwinder.top, u64::MAX - 15, u64::MAX] {
            unwinder.walk(Regs { bp, ..regs }, MAX_FRAMES, &mut trace, &share.modules);
            assert!(trace.cut && trace.frames() <= 2, "bp {bp:#x} gave {} frames", trace.frames());
        }
    });
}

/// A function with a frame pointer, as a server that keeps them is compiled: calls itself `depth` times, then `f`.
#[unsafe(naked)]
unsafe extern "C" fn with_frame_pointer(f: extern "C" fn(*mut u8), argument: *mut u8, depth: u64) {
    std::arch::naked_asm!(
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "test rdx, rdx",
        "jz 2f",
        "dec rdx",
        "call {this}",
        "jmp 3f",
        "2:",
        "mov rax, rdi",
        "mov rdi, rsi",
        "call rax",
        "3:",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
        this = sym with_frame_pointer,
    )
}

#[test]
fn frame_pointers_and_dwarf_give_the_same_stack() {
    struct Both {
        share: Share,
        unwinder: Box<Unwinder>,
        compared: usize,
    }
    extern "C" fn compare(both: *mut u8) {
        // SAFETY: the test passes its own Both.
        let both = unsafe { &mut *both.cast::<Both>() };
        let mut walks = [const { Trace::new() }; 2];
        with_registers(&mut |regs| {
            let start = with_frame_pointer as *const () as u64;
            for (i, fast) in [(start, start + 64), (0, 0)].into_iter().enumerate() {
                both.unwinder.fast = fast;
                both.unwinder.walk(regs, MAX_FRAMES, &mut walks[i], &both.share.modules);
            }
        });
        assert!(!walks[0].cut && !walks[1].cut);
        assert_eq!(walks[0].addresses(), walks[1].addresses());
        both.compared = walks[0].frames;
    }
    let share = Share::map(1, 64).unwrap();
    let mut both = Both { share, unwinder: unwinder(&share), compared: 0 };
    // SAFETY: the naked function passes the pointer on to `compare` and touches nothing else.
    unsafe { with_frame_pointer(compare, (&raw mut both).cast(), 10) };
    assert!(both.compared > 15);
}

/// Calls `f` some frames deeper, on one of two ways that take the same room.
fn on_way(way: usize, f: &mut dyn FnMut()) {
    #[inline(never)]
    fn one(f: &mut dyn FnMut()) {
        f();
        std::hint::black_box(1);
    }
    #[inline(never)]
    fn other(f: &mut dyn FnMut()) {
        f();
        std::hint::black_box(2);
    }
    let ways = std::hint::black_box([one as fn(&mut dyn FnMut()), other]);
    ways[way](f);
    std::hint::black_box(way);
}

#[test]
fn a_remembered_stack_is_recalled_and_no_other() {
    let _alone = LOADS.lock().unwrap_or_else(|e| e.into_inner());
    use crate::ledger::region::Budget;
    use crate::stack::Stacks;
    let share = Share::map(1, 1024).unwrap();
    let mut unwinder = unwinder(&share);
    let (mut walking, mut remembering) = (Box::new(Stacks::new()), Box::new(Stacks::new()));
    let mut budget = Budget::new(1 << 20);
    let (mut ids, mut recalled, mut foreseen) = (std::collections::HashSet::new(), 0, 0);
    for (depth, way) in (0..3).flat_map(|_| (0..20).flat_map(|depth| [(depth, 0), (depth, 1)])) {
        deep(depth, &mut || {
            on_way(way, &mut || {
                with_registers(&mut |regs| {
                    // SAFETY: the registers of this very call.
                    unsafe {
                        let walked = walking.capture(&mut unwinder, regs, MAX_FRAMES, true, &share, &mut budget).0;
                        ids.insert(walked);
                        let next = match Stacks::gathers() {
                            true => remembering.recall_next::<true>(regs.sp).map(|known| known.stack),
                            false => remembering.recall_next::<false>(regs.sp).map(|known| known.stack),
                        };
                        foreseen += next.is_some() as usize;
                        match next.or_else(|| remembering.recall::<false>(regs.sp).map(|known| known.stack)) {
                            Some(stack) => {
                                assert_eq!(stack, walked);
                                recalled += 1;
                            }
                            None => {
                                remembering.capture(&mut unwinder, regs, MAX_FRAMES, true, &share, &mut budget);
                            }
                        }
                    }
                })
            })
        });
    }
    assert_eq!(
        ids.len(),
        4,
        "the two ways differ in one return address only, and all but the first depth in recursion only"
    );
    // Of 120 visits the first to each stack cannot be recalled, and some are too long.
    assert!((40..=80).contains(&recalled), "{recalled}");
    assert!(foreseen > 0, "none was known as the one after the last");
}

/// A library whose `call` calls what it is given, with so many bytes of its own on the stack.
fn library(name: &str, bytes: usize) -> std::ffi::CString {
    let path = std::env::temp_dir().join(format!("gone-{name}-{}.so", std::process::id()));
    let code = format!(
        "void call(void (*f)(void *), void *p) {{ volatile char room[{bytes}]; room[0] = 1; f(p); room[1] = 2; }}"
    );
    let mut cc = std::process::Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-fomit-frame-pointer", "-fno-stack-protector", "-x", "c", "-", "-o"]);
    let mut cc = cc.arg(&path).stdin(std::process::Stdio::piped()).spawn().expect("cc");
    std::io::Write::write_all(&mut cc.stdin.take().unwrap(), code.as_bytes()).unwrap();
    assert!(cc.wait().unwrap().success());
    std::ffi::CString::new(path.into_os_string().into_encoded_bytes()).unwrap()
}

#[test]
fn what_is_loaded_where_a_library_was_unloaded_is_walked_by_its_own_rules() {
    let _alone = LOADS.lock().unwrap_or_else(|e| e.into_inner());
    use crate::ledger::region::Budget;
    use crate::stack::{CUT, Stacks, unframe};
    type Call = unsafe extern "C-unwind" fn(unsafe extern "C-unwind" fn(*mut libc::c_void), *mut libc::c_void);
    struct Here {
        share: Share,
        unwinder: Box<Unwinder>,
        stacks: Box<Stacks>,
        budget: Budget,
        stack: u32,
    }
    unsafe extern "C-unwind" fn capture(here: *mut libc::c_void) {
        // SAFETY: the test passes its own, and the registers are of this very call.
        let Here { share, unwinder, stacks, budget, stack } = unsafe { &mut *here.cast::<Here>() };
        with_registers(&mut |regs| unsafe {
            *stack = stacks.capture(unwinder, regs, MAX_FRAMES, true, share, budget).0;
        });
    }
    let share = Share::map(1, 1024).unwrap();
    let stacks = Box::new(Stacks::new());
    let mut here = Here { unwinder: unwinder(&share), share, stacks, budget: Budget::new(1 << 20), stack: 0 };
    let (mut place, mut same_place) = (0, false);
    // Another test may take the place where the first lay before the second is loaded.
    for _ in 0..20 {
        if same_place {
            break;
        }
        for (name, bytes) in [("first", 40), ("second", 4000), ("third", 400)] {
            let path = library(name, bytes);
            // SAFETY: a library of the test, which nothing refers to when it is closed.
            unsafe {
                let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
                assert!(!handle.is_null());
                let call = libc::dlsym(handle, c"call".as_ptr());
                std::mem::transmute::<*mut libc::c_void, Call>(call)(capture, (&raw mut here).cast());
                let words = here.share.stacks.get(here.stack);
                let file = |word: u64| {
                    let mut text = String::new();
                    let _ =
                        crate::share::dictionary::write_text(here.share.modules.words_of(unframe(word).0), &mut text);
                    text
                };
                let through: Vec<usize> = (0..words.len()).filter(|&i| file(words[i]).contains("/gone-")).collect();
                assert_eq!(through.len(), 1, "one frame is the library's");
                assert_eq!(file(words[through[0]]), path.to_str().unwrap());
                // And the walk went on through it.
                assert!(words.len() > through[0] + 4 && !words.contains(&CUT), "{} words", words.len());
                if name == "second" {
                    same_place = call as u64 == place;
                }
                place = call as u64;
                libc::dlclose(handle);
                std::fs::remove_file(path.to_str().unwrap()).unwrap();
                // On the clock, also without another capture.
                here.stacks.look_for_unloaded(&mut here.unwinder, &here.share, &mut here.budget);
                assert!(!here.unwinder.modules.unloaded);
                assert!(here.unwinder.modules.find(call as u64, &here.share.modules).is_none());
                assert!(here.unwinder.rules.iter().all(|r| r.return_address.abs_diff(call as u64) > 4096));
                if name == "second" {
                    here.stacks.forget();
                }
            }
        }
    }
    assert!(same_place, "the second lay where the first had been, or nothing was tried");
}
