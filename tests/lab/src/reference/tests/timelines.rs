//! Recorded timelines, played to the model in the place of each reference node in them.
//!
//! What the other node sent comes at its time. When a packet of ours is due is taken from the recording; by which
//! ways it goes, and what else is said, is the model's to tell, and has to be what was recorded. Pongs are made up:
//! half a millisecond after each ping, unless UDP was cut.

use super::*;

/// Go's timers slip by half a millisecond each time, and of packets that were only counted the model sees a rounder
/// beat: what waits for the next packet may come one of them (200 ms) earlier or later.
const TOLERANCE: f64 = 250.0;
/// Go does at once what the model does one after the other, and timers slip: in the moment of a call it may call or
/// not, and a packet may have chosen its way before a pong, as chance has it.
const MOMENT: f64 = 50.0;
/// Pings of one round are not further apart.
const ROUND: f64 = 100.0;
const ROUND_TRIP: f64 = 0.5;
/// A heartbeat before the first one in the recording that begins in the middle of a session.
const BEGIN: f64 = 98.8 - 3000.0;
/// Packets that were only counted, an echo and an acknowledgement every 200 ms, are not further apart in the mean,
/// unless they came all at the beginning of their row.
const PACE: f64 = 110.0;

#[test]
fn the_side_that_asked_for_the_tunnel_goes_direct_leaves_and_returns_as_recorded() {
    Timeline::load("direct", "client", "10.77.1.2:44248", "10.77.2.2:58302").assert_replayed(44);
}

#[test]
fn the_other_side_goes_direct_leaves_and_returns_as_recorded() {
    Timeline::load("direct", "agent", "10.77.2.2:58302", "10.77.1.2:44248").assert_replayed(35);
}

#[test]
fn without_a_direct_path_the_side_that_asked_for_the_tunnel_probes_as_recorded() {
    Timeline::load("udp-dropped", "client", "10.77.1.2:60328", "10.77.2.2:56567").assert_replayed(41);
}

#[test]
fn without_a_direct_path_the_other_side_probes_as_recorded() {
    Timeline::load("udp-dropped", "agent", "10.77.2.2:56567", "10.77.1.2:60328").assert_replayed(32);
}

#[test]
fn calls_make_it_leave_a_dead_path_and_return_as_recorded() {
    let mut timeline = Timeline::load("quick-fallback", "agent", "10.77.0.5:41641", "10.77.0.1:60517");
    // The ping over the relay at 5.4 s, without a call, is one of the agent's own user pings.
    timeline.inputs.splice(0..0, [Input::Node, Input::Ready, Input::Send].map(|it| (BEGIN, it)));
    timeline.inputs.push((5367.1, Input::UserPing));
    timeline.are_cuts_unseen = true;
    timeline.assert_replayed(22);
}

/// Something that a side says besides packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Say {
    Ping,
    RelayPing,
    Call,
}

#[derive(Debug, Clone)]
enum Input {
    Own,
    Node,
    Ready,
    Send,
    UserPing,
    LinkChange,
    Ping(Via, TxId),
    Call(Vec<SocketAddr>),
    Pong(Via, TxId),
}

/// A recording, as one side sees it.
struct Timeline {
    own: SocketAddr,
    peer: SocketAddr,
    cuts: Vec<(f64, f64)>,
    /// Whether what this side sent over UDP while it was cut was not recorded.
    are_cuts_unseen: bool,
    end: f64,
    inputs: Vec<(f64, Input)>,
    /// What this side said.
    said: Vec<(f64, Say)>,
    /// Packets of this side from then to then, and whether any went over UDP and by relay.
    rows: Vec<(f64, f64, [bool; 2])>,
}

impl Timeline {
    fn load(name: &str, us: &str, own: &str, peer: &str) -> Self {
        let file = load(&format!("timeline-{name}"));
        let events = file["events"].as_array().unwrap();
        assert_eq!(Some(events.len()), file["count"].as_u64().map(|count| count as usize));
        let (own, peer) = (at(own), at(peer));
        let cuts = cuts(events);
        let end =
            events.iter().find(|event| event["what"] == "command quit").or(events.last()).map_or(0.0, ms);
        let (inputs, said, rows) = (Vec::new(), Vec::new(), Vec::new());
        let mut timeline = Self { own, peer, cuts, are_cuts_unseen: false, end, inputs, said, rows };
        events.iter().for_each(|event| timeline.add(us, event));
        timeline
    }

    fn add(&mut self, us: &str, event: &Value) {
        let (at, what, is_ours) = (ms(event), event["what"].as_str().unwrap(), event["who"] == us);
        let via = if event["path"] == "udp" { Via::Direct(self.peer) } else { Via::Relay };
        let has_come = via == Via::Relay || self.passes(at);
        match (what, is_ours) {
            ("publishes node", true) => self.inputs.push((at, Input::Own)),
            // An agent programs its peers at once.
            ("coordinator sends NODE", true) if us == "agent" => {
                self.inputs.extend([Input::Node, Input::Ready].map(|it| (at, it)));
            }
            ("coordinator sends NODE", true) => self.inputs.push((at, Input::Node)),
            ("coordinator sends READY_FOR_HANDSHAKE", true) => self.inputs.push((at, Input::Ready)),
            // It asks the relay whether it is there because its link has changed.
            ("derp ping", true) => self.inputs.push((at, Input::LinkChange)),
            ("ping-start", true) => self.inputs.push((at, Input::UserPing)),
            ("disco ping", true) if via == Via::Relay => self.said.push((at, Say::RelayPing)),
            ("disco ping", true) => self.said.push((at, Say::Ping)),
            ("disco call-me-maybe", true) => self.said.push((at, Say::Call)),
            ("disco ping", false) if has_come => {
                let count = u64::try_from(self.inputs.len()).unwrap();
                self.inputs.push((at, Input::Ping(via, id(count))));
            }
            ("disco call-me-maybe", false) => self.inputs.push((at, Input::Call(endpoints(event)))),
            ("traffic", _) => {
                let count = |what: &str| event["counts"][format!("{us} {what}")].as_u64().unwrap_or(0);
                let until = event["until_ms"].as_f64().unwrap();
                self.add_packets(at, until, [count("udp data"), count("relay data")]);
            }
            _ if is_ours && what.starts_with("wireguard") => {
                self.add_packets(at, at, [u64::from(via != Via::Relay), u64::from(via == Via::Relay)]);
            }
            _ => {}
        }
    }

    fn add_packets(&mut self, from: f64, until: f64, counts: [u64; 2]) {
        let count = counts[0].max(counts[1]);
        if count == 0 {
            return;
        }
        self.rows.push((from, until, counts.map(|count| count > 0)));
        let step = Some((until - from) / count as f64).filter(|step| *step <= PACE).unwrap_or(0.0);
        self.inputs.extend((0..count).map(|n| (step.mul_add(n as f64, from), Input::Send)));
    }

    fn passes(&self, at: f64) -> bool {
        !self.cuts.iter().any(|(from, to)| (*from..*to).contains(&at))
    }

    /// Plays it, and compares all that was said, and the ways of packets in so many rows.
    fn assert_replayed(mut self, rows: usize) {
        self.inputs.sort_by(|one, other| one.0.total_cmp(&other.0));
        let played = Player::play(&self);
        for say in [Say::Ping, Say::RelayPing, Say::Call] {
            let [recorded, said] = [&self.said, &played.said].map(|said| self.rounds(said, say));
            let are_near = |one: f64, others: &[f64]| others.iter().any(|it| (it - one).abs() < TOLERANCE);
            let is_sure = |it: &&f64| say != Say::Call || !self.is_called(**it);
            let missing: Vec<_> =
                recorded.iter().filter(is_sure).filter(|it| !are_near(**it, &said)).collect();
            assert!(missing.is_empty(), "recorded {say:?} at {missing:?}, but the model at {said:?}");
            let more: Vec<_> = said.iter().filter(is_sure).filter(|it| !are_near(**it, &recorded)).collect();
            assert!(more.is_empty(), "{say:?} at {more:?}, but recorded at {recorded:?}");
        }
        for (from, until, recorded) in &self.rows {
            let ways = played.ways(from - MOMENT, until + MOMENT);
            let could = [0, 1].map(|way| ways.iter().any(|ways| ways[way]));
            assert!(recorded[0] <= could[0] && recorded[1] <= could[1], "{from} {recorded:?} {could:?}");
            // The two copies of a single packet may be in two rows.
            if until - from > ROUND && ways.iter().all(|it| *it == ways[0]) {
                assert_eq!(*recorded, ways[0], "from {from} to {until}");
            }
        }
        assert_eq!(self.rows.len(), rows);
    }

    /// When something was said for the first time in a while, as far as it could be recorded.
    fn rounds(&self, said: &[(f64, Say)], say: Say) -> Vec<f64> {
        let mut rounds: Vec<f64> = Vec::new();
        let is_unseen = |at: f64| at < 0.0 || (self.are_cuts_unseen && say == Say::Ping && !self.passes(at));
        for (at, _) in said.iter().filter(|(at, it)| *it == say && !is_unseen(*at)) {
            if rounds.last().is_none_or(|last| at - last > ROUND) {
                rounds.push(*at);
            }
        }
        rounds
    }

    /// Whether the other side called at the same moment.
    fn is_called(&self, at: f64) -> bool {
        let is_call =
            |(called, it): &(f64, Input)| matches!(it, Input::Call(_)) && (at - called).abs() < MOMENT;
        self.inputs.iter().any(is_call)
    }
}

/// The model while it is played to.
struct Player<'a> {
    timeline: &'a Timeline,
    reference: Reference,
    start: Instant,
    /// Made up, and when each arrives.
    pongs: Vec<(f64, Input)>,
    count: u64,
    said: Vec<(f64, Say)>,
    /// The ways that a packet would have taken, by UDP and by relay: whenever something happened, and each millisecond
    /// in between.
    ways: Vec<(f64, [bool; 2])>,
}

impl<'a> Player<'a> {
    fn play(timeline: &'a Timeline) -> Self {
        let (reference, count, start) = (Reference::new(), 1 << 32, Instant::now());
        let (pongs, said, ways) = (Vec::new(), Vec::new(), Vec::new());
        let mut player = Self { timeline, reference, start, pongs, count, said, ways };
        player.take(timeline.inputs[0].0, &Input::Own);
        for (at, input) in &timeline.inputs {
            player.pass(*at);
            player.take(*at, input);
        }
        player.pass(timeline.end);
        player
    }

    /// Lets time pass until then.
    fn pass(&mut self, until: f64) {
        let mut now = self.ways.last().unwrap().0;
        while now < until {
            let since = |due: Instant| (due - self.instant(BEGIN)).as_secs_f64() * 1000.0 + BEGIN;
            let timer = self.reference.poll_timeout().map(since);
            let pong = self.pongs.first().map(|(at, _)| *at);
            now = [timer, pong, Some(now + 1.0)].into_iter().flatten().fold(until, f64::min);
            if pong == Some(now) {
                let (_, pong) = self.pongs.remove(0);
                self.take(now, &pong);
            } else {
                self.reference.handle_timeout(self.instant(now));
                self.drain(now);
            }
        }
    }

    fn instant(&self, at: f64) -> Instant {
        // A timer must not be met a rounding too early.
        self.start + Duration::from_nanos(((at - BEGIN) * 1e6).round() as u64)
    }

    fn take(&mut self, at: f64, input: &Input) {
        let (now, timeline) = (self.instant(at), self.timeline);
        match input {
            Input::Own => self.reference.handle_own_endpoints(now, &[timeline.own]),
            Input::Node => self.reference.handle_node(now, &[timeline.peer]),
            Input::Ready => self.reference.handle_ready(now),
            Input::Send => drop(self.reference.route(now)),
            Input::LinkChange => self.reference.handle_link_change(),
            Input::UserPing => self.reference.user_ping(now),
            Input::Ping(via, txid) => assert!(self.reference.handle_ping(now, *via, *txid)),
            Input::Call(endpoints) => self.reference.handle_call_me_maybe(now, endpoints),
            Input::Pong(via, txid) => assert!(self.reference.handle_pong(now, *via, *txid).is_some()),
        }
        self.drain(at);
    }

    fn drain(&mut self, at: f64) {
        let now = self.instant(at);
        loop {
            self.count += 1;
            let txid = id(self.count);
            let Some(effect) = self.reference.poll_effect(&mut || txid) else { break };
            let via = match effect {
                Effect::Ping { to, .. } => Via::Direct(to),
                _ => Via::Relay,
            };
            match effect {
                Effect::Ping { .. } | Effect::RelayPing { .. } => {
                    self.said.push((at, if via == Via::Relay { Say::RelayPing } else { Say::Ping }));
                    if via == Via::Relay || self.timeline.passes(at) {
                        self.pongs.push((at + ROUND_TRIP, Input::Pong(via, txid)));
                    }
                }
                Effect::CallMeMaybe(list) => {
                    assert_eq!(list, [self.timeline.own]);
                    self.said.push((at, Say::Call));
                }
                Effect::RefreshEndpoints => self.reference.handle_own_endpoints(now, &[self.timeline.own]),
                Effect::Verified(source) => assert_eq!(source, self.timeline.peer),
            }
        }
        let is_relayed = self.reference.trusted(now).is_none();
        self.ways.push((at, [self.reference.best().is_some(), is_relayed]));
    }

    /// All ways that a packet could have taken in that time.
    fn ways(&self, from: f64, until: f64) -> Vec<[bool; 2]> {
        let after = self.ways.partition_point(|(at, _)| *at <= from).saturating_sub(1);
        self.ways[after..].iter().take_while(|(at, _)| *at <= until).map(|(_, ways)| *ways).collect()
    }
}

/// When UDP was cut, and restored.
fn cuts(events: &[Value]) -> Vec<(f64, f64)> {
    let at = |said: [&str; 2]| {
        let is_it = |event: &&Value| said.iter().any(|it| event["what"].as_str().unwrap().contains(it));
        events.iter().find(is_it).map(ms)
    };
    let cut = at(["*** cut", "udp dropped"]).unwrap_or(f64::MIN);
    // The rule that dropped UDP was lifted just after the line about it: pings of 4 ms later were not answered yet.
    vec![(cut, at(["*** restore", "udp passes"]).unwrap() + 5.0)]
}

fn endpoints(event: &Value) -> Vec<SocketAddr> {
    let list = event["detail"]["endpoints"].as_array().unwrap();
    list.iter().map(|it| at(it.as_str().unwrap())).collect()
}

fn id(count: u64) -> TxId {
    let mut id = [0; 12];
    id[..8].copy_from_slice(&count.to_be_bytes());
    id
}

fn ms(event: &Value) -> f64 {
    event["ms"].as_f64().unwrap()
}
