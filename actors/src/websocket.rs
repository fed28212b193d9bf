//! A client's WebSocket as a byte stream: the control connection's, and a relay's where plain upgrades do not
//! pass (tailnet-control 1.12, 1.13, 2.2; tailnet-data 2.4). The HTTP step is the caller's.
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
use warren_observability::redact::one_line;

mod transport;

use transport::Transport;

const BUFFER: usize = 64 * 1024;
/// Bytes of the longest reason to close (RFC 6455, 5.5).
const MAX_REASON: usize = 123;
/// A server that takes nothing of what waits for it for so long is gone, though it may still send.
const WRITE_STALL: Duration = Duration::from_secs(10);
/// What is read of a server that takes nothing: each of its bytes may want an answer, and answers wait above
/// without a bound.
const MAX_UNANSWERED: usize = 1024 * 1024;

/// What one kind of connection allows itself and its server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Without any message for so long the connection is dead.
    pub(crate) idle: Duration,
    /// A larger message is refused.
    pub(crate) largest_received: usize,
    /// The most that is sent in one message.
    pub(crate) largest_sent: usize,
}

/// Why what a server answered with 101 is no WebSocket as it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the WebSocket handshake is not as it should be: {0}; a proxy in front of the server may be at fault"
)]
pub struct HandshakeError(&'static str);

/// Why a byte stream ended, where it was not in order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StreamError {
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

/// A fresh `Sec-WebSocket-Key`.
pub(crate) fn key() -> String {
    BASE64_STANDARD.encode(rand::random::<[u8; 16]>())
}

/// What a request for a WebSocket carries besides its host; `protocol` is the one subprotocol it offers.
pub(crate) fn request_headers(key: &str, protocol: Option<&'static str>) -> HeaderMap {
    let value = HeaderValue::from_static;
    let key = HeaderValue::from_str(key).unwrap_or(value(""));
    let always = [
        (header::CONNECTION, value("Upgrade")),
        (header::UPGRADE, value("websocket")),
        (header::SEC_WEBSOCKET_VERSION, value("13")),
        (header::SEC_WEBSOCKET_KEY, key),
    ];
    let offered = protocol.map(|protocol| (header::SEC_WEBSOCKET_PROTOCOL, value(protocol)));
    always.into_iter().chain(offered).collect()
}

/// Checks the head of a 101 answer to a request with this key and this offer.
pub(crate) fn check_response(
    headers: &HeaderMap,
    key: &str,
    protocol: Option<&'static str>,
) -> Result<(), HandshakeError> {
    let wrong = |what| Err(HandshakeError(what));
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
    let chosen = headers.get(header::SEC_WEBSOCKET_PROTOCOL).map(HeaderValue::as_bytes);
    match (chosen, protocol) {
        (None, None) => {}
        (Some(chosen), Some(offered)) if chosen == offered.as_bytes() => {}
        (None, Some(_)) => return wrong("the subprotocol that was offered was not chosen"),
        (Some(_), _) => return wrong("a subprotocol was chosen that was not offered"),
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
pub(crate) fn accept_key(key: &str) -> String {
    const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    let mut hash = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(key.as_bytes());
    hash.update(GUID.as_bytes());
    BASE64_STANDARD.encode(hash.finish())
}

/// Takes an established connection as a client's WebSocket.
pub(crate) async fn byte_stream<S>(stream: S, limits: Limits) -> (ByteStream<S>, Handle<S>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER)
        // What is buffered while the server does not read. Writing waits from the first byte not taken.
        .max_write_buffer_size(BUFFER + 4 * limits.largest_sent)
        .max_message_size(Some(limits.largest_received))
        .max_frame_size(Some(limits.largest_received));
    let transport = Transport::new(stream, WRITE_STALL);
    let web_socket = WebSocketStream::from_raw_socket(transport, Role::Client, Some(config)).await;
    let silence = Box::pin(sleep(limits.idle));
    let socket = Socket { web_socket, unread: Bytes::new(), limits, silence, has_ended: false };
    let shared = Arc::new(Shared {
        socket: Mutex::new(socket),
        heard: Notify::new(),
        said: Notify::new(),
        ping_wanted: AtomicBool::new(false),
        reader: AtomicWaker::new(),
    });
    (ByteStream { shared: Arc::clone(&shared) }, Handle { shared })
}

/// The byte stream; the only reader and writer.
pub(crate) struct ByteStream<S> {
    shared: Arc<Shared<S>>,
}

/// What can be done about a connection beside its stream.
pub(crate) struct Handle<S> {
    shared: Arc<Shared<S>>,
}

struct Shared<S> {
    /// Held only while polling; never across an await.
    socket: Mutex<Socket<S>>,
    /// Told of every message of the server.
    heard: Notify,
    /// Told of every message to the server.
    said: Notify,
    ping_wanted: AtomicBool,
    reader: AtomicWaker,
}

struct Socket<S> {
    web_socket: WebSocketStream<Transport<S>>,
    unread: Bytes,
    limits: Limits,
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
    pub(crate) async fn is_alive(&self, limit: Duration) -> bool {
        let heard = self.shared.heard.notified();
        tokio::pin!(heard);
        heard.as_mut().enable();
        self.shared.ping_wanted.store(true, Ordering::Release);
        self.shared.reader.wake();
        timeout(limit, heard).await.is_ok()
    }

    /// Waits until something was said and nothing heard of the server for `limit` after it.
    pub(crate) async fn goes_unanswered(&self, limit: Duration) {
        loop {
            self.shared.said.notified().await;
            if timeout(limit, self.shared.heard.notified()).await.is_err() {
                return;
            }
        }
    }

    /// Closes the WebSocket in order. Only when nobody polls the stream any more.
    pub(crate) async fn close(&self, limit: Duration) {
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
                    StreamError::Silent(self.limits.idle),
                )));
            };
            self.silence.as_mut().reset(Instant::now() + self.limits.idle);
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
            let reason = one_line(&reason, MAX_REASON);
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
        let largest = socket.limits.largest_sent;
        let mut web_socket = Pin::new(&mut socket.web_socket);
        ready!(web_socket.as_mut().poll_ready(cx)).map_err(io_error)?;
        let part = bytes.get(..largest).unwrap_or(bytes);
        web_socket.start_send(Message::Binary(Bytes::copy_from_slice(part))).map_err(io_error)?;
        self.shared.said.notify_one();
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
