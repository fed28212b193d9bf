//! The pinger: asks every agent every 5 s whether it is there, and agents that just became reachable at once
//! (vpn-protocol 8). What an answer means is decided in [`warren_core::ping`]; this shell sends, keeps time,
//! and hands results to the registry. Who wants to know whether packets get through is served by
//! [`warren_core::reach`].
//!
//! Owns no cell: results live in the registry's table. A crash loses the pings that are outstanding, and the
//! successor pings every agent at once.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::{Counter, Histogram, counter, histogram};
use uuid::Uuid;
use warren_core::{
    ping::{self, Ping, PingRefused, Pings, TxId},
    reach::Reaching,
    roster::PingReport,
};
use warren_observability::names;
use warren_proto::key::random;

use crate::{
    data_plane::{PingUnsent, Pong, TsmpPong},
    facts::Net,
    recovery::Plane,
    registry,
    runtime::{Alarm, Context, Part, PartError, Reply},
};

/// The longest that somebody may wait for one answer.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// What the pinger hears.
#[derive(Debug)]
pub enum Message {
    /// The network map changed; which one is in the cell.
    PeersChanged,
    /// A relay link came up, or the data plane knows new peers: agents that were silent may be reachable now.
    PathUp,
    /// The machine woke up, or the network changed: who answered may not any more.
    Woken,
    /// A pong arrived; stamped where it was received, or the mailbox would become latency.
    Pong(Pong),
    /// A pong through WireGuard arrived.
    TsmpPong(TsmpPong),
    /// It is time for whatever is due.
    Due,
    /// Pings one agent at once.
    PingNow {
        /// The agent.
        agent: Uuid,
        /// How long the asker waits, at most 30 s.
        limit: Duration,
        /// Where the answer goes.
        reply: Reply<Result<PingReport, PingFailed>>,
    },
    /// Asks an agent through WireGuard until it answers.
    Reach {
        /// The agent.
        agent: Uuid,
        /// How long the asker waits, at most 30 s.
        limit: Duration,
        /// Where it goes how long the first answer took after its ping.
        reply: Reply<Result<Duration, PingFailed>>,
    },
}

/// Why a ping on demand has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PingFailed {
    /// The agent is not connected to the deployment, or has not made itself known to us yet.
    #[error("the agent is not connected at the moment")]
    NoPeer,
    /// Too many people wait for pings.
    #[error("too many pings at the same time; try again")]
    Busy,
    /// No answer came.
    #[error("no answer in time")]
    Timeout,
}

/// The part.
pub struct Pinger {
    net: Arc<Net>,
}

/// One incarnation of the pinger.
pub struct State {
    pings: Pings<Reply<Result<PingReport, PingFailed>>>,
    reaching: Reaching<Reply<Result<Duration, PingFailed>>>,
    alarm: Alarm,
    counters: Counters,
    silent: Silent,
    /// Who answered when the machine woke up, or the network changed, and is there still.
    missed: BTreeSet<Uuid>,
}

/// Agents whose silence was logged: each is told of once until it answers again.
#[derive(Default)]
struct Silent(BTreeSet<Uuid>);

struct Counters {
    answered: Counter,
    timed_out: Counter,
    unsent: Counter,
    relayed: Histogram,
    direct: Histogram,
}

impl Pinger {
    /// For one Boot.
    pub fn new(net: Arc<Net>) -> Self {
        Self { net }
    }
}

impl Part for Pinger {
    type Message = Message;
    type State = State;

    async fn start(&self, context: &Context<Message>) -> Result<State, PartError> {
        context.follow(self.net.network_map.view(), || Message::PeersChanged);
        let mut state = State {
            pings: Pings::new(Instant::now()),
            reaching: Reaching::default(),
            alarm: Alarm::default(),
            counters: Counters::new(),
            silent: Silent::default(),
            missed: BTreeSet::new(),
        };
        state.set_alarm(context);
        Ok(state)
    }

    async fn handle(
        &self,
        context: &Context<Message>,
        state: &mut State,
        message: Message,
    ) -> Result<(), PartError> {
        let now = Instant::now();
        match message {
            Message::PeersChanged => {
                let map = self.net.network_map.get();
                state.silent.0.retain(|agent| map.peers.contains_key(agent));
                state.missed.retain(|agent| map.peers.contains_key(agent));
                if state.missed.is_empty() {
                    self.net.recovery.give_up(Plane::Data);
                }
                for waiter in state.pings.set_peers(now, &map) {
                    let _ = waiter.send(Err(PingFailed::NoPeer));
                }
                for waiter in state.reaching.set_peers(&map) {
                    let _ = waiter.send(Err(PingFailed::NoPeer));
                }
            }
            Message::PathUp => state.pings.handle_path_up(now),
            Message::Woken => {
                // What did not get through before is not waited for.
                let answering: BTreeSet<Uuid> = state.pings.answering().collect();
                if !answering.is_empty() {
                    state.missed = answering;
                    self.net.recovery.begin(Plane::Data, now);
                }
                state.pings.handle_wake(now);
            }
            Message::Pong(pong) => self.take_pong(state, pong),
            Message::PingNow { agent, limit, reply } => {
                if let Err((refused, reply)) =
                    state.pings.ping_now(now, agent, now + limit.min(MAX_WAIT), reply)
                {
                    let _ = reply.send(Err(refused.into()));
                }
            }
            Message::Reach { agent, limit, reply } => self.reach(state, agent, limit, reply),
            Message::TsmpPong(TsmpPong { peer, data, received_at }) => {
                if let Some((waiter, took)) = state.reaching.handle_pong(&peer, &data, received_at) {
                    let _ = waiter.send(Ok(took));
                }
            }
            Message::Due => {}
        }
        self.send_due(state);
        self.send_tsmp(state);
        state.set_alarm(context);
        Ok(())
    }
}

impl Pinger {
    fn send_due(&self, state: &mut State) {
        let now = Instant::now();
        if state.pings.poll_timeout() > now {
            return;
        }
        let due = state.pings.handle_timeout(now, random);
        for waiter in due.gave_up {
            let _ = waiter.send(Err(PingFailed::Timeout));
        }
        state.counters.timed_out.increment(due.timed_out.len() as u64);
        for agent in due.timed_out {
            if state.silent.begins(agent) {
                tracing::warn!(%agent, "an agent does not answer pings");
            }
        }
        for Ping { peer, txid, .. } in due.pings {
            match self.net.data_plane.send_ping(peer, txid) {
                Ok(()) => {}
                Err(
                    PingUnsent::UnknownPeer
                    | PingUnsent::NoLink
                    | PingUnsent::QueueFull
                    | PingUnsent::Unreachable,
                ) => {
                    state.pings.unsent(&txid);
                    state.counters.unsent.increment(1);
                }
            }
        }
    }

    fn reach(
        &self,
        state: &mut State,
        agent: Uuid,
        limit: Duration,
        reply: Reply<Result<Duration, PingFailed>>,
    ) {
        let Some(peer) = self.net.network_map.get().peers.get(&agent).map(|peer| peer.node_key) else {
            let _ = reply.send(Err(PingFailed::NoPeer));
            return;
        };
        let now = Instant::now();
        if let Err(reply) = state.reaching.begin(now, (agent, peer), now + limit.min(MAX_WAIT), reply) {
            let _ = reply.send(Err(PingFailed::Busy));
        }
    }

    fn send_tsmp(&self, state: &mut State) {
        let due = state.reaching.handle_timeout(Instant::now(), random, rand::random);
        for waiter in due.gave_up {
            let _ = waiter.send(Err(PingFailed::Timeout));
        }
        for (peer, data) in due.pings {
            if let Err(error) = self.net.data_plane.send_tsmp_ping(&peer, data) {
                // The next one of the series may find it.
                tracing::debug!(?error, "no ping through WireGuard");
            }
        }
    }

    fn take_pong(&self, state: &mut State, pong: Pong) {
        if let Some(asked) = pong.received_at.checked_sub(pong.latency) {
            self.net.recovery.works(Plane::Data, asked, pong.received_at);
        }
        let txid: &TxId = &pong.txid;
        let Some(answer) = state.pings.handle_pong(txid, &pong.peer, pong.received_at) else { return };
        let report = ping::report(
            answer.latency,
            pong.region,
            &self.net.relay_map.get(),
            *self.net.home.get(),
            &self.net.latencies.get(),
        );
        state.counters.count(&report);
        if state.silent.ends(&answer.agent) {
            tracing::info!(agent = %answer.agent, "an agent answers pings again");
        }
        for waiter in answer.waiters {
            let _ = waiter.send(Ok(report.clone()));
        }
        let pinged = registry::Message::Pinged { agent: answer.agent, report };
        if let Err(error) = self.net.registry.try_send(pinged) {
            // The next tick has a newer result.
            tracing::debug!(%error, "the result of a ping is not recorded");
        }
    }
}

impl Silent {
    /// An agent did not answer; whether that is news.
    fn begins(&mut self, agent: Uuid) -> bool {
        self.0.insert(agent)
    }

    /// An agent answered; whether that is news.
    fn ends(&mut self, agent: &Uuid) -> bool {
        self.0.remove(agent)
    }
}

impl State {
    fn set_alarm(&mut self, context: &Context<Message>) {
        let due = self.reaching.poll_timeout().into_iter().fold(self.pings.poll_timeout(), Instant::min);
        self.alarm.set(context, Some(due), Message::Due);
    }
}

impl Counters {
    fn new() -> Self {
        let result = |result: &'static str| counter!(names::PINGS, "result" => result);
        let path = |path: &'static str| histogram!(names::PING_DURATION, "connection_type" => path);
        Self {
            answered: result("ok"),
            timed_out: result("timeout"),
            unsent: result("unsent"),
            relayed: path("derp"),
            direct: path("p2p"),
        }
    }

    fn count(&self, report: &PingReport) {
        self.answered.increment(1);
        let histogram = if report.direct { &self.direct } else { &self.relayed };
        histogram.record(report.latency);
    }
}

impl From<PingRefused> for PingFailed {
    fn from(refused: PingRefused) -> Self {
        match refused {
            PingRefused::NoPeer => Self::NoPeer,
            PingRefused::Busy => Self::Busy,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use warren_core::{
        coordination::{NetworkMap, Peer},
        relay_map::RegionId,
    };
    use warren_proto::key::{DiscoPublic, NodePublic};

    use super::*;
    use crate::{
        facts::NetworkOwner,
        relay::tests::net,
        runtime::{Tasks, ears::ears},
    };

    #[tokio::test]
    async fn an_agent_that_is_not_programmed_is_not_pinged_and_the_asker_hears_why() {
        let mut setting = Setting::new().await;
        let (reply, answer) = oneshot::channel();
        let agent = Uuid::from_u128(9);
        setting.hear(Message::PingNow { agent, limit: Duration::from_secs(1), reply }).await;
        assert_eq!(answer.await.unwrap(), Err(PingFailed::NoPeer));
    }

    #[tokio::test]
    async fn an_asker_whose_agent_vanishes_hears_so_at_once() {
        let mut setting = Setting::new().await;
        setting.set_peers(&[1]).await;
        let (reply, answer) = oneshot::channel();
        setting.hear(Message::PingNow { agent: Uuid::from_u128(1), limit: MAX_WAIT, reply }).await;
        setting.set_peers(&[]).await;
        assert_eq!(answer.await.unwrap(), Err(PingFailed::NoPeer));
    }

    #[tokio::test]
    async fn an_asker_waits_no_longer_than_he_wants() {
        let mut setting = Setting::new().await;
        setting.set_peers(&[1]).await;
        let (reply, answer) = oneshot::channel();
        setting.hear(Message::PingNow { agent: Uuid::from_u128(1), limit: Duration::ZERO, reply }).await;
        assert_eq!(answer.await.unwrap(), Err(PingFailed::Timeout));
    }

    #[tokio::test]
    async fn a_pong_that_was_asked_for_is_a_result_and_another_one_is_not() {
        let mut setting = Setting::new().await;
        setting.set_peers(&[1]).await;
        let mut registry = ears(&setting.part.net.registry).await;
        setting.hear(Message::Pong(pong([7; 12]))).await;
        setting.ask([8; 12]);
        setting.hear(Message::Pong(pong([8; 12]))).await;
        let first = registry.recv().await.unwrap();
        assert!(
            matches!(&first, registry::Message::Pinged { agent, .. } if agent.as_u128() == 1),
            "{first:?}"
        );
        assert!(registry.try_recv().is_err(), "the stray one is none");
    }

    #[tokio::test]
    async fn that_packets_get_through_again_is_waited_for_only_where_they_did_and_somebody_is_there() {
        let mut setting = Setting::new().await;
        let net = Arc::clone(&setting.part.net);
        setting.hear(Message::Woken).await;
        setting.set_peers(&[1]).await;
        setting.hear(Message::Woken).await;
        assert_eq!(net.recovery.waits_for(), [], "nobody has ever answered");
        setting.ask([8; 12]);
        setting.hear(Message::Pong(pong([8; 12]))).await;
        setting.hear(Message::Woken).await;
        assert_eq!(net.recovery.waits_for(), [Plane::Data]);
        setting.set_peers(&[1, 2]).await;
        assert_eq!(net.recovery.waits_for(), [Plane::Data]);
        setting.set_peers(&[2]).await;
        assert_eq!(net.recovery.waits_for(), [], "nobody is left who answered");
    }

    #[tokio::test]
    async fn who_asks_whether_packets_get_through_hears_why_there_is_no_answer() {
        let mut setting = Setting::new().await;
        let agent = Uuid::from_u128(1);
        let (reply, nobody) = oneshot::channel();
        setting.hear(Message::Reach { agent, limit: MAX_WAIT, reply }).await;
        assert_eq!(nobody.await.unwrap(), Err(PingFailed::NoPeer));
        setting.set_peers(&[1]).await;
        let (reply, too_late) = oneshot::channel();
        setting.hear(Message::Reach { agent, limit: Duration::ZERO, reply }).await;
        assert_eq!(too_late.await.unwrap(), Err(PingFailed::Timeout));
        let (reply, gone) = oneshot::channel();
        setting.hear(Message::Reach { agent, limit: MAX_WAIT, reply }).await;
        let pong = TsmpPong { peer: key(1), data: [7; 8], received_at: Instant::now() };
        setting.hear(Message::TsmpPong(pong)).await;
        setting.set_peers(&[]).await;
        assert_eq!(gone.await.unwrap(), Err(PingFailed::NoPeer), "nobody had asked that");
    }

    /// Conforms: vpn:15.11
    #[test]
    fn the_silence_of_an_agent_is_told_once_until_it_answers_again() {
        let (mut silent, agent) = (Silent::default(), Uuid::from_u128(1));
        assert!(!silent.ends(&agent), "who was not silent");
        for _ in 0..2 {
            assert!(silent.begins(agent));
            assert!(!silent.begins(agent), "not at every tick");
            assert!(silent.ends(&agent));
        }
    }

    struct Setting {
        part: Pinger,
        context: Context<Message>,
        state: State,
    }

    impl Setting {
        async fn new() -> Self {
            let net = Arc::new(net(NetworkOwner::Nobody));
            let context = Context { me: net.pinger.clone(), tasks: Tasks::default() };
            let part = Pinger::new(net);
            let state = part.start(&context).await.unwrap();
            Self { part, context, state }
        }

        async fn hear(&mut self, message: Message) {
            self.part.handle(&self.context, &mut self.state, message).await.unwrap();
        }

        /// Has the first agent's next ping carry this.
        fn ask(&mut self, txid: TxId) {
            self.state.pings.handle_wake(Instant::now());
            self.state.pings.handle_timeout(Instant::now(), || txid);
        }

        async fn set_peers(&mut self, ids: &[u8]) {
            let peer = |id: &u8| Peer {
                node_key: key(*id),
                disco_key: DiscoPublic([1; 32]),
                home: RegionId(1),
                addresses: Vec::new(),
                keepalive: false,
                endpoints: Vec::new(),
                announcements: 1,
            };
            let peers = ids.iter().map(|id| (Uuid::from_u128(u128::from(*id)), peer(id))).collect();
            self.part.net.network_map.claim().unwrap().set(NetworkMap { peers });
            self.hear(Message::PeersChanged).await;
        }
    }

    fn pong(txid: TxId) -> Pong {
        Pong {
            peer: key(1),
            txid,
            region: Some(RegionId(1)),
            latency: Duration::from_millis(1),
            is_user: true,
            received_at: Instant::now(),
        }
    }

    fn key(id: u8) -> NodePublic {
        NodePublic([id; 32])
    }
}
