//! Websockets from the server's side: the handshake, and the messages as one stream of bytes
//! (tailnet-control 1.12 and 1.13).

use std::{io, pin::pin, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, StatusCode, header};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream},
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        error::ProtocolError,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::{
    answer::{self, Answer},
    record::Ended,
};
use crate::work::Work;

/// The largest message that is taken; a deployment has no limit.
const MAX_MESSAGE: usize = 16 << 20;
/// Bytes that wait between the websocket and what reads it.
const PIPE: usize = 256 * 1024;
/// The most that one message carries: relay clients in Go close the connection on one of more.
const WRITE: usize = 32 * 1024;
/// How long the peer's close frame is waited for.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// Whose pages may connect.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Any,
    Same,
}

/// The answer to a handshake: 101, or why not.
#[expect(clippy::result_large_err, reason = "both sides are the answer")]
pub(crate) fn accept(
    headers: &HeaderMap,
    origin: Origin,
    protocol: Option<&'static str>,
) -> Result<Answer, Answer> {
    let all = |name: header::HeaderName| -> Vec<String> {
        headers
            .get_all(name)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .collect()
    };
    let has = |values: &[String], token: &str| {
        values.iter().flat_map(|line| line.split(',')).any(|part| part.trim().eq_ignore_ascii_case(token))
    };
    for (name, shown, token) in
        [(header::CONNECTION, "Connection", "Upgrade"), (header::UPGRADE, "Upgrade", "websocket")]
    {
        let values = all(name);
        if !has(&values, token) {
            let first = values.first().map(String::as_str).unwrap_or_default();
            let reason =
                format!("WebSocket protocol violation: {shown} header {first:?} does not contain {token}");
            let mut refusal = answer::handshake(StatusCode::UPGRADE_REQUIRED, &reason);
            answer::set(&mut refusal, header::CONNECTION, "Upgrade");
            answer::set(&mut refusal, header::UPGRADE, "websocket");
            return Err(refusal);
        }
    }
    let versions = all(header::SEC_WEBSOCKET_VERSION);
    if versions.first().map(String::as_str) != Some("13") {
        let shown = versions.first().map(String::as_str).unwrap_or_default();
        let reason = format!("unsupported WebSocket protocol version (only 13 is supported): {shown:?}");
        let mut refusal = answer::handshake(StatusCode::BAD_REQUEST, &reason);
        answer::set(&mut refusal, header::SEC_WEBSOCKET_VERSION, "13");
        return Err(refusal);
    }
    let violation = |reason: &str| {
        answer::handshake(StatusCode::BAD_REQUEST, &format!("WebSocket protocol violation: {reason}"))
    };
    let keys = all(header::SEC_WEBSOCKET_KEY);
    let key = match keys.as_slice() {
        [] => return Err(violation("missing Sec-WebSocket-Key")),
        [key] => key.trim(),
        _ => return Err(violation("multiple Sec-WebSocket-Key headers")),
    };
    if STANDARD.decode(key).map_or(0, |raw| raw.len()) != 16 {
        let reason = format!("invalid Sec-WebSocket-Key {key:?}, must be a 16 byte base64 encoded string");
        return Err(violation(&reason));
    }
    if origin == Origin::Same
        && let Some(from) = all(header::ORIGIN).first()
    {
        let host = all(header::HOST).first().cloned().unwrap_or_default();
        let from = from.split_once("://").map_or(from.as_str(), |(_, host)| host);
        if !from.eq_ignore_ascii_case(&host) {
            let reason = format!("request Origin {from:?} is not authorized for Host {host:?}");
            return Err(answer::handshake(StatusCode::FORBIDDEN, &reason));
        }
    }
    let mut answer = answer::empty(StatusCode::SWITCHING_PROTOCOLS);
    answer::set(&mut answer, header::CONNECTION, "Upgrade");
    answer::set(&mut answer, header::UPGRADE, "websocket");
    answer::set(&mut answer, header::SEC_WEBSOCKET_ACCEPT, &derive_accept_key(key.as_bytes()));
    if let Some(protocol) = protocol {
        answer::set(&mut answer, header::SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    Ok(answer)
}

/// How often the peer is asked whether it lives, which is also how long it may take to answer.
#[derive(Clone, Copy)]
pub(crate) struct Liveness(pub(crate) Duration);

/// A close frame to send.
pub(crate) type Close = (u16, String);

/// Carries bytes between a websocket and the pipe that is returned, until either ends. How it ended is
/// told to `ended`.
pub(crate) async fn carry<S>(
    stream: S,
    liveness: Option<Liveness>,
    mut closes: mpsc::Receiver<Close>,
    work: &Work,
    ended: impl FnOnce(Ended) + Send + 'static,
) -> DuplexStream
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (near, far) = tokio::io::duplex(PIPE);
    let config = WebSocketConfig::default()
        .read_buffer_size(16 * 1024)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .write_buffer_size(0);
    let socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    work.spawn(async move {
        let (mut sink, mut messages) = socket.split();
        let (mut from_inside, mut to_inside) = tokio::io::split(far);
        let (pongs, heard) = mpsc::channel(1);
        let reading = async {
            loop {
                match messages.next().await {
                    Some(Ok(Message::Binary(bytes))) => {
                        if to_inside.write_all(&bytes).await.is_err() {
                            // The inside is gone; what comes now is only for the close.
                        }
                    }
                    Some(Ok(Message::Text(_))) => {
                        return Reading::Refused(CloseCode::Unsupported, "expected binary message");
                    }
                    Some(Ok(Message::Pong(_))) => {
                        let _ = pongs.try_send(());
                    }
                    Some(Ok(Message::Close(frame))) => {
                        let (code, reason) = frame.map_or((1005, String::new()), |frame| {
                            (frame.code.into(), frame.reason.to_string())
                        });
                        // Reading on sends the echo.
                        let _ = timeout(CLOSE_LIMIT, messages.next()).await;
                        return Reading::Ended(Ended::Closed(code, reason));
                    }
                    Some(Ok(_)) => {}
                    // A deployment names no error here.
                    Some(Err(Error::Protocol(ProtocolError::UnmaskedFrameFromClient))) => {
                        return Reading::Refused(CloseCode::Normal, "");
                    }
                    Some(Err(Error::Protocol(_))) => {
                        return Reading::Refused(CloseCode::Protocol, "protocol error");
                    }
                    Some(Err(_)) | None => return Reading::Ended(Ended::Lost),
                }
            }
        };
        let mut reading = pin!(reading);
        let end = tokio::select! {
            end = &mut reading => Err(end),
            outcome = write(&mut sink, &mut from_inside, liveness, &mut closes, heard) => Ok(outcome),
        };
        let outcome = match end {
            Err(Reading::Ended(end)) => end,
            Err(Reading::Refused(code, reason)) => {
                let _ = timeout(CLOSE_LIMIT, sink.send(close_frame(code, reason))).await;
                Ended::ByLab
            }
            Ok(Err(_)) => Ended::Lost,
            Ok(Ok(())) => {
                // Our close frame is out: the peer's is waited for.
                let _ = timeout(CLOSE_LIMIT, reading).await;
                Ended::ByLab
            }
        };
        ended(outcome);
    });
    near
}

/// Carries bytes without pings, as relays do.
pub(crate) async fn plain<S>(work: &Work, stream: S) -> DuplexStream
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (keep, closes) = mpsc::channel(1);
    carry(stream, None, closes, work, move |_| drop(keep)).await
}

enum Reading {
    Ended(Ended),
    Refused(CloseCode, &'static str),
}

/// Writes what comes from inside, the pings and the close. `Ok` once a close frame was sent.
async fn write(
    sink: &mut (impl SinkExt<Message, Error = Error> + Unpin),
    from_inside: &mut (impl AsyncRead + Unpin),
    liveness: Option<Liveness>,
    closes: &mut mpsc::Receiver<Close>,
    mut heard: mpsc::Receiver<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; WRITE];
    let mut pings = 0_u64;
    let mut due = liveness.map(|Liveness(period)| Instant::now() + period);
    let mut is_waiting = false;
    loop {
        let deadline = async {
            match due {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let message = tokio::select! {
            read = from_inside.read(&mut buffer) => match read? {
                0 => close_frame(CloseCode::Normal, ""),
                got => Message::Binary(Bytes::copy_from_slice(buffer.get(..got).unwrap_or_default())),
            },
            Some((code, reason)) = closes.recv() => close_frame(code.into(), &reason),
            Some(()) = heard.recv() => {
                is_waiting = false;
                continue;
            }
            () = deadline => {
                due = liveness.map(|Liveness(period)| Instant::now() + period);
                if is_waiting {
                    close_frame(CloseCode::Away, "liveness probe failed")
                } else {
                    is_waiting = true;
                    pings += 1;
                    Message::Ping(pings.to_string().into())
                }
            }
        };
        let is_close = message.is_close();
        sink.send(message).await.map_err(io::Error::other)?;
        if is_close {
            return Ok(());
        }
    }
}

fn close_frame(code: CloseCode, reason: &str) -> Message {
    Message::Close(Some(CloseFrame { code, reason: reason.into() }))
}
