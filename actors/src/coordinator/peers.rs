//! The peer table at work: feeds [`Coordination`] with what comes and with time, publishes the network map,
//! and gathers what is to be said on the Coordinate stream. Works on whether or not there is a connection:
//! lost peers are given up in time also without one.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};
use uuid::Uuid;
use warren_core::{
    coordination::{Coordination, NetworkMap, Outcome, Requests},
    roster::Update,
};
use warren_proto::{key::NodePublic, tailnet::CoordinateResponse};

use super::{error::ControlError, memory::ControlMemory};
use crate::{
    data_plane::DataPlane,
    facts::Net,
    runtime::{AlreadyClaimed, CellWriter},
};

/// What may wait behind a write that is under way, beyond what a new stream begins with; some 4 MB. A
/// deployment that lets more come together takes nothing any more.
const MAX_OUTGOING: usize = 16 * 1024;

/// The one user of [`Coordination`], and the one writer of the network map.
pub(super) struct Peers {
    net: Arc<Net>,
    memory: Arc<ControlMemory>,
    map: CellWriter<NetworkMap>,
    /// Locked only under the memory's lock or alone.
    outgoing: Mutex<Outgoing>,
    /// Told when there is something to send.
    pub(super) to_send: Notify,
    /// Told when the next timeout may be another one.
    rescheduled: Notify,
}

#[derive(Default)]
struct Outgoing {
    requests: Requests,
    has_overflowed: bool,
}

impl Peers {
    /// Takes over from a predecessor: its stream is gone, what it knew is not.
    pub(super) fn new(net: Arc<Net>, memory: Arc<ControlMemory>) -> Result<Self, AlreadyClaimed> {
        let map = net.network_map.claim()?;
        let outgoing = Mutex::default();
        let peers = Self { net, memory, map, outgoing, to_send: Notify::new(), rescheduled: Notify::new() };
        peers.disconnected();
        peers.map.set_if_changed(peers.memory.lock().coordination.network_map().clone());
        Ok(peers)
    }

    /// A stream began: it is told all that is wanted.
    pub(super) fn connected(&self) {
        let mut memory = self.memory.lock();
        let requests = memory.coordination.connected(now());
        *self.outgoing() = Outgoing { requests, has_overflowed: false };
        self.to_send.notify_one();
        self.rescheduled.notify_one();
    }

    /// The stream ended, if there was one: every peer is lost until the next one says otherwise.
    pub(super) fn disconnected(&self) {
        let last_handshake = last_handshakes(&self.net.data_plane);
        self.memory.lock().coordination.disconnected(now(), last_handshake);
        *self.outgoing() = Outgoing::default();
        self.rescheduled.notify_one();
    }

    /// Wants tunnels to exactly these agents.
    pub(super) fn set_destinations(&self, wanted: &BTreeSet<Uuid>, update: Update) {
        self.change(|coordination| coordination.set_destinations(now(), wanted, update));
    }

    /// Takes what the deployment says about peers; returns its error text, if it has one.
    pub(super) fn handle_response(&self, response: &CoordinateResponse) -> Option<String> {
        let last_handshake = last_handshakes(&self.net.data_plane);
        self.change(|coordination| coordination.handle_response(now(), response, last_handshake))
    }

    /// Lets time pass for the peers, for as long as it is polled.
    pub(super) async fn keep_time(&self) -> Infallible {
        loop {
            let due = self.memory.lock().coordination.poll_timeout();
            let Some(due) = due else {
                self.rescheduled.notified().await;
                continue;
            };
            if timeout_at(due.into(), self.rescheduled.notified()).await.is_err() {
                let last_handshake = last_handshakes(&self.net.data_plane);
                self.change(|coordination| coordination.handle_timeout(now(), last_handshake));
            }
        }
    }

    /// What is to be sent, in order; it counts as sent.
    pub(super) fn take_outgoing(&self) -> Result<Requests, ControlError> {
        let Outgoing { requests, has_overflowed } = std::mem::take(&mut *self.outgoing());
        if has_overflowed { Err(ControlError::Stalled) } else { Ok(requests) }
    }

    fn change(&self, change: impl FnOnce(&mut Coordination) -> Outcome) -> Option<String> {
        let mut memory = self.memory.lock();
        let outcome = change(&mut memory.coordination);
        if outcome.map_changed {
            self.map.set(memory.coordination.network_map().clone());
        }
        self.queue(outcome.requests);
        drop(memory);
        self.rescheduled.notify_one();
        for ignored in outcome.ignored {
            tracing::debug!(peer = ?ignored.peer, reason = %ignored.reason, "an update about a peer cannot be used");
        }
        outcome.error
    }

    fn queue(&self, requests: Requests) {
        if requests.is_empty() {
            return;
        }
        let mut outgoing = self.outgoing();
        if outgoing.requests.len() + requests.len() > MAX_OUTGOING {
            outgoing.has_overflowed = true;
        } else {
            outgoing.requests.extend(requests);
        }
        self.to_send.notify_one();
    }

    fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time as timers see it, so that tests can move it.
pub(super) fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// How long ago a peer completed a handshake, asked for one at a time: most messages concern few peers.
fn last_handshakes(data_plane: &DataPlane) -> impl Fn(&NodePublic) -> Option<Duration> {
    let now = SystemTime::now();
    move |key| {
        let last = data_plane.stats_of(key)?.last_handshake?;
        // One in the future is a clock that was set back.
        Some(now.duration_since(last).unwrap_or_default())
    }
}
