//! Below the calls: what keeps a control connection alive, what breaks it, and bytes that no rule allows
//! (tailnet-control 1.13).

use futures::FutureExt;
use tokio::time::Instant;

use super::*;
use crate::control::rpc as server;

#[tokio::test(start_paused = true)]
async fn who_answers_no_ping_is_closed_after_two_periods_of_a_clock_that_may_be_paused() {
    let yamux_keepalive = Duration::from_secs(86_400);
    let options = LabOptions { agents: 0, yamux_keepalive, ..LabOptions::default() };
    let lab = Lab::start(options).await.unwrap();
    let start = Instant::now();
    let mut stream = connect_in_memory(&lab);
    let mut ping = [0; 3];
    stream.read_exact(&mut ping).await.unwrap();
    assert_eq!((&ping, start.elapsed().as_secs()), (b"\x89\x011", 15));
    let mut close = [0; 25];
    stream.read_exact(&mut close).await.unwrap();
    assert_eq!(start.elapsed().as_secs(), 30);
    assert_eq!(&close, b"\x88\x17\x03\xe9liveness probe failed");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!((rest.len(), start.elapsed().as_secs()), (0, 35), "the answer to a close is waited for");
}

#[tokio::test]
async fn messages_that_break_the_rules_of_websockets_are_answered_with_a_deployments_codes() {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    let cases: [(&str, &[u8], u16); 3] = [
        ("text", b"\x81\x81\0\0\0\0x", 1003),
        ("compressed", b"\xc2\x81\0\0\0\0x", 1002),
        ("unmasked", b"\x82\x01x", 1000),
    ];
    for (name, message, code) in cases {
        let mut stream = connect_in_memory(&lab);
        stream.write_all(message).await.unwrap();
        let mut close = [0; 4];
        timeout(LIMIT, stream.read_exact(&mut close)).await.unwrap().unwrap();
        assert_eq!((close[0], u16::from_be_bytes([close[2], close[3]])), (0x88, code), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raw_bytes_come_at_the_layer_that_was_asked_for_and_as_often() {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    let control = lab.control();
    let cut_off = CallFault::Raw(Raw::new("\x07\x01\x01"));
    control.fail_call(Method::StreamDerpMaps, cut_off, Times::Next(1));
    let mut client = Client::connect(&lab, "").await;
    let mut call = client.ask(Method::StreamDerpMaps, &tailnet::StreamDerpMapsRequest {}).await;
    assert_eq!(call.packet().await, None);
    assert_eq!(&call.reader.buffer[..], b"\x07\x01\x01");
    let mut again = client.ask(Method::StreamDerpMaps, &tailnet::StreamDerpMapsRequest {}).await;
    let _: tailnet::DerpMap = again.hear().await;

    let garbage = Raw::new(vec![9; 40]).dripping(Duration::from_millis(1));
    control.fail_layer(Layer::WebSocket, garbage, Times::Next(1));
    let mut stream = connect_in_memory(&lab);
    let mut bytes = Vec::new();
    timeout(LIMIT, stream.read_to_end(&mut bytes)).await.unwrap().unwrap();
    assert_eq!(bytes, [9; 40]);

    control.fail_layer(Layer::Yamux, Raw::new("no yamux").then(Then::StaySilent), Times::Next(1));
    let mut stream = connect_in_memory(&lab);
    let mut message = [0; 10];
    timeout(LIMIT, stream.read_exact(&mut message)).await.unwrap().unwrap();
    assert_eq!(&message, b"\x82\x08no yamux", "in a binary message");
    assert!(stream.read_u8().now_or_never().is_none());

    rpc::refresh(&mut Client::connect(&lab, "").await).await;
}

/// A control connection below the websocket, without a socket: no timer waits for one.
fn connect_in_memory(lab: &Lab) -> DuplexStream {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (state, work) = (Arc::clone(&lab.control.0), lab.work.clone());
    let visit = server::Visit { peer: OWN, device: None };
    lab.work.spawn(server::serve(state, work, visit, far));
    near
}
