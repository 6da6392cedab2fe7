//! How to get from a frame to its caller, out of a module's `.eh_frame`: read once per return address, kept compact.

use gimli::{
    BaseAddresses, CfaRule, EhFrame, EhFrameHdr, EhHdrTable, EndianSlice, FrameDescriptionEntry, NativeEndian,
    ParsedEhFrameHdr, Register, RegisterRule, UnwindContext, UnwindContextStorage, UnwindSection, UnwindTableRow,
    X86_64,
};

use super::modules::Module;

/// The caller's frame in terms of this one's registers. The return address lies just below the CFA.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rule {
    pub kind: Kind,
    /// The CFA is the base register plus this many bytes.
    pub cfa_offset: i32,
    /// The caller's frame pointer is stored this many bytes from the CFA; 0 where it is unchanged.
    pub bp_offset: i32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Kind {
    /// No rule, or one that is not worth keeping: the walk is cut here.
    #[default]
    Unknown,
    Sp,
    Bp,
    /// The process's first frame.
    Outermost,
}

/// Bits of a packed rule: where the return address lies in its module, and of each offset, in words of the stack.
const WHERE: u32 = 28;
const OFFSET: u32 = 17;

impl Rule {
    /// The rule and where its return address lies, in one word that is never 0. None if they do not fit.
    pub fn pack(self, place: u64) -> Option<u64> {
        let kind = match self.kind {
            Kind::Unknown => return None,
            Kind::Sp => 1,
            Kind::Bp => 2,
            Kind::Outermost => 3,
        };
        let offset = |bytes: i32| {
            let words = (bytes / 8) as i64;
            let fits = bytes % 8 == 0 && words << (64 - OFFSET) >> (64 - OFFSET) == words;
            fits.then_some(words as u64 & ((1 << OFFSET) - 1))
        };
        let (cfa, bp) = (offset(self.cfa_offset)?, offset(self.bp_offset)?);
        (place >> WHERE == 0).then_some(kind << 62 | cfa << (WHERE + OFFSET) | bp << WHERE | place)
    }

    /// The other way; None if the word is of another place.
    pub fn unpack(word: u64, place: u64) -> Option<Rule> {
        let kind = match word >> 62 {
            1 => Kind::Sp,
            2 => Kind::Bp,
            3 => Kind::Outermost,
            _ => return None,
        };
        let offset = |above: u32| ((word << above) as i64 >> (64 - OFFSET)) as i32 * 8;
        let (cfa_offset, bp_offset) = (offset(64 - WHERE - 2 * OFFSET), offset(64 - WHERE - OFFSET));
        (word & ((1 << WHERE) - 1) == place).then_some(Rule { kind, cfa_offset, bp_offset })
    }
}

/// gimli's working memory, on the stack: there is no malloc inside a palloc.
struct OnStack;

impl UnwindContextStorage<usize> for OnStack {
    type Rules = [(Register, RegisterRule<usize>); 24];
    type Stack = [UnwindTableRow<usize, Self>; 3];
}

type Slice = EndianSlice<'static, NativeEndian>;

struct Sections {
    header: ParsedEhFrameHdr<Slice>,
    frames: EhFrame<Slice>,
    bases: BaseAddresses,
}

fn memory(start: u64, end: u64) -> Slice {
    // SAFETY: callers pass ranges inside one PT_LOAD segment of a module that the dynamic linker has mapped.
    EndianSlice::new(unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) }, NativeEndian)
}

fn sections(module: &Module) -> Option<Sections> {
    if module.eh_frame_hdr == 0 || module.eh_end <= module.eh_frame_hdr {
        return None;
    }
    let bases = BaseAddresses::default().set_eh_frame_hdr(module.eh_frame_hdr).set_text(module.start);
    let bytes = memory(module.eh_frame_hdr, module.eh_end);
    // What every linker writes: a count of four bytes, entries of four bytes each way, from the header on. gimli
    // multiplies without a check what others may claim.
    if !matches!(bytes.slice(), [1, _, 0x03, 0x3b, ..]) {
        return None;
    }
    let header = EhFrameHdr::from(bytes).parse(&bases, 8).ok()?;
    let gimli::Pointer::Direct(frames) = header.eh_frame_ptr() else { return None };
    // Where .eh_frame lies in the same segment as its header, its end is the segment's.
    if frames < module.eh_frame_hdr || frames >= module.eh_end {
        return None;
    }
    let bases = bases.set_eh_frame(frames);
    Some(Sections { header, frames: EhFrame::from(memory(frames, module.eh_end)), bases })
}

/// The rule for a return address inside the module.
pub fn find(module: &Module, return_address: u64) -> Rule {
    read(module, return_address).unwrap_or_default()
}

fn read(module: &Module, return_address: u64) -> Option<Rule> {
    let Sections { header, frames, bases } = sections(module)?;
    let table = header.table()?;
    let mut context = UnwindContext::<usize, OnStack>::new_in();
    // The return address may be the first of the next function; the call lies before it.
    let address = return_address - 1;
    let fde = fde_at(&table, &frames, &bases, table.lookup(address, &bases).ok()?)?;
    if !fde.contains(address) || fde.is_signal_trampoline() {
        return None;
    }
    let row = fde.unwind_info_for_address(&frames, &bases, &mut context, address).ok()?;
    rule_of(row)
}

/// The description that an entry of the table points to. gimli does not expect one before the first of them.
fn fde_at(
    table: &EhHdrTable<'_, Slice>,
    frames: &EhFrame<Slice>,
    bases: &BaseAddresses,
    pointer: gimli::Pointer,
) -> Option<FrameDescriptionEntry<Slice>> {
    let gimli::Pointer::Direct(address) = pointer else { return None };
    if address < bases.eh_frame.section? {
        return None;
    }
    let offset = table.pointer_to_offset(pointer).ok()?;
    frames.fde_from_offset(bases, offset, EhFrame::cie_from_offset).ok()
}

fn rule_of(row: &UnwindTableRow<usize, OnStack>) -> Option<Rule> {
    let return_address = row.register(X86_64::RA);
    if return_address == Some(RegisterRule::Undefined) {
        return Some(Rule { kind: Kind::Outermost, ..Rule::default() });
    }
    if return_address != Some(RegisterRule::Offset(-8)) {
        return None;
    }
    let CfaRule::RegisterAndOffset { register, offset } = *row.cfa() else { return None };
    let kind = match register {
        X86_64::RSP => Kind::Sp,
        X86_64::RBP => Kind::Bp,
        _ => return None,
    };
    let bp_offset = match row.register(X86_64::RBP) {
        None | Some(RegisterRule::SameValue | RegisterRule::Undefined) => 0,
        Some(RegisterRule::Offset(offset)) => offset,
        Some(_) => return None,
    };
    Some(Rule { kind, cfa_offset: i32::try_from(offset).ok()?, bp_offset: i32::try_from(bp_offset).ok()? })
}

/// Start and end of the function, or the part of it, that an address lies in.
pub fn function(module: &Module, address: u64) -> Option<(u64, u64)> {
    let Sections { header, frames, bases } = sections(module)?;
    let table = header.table()?;
    let fde = fde_at(&table, &frames, &bases, table.lookup(address, &bases).ok()?)?;
    fde.contains(address).then_some(())?;
    Some((fde.initial_address(), fde.end_address()))
}

/// The functions to look at before a module's frame pointers are trusted.
const PROBES: usize = 200;
const FEWEST: usize = 16;

/// Whether nearly all functions of the module with a frame keep the frame pointer in it, judged by a sample of its
/// unwind tables: a compiler flag holds for a whole build, hand-written assembly aside.
pub fn keeps_frame_pointers(module: &Module) -> bool {
    let Some(Sections { header, frames, bases }) = sections(module) else { return false };
    let Some(table) = header.table() else { return false };
    let mut context = UnwindContext::<usize, OnStack>::new_in();
    let (mut with, mut without) = (0, 0);
    let count = entries(&table, &bases);
    let mut iterator = table.iter(&bases);
    for _ in 0..PROBES.min(count) {
        let Ok(Some((_, pointer))) = iterator.nth((count / PROBES).saturating_sub(1)) else { break };
        let Some(fde) = fde_at(&table, &frames, &bases, pointer) else { continue };
        match frame_kind(&fde, &frames, &bases, &mut context) {
            Some(true) => with += 1,
            Some(false) => without += 1,
            None => (),
        }
    }
    with >= FEWEST && without * 50 <= with
}

fn entries(table: &EhHdrTable<'_, Slice>, bases: &BaseAddresses) -> usize {
    let mut iterator = table.iter(bases);
    let mut count = 0;
    while let Ok(Some(_)) = iterator.next() {
        count += 1;
    }
    count
}

/// Whether a function that has a frame keeps the frame pointer in it; None for one without a frame.
fn frame_kind(
    fde: &FrameDescriptionEntry<Slice>,
    frames: &EhFrame<Slice>,
    bases: &BaseAddresses,
    context: &mut UnwindContext<usize, OnStack>,
) -> Option<bool> {
    let mut rows = fde.rows(frames, bases, context).ok()?;
    let mut kind = None;
    while let Ok(Some(row)) = rows.next_row() {
        match *row.cfa() {
            CfaRule::RegisterAndOffset { register: X86_64::RBP, offset: 16 } => return Some(true),
            CfaRule::RegisterAndOffset { register: X86_64::RSP, offset: 8 } => (),
            // Also the first instructions of a function that will set up its frame pointer; then a row follows.
            _ => kind = Some(false),
        }
    }
    kind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_that_fits_into_a_word_comes_out_of_it() {
        let rule = |kind, cfa_offset, bp_offset| Rule { kind, cfa_offset, bp_offset };
        for (place, rule) in [
            (0, rule(Kind::Outermost, 0, 0)),
            (0x7f_ffff, rule(Kind::Sp, 8, 0)),
            (0xfff_ffff, rule(Kind::Bp, 16, -16)),
            (1, rule(Kind::Sp, 8 * 0xffff, -8 * 0x1_0000)),
        ] {
            let word = rule.pack(place).unwrap();
            assert_eq!(Rule::unpack(word, place), Some(rule));
            assert_eq!(Rule::unpack(word, place ^ 1), None);
        }
        assert_eq!(Rule::unpack(0, 0), None);
        for (place, rule) in [
            (1 << WHERE, rule(Kind::Sp, 8, 0)),
            (0, rule(Kind::Sp, 12, 0)),
            (0, rule(Kind::Sp, 8 * 0x1_0000, 0)),
            (0, rule(Kind::Bp, 16, -8 * 0x1_0001)),
            (0, rule(Kind::Unknown, 0, 0)),
        ] {
            assert_eq!(rule.pack(place), None);
        }
    }
}
