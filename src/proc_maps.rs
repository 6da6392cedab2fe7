//! `/proc/self/maps`: what is mapped where in this process.

/// One line of it.
#[derive(Debug, PartialEq)]
pub struct Mapping<'a> {
    pub start: u64,
    pub end: u64,
    /// As `r-xp`.
    pub access: &'a str,
    /// Empty where there is none. It may hold spaces.
    pub path: &'a str,
}

/// The lines that can be read; what is none is left out.
pub fn parse(text: &str) -> impl Iterator<Item = Mapping<'_>> {
    text.lines().filter_map(|line| {
        // Range, access, offset, device and inode, each followed by one space; then the path, aligned by spaces.
        let mut fields = line.splitn(6, ' ');
        let (range, access) = (fields.next()?, fields.next()?);
        let path = fields.nth(3).unwrap_or("").trim_start();
        let (start, end) = range.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        (start < end).then_some(Mapping { start, end, access, path })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_path_may_hold_spaces() {
        let text = "55d0c0a00000-55d0c0b00000 r-xp 00001000 fe:01 123 \t  /srv/my servers/postgres\n7ffc0-7ffd0 rw-p 0 00:00 0\nnonsense\n9-3 rw-p";
        let all: Vec<_> = parse(text).map(|m| (m.start, m.access.to_string(), m.path.trim().to_string())).collect();
        assert_eq!(
            all,
            [
                (0x55d0c0a00000, "r-xp".into(), "/srv/my servers/postgres".into()),
                (0x7ffc0, "rw-p".into(), String::new())
            ]
        );
    }

    #[test]
    fn this_process_finds_its_own_code() {
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let here = parse as fn(&'static str) -> _ as *const () as u64;
        let found = parse(&text).find(|m| (m.start..m.end).contains(&here)).unwrap();
        assert!(found.access.contains('x') && found.path.starts_with('/'));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "([0-9a-f]{0,17}-?[0-9a-f]{0,17} ?[rwxp-]{0,4}[ a-z0-9:/\n\u{e9}]{0,40})*", other in ".*") {
            for mapping in parse(&text).chain(parse(&other)) {
                prop_assert!(mapping.start < mapping.end);
            }
        }
    }
}
