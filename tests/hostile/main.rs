//! Hostile input is the daily weather. Whatever a client, a manager, a control plane or a relay sends, the
//! fault is named, memory has a ceiling, and everybody else is served as before.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod api;
mod control_plane;
mod crook;
mod leg_a;
mod leg_b;
mod relay;
#[path = "../support/mod.rs"]
mod support;

use std::{
    thread,
    time::{Duration, Instant},
};

use crook::Crook;
use support::{Deployment, LIMIT, ServiceProcess, eventually, peak_memory, stderr, sum};

/// Most memory that a service may ever have had, of which some 20 MiB are the debug build itself.
const SERVICE_CEILING: Mebibytes = Mebibytes(40);

/// Most memory that a tunnel may ever have had, of which some 25 MiB are the debug build itself.
const TUNNEL_CEILING: Mebibytes = Mebibytes(64);

/// An amount of memory.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
struct Mebibytes(u64);

/// The most memory that a process ever had.
fn peak(pid: u32) -> Mebibytes {
    Mebibytes(peak_memory(pid).unwrap() >> 20)
}

/// Checks what every hostile guest of a service must leave behind: the same process, at work, within its
/// ceiling, and a word about the fault in its log.
fn stands(service: &ServiceProcess, word: &str) {
    eventually("others are served", || service.warren(&["status"]).status.code() == Some(0));
    eventually(&format!("{word:?} in the log"), || service.log().contains(word));
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

/// A service, and a deployment that it reaches by way of a crook.
struct Scene {
    deployment: Deployment,
    service: ServiceProcess,
    crook: Crook,
}

impl Scene {
    /// With so many agents.
    fn new(agents: usize) -> Self {
        let (deployment, service) = (Deployment::start(agents), ServiceProcess::start());
        let (url, token) = deployment.access();
        let crook = Crook::before(url.strip_prefix("http://").unwrap());
        service.pretend_login(crook.url(), &token);
        Self { deployment, service, crook }
    }

    /// With a tunnel by which every agent answers.
    fn up(agents: usize) -> Self {
        let scene = Self::new(agents);
        let output = scene.service.warren(&["up", "--wait"]);
        assert!(output.status.success(), "{}", stderr(&output));
        scene
    }

    /// Waits until the tunnel has told of an end of the control connection, in one of these words.
    #[track_caller]
    fn control_error(&self, words: &[&str]) {
        self.is_logged("no control connection", 1, words);
    }

    /// The same where nothing else has ended it before.
    #[track_caller]
    fn control_error_of_first(&self, words: &[&str]) {
        self.is_logged("no control connection", 0, words);
    }

    /// Waits until the tunnel has told of an end of its link to the relay, in one of these words.
    #[track_caller]
    fn relay_error(&self, words: &[&str]) {
        self.is_logged("a relay link is down", 1, words);
    }

    /// In the words of an end that comes after so many that the test itself has brought about.
    #[track_caller]
    fn is_logged(&self, event: &str, after: usize, words: &[&str]) {
        let of_it = |log: &str| -> Vec<String> {
            log.lines().filter(|line| line.contains(event)).skip(after).map(str::to_owned).collect()
        };
        let is_meant = |line: &String| words.is_empty() || words.iter().any(|word| line.contains(word));
        let begun = Instant::now();
        while !of_it(&self.service.log()).iter().any(is_meant) {
            assert!(begun.elapsed() < LIMIT, "none of {words:?} in {:#?}", of_it(&self.service.log()));
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The number of agents that are shown.
    fn agents(&self) -> usize {
        self.service.status()["agents"].as_array().map_or(0, Vec::len)
    }

    /// Waits until agents have answered once more.
    #[track_caller]
    fn is_pinged_again(&self) {
        let answered = || sum(&self.service.metrics(), "warren_pings_total", &["result=\"ok\""]);
        let before = answered();
        eventually("agents answer", || answered() > before);
    }

    /// Waits until the control connection stands and agents answer, and checks that nothing died meanwhile.
    #[track_caller]
    fn is_whole_again(&self) {
        eventually("the control connection stands", || {
            sum(&self.service.metrics(), "warren_control_connected", &[]) == 1.0
        });
        self.is_pinged_again();
        self.has_stood();
    }

    /// Checks that neither process died or took more than its share.
    #[track_caller]
    fn has_stood(&self) {
        assert_eq!(sum(&self.service.metrics(), "warren_tunnel_restarts_total", &[]), 0.0);
        let took = peak(self.service.pid());
        assert!(took < SERVICE_CEILING, "the service took {took:?}");
        if let Some(pid) = self.service.tunnel_pid() {
            let took = peak(pid);
            assert!(took < TUNNEL_CEILING, "the tunnel took {took:?}");
        }
    }
}
