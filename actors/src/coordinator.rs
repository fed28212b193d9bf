//! The control-plane coordinator: keeps the control connection, and the facts that come through it.
//!
//! Writes the cells `link`, `network_map`, `relay_map`, `upgrades`, `direct` and `workspaces`. It decides when to dial and what the
//! end of a connection means; one `Attempt` at a time does the work and reports. What must survive a
//! crash is in the cells and in [`ControlMemory`]: the successor is the same peer to the deployment, and no
//! peer is unprogrammed meanwhile.

use std::{
    fmt::Display,
    sync::Arc,
    time::{Duration, SystemTime},
};

use metrics::{Gauge, counter, gauge};
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use warren_core::{
    backoff::Backoff,
    path::Direct,
    relay_map::{ConnectionInfo, RelayMap},
    roster::{Update, UpdateError, Workspaces},
    wakes::Wakes,
};
use warren_observability::{names, redact::redact_cut};
use warren_proto::tailnet::WorkspaceUpdate;

use crate::{
    facts::{LinkState, Net},
    packet_io, pinger,
    recovery::Plane,
    relay::{self, upgrade::Upgrades},
    resume,
    runtime::{AlreadyClaimed, CellWriter, Context, Part, PartError},
};

mod calls;
mod connection;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod http;
mod memory;
mod peers;
mod refusal;
mod rpc;
mod upgrade;

use connection::{Attempt, Begin, STOP_LIMIT};
pub use error::ControlError;
pub use memory::ControlMemory;
use peers::Peers;
pub use refusal::{Redirect, Refusal, Validation};
pub use upgrade::OpenError;
pub use warren_core::wakes::Cause;

/// The first pause after an end, the longest, and their growth. The deployment's rate limit is 512 requests
/// in a minute; a person who waits should not notice the shorter pauses.
const PAUSES: (Duration, Duration, f64) = (Duration::from_millis(100), Duration::from_secs(10), 1.618);
/// Pauses are shortened by up to this share, so that not all come back together after a restart.
const JITTER: f64 = 0.3;
/// A connection that was useful for so long shows that the trouble is over. Shorter ones do not: an update
/// that cannot be applied ends each connection in the same way.
const STEADY_AFTER: Duration = Duration::from_secs(10);
/// Where only a person can help, trying again is for those who helped without telling us.
const SLOW_RETRY: Duration = Duration::from_secs(5 * 60);
/// The longest that a deployment may ask to be spared.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10 * 60);

/// What the coordinator hears.
#[derive(Debug)]
pub enum Message {
    /// Something happened after which nothing is sure: looks at once whether the connection is alive, and tells
    /// whom else that concerns.
    Wake(Cause),
    /// Its own attempt to keep a connection got somewhere; an earlier one's than the latest is ignored.
    Report {
        /// Which attempt.
        attempt: u64,
        /// Where it got.
        event: Event,
    },
}

/// Where an attempt to keep a connection got.
#[derive(Debug)]
pub enum Event {
    /// The deployment accepted the connection.
    Accepted,
    /// It sent what it owes: the connection is useful.
    Proven,
    /// It is over, or never came about.
    Ended(ControlError),
}

/// The part.
pub struct Coordinator {
    net: Arc<Net>,
    memory: Arc<ControlMemory>,
}

/// One incarnation of the part.
pub struct State {
    shared: Arc<Shared>,
    link: Link,
    backoff: Backoff,
    proven_at: Option<Instant>,
    wakes: Wakes,
    attempt: JoinHandle<Option<()>>,
}

/// What one incarnation and its tasks share.
struct Shared {
    net: Arc<Net>,
    memory: Arc<ControlMemory>,
    peers: Peers,
    relay_map: CellWriter<RelayMap>,
    upgrades: CellWriter<Upgrades>,
    direct: CellWriter<Direct>,
    workspaces: CellWriter<Workspaces>,
    /// Told when the machine woke up.
    wake: Notify,
    /// Cancelled when the part is stopped: leave in order.
    stop: CancellationToken,
}

impl Part for Coordinator {
    type Message = Message;
    type State = State;

    async fn start(&self, context: &Context<Message>) -> Result<State, PartError> {
        let link = Link::claim(&self.net)?;
        let shared = Arc::new(Shared::claim(&self.net, &self.memory)?);
        let timekeeper = Arc::clone(&shared);
        context.tasks.spawn(async move { timekeeper.peers.keep_time().await });
        let me = context.me.clone();
        context.tasks.spawn(resume::watch(move || {
            let me = me.clone();
            async move { me.send(Message::Wake(Cause::Resumed)).await.unwrap_or_default() }
        }));
        let (floor, cap, factor) = PAUSES;
        Ok(State {
            attempt: attempt(context, &shared, Begin::AtOnce),
            shared,
            link,
            backoff: Backoff::new(floor, cap, factor, JITTER),
            proven_at: None,
            wakes: Wakes::default(),
        })
    }

    async fn handle(
        &self,
        context: &Context<Message>,
        state: &mut State,
        message: Message,
    ) -> Result<(), PartError> {
        match message {
            Message::Wake(cause) => self.wake(state, cause),
            Message::Report { attempt, event } if attempt == self.memory.lock().attempts => match event {
                Event::Accepted => {
                    self.memory.lock().was_accepted = true;
                    gauge!(names::AUTH_VALID).set(1.0);
                }
                Event::Proven => {
                    tracing::info!("the control connection is up");
                    self.net.recovery.works(Plane::Control, peers::now(), peers::now());
                    state.proven_at = Some(Instant::now());
                    state.link.set(LinkState::Up { since: SystemTime::now() });
                }
                Event::Ended(error) => self.take_end(context, state, &error),
            },
            Message::Report { .. } => {}
        }
        Ok(())
    }

    /// Tells the deployment that we leave, so that agents do not wait for us.
    async fn stop(&self, state: State) {
        state.shared.stop.cancel();
        if timeout(STOP_LIMIT, state.attempt).await.is_err() {
            tracing::warn!("the control connection did not end in order");
        }
    }
}

impl Coordinator {
    /// For one Boot; `memory` lives as long as it.
    pub fn new(net: Arc<Net>, memory: Arc<ControlMemory>) -> Self {
        Self { net, memory }
    }

    /// A manager may see a waking as well as we do, and both a network that is another since: all is one.
    fn wake(&self, state: &mut State, cause: Cause) {
        if !state.wakes.is_news(peers::now(), resume::slept(), cause) {
            tracing::debug!(?cause, "that was seen to already");
            return;
        }
        tracing::info!(?cause, "every connection has to show that it is alive");
        self.net.recovery.begin(Plane::Control, peers::now());
        state.backoff.reset();
        self.net.data_plane.dialer().fail_lost();
        state.shared.wake.notify_one();
        let told = [
            self.net.relay.try_send(relay::Message::NetworkChanged).err().map(|error| error.to_string()),
            self.net
                .packet_io
                .try_send(packet_io::Message::NetworkChanged)
                .err()
                .map(|error| error.to_string()),
            self.net.pinger.try_send(pinger::Message::Woken).err().map(|error| error.to_string()),
        ];
        for error in told.into_iter().flatten() {
            tracing::debug!(error, "a part was not told that the network may have changed");
        }
    }

    /// Says what the end of an attempt means, and begins the next one.
    fn take_end(&self, context: &Context<Message>, state: &mut State, error: &ControlError) {
        counter!(names::CONTROL_DISCONNECTS, "reason" => error.reason()).increment(1);
        if error.drops_resume_token() {
            self.memory.lock().resume = None;
        }
        if error.requires_sign_in() {
            gauge!(names::AUTH_VALID).set(0.0);
        }
        let was_steady = state.proven_at.take().is_some_and(|at| at.elapsed() >= STEADY_AFTER);
        if was_steady && !error.is_likely_to_repeat() {
            state.backoff.reset();
        }
        let text = state.shared.tellable(error);
        let (link, begin) = self.judge(error, text.clone(), state.backoff.next(rand::random()));
        tracing::info!(reason = error.reason(), error = text, next = ?begin, "no control connection");
        state.link.set(link);
        state.attempt = attempt(context, &state.shared, begin);
    }

    /// How the link stands after an end, and when to dial again. While no connection was ever accepted, what
    /// fails a start is final: a person waits for the verdict. Later nothing is, but where only a person can
    /// help it is said, and tried rarely (tailnet-control 1.11).
    fn judge(&self, error: &ControlError, text: String, pause: Duration) -> (LinkState, Begin) {
        if error.fails_start() && !self.memory.lock().was_accepted {
            return (LinkState::Refused { error: text }, Begin::OnWake);
        }
        if error.requires_action() {
            return (LinkState::Refused { error: text }, Begin::After(SLOW_RETRY));
        }
        let asked = error.retry_after().map(|asked| asked.min(MAX_RETRY_AFTER).max(pause));
        let begin = asked.map_or(Begin::After(pause), Begin::NotBefore);
        (LinkState::Waiting { error: text, retry_in: asked.unwrap_or(pause) }, begin)
    }
}

/// Begins the next attempt; the one before has ended, or ended with its incarnation.
fn attempt(context: &Context<Message>, shared: &Arc<Shared>, begin: Begin) -> JoinHandle<Option<()>> {
    let number = {
        let mut memory = shared.memory.lock();
        memory.attempts += 1;
        memory.attempts
    };
    let attempt = Attempt { shared: Arc::clone(shared), number, me: context.me.clone() };
    context.tasks.spawn(attempt.run(begin))
}

impl Shared {
    /// An error in words that may be shown: a deployment may echo what it was given.
    fn tellable(&self, error: &dyn Display) -> String {
        let resume = self.memory.lock().resume.as_ref().map(|resume| resume.token.clone());
        redact_cut(&error.to_string(), self.net.boot.secrets().chain(&resume))
    }

    fn claim(net: &Arc<Net>, memory: &Arc<ControlMemory>) -> Result<Self, AlreadyClaimed> {
        Ok(Self {
            peers: Peers::new(Arc::clone(net), Arc::clone(memory))?,
            relay_map: net.relay_map.claim()?,
            upgrades: net.upgrades.claim()?,
            direct: net.direct.claim()?,
            workspaces: net.workspaces.claim()?,
            wake: Notify::new(),
            stop: CancellationToken::new(),
            net: Arc::clone(net),
            memory: Arc::clone(memory),
        })
    }

    fn note_update(&self) {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        gauge!(names::CONTROL_LAST_UPDATE).set(since.as_secs_f64());
    }

    fn take_introduction(&self, username: String, info: ConnectionInfo) {
        let only = Some(Upgrades::WebSocketOnly).filter(|_| info.force_websockets);
        self.upgrades.set_if_changed(only.unwrap_or_default());
        self.direct.set_if_changed(if info.disable_direct { Direct::Blocked } else { Direct::Allowed });
        self.take_relay_map(info.relay_map);
        let known = Workspaces::clone(&self.workspaces.get());
        self.workspaces.set_if_changed(Workspaces { username, suffix: info.hostname_suffix, ..known });
    }

    /// Relays that the deployment itself serves are where we reach the deployment.
    fn take_relay_map(&self, mut map: RelayMap) {
        map.rewrite_embedded(&self.net.boot.url);
        self.relay_map.set_if_changed(map);
    }

    fn take_workspaces(&self, message: &WorkspaceUpdate, update: Update) -> Result<(), UpdateError> {
        let mut workspaces = Workspaces::clone(&self.workspaces.get());
        workspaces.apply(message, update)?;
        self.peers.set_destinations(&workspaces.agent_ids(), update);
        self.workspaces.set_if_changed(workspaces);
        Ok(())
    }
}

/// How the link stands, as others read it. What is up is not up any more when its writer is gone.
struct Link {
    cell: CellWriter<LinkState>,
    is_connected: Gauge,
}

impl Link {
    fn claim(net: &Net) -> Result<Self, AlreadyClaimed> {
        Ok(Self { cell: net.link.claim()?, is_connected: gauge!(names::CONTROL_CONNECTED) })
    }

    fn set(&self, state: LinkState) {
        self.is_connected.set(if matches!(state, LinkState::Up { .. }) { 1.0 } else { 0.0 });
        self.cell.set_if_changed(state);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if matches!(*self.cell.get(), LinkState::Up { .. }) {
            self.set(LinkState::Connecting);
        }
    }
}

#[cfg(test)]
mod tests;
