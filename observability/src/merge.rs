//! Two expositions as one. Prometheus wants the samples of a family together, so the tunnel's samples
//! are sorted in behind the service's. What comes from the tunnel is hostile input: only families and
//! labels of [`names`], only numbers, and only so many of them.

use std::collections::BTreeMap;

use crate::names;

/// Most series that are taken from the other process; beyond it a scrape is cut, not refused.
/// 40 families with a closed set of labels stay far below it.
pub const MAX_FOREIGN_SERIES: usize = 4096;

/// Most bytes that are read from the other process.
pub const MAX_FOREIGN_BYTES: usize = 1 << 20;

/// Longest label value that is taken from the other process, in bytes.
const MAX_LABEL_VALUE: usize = 64;

/// What the families of `metrics-process` begin with.
const PROCESS_PREFIX: &str = "process_";

#[derive(Default)]
struct Group<'a> {
    head: Vec<&'a str>,
    samples: Vec<&'a str>,
}

/// Merges our own exposition with that of the other process, family by family, sorted by name.
pub fn merge(own: &str, foreign: Option<&str>) -> String {
    let mut groups = BTreeMap::new();
    collect(own, &mut groups, |_, _| true);
    if let Some(foreign) = foreign {
        let mut left = MAX_FOREIGN_SERIES;
        collect(cut(foreign), &mut groups, |family, sample| {
            let accepted = left > 0 && is_acceptable(family, sample);
            left -= usize::from(accepted);
            accepted
        });
    }
    let mut merged = String::with_capacity(own.len() + foreign.map_or(0, str::len));
    for group in groups.values().filter(|group| !group.samples.is_empty()) {
        for line in group.head.iter().chain(&group.samples) {
            merged.push_str(line);
            merged.push('\n');
        }
    }
    merged
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_FOREIGN_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

fn collect<'a>(
    text: &'a str,
    groups: &mut BTreeMap<&'a str, Group<'a>>,
    mut accept: impl FnMut(&str, &str) -> bool,
) {
    let mut family = "";
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (Some(keyword @ ("HELP" | "TYPE")), Some(name)) = (words.next(), words.next()) else {
                continue;
            };
            if !is_known(name) {
                family = "";
                continue;
            }
            family = name;
            let group = groups.entry(name).or_default();
            // The first to describe a family wins: one HELP and one TYPE each.
            let said = group.head.iter().any(|held| held.get(2..6) == Some(keyword));
            if !said {
                group.head.push(line);
            }
        } else if !family.is_empty()
            && let Some(group) = groups.get_mut(family)
            && accept(family, line)
        {
            group.samples.push(line);
        }
    }
}

fn is_known(name: &str) -> bool {
    names::family(name).is_some()
        || (name.starts_with(PROCESS_PREFIX)
            && name.len() <= MAX_LABEL_VALUE
            && name.chars().all(is_name_char))
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Whether a sample line of the other process is one of `family`, with labels it may carry.
fn is_acceptable(family: &str, line: &str) -> bool {
    let allowed = names::family(family).map_or(&[][..], |family| family.labels);
    let (series, value) = match line.rsplit_once(' ') {
        Some(parts) => parts,
        None => return false,
    };
    let (name, labels) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}')),
        None => (series, Some("")),
    };
    let Some(labels) = labels else { return false };
    let suffix_is_known = matches!(name.strip_prefix(family), Some("" | "_bucket" | "_sum" | "_count"));
    let labels_are_known = labels.split_terminator(',').all(|pair| {
        pair.split_once('=').is_some_and(|(label, quoted)| {
            let known = label == "process" || label == "le" || allowed.contains(&label);
            known && is_plain_value(label, quoted)
        })
    });
    suffix_is_known && labels_are_known && value.parse::<f64>().is_ok()
}

/// Values of closed sets need no escapes, commas or braces; a process cannot claim to be the other.
fn is_plain_value(label: &str, quoted: &str) -> bool {
    let Some(value) = quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else { return false };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+' | ' ');
    value.len() <= MAX_LABEL_VALUE && value.chars().all(plain) && (label != "process" || value == "tunnel")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "# HELP warren_peers Agents.\n# TYPE warren_peers gauge\n\
                       warren_peers{process=\"service\",connection_type=\"derp\"} 1\n\n\
                       # TYPE process_threads gauge\nprocess_threads{process=\"service\"} 4\n";

    #[test]
    fn samples_of_one_family_stand_together_under_one_head() {
        let foreign = "# HELP warren_peers Other words.\n# TYPE warren_peers gauge\n\
                       warren_peers{process=\"tunnel\",connection_type=\"none\"} 2\n";

        let merged = merge(OWN, Some(foreign));

        let expected = "# TYPE process_threads gauge\nprocess_threads{process=\"service\"} 4\n\
                        # HELP warren_peers Agents.\n# TYPE warren_peers gauge\n\
                        warren_peers{process=\"service\",connection_type=\"derp\"} 1\n\
                        warren_peers{process=\"tunnel\",connection_type=\"none\"} 2\n";
        assert_eq!(merged, expected);
    }

    #[test]
    fn without_the_other_process_our_own_series_stay() {
        assert!(merge(OWN, None).contains("warren_peers{process=\"service\""));
    }

    #[test]
    fn unknown_families_labels_and_values_of_the_other_process_are_left_out() {
        for line in [
            "# TYPE evil_total counter\nevil_total{process=\"tunnel\"} 1",
            "# TYPE warren_peers gauge\nwarren_peers{process=\"tunnel\",user=\"x\"} 1",
            "# TYPE warren_peers gauge\nwarren_peers{process=\"tunnel\",connection_type=\"a\\\"b\"} 1",
            "# TYPE warren_peers gauge\nwarren_peers{process=\"service\",connection_type=\"p2p\"} 1",
            "# TYPE warren_peers gauge\nwarren_peers{process=\"tunnel\"} one",
            "# TYPE warren_peers gauge\nwarren_workspaces{process=\"tunnel\"} 1",
            "warren_peers{process=\"tunnel\"} 1",
        ] {
            assert_eq!(merge("", Some(line)), "", "{line}");
        }
    }

    #[test]
    fn a_flood_of_series_is_cut() {
        let mut flood = String::from("# TYPE warren_peers gauge\n");
        for _ in 0..MAX_FOREIGN_SERIES * 2 {
            flood.push_str("warren_peers{process=\"tunnel\"} 1\n");
        }
        assert_eq!(merge("", Some(&flood)).lines().count(), MAX_FOREIGN_SERIES + 1);
    }

    #[test]
    fn a_cut_inside_a_character_does_not_panic() {
        let text = "é".repeat(MAX_FOREIGN_BYTES);
        assert_eq!(merge("", Some(&text)), "");
    }
}
