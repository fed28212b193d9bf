//! The client's side of the local API: HTTP and JSON on the service's second Unix socket, for what
//! leg B cannot say.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

use super::{
    Reach,
    exit::{CliError, Exit},
};

/// Limit of one plain request.
const LIMIT: Duration = Duration::from_secs(10);

/// Limit of forgetting: above what ending the tunnel takes at worst.
const FORGET_LIMIT: Duration = Duration::from_secs(35);

/// Largest answer that is read whole, in bytes.
const MAX_ANSWER: usize = 8 << 20;

/// Longest line of a stream, in bytes.
const MAX_LINE: usize = 64 << 10;

/// The local API of one service.
#[derive(Clone)]
pub(crate) struct Api {
    socket: PathBuf,
}

impl Api {
    /// The API of the service that `reach` names.
    pub(crate) fn new(reach: &Reach) -> Self {
        Self { socket: reach.socket("api.sock") }
    }

    /// Asks for a JSON document.
    pub(crate) async fn get(&self, path: &str) -> Result<serde_json::Value, CliError> {
        let answer = limited(self.send(Method::GET, path)).await?;
        let body = limited(async { read(answer).await }).await?;
        serde_json::from_slice(&body)
            .map_err(|error| CliError::failed(format!("the service sent no JSON: {error}")))
    }

    /// Makes the service forget its copy of the token.
    pub(crate) async fn erase_credentials(&self) -> Result<(), CliError> {
        // The tunnel ends first, which can take its whole ladder.
        within(FORGET_LIMIT, self.send(Method::DELETE, "/v1/credentials")).await.map(drop)
    }

    /// Follows a stream of JSON lines.
    pub(crate) async fn stream(&self, path: &str) -> Result<Lines, CliError> {
        let answer = limited(self.send(Method::GET, path)).await?;
        Ok(Lines { body: answer.into_body(), held: Vec::new() })
    }

    async fn send(&self, method: Method, path: &str) -> Result<Response<Incoming>, CliError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| unreachable_socket(&self.socket, &error))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(CliError::failed)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "localhost")
            .body(Empty::<Bytes>::new())
            .map_err(CliError::failed)?;
        let answer = sender.send_request(request).await.map_err(CliError::failed)?;
        if answer.status().is_success() { Ok(answer) } else { Err(refusal(answer).await) }
    }
}

/// A stream of JSON lines.
pub(crate) struct Lines {
    body: Incoming,
    held: Vec<u8>,
}

impl Lines {
    /// The next line, or `None` at the end of the stream. A service that falls silent is an error.
    pub(crate) async fn next(&mut self) -> Result<Option<serde_json::Value>, CliError> {
        limited(self.line()).await
    }

    async fn line(&mut self) -> Result<Option<serde_json::Value>, CliError> {
        loop {
            if let Some(end) = self.held.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.held.drain(..=end).collect();
                return serde_json::from_slice(&line).map(Some).map_err(CliError::failed);
            }
            if self.held.len() > MAX_LINE {
                return Err(CliError::failed("the service sent a line without end"));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            if let Ok(data) = frame.map_err(CliError::failed)?.into_data() {
                self.held.extend_from_slice(&data);
            }
        }
    }
}

/// What to tell a person whose service cannot be reached.
pub(crate) fn unreachable_socket(socket: &std::path::Path, error: &std::io::Error) -> CliError {
    let path = socket.display();
    match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => CliError::new(
            Exit::NotRunning,
            format!("the service does not run (nobody listens at {path}): start it with `warren service`"),
        ),
        std::io::ErrorKind::PermissionDenied => CliError::new(
            Exit::Denied,
            format!("you may not talk to the service at {path}: ask to be added to the group that owns it"),
        ),
        _ => CliError::failed(format!("cannot reach the service at {path}: {error}")),
    }
}

async fn refusal(answer: Response<Incoming>) -> CliError {
    let status = answer.status();
    let body = limited(read(answer)).await.unwrap_or_default();
    let json: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let words = json.get("error").and_then(|error| error.as_str()).map(str::to_owned);
    let words = words.unwrap_or_else(|| format!("the service answered {status}"));
    let exit = match status {
        StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => Exit::Denied,
        StatusCode::GATEWAY_TIMEOUT => Exit::Timeout,
        StatusCode::SERVICE_UNAVAILABLE => Exit::Unhealthy,
        StatusCode::NOT_IMPLEMENTED => Exit::VersionMismatch,
        _ => Exit::Failed,
    };
    CliError::new(exit, words)
}

async fn read(answer: Response<Incoming>) -> Result<Bytes, CliError> {
    let body = Limited::new(answer.into_body(), MAX_ANSWER);
    Ok(body.collect().await.map_err(CliError::failed)?.to_bytes())
}

async fn limited<T>(request: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    within(LIMIT, request).await
}

async fn within<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, CliError>>,
) -> Result<T, CliError> {
    let late = || CliError::new(Exit::Timeout, format!("the service did not answer within {limit:?}"));
    timeout(limit, request).await.unwrap_or_else(|_| Err(late()))
}
