//! Hostile input is the daily weather. Whatever a client, a manager, a control plane or a relay sends, the
//! fault is named, memory has a ceiling, and everybody else is served as before.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod api;
mod leg_b;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use support::{LIMIT, ServiceProcess, eventually};

/// Most memory that a service may ever have had, of which some 20 MiB are the debug build itself.
const SERVICE_CEILING: Mebibytes = Mebibytes(40);

/// An amount of memory.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
struct Mebibytes(u64);

/// The most memory that a process ever had.
fn peak(pid: u32) -> Mebibytes {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    Mebibytes(line.trim_end_matches("kB").trim().parse::<u64>().unwrap() / 1024)
}

/// Checks what every hostile guest of a service must leave behind: the same process, at work, within its
/// ceiling, and a word about the fault in its log.
fn stands(service: &ServiceProcess, word: &str) {
    eventually("others are served", || service.warren(&["status"]).status.code() == Some(0));
    assert!(within_a_while(|| service.log().contains(word)), "{word:?} is not in:\n{}", service.log());
    let peak = peak(service.pid());
    assert!(peak < SERVICE_CEILING, "{peak:?}");
}

/// Raises the number of descriptors that this process may have as far as it goes. Returns it.
fn raise_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    limit.maximum.unwrap_or(u64::MAX)
}

/// Shorter than any limit of a service: who is still connected by then was not thrown out at once.
const A_WHILE: Duration = Duration::from_millis(300);
const _: () = assert!(A_WHILE.as_millis() < LIMIT.as_millis());

fn within_a_while(mut done: impl FnMut() -> bool) -> bool {
    (0..50).any(|_| done() || (std::thread::sleep(A_WHILE / 10), false).1)
}
