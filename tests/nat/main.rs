//! Warren and an agent across translators, firewalls and bad lines: which path results, and how soon.
//!
//! Each test runs in a user namespace of its own, where it may make networks: no root, no package. What is
//! measured is in `tests/NAT.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod scene;
#[path = "../support/mod.rs"]
mod support;
mod table;

use std::{
    process::Command,
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

use scene::{Edge, Met, Scene, Shape};
use support::{can_isolate, eventually, figure};
use table::{CASES, MEASURED};
use warren_lab::nat::Kind;

/// Between neighbours.
const NEAR: Duration = Duration::from_secs(1);
/// Through translators that allow it.
const FAR: Duration = Duration::from_secs(3);
/// The machine may be busy with other things.
const ATTEMPTS: usize = 3;
/// What is carried each way once a path is there.
const LOAD: u64 = 1_000_000;
/// Fewer datagrams cannot carry it.
const DATAGRAMS: u64 = LOAD / 1280;
/// Tests that run at once.
const AT_ONCE: usize = 2;
/// Set where a test runs in namespaces of its own.
const INSIDE: &str = "WARREN_NAT_INSIDE";

#[test]
fn neighbours_on_one_lan_meet_directly() {
    isolated(|| {
        let scene = Scene::up(&Shape::of(Edge::Home(Kind::PortRestricted), Edge::Shared));
        meets_directly(&scene, NEAR);
    });
}

#[test]
fn full_cones_are_passed() {
    isolated(|| {
        let scene = Scene::up(&Shape::of(Edge::Home(Kind::FullCone), Edge::Home(Kind::FullCone)));
        meets_directly(&scene, FAR);
    });
}

#[test]
fn the_table_shows_every_case() {
    if std::env::var_os("BLESS").is_none() {
        let wrong = table::problems();
        assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    }
}

/// Checks that an agent is met directly by then, that it knows the path as well, and that data takes it.
#[track_caller]
fn meets_directly(scene: &Scene, bar: Duration) -> Met {
    let met = scene.meet_within(bar, ATTEMPTS);
    eventually("the agent trusts its path", || {
        scene.path(&met.agent).best.is_some_and(|best| best.is_trusted)
    });
    let (straight, relayed) = scene.carries(&met.agent, LOAD);
    assert!(straight > DATAGRAMS && relayed < straight / 10, "{straight} straight, {relayed} by the relay");
    measured(&format!("direct after {:.2} s", met.took.as_secs_f64()));
    met
}

/// Tells a figure of the case that runs.
fn measured(text: &str) {
    figure(&format!("{}{}: {text}", MEASURED.trim_start_matches("FIGURE "), std::env::var(INSIDE).unwrap()));
}

/// Runs a case's body in namespaces of its own, by starting the test there once more. Says loudly where that is not
/// possible.
fn isolated<Body: FnOnce()>(body: Body) {
    if std::env::var_os(INSIDE).is_some() {
        body();
        return eventually("nothing is left behind", || scene::left_behind().is_empty());
    }
    // The closure is inside the test, whose name stands before it.
    let name = std::any::type_name::<Body>().trim_end_matches("::{{closure}}");
    let name = name.rsplit("::").next().unwrap();
    assert!(CASES.iter().any(|case| case.test == name), "{name} is missing in the table");
    if !can_isolate(name) {
        return;
    }
    let _turn = Turn::take();
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", name])
        .env(INSIDE, name)
        .output()
        .unwrap();
    let (out, err) = (support::stdout(&output), support::stderr(&output));
    assert!(output.status.success() && out.contains("1 passed"), "{out}{err}");
    for line in err.lines() {
        if let Some(skipped) = line.strip_prefix("SKIPPED ") {
            return support::skipped(name, skipped);
        }
        let Some(said) = line.strip_prefix(MEASURED) else { continue };
        figure(line.trim_start_matches("FIGURE "));
        if std::env::var_os("BLESS").is_some() {
            table::note(name, said.trim_start_matches(name).trim_start_matches(": "));
        }
    }
}

/// The right to run now.
struct Turn;

static RUNNING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

impl Turn {
    fn take() -> Self {
        let running = RUNNING.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = RUNNING.1.wait_while(running, |running| *running >= AT_ONCE);
        *wait.unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        RUNNING.1.notify_one();
    }
}
