//! Call sites merged from the leaf: first all that one function allocates, then by whom it was called.

use std::collections::HashMap;

use super::metric::Metric;
use super::{Model, Placed, Site};
use crate::symbols::Frame;

/// What was allocated through one function at one place, with its callers below it.
pub struct Node<'a> {
    pub frame: &'a Frame,
    pub inlined: bool,
    /// Of the metric.
    pub value: u64,
    pub count: u64,
    pub bytes: u64,
    /// Whether all of these are, not estimates.
    pub exact: bool,
    /// The greatest first.
    pub callers: Vec<Node<'a>>,
}

struct Leaf<'a> {
    /// From the culprit on.
    frames: Vec<Placed<'a>>,
    value: u64,
    count: u64,
    bytes: u64,
    exact: bool,
}

/// Trees whose roots are the culprits: helpers that only allocate for them are left out. The greatest come first.
/// Besides the metric's value each node has the number and bytes of allocations, those alive or all of them, as
/// befits the metric. Sites without a value are left out.
pub fn merge<'a>(model: &'a Model, sites: impl IntoIterator<Item = &'a Site>, metric: Metric) -> Vec<Node<'a>> {
    let leaf = |site: &'a Site| {
        let (count, bytes) = match metric {
            Metric::Live | Metric::LiveCount | Metric::Growth => (site.live_count, site.live_bytes),
            Metric::Allocated | Metric::Allocations => (site.alloc_count, site.alloc_bytes),
            Metric::Temporary => (site.free_count(), site.free_bytes()),
        };
        let frames = model.frames(site).skip(site.culprit).collect();
        Leaf { frames, value: metric.of(site), count, bytes, exact: site.exact }
    };
    let leaves: Vec<Leaf<'a>> = sites.into_iter().map(leaf).filter(|l| l.value > 0).collect();
    group(&leaves.iter().collect::<Vec<_>>(), 0)
}

/// Nodes of the frames at one depth, of leaves that have all their frames before it in common.
fn group<'a>(leaves: &[&Leaf<'a>], depth: usize) -> Vec<Node<'a>> {
    let mut by_frame: HashMap<(&str, &str), Vec<&Leaf<'a>>> = HashMap::new();
    for leaf in leaves {
        if let Some(p) = leaf.frames.get(depth) {
            by_frame.entry((p.frame.name(), &p.frame.location)).or_default().push(leaf);
        }
    }
    let mut nodes: Vec<Node<'a>> = by_frame
        .into_values()
        .map(|leaves| {
            let placed = leaves[0].frames[depth];
            let sum = |of: fn(&Leaf) -> u64| leaves.iter().map(|l| of(l)).sum();
            Node {
                frame: placed.frame,
                inlined: placed.inlined,
                value: sum(|l| l.value),
                count: sum(|l| l.count),
                bytes: sum(|l| l.bytes),
                exact: leaves.iter().all(|l| l.exact),
                callers: group(&leaves, depth + 1),
            }
        })
        .collect();
    nodes.sort_by(|a, b| b.value.cmp(&a.value).then_with(|| a.frame.describe().cmp(&b.frame.describe())));
    nodes
}

#[cfg(test)]
mod tests {
    use super::super::samples::small;
    use super::*;

    #[test]
    fn callers_are_below_what_they_call_and_helpers_are_left_out() {
        let model = small();
        let roots = merge(&model, &model.sites, Metric::Live);
        assert_eq!(
            roots.iter().map(|r| (r.frame.name(), r.value, r.inlined)).collect::<Vec<_>>(),
            [("inner", 3000, true), ("other", 50, false)]
        );
        assert_eq!(roots[0].callers[0].frame.name(), "run");
        assert_eq!(roots[0].callers[0].callers[0].frame.name(), "main");
        assert_eq!((roots[1].count, roots[1].bytes), (5, 50));
    }

    #[test]
    fn one_function_that_is_called_from_two_places_is_one_root() {
        let mut model = small();
        model.sites[1].stack = vec![1, 3, 2];
        let roots = merge(&model, &model.sites, Metric::Live);
        assert_eq!((roots.len(), roots[0].value), (1, 3050));
        assert_eq!(roots[0].callers[0].callers.len(), 2);
    }
}
