use proptest::prelude::*;

use super::*;
use crate::roster::Update::{Diff, Snapshot};

#[test]
fn a_crowd_of_peers_that_nobody_asked_for_has_a_limit_and_destinations_do_not_suffer() {
    let mut table = Table::connected();
    let crowd = 1..=MAX_PEERS as u128;
    let peer_updates = crowd.map(|number| update(number, Kind::ReadyForHandshake, None)).collect();
    let response = CoordinateResponse { peer_updates, error: String::new() };
    assert_eq!(table.coordination.handle_response(table.now, &response, |_| None).ignored, []);
    let stranger = MAX_PEERS as u128 + 1;
    for (kind, node) in [(Kind::ReadyForHandshake, None), (Kind::Node, Some(node(1, 1)))] {
        let outcome = table.update(stranger, kind, node);
        let ignored = Ignored { peer: Some(id(stranger)), reason: IgnoredReason::TooMany };
        assert_eq!((outcome.ignored, outcome.map_changed), (vec![ignored], false));
    }
    assert!(table.update(1, Kind::Node, Some(node(1, 1))).map_changed, "who is known may still say more");
    table.want(&[stranger], Diff);
    assert!(table.update(stranger, Kind::Node, Some(node(2, 1))).ignored.is_empty());
}

/// What happens to the one peer of a row.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// It becomes a destination, or none.
    Wanted(bool),
    /// Its node comes, with a key and a home.
    Node(u8, i32),
    Ready,
    Disconnected,
    Lost,
    /// Our own stream ends.
    AllLost,
    /// WireGuard completes a handshake with all its keys.
    Handshake,
    Pass(Duration),
}

/// What it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Programmed, or programmed anew.
    Programmed,
    /// No longer programmed.
    Absent,
    /// The map is as it was.
    Same,
}

use Event::{AllLost, Disconnected, Handshake, Lost, Node, Pass, Ready, Wanted};
use Then::{Absent, Programmed, Same};

/// No requests.
const NOTHING: [&str; 0] = [];

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// A line of tailnet-control 12.6, or a sentence of 4.3 and 4.4, with what happens in turn.
type Row = (&'static str, &'static [(Event, Then)]);

const WANTED: (Event, Then) = (Wanted(true), Same);

const ROWS: &[Row] = &[
    ("P1: who is no destination is programmed at once", &[(Node(1, 1), Programmed)]),
    ("P2: a destination is not programmed by its node", &[WANTED, (Node(1, 1), Same)]),
    ("P3: READY before NODE", &[WANTED, (Ready, Same), (Node(1, 1), Programmed)]),
    ("P4: NODE before READY", &[WANTED, (Node(1, 1), Same), (Ready, Programmed), (Ready, Same)]),
    (
        "P5: NODE without READY",
        &[
            WANTED,
            (Node(1, 1), Same),
            (Pass(MS.saturating_mul(4999)), Same),
            (Pass(MS), Programmed),
            // What was sent too early is repeated.
            (Ready, Programmed),
            (Ready, Same),
        ],
    ),
    (
        "4.3: every NODE starts the wait anew",
        &[
            WANTED,
            (Node(1, 1), Same),
            (Pass(SECOND.saturating_mul(4)), Same),
            (Node(1, 1), Same),
            (Pass(SECOND.saturating_mul(4)), Same),
            (Pass(SECOND), Programmed),
        ],
    ),
    (
        "P6: the same NODE again, and another one",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Node(1, 1), Same),
            (Node(1, 2), Programmed),
            (Pass(MINUTE), Same),
        ],
    ),
    (
        "P7: DISCONNECTED removes, and a lost one too",
        &[
            (Node(1, 1), Programmed),
            (Handshake, Same),
            (Lost, Same),
            (Disconnected, Absent),
            (Pass(MINUTE.saturating_mul(20)), Same),
        ],
    ),
    (
        "P8: LOST keeps for 15 minutes after the last handshake, which is read again",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Handshake, Same),
            (Lost, Same),
            (Pass(MINUTE.saturating_mul(14)), Same),
            (Handshake, Same),
            (Pass(MINUTE), Same),
            (Pass(MINUTE.saturating_mul(13)), Same),
            (Pass(MINUTE), Absent),
        ],
    ),
    (
        "4.3: LOST without a handshake",
        &[(Node(1, 1), Programmed), (Lost, Same), (Pass(Duration::ZERO), Absent)],
    ),
    (
        "4.3: LOST again does not extend the wait",
        &[
            (Node(1, 1), Programmed),
            (Handshake, Same),
            (Lost, Same),
            (Pass(MINUTE.saturating_mul(10)), Same),
            (Lost, Same),
            (Pass(MINUTE.saturating_mul(5)), Absent),
        ],
    ),
    (
        "P9: NODE after LOST",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Handshake, Same),
            (Lost, Same),
            (Node(1, 1), Same),
            (Pass(MINUTE.saturating_mul(20)), Same),
        ],
    ),
    (
        "P10: all lost, no handshake",
        &[(Node(1, 1), Programmed), (AllLost, Same), (Pass(Duration::ZERO), Absent)],
    ),
    (
        "P10: all lost, with a handshake",
        &[
            (Node(1, 1), Programmed),
            (Handshake, Same),
            (AllLost, Same),
            (Pass(MINUTE.saturating_mul(15).saturating_sub(MS)), Same),
            (Pass(MS), Absent),
        ],
    ),
    (
        "4.9: after a reconnect the same NODE reprograms nothing",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Handshake, Same),
            (AllLost, Same),
            (Node(1, 1), Same),
            (Pass(MINUTE.saturating_mul(20)), Same),
        ],
    ),
    (
        "READY after a loss is news, once: what was sent to a peer that had forgotten us is repeated",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Handshake, Same),
            (AllLost, Same),
            (Node(1, 1), Same),
            (Ready, Programmed),
            (Ready, Same),
            (Lost, Same),
            (Ready, Programmed),
        ],
    ),
    (
        "P11: LOST or DISCONNECTED for an unknown peer",
        &[(Lost, Same), (Disconnected, Same), (Pass(MINUTE), Same)],
    ),
    (
        "4.4: that it is a destination outlives its entry",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Disconnected, Absent),
            (Node(1, 1), Same),
            (Ready, Programmed),
        ],
    ),
    (
        "data 11.2: another key waits for READY again",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Pass(MINUTE), Same),
            (Node(2, 1), Absent),
            (Ready, Programmed),
            (Pass(MINUTE), Same),
            (Node(3, 1), Absent),
            (Pass(SECOND.saturating_mul(5)), Programmed),
        ],
    ),
    (
        "4.4: an agent that comes back sends READY before its new NODE",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Handshake, Same),
            (Pass(MINUTE), Same),
            (Lost, Same),
            (Ready, Programmed),
            (Pass(MINUTE), Same),
            (Node(2, 1), Programmed),
        ],
    ),
    (
        "a READY from before the loss is not meant for the node after it",
        &[
            WANTED,
            (Node(1, 1), Same),
            (Ready, Programmed),
            (Handshake, Same),
            (Lost, Same),
            (Node(2, 1), Absent),
        ],
    ),
    (
        "a READY from before our own stream ended is not meant for the node after it",
        &[
            WANTED,
            (Node(1, 1), Same),
            (Ready, Programmed),
            (Handshake, Same),
            (AllLost, Same),
            (Node(2, 1), Absent),
        ],
    ),
    (
        "READY moments before another key is meant for it, also where the loss went unnoticed",
        &[
            WANTED,
            (Ready, Same),
            (Node(1, 1), Programmed),
            (Pass(MINUTE), Same),
            (Ready, Same),
            (Pass(SECOND.saturating_mul(5)), Same),
            (Node(2, 1), Programmed),
            (Pass(MS), Same),
            (Node(3, 1), Absent),
        ],
    ),
    (
        "who was known before it is wanted waits from then on",
        &[(Node(1, 1), Programmed), (Wanted(true), Absent), (Pass(SECOND.saturating_mul(5)), Programmed)],
    ),
    (
        "who is no longer wanted is forgotten",
        &[WANTED, (Ready, Same), (Node(1, 1), Programmed), (Wanted(false), Absent), (Pass(MINUTE), Same)],
    ),
    (
        "a READY alone is forgotten when lost",
        &[WANTED, (Ready, Same), (Lost, Same), (Pass(MS), Same), (Node(1, 1), Same)],
    ),
];

/// That a destination is kept warm also after P5's timeout is on purpose: managers show an agent without a fresh
/// handshake as dead.
///
/// Conforms: control:P2 control:P3 control:P4 control:P5 control:P6 control:P7 control:P8 control:P9 control:P10 control:P11
#[test]
fn each_event_programs_what_it_should_and_nothing_else() {
    for (line, events) in ROWS {
        let mut table = Table::connected();
        for (step, (event, then)) in events.iter().enumerate() {
            let outcome = table.happen(0, *event);
            let peer = table.coordination.network_map().peers.get(&id(0));
            let context = format!("{line}: step {step}, {event:?}");
            assert_eq!(outcome.map_changed, *then != Same, "{context}");
            match then {
                Programmed => {
                    let peer = peer.unwrap_or_else(|| panic!("{context}: is not programmed"));
                    assert_eq!(peer.keepalive, table.wanted.contains(&id(0)), "{context}");
                }
                Absent => assert_eq!(peer, None, "{context}"),
                Same => {}
            }
        }
    }
}

#[test]
fn other_latencies_and_times_reprogram_nothing_and_other_endpoints_are_told() {
    let mut table = Table::connected();
    assert!(table.happen(0, Node(1, 1)).map_changed);
    let node = tailnet::Node {
        id: 7,
        as_of: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
        derp_latency: [("1-v4".to_owned(), 0.1)].into(),
        ..node(1, 1)
    };
    assert!(!table.update(0, Kind::Node, Some(node.clone())).map_changed);
    let endpoints = vec!["192.0.2.1:41641".to_owned()];
    assert!(table.update(0, Kind::Node, Some(tailnet::Node { endpoints, ..node })).map_changed);
    let peer = &table.coordination.network_map().peers[&id(0)];
    assert_eq!(peer.endpoints, ["192.0.2.1:41641".parse().unwrap()]);
}

/// Where the reference writes a home as `127.3.3.40:<id>`, ours is the region itself.
///
/// Conforms: control:P1
#[test]
fn new_peers_are_programmed_with_their_homes_and_endpoints_and_only_who_is_wanted_is_kept_warm() {
    let mut table = Table::connected();
    table.want(&[2], Snapshot);
    let texts = |number: u8| vec![format!("192.0.2.{number}:41641"), format!("[2001:db8::{number}]:41641")];
    let whole =
        |number: u8| tailnet::Node { endpoints: texts(number), ..node(number, 7 + i32::from(number)) };
    assert!(
        table.update(1, Kind::Node, Some(whole(1))).map_changed,
        "who is no destination is not waited for"
    );
    table.update(2, Kind::ReadyForHandshake, None);
    assert!(table.update(2, Kind::Node, Some(whole(2))).map_changed);
    let peers = &table.coordination.network_map().peers;
    assert_eq!(peers.len(), 2);
    for (number, home, is_warm) in [(1, RegionId(8), false), (2, RegionId(9), true)] {
        let expected = Peer {
            node_key: NodePublic([number; 32]),
            disco_key: DiscoPublic([number; 32]),
            home,
            addresses: vec![format!("fd60:627a:a42b::{number}").parse().unwrap()],
            keepalive: is_warm,
            endpoints: texts(number).iter().map(|text| text.parse().unwrap()).collect(),
            announcements: u32::from(is_warm),
        };
        assert_eq!(peers[&id(number.into())], expected);
    }
}

#[test]
fn a_node_in_a_loss_is_ignored() {
    let mut table = Table::connected();
    table.happen(0, Node(1, 1));
    assert!(!table.update(0, Kind::Lost, Some(node(2, 1))).map_changed);
    assert_eq!(table.coordination.network_map().peers[&id(0)].node_key, NodePublic([1; 32]));
}

/// Conforms: control:N10
#[test]
fn only_an_update_of_the_kind_node_brings_a_node() {
    for kind in [Kind::Unspecified, Kind::Disconnected, Kind::Lost, Kind::ReadyForHandshake] {
        let mut table = Table::connected();
        assert!(!table.update(0, kind, Some(node(1, 1))).map_changed, "{kind:?}");
        assert!(table.update(0, Kind::Node, Some(node(1, 1))).map_changed, "{kind:?}");
    }
}

/// Conforms: control:N9
#[test]
fn an_id_is_its_sixteen_bytes_in_order_also_if_all_are_zero() {
    let in_order = Uuid::from_bytes(std::array::from_fn(|index| index as u8));
    for id in [Uuid::nil(), Uuid::max(), in_order] {
        let mut coordination = Coordination::default();
        coordination.set_destinations(Instant::now(), &[id].into(), Snapshot);
        let asked = coordination.connected(Instant::now());
        let raw = &asked[0].add_tunnel.as_ref().unwrap().id;
        assert_eq!(raw.as_ref(), id.as_bytes());
        assert_eq!(Uuid::from_slice(raw).unwrap(), id);
    }
}

#[test]
fn what_cannot_be_used_is_named_and_everything_beside_it_is_taken() {
    let mut table = Table::connected();
    let update = |id: &[u8], kind: i32, node| PeerUpdate {
        id: Bytes::copy_from_slice(id),
        kind,
        node,
        reason: "node update".to_owned(),
    };
    let (bad, good) = (id(1), id(2));
    let node_kind = i32::from(Kind::Node);
    let peer_updates = vec![
        update(&[1, 2], node_kind, Some(node(1, 1))),
        update(&[], node_kind, Some(node(1, 1))),
        update(bad.as_bytes(), node_kind, None),
        update(bad.as_bytes(), node_kind, Some(node(1, 0))),
        update(bad.as_bytes(), node_kind, Some(tailnet::Node { key: Bytes::new(), ..node(1, 1) })),
        update(bad.as_bytes(), 0, None),
        update(bad.as_bytes(), 99, None),
        update(good.as_bytes(), node_kind, Some(node(2, 1))),
    ];
    let error = "ready for handshake error: you do not share a tunnel".to_owned();
    let response = CoordinateResponse { peer_updates, error: error.clone() };
    let outcome = table.coordination.handle_response(table.now, &response, |_| None);
    let reasons: Vec<_> = outcome.ignored.iter().map(|it| (it.peer, it.reason.to_string())).collect();
    let expected = [
        (None, "the peer's id has 2 bytes"),
        (None, "the peer's id has 0 bytes"),
        (Some(bad), "the update has no node"),
        (Some(bad), "the home region 0 is none"),
        (Some(bad), "the node key is malformed"),
        (Some(bad), "unknown kind 0"),
        (Some(bad), "unknown kind 99"),
    ];
    assert_eq!(reasons, expected.map(|(peer, reason)| (peer, reason.to_owned())));
    assert_eq!(outcome.error, Some(error));
    assert!(outcome.map_changed);
    assert_eq!(table.coordination.network_map().peers.keys().collect::<Vec<_>>(), [&good]);
}

#[test]
fn a_node_that_cannot_be_used_leaves_the_one_before_it() {
    let mut table = Table::connected();
    table.happen(0, Node(1, 1));
    assert!(!table.happen(0, Node(2, 0)).map_changed);
    assert_eq!(table.coordination.network_map().peers[&id(0)].node_key, NodePublic([1; 32]));
}

mod requests {
    use super::*;

    /// Conforms: control:L3
    #[test]
    fn each_new_stream_is_asked_for_all_that_is_wanted_and_nothing_is_asked_without_one() {
        let mut table = Table::default();
        assert_eq!(table.want(&[1, 2], Snapshot), NOTHING);
        assert_eq!(table.connect(), ["+1", "+2"]);
        table.happen(1, AllLost);
        assert_eq!(table.want(&[2, 3], Diff), NOTHING);
        assert_eq!(table.connect(), ["+2", "+3"], "nothing is said of what was given back meanwhile");
    }

    #[test]
    fn what_is_new_is_asked_for_before_what_is_old_is_given_back_and_nothing_twice() {
        let mut table = Table::connected();
        assert_eq!(table.want(&[5, 6, 7], Snapshot), ["+5", "+6", "+7"]);
        assert_eq!(table.want(&[5, 6, 7], Snapshot), NOTHING);
        assert_eq!(table.want(&[1, 6, 9], Diff), ["+1", "+9", "-5", "-7"]);
        assert_eq!(table.want(&[], Diff), ["-1", "-6", "-9"]);
    }

    /// Conforms: control:L2 control:L6
    #[test]
    fn who_is_new_is_asked_for_in_order_and_waited_for_and_who_stays_is_left_alone() {
        let mut table = Table::connected();
        assert_eq!(table.want(&[4, 5], Snapshot), ["+4", "+5"]);
        table.happen(4, Ready);
        assert!(table.happen(4, Node(1, 1)).map_changed);
        assert_eq!(table.want(&[1, 2, 4], Diff), ["+1", "+2", "-5"]);
        assert!(table.coordination.network_map().peers.contains_key(&id(4)));
        for new in [1, 2] {
            assert!(
                !table.happen(new, Node(2, 1)).map_changed,
                "a destination is not programmed by its node"
            );
            assert!(table.happen(new, Ready).map_changed);
            assert!(table.coordination.network_map().peers[&id(new)].keepalive);
        }
    }

    /// Conforms: control:L4
    #[test]
    fn who_was_given_back_is_not_asked_for_on_the_next_stream() {
        let mut table = Table::connected();
        table.want(&[1, 2], Snapshot);
        assert_eq!(table.want(&[1], Diff), ["-2"]);
        table.happen(1, AllLost);
        assert_eq!(table.connect(), ["+1"]);
    }

    #[test]
    fn a_client_says_nothing_but_which_tunnels_it_wants() {
        let mut table = Table::connected();
        let outcome = table.coordination.set_destinations(table.now, &[id(1)].into(), Snapshot);
        let raw = Bytes::copy_from_slice(id(1).as_bytes());
        let add_tunnel = Some(Tunnel { id: raw });
        assert_eq!(outcome.requests, [CoordinateRequest { add_tunnel, ..CoordinateRequest::default() }]);
    }
}

/// One refused destination ends the stream and does not say who it was.
mod refusals {
    use super::*;

    #[test]
    fn the_refused_one_of_a_thousand_is_found_in_a_few_streams_and_all_others_are_asked_for() {
        for refused in [0, 500, 999] {
            let mut server = Server::refusing(&[refused]);
            let mut table = Table::default();
            server.settle(&mut table, 1000);
            assert_eq!(table.coordination.refused(), &[id(refused)].into());
            assert_eq!(server.tunnels.len(), 999, "all others are granted");
            assert!(
                server.streams <= 8,
                "4 splits, 3 chances alone, and the last stream: {}",
                server.streams
            );
            assert!(server.asked <= 1000 * server.streams, "none is asked for twice on one stream");
            let took = table.now.duration_since(table.begin);
            assert!(took <= 2 * MINUTE, "nobody waits for long: {took:?}");
        }
    }

    #[test]
    fn several_refused_ones_are_each_found() {
        let mut server = Server::refusing(&[3, 4, 77]);
        let mut table = Table::default();
        server.settle(&mut table, 100);
        assert_eq!(table.coordination.refused(), &[id(3), id(4), id(77)].into());
        assert_eq!(server.tunnels.len(), 97);
    }

    #[test]
    fn who_was_heard_of_is_not_suspected() {
        let mut table = Table::connected();
        table.want(&[1, 2, 3], Snapshot);
        table.happen(1, Node(1, 1));
        table.happen(2, Ready);
        refuse(&mut table);
        assert_eq!(table.connect(), ["+1", "+2"]);
        assert_eq!(table.want(&[1, 2, 3], Diff), NOTHING, "no snapshot has listed it yet");
    }

    #[test]
    fn who_was_asked_for_long_ago_is_not_suspected() {
        let mut table = Table::connected();
        table.want(&[1], Snapshot);
        table.happen(1, Pass(10 * SECOND));
        table.want(&[1, 2], Diff);
        refuse(&mut table);
        assert_eq!(table.connect(), ["+1"]);
    }

    #[test]
    fn suspects_are_asked_for_only_once_a_snapshot_lists_them_and_apart_from_all_others() {
        let mut table = Table::connected();
        table.want(&[1], Snapshot);
        table.happen(1, Pass(10 * SECOND));
        table.want(&[1, 2], Diff);
        refuse(&mut table);
        assert_eq!(table.connect(), ["+1"]);
        assert_eq!(table.want(&[1, 2], Snapshot), NOTHING, "a refusal now would be blamed on both");
        let due = table.coordination.poll_timeout().unwrap();
        assert_eq!(due.duration_since(table.now), 2 * SECOND);
        assert_eq!(requests(&table.happen(0, Pass(2 * SECOND))), ["+2"]);
    }

    #[test]
    fn a_snapshot_that_comes_before_the_stream_counts_too() {
        let mut table = Table::connected();
        table.want(&[1], Snapshot);
        refuse(&mut table);
        assert_eq!(table.want(&[1], Snapshot), NOTHING);
        assert_eq!(table.connect(), ["+1"]);
    }

    #[test]
    fn a_diff_that_comes_before_the_stream_does_not() {
        let mut table = Table::connected();
        table.want(&[1], Snapshot);
        refuse(&mut table);
        assert_eq!(table.want(&[1, 2], Diff), NOTHING);
        assert_eq!(table.connect(), ["+2"]);
        assert_eq!(table.coordination.poll_timeout(), None, "and no trial is planned");
    }

    #[test]
    fn nothing_is_tried_on_a_stream_that_was_refused_something() {
        let mut table = Table::connected();
        table.want(&[1, 2, 3], Snapshot);
        refuse(&mut table);
        table.connect();
        assert_eq!(table.want(&[1, 2, 3], Snapshot), ["+1"]);
        table.error(REFUSAL);
        assert_eq!(requests(&table.happen(0, Pass(MINUTE))), NOTHING);
    }

    #[test]
    fn a_trial_ends_with_its_stream_and_goes_on_with_the_next_snapshot() {
        let mut table = Table::connected();
        table.want(&[1, 2, 3], Snapshot);
        refuse(&mut table);
        table.connect();
        assert_eq!(table.want(&[1, 2, 3], Snapshot), ["+1"]);
        table.happen(1, Node(1, 1));
        table.happen(0, AllLost);
        assert_eq!(requests(&table.happen(0, Pass(MINUTE))), NOTHING, "there is no stream");
        assert_eq!(table.connect(), ["+1"]);
        assert_eq!(requests(&table.happen(0, Pass(MINUTE))), NOTHING, "no snapshot has listed them");
        assert_eq!(table.want(&[1, 2, 3], Snapshot), ["+2"]);
        assert_eq!(requests(&table.happen(0, Pass(2 * SECOND))), ["+3"]);
    }

    #[test]
    fn who_was_asked_for_too_early_gets_its_chances() {
        let mut table = Table::connected();
        table.want(&[1], Snapshot);
        for _ in 0..2 {
            refuse(&mut table);
            assert_eq!(table.connect(), NOTHING);
            assert_eq!(table.want(&[1], Snapshot), ["+1"]);
        }
        table.happen(1, Node(1, 1));
        assert_eq!(table.coordination.refused().len(), 0);
        table.happen(1, AllLost);
        assert_eq!(table.connect(), ["+1"]);
        for _ in 0..2 {
            refuse(&mut table);
            table.connect();
            assert_eq!(table.want(&[1], Snapshot), ["+1"], "granted: its refusals are forgotten");
        }
        assert_eq!(table.coordination.refused().len(), 0);
    }

    #[test]
    fn a_refused_one_is_asked_for_again_when_it_was_given_back_and_is_wanted_anew() {
        let mut table = Table::connected();
        table.want(&[1], Snapshot);
        for _ in 0..3 {
            refuse(&mut table);
            table.connect();
            table.want(&[1], Snapshot);
        }
        assert_eq!(table.coordination.refused(), &[id(1)].into());
        assert_eq!(table.want(&[1], Snapshot), NOTHING);
        table.want(&[], Diff);
        assert_eq!(table.coordination.refused().len(), 0);
        assert_eq!(table.want(&[1], Diff), ["+1"]);
    }

    #[test]
    fn other_errors_blame_nobody() {
        let mut table = Table::connected();
        table.want(&[1], Snapshot);
        for error in ["coordinator closed", "peer ID overwritten by new connection"] {
            assert_eq!(table.error(error).error.as_deref(), Some(error));
            table.happen(1, AllLost);
            assert_eq!(table.connect(), ["+1"]);
        }
    }

    const REFUSAL: &str = "authorization: workspace agent not found or you do not have permission";

    fn refuse(table: &mut Table) {
        assert_eq!(table.error(REFUSAL).error.as_deref(), Some(REFUSAL));
        table.happen(0, AllLost);
    }

    /// Grants tunnels in order until it must refuse one, and is silent about what it granted, as about agents
    /// that are away.
    struct Server {
        forbidden: BTreeSet<Uuid>,
        tunnels: BTreeSet<Uuid>,
        streams: usize,
        asked: usize,
    }

    impl Server {
        fn refusing(forbidden: &[u128]) -> Self {
            let forbidden = forbidden.iter().copied().map(id).collect();
            Self { forbidden, tunnels: BTreeSet::new(), streams: 0, asked: 0 }
        }

        /// Lets the client connect again and again until a stream stands with nothing left to ask for.
        fn settle(&mut self, table: &mut Table, agents: u128) {
            let wanted: Vec<u128> = (0..agents).collect();
            while !self.serve(table, &wanted) {
                assert!(self.streams < 50, "it does not settle");
                self.tunnels.clear();
                table.error(REFUSAL);
                table.happen(0, AllLost);
            }
        }

        /// One stream; returns whether it stands.
        fn serve(&mut self, table: &mut Table, wanted: &[u128]) -> bool {
            self.streams += 1;
            let on_connect = table.coordination.connected(table.now);
            let on_snapshot = table.set(wanted, Snapshot).requests;
            if !self.grant(&on_connect) || !self.grant(&on_snapshot) {
                return false;
            }
            while let Some(due) = table.coordination.poll_timeout() {
                let outcome = table.happen(0, Pass(due.saturating_duration_since(table.now)));
                if !self.grant(&outcome.requests) {
                    return false;
                }
            }
            true
        }

        fn grant(&mut self, requests: &[CoordinateRequest]) -> bool {
            self.asked += requests.len();
            let mut ids = requests.iter().filter_map(|it| Uuid::from_slice(&it.add_tunnel.as_ref()?.id).ok());
            ids.all(|id| !self.forbidden.contains(&id) && self.tunnels.insert(id))
        }
    }
}

mod cost {
    use std::cell::Cell;

    use super::*;

    const AGENTS: u128 = 1000;

    #[test]
    fn a_thousand_agents_cost_a_request_each_and_a_handshake_is_read_only_for_who_is_lost() {
        let mut table = Table::connected();
        let all: Vec<u128> = (0..AGENTS).collect();
        assert_eq!(table.want(&all, Snapshot).len(), 1000);
        let reads = Cell::new(0);
        let counted = |_: &NodePublic| {
            reads.set(reads.get() + 1);
            Some(Duration::ZERO)
        };
        for kind in [Kind::Node, Kind::ReadyForHandshake] {
            let peer_updates = all.iter().map(|number| update(*number, kind, Some(node(1, 1)))).collect();
            let response = CoordinateResponse { peer_updates, ..CoordinateResponse::default() };
            table.coordination.handle_response(table.now, &response, counted);
        }
        assert_eq!(table.coordination.network_map().peers.len(), 1000);
        assert_eq!(reads.get(), 0);
        table.coordination.disconnected(table.now, counted);
        assert_eq!(reads.replace(0), 1000);
        table.coordination.handle_timeout(table.now + LOST_TIMEOUT, counted);
        assert_eq!(reads.get(), 1000);
        table.coordination.handle_timeout(table.now + LOST_TIMEOUT, counted);
        assert_eq!(reads.get(), 1000, "nobody is due");
    }

    #[test]
    fn all_that_is_due_at_once_is_done_at_once() {
        let mut table = Table::connected();
        let all: Vec<u128> = (0..AGENTS).collect();
        table.want(&all, Snapshot);
        all.iter().for_each(|number| drop(table.happen(*number, Node(1, 1))));
        assert!(table.coordination.handle_timeout(table.now + READY_TIMEOUT, |_| None).map_changed);
        assert_eq!(table.coordination.network_map().peers.len(), 1000);
        assert_eq!(table.coordination.poll_timeout(), None);
    }
}

proptest! {
    /// Whatever happens: a change is told exactly if there is one, nobody is programmed before it is ready, what
    /// was asked for on a stream is what is wanted, and time never stands still.
    #[test]
    fn the_map_and_the_tunnels_follow_the_events(events in proptest::collection::vec(any_event(), 1..120)) {
        let mut table = Table::connected();
        let mut ready_since: BTreeMap<u128, Instant> = BTreeMap::new();
        let mut node_since: BTreeMap<u128, Instant> = BTreeMap::new();
        let mut tunnels: BTreeSet<String> = BTreeSet::new();
        let mut is_connected = true;
        for (number, event) in events {
            let before = table.coordination.network_map().clone();
            match event {
                Ready => drop(ready_since.insert(number, table.now)),
                Node(_, 1..) => drop(node_since.entry(number).or_insert(table.now)),
                AllLost => {
                    is_connected = false;
                    tunnels.clear();
                }
                _ => {}
            }
            let outcome = table.happen(number, event);
            for request in requests(&outcome) {
                prop_assert!(is_connected, "nothing is asked without a stream");
                let (sign, id) = request.split_at(1);
                let done = if sign == "+" { tunnels.insert(id.to_owned()) } else { tunnels.remove(id) };
                prop_assert!(done, "{request} once");
            }
            let is_different = before != *table.coordination.network_map();
            prop_assert!(outcome.map_changed == is_different || matches!(event, Pass(_)));
            for (id, peer) in &table.coordination.network_map().peers {
                let number = id.as_u128();
                let is_wanted = table.wanted.contains(id);
                prop_assert_eq!(peer.keepalive, is_wanted);
                let waited = node_since.get(&number).is_some_and(|at| table.now.duration_since(*at) >= READY_TIMEOUT);
                prop_assert!(!is_wanted || waited || ready_since.contains_key(&number), "{number} is not ready");
            }
            if !is_connected && number % 2 == 0 {
                is_connected = true;
                tunnels.extend(table.connect().iter().map(|it| it[1..].to_owned()));
            }
            let wanted: BTreeSet<String> = table.wanted.iter().map(|id| id.as_u128().to_string()).collect();
            prop_assert!(!is_connected || tunnels == wanted);
        }
        // Without a stream and without handshakes everything ends.
        table.handshakes.clear();
        table.happen(0, AllLost);
        table.happen(0, Pass(LOST_TIMEOUT));
        prop_assert_eq!(table.coordination.network_map().peers.len(), 0);
        prop_assert_eq!(table.coordination.poll_timeout(), None);
        prop_assert!(table.coordination.peers.is_empty());
    }
}

fn any_event() -> impl Strategy<Value = (u128, Event)> {
    let event = prop_oneof![
        2 => any::<bool>().prop_map(Wanted),
        6 => (1_u8..3, 0_i32..3).prop_map(|(key, home)| Node(key, home)),
        4 => Just(Ready),
        1 => Just(Disconnected),
        2 => Just(Lost),
        1 => Just(AllLost),
        2 => Just(Handshake),
        2 => (0_u64..10_000).prop_map(|ms| Pass(Duration::from_millis(ms))),
        1 => (0_u64..30).prop_map(|minutes| Pass(Duration::from_secs(60 * minutes))),
    ];
    (0_u128..5, event)
}

/// The table under test with its time, and a WireGuard that knows when it last shook hands.
struct Table {
    coordination: Coordination,
    begin: Instant,
    now: Instant,
    wanted: BTreeSet<Uuid>,
    handshakes: BTreeMap<NodePublic, Instant>,
}

impl Default for Table {
    fn default() -> Self {
        let begin = Instant::now();
        let (wanted, handshakes) = (BTreeSet::new(), BTreeMap::new());
        Self { coordination: Coordination::default(), begin, now: begin, wanted, handshakes }
    }
}

impl Table {
    fn connected() -> Self {
        let mut table = Self::default();
        table.connect();
        table
    }

    fn connect(&mut self) -> Vec<String> {
        texts(&self.coordination.connected(self.now))
    }

    fn want(&mut self, numbers: &[u128], update: Update) -> Vec<String> {
        requests(&self.set(numbers, update))
    }

    fn set(&mut self, numbers: &[u128], update: Update) -> Outcome {
        self.wanted = numbers.iter().copied().map(id).collect();
        self.coordination.set_destinations(self.now, &self.wanted, update)
    }

    fn happen(&mut self, number: u128, event: Event) -> Outcome {
        match event {
            Wanted(is_wanted) => {
                if is_wanted {
                    self.wanted.insert(id(number))
                } else {
                    self.wanted.remove(&id(number))
                };
                self.coordination.set_destinations(self.now, &self.wanted, Diff)
            }
            Node(key, home) => self.update(number, Kind::Node, Some(node(key, home))),
            Ready => self.update(number, Kind::ReadyForHandshake, None),
            Disconnected => self.update(number, Kind::Disconnected, None),
            Lost => self.update(number, Kind::Lost, None),
            AllLost => {
                self.coordination.disconnected(self.now, ages(&self.handshakes, self.now));
                Outcome::default()
            }
            Handshake => {
                self.handshakes.extend((1..=3).map(|key| (NodePublic([key; 32]), self.now)));
                Outcome::default()
            }
            Pass(span) => self.pass(span),
        }
    }

    fn update(&mut self, number: u128, kind: Kind, node: Option<tailnet::Node>) -> Outcome {
        let response =
            CoordinateResponse { peer_updates: vec![update(number, kind, node)], error: String::new() };
        self.coordination.handle_response(self.now, &response, ages(&self.handshakes, self.now))
    }

    fn error(&mut self, text: &str) -> Outcome {
        let response = CoordinateResponse { peer_updates: Vec::new(), error: text.to_owned() };
        self.coordination.handle_response(self.now, &response, |_| None)
    }

    /// Wakes the table whenever it wants to be woken.
    fn pass(&mut self, span: Duration) -> Outcome {
        let (until, mut all) = (self.now + span, Outcome::default());
        while let Some(due) = self.coordination.poll_timeout().filter(|due| *due <= until) {
            self.now = due.max(self.now);
            let before = self.coordination.network_map().clone();
            let outcome = self.coordination.handle_timeout(self.now, ages(&self.handshakes, self.now));
            assert_eq!(outcome.map_changed, before != *self.coordination.network_map());
            all.map_changed |= outcome.map_changed;
            all.requests.extend(outcome.requests);
            let next = self.coordination.poll_timeout();
            assert!(next.is_none_or(|next| next > self.now), "it wants to be woken at once again");
        }
        self.now = until;
        all
    }
}

fn ages(
    handshakes: &BTreeMap<NodePublic, Instant>,
    now: Instant,
) -> impl Fn(&NodePublic) -> Option<Duration> {
    move |key| handshakes.get(key).map(|at| now.duration_since(*at))
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn node(key: u8, home: i32) -> tailnet::Node {
    let addresses = vec![format!("fd60:627a:a42b::{key}/128")];
    tailnet::Node {
        key: Bytes::copy_from_slice(&NodePublic([key; 32]).to_binary()),
        disco: DiscoPublic([key; 32]).to_string(),
        preferred_derp: home,
        allowed_ips: addresses.clone(),
        addresses,
        ..tailnet::Node::default()
    }
}

fn update(number: u128, kind: Kind, node: Option<tailnet::Node>) -> PeerUpdate {
    let id = Bytes::copy_from_slice(id(number).as_bytes());
    PeerUpdate { id, kind: kind.into(), node, reason: String::new() }
}

/// `+1` asks for a tunnel to the agent with number 1, `-1` gives it back.
fn requests(outcome: &Outcome) -> Vec<String> {
    texts(&outcome.requests)
}

fn texts(requests: &[CoordinateRequest]) -> Vec<String> {
    let text = |sign, tunnel: &Tunnel| format!("{sign}{}", Uuid::from_slice(&tunnel.id).unwrap().as_u128());
    let of = |it: &CoordinateRequest| {
        let (add, remove) = (it.add_tunnel.as_ref(), it.remove_tunnel.as_ref());
        add.map(|it| text('+', it)).or(remove.map(|it| text('-', it))).expect("a tunnel")
    };
    requests.iter().map(of).collect()
}
