//! The model against what was recorded of the reference itself, and its weaknesses by name.

mod timelines;

use std::path::Path;

use serde_json::Value;

use super::*;

#[test]
fn addresses_are_compared_as_recorded() {
    let file = load("better-address");
    let vectors = file["vectors"].as_array().unwrap();
    assert_eq!(Some(vectors.len()), file["count"].as_u64().map(|count| count as usize));
    for vector in vectors {
        let inputs = &vector["inputs"];
        let side = |name: &str| {
            let address = inputs[name].as_str().unwrap().parse().ok()?;
            let latency = Duration::from_nanos(inputs[format!("{name}_latency_ns")].as_u64().unwrap());
            Some(Best { address, latency })
        };
        let expected = vector["decoded"]["better"].as_bool().unwrap();
        assert_eq!(better(side("a"), side("b")), expected, "{}", vector["name"]);
    }
}

#[test]
fn while_the_best_address_is_the_only_candidate_its_loss_is_not_called_about() {
    let mut peer = Peer::direct();
    for _ in 0..70 {
        peer.pass(100);
        peer.reference.route(peer.now);
    }
    let effects = peer.effects();
    assert_eq!(effects, [PING, PING], "heartbeats alone, which keep it inside of the spacing");
    assert_eq!(peer.reference.route(peer.now), Route { direct: Some(at(A)), relay: true });
}

#[test]
fn a_dead_best_address_keeps_a_slower_one_out() {
    let mut peer = Peer::direct();
    peer.reference.handle_node(peer.now, &[at(A), at(B)]);
    peer.pass(7000);
    peer.effects();
    peer.reference.handle_ping(peer.now, Via::Direct(at(B)), [7; 12]);
    peer.reference.route(peer.now);
    let to_b = peer.pings(B);
    peer.pass(100);
    assert!(peer.reference.handle_pong(peer.now, Via::Direct(at(B)), to_b).is_some());
    assert_eq!(peer.reference.best().map(|best| best.address), Some(at(A)));
    assert_eq!(peer.reference.trusted(peer.now), None);
}

#[test]
fn a_call_that_omits_what_an_earlier_one_listed_makes_it_leave_though_the_node_message_lists_it() {
    let mut peer = Peer::direct();
    peer.reference.handle_call_me_maybe(peer.now, &[]);
    assert!(peer.reference.best().is_some(), "no call listed it");
    peer.reference.handle_call_me_maybe(peer.now, &[at(A)]);
    peer.reference.handle_call_me_maybe(peer.now, &[]);
    assert_eq!(peer.reference.best(), None);
    assert_eq!(peer.reference.route(peer.now), Route { direct: None, relay: true });
}

#[test]
fn own_addresses_that_are_too_old_are_collected_before_they_are_told() {
    let mut peer = Peer::new();
    peer.pass(28_000);
    peer.reference.route(peer.now);
    assert_eq!(peer.effects(), [PING, Told::Refresh]);
    peer.reference.handle_own_endpoints(peer.now, &[at(OWN)]);
    assert_eq!(peer.effects(), [Told::Call]);
}

#[test]
fn a_side_that_blocks_direct_connections_calls_with_an_empty_list_once_it_was_pinged_by_relay() {
    let mut peer = Peer::direct();
    peer.reference.set_blocked(true);
    assert!(!peer.reference.handle_ping(peer.now, Via::Direct(at(A)), [7; 12]));
    assert_eq!(peer.reference.route(peer.now), Route { direct: None, relay: true });
    assert_eq!(peer.effects(), []);
    assert!(peer.reference.handle_ping(peer.now, Via::Relay, [8; 12]));
    peer.reference.route(peer.now);
    let mut number = || [9; 12];
    assert!(matches!(peer.reference.poll_effect(&mut number), Some(Effect::RelayPing { .. })));
    assert_eq!(peer.reference.poll_effect(&mut number), Some(Effect::CallMeMaybe(Vec::new())));
}

#[test]
fn heartbeats_end_45_s_after_the_last_packet() {
    let mut peer = Peer::direct();
    peer.pass(45_000);
    assert_eq!(peer.effects().iter().filter(|it| **it == PING).count(), 15);
    peer.pass(3000);
    assert_eq!(peer.effects(), []);
    assert_eq!(peer.reference.poll_timeout(), None);
}

#[test]
fn the_same_ping_again_is_not_answered_and_nothing_is_heard_before_the_peer_is_programmed() {
    let mut reference = Reference::new();
    let now = Instant::now();
    assert!(!reference.handle_ping(now, Via::Relay, [1; 12]));
    reference.handle_ready(now);
    let answers = [[1; 12], [1; 12], [2; 12], [1; 12]].map(|id| reference.handle_ping(now, Via::Relay, id));
    assert_eq!(answers, [true, false, true, true], "one id is remembered");
}

const OWN: &str = "198.51.100.1:41641";
const A: &str = "203.0.113.1:41641";
const B: &str = "203.0.113.2:41641";
const PING: Told =
    Told::Ping(Via::Direct(SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1)), 41641)));

/// An effect without its ids and addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Ping(Via),
    Call,
    Refresh,
}

struct Peer {
    reference: Reference,
    now: Instant,
    count: u8,
    sent: Vec<(Via, TxId)>,
}

impl Peer {
    /// Has a candidate, and sends nothing yet.
    fn new() -> Self {
        let (mut reference, now) = (Reference::new(), Instant::now());
        reference.handle_own_endpoints(now, &[at(OWN)]);
        reference.handle_node(now, &[at(A)]);
        reference.handle_ready(now);
        Self { reference, now, count: 0, sent: Vec::new() }
    }

    /// Has just become direct.
    fn direct() -> Self {
        let mut peer = Self::new();
        peer.reference.route(peer.now);
        let txid = peer.pings(A);
        peer.now += Duration::from_millis(10);
        peer.reference.handle_pong(peer.now, Via::Direct(at(A)), txid).unwrap();
        assert_eq!(peer.reference.route(peer.now), Route { direct: Some(at(A)), relay: false });
        peer.effects();
        peer
    }

    fn pass(&mut self, milliseconds: u64) {
        let end = self.now + Duration::from_millis(milliseconds);
        while let Some(due) = self.reference.poll_timeout().filter(|due| *due <= end) {
            self.now = due;
            self.reference.handle_timeout(due);
        }
        self.now = end;
    }

    fn effects(&mut self) -> Vec<Told> {
        let mut told = Vec::new();
        loop {
            self.count += 1;
            let count = self.count;
            let Some(effect) = self.reference.poll_effect(&mut || [count; 12]) else { return told };
            let via = match &effect {
                Effect::Ping { to, .. } => Via::Direct(*to),
                _ => Via::Relay,
            };
            match effect {
                Effect::Ping { txid, .. } | Effect::RelayPing { txid } => {
                    self.sent.push((via, txid));
                    told.push(Told::Ping(via));
                }
                Effect::CallMeMaybe(_) => told.push(Told::Call),
                Effect::RefreshEndpoints => told.push(Told::Refresh),
                Effect::Verified(_) => {}
            }
        }
    }

    /// The id of the last ping to an address.
    fn pings(&mut self, address: &str) -> TxId {
        self.effects();
        self.sent.iter().rfind(|(via, _)| *via == Via::Direct(at(address))).expect("a ping").1
    }
}

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

fn load(name: &str) -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../actors/core/tests/vectors/data");
    serde_json::from_slice(&std::fs::read(folder.join(format!("{name}.json"))).unwrap()).unwrap()
}
