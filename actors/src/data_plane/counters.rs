//! The data plane's metrics. Handles are taken once; a batch counts in a [`Tally`] of its own and adds
//! it at its end.

use metrics::{Counter, counter};
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
    /// The link's queue is full.
    QueueFull,
    /// The engine would not seal it.
    Unsealed,
    /// It waited for a session that never came.
    NoSession,
}

const DROPS: [(Drop, &str, &str); 14] = [
    (Drop::UnknownPeer, "receive", "unknown_peer"),
    (Drop::Refused, "receive", "refused"),
    (Drop::Inner, "receive", "inner"),
    (Drop::Source, "receive", "source"),
    (Drop::Destination, "receive", "destination"),
    (Drop::Disco, "receive", "disco"),
    (Drop::NoDevice, "receive", "no_device"),
    (Drop::Device, "receive", "device"),
    (Drop::Malformed, "transmit", "malformed"),
    (Drop::NoRoute, "transmit", "no_route"),
    (Drop::NoLink, "transmit", "no_link"),
    (Drop::QueueFull, "transmit", "queue_full"),
    (Drop::Unsealed, "transmit", "unsealed"),
    (Drop::NoSession, "transmit", "no_session"),
];

/// Handles of every counter.
pub(crate) struct Counters {
    received: Traffic,
    sent: Traffic,
    drops: [Counter; DROPS.len()],
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
    pub(crate) received: Amount,
    /// Inner packets and their bytes to peers.
    pub(crate) sent: Amount,
    drops: [u64; DROPS.len()],
}

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
            received: Traffic {
                bytes: counter!(names::RECEIVE_BYTES, "path" => "derp"),
                packets: counter!(names::RECEIVE_PACKETS, "path" => "derp"),
            },
            sent: Traffic {
                bytes: counter!(names::TRANSMIT_BYTES, "path" => "derp"),
                packets: counter!(names::TRANSMIT_PACKETS, "path" => "derp"),
            },
            drops: DROPS.map(|(_, direction, reason)| {
                counter!(names::DROPPED_PACKETS, "direction" => direction, "reason" => reason)
            }),
            handshakes_completed: counter!(names::WIREGUARD_HANDSHAKES, "result" => "completed"),
            handshakes_given_up: counter!(names::WIREGUARD_HANDSHAKES, "result" => "given_up"),
        }
    }

    /// Adds what a batch counted.
    pub(crate) fn add(&self, tally: &Tally) {
        self.received.add(tally.received);
        self.sent.add(tally.sent);
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
    }
}
