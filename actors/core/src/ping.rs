//! Pings: who is due, what is outstanding, what an answer means (vpn-protocol 8).
//!
//! Every peer is pinged on a grid of 5 s. A peer that was just programmed is pinged at once, and again
//! after a quarter of a second, half a second, a second, until its first answer or the next tick. All
//! pings to a peer until its first answer are one round with one result: answered, or timed out.
//! Work is linear in the number of peers.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use uuid::Uuid;
use warren_proto::key::NodePublic;

use crate::{
    coordination::{NetworkMap, Peer},
    home::Report,
    relay_map::{RegionId, RelayMap},
    roster::PingReport,
};

/// How often every peer is pinged.
pub const TICK: Duration = Duration::from_secs(5);
/// How long an answer counts.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// The first pause of quick pings; it doubles.
const QUICK_PAUSE: Duration = Duration::from_millis(250);
/// Pings sent at once. Answers to more would meet in the relay's queue for us, which holds 512.
const BURST: usize = 128;
/// Between two bursts: 1000 agents are pinged within 160 ms.
const BURST_PAUSE: Duration = Duration::from_millis(20);
/// How many people may wait for a ping at the same time.
pub const MAX_WAITERS: usize = 256;

/// What tells pings apart; random, so that nobody answers what he has not seen.
pub type TxId = [u8; 12];

/// A ping to send now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ping {
    /// The agent to be pinged.
    pub agent: Uuid,
    /// Its key.
    pub peer: NodePublic,
    /// What the answer must carry.
    pub txid: TxId,
}

/// What is due. `W` is whatever the owner tells a waiter by.
#[derive(Debug, PartialEq, Eq)]
pub struct Due<W> {
    /// What to send; each that cannot be sent is reported by [`Pings::unsent`].
    pub pings: Vec<Ping>,
    /// Agents whose round ended without an answer.
    pub timed_out: Vec<Uuid>,
    /// Who has waited long enough.
    pub gave_up: Vec<W>,
}

/// An answer that was waited for.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer<W> {
    /// Who answered.
    pub agent: Uuid,
    /// The round trip.
    pub latency: Duration,
    /// Who waits for it.
    pub waiters: Vec<W>,
}

/// Why a ping on demand was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PingRefused {
    /// The agent is not programmed: it is not connected, or does not know us yet.
    #[error("no matching peer")]
    NoPeer,
    /// Too many wait already.
    #[error("too many pings are waited for")]
    Busy,
}

/// The schedule of pings and what is outstanding.
#[derive(Debug)]
pub struct Pings<W> {
    agents: BTreeMap<Uuid, Agent>,
    outstanding: BTreeMap<TxId, Sent>,
    quick: BTreeSet<(Instant, Uuid)>,
    /// Whose ping is due and has not been sent.
    queue: BTreeSet<Uuid>,
    burst: Burst,
    waiters: Vec<Waiter<W>>,
    next_tick: Instant,
}

/// How many pings may still be sent before a moment.
#[derive(Debug)]
struct Burst {
    left: usize,
    ends: Instant,
}

#[derive(Debug)]
struct Agent {
    peer: NodePublic,
    /// Whether the last round that ended was answered.
    is_answering: bool,
    round: Option<Round>,
}

/// The pings to one agent until its first answer.
#[derive(Debug)]
struct Round {
    started: Instant,
    pings: Vec<TxId>,
    last_sent: Option<Instant>,
    quick: Option<Quick>,
}

#[derive(Debug, Clone, Copy)]
struct Quick {
    due: Instant,
    pause: Duration,
}

#[derive(Debug)]
struct Sent {
    agent: Uuid,
    at: Instant,
}

#[derive(Debug)]
struct Waiter<W> {
    agent: Uuid,
    until: Instant,
    reply: W,
}

impl<W> Pings<W> {
    /// A schedule without peers; its grid of ticks starts at `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            agents: BTreeMap::new(),
            outstanding: BTreeMap::new(),
            quick: BTreeSet::new(),
            queue: BTreeSet::new(),
            burst: Burst { left: 0, ends: now },
            waiters: Vec::new(),
            next_tick: now + TICK,
        }
    }

    /// Takes the programmed peers. New ones, and those with a new key, are due at once. Returns those
    /// who wait for an agent that is gone.
    pub fn set_peers(&mut self, now: Instant, map: &NetworkMap) -> Vec<W> {
        let gone =
            |(id, agent): (&Uuid, &Agent)| map.peers.get(id).is_none_or(|peer| peer.node_key != agent.peer);
        let gone: Vec<Uuid> = self.agents.iter().filter(|it| gone(*it)).map(|(id, _)| *id).collect();
        for id in gone {
            self.end_round(&id);
            self.agents.remove(&id);
            self.queue.remove(&id);
        }
        for (id, Peer { node_key, .. }) in &map.peers {
            if !self.agents.contains_key(id) {
                self.agents.insert(*id, Agent { peer: *node_key, is_answering: false, round: None });
                self.hurry(now, id);
            }
        }
        self.take_waiters(|waiter, agents| !agents.contains_key(&waiter.agent))
    }

    /// A path came up: agents that do not answer are pinged again at once and quickly.
    pub fn handle_path_up(&mut self, now: Instant) {
        let silent = self.agents.iter().filter(|(_, agent)| !agent.is_answering).map(|(id, _)| *id);
        for id in silent.collect::<Vec<_>>() {
            self.hurry(now, &id);
        }
    }

    /// The machine woke up, or the network changed: everybody is pinged at once, and quickly until they answer.
    pub fn handle_wake(&mut self, now: Instant) {
        for id in self.agents.keys().copied().collect::<Vec<_>>() {
            self.hurry(now, &id);
        }
    }

    /// The agents that answer, as far as is known.
    pub fn answering(&self) -> impl Iterator<Item = Uuid> {
        self.agents.iter().filter(|(_, agent)| agent.is_answering).map(|(id, _)| *id)
    }

    /// Pings one agent at once; `reply` comes back with its answer, or when `until` has passed.
    pub fn ping_now(
        &mut self,
        now: Instant,
        agent: Uuid,
        until: Instant,
        reply: W,
    ) -> Result<(), (PingRefused, W)> {
        if !self.agents.contains_key(&agent) {
            return Err((PingRefused::NoPeer, reply));
        }
        if self.waiters.len() >= MAX_WAITERS {
            return Err((PingRefused::Busy, reply));
        }
        self.waiters.push(Waiter { agent, until, reply });
        self.hurry(now, &agent);
        Ok(())
    }

    /// When [`Self::handle_timeout`] is due next.
    pub fn poll_timeout(&self) -> Instant {
        let quick = self.quick.first().map(|(due, _)| *due);
        let burst = (!self.queue.is_empty()).then_some(self.burst.ends);
        let waiters = self.waiters.iter().map(|waiter| waiter.until);
        waiters.chain(quick).chain(burst).fold(self.next_tick, Instant::min)
    }

    /// Lets time pass. `txid` gives a fresh random number for each ping.
    pub fn handle_timeout(&mut self, now: Instant, mut txid: impl FnMut() -> TxId) -> Due<W> {
        let gave_up = self.take_waiters(|waiter, _| waiter.until <= now);
        let mut timed_out = Vec::new();
        if self.next_tick <= now {
            timed_out = self.tick(now);
            self.queue = self.agents.keys().copied().collect();
        } else {
            let due = self.take_quick(now);
            self.queue.extend(due);
        }
        let pings = self.take_burst(now).iter().filter_map(|id| self.send(now, id, txid())).collect();
        Due { pings, timed_out, gave_up }
    }

    /// A ping could not be sent, because no path to the peer is up. It does not count.
    pub fn unsent(&mut self, txid: &TxId) {
        let Some(sent) = self.outstanding.remove(txid) else { return };
        let Some(agent) = self.agents.get_mut(&sent.agent) else { return };
        if let Some(round) = &mut agent.round {
            round.pings.retain(|ping| ping != txid);
            if round.pings.is_empty() {
                round.last_sent = None;
            }
        }
    }

    /// Takes an answer from `peer`. `None` for one that was not asked for, came too late, came from
    /// another peer, or follows the first of its round.
    pub fn handle_pong(&mut self, txid: &TxId, peer: &NodePublic, received_at: Instant) -> Option<Answer<W>> {
        let sent = self.outstanding.get(txid)?;
        let (id, latency) = (sent.agent, received_at.saturating_duration_since(sent.at));
        let agent = self.agents.get_mut(&id).filter(|agent| agent.peer == *peer && latency <= TIMEOUT)?;
        agent.is_answering = true;
        self.end_round(&id);
        Some(Answer { agent: id, latency, waiters: self.take_waiters(|waiter, _| waiter.agent == id) })
    }
}

impl<W> Pings<W> {
    /// Ends the rounds that got their time, and moves on along the grid; ticks missed are lost.
    fn tick(&mut self, now: Instant) -> Vec<Uuid> {
        let mut tick = self.next_tick;
        while tick + TICK <= now {
            tick += TICK;
        }
        self.next_tick = tick + TICK;
        self.quick.clear();
        let mut timed_out = Vec::new();
        for (id, agent) in &mut self.agents {
            let round = agent.round.get_or_insert_with(|| Round::new(tick));
            round.quick = None;
            if tick.saturating_duration_since(round.started) < TIMEOUT {
                continue;
            }
            if !round.pings.is_empty() {
                timed_out.push(*id);
            }
            for ping in &round.pings {
                self.outstanding.remove(ping);
            }
            agent.is_answering = false;
            agent.round = Some(Round::new(tick));
        }
        timed_out
    }

    /// Has an agent pinged at once, or as soon as the last ping had a moment, and quickly from then on.
    fn hurry(&mut self, now: Instant, id: &Uuid) {
        let Some(agent) = self.agents.get_mut(id) else { return };
        let round = agent.round.get_or_insert_with(|| Round::new(now));
        let due = round.last_sent.map_or(now, |at| now.max(at + QUICK_PAUSE));
        if let Some(quick) = round.quick.replace(Quick { due, pause: QUICK_PAUSE }) {
            self.quick.remove(&(quick.due, *id));
        }
        self.quick.insert((due, *id));
    }

    fn take_quick(&mut self, now: Instant) -> Vec<Uuid> {
        let mut due = Vec::new();
        while let Some((at, id)) = self.quick.first().copied().filter(|(at, _)| *at <= now) {
            self.quick.remove(&(at, id));
            due.push(id);
        }
        due
    }

    fn take_burst(&mut self, now: Instant) -> Vec<Uuid> {
        if !self.queue.is_empty() && self.burst.ends <= now {
            self.burst = Burst { left: BURST, ends: now + BURST_PAUSE };
        }
        let count = self.burst.left.min(self.queue.len());
        self.burst.left -= count;
        std::iter::from_fn(|| self.queue.pop_first()).take(count).collect()
    }

    fn send(&mut self, now: Instant, id: &Uuid, txid: TxId) -> Option<Ping> {
        let agent = self.agents.get_mut(id)?;
        let round = agent.round.as_mut()?;
        round.pings.push(txid);
        round.last_sent = Some(now);
        if let Some(quick) = &mut round.quick {
            *quick = Quick { due: now + quick.pause, pause: quick.pause * 2 };
            self.quick.insert((quick.due, *id));
        }
        self.outstanding.insert(txid, Sent { agent: *id, at: now });
        Some(Ping { agent: *id, peer: agent.peer, txid })
    }

    fn end_round(&mut self, id: &Uuid) {
        let Some(round) = self.agents.get_mut(id).and_then(|agent| agent.round.take()) else { return };
        for ping in &round.pings {
            self.outstanding.remove(ping);
        }
        if let Some(quick) = round.quick {
            self.quick.remove(&(quick.due, *id));
        }
    }

    fn take_waiters(
        &mut self,
        mut is_done: impl FnMut(&Waiter<W>, &BTreeMap<Uuid, Agent>) -> bool,
    ) -> Vec<W> {
        let agents = &self.agents;
        self.waiters.extract_if(.., |waiter| is_done(waiter, agents)).map(|waiter| waiter.reply).collect()
    }
}

impl Round {
    fn new(started: Instant) -> Self {
        Self { started, pings: Vec::new(), last_sent: None, quick: None }
    }
}

/// What a manager is told of an answer: `region` is the relay region it came through, `None` a direct
/// path; then our home region stands for it. Regions are told apart by name there, so of several with one name the
/// nearest counts.
pub fn report(
    latency: Duration,
    region: Option<RegionId>,
    map: &RelayMap,
    home: Option<RegionId>,
    latencies: &Report,
) -> PingReport {
    let region_name = map.region_name(region.or(home));
    let named = latencies.iter().filter(|(id, _)| map.region_name(Some(**id)) == region_name);
    let region_latency = named.filter_map(|(_, latency)| latency.best()).min();
    PingReport { latency, direct: region.is_none(), region_name, region_latency }
}

#[cfg(test)]
mod tests;
