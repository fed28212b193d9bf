//! The data plane's metrics. Handles are taken once; a batch counts in a [`Tally`] of its own and adds
//! it at its end.

use metrics::{Counter, counter};
use warren_core::path::Why;
use warren_observability::names;

/// Why a packet was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drop {
    /// From a key that is no peer's.
    UnknownPeer,
    /// The engine did not accept it: forged, repeated, or of a session that is over.
    Refused,
    /// What was inside is no IP packet.
    Inner,
    /// The inner source is not the peer's.
    Source,
    /// The inner destination is not ours.
    Destination,
    /// A path probe that does not open or is not the peer's.
    Disco,
    /// WireGuard over UDP from an address that is no peer's.
    UnknownSource,
    /// STUN that is no answer.
    Stun,
    /// There is no device to deliver to.
    NoDevice,
    /// The device refused it.
    Device,
    /// No packet, or one that contradicts itself.
    Malformed,
    /// No peer has the destination.
    NoRoute,
    /// There is no link to where the peer listens.
    NoLink,
    /// The link's queue, or the socket's, is full.
    QueueFull,
    /// The system says that there is no way to the address.
    Unreachable,
    /// The path does not carry it in one piece.
    TooBig,
    /// The socket would not send it.
    Socket,
    /// The engine would not seal it.
    Unsealed,
    /// It waited for a session that never came.
    NoSession,
}

const DROPS: [(Drop, &str, &str); 19] = [
    (Drop::UnknownPeer, "receive", "unknown_peer"),
    (Drop::Refused, "receive", "refused"),
    (Drop::Inner, "receive", "inner"),
    (Drop::Source, "receive", "source"),
    (Drop::Destination, "receive", "destination"),
    (Drop::Disco, "receive", "disco"),
    (Drop::UnknownSource, "receive", "unknown_source"),
    (Drop::Stun, "receive", "stun"),
    (Drop::NoDevice, "receive", "no_device"),
    (Drop::Device, "receive", "device"),
    (Drop::Malformed, "transmit", "malformed"),
    (Drop::NoRoute, "transmit", "no_route"),
    (Drop::NoLink, "transmit", "no_link"),
    (Drop::QueueFull, "transmit", "queue_full"),
    (Drop::Unreachable, "transmit", "unreachable"),
    (Drop::TooBig, "transmit", "too_big"),
    (Drop::Socket, "transmit", "socket"),
    (Drop::Unsealed, "transmit", "unsealed"),
    (Drop::NoSession, "transmit", "no_session"),
];

/// Which way inner packets go or come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through a relay.
    Relay,
    /// Over UDP, perhaps through the relay as well.
    Direct,
}

const WAYS: [(Way, &str); 2] = [(Way::Relay, "derp"), (Way::Direct, "direct")];

/// What a path probe is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Probe {
    /// Asks whether anybody is there.
    Ping,
    /// Answers that.
    Pong,
    /// Says where somebody is.
    CallMeMaybe,
}

const PROBES: [(Probe, &str); 3] =
    [(Probe::Ping, "ping"), (Probe::Pong, "pong"), (Probe::CallMeMaybe, "call_me_maybe")];

/// Handles of the counters of probes, one direction of them.
pub(crate) struct Probes([[Counter; WAYS.len()]; PROBES.len()]);

impl Probes {
    fn new(direction: &'static str) -> Self {
        Self(PROBES.map(|(_, kind)| {
            WAYS.map(|(_, path)| {
                counter!(names::DISCO_MESSAGES, "direction" => direction, "type" => kind, "path" => path)
            })
        }))
    }

    /// One more.
    pub(crate) fn note(&self, probe: Probe, way: Way) {
        let counter = self.0.get(probe as usize).and_then(|ways| ways.get(way as usize));
        if let Some(counter) = counter {
            counter.increment(1);
        }
    }
}

/// Handles of every counter.
pub(crate) struct Counters {
    received: [Traffic; WAYS.len()],
    sent: [Traffic; WAYS.len()],
    drops: [Counter; DROPS.len()],
    /// Probes of peers that opened.
    pub(crate) probes_received: Probes,
    /// Probes that a socket or a link took.
    pub(crate) probes_sent: Probes,
    changes: [Counter; Why::ALL.len()],
    /// Handshakes that made a session.
    pub(crate) handshakes_completed: Counter,
    /// Handshakes that were given up.
    pub(crate) handshakes_given_up: Counter,
}

struct Traffic {
    bytes: Counter,
    packets: Counter,
}

/// What one batch counted.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Inner packets and their bytes from peers.
    pub(crate) received: Amounts,
    /// Inner packets and their bytes to peers.
    pub(crate) sent: Amounts,
    drops: [u64; DROPS.len()],
}

/// What went each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Amounts([Amount; WAYS.len()]);

/// A number of packets and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Amount {
    /// One more packet.
    pub(crate) fn add(&mut self, len: usize) {
        self.packets += 1;
        self.bytes += len as u64;
    }

    /// What came in addition since it was `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self { packets: self.packets - before.packets, bytes: self.bytes - before.bytes }
    }
}

impl Amounts {
    /// What went one way.
    pub(crate) fn by(&mut self, way: Way) -> &mut Amount {
        let [relay, direct] = &mut self.0;
        match way {
            Way::Relay => relay,
            Way::Direct => direct,
        }
    }

    /// What went any way.
    pub(crate) fn total(&self) -> Amount {
        let [relay, direct] = self.0;
        Amount { packets: relay.packets + direct.packets, bytes: relay.bytes + direct.bytes }
    }
}

impl Tally {
    /// One more packet given up.
    pub(crate) fn drop(&mut self, reason: Drop) {
        self.drop_many(reason, 1);
    }

    /// More packets given up.
    pub(crate) fn drop_many(&mut self, reason: Drop, packets: u64) {
        if let Some(count) = self.drops.get_mut(reason as usize) {
            *count += packets;
        }
    }
}

impl Counters {
    /// Takes the handles; the recorder must be installed.
    pub(crate) fn new() -> Self {
        Self {
            received: WAYS.map(|(_, path)| Traffic {
                bytes: counter!(names::RECEIVE_BYTES, "path" => path),
                packets: counter!(names::RECEIVE_PACKETS, "path" => path),
            }),
            sent: WAYS.map(|(_, path)| Traffic {
                bytes: counter!(names::TRANSMIT_BYTES, "path" => path),
                packets: counter!(names::TRANSMIT_PACKETS, "path" => path),
            }),
            drops: DROPS.map(|(_, direction, reason)| {
                counter!(names::DROPPED_PACKETS, "direction" => direction, "reason" => reason)
            }),
            probes_received: Probes::new("receive"),
            probes_sent: Probes::new("transmit"),
            changes: Why::ALL.map(|why| counter!(names::DIRECT_PATH_CHANGES, "reason" => why.label())),
            handshakes_completed: counter!(names::WIREGUARD_HANDSHAKES, "result" => "completed"),
            handshakes_given_up: counter!(names::WIREGUARD_HANDSHAKES, "result" => "given_up"),
        }
    }

    /// Another path is taken to a peer.
    pub(crate) fn note_change(&self, why: Why) {
        if let Some(counter) = self.changes.get(why as usize) {
            counter.increment(1);
        }
    }

    /// Adds what a batch counted.
    pub(crate) fn add(&self, tally: &Tally) {
        let ways = self.received.iter().zip(tally.received.0).chain(self.sent.iter().zip(tally.sent.0));
        ways.for_each(|(traffic, amount)| traffic.add(amount));
        for (counter, count) in self.drops.iter().zip(tally.drops) {
            if count > 0 {
                counter.increment(count);
            }
        }
    }
}

impl Traffic {
    fn add(&self, amount: Amount) {
        if amount.packets > 0 {
            self.bytes.increment(amount.bytes);
            self.packets.increment(amount.packets);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_stands_at_its_own_place() {
        for (index, (reason, _, _)) in DROPS.iter().enumerate() {
            assert_eq!(*reason as usize, index, "{reason:?}");
        }
        for (index, (way, _)) in WAYS.iter().enumerate() {
            let mut amounts = Amounts::default();
            amounts.by(*way).add(1);
            assert_eq!(amounts.0[index].packets, 1, "{way:?}");
        }
        assert!(PROBES.iter().enumerate().all(|(index, (probe, _))| *probe as usize == index));
        assert!(Why::ALL.iter().enumerate().all(|(index, why)| *why as usize == index));
    }
}
