//! The WebSocket of the control connection, as a byte stream (tailnet-control 1.12, 1.13, 2.2).
//!
//! Whoever reads the stream also answers the server's pings, so it must be read at all times. Messages have
//! no meaning of their own: their payloads are concatenated.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::{Buf, Bytes};
use futures::{Sink, SinkExt, Stream, task::AtomicWaker};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

mod transport;

use super::http::{ApiClient, ApiError};
use transport::Transport;

/// The server pings every 15 s; without anything for three times as long the connection is dead.
pub(super) const READ_IDLE: Duration = Duration::from_secs(45);
/// Deployments send at most about 70 KiB in one message; the limit is for what is no deployment.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// The most that is sent in one message.
const MAX_SENT: usize = 64 * 1024;
const BUFFER: usize = 64 * 1024;
/// A server that takes nothing of what waits for it for so long is gone, though it may still send.
const WRITE_STALL: Duration = Duration::from_secs(10);
/// What is read of a server that takes nothing: each of its bytes may want an answer, and answers wait above
/// without a bound.
const MAX_UNANSWERED: usize = 1024 * 1024;
/// What is buffered while the server does not read. Writing waits from the first byte that is not taken.
const MAX_BUFFERED: usize = BUFFER + 4 * MAX_SENT;

/// Why no WebSocket came about.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The request failed or was refused.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The server switched protocols, but not as it should.
    #[error(
        "the WebSocket handshake is not as it should be: {0}; a proxy in front of the deployment may be at fault"
    )]
    Handshake(&'static str),
}

/// Why a byte stream ended, where it was not in order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum StreamError {
    /// The server sent text, which has no place here.
    #[error("the server sent a text message")]
    Text,
    /// The server closed the connection and says that something is wrong.
    #[error("the server closed the connection with code {code}{}", because(reason))]
    Closed {
        /// The code.
        code: u16,
        /// The reason, which may be empty.
        reason: String,
    },
    /// Nothing came for too long.
    #[error("the server has been silent for {} seconds", .0.as_secs())]
    Silent(Duration),
    /// What waits for it was not taken for too long.
    #[error("the server has taken nothing for {} seconds", .0.as_secs())]
    Stalled(Duration),
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

/// Opens a WebSocket at `path` of the deployment.
pub(super) async fn open(
    client: &ApiClient,
    path: &str,
    query: &str,
    limit: Duration,
) -> Result<(ByteStream<TokioIo<Upgraded>>, Handle<TokioIo<Upgraded>>), OpenError> {
    let key = BASE64_STANDARD.encode(rand::random::<[u8; 16]>());
    let switched = client.upgrade(path, query, request_headers(&key), limit).await?;
    check_response(&switched.headers, &key)?;
    Ok(byte_stream(switched.stream, READ_IDLE).await)
}

fn request_headers(key: &str) -> HeaderMap {
    let value = HeaderValue::from_static;
    let key = HeaderValue::from_str(key).unwrap_or(value(""));
    HeaderMap::from_iter([
        (header::CONNECTION, value("Upgrade")),
        (header::UPGRADE, value("websocket")),
        (header::SEC_WEBSOCKET_VERSION, value("13")),
        (header::SEC_WEBSOCKET_KEY, key),
    ])
}

fn check_response(headers: &HeaderMap, key: &str) -> Result<(), OpenError> {
    let wrong = |what| Err(OpenError::Handshake(what));
    if !has_token(headers, &header::CONNECTION, "upgrade") {
        return wrong("the header Connection does not say Upgrade");
    }
    if !has_token(headers, &header::UPGRADE, "websocket") {
        return wrong("the header Upgrade does not say websocket");
    }
    let accept = headers.get(header::SEC_WEBSOCKET_ACCEPT).map(HeaderValue::as_bytes);
    if accept != Some(accept_key(key).as_bytes()) {
        return wrong("the header Sec-WebSocket-Accept does not match the key");
    }
    if headers.contains_key(header::SEC_WEBSOCKET_PROTOCOL) {
        return wrong("a subprotocol was chosen that was not offered");
    }
    if headers.contains_key(header::SEC_WEBSOCKET_EXTENSIONS) {
        return wrong("an extension was chosen that was not offered");
    }
    Ok(())
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|it| it.trim().eq_ignore_ascii_case(token))
}

/// What a server answers to a `Sec-WebSocket-Key` (RFC 6455, 4.2.2).
pub fn accept_key(key: &str) -> String {
    const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    let mut hash = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(key.as_bytes());
    hash.update(GUID.as_bytes());
    BASE64_STANDARD.encode(hash.finish())
}

/// Takes an established connection as a client's WebSocket that gives up after `idle` without a message.
pub(super) async fn byte_stream<S>(stream: S, idle: Duration) -> (ByteStream<S>, Handle<S>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER)
        .max_write_buffer_size(MAX_BUFFERED)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    let transport = Transport::new(stream, WRITE_STALL);
    let web_socket = WebSocketStream::from_raw_socket(transport, Role::Client, Some(config)).await;
    let socket =
        Socket { web_socket, unread: Bytes::new(), idle, silence: Box::pin(sleep(idle)), has_ended: false };
    let shared = Arc::new(Shared {
        socket: Mutex::new(socket),
        heard: Notify::new(),
        ping_wanted: AtomicBool::new(false),
        reader: AtomicWaker::new(),
    });
    (ByteStream { shared: Arc::clone(&shared) }, Handle { shared })
}

/// The byte stream; the only reader and writer.
pub(super) struct ByteStream<S> {
    shared: Arc<Shared<S>>,
}

/// What can be done about a connection beside its stream.
pub(super) struct Handle<S> {
    shared: Arc<Shared<S>>,
}

struct Shared<S> {
    /// Held only while polling; never across an await.
    socket: Mutex<Socket<S>>,
    /// Told of every message of the server.
    heard: Notify,
    ping_wanted: AtomicBool,
    reader: AtomicWaker,
}

struct Socket<S> {
    web_socket: WebSocketStream<Transport<S>>,
    unread: Bytes,
    idle: Duration,
    silence: Pin<Box<Sleep>>,
    has_ended: bool,
}

impl<S> Shared<S> {
    fn lock(&self) -> MutexGuard<'_, Socket<S>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Handle<S> {
    /// Sends a ping; whether anything was heard of the server within `limit`.
    pub(super) async fn is_alive(&self, limit: Duration) -> bool {
        let heard = self.shared.heard.notified();
        tokio::pin!(heard);
        heard.as_mut().enable();
        self.shared.ping_wanted.store(true, Ordering::Release);
        self.shared.reader.wake();
        timeout(limit, heard).await.is_ok()
    }

    /// Closes the WebSocket in order. Only when nobody polls the stream any more.
    pub(super) async fn close(&self, limit: Duration) {
        let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        let mut message = Some(Message::Close(Some(frame)));
        let said = std::future::poll_fn(|cx| {
            let mut socket = self.shared.lock();
            if message.is_some() {
                ready!(Pin::new(&mut socket.web_socket).poll_ready(cx))?;
            }
            if let Some(message) = message.take() {
                Pin::new(&mut socket.web_socket).start_send(message)?;
            }
            socket.web_socket.poll_flush_unpin(cx)
        });
        let answered = std::future::poll_fn(|cx| {
            let mut socket = self.shared.lock();
            loop {
                let message = ready!(Pin::new(&mut socket.web_socket).poll_next(cx));
                if !matches!(message, Some(Ok(_))) {
                    return Poll::Ready(());
                }
            }
        });
        let closing = async {
            if said.await.is_ok() {
                answered.await;
            }
        };
        let _ = timeout(limit, closing).await;
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    fn poll_message(&mut self, cx: &mut Context<'_>, heard: &Notify) -> Poll<io::Result<Option<Bytes>>> {
        loop {
            let Poll::Ready(message) = Pin::new(&mut self.web_socket).poll_next(cx) else {
                ready!(self.silence.as_mut().poll(cx));
                return Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    StreamError::Silent(self.idle),
                )));
            };
            self.silence.as_mut().reset(Instant::now() + self.idle);
            heard.notify_waiters();
            match message {
                Some(Ok(Message::Binary(payload))) if payload.is_empty() => {}
                Some(Ok(Message::Binary(payload))) => return Poll::Ready(Ok(Some(payload))),
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Text(_))) => return Poll::Ready(Err(io::Error::other(StreamError::Text))),
                Some(Ok(Message::Close(frame))) => {
                    // The reply is on its way already; nobody waits for it.
                    let _ = self.web_socket.poll_flush_unpin(cx);
                    return Poll::Ready(clean_end(frame));
                }
                Some(Err(tungstenite::Error::ConnectionClosed)) | None => return Poll::Ready(Ok(None)),
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
    }

    fn ping(&mut self, cx: &mut Context<'_>) {
        let mut web_socket = Pin::new(&mut self.web_socket);
        if let Poll::Ready(Ok(())) = web_socket.as_mut().poll_ready(cx) {
            // What fails here fails again where it is told.
            let _ = web_socket.as_mut().start_send(Message::Ping(Bytes::new()));
            let _ = web_socket.poll_flush(cx);
        }
    }
}

/// Normal closure and going away are ends in order; everything else is a failure (tailnet-control 1.13).
fn clean_end(frame: Option<CloseFrame>) -> io::Result<Option<Bytes>> {
    match frame {
        None => Ok(None),
        Some(CloseFrame { code: CloseCode::Normal | CloseCode::Away, .. }) => Ok(None),
        Some(CloseFrame { code, reason }) => {
            let reason = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            Err(io::Error::other(StreamError::Closed { code: code.into(), reason }))
        }
    }
}

fn io_error(error: tungstenite::Error) -> io::Error {
    match error {
        tungstenite::Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for ByteStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let shared = &self.shared;
        shared.reader.register(cx.waker());
        let mut socket = shared.lock();
        if shared.ping_wanted.swap(false, Ordering::AcqRel) {
            socket.ping(cx);
        }
        if socket.unread.is_empty() && !socket.has_ended {
            match ready!(socket.poll_message(cx, &shared.heard))? {
                Some(payload) => socket.unread = payload,
                None => socket.has_ended = true,
            }
        }
        let taken = buffer.remaining().min(socket.unread.len());
        buffer.put_slice(&socket.unread.chunk()[..taken]);
        socket.unread.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ByteStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut socket = self.shared.lock();
        let mut web_socket = Pin::new(&mut socket.web_socket);
        ready!(web_socket.as_mut().poll_ready(cx)).map_err(io_error)?;
        let part = bytes.get(..MAX_SENT).unwrap_or(bytes);
        web_socket.start_send(Message::Binary(Bytes::copy_from_slice(part))).map_err(io_error)?;
        Poll::Ready(Ok(part.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.lock().web_socket.poll_flush_unpin(cx).map_err(io_error)
    }

    /// Only flushes: the close handshake is [`Handle::close`]'s.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

#[cfg(test)]
mod tests;
