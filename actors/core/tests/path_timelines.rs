//! Timelines of paths, recorded between reference nodes and between one and a foreign peer, played to a path of ours in
//! the place of one of them.
//!
//! What the recorded peer sends comes at its time: probes, calls and data, each by its way. What it would have answered
//! to us is made up: a ping over UDP is answered half a millisecond later unless UDP was cut. What the recorded client
//! sent says only that a packet is due; by which way, and what is probed, is ours to decide. So it can be asserted when
//! we go direct, leave and come back, what we tell, that we answer, and what probing costs; it cannot be asserted how
//! the peer takes it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test"
)]

use std::{
    net::SocketAddr,
    path::Path as File,
    time::{Duration, Instant},
};

use serde_json::Value;
use warren_core::{
    path::{Direct, Effect, Path, RelayStands, Via},
    relay_map::RegionId,
};
use warren_proto::disco::TxId;

const RELAY: Via = Via::Relay(RegionId(999));
const ROUND_TRIP: f64 = 0.5;

/// Two nodes meet, UDP is cut for half a minute under traffic, and comes back.
#[test]
fn a_path_is_direct_at_ready_left_at_the_cut_and_direct_again_when_udp_returns() {
    let timeline = Timeline::load("direct", "client");
    let (own, peer) = ("10.77.1.2:44248", "10.77.2.2:58302");
    let (cut, restored) = (timeline.at("*** cut"), timeline.at("*** restore"));
    let ready = timeline.at("READY_FOR_HANDSHAKE");
    let played = timeline.play(own, peer, &[(cut, restored)]);

    assert_eq!(played.pings.first(), Some(&ready), "no ping before the peer knows us, and one at once");
    assert_eq!(played.calls[0], (ready, vec![own.parse().unwrap()]));
    let [first, lost, back] = played.changes[..] else { panic!("{:?}", played.changes) };
    assert!(first.1 && first.0 - ready < 5.0, "direct at {}", first.0);
    assert!(!lost.1 && lost.0 - cut < 1000.0, "left at {}", lost.0);
    assert!(back.1 && back.0 - restored < 1000.0, "back at {}", back.0);
    assert!(played.told_from(back.0).starts_with(&[vec![own.parse().unwrap()]]));
    assert_eq!(played.unanswered, 0, "every ping that arrives is answered");
}

/// UDP is dropped for two minutes: traffic, then little, then none. Then it works.
#[test]
fn without_a_direct_path_probing_costs_less_than_the_reference_and_finds_udp_when_it_returns() {
    let timeline = Timeline::load("udp-dropped", "client");
    let restored = timeline.at("*** restore");
    let recorded = timeline.events.iter().filter(|it| {
        it["who"] == "client" && it["what"] == "disco ping" && it["path"] == "udp" && ms(it) < restored
    });
    let recorded = recorded.count();
    let played = timeline.play("10.77.1.2:60328", "10.77.2.2:56567", &[(0.0, restored)]);

    let pings = played.pings.iter().filter(|at| **at < restored).count();
    assert!(pings <= recorded, "{pings} pings, the reference sent {recorded}");
    let [(at, true)] = played.changes[..] else { panic!("{:?}", played.changes) };
    let sent = played.sent.iter().find(|at| **at >= restored).unwrap();
    assert!(at >= restored && at - sent < 1000.0, "direct at {at}, a packet was sent at {sent}");
    assert_eq!(played.unanswered, 0);
}

/// The recipe that was tried against a real agent.
#[test]
fn a_dead_path_is_left_as_the_recorded_peer_does_only_sooner() {
    let timeline = Timeline::load("quick-fallback", "peer");
    let (own, cut) = ("10.77.0.1:60517", timeline.at("udp dropped"));
    let (back, dead) = (timeline.at("udp passes"), timeline.at("declared dead"));
    let played = timeline.play(own, "10.77.0.5:41641", &[(cut, back)]);

    let [_, lost, again] = played.changes[..] else { panic!("{:?}", played.changes) };
    assert!(!lost.1 && lost.0 < dead, "left at {}, the recorded peer at {dead}", lost.0);
    let all: Vec<SocketAddr> = vec![own.parse().unwrap()];
    let told: Vec<_> = played.calls.iter().filter(|(at, _)| (lost.0..back).contains(at)).collect();
    assert_eq!(told[0].1, all);
    assert_eq!((told[1].1.len(), (told[1].0 - told[0].0).round()), (0, 20.0));
    assert_eq!((&told[2].1, (told[2].0 - told[1].0).round()), (&all, 20.0));
    let salvo = played.pings.iter().filter(|at| (lost.0..lost.0 + 100.0).contains(at)).count();
    assert!((12..=14).contains(&salvo), "in case it was chance: {salvo}");
    let pings = played.pings.iter().filter(|at| (lost.0 + 100.0..back).contains(at)).count();
    assert!((4..=9).contains(&pings), "one a second, and one for each call: {pings}");
    // The recorded peer waits for its next ping; ours returns the agent's as soon as a tenth of a second has passed.
    assert!(again.1 && again.0 - 6987.0 < 105.0, "back at {}", again.0);
    assert!(played.told_from(again.0).starts_with(&[all]));
    assert_eq!(played.unanswered, 0);
}

/// Neither wants direct paths; a node that must not probe asks by relay whether the other is there, every five seconds.
#[test]
fn where_direct_paths_are_blocked_nothing_is_probed_and_every_ping_by_relay_is_answered() {
    for us in ["client", "agent"] {
        let timeline = Timeline { policy: Direct::Blocked, tells: false, ..Timeline::load("relay-only", us) };
        let pinged =
            timeline.events.iter().filter(|it| it["who"] != us && it["what"] == "disco ping").count();
        let played = timeline.play("10.77.1.2:44248", "10.77.2.2:58302", &[]);

        assert!(pinged > 60 && played.answered == pinged, "{} answers to {pinged} pings", played.answered);
        assert_eq!((&played.pings, &played.changes), (&Vec::new(), &Vec::new()));
        assert!(played.calls.iter().all(|(_, list)| list.is_empty()), "{:?}", played.calls);
        assert!(
            played.calls.len() <= 1,
            "{} calls, though the peer takes no direct path",
            played.calls.len()
        );
    }
}

/// It says nowhere where it is: its datagrams are nobody's until a ping came from there.
#[test]
fn a_peer_that_publishes_no_address_is_known_by_its_ping_and_direct_once_it_answers() {
    let timeline = Timeline { tells: false, ..Timeline::load("minimal-peer", "agent") };
    let (first, ping) = (timeline.at("wireguard handshake"), timeline.at("disco ping"));
    let answer = timeline.at("wireguard handshake response");
    let played = timeline.play("127.0.0.1:41641", "127.0.0.1:50000", &[]);

    assert_eq!(played.strange, [first], "what it sends before its ping");
    assert_eq!(played.verified[0], ping);
    let [(found, true)] = played.changes[..] else { panic!("{:?}", played.changes) };
    assert!(
        found >= ping && found <= answer + ROUND_TRIP,
        "direct at {found}, the recorded node at {answer}"
    );
    assert_eq!((played.answered, played.unanswered), (2, 0), "one by UDP and one by relay");
}

struct Timeline {
    us: &'static str,
    events: Vec<Value>,
    policy: Direct,
    /// Whether the peer's node and its calls say where it is.
    tells: bool,
}

/// What ours did, and when, in milliseconds.
#[derive(Debug, Default)]
struct Played {
    pings: Vec<f64>,
    calls: Vec<(f64, Vec<SocketAddr>)>,
    /// To a direct path, or to the relay.
    changes: Vec<(f64, bool)>,
    sent: Vec<f64>,
    answered: usize,
    unanswered: usize,
    /// When the peer's address became known as its own, and when it sent from there before.
    verified: Vec<f64>,
    strange: Vec<f64>,
}

#[derive(Debug, Clone)]
enum Input {
    Node,
    Ready,
    Send,
    Data(Via),
    Ping(Via),
    Call,
    Pong(TxId),
}

struct Player {
    path: Path,
    start: Instant,
    own: SocketAddr,
    peer: SocketAddr,
    /// Where the peer says that it is.
    told: Vec<SocketAddr>,
    cuts: Vec<(f64, f64)>,
    txid: u64,
    pongs: Vec<(f64, Input)>,
    played: Played,
}

impl Timeline {
    fn load(name: &str, us: &'static str) -> Self {
        let folder = File::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/data");
        let file = std::fs::read(folder.join(format!("timeline-{name}.json"))).unwrap();
        let file: Value = serde_json::from_slice(&file).unwrap();
        let events = file["events"].as_array().unwrap().clone();
        assert_eq!(Some(events.len()), file["count"].as_u64().map(|count| usize::try_from(count).unwrap()));
        Self { us, events, policy: Direct::Allowed, tells: true }
    }

    /// When something is said to happen for the first time.
    fn at(&self, what: &str) -> f64 {
        let said = |it: &&Value| it["what"].as_str().unwrap().contains(what);
        ms(self.events.iter().find(said).expect("an event that says so"))
    }

    fn play(&self, own: &str, peer: &str, cuts: &[(f64, f64)]) -> Played {
        let (own, peer) = (own.parse().unwrap(), peer.parse().unwrap());
        let mut inputs: Vec<(f64, Input)> = self.events.iter().flat_map(|it| self.inputs(it, peer)).collect();
        inputs.sort_by(|a, b| a.0.total_cmp(&b.0));
        if !inputs.iter().any(|(_, it)| matches!(it, Input::Ready)) {
            inputs.splice(0..0, [(0.0, Input::Node), (0.0, Input::Ready), (0.0, Input::Send)]);
        }
        let mut player = Player::new(own, peer, cuts);
        player.path.set_policy(player.start, self.policy);
        player.told.extend(self.tells.then_some(peer));
        for (at, input) in inputs {
            player.pass(at);
            player.take(at, &input);
        }
        player.played
    }

    fn inputs(&self, event: &Value, peer: SocketAddr) -> Vec<(f64, Input)> {
        let (what, at, is_ours) = (event["what"].as_str().unwrap(), ms(event), event["who"] == self.us);
        let via = if event["path"] == "udp" { Via::Direct(peer) } else { RELAY };
        let input = match (what, is_ours) {
            ("traffic", _) => return self.traffic(event, peer),
            ("coordinator sends NODE", true) => Input::Node,
            ("coordinator sends READY_FOR_HANDSHAKE", true) => Input::Ready,
            // Also one behind a message of unknown type.
            _ if what.ends_with("ping") && what.starts_with("disco") && !is_ours => Input::Ping(via),
            ("disco call-me-maybe", false) => Input::Call,
            _ if what.starts_with("wireguard") && is_ours => Input::Send,
            _ if what.starts_with("wireguard") => Input::Data(via),
            _ => return Vec::new(),
        };
        vec![(at, input)]
    }

    /// Packets of which only the number is known, spread over their time; those sent twice are one.
    fn traffic(&self, event: &Value, peer: SocketAddr) -> Vec<(f64, Input)> {
        let count = |who: &str, what: &str| event["counts"][format!("{who} {what}")].as_u64().unwrap_or(0);
        let them = if self.us == "agent" { "client" } else { "agent" };
        let udp = count(self.us, "udp data").max(count(self.us, "udp data lost"));
        let rows = [
            (udp.max(count(self.us, "relay data")), Input::Send),
            (count(them, "udp data"), Input::Data(Via::Direct(peer))),
            (count(them, "relay data"), Input::Data(RELAY)),
        ];
        let (from, to) = (ms(event), event["until_ms"].as_f64().unwrap_or(ms(event)));
        let spread = |(count, input): (u64, Input)| {
            let step = (to - from) / count.max(1) as f64;
            (0..count).map(move |n| (step.mul_add(n as f64, from), input.clone()))
        };
        rows.into_iter().flat_map(spread).collect()
    }
}

impl Player {
    fn new(own: SocketAddr, peer: SocketAddr, cuts: &[(f64, f64)]) -> Self {
        let (start, cuts) = (Instant::now(), cuts.to_vec());
        let (path, told, pongs, played) = (Path::new(), Vec::new(), Vec::new(), Played::default());
        Self { path, start, own, peer, told, cuts, txid: 0, pongs, played }
    }

    /// Lets time pass until then.
    fn pass(&mut self, until: f64) {
        loop {
            let timer = self.path.poll_timeout().map(|due| (due - self.start).as_secs_f64() * 1000.0);
            let pong = self.pongs.first().map(|(at, _)| *at);
            match (timer, pong) {
                (_, Some(at)) if at <= until && timer.is_none_or(|timer| at <= timer) => {
                    let (_, pong) = self.pongs.remove(0);
                    self.take(at, &pong);
                }
                (Some(at), _) if at <= until => {
                    self.path.handle_timeout(self.instant(at));
                    self.drain(at);
                }
                _ => break,
            }
        }
    }

    fn instant(&self, at: f64) -> Instant {
        // A timer must not be met a rounding too early.
        self.start + Duration::from_nanos((at * 1e6).round() as u64)
    }

    fn passes(&self, at: f64) -> bool {
        !self.cuts.iter().any(|(from, to)| (*from..*to).contains(&at))
    }

    fn take(&mut self, at: f64, input: &Input) {
        let (now, passes) = (self.instant(at), self.passes(at));
        match input {
            Input::Node => {
                self.path.handle_own_endpoints(now, &[self.own]);
                self.path.handle_node(now, &self.told);
            }
            Input::Ready => self.path.handle_ready(now),
            Input::Send => {
                self.played.sent.push(at);
                self.path.route(now);
            }
            Input::Data(Via::Direct(_)) | Input::Ping(Via::Direct(_)) if !passes => {}
            Input::Data(Via::Direct(_)) if self.played.verified.is_empty() => self.played.strange.push(at),
            Input::Data(via) => self.path.handle_received(now, *via),
            Input::Ping(via) => {
                let txid = self.number();
                let is_owed = self.path.handle_ping(now, *via, txid);
                self.played.answered += usize::from(is_owed);
                self.played.unanswered += usize::from(!is_owed);
            }
            Input::Call => self.path.handle_call_me_maybe(now, &self.told),
            Input::Pong(_) if !passes => {}
            Input::Pong(txid) => {
                self.path.handle_pong(now, Via::Direct(self.peer), *txid, self.own);
            }
        }
        self.drain(at);
    }

    fn number(&mut self) -> TxId {
        self.txid += 1;
        let mut txid = [0; 12];
        txid[..8].copy_from_slice(&self.txid.to_be_bytes());
        txid
    }

    fn drain(&mut self, at: f64) {
        loop {
            let number = self.number();
            let Some(effect) = self.path.poll_effect(&mut || number) else { return };
            match effect {
                Effect::Ping { to, txid } => {
                    assert_eq!(to, self.peer);
                    self.played.pings.push(at);
                    if self.passes(at) {
                        self.pongs.push((at + ROUND_TRIP, Input::Pong(txid)));
                    }
                }
                Effect::CallMeMaybe(list) => self.played.calls.push((at, list)),
                Effect::RefreshEndpoints => self.path.handle_own_endpoints(self.instant(at), &[self.own]),
                Effect::ProveRelay => self.path.handle_relay(self.instant(at), RelayStands::Alive),
                Effect::Changed { to, .. } => self.played.changes.push((at, to.is_some())),
                Effect::Verified(address) => {
                    assert_eq!(address, self.peer);
                    self.played.verified.push(at);
                }
                Effect::RelayPing { .. } | Effect::Forgotten(_) => panic!("nobody asked for {effect:?}"),
            }
        }
    }
}

impl Played {
    /// What the peer was told from then on.
    fn told_from(&self, from: f64) -> Vec<Vec<SocketAddr>> {
        self.calls.iter().filter(|(at, _)| *at >= from).map(|(_, list)| list.clone()).collect()
    }
}

fn ms(event: &Value) -> f64 {
    event["ms"].as_f64().unwrap()
}
