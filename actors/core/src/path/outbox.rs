//! What a path has to say and was not asked for yet.

use std::{collections::VecDeque, net::SocketAddr, time::Instant};

use warren_proto::disco::TxId;

use super::Effect;

/// More than any input brings about: a ping to each candidate, and each verified address forgotten.
pub(super) const MAX_EFFECTS: usize = 512;

/// Something to say. Pings get their number when they go out.
#[derive(Debug)]
pub(super) enum Pending {
    Ping { to: SocketAddr, at: Instant, number: Number },
    Effect(Effect),
}

/// How the answer of a ping will be told.
#[derive(Debug, Clone, Copy)]
pub(super) enum Number {
    /// Any; whose user's ping it belongs to.
    Any(Option<TxId>),
    /// This one, a user's.
    Given(TxId),
}

/// First in, first out. What is one too many is dropped: it was not fetched in the first place.
#[derive(Debug, Default)]
pub(super) struct Outbox(VecDeque<Pending>);

impl Outbox {
    pub(super) fn push(&mut self, pending: Pending) {
        if self.0.len() < MAX_EFFECTS {
            self.0.push_back(pending);
        }
    }

    pub(super) fn pop(&mut self) -> Option<Pending> {
        self.0.pop_front()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
