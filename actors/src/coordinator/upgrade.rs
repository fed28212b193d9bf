//! How the control connection begins: an HTTP request to the deployment that becomes a WebSocket
//! (tailnet-control 1.12).

use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;

use super::http::{ApiClient, ApiError};
use crate::websocket::{self, ByteStream, Handle, HandshakeError, Limits};

/// Deployments ping every 15 s: without anything for three times as long the connection is dead. They send
/// at most about 70 KiB in one message; the limit is for what is no deployment.
pub(super) const LIMITS: Limits =
    Limits { idle: Duration::from_secs(45), largest_received: 4 * 1024 * 1024, largest_sent: 64 * 1024 };

/// Why no WebSocket came about.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The request failed or was refused.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The server switched protocols, but not as it should.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
}

/// Opens a WebSocket at `path` of the deployment.
pub(super) async fn open(
    client: &ApiClient,
    path: &str,
    query: &str,
    limit: Duration,
) -> Result<(ByteStream<TokioIo<Upgraded>>, Handle<TokioIo<Upgraded>>), OpenError> {
    let key = websocket::key();
    let switched = client.upgrade(path, query, websocket::request_headers(&key, None), limit).await?;
    websocket::check_response(&switched.headers, &key, None)?;
    Ok(websocket::byte_stream(switched.stream, LIMITS).await)
}
