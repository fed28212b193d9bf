//! Leg A from our end, with the bytes of a tunnel's end in the test's hands.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use warren_proto::header::Role;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);
/// A Wake as it must be on the wire: the first request of the connection.
const WAKE: &[u8] = &[0, 0, 0, 6, 0x0a, 2, 0x08, 1, 0x32, 0];

/// A speaker, and the other end after its greeting.
async fn greeted(line: &str) -> (TunnelSpeaker, Inbox<TunnelMessage>, DuplexStream) {
    let (ours, mut theirs) = tokio::io::duplex(1024);
    let (read, write) = tokio::io::split(ours);
    theirs.write_all(line.as_bytes()).await.unwrap();
    let (speaker, inbox) = Speaker::connect(read, write, Role::Manager, Role::Tunnel, LIMIT).await.unwrap();
    let mut greeting = [0; b"codervpn manager 1.3\n".len()];
    theirs.read_exact(&mut greeting).await.unwrap();
    (speaker, inbox, theirs)
}

/// Everything the other end hears from now on.
async fn rest(mut theirs: DuplexStream, speaker: TunnelSpeaker) -> Vec<u8> {
    speaker.close(LIMIT).await;
    let mut heard = Vec::new();
    theirs.read_to_end(&mut heard).await.unwrap();
    heard
}

/// Conforms: vpn:W25
#[tokio::test(start_paused = true)]
async fn a_tunnel_of_1_3_hears_of_a_sleep_once_whatever_it_answers() {
    let fitting: &[u8] = &[0, 0, 0, 6, 0x0a, 2, 0x10, 1, 0x3a, 0];
    let unexpected: &[u8] = &[0, 0, 0, 6, 0x0a, 2, 0x10, 1, 0x1a, 0];
    let silence: &[u8] = &[];
    for answer in [fitting, unexpected, silence] {
        let (speaker, _inbox, mut theirs) = greeted("codervpn tunnel 1.3\n").await;
        let mut heard = [0; WAKE.len()];
        let answering = async {
            theirs.read_exact(&mut heard).await.unwrap();
            theirs.write_all(answer).await.unwrap();
        };
        tokio::join!(wake(&speaker), answering);
        assert_eq!(heard, WAKE);
        assert!(rest(theirs, speaker).await.is_empty(), "one is enough");
    }
}

/// Conforms: vpn:W25
#[tokio::test]
async fn a_tunnel_that_does_not_know_of_sleep_is_not_told() {
    for line in ["codervpn tunnel 1.0\n", "codervpn tunnel 1.2\n"] {
        let (speaker, _inbox, theirs) = greeted(line).await;
        wake(&speaker).await;
        assert!(rest(theirs, speaker).await.is_empty());
    }
}

/// Conforms: vpn:W25
#[tokio::test]
async fn a_sleep_that_cannot_be_told_is_no_trouble() {
    let (speaker, _inbox, theirs) = greeted("codervpn tunnel 1.3\n").await;
    drop(theirs);
    wake(&speaker).await;
}

/// Conforms: vpn:15.25
#[tokio::test(start_paused = true)]
async fn a_tunnel_that_never_answers_its_start_is_not_waited_for_for_ever() {
    let (speaker, _inbox, _theirs) = greeted("codervpn tunnel 1.3\n").await;
    let begun = Instant::now();
    let outcome = start(&speaker, &[], vpn::StartRequest::default()).await;
    assert_eq!(outcome, Err(CallError::Deadline));
    assert_eq!(begun.elapsed().as_secs(), START_LIMIT.as_secs());
}

#[tokio::test]
async fn an_answer_of_another_kind_is_a_start_that_failed() {
    let (speaker, _inbox, mut theirs) = greeted("codervpn tunnel 1.3\n").await;
    let asking = start(&speaker, &[], vpn::StartRequest::default());
    let answering = async {
        theirs.read_u8().await.unwrap();
        theirs.write_all(&[0, 0, 0, 6, 0x0a, 2, 0x10, 1, 0x3a, 0]).await.unwrap();
    };
    let (answer, ()) = tokio::join!(asking, answering);
    let answer = answer.unwrap();
    assert!(!answer.success && answer.error_message.contains("does not fit"), "{}", answer.error_message);
}

/// One agent of one workspace.
fn everything() -> vpn::PeerUpdate {
    let id = || vec![1; 16].into();
    vpn::PeerUpdate {
        upserted_workspaces: vec![vpn::Workspace { id: id(), ..Default::default() }],
        upserted_agents: vec![vpn::Agent { id: id(), workspace_id: id(), ..Default::default() }],
        ..Default::default()
    }
}

/// It deletes the agent of [`everything`], which nobody has heard of at first.
fn deletion() -> vpn::PeerUpdate {
    let agent = vpn::Agent { id: vec![1; 16].into(), ..Default::default() };
    vpn::PeerUpdate { deleted_agents: vec![agent], ..Default::default() }
}

fn of_peers(update: vpn::PeerUpdate) -> TunnelMessage {
    TunnelMessage { rpc: None, msg: Some(tunnel_message::Msg::PeerUpdate(update)) }
}

/// A tunnel's end of leg A, and somebody who listens at the other.
struct Heard {
    service: Arc<Service>,
    started: CancellationToken,
    tunnel: Speaker<TunnelMessage, ManagerMessage>,
    asked: Inbox<ManagerMessage>,
    _tasks: Tasks,
    _folder: tempfile::TempDir,
}

impl Heard {
    async fn begin() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let service = Arc::new(super::super::tests::service(folder.path(), "/nonexistent".into()));
        let (ours, theirs) = tokio::io::duplex(1024);
        let ((read, write), (their_read, their_write)) = (tokio::io::split(ours), tokio::io::split(theirs));
        let (manager, tunnel) = tokio::join!(
            Speaker::connect(read, write, Role::Manager, Role::Tunnel, LIMIT),
            Speaker::connect(their_read, their_write, Role::Tunnel, Role::Manager, LIMIT),
        );
        let ((speaker, inbox), (tunnel, asked)) = (manager.unwrap(), tunnel.unwrap());
        let (tasks, started) = (Tasks::default(), CancellationToken::new());
        let ear = Ear {
            speaker,
            secrets: Arc::default(),
            service: Arc::clone(&service),
            settings: Arc::new(Semaphore::new(MAX_SETTINGS)),
            started: started.clone(),
            book: Book {
                peers: service.peers.claim().unwrap(),
                _silent: CancellationToken::new().drop_guard(),
            },
        };
        tasks.spawn(ear.listen(inbox));
        Self { service, started, tunnel, asked, _tasks: tasks, _folder: folder }
    }

    /// The id of a request for all peers, if one comes within `limit`.
    async fn asked(&mut self, limit: Duration) -> Option<u64> {
        let request = tokio::time::timeout(limit, self.asked.recv()).await.ok()?.unwrap();
        assert!(matches!(request.message.msg, Some(manager_message::Msg::GetPeerUpdate(_))));
        let Kind::Request(id) = request.kind else { panic!("{:?}", request.kind) };
        Some(id)
    }

    async fn agents(&self, count: usize) {
        let mut peers = self.service.peers.view();
        let reached = peers.wait_for(|peers| peers.agents().count() == count);
        tokio::time::timeout(LIMIT, reached).await.unwrap();
    }
}

/// Conforms: vpn:15.28
#[tokio::test(start_paused = true)]
async fn an_update_that_does_not_fit_is_remembered_until_the_tunnel_has_answered_its_start() {
    let mut heard = Heard::begin().await;
    heard.tunnel.notify(of_peers(deletion())).await.unwrap();
    assert_eq!(heard.asked(LIMIT).await, None, "deployed tunnels end when they are asked before");
    heard.started.cancel();
    let id = heard.asked(LIMIT).await.expect("it is asked");
    heard.tunnel.respond(id, of_peers(everything())).await.unwrap();
    heard.agents(1).await;
    assert_eq!(heard.asked(10 * RESYNC_PAUSE).await, None, "once is enough");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_does_not_answer_is_asked_again_after_a_pause() {
    let mut heard = Heard::begin().await;
    heard.started.cancel();
    heard.tunnel.notify(of_peers(deletion())).await.unwrap();
    assert!(heard.asked(LIMIT).await.is_some());
    assert_eq!(heard.asked(RESYNC_PAUSE / 2).await, None);
    let id = heard.asked(RESYNC_PAUSE).await.expect("it is asked again");
    heard.tunnel.respond(id, of_peers(everything())).await.unwrap();
    heard.agents(1).await;
}

/// Many times: who looks first is a matter of chance.
#[tokio::test(start_paused = true)]
async fn what_a_tunnel_says_right_behind_its_answer_is_newer_than_the_answer() {
    for _ in 0..50 {
        let mut heard = Heard::begin().await;
        heard.started.cancel();
        heard.tunnel.notify(of_peers(deletion())).await.unwrap();
        let id = heard.asked(LIMIT).await.expect("it is asked");
        heard.tunnel.try_respond(id, of_peers(everything())).unwrap();
        heard.tunnel.try_notify(of_peers(deletion())).unwrap();
        let mut peers = heard.service.peers.view();
        let taken = peers.wait_for(|peers| peers.workspace(&[1; 16]).is_some());
        tokio::time::timeout(LIMIT, taken).await.expect("the answer is taken");
        heard.agents(0).await;
        assert_eq!(heard.asked(10 * RESYNC_PAUSE).await, None, "nothing is missing");
    }
}
