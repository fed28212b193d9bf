//! The local API: HTTP and JSON for what leg B cannot say, and metrics and health for whoever watches.
//!
//! ```text
//! api.sock   everything below, for everybody who may connect; what changes something, for the owner
//! loopback   /metrics, /healthz, /readyz, /startupz and / only, without names, for whoever is on this machine
//! ```
//!
//! The listeners belong to the composition and survive this part. Each connection is a task: what panics in
//! one is the end of that connection.

use std::{io, sync::Arc, time::Duration};

use axum::{Extension, Router, extract::Request, middleware, routing};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    sync::Semaphore,
    time::sleep,
};
use warren_actors::runtime::{Context, Part, PartError, Tasks};

use crate::{
    access::{self, Caller},
    facts::Service,
    service::Surface,
};

mod answer;
mod control;
mod look;
mod ping;
mod resolve;
mod scrape;
#[cfg(test)]
mod tests;

use answer::Refusal;

/// Connections at the same time, for each listener.
const MAX_CONNECTIONS: usize = 64;
/// Those of one user at the Unix socket, so that one user who follows events cannot shut out the others.
const MAX_CONNECTIONS_PER_USER: usize = 32;
/// How long a request's head may take to arrive.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// How long a client on loopback may take to read anything, in milliseconds.
const WRITE_LIMIT_MS: u32 = 10_000;
/// Bytes of a request's head.
const MAX_HEAD: usize = 16 * 1024;
/// Bytes of a request's body.
const MAX_BODY: usize = 64 * 1024;
/// The pause after a failed accept: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// For an answer of the tunnel that somebody at a screen waits for.
const TUNNEL_LIMIT: Duration = Duration::from_secs(1);

/// This part hears nothing: its questions come by its sockets.
#[derive(Debug)]
pub enum Message {}

/// The part.
pub struct Api {
    shared: Arc<Shared>,
}

/// What every request may look at.
struct Shared {
    service: Arc<Service>,
    surface: Arc<Surface>,
}

impl Api {
    /// The API of this service.
    pub fn new(service: Arc<Service>, surface: Arc<Surface>) -> Self {
        Self { shared: Arc::new(Shared { service, surface }) }
    }
}

impl Part for Api {
    type Message = Message;
    type State = ();

    async fn start(&self, context: &Context<Message>) -> Result<(), PartError> {
        let listener = self.shared.surface.api.try_clone()?;
        listener.set_nonblocking(true)?;
        let router = local(Arc::clone(&self.shared));
        context.tasks.spawn(serve_unix(UnixListener::from_std(listener)?, router));
        if let Some(listener) = &self.shared.surface.metrics {
            let listener = listener.try_clone()?;
            listener.set_nonblocking(true)?;
            let router = public(Arc::clone(&self.shared)).layer(middleware::from_fn(on_this_machine));
            context.tasks.spawn(serve_tcp(TcpListener::from_std(listener)?, router));
        }
        Ok(())
    }

    async fn handle(&self, _: &Context<Message>, (): &mut (), message: Message) -> Result<(), PartError> {
        match message {}
    }
}

/// What may be seen without authentication: no names, addresses or keys.
fn public(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", routing::get(look::page))
        .route("/metrics", routing::get(scrape::metrics))
        .route("/healthz", routing::get(look::healthz))
        .route("/readyz", routing::get(look::readyz))
        .route("/startupz", routing::get(look::startupz))
        .fallback(async || Refusal::not_found("there is no such page"))
        .method_not_allowed_fallback(wrong_method)
        .with_state(shared)
}

/// Everything, for who may connect to the Unix socket.
fn local(shared: Arc<Shared>) -> Router {
    let routes = Router::new()
        .route("/v1/status", routing::get(look::status))
        .route("/v1/netcheck", routing::get(look::netcheck))
        .route("/v1/tree", routing::get(look::tree))
        .route("/v1/logs", routing::get(look::logs))
        .route("/v1/events", routing::get(look::events))
        .route("/v1/ping/{agent}", routing::get(ping::ping))
        .route("/v1/credentials", routing::delete(control::forget));
    #[cfg(feature = "faults")]
    let routes = routes.route("/v1/fault", routing::post(control::fault));
    let routes = routes
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY));
    routes.with_state(Arc::clone(&shared)).merge(public(shared))
}

async fn wrong_method() -> Refusal {
    Refusal::not_allowed("this page does not take that method")
}

/// A browser can be made to ask a name that leads here (DNS rebinding): only names of this machine count.
async fn on_this_machine(
    request: Request,
    next: middleware::Next,
) -> Result<axum::response::Response, Refusal> {
    let host = request.headers().get(http::header::HOST).and_then(|host| host.to_str().ok());
    if host.is_some_and(is_local_name) {
        Ok(next.run(request).await)
    } else {
        Err(Refusal::forbidden("this is served for names of this machine only, such as localhost"))
    }
}

fn is_local_name(host: &str) -> bool {
    let without_port = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = without_port.trim_start_matches('[').trim_end_matches(']');
    let is_loopback = name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    is_loopback || name.eq_ignore_ascii_case("localhost")
}

async fn serve_unix(listener: UnixListener, router: Router) {
    let places = Places::default();
    let users = access::Places::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_USER);
    loop {
        let (place, accepted) = places.next(async || listener.accept().await).await;
        let (caller, stream) =
            match accepted.and_then(|(stream, _): (UnixStream, _)| Ok((Caller::of(&stream)?, stream))) {
                Ok(accepted) => accepted,
                Err(error) => {
                    pause(&error).await;
                    continue;
                }
            };
        match users.take(caller) {
            Some(share) => places.serve((place, share), stream, router.clone().layer(Extension(caller))),
            None => tracing::warn!(uid = caller.uid, "a connection too many is turned away"),
        }
    }
}

async fn serve_tcp(listener: TcpListener, router: Router) {
    let places = Places::default();
    loop {
        let (place, accepted) = places.next(async || listener.accept().await).await;
        match accepted {
            Ok((stream, _)) => {
                // Who asks and never reads gives the place back.
                let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, WRITE_LIMIT_MS);
                places.serve(place, stream, router.clone());
            }
            Err(error) => pause(&error).await,
        }
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    sleep(ACCEPT_PAUSE).await;
}

/// The connections of one listener: at most so many, and each by itself.
struct Places {
    free: Arc<Semaphore>,
    connections: Tasks,
}

type Place = Option<tokio::sync::OwnedSemaphorePermit>;

impl Default for Places {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(MAX_CONNECTIONS)), connections: Tasks::default() }
    }
}

impl Places {
    /// The next connection, when there is a place for it.
    async fn next<T>(&self, accept: impl AsyncFnOnce() -> T) -> (Place, T) {
        let place = Arc::clone(&self.free).acquire_owned().await.ok();
        (place, accept().await)
    }

    /// Serves one connection, which keeps its place until it ends.
    fn serve<P, S>(&self, place: P, stream: S, router: Router)
    where
        P: Send + 'static,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.connections.spawn(async move {
            let _place = place;
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_LIMIT)
                .max_buf_size(MAX_HEAD)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a connection of the local API ended early");
            }
        });
    }
}
