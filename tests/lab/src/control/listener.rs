//! The deployment's listener: routes, who may come in, the upgrades, and the faults on the way
//! (tailnet-control 1 and 10).

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};

use super::{
    State,
    answer::{self, Answer, SIGNED_OUT},
    cork::Socket,
    fault::{Check, Endpoint, HttpFault},
    record, relay_map, rpc,
    telemetry::{self, Device},
    version, websocket,
};
use crate::{relay, work::Work};

/// The listener's port is taken from the start, so a failure to accept is the process's: pause, go on.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who may be somewhere.
enum Visitor {
    Welcome,
    Refused(Box<Answer>),
}

/// What serves one listener: the deployment itself, or a relay that stands alone.
#[derive(Clone)]
pub(crate) enum Site {
    /// Everything.
    Deployment(Arc<State>),
    /// `/derp` only.
    Relay(Arc<State>, relay::Relay),
}

impl Site {
    fn state(&self) -> &Arc<State> {
        match self {
            Self::Deployment(state) | Self::Relay(state, _) => state,
        }
    }

    fn relay(&self) -> &relay::Relay {
        match self {
            Self::Deployment(state) => &state.relay,
            Self::Relay(_, relay) => relay,
        }
    }
}

/// Accepts connections until the lab ends.
pub(crate) async fn listen(listener: TcpListener, site: Site, work: Work) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (site, connection_work) = (site.clone(), work.clone());
                work.spawn(async move { serve(stream, site, connection_work).await });
            }
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, site: Site, work: Work) {
    let _ = stream.set_nodelay(true);
    let socket = site.relay().manners().greets_at_once.then(|| Socket::of(&stream)).and_then(Result::ok);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let (site, work) = (site.clone(), work.clone());
        if let Some(socket) = &socket {
            request.extensions_mut().insert(socket.clone());
        }
        async move { respond(site, work, request).await }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // A peer that breaks off, and a fault that hangs up, both end here.
    let _ = connection.with_upgrades().await;
}

async fn respond(site: Site, work: Work, request: Request<Incoming>) -> Result<Answer, io::Error> {
    let state = Arc::clone(site.state());
    let place = state.recorder.request(recorded(&request));
    let is_for_relay = collapsed(request.uri().path()).starts_with("/derp");
    if is_for_relay && site.relay().manners().is_gone {
        return Err(io::Error::other("the relay is gone on purpose"));
    }
    if is_for_relay && request.uri().path().ends_with("/latency-check") {
        tokio::time::sleep(site.relay().manners().latency).await;
    }
    let endpoint = match &site {
        Site::Deployment(_) => endpoint(request.uri().path()),
        Site::Relay(..) => Endpoint::Other,
    };
    let mut answer = match state.faults.http().strike(&endpoint) {
        Some(HttpFault::Hangup) => return Err(io::Error::other("hung up on purpose")),
        Some(HttpFault::Silent) => std::future::pending().await,
        Some(HttpFault::Slow(delay)) => {
            tokio::time::sleep(delay).await;
            route(&site, &work, request)
        }
        Some(HttpFault::Status(status, message)) => answer::error(status, &message),
        Some(HttpFault::Answer(status, kind, body)) => answer::with_body(status, &kind, body),
        Some(HttpFault::Redirect(target)) => {
            let mut answer = answer::empty(StatusCode::TEMPORARY_REDIRECT);
            answer::set(&mut answer, header::LOCATION, &target);
            answer
        }
        None => route(&site, &work, request),
    };
    // The relay's own upgrade is written by another hand in a deployment, without these.
    if !answer.headers().contains_key("derp-version") {
        answer::finish(&mut answer);
    }
    state.recorder.answered(place, answer.status().as_u16());
    Ok(answer)
}

fn recorded(request: &Request<Incoming>) -> record::Request {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    record::Request {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        query: query(request).collect(),
        headers: request.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
        status: None,
    }
}

fn query<B>(request: &Request<B>) -> impl Iterator<Item = (String, String)> {
    let query = request.uri().query().unwrap_or_default();
    url::form_urlencoded::parse(query.as_bytes()).map(|(key, value)| (key.into_owned(), value.into_owned()))
}

fn parameter<B>(request: &Request<B>, name: &str) -> Option<String> {
    query(request).find(|(key, value)| key == name && !value.is_empty()).map(|(_, value)| value)
}

fn endpoint(path: &str) -> Endpoint {
    match collapsed(path).as_str() {
        "/api/v2/users/me" => Endpoint::UsersMe,
        "/api/v2/workspaceagents/connection" => Endpoint::Connection,
        "/api/v2/tailnet" => Endpoint::Tailnet,
        "/api/v2/buildinfo" => Endpoint::BuildInfo,
        "/derp" => Endpoint::Derp,
        "/derp/latency-check" => Endpoint::LatencyCheck,
        _ => Endpoint::Other,
    }
}

/// Runs of slashes count as one.
fn collapsed(path: &str) -> String {
    let mut collapsed = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !collapsed.ends_with('/') {
            collapsed.push(character);
        }
    }
    collapsed
}

fn route(site: &Site, work: &Work, request: Request<Incoming>) -> Answer {
    let path = collapsed(request.uri().path());
    match (site, path.as_str()) {
        (_, "/derp/latency-check") => answer::empty(StatusCode::OK),
        (_, "/derp") => relay_upgrade(site, work, request),
        (Site::Relay(..), _) => answer::text(StatusCode::NOT_FOUND, "404 page not found\n"),
        (Site::Deployment(state), path) => deployment(state, work, path, request),
    }
}

fn deployment(state: &Arc<State>, work: &Work, path: &str, request: Request<Incoming>) -> Answer {
    let handler = match path {
        "/healthz" | "/latency-check" => return answer::text(StatusCode::OK, "OK"),
        "/api/v2/buildinfo"
        | "/api/v2/users/me"
        | "/api/v2/workspaceagents/connection"
        | "/api/v2/tailnet"
        | "/api/v2/experiments" => path,
        _ => return answer::error(StatusCode::NOT_FOUND, "Route not found."),
    };
    if request.method() != Method::GET {
        let mut answer = answer::empty(StatusCode::METHOD_NOT_ALLOWED);
        answer::set(&mut answer, header::ALLOW, "GET");
        return answer;
    }
    match handler {
        "/api/v2/buildinfo" => {
            answer::json(StatusCode::OK, &answer::build_info(&state.url(), state.deployment))
        }
        "/api/v2/experiments" => answer::json(StatusCode::OK, &json!([])),
        "/api/v2/users/me" => match authenticate(state, &request) {
            Visitor::Welcome => answer::json(
                StatusCode::OK,
                &answer::user(state.user, &state.options.username, state.options.is_owner),
            ),
            Visitor::Refused(answer) => *answer,
        },
        "/api/v2/workspaceagents/connection" => connection_info(state, &request),
        _ => tailnet(state, work, request),
    }
}

/// What the caller shows as its token, in the order in which a deployment looks for it.
fn shown_token(request: &Request<Incoming>) -> Option<String> {
    let headers = request.headers();
    let first = |name: &str| headers.get(name)?.to_str().ok().map(str::to_owned);
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let cookie = cookies
        .flat_map(|line| line.split(';'))
        .find_map(|pair| pair.trim().strip_prefix("coder_session_token=").map(str::to_owned));
    let bearer = || first("authorization")?.strip_prefix("Bearer ").map(str::to_owned);
    cookie
        .or_else(|| parameter(request, "coder_session_token"))
        .or_else(|| first("coder-session-token"))
        .filter(|token| !token.is_empty())
        .or_else(bearer)
        .or_else(|| parameter(request, "access_token"))
}

fn authenticate(state: &State, request: &Request<Incoming>) -> Visitor {
    let refuse = |detail: &str| {
        let value = json!({ "message": SIGNED_OUT, "detail": detail });
        Visitor::Refused(Box::new(answer::unauthorized(&state.url(), "has expired", &value)))
    };
    let Some(token) = shown_token(request) else {
        return refuse("Cookie \"coder_session_token\" or query parameter must be provided.");
    };
    let parts = token.split('-').count();
    if parts != 2 {
        let reason =
            format!("Invalid API key format: incorrect amount of API key parts, expected 2 got {parts}");
        return refuse(&reason);
    }
    let accepted = state.token();
    let key = |token: &str| token.split('-').next().map(str::to_owned);
    match () {
        () if token == accepted => Visitor::Welcome,
        () if key(&token) == key(&accepted) => refuse("API key secret is invalid."),
        () => refuse("API key is invalid."),
    }
}

fn connection_info(state: &Arc<State>, request: &Request<Incoming>) -> Answer {
    if shown_token(request).is_none() {
        let message = "API key or external proxy authentication required, but none provided";
        return answer::error(StatusCode::UNAUTHORIZED, message);
    }
    if let Visitor::Refused(answer) = authenticate(state, request) {
        return *answer;
    }
    let mut value = json!({
        "derp_map": relay_map::json(&state.relay_map.borrow()),
        "derp_force_websockets": state.options.force_websockets,
        "disable_direct_connections": state.options.disable_direct,
    });
    if !state.options.suffix.is_empty() {
        value["hostname_suffix"] = json!(state.options.suffix);
    }
    answer::json(StatusCode::OK, &value)
}

/// The checks in their order; the first that fails answers.
fn tailnet(state: &Arc<State>, work: &Work, mut request: Request<Incoming>) -> Answer {
    let fails = |check| state.faults.checks().strike(&check).is_some();
    if fails(Check::RateLimit) {
        let message = "You've been rate limited for sending more than 512 requests in 1m0s.";
        let mut answer = answer::error(StatusCode::TOO_MANY_REQUESTS, message);
        answer::set(&mut answer, header::RETRY_AFTER, "60");
        return answer;
    }
    if let Visitor::Refused(answer) = authenticate(state, &request) {
        return *answer;
    }
    if fails(Check::SignedIn) {
        let value = json!({ "message": SIGNED_OUT, "detail": "API key is invalid." });
        return answer::unauthorized(&state.url(), "has expired", &value);
    }
    if fails(Check::Active) {
        let message =
            "User is not active (status = \"suspended\"). Contact an admin to reactivate your account.";
        return answer::unauthorized(&state.url(), "is invalid", &json!({ "message": message }));
    }
    if fails(Check::Browser) || state.options.is_browser_only {
        return answer::error(
            StatusCode::CONFLICT,
            "Non-browser connections are disabled for your deployment.",
        );
    }
    let requested = parameter(&request, "version").unwrap_or_else(|| "2.0".to_owned());
    let mut server = state.options.api_version;
    if fails(Check::Version) {
        server = (server.0, -1);
    }
    if let Err(why) = version::check(server, &requested) {
        let message = "Unknown or unsupported API version";
        return answer::invalid(StatusCode::BAD_REQUEST, message, None, "version", &why);
    }
    let token = parameter(&request, "resume_token");
    let verified = match &token {
        Some(_) if fails(Check::ResumeToken) => Err("refused on purpose".to_owned()),
        Some(token) => state.tokens.verify(token),
        None => Ok(None),
    };
    let peer = match verified {
        Ok(peer) => peer.unwrap_or_else(crate::random_id),
        Err(detail) => {
            const MESSAGE: &str = "Invalid resume token";
            return answer::invalid(
                StatusCode::UNAUTHORIZED,
                MESSAGE,
                Some(&detail),
                "resume_token",
                MESSAGE,
            );
        }
    };
    if fails(Check::Authorization) {
        return answer::error(StatusCode::INTERNAL_SERVER_ERROR, "Internal error preparing sql filter.");
    }
    if fails(Check::Handshake) {
        return answer::handshake(
            StatusCode::UPGRADE_REQUIRED,
            "WebSocket protocol violation: refused on purpose",
        );
    }
    match websocket::accept(request.headers(), websocket::Origin::Same, None) {
        Err(refusal) => refusal,
        Ok(answer) => {
            let upgrade = hyper::upgrade::on(&mut request);
            let device = request.headers().get(telemetry::HEADER).and_then(|value| value.to_str().ok());
            let visit = rpc::Visit { peer, device: device.and_then(Device::parse) };
            start_control(state, work, visit, upgrade);
            answer
        }
    }
}

fn start_control(state: &Arc<State>, work: &Work, visit: rpc::Visit, upgrade: OnUpgrade) {
    let (state, inner) = (Arc::clone(state), work.clone());
    work.spawn(async move {
        let Ok(stream) = upgrade.await else { return };
        rpc::serve(state, inner, visit, TokioIo::new(stream)).await;
    });
}

fn relay_upgrade(site: &Site, work: &Work, mut request: Request<Incoming>) -> Answer {
    let relay = site.relay().clone();
    let manners = relay.manners();
    if let Some(status) = manners.refusal {
        return answer::text(status, "refused on purpose\n");
    }
    let upgrade_to =
        |headers: &HeaderMap| headers.get(header::UPGRADE)?.to_str().ok().map(str::to_ascii_lowercase);
    let wanted = upgrade_to(request.headers());
    let offers_derp = request
        .headers()
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(','))
        .any(|protocol| protocol.trim() == "derp");
    match wanted.as_deref() {
        Some("websocket") if offers_derp => {
            if let Some(status) = manners.websocket_refusal {
                return answer::text(status, "refused on purpose\n");
            }
            let protocol = Some("derp").filter(|_| !manners.omits_subprotocol);
            match websocket::accept(request.headers(), websocket::Origin::Any, protocol) {
                Err(refusal) => refusal,
                Ok(answer) => {
                    let upgrade = hyper::upgrade::on(&mut request);
                    let inner = work.clone();
                    work.spawn(async move {
                        let Ok(stream) = upgrade.await else { return };
                        let stream = websocket::plain(&inner, TokioIo::new(stream)).await;
                        relay.serve(&inner, stream).await;
                    });
                    answer
                }
            }
        }
        Some("derp" | "websocket") => {
            if let Some((status, body)) = manners.plain_refusal {
                return answer::text(status, &body);
            }
            let upgrade = hyper::upgrade::on(&mut request);
            let mut answer: Answer = http::Response::new(Full::new(Bytes::new()));
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            answer::set(&mut answer, header::UPGRADE, "DERP");
            answer::set(&mut answer, header::CONNECTION, "Upgrade");
            answer::set(&mut answer, header::HeaderName::from_static("derp-version"), "2");
            answer::set(
                &mut answer,
                header::HeaderName::from_static("derp-public-key"),
                &relay.public().to_hex(),
            );
            let cork = request.extensions().get::<Socket>().cloned().map(Socket::cork).and_then(Result::ok);
            let inner = work.clone();
            work.spawn(async move {
                let Ok(stream) = upgrade.await else { return };
                relay.serve_held(&inner, TokioIo::new(stream), cork).await;
            });
            answer
        }
        _ => answer::text(StatusCode::UPGRADE_REQUIRED, "DERP requires connection upgrade\n"),
    }
}
