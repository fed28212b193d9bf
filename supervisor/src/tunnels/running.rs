//! A tunnel process that speaks, and what joins us to it. It belongs to the composition: a crash of the
//! tunnels part leaves it as it is, and its successor goes on with it.
//!
//! What the tunnel says by itself is handled here, by one task that lives as long as the connection: peers
//! go to their cell, requests for network settings to the host part, log lines to our log.

use std::{fmt, sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use secrecy::SecretString;
use tokio::{
    sync::Semaphore,
    task::unconstrained,
    time::{Instant, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use warren_actors::{
    runtime::{CellWriter, Tasks},
    speaker::{CallError, Inbox, Incoming, Speaker},
};
use warren_observability::{names, redact::redact};
use warren_proto::{
    correlator::Kind,
    header::Version,
    vpn::{
        self, ManagerMessage, NetworkSettingsRequest, NetworkSettingsResponse, TunnelMessage, log,
        manager_message, tunnel_message,
    },
};

use super::death::Death;
use crate::{
    facts::{Fit, Peers, Service},
    host,
    intent::Order,
    link::LinkClient,
    process::{Exit, Process},
};

/// How long the answer to a Start may take. The tunnel itself answers within 30 s.
const START_LIMIT: Duration = Duration::from_secs(35);
/// How long the answer to a Stop may take (vpn-protocol 11.6).
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long the answer to a Wake may take (vpn-protocol 11.11).
const WAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long the answer to a request for all peers may take.
const RESYNC_LIMIT: Duration = Duration::from_secs(5);
/// The least time between two of them: a tunnel whose updates never fit is not asked all the time.
const RESYNC_PAUSE: Duration = Duration::from_secs(30);
/// How long what was sent may take to leave before the connection is closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// How long a process may take to end once its connection is closed.
const EOF_GRACE: Duration = Duration::from_secs(2);
/// As long for a foreign program: deployed ones have undone everything when they answer, and then never end.
const FOREIGN_EOF_GRACE: Duration = Duration::from_millis(500);
/// How long it may take to end once it was asked by a signal.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// How long the task that listens may take to notice the end: nothing but being scheduled.
const SILENCE_LIMIT: Duration = Duration::from_millis(100);

/// How long the host may take to set the network. The tunnel waits 30 s.
const SETTINGS_LIMIT: Duration = Duration::from_secs(10);
/// Requests for network settings at the same time. A tunnel sends one after the other.
const MAX_SETTINGS: usize = 4;

/// The first version that knows Wake.
const SINCE_WAKE: Version = Version { major: 1, minor: 3 };

/// Characters of the longest text that is taken over from a tunnel.
const MAX_TEXT: usize = 4096;

/// How leg A looks from our end.
pub(super) type TunnelSpeaker = Speaker<ManagerMessage, TunnelMessage>;

/// A tunnel process that speaks. With the last holder it is killed.
pub struct Running {
    order: Arc<Order>,
    secrets: Arc<[SecretString]>,
    process: Process,
    speaker: TunnelSpeaker,
    link: Option<LinkClient>,
    silent: CancellationToken,
    /// Said once the tunnel has answered its Start; deployed ones end when they are asked for peers before.
    started: CancellationToken,
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
    /// Starts to listen. No text of the tunnel is shown with one of `secrets`. `peers` goes back to its cell, empty, when the tunnel falls silent.
    pub(super) fn new(
        greeted: Greeted,
        order: Arc<Order>,
        secrets: Arc<[SecretString]>,
        peers: CellWriter<Peers>,
        service: &Arc<Service>,
    ) -> Self {
        let Greeted { process, speaker, inbox, link } = greeted;
        let (tasks, silent, started) = (Tasks::default(), CancellationToken::new(), CancellationToken::new());
        let ear = Ear {
            speaker: speaker.clone(),
            secrets: Arc::clone(&secrets),
            service: Arc::clone(service),
            settings: Arc::new(Semaphore::new(MAX_SETTINGS)),
            started: started.clone(),
            book: Book { peers, _silent: silent.clone().drop_guard() },
        };
        tasks.spawn(ear.listen(inbox));
        Self { order, secrets, process, speaker, link, silent, started, _tasks: tasks }
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
    pub(super) async fn start(&self, request: vpn::StartRequest) -> Result<vpn::StartResponse, CallError> {
        let answer = start(&self.speaker, &self.secrets, request).await?;
        if answer.success {
            self.started.cancel();
        }
        Ok(answer)
    }

    /// Tells the tunnel that the machine has slept.
    pub(super) async fn wake(&self) {
        wake(&self.speaker).await;
    }

    /// Ends the process: Stop, the end of the connection, SIGTERM, SIGKILL, each with its limit.
    pub(super) async fn end(&self) -> Exit {
        if self.process.exit().is_none() {
            self.stop().await;
            self.speaker.close(CLOSE_LIMIT).await;
            let grace = if self.link.is_some() { EOF_GRACE } else { FOREIGN_EOF_GRACE };
            self.process.exited_within(grace).await;
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
                let error = tame(&answer.error_message, &self.secrets);
                tracing::warn!(%error, "the tunnel did not stop as it should");
            }
            Ok(_) => tracing::warn!("the tunnel gave an answer that does not fit a stop"),
            Err(error) => tracing::warn!(%error, "the tunnel did not answer a stop"),
        }
    }
}

async fn start(
    speaker: &TunnelSpeaker,
    secrets: &[SecretString],
    request: vpn::StartRequest,
) -> Result<vpn::StartResponse, CallError> {
    let message = ManagerMessage { rpc: None, msg: Some(manager_message::Msg::Start(request)) };
    match speaker.request(message, START_LIMIT).await?.msg {
        Some(tunnel_message::Msg::Start(answer)) => {
            Ok(vpn::StartResponse { error_message: tame(&answer.error_message, secrets), ..answer })
        }
        _ => Ok(vpn::StartResponse {
            success: false,
            error_message: "the tunnel gave an answer that does not fit the question".to_owned(),
        }),
    }
}

/// One Wake, to a tunnel that knows it. That it fails changes nothing: the tunnel finds out by itself, later.
async fn wake(speaker: &TunnelSpeaker) {
    if speaker.negotiated() < SINCE_WAKE {
        tracing::debug!(version = %speaker.negotiated(), "this tunnel cannot be told that the machine has slept");
        return;
    }
    let message = ManagerMessage { rpc: None, msg: Some(manager_message::Msg::Wake(vpn::WakeRequest {})) };
    match speaker.request(message, WAKE_LIMIT).await.map(|answer| answer.msg) {
        Ok(Some(tunnel_message::Msg::Wake(_))) => {}
        Ok(_) => tracing::warn!("the tunnel gave an answer that does not fit a wake"),
        Err(error) => tracing::warn!(%error, "the tunnel did not answer a wake"),
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
    secrets: Arc<[SecretString]>,
    service: Arc<Service>,
    settings: Arc<Semaphore>,
    started: CancellationToken,
    book: Book,
}

/// Asking for all peers, because an update did not fit. That one did not is remembered until it is asked.
#[derive(Default)]
struct Resync {
    is_wanted: bool,
    question: Option<BoxFuture<'static, Option<vpn::PeerUpdate>>>,
    asked_at: Option<Instant>,
}

/// What a resync has come to.
enum Turn {
    /// It is time to ask.
    Due,
    /// What the tunnel answered.
    Answered(Option<vpn::PeerUpdate>),
}

impl Resync {
    /// Waits for ever while nothing is missing.
    async fn turn(&mut self, started: &CancellationToken) -> Turn {
        if let Some(question) = &mut self.question {
            let answer = question.await;
            self.question = None;
            return Turn::Answered(answer);
        }
        if !self.is_wanted {
            return std::future::pending().await;
        }
        started.cancelled().await;
        if let Some(at) = self.asked_at {
            sleep_until(at + RESYNC_PAUSE).await;
        }
        Turn::Due
    }

    fn ask(&mut self, speaker: TunnelSpeaker) {
        tracing::info!("an update of the tunnel does not fit; it is asked for everything");
        self.is_wanted = false;
        self.asked_at = Some(Instant::now());
        self.question = Some(ask_for_everything(speaker).boxed());
    }
}

impl Ear {
    async fn listen(self, mut inbox: Inbox<TunnelMessage>) {
        let (answers, mut resync) = (Tasks::default(), Resync::default());
        loop {
            let (incoming, turn) = tokio::select! {
                incoming = inbox.recv() => match incoming {
                    // If the tunnel has answered before it said this, the answer is there by now.
                    Some(incoming) => {
                        let turn = unconstrained(resync.turn(&self.started)).now_or_never();
                        (Some(incoming), turn)
                    }
                    None => return,
                },
                turn = resync.turn(&self.started) => (None, Some(turn)),
            };
            let is_answered = matches!(turn, Some(Turn::Answered(Some(_))));
            if let Some(turn) = turn {
                self.take_turn(&mut resync, turn);
            }
            if let Some(incoming) = incoming {
                self.hear(&answers, &mut resync, incoming);
            }
            if is_answered {
                // What waits was said around the answer. Taken after it in its order it leads to what is now,
                // whichever came first; that it may not fit meanwhile means nothing.
                while let Some(Some(incoming)) = inbox.recv().now_or_never() {
                    self.hear(&answers, &mut resync, incoming);
                }
                resync.is_wanted = false;
            }
        }
    }

    fn take_turn(&self, resync: &mut Resync, turn: Turn) {
        match turn {
            Turn::Due => resync.ask(self.speaker.clone()),
            Turn::Answered(Some(everything)) => self.replace(everything),
            Turn::Answered(None) => resync.is_wanted = true,
        }
    }

    fn hear(&self, answers: &Tasks, resync: &mut Resync, incoming: Incoming<TunnelMessage>) {
        match (incoming.message.msg, incoming.kind) {
            (Some(tunnel_message::Msg::PeerUpdate(update)), _) => {
                resync.is_wanted |= self.note(update) == Fit::Gap;
            }
            (Some(tunnel_message::Msg::Log(line)), _) => self.log(&line),
            (Some(tunnel_message::Msg::NetworkSettings(settings)), Kind::Request(id)) => {
                self.settle(answers, id, settings);
            }
            (message, kind) => {
                let is_empty = message.is_none();
                tracing::warn!(?kind, is_empty, "the tunnel says what nobody asked for");
            }
        }
    }

    fn note(&self, update: vpn::PeerUpdate) -> Fit {
        let mut peers = Peers::clone(&self.book.peers.get());
        let fit = peers.apply(update);
        self.book.peers.set_if_changed(peers);
        fit
    }

    fn replace(&self, everything: vpn::PeerUpdate) {
        let mut peers = Peers::default();
        peers.apply(everything);
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
        let text = tame(&text, &self.secrets);
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

/// `None` where the tunnel does not answer as it should: it is asked again after a pause.
async fn ask_for_everything(speaker: TunnelSpeaker) -> Option<vpn::PeerUpdate> {
    let request = manager_message::Msg::GetPeerUpdate(vpn::GetPeerUpdate {});
    let answer = speaker.request(ManagerMessage { rpc: None, msg: Some(request) }, RESYNC_LIMIT).await;
    match answer.map(|answer| answer.msg) {
        Ok(Some(tunnel_message::Msg::PeerUpdate(everything))) => Some(everything),
        Ok(_) => {
            tracing::warn!("the tunnel gave an answer that does not fit a request for all peers");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "the tunnel did not answer a request for all peers");
            None
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
fn tame(text: &str, secrets: &[SecretString]) -> String {
    let is_shown = |symbol: &char| !symbol.is_control() || matches!(symbol, '\n' | '\t');
    redact(text, secrets).chars().filter(is_shown).take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests;
