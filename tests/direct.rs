//! Direct paths of a whole service and its tunnel to agents that follow the reference's rules, on one machine.
//! No privilege needed: the service runs without a device.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::time::Duration;

use support::{Deployment, ServiceProcess, eventually, stderr, stdout, within};
use warren_actors::udp::UdpSockets;
use warren_lab::{Cut, LabOptions};

/// Until a fact is told that the pinger finds out every 5 s.
const TOLD: Duration = Duration::from_secs(30);

/// Conforms: control:D7
#[test]
fn agents_are_reached_directly_and_what_a_person_sees_says_so() {
    let scene = Scene::up(LabOptions::default());
    scene.is_direct();
    eventually("status says so", || scene.service.status()["agents"][0]["p2p"] == true);
    let look = scene.service.warren(&["netcheck"]);
    assert!(look.status.success(), "{}{}", stdout(&look), stderr(&look));
    assert!(stdout(&look).contains("UDP gets out and back     yes"), "{}", stdout(&look));
    let look = scene.service.warren(&["netcheck", "--json"]);
    let look: serde_json::Value = serde_json::from_slice(&look.stdout).unwrap();
    assert_eq!(look["udp"], true, "{look}");
    assert!(look["regions"].as_array().is_some_and(|all| all.iter().any(|it| it["home"] == true)), "{look}");
    let agent = scene.deployment.lab.agents()[0].id;
    assert!(scene.deployment.lab.agent_stats(agent).direct_datagrams > 0);
    assert!(!scene.told_endpoints().is_empty());
    eventually("the metrics say so", || {
        let metrics = scene.service.metrics();
        support::sum(&metrics, "warren_path_changes_total", &["to=\"p2p\""]) >= 1.0
            && support::sum(&metrics, "warren_peers", &["connection_type=\"p2p\""]) >= 1.0
            && support::sum(&metrics, "warren_netcheck_udp", &[]) == 1.0
    });
    eventually("the log names the agent and where it is", || {
        let log = scene.service.log();
        log.lines().any(|line| line.contains("an agent is reached directly") && line.contains("lab-1"))
    });
}

#[test]
fn a_path_that_dies_silently_is_left_and_taken_again_when_it_is_back() {
    let scene = Scene::up(LabOptions::default());
    scene.is_direct();
    let agent = scene.deployment.lab.agents()[0].id;
    for cut in [Cut::BOTH, Cut { sent: true, received: false }, Cut { sent: false, received: true }] {
        scene.deployment.lab.cut_udp(agent, cut);
        within(TOLD, "the relay answers", || scene.ping().contains("path=relay"));
        scene.deployment.lab.cut_udp(agent, Cut::default());
        scene.is_direct();
    }
    scene.has_had_no_trouble();
}

/// Conforms: control:D7 data:20.2.11
#[test]
fn where_the_deployment_forbids_direct_paths_everything_is_relayed() {
    let scene = Scene::up(LabOptions { disable_direct: true, ..LabOptions::default() });
    let agent = scene.deployment.lab.agents()[0].id;
    for _ in 0..3 {
        assert!(scene.ping().contains("path=relay Coder Embedded Relay"));
    }
    assert_eq!(scene.told_endpoints(), Vec::<String>::new());
    assert_eq!(scene.deployment.lab.agent_stats(agent).direct_datagrams, 0);
}

#[test]
fn the_tunnels_sockets_have_the_buffers_that_its_service_may_ask_for() {
    let scene = Scene::up(LabOptions::default());
    scene.is_direct();
    let log = scene.service.log();
    let bound =
        log.lines().find(|line| line.contains("UDP sockets are bound")).unwrap_or_else(|| panic!("{log}"));
    let buffer = bound.split("receive_buffer=").nth(1).and_then(|rest| rest.split_whitespace().next());
    // The service has the privileges of this test; the tunnel has none.
    let allowed = UdpSockets::bind(0).unwrap().receive_buffer().unwrap();
    assert_eq!(buffer.unwrap().parse(), Ok(allowed), "{bound}");
    if rustix::process::geteuid().is_root() {
        assert!(allowed >= 1024 * 1024, "who has the privilege raises what the host allows: {allowed}");
    }
    assert!(!log.contains("makes its UDP sockets itself"), "{log}");
}

#[test]
fn an_agent_that_comes_back_with_new_keys_is_reached_directly_again() {
    let scene = Scene::up(LabOptions::default());
    scene.is_direct();
    let agent = scene.deployment.lab.agents()[0].id;
    scene.deployment.runtime.block_on(async {
        scene.deployment.lab.start_agent(agent, warren_lab::End::Crash);
    });
    within(TOLD, "it answers directly", || scene.ping().contains("path=direct"));
    scene.has_had_no_trouble();
}

/// That it answers pings says nothing of what its tunnel does (tailnet-data 12.2).
#[test]
fn up_waits_until_packets_get_through_and_says_to_whom_they_do_not() {
    let deployment = Deployment::with(LabOptions { agents: 1, direct: true, ..LabOptions::default() });
    let agent = deployment.lab.agents()[0].id;
    deployment.lab.shut_tunnel(agent, true);
    let service = ServiceProcess::start();
    let (url, token) = deployment.access();
    service.pretend_login(&url, &token);
    assert!(service.warren(&["up"]).status.success());
    let answers = || service.warren(&["ping", "main.lab-1", "--count", "1"]).status.success();
    within(TOLD, "it answers pings", answers);
    let up = service.warren(&["up", "--wait", "--timeout", "7s"]);
    assert_eq!(up.status.code(), Some(7), "{}", stderr(&up));
    assert!(stderr(&up).contains("no packets get to these agents and back: lab-1.main"), "{}", stderr(&up));
    assert!(answers());
    let through = || service.warren(&["ping", "main.lab-1", "--tsmp", "--count", "1"]);
    assert_eq!(through().status.code(), Some(6));

    deployment.lab.shut_tunnel(agent, false);
    let up = service.warren(&["up", "--wait"]);
    assert!(up.status.success(), "{}", stderr(&up));
    let through = through();
    assert!(through.status.success() && stdout(&through).contains("through WireGuard"), "{through:?}");
}

struct Scene {
    deployment: Deployment,
    service: ServiceProcess,
}

impl Scene {
    fn up(options: LabOptions) -> Self {
        let deployment = Deployment::with(LabOptions { agents: 1, direct: true, ..options });
        let service = ServiceProcess::start();
        service.connect(&deployment);
        Self { deployment, service }
    }

    fn ping(&self) -> String {
        stdout(&self.service.warren(&["ping", "main.lab-1", "--count", "1"]))
    }

    #[track_caller]
    fn is_direct(&self) {
        let ping = self.service.warren(&["ping", "main.lab-1", "--until-direct", "--count", "20"]);
        assert!(ping.status.success(), "{}{}\n{}", stdout(&ping), stderr(&ping), self.service.log());
    }

    /// Where our node says that we are.
    fn told_endpoints(&self) -> Vec<String> {
        let control = self.deployment.control();
        let [client] = *control.clients() else { panic!("one client") };
        control.node(client).unwrap().endpoints
    }

    fn has_had_no_trouble(&self) {
        assert_eq!(support::sum(&self.service.metrics(), "warren_tunnel_restarts_total", &[]), 0.0);
        let log = self.service.log();
        let errors: Vec<&str> = log.lines().filter(|line| line.contains(" ERROR ")).collect();
        assert_eq!(errors, [""; 0]);
    }
}
