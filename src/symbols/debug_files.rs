//! Where the names of a module are: in itself, or in a debug file of its own, found by build-id or by link.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use addr2line::Loader;
use memmap2::Mmap;
use object::{Object, ObjectSymbol, SymbolKind};

const DEBUG_ROOT: &str = "/usr/lib/debug";

/// What one module can tell about its addresses.
pub struct Source {
    /// Lines and inlined functions; None where the file has no debug information that can be read.
    pub dwarf: Option<Loader>,
    /// (address, size, name), by address. Only functions whose size is known.
    functions: Vec<(u64, u64, String)>,
}

impl Source {
    /// The function that covers an address: in a stripped library the nearest name is somebody else's, so its
    /// size decides.
    pub fn function(&self, address: u64) -> Option<&str> {
        let after = self.functions.partition_point(|f| f.0 <= address);
        let (start, size, name) = self.functions.get(after.checked_sub(1)?)?;
        (address - start < *size).then_some(name.as_str())
    }
}

/// None when the module is no file that can be read, as the kernel's vdso.
pub fn open(module: &Path) -> Option<Source> {
    if !module.is_absolute() {
        return None;
    }
    let map = map(module)?;
    let file = object::File::parse(&*map).ok()?;
    let mut functions = Vec::new();
    collect(&file, &mut functions);
    let dwarf = match separate(module, &file) {
        Some((debug, supplement)) => {
            if let Some(map) = self::map(&debug)
                && let Ok(file) = object::File::parse(&*map)
            {
                collect(&file, &mut functions);
            }
            Loader::new_with_sup(debug, supplement).ok()
        }
        None => Loader::new(module).ok(),
    };
    functions.sort();
    functions.dedup_by_key(|f| f.0);
    Some(Source { dwarf, functions })
}

fn map(path: &Path) -> Option<Mmap> {
    // SAFETY: a file that shrinks while it is mapped would raise SIGBUS. Package managers replace libraries by
    // renaming a new file into place and leave the old one whole.
    unsafe { Mmap::map(&File::open(path).ok()?).ok() }
}

fn collect(file: &object::File, functions: &mut Vec<(u64, u64, String)>) {
    let symbols = file.symbols().chain(file.dynamic_symbols());
    let sized = symbols.filter(|s| s.kind() == SymbolKind::Text && s.is_definition() && s.size() > 0);
    functions.extend(sized.filter_map(|s| Some((s.address(), s.size(), s.name().ok()?.to_string()))));
}

/// The debug file of a module, and that file's own supplement where it has one.
fn separate(module: &Path, file: &object::File) -> Option<(PathBuf, Option<PathBuf>)> {
    let mut tried = HashSet::new();
    let found = by_build_id(file.build_id().ok()?)
        .into_iter()
        .chain(by_link(module, file))
        .find(|p| tried.insert(p.clone()) && p.is_file())?;
    let map = map(&found)?;
    let supplement = object::File::parse(&*map).ok().and_then(|f| {
        let (name, id) = f.gnu_debugaltlink().ok()??;
        let named = found.parent()?.join(Path::new(std::str::from_utf8(name).ok()?));
        by_build_id(Some(id)).into_iter().chain([named]).find(|p| p.is_file())
    });
    Some((found, supplement))
}

fn by_build_id(id: Option<&[u8]>) -> Option<PathBuf> {
    let hex: String = id?.iter().map(|b| format!("{b:02x}")).collect();
    (hex.len() > 2)
        .then(|| Path::new(DEBUG_ROOT).join(".build-id").join(&hex[..2]).join(format!("{}.debug", &hex[2..])))
}

fn by_link(module: &Path, file: &object::File) -> Vec<PathBuf> {
    let Ok(Some((name, _))) = file.gnu_debuglink() else { return Vec::new() };
    let (Ok(name), Some(folder)) = (std::str::from_utf8(name), module.parent()) else { return Vec::new() };
    let under_root = Path::new(DEBUG_ROOT).join(folder.strip_prefix("/").unwrap_or(folder)).join(name);
    // A file that names itself as its debug file would be a circle.
    [folder.join(name), folder.join(".debug").join(name), under_root].into_iter().filter(|p| p != module).collect()
}
