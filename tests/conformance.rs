//! Every line of the wire's conformance lists has a test. The lines stand in `conformance/lines.tsv`; a test
//! says which it proves in its doc comment, as `/// Conforms: vpn:S1 control:H2`; `CONFORMANCE.md` is the table
//! of both, written by this program (`BLESS=1 cargo test --test conformance`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

/// Where tests live. `tests/fuzz` holds no tests of this kind.
const ROOMS: [&str; 5] = ["proto", "actors", "observability", "supervisor", "tests"];
const MARK: &str = "/// Conforms:";
/// What a line may wait for: a later version brings it, and its tests.
const AWAITED: &str = "DNS";
/// Begins the remark of a line that is answered in another way than its words say; it has a test all the same.
const OTHERWISE: &str = "otherwise: ";
/// How much of a line the table shows.
const SHOWN: usize = 150;

/// Conforms: vpn:16.2.1
#[test]
fn every_line_has_a_test_and_the_table_shows_it() {
    let (lines, proofs) = (lines(), proofs());
    let mut wrong = problems(&lines, &proofs);
    let (table, path) = (table(&lines, &proofs), root().join("tests/CONFORMANCE.md"));
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, &table).unwrap();
    } else if fs::read_to_string(&path).ok().as_deref() != Some(&table) {
        wrong.push("tests/CONFORMANCE.md is old: BLESS=1 cargo test --test conformance".to_owned());
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// One line of the lists.
struct Line {
    id: String,
    behaviour: String,
    remark: Option<String>,
}

impl Line {
    fn awaits(&self) -> Option<&str> {
        self.remark.as_deref().filter(|remark| !remark.starts_with(OTHERWISE))
    }
}

/// A test that proves a line.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Proof {
    file: String,
    test: String,
    is_ignored: bool,
}

fn lines() -> Vec<Line> {
    let text = fs::read_to_string(root().join("tests/conformance/lines.tsv")).unwrap();
    let rows = text.lines().filter(|row| !row.starts_with('#'));
    rows.map(|row| {
        let mut cells = row.split('\t').map(str::to_owned);
        Line { id: cells.next().unwrap(), behaviour: cells.next().unwrap(), remark: cells.next() }
    })
    .collect()
}

/// Which tests prove which line, by its id.
fn proofs() -> BTreeMap<String, BTreeSet<Proof>> {
    let mut proofs = BTreeMap::<String, BTreeSet<Proof>>::new();
    for file in ROOMS.iter().flat_map(|room| sources(&root().join(room))) {
        let text = fs::read_to_string(&file).unwrap();
        let name = file.strip_prefix(root()).unwrap().display().to_string();
        let rows: Vec<&str> = text.lines().map(str::trim).collect();
        for (at, row) in rows.iter().enumerate() {
            let Some(ids) = row.strip_prefix(MARK) else { continue };
            let (test, is_ignored) = marked(&rows[at + 1..])
                .unwrap_or_else(|| panic!("{name}:{}: the mark does not stand above a test", at + 1));
            for id in ids.split_whitespace() {
                let proof = Proof { file: name.clone(), test: test.to_owned(), is_ignored };
                proofs.entry(id.to_owned()).or_default().insert(proof);
            }
        }
    }
    proofs
}

/// The test that follows a mark, and whether it is ignored: only doc comments and attributes may stand between.
fn marked<'a>(rows: &[&'a str]) -> Option<(&'a str, bool)> {
    let (mut is_test, mut is_ignored) = (false, false);
    for row in rows {
        if row.starts_with("#[") {
            is_test |= row.contains("test]") || row.contains("::test(");
            is_ignored |= row.contains("ignore");
        } else if let Some((_, rest)) = row.split_once("fn ") {
            return is_test.then_some((rest.split(['(', '<']).next()?, is_ignored));
        } else if !row.starts_with("///") {
            return None;
        }
    }
    None
}

fn sources(room: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(room).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() && entry.file_name() != "fuzz" && entry.file_name() != "target" {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|it| it == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn problems(lines: &[Line], proofs: &BTreeMap<String, BTreeSet<Proof>>) -> Vec<String> {
    let mut wrong = Vec::new();
    for line @ Line { id, behaviour, .. } in lines {
        match (proofs.get(id), line.awaits()) {
            (None, None) => wrong.push(format!("{id} has no test: {behaviour}")),
            (None, Some(what)) if what != AWAITED => {
                wrong.push(format!("{id} waits for {what:?}, which nobody brings"));
            }
            (Some(_), Some(what)) => wrong.push(format!("{id} has a test and still waits for {what}")),
            (None, Some(_)) | (Some(_), None) => {}
        }
    }
    for (id, tests) in proofs {
        if lines.iter().all(|line| line.id != *id) {
            wrong.push(format!("{id} is no line of the lists"));
        }
        for Proof { file, test, .. } in tests.iter().filter(|proof| proof.is_ignored) {
            wrong.push(format!("{file}: {test} proves {id} but is ignored"));
        }
    }
    wrong
}

fn table(lines: &[Line], proofs: &BTreeMap<String, BTreeSet<Proof>>) -> String {
    let waiting = lines.iter().filter(|line| line.awaits().is_some()).count();
    let mut table = format!(
        "# Conformance\n\n\
         Written by `BLESS=1 cargo test --test conformance`; `.ci/run` sees that each of these tests passed; \
         what one of them could not test on a machine it says itself, as `SKIPPED`, and `.ci/run` counts that.\n\n\
         {} lines: {} proven, {waiting} waiting. Where a line is answered \"otherwise\" than its words say, the \
         reason stands with it.\n\n\
         | line | behaviour | state | tests |\n|---|---|---|---|\n",
        lines.len(),
        lines.len() - waiting,
    );
    for line @ Line { id, behaviour, remark } in lines {
        let state = match (remark, line.awaits()) {
            (None, _) => "proven".to_owned(),
            (Some(_), Some(what)) => format!("waits for {what}"),
            (Some(remark), None) => format!("proven {remark}"),
        };
        let tests: Vec<_> = proofs.get(id).into_iter().flatten().map(shown).collect();
        writeln!(table, "| {id} | {} | {state} | {} |", cut(behaviour), tests.join("<br>")).unwrap();
    }
    table
}

fn shown(Proof { file, test, .. }: &Proof) -> String {
    format!("`{test}` ({file})")
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
    .replace('<', "&lt;")
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
