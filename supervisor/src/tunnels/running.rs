//! A tunnel process that speaks, and what joins us to it. It belongs to the composition: a crash of the
//! tunnels part leaves it as it is, and its successor goes on with it.
//!
//! What the tunnel says by itself is handled here, by one task that lives as long as the connection: peers
//! go to their cell, requests for network settings to the host part, log lines to our log.

use std::{fmt, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use warren_actors::{
    runtime::{CellWriter, Tasks},
    speaker::{CallError, Inbox, Speaker},
};
use warren_observability::{names, redact::redact};
use warren_proto::{
    correlator::Kind,
    vpn::{
        self, ManagerMessage, NetworkSettingsRequest, NetworkSettingsResponse, TunnelMessage, log,
        manager_message, tunnel_message,
    },
};

use super::death::Death;
use crate::{
    facts::{Peers, Service},
    host,
    intent::Order,
    link::LinkClient,
    process::{Exit, Process},
};

/// How long the answer to a Start may take. The tunnel itself answers within 30 s.
const START_LIMIT: Duration = Duration::from_secs(35);
/// How long the answer to a Stop may take (vpn-protocol 11.6).
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long what was sent may take to leave before the connection is closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// How long a process may take to end once its connection is closed.
const EOF_GRACE: Duration = Duration::from_secs(2);
/// How long it may take to end once it was asked by a signal.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// How long the task that listens may take to notice the end: nothing but being scheduled.
const SILENCE_LIMIT: Duration = Duration::from_millis(100);

/// How long the host may take to set the network. The tunnel waits 30 s.
const SETTINGS_LIMIT: Duration = Duration::from_secs(10);
/// Requests for network settings at the same time. A tunnel sends one after the other.
const MAX_SETTINGS: usize = 4;

/// Characters of the longest text that is taken over from a tunnel.
const MAX_TEXT: usize = 4096;

/// How leg A looks from our end.
pub(super) type TunnelSpeaker = Speaker<ManagerMessage, TunnelMessage>;

/// A tunnel process that speaks. With the last holder it is killed.
pub struct Running {
    order: Arc<Order>,
    process: Process,
    speaker: TunnelSpeaker,
    link: Option<LinkClient>,
    silent: CancellationToken,
    _tasks: Tasks,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running")
            .field("pid", &self.process.pid())
            .field("order", &self.order)
            .finish_non_exhaustive()
    }
}

/// What a process has become once both of its connections are greeted.
pub(super) struct Greeted {
    pub(super) process: Process,
    pub(super) speaker: TunnelSpeaker,
    pub(super) inbox: Inbox<TunnelMessage>,
    pub(super) link: Option<LinkClient>,
}

impl Running {
    /// Starts to listen. `peers` goes back to its cell, empty, when the tunnel falls silent.
    pub(super) fn new(
        greeted: Greeted,
        order: Arc<Order>,
        peers: CellWriter<Peers>,
        service: &Arc<Service>,
    ) -> Self {
        let Greeted { process, speaker, inbox, link } = greeted;
        let (tasks, silent) = (Tasks::default(), CancellationToken::new());
        let ear = Ear {
            speaker: speaker.clone(),
            order: Arc::clone(&order),
            service: Arc::clone(service),
            settings: Arc::new(Semaphore::new(MAX_SETTINGS)),
            book: Book { peers, _silent: silent.clone().drop_guard() },
        };
        tasks.spawn(ear.listen(inbox));
        Self { order, process, speaker, link, silent, _tasks: tasks }
    }

    /// What it was started for.
    pub fn order(&self) -> &Arc<Order> {
        &self.order
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The private link, if it is our own program.
    pub fn link(&self) -> Option<&LinkClient> {
        self.link.as_ref()
    }

    /// Waits until the tunnel can say nothing any more: its end of the connection is closed or broken.
    pub(super) async fn silent(&self) {
        self.silent.cancelled().await;
    }

    /// As [`Self::silent`], where that is a matter of being scheduled.
    pub(super) async fn silent_soon(&self) {
        let _ = tokio::time::timeout(SILENCE_LIMIT, self.silent()).await;
    }

    /// Asks the tunnel to start, and returns what it answered.
    pub(super) async fn start(&self, start: vpn::StartRequest) -> Result<vpn::StartResponse, CallError> {
        let message = ManagerMessage { rpc: None, msg: Some(manager_message::Msg::Start(start)) };
        match self.speaker.request(message, START_LIMIT).await?.msg {
            Some(tunnel_message::Msg::Start(answer)) => {
                Ok(vpn::StartResponse { error_message: tame(&answer.error_message, &self.order), ..answer })
            }
            _ => Ok(vpn::StartResponse {
                success: false,
                error_message: "the tunnel gave an answer that does not fit the question".to_owned(),
            }),
        }
    }

    /// Ends the process: Stop, the end of the connection, SIGTERM, SIGKILL, each with its limit.
    pub(super) async fn end(&self) -> Exit {
        if self.process.exit().is_none() {
            self.stop().await;
            self.speaker.close(CLOSE_LIMIT).await;
            self.process.exited_within(EOF_GRACE).await;
        }
        let exit = self.process.end(TERM_GRACE).await;
        self.silent_soon().await;
        exit
    }

    async fn stop(&self) {
        let message =
            ManagerMessage { rpc: None, msg: Some(manager_message::Msg::Stop(vpn::StopRequest {})) };
        let answer = tokio::select! {
            answer = self.speaker.request(message, STOP_LIMIT) => answer,
            _ = self.process.exited() => return,
        };
        match answer.map(|answer| answer.msg) {
            Ok(Some(tunnel_message::Msg::Stop(answer))) if answer.success => {}
            Ok(Some(tunnel_message::Msg::Stop(answer))) => {
                let error = tame(&answer.error_message, &self.order);
                tracing::warn!(%error, "the tunnel did not stop as it should");
            }
            Ok(_) => tracing::warn!("the tunnel gave an answer that does not fit a stop"),
            Err(error) => tracing::warn!(%error, "the tunnel did not answer a stop"),
        }
    }
}

/// Ends a process that never spoke.
pub(super) async fn end_mute(process: &Process) -> Death {
    Death::from(process.end(TERM_GRACE).await)
}

/// Empties the cell, gives it back, and then says that the tunnel is silent.
struct Book {
    peers: CellWriter<Peers>,
    _silent: DropGuard,
}

impl Drop for Book {
    fn drop(&mut self) {
        self.peers.set_if_changed(Peers::default());
    }
}

/// Listens to the tunnel.
struct Ear {
    speaker: TunnelSpeaker,
    order: Arc<Order>,
    service: Arc<Service>,
    settings: Arc<Semaphore>,
    book: Book,
}

impl Ear {
    async fn listen(self, mut inbox: Inbox<TunnelMessage>) {
        let answers = Tasks::default();
        while let Some(incoming) = inbox.recv().await {
            match (incoming.message.msg, incoming.kind) {
                (Some(tunnel_message::Msg::PeerUpdate(update)), _) => self.note(update),
                (Some(tunnel_message::Msg::Log(line)), _) => self.log(&line),
                (Some(tunnel_message::Msg::NetworkSettings(settings)), Kind::Request(id)) => {
                    self.settle(&answers, id, settings);
                }
                (message, kind) => {
                    let is_empty = message.is_none();
                    tracing::warn!(?kind, is_empty, "the tunnel says what nobody asked for");
                }
            }
        }
    }

    fn note(&self, update: vpn::PeerUpdate) {
        let mut peers = Peers::clone(&self.book.peers.get());
        peers.apply(update);
        self.book.peers.set_if_changed(peers);
    }

    /// Setting the network may take longer than the tunnel may be left unheard.
    fn settle(&self, answers: &Tasks, id: u64, settings: NetworkSettingsRequest) {
        let Ok(permit) = Arc::clone(&self.settings).try_acquire_owned() else {
            let answer = respond(Err("too many network settings are being set already".to_owned()));
            let _ = self.speaker.try_respond(id, answer);
            return;
        };
        let (speaker, host) = (self.speaker.clone(), self.service.host_part.clone());
        answers.spawn(async move {
            let begun = Instant::now();
            let asked = host
                .ask(SETTINGS_LIMIT, |reply| host::Message::Apply { settings: Box::new(settings), reply })
                .await;
            let outcome = asked.unwrap_or_else(|error| Err(format!("the service could not do it: {error}")));
            count_settings(outcome.is_ok(), begun);
            let _ = speaker.respond(id, respond(outcome)).await;
            drop(permit);
        });
    }

    /// Where the manager owns the network the tunnel's log comes this way, and nothing on stderr.
    fn log(&self, line: &vpn::Log) {
        let fields = line.fields.iter().map(|field| format!(" {}={}", field.name, field.value));
        let text = format!("{}{}", line.message, fields.collect::<String>());
        let text = tame(&text, &self.order);
        self.service.log.keep(&text);
        match line.level() {
            log::Level::Debug => tracing::debug!(target: "tunnel", "{text}"),
            log::Level::Info => tracing::info!(target: "tunnel", "{text}"),
            log::Level::Warn => tracing::warn!(target: "tunnel", "{text}"),
            log::Level::Error | log::Level::Critical | log::Level::Fatal => {
                tracing::error!(target: "tunnel", "{text}");
            }
        }
    }
}

fn respond(outcome: Result<(), String>) -> ManagerMessage {
    let answer = NetworkSettingsResponse {
        success: outcome.is_ok(),
        error_message: outcome.err().unwrap_or_default(),
    };
    ManagerMessage { rpc: None, msg: Some(manager_message::Msg::NetworkSettings(answer)) }
}

fn count_settings(is_done: bool, begun: Instant) {
    let (method, result) = ("network_settings", if is_done { "ok" } else { "failed" });
    metrics::counter!(names::RPC_REQUESTS, "leg" => "a", "method" => method, "result" => result).increment(1);
    metrics::histogram!(names::RPC_DURATION, "leg" => "a", "method" => method).record(begun.elapsed());
}

/// What may be shown of a text of the tunnel: no secret, nothing that moves a cursor, and not endless.
fn tame(text: &str, order: &Order) -> String {
    let is_shown = |symbol: &char| !symbol.is_control() || matches!(symbol, '\n' | '\t');
    redact(text, order.secrets()).chars().filter(is_shown).take(MAX_TEXT).collect()
}
