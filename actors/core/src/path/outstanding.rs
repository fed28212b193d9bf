//! Pings that wait for their answer (tailnet-data 5.3).

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_proto::disco::TxId;

/// How long an answer counts.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Two rounds over all candidates and what hurries between them.
pub(super) const MAX_OUTSTANDING: usize = 256;

/// One ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) txid: TxId,
    pub(super) to: Target,
    pub(super) at: Instant,
    /// Who waits for it: the number of a ping that a person or the pinger asked for.
    pub(super) user: Option<TxId>,
}

/// Where a ping went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Direct(SocketAddr),
    Relay,
}

/// The pings on their way, the oldest first; one too many makes it be forgotten.
#[derive(Debug, Default)]
pub(super) struct Outstanding(VecDeque<Sent>);

impl Outstanding {
    pub(super) fn note(&mut self, sent: Sent) {
        if self.0.len() >= MAX_OUTSTANDING {
            self.0.pop_front();
        }
        self.0.push_back(sent);
    }

    /// The ping that an answer is to, and its round trip.
    pub(super) fn take(&mut self, now: Instant, txid: &TxId) -> Option<(Sent, Duration)> {
        self.0.retain(|it| now.saturating_duration_since(it.at) <= TIMEOUT);
        let at = self.0.iter().position(|it| it.txid == *txid)?;
        let sent = self.0.remove(at)?;
        Some((sent, now.saturating_duration_since(sent.at)))
    }

    /// What went to an address will not be answered.
    pub(super) fn forget(&mut self, address: &SocketAddr) {
        self.0.retain(|it| it.to != Target::Direct(*address));
    }

    /// Nothing that went over UDP will be answered.
    pub(super) fn forget_direct(&mut self) {
        self.0.retain(|it| it.to == Target::Relay);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
