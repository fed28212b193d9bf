//! One control connection: websocket, yamux session, and a call on each of its streams
//! (tailnet-control 2).

use std::{io, sync::Arc};

use futures::StreamExt;
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, WriteHalf},
    sync::{mpsc, watch},
};
use tokio_yamux::{Config, Session, StreamHandle};
use uuid::Uuid;
use warren_proto::tailnet;

use super::{
    Live, State,
    coordinator::{Auth, Gone, Place},
    drpc::{self, Packet, Reader, Writer},
    fault::{CallFault, Method},
    raw::{Layer, Raw, Then},
    record::{Connection, Ended},
    relay_map,
    telemetry::Device,
    websocket,
    workspaces::Workspaces,
};
use crate::work::Work;

/// Packets of one transport that wait; a client that sends more while none is taken is cut off.
const PACKETS: usize = 8192;
const UNIMPLEMENTED: u64 = 12;
/// Every user's client has this name at the coordinator.
const CLIENT: &str = "client";

type Sink = Writer<WriteHalf<StreamHandle>>;

/// Who comes to a new connection.
pub(crate) struct Visit {
    pub(crate) peer: Uuid,
    pub(crate) device: Option<Device>,
}

/// What calls know of their connection.
#[derive(Clone)]
struct Context {
    state: Arc<State>,
    connection: usize,
    peer: Uuid,
}

/// Serves a connection until either side ends it.
pub(crate) async fn serve<S>(state: Arc<State>, work: Work, visit: Visit, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Visit { peer, device } = visit;
    let connection = state.recorder.connection(Connection {
        peer,
        device,
        name: CLIENT.to_owned(),
        user: state.user,
        ..Connection::default()
    });
    let work = work.child();
    let (close, closes) = mpsc::channel(4);
    state.live().insert(connection, Live { work: work.clone(), close });
    if let Some(raw) = state.faults.layers().strike(&Layer::WebSocket) {
        tokio::select! {
            () = raw.serve(stream) => {}
            () = work.cancelled() => {}
        }
        state.live().remove(&connection);
        return state.recorder.ended(connection, Ended::ByLab);
    }
    let liveness = websocket::Liveness(state.options.websocket_ping);
    let ending = Arc::clone(&state);
    let ended = move |how| {
        ending.live().remove(&connection);
        ending.recorder.ended(connection, how);
    };
    let pipe = websocket::carry(stream, Some(liveness), closes, &work, ended).await;
    if let Some(raw) = state.faults.layers().strike(&Layer::Yamux) {
        return raw.serve(pipe).await;
    }
    let config = Config { keepalive_interval: state.options.yamux_keepalive, ..Config::default() };
    let mut session = Session::new_server(pipe, config);
    let context = Context { state, connection, peer };
    while let Some(Ok(stream)) = session.next().await {
        let context = context.clone();
        work.spawn(async move { transport(context, stream).await });
    }
}

/// Why a call is over.
enum Over {
    /// In whatever way; another may follow.
    Call,
    /// A rule was broken, or the client is gone: nothing follows.
    Transport,
}

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Self {
        Self::Transport
    }
}

/// One yamux stream.
async fn transport(context: Context, stream: StreamHandle) {
    let (mut read, write) = tokio::io::split(stream);
    let (packets, mut incoming) = mpsc::channel(PACKETS);
    let mut writer = Writer::new(write);
    // The stream is read whatever a call does, or its window updates would not be seen. What came before its
    // end, or before a broken rule, is still handled: the end of the packets ends the calls.
    let reading = async move {
        let mut reader = Reader::default();
        loop {
            loop {
                match reader.next() {
                    Ok(Some(packet)) => match packets.try_send(packet) {
                        Ok(()) => {}
                        Err(_) => return,
                    },
                    Ok(None) => break,
                    Err(drpc::Violation) => return,
                }
            }
            if !matches!(read.read_buf(&mut reader.buffer).await, Ok(1..)) {
                return;
            }
        }
    };
    let reading = async {
        reading.await;
        std::future::pending().await
    };
    tokio::select! {
        () = reading => {}
        () = calls(&context, &mut incoming, &mut writer) => {}
    }
    writer.finish().await;
}

async fn calls(context: &Context, incoming: &mut mpsc::Receiver<Packet>, writer: &mut Sink) {
    let mut is_first = true;
    let mut current = 0;
    while let Some(packet) = incoming.recv().await {
        match packet.kind {
            drpc::INVOKE => {
                is_first = false;
                if packet.stream <= current {
                    return;
                }
                current = packet.stream;
                writer.begin(current);
                let path = String::from_utf8_lossy(&packet.data).into_owned();
                context.state.recorder.call(context.connection, &path);
                if let Err(Over::Transport) = call(context, &path, incoming, writer).await {
                    return;
                }
            }
            drpc::INVOKE_METADATA if Metadata::decode(packet.data).is_ok() => {}
            drpc::INVOKE_METADATA => return,
            // Before the first call this stops the reader for good, and nothing more is answered.
            _ if is_first => while incoming.recv().await.is_some() {},
            // What still comes of a call that is over.
            _ => {}
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Metadata {
    #[prost(btree_map = "string, string", tag = "1")]
    values: std::collections::BTreeMap<String, String>,
}

/// What a client says in a call.
enum Said {
    Message(bytes::Bytes),
    /// No more messages come.
    Done,
}

/// The client's next words. An end of the call is an error.
async fn hear(incoming: &mut mpsc::Receiver<Packet>) -> Result<Said, Over> {
    loop {
        let packet = incoming.recv().await.ok_or(Over::Transport)?;
        match packet.kind {
            drpc::MESSAGE => return Ok(Said::Message(packet.data)),
            drpc::CLOSE_SEND => return Ok(Said::Done),
            drpc::CLOSE | drpc::CANCEL | drpc::ERROR => return Err(Over::Call),
            drpc::INVOKE | drpc::INVOKE_METADATA => return Err(Over::Transport),
            _ if packet.is_control => {}
            _ => return Err(Over::Transport),
        }
    }
}

/// Hears the client out until it ends the call.
async fn until_ended(incoming: &mut mpsc::Receiver<Packet>) -> Over {
    loop {
        if let Err(over) = hear(incoming).await {
            return over;
        }
    }
}

async fn call(
    context: &Context,
    path: &str,
    incoming: &mut mpsc::Receiver<Packet>,
    writer: &mut Sink,
) -> Result<(), Over> {
    let method = Method::from_path(path);
    let fault = method.and_then(|method| context.state.faults.calls().strike(&method));
    let unknown = || format!("protocol error: unknown rpc: {path:?}");
    match (method, fault) {
        (None, _) | (_, Some(CallFault::Unknown)) => Ok(writer.error(0, &unknown()).await?),
        (_, Some(CallFault::Unimplemented)) => Ok(writer.error(UNIMPLEMENTED, "Unimplemented").await?),
        (_, Some(CallFault::Error(code, text))) => Ok(writer.error(code, &text).await?),
        (_, Some(CallFault::Close)) => Ok(writer.close().await?),
        (_, Some(CallFault::Raw(raw))) => spoil(&raw, incoming, writer).await,
        (Some(method), Some(CallFault::Silent)) => silent(context, method, incoming).await,
        (Some(Method::Coordinate), None) => coordinate(context, incoming, writer).await,
        (Some(Method::StreamDerpMaps), None) => relay_maps(context, incoming, writer).await,
        (Some(Method::WorkspaceUpdates), None) => workspace_updates(context, incoming, writer).await,
        (Some(Method::RefreshResumeToken), None) => {
            let Some(tailnet::RefreshResumeTokenRequest {}) = request(incoming, writer).await? else {
                return Ok(());
            };
            let answer = context.state.tokens.issue(context.peer, context.state.resume_lifetime());
            unary(writer, &answer).await
        }
        (Some(Method::PostTelemetry), None) => {
            let Some(tailnet::TelemetryRequest { events }) = request(incoming, writer).await? else {
                return Ok(());
            };
            context.state.post_telemetry(events);
            unary(writer, &tailnet::TelemetryResponse {}).await
        }
    }
}

/// Never answers; what is said is recorded.
async fn silent(
    context: &Context,
    method: Method,
    incoming: &mut mpsc::Receiver<Packet>,
) -> Result<(), Over> {
    loop {
        if let Said::Message(data) = hear(incoming).await?
            && method == Method::Coordinate
            && let Ok(request) = tailnet::CoordinateRequest::decode(data)
        {
            context.state.recorder.coordinate(context.connection, request);
        }
    }
}

/// Writes what a test wants on the stream.
async fn spoil(raw: &Raw, incoming: &mut mpsc::Receiver<Packet>, writer: &mut Sink) -> Result<(), Over> {
    raw.write(writer.raw()).await?;
    match raw.then {
        Then::HangUp => Err(Over::Transport),
        Then::StaySilent => Err(until_ended(incoming).await),
    }
}

/// The request of a call that has one; `None` if it was answered with an error.
async fn request<M: Message + Default>(
    incoming: &mut mpsc::Receiver<Packet>,
    writer: &mut Sink,
) -> Result<Option<M>, Over> {
    let Said::Message(data) = hear(incoming).await? else {
        writer.error(0, "EOF").await?;
        return Ok(None);
    };
    let Ok(message) = M::decode(data) else {
        writer.error(0, "proto: cannot parse invalid wire-format data").await?;
        return Ok(None);
    };
    Ok(Some(message))
}

async fn unary(writer: &mut Sink, answer: &impl Message) -> Result<(), Over> {
    writer.message(answer).await?;
    Ok(writer.packet(drpc::CLOSE_SEND, &[]).await?)
}

/// Gives up a place at the coordinator however the stream ends.
struct Leave<'a>(&'a State, Place);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.coordinator.leave(self.1, Gone::Lost);
    }
}

async fn coordinate(
    context: &Context,
    incoming: &mut mpsc::Receiver<Packet>,
    writer: &mut Sink,
) -> Result<(), Over> {
    let state = &*context.state;
    let (place, mut responses) = state.coordinator.open(context.peer, Auth::Client);
    let leave = Leave(state, place);
    // Requests are taken whether or not the client reads what it is told.
    let requests = async {
        loop {
            match hear(incoming).await {
                Ok(Said::Message(data)) => match tailnet::CoordinateRequest::decode(data) {
                    Ok(request) => {
                        state.recorder.coordinate(context.connection, request.clone());
                        if let Err(text) = state.coordinator.handle(place, request) {
                            state.coordinator.leave(place, Gone::Refused(text));
                        }
                        // A deployment asks its database here; without a pause a burst of tunnels would
                        // fill the queue of answers before the first is written.
                        tokio::task::yield_now().await;
                    }
                    Err(_) => state.coordinator.leave(place, Gone::Lost),
                },
                Ok(Said::Done) => state.coordinator.leave(place, Gone::Lost),
                Err(over) => return over,
            }
        }
    };
    let telling = async {
        while let Some(response) = responses.recv().await {
            writer.message(&response).await?;
        }
        // The stream stays until the client ends it.
        writer.close().await
    };
    tokio::select! {
        over = requests => return Err(over),
        told = telling => told?,
    }
    drop(leave);
    Ok(())
}

async fn relay_maps(
    context: &Context,
    incoming: &mut mpsc::Receiver<Packet>,
    writer: &mut Sink,
) -> Result<(), Over> {
    let Some(tailnet::StreamDerpMapsRequest {}) = request(incoming, writer).await? else { return Ok(()) };
    let mut maps = context.state.relay_map.subscribe();
    let mut cut = context.state.cut_maps.subscribe();
    let telling = async {
        let mut told = None;
        loop {
            let map = maps.borrow_and_update().clone();
            if told.as_ref().is_none_or(|told| relay_map::differs(told, &map)) {
                writer.message(&map).await?;
                told = Some(map);
            }
            if !changed(&mut maps, &mut cut).await {
                return writer.close().await;
            }
        }
    };
    tokio::select! {
        // Who has ended the call already is told nothing.
        biased;
        over = until_ended(incoming) => Err(over),
        told = telling => Ok(told?),
    }
}

async fn workspace_updates(
    context: &Context,
    incoming: &mut mpsc::Receiver<Packet>,
    writer: &mut Sink,
) -> Result<(), Over> {
    let Some(asked) = request::<tailnet::WorkspaceUpdatesRequest>(incoming, writer).await? else {
        return Ok(());
    };
    let Ok(owner) = Uuid::from_slice(&asked.workspace_owner_id) else { return Ok(writer.close().await?) };
    let is_own = owner == context.state.user;
    let mut all = context.state.workspaces.subscribe();
    let mut cut = context.state.cut_updates.subscribe();
    let mut injected = context.state.injected.subscribe();
    let telling = async {
        let mut told: Option<Workspaces> = None;
        loop {
            // Of others one sees nothing, and the stream stays open.
            let now = Some(all.borrow_and_update().clone()).filter(|_| is_own).unwrap_or_default();
            let update = told.as_ref().map_or_else(|| now.snapshot(), |told| now.difference(told));
            if told.is_none() || update != tailnet::WorkspaceUpdate::default() {
                writer.message(&update).await?;
            }
            told = Some(now);
            loop {
                tokio::select! {
                    is_news = changed(&mut all, &mut cut) => match is_news {
                        true => break,
                        false => return writer.close().await,
                    },
                    Ok(update) = injected.recv() => writer.message(&update).await?,
                }
            }
        }
    };
    tokio::select! {
        // Who has ended the call already is told nothing.
        biased;
        over = until_ended(incoming) => Err(over),
        told = telling => Ok(told?),
    }
}

/// Waits for news. `false` if the stream is to be cut instead.
async fn changed<T>(news: &mut watch::Receiver<T>, cut: &mut watch::Receiver<()>) -> bool {
    tokio::select! {
        outcome = news.changed() => outcome.is_ok(),
        _ = cut.changed() => false,
    }
}
