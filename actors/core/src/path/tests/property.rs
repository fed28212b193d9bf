//! Whatever happens, in whatever order: time moves on, memory is bounded, and nobody leaves a path that answers for
//! one that does not.

use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*};

use super::*;

/// How long a path must have been as it is before it counts as one that answers, or as one that does not.
const STEADY: Duration = Duration::from_secs(3);

#[derive(Debug, Clone)]
enum Input {
    Ready,
    Node(Vec<u8>),
    Call(Vec<u8>),
    Own(Vec<u8>),
    Policy(Direct),
    Ping(u8),
    RelayPing(u8),
    Received(u8),
    Relayed,
    /// Refused by a host that is not there.
    Unreachable(u8),
    LinkChange,
    Relay(RelayStands),
    UserPing,
    Talk(u16),
    Pass(u32),
    /// An address begins, or ceases, to answer.
    Turn(u8),
}

fn input() -> impl Strategy<Value = Input> {
    let n = 0..6_u8;
    let some = || vec(0..6_u8, 0..6);
    let relay = prop_oneof![3 => Just(RelayStands::Alive), 1 => Just(RelayStands::Down)];
    prop_oneof![
        2 => Just(Input::Ready),
        2 => some().prop_map(Input::Node),
        2 => some().prop_map(Input::Call),
        2 => some().prop_map(Input::Own),
        1 => prop_oneof![4 => Just(Direct::Allowed), 1 => Just(Direct::Blocked)].prop_map(Input::Policy),
        4 => n.clone().prop_map(Input::Ping),
        1 => n.clone().prop_map(Input::RelayPing),
        4 => n.clone().prop_map(Input::Received),
        2 => Just(Input::Relayed),
        1 => n.clone().prop_map(Input::Unreachable),
        1 => Just(Input::LinkChange),
        2 => relay.prop_map(Input::Relay),
        2 => Just(Input::UserPing),
        6 => (0..3000_u16).prop_map(Input::Talk),
        6 => prop_oneof![0..500_u32, 0..100_000_u32].prop_map(Input::Pass),
        3 => n.prop_map(Input::Turn),
    ]
}

/// The network between the two, as far as it answers.
struct World {
    bench: Bench,
    /// Since when an address answers, or does not.
    alive: BTreeMap<SocketAddr, (bool, Instant)>,
    in_flight: Vec<(Instant, SocketAddr, TxId)>,
    /// What it says when it is asked.
    relay: RelayStands,
    is_ready: bool,
    pings: usize,
}

impl World {
    fn new() -> Self {
        let bench = Bench::new();
        let long_ago = bench.now;
        let alive = (0..6).map(|n| (peer(n), (n % 2 == 0, long_ago))).collect();
        Self { bench, alive, in_flight: Vec::new(), relay: RelayStands::Alive, is_ready: false, pings: 0 }
    }

    fn act(&mut self, input: &Input) {
        let (now, path) = (self.bench.now, &mut self.bench.path);
        let peers = |list: &[u8]| list.iter().copied().map(peer).collect::<Vec<_>>();
        match input {
            Input::Ready => {
                self.is_ready = true;
                path.handle_ready(now);
            }
            Input::Node(list) => path.handle_node(now, &peers(list)),
            Input::Call(list) => path.handle_call_me_maybe(now, &peers(list)),
            Input::Own(list) => {
                path.handle_own_endpoints(now, &list.iter().copied().map(own).collect::<Vec<_>>());
            }
            Input::Policy(policy) => path.set_policy(now, *policy),
            Input::Ping(n) => {
                self.bench.hear(peer(*n));
            }
            Input::RelayPing(n) => {
                path.handle_ping(now, RELAY, number(u64::from(*n)));
            }
            Input::Received(n) => path.handle_received(now, Via::Direct(peer(*n))),
            Input::Relayed => path.handle_received(now, RELAY),
            Input::Unreachable(n) if self.alive[&peer(*n)].0 => {}
            Input::Unreachable(n) => path.handle_unreachable(now, peer(*n)),
            Input::LinkChange => path.handle_link_change(now),
            Input::Relay(relay) => {
                self.relay = *relay;
                path.handle_relay(now, *relay);
            }
            Input::UserPing => {
                self.bench.txid += 1;
                path.user_ping(now, number(self.bench.txid));
            }
            Input::Talk(ms) => {
                for _ in 0..ms / 20 {
                    self.bench.path.route(self.bench.now);
                    self.pass(20 * MS);
                }
            }
            Input::Pass(ms) => self.pass(Duration::from_millis(u64::from(*ms))),
            Input::Turn(n) => {
                let state = self.alive.get_mut(&peer(*n)).unwrap();
                *state = (!state.0, now);
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.bench.now + time;
        loop {
            self.check(true);
            let pong = self.in_flight.iter().map(|(at, ..)| *at).min();
            let timer = self.bench.path.poll_timeout();
            let Some(next) = pong.into_iter().chain(timer).min().filter(|next| *next <= end) else { break };
            self.bench.now = self.bench.now.max(next);
            let now = self.bench.now;
            for (_, from, txid) in self.in_flight.extract_if(.., |(at, ..)| *at <= now).collect::<Vec<_>>() {
                self.bench.path.handle_pong(now, Via::Direct(from), txid, own(1));
            }
            self.bench.path.handle_timeout(now);
            assert!(self.bench.path.poll_timeout().is_none_or(|next| next > now), "time stands still");
        }
        self.bench.now = end;
    }

    /// Looks at what is to be done. `is_time`: nothing came about but time and answers.
    fn check(&mut self, is_time: bool) {
        let now = self.bench.now;
        let mut effects = self.bench.taken();
        if effects.contains(&Effect::ProveRelay) {
            self.bench.path.handle_relay(now, self.relay);
            effects.extend(self.bench.taken());
        }
        for effect in effects {
            match effect {
                Effect::Ping { to, txid } => {
                    assert!(self.is_ready, "a ping before the peer knows us");
                    self.pings += 1;
                    if self.alive[&to].0 {
                        self.in_flight.push((now + LATENCY, to, txid));
                    }
                }
                Effect::RelayPing { .. } => assert!(self.is_ready),
                Effect::Changed { from, to, .. } if is_time => self.check_change(from, to),
                Effect::CallMeMaybe(list) => assert!(list.len() <= candidates::MAX_CANDIDATES),
                Effect::Changed { .. } | Effect::RefreshEndpoints | Effect::ProveRelay => {}
                Effect::Verified(_) | Effect::Forgotten(_) => {}
            }
        }
        self.check_memory();
    }

    fn check_change(&self, from: Option<SocketAddr>, to: Option<SocketAddr>) {
        if let Some(to) = to {
            assert!(!self.is_steadily(to, false), "{to} is taken and does not answer");
        }
        let Some(from) = from.filter(|from| self.is_steadily(*from, true)) else { return };
        let is_gone = !self.bench.path.candidates.contains(&from);
        assert!(to.is_some() || is_gone, "{from} answers and is left for the relay");
    }

    fn is_steadily(&self, address: SocketAddr, is_alive: bool) -> bool {
        let (alive, since) = self.alive[&address];
        alive == is_alive && self.bench.now - since >= STEADY
    }

    fn check_memory(&self) {
        let path = &self.bench.path;
        assert!(path.candidates.len() <= candidates::MAX_CANDIDATES);
        assert!(path.outstanding.len() <= outstanding::MAX_OUTSTANDING);
        assert!(path.outbox.len() == 0, "it was drained");
        assert!(path.calling.len() <= candidates::MAX_CANDIDATES);
        assert!(path.verified.len() <= MAX_VERIFIED);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn no_path_that_answers_is_left_for_one_that_does_not_and_time_moves_on(inputs in vec(input(), 1..80)) {
        let mut world = World::new();
        for input in &inputs {
            world.act(input);
            world.check(matches!(input, Input::Pass(_) | Input::Talk(_)));
        }
        let elapsed = (world.bench.now - world.bench.start).as_secs_f64();
        let inputs = inputs.len();
        // Six addresses, each at most ten times a second; and at once after what just happened.
        prop_assert!(world.pings as f64 <= 60.0 * elapsed + 12.0 * inputs as f64, "{} in {elapsed}", world.pings);
    }

    #[test]
    fn effects_that_nobody_fetches_do_not_pile_up(inputs in vec(input(), 1..200)) {
        let mut world = World::new();
        for input in &inputs {
            match input {
                Input::Talk(_) | Input::Pass(_) => {
                    world.bench.now += S;
                    world.bench.path.route(world.bench.now);
                    world.bench.path.handle_timeout(world.bench.now);
                }
                _ => world.act(input),
            }
            prop_assert!(world.bench.path.outbox.len() <= outbox::MAX_EFFECTS);
        }
    }
}
