//! What a coordinator tells whom, in memory.

use warren_proto::{
    address::{coder_address, tailscale_address},
    tailnet::coordinate_request as ask,
};

use super::*;

pub(super) const AGENT: Uuid = Uuid::from_u128(0xa);
pub(super) const CLIENT: Uuid = Uuid::from_u128(0xc);
pub(super) const OTHER: Uuid = Uuid::from_u128(0xd);

/// Conforms: control:K7
#[test]
fn a_tunnel_tells_both_ends_of_each_other_and_readiness_comes_back() {
    let (coordinator, agent, mut to_agent, client, mut to_client) = pair();
    coordinator.handle(client, add(AGENT)).unwrap();
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node)]);
    assert_eq!(kinds(&mut to_agent), [(CLIENT, Kind::Node)]);
    coordinator.handle(agent, ready(CLIENT)).unwrap();
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::ReadyForHandshake)]);
}

#[test]
fn the_same_node_is_told_once_unless_a_test_repeats_it() {
    let (coordinator, agent, _to_agent, client, mut to_client) = pair();
    coordinator.handle(client, add(AGENT)).unwrap();
    coordinator.handle(client, add(AGENT)).unwrap();
    coordinator.handle(agent, node(AGENT, 1)).unwrap();
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node)]);
    coordinator.handle(agent, node(AGENT, 2)).unwrap();
    coordinator.repeat_node(AGENT);
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node), (AGENT, Kind::Node)]);
}

/// Conforms: control:K11
#[test]
fn goodbyes_and_losses_are_told_to_who_knew_the_node_and_to_nobody_else() {
    let (coordinator, agent, mut to_agent, client, mut to_client) = pair();
    let (_stranger, mut to_stranger) = coordinator.open(OTHER, Auth::Client);
    coordinator.handle(client, add(AGENT)).unwrap();
    kinds(&mut to_client);
    kinds(&mut to_agent);
    coordinator.leave(agent, Gone::Lost);
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Lost)]);
    assert_eq!(coordinator.handle(client, goodbye()), Ok(Handled::Left));
    assert!(to_client.try_recv().is_err() && to_client.is_closed());
    assert_eq!(kinds(&mut to_stranger), []);
    assert_eq!(coordinator.tunnels(), []);
}

/// Conforms: control:K5
#[test]
fn an_agent_that_comes_back_hears_at_once_of_the_tunnels_that_lead_to_it() {
    let (coordinator, agent, _to_agent, client, mut to_client) = pair();
    coordinator.handle(client, add(AGENT)).unwrap();
    coordinator.leave(agent, Gone::Lost);
    kinds(&mut to_client);
    let (again, mut to_again) = coordinator.open(AGENT, Auth::Agent);
    assert_eq!(nodes(&mut to_again), [(CLIENT, 1)]);
    coordinator.handle(again, node(AGENT, 1)).unwrap();
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node)]);
}

/// Conforms: control:K6
#[test]
fn a_newer_stream_displaces_the_older_one_with_a_word() {
    let (coordinator, agent, _to_agent, old, mut to_old) = pair();
    coordinator.handle(old, add(AGENT)).unwrap();
    kinds(&mut to_old);
    let (_new, mut to_new) = coordinator.open(CLIENT, Auth::Client);
    assert_eq!(errors(&mut to_old), ["peer ID overwritten by new connection"]);
    assert!(to_old.is_closed());
    assert_eq!(nodes(&mut to_new), [(AGENT, 1)]);
    coordinator.leave(old, Gone::Lost);
    assert_eq!(coordinator.clients(), [CLIENT]);
    coordinator.handle(agent, node(AGENT, 2)).unwrap();
    assert_eq!(nodes(&mut to_new), [(AGENT, 2)]);
    assert!(!to_new.is_closed());
}

#[test]
fn what_a_client_may_not_do_is_fatal_in_a_deployments_words() {
    let (coordinator, _agent, _to_agent, client, _to_client) = pair();
    let refused = "authorization: workspace agent not found or you do not have permission";
    assert_eq!(coordinator.handle(client, add(Uuid::from_u128(9))), Err(refused.to_owned()));
    coordinator.forbid(AGENT, true);
    assert_eq!(coordinator.handle(client, add(AGENT)), Err(refused.to_owned()));
    let early = Err("authorization: clients may not send ready_for_handshake".to_owned());
    assert_eq!(coordinator.handle(client, ready(AGENT)), early);
    let nothing = CoordinateRequest { update_self: Some(Default::default()), ..Default::default() };
    assert!(coordinator.handle(client, nothing).is_err());
}

#[test]
fn an_agent_has_its_own_addresses_and_opens_no_tunnels() {
    let (coordinator, agent, _to_agent, _client, _to_client) = pair();
    let opened = coordinator.handle(agent, add(CLIENT));
    assert_eq!(opened, Err("authorization: agents cannot open tunnels".to_owned()));
    let mut foreign = node(AGENT, 1);
    if let Some(node) = foreign.update_self.as_mut().and_then(|update| update.node.as_mut()) {
        node.addresses = vec!["fd60:627a:a42b::1/128".to_owned()];
    }
    let refused = "authorization: Addresses: invalid node address, got fd60:627a:a42b::1";
    assert_eq!(coordinator.handle(agent, foreign), Err(refused.to_owned()));
}

#[test]
fn held_readiness_is_told_when_it_is_released() {
    let (coordinator, agent, _to_agent, client, mut to_client) = pair();
    coordinator.handle(client, add(AGENT)).unwrap();
    kinds(&mut to_client);
    coordinator.hold_ready(true);
    coordinator.handle(agent, ready(CLIENT)).unwrap();
    assert_eq!(kinds(&mut to_client), []);
    coordinator.hold_ready(false);
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::ReadyForHandshake)]);
}

#[test]
fn a_closed_coordinator_says_so_and_stays_silent_on_new_streams() {
    let (coordinator, _agent, _to_agent, _client, mut to_client) = pair();
    coordinator.close();
    assert_eq!(errors(&mut to_client), ["coordinator closed"]);
    let (silent, mut to_silent) = coordinator.open(CLIENT, Auth::Client);
    assert_eq!(coordinator.handle(silent, add(AGENT)), Ok(Handled::Open));
    assert!(to_silent.try_recv().is_err() && !to_silent.is_closed());
    coordinator.reopen();
    assert!(to_silent.is_closed());
}

#[test]
fn a_peer_that_does_not_read_is_dropped_and_the_others_hear_of_it() {
    let (coordinator, agent, mut to_agent, client, to_client) = pair();
    coordinator.handle(client, add(AGENT)).unwrap();
    kinds(&mut to_agent);
    for version in 0..=OUTPUT_QUEUE as u64 {
        coordinator.handle(agent, node(AGENT, version)).unwrap();
    }
    assert!(to_client.is_closed());
    assert_eq!(to_client.len(), OUTPUT_QUEUE);
    assert_eq!(kinds(&mut to_agent), [(CLIENT, Kind::Disconnected)]);
}

/// Conforms: control:K1
#[test]
fn the_node_of_a_client_alone_is_kept_for_who_comes_later() {
    let coordinator = Coordinator::default();
    coordinator.allow(CLIENT);
    let (alone, mut to_alone) = coordinator.open(CLIENT, Auth::Client);
    coordinator.handle(alone, node(CLIENT, 7)).unwrap();
    assert!(to_alone.try_recv().is_err() && !to_alone.is_closed());
    let (later, mut to_later) = coordinator.open(OTHER, Auth::Client);
    coordinator.handle(later, add(CLIENT)).unwrap();
    assert_eq!(nodes(&mut to_later), [(CLIENT, 7)]);
}

/// Conforms: control:K2
#[test]
fn a_client_whose_address_is_a_network_is_closed_with_a_word() {
    let (coordinator, _agent, _to_agent, client, mut to_client) = pair();
    let network = with_prefixes(&["fd60:627a:a42b:1::/64"], &[]);
    let refused = "authorization: invalid address bits, expected 128, got 64";
    assert_eq!(refusal(&coordinator, client, network, &mut to_client), refused);
}

/// Conforms: control:K3
#[test]
fn an_agent_may_say_each_of_its_own_addresses() {
    let (coordinator, agent, mut to_agent, client, mut to_client) = pair();
    coordinator.handle(client, add(AGENT)).unwrap();
    kinds(&mut to_client);
    kinds(&mut to_agent);
    let coder = format!("{}/128", coder_address(&AGENT));
    let tailscale = format!("{}/128", tailscale_address(&AGENT));
    let legacy = "fd7a:115c:a1e0:49d6:b259:b7ac:b1b2:48f4/128";
    for own in [coder.as_str(), &tailscale, legacy] {
        coordinator.handle(agent, with_prefixes(&[own], &[own])).unwrap();
        assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node)], "{own}");
    }
    assert!(to_agent.try_recv().is_err() && !to_agent.is_closed());
}

/// Conforms: control:K3
#[test]
fn an_agent_that_says_what_is_not_its_own_is_closed_with_a_word() {
    let own = format!("{}/128", coder_address(&AGENT));
    let foreign = "fd60:627a:a42b::1/128";
    let network = "fd60:627a:a42b::/64";
    let said = [
        (with_prefixes(&[foreign], &[&own]), "Addresses: invalid node address, got fd60:627a:a42b::1"),
        (with_prefixes(&[&own], &[foreign]), "AllowedIps: invalid node address, got fd60:627a:a42b::1"),
        (with_prefixes(&[network], &[&own]), "Addresses: invalid address bits, expected 128, got 64"),
        (with_prefixes(&[&own], &[network]), "AllowedIps: invalid address bits, expected 128, got 64"),
    ];
    for (request, text) in said {
        let (coordinator, agent, mut to_agent, _client, _to_client) = pair();
        assert_eq!(refusal(&coordinator, agent, request, &mut to_agent), format!("authorization: {text}"));
    }
}

/// Conforms: control:K4
#[test]
fn both_ends_of_a_tunnel_hear_each_others_node_and_each_later_one() {
    let (coordinator, agent, mut to_agent, client, mut to_client) = pair();
    coordinator.handle(client, add(AGENT)).unwrap();
    assert_eq!(nodes(&mut to_client), [(AGENT, 1)]);
    assert_eq!(nodes(&mut to_agent), [(CLIENT, 1)]);
    for version in 2..5 {
        coordinator.handle(agent, node(AGENT, version)).unwrap();
        coordinator.handle(client, node(CLIENT, version)).unwrap();
        assert_eq!(nodes(&mut to_client), [(AGENT, version)]);
        assert_eq!(nodes(&mut to_agent), [(CLIENT, version)]);
    }
}

/// Conforms: control:K8
#[test]
fn readiness_without_a_tunnel_is_an_error_that_ends_nothing() {
    let (coordinator, agent, mut to_agent, client, mut to_client) = pair();
    assert_eq!(coordinator.handle(agent, ready(CLIENT)), Ok(Handled::Open));
    let text = format!("ready for handshake error: you do not share a tunnel with \"{CLIENT}\"");
    assert_eq!(errors(&mut to_agent), [text]);
    assert!(!to_agent.is_closed());
    assert_eq!(kinds(&mut to_client), []);
    coordinator.handle(client, add(AGENT)).unwrap();
    coordinator.handle(agent, ready(CLIENT)).unwrap();
    assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node), (AGENT, Kind::ReadyForHandshake)]);
}

/// Conforms: control:K9
#[test]
fn tunnels_in_both_directions_live_side_by_side_and_each_ends_with_its_source() {
    let coordinator = Coordinator::default();
    let ends = [CLIENT, OTHER];
    ends.iter().for_each(|id| coordinator.allow(*id));
    let [(one, mut to_one), (other, mut to_other)] = ends.map(|id| coordinator.open(id, Auth::Client));
    for (place, to) in [(one, OTHER), (other, CLIENT)] {
        coordinator.handle(place, node(place.id, 1)).unwrap();
        coordinator.handle(place, add(to)).unwrap();
    }
    assert_eq!(coordinator.tunnels(), [(CLIENT, OTHER), (OTHER, CLIENT)]);
    assert_eq!(nodes(&mut to_one), [(OTHER, 1)]);
    assert_eq!(nodes(&mut to_other), [(CLIENT, 1)]);
    coordinator.handle(one, node(CLIENT, 2)).unwrap();
    assert_eq!(nodes(&mut to_other), [(CLIENT, 2)], "two tunnels are not told twice");
    coordinator.leave(one, Gone::Lost);
    assert_eq!(coordinator.tunnels(), [(OTHER, CLIENT)]);
}

/// Conforms: control:K10
#[test]
fn a_goodbye_is_told_as_one_and_ends_the_own_stream_without_a_word() {
    let (coordinator, _agent, mut to_agent, client, mut to_client) = pair();
    coordinator.handle(client, add(AGENT)).unwrap();
    kinds(&mut to_client);
    kinds(&mut to_agent);
    assert_eq!(coordinator.handle(client, goodbye()), Ok(Handled::Left));
    assert_eq!(kinds(&mut to_agent), [(CLIENT, Kind::Disconnected)]);
    assert!(to_client.try_recv().is_err() && to_client.is_closed());
}

/// Conforms: control:K12
#[test]
fn each_request_is_judged_by_what_its_own_sender_may_do() {
    let (coordinator, agent, mut to_agent, client, _to_client) = pair();
    coordinator.allow(CLIENT);
    coordinator.handle(client, add(AGENT)).unwrap();
    kinds(&mut to_agent);
    let opened = "authorization: agents cannot open tunnels";
    let early = Err("authorization: clients may not send ready_for_handshake".to_owned());
    assert_eq!(coordinator.handle(client, ready(AGENT)), early);
    assert_eq!(coordinator.handle(agent, ready(CLIENT)), Ok(Handled::Open));
    // An address that a client may have and an agent may not.
    let foreign = || with_prefixes(&["fd60:627a:a42b::1/128"], &[]);
    assert_eq!(coordinator.handle(client, foreign()), Ok(Handled::Open));
    let refused = "authorization: Addresses: invalid node address, got fd60:627a:a42b::1";
    assert_eq!(coordinator.handle(agent, foreign()), Err(refused.to_owned()));
    kinds(&mut to_agent);
    assert_eq!(refusal(&coordinator, agent, add(CLIENT), &mut to_agent), opened);
    // A later stream with the ID of an agent has the rights that it came with.
    let (again, _to_again) = coordinator.open(AGENT, Auth::Client);
    assert_eq!(coordinator.handle(again, add(CLIENT)), Ok(Handled::Open));
}

pub(super) type Responses = mpsc::Receiver<CoordinateResponse>;

/// An agent and a client that have told their nodes.
fn pair() -> (Coordinator, Place, Responses, Place, Responses) {
    let coordinator = Coordinator::default();
    coordinator.allow(AGENT);
    let (agent, to_agent) = coordinator.open(AGENT, Auth::Agent);
    coordinator.handle(agent, node(AGENT, 1)).unwrap();
    let (client, to_client) = coordinator.open(CLIENT, Auth::Client);
    coordinator.handle(client, node(CLIENT, 1)).unwrap();
    (coordinator, agent, to_agent, client, to_client)
}

pub(super) fn node(of: Uuid, version: u64) -> CoordinateRequest {
    let addresses = vec![format!("{}/128", coder_address(&of))];
    let derp_latency = [(version.to_string(), 0.1)].into();
    let node = Node { addresses, derp_latency, ..Node::default() };
    update_self(node)
}

fn with_prefixes(addresses: &[&str], allowed_ips: &[&str]) -> CoordinateRequest {
    let [addresses, allowed_ips] =
        [addresses, allowed_ips].map(|prefixes| prefixes.iter().map(|text| (*text).to_owned()).collect());
    update_self(Node { addresses, allowed_ips, ..Node::default() })
}

pub(super) fn update_self(node: Node) -> CoordinateRequest {
    let update_self = Some(ask::UpdateSelf { node: Some(node) });
    CoordinateRequest { update_self, ..CoordinateRequest::default() }
}

pub(super) fn goodbye() -> CoordinateRequest {
    CoordinateRequest { disconnect: Some(ask::Disconnect {}), ..CoordinateRequest::default() }
}

pub(super) fn add(agent: Uuid) -> CoordinateRequest {
    let id = agent.as_bytes().to_vec().into();
    let add_tunnel = Some(ask::Tunnel { id });
    CoordinateRequest { add_tunnel, ..CoordinateRequest::default() }
}

pub(super) fn ready(client: Uuid) -> CoordinateRequest {
    let id = client.as_bytes().to_vec().into();
    let ready_for_handshake = vec![ask::ReadyForHandshake { id }];
    CoordinateRequest { ready_for_handshake, ..CoordinateRequest::default() }
}

pub(super) fn kinds(responses: &mut Responses) -> Vec<(Uuid, Kind)> {
    let mut kinds = Vec::new();
    while let Ok(response) = responses.try_recv() {
        let told = response.peer_updates.iter();
        kinds.extend(told.map(|update| (Uuid::from_slice(&update.id).unwrap(), update.kind())));
    }
    kinds
}

pub(super) fn errors(responses: &mut Responses) -> Vec<String> {
    std::iter::from_fn(|| responses.try_recv().ok()).map(|response| response.error).collect()
}

/// The versions of the nodes that are told, in order.
pub(super) fn nodes(responses: &mut Responses) -> Vec<(Uuid, u64)> {
    let updates = std::iter::from_fn(|| responses.try_recv().ok()).flat_map(|response| response.peer_updates);
    let nodes = updates.filter_map(|update| Some((Uuid::from_slice(&update.id).unwrap(), update.node?)));
    nodes.map(|(id, node)| (id, node.derp_latency.keys().next().unwrap().parse().unwrap())).collect()
}

/// What a stream that asks for too much is told before it ends.
fn refusal(
    coordinator: &Coordinator,
    place: Place,
    request: CoordinateRequest,
    told: &mut Responses,
) -> String {
    let text = coordinator.handle(place, request).unwrap_err();
    coordinator.leave(place, Gone::Refused(text));
    assert!(told.is_closed());
    errors(told).concat()
}
