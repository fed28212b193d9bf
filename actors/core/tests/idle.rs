//! What agents cost that nobody talks to: the pinger's schedule and the paths to two agents on a virtual clock, one
//! reached directly and one only by relay, each with WireGuard's keepalives.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use uuid::Uuid;
use warren_core::{
    coordination::{NetworkMap, Peer},
    path::{Effect, Path, RelayStands, Via},
    ping::Pings,
    relay_map::RegionId,
};
use warren_proto::{
    disco::TxId,
    key::{DiscoPublic, NodePublic},
};

const REGION: RegionId = RegionId(1);
const STEP: Duration = Duration::from_millis(10);
/// There and back, whichever way.
const LATENCY: Duration = Duration::from_millis(20);
const KEEPALIVE: Duration = Duration::from_secs(25);
const SECOND: Duration = Duration::from_secs(1);
/// The pinger asks every agent so often, and is answered.
const PINGS_A_MINUTE: usize = 2 * 12;
/// Besides that.
const MOST_A_MINUTE: usize = 60;
/// Where nothing is being sought, the direct path's own renewal: a ping and its answer for each keepalive.
const MOST_AT_REST: usize = 2 * 6;

#[test]
fn idle_agents_cost_less_than_one_probe_a_second_beside_the_pings_and_next_to_nothing_after_a_while() {
    for reach in [Reach::Direct, Reach::RelayOnly] {
        let mut agent = Agent::new(reach);
        let mut minutes = Vec::new();
        for _ in 0..30 {
            let before = agent.messages;
            agent.run(60 * SECOND);
            minutes.push(agent.messages - before);
        }
        let most = minutes.iter().max().unwrap();
        assert!(*most <= PINGS_A_MINUTE + MOST_A_MINUTE, "{reach:?}: {minutes:?}");
        assert_eq!(agent.path.best().is_some(), reach == Reach::Direct);
        let at_rest = minutes[10..].iter().sum::<usize>() / minutes[10..].len();
        assert!(at_rest <= PINGS_A_MINUTE + MOST_AT_REST, "{reach:?}: {minutes:?}");
        assert!(agent.answered >= 30 * 12 - 1, "{reach:?}: {}", agent.answered);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Direct,
    RelayOnly,
}

/// An agent as we reach it, and our side of the way to it.
struct Agent {
    reach: Reach,
    now: Instant,
    end: Instant,
    path: Path,
    pings: Pings<()>,
    keepalive: Instant,
    /// Answers that are under way: when they arrive, by which way, and to what.
    answers: Vec<(Instant, Via, TxId)>,
    txid: u64,
    /// Disco messages both ways.
    messages: usize,
    answered: usize,
}

impl Agent {
    fn new(reach: Reach) -> Self {
        let now = Instant::now();
        let mut path = Path::new();
        path.handle_own_endpoints(now, &[address(100)]);
        path.handle_node(now, &[address(1), address(2), address(3)]);
        path.handle_ready(now);
        let mut pings = Pings::new(now);
        let peer = Peer {
            node_key: key(),
            disco_key: DiscoPublic([2; 32]),
            home: REGION,
            addresses: Vec::new(),
            keepalive: true,
            endpoints: Vec::new(),
            announcements: 1,
        };
        pings.set_peers(now, &NetworkMap { peers: [(Uuid::nil(), peer)].into() });
        let (answers, txid, messages, answered) = (Vec::new(), 0, 0, 0);
        Self { reach, now, end: now, path, pings, keepalive: now, answers, txid, messages, answered }
    }

    fn run(&mut self, span: Duration) {
        self.end += span;
        while self.now < self.end {
            self.now += STEP;
            self.step();
        }
    }

    fn step(&mut self) {
        let now = self.now;
        let (due, later) = std::mem::take(&mut self.answers).into_iter().partition(|(at, ..)| *at <= now);
        self.answers = later;
        let due: Vec<(Instant, Via, TxId)> = due;
        for (_, via, txid) in due {
            self.messages += 1;
            if let Some(answer) = self.path.handle_pong(now, via, txid, address(100)) {
                self.answered += usize::from(self.pings.handle_pong(&answer.txid, &key(), now).is_some());
            }
        }
        if self.keepalive <= now {
            self.keepalive = now + KEEPALIVE;
            let route = self.path.route(now);
            self.path.handle_received(now, route.direct.map_or(Via::Relay(REGION), Via::Direct));
        }
        self.path.handle_timeout(now);
        if self.pings.poll_timeout() <= now {
            let txid = &mut self.txid;
            for ping in self.pings.handle_timeout(now, || number(txid)).pings {
                self.path.user_ping(now, ping.txid);
            }
        }
        self.carry_out();
    }

    fn carry_out(&mut self) {
        let now = self.now;
        loop {
            let txid = &mut self.txid;
            let Some(effect) = self.path.poll_effect(&mut || number(txid)) else { return };
            match effect {
                Effect::Ping { to, txid } => {
                    self.messages += 1;
                    if self.reach == Reach::Direct && to == address(1) {
                        self.answers.push((now + LATENCY, Via::Direct(to), txid));
                    }
                }
                Effect::RelayPing { txid } => {
                    self.messages += 1;
                    self.answers.push((now + LATENCY, Via::Relay(REGION), txid));
                }
                Effect::CallMeMaybe(list) => {
                    self.messages += 1;
                    // It pings us wherever we say that we are; nothing of that arrives where nothing gets through.
                    self.messages += list.len();
                }
                Effect::RefreshEndpoints => self.path.handle_own_endpoints(now, &[address(100)]),
                Effect::ProveRelay => self.path.handle_relay(now, RelayStands::Alive),
                Effect::Changed { .. } | Effect::Verified(_) | Effect::Forgotten(_) => {}
            }
        }
    }
}

fn number(last: &mut u64) -> TxId {
    *last += 1;
    let mut txid = [0; 12];
    txid[..8].copy_from_slice(&last.to_be_bytes());
    txid
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 41641))
}

fn key() -> NodePublic {
    NodePublic([1; 32])
}
