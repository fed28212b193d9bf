//! Messages on their way between peers, and what paths want done.

use std::{net::SocketAddr, time::Duration};

use rand::RngExt;
use warren_core::path::{Direct, Effect, Via, Why};
use warren_proto::disco::{PADDED, TxId};

use super::{Event, Packet, RELAY_DELAY, World};
use crate::{
    loss::Loss,
    peer::{Heard, Outgoing, Peer, PeerId, Said},
    promises::LONGEST_BAR,
    tunnel::Message,
};

/// For the relay's answer, when the direct path seems dead.
const PROOF_LIMIT: Duration = Duration::from_secs(1);
/// Answers to what was sent before a change have arrived by then.
const STEADY_AFTER: Duration = Duration::from_secs(2);

impl World {
    pub(super) fn hear(&mut self, id: PeerId, sender: PeerId, via: Via, said: Said) {
        match &said {
            Said::WireGuard(message) => self.open(id, sender, via, message),
            Said::Ping(_) | Said::Pong { .. } | Said::CallMeMaybe(_) => {
                match (self.peers[id.0].probe(self.now, sender, via, said), via) {
                    (Some(answer), Via::Direct(to)) => self.send(id, to, sender, answer),
                    (Some(answer), Via::Relay(_)) => self.relay(id, sender, answer),
                    (None, _) => {}
                }
            }
        }
        self.carry_out(id);
    }

    fn open(&mut self, id: PeerId, sender: PeerId, via: Via, message: &Message) {
        match self.peers[id.0].open(self.now, sender, via, message) {
            Ok(Heard { is_news, outgoing }) => {
                self.transmit(id, outgoing);
                if is_news && self.peers[id.0].is_answering {
                    self.send_packet(id, sender);
                }
            }
            Err(loss) => self.lose_message(sender, id, message, loss),
        }
    }

    pub(super) fn transmit(&mut self, from: PeerId, outgoing: impl IntoIterator<Item = Outgoing>) {
        for Outgoing { to, message, route } in outgoing {
            if let Some(address) = route.direct {
                self.send(from, address, to, Said::WireGuard(message.clone()));
            }
            if route.relay {
                self.relay(from, to, Said::WireGuard(message));
            }
        }
    }

    pub(super) fn lose(&mut self, from: PeerId, to: PeerId, said: &Said, loss: Loss) {
        if let Said::WireGuard(message) = said {
            self.lose_message(from, to, message, loss);
        }
    }

    fn lose_message(&mut self, from: PeerId, to: PeerId, message: &Message, loss: Loss) {
        if let Some(number) = message.number {
            self.peers[from.0].other(to).losses.note(number, loss);
        }
    }

    /// Carries out what the paths of a peer want done.
    pub(super) fn carry_out(&mut self, id: PeerId) {
        for to in self.ids().filter(|to| *to != id) {
            loop {
                let chance = &mut self.chance;
                let mut txid = || -> TxId { chance.random() };
                let Some(effect) = self.peers[id.0].other(to).path.poll_effect(&mut txid) else { break };
                self.effect(id, to, effect);
            }
        }
    }

    fn effect(&mut self, id: PeerId, to: PeerId, effect: Effect) {
        match effect {
            Effect::Ping { to: address, txid } => {
                self.send(id, address, to, Said::Ping(txid));
                let is_there = self.who_answers(id, address) == Some(to);
                self.seen.pinged.insert((id, to, address), is_there);
            }
            Effect::RelayPing { txid } => self.relay(id, to, Said::Ping(txid)),
            Effect::CallMeMaybe(endpoints) => self.relay(id, to, Said::CallMeMaybe(endpoints)),
            Effect::RefreshEndpoints => self.look_for_addresses(id),
            Effect::ProveRelay => {
                self.peers[id.0].relay.prove(self.now);
                self.at(PROOF_LIMIT, Event::Proof(id, self.now));
            }
            Effect::Changed { from, to: now_at, why } => self.changed((id, to), from, now_at, why),
            Effect::Verified(address) => self.peers[id.0].verify(address, to),
            Effect::Forgotten(address) => self.peers[id.0].forget(address, to),
        }
    }

    /// A peer of ours takes another way: once it had the time to notice what does not work any more, one that works, and
    /// no other instead of one that works.
    fn changed(
        &mut self,
        (id, other): (PeerId, PeerId),
        from: Option<SocketAddr>,
        to: Option<SocketAddr>,
        why: Why,
    ) {
        self.seen.changes.push((self.now, id, to));
        if why == Why::Flapping {
            self.seen.let_be_at.insert((id, other), self.now);
        }
        if self.now <= self.changed_at + STEADY_AFTER {
            return;
        }
        match to {
            Some(address) => {
                assert_eq!(
                    self.who_answers(id, address),
                    Some(other),
                    "{id:?} takes {address}, which is dead"
                );
            }
            None if why == Why::Forbidden || !self.loses_nothing_by_chance() => {}
            None => {
                // Who lets direct paths be answers nobody. That it works since the last ping nobody can know yet.
                let at = self.seen.let_be_at.get(&(other, id));
                let lets_be = at.is_some_and(|at| self.now < *at + LONGEST_BAR);
                let works = |from| self.who_answers(id, from) == Some(other);
                let could_answer = |from| self.seen.pinged.get(&(id, other, from)) != Some(&false);
                let was_dead = lets_be || !from.is_some_and(|from| works(from) && could_answer(from));
                let carries = self.peers[id.0].relay.carries();
                assert!(was_dead || carries, "{id:?} leaves {from:?} for a relay that is dead: {why:?}");
            }
        }
    }

    /// Who would answer the largest probe of a peer that it sent to an address now, by chance or always.
    pub(crate) fn who_answers(&self, id: PeerId, address: SocketAddr) -> Option<PeerId> {
        let one = &self.peers[id.0];
        let (host, at, seen) = self.network.reached(self.now, one.host, one.port, address)?;
        let is_there = |id: &PeerId| {
            let other = &self.peers[id.0];
            other.host == host && other.port == at.port() && other.policy == Direct::Allowed
        };
        let id = self.ids().find(is_there)?;
        let other = &self.peers[id.0];
        let (host, at, _) = self.network.reached(self.now, other.host, other.port, seen)?;
        (host == one.host && at.port() == one.port).then_some(id)
    }

    fn send(&mut self, from: PeerId, address: SocketAddr, to: PeerId, said: Said) {
        let length = if let Said::WireGuard(message) = &said { message.length() } else { PADDED };
        self.note_sent(from, &said);
        let Peer { host, port, .. } = self.peers[from.0];
        debug_assert_ne!(from, to);
        let packet = Packet::Said { from, to, said };
        if !self.network.send(self.now, host, port, address, length, packet) {
            self.peers[from.0].other(to).path.handle_unreachable(self.now, address);
        }
    }

    fn relay(&mut self, from: PeerId, to: PeerId, said: Said) {
        self.note_sent(from, &said);
        if self.peers[from.0].relay.send(self.now) {
            self.at(RELAY_DELAY, Event::Relayed { from, to, said });
        } else {
            self.lose(from, to, &said, Loss::Relay);
        }
    }

    fn note_sent(&mut self, from: PeerId, said: &Said) {
        if matches!(said, Said::WireGuard(message) if message.number.is_some()) {
            return;
        }
        if self.now >= self.second.0 + Duration::from_secs(1) {
            self.second = (self.now, vec![0; self.peers.len()]);
        }
        self.second.1[from.0] += 1;
        let busiest = &mut self.seen.busiest_second[from.0];
        *busiest = self.second.1[from.0].max(*busiest);
    }
}
