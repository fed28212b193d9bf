//! Real requests at real sockets; the tunnel is a double at the other end of a private link.

use std::{future::Future, pin::Pin, sync::OnceLock};

use axum::response::IntoResponse;
use http_body_util::BodyExt;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;
use warren_actors::runtime::Address;
use warren_observability::exporter::{Exporter, Process};
use warren_proto::{
    link::{Netcheck, PathEvents, TunnelStatus, netcheck::Region, path_events::PathEvent},
    vpn,
};

use super::*;
use crate::{
    child::{ChildSpec, SupervisorSpec},
    config::Config,
    facts::{Options, TunnelState, stand_in},
    intent,
    link::{self, AgentPing, Answers, LinkClient, PingBy},
    process::Spawner,
    sockets,
    tree::{NodeInfo, Tree},
    tunnels,
};

const LIMIT: Duration = Duration::from_secs(20);
const AGENT: Uuid = Uuid::from_bytes([7; 16]);

/// A process has one recorder.
fn exporter() -> Exporter {
    static EXPORTER: OnceLock<Exporter> = OnceLock::new();
    EXPORTER.get_or_init(|| Exporter::install(Process::Service, "0.0.0").unwrap()).clone()
}

/// A tunnel that knows one agent.
struct Double;

impl Answers for Double {
    fn exposition(&self) -> String {
        "# TYPE warren_peers gauge\nwarren_peers{process=\"tunnel\",connection_type=\"derp\"} 1\n\
         # TYPE evil gauge\nevil 1\n"
            .to_owned()
    }

    fn tree(&self) -> Vec<NodeInfo> {
        Vec::new()
    }

    fn status(&self) -> TunnelStatus {
        let region = Region { name: "Lab\u{7}".into(), home: true, ..Default::default() };
        let netcheck = Netcheck {
            udp: Some(true),
            mapped_v4: "203.0.113.9:1".into(),
            regions: vec![region],
            ..Default::default()
        };
        let netcheck = Some(netcheck);
        TunnelStatus { control: "up".into(), home_region: "Lab".into(), netcheck, ..Default::default() }
    }

    /// One change after what was told before anybody asked.
    fn path_events(&self, after: u64) -> PathEvents {
        let event = PathEvent {
            agent_id: AGENT.as_bytes().to_vec().into(),
            to: "192.0.2.1:41641".into(),
            reason: "found".into(),
            changes: 1,
            ..Default::default()
        };
        match after {
            u64::MAX => PathEvents { newest: 8, events: Vec::new() },
            8 => PathEvents { newest: 9, events: vec![event] },
            _ => PathEvents { newest: 9, events: Vec::new() },
        }
    }

    fn ping(
        &self,
        agent: Uuid,
        by: PingBy,
        _: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<AgentPing, String>> + Send>> {
        let latency = Duration::from_millis(5);
        let answer = match agent {
            AGENT if by == PingBy::Tsmp => {
                Ok(AgentPing { latency: Duration::from_millis(7), ..AgentPing::default() })
            }
            AGENT => Ok(AgentPing { latency, direct: false, region: "Lab".to_owned() }),
            _ => Err("no such agent".to_owned()),
        };
        Box::pin(async { answer })
    }

    fn fault(&self, _: &str, _: &str) {}
}

/// A part that ends a tunnel at once, or says why it cannot.
struct Ends {
    refusal: &'static str,
}

impl Part for Ends {
    type Message = tunnels::Message;
    type State = ();

    async fn start(&self, _: &Context<tunnels::Message>) -> Result<(), PartError> {
        Ok(())
    }

    async fn handle(
        &self,
        _: &Context<tunnels::Message>,
        (): &mut (),
        message: tunnels::Message,
    ) -> Result<(), PartError> {
        if let tunnels::Message::Stop { reply, .. } = message {
            let (success, error_message) = (self.refusal.is_empty(), self.refusal.to_owned());
            let _ = reply.send(vpn::StopResponse { success, error_message });
        }
        Ok(())
    }
}

struct Bench {
    service: Arc<Service>,
    surface: Arc<Surface>,
    metrics: std::net::SocketAddr,
    tree: Tree,
    folder: TempDir,
}

impl Bench {
    async fn new() -> Self {
        Self::begin(false).await
    }

    async fn begin(allow_faults: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let paths = stand_in::paths(folder.path());
        let options = Options { allow_faults, ..stand_in::options() };
        let metrics = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = metrics.local_addr().unwrap();
        let surface = Arc::new(Surface {
            vpn: Arc::new([]),
            api: sockets::listen(&paths.api_socket(), 0o600, None).unwrap(),
            metrics: Some(metrics),
            exporter: exporter(),
            tree: OnceLock::new(),
        });
        let spawner = Spawner::start(tokio::runtime::Handle::current()).unwrap();
        let service = Arc::new(Service::new(paths, Config::default(), options, spawner));
        let (asked, shown) = (Arc::clone(&service), Arc::clone(&surface));
        let spec = SupervisorSpec::new("root", 3, Duration::from_secs(300))
            .child(ChildSpec::part(&Address::new("api", 1), move || {
                Api::new(Arc::clone(&asked), Arc::clone(&shown))
            }));
        let tree = Tree::start(spec).await.unwrap();
        let _ = surface.tree.set(tree.clone());
        Self { service, surface, metrics: address, tree, folder }
    }

    /// With a tunnel and its agent `dev.main`.
    async fn with_tunnel() -> Self {
        let bench = Self::new().await;
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(link::serve(theirs, Arc::new(Double)));
        bench.service.link.claim().unwrap().set(Some(LinkClient::connect(ours).await.unwrap()));
        let started =
            TunnelState { lifecycle: vpn::status::Lifecycle::Started, pid: Some(42), ..Default::default() };
        bench.service.tunnel.claim().unwrap().set(started);
        let mut peers = crate::facts::Peers::default();
        let workspace_id: bytes::Bytes = vec![1; 16].into();
        peers.apply(vpn::PeerUpdate {
            upserted_workspaces: vec![vpn::Workspace {
                id: workspace_id.clone(),
                name: "dev".into(),
                ..Default::default()
            }],
            upserted_agents: vec![vpn::Agent {
                id: AGENT.as_bytes().to_vec().into(),
                name: "main".into(),
                workspace_id,
                ..Default::default()
            }],
            ..Default::default()
        });
        bench.service.peers.claim().unwrap().set(peers);
        bench
    }

    /// The status and the body of the answer to a request at the Unix socket.
    async fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let stream = UnixStream::connect(self.folder.path().join("api.sock")).await.unwrap();
        exchange(stream, method, path, "localhost").await
    }

    async fn get(&self, path: &str) -> (u16, String) {
        self.ask("GET", path).await
    }

    /// The same as another user, who is not privileged.
    async fn ask_as(&self, uid: u32, method: &str, path: &str) -> (u16, String) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let shared = Shared { service: Arc::clone(&self.service), surface: Arc::clone(&self.surface) };
        let places = Places::default();
        places.serve((), theirs, local(Arc::new(shared)).layer(Extension(Caller { uid })));
        exchange(ours, method, path, "localhost").await
    }

    /// With a part that ends the tunnel, or says why not, and the real one that forgets.
    async fn with_parts(refusal: &'static str) -> Self {
        let bench = Self::new().await;
        let (state_dir, desired) = (bench.service.paths.state_dir.clone(), bench.service.desired.clone());
        let forgets = move || intent::Intent::new(state_dir.clone(), desired.clone());
        bench.tree.add(ChildSpec::part(&bench.service.intent, forgets)).await.unwrap();
        let ends = move || Ends { refusal };
        bench.tree.add(ChildSpec::part(&bench.service.tunnels, ends)).await.unwrap();
        bench
    }

    /// The same at the loopback listener.
    async fn get_tcp(&self, path: &str, host: &str) -> (u16, String) {
        let stream = tokio::net::TcpStream::connect(self.metrics).await.unwrap();
        exchange(stream, "GET", path, host).await
    }
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    method: &str,
    path: &str,
    host: &str,
) -> (u16, String) {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(LIMIT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn health_needs_no_tunnel_and_readiness_does() {
    let bench = Bench::new().await;
    assert_eq!(bench.get_tcp("/healthz", "localhost").await.0, 200);
    assert_eq!(bench.get_tcp("/startupz", "localhost").await.0, 200);
    let (status, body) = bench.get_tcp("/readyz", "localhost").await;
    assert_eq!((status, body.as_str()), (503, "no tunnel is wanted\n"));
    let bench = Bench::with_tunnel().await;
    assert_eq!(bench.get_tcp("/readyz", "localhost").await.0, 200);
}

#[tokio::test]
async fn a_name_of_another_machine_is_not_served_on_loopback() {
    let bench = Bench::new().await;
    let port = bench.metrics.port();
    for host in ["localhost", "LOCALHOST:1", "127.0.0.1", "127.9.9.9", "[::1]", &format!("[::1]:{port}")] {
        assert_eq!(bench.get_tcp("/healthz", host).await.0, 200, "{host}");
    }
    for host in ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", ""] {
        assert_eq!(bench.get_tcp("/healthz", host).await.0, 403, "{host}");
    }
}

#[tokio::test]
async fn one_user_who_keeps_connections_open_leaves_places_for_others() {
    let bench = Bench::new().await;
    let mut held = Vec::new();
    for _ in 0..MAX_CONNECTIONS_PER_USER {
        let mut stream = UnixStream::connect(bench.folder.path().join("api.sock")).await.unwrap();
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'H', "it is served");
        held.push(stream);
    }
    let mut one_more = UnixStream::connect(bench.folder.path().join("api.sock")).await.unwrap();
    assert_eq!(one_more.read(&mut [0]).await.unwrap(), 0, "it is turned away");
}

#[tokio::test]
async fn a_follower_who_leaves_gives_the_place_back() {
    let bench = Bench::new().await;
    let follow = async || {
        let mut stream = UnixStream::connect(bench.folder.path().join("api.sock")).await.unwrap();
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        stream.read_u8().await.is_ok().then_some(stream)
    };
    let mut held = Vec::new();
    for _ in 0..MAX_CONNECTIONS_PER_USER {
        held.push(follow().await.unwrap());
    }
    drop(held);
    // Those that come before the others are noticed to be gone are turned away.
    let served = async { while follow().await.is_none() {} };
    tokio::time::timeout(LIMIT, served).await.unwrap();
}

#[tokio::test]
async fn a_panic_in_one_request_ends_its_own_connection_alone() {
    let places = Places::default();
    let router = Router::new()
        .route("/fails", routing::get(async || -> &'static str { panic!("a test forced this panic") }))
        .route("/works", routing::get(async || "it works"));
    let connect = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        places.serve((), theirs, router.clone());
        ours
    };
    let (mut failing, before) = (connect(), connect());
    failing.write_all(b"GET /fails HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert_eq!(failing.read(&mut [0]).await.unwrap(), 0);
    for stream in [before, connect()] {
        assert_eq!(exchange(stream, "GET", "/works", "x").await, (200, "it works".to_owned()));
    }
}

#[tokio::test]
async fn names_are_not_to_be_had_on_loopback() {
    let bench = Bench::with_tunnel().await;
    for path in ["/v1/status", "/v1/tree", "/v1/logs", "/v1/ping/dev.main"] {
        assert_eq!(bench.get_tcp(path, "localhost").await.0, 404, "{path}");
    }
    let (_, page) = bench.get_tcp("/", "localhost").await;
    assert!(page.contains("started") && page.contains("0 of 1") && !page.contains("dev.main"), "{page}");
}

#[tokio::test]
async fn metrics_are_those_of_both_processes_as_far_as_they_are_known() {
    let bench = Bench::with_tunnel().await;
    let (status, metrics) = bench.get_tcp("/metrics", "localhost").await;
    assert_eq!(status, 200);
    for sample in [
        "warren_peers{process=\"tunnel\",connection_type=\"derp\"} 1",
        "warren_tunnel_scrape_success{process=\"service\"} 1",
        "warren_actor_mailbox_depth{process=\"service\",actor=\"api\"} 0",
    ] {
        assert!(metrics.contains(sample), "{sample} is missing:\n{metrics}");
    }
    assert!(!metrics.contains("evil"));
}

#[tokio::test]
async fn status_and_tree_tell_of_both_processes() {
    let bench = Bench::with_tunnel().await;
    let (_, status) = bench.get("/v1/status").await;
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["lifecycle"], "started");
    assert_eq!(status["tunnel_pid"], 42);
    assert_eq!(status["control"]["state"], "up");
    assert_eq!(status["home_region"], "Lab");
    let (_, tree) = bench.get("/v1/tree").await;
    let tree: Value = serde_json::from_str(&tree).unwrap();
    assert_eq!(tree["processes"][0]["nodes"][1]["name"], "api");
    assert_eq!(tree["processes"][1]["process"], "tunnel");
    assert_eq!(tree["processes"][1]["pid"], 42);
}

#[tokio::test]
async fn the_last_look_at_the_network_is_told_and_without_a_tunnel_why_there_is_none() {
    let (status, body) = Bench::with_tunnel().await.get("/v1/netcheck").await;
    assert_eq!(status, 200, "{body}");
    let look: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&look["udp"], &look["mapped_v6"]), (&Value::from(true), &Value::Null));
    assert_eq!(look["regions"][0]["name"], "Lab ", "what could move a cursor is taken out");
    let (status, body) = Bench::new().await.get("/v1/netcheck").await;
    assert_eq!(status, 503);
    assert!(body.contains("warren up"), "{body}");
}

#[tokio::test]
async fn pings_come_one_a_line() {
    let bench = Bench::with_tunnel().await;
    let (status, body) = bench.get("/v1/ping/main.dev?count=2").await;
    assert_eq!(status, 200);
    let lines: Vec<Value> = body.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let pongs = lines.iter().filter(|line| line["latency_seconds"] == 0.005 && line["region"] == "Lab");
    assert_eq!(pongs.count(), 2, "{body}");
    let (status, body) = bench.get("/v1/ping/main.dev?tsmp=true").await;
    assert_eq!(status, 200);
    assert!(body.lines().any(|line| line == r#"{"latency_seconds":0.007}"#), "{body}");
}

#[tokio::test]
async fn a_ping_without_a_tunnel_or_to_nobody_is_refused_in_words() {
    let (status, body) = Bench::new().await.get("/v1/ping/dev.main").await;
    assert_eq!(status, 503);
    assert!(body.contains("warren up"), "{body}");
    let (status, body) = Bench::with_tunnel().await.get("/v1/ping/prod").await;
    assert_eq!(status, 404);
    assert!(body.contains("dev.main"), "{body}");
}

#[tokio::test]
async fn the_last_words_of_the_tunnel_are_lines() {
    let bench = Bench::new().await;
    bench.service.log.keep("first");
    bench.service.log.keep("second");
    let (_, logs) = bench.get("/v1/logs").await;
    assert_eq!(logs, r#"{"lines":["first","second"]}"#);
}

#[tokio::test]
async fn a_ping_while_the_tunnel_is_not_there_says_why() {
    let bench = Bench::new().await;
    let tunnel = bench.service.tunnel.claim().unwrap();
    for (lifecycle, error, expected, words) in [
        (vpn::status::Lifecycle::Stopped, "the token was refused", 503, "the token was refused"),
        (vpn::status::Lifecycle::Starting, "", 503, "only starting"),
        (vpn::status::Lifecycle::Started, "", 503, "did not answer in time"),
    ] {
        tunnel.set(TunnelState { lifecycle, error: error.into(), ..Default::default() });
        let (status, body) = bench.get("/v1/ping/dev.main").await;
        assert_eq!(status, expected);
        assert!(body.contains(words), "{body}");
    }
}

#[tokio::test]
async fn a_tunnel_that_is_another_program_cannot_be_asked_and_that_is_no_matter_of_time() {
    let tunnel = TunnelState { lifecycle: vpn::status::Lifecycle::Started, ..Default::default() };
    let answer = super::ping::refusal(&tunnel, true).into_response();
    assert_eq!(answer.status(), 501);
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&body).contains("another program"), "{body:?}");
}

#[tokio::test]
async fn every_refusal_is_json_with_words() {
    let bench = Bench::with_tunnel().await;
    for (method, path, expected) in [
        ("GET", "/v1/ping/dev.main?count=many", 400),
        ("GET", "/v1/ping/nobody", 404),
        ("GET", "/v2", 404),
        ("POST", "/v1/status", 405),
        ("POST", "/metrics", 405),
    ] {
        let (status, body) = bench.ask(method, path).await;
        assert_eq!(status, expected, "{method} {path}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert!(body["error"].is_string(), "{method} {path}: {body}");
    }
}

#[tokio::test]
async fn events_begin_with_the_present_and_tell_every_change() {
    let bench = Bench::new().await;
    let mut stream = UnixStream::connect(bench.folder.path().join("api.sock")).await.unwrap();
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut lines = tokio::io::BufReader::new(stream).lines();
    let mut next = async || loop {
        let line = tokio::time::timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().unwrap();
        if line.starts_with('{') {
            return serde_json::from_str::<Value>(&line).unwrap();
        }
    };
    assert_eq!(next().await["lifecycle"], "stopped");
    let started =
        TunnelState { lifecycle: vpn::status::Lifecycle::Started, pid: Some(42), ..Default::default() };
    bench.service.tunnel.claim().unwrap().set(started);
    let event = next().await;
    assert_eq!((&event["lifecycle"], &event["tunnel_pid"]), (&"started".into(), &42.into()));
}

#[tokio::test]
async fn events_tell_by_which_way_an_agent_is_reached_from_now_on_and_why() {
    let bench = Bench::with_tunnel().await;
    let mut stream = UnixStream::connect(bench.folder.path().join("api.sock")).await.unwrap();
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut lines = tokio::io::BufReader::new(stream).lines();
    let told = async {
        loop {
            let line = lines.next_line().await.unwrap().unwrap();
            if line.contains(r#""event":"path""#) {
                return serde_json::from_str::<Value>(&line).unwrap();
            }
        }
    };
    let event = tokio::time::timeout(LIMIT, told).await.unwrap();
    for (field, value) in [
        ("workspace", "dev"),
        ("agent", "main"),
        ("from", "relay"),
        ("to", "192.0.2.1:41641"),
        ("reason", "found"),
    ] {
        assert_eq!(event[field], value, "{event}");
    }
}

#[tokio::test]
async fn forgetting_ends_the_tunnel_and_leaves_nothing_of_it() {
    let bench = Bench::with_parts("").await;
    bench.service.log.keep("about the last tunnel");
    assert_eq!(bench.ask("DELETE", "/v1/credentials").await, (204, String::new()));
    assert!(bench.service.log.lines().is_empty());
}

#[tokio::test]
async fn what_cannot_be_ended_is_not_forgotten() {
    let bench = Bench::with_parts("it hangs").await;
    bench.service.log.keep("about the tunnel");
    let (status, body) = bench.ask("DELETE", "/v1/credentials").await;
    assert_eq!((status, body.as_str()), (500, r#"{"error":"it hangs"}"#));
    assert_eq!(bench.service.log.lines().len(), 1);
}

#[tokio::test]
async fn only_the_owner_may_have_the_tunnel_forgotten_and_others_may_look() {
    const OWNER: u32 = 60_001;
    const OTHER: u32 = 60_002;
    let bench = Bench::with_parts("").await;
    let owned = TunnelState { owner: Some(OWNER), ..Default::default() };
    bench.service.tunnel.claim().unwrap().set(owned);
    let (status, body) = bench.ask_as(OTHER, "DELETE", "/v1/credentials").await;
    assert_eq!(status, 403);
    assert!(body.contains("belongs to user 60001"), "{body}");
    assert_eq!(bench.ask_as(OTHER, "GET", "/v1/status").await.0, 200);
    assert_eq!(bench.ask_as(OWNER, "DELETE", "/v1/credentials").await.0, 204);
}

#[cfg(feature = "faults")]
#[tokio::test]
async fn the_listeners_survive_a_panic_of_the_part() {
    let bench = Bench::begin(true).await;
    let restarts = || bench.tree.snapshot().iter().map(|node| node.restarts).sum::<u64>();
    assert!(bench.tree.inject("api", warren_actors::runtime::FaultKind::Panic));
    let restarted = async {
        while restarts() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, restarted).await.unwrap();
    assert_eq!(bench.get("/healthz").await.0, 200);
    assert_eq!(bench.get_tcp("/healthz", "localhost").await.0, 200);
}

#[cfg(feature = "faults")]
#[tokio::test]
async fn faults_are_not_to_be_had_unless_the_service_was_started_for_them() {
    let bench = Bench::new().await;
    let body = r#"{"process":"service","actor":"api","kind":"panic"}"#;
    let mut stream = UnixStream::connect(bench.folder.path().join("api.sock")).await.unwrap();
    let request = format!(
        "POST /v1/fault HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
}

#[test]
fn only_names_of_this_machine_are_local() {
    for host in ["localhost", "localhost:9420", "127.0.0.1:9420", "[::1]:9420"] {
        assert!(is_local_name(host), "{host}");
    }
    for host in ["localhost.evil.example", "[fd60::1]:1", "0.0.0.0", ":80"] {
        assert!(!is_local_name(host), "{host}");
    }
}
