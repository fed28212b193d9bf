//! The RPC session of the tunnel role (leg A): what a manager asks, and what it is told
//! (vpn-protocol 4, 6, 7.4, 9.1).
//!
//! ```text
//! Stream (outlives us) ─ requests ─> Session ─ Boot ─> root, which builds and ends the net
//!                      <─ answers ──┘    └─ tasks: start verdict, peer updates, network settings, logs
//! ```
//!
//! Start and Stop are levels: the session writes the `boot` cell and derives the answer from what the net's
//! cells then say. Every request stays in the [`Stream`] until it is answered, so that a successor of a
//! crashed session answers what its predecessor could not. The session owns nothing that must be cleaned up.
//!
//! | Survives a crash | Where |
//! |---|---|
//! | requests without an answer | [`Stream`] |
//! | what the manager knows of the peers | [`Stream`] |
//! | how far Start has come | [`Memory`] |
//! | which network settings were acknowledged | `Net::host` |

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use warren_observability::names;
use warren_proto::vpn::{self, manager_message, tunnel_message};

use crate::{
    coordinator,
    facts::{Boot, HostState, Net, NetworkOwner},
    runtime::{Address, Cell, CellWriter, Context, Part, PartError, Reply},
};

pub mod log;
mod settings;
mod start;
mod stream;
mod updates;

pub use log::LogSink;
pub use stream::{Ended, Stream};

use stream::{Answer, Request, Ticket};

/// How long a start may take, all of it.
pub const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a stop waits for the net to end. Deployed managers wait 5 s for the answer.
pub const STOP_LIMIT: Duration = Duration::from_secs(3);
/// How long the answer to a stop may take to leave.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// What the session hears, all of it from its own tasks.
#[derive(Debug)]
pub enum Message {
    /// Requests may be waiting in the stream.
    Arrived,
    /// The manager is gone, or the stream broke.
    StreamEnded,
    /// The net was built or has ended.
    NetChanged,
    /// How the start of this generation came out.
    Verdict {
        /// The generation.
        generation: u64,
        /// What to tell the manager.
        outcome: Result<(), String>,
    },
    /// What a failed start had built has ended, or had its time to.
    CleanedUp(Ticket),
    /// What became of the network settings of this generation.
    Settled {
        /// The generation.
        generation: u64,
        /// What to publish.
        host: HostState,
    },
    /// Asks for the phase, for tests and `debug`.
    Phase(Reply<Phase>),
}

/// What the session uses. Everything in it outlives the session.
#[derive(Clone)]
pub struct SessionDeps {
    /// The connection to the manager.
    pub stream: Arc<Stream>,
    /// What Start asked for; the session writes it.
    pub boot: Cell<Option<Arc<Boot>>>,
    /// The net that the root has built for it.
    pub net: Cell<Option<Arc<Net>>>,
    /// What a successor must know; the session writes it.
    pub memory: Cell<Memory>,
    /// Who owns the network when the manager gives no descriptor: the tunnel, or nobody.
    pub default_network: NetworkOwner,
    /// Log lines for a manager that gave a descriptor.
    pub logs: LogSink,
}

/// What must survive a crash of the session.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    phase: Phase,
    /// The generation of the last Boot.
    generation: u64,
}

/// How far the life between Start and Stop has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Phase {
    /// No start, or only failed ones.
    #[default]
    Idle,
    /// `Boot` is set, the manager waits for the answer.
    Starting {
        /// The request.
        start: Ticket,
        /// When the answer is due.
        deadline: Instant,
    },
    /// The start failed and `Boot` is retracted; the manager hears of it when nothing is left.
    Failing {
        /// The request.
        start: Ticket,
        /// What the manager will hear.
        error: String,
    },
    /// Started.
    Running {
        /// The request.
        start: Ticket,
    },
    /// `Boot` is retracted for good.
    Stopping {
        /// The request.
        stop: Ticket,
    },
}

/// One incarnation of the session.
pub struct State {
    boot: CellWriter<Option<Arc<Boot>>>,
    memory: CellWriter<Memory>,
    /// The present net's host cell, if the manager owns the network.
    host: Option<(u64, CellWriter<HostState>)>,
    /// Requests for everything known of the peers; closed, the task finishes them and ends.
    asked: Option<mpsc::Sender<Arc<Request>>>,
    updates: Option<JoinHandle<Option<()>>>,
    verdict: Option<JoinHandle<Option<()>>>,
    settings: Option<JoinHandle<Option<()>>>,
    logs: Option<JoinHandle<Option<()>>>,
}

/// The session part.
pub struct Session {
    deps: SessionDeps,
}

impl Session {
    /// A session over these.
    pub fn new(deps: SessionDeps) -> Self {
        Self { deps }
    }
}

impl Part for Session {
    type Message = Message;
    type State = State;

    async fn start(&self, context: &Context<Message>) -> Result<State, PartError> {
        let (asked, questions) = mpsc::channel(stream::OPEN_REQUESTS);
        let state = State {
            boot: self.deps.boot.claim()?,
            memory: self.deps.memory.claim()?,
            host: None,
            asked: Some(asked),
            updates: Some(context.tasks.spawn(updates::run(
                self.deps.stream.clone(),
                self.deps.net.view(),
                questions,
            ))),
            verdict: None,
            settings: None,
            logs: None,
        };
        self.deps.stream.redeliver();
        context.tasks.spawn(pump(self.deps.stream.clone(), context.me.clone()));
        context.follow(self.deps.net.view(), || Message::NetChanged);
        Ok(state)
    }

    async fn handle(
        &self,
        context: &Context<Message>,
        state: &mut State,
        message: Message,
    ) -> Result<(), PartError> {
        match message {
            Message::Arrived => {
                while let Some(request) = self.deps.stream.take() {
                    self.handle_request(context, state, request);
                }
            }
            Message::StreamEnded => self.handle_stream_ended(state),
            Message::NetChanged => self.handle_net_changed(context, state)?,
            Message::Verdict { generation, outcome } => {
                self.handle_verdict(context, state, generation, outcome)
            }
            Message::CleanedUp(start) => self.handle_cleaned_up(context, state, start),
            Message::Settled { generation, host } => state.publish(generation, host),
            Message::Phase(reply) => drop(reply.send(state.phase())),
        }
        Ok(())
    }
}

/// Brings requests in. The first message covers those that a predecessor left behind.
async fn pump(stream: Arc<Stream>, me: Address<Message>) {
    let mut inbox = stream.inbox().await;
    loop {
        if me.send(Message::Arrived).await.is_err() {
            return;
        }
        if !stream.admit(&mut inbox).await {
            let _ = me.send(Message::StreamEnded).await;
            return;
        }
    }
}

impl Session {
    fn handle_request(&self, context: &Context<Message>, state: &mut State, request: Arc<Request>) {
        if matches!(state.phase(), Phase::Stopping { stop } if stop < request.ticket) {
            // The answer to Stop is the last frame; what comes behind it is not answered.
            self.deps.stream.settle(&request);
            return;
        }
        match request.body() {
            Some(manager_message::Msg::Start(start)) => self.handle_start(context, state, &request, start),
            Some(manager_message::Msg::Stop(_)) => self.handle_stop(context, state, &request),
            Some(manager_message::Msg::Wake(_)) => self.handle_wake(context, state, &request),
            Some(manager_message::Msg::GetPeerUpdate(_)) => state.ask_for_peers(request),
            Some(manager_message::Msg::NetworkSettings(_)) | None => {
                // An answer without a body ends the connection at some managers, so there is none.
                tracing::warn!(id = request.id, "a request that this build does not know");
                self.deps.stream.settle(&request);
            }
        }
    }

    fn handle_start(
        &self,
        context: &Context<Message>,
        state: &mut State,
        request: &Arc<Request>,
        start: &vpn::StartRequest,
    ) {
        let ours = request.ticket;
        match state.phase() {
            Phase::Idle if request.is_poisonous() => {
                self.answer_start(context, request, Err(start::CRASHES.to_owned()));
            }
            Phase::Idle => self.begin_start(context, state, request, start),
            Phase::Starting { start: begun, deadline } if begun == ours => {
                self.resume_start(context, state, request, start, deadline);
            }
            Phase::Failing { start: failed, .. } if failed == ours => self.clean_up(context, state, ours),
            Phase::Running { start: done } if done == ours => self.answer_start(context, request, Ok(())),
            // The stop came later, and a predecessor crashed before it could answer both.
            Phase::Stopping { .. } => {
                self.answer_start(context, request, Err(start::CANCELLED.to_owned()));
            }
            Phase::Starting { .. } | Phase::Failing { .. } | Phase::Running { .. } => {
                self.answer_start(context, request, Err(start::ALREADY_RUNNING.to_owned()));
            }
        }
    }

    fn begin_start(
        &self,
        context: &Context<Message>,
        state: &mut State,
        request: &Arc<Request>,
        start: &vpn::StartRequest,
    ) {
        let generation = state.memory.get().generation + 1;
        let boot = match start::boot(start, generation, self.deps.default_network) {
            Ok(boot) => boot,
            Err(error) => {
                tracing::error!(%error, "failed to start tunnel");
                self.answer_start(context, request, Err(error));
                return;
            }
        };
        tracing::info!(generation, network = ?boot.network, "starting CoderVPN tunnel");
        let deadline = Instant::now() + START_LIMIT;
        state.remember(|memory| {
            memory.generation = generation;
            memory.phase = Phase::Starting { start: request.ticket, deadline };
        });
        self.await_verdict(context, state, boot, deadline);
    }

    /// Goes on where a predecessor crashed. It may have crashed before it set `Boot`.
    fn resume_start(
        &self,
        context: &Context<Message>,
        state: &mut State,
        request: &Arc<Request>,
        start: &vpn::StartRequest,
        deadline: Instant,
    ) {
        let generation = state.memory.get().generation;
        let boot = start::boot(start, generation, self.deps.default_network);
        match boot {
            Ok(_) if request.is_poisonous() => {
                self.fail_start(context, state, request.ticket, start::CRASHES.to_owned());
            }
            Ok(boot) => self.await_verdict(context, state, boot, deadline),
            Err(error) => self.fail_start(context, state, request.ticket, error),
        }
    }

    fn await_verdict(&self, context: &Context<Message>, state: &mut State, boot: Boot, deadline: Instant) {
        let (generation, network) = (boot.generation, boot.network);
        if state.boot.get().as_ref().as_ref().is_none_or(|set| set.generation != generation) {
            state.boot.set(Some(Arc::new(boot)));
        }
        self.send_logs(context, state, network);
        let (nets, me) = (self.deps.net.view(), context.me.clone());
        let verdict = context.tasks.spawn(async move {
            let outcome = start::verdict(nets, generation, deadline).await;
            let _ = me.send(Message::Verdict { generation, outcome }).await;
        });
        replace(&mut state.verdict, Some(verdict));
    }

    fn handle_verdict(
        &self,
        context: &Context<Message>,
        state: &mut State,
        generation: u64,
        outcome: Result<(), String>,
    ) {
        let Phase::Starting { start, .. } = state.phase() else { return };
        if generation != state.memory.get().generation {
            return;
        }
        match outcome {
            Ok(()) => {
                tracing::info!(generation, "the tunnel is up");
                state.remember(|memory| memory.phase = Phase::Running { start });
                if let Some(request) = self.deps.stream.find(start) {
                    self.answer_start(context, &request, Ok(()));
                }
            }
            Err(error) => self.fail_start(context, state, start, error),
        }
    }

    fn fail_start(&self, context: &Context<Message>, state: &mut State, start: Ticket, error: String) {
        tracing::error!(%error, "failed to start tunnel");
        state.remember(|memory| memory.phase = Phase::Failing { start, error });
        self.clean_up(context, state, start);
    }

    /// Ends what a failed start has built, so that the next start in this process finds nothing in its way.
    fn clean_up(&self, context: &Context<Message>, state: &mut State, start: Ticket) {
        self.retract(state);
        let (nets, me) = (self.deps.net.view(), context.me.clone());
        context.tasks.spawn(async move {
            stream::net_gone(nets).await;
            let _ = me.send(Message::CleanedUp(start)).await;
        });
    }

    fn handle_cleaned_up(&self, context: &Context<Message>, state: &mut State, cleaned: Ticket) {
        let Phase::Failing { start, error } = state.phase() else { return };
        if start != cleaned {
            return;
        }
        state.remember(|memory| memory.phase = Phase::Idle);
        if let Some(request) = self.deps.stream.find(start) {
            self.answer_start(context, &request, Err(error));
        }
    }

    fn handle_stop(&self, context: &Context<Message>, state: &mut State, request: &Arc<Request>) {
        tracing::info!("stopping CoderVPN tunnel");
        let failed = match state.phase() {
            Phase::Failing { start, error } => Some((start, error)),
            Phase::Idle | Phase::Starting { .. } | Phase::Running { .. } | Phase::Stopping { .. } => None,
        };
        state.remember(|memory| memory.phase = Phase::Stopping { stop: request.ticket });
        self.retract(state);
        state.asked = None;
        let farewell = stream::Farewell {
            stream: self.deps.stream.clone(),
            nets: self.deps.net.view(),
            updates: state.updates.take(),
            failed,
            stop: request.clone(),
        };
        context.tasks.spawn(farewell.say(STOP_LIMIT, FLUSH_LIMIT));
    }

    /// Which wakes are one, the coordinator knows: it hears of others, too.
    fn handle_wake(&self, context: &Context<Message>, state: &State, request: &Arc<Request>) {
        let net = self.deps.net.get();
        if let (Phase::Running { .. }, Some(net)) = (state.phase(), net.as_ref())
            && let Err(error) =
                net.coordinator.try_send(coordinator::Message::Wake(coordinator::Cause::Manager))
        {
            tracing::warn!(%error, "nobody to wake");
        }
        let message = tunnel_message::Msg::Wake(vpn::WakeResponse {});
        self.answer(context, request, Answer { message, result: "ok" });
    }

    fn handle_stream_ended(&self, state: &mut State) {
        if matches!(state.phase(), Phase::Stopping { .. }) {
            return;
        }
        tracing::warn!(reason = ?self.deps.stream.end(), "the manager is gone");
        self.retract(state);
    }

    fn handle_net_changed(&self, context: &Context<Message>, state: &mut State) -> Result<(), PartError> {
        state.host = None;
        replace(&mut state.settings, None);
        let net = self.deps.net.get();
        let (Some(net), Phase::Starting { .. } | Phase::Running { .. }) = (net.as_ref(), state.phase())
        else {
            return Ok(());
        };
        let generation = state.memory.get().generation;
        if net.boot.generation != generation || !matches!(net.boot.network, NetworkOwner::Manager(_)) {
            return Ok(());
        }
        self.send_logs(context, state, net.boot.network);
        let acknowledged = net.host.get().applied.clone();
        state.host = Some((generation, net.host.claim()?));
        let conversation = settings::Conversation {
            speaker: self.deps.stream.speaker().clone(),
            wanted: net.interface.view(),
            acknowledged,
        };
        let me = context.me.clone();
        state.settings = Some(context.tasks.spawn(conversation.hold(move |host| {
            let me = me.clone();
            async move { me.send(Message::Settled { generation, host }).await.is_ok() }
        })));
        Ok(())
    }

    /// Managers that own the network are sent the log; others ignore it.
    fn send_logs(&self, context: &Context<Message>, state: &mut State, network: NetworkOwner) {
        if matches!(network, NetworkOwner::Manager(_)) && state.logs.is_none() {
            self.deps.logs.open();
            let pump = self.deps.logs.clone().send_to(self.deps.stream.speaker().clone());
            state.logs = Some(context.tasks.spawn(pump));
        }
    }

    /// Nothing is asked for any more: `Boot` is retracted, and what went with it ends.
    fn retract(&self, state: &mut State) {
        if state.boot.get().is_some() {
            state.boot.set(None);
        }
        self.deps.logs.close();
        state.host = None;
        for task in [&mut state.verdict, &mut state.settings, &mut state.logs] {
            replace(task, None);
        }
    }

    fn answer_start(&self, context: &Context<Message>, request: &Arc<Request>, outcome: Result<(), String>) {
        let result = if outcome.is_ok() { "ok" } else { "failed" };
        let message = tunnel_message::Msg::Start(start::response(outcome));
        self.answer(context, request, Answer { message, result });
    }

    /// Answers at once where there is room. Waiting for room is left to a task: the manager may not read.
    fn answer(&self, context: &Context<Message>, request: &Arc<Request>, answer: Answer) {
        let stream = self.deps.stream.clone();
        match stream.speaker().try_reserve() {
            Ok(slot) => stream.answer_in(slot, request, answer),
            Err(_) => {
                let request = request.clone();
                context.tasks.spawn(async move { stream.answer(&request, answer).await });
            }
        }
    }
}

impl State {
    fn phase(&self) -> Phase {
        self.memory.get().phase.clone()
    }

    fn remember(&mut self, change: impl FnOnce(&mut Memory)) {
        let mut memory = Memory::clone(&self.memory.get());
        change(&mut memory);
        self.memory.set(memory);
    }

    fn publish(&self, generation: u64, host: HostState) {
        if let Some((held, writer)) = &self.host
            && *held == generation
        {
            writer.set_if_changed(host);
        }
    }

    /// There is always room: at most as many requests are open as may wait here.
    fn ask_for_peers(&self, request: Arc<Request>) {
        if let Some(asked) = &self.asked {
            let _ = asked.try_send(request);
        }
    }
}

/// Puts another task, or none, in the place of one, which ends at its next await.
fn replace(task: &mut Option<JoinHandle<Option<()>>>, successor: Option<JoinHandle<Option<()>>>) {
    if let Some(old) = std::mem::replace(task, successor) {
        old.abort();
    }
}

impl Request {
    fn count(&self, result: &'static str) {
        let method = self.method();
        metrics::counter!(names::RPC_REQUESTS, "leg" => "a", "method" => method, "result" => result)
            .increment(1);
        metrics::histogram!(names::RPC_DURATION, "leg" => "a", "method" => method)
            .record(self.received_at.elapsed());
    }
}

#[cfg(test)]
mod tests;
