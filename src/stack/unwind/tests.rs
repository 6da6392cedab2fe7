use super::*;
use crate::share::Share;

fn unwinder(share: &Share) -> Box<Unwinder> {
    let mut unwinder = Box::new(Unwinder::new());
    unwinder.prepare(&share.modules);
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
    let share = Share::map(1, 64, false).unwrap();
    let mut unwinder = unwinder(&share);
    deep(20, &mut || {
        let mut ours = [0; MAX_FRAMES];
        let mut theirs = Vec::new();
        let (n, cut) = with_registers(&mut |regs| {
            backtrace::trace(|frame| {
                theirs.push(frame.ip() as u64);
                true
            });
            unwinder.walk(regs, &mut ours, &share.modules)
        });
        assert!(!cut);
        // The innermost frames are of the two walkers themselves; from a common caller on they are equal.
        let start = theirs.iter().position(|&ip| ip == ours[1]).expect("our caller is in their walk");
        let theirs: Vec<u64> = theirs[start..].iter().copied().filter(|&ip| ip != 0).collect();
        let common = theirs.len().min(n - 1);
        assert!(common > 20);
        assert_eq!(&ours[1..=common], &theirs[..common]);
    });
}

#[test]
fn a_foreign_stack_is_not_read() {
    let share = Share::map(1, 64, false).unwrap();
    let mut unwinder = unwinder(&share);
    let mut out = [0; MAX_FRAMES];
    for sp in [0, 8, 7, unwinder.top, unwinder.top - 7, u64::MAX - 7, 1 << 47] {
        assert_eq!(unwinder.walk(Regs { sp, bp: sp }, &mut out, &share.modules), (0, true));
    }
}

#[test]
fn a_broken_frame_pointer_cuts_the_walk() {
    let share = Share::map(1, 64, false).unwrap();
    let mut unwinder = unwinder(&share);
    let mut out = [0; MAX_FRAMES];
    with_registers(&mut |regs| {
        // As if every module kept frame pointers: whatever the register holds, no read leaves the stack.
        unwinder.fast = (1, u64::MAX);
        for bp in [1, 8, regs.sp - 4096, unwinder.top - 8, unwinder.top, u64::MAX - 15, u64::MAX] {
            let (n, cut) = unwinder.walk(Regs { bp, ..regs }, &mut out, &share.modules);
            assert!(cut && n <= 2, "bp {bp:#x} gave {n} frames");
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
        let mut walks = [[0u64; MAX_FRAMES]; 2];
        let mut frames = [(0, false); 2];
        with_registers(&mut |regs| {
            let start = with_frame_pointer as *const () as u64;
            for (i, fast) in [(start, start + 64), (0, 0)].into_iter().enumerate() {
                both.unwinder.fast = fast;
                frames[i] = both.unwinder.walk(regs, &mut walks[i], &both.share.modules);
            }
        });
        assert_eq!(frames[0], frames[1]);
        assert!(!frames[0].1);
        assert_eq!(walks[0], walks[1]);
        both.compared = frames[0].0;
    }
    let share = Share::map(1, 64, false).unwrap();
    let mut both = Both { share, unwinder: unwinder(&share), compared: 0 };
    // SAFETY: the naked function passes the pointer on to `compare` and touches nothing else.
    unsafe { with_frame_pointer(compare, (&raw mut both).cast(), 10) };
    assert!(both.compared > 15);
}
