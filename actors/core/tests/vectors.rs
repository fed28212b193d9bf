//! Golden vectors of the control plane and of node messages, fed to the rules: what was recorded from a
//! deployment must lead to the right workspaces, tunnels, peers and maps.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use prost::Message;
use serde_json::Value;
use uuid::Uuid;
use warren_core::{
    coordination::Coordination,
    home::{Homes, RegionLatency, Report},
    own_node::{OwnIdentity, OwnNode},
    path::{Measured, better},
    relay_map::{NodeAddress, RegionId, RelayMap},
    roster::{Roster, Sent, Update, Workspaces},
};
use warren_proto::{
    drpc::{Decoder, Kind},
    key::NodePublic,
    name::DEFAULT_SUFFIX,
    tailnet::{
        CoordinateRequest, CoordinateResponse, DerpMap, Node, WorkspaceUpdate,
        coordinate_response::{PeerUpdate, peer_update},
    },
};

const MS: Duration = Duration::from_millis(1);

/// Conforms: data:20.1.4
#[test]
fn the_better_of_two_paths_is_the_one_that_was_recorded() {
    let file = load("data/better-address");
    let rows = file["vectors"].as_array().unwrap();
    assert_eq!(rows.len(), 27);
    for row in rows {
        let measured = |address: &str, latency: &str| {
            let address = row["inputs"][address].as_str().unwrap().parse().ok()?;
            let latency = Duration::from_nanos(row["inputs"][latency].as_u64().unwrap());
            Some(Measured { address, latency })
        };
        let (a, b) = (measured("a", "a_latency_ns"), measured("b", "b_latency_ns"));
        assert_eq!(better(a, b), row["decoded"]["better"], "{}", row["name"]);
    }
}

#[test]
fn the_life_of_a_workspace_leads_to_the_right_tunnels_names_and_messages() {
    let mut workspaces = Workspaces {
        username: "alice".to_owned(),
        suffix: DEFAULT_SUFFIX.to_owned(),
        ..Workspaces::default()
    };
    let (mut roster, mut coordination, mut sent) =
        (Roster::default(), Coordination::default(), Sent::default());
    let now = Instant::now();
    coordination.connected(now);
    let mut story = Vec::new();
    let mut update = Update::Snapshot;
    for (_, _, message) in messages::<WorkspaceUpdate>("workspace-updates", "life", "WorkspaceUpdate") {
        workspaces.apply(&message, update).unwrap();
        assert_eq!(roster.set_workspaces(&workspaces), []);
        let requests = coordination.set_destinations(now, &workspaces.agent_ids(), update).requests;
        let added = requests.iter().filter(|it| it.add_tunnel.is_some()).count();
        let told = sent.difference(roster.snapshot()).unwrap();
        story.push((
            (roster.snapshot().workspaces.len(), roster.snapshot().agents.len()),
            (added, requests.len() - added),
            (told.upserted_workspaces.len(), told.upserted_agents.len()),
            (told.deleted_workspaces.len(), told.deleted_agents.len()),
        ));
        if update == Update::Snapshot {
            let first =
                |name| roster.snapshot().agents.values().find(|it| it.name == name).unwrap().fqdn[0].as_str();
            assert_eq!([first("main"), first("alpha")], ["dev.coder.", "alpha.pair.me.coder."]);
        }
        sent.note_difference(Arc::new(roster.snapshot().clone()));
        update = Update::Diff;
    }
    // There are; tunnels asked for and given back; upserts and deletes of workspaces and agents.
    let expected = [
        ((2, 3), (3, 0), (2, 3), (0, 0)), // the snapshot
        ((3, 3), (0, 0), (1, 0), (0, 0)), // created: STARTING
        ((3, 4), (1, 0), (1, 1), (0, 0)), // RUNNING, with its agent
        ((3, 3), (0, 1), (1, 0), (0, 1)), // STOPPING
        ((3, 4), (1, 0), (1, 1), (0, 0)), // STOPPED, with an agent of another id
        ((3, 3), (0, 1), (1, 0), (0, 1)), // DELETING
        ((2, 3), (0, 0), (0, 0), (1, 0)), // deleted
    ];
    assert_eq!(story, expected);
}

#[test]
fn an_empty_snapshot_is_a_message_of_no_bytes_and_is_known() {
    for entry in ["empty-snapshot", "foreign-owner", "unknown-owner"] {
        let recorded = messages::<WorkspaceUpdate>("workspace-updates", entry, "WorkspaceUpdate");
        let mut workspaces = Workspaces::default();
        assert_eq!(recorded.len(), 1, "{entry}");
        workspaces.apply(&recorded[0].2, Update::Snapshot).unwrap();
        assert!(workspaces.known && workspaces.workspaces.is_empty(), "{entry}");
    }
}

#[test]
fn each_recorded_relay_map_is_read_and_compared_with_the_one_before() {
    let maps = messages::<DerpMap>("derpmap", "life", "DERPMap");
    let maps: Vec<RelayMap> = maps.iter().map(|(_, _, map)| RelayMap::from_proto(map)).collect();
    let numbers = |ids: Vec<RegionId>| ids.into_iter().map(|id| id.0).collect::<Vec<_>>();
    let changes: Vec<_> = maps
        .windows(2)
        .map(|pair| pair[0].difference(&pair[1]))
        .map(|it| (numbers(it.added), numbers(it.changed), numbers(it.removed)))
        .collect();
    let none = Vec::new;
    let expected = [
        (vec![7], none(), none()),
        (none(), none(), vec![7]),
        (none(), none(), vec![999, 1000]),
        (vec![999, 1000], none(), none()),
    ];
    assert_eq!(changes, expected);
    assert!(maps[0].difference(&maps[4]).is_empty(), "in another order it is the same map");
    let extra = &maps[1].regions[&RegionId(7)].nodes[0];
    assert_eq!((extra.ipv4, extra.ipv6), (NodeAddress::Disabled, NodeAddress::Disabled));
    assert_eq!((extra.derp_port, extra.stun_port), (443, None));

    let mut homes = Homes::new(None, 0);
    let home = maps.iter().map(|map| homes.handle_map(map).map(|id| id.0)).collect::<Vec<_>>();
    assert_eq!(home, [Some(999), Some(999), Some(999), None, Some(999)]);
}

#[test]
fn the_recorded_embedded_relay_is_reached_where_the_deployment_is() {
    let map = &messages::<DerpMap>("derpmap", "life", "DERPMap")[1].2;
    let mut map = RelayMap::from_proto(map);
    let before = map.clone();
    map.rewrite_embedded(&"https://coder.example.com:8443".parse().unwrap());
    let node = &map.regions[&RegionId(999)].nodes[0];
    assert_eq!(
        (node.host_name.as_str(), node.derp_port, node.force_http),
        ("coder.example.com", 8443, false)
    );
    assert!(node.insecure_for_tests, "nothing else changes");
    for other in [7, 1000].map(RegionId) {
        assert_eq!(map.regions[&other], before.regions[&other]);
    }
}

/// What the client sees in each recording: each answer, and whether its agent is programmed after it.
#[test]
fn recorded_streams_program_the_agent_when_it_is_ready_and_as_long_as_it_is_there() {
    let rows: [(&str, &[(&str, bool)]); 7] = [
        (
            "tunnel-life",
            &[
                ("add tunnel", false),
                ("READY", true),
                ("READY", true),
                ("remove tunnel", false),
                ("add tunnel", false),
                ("READY", true),
            ],
        ),
        ("disconnect-at-once", &[("add tunnel", false)]),
        (
            "second-coordinate",
            &[
                ("add tunnel", false),
                ("init", false),
                ("peer ID overwritten by new connection", false),
                ("READY", true),
            ],
        ),
        (
            "agent-restart",
            &[
                ("add tunnel", false),
                ("READY", true),
                ("node update", true),
                ("graceful disconnect", false),
                ("READY", false),
                ("node update", true),
                ("node update", true),
            ],
        ),
        (
            "coordinator-replaced",
            &[
                ("add tunnel", false),
                ("READY", true),
                ("node update", true),
                ("coordinator close", true),
                ("coordinator closed", true),
                ("add tunnel", true),
                ("READY", true),
            ],
        ),
        (
            "both-sides",
            &[
                ("add tunnel", false),
                ("READY", true),
                ("READY", true),
                ("lost", true),
                ("node update", true),
                ("lost", true),
                ("node update", true),
                ("add tunnel", true),
                ("remove tunnel", false),
                ("add tunnel", false),
            ],
        ),
        ("empty-and-unknown", &[("add tunnel", false), ("READY", true), ("node update", true)]),
    ];
    for (entry, expected) in rows {
        let story = replay(entry);
        let story: Vec<_> =
            story.iter().map(|(what, is_programmed)| (what.as_str(), *is_programmed)).collect();
        assert_eq!(story, expected, "{entry}");
    }
}

/// High availability puts the last node into LOST, says `new` and `found`, and may send READY first.
#[test]
fn every_recorded_answer_can_be_used() {
    let mut answers = 0;
    for entry in names("coordinate") {
        let mut coordination = Coordination::default();
        let now = Instant::now();
        for (_, _, response) in messages::<CoordinateResponse>("coordinate", &entry, "CoordinateResponse") {
            let outcome = coordination.handle_response(now, &response, |_| Some(Duration::ZERO));
            assert_eq!(outcome.ignored, [], "{entry}");
            assert_eq!(outcome.error.unwrap_or_default(), response.error, "{entry}");
            for update in &response.peer_updates {
                let id = Uuid::from_slice(&update.id).unwrap();
                let programmed = coordination.network_map().peers.get(&id);
                let node = update.node.as_ref().filter(|_| update.kind() == peer_update::Kind::Node);
                if let Some(node) = node {
                    assert_eq!(programmed.unwrap().node_key, NodePublic::from_binary(&node.key).unwrap());
                }
                assert!(programmed.is_none() || update.kind() != peer_update::Kind::Disconnected, "{entry}");
                answers += 1;
            }
        }
    }
    assert!(answers > 60, "{answers}");
}

#[test]
fn a_node_that_a_reference_node_published_becomes_a_peer() {
    for vector in node_messages() {
        let node = Node::decode(hex(&vector, "bytes").as_slice()).unwrap();
        let decoded = &vector["decoded"];
        let update = PeerUpdate {
            id: Uuid::from_u128(7).as_bytes().to_vec().into(),
            node: Some(node),
            kind: peer_update::Kind::Node.into(),
            reason: String::new(),
        };
        let response = CoordinateResponse { peer_updates: vec![update], error: String::new() };
        let mut coordination = Coordination::default();
        let outcome = coordination.handle_response(Instant::now(), &response, |_| None);
        assert_eq!(outcome.ignored, [], "{vector}");
        let peer = &coordination.network_map().peers[&Uuid::from_u128(7)];
        let addresses: Vec<_> = peer.addresses.iter().map(|address| format!("{address}/128")).collect();
        assert_eq!(Value::from(addresses), decoded["allowedIps"]);
        assert_eq!(peer.disco_key.to_string(), decoded["disco"]);
        assert_eq!(peer.node_key.to_binary().to_vec(), hex(decoded, "key"));
        assert_eq!(i64::from(peer.home.0), decoded["preferredDerp"]);
    }
}

/// Conforms: control:N8
#[test]
fn a_node_message_reads_back_whether_it_says_nothing_or_everything() {
    let everything: Vec<Node> =
        node_messages().iter().map(|it| Node::decode(hex(it, "bytes").as_slice()).unwrap()).collect();
    let has_all = |node: &Node| {
        let has_maps = !node.derp_latency.is_empty() && !node.derp_forced_websocket.is_empty();
        has_maps && !node.endpoints.is_empty() && !node.addresses.is_empty() && node.id != 0
    };
    assert!(everything.iter().any(has_all));
    let micros = |node: &Node| node.as_of.is_some_and(|at| at.nanos % 1000 == 0 && at.nanos % 1_000_000 != 0);
    assert!(everything.iter().any(micros));
    for node in everything.into_iter().chain([Node::default()]) {
        assert_eq!(Node::decode(node.encode_to_vec().as_slice()).unwrap(), node);
    }
}

/// Told the same facts, our own node says what the reference said, but for its one address and the time.
///
/// Conforms: control:N8
#[test]
fn our_own_node_is_written_as_the_reference_writes_it() {
    for vector in node_messages() {
        let reference = Node::decode(hex(&vector, "bytes").as_slice()).unwrap();
        let mut own = OwnNode::new(OwnIdentity {
            node_id: reference.id,
            node_key: NodePublic::from_binary(&reference.key).unwrap(),
            disco_key: reference.disco.parse().unwrap(),
            address: "fd60:627a:a42b:4000:8000::a".parse().unwrap(),
        });
        own.connected();
        own.set_home(RegionId::new(reference.preferred_derp.into()));
        own.set_latencies(latencies(&reference));
        own.set_endpoints(reference.endpoints.iter().map(|text| text.parse().unwrap()).collect());
        let forced = reference.derp_forced_websocket.iter();
        own.set_forced_websocket(
            forced.map(|(id, reason)| (RegionId::new((*id).into()).unwrap(), reason.clone())).collect(),
        );
        let as_of = reference.as_of.unwrap();
        let wall = SystemTime::UNIX_EPOCH + Duration::new(as_of.seconds as u64, as_of.nanos as u32);
        let request = own.poll_update(Instant::now(), wall).unwrap();
        let node = request.update_self.unwrap().node.unwrap();
        let address = vec!["fd60:627a:a42b:4000:8000::a/128".to_owned()];
        // Latencies are whole nanoseconds here.
        let is_close = |(key, seconds): (&String, &f64)| (node.derp_latency[key] - seconds).abs() < 1e-9;
        assert!(reference.derp_latency.iter().all(is_close), "{vector}");
        let derp_latency = node.derp_latency.clone();
        let expected = Node { addresses: address.clone(), allowed_ips: address, derp_latency, ..reference };
        assert_eq!(node, expected, "{vector}");
    }
}

/// Feeds the client's side of a recording: what it asked for is what the rules ask for.
fn replay(entry: &str) -> Vec<(String, bool)> {
    let begin = Instant::now();
    let (mut coordination, mut wanted, mut story) = (Coordination::default(), BTreeSet::new(), Vec::new());
    coordination.connected(begin);
    let mut steps: Vec<(Duration, Step)> = Vec::new();
    for (at, conn, request) in messages::<CoordinateRequest>("coordinate", entry, "CoordinateRequest") {
        steps.extend((conn == 0).then_some((at, Step::Request(Box::new(request)))));
    }
    for (at, conn, response) in messages::<CoordinateResponse>("coordinate", entry, "CoordinateResponse") {
        steps.extend((conn == 0).then_some((at, Step::Response(response))));
    }
    steps.sort_by_key(|(at, _)| *at);
    for (at, step) in steps {
        let now = begin + at;
        match step {
            Step::Request(request) => {
                let CoordinateRequest { add_tunnel, remove_tunnel, .. } = *request;
                let added = add_tunnel.map(|tunnel| Uuid::from_slice(&tunnel.id).unwrap());
                let removed = remove_tunnel.map(|tunnel| Uuid::from_slice(&tunnel.id).unwrap());
                let is_news =
                    added.is_some_and(|id| wanted.insert(id)) | removed.is_some_and(|id| wanted.remove(&id));
                let requests = coordination.set_destinations(now, &wanted, Update::Diff).requests;
                assert_eq!(!requests.is_empty(), is_news, "{entry}");
            }
            Step::Response(response) => {
                let outcome = coordination.handle_response(now, &response, |_| Some(Duration::ZERO));
                assert_eq!(outcome.ignored, [], "{entry}");
                story.push((what(&response), !coordination.network_map().peers.is_empty()));
            }
        }
    }
    story
}

enum Step {
    Request(Box<CoordinateRequest>),
    Response(CoordinateResponse),
}

/// An answer's error text, or why its only update was sent.
fn what(response: &CoordinateResponse) -> String {
    match response.peer_updates.as_slice() {
        [] => response.error.clone(),
        [update] if update.kind() == peer_update::Kind::ReadyForHandshake => "READY".to_owned(),
        [update] => update.reason.clone(),
        more => panic!("{} updates in one answer", more.len()),
    }
}

fn latencies(node: &Node) -> Report {
    let mut report: BTreeMap<RegionId, RegionLatency> = BTreeMap::new();
    for (key, seconds) in &node.derp_latency {
        let (region, family) = key.split_once('-').unwrap();
        let latency = report.entry(RegionId::new(region.parse().unwrap()).unwrap()).or_default();
        let family = if family == "v4" { &mut latency.v4 } else { &mut latency.v6 };
        *family = Some(Duration::from_secs_f64(*seconds));
    }
    report
}

fn node_messages() -> Vec<Value> {
    let vectors = load("data/node-messages")["vectors"].as_array().unwrap().clone();
    assert_eq!(vectors.len(), 11);
    vectors
}

fn names(file: &str) -> Vec<String> {
    let entries = load(&format!("control/{file}"))["entries"].clone();
    entries.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
}

/// The recorded messages of one type in an entry: when each was sent, on which connection.
fn messages<M: Message + Default>(file: &str, entry: &str, protobuf: &str) -> Vec<(Duration, u64, M)> {
    let file = load(&format!("control/{file}"));
    let entries = file["entries"].as_array().unwrap();
    let entry = entries.iter().find(|it| it["name"] == entry).expect("an entry of this name");
    let mut messages = Vec::new();
    for step in entry["steps"].as_array().unwrap() {
        let at = MS.mul_f64(step["t_ms"].as_f64().unwrap());
        for frame in step["meaning"]["frames"].as_array().into_iter().flatten() {
            if frame["protobuf"] == protobuf {
                let message = M::decode(packet(&hex(frame, "drpc_hex")).as_slice()).unwrap();
                messages.push((at, step["conn"].as_u64().unwrap_or(0), message));
            }
        }
    }
    assert!(!messages.is_empty());
    messages
}

fn packet(frame: &[u8]) -> Vec<u8> {
    let mut decoder = Decoder::new();
    decoder.extend(frame);
    let packet = decoder.next().unwrap().expect("a whole packet in one frame");
    assert_eq!(packet.kind, Kind::Message);
    packet.data.to_vec()
}

fn load(file: &str) -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    serde_json::from_slice(&std::fs::read(folder.join(file).with_extension("json")).unwrap()).unwrap()
}

fn hex(value: &Value, key: &str) -> Vec<u8> {
    let digits = value[key].as_str().unwrap().as_bytes();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}
