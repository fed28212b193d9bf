//! Both ends against each other, and each against an end that does not keep to the rules.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use tokio::{io::AsyncReadExt, net::UnixStream};
use uuid::Uuid;
use warren_proto::link::{
    Exposition, PathEvents, Ping, Pong, Tree, TunnelStatus, path_events::PathEvent, tree::Node,
    tunnel_status::Relay,
};

use super::*;
use crate::tree::{NodeInfo, NodeKind, Phase};

const SOON: Duration = Duration::from_secs(5);
const AGENT: Uuid = Uuid::from_u128(7);
/// An agent that never answers.
const PATIENT: Uuid = Uuid::from_u128(8);

/// A tunnel that knows what to say.
#[derive(Default)]
struct Oracle {
    faults: Mutex<Vec<(String, String)>>,
    exposition: String,
}

impl Answers for Oracle {
    fn exposition(&self) -> String {
        self.exposition.clone()
    }

    fn tree(&self) -> Vec<NodeInfo> {
        vec![NodeInfo {
            depth: 1,
            name: "relay",
            kind: NodeKind::Worker,
            state: Phase::Running,
            since: SystemTime::UNIX_EPOCH + Duration::from_secs(9),
            restarts: 2,
            last_reason: Some("panic: oh\u{1b}[2J".to_owned()),
            mailbox_depth: 3,
        }]
    }

    fn path_events(&self, after: u64) -> PathEvents {
        let event = PathEvent { to: "192.0.2.1:1\u{1b}[2J".to_owned(), changes: 3, ..PathEvent::default() };
        PathEvents { newest: after + 1, events: vec![event; 300] }
    }

    fn status(&self) -> TunnelStatus {
        TunnelStatus { control: "up".to_owned(), ..TunnelStatus::default() }
    }

    fn ping(
        &self,
        agent: Uuid,
        by: PingBy,
        _: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<AgentPing, String>> + Send>> {
        Box::pin(async move {
            match agent {
                AGENT if by == PingBy::Tsmp => {
                    Ok(AgentPing { latency: Duration::from_millis(7), ..AgentPing::default() })
                }
                AGENT => Ok(AgentPing {
                    latency: Duration::from_millis(12),
                    direct: false,
                    region: "Lab".to_owned(),
                }),
                PATIENT => std::future::pending().await,
                _ => Err("no such agent".to_owned()),
            }
        })
    }

    fn fault(&self, actor: &str, kind: &str) {
        self.faults.lock().unwrap().push((actor.to_owned(), kind.to_owned()));
    }
}

async fn linked(oracle: Oracle) -> (LinkClient, Arc<Oracle>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let oracle = Arc::new(oracle);
    tokio::spawn(serve(theirs, Arc::clone(&oracle) as Arc<dyn Answers>));
    (LinkClient::connect(ours).await.unwrap(), oracle)
}

/// A tunnel that says what the test wants, after a proper hello.
async fn rogue() -> (LinkClient, Reader, Writer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (read, write) = theirs.into_split();
    let (mut reader, mut writer) = (Reader::new(read), Writer { half: write });
    let (client, _, _) = tokio::try_join!(LinkClient::connect(ours), writer.hello(), reader.hello()).unwrap();
    (client, reader, writer)
}

#[tokio::test]
async fn every_question_has_its_answer() {
    let (client, oracle) = linked(Oracle { exposition: "up 1\n".to_owned(), ..Oracle::default() }).await;
    assert_eq!(client.liveness(SOON).await, Ok(()));
    assert_eq!(client.scrape(SOON).await.as_deref(), Ok("up 1\n"));
    assert_eq!(client.status(SOON).await.unwrap().control, "up");
    let paths = client.path_events(7, SOON).await.unwrap();
    assert_eq!((paths.newest, paths.events.len(), paths.events[0].to.as_str()), (8, 256, "192.0.2.1:1 [2J"));
    let tree = client.tree(SOON).await.unwrap();
    assert_eq!((tree[0].name.as_str(), tree[0].restarts, tree[0].mailbox_depth), ("relay", 2, 3));
    assert_eq!(tree[0].since.unwrap().seconds, 9);
    assert_eq!(tree[0].last_reason, "panic: oh [2J");
    let ping = client.ping_agent(AGENT, PingBy::Disco, SOON).await.unwrap().unwrap();
    assert_eq!((ping.latency, ping.direct, ping.region.as_str()), (Duration::from_millis(12), false, "Lab"));
    assert_eq!(
        client.ping_agent(Uuid::nil(), PingBy::Disco, SOON).await,
        Ok(Err("no such agent".to_owned()))
    );
    let through = client.ping_agent(AGENT, PingBy::Tsmp, SOON).await.unwrap().unwrap();
    assert_eq!(through.latency, Duration::from_millis(7));
    client.fault("relay", "panic", SOON).await.unwrap();
    client.liveness(SOON).await.unwrap();
    assert_eq!(*oracle.faults.lock().unwrap(), [("relay".to_owned(), "panic".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_ping_that_waits_delays_no_other_question_and_ends_with_its_limit() {
    let (client, _) = linked(Oracle::default()).await;
    let patient = client.clone();
    let waiting = tokio::spawn(async move { patient.ping_agent(PATIENT, PingBy::Disco, SOON).await });
    tokio::task::yield_now().await;
    assert_eq!(client.liveness(SOON).await, Ok(()));
    assert_eq!(waiting.await.unwrap(), Ok(Err("no answer in time".to_owned())));
}

#[tokio::test(start_paused = true)]
async fn more_pings_than_allowed_are_refused_at_once() {
    let (client, _) = linked(Oracle::default()).await;
    let mut refused = 0;
    let mut pings = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let client = client.clone();
        pings.spawn(async move { client.ping_agent(PATIENT, PingBy::Disco, SOON).await });
    }
    while let Some(result) = pings.join_next().await {
        refused += u32::from(result.unwrap() == Ok(Err("too many pings at the same time".to_owned())));
    }
    assert_eq!(refused, 8);
}

#[tokio::test]
async fn an_exposition_too_large_for_a_frame_does_not_end_the_link() {
    let (client, _) = linked(Oracle { exposition: "x".repeat(MAX_FRAME), ..Oracle::default() }).await;
    assert_eq!(client.scrape(SOON).await.as_deref(), Ok(""));
    assert_eq!(client.liveness(SOON).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_does_not_answer_costs_one_deadline_and_a_late_answer_nothing() {
    let (client, mut reader, mut writer) = rogue().await;
    assert_eq!(client.liveness(SOON).await, Err(LinkError::Deadline));
    let question = reader.next().await.unwrap();
    writer.send(&Frame { id: question.id, body: Some(Body::Pong(Pong {})) }).await.unwrap();
    let answering = async {
        let question = reader.next().await.unwrap();
        writer.send(&Frame { id: 99, body: Some(Body::Pong(Pong {})) }).await.unwrap();
        writer.send(&Frame { id: question.id, body: None }).await.unwrap();
        let text = "late".to_owned();
        writer
            .send(&Frame { id: question.id, body: Some(Body::Exposition(Exposition { text })) })
            .await
            .unwrap();
    };
    let (scraped, ()) = tokio::join!(client.scrape(SOON), answering);
    assert_eq!(scraped.as_deref(), Ok("late"));
}

#[tokio::test]
async fn an_answer_that_does_not_fit_is_an_error_of_that_question_alone() {
    let (client, mut reader, mut writer) = rogue().await;
    for _ in 0..2 {
        let answering = async {
            let question = reader.next().await.unwrap();
            writer.send(&Frame { id: question.id, body: Some(Body::Ping(Ping {})) }).await.unwrap();
        };
        let (scraped, ()) = tokio::join!(client.scrape(SOON), answering);
        assert_eq!(scraped, Err(LinkError::Unfitting));
    }
}

#[tokio::test]
async fn texts_and_lists_from_the_tunnel_are_capped() {
    let (client, mut reader, mut writer) = rogue().await;
    let long = "x".repeat(1000);
    let node = Node { name: long.clone(), ..Node::default() };
    let relay = Relay { region: long.clone(), ..Relay::default() };
    let status = TunnelStatus {
        control_error: format!("\r\n{long}"),
        relays: vec![relay; 500],
        absent: vec![long; 500],
        ..TunnelStatus::default()
    };
    let bodies = [Body::Tree(Tree { nodes: vec![node; 900] }), Body::TunnelStatus(status)];
    let answering = async {
        for body in bodies {
            let question = reader.next().await.unwrap();
            writer.send(&Frame { id: question.id, body: Some(body) }).await.unwrap();
        }
    };
    let asking = async { (client.tree(SOON).await.unwrap(), client.status(SOON).await.unwrap()) };
    let ((tree, status), ()) = tokio::join!(asking, answering);
    assert_eq!((tree.len(), tree[0].name.len()), (256, 256));
    assert_eq!((status.relays.len(), status.relays[0].region.len(), status.absent.len()), (64, 256, 32));
    assert!(status.control_error.starts_with("  x"));
}

#[tokio::test]
async fn a_frame_over_the_limit_or_without_sense_ends_the_link_for_everyone() {
    for (bytes, what) in
        [(&[0, 0x10, 0, 1][..], "exceeds the limit"), (&[0, 0, 0, 2, 0xff, 0xff][..], "undecodable")]
    {
        let (client, _reader, mut writer) = rogue().await;
        let waiting = client.scrape(SOON);
        writer.half.write_all(bytes).await.unwrap();
        let LinkError::Frame(reason) = waiting.await.unwrap_err() else { panic!("another error") };
        assert!(reason.contains(what), "{reason}");
        assert_eq!(client.liveness(SOON).await, Err(LinkError::Frame(reason.clone())));
        assert_eq!(client.closed().await, LinkError::Frame(reason));
    }
}

#[tokio::test]
async fn another_version_or_no_hello_ends_the_link_at_both_ends() {
    let strange = Frame { id: 0, body: Some(Body::Hello(Hello { version: 2, program: String::new() })) };
    let rude = Frame { id: 1, body: Some(Body::Ping(Ping {})) };
    for (first, expected) in [(strange, LinkError::Version(2)), (rude, LinkError::NoHello)] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut writer = Writer { half: theirs.into_split().1 };
        writer.send(&first).await.unwrap();
        assert_eq!(LinkClient::connect(ours).await.map(drop), Err(expected.clone()));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut writer = Writer { half: theirs.into_split().1 };
        writer.send(&first).await.unwrap();
        assert_eq!(serve(ours, Arc::new(Oracle::default())).await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_other_end_is_not_waited_for_long() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert_eq!(LinkClient::connect(ours).await.map(drop), Err(LinkError::NoHello));
}

#[tokio::test]
async fn the_link_ends_with_its_last_client_and_with_its_server() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let serving = tokio::spawn(serve(theirs, Arc::new(Oracle::default())));
    let client = LinkClient::connect(ours).await.unwrap();
    let other = client.clone();
    drop(client);
    assert_eq!(other.liveness(SOON).await, Ok(()));
    drop(other);
    assert_eq!(serving.await.unwrap(), LinkError::Closed);

    let (client, reader, writer) = rogue().await;
    drop((reader, writer));
    assert_eq!(client.closed().await, LinkError::Closed);
    assert_eq!(client.liveness(SOON).await, Err(LinkError::Closed));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_asks_without_reading_is_hung_up_on() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let serving = tokio::spawn(serve(
        theirs,
        Arc::new(Oracle { exposition: "x".repeat(500_000), ..Oracle::default() }),
    ));
    let hello = Frame { id: 0, body: Some(Body::Hello(Hello { version: VERSION, program: String::new() })) };
    ours.write_all(&frame::encode(&hello).unwrap()).await.unwrap();
    let question = Frame { id: 1, body: Some(Body::Scrape(warren_proto::link::Scrape {})) };
    for _ in 0..30 {
        ours.write_all(&frame::encode(&question).unwrap()).await.unwrap();
    }
    assert_eq!(serving.await.unwrap(), LinkError::Deadline);
    let mut rest = Vec::new();
    ours.read_to_end(&mut rest).await.unwrap();
}
