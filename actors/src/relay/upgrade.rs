//! How a connection to a relay begins: a node of its region is dialled and asked to upgrade, plainly or to a
//! WebSocket (tailnet-data 2.3 to 2.5).
//!
//! ```text
//! each node: dial -> Upgrade: DERP ------------> 101 -> Wire::Plain
//!                         │ 400-499, or only HTTP/2 (remembered by the link)
//! each node: dial -> Upgrade: websocket, derp -> 101 -> Wire::WebSocket
//! ```

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use secrecy::SecretString;
use tokio::time::timeout;
use warren_core::{relay_link::SILENCE_LIMIT, relay_map::Node};
use warren_observability::redact::{LEAST_SECRET, one_line, redact_cut};
use warren_proto::derp;

use super::request::{self, Headers, RequestError};
use crate::{
    dial::{Alpn, DialError, Dialer, Sent, Target, TlsError},
    websocket::{self, ByteStream, HandshakeError, Limits},
};

/// For one node of a region, so that another gets its chance.
const NODE_LIMIT: Duration = Duration::from_secs(4);
/// Of the body of a refusal this much is told.
const MAX_TOLD: usize = 1024;
/// For the rest of that body.
const BODY_LIMIT: Duration = Duration::from_secs(1);
/// The only subprotocol of relays.
const PROTOCOL: &str = "derp";

/// Relays do not ping WebSockets: whether one lives is found out as with plain links. A message of theirs is
/// at most one frame or a few small ones, and one of ours a part of what is written at once.
const LIMITS: Limits =
    Limits { idle: SILENCE_LIMIT, largest_received: derp::HEADER + (1 << 20), largest_sent: 32 * 1024 };

const HTTP2: &str = "The server wanted us to use HTTP/2, but DERP requires Upgrade which needs HTTP/1.1";

/// Which upgrades a relay is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Upgrades {
    /// The plain one, and a WebSocket from the moment on that it is refused.
    #[default]
    PlainFirst,
    /// A WebSocket only: the deployment says so.
    WebSocketOnly,
}

/// An upgraded connection, not logged in yet.
pub(super) struct Opened {
    pub(super) wire: Wire,
    /// What leaves through it.
    pub(super) sent: Sent,
}

/// What carries the frames.
pub(super) enum Wire {
    Plain(TokioIo<Upgraded>),
    WebSocket(ByteStream<TokioIo<Upgraded>>),
}

/// Why and how a link asks for WebSockets only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fallback {
    /// In the words that deployments know (tailnet-control 5.3).
    pub(super) reason: String,
    pub(super) alpn: Alpn,
}

/// Why no node of a region upgraded.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpgradeError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("the relay refuses to upgrade ({status}){}", told(.body))]
    Refused { status: StatusCode, body: String },
    #[error(
        "the relay answers {0} instead of upgrading; it may be starting or overloaded, and is asked again"
    )]
    Status(StatusCode),
    #[error("the upgrade failed: {0}")]
    Upgrade(hyper::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("{error}; by WebSocket, since plain upgrades do not pass: {reason}")]
    Fallback { error: Box<UpgradeError>, reason: String },
}

fn told(body: &str) -> String {
    if body.is_empty() { String::new() } else { format!(": {body}") }
}

impl UpgradeError {
    /// How relays behind this answer are reached all the same; `None` where a WebSocket would not help.
    pub(super) fn fallback(&self) -> Option<Fallback> {
        match self {
            Self::Refused { status, body } => {
                let status = status.as_u16();
                let reason = format!(
                    "GET failed with status code {status} (a proxy could be disallowing the use of 'Upgrade: derp'): {body}"
                );
                Some(Fallback { reason, alpn: Alpn::Http1 })
            }
            Self::Request(RequestError::Dial(DialError::Tls { reason: TlsError::OnlyHttp2, .. })) => {
                // Such a server speaks HTTP/1.1 to whoever announces nothing.
                Some(Fallback { reason: HTTP2.to_owned(), alpn: Alpn::Nothing })
            }
            _ => None,
        }
    }
}

/// Asks the nodes in their order for a plain upgrade. If none grants it, what forces a WebSocket is told
/// before everything else.
pub(super) async fn plain(
    dialer: &Dialer,
    nodes: &[Node],
    headers: &Headers,
) -> Result<Opened, UpgradeError> {
    let mut errors = Vec::new();
    for node in nodes {
        match plain_at(dialer, node, headers).await {
            Ok(opened) => return Ok(opened),
            Err(error) => errors.push(error),
        }
    }
    let forcing = errors.iter().position(|error| error.fallback().is_some()).unwrap_or_default();
    Err(errors.into_iter().nth(forcing).unwrap_or(RequestError::NoRelay.into()))
}

/// Asks the nodes in their order for a WebSocket. If none grants it, the first error is told.
pub(super) async fn web_socket(
    dialer: &Dialer,
    nodes: &[Node],
    headers: &Headers,
    alpn: Alpn,
) -> Result<Opened, UpgradeError> {
    let mut first_error = None;
    for node in nodes {
        match web_socket_at(dialer, node, headers, alpn).await {
            Ok(opened) => return Ok(opened),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.unwrap_or(RequestError::NoRelay.into()))
}

async fn plain_at(dialer: &Dialer, node: &Node, headers: &Headers) -> Result<Opened, UpgradeError> {
    let asks = HeaderMap::from_iter([
        (header::UPGRADE, HeaderValue::from_static("DERP")),
        (header::CONNECTION, HeaderValue::from_static("Upgrade")),
    ]);
    let (response, sent) = ask(dialer, node, request::target(node), headers, asks).await?;
    let wire = Wire::Plain(switched(response).await?);
    Ok(Opened { wire, sent })
}

async fn web_socket_at(
    dialer: &Dialer,
    node: &Node,
    headers: &Headers,
    alpn: Alpn,
) -> Result<Opened, UpgradeError> {
    let key = websocket::key();
    let asks = websocket::request_headers(&key, Some(PROTOCOL));
    let target = Target { alpn, ..request::target(node) };
    let (response, sent) = ask(dialer, node, target, headers, asks).await?;
    websocket::check_response(response.headers(), &key, Some(PROTOCOL))?;
    let (stream, _) = websocket::byte_stream(switched(response).await?, LIMITS).await;
    Ok(Opened { wire: Wire::WebSocket(stream), sent })
}

/// Sends a request to upgrade; any other answer than 101 is an error.
async fn ask(
    dialer: &Dialer,
    node: &Node,
    target: Target,
    headers: &Headers,
    asks: HeaderMap,
) -> Result<(Response<Incoming>, Sent), UpgradeError> {
    let mut request: Request<Empty<Bytes>> = request::get(node, "/derp", headers)?;
    request.headers_mut().extend(asks);
    let stream = dialer.connect(&target, NODE_LIMIT).await.map_err(RequestError::from)?;
    let sent = stream.sent();
    let response = request::send(stream, request).await?;
    match response.status() {
        StatusCode::SWITCHING_PROTOCOLS => Ok((response, sent)),
        status if status.is_client_error() => {
            Err(UpgradeError::Refused { status, body: body(response.into_body(), headers).await })
        }
        status => Err(UpgradeError::Status(status)),
    }
}

async fn switched(response: Response<Incoming>) -> Result<TokioIo<Upgraded>, UpgradeError> {
    hyper::upgrade::on(response).await.map(TokioIo::new).map_err(UpgradeError::Upgrade)
}

/// What a refusal says, as it may be shown and told to others: other machines read it in our node.
async fn body(mut body: Incoming, headers: &Headers) -> String {
    let mut bytes = Vec::new();
    let reading = async {
        while bytes.len() < MAX_TOLD {
            let Some(Ok(frame)) = body.frame().await else { return };
            if let Ok(data) = frame.into_data() {
                bytes.extend(data);
            }
        }
    };
    // What came in time is told.
    let _ = timeout(BODY_LIMIT, reading).await;
    tellable(&bytes, headers)
}

/// Without what would disturb a terminal, and without our secrets, which some servers echo.
fn tellable(bytes: &[u8], headers: &Headers) -> String {
    let values = headers.iter().filter_map(|(_, value)| value.to_str().ok());
    let secrets: Vec<SecretString> =
        values.filter(|it| it.len() >= LEAST_SECRET).map(SecretString::from).collect();
    let text = one_line(&redact_cut(&String::from_utf8_lossy(bytes), &secrets), MAX_TOLD);
    let text = text.trim();
    text.get(..text.floor_char_boundary(MAX_TOLD)).unwrap_or_default().to_owned()
}

#[cfg(test)]
pub(super) mod tests;
