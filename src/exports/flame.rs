//! Collapsed stacks, and the flame graph that the crate inferno draws of them.

use std::collections::BTreeMap;
use std::fmt::Write;

use inferno::flamegraph::{self, Options};

use super::Model;
use super::metric::Metric;
use crate::moment;

/// `frame;frame;frame value` in lines, root first. The outermost frame is the backend type, so that processes of
/// different kinds stand side by side. Stacks without a value are left out.
pub fn folded(model: &Model, metric: Metric) -> String {
    let mut stacks: BTreeMap<String, u64> = BTreeMap::new();
    for site in &model.sites {
        let value = metric.of(site);
        if value > 0 {
            let mut stack = word(&site.backend_type);
            for placed in model.frames(site).rev() {
                stack.push(';');
                stack.push_str(&word(placed.frame.name()));
            }
            *stacks.entry(stack).or_default() += value;
        }
    }
    let mut text = String::new();
    for (stack, value) in stacks {
        let _ = writeln!(text, "{stack} {value}");
    }
    text
}

/// A name without what separates frames and lines.
fn word(name: &str) -> String {
    name.replace(';', ":").replace(|c: char| c.is_control(), " ")
}

/// The flame graph as an SVG, which searches and zooms in a browser.
pub fn svg(model: &Model, metric: Metric) -> String {
    let folded = folded(model, metric);
    let mut options = Options::default();
    options.title = format!("rheap: {}", metric.title());
    options.subtitle = Some(format!("{}, {}, {}", model.subject(), moment::text(model.taken_at), model.server));
    options.count_name = metric.unit().into();
    options.name_type = "Function:".into();
    options.hash = true;
    options.deterministic = true;
    // A thousandth of the width is a pixel; the percentages of its callers count what is narrower.
    options.min_width = 0.1;
    options.notes = "written by rheap; frames narrower than 0.1 % are not drawn, but counted in their callers".into();
    let mut out = Vec::new();
    let drawn = flamegraph::from_lines(&mut options, folded.lines(), &mut out);
    let picture = match (drawn, folded.is_empty()) {
        (Ok(()), false) => String::from_utf8(out).unwrap_or_else(|_| nothing(&options)),
        _ => nothing(&options),
    };
    ascii(&titled(picture, &options))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// With a title that browsers and readers of screens know the picture by.
fn titled(picture: String, options: &Options) -> String {
    let Some(head) = picture.find("<svg").and_then(|svg| Some(svg + picture[svg..].find('>')? + 1)) else {
        return picture;
    };
    let subtitle = options.subtitle.as_deref().unwrap_or_default();
    let title = escape(&format!("{}: {subtitle}", options.title));
    format!("{}\n<title>{title}</title>{}", &picture[..head], &picture[head..])
}

/// The same picture in whatever encoding it is kept.
fn ascii(picture: &str) -> String {
    let mut text = String::with_capacity(picture.len());
    for c in picture.chars() {
        if c.is_ascii() {
            text.push(c);
        } else {
            let _ = write!(text, "&#x{:x};", c as u32);
        }
    }
    text
}

/// A picture that says that there is nothing to draw.
fn nothing(options: &Options) -> String {
    format!(
        "<?xml version=\"1.0\" standalone=\"no\"?>\n<svg version=\"1.1\" width=\"1200\" height=\"90\" \
         xmlns=\"http://www.w3.org/2000/svg\">\n<rect width=\"100%\" height=\"100%\" fill=\"#f8f8f8\"/>\n\
         <g font-family=\"monospace\" text-anchor=\"middle\">\n\
         <text x=\"600\" y=\"30\" font-size=\"17\">{}</text>\n<text x=\"600\" y=\"52\" font-size=\"12\">{}</text>\n\
         <text x=\"600\" y=\"76\" font-size=\"12\">Nothing is recorded that has a value here.</text>\n</g>\n</svg>\n",
        escape(&options.title),
        escape(options.subtitle.as_deref().unwrap_or_default()),
    )
}

#[cfg(test)]
mod tests {
    use super::super::samples::{large, small};
    use super::*;

    #[test]
    fn stacks_are_root_first_and_summed() {
        let model = small();
        assert_eq!(
            folded(&model, Metric::Live),
            "client backend;main;run;inner;lappend 3000\nclient backend;main;run;other 50\n"
        );
        assert_eq!(folded(&model, Metric::Temporary), "client backend;main;run;other 95\n");
        for metric in Metric::ALL {
            let sum: u64 =
                folded(&model, metric).lines().map(|l| l.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum();
            assert_eq!(sum, model.sites.iter().map(|s| metric.of(s)).sum::<u64>());
        }
    }

    #[test]
    fn a_picture_says_what_it_shows_and_escapes_names() {
        let mut model = small();
        model.calls[0].frames[0].function = Some("Vec<T>::push & <x>;y".into());
        model.calls[3].frames[0].function = Some("gr\u{f6}\u{df}e".into());
        let svg = svg(&model, Metric::Live);
        assert!(svg.contains("rheap: live bytes") && svg.contains("pid 7 (client backend, exact)"), "{svg}");
        assert!(svg.contains("Vec&lt;T&gt;::push &amp; &lt;x&gt;:y"));
        let title = "<title>rheap: live bytes: pid 7 (client backend, exact), 2025-05-08 06:13:22 UTC, PostgreSQL 17.11</title>";
        assert!(svg.split_once("<svg").unwrap().1.split_once('>').unwrap().1.trim_start().starts_with(title));
        assert!(svg.is_ascii() && svg.contains("gr&#xf6;&#xdf;e"));
        assert!(svg.contains("function zoom") && svg.contains("function search"));
    }

    #[test]
    fn nothing_to_draw_is_a_picture_too() {
        let svg = svg(&Model::default(), Metric::Growth);
        assert!(svg.contains("Nothing is recorded") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn ten_thousand_stacks_of_a_hundred_processes_take_seconds() {
        let model = large();
        let start = std::time::Instant::now();
        let drawn = svg(&model, Metric::Live);
        assert!(drawn.ends_with("</svg>\n") || drawn.ends_with("</svg>"));
        assert!(drawn.len() < 5 << 20, "{}", drawn.len());
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
}
