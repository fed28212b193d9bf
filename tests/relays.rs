//! Several regions, relays that go and come back, and relays behind what refuses plain upgrades, as a service
//! and its tunnel meet them. No privilege needed: the service runs without a device.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::time::Duration;

use hyper::StatusCode;
use support::{Deployment, ServiceProcess, eventually, stderr};
use warren_lab::{
    AgentInfo, EMBEDDED_REGION, End, FIRST_FURTHER_REGION, LabOptions, Recording, Relay, Request,
};
use warren_proto::tailnet::Node;

/// So far away that every other region is worthwhile.
const FAR: Duration = Duration::from_millis(150);

/// Conforms: control:D9
#[test]
fn where_websockets_are_forced_every_region_is_reached_by_them_and_no_plain_upgrade_is_ever_seen() {
    let options = LabOptions { force_websockets: true, further_regions: 1, ..spread(2) };
    let world = World::up(options);
    world.reaches(&world.agents());
    let upgrades = world.upgrades();
    assert!(upgrades.len() >= 2 && upgrades.iter().all(|upgrade| upgrade == "websocket"), "{upgrades:?}");
    assert!(world.nodes().iter().all(|node| node.derp_forced_websocket.is_empty()));
}

/// Conforms: control:D6 data:20.2.2
#[test]
fn a_proxy_that_refuses_the_upgrade_is_got_around_and_named_in_our_node() {
    let world = World::start(LabOptions { agents: 1, ..LabOptions::default() });
    world.relay(EMBEDDED_REGION).refuse_plain_upgrades(Some((StatusCode::BAD_REQUEST, "no upgrades here")));
    world.bring_up();
    world.reaches(&world.agents());
    let reason = "GET failed with status code 400 (a proxy could be disallowing the use of 'Upgrade: derp'): no \
                  upgrades here";
    let id = i32::try_from(EMBEDDED_REGION).unwrap();
    eventually("the reason is in our node", || {
        world
            .nodes()
            .last()
            .is_some_and(|node| node.derp_forced_websocket.get(&id).is_some_and(|it| it == reason))
    });
}

/// Conforms: control:D5
#[test]
fn agents_of_all_regions_are_reached_by_their_own_relays_and_the_nearest_one_is_home() {
    let world = World::start(LabOptions { further_regions: 2, ..spread(3) });
    world.relay(EMBEDDED_REGION).set_latency(FAR);
    world.relay(FIRST_FURTHER_REGION).set_latency(FAR);
    world.bring_up();
    world.reaches(&world.agents());
    eventually("the nearest is home", || world.home() == Some(FIRST_FURTHER_REGION + 1));
    for (_, relay) in world.deployment.lab.relays() {
        assert!(relay.packets() > 0, "one relay for each agent");
    }
    assert!(world.nodes().iter().all(|node| node.derp_forced_websocket.is_empty()));
}

#[test]
fn a_home_that_goes_is_replaced_and_does_not_make_the_home_flap_when_it_is_back() {
    let world = World::start(LabOptions { further_regions: 1, ..spread(2) });
    let (first, second) = (world.relay(EMBEDDED_REGION), world.relay(FIRST_FURTHER_REGION));
    second.set_latency(FAR);
    world.bring_up();
    world.reaches(&world.agents());
    eventually("the nearest is home", || world.home() == Some(EMBEDDED_REGION));

    first.go(true);
    // Agents elsewhere are reached while home is being looked for.
    world.reaches(&world.agents_of(1));
    eventually("another region is home", || world.home() == Some(FIRST_FURTHER_REGION));
    let moves = world.homes().len();
    first.set_latency(FAR);
    first.go(false);
    world.reaches(&world.agents());
    let measured = world.latency_checks();
    second.kill_connections();
    eventually("both are measured again", || world.latency_checks() >= measured + 2);
    world.reaches(&world.agents());
    assert_eq!(world.homes().len(), moves, "one region is as good as the other now: {:?}", world.homes());
}

/// Conforms: control:D8
#[test]
fn a_map_without_the_home_region_moves_home_and_a_node_update_says_so() {
    let world = World::start(LabOptions { further_regions: 1, ..spread(2) });
    world.relay(FIRST_FURTHER_REGION).set_latency(FAR);
    world.bring_up();
    world.reaches(&world.agents());
    eventually("the nearest is home", || world.home() == Some(EMBEDDED_REGION));

    let whole = world.deployment.control().relay_map();
    let mut map = whole.clone();
    map.regions.remove(&EMBEDDED_REGION);
    world.deployment.control().set_relay_map(map);

    eventually("the other region is home", || world.home() == Some(FIRST_FURTHER_REGION));
    world.reaches(&world.agents_of(1));
    let stale = world.agents_of(0);
    let ping = world.service.warren(&["ping", &name(&stale[0]), "--count", "1"]);
    assert!(!ping.status.success(), "its region is not in the map any more");
    world.deployment.control().set_relay_map(whole);
    world.reaches(&stale);
}

/// Conforms: control:D10
#[test]
fn a_running_client_and_running_agents_follow_a_changed_map() {
    let options = LabOptions { further_regions: 1, agents_follow_map: true, ..spread(2) };
    let world = World::start(options);
    world.relay(FIRST_FURTHER_REGION).set_latency(FAR);
    world.bring_up();
    world.reaches(&world.agents());
    eventually("the nearest is home", || world.home() == Some(EMBEDDED_REGION));

    let mut map = world.deployment.control().relay_map();
    map.regions.remove(&EMBEDDED_REGION);
    world.deployment.control().set_relay_map(map);

    eventually("the other region is home", || world.home() == Some(FIRST_FURTHER_REGION));
    world.reaches(&world.agents());
}

/// Conforms: data:20.2.8
#[test]
fn an_agent_that_starts_anew_is_reached_under_its_new_keys_and_its_old_ones_are_forgotten() {
    let world = World::up(LabOptions { agents: 1, ..LabOptions::default() });
    world.reaches(&world.agents());
    let (lab, id) = (&world.deployment.lab, world.agents()[0].id);
    let old = lab.agent_key(id).unwrap();
    world.deployment.runtime.block_on(async { lab.start_agent(id, End::Crash) });
    eventually("it runs anew", || lab.agent_key(id).is_some_and(|key| key != old));
    let answered = lab.agent_stats(id).disco_pings;
    eventually("it answers anew", || lab.agent_stats(id).disco_pings > answered);
    world.reaches(&world.agents());
    let peers = || support::sum(&world.service.metrics(), "warren_peers", &[]);
    eventually("one peer is left", || (peers() - 1.0).abs() < f64::EPSILON);
}

/// Conforms: control:H1 vpn:C1
#[test]
fn the_deployment_and_its_own_relay_see_the_token_once_in_each_request_and_other_relays_never() {
    let world = World::up(LabOptions { further_regions: 1, ..spread(2) });
    world.reaches(&world.agents());
    let own = world.deployment.lab.url().trim_start_matches("http://").to_owned();
    let mut seen = std::collections::BTreeSet::new();
    for request in world.recording().requests {
        let is_own = request.header("host").next() == Some(own.as_str());
        let tokens = request.header("coder-session-token").count();
        assert_eq!(tokens, usize::from(is_own), "{}", request.path);
        seen.insert((request.path, is_own));
    }
    for path in ["/api/v2/users/me", "/api/v2/workspaceagents/connection", "/api/v2/tailnet"] {
        assert!(seen.contains(&(path.to_owned(), true)), "{seen:?}");
    }
    for path in ["/derp", "/derp/latency-check"] {
        assert!([true, false].iter().all(|is_own| seen.contains(&(path.to_owned(), *is_own))), "{seen:?}");
    }
}

fn spread(agents: usize) -> LabOptions {
    LabOptions { agents, spread_agents: true, ..LabOptions::default() }
}

fn name(agent: &AgentInfo) -> String {
    format!("{}.{}", agent.name, agent.workspace)
}

struct World {
    deployment: Deployment,
    service: ServiceProcess,
}

impl World {
    fn start(options: LabOptions) -> Self {
        let (deployment, service) = (Deployment::with(options), ServiceProcess::start());
        let (url, token) = deployment.access();
        service.pretend_login(&url, &token);
        Self { deployment, service }
    }

    fn up(options: LabOptions) -> Self {
        let world = Self::start(options);
        world.bring_up();
        world
    }

    fn bring_up(&self) {
        let output = self.service.warren(&["up"]);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    fn relay(&self, region: i64) -> Relay {
        let relays = self.deployment.lab.relays();
        relays.into_iter().find(|(number, _)| i64::from(*number) == region).unwrap().1
    }

    fn agents(&self) -> Vec<AgentInfo> {
        self.deployment.lab.agents()
    }

    /// The agents whose home is the region of this place, of two.
    fn agents_of(&self, region: usize) -> Vec<AgentInfo> {
        self.agents().into_iter().skip(region).step_by(2).collect()
    }

    fn reaches(&self, agents: &[AgentInfo]) {
        for agent in agents {
            eventually(&format!("{} answers", name(agent)), || {
                self.service.warren(&["ping", &name(agent), "--count", "1"]).status.success()
            });
        }
    }

    fn recording(&self) -> Recording {
        self.deployment.control().recording()
    }

    /// What upgrades relays were asked for, in order.
    fn upgrades(&self) -> Vec<String> {
        let upgrade = |request: &Request| request.header("upgrade").next().unwrap_or_default().to_owned();
        self.recording().requests.iter().filter(|request| request.path == "/derp").map(upgrade).collect()
    }

    fn latency_checks(&self) -> usize {
        self.recording().requests.iter().filter(|request| request.path == "/derp/latency-check").count()
    }

    /// Every node message that was sent, in order.
    fn nodes(&self) -> Vec<Node> {
        let connections = self.recording().connections.into_iter();
        let requests = connections.flat_map(|connection| connection.requests);
        requests.filter_map(|request| request.update_self?.node).collect()
    }

    /// The homes that were told, in order, each as often as it was told.
    fn homes(&self) -> Vec<i64> {
        self.nodes().iter().map(|node| i64::from(node.preferred_derp)).collect()
    }

    fn home(&self) -> Option<i64> {
        self.homes().last().copied()
    }
}
