//! Requests to the deployment over HTTP/1.1: one request per connection, no redirects, no cookies. What is
//! refused comes back in words for people (tailnet-control 1).

use std::{fmt, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, client::conn::http1, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use url::Url;
use uuid::Uuid;
use warren_core::server_version::{self, VersionError};
use warren_observability::redact::LEAST_SECRET;

use crate::dial::{DialError, Dialer, Stream, Target, TlsError};

use super::refusal::{Redirect, Refusal};

/// For a whole request, dialling and body included.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// The header that authenticates; sent exactly once.
const TOKEN: HeaderName = HeaderName::from_static("coder-session-token");
/// What every answer of a deployment says about it.
const BUILD_VERSION: HeaderName = HeaderName::from_static("x-coder-build-version");
/// The most that the head of a response may take.
const MAX_HEAD: usize = 64 * 1024;
/// The most that a body may take. A relay map of a thousand regions is a tenth of this.
const MAX_BODY: usize = 4 * 1024 * 1024;
/// The most that is read of the body of a refusal.
const MAX_REFUSAL: usize = 64 * 1024;
/// Headers that the connection needs for itself; nobody else sets them.
const OURS: [HeaderName; 7] = [
    TOKEN,
    header::HOST,
    header::CONNECTION,
    header::UPGRADE,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::COOKIE,
];

/// Asks one deployment, as one user or as nobody. Token and headers go to the deployment's own origin only.
#[derive(Clone)]
pub struct ApiClient {
    dialer: Arc<Dialer>,
    url: Url,
    token: Option<SecretString>,
    headers: HeaderMap,
}

impl fmt::Debug for ApiClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiClient").field("origin", &origin(&self.url)).finish_non_exhaustive()
    }
}

/// Why the deployment did not give what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The URL is none of a deployment.
    #[error("{0:?} is not the URL of a deployment: use https://HOST or http://HOST")]
    Url(String),
    /// The token cannot be sent.
    #[error("the session token has characters that no token has; sign in again (`warren login`)")]
    Token,
    /// No connection came about.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The server took too long.
    #[error(
        "GET {url}: the server did not answer within {} seconds; check that the URL is that of a Coder \
         deployment, and that it is not overloaded", limit.as_secs()
    )]
    Deadline {
        /// What was asked for.
        url: String,
        /// The limit.
        limit: Duration,
    },
    /// The connection broke, or what came is not HTTP.
    #[error("GET {url}: the answer is not HTTP: {reason}; check host, port and scheme of the URL")]
    NotHttp {
        /// What was asked for.
        url: String,
        /// What was wrong.
        reason: String,
    },
    /// The server says that the deployment is elsewhere. It is not followed: the token stays where it belongs.
    #[error(transparent)]
    Redirect(Redirect),
    /// The server refused.
    #[error(transparent)]
    Refused(Box<Refusal>),
    /// The answer is larger than anything a deployment sends.
    #[error(
        "GET {url}: the answer is larger than {MAX_BODY} bytes; check that the URL is that of a Coder deployment"
    )]
    TooLarge {
        /// What was asked for.
        url: String,
    },
    /// The deployment is too old.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// The answer is not what a deployment sends.
    #[error("GET {url}: the answer is not that of a Coder deployment: {reason}; check the URL")]
    Unreadable {
        /// What was asked for.
        url: String,
        /// What was wrong.
        reason: String,
    },
}

impl ApiError {
    /// Whether the token is not accepted (any more), so that only signing in helps.
    pub fn requires_sign_in(&self) -> bool {
        match self {
            Self::Token => true,
            Self::Refused(refusal) => refusal.requires_sign_in(),
            _ => false,
        }
    }

    /// What the server answered, if it refused.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
}

/// The user that a token belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct User {
    /// The user's id, the owner of the workspaces.
    #[serde(deserialize_with = "uuid")]
    pub id: Uuid,
    /// The user's name.
    pub username: String,
}

/// What a deployment says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BuildInfo {
    /// Its version, such as `v2.31.1`.
    pub version: String,
    /// Its access URL, as its administrator has set it.
    #[serde(default)]
    pub external_url: String,
}

/// A switched connection.
#[derive(Debug)]
pub(super) struct Switched {
    /// The response's headers, for the handshake's checks.
    pub(super) headers: HeaderMap,
    /// The byte stream.
    pub(super) stream: TokioIo<Upgraded>,
}

impl ApiClient {
    /// Asks the deployment at `url`; `headers` are sent once each, in order, repeated names kept.
    pub fn new(
        dialer: impl Into<Arc<Dialer>>,
        url: Url,
        token: Option<SecretString>,
        headers: Vec<(String, SecretString)>,
    ) -> Self {
        let mut sent = HeaderMap::new();
        for (name, value) in &headers {
            let (Ok(name), Ok(value)) = (name.parse(), secret_value(value)) else { continue };
            if !OURS.contains(&name) && !name.as_str().starts_with("sec-websocket-") {
                sent.append(name, value);
            }
        }
        Self { dialer: dialer.into(), url, token, headers: sent }
    }

    /// The deployment's URL.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The user that the token belongs to.
    pub async fn current_user(&self) -> Result<User, ApiError> {
        self.get_json("/api/v2/users/me", REQUEST_LIMIT).await
    }

    /// What the deployment says about itself; needs no token. One that is too old is an error.
    pub async fn build_info(&self) -> Result<BuildInfo, ApiError> {
        let info: BuildInfo = self.get_json("/api/v2/buildinfo", REQUEST_LIMIT).await?;
        server_version::check(&info.version)?;
        Ok(info)
    }

    /// The body of a 200 answer to `GET path`, read as JSON.
    pub async fn get_json<T: DeserializeOwned>(&self, path: &str, limit: Duration) -> Result<T, ApiError> {
        let body = self.get(path, limit).await?;
        let unreadable = |error: serde_json::Error| ApiError::Unreadable {
            url: self.shown(path),
            // Without the text: it may be anything, of any length.
            reason: format!("not the JSON expected, line {} column {}", error.line(), error.column()),
        };
        serde_json::from_slice(&body).map_err(unreadable)
    }

    /// The body of a 200 answer to `GET path`, capped.
    pub async fn get(&self, path: &str, limit: Duration) -> Result<Bytes, ApiError> {
        let request = self.request(path, None)?;
        let read = async |response: Response<Incoming>| {
            if response.status() != StatusCode::OK {
                return Err(self.refused(path, response).await);
            }
            check_version(response.headers())?;
            self.body(path, response.into_body()).await
        };
        let work = async { self.exchange(self.dial().await?, request, read).await };
        self.within(path, limit, work).await
    }

    /// Asks for `path` with `headers` on top, to switch to another protocol.
    pub(super) async fn upgrade(
        &self,
        path: &str,
        query: &str,
        headers: HeaderMap,
        limit: Duration,
    ) -> Result<Switched, ApiError> {
        let request = self.upgrade_request(path, query, headers)?;
        let work = async { self.switch(self.dial().await?, path, request).await };
        self.within(path, limit, work).await
    }

    /// As [`Self::upgrade`], over a stream that is there.
    #[cfg(feature = "fuzzing")]
    pub(super) async fn upgrade_over<S>(
        &self,
        stream: S,
        path: &str,
        headers: HeaderMap,
        limit: Duration,
    ) -> Result<Switched, ApiError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let request = self.upgrade_request(path, "", headers)?;
        self.within(path, limit, self.switch(stream, path, request)).await
    }
}

impl ApiClient {
    async fn within<T>(
        &self,
        path: &str,
        limit: Duration,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        match timeout(limit, work).await {
            Ok(result) => result,
            Err(_) => Err(ApiError::Deadline { url: self.shown(path), limit }),
        }
    }

    async fn dial(&self) -> Result<Stream, ApiError> {
        let target = self.target()?;
        // The outer limit is shorter: it says which request was not answered.
        Ok(self.dialer.connect(&target, REQUEST_LIMIT).await?)
    }

    async fn exchange<S, T>(
        &self,
        stream: S,
        request: Request<Empty<Bytes>>,
        read: impl AsyncFnOnce(Response<Incoming>) -> Result<T, ApiError>,
    ) -> Result<T, ApiError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let path = request.uri().path().to_owned();
        let builder = http1::Builder::new().max_buf_size(MAX_HEAD).clone();
        let (mut sender, connection) =
            builder.handshake(TokioIo::new(stream)).await.map_err(|error| self.not_http(&path, &error))?;
        let conversation = async {
            let response =
                sender.send_request(request).await.map_err(|error| self.not_http(&path, &error))?;
            read(response).await
        };
        drive(connection.with_upgrades(), conversation).await
    }

    async fn switch<S>(
        &self,
        stream: S,
        path: &str,
        request: Request<Empty<Bytes>>,
    ) -> Result<Switched, ApiError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let read = async |response: Response<Incoming>| {
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                return Err(self.refused(path, response).await);
            }
            let headers = response.headers().clone();
            let upgraded = hyper::upgrade::on(response).await.map_err(|error| self.not_http(path, &error))?;
            Ok(Switched { headers, stream: TokioIo::new(upgraded) })
        };
        self.exchange(stream, request, read).await
    }

    fn upgrade_request(
        &self,
        path: &str,
        query: &str,
        headers: HeaderMap,
    ) -> Result<Request<Empty<Bytes>>, ApiError> {
        let mut request = self.request(path, Some(query))?;
        request.headers_mut().remove(header::CONNECTION);
        request.headers_mut().extend(headers);
        Ok(request)
    }

    fn request(&self, path: &str, query: Option<&str>) -> Result<Request<Empty<Bytes>>, ApiError> {
        let uri = query.map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
        let malformed = |_| ApiError::Url(origin(&self.url));
        let mut request = Request::get(uri).body(Empty::new()).map_err(malformed)?;
        let headers = request.headers_mut();
        headers.insert(header::HOST, self.host()?);
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        for name in self.headers.keys() {
            headers.remove(name);
        }
        headers.extend(self.headers.clone());
        if let Some(token) = &self.token {
            headers.insert(TOKEN, secret_value(token).map_err(|_| ApiError::Token)?);
        }
        Ok(request)
    }

    fn target(&self) -> Result<Target, ApiError> {
        Target::of_url(&self.url).ok_or_else(|| ApiError::Url(origin(&self.url)))
    }

    fn host(&self) -> Result<HeaderValue, ApiError> {
        let host = self.url.host_str().unwrap_or_default();
        let host = self.url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        HeaderValue::from_str(&host).map_err(|_| ApiError::Url(origin(&self.url)))
    }

    async fn body(&self, path: &str, mut body: Incoming) -> Result<Bytes, ApiError> {
        let mut whole = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.not_http(path, &error))?;
            let Ok(data) = frame.into_data() else { continue };
            if whole.len() + data.len() > MAX_BODY {
                return Err(ApiError::TooLarge { url: self.shown(path) });
            }
            whole.extend_from_slice(&data);
        }
        Ok(whole.freeze())
    }

    /// Reads what can be read of the body and says what the answer means.
    async fn refused(&self, path: &str, response: Response<Incoming>) -> ApiError {
        let (head, mut body) = response.into_parts();
        if head.status.is_redirection() {
            return ApiError::Redirect(Redirect::new(
                self.shown(path),
                &self.url,
                head.status,
                &head.headers,
            ));
        }
        let mut text = BytesMut::new();
        while text.len() < MAX_REFUSAL {
            let Some(Ok(frame)) = body.frame().await else { break };
            if let Ok(data) = frame.into_data() {
                let room = MAX_REFUSAL - text.len();
                text.extend(data.into_iter().take(room));
            }
        }
        let refusal = Refusal::new(self.shown(path), head.status, &head.headers, &text);
        ApiError::Refused(Box::new(refusal.without(&self.secrets())))
    }

    fn secrets(&self) -> Vec<SecretString> {
        let values = self.headers.values().filter_map(|value| value.to_str().ok());
        let values = values.filter(|value| value.len() >= LEAST_SECRET).map(SecretString::from);
        values.chain(self.token.clone()).collect()
    }

    fn not_http(&self, path: &str, error: &hyper::Error) -> ApiError {
        if let Some(reason) = TlsError::of_request(error) {
            let host = self.url.host_str().unwrap_or_default().to_owned();
            return ApiError::Dial(DialError::Tls { host, reason });
        }
        // The outer text of hyper names the layer, the inner one the reason.
        let reason = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
        ApiError::NotHttp { url: self.shown(path), reason }
    }

    /// The request's URL as it may be shown: without query, which may hold a secret.
    fn shown(&self, path: &str) -> String {
        format!("{}{path}", origin(&self.url))
    }
}

fn uuid<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
}

const USER_AGENT: &str = concat!("warren/", env!("CARGO_PKG_VERSION"));

/// The version is told with every answer, so that asking for it costs nothing. A proxy in between may have
/// taken it away: then there is nothing to check.
fn check_version(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(version) = headers.get(BUILD_VERSION) else { return Ok(()) };
    Ok(server_version::check(&String::from_utf8_lossy(version.as_bytes()))?)
}

fn origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

fn secret_value(value: &SecretString) -> Result<HeaderValue, header::InvalidHeaderValue> {
    let mut value = HeaderValue::from_bytes(value.expose_secret().as_bytes())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Runs a conversation over its connection, which moves the bytes but has nothing to say of its own.
async fn drive<T>(connection: impl Future, conversation: impl Future<Output = T>) -> T {
    tokio::pin!(connection, conversation);
    let mut is_moving = true;
    loop {
        tokio::select! {
            biased;
            outcome = &mut conversation => return outcome,
            _ = &mut connection, if is_moving => is_moving = false,
        }
    }
}

#[cfg(test)]
mod tests;
