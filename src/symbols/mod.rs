//! From a return address to functions, files and lines. Only in the process that asks, and nothing of it is kept.

pub(crate) mod debug_files;
pub mod helpers;

use std::collections::HashMap;
use std::path::Path;

use crate::share::{Share, dictionary};
use crate::stack::{CUT, unframe};

/// One function at one place; several of them for one address where functions were inlined.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Frame {
    /// None where the name would be a guess.
    pub function: Option<String>,
    /// `file:line`, or `module+0xoffset` without debug information.
    pub location: String,
    /// `module+0xoffset`, always.
    pub address: String,
}

impl Frame {
    pub fn name(&self) -> &str {
        self.function.as_deref().unwrap_or(&self.address)
    }

    /// Of its source, where debug information has told.
    pub fn file_and_line(&self) -> Option<(&str, u32)> {
        let (file, line) = self.location.rsplit_once(':')?;
        Some((file, line.parse().ok()?))
    }

    pub fn describe(&self) -> String {
        match &self.function {
            Some(function) => format!("{function} at {}", self.location),
            None => self.address.clone(),
        }
    }
}

fn module_path(share: &Share, module: u32) -> Option<String> {
    dictionary::unpack(&share.modules.get(module)).map(|(_, path)| path)
}

/// The file of a frame word's module and the offset in it; None for the end of a stack that was cut.
pub fn place(share: &Share, word: u64) -> Option<(String, u64)> {
    let (module, offset) = unframe(word);
    (word != CUT).then(|| (module_path(share, module).unwrap_or_else(|| "(unknown module)".into()), offset))
}

fn module_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A source path without the folder that it was built in: from its last `src` or `contrib` on.
fn short(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            ".." if parts.last().is_some_and(|p| !p.is_empty()) => drop(parts.pop()),
            "." => (),
            part => parts.push(part),
        }
    }
    match parts.iter().rposition(|&p| p == "src" || p == "contrib") {
        Some(root) => parts[root..].join("/"),
        None => parts.join("/"),
    }
}

/// `module+0xoffset` of a frame word.
pub fn address(share: &Share, word: u64) -> String {
    if word == CUT {
        return "(cut)".into();
    }
    let (module, offset) = unframe(word);
    match module_path(share, module) {
        Some(path) => format!("{}+{offset:#x}", module_name(&path)),
        None => "(unknown module)".into(),
    }
}

/// The symbols that one query needs.
pub struct Symbols {
    share: Share,
    sources: HashMap<u32, Option<debug_files::Source>>,
    frames: HashMap<u64, Vec<Frame>>,
}

impl Symbols {
    pub fn new(share: &Share) -> Self {
        Symbols { share: *share, sources: HashMap::new(), frames: HashMap::new() }
    }

    /// The frames of a stored stack, innermost first, down to `main`.
    pub fn stack(&mut self, stack: u32) -> Vec<Frame> {
        let mut all = Vec::new();
        for word in self.share.stacks.get(stack) {
            let frames = self.frames(word);
            let outermost = frames.iter().any(|f| f.function.as_deref() == Some("main"));
            all.extend(frames);
            if outermost {
                break;
            }
        }
        all
    }

    /// The functions at a frame word: one, or several that are inlined into each other, innermost first.
    pub fn frames(&mut self, word: u64) -> Vec<Frame> {
        if let Some(known) = self.frames.get(&word) {
            return known.clone();
        }
        let found = self.resolve(word);
        self.frames.insert(word, found.clone());
        found
    }

    fn resolve(&mut self, word: u64) -> Vec<Frame> {
        let address = address(&self.share, word);
        let unnamed = || vec![Frame { function: None, location: address.clone(), address: address.clone() }];
        let (module, offset) = unframe(word);
        if word == CUT || offset == 0 {
            return unnamed();
        }
        let share = self.share;
        let source = self.sources.entry(module).or_insert_with(|| {
            let path = module_path(&share, module)?;
            debug_files::open(Path::new(&path))
        });
        let Some(source) = source else { return unnamed() };
        // The return address belongs to the instruction after the call.
        let probe = offset - 1;
        let mut frames = Vec::new();
        if let Some(Ok(mut inlined)) = source.dwarf.as_ref().map(|d| d.find_frames(probe)) {
            while let Ok(Some(frame)) = inlined.next() {
                let function = frame.function.and_then(|f| f.demangle().ok().map(|n| n.into_owned()));
                let location = frame.location.and_then(|l| Some(format!("{}:{}", short(l.file?), l.line?)));
                frames.push(Frame {
                    function,
                    location: location.unwrap_or_else(|| address.clone()),
                    address: address.clone(),
                });
            }
        }
        if frames.iter().all(|f| f.function.is_none()) {
            frames = unnamed();
            frames[0].function =
                source.function(probe).map(|name| addr2line::demangle_auto(name.into(), None).into_owned());
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stack::frame;

    #[test]
    fn a_source_path_is_short_and_clear() {
        assert_eq!(short("/b/pg/src/backend/postmaster/postmaster.c"), "src/backend/postmaster/postmaster.c");
        assert_eq!(
            short("/b/src/backend/executor/../../../src/include/executor/executor.h"),
            "src/include/executor/executor.h"
        );
        assert_eq!(short("./build/../src/common/x.c"), "src/common/x.c");
        assert_eq!(short("leak.c"), "leak.c");
    }

    /// The offset of a function of this test's own executable.
    fn own_frame(share: &Share, f: usize) -> u64 {
        let exe = std::fs::read_link("/proc/self/exe").unwrap();
        let mut words = [0; 64];
        let n = dictionary::pack(0, exe.as_os_str().as_encoded_bytes(), &mut words);
        let module = share.modules.intern(&words[..n]);
        let mut modules = crate::stack::modules::Modules::new();
        modules.set_main_path();
        modules.refresh(&share.modules);
        let (found, offset) = modules.locate(f as u64 + 4, &share.modules).unwrap();
        assert_eq!(found, module);
        frame(module, offset)
    }

    #[inline(never)]
    fn landmark() {
        std::hint::black_box(17);
    }

    #[test]
    fn an_address_in_a_file_with_debug_information_has_function_and_line() {
        let share = Share::map(1, 16).unwrap();
        let word = own_frame(&share, landmark as *const () as usize);
        let stack = share.stacks.intern(&[word, CUT]);
        let frames = Symbols::new(&share).stack(stack);
        assert!(frames[0].name().ends_with("landmark"), "{frames:?}");
        assert!(frames[0].location.starts_with("src/symbols/mod.rs:"), "{frames:?}");
        assert_eq!(frames[1].describe(), "(cut)");
    }

    #[test]
    fn an_unknown_module_is_not_guessed() {
        let share = Share::map(1, 16).unwrap();
        let stack = share.stacks.intern(&[frame(499, 0x10)]);
        assert_eq!(Symbols::new(&share).stack(stack)[0].describe(), "(unknown module)");
    }
}
