//! One peer of ours on a virtual clock. What it sends is looked at, or answered by hand.

use super::*;

mod calling;
mod following;
mod leaving;
mod links;
mod property;
mod receiving;
mod seeking;
mod trust;

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);
const REGION: RegionId = RegionId(999);
const RELAY: Via = Via::Relay(REGION);
/// How long a path of the tests takes there and back.
const LATENCY: Duration = Duration::from_millis(10);

/// A path, its clock, and a source of numbers.
struct Bench {
    path: Path,
    start: Instant,
    now: Instant,
    txid: u64,
    /// Effects that were drained and not looked at.
    effects: Vec<(Duration, Effect)>,
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        Self { path: Path::new(), start: now, now, txid: 0, effects: Vec::new() }
    }

    /// A peer that knows us, at these addresses, after our first round.
    fn ready(endpoints: &[SocketAddr]) -> Self {
        let mut bench = Self::new();
        bench.path.handle_own_endpoints(bench.now, &[own(1)]);
        bench.path.handle_node(bench.now, endpoints);
        bench.path.handle_ready(bench.now);
        bench
    }

    /// A peer with a direct path, and traffic both ways. At 1 s.
    fn direct() -> Self {
        let mut bench = Self::ready(&[peer(1)]);
        bench.path.route(bench.now);
        bench.answer(peer(1));
        bench.hear(peer(1));
        bench.talk(S);
        bench.take();
        bench
    }

    fn drain(&mut self) {
        let at = self.now - self.start;
        let mut txid = || {
            self.txid += 1;
            number(self.txid)
        };
        while let Some(effect) = self.path.poll_effect(&mut txid) {
            self.effects.push((at, effect));
        }
    }

    /// What was to be done since this was asked last, and when.
    fn take(&mut self) -> Vec<(Duration, Effect)> {
        self.drain();
        std::mem::take(&mut self.effects)
    }

    fn taken(&mut self) -> Vec<Effect> {
        self.take().into_iter().map(|(_, effect)| effect).collect()
    }

    /// Lets time pass; each timer is kept to the moment.
    fn pass(&mut self, time: Duration) {
        self.drain();
        let end = self.now + time;
        while let Some(due) = self.path.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.path.handle_timeout(self.now);
            self.drain();
            assert!(self.path.poll_timeout().is_none_or(|next| next > self.now), "time stands still");
        }
        self.now = end;
    }

    /// Traffic over the path taken, there and back every 20 ms, and each ping answered.
    fn talk(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            let route = self.path.route(self.now);
            self.drain();
            self.pass(LATENCY);
            self.answer_all();
            self.path.handle_received(self.now, route.direct.map_or(RELAY, Via::Direct));
            self.pass(LATENCY);
            self.answer_all();
        }
    }

    /// We send every 20 ms, and nothing comes back.
    fn shout(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.path.route(self.now);
            self.pass(20 * MS);
        }
    }

    /// Every ping that is out, over UDP, answered just now.
    fn answer_all(&mut self) {
        self.drain();
        let pings: Vec<_> =
            self.effects.extract_if(.., |(_, it)| matches!(it, Effect::Ping { .. })).collect();
        for (_, ping) in pings {
            if let Effect::Ping { to, txid } = ping {
                self.path.handle_pong(self.now, Via::Direct(to), txid, own(1));
            }
        }
        self.drain();
    }

    /// The latest ping to an address is answered, a round trip later.
    fn answer(&mut self, from: SocketAddr) -> Option<Answer> {
        self.answer_after(from, LATENCY)
    }

    fn answer_after(&mut self, from: SocketAddr, latency: Duration) -> Option<Answer> {
        self.drain();
        let pings = self.effects.iter().rev().filter_map(|(at, it)| match it {
            Effect::Ping { to, txid } if *to == from => Some((*at, *txid)),
            _ => None,
        });
        let (at, txid) = pings.into_iter().next().expect("nothing was sent there");
        self.now = self.now.max(self.start + at + latency);
        let answer = self.path.handle_pong(self.now, Via::Direct(from), txid, own(1));
        self.drain();
        answer
    }

    /// A new ping from an address.
    fn hear(&mut self, from: SocketAddr) -> bool {
        self.txid += 1;
        self.path.handle_ping(self.now, Via::Direct(from), number(self.txid | 1 << 32))
    }

    fn route(&mut self) -> (Option<SocketAddr>, bool) {
        let Route { direct, relay } = self.path.route(self.now);
        (direct, relay)
    }

    fn best(&self) -> Option<SocketAddr> {
        self.path.best().map(|best| best.address)
    }
}

fn number(number: u64) -> TxId {
    let mut txid = [0; 12];
    txid[..8].copy_from_slice(&number.to_be_bytes());
    txid
}

/// The peer's addresses, all alike to [`better`].
fn peer(n: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, n], 1000))
}

/// The one address, or none.
fn only_if(is_there: bool) -> Vec<SocketAddr> {
    is_there.then_some(peer(1)).into_iter().collect()
}

fn own(n: u8) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, n], 2000))
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Who was pinged, in order.
fn pinged(effects: &[Effect]) -> Vec<SocketAddr> {
    effects.iter().filter_map(|it| if let Effect::Ping { to, .. } = it { Some(*to) } else { None }).collect()
}

/// When who was pinged.
fn pings_at(effects: &[(Duration, Effect)]) -> Vec<u128> {
    effects.iter().filter(|(_, it)| matches!(it, Effect::Ping { .. })).map(|(at, _)| at.as_millis()).collect()
}

/// What the peer was told.
fn lists(effects: &[(Duration, Effect)]) -> Vec<Vec<SocketAddr>> {
    calls(effects).into_iter().map(|(_, list)| list).collect()
}

/// What the peer was told, and when.
fn calls(effects: &[(Duration, Effect)]) -> Vec<(u128, Vec<SocketAddr>)> {
    let call = |(at, it): &(Duration, Effect)| match it {
        Effect::CallMeMaybe(list) => Some((at.as_millis(), list.clone())),
        _ => None,
    };
    effects.iter().filter_map(call).collect()
}
