//! Leg B: desktop programs and `warren` itself as clients of the service (vpn-protocol 11).
//!
//! ```text
//! socket ── accept ──> session ─┬─ requests   Status at once; Start and Stop go to the tunnels part
//!                               └─ broadcast  every change of the cells `tunnel` and `peers`
//! ```
//!
//! A session is a task; what it tells comes from cells, so that a client that reads slowly gets fewer and
//! newer whole frames, and delays nobody. The listening sockets belong to the composition: after a crash of
//! this part clients connect again, and the tunnel does not notice.

use std::{
    io,
    os::unix::net::UnixListener as StdListener,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::FutureExt;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixListener, UnixStream},
    time::{sleep, timeout},
};
use warren_actors::{
    runtime::{Context, Part, PartError, Tasks, View},
    speaker::{End, Inbox, Incoming, Speaker},
};
use warren_observability::names;
use warren_proto::{
    correlator::Kind,
    header::Role,
    vpn::{self, ClientMessage, ServiceMessage, client_message, service_message, status::Lifecycle},
};

use crate::{
    access::{Caller, Places, may_control},
    facts::{Peers, Service, TunnelState},
    host::footprint,
    tunnels,
};

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod order;

/// How long a client may take to say who it is (vpn-protocol 16).
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long a client may take to read one frame; after that it is not waited for any more.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// How long a Start may take: what the tunnels part takes at worst, to end a tunnel and begin another.
const START_LIMIT: Duration = Duration::from_secs(65);
/// How long a Stop may take: what the whole ladder takes at worst.
const STOP_LIMIT: Duration = Duration::from_secs(25);
/// Clients at the same time. Each takes three tasks and some 100 KiB.
const MAX_CLIENTS: usize = 256;
/// Clients of one user at the same time, so that one user cannot shut out the others.
const MAX_CLIENTS_PER_USER: usize = 64;
/// Requests of one client that are being worked on.
const MAX_REQUESTS: usize = 8;
/// The pause after a failed accept: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Client = Speaker<ServiceMessage, ClientMessage>;

/// This part hears nothing: its clients come by their sockets.
#[derive(Debug)]
pub enum Message {}

/// The part.
pub struct Clients {
    service: Arc<Service>,
    listeners: Arc<[StdListener]>,
}

impl Clients {
    /// The clients that come to these sockets.
    pub fn new(service: Arc<Service>, listeners: Arc<[StdListener]>) -> Self {
        Self { service, listeners }
    }
}

impl Part for Clients {
    type Message = Message;
    type State = ();

    async fn start(&self, context: &Context<Message>) -> Result<(), PartError> {
        let places = Places::new(MAX_CLIENTS, MAX_CLIENTS_PER_USER);
        for listener in self.listeners.iter() {
            let door = Door { service: Arc::clone(&self.service), places: places.clone() };
            context.tasks.spawn(door.serve(listen(listener)?));
        }
        Ok(())
    }

    async fn handle(&self, _: &Context<Message>, (): &mut (), message: Message) -> Result<(), PartError> {
        match message {}
    }
}

/// A listener of our own on a socket that belongs to the composition.
fn listen(listener: &StdListener) -> io::Result<UnixListener> {
    let listener = listener.try_clone()?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Where clients come in.
struct Door {
    service: Arc<Service>,
    places: Places,
}

impl Door {
    async fn serve(self, listener: UnixListener) {
        let sessions = Tasks::default();
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.admit(&sessions, stream),
                Err(error) => {
                    tracing::warn!(%error, "a client could not be let in");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// A panic of one session is that client's end, and nobody else's.
    fn admit(&self, sessions: &Tasks, stream: UnixStream) {
        let caller = match Caller::of(&stream) {
            Ok(caller) => caller,
            Err(error) => return tracing::warn!(%error, "a client without credentials"),
        };
        let Some(place) = self.places.take(caller) else {
            return tracing::warn!(uid = caller.uid, "a client too many is turned away");
        };
        let service = Arc::clone(&self.service);
        sessions.spawn(async move {
            let _place = place;
            serve(service, caller, stream).await;
        });
    }
}

async fn serve(service: Arc<Service>, caller: Caller, stream: UnixStream) {
    let (read, write) = stream.into_split();
    serve_over(service, caller, read, write).await;
}

async fn serve_over<R, W>(service: Arc<Service>, caller: Caller, read: R, write: W)
where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let (client, inbox) =
        match Speaker::connect(read, write, Role::Service, Role::Client, HANDSHAKE_LIMIT).await {
            Ok(connected) => connected,
            Err(error) => return tracing::info!(%error, uid = caller.uid, "no client"),
        };
    let news = News::new(&service);
    let session = Session { service, caller, client: client.clone() };
    tokio::select! {
        () = session.answer(inbox) => {}
        () = news.tell(&client) => {}
    }
    match client.end() {
        Some(end @ (End::Protocol(_) | End::Overflow)) => {
            tracing::warn!(%end, uid = caller.uid, "a client is turned out");
        }
        Some(End::Closed | End::Eof | End::Broken { .. }) | None => {}
    }
    client.close(WRITE_LIMIT).await;
}

/// What one client is told without asking.
struct News {
    tunnel: View<TunnelState>,
    peers: View<Peers>,
}

impl News {
    /// What is so when a client comes is no news.
    fn new(service: &Service) -> Self {
        let (mut tunnel, mut peers) = (service.tunnel.view(), service.peers.view());
        // Seen here and not in `tell`, which may run only after the first answer and another change.
        let _ = (tunnel.changed().now_or_never(), peers.changed().now_or_never());
        Self { tunnel, peers }
    }

    /// Tells the client of every change, until it does not read any more.
    async fn tell(mut self, client: &Client) {
        let mut told = None;
        loop {
            let changed = tokio::select! {
                tunnel = self.tunnel.changed() => tunnel.is_some(),
                peers = self.peers.changed() => peers.is_some(),
            };
            if !changed || !self.tell_once(client, &mut told).await {
                return;
            }
        }
    }

    async fn tell_once(&self, client: &Client, told: &mut Option<vpn::StartProgressStage>) -> bool {
        let tunnel = self.tunnel.get();
        let stage = tunnel.progress.filter(|_| tunnel.lifecycle == Lifecycle::Starting);
        if let Some(stage) = stage.filter(|stage| Some(*stage) != *told) {
            let progress = vpn::StartProgress { stage: stage.into(), ..vpn::StartProgress::default() };
            if !send(client, None, service_message::Msg::StartProgress(progress)).await {
                return false;
            }
        }
        *told = stage;
        let status = status(&self.tunnel.get(), &self.peers.get());
        send(client, None, service_message::Msg::Status(status)).await
    }
}

/// Sends one whole frame, as the answer to a request if it has one, and waits until it is written. Returns
/// whether it was.
async fn send(client: &Client, request: Option<u64>, message: service_message::Msg) -> bool {
    let message = ServiceMessage { rpc: None, msg: Some(message) };
    let sending = async {
        let slot = client.reserve().await.ok()?;
        let written = match request {
            Some(id) => slot.respond(id, message),
            None => slot.notify(message),
        };
        let written = written.ok()?;
        written.wait().await.then_some(())
    };
    timeout(WRITE_LIMIT, sending).await.ok().flatten().is_some()
}

/// Everything that leg B can say (vpn-protocol 11.5).
fn status(tunnel: &TunnelState, peers: &Peers) -> vpn::Status {
    let left_behind = footprint::words(&tunnel.left_behind);
    let error = Some(tunnel.error.clone()).filter(|error| !error.is_empty());
    let mut status = vpn::Status {
        error_message: error.into_iter().chain(left_behind).collect::<Vec<_>>().join("; "),
        peer_update: Some(peers.complete()),
        ..vpn::Status::default()
    };
    status.set_lifecycle(tunnel.lifecycle);
    status
}

/// What one client asks.
struct Session {
    service: Arc<Service>,
    caller: Caller,
    client: Client,
}

impl Session {
    /// Answers until the client is gone, or does not read. What it has begun goes on without it.
    async fn answer(&self, mut inbox: Inbox<ClientMessage>) {
        let room = Arc::new(tokio::sync::Semaphore::new(MAX_REQUESTS));
        while let Some(Incoming { message, kind, received_at, room: bytes }) = inbox.recv().await {
            let id = match kind {
                Kind::Request(id) => id,
                Kind::Response(_) | Kind::Notification | Kind::Stray => {
                    tracing::warn!(?kind, "a client sent what is no request");
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            let (service, client, caller) = (Arc::clone(&self.service), self.client.clone(), self.caller);
            tokio::spawn(async move {
                let _held = (permit, bytes);
                let Some((method, answer)) = work(&service, caller, message.msg).await else { return };
                count(method, &answer, received_at);
                if !send(&client, Some(id), answer).await {
                    tracing::info!(uid = caller.uid, "a client that does not read its answers is let go");
                    client.close(Duration::ZERO).await;
                }
            });
        }
    }
}

async fn work(
    service: &Service,
    caller: Caller,
    request: Option<client_message::Msg>,
) -> Option<(&'static str, service_message::Msg)> {
    match request {
        Some(client_message::Msg::Status(_)) => {
            let status = status(&service.tunnel.get(), &service.peers.get());
            Some(("status", service_message::Msg::Status(status)))
        }
        Some(client_message::Msg::Start(start)) => {
            let error_message = begin(service, caller, start).await.err();
            let (success, error_message) = (error_message.is_none(), error_message.unwrap_or_default());
            Some(("start", service_message::Msg::Start(vpn::StartResponse { success, error_message })))
        }
        Some(client_message::Msg::Stop(_)) => {
            let error_message = end(service, caller).await.err();
            let (success, error_message) = (error_message.is_none(), error_message.unwrap_or_default());
            Some(("stop", service_message::Msg::Stop(vpn::StopResponse { success, error_message })))
        }
        None => {
            // An answer without a body ends the connection at some clients, so there is none.
            tracing::warn!("a client asked what this build does not know");
            None
        }
    }
}

async fn begin(service: &Service, caller: Caller, start: vpn::StartRequest) -> Result<(), String> {
    may_control(&caller, service)?;
    let order = Arc::new(order::order(start, caller.uid, &service.config.allow_http_hosts)?);
    let asked =
        service.tunnels.ask(START_LIMIT, |reply| tunnels::Message::Start { order, caller, reply }).await;
    let answer = asked.map_err(|error| format!("the service could not do it: {error}; try again"))?;
    if answer.success { Ok(()) } else { Err(answer.error_message) }
}

async fn end(service: &Service, caller: Caller) -> Result<(), String> {
    may_control(&caller, service)?;
    let asked = service.tunnels.ask(STOP_LIMIT, |reply| tunnels::Message::Stop { caller, reply }).await;
    let answer = asked.map_err(|error| format!("the service could not do it: {error}; try again"))?;
    if answer.success { Ok(()) } else { Err(answer.error_message) }
}

fn count(method: &'static str, answer: &service_message::Msg, received_at: Instant) {
    let is_done = match answer {
        service_message::Msg::Start(answer) => answer.success,
        service_message::Msg::Stop(answer) => answer.success,
        service_message::Msg::Status(_) | service_message::Msg::StartProgress(_) => true,
    };
    let result = if is_done { "ok" } else { "failed" };
    metrics::counter!(names::RPC_REQUESTS, "leg" => "b", "method" => method, "result" => result).increment(1);
    metrics::histogram!(names::RPC_DURATION, "leg" => "b", "method" => method).record(received_at.elapsed());
}

#[cfg(test)]
mod tests;
