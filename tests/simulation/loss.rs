//! Why packets do not come: each that does not has a reason, and each reason is counted.

use std::collections::{BTreeMap, BTreeSet};

use super::network::Fate;

/// What became of a packet, or of one of its copies, that did not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Loss {
    /// Who sent it did not know the peer yet.
    NoRoute,
    /// Who got it did not know the peer yet.
    UnknownPeer,
    /// There was no session: it found no room among those that waited for one, or waited in vain, or came where
    /// its own was gone.
    NoSession,
    /// A link to the relay was down.
    Relay,
    /// It came from a source that no ping had shown to be the peer's.
    UnknownSource,
    /// It came to a port where nobody listened any more.
    Closed,
    /// It was not taken, though there was a session: a copy.
    Refused,
    /// The network lost it.
    Network(Fate),
}

/// What was lost of the packets from one peer to another.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    of: BTreeMap<u64, BTreeSet<Loss>>,
    count: BTreeMap<Loss, u64>,
}

impl Losses {
    /// A packet, or a copy of it, was lost.
    pub(crate) fn note(&mut self, number: u64, loss: Loss) {
        self.of.entry(number).or_default().insert(loss);
        *self.count.entry(loss).or_default() += 1;
    }

    /// How often what happened.
    pub(crate) fn count(&self) -> &BTreeMap<Loss, u64> {
        &self.count
    }

    /// What happened to a packet and its copies.
    pub(crate) fn of(&self, number: u64) -> Option<&BTreeSet<Loss>> {
        self.of.get(&number)
    }

    /// Whether there was no session for a packet.
    pub(crate) fn lacked_session(&self, number: u64) -> bool {
        self.of.get(&number).is_some_and(|losses| losses.contains(&Loss::NoSession))
    }

    /// Whether it is known why a packet did not come. That a copy was refused is no reason.
    pub(crate) fn explain(&self, number: u64) -> bool {
        self.of.get(&number).is_some_and(|losses| losses.iter().any(|loss| *loss != Loss::Refused))
    }
}
