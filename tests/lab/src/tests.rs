//! The lab as a client sees it, by a client of its own that knows only the wire.

mod direct;
mod floods;
mod http;
mod layers;
mod recorded;
mod rpc;

use std::{net::Ipv6Addr, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest};
use tokio_yamux::{Config, Control as Yamux, Session, StreamHandle};
use uuid::Uuid;
use warren_actors::wireguard::{Engine, Engines, Opened, Sealed, open_room, seal_room};
use warren_proto::{
    address::coder_address,
    key::{DiscoPrivate, NodePrivate, NodePublic, random},
    tailnet::{self, coordinate_request as ask, coordinate_response::peer_update::Kind},
};

use super::*;
use crate::{
    agent::small,
    control::{
        coordinator::Auth,
        drpc::{self, Reader},
    },
    relay::wire,
};

const LIMIT: Duration = Duration::from_secs(30);

/// Conforms: control:L7
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_hears_of_relays_workspaces_and_agents_over_one_websocket() {
    let lab = Lab::start(LabOptions { agents: 2, ..LabOptions::default() }).await.unwrap();
    let mut client = Client::connect(&lab, "").await;

    let map: tailnet::DerpMap =
        client.ask(Method::StreamDerpMaps, &tailnet::StreamDerpMapsRequest {}).await.hear().await;
    assert!(map.home_params.is_some() && map.regions.contains_key(&EMBEDDED_REGION));

    let owner = lab.control().user().as_bytes().to_vec().into();
    let asked = tailnet::WorkspaceUpdatesRequest { workspace_owner_id: owner };
    let mut updates = client.ask(Method::WorkspaceUpdates, &asked).await;
    let all: tailnet::WorkspaceUpdate = updates.hear().await;
    assert_eq!((all.upserted_workspaces.len(), all.upserted_agents.len()), (2, 2));
    lab.add_workspace("late", &["main"]);
    let late: tailnet::WorkspaceUpdate = updates.hear().await;
    assert_eq!(late.upserted_workspaces[0].name, "late");

    let agent = lab.agents()[0].id;
    assert!(lab.wait_for_agent(agent, LIMIT, |stats| stats.relay_logins > 0).await);
    let mut stream =
        client.ask(Method::Coordinate, &own_node(&NodePrivate::generate(), &DiscoPrivate::generate())).await;
    stream.say(&add_tunnel(agent)).await;
    let node: tailnet::CoordinateResponse = stream.hear().await;
    assert_eq!(node.peer_updates[0].kind(), Kind::Node);
    assert_eq!(Uuid::from_slice(&node.peer_updates[0].id).unwrap(), agent);
    let ready: tailnet::CoordinateResponse = stream.hear().await;
    assert_eq!(ready.peer_updates[0].kind(), Kind::ReadyForHandshake);
    stream.say(&own_node(&NodePrivate::generate(), &DiscoPrivate::generate())).await;
    let again: tailnet::CoordinateResponse = stream.hear().await;
    assert_eq!(again.peer_updates[0].kind(), Kind::ReadyForHandshake, "each node is answered");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_a_resume_token_is_the_same_peer_again() {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    let mut first = Client::connect(&lab, "").await;
    let token: tailnet::RefreshResumeTokenResponse =
        first.ask(Method::RefreshResumeToken, &tailnet::RefreshResumeTokenRequest {}).await.hear().await;
    let _second = Client::connect(&lab, &format!("&resume_token={}", token.token)).await;
    let control = lab.control();
    let peers = control.wait(LIMIT, |seen| {
        let peers: Vec<Uuid> = seen.connections.iter().map(|connection| connection.peer).collect();
        (peers.len() == 2).then_some(peers)
    });
    let peers = peers.await.unwrap();
    assert_eq!(peers[0], peers[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_strike_calls_and_connections_as_they_are_armed() {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    let control = lab.control();
    control.fail_call(Method::StreamDerpMaps, CallFault::Close, Times::Next(1));
    let mut client = Client::connect(&lab, "").await;
    let mut call = client.ask(Method::StreamDerpMaps, &tailnet::StreamDerpMapsRequest {}).await;
    assert_eq!(call.packet().await.unwrap().0, drpc::CLOSE);
    let mut again = client.ask(Method::StreamDerpMaps, &tailnet::StreamDerpMapsRequest {}).await;
    let _: tailnet::DerpMap = again.hear().await;
    control.close_connections(4000, "on purpose");
    assert!(again.packet().await.is_none());
    control.fail(
        Endpoint::Tailnet,
        HttpFault::Status(::http::StatusCode::FORBIDDEN, "no".to_owned()),
        Times::Next(1),
    );
    assert!(get(&lab, "/api/v2/tailnet?version=2.3", lab.token()).await.starts_with("HTTP/1.1 403"));
}

#[tokio::test]
async fn only_the_one_token_is_accepted_and_a_refusal_is_json() {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    let welcome = get(&lab, "/api/v2/users/me", lab.token()).await;
    assert!(welcome.starts_with("HTTP/1.1 200") && welcome.contains("\"username\": \"alice\""), "{welcome}");
    let refused = get(&lab, "/api/v2/users/me", "aaaaaaaaaa-bbbbbbbbbbbbbbbbbbbbbb").await;
    assert!(
        refused.starts_with("HTTP/1.1 401") && refused.contains("\"message\": \"You are signed out"),
        "{refused}"
    );
    let relay = get(&lab, "/derp", "").await;
    assert!(relay.starts_with("HTTP/1.1 426"), "{relay}");
    assert!(get(&lab, "/derp/latency-check", "").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_answers_probes_and_echoes_over_its_relay() {
    let lab = Lab::start(LabOptions { agents: 1, ..LabOptions::default() }).await.unwrap();
    let agent = lab.agents()[0].clone();
    let mut peer = Peer::join(&lab, agent.id).await;

    let pong = peer.probe().await;
    assert_eq!(pong.len(), 1310);
    let echo = peer.echo(agent.address).await;
    assert_eq!(echo.get(40), Some(&129), "{echo:?}");

    let stats = lab.agent_stats(agent.id);
    assert_eq!((stats.disco_pings, stats.echo_requests, stats.handshakes), (1, 1, 1));
    lab.mute_agent(agent.id, true);
    peer.send(&[1; 62]).await;
    lab.stop().await;
}

/// Conforms: control:K19
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_goes_on_in_the_same_session_when_replicas_close_or_fail() {
    let lab = Lab::start(LabOptions { agents: 1, replicas: 2, ..LabOptions::default() }).await.unwrap();
    let agent = lab.agents()[0].clone();
    assert!(lab.wait_for_agent(agent.id, LIMIT, |stats| stats.relay_logins > 0).await);
    let mut peer = Peer::join(&lab, agent.id).await;
    assert_eq!(peer.echo(agent.address).await.get(40), Some(&129));
    // The peer's replica, then the one at which both are by then.
    let ends = [
        (1, ReplicaHealth::Closed, "coordinator closed"),
        (0, ReplicaHealth::Unhealthy, "coordinator unhealthy"),
    ];
    for (replica, health, text) in ends {
        lab.control().set_replica(replica, health);
        assert_eq!(peer.last_words().await, [text], "and nobody is gone");
        (_, peer.to_peer) = coordinate(&lab, &peer.own, agent.id).await;
        assert_eq!(peer.echo(agent.address).await.get(40), Some(&129));
        lab.control().set_replica(replica, ReplicaHealth::Serving);
    }
    // An agent forgets the session of a peer that is gone, not of one that is lost.
    assert_eq!(lab.agent_stats(agent.id).handshakes, 1);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_agents_come_up_and_end_and_none_holds_a_socket() {
    let lab = Lab::start(LabOptions { agents: 1000, ..LabOptions::default() }).await.unwrap();
    let last = lab.agents()[999].id;
    for agent in lab.agents() {
        assert!(lab.wait_for_agent(agent.id, LIMIT, |stats| stats.relay_logins > 0).await);
    }
    assert_eq!(lab.relay().clients().len(), 1000);
    let key = lab.agent_key(last).unwrap();
    lab.stop_agent(last, End::Crash);
    assert!(lab.relay().wait_for(&key, false, LIMIT).await);
    assert!(lab.tasks() < 2100, "{}", lab.tasks());
    timeout(LIMIT, lab.stop()).await.unwrap();
}

async fn get(lab: &Lab, path: &str, token: &str) -> String {
    let host = lab.url().strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(host).await.unwrap();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nCoder-Session-Token: {token}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(LIMIT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

fn own_node(node: &NodePrivate, disco: &DiscoPrivate) -> tailnet::CoordinateRequest {
    let address = format!("{}/128", coder_address(&OWN));
    let node = tailnet::Node {
        key: Bytes::copy_from_slice(&node.public().to_binary()),
        disco: disco.public().to_string(),
        preferred_derp: 999,
        addresses: vec![address.clone()],
        allowed_ips: vec![address],
        ..tailnet::Node::default()
    };
    tailnet::CoordinateRequest {
        update_self: Some(ask::UpdateSelf { node: Some(node) }),
        ..Default::default()
    }
}

fn add_tunnel(agent: Uuid) -> tailnet::CoordinateRequest {
    let add_tunnel = Some(ask::Tunnel { id: agent.as_bytes().to_vec().into() });
    tailnet::CoordinateRequest { add_tunnel, ..Default::default() }
}

/// The ID whose address the test's own node has.
const OWN: Uuid = Uuid::from_u128(0x1234);

/// A control connection from the client's side.
struct Client {
    yamux: Yamux,
    pipe: tokio::task::JoinHandle<()>,
}

impl Client {
    async fn connect(lab: &Lab, more: &str) -> Self {
        Self::dial(lab, &format!("version=2.3{more}"), &[]).await
    }

    async fn dial(lab: &Lab, query: &str, headers: &[(&'static str, &str)]) -> Self {
        let host = lab.url().strip_prefix("http://").unwrap();
        let stream = TcpStream::connect(host).await.unwrap();
        let uri = format!("ws://{host}/api/v2/tailnet?{query}&coder_session_token={}", lab.token());
        let mut request = uri.into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().append(*name, value.parse().unwrap());
        }
        let (socket, _) = tokio_tungstenite::client_async(request, stream).await.unwrap();
        let (near, far) = tokio::io::duplex(256 * 1024);
        let pipe = tokio::spawn(async move {
            let (mut sink, mut messages) = socket.split();
            let (mut read, mut write) = tokio::io::split(far);
            let mut buffer = vec![0; 64 * 1024];
            loop {
                tokio::select! {
                    read = read.read(&mut buffer) => match read {
                        Ok(got) if got > 0 => {
                            let message = Message::Binary(Bytes::copy_from_slice(&buffer[..got]));
                            if sink.send(message).await.is_err() { return }
                        }
                        _ => return,
                    },
                    message = messages.next() => match message {
                        Some(Ok(Message::Binary(bytes))) => if write.write_all(&bytes).await.is_err() { return },
                        Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                        _ => return,
                    },
                }
            }
        });
        let mut session = Session::new_client(near, Config::default());
        let yamux = session.control();
        tokio::spawn(async move { while session.next().await.is_some() {} });
        Self { yamux, pipe }
    }

    /// Ends the connection without a word.
    fn hang_up(self) {
        self.pipe.abort();
    }

    /// A stream on which nothing is said yet.
    async fn open(&mut self) -> Call {
        Call { stream: self.yamux.open_stream().await.unwrap(), reader: Reader::default(), id: (1, 0) }
    }

    /// Makes a call on a stream of its own and says its first message.
    async fn ask(&mut self, method: Method, request: &impl prost::Message) -> Call {
        let mut call = self.open().await;
        call.begin(method, request).await;
        call
    }
}

struct Call {
    stream: StreamHandle,
    reader: Reader,
    /// The call on its stream, and the last message of it.
    id: (u64, u64),
}

impl Call {
    async fn begin(&mut self, method: Method, request: &impl prost::Message) {
        self.write(drpc::INVOKE, method.path().as_bytes()).await;
        self.say(request).await;
    }

    /// Ends this call and makes another on the same stream.
    async fn next(&mut self, method: Method, request: &impl prost::Message) {
        self.write(drpc::CLOSE, &[]).await;
        self.id = (self.id.0 + 1, 0);
        self.begin(method, request).await;
    }

    async fn say(&mut self, message: &impl prost::Message) {
        self.write(drpc::MESSAGE, &message.encode_to_vec()).await;
    }

    async fn write(&mut self, kind: u8, data: &[u8]) {
        self.id.1 += 1;
        let mut frame = BytesMut::new();
        drpc::put_frame(&mut frame, kind << 1 | 1, self.id, data);
        self.stream.write_all(&frame).await.unwrap();
    }

    /// The next packet, or `None` at the end of the stream.
    async fn packet(&mut self) -> Option<(u8, Bytes)> {
        let waiting = async {
            loop {
                if let Some(packet) = self.reader.next().unwrap() {
                    return Some((packet.kind, packet.data));
                }
                if !matches!(self.stream.read_buf(&mut self.reader.buffer).await, Ok(1..)) {
                    return None;
                }
            }
        };
        timeout(LIMIT, waiting).await.unwrap()
    }

    async fn hear<M: prost::Message + Default>(&mut self) -> M {
        let (kind, data) = self.packet().await.unwrap();
        assert_eq!(kind, drpc::MESSAGE);
        M::decode(data).unwrap()
    }
}

/// A peer of one agent: coordinated without a websocket, logged in at the relay without HTTP.
struct Peer {
    relay: DuplexStream,
    arrived: BytesMut,
    own: tailnet::CoordinateRequest,
    to_peer: Responses,
    disco: DiscoPrivate,
    engine: Box<dyn Engine>,
    agent: NodePublic,
    agent_disco: warren_proto::key::DiscoPublic,
}

impl Peer {
    async fn join(lab: &Lab, agent: Uuid) -> Self {
        let (node, disco) = (NodePrivate::generate(), DiscoPrivate::generate());
        let (mut relay, far) = tokio::io::duplex(256 * 1024);
        let (server, work) = (lab.relay(), lab.work.clone());
        lab.work.spawn(async move { server.serve(&work, far).await });
        let mut arrived = BytesMut::new();
        let (_, key) = frame(&mut relay, &mut arrived).await;
        let server = wire::open_server_key(&key).unwrap();
        relay.write_all(&wire::client_info(&node, &node.public(), &server)).await.unwrap();
        let (kind, info) = frame(&mut relay, &mut arrived).await;
        assert!(kind == wire::SERVER_INFO && wire::open_server_info(&node, &server, &info));

        let own = own_node(&node, &disco);
        let (told, to_peer) = coordinate(lab, &own, agent).await;
        let agent = NodePublic::from_binary(&told.key).unwrap();
        let engine = Engines::new(&node).engine(&agent, 7, std::time::Instant::now());
        let agent_disco = told.disco.parse().unwrap();
        Self { relay, arrived, own, to_peer, disco, engine, agent, agent_disco }
    }

    async fn send(&mut self, packet: &[u8]) {
        self.relay.write_all(&wire::frame(wire::SEND_PACKET, &[&self.agent.0, packet])).await.unwrap();
    }

    async fn receive(&mut self) -> Bytes {
        loop {
            let (kind, body) = frame(&mut self.relay, &mut self.arrived).await;
            if kind == wire::RECV_PACKET {
                assert_eq!(body[..32], self.agent.0);
                return body.slice(32..);
            }
        }
    }

    /// The errors with which the coordinator ends the stream; there may be readiness before them.
    async fn last_words(&mut self) -> Vec<String> {
        let mut words = Vec::new();
        while let Some(response) = timeout(LIMIT, self.to_peer.recv()).await.unwrap() {
            let kinds = response.peer_updates.iter().map(tailnet::coordinate_response::PeerUpdate::kind);
            assert!(kinds.into_iter().all(|kind| kind != Kind::Disconnected));
            words.extend(Some(response.error).filter(|text| !text.is_empty()));
        }
        words
    }

    /// Sends a path probe. Returns the datagram that answers it.
    async fn probe(&mut self) -> Bytes {
        let plain = [[1, 0].as_slice(), &[7; 12], &[0; 32]].concat();
        let sealed = self.disco.shared(&self.agent_disco).seal_with_nonce(&random(), &plain);
        let ping = ["TS💬".as_bytes(), &self.disco.public().0, &sealed].concat();
        self.send(&ping).await;
        self.receive().await
    }

    /// Sends an echo request through the tunnel. Returns the inner packet that answers it.
    async fn echo(&mut self, to: Ipv6Addr) -> Vec<u8> {
        let mut packet = small::echo_request(coder_address(&OWN), to);
        packet.resize(packet.len().next_multiple_of(16), 0);
        let mut out = vec![0; seal_room(packet.len())];
        let (Sealed::Handshake(length) | Sealed::Data(length)) =
            self.engine.seal(std::time::Instant::now(), &packet, &mut out)
        else {
            panic!("nothing waits")
        };
        self.send(&out[..length]).await;
        loop {
            let datagram = self.receive().await;
            let mut opened = vec![0; open_room(datagram.len())];
            match self.engine.open(std::time::Instant::now(), &datagram, &mut opened) {
                Opened::Packet { len, .. } => return opened[..len].to_vec(),
                Opened::Answer { len, .. } => self.send(&opened[..len]).await,
                Opened::Nothing { .. } => {}
                Opened::Refused | Opened::Malformed { .. } => panic!("the agent's datagram was refused"),
            }
            while let Some(length) = self.engine.drain(std::time::Instant::now(), &mut out) {
                let sealed = out[..length].to_vec();
                self.send(&sealed).await;
            }
        }
    }
}

type Responses = tokio::sync::mpsc::Receiver<tailnet::CoordinateResponse>;

/// Opens a stream, tells the own node and asks for an agent. Returns its node once it is ready.
async fn coordinate(lab: &Lab, own: &tailnet::CoordinateRequest, agent: Uuid) -> (tailnet::Node, Responses) {
    let coordinator = &lab.control.0.coordinator;
    let (place, mut responses) = coordinator.open(OWN, Auth::Client);
    coordinator.handle(place, own.clone()).unwrap();
    coordinator.handle(place, add_tunnel(agent)).unwrap();
    let mut told = None;
    loop {
        let update = timeout(LIMIT, responses.recv()).await.unwrap().unwrap().peer_updates.remove(0);
        match update.kind() {
            Kind::Node => told = update.node,
            Kind::ReadyForHandshake => return (told.unwrap(), responses),
            kind => panic!("{kind:?}"),
        }
    }
}

async fn frame(relay: &mut DuplexStream, arrived: &mut BytesMut) -> (u8, Bytes) {
    let waiting = async {
        loop {
            if let Some(frame) = wire::take(arrived).unwrap() {
                return frame;
            }
            assert!(relay.read_buf(arrived).await.unwrap() > 0, "the relay has hung up");
        }
    };
    timeout(LIMIT, waiting).await.unwrap()
}
