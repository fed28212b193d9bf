use std::io::{Read, Write};

use tokio::io::DuplexStream;

use super::*;
use crate::{Lab, LabOptions};

const LIMIT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn packets_go_to_the_key_they_are_for_and_name_their_sender() {
    let relay = Relay::new(LIMIT);
    let (mut a, mut b) = (Client::log_in(&relay).await, Client::log_in(&relay).await);
    a.send(b.key, b"hello").await;
    assert_eq!(b.next().await, (wire::RECV_PACKET, Bytes::from([a.key.0.as_slice(), b"hello"].concat())));
    assert_eq!(relay.packets(), 1);
}

#[tokio::test]
async fn a_clients_end_is_told_to_those_it_sent_to() {
    let relay = Relay::new(LIMIT);
    let (mut a, mut b) = (Client::log_in(&relay).await, Client::log_in(&relay).await);
    b.send(a.key, b"hello").await;
    a.next().await;
    relay.kill(&b.key);
    let gone = Bytes::from([b.key.0.as_slice(), &[GONE_DISCONNECTED]].concat());
    assert_eq!(a.next().await, (wire::PEER_GONE, gone));
    assert_eq!(relay.clients(), [a.key]);
}

#[tokio::test]
async fn a_probe_to_nobody_is_answered_three_times_and_other_packets_never() {
    let relay = Relay::new(LIMIT);
    let mut a = Client::log_in(&relay).await;
    let nobody = NodePrivate::generate().public();
    let mut probe = "TS💬".as_bytes().to_vec();
    probe.resize(100, 0);
    a.send(nobody, &[4; 100]).await;
    for _ in 0..5 {
        a.send(nobody, &probe).await;
    }
    a.write(&wire::frame(wire::PING, &[&[9; 8]])).await;
    let mut gone = 0;
    loop {
        match a.next().await {
            (wire::PEER_GONE, body) => {
                assert_eq!(body[32], GONE_NOT_HERE);
                gone += 1;
            }
            (wire::PONG, _) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(gone, NOT_HERE_BURST);
}

#[tokio::test]
async fn of_two_connections_with_one_key_the_one_heard_last_receives() {
    let relay = Relay::new(LIMIT);
    let mut sender = Client::log_in(&relay).await;
    let private = NodePrivate::generate();
    let mut old = Client::log_in_as(&relay, private.clone()).await;
    let mut new = Client::log_in_as(&relay, private).await;
    sender.send(old.key, b"1").await;
    assert_eq!(new.next().await.1[32..], *b"1");
    old.write(&wire::frame(wire::PING, &[&[9; 8]])).await;
    assert_eq!(old.next().await.0, wire::PONG);
    sender.send(old.key, b"2").await;
    assert_eq!(old.next().await.1[32..], *b"2");
}

#[tokio::test]
async fn a_client_that_breaks_a_rule_is_cut_off() {
    let relay = Relay::new(LIMIT);
    for frame in [
        wire::frame(wire::NOTE_PREFERRED, &[&[1, 1]]),
        wire::frame(wire::PING, &[&[1; 7]]),
        wire::frame(wire::WATCH_CONNECTIONS, &[]),
        wire::frame(wire::SEND_PACKET, &[&[1; 31]]),
    ] {
        let mut client = Client::log_in(&relay).await;
        client.write(&frame).await;
        assert!(relay.wait_for(&client.key, false, LIMIT).await, "{frame:?}");
    }
}

#[tokio::test]
async fn a_stalled_relay_keeps_its_clients_and_says_nothing_until_it_is_released() {
    let relay = Relay::new(LIMIT);
    let mut a = Client::log_in(&relay).await;
    relay.stall(true);
    a.write(&wire::frame(wire::PING, &[&[9; 8]])).await;
    assert!(timeout(Duration::from_millis(50), a.next()).await.is_err());
    relay.stall(false);
    assert_eq!(a.next().await.0, wire::PONG);
}

#[tokio::test]
async fn either_upgrade_can_be_refused_and_a_websocket_granted_without_its_subprotocol() {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    let relay = lab.relay();
    assert!(ask(&lab, "DERP").await.contains("101 Switching Protocols"));
    assert!(ask(&lab, "websocket").await.contains("sec-websocket-protocol: derp\r\n"));
    for status in [StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND, StatusCode::UPGRADE_REQUIRED] {
        relay.refuse_plain_upgrades(Some((status, "not here")));
        let answer = ask(&lab, "DERP").await;
        assert!(answer.contains(&format!("HTTP/1.1 {status}")) && answer.ends_with("not here"), "{answer}");
    }
    assert!(ask(&lab, "websocket").await.contains("101 Switching Protocols"));
    relay.omit_subprotocol(true);
    let answer = ask(&lab, "websocket").await;
    assert!(answer.contains("101") && !answer.contains("sec-websocket-protocol"), "{answer}");
    relay.refuse_websockets(Some(StatusCode::FORBIDDEN));
    assert!(ask(&lab, "websocket").await.contains("403 Forbidden"));
    relay.go(true);
    assert_eq!(ask(&lab, "websocket").await, "");
}

/// Who reads in a thread of its own is awake at the first segment, and has seldom more than that in one read. A segment
/// is kept back for 200 ms at most, which a busy machine may take.
#[tokio::test(flavor = "multi_thread")]
async fn a_greeting_can_come_in_one_segment_with_the_answer_to_the_upgrade() {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    lab.relay().greet_at_once(true);
    let address = lab.url().trim_start_matches("http://").to_owned();
    let look = move || {
        let mut at_once = 0;
        for _ in 0..50 {
            let mut stream = std::net::TcpStream::connect(&address).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream
                .write_all(b"GET /derp HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n")
                .unwrap();
            let mut answer = vec![0; 4096];
            let read = stream.read(&mut answer).unwrap();
            let answer = String::from_utf8_lossy(&answer[..read]);
            at_once += u32::from(answer.contains("\r\n\r\n\u{1}\0\0\0(DERP🔑"));
        }
        at_once
    };
    let at_once = tokio::task::spawn_blocking(look).await.unwrap();
    assert!(at_once >= 45, "{at_once}");
}

/// The head of the answer to an upgrade request, and a short body.
async fn ask(lab: &Lab, upgrade: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(lab.url().trim_start_matches("http://")).await.unwrap();
    let request = format!(
        "GET /derp HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: derp\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = timeout(LIMIT, stream.read(&mut answer)).await.unwrap().unwrap_or(0);
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

struct Client {
    stream: DuplexStream,
    arrived: BytesMut,
    key: NodePublic,
}

impl Client {
    async fn log_in(relay: &Relay) -> Self {
        Self::log_in_as(relay, NodePrivate::generate()).await
    }

    async fn log_in_as(relay: &Relay, private: NodePrivate) -> Self {
        let (stream, far) = tokio::io::duplex(64 * 1024);
        let server = relay.clone();
        tokio::spawn(async move { server.serve(&Work::default(), far).await });
        let mut client = Self { stream, arrived: BytesMut::new(), key: private.public() };
        let (_, key) = client.next().await;
        let server = wire::open_server_key(&key).unwrap();
        client.write(&wire::client_info(&private, &client.key.clone(), &server)).await;
        assert_eq!(client.next().await.0, wire::SERVER_INFO);
        client
    }

    async fn write(&mut self, frame: &[u8]) {
        self.stream.write_all(frame).await.unwrap();
    }

    async fn send(&mut self, to: NodePublic, packet: &[u8]) {
        self.write(&wire::frame(wire::SEND_PACKET, &[&to.0, packet])).await;
    }

    async fn next(&mut self) -> (u8, Bytes) {
        loop {
            if let Some(frame) = wire::take(&mut self.arrived).unwrap() {
                return frame;
            }
            let read = timeout(LIMIT, self.stream.read_buf(&mut self.arrived)).await.unwrap().unwrap();
            assert!(read > 0, "the relay has hung up");
        }
    }
}
