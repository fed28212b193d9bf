use std::future::pending;

use tokio::{
    io::{DuplexStream, duplex},
    sync::mpsc,
    task::JoinHandle,
};
use warren_proto::tailnet::{
    CoordinateRequest, CoordinateResponse, DerpMap, RefreshResumeTokenRequest, RefreshResumeTokenResponse,
    StreamDerpMapsRequest,
};

use super::*;
use crate::coordinator::tests::deployment::{Call, calls};

const LIMIT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_question_is_answered_and_the_call_closed_once() {
    let mut rig = Rig::new();
    let asking = rig.refresh();
    let mut call = rig.call("RefreshResumeToken").await;
    assert_eq!(call.next::<RefreshResumeTokenRequest>().await, Some(RefreshResumeTokenRequest {}));
    assert_eq!(call.packet().await.unwrap().kind, Kind::CloseSend);
    call.send(&token("first")).await;
    call.write(Kind::CloseSend, &[]).await;
    assert_eq!(asking.await.unwrap().unwrap().token, "first");
    assert_eq!(call.packet().await.unwrap().kind, Kind::Close);
    assert_eq!(call.packet().await, None, "the end of the stream follows");
}

#[tokio::test]
async fn a_call_that_the_deployment_does_not_have_is_known_by_code_and_by_text() {
    for (code, text) in [(12, "Unimplemented"), (0, "protocol error: unknown rpc: \"/x\"")] {
        let error = answered_with(code, text).await;
        assert!(matches!(error, CallError::Unimplemented), "{error}");
    }
}

#[tokio::test]
async fn an_error_is_told_without_what_could_harm_a_terminal() {
    let error = answered_with(0, "no\u{1b}[2J database").await;
    assert_eq!(error.to_string(), "the deployment reports: no [2J database");
}

#[tokio::test]
async fn a_call_that_ends_without_its_answer_has_failed() {
    for (kind, expected) in [
        (Kind::Close, "the deployment ended the call without an answer"),
        (Kind::Cancel, "the deployment cancelled the call"),
        (Kind::Invoke, "the deployment breaks the protocol: a packet of kind Invoke in an answer"),
    ] {
        let mut rig = Rig::new();
        let asking = rig.refresh();
        rig.call("RefreshResumeToken").await.write(kind, &[]).await;
        assert_eq!(asking.await.unwrap().unwrap_err().to_string(), expected);
    }
}

#[tokio::test]
async fn a_message_of_another_schema_is_an_error() {
    let mut rig = Rig::new();
    let asking = rig.refresh();
    rig.call("RefreshResumeToken").await.write(Kind::Message, &[0x0a, 0x05, 0x61]).await;
    assert!(matches!(asking.await.unwrap(), Err(CallError::Malformed(_))));
}

#[tokio::test]
async fn a_message_that_would_fill_the_memory_once_it_is_unpacked_is_not() {
    let mut rig = Rig::new();
    let (_requests, mut answers) =
        rig.rpc.bidirectional::<CoordinateRequest, CoordinateResponse>(Method::Coordinate).await.unwrap();
    let mut call = rig.call("Coordinate").await;
    // Empty peers take two bytes each on the wire.
    call.write(Kind::Message, &[0x0a, 0x00].repeat(100_000)).await;
    let error = answers.next().await.unwrap_err();
    assert!(matches!(error, CallError::Protocol(DrpcError::TooHeavy(_))), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_question_without_an_answer_has_a_deadline() {
    let mut rig = Rig::new();
    let asking = rig.refresh();
    let _call = rig.call("RefreshResumeToken").await;
    assert!(matches!(asking.await.unwrap(), Err(CallError::Deadline(LIMIT))));
}

/// Conforms: control:L8
#[tokio::test]
async fn a_server_stream_gives_message_after_message_until_it_is_closed() {
    let mut rig = Rig::new();
    let opened = rig.rpc.server_stream::<_, DerpMap>(Method::StreamDerpMaps, &StreamDerpMapsRequest {});
    let (mut requests, mut answers) = opened.await.unwrap();
    let mut call = rig.call("StreamDERPMaps").await;
    call.send(&DerpMap::default()).await;
    call.send(&DerpMap::default()).await;
    call.write(Kind::Close, &[]).await;
    assert_eq!(answers.next().await.unwrap(), Some(DerpMap::default()));
    assert_eq!(answers.next().await.unwrap(), Some(DerpMap::default()));
    assert_eq!(answers.next().await.unwrap(), None);
    assert_eq!(answers.next().await.unwrap(), None);
    requests.close().await;
    requests.close().await;
    let mut heard = Vec::new();
    while let Some(packet) = call.packet().await {
        heard.push(packet.kind);
    }
    assert_eq!(heard, [Kind::Message, Kind::CloseSend, Kind::Close], "closing twice is closing once");
}

#[tokio::test]
async fn an_answer_that_is_not_waited_for_to_its_end_is_not_lost() {
    let mut rig = Rig::new();
    let (_requests, mut answers) = rig.coordinate().await;
    let mut call = rig.call("Coordinate").await;
    let response = CoordinateResponse { error: "x".repeat(200_000), ..CoordinateResponse::default() };
    let sent = response.clone();
    tokio::spawn(async move {
        call.send(&sent).await;
        pending::<()>().await;
    });
    let received = loop {
        tokio::select! {
            biased;
            answer = answers.next() => break answer.unwrap(),
            () = tokio::task::yield_now() => {}
        }
    };
    assert!(received == Some(response));
}

#[tokio::test]
async fn an_invoke_does_not_wait_for_the_first_message_and_messages_keep_their_order() {
    let mut rig = Rig::new();
    let (mut requests, _answers) = rig.coordinate().await;
    let mut call = rig.call("Coordinate").await;
    let many: Vec<_> = (0..1000).map(add_tunnel).collect();
    requests.send(&many).await.unwrap();
    for expected in many {
        assert_eq!(call.next().await, Some(expected));
    }
}

#[tokio::test(start_paused = true)]
async fn a_deployment_that_takes_nothing_is_noticed() {
    let mut rig = Rig::new();
    let (mut requests, _answers) = rig.coordinate().await;
    let _unread = rig.call("Coordinate").await;
    let flood: Vec<_> = (0..50_000).map(add_tunnel).collect();
    assert!(matches!(requests.send(&flood).await, Err(CallError::Stalled)));
}

#[tokio::test]
async fn no_call_begins_over_a_connection_that_is_gone() {
    let (ours, theirs) = duplex(1024);
    drop(theirs);
    let (rpc, driver) = client(ours);
    let _ended = driver.run(CancellationToken::new()).await;
    let opened = rpc.bidirectional::<CoordinateRequest, CoordinateResponse>(Method::Coordinate).await;
    assert!(matches!(opened, Err(CallError::Connection(_))));
}

#[tokio::test]
async fn what_was_written_before_the_stop_is_sent() {
    let (ours, theirs) = duplex(64 * 1024);
    let (rpc, driver) = client(ours);
    let stop = CancellationToken::new();
    let driving = tokio::spawn(driver.run(stop.clone()));
    let mut calls = calls(theirs);
    let (mut requests, answers) =
        rpc.bidirectional::<CoordinateRequest, CoordinateResponse>(Method::Coordinate).await.unwrap();
    let mut call = calls.recv().await.unwrap();
    requests.send(&[add_tunnel(7)]).await.unwrap();
    stop.cancel();
    driving.await.unwrap().unwrap();
    drop((requests, answers));
    assert_eq!(call.next().await, Some(add_tunnel(7)));
}

struct Rig {
    rpc: Rpc,
    calls: mpsc::Receiver<Call>,
    _driving: JoinHandle<io::Result<()>>,
}

impl Rig {
    fn new() -> Self {
        let (ours, theirs): (DuplexStream, DuplexStream) = duplex(64 * 1024);
        let (rpc, driver) = client(ours);
        Self { rpc, calls: calls(theirs), _driving: tokio::spawn(driver.run(CancellationToken::new())) }
    }

    async fn call(&mut self, method: &str) -> Call {
        let call = self.calls.recv().await.unwrap();
        assert_eq!(call.method, method);
        call
    }

    async fn coordinate(&self) -> (Requests<CoordinateRequest>, Answers<CoordinateResponse>) {
        self.rpc.bidirectional(Method::Coordinate).await.unwrap()
    }

    fn refresh(&self) -> JoinHandle<Result<RefreshResumeTokenResponse, CallError>> {
        let rpc = self.rpc.clone();
        tokio::spawn(async move {
            rpc.unary(Method::RefreshResumeToken, &RefreshResumeTokenRequest {}, LIMIT).await
        })
    }
}

async fn answered_with(code: u64, text: &str) -> CallError {
    let mut rig = Rig::new();
    let asking = rig.refresh();
    let body = ErrorBody { code, text: text.to_owned() };
    rig.call("RefreshResumeToken").await.write(Kind::Error, &body.encode()).await;
    asking.await.unwrap().unwrap_err()
}

fn token(text: &str) -> RefreshResumeTokenResponse {
    RefreshResumeTokenResponse { token: text.to_owned(), refresh_in: None, expires_at: None }
}

fn add_tunnel(number: u32) -> CoordinateRequest {
    let id = bytes::Bytes::copy_from_slice(&[number.to_be_bytes(); 4].concat());
    let add_tunnel = Some(warren_proto::tailnet::coordinate_request::Tunnel { id });
    CoordinateRequest { add_tunnel, ..CoordinateRequest::default() }
}
