//! One page that needs nothing but itself: style, code and data are in it, and its policy forbids the network.

use std::fmt::Write;

use super::{Model, json};

const TEMPLATE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPTS: [&str; 3] =
    [include_str!("page/basics.js"), include_str!("page/flame.js"), include_str!("page/sections.js")];

/// The page, in ASCII, so that it is the same in whatever encoding it is kept. Its data is the report for programs.
pub fn page(model: &Model) -> String {
    let data = serde_json::to_string(&json::compact(model)).expect("numbers and strings are JSON");
    let title = format!("rheap: {}", model.subject());
    let mut page = String::with_capacity(data.len() + data.len() / 8 + 65536);
    let mut rest = TEMPLATE;
    let parts = [
        ("{{title}}", escaped(&title)),
        ("{{style}}", STYLE.into()),
        ("{{data}}", harmless(&data)),
        ("{{script}}", SCRIPTS.concat()),
    ];
    for (place, text) in parts {
        let (before, after) = rest.split_once(place).expect("the template has each place, in this order");
        page.push_str(before);
        page.push_str(&text);
        rest = after;
    }
    page.push_str(rest);
    page
}

/// Text for the page itself.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_control() {
            out.push(' ');
        } else if c.is_ascii() && c != '&' && c != '<' {
            out.push(c);
        } else {
            let _ = write!(out, "&#x{:x};", c as u32);
        }
    }
    out
}

/// JSON in which nothing can end the element that holds it, whatever functions and contexts are called. The
/// characters stand in strings only, where an escape means the same. What is no character to be seen, or turns the
/// order of others round, is shown as its escape.
fn harmless(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    let mut chars = json.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(c @ ('"' | '\\')) => text.extend(['\\', c]),
                Some(c) => text.extend(['\\', '\\', c]),
                None => {}
            },
            '<' => text.push_str("\\u003c"),
            '>' => text.push_str("\\u003e"),
            '&' => text.push_str("\\u0026"),
            c if hidden(c) => {
                let _ = write!(text, "\\\\u{:04x}", c as u32);
            }
            c if c.is_ascii() => text.push(c),
            c => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
        }
    }
    text
}

/// Control characters that JSON leaves as they are, and marks of direction.
fn hidden(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::super::samples::{large, small};
    use super::*;

    #[test]
    fn what_cannot_be_seen_is_shown_as_its_escape() {
        let mut model = small();
        model.leaks[0].facts.context = "a\n\u{1b}[31m\u{85}\u{202e}b\\n\"".into();
        let page = page(&model);
        let data = page.split_once("type=\"application/json\">").unwrap().1.split_once("</script>").unwrap().0;
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["leaks"][0]["context"], r#"a\n\u001b[31m\u0085\u202eb\n""#);
    }

    #[test]
    fn a_hostile_name_stays_data() {
        let mut model = small();
        let name = "</script><script>alert(1)</script>\u{2028}<!-- {{script}} gr\u{f6}\u{df}e \u{1f600}";
        model.processes[0].backend_type = "<b>\u{e9}".into();
        model.calls[1].frames[0].function = Some(name.into());
        model.leaks[0].frames[1].function = Some(name.into());
        let page = page(&model);
        assert_eq!(page.matches("</script>").count(), 2, "the data's and the code's");
        assert!(!page.contains("alert(1)<") && page.is_ascii());
        assert!(page.contains("<title>rheap: pid 7 (&#x3c;b>&#xe9;, exact)</title>"));
        let data = page.split_once("type=\"application/json\">").unwrap().1.split_once("</script>").unwrap().0;
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["leaks"][0]["function"], name);
    }

    #[test]
    fn it_asks_nobody_for_anything() {
        let page = page(&small());
        assert!(page.contains("default-src 'none'"));
        assert!(!page.contains("src=") && !page.contains("@import") && !page.contains("url("));
    }

    #[test]
    fn ten_thousand_stacks_take_seconds() {
        let model = large();
        let start = std::time::Instant::now();
        assert!(page(&model).len() > 1 << 20);
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
}
