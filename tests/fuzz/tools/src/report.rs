//! `report PROFILES DATE` tells, from the lcov files of all targets, which functions and lines of the files
//! under test were never reached. Tests inside of these files do not count: they are not built.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fs,
    path::Path,
};

/// What each target is about.
const TARGETS: [(&str, &[&str]); 13] = [
    ("header", &["proto/src/header.rs"]),
    ("frame", &["proto/src/frame.rs", "proto/src/weight.rs"]),
    ("correlator", &["proto/src/correlator.rs"]),
    ("drpc", &["proto/src/drpc.rs"]),
    (
        "tailnet",
        &[
            "actors/core/src/roster/workspaces.rs",
            "actors/core/src/coordination/node.rs",
            "actors/core/src/relay_map.rs",
        ],
    ),
    ("yamux", &["actors/src/coordinator/rpc.rs"]),
    (
        "websocket",
        &[
            "actors/src/websocket.rs",
            "actors/src/websocket/transport.rs",
            "actors/src/coordinator/http.rs",
            "actors/src/coordinator/refusal.rs",
        ],
    ),
    ("derp", &["proto/src/derp.rs", "actors/src/relay/frames.rs"]),
    ("disco", &["proto/src/disco.rs"]),
    ("stun", &["proto/src/stun.rs"]),
    ("tsmp", &["proto/src/tsmp.rs", "actors/src/data_plane/inner.rs"]),
    ("config", &["supervisor/src/config.rs"]),
    ("leg_b", &["supervisor/src/clients.rs", "supervisor/src/clients/order.rs", "supervisor/src/access.rs"]),
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(profiles), Some(date)) = (arguments.next(), arguments.next()) else {
        return Err("usage: report PROFILES DATE".into());
    };
    println!("# What the fuzz targets never reach\n");
    println!("{date}: `tests/fuzz/coverage`, over the committed corpora and what the last run found.");
    println!(
        "Compiled lines, tests left out; a function that a target does not use at all stands under *never called*.\n"
    );
    println!("| Target | File | Lines reached | Functions reached |");
    println!("|---|---|---|---|");
    let mut details = String::new();
    for (target, files) in TARGETS {
        let lcov = fs::read_to_string(Path::new(&profiles).join(target).with_extension("lcov"))?;
        for file in files {
            let reached = Reached::of(&lcov, file);
            println!(
                "| `{target}` | `{file}` | {} | {} |",
                share(reached.lines.values()),
                share(reached.functions.values())
            );
            details.push_str(&reached.missing(file)?);
        }
    }
    print!("\n{details}");
    Ok(())
}

/// How often lines were run, and functions by the line they begin in.
#[derive(Default)]
struct Reached {
    lines: BTreeMap<usize, u64>,
    functions: BTreeMap<usize, u64>,
}

impl Reached {
    fn of(lcov: &str, file: &str) -> Self {
        let section = lcov.split("end_of_record").find(|section| {
            section.lines().any(|line| line.starts_with("SF:") && line.ends_with(&format!("/{file}")))
        });
        let (mut reached, mut begins) = (Self::default(), BTreeMap::new());
        for line in section.unwrap_or_default().lines() {
            let Some((what, fields)) = line.split_once(':') else { continue };
            let Some((first, second)) = fields.split_once(',') else { continue };
            match (what, first.parse(), second.parse()) {
                ("DA", Ok(line), Ok(count)) => drop(reached.lines.insert(line, count)),
                ("FN", Ok(line), _) => drop(begins.insert(second.to_owned(), line)),
                ("FNDA", Ok(count), _) => {
                    let Some(line) = begins.get(second) else { continue };
                    // Generic functions and closures have a record each.
                    *reached.functions.entry(*line).or_default() += count as u64;
                }
                _ => {}
            }
        }
        reached
    }

    fn missing(&self, file: &str) -> Result<String, Box<dyn Error>> {
        let text = fs::read_to_string(file)?;
        let source: Vec<_> = text.lines().collect();
        let is_function = |line: &usize| source.get(line - 1).is_some_and(|text| text.contains("fn "));
        let never: Vec<_> =
            self.functions.iter().filter(|(line, count)| **count == 0 && is_function(line)).collect();
        let lines: BTreeSet<_> =
            self.lines.iter().filter(|(_, count)| **count == 0).map(|(line, _)| *line).collect();
        if lines.is_empty() {
            return Ok(String::new());
        }
        let mut words = format!("## `{file}`\n\n");
        for (line, _) in never {
            words.push_str(&format!(
                "* never called: line {line}, `{}`\n",
                source[line - 1].trim().trim_end_matches('{').trim()
            ));
        }
        words.push_str(&format!("* lines never run: {}\n\n", ranges(&lines)));
        Ok(words)
    }
}

fn share<'a>(counts: impl Iterator<Item = &'a u64>) -> String {
    let counts: Vec<_> = counts.collect();
    let reached = counts.iter().filter(|count| ***count > 0).count();
    format!("{reached} of {}", counts.len())
}

/// `3-5, 9`.
fn ranges(lines: &BTreeSet<usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for line in lines {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *line => *last = *line,
            _ => ranges.push((*line, *line)),
        }
    }
    let form = |(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.iter().map(form).collect::<Vec<_>>().join(", ")
}
