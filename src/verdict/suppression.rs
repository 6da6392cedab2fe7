//! What the user has said is no leak.

use super::{Judgement, Verdict};
use crate::symbols::Frame;

/// A pattern and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Suppression {
    /// `*` stands for any text, also none; everything else for itself.
    pub pattern: String,
    pub reason: String,
}

impl Suppression {
    /// Of a call site that it covers.
    pub fn judgement(&self, judgement: Judgement) -> Judgement {
        let reason = format!("suppressed by '{}': {}", self.pattern, self.reason);
        Judgement { verdict: Verdict::Steady, confidence: 0.0, reason, ..judgement }
    }

    /// Whether the pattern is that of the context's path, of its name, or of a function of the stack.
    pub fn covers(&self, path: &str, name: &str, frames: &[Frame]) -> bool {
        matches(&self.pattern, path)
            || matches(&self.pattern, name)
            || frames.iter().any(|f| f.function.as_deref().is_some_and(|name| matches(&self.pattern, name)))
    }
}

/// In time linear in the text for each star of the pattern.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, text) in [
            ("drandom", "drandom"),
            ("*", ""),
            ("*", "anything"),
            ("my_*", "my_function"),
            ("*_cache", "type_cache"),
            ("a*b*c", "a--b--b-c"),
            ("TopMemoryContext/*/x", "TopMemoryContext/a/b/x"),
            ("%s$(ls)'*", "%s$(ls)'; DROP"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("drandom", "drandom2"),
            ("drandom", "xdrandom"),
            ("a*a", "a"),
            ("a*b", "ab c"),
            ("", "x"),
            ("a*b*c", "acb"),
        ] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn a_context_is_known_by_its_whole_name() {
        let suppression = |pattern: &str| Suppression { pattern: pattern.into(), reason: "mine".into() };
        let covers = |pattern| suppression(pattern).covers("Top/PL/pgSQL function", "PL/pgSQL function", &[]);
        assert!(covers("PL/pgSQL function") && covers("Top/*"));
        assert!(!covers("pgSQL function") && !covers("Top"));
    }

    proptest::proptest! {
        #[test]
        fn agrees_with_a_regular_search(pattern in "[ab*]{0,8}", text in "[ab]{0,10}") {
            fn slowly(p: &[u8], t: &[u8]) -> bool {
                match p.split_first() {
                    None => t.is_empty(),
                    Some((b'*', rest)) => (0..=t.len()).any(|skip| slowly(rest, &t[skip..])),
                    Some((c, rest)) => t.first() == Some(c) && slowly(rest, &t[1..]),
                }
            }
            proptest::prop_assert_eq!(matches(&pattern, &text), slowly(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
