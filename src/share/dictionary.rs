//! Things that many processes see and that never change are stored once: stacks, context paths, module names.
//!
//! A word list gets an id, the same id for the same words. Insert-only and lock-free; an insert that died half-way
//! costs an entry, nothing else. When it is full, `intern` says so and the caller does without.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

#[repr(C)]
pub struct Entry {
    /// 0: unused, or not told yet: the words count.
    hash: AtomicU64,
    /// Offset of the words << 16 | their number; 0: unused. Taken in one step when the words are written, so that two
    /// processes that come with the same words at once get one id.
    place: AtomicU64,
}

#[derive(Clone, Copy)]
pub struct Dictionary {
    pub entries: &'static [Entry],
    pub words: &'static [AtomicU64],
    /// Words given out. It starts at 0, and word 0 is never used, so that no place is 0.
    pub used: &'static AtomicU32,
}

const PROBES: usize = 64;

/// Mixes words into a hash that is never 0.
pub fn hash(words: &[u64]) -> u64 {
    let mut h: u64 = words.len() as u64 ^ 0x51_7C_C1_B7_27_22_0A_95;
    for &w in words {
        let wide = ((h ^ w) as u128).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
        h = (wide ^ (wide >> 64)) as u64 ^ h.rotate_left(23);
    }
    h.max(1)
}

impl Dictionary {
    /// The id of these words, at least 1, or 0 when the dictionary is full.
    pub fn intern(&self, words: &[u64]) -> u32 {
        let h = hash(words);
        let mut place = 0;
        for probe in 0..PROBES {
            let index = (h as usize).wrapping_add(probe) % self.entries.len();
            let entry = &self.entries[index];
            if entry.place.load(Acquire) == 0 {
                if place == 0 {
                    place = self.write(words);
                }
                if place == 0 {
                    return 0;
                }
                if entry.place.compare_exchange(0, place, AcqRel, Acquire).is_ok() {
                    entry.hash.store(h, Release);
                    return index as u32 + 1;
                }
            }
            let told = entry.hash.load(Acquire);
            if (told == h || told == 0) && self.equals(entry, words) {
                return index as u32 + 1;
            }
        }
        0
    }

    /// Writes the words where nobody looks yet. Their place, or 0 when there is no room.
    fn write(&self, words: &[u64]) -> u64 {
        // Once full it stays full: the counter must not come round.
        if self.used.load(Relaxed) as usize > self.words.len() {
            return 0;
        }
        let at = self.used.fetch_add(words.len() as u32, AcqRel) as usize + 1;
        if at + words.len() > self.words.len() {
            return 0;
        }
        for (cell, &word) in self.words[at..].iter().zip(words) {
            cell.store(word, Relaxed);
        }
        (at as u64) << 16 | words.len() as u64
    }

    fn equals(&self, entry: &Entry, words: &[u64]) -> bool {
        let stored = self.stored(entry);
        stored.len() == words.len() && stored.iter().zip(words).all(|(a, &b)| a.load(Relaxed) == b)
    }

    fn stored(&self, entry: &Entry) -> &'static [AtomicU64] {
        let place = entry.place.load(Acquire);
        let (at, len) = ((place >> 16) as usize, (place & 0xFFFF) as usize);
        self.words.get(at..at + len).filter(|_| place != 0).unwrap_or(&[])
    }

    /// The words of an id, where they lie; empty for an id that nobody got.
    pub fn words_of(&self, id: u32) -> &'static [AtomicU64] {
        self.entries.get((id as usize).wrapping_sub(1)).map_or(&[], |entry| self.stored(entry))
    }

    /// The words of an id; empty for an id that nobody got.
    pub fn get(&self, id: u32) -> Vec<u64> {
        self.words_of(id).iter().map(|w| w.load(Relaxed)).collect()
    }
}

/// A text as words, after one word of the caller's, without allocation. Returns the number of words used.
pub fn pack(first: u64, text: &[u8], words: &mut [u64; 64]) -> usize {
    let text = &text[..text.len().min(62 * 8)];
    words[0] = first;
    words[1] = text.len() as u64;
    for (i, part) in text.chunks(8).enumerate() {
        let mut bytes = [0; 8];
        bytes[..part.len()].copy_from_slice(part);
        words[i + 2] = u64::from_le_bytes(bytes);
    }
    2 + text.len().div_ceil(8)
}

/// What `pack` packed.
pub fn unpack(words: &[u64]) -> Option<(u64, String)> {
    let (&first, &len) = (words.first()?, words.get(1)?);
    let bytes: Vec<u8> = words[2..].iter().flat_map(|w| w.to_le_bytes()).take(len as usize).collect();
    Some((first, String::from_utf8_lossy(&bytes).into_owned()))
}

/// Writes the text that `pack` packed, without memory. Error: that of `out`.
pub fn write_text(words: &[AtomicU64], out: &mut impl std::fmt::Write) -> std::fmt::Result {
    let (mut bytes, mut length) = ([0u8; 62 * 8], 0);
    let wanted = words.get(1).map_or(0, |w| w.load(Relaxed) as usize).min(bytes.len());
    for word in words.iter().skip(2) {
        let Some(place) = bytes.get_mut(length..length + 8) else { break };
        place.copy_from_slice(&word.load(Relaxed).to_le_bytes());
        length += 8;
    }
    for part in bytes[..wanted.min(length)].utf8_chunks() {
        out.write_str(part.valid())?;
        if !part.invalid().is_empty() {
            out.write_char(char::REPLACEMENT_CHARACTER)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dictionary(entries: usize, words: usize) -> Dictionary {
        Dictionary {
            entries: (0..entries).map(|_| Entry { hash: 0.into(), place: 0.into() }).collect::<Vec<_>>().leak(),
            words: (0..words).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().leak(),
            used: Box::leak(Box::new(AtomicU32::new(0))),
        }
    }

    #[test]
    fn the_same_words_get_the_same_id_from_several_threads() {
        let d = dictionary(4096, 65536);
        let ids: Vec<Vec<u32>> = std::thread::scope(|s| {
            let all: Vec<_> =
                (0..4).map(|_| s.spawn(|| (1..1000u64).map(|i| d.intern(&[i, i * i, 7])).collect())).collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for (i, &id) in ids[0].iter().enumerate() {
            let i = i as u64 + 1;
            assert_eq!(d.get(id), [i, i * i, 7]);
        }
        assert!(ids.iter().all(|list| *list == ids[0]));
    }

    #[test]
    fn a_full_dictionary_says_so_and_keeps_what_it_has() {
        let d = dictionary(64, 33);
        let ids: Vec<u32> = (0..20u64).map(|i| d.intern(&[i, i])).collect();
        assert!(ids[..16].iter().all(|&id| id != 0) && ids[16..].iter().all(|&id| id == 0));
        assert_eq!(d.get(ids[15]), [15, 15]);
        assert_eq!(d.intern(&[3, 3]), ids[3]);
        assert!(d.get(0).is_empty());
        assert!(d.get(9999).is_empty());
    }

    #[test]
    fn a_text_survives_packing() {
        let mut words = [0; 64];
        for text in ["", "a", "TopMemoryContext", &"x".repeat(495)] {
            let n = pack(5, text.as_bytes(), &mut words);
            assert_eq!(unpack(&words[..n]), Some((5, text.to_string())));
            let mut written = String::new();
            write_text(&words[..n].iter().map(|&w| w.into()).collect::<Vec<_>>(), &mut written).unwrap();
            assert_eq!(written, text);
        }
    }
}
