//! What comes from outside rheap, damaged at random: unwind tables and symbols of files, and the shared mapping as
//! somebody left it who died or wrote into it. Nothing may panic, hang, or read beyond its bounds.
//!
//! `corpus/small.so` is the file that is damaged: seven functions with frames of every kind, compiled by
//! `gcc -O1 -g -fomit-frame-pointer -fPIC -shared -nostdlib -Wl,-z,noseparate-code -Wl,--build-id=none`. In it the
//! places in the file are the addresses. More cases: PROPTEST_CASES=100000 cargo test --release fuzz.

use std::sync::atomic::Ordering::*;

use proptest::prelude::*;

use crate::share::{Share, slot};
use crate::stack::modules::Module;
use crate::stack::rules;
use crate::symbols::{Symbols, debug_files};

const SMALL: &[u8] = include_bytes!("corpus/small.so");
/// Of `.eh_frame_hdr`, `.text`'s first, and the end of what is mapped behind them.
const EH_FRAME_HDR: usize = 0x480;
const TEXT: usize = 0x300;
const EH_END: usize = 0x5c4;

/// A copy at an address whose low bits are those of a mapping.
fn loaded(bytes: &[u8]) -> (Vec<u64>, Module) {
    let mut words = vec![0u64; bytes.len().div_ceil(8)];
    for (word, part) in words.iter_mut().zip(bytes.chunks(8)) {
        let mut eight = [0; 8];
        eight[..part.len()].copy_from_slice(part);
        *word = u64::from_le_bytes(eight);
    }
    let base = words.as_ptr() as u64;
    let module = Module {
        start: base,
        end: base + EH_END as u64,
        bias: base,
        eh_frame_hdr: base + EH_FRAME_HDR as u64,
        eh_end: base + EH_END as u64,
        id: 1,
        frame_pointers: false,
    };
    (words, module)
}

fn look_up_everything(module: &Module) {
    for offset in (TEXT..EH_FRAME_HDR).step_by(3) {
        rules::find(module, module.start + offset as u64);
        rules::function(module, module.start + offset as u64);
    }
    rules::keeps_frame_pointers(module);
}

/// (place, byte) pairs within a range of the file.
fn damage(range: std::ops::Range<usize>) -> impl Strategy<Value = Vec<(usize, u8)>> {
    prop::collection::vec((range, any::<u8>()), 1..24)
}

fn damaged(places: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = SMALL.to_vec();
    for &(place, byte) in places {
        bytes[place] = byte;
    }
    bytes
}

#[test]
fn the_file_as_it_is_has_rules() {
    let (_memory, module) = loaded(SMALL);
    let known = (TEXT..EH_FRAME_HDR).filter(|&o| rules::function(&module, module.start + o as u64).is_some());
    assert!(known.count() > 200);
}

proptest! {
    #[test]
    fn damaged_unwind_tables_give_rules_or_none(places in damage(EH_FRAME_HDR..EH_END)) {
        let (_memory, module) = loaded(&damaged(&places));
        look_up_everything(&module);
    }

    #[test]
    fn noise_in_place_of_unwind_tables_gives_rules_or_none(noise in prop::collection::vec(any::<u8>(), EH_END - EH_FRAME_HDR)) {
        let mut bytes = SMALL.to_vec();
        bytes[EH_FRAME_HDR..EH_END].copy_from_slice(&noise);
        look_up_everything(&loaded(&bytes).1);
        // The head of the tables as it should be, so that the noise is reached.
        bytes[EH_FRAME_HDR..EH_FRAME_HDR + 12].copy_from_slice(&SMALL[EH_FRAME_HDR..EH_FRAME_HDR + 12]);
        let (_memory, module) = loaded(&bytes);
        look_up_everything(&module);
    }

    #[test]
    fn a_damaged_file_gives_names_or_none(places in damage(0..SMALL.len()), length in 0..SMALL.len() * 2) {
        let mut bytes = damaged(&places);
        bytes.truncate(length.max(64));
        let path = std::env::temp_dir().join(format!("rheap-fuzz-{}-{:?}.so", std::process::id(), std::thread::current().id()));
        std::fs::write(&path, &bytes).unwrap();
        if let Some(source) = debug_files::open(&path) {
            for address in (TEXT as u64..EH_FRAME_HDR as u64).step_by(7) {
                source.function(address);
                if let Some(dwarf) = &source.dwarf
                    && let Ok(mut frames) = dwarf.find_frames(address)
                {
                    for _ in 0..64 {
                        match frames.next() {
                            Ok(Some(frame)) => drop(frame.function.map(|f| f.demangle().map(|n| n.len()))),
                            _ => break,
                        }
                    }
                }
            }
        }
        std::fs::remove_file(&path).unwrap();
    }

}

proptest! {
    // Each takes a thousand times as long as one of the others.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.div_ceil(10)))]

    #[test]
    fn a_mapping_full_of_noise_is_read_without_harm(seed in any::<u64>(), density in 1..64u64) {
        let share = Share::map(4, 256).unwrap();
        let mut state = seed | 1;
        for word in share.raw_words() {
            // xorshift; small numbers are as likely as large ones, since ids and lengths are small.
            state ^= state << 13; state ^= state >> 7; state ^= state << 17;
            if state % 64 < density {
                word.store(state >> (state % 61), Relaxed);
            }
        }
        // No signal is sent to whoever stands in the noise: 0 only asks.
        for owner in share.owners { owner.store(i32::MAX - 3, Relaxed); }
        share.bury_dead(5);
        let mut symbols = Symbols::new(&share);
        for id in 0..600 {
            share.path_name(id);
            for word in share.stacks.get(id) { crate::symbols::address(&share, word); }
            share.modules.get(id);
        }
        symbols.stack(1);
        for ending in share.endings.all() {
            for held in ending.sites { share.path_name(held.path); }
        }
        for site in share.sites.rows { let _ = (site.copy(), site.held(), site.generations()); }
        for row in share.rows.rows { let _ = (row.copy(), row.held()); }
        for owner in share.owners { slot::alive(owner.load(Relaxed)); }
        share.release_dead(None);
        let claimed = share.claim_slot(std::process::id() as i32, 4);
        prop_assert!(claimed.is_some());
        prop_assert_eq!(share.sites.owned(claimed.unwrap()).count(), 0);
    }
}
