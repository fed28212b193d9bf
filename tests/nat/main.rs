//! Warren and an agent across translators, firewalls and bad lines: which path results, and how soon.
//!
//! Each test runs in a user namespace of its own, where it may make networks: no root, no package. What is
//! measured is in `tests/NAT.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

#[path = "../foreign/nginx/authority.rs"]
mod authority;
mod load;
mod scene;
#[path = "../foreign/nginx/server.rs"]
mod server;
#[path = "../support/mod.rs"]
mod support;
mod table;

use std::{
    fmt,
    process::Command,
    sync::{Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use load::Load;
use scene::{Edge, Family, Met, Scene, Shape, good_line};
use server::{Front, Nginx, has_nginx};
use support::{can_isolate, eventually, figure, sum};
use table::{CASES, MEASURED};
use warren_lab::{
    AgentInfo, Cut, EMBEDDED_REGION,
    internet::{Fate, Line, Mtu},
    nat::Kind,
};

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
/// For how long one that is relayed must stay so.
const STAYS: Duration = Duration::from_secs(5);
/// Between two looks at that.
const LOOK: Duration = Duration::from_millis(100);
/// Within this much data must flow again, and directly where it can, in seconds.
const SOON: f64 = 1.0;
/// How often UDP is cut off under load.
const ROUNDS: usize = 3;
/// How often the network changes under load.
const CHANGES: u8 = 6;
/// Tests that run at once.
const AT_ONCE: usize = 2;
/// Set where a test runs in namespaces of its own.
const INSIDE: &str = "WARREN_NAT_INSIDE";

/// Conforms: data:20.2.5
#[test]
fn neighbours_on_one_lan_meet_directly() {
    isolated(|| between(Edge::Home(Kind::PortRestricted), Edge::Shared).meets_directly(NEAR));
}

#[test]
fn hosts_of_the_open_world_meet_directly() {
    isolated(|| between(Edge::Open, Edge::Open).meets_directly(FAR));
}

/// Conforms: data:20.2.5
#[test]
fn full_cones_are_passed() {
    isolated(|| homes(Kind::FullCone, Kind::FullCone).meets_directly(FAR));
}

#[test]
fn restricted_cones_are_passed() {
    isolated(|| homes(Kind::Restricted, Kind::Restricted).meets_directly(FAR));
}

#[test]
fn cones_that_restrict_ports_are_passed() {
    isolated(|| homes(Kind::PortRestricted, Kind::PortRestricted).meets_directly(FAR));
}

/// Conforms: data:20.2.5
#[test]
fn a_symmetric_translator_of_ours_is_passed() {
    isolated(|| homes(Kind::Symmetric, Kind::Restricted).meets_directly(FAR));
}

/// Conforms: data:20.2.5
#[test]
fn a_symmetric_translator_of_theirs_is_passed() {
    isolated(|| homes(Kind::Restricted, Kind::Symmetric).meets_directly(FAR));
}

#[test]
fn symmetric_translators_on_both_sides_keep_everything_on_the_relay() {
    isolated(|| {
        let scene = homes(Kind::Symmetric, Kind::Symmetric);
        scene.stays_relayed();
        assert!(scene.fate(Fate::Filtered) > 0, "they have tried");
    });
}

#[test]
fn where_udp_is_blocked_everything_is_relayed() {
    isolated(|| {
        let line = Line { udp: Cut::BOTH, ..good_line() };
        let scene = Scene::up(&Shape { line, ..Shape::of(Edge::Home(Kind::FullCone), Edge::Open) });
        scene.stays_relayed();
        assert_eq!(scene.ask("/v1/netcheck").unwrap()["udp"], false);
        assert!(scene.fate(Fate::Blocked) > 0, "they have tried");
    });
}

#[test]
fn hosts_with_ipv6_only_meet_directly() {
    isolated(|| {
        let scene = Scene::up(&Shape { family: Family::V6, ..Shape::of(Edge::Open, Edge::Open) });
        scene.meets_directly(FAR);
        let look = scene.ask("/v1/netcheck").unwrap();
        assert!(look["mapped_v6"].is_string() && look["mapped_v4"].is_null(), "{look}");
    });
}

/// Conforms: data:20.2.7
#[test]
fn a_path_too_small_for_us_stays_relayed_if_we_are_told() {
    isolated(|| too_small(Mtu::Told(1300)));
}

/// Conforms: data:20.2.7
#[test]
fn a_path_too_small_for_us_stays_relayed_if_nobody_tells() {
    isolated(|| too_small(Mtu::BlackHole(1300)));
}

fn too_small(mtu: Mtu) {
    let line = Line { mtu: Some(mtu), ..good_line() };
    let shape = Shape::of(Edge::Home(Kind::FullCone), Edge::Home(Kind::FullCone));
    let scene = Scene::up(&Shape { line, ..shape });
    scene.stays_relayed();
    assert!(scene.fate(Fate::TooLarge) > 0, "they have tried");
}

#[test]
fn a_proxy_that_strips_upgrades_hinders_nobody() {
    isolated(|| {
        if !has_nginx("a proxy that strips upgrades, before real networks") {
            return;
        }
        let scene = Scene::set(&Shape::of(Edge::Home(Kind::Restricted), Edge::Home(Kind::Restricted)));
        let upstream = scene.deployment.lab.url().trim_start_matches("http://").to_owned();
        let nginx = Nginx::start(&Front::of(&upstream).at(Family::V4.world()).stripping());
        scene.log_in(&format!("http://{}:{}", Family::V4.world(), nginx.port()));
        scene.meets_directly(FAR);
        let region = i32::try_from(EMBEDDED_REGION).unwrap();
        let reason = scene.deployment.control().read(|seen| {
            let requests = seen.connections.iter().flat_map(|connection| &connection.requests);
            let nodes = requests.filter_map(|request| request.update_self.as_ref()?.node.as_ref());
            nodes.last().and_then(|node| node.derp_forced_websocket.get(&region).cloned())
        });
        assert!(reason.as_ref().is_some_and(|reason| reason.contains("426")), "{reason:?}");
        let upgrades = scene.deployment.control().read(|seen| {
            let relayed = seen.requests.iter().filter(|request| request.path == "/derp");
            relayed.filter(|request| request.header("upgrade").eq(["websocket"])).count()
        });
        assert!(upgrades > 0);
    });
}

#[test]
fn a_line_that_loses_some_is_used_all_the_same() {
    isolated(|| {
        let line = Line { loss_percent: 5, seed: 7, ..good_line() };
        let shape = Shape::of(Edge::Home(Kind::PortRestricted), Edge::Home(Kind::PortRestricted));
        Scene::up(&Shape { line, ..shape }).meets_directly(FAR);
    });
}

/// Conforms: data:20.2.6
#[test]
fn udp_that_is_cut_off_under_load_is_left_and_taken_again() {
    isolated(|| cuts_udp(Cut::BOTH));
}

#[test]
fn what_we_send_by_udp_and_is_cut_off_under_load_is_noticed_as_soon() {
    isolated(|| cuts_udp(Cut { sent: true, received: false }));
}

#[test]
fn what_we_are_sent_by_udp_and_is_cut_off_under_load_is_noticed_as_soon() {
    isolated(|| cuts_udp(Cut { sent: false, received: true }));
}

fn cuts_udp(cut: Cut) {
    let scene = homes(Kind::PortRestricted, Kind::PortRestricted);
    let all = at_best(|_| scene.cuts_udp(cut), |[relayed, back]| relayed.median < SOON && back.median < SOON);
    let [relayed, back] = &all;
    measured(&format!("data by the relay {relayed} after the cut, direct again {back} after its end"));
    assert!(relayed.most < 7.0 && back.most < 6.0, "not even what the reference does");
}

#[test]
fn networks_change_under_load() {
    isolated(|| {
        let scene = homes(Kind::PortRestricted, Kind::PortRestricted);
        let [data, control, direct] = at_best(
            |attempt| scene.roams(attempt * CHANGES),
            |[data, control, direct]| {
                data.median < SOON && control.median < 2.0 * SOON && direct.median < 3.0 * SOON
            },
        );
        measured(&format!("data {data}, control plane {control}, direct {direct} after a change"));
        let metrics = scene.service.metrics();
        for plane in ["plane=\"data\"", "plane=\"control\""] {
            let of = |kind: &str| sum(&metrics, &format!("warren_resume_recovery_seconds_{kind}"), &[plane]);
            let (count, all) = (of("count"), of("sum"));
            assert!(count >= f64::from(CHANGES) && all / count < 3.0 * SOON, "{plane}: {count} in {all} s");
        }
    });
}

#[test]
fn the_table_shows_every_case() {
    if std::env::var_os("BLESS").is_none() {
        let wrong = table::problems();
        assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    }
}

fn between(ours: Edge, theirs: Edge) -> Scene {
    Scene::up(&Shape::of(ours, theirs))
}

fn homes(ours: Kind, theirs: Kind) -> Scene {
    between(Edge::Home(ours), Edge::Home(theirs))
}

impl Scene {
    /// Checks that an agent is met directly by then, that it knows the path as well, and that data takes it.
    #[track_caller]
    fn meets_directly(&self, bar: Duration) {
        let Met { agent, took } = self.meet_within(bar, ATTEMPTS);
        eventually("the agent trusts its path", || self.trusts(&agent));
        let (straight, relayed) = self.carries(&agent, LOAD);
        assert!(
            straight > DATAGRAMS && relayed < straight / 10,
            "{straight} straight, {relayed} by the relay"
        );
        measured(&format!("direct after {:.2} s", took.as_secs_f64()));
    }

    /// Checks that an agent answers by the relay and goes on to do so, and that data comes through.
    #[track_caller]
    fn stays_relayed(&self) {
        let Met { agent, took } = self.hear();
        assert!(took <= FAR, "took {took:?}\n{}", self.told(&agent));
        let begun = Instant::now();
        while begun.elapsed() < STAYS {
            let ping = self.ping(&agent);
            assert!(
                ping.as_ref().is_some_and(|ping| ping["p2p"] == false),
                "{ping:?}\n{}",
                self.told(&agent)
            );
            thread::sleep(LOOK);
        }
        let (straight, relayed) = self.carries(&agent, LOAD);
        assert!(straight == 0 && relayed > DATAGRAMS, "{straight} straight, {relayed} by the relay");
        assert_eq!(self.path(&agent).best, None);
        measured(&format!("relayed after {:.2} s, and {} s later", took.as_secs_f64(), STAYS.as_secs()));
    }

    /// Cuts our site's UDP off under load, several times. Returns after how long data is relayed, and comes straight
    /// again.
    #[track_caller]
    fn cuts_udp(&self, cut: Cut) -> [Spread; 2] {
        let (mut relayed, mut back) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            // Paths of one agent that go and come again within a minute are let be for a while.
            let (agent, load) = self.under_load();
            self.internet.set_line(self.site, Line { udp: cut, ..good_line() });
            relayed.push(load.recovers(Instant::now()));
            let dead = self.path(&agent).received.udp;
            eventually("TCP goes on", load.goes_on());
            assert!(!cut.sent || self.path(&agent).received.udp == dead, "nothing comes straight");
            self.internet.set_line(self.site, good_line());
            let begun = Instant::now();
            back.push(self.goes_straight(&agent).duration_since(begun));
            eventually("TCP goes on", load.goes_on());
        }
        [relayed, back].map(Spread::of)
    }

    /// Changes networks under load, several times, to ones with numbers from `first` on. Returns after how long data
    /// flows again, the control plane is back, and everything goes straight.
    #[track_caller]
    fn roams(&self, first: u8) -> [Spread; 3] {
        let (agent, load) = self.under_load();
        let (mut data, mut control, mut direct) = (Vec::new(), Vec::new(), Vec::new());
        for number in first..first + CHANGES {
            let (connections, begun) = (self.connections(), Instant::now());
            self.roam(number, if number % 2 == 0 { Edge::Open } else { Edge::Home(Kind::PortRestricted) });
            thread::scope(|scope| {
                let connected = scope.spawn(|| {
                    eventually("there is a control connection", || self.connections() > connections);
                    begun.elapsed()
                });
                // What was under way when the network changed counts for nothing.
                data.push(load.recovers(begun));
                direct.push(self.goes_straight(&agent).duration_since(begun));
                control.push(connected.join().unwrap());
            });
            eventually("TCP goes on", load.goes_on());
        }
        [data, control, direct].map(Spread::of)
    }

    /// An agent that is reached directly, as both know, and what is asked of it all the time.
    #[track_caller]
    fn under_load(&self) -> (AgentInfo, Load) {
        let Met { agent, .. } = self.meet();
        eventually("the agent trusts its path", || self.trusts(&agent));
        let load = Load::begin(&self.namespace(), &agent);
        eventually("it is under load", load.goes_on());
        (agent, load)
    }

    /// Waits until all that an agent gets comes straight. Returns since when it does.
    #[track_caller]
    fn goes_straight(&self, agent: &AgentInfo) -> Instant {
        let mut since = Instant::now();
        eventually("everything comes straight", || {
            let before = self.path(agent).received;
            since = Instant::now();
            thread::sleep(LOOK);
            let after = self.path(agent).received;
            after.udp > before.udp && after.relay == before.relay
        });
        since
    }

    fn trusts(&self, agent: &AgentInfo) -> bool {
        self.path(agent).best.is_some_and(|best| best.is_trusted)
    }

    /// How many control connections have said where they are.
    fn connections(&self) -> usize {
        let control = self.deployment.control();
        control
            .read(|seen| seen.connections.iter().filter(|connection| !connection.requests.is_empty()).count())
    }
}

/// Measures until it is good, a few times at most: the machine may have other things to do.
#[track_caller]
fn at_best<const N: usize>(
    mut measure: impl FnMut(u8) -> [Spread; N],
    is_good: impl Fn(&[Spread; N]) -> bool,
) -> [Spread; N] {
    for attempt in 0.. {
        let measured = measure(attempt);
        if is_good(&measured) {
            return measured;
        }
        let told: Vec<String> = measured.iter().map(Spread::to_string).collect();
        assert!(usize::from(attempt) + 1 < ATTEMPTS, "{told:?}");
    }
    unreachable!("attempts end")
}

/// Of several measurements, in seconds.
struct Spread {
    median: f64,
    most: f64,
    count: usize,
}

impl Spread {
    fn of(mut all: Vec<Duration>) -> Self {
        all.sort();
        let [median, most] = [all[all.len() / 2], all[all.len() - 1]].map(|it| it.as_secs_f64());
        Self { median, most, count: all.len() }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} s (median of {}, at most {:.2} s)", self.median, self.count, self.most)
    }
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
