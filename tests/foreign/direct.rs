//! Direct paths: our whole service and its tunnel, and an agent whose paths are `magicsock`'s.
//!
//! ```text
//! kernel ── warren0 ── our tunnel ══ UDP ══ valve ── magicsock ── wireguard-go ── a TCP stack that echoes
//!                          ╚════════ lab's relay ══════╝
//! ```
//! Deployed agents have an older `magicsock` with changes of their own (tailnet-data 7, 8): what is asserted here is
//! what both promise. The valve is in the Go program and loses what a firewall would. Where translators are named, the
//! two are on networks of their own, as in the target `nat`.

mod agent;
mod transfer;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use warren_lab::{
    LabOptions,
    internet::{Internet, Line, SiteId},
    nat::Kind,
};

use self::{
    agent::{ForeignAgent, is_direct, is_relayed},
    transfer::Transfer,
};
use crate::{
    isolated::{add_address, bring_up, isolated, remove_address},
    program::has_program,
    support::{self, Deployment, LIMIT, ServiceProcess, figure, signal, stdout, within},
};

/// How soon both must have found each other (tailnet-data 20.2, row 5).
const FOUND: Duration = Duration::from_secs(3);
/// How long a path that died may be believed in (rows 6 and 9), and how soon one that is back must be taken.
const BELIEVED: Duration = Duration::from_secs(7);
const TAKEN: Duration = Duration::from_secs(6);
/// More than TCP waits between tries once such a time has passed, so that a transfer may go on only with its next.
const RETRY: Duration = Duration::from_secs(7);
/// How soon a relay that has died silently is given up while it is used.
const GIVEN_UP: Duration = Duration::from_secs(10);
/// A path that works carries on without a pause that anybody notices.
const NOTICED: Duration = Duration::from_secs(1);

/// An address that is ours to take away again: a change of the network.
const PASSING: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
/// An address that our device has besides the one inside of the tunnel.
const OF_THE_DEVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 98, 0, 1));

/// Where the deployment is, when there are networks.
const WORLD: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));

#[test]
fn their_agent_and_our_tunnel_are_direct_at_once_and_both_say_so() {
    if !has_program("a direct path between our tunnel and their agent") {
        return;
    }
    let mut scene = Scene::up(ServiceProcess::start());
    scene.agent.program.wait(is_direct);
    let took = scene.agent.between(|event| event["event"] == "knows", is_direct);
    figure(&format!("their agent is direct {} ms after it has heard of us", took.as_millis()));
    assert!(took < FOUND, "{took:?}");
    within(TAKEN, "ours is direct", || scene.ping().contains("path=direct"));
    within(LIMIT, "status says so", || scene.service.status()["agents"][0]["p2p"] == true);
    // A keepalive is enough, and comes every 25 s.
    within(LIMIT, "what our tunnel has to say comes by UDP", || scene.agent.wireguard_over_udp() > 0);
}

#[test]
fn their_agent_and_our_tunnel_are_direct_on_one_lan() {
    if has_program("our tunnel and their agent on one network") {
        isolated(|| meets_on("one network", |internet| [lan(internet, Kind::PortRestricted, 1); 2]));
    }
}

#[test]
fn their_agent_and_our_tunnel_are_direct_through_full_cones() {
    if has_program("our tunnel and their agent behind full cones") {
        isolated(|| {
            meets_on("full cones", |internet| [1, 2].map(|number| lan(internet, Kind::FullCone, number)));
        });
    }
}

#[test]
fn their_agent_and_our_tunnel_are_direct_through_a_symmetric_translator_of_ours() {
    if has_program("our tunnel behind a symmetric translator, and their agent") {
        isolated(|| {
            meets_on("a symmetric translator of ours", |internet| {
                [lan(internet, Kind::Symmetric, 1), lan(internet, Kind::Restricted, 2)]
            });
        });
    }
}

#[test]
fn their_agent_and_our_tunnel_are_direct_through_a_symmetric_translator_of_theirs() {
    if has_program("our tunnel, and their agent behind a symmetric translator") {
        isolated(|| {
            meets_on("a symmetric translator of theirs", |internet| {
                [lan(internet, Kind::Restricted, 1), lan(internet, Kind::Symmetric, 2)]
            });
        });
    }
}

#[test]
fn a_transfer_survives_that_udp_is_blocked_and_returns_to_it_when_it_is_not() {
    if has_program("UDP that is blocked between our tunnel and their agent") {
        isolated(|| survives_blocked_udp("both"));
    }
}

#[test]
fn a_transfer_survives_that_what_their_agent_sends_by_udp_is_lost() {
    if has_program("what their agent sends by UDP and is lost") {
        isolated(|| survives_blocked_udp("sent"));
    }
}

#[test]
fn a_transfer_survives_that_what_their_agent_is_sent_by_udp_is_lost() {
    if has_program("what their agent is sent by UDP and is lost") {
        isolated(|| survives_blocked_udp("received"));
    }
}

#[test]
fn a_transfer_survives_that_the_relay_is_killed_or_stalls() {
    if !has_program("a relay that fails between our tunnel and their agent") {
        return;
    }
    isolated(|| {
        let mut scene = Scene::isolated();
        scene.agent.program.wait(is_direct);
        let relay = scene.deployment.lab.relay();
        let transfer = scene.transfer();
        transfer.has_moved_on();

        // A direct path needs no relay.
        transfer.silence();
        relay.stall(true);
        transfer.has_moved_on();
        relay.kill_connections();
        transfer.has_moved_on();
        let silence = transfer.silence();
        assert!(silence < NOTICED, "{silence:?}");
        relay.stall(false);

        scene.agent.block_udp("both");
        within(LIMIT, "everything is relayed", || scene.ping().contains("path=relay"));
        transfer.has_moved_on();
        let passed = relay.packets();
        transfer.silence();
        let logins = scene.relay_logins();
        relay.kill_connections();
        within(LIMIT, "both log in again", || scene.relay_logins() >= logins + 2);
        transfer.has_moved_on();
        let killed = transfer.silence();
        assert!(killed < RETRY, "{killed:?}");
        assert!(relay.packets() > passed);

        // Their agent waits for the watchdog's two minutes.
        let logins = scene.relay_logins();
        relay.stall(true);
        let noticed = within(GIVEN_UP, "ours gives it up and dials", || scene.relay_logins() > logins);
        let rounds = transfer.rounds();
        thread::sleep(NOTICED);
        assert!(transfer.rounds() <= rounds + 1, "a relay that stalls carries nothing");
        relay.stall(false);
        transfer.has_moved_on();
        figure(&format!(
            "a killed relay stalls a transfer with their agent for {} ms; one that stalls is given up after {} ms",
            killed.as_millis(),
            noticed.as_millis()
        ));
        scene.has_not_restarted();
    });
}

#[test]
fn their_agent_hears_a_probe_first_from_our_next_port_and_follows_us_there() {
    if !has_program("our tunnel at another port, and their agent") {
        return;
    }
    isolated(|| {
        add_address("lo", PASSING, 32);
        let mut scene = Scene::isolated();
        scene.agent.program.wait(is_direct);
        let transfer = scene.transfer();
        transfer.has_moved_on();
        transfer.silence();
        scene.agent.program.forget();

        let moved = Instant::now();
        let taken = scene.move_to_another_port();
        let left = taken.local_addr().unwrap().port();
        let is_anew = |address: &Value| {
            address.as_str().unwrap().parse::<SocketAddr>().is_ok_and(|address| address.port() != left)
        };
        scene.agent.program.wait(|event| is_direct(event) && is_anew(&event["address"]));
        let took = moved.elapsed();
        assert!(took < BELIEVED, "{took:?}");
        transfer.has_moved_on();
        let stall = transfer.silence();
        figure(&format!(
            "their agent is direct to our next port after {} ms; a transfer stalls for {} ms",
            took.as_millis(),
            stall.as_millis()
        ));
        let heard = scene.agent.program.unseen("heard");
        let firsts: Vec<_> = heard.iter().filter(|event| is_anew(&event["from"])).collect();
        assert!(!firsts.is_empty() && firsts.iter().all(|event| event["disco"] == true), "{firsts:?}");
        assert!(stall < BELIEVED, "{stall:?}");
        assert!(scene.ping().contains("path=direct"), "{}", scene.service.log());
        scene.has_not_restarted();
    });
}

/// Which addresses it has is a matter of whoever made it. A path to one of them would lead through itself
/// (tailnet-data 9).
#[test]
fn of_our_own_device_peers_are_told_no_address() {
    isolated(|| {
        bring_up("lo");
        let deployment = Deployment::with(LabOptions { agents: 1, direct: true, ..LabOptions::default() });
        let service = ServiceProcess::start_configured("");
        service.connect(&deployment);
        add_address("warren0", OF_THE_DEVICE, 32);
        add_address("lo", PASSING, 32);
        let is_told = |address| endpoints(&deployment).iter().any(|endpoint| endpoint.ip() == address);
        within(LIMIT, "another address is told", || is_told(PASSING));
        assert!(!is_told(OF_THE_DEVICE));
    });
}

/// A network behind a translator.
fn lan(internet: &Internet, kind: Kind, number: u8) -> SiteId {
    let site = internet.add_home(kind, [203, 0, 113, number].into());
    internet.set_line(site, Line { delay: Duration::from_millis(5), ..Line::default() });
    site
}

/// Our tunnel is on the first of two networks and their agent on the second, and everybody else in the world
/// (tailnet-data 20.2, row 5).
fn meets_on(what: &str, sites: impl Fn(&Internet) -> [SiteId; 2]) {
    let mut internet = Internet::start().unwrap();
    let world = internet.add_site();
    internet.add_ourselves(world, &[WORLD]).unwrap();
    let [ours, theirs] = sites(&internet);
    let number = if ours == theirs { 1 } else { 2 };
    let own = internet.add_host(ours, &[[192, 168, 1, 10].into()]).unwrap();
    let agents = internet.add_host(theirs, &[[192, 168, number, 20].into()]).unwrap();
    let [own, agents] = [own, agents].map(|host| internet.namespace(host));

    let deployment =
        Deployment::with(LabOptions { agents: 1, direct: true, listen: WORLD, ..LabOptions::default() });
    let config = format!("allow_http_hosts = [\"{WORLD}\"]\n");
    let service = own.enter(|| ServiceProcess::start_configured(&config)).unwrap();
    let agent = agents.enter(|| ForeignAgent::start(&deployment)).unwrap();
    let mut scene = Scene::of(service, deployment, agent);
    scene.agent.program.wait(is_direct);
    let took = scene.agent.between(|event| event["event"] == "knows", is_direct);
    figure(&format!("{what}: their agent is direct {} ms after it has heard of us", took.as_millis()));
    assert!(took < FOUND, "{took:?}");
    within(TAKEN, "ours is direct", || scene.ping().contains("path=direct"));
    let echoes = scene.agent.echoes_at();
    let transfer = own.enter(|| Transfer::start(echoes)).unwrap();
    let before = scene.agent.wireguard_over_udp();
    transfer.has_moved_on();
    assert!(scene.agent.wireguard_over_udp() > before + 10, "data goes straight");
    scene.has_not_restarted();
}

/// Only one such loss a scene: after a second in a minute we stay on the relay for longer, on purpose.
fn survives_blocked_udp(direction: &str) {
    let mut scene = Scene::isolated();
    scene.agent.program.wait(is_direct);
    let transfer = scene.transfer();
    transfer.has_moved_on();
    assert!(scene.agent.wireguard_over_udp() > 0);

    transfer.silence();
    scene.agent.block_udp(direction);
    let blocked = Instant::now();
    scene.agent.program.wait(is_relayed);
    let left = blocked.elapsed();
    assert!(left < BELIEVED, "{left:?}");
    transfer.has_moved_on();
    let stall = transfer.silence();
    assert!(stall < BELIEVED + RETRY, "{stall:?}");
    assert!(scene.ping().contains("path=relay"), "{}", scene.service.log());

    scene.agent.program.forget();
    scene.agent.allow_udp();
    let allowed = Instant::now();
    scene.agent.program.wait(is_direct);
    let back = allowed.elapsed();
    assert!(back < TAKEN, "{back:?}");
    within(TAKEN, "ours is direct again", || scene.ping().contains("path=direct"));
    transfer.has_moved_on();
    let [left, stall, back] = [left, stall, back].map(|time| time.as_millis());
    figure(&format!(
        "UDP with their agent blocked, {direction}: left after {left} ms, a transfer stalls for {stall} ms, taken \
         again {back} ms after it is unblocked"
    ));
    scene.has_not_restarted();
}

/// Where we are, as the coordinator knows it.
fn endpoints(deployment: &Deployment) -> Vec<SocketAddr> {
    let control = deployment.control();
    let [client] = *control.clients() else { panic!("one client") };
    let told = control.node(client).unwrap().endpoints;
    told.iter().map(|endpoint| endpoint.parse().unwrap()).collect()
}

struct Scene {
    agent: ForeignAgent,
    service: ServiceProcess,
    deployment: Deployment,
}

impl Scene {
    /// In namespaces, with a device.
    fn isolated() -> Self {
        bring_up("lo");
        Self::up(ServiceProcess::start_configured(""))
    }

    fn up(service: ServiceProcess) -> Self {
        let deployment = Deployment::with(LabOptions { agents: 1, direct: true, ..LabOptions::default() });
        let agent = ForeignAgent::start(&deployment);
        Self::of(service, deployment, agent)
    }

    /// Brings the tunnel up.
    fn of(service: ServiceProcess, deployment: Deployment, agent: ForeignAgent) -> Self {
        service.connect(&deployment);
        Self { agent, service, deployment }
    }

    fn ping(&self) -> String {
        stdout(&self.service.warren(&["ping", "main.lab-1", "--count", "1"]))
    }

    fn transfer(&self) -> Transfer {
        Transfer::start(self.agent.echoes_at())
    }

    /// How often somebody has asked the relay to be let in.
    fn relay_logins(&self) -> usize {
        self.deployment.control().recording().requests.iter().filter(|it| it.path == "/derp").count()
    }

    fn our_port(&self) -> Option<u16> {
        endpoints(&self.deployment).iter().find(|endpoint| endpoint.is_ipv4()).map(SocketAddr::port)
    }

    /// Has us bind our sockets anew, where our port is somebody else's by then: for as long as that is kept. The
    /// service makes them, and waits until the port is taken.
    fn move_to_another_port(&self) -> UdpSocket {
        let mut port = None;
        within(LIMIT, "we tell where we are", || {
            port = self.our_port();
            port.is_some()
        });
        signal(self.service.pid(), "STOP");
        remove_address("lo", PASSING);
        let mut taken = None;
        within(LIMIT, "we give up our port", || {
            taken = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port.unwrap())).ok();
            taken.is_some()
        });
        signal(self.service.pid(), "CONT");
        taken.unwrap()
    }

    fn has_not_restarted(&self) {
        assert_eq!(support::sum(&self.service.metrics(), "warren_tunnel_restarts_total", &[]), 0.0);
    }
}
