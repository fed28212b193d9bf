//! The main job as a user runs it: a lab in namespaces of its own, real packets, real crashes.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use support::{
    Event, LabProcess, Namespace, ServiceProcess, WARREN, can_isolate, eventually, figure, has, is_alive,
    signal, skipped, within,
};

#[test]
fn a_lab_pings_every_agent_fetches_pages_and_leaves_nothing() {
    if !can_isolate("a_lab_pings_every_agent_fetches_pages_and_leaves_nothing") {
        return;
    }
    let mut lab = LabProcess::start(&["--agents", "3", "--duration", "23s"]);

    let status = lab.wait_for_end();

    assert_eq!(status, Some(0), "{:#?}", lab.seen());
    let seen = lab.seen();
    for agent in lab.agents() {
        let worked = |kind: &str| {
            seen.iter().any(|it| it["event"] == kind && it["agent"] == *agent && it["ok"] == true)
        };
        assert!(lab.pings(&agent) >= 4, "{agent}: {seen:#?}");
        assert!(worked("fetch") && worked("echo"), "{agent}: {seen:#?}");
    }
    assert!(seen.iter().filter(|it| is_ping(it)).all(|ping| ping["region"] != ""), "{seen:#?}");
    for agent in lab.agents() {
        let is_direct = |it: &&Event| is_ping(it) && it["agent"] == *agent && it["p2p"] == true;
        assert!(seen.iter().any(|it| is_direct(&it)), "{agent} is reached directly: {seen:#?}");
    }
    lab.check_that_nothing_is_left();
}

#[test]
fn curl_and_ping_reach_an_agent_through_the_device() {
    let name = "curl_and_ping_reach_an_agent_through_the_device";
    if !can_isolate(name) || !has("curl", name) || !has("ping", name) || !has("nsenter", name) {
        return;
    }
    let mut lab = LabProcess::start(&["--agents", "1"]);
    lab.wait(is_ping);
    let address = lab.address();

    let url = format!("http://[{address}]/");
    let page = lab.enter("curl").args(["--silent", "--fail", "--max-time", "20", &url]).output().unwrap();
    let echo = lab.enter("ping").args(["-6", "-c", "2", "-w", "20", &address]).output().unwrap();

    assert!(page.status.success() && support::stdout(&page).contains("came through the tunnel"), "{page:?}");
    assert!(echo.status.success(), "{echo:?}");
    lab.end();
}

/// Conforms: vpn:15.36
#[test]
fn the_first_ping_is_reported_right_after_the_start() {
    if !can_isolate("the_first_ping_is_reported_right_after_the_start") {
        return;
    }
    let mut lab = LabProcess::start(&["--agents", "3"]);

    let first = lab.wait(is_ping)["since_start_seconds"].as_f64().unwrap();

    figure(&format!("first ping at the manager {first:.3} s after StartResponse (debug build, goal 0.5)"));
    assert!(first < 2.0, "{first} s");
    lab.end();
}

#[test]
fn a_killed_tunnel_is_replaced_and_the_reason_is_told() {
    if !can_isolate("a_killed_tunnel_is_replaced_and_the_reason_is_told") {
        return;
    }
    let mut lab = LabProcess::start(&["--agents", "2"]);
    lab.wait(is_ping);
    let (_, killed) = lab.pids();

    let at = Instant::now();
    signal(killed, "KILL");

    let told = lab.wait(|event| event.at > at && event["event"] == "status");
    assert_eq!(told["lifecycle"], "starting", "{told:?}");
    assert!(told["error"].as_str().is_some_and(|reason| reason.contains("signal 9")), "{told:?}");
    let is_new = |pid: &Option<u64>| pid.is_some_and(|pid| pid != u64::from(killed));
    eventually("a new process runs", || is_new(&lab.tunnel_pid()));
    let replaced = at.elapsed();
    // Not before the new process has answered its Start.
    let started = lab.wait(|event| event["event"] == "status" && event["lifecycle"] == "started");
    assert!(is_new(&lab.tunnel_pid()));
    let ping = lab.wait(is_ping);
    let after = |event: &Event| event.at.duration_since(at);
    figure(&format!(
        "killed tunnel: told after {:?}, new process after {replaced:?} at most, started after {:?}, ping after {:?}",
        after(&told),
        after(&started),
        after(&ping)
    ));
    assert!(after(&told) < Duration::from_secs(2));
    assert!(replaced < Duration::from_secs(5));
    assert!(after(&ping) < Duration::from_secs(10));
    assert_eq!(lab.sum("warren_tunnel_restarts_total", &["reason=\"killed\""]), 1.0, "{}", lab.metrics());
    assert_eq!(lab.sum("warren_tunnel_restarts_total", &[]), 1.0);
    lab.end();
}

#[test]
fn a_killed_service_takes_everything_with_it() {
    if !can_isolate("a_killed_service_takes_everything_with_it") {
        return;
    }
    let mut lab = LabProcess::start(&["--agents", "1"]);
    lab.wait(is_ping);
    let (service, tunnel) = lab.pids();

    signal(service, "KILL");

    within(Duration::from_secs(5), "the tunnel ends", || !is_alive(tunnel));
    assert_eq!(lab.wait_for_end(), Some(1));
    lab.check_that_nothing_is_left();
}

#[test]
fn a_killed_services_device_goes_and_its_successor_resumes() {
    let name = "a_killed_services_device_goes_and_its_successor_resumes";
    if !can_isolate(name) || !has("curl", name) {
        return;
    }
    let network = Namespace::new();
    let mut serve = network.enter(WARREN);
    let deployment = LabProcess::start_as(serve.args(["lab", "--json", "--serve", "--agents", "1"]));
    let text = |key: &str| deployment.ready[key].as_str().unwrap().to_owned();
    let mut service = ServiceProcess::start_in(&network);
    service.pretend_login(&text("coder_url"), &text("token"));
    let up = service.warren(&["up", "--wait"]);
    assert!(up.status.success(), "{}", support::stderr(&up));
    assert!(network.has_device("warren0"));
    let tunnel =
        service.tunnel_pid().unwrap_or_else(|| panic!("{:?}", support::process(&service.tree(), "tunnel")));

    service.kill();

    within(Duration::from_secs(5), "the tunnel ends", || !is_alive(tunnel));
    within(Duration::from_secs(5), "the device goes", || !network.has_device("warren0"));
    service.start_again_in(&network);
    eventually("the tunnel is up again", || service.status()["lifecycle"] == "started");
    let url = format!("http://[{}]/", deployment.address());
    let page =
        || network.enter("curl").args(["--silent", "--fail", "--max-time", "5", &url]).output().unwrap();
    eventually("a page comes through the new device", || page().status.success());
}

#[test]
fn a_download_of_200_mb_survives_a_panic_in_each_actor_of_the_tunnel() {
    let name = "a_download_of_200_mb_survives_a_panic_in_each_actor_of_the_tunnel";
    if !can_isolate(name) || !has("curl", name) {
        return;
    }
    // Through the relay, so that its part is one that could be missed.
    let mut lab = LabProcess::start(&["--relay-only", "--agents", "1"]);
    assert_eq!(lab.wait(is_ping)["p2p"], false);
    let (_, tunnel) = lab.pids();
    let actors = lab.workers("tunnel");
    for known in ["session", "registry", "packet_io", "relay", "pinger", "coordinator"] {
        assert!(actors.iter().any(|actor| actor == known), "{known} is not among {actors:?}");
    }

    let download = download::Download::start(&lab, 200 << 20);
    for (done, actor) in actors.iter().enumerate() {
        let part = (200_u64 << 20) / (actors.len() as u64 + 1);
        download.allow_until(part * (done as u64 + 2));
        eventually("the download goes on", || download.received() >= part * (done as u64 + 1));
        assert!(download.received() < 200 << 20);
        lab.fault("tunnel", actor, "panic");
        let label = format!("actor=\"{actor}\"");
        let restarts = ["process=\"tunnel\"", "reason=\"panic\"", &label];
        eventually(&format!("{actor} is restarted"), || {
            lab.sum("warren_actor_restarts_total", &restarts) == 1.0
        });
        // It alone.
        let all = lab.sum("warren_actor_restarts_total", &["process=\"tunnel\""]);
        assert_eq!(all, done as f64 + 1.0, "{actor}: {}", lab.metrics());
    }
    download.allow_until(u64::MAX);
    let took = download.finish();

    figure(&format!("200 MB with {} panics in {took:?} (debug build)", actors.len()));
    let since = Instant::now();
    lab.wait(|event| event.at > since && is_ping(event));
    assert_eq!(lab.tunnel_pid(), Some(u64::from(tunnel)), "the process must not notice");
    assert_eq!(lab.sum("warren_tunnel_restarts_total", &[]), 0.0);
    lab.end();
}

#[test]
fn a_panic_in_any_actor_of_the_service_is_not_noticed_by_the_tunnel() {
    if !can_isolate("a_panic_in_any_actor_of_the_service_is_not_noticed_by_the_tunnel") {
        return;
    }
    // Three in 300 s are what its tree allows.
    const AT_ONCE: usize = 3;
    let mut left: Option<Vec<String>> = None;
    while left.as_ref().is_none_or(|left| !left.is_empty()) {
        let mut lab = LabProcess::start(&["--agents", "1"]);
        lab.wait(is_ping);
        let (service, tunnel) = lab.pids();
        let left = left.get_or_insert_with(|| lab.workers("service"));
        for known in ["host", "intent", "tunnels"] {
            assert!(
                lab.workers("service").iter().any(|actor| actor == known),
                "{known} is not in {}",
                lab.tree()
            );
        }
        for actor in left.drain(..left.len().min(AT_ONCE)) {
            lab.fault("service", &actor, "panic");
            let label = format!("actor=\"{actor}\"");
            let restarts = ["process=\"service\"", "reason=\"panic\"", &label];
            eventually(&format!("{actor} is restarted"), || {
                lab.sum("warren_actor_restarts_total", &restarts) == 1.0
            });
            eventually("the service answers", || lab.warren(&["status"]).status.success());
            assert_eq!(lab.tunnel_pid(), Some(u64::from(tunnel)), "{actor}: the tunnel must not notice");
        }
        let since = Instant::now();
        lab.wait(|event| event.at > since && is_ping(event));
        assert!(is_alive(service) && is_alive(tunnel));
        lab.end();
    }
}

#[test]
fn metrics_are_clean_and_cover_both_processes() {
    if !can_isolate("metrics_are_clean_and_cover_both_processes") {
        return;
    }
    let mut lab = LabProcess::start(&["--agents", "2"]);
    lab.wait(is_ping);

    let metrics = lab.metrics();

    for (family, labels) in [
        ("warren_build_info", ["process=\"service\""]),
        ("warren_build_info", ["process=\"tunnel\""]),
        ("warren_pings_total", ["process=\"tunnel\""]),
        ("warren_tunnel_lifecycle", ["state=\"started\""]),
        ("warren_derp_connected", ["process=\"tunnel\""]),
        ("warren_control_connected", ["process=\"tunnel\""]),
    ] {
        assert!(support::sum(&metrics, family, &labels) >= 1.0, "{family} {labels:?}:\n{metrics}");
    }
    check_with_promtool(&metrics);
    lab.end();
}

fn check_with_promtool(exposition: &str) {
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        skipped("promtool check metrics", "promtool is missing (sudo apt install prometheus)");
        return;
    };
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), exposition.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", support::stderr(&output));
}

#[test]
fn an_interrupt_ends_the_lab_at_once_and_leaves_nothing() {
    if !can_isolate("an_interrupt_ends_the_lab_at_once_and_leaves_nothing") {
        return;
    }
    let mut lab = LabProcess::start(&["--agents", "1"]);
    let begun = Instant::now();
    assert_eq!(lab.interrupt(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(20));
    lab.check_that_nothing_is_left();
}

/// Conforms: vpn:15.33
#[test]
fn nothing_shells_out() {
    if !can_isolate("nothing_shells_out") {
        return;
    }
    let mut command = Command::new(WARREN);
    command.args(["lab", "--json", "--agents", "1"]).env("PATH", "/nowhere");
    let mut lab = LabProcess::start_as(&mut command);
    lab.wait(|event| event["event"] == "fetch" && event["ok"] == true);
    lab.wait(|event| event["event"] == "echo" && event["ok"] == true);
    lab.end();
}

#[test]
fn without_a_device_agents_are_pinged_all_the_same() {
    let mut lab = LabProcess::start(&["--no-tun", "--agents", "2", "--duration", "7s"]);

    let status = lab.wait_for_end();

    assert_eq!(status, Some(0), "{:#?}", lab.seen());
    assert!(lab.agents().iter().all(|agent| lab.pings(agent) >= 1), "{:#?}", lab.seen());
    lab.check_that_nothing_is_left();
}

fn is_ping(event: &Event) -> bool {
    event["event"] == "ping"
}

mod download {
    //! A page of many megabytes, fetched by `curl` inside the lab's network and checked here.

    use std::{
        io::Read,
        process::Stdio,
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
        thread::{self, JoinHandle},
        time::{Duration, Instant},
    };

    use warren_lab::payload::{Checksum, checksum};

    use super::LabProcess;

    pub(crate) struct Download {
        received: Arc<AtomicU64>,
        allowed: Arc<AtomicU64>,
        length: u64,
        reader: JoinHandle<u64>,
        begun: Instant,
    }

    impl Download {
        pub(crate) fn start(lab: &LabProcess, length: u64) -> Self {
            let url = format!("http://[{}]/bytes/{length}", lab.address());
            let mut curl = lab.enter("curl");
            curl.args(["--silent", "--show-error", "--fail", "--max-time", "300", &url])
                .stdout(Stdio::piped());
            let mut curl = curl.spawn().unwrap();
            let (received, allowed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
            let (count, limit) = (Arc::clone(&received), Arc::clone(&allowed));
            let reader = thread::spawn(move || {
                let (mut out, mut sum) = (curl.stdout.take().unwrap(), Checksum::default());
                let mut buffer = vec![0; 64 << 10];
                let mut got = usize::MAX;
                while got > 0 {
                    while count.load(Ordering::Relaxed) >= limit.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(5));
                    }
                    got = out.read(&mut buffer).unwrap();
                    sum.update(&buffer[..got]);
                    count.fetch_add(got as u64, Ordering::Relaxed);
                }
                assert!(curl.wait().unwrap().success());
                sum.finish()
            });
            Self { received, allowed, length, reader, begun: Instant::now() }
        }

        /// Lets it go on until so many bytes have come: a fast machine must not be done too early.
        pub(crate) fn allow_until(&self, bytes: u64) {
            self.allowed.store(bytes, Ordering::Relaxed);
        }

        pub(crate) fn received(&self) -> u64 {
            self.received.load(Ordering::Relaxed)
        }

        /// Waits for the end and checks every byte.
        pub(crate) fn finish(self) -> Duration {
            let sum = self.reader.join().unwrap();
            assert_eq!(self.received.load(Ordering::Relaxed), self.length);
            assert_eq!(sum, checksum(self.length));
            self.begun.elapsed()
        }
    }
}
