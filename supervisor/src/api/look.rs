//! What is only looked at: health, the small page, status, tree, logs.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::State,
    response::{Html, IntoResponse, Response},
};
use futures::stream;
use http::{StatusCode, header::CONTENT_TYPE};
use serde_json::{Value, json};
use uuid::Uuid;
use warren_observability::{
    health::Health,
    page::{self, Page},
};
use warren_proto::{
    link::{TunnelStatus, netcheck::Region, path_events::PathEvent, tree::Node},
    vpn::status::Lifecycle,
};

use super::{Shared, TUNNEL_LIMIT, answer::Refusal, ping::why_not};
use crate::{
    facts::{Peers, TunnelState},
    tree::NodeInfo,
};

/// The type of a stream of JSON lines.
pub(super) const NDJSON: &str = "application/x-ndjson";
/// How often the tunnel is asked which paths changed, for as long as somebody follows.
const PATHS_PERIOD: Duration = Duration::from_secs(1);

/// Whether the service lives: that it answers says so.
pub(super) async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    let health = health(&shared);
    reply(health.is_live(), &health.dead)
}

/// Whether packets can flow to agents.
pub(super) async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let health = health(&shared);
    reply(health.is_ready(), if health.is_live() { &health.unready } else { &health.dead })
}

/// Whether every part has started.
pub(super) async fn startupz(State(shared): State<Arc<Shared>>) -> Response {
    let reasons = ["the service is starting".to_owned()];
    let has_started = shared.surface.tree.get().is_some();
    reply(has_started, if has_started { &[] } else { &reasons })
}

fn reply(is_good: bool, reasons: &[String]) -> Response {
    let status = if is_good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let text = if is_good { "ok\n".to_owned() } else { reasons.join("\n") + "\n" };
    (status, text).into_response()
}

fn health(shared: &Shared) -> Health {
    let tunnel = shared.service.tunnel.get();
    let is_up = tunnel.lifecycle == Lifecycle::Started;
    let unready = if is_up { Vec::new() } else { vec![what_is_wrong(&tunnel)] };
    Health { dead: Vec::new(), unready }
}

/// Without names: the page and health need no authentication.
fn what_is_wrong(tunnel: &TunnelState) -> String {
    match tunnel.lifecycle {
        _ if tunnel.circuit_open => "the tunnel died too often and is not started again".to_owned(),
        Lifecycle::Stopped if tunnel.error.is_empty() => "no tunnel is wanted".to_owned(),
        Lifecycle::Stopped => "the tunnel could not be started; `warren status` says why".to_owned(),
        Lifecycle::Starting => "the tunnel is starting".to_owned(),
        Lifecycle::Stopping => "the tunnel is stopping".to_owned(),
        Lifecycle::Started | Lifecycle::Unknown => "the state of the tunnel is not known".to_owned(),
    }
}

/// The small page for people.
pub(super) async fn page(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let service = &shared.service;
    let (tunnel, peers, health) = (service.tunnel.get(), service.peers.get(), health(&shared));
    let agents = peers.agents().count();
    let answered = peers.agents().filter(|agent| agent.last_ping.is_some()).count();
    let status = tunnel_status(&shared).await;
    let mut rows = vec![
        ("Tunnel", tunnel.lifecycle.label().to_owned()),
        ("For", seconds(since(tunnel.since))),
        ("Agents that answered a ping", format!("{answered} of {agents}")),
        ("Restarts of the tunnel process", tunnel.restarts.to_string()),
    ];
    if let Some(status) = status {
        rows.push(("Control plane", status.control));
        let region = Some(status.home_region).filter(|region| !region.is_empty());
        rows.push(("Home relay", region.unwrap_or_else(|| "none yet".to_owned())));
    }
    let problems = health.dead.into_iter().chain(health.unready).collect();
    Html(page::render(&Page { version: service.options.version, rows, problems }))
}

/// Everything about the tunnel that leg B does not say.
pub(super) async fn status(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let mut status = tunnel_json(&shared.service.tunnel.get());
    status["version"] = json!(shared.service.options.version);
    status["service_pid"] = json!(std::process::id());
    if let Some(tunnel) = tunnel_status(&shared).await {
        let relay = |relay: &warren_proto::link::tunnel_status::Relay| json!({ "region": relay.region, "state": relay.state, "error": said(&relay.error) });
        status["control"] = json!({ "state": tunnel.control, "error": said(&tunnel.control_error) });
        status["home_region"] = json!(said(&tunnel.home_region));
        let latency = tunnel.home_latency.and_then(|it| Duration::try_from(it).ok());
        status["home_latency_seconds"] = json!(latency.map(|it| it.as_secs_f64()));
        status["relays"] = tunnel.relays.iter().map(relay).collect();
        status["absent"] = json!(tunnel.absent);
    }
    Json(status)
}

/// How the world sees the tunnel, and how far the relays are, as it looked last.
pub(super) async fn netcheck(State(shared): State<Arc<Shared>>) -> Result<Json<Value>, Refusal> {
    let status = tunnel_status(&shared).await;
    let status = status.ok_or_else(|| why_not(&shared))?;
    let netcheck = status.netcheck.ok_or_else(|| {
        Refusal::unavailable("the tunnel has not looked yet; try again in a moment".to_owned())
    })?;
    let region = |region: &Region| {
        let latencies = [region.v4, region.v6];
        let [v4, v6] = latencies.map(|it| Some(Duration::try_from(it?).ok()?.as_secs_f64()));
        json!({
            "name": region.name, "home": region.home, "latency_v4_seconds": v4, "latency_v6_seconds": v6,
        })
    };
    let at = netcheck.at.and_then(|at| SystemTime::try_from(at).ok());
    Ok(Json(json!({
        "age_seconds": at.map(|at| since(at).as_secs_f64()),
        "udp": netcheck.udp,
        "mapped_v4": said(&netcheck.mapped_v4),
        "mapped_v6": said(&netcheck.mapped_v6),
        "varies_by_destination": netcheck.varies_by_destination,
        "direct_allowed": netcheck.direct_allowed,
        "endpoints": netcheck.endpoints,
        "regions": netcheck.regions.iter().map(region).collect::<Vec<_>>(),
    })))
}

async fn tunnel_status(shared: &Shared) -> Option<TunnelStatus> {
    let link = shared.service.link.get().as_ref().clone()?;
    link.status(TUNNEL_LIMIT).await.ok()
}

fn tunnel_json(tunnel: &TunnelState) -> Value {
    json!({
        "lifecycle": tunnel.lifecycle.label(),
        "error": said(&tunnel.error),
        "owner_uid": tunnel.owner,
        "tunnel_pid": tunnel.pid,
        "seconds": since(tunnel.since).as_secs_f64(),
        "restarts": tunnel.restarts,
        "last_reason": tunnel.last_reason,
        "circuit_open": tunnel.circuit_open,
        "left_behind": tunnel.left_behind.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn said(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// Every change of the tunnel's state as it happens, and of the paths to agents within a second.
pub(super) async fn events(State(shared): State<Arc<Shared>>) -> Response {
    let view = shared.service.tunnel.view();
    let paths = stream::unfold(Follower { shared, after: None }, async |mut follower| {
        Some((Ok(follower.next().await), follower))
    });
    let changes = stream::unfold(view, async |mut view| {
        let tunnel = view.changed().await?;
        Some((Ok::<_, Infallible>(line(&tunnel_json(&tunnel))), view))
    });
    lines(stream::select(changes, paths))
}

/// Who follows paths.
struct Follower {
    shared: Arc<Shared>,
    /// The number of the last event that is known; `None` before it was asked.
    after: Option<u64>,
}

impl Follower {
    /// The next changes, one line each. What changes while there is no tunnel to ask is not known.
    async fn next(&mut self) -> Bytes {
        loop {
            if self.after.is_some() {
                tokio::time::sleep(PATHS_PERIOD).await;
            }
            let events = self.look().await;
            let peers = self.shared.service.peers.get();
            let text: String = events.iter().map(|event| format!("{}\n", path_json(&peers, event))).collect();
            if !text.is_empty() {
                return text.into();
            }
        }
    }

    /// What was told before anybody followed is past. Another tunnel counts anew.
    async fn look(&mut self) -> Vec<PathEvent> {
        let asked = self.after.unwrap_or(u64::MAX);
        // One that is yet to come has told nothing.
        self.after.get_or_insert(0);
        let link = self.shared.service.link.get().as_ref().clone();
        let Some(link) = link else { return Vec::new() };
        let Ok(mut events) = link.path_events(asked, TUNNEL_LIMIT).await else { return Vec::new() };
        if asked != u64::MAX && events.newest < asked {
            events.events = link.path_events(0, TUNNEL_LIMIT).await.map(|it| it.events).unwrap_or_default();
        }
        self.after = Some(events.newest);
        events.events
    }
}

fn path_json(peers: &Peers, event: &PathEvent) -> Value {
    let agent = peers.agents().find(|agent| agent.id == event.agent_id);
    let workspace = agent.and_then(|agent| peers.workspace(&agent.workspace_id));
    let at = event.at.and_then(|at| SystemTime::try_from(at).ok());
    let at = at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    json!({
        "event": "path",
        "at_unix_seconds": at.map(|at| at.as_secs_f64()),
        "workspace": workspace.map(|workspace| &workspace.name),
        "agent": agent.map(|agent| &agent.name),
        "agent_id": Uuid::from_slice(&event.agent_id).ok().map(|id| id.to_string()),
        "from": said(&event.from).unwrap_or("relay"),
        "to": said(&event.to).unwrap_or("relay"),
        "reason": event.reason,
        "changes": event.changes,
    })
}

/// A stream of JSON lines as an answer.
pub(super) fn lines(
    lines: impl stream::Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
) -> Response {
    ([(CONTENT_TYPE, NDJSON)], Body::from_stream(lines)).into_response()
}

/// One line of such a stream.
pub(super) fn line(value: &Value) -> Bytes {
    Bytes::from(format!("{value}\n"))
}

/// The last lines that the tunnel process said.
pub(super) async fn logs(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let lines = shared.service.log.lines();
    Json(json!({ "lines": lines.iter().map(|line| &**line).collect::<Vec<_>>() }))
}

/// The supervision trees of both processes.
pub(super) async fn tree(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let own: Vec<Value> = shared
        .surface
        .tree
        .get()
        .map(|tree| tree.snapshot().iter().map(own_node).collect())
        .unwrap_or_default();
    let mut processes = vec![json!({ "process": "service", "pid": std::process::id(), "nodes": own })];
    let (link, pid) = (shared.service.link.get().as_ref().clone(), shared.service.tunnel.get().pid);
    let tunnel = match link {
        Some(link) => Some(link.tree(TUNNEL_LIMIT).await.map_err(|error| error.to_string())),
        // A process that is only starting, or another program than ours.
        None => pid.map(|_| Err("it cannot be asked".to_owned())),
    };
    processes.extend(tunnel.map(|nodes| match nodes {
        Ok(nodes) => {
            let nodes: Vec<Value> = nodes.iter().map(tunnel_node).collect();
            json!({ "process": "tunnel", "pid": pid, "nodes": nodes })
        }
        Err(error) => json!({ "process": "tunnel", "pid": pid, "nodes": [], "error": error }),
    }));
    Json(json!({ "processes": processes }))
}

fn own_node(node: &NodeInfo) -> Value {
    json!({
        "depth": node.depth,
        "name": node.name,
        "kind": node.kind.as_str(),
        "state": node.state.as_str(),
        "running_seconds": since(node.since).as_secs_f64(),
        "restarts": node.restarts,
        "mailbox_depth": node.mailbox_depth,
        "last_reason": node.last_reason,
    })
}

fn tunnel_node(node: &Node) -> Value {
    let began = node.since.and_then(|since| SystemTime::try_from(since).ok());
    json!({
        "depth": node.depth,
        "name": node.name,
        "kind": node.kind,
        "state": node.state,
        "running_seconds": began.map(|began| since(began).as_secs_f64()),
        "restarts": node.restarts,
        "mailbox_depth": node.mailbox_depth,
        "last_reason": said(&node.last_reason),
    })
}

fn since(begin: SystemTime) -> Duration {
    begin.elapsed().unwrap_or_default()
}

fn seconds(span: Duration) -> String {
    format!("{} s", span.as_secs())
}
