//! What peers hear that are at different replicas.

use super::*;
use crate::control::coordinator::tests::{
    AGENT, CLIENT, OTHER, Responses, add, errors, goodbye, kinds, node, nodes, ready, update_self,
};

/// Conforms: control:K14
#[test]
fn rapid_updates_arrive_elsewhere_in_order_and_the_latest_is_the_last() {
    let (mut site, agent, _to_agent, _client, mut to_client) = pair();
    for version in 2..=200 {
        site.say(agent, node(AGENT, version));
    }
    let told = nodes(&mut to_client);
    assert!(told.is_sorted_by(|(_, one), (_, next)| one < next), "{told:?}");
    assert_eq!(told.last(), Some(&(AGENT, 200)));
}

/// Conforms: control:K15
#[test]
fn peers_of_a_replica_without_heartbeats_are_lost_until_it_recovers_and_never_gone() {
    let (mut site, agent, mut to_agent, _client, mut to_client) = pair();
    site.replicas.set_health(0, ReplicaHealth::Stalled);
    assert_eq!(told(&mut to_client), [(Kind::Lost, "lost".to_owned(), Some(1))]);
    assert!(!to_agent.is_closed());
    // What is said there meanwhile is heard when it is back.
    site.say(agent, node(AGENT, 2));
    assert_eq!(told(&mut to_client), []);
    site.replicas.set_health(0, ReplicaHealth::Serving);
    assert_eq!(told(&mut to_client), [(Kind::Node, "found".to_owned(), Some(2))]);
    assert_eq!(told(&mut to_agent), []);
}

/// Conforms: control:K16
#[test]
fn an_unhealthy_replica_ends_old_and_new_streams_with_a_word_until_it_is_well() {
    let (mut site, _agent, mut to_agent, _client, mut to_client) = pair();
    site.replicas.set_health(0, ReplicaHealth::Unhealthy);
    assert_eq!(errors(&mut to_agent), ["coordinator unhealthy"]);
    assert!(to_agent.is_closed());
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Lost)]);
    let (_refused, mut to_refused) = site.replicas.open_at(0, AGENT, Auth::Agent);
    assert_eq!(errors(&mut to_refused), ["coordinator unhealthy"]);
    assert!(to_refused.is_closed());
    site.replicas.set_health(0, ReplicaHealth::Serving);
    let (_again, mut to_again) = site.join(0, AGENT, Auth::Agent, 2);
    assert_eq!(nodes(&mut to_again), [(CLIENT, 1)]);
    assert!(!to_again.is_closed());
    assert_eq!(told(&mut to_client), [(Kind::Node, "found".to_owned(), Some(2))]);
}

/// Conforms: control:K17
#[test]
fn of_an_agent_at_two_replicas_the_newest_is_told_and_the_older_when_it_leaves() {
    let (mut site, older, _to_older, _client, mut to_client) = pair();
    let (newer, mut to_newer) = site.join(1, AGENT, Auth::Agent, 2);
    assert_eq!(told(&mut to_client), [(Kind::Node, "update".to_owned(), Some(2))]);
    assert_eq!(nodes(&mut to_newer), [(CLIENT, 1)]);
    assert_eq!(site.say(newer, goodbye()), Handled::Left);
    assert_eq!(told(&mut to_client), [(Kind::Node, "update".to_owned(), Some(1))]);
    // The same when it is lost, and whoever spoke last is the newest.
    let (newer, _to_newer) = site.join(1, AGENT, Auth::Agent, 3);
    site.say(older, node(AGENT, 4));
    site.say(newer, node(AGENT, 5));
    assert_eq!(nodes(&mut to_client), [(AGENT, 3), (AGENT, 4), (AGENT, 5)]);
    site.replicas.leave(newer, Gone::Lost);
    assert_eq!(told(&mut to_client), [(Kind::Node, "update".to_owned(), Some(4))]);
    site.say(older, goodbye());
    assert_eq!(told(&mut to_client), [(Kind::Lost, "lost".to_owned(), Some(5))], "the lost one's row stays");
}

/// Conforms: control:K18
#[test]
fn peers_at_different_replicas_hear_each_other_until_one_closes_with_a_word() {
    let mut site = Site::new();
    let (agent, mut to_agent) = site.join(0, AGENT, Auth::Agent, 1);
    let (client, mut to_client) = site.join(1, CLIENT, Auth::Client, 1);
    site.say(client, add(AGENT));
    assert_eq!(told(&mut to_client), [(Kind::Node, "new".to_owned(), Some(1))]);
    assert_eq!(told(&mut to_agent), [(Kind::Node, "new".to_owned(), Some(1))]);
    site.say(agent, ready(CLIENT));
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::ReadyForHandshake)]);
    site.say(client, node(CLIENT, 2));
    assert_eq!(told(&mut to_agent), [(Kind::Node, "update".to_owned(), Some(2))]);
    site.replicas.set_health(0, ReplicaHealth::Closed);
    assert_eq!(errors(&mut to_agent), ["coordinator closed"]);
    assert!(to_agent.is_closed());
    assert!(!to_client.is_closed());
}

/// Conforms: control:K19
#[test]
fn a_client_whose_replica_closes_or_fails_goes_on_at_another_and_is_never_gone() {
    for health in [ReplicaHealth::Closed, ReplicaHealth::Unhealthy, ReplicaHealth::Stalled] {
        let (mut site, agent, mut to_agent, _client, _to_client) = pair();
        site.replicas.set_health(1, health);
        assert_eq!(told(&mut to_agent), [(Kind::Lost, "lost".to_owned(), Some(1))], "{health:?}");
        let (again, mut to_again) = site.replicas.open(CLIENT, Auth::Client);
        site.say(again, node(CLIENT, 2));
        site.say(again, add(AGENT));
        assert_eq!(told(&mut to_agent), [(Kind::Node, "found".to_owned(), Some(2))], "{health:?}");
        assert_eq!(nodes(&mut to_again), [(AGENT, 1)], "{health:?}");
        site.say(agent, ready(CLIENT));
        assert_eq!(kinds(&mut to_again), [(AGENT, Kind::ReadyForHandshake)], "{health:?}");
        // Its own replica comes back, and with it what the client said there before.
        site.replicas.set_health(1, ReplicaHealth::Serving);
        assert_eq!(told(&mut to_agent), [], "{health:?}");
    }
}

/// Conforms: control:K20
#[test]
fn what_lost_peers_said_outlives_the_replica_that_they_were_at() {
    let (mut site, agent, _to_agent, _client, mut to_client) = pair();
    site.replicas.leave(agent, Gone::Lost);
    site.replicas.set_health(0, ReplicaHealth::Closed);
    assert_eq!(told(&mut to_client), [(Kind::Lost, "lost".to_owned(), Some(1))], "and not DISCONNECTED");
    let row = &site.replicas.rows[&(AGENT, 0)];
    assert!(row.is_lost && row.node.derp_latency.contains_key("1"));
    // The client's row and tunnel too: the agent hears at another replica where it was.
    site.replicas.set_health(1, ReplicaHealth::Closed);
    assert!(site.replicas.rows[&(CLIENT, 1)].is_lost);
    assert_eq!(site.replicas.tunnels(), [(CLIENT, AGENT)]);
    let (_agent, _to_agent) = site.join(2, AGENT, Auth::Agent, 2);
    let (_client, mut to_client) = site.join(2, CLIENT, Auth::Client, 2);
    assert_eq!(nodes(&mut to_client), [(AGENT, 2)], "without asking again");
}

#[test]
fn a_goodbye_leaves_nothing_and_is_told_as_one() {
    let (mut site, _agent, mut to_agent, client, mut to_client) = pair();
    assert_eq!(site.say(client, goodbye()), Handled::Left);
    assert_eq!(told(&mut to_agent), [(Kind::Disconnected, "disconnected".to_owned(), None)]);
    assert!(to_client.try_recv().is_err() && to_client.is_closed());
    assert_eq!(site.replicas.tunnels(), []);
    assert!(!site.replicas.rows.contains_key(&(CLIENT, 1)));
}

#[test]
fn a_newer_stream_at_the_same_replica_displaces_the_older_without_a_word() {
    let (mut site, _agent, mut to_agent, _client, mut to_client) = pair();
    let (again, mut to_again) = site.replicas.open_at(1, CLIENT, Auth::Client);
    assert!(to_client.try_recv().is_err() && to_client.is_closed());
    assert_eq!(told(&mut to_agent), [(Kind::Lost, "lost".to_owned(), Some(1))]);
    assert_eq!(told(&mut to_again), [(Kind::Node, "new".to_owned(), Some(1))], "without asking again");
    site.say(again, node(CLIENT, 2));
    assert_eq!(told(&mut to_agent), [(Kind::Node, "found".to_owned(), Some(2))]);
}

#[test]
fn readiness_for_an_unknown_peer_is_an_error_and_the_rest_is_not_read() {
    let (mut site, agent, mut to_agent, _client, mut to_client) = pair();
    let mut list = ready(OTHER);
    list.ready_for_handshake.extend(ready(CLIENT).ready_for_handshake);
    site.say(agent, list);
    let text = format!("ready for handshake error: you do not share a tunnel with \"{OTHER}\"");
    assert_eq!(errors(&mut to_agent), [text]);
    assert!(!to_agent.is_closed());
    assert_eq!(kinds(&mut to_client), []);
}

#[test]
fn faults_of_coordination_strike_at_every_replica() {
    let (mut site, agent, _to_agent, _client, mut to_client) = pair();
    let replicas = &mut site.replicas;
    assert_eq!(replicas.node(AGENT).map(update_self), Some(node(AGENT, 1)));
    replicas.inject(&error("on purpose".to_owned()));
    assert_eq!(errors(&mut to_client), ["on purpose"]);
    replicas.repeat_node(AGENT);
    assert_eq!(told(&mut to_client), [(Kind::Node, "update".to_owned(), Some(1))]);
    replicas.pretend_gone(AGENT, Kind::Lost);
    assert_eq!(told(&mut to_client), [(Kind::Lost, "lost".to_owned(), Some(1))]);
    site.say(agent, node(AGENT, 2));
    assert_eq!(told(&mut to_client), [(Kind::Node, "found".to_owned(), Some(2))]);
    site.replicas.pretend_gone(AGENT, Kind::Disconnected);
    assert_eq!(told(&mut to_client), [(Kind::Disconnected, "disconnected".to_owned(), None)]);
    site.say(agent, node(AGENT, 3));
    assert_eq!(told(&mut to_client), [(Kind::Node, "new".to_owned(), Some(3))]);

    site.replicas.hold_ready(true);
    site.say(agent, ready(CLIENT));
    assert_eq!(kinds(&mut to_client), []);
    site.replicas.hold_ready(false);
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::ReadyForHandshake)]);
}

#[test]
fn new_streams_go_where_the_fewest_are_among_the_replicas_that_do_best() {
    let mut site = Site::new();
    site.replicas.set_health(1, ReplicaHealth::Stalled);
    let streams: Vec<_> = (1..=4).map(|id| site.replicas.open(Uuid::from_u128(id), Auth::Client)).collect();
    let at = |number: &u64| site.replicas.streams[number].replica;
    let places: Vec<usize> = streams.iter().map(|(place, _)| at(&place.stream)).collect();
    assert_eq!(places, [0, 2, 0, 2]);
}

#[test]
fn a_replica_that_has_closed_stays_silent_on_new_streams_until_it_serves_again() {
    let (mut site, _agent, _to_agent, _client, _to_client) = pair();
    site.replicas.set_health(1, ReplicaHealth::Closed);
    let (silent, mut to_silent) = site.join(1, CLIENT, Auth::Client, 2);
    assert_eq!(site.say(silent, add(AGENT)), Handled::Open);
    assert!(to_silent.try_recv().is_err() && !to_silent.is_closed());
    site.replicas.set_health(1, ReplicaHealth::Serving);
    assert!(to_silent.try_recv().is_err() && to_silent.is_closed());
}

#[test]
fn a_peer_that_does_not_read_is_lost() {
    let (mut site, agent, mut to_agent, _client, to_client) = pair();
    for version in 2..=(OUTPUT_QUEUE as u64) + 2 {
        site.say(agent, node(AGENT, version));
    }
    assert!(to_client.is_closed());
    assert_eq!(to_client.len(), OUTPUT_QUEUE);
    assert_eq!(kinds(&mut to_agent), [(CLIENT, Kind::Lost)]);
}

/// Three replicas.
struct Site {
    replicas: Replicas,
    authority: Authority,
}

impl Site {
    fn new() -> Self {
        let authority = Authority { agents: [AGENT].into(), ..Authority::default() };
        Self { replicas: Replicas::new(3), authority }
    }

    /// Opens a stream at a replica and tells a node there.
    fn join(&mut self, at: usize, id: Uuid, auth: Auth, version: u64) -> (Place, Responses) {
        let (place, responses) = self.replicas.open_at(at, id, auth);
        self.say(place, node(id, version));
        (place, responses)
    }

    fn say(&mut self, place: Place, request: CoordinateRequest) -> Handled {
        self.replicas.handle(&self.authority, place, &request).unwrap()
    }
}

/// An agent at replica 0 and a client at replica 1 that have a tunnel and know of each other.
fn pair() -> (Site, Place, Responses, Place, Responses) {
    let mut site = Site::new();
    let (agent, mut to_agent) = site.join(0, AGENT, Auth::Agent, 1);
    let (client, mut to_client) = site.join(1, CLIENT, Auth::Client, 1);
    site.say(client, add(AGENT));
    assert_eq!(nodes(&mut to_agent), [(CLIENT, 1)]);
    assert_eq!(nodes(&mut to_client), [(AGENT, 1)]);
    (site, agent, to_agent, client, to_client)
}

/// Each update: its kind, its reason and the version of its node.
fn told(responses: &mut Responses) -> Vec<(Kind, String, Option<u64>)> {
    let updates = std::iter::from_fn(|| responses.try_recv().ok()).flat_map(|response| response.peer_updates);
    let version = |node: &Node| node.derp_latency.keys().next().unwrap().parse().unwrap();
    updates.map(|update| (update.kind(), update.reason.clone(), update.node.as_ref().map(version))).collect()
}
