//! gzipped profile.proto, as `go tool pprof` and its like read it.
//!
//! The message is written by hand: it has a dozen fields, and two wire types.

use std::collections::HashMap;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::Model;
use crate::moment;

/// One sample for each call site, with the sample types of Go's heap profiles: alloc_objects, alloc_space,
/// inuse_objects, inuse_space. Estimates are unbiased already. Labels: backend_type, context, query_id.
pub fn profile(model: &Model) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::default());
    // Writing into memory does not fail.
    let _ = out.write_all(&message(model));
    out.finish().unwrap_or_default()
}

/// The address range of a module in the profile: an offset alone would be ambiguous between modules.
const MODULE: u64 = 1 << 40;

/// Fields of one message.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// A number; 0 is left out, as it is the default.
    fn number(&mut self, field: u64, value: u64) {
        if value != 0 {
            self.varint(field << 3);
            self.varint(value);
        }
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn numbers(&mut self, field: u64, values: impl IntoIterator<Item = u64>) {
        let mut packed = Message::default();
        values.into_iter().for_each(|v| packed.varint(v));
        self.bytes(field, &packed.0);
    }

    /// A message of numbers alone.
    fn fields(&mut self, field: u64, numbers: &[(u64, u64)]) {
        let mut inner = Message::default();
        numbers.iter().for_each(|&(f, v)| inner.number(f, v));
        self.bytes(field, &inner.0);
    }
}

#[derive(Default)]
struct Strings {
    ids: HashMap<String, u64>,
    list: Vec<String>,
}

impl Strings {
    fn id(&mut self, text: &str) -> u64 {
        if let Some(&id) = self.ids.get(text) {
            return id;
        }
        let id = self.list.len() as u64;
        self.list.push(text.into());
        self.ids.insert(text.into(), id);
        id
    }
}

fn message(model: &Model) -> Vec<u8> {
    let mut strings = Strings::default();
    strings.id("");
    let mut profile = Message::default();
    for (kind, unit) in
        [("alloc_objects", "count"), ("alloc_space", "bytes"), ("inuse_objects", "count"), ("inuse_space", "bytes")]
    {
        let fields = [(1, strings.id(kind)), (2, strings.id(unit))];
        profile.fields(1, &fields);
    }
    let labels = ["backend_type", "context", "query_id"].map(|key| strings.id(key));
    for site in &model.sites {
        let mut sample = Message::default();
        sample.numbers(1, site.stack.iter().map(|&call| call as u64 + 1));
        sample.numbers(2, [site.alloc_count, site.alloc_bytes, site.live_count, site.live_bytes]);
        let query_id = site.query_id.map(|id| id.to_string());
        let values = [Some(site.backend_type.as_str()), Some(site.context.as_str()), query_id.as_deref()];
        for (key, value) in labels.into_iter().zip(values) {
            // As text, also the query id: pprof would round a number for display.
            if let Some(value) = value {
                sample.fields(3, &[(1, key), (2, strings.id(value))]);
            }
        }
        profile.bytes(2, &sample.0);
    }
    // The first mapping is the main binary: the module that `main` is in, of which every whole stack ends.
    let main = model.sites.iter().find_map(|s| model.calls[*s.stack.last()? as usize].module).unwrap_or(0);
    let mut order: Vec<u32> = (0..model.modules.len() as u32).collect();
    order.sort_by_key(|&m| (m != main, m));
    for module in order {
        let start = (module as u64 + 1) * MODULE;
        let file = strings.id(&model.modules[module as usize]);
        // Functions, files, lines and inlined frames are all there already: nothing is to be looked up.
        let known = [(7, 1), (8, 1), (9, 1), (10, 1)];
        profile
            .fields(3, &[&[(1, module as u64 + 1), (2, start), (3, start + MODULE), (5, file)], &known[..]].concat());
    }
    let mut functions: HashMap<(u64, u64), u64> = HashMap::new();
    let mut function_messages = Message::default();
    for (index, call) in model.calls.iter().enumerate() {
        let mut location = Message::default();
        location.number(1, index as u64 + 1);
        if let Some(module) = call.module {
            location.number(2, module as u64 + 1);
            location.number(3, (module as u64 + 1) * MODULE + call.offset);
        }
        for frame in &call.frames {
            let (file, line) = frame.file_and_line().unwrap_or(("", 0));
            let key = (strings.id(frame.name()), strings.id(file));
            let next = functions.len() as u64 + 1;
            let id = *functions.entry(key).or_insert_with(|| {
                function_messages.fields(5, &[(1, next), (2, key.0), (3, key.0), (4, key.1)]);
                next
            });
            location.fields(4, &[(1, id), (2, line as u64)]);
        }
        profile.bytes(4, &location.0);
    }
    profile.0.extend(function_messages.0);
    let comment = strings.id(&format!("rheap, {}, {}", model.subject(), model.server));
    let (space, unit, shown) = (strings.id("space"), strings.id("bytes"), strings.id("inuse_space"));
    profile.number(9, moment::unix_nanos(model.taken_at) as u64);
    profile.fields(11, &[(1, space), (2, unit)]);
    profile.number(12, if model.sites.iter().all(|s| s.exact) { 1 } else { model.sample_bytes });
    profile.number(13, comment);
    profile.number(14, shown);
    for text in &strings.list {
        profile.bytes(6, text.as_bytes());
    }
    profile.0
}

#[cfg(test)]
mod tests {
    use super::super::samples::{large, small};
    use super::*;

    fn read(bytes: &[u8], at: &mut usize) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = bytes[*at];
            *at += 1;
            value |= ((byte & 0x7f) as u64) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }

    /// (field, bytes or number) of a message.
    fn fields(bytes: &[u8]) -> Vec<(u64, Vec<u8>, u64)> {
        let (mut at, mut found) = (0, Vec::new());
        while at < bytes.len() {
            let tag = read(bytes, &mut at);
            let value = read(bytes, &mut at);
            if tag & 7 == 2 {
                found.push((tag >> 3, bytes[at..at + value as usize].to_vec(), 0));
                at += value as usize;
            } else {
                found.push((tag >> 3, Vec::new(), value));
            }
        }
        found
    }

    #[test]
    fn samples_locations_and_strings_are_all_there() {
        let all = fields(&message(&small()));
        let count = |field| all.iter().filter(|f| f.0 == field).count();
        assert_eq!((count(1), count(2), count(3), count(4)), (4, 2, 1, 5));
        let strings: Vec<&[u8]> = all.iter().filter(|f| f.0 == 6).map(|f| f.1.as_slice()).collect();
        assert_eq!(strings[0], b"");
        assert!(
            strings.contains(&&b"lappend"[..])
                && strings.contains(&&b"src/lappend.c"[..])
                && strings.contains(&&b"-5"[..])
        );
        let sample = fields(&all.iter().find(|f| f.0 == 2).unwrap().1);
        assert_eq!(sample[0].1, [1, 2, 3]);
        let (values, mut at) = (&sample[1].1, 0);
        assert_eq!([0; 4].map(|_| read(values, &mut at)), [30, 3000, 30, 3000]);
        // Two functions inlined at one location, the innermost first.
        let location = fields(&all.iter().filter(|f| f.0 == 4).nth(1).unwrap().1);
        assert_eq!(location.iter().filter(|f| f.0 == 4).count(), 2);
    }

    #[test]
    fn ten_thousand_stacks_take_seconds() {
        let start = std::time::Instant::now();
        let bytes = profile(&large());
        assert_eq!(bytes[..2], [0x1f, 0x8b]);
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
}
