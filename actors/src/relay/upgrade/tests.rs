//! Links to a small relay that speaks both upgrades, or refuses either.

use std::{
    net::Ipv6Addr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream},
    net::{TcpListener, TcpStream},
    sync::{broadcast, mpsc},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};
use warren_core::relay_map::RegionId;
use warren_proto::key::{DiscoPrivate, NodePrivate, NodePublic, random};

use super::*;
use crate::{
    data_plane::{DataPlane, DataPlaneConfig, Events, LinkChange, LinkInfo, LinkTarget, Pong},
    dial::DialOptions,
    facts::RelayLink,
    websocket::accept_key,
};

const LIMIT: Duration = Duration::from_secs(20);
const REGION: RegionId = RegionId(999);
const REFUSED: &str = "HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\ntest";
const REASON: &str =
    "GET failed with status code 400 (a proxy could be disallowing the use of 'Upgrade: derp'): test";

/// Conforms: control:D5
#[tokio::test]
async fn a_relay_that_upgrades_plainly_is_never_asked_for_a_websocket() {
    let (relay, mut side) = (FakeRelay::start().await, Side::start());
    side.plane.ensure_link(relay.target());
    side.hear(LinkChange::Up).await;
    relay.cut();
    side.hear(LinkChange::Down).await;
    side.hear(LinkChange::Up).await;
    assert_eq!(relay.asked(), ["DERP", "DERP"]);
    assert_eq!(side.info().forced_websocket, None);
}

/// Conforms: control:D6 data:20.2.2
#[tokio::test]
async fn a_refused_upgrade_makes_a_websocket_at_once_which_carries_frames_both_ways() {
    let (mut relay, mut side) = (FakeRelay::start().await, Side::start());
    relay.refuse_plain(Some(REFUSED));
    side.plane.ensure_link(relay.target());
    side.hear(LinkChange::Up).await;
    assert_eq!(relay.asked(), ["DERP", "websocket"]);
    assert_eq!(side.info().forced_websocket.as_deref(), Some(REASON));
    side.plane.prefer_link(REGION);
    assert_eq!(relay.hear(0x07).await, [1]);
    relay.inject(&[0x12, 0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(relay.hear(0x13).await, [1, 2, 3, 4, 5, 6, 7, 8]);
}

/// Conforms: data:20.2.3
#[tokio::test]
async fn a_link_survives_what_a_newer_relay_may_say_and_follows_a_restart() {
    let (mut relay, mut side) = (FakeRelay::start().await, Side::start());
    // The key comes in one segment with the answer to the upgrade, and with bytes behind it.
    relay.say_more_with_the_key(b"of the future");
    side.plane.ensure_link(relay.target());
    side.hear(LinkChange::Up).await;
    relay.inject(&frame(0x33, b"unknown"));
    relay.inject(&frame(0x14, b"too many connections"));
    relay.inject(&frame(0x14, b""));
    relay.inject(&[0x12, 0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(relay.hear(0x13).await, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert!(matches!(side.info().state, RelayLink::Up { .. }));
    assert_eq!(relay.asked(), ["DERP"]);
    relay.inject(&frame(0x15, &[0, 0, 0, 1, 0, 0, 0, 1]));
    side.hear(LinkChange::Down).await;
    side.hear(LinkChange::Up).await;
    assert_eq!(relay.asked(), ["DERP"]);
}

/// Conforms: data:20.2.4
#[tokio::test]
async fn a_relay_that_is_killed_in_the_middle_or_stalls_is_dialled_again_within_the_back_off() {
    let (relay, mut side) = (FakeRelay::start().await, Side::start());
    side.plane.ensure_link(relay.target());
    side.hear(LinkChange::Up).await;
    // In the middle of a frame.
    relay.inject(&frame(0x05, &[7; 1000])[..500]);
    relay.cut();
    side.hear(LinkChange::Down).await;
    let begun = std::time::Instant::now();
    side.hear(LinkChange::Up).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    // It accepts, and says nothing any more: a link that is asked finds out long before the watchdog.
    relay.fall_silent(true);
    // What is asked in the moment of the login counts as answered by it.
    let plane = side.plane.clone();
    let asking = async {
        loop {
            plane.probe_links();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = side.hear(LinkChange::Down) => {}
        () = asking => {}
    }
    relay.fall_silent(false);
    side.hear(LinkChange::Up).await;
}

#[tokio::test]
async fn a_link_that_fell_back_stays_with_websockets_and_a_fresh_one_asks_plainly_again() {
    let (relay, mut side) = (FakeRelay::start().await, Side::start());
    relay.refuse_plain(Some(REFUSED));
    side.plane.ensure_link(relay.target());
    side.hear(LinkChange::Up).await;
    relay.refuse_plain(None);
    relay.asked();
    relay.cut();
    side.hear(LinkChange::Down).await;
    side.hear(LinkChange::Up).await;
    assert_eq!(relay.asked(), ["websocket"]);
    side.plane.close_link(REGION);
    side.hear(LinkChange::Closed).await;
    side.plane.ensure_link(relay.target());
    side.hear(LinkChange::Up).await;
    assert_eq!(relay.asked(), ["DERP"]);
}

#[tokio::test]
async fn after_a_change_of_the_network_the_next_attempt_asks_plainly_again() {
    let (mut relay, mut side) = (FakeRelay::start().await, Side::start());
    relay.refuse_plain(Some(REFUSED));
    side.plane.ensure_link(relay.target());
    side.hear(LinkChange::Up).await;
    relay.refuse_plain(None);
    relay.asked();
    side.plane.probe_links();
    relay.hear(0x12).await;
    assert!(relay.asked().is_empty(), "what works is not given up");
    relay.cut();
    side.hear(LinkChange::Down).await;
    side.hear(LinkChange::Up).await;
    assert_eq!(relay.asked(), ["DERP"]);
}

/// Conforms: control:D9
#[tokio::test]
async fn where_the_deployment_forces_websockets_no_plain_upgrade_is_ever_asked_for() {
    let (relay, mut side) = (FakeRelay::start().await, Side::start());
    side.plane.ensure_link(LinkTarget { upgrades: Upgrades::WebSocketOnly, ..relay.target() });
    side.hear(LinkChange::Up).await;
    relay.cut();
    side.hear(LinkChange::Down).await;
    side.hear(LinkChange::Up).await;
    relay.web_socket(WebSockets::Refused);
    relay.cut();
    side.hear(LinkChange::Down).await;
    side.hear(LinkChange::Down).await;
    let asked = relay.asked();
    assert!(asked.len() >= 3 && asked.iter().all(|it| it == "websocket"), "{asked:?}");
    assert_eq!(side.info().forced_websocket, None, "it was not found out");
}

#[tokio::test]
async fn a_websocket_without_the_subprotocol_is_refused_and_both_failures_are_told() {
    let (relay, mut side) = (FakeRelay::start().await, Side::start());
    relay.refuse_plain(Some(REFUSED));
    relay.web_socket(WebSockets::WithoutSubprotocol);
    side.plane.ensure_link(relay.target());
    side.hear(LinkChange::Down).await;
    let RelayLink::Down { error } = side.info().state else { panic!("not down") };
    assert!(error.contains("subprotocol that was offered was not chosen"), "{error}");
    assert!(error.contains("status code 400"), "{error}");
}

#[tokio::test]
async fn only_400_to_499_force_a_websocket() {
    for (status, forces) in [
        (400, true),
        (401, true),
        (404, true),
        (426, true),
        (499, true),
        (200, false),
        (302, false),
        (500, false),
        (503, false),
    ] {
        let relay = FakeRelay::start().await;
        relay.refuse_plain(Some(format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n").leak()));
        let error = plain(&dialer(), &[relay.node()], &Headers::new()).await.err().unwrap();
        assert_eq!(error.fallback().is_some(), forces, "{status}: {error}");
    }
    let gone = Node { derp_port: 1, ..FakeRelay::start().await.node() };
    assert!(plain(&dialer(), &[gone], &Headers::new()).await.err().unwrap().fallback().is_none());
}

#[tokio::test]
async fn every_node_is_asked_in_both_ways() {
    let (refusing, serving) = (FakeRelay::start().await, FakeRelay::start().await);
    refusing.refuse_plain(Some(REFUSED));
    refusing.web_socket(WebSockets::Refused);
    let nodes = [refusing.node(), serving.node()];
    let opened = plain(&dialer(), &nodes, &Headers::new()).await.unwrap();
    assert!(matches!(opened.wire, Wire::Plain(_)));
    let opened = web_socket(&dialer(), &nodes, &Headers::new(), Alpn::Http1).await.unwrap();
    assert!(matches!(opened.wire, Wire::WebSocket(_)));
    let gone = Node { derp_port: 1, ..serving.node() };
    let error = plain(&dialer(), &[gone, refusing.node()], &Headers::new()).await.err().unwrap();
    assert!(error.fallback().is_some(), "what forces a WebSocket is told before what does not: {error}");
}

#[tokio::test]
async fn a_server_that_insists_on_http2_forces_a_websocket_for_which_nothing_is_announced() {
    let dial = DialError::Tls { host: "h".to_owned(), reason: TlsError::OnlyHttp2 };
    let fallback = UpgradeError::from(RequestError::from(dial)).fallback().unwrap();
    assert_eq!(fallback, Fallback { reason: HTTP2.to_owned(), alpn: Alpn::Nothing });
}

#[test]
fn a_refusals_body_is_told_without_control_characters_secrets_and_excess() {
    let headers = Headers::from([
        (header::AUTHORIZATION, HeaderValue::from_static("sesame-token")),
        (header::ACCEPT, HeaderValue::from_static("no")),
    ]);
    let told = tellable(b"\x1b[2Jno upgrade:\r\nsesame-token sesame-token\n", &headers);
    assert_eq!(told, "[2Jno upgrade:  [redacted] [redacted]");
    assert_eq!(tellable("ä".repeat(2000).as_bytes(), &headers).len(), MAX_TOLD);
}

#[tokio::test]
async fn the_extra_headers_are_sent_with_either_upgrade() {
    let relay = FakeRelay::start().await;
    let headers = Headers::from([(header::AUTHORIZATION, HeaderValue::from_static("sesame-token"))]);
    assert!(plain(&dialer(), &[relay.node()], &headers).await.is_ok());
    assert!(web_socket(&dialer(), &[relay.node()], &headers, Alpn::Http1).await.is_ok());
    let heads = relay.heads();
    assert_eq!(heads.len(), 2);
    assert!(heads.iter().all(|head| head.contains("authorization: sesame-token\r\n")), "{heads:?}");
    assert!(heads[1].contains("sec-websocket-protocol: derp\r\n"), "{heads:?}");
    assert!(!heads[1].contains("sec-websocket-extensions"), "{heads:?}");
}

#[tokio::test]
async fn a_message_as_long_as_the_longest_frame_is_taken() {
    for (length, is_taken) in [(LIMITS.largest_received, true), (LIMITS.largest_received + 1, false)] {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let mut server = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
        let sending = tokio::spawn(async move {
            let _ = server.send(Message::Binary(vec![7; length].into())).await;
        });
        let (mut stream, _) = websocket::byte_stream(ours, LIMITS).await;
        let mut read = vec![0; length];
        assert_eq!(stream.read_exact(&mut read).await.is_ok(), is_taken, "{length}");
        drop(stream);
        let _ = sending.await;
    }
}

fn dialer() -> Dialer {
    Dialer::new(DialOptions::default()).unwrap()
}

/// One data plane, and what becomes of its links.
struct Side {
    plane: DataPlane,
    changes: mpsc::Receiver<LinkChange>,
}

struct Ears(mpsc::Sender<LinkChange>);

impl Events for Ears {
    fn pong(&self, _: Pong) {}
    fn link_changed(&self, _: RegionId, change: LinkChange) {
        let _ = self.0.try_send(change);
    }
    fn handshake(&self, _: NodePublic) {}
}

impl Side {
    fn start() -> Self {
        let (sender, changes) = mpsc::channel(1000);
        let plane = DataPlane::start(DataPlaneConfig {
            node: NodePrivate::generate(),
            disco: DiscoPrivate::generate(),
            address: Ipv6Addr::LOCALHOST,
            dialer: Arc::new(dialer()),
            events: Arc::new(Ears(sender)),
            udp: None,
        });
        Self { plane: plane.unwrap(), changes }
    }

    async fn hear(&mut self, expected: LinkChange) {
        let wait = async { while self.changes.recv().await.unwrap() != expected {} };
        timeout(LIMIT, wait).await.unwrap();
    }

    fn info(&self) -> LinkInfo {
        self.plane.links().remove(&REGION).unwrap()
    }
}

/// What becomes of a request for a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WebSockets {
    Served,
    WithoutSubprotocol,
    Refused,
}

/// A relay with one client at a time in mind.
pub(crate) struct FakeRelay {
    port: u16,
    shared: Arc<Shared>,
    frames: mpsc::Receiver<(u8, Vec<u8>)>,
}

struct Shared {
    key: NodePrivate,
    plain_refusal: Mutex<Option<&'static str>>,
    web_sockets: Mutex<WebSockets>,
    more_with_the_key: Mutex<Vec<u8>>,
    is_silent: AtomicBool,
    heads: Mutex<Vec<String>>,
    frames: mpsc::Sender<(u8, Vec<u8>)>,
    /// Bytes to send; none cuts the connection.
    orders: broadcast::Sender<Vec<u8>>,
}

impl FakeRelay {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, frames) = mpsc::channel(1000);
        let shared = Arc::new(Shared {
            key: NodePrivate::generate(),
            plain_refusal: Mutex::default(),
            web_sockets: Mutex::new(WebSockets::Served),
            more_with_the_key: Mutex::default(),
            is_silent: AtomicBool::new(false),
            heads: Mutex::default(),
            frames: sender,
            orders: broadcast::channel(100).0,
        });
        let served = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let served = Arc::clone(&served);
                tokio::spawn(async move { served.serve(stream).await });
            }
        });
        Self { port, shared, frames }
    }

    pub(crate) fn node(&self) -> Node {
        let host_name = "127.0.0.1".to_owned();
        Node { host_name, derp_port: self.port, force_http: true, ..Node::default() }
    }

    fn target(&self) -> LinkTarget {
        let (nodes, headers) = (vec![self.node()], Headers::new());
        LinkTarget { region: REGION, nodes, headers, upgrades: Upgrades::PlainFirst }
    }

    /// Answers plain upgrades so.
    pub(crate) fn refuse_plain(&self, answer: Option<&'static str>) {
        *self.shared.plain_refusal.lock().unwrap() = answer;
    }

    fn web_socket(&self, how: WebSockets) {
        *self.shared.web_sockets.lock().unwrap() = how;
    }

    fn say_more_with_the_key(&self, bytes: &[u8]) {
        *self.shared.more_with_the_key.lock().unwrap() = bytes.to_vec();
    }

    /// Answers no ping any more.
    fn fall_silent(&self, is_silent: bool) {
        self.shared.is_silent.store(is_silent, Ordering::Relaxed);
    }

    /// The heads of all requests.
    fn heads(&self) -> Vec<String> {
        self.shared.heads.lock().unwrap().clone()
    }

    /// What upgrades were asked for since the last call.
    fn asked(&self) -> Vec<String> {
        let heads = std::mem::take(&mut *self.shared.heads.lock().unwrap());
        heads.iter().map(|head| value(head, "upgrade").unwrap_or_default()).collect()
    }

    fn cut(&self) {
        self.inject(&[]);
    }

    fn inject(&self, bytes: &[u8]) {
        self.shared.orders.send(bytes.to_vec()).unwrap();
    }

    /// The next frame of this type that came.
    async fn hear(&mut self, kind: u8) -> Vec<u8> {
        let wait = async {
            loop {
                let (heard, body) = self.frames.recv().await.unwrap();
                if heard == kind {
                    return body;
                }
            }
        };
        timeout(LIMIT, wait).await.unwrap()
    }
}

impl Shared {
    async fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
        }
        let head = String::from_utf8(head).unwrap();
        self.heads.lock().unwrap().push(head.clone());
        if value(&head, "upgrade").as_deref() == Some("websocket") {
            return self.serve_web_socket(stream, &head).await;
        }
        let refusal = *self.plain_refusal.lock().unwrap();
        if let Some(answer) = refusal {
            return stream.write_all(answer.as_bytes()).await.ok();
        }
        let answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n";
        self.talk(stream, answer.as_bytes()).await
    }

    async fn serve_web_socket(&self, mut stream: TcpStream, head: &str) -> Option<()> {
        let how = *self.web_sockets.lock().unwrap();
        let protocol = match how {
            WebSockets::Refused => {
                return stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await.ok();
            }
            WebSockets::WithoutSubprotocol => "",
            WebSockets::Served => "Sec-WebSocket-Protocol: derp\r\n",
        };
        let accept = accept_key(&value(head, "sec-websocket-key")?);
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {accept}\r\n{protocol}\r\n"
        );
        stream.write_all(answer.as_bytes()).await.ok()?;
        let web_socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
        let (near, far) = tokio::io::duplex(64 * 1024);
        tokio::select! {
            ended = self.talk(near, b"") => ended,
            () = bridge(web_socket, far) => None,
        }
    }

    /// Speaks as a relay, its key in one segment with what stands before it.
    async fn talk<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S, before: &[u8]) -> Option<()> {
        let more = self.more_with_the_key.lock().unwrap().clone();
        let key = [b"DERP\xf0\x9f\x94\x91".as_slice(), &self.key.public().0, &more].concat();
        stream.write_all(&[before, &frame(1, &key)].concat()).await.ok()?;
        let (_, body) = read_frame(&mut stream).await?;
        let shared = self.key.shared(&NodePublic::from_slice(body.get(..32)?)?);
        let mut orders = self.orders.subscribe();
        stream.write_all(&frame(3, &shared.seal_with_nonce(&random(), br#"{"version":2}"#))).await.ok()?;
        let (mut read, mut write) = tokio::io::split(stream);
        let (pongs, mut answers) = mpsc::channel(10);
        let reading = async {
            while let Some((kind, body)) = read_frame(&mut read).await {
                if kind == 0x12 && !self.is_silent.load(Ordering::Relaxed) {
                    let _ = pongs.try_send(frame(0x13, &body));
                }
                let _ = self.frames.try_send((kind, body));
            }
        };
        let writing = async {
            loop {
                let bytes = tokio::select! {
                    Ok(bytes) = orders.recv() => bytes,
                    Some(pong) = answers.recv() => pong,
                };
                if bytes.is_empty() {
                    return Some(());
                }
                write.write_all(&bytes).await.ok()?;
            }
        };
        tokio::select! {
            () = reading => None,
            ended = writing => ended,
        }
    }
}

/// Carries bytes in messages of odd sizes: where one ends has no meaning.
async fn bridge(web_socket: WebSocketStream<TcpStream>, inside: DuplexStream) {
    let (mut sink, mut messages) = web_socket.split();
    let (mut from_inside, mut to_inside) = tokio::io::split(inside);
    let inwards = async {
        while let Some(Ok(message)) = messages.next().await {
            if let Message::Binary(bytes) = message {
                assert!(bytes.len() <= 32 * 1024);
                to_inside.write_all(&bytes).await.unwrap();
            }
        }
    };
    let outwards = async {
        let mut bytes = [0; 7];
        while let Ok(read @ 1..) = from_inside.read(&mut bytes).await {
            if sink.send(Message::Binary(Bytes::copy_from_slice(&bytes[..read]))).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = inwards => {}
        () = outwards => {}
    }
}

fn value(head: &str, name: &str) -> Option<String> {
    let mut headers = head.lines().filter_map(|line| line.split_once(": "));
    headers.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    [[kind].as_slice(), &u32::try_from(body.len()).unwrap().to_be_bytes(), body].concat()
}

async fn read_frame<R: AsyncRead + Unpin>(stream: &mut R) -> Option<(u8, Vec<u8>)> {
    let kind = stream.read_u8().await.ok()?;
    let mut body = vec![0; stream.read_u32().await.ok()?.try_into().ok()?];
    stream.read_exact(&mut body).await.ok()?;
    Some((kind, body))
}
