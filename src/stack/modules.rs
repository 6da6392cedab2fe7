//! The executables and libraries of this process: where they lie, and where their unwind tables are.

use std::ffi::CStr;

use super::rules;
use crate::share::dictionary::{Dictionary, pack};

/// One loaded file, by its executable part.
#[derive(Clone, Copy)]
pub struct Module {
    pub start: u64,
    pub end: u64,
    /// What to subtract from an address to get the file's own.
    pub bias: u64,
    /// Address of `.eh_frame_hdr`, 0 where there is none, and the end of what is mapped behind it.
    pub eh_frame_hdr: u64,
    pub eh_end: u64,
    /// Id of its path in the dictionary of modules, 0 if that is full.
    pub id: u32,
    /// Whether its code keeps frame pointers, so that the cheap walk is right in it.
    pub frame_pointers: bool,
}

const CAPACITY: usize = 192;

#[repr(C)]
pub struct Modules {
    /// The one found last.
    last: usize,
    list: [Module; CAPACITY],
    len: usize,
    /// Loads and unloads that the dynamic linker had counted when we looked.
    generation: (u64, u64),
    /// Something was unloaded since this was last cleared: what is known of addresses may be of other code.
    pub unloaded: bool,
    main_path: [u8; 256],
    main_path_len: usize,
    /// Testing and distrust: never use frame pointers.
    pub dwarf_only: bool,
}

const NONE: Module = Module { start: 0, end: 0, bias: 0, eh_frame_hdr: 0, eh_end: 0, id: 0, frame_pointers: false };

impl Modules {
    pub const fn new() -> Self {
        Modules {
            last: 0,
            list: [NONE; CAPACITY],
            len: 0,
            generation: (0, 0),
            unloaded: false,
            main_path: [0; 256],
            main_path_len: 0,
            dwarf_only: false,
        }
    }

    /// Notes the path of the executable, for which the dynamic linker has no name. Allocates: at load only.
    pub fn set_main_path(&mut self) {
        if let Ok(path) = std::fs::read_link("/proc/self/exe") {
            let bytes = path.as_os_str().as_encoded_bytes();
            self.main_path_len = bytes.len().min(256);
            self.main_path[..self.main_path_len].copy_from_slice(&bytes[..self.main_path_len]);
        }
    }

    /// The module that an address lies in. A library loaded since the last look is found.
    #[inline]
    pub fn find(&mut self, address: u64, names: &Dictionary) -> Option<&Module> {
        let last = &self.list[self.last];
        if address >= last.start && address < last.end {
            return Some(&self.list[self.last]);
        }
        self.search(address, names)
    }

    fn search(&mut self, address: u64, names: &Dictionary) -> Option<&Module> {
        let known = |s: &Self| s.list[..s.len].iter().position(|m| address >= m.start && address < m.end);
        let found = known(self).or_else(|| {
            self.refresh(names);
            known(self)
        })?;
        self.last = found;
        Some(&self.list[found])
    }

    /// Module id and offset of a return address.
    pub fn locate(&mut self, address: u64, names: &Dictionary) -> Option<(u32, u64)> {
        let module = self.find(address, names)?;
        (module.id != 0).then(|| (module.id, address - module.bias))
    }

    /// Where a module, known by its dictionary id, lies in this process.
    pub fn by_id(&self, id: u32) -> Option<&Module> {
        self.list[..self.len].iter().find(|m| m.id == id)
    }

    /// Looks at the dynamic linker's list if it has changed. Takes no memory.
    pub fn refresh(&mut self, names: &Dictionary) {
        let mut look = Look { modules: self, names, first: true };
        // SAFETY: the callback gets a pointer to `look`, which lives until the call returns.
        unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut look).cast()) };
    }
}

struct Look<'a> {
    modules: &'a mut Modules,
    names: &'a Dictionary,
    first: bool,
}

unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _size: usize, data: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `refresh` passes its Look, and the dynamic linker a valid info with its program headers.
    let (look, info) = unsafe { (&mut *data.cast::<Look>(), &*info) };
    let generation = (info.dlpi_adds, info.dlpi_subs);
    if look.first {
        if look.modules.generation == generation {
            return 1;
        }
        look.modules.unloaded |= look.modules.generation.1 != generation.1;
        // Something may lie where something else lay before: forget all, keep nothing half-right.
        look.modules.generation = generation;
        look.modules.len = 0;
        look.modules.last = 0;
    }
    let main = std::mem::take(&mut look.first);
    // SAFETY: as above; names of loaded objects are C strings.
    let (headers, name) = unsafe {
        (
            std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum as usize),
            if info.dlpi_name.is_null() { c"" } else { CStr::from_ptr(info.dlpi_name) },
        )
    };
    let at = |address: u64| info.dlpi_addr.wrapping_add(address);
    let mut module = Module { bias: info.dlpi_addr, ..NONE };
    for header in headers {
        if header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_X != 0 && module.end == 0 {
            module.start = at(header.p_vaddr);
            module.end = module.start + header.p_memsz;
        }
        if header.p_type == libc::PT_GNU_EH_FRAME {
            module.eh_frame_hdr = at(header.p_vaddr);
        }
    }
    for header in headers {
        let (start, end) = (at(header.p_vaddr), at(header.p_vaddr) + header.p_memsz);
        if header.p_type == libc::PT_LOAD && (start..end).contains(&module.eh_frame_hdr) {
            module.eh_end = end;
        }
    }
    if module.end == 0 || look.modules.len == CAPACITY {
        return 0;
    }
    let path = if main { &look.modules.main_path[..look.modules.main_path_len] } else { name.to_bytes() };
    let mut words = [0; 64];
    let count = pack(0, path, &mut words);
    module.id = look.names.intern(&words[..count]);
    module.frame_pointers = rules::keeps_frame_pointers(&module);
    look.modules.list[look.modules.len] = module;
    look.modules.len += 1;
    0
}
