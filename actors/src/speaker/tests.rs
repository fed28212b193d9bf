use std::{
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{DuplexStream, duplex, split};
use warren_proto::vpn::{ManagerMessage, TunnelMessage, manager_message, tunnel_message};

use super::*;

type TunnelEnd = (Speaker<TunnelMessage, ManagerMessage>, Inbox<ManagerMessage>);
type ManagerEnd = (Speaker<ManagerMessage, TunnelMessage>, Inbox<TunnelMessage>);

const SOON: Duration = Duration::from_secs(5);
const OUR_LINE: &[u8] = b"codervpn tunnel 1.3\n";
const THEIR_LINE: &[u8] = b"codervpn manager 1.3\n";

#[tokio::test]
async fn our_line_leaves_as_one_write_before_anything_was_read() {
    let (written, mut writes) = mpsc::channel(4);
    let (silent, _kept) = duplex(1);
    let connecting = tokio::spawn(tunnel(silent, Recorder(written), SOON));
    assert_eq!(writes.recv().await.unwrap(), OUR_LINE);
    connecting.abort();
}

#[tokio::test]
async fn lines_cross_on_a_pipe_that_holds_a_single_byte() {
    let (ours, theirs) = duplex(1);
    let (ours, theirs) = tokio::join!(tunnel_on(ours), manager_on(theirs));
    assert_eq!(ours.0.negotiated().to_string(), "1.3");
    assert_eq!(theirs.0.negotiated(), ours.0.negotiated());
}

#[tokio::test]
async fn older_and_longer_version_lists_are_accepted() {
    for (line, negotiated) in [
        ("codervpn manager 1.0\n", "1.0"),
        ("codervpn manager 1.3,2.1\n", "1.3"),
        ("codervpn manager 1.9\n", "1.3"),
    ] {
        let (ours, mut theirs) = duplex(64);
        theirs.write_all(line.as_bytes()).await.unwrap();
        assert_eq!(tunnel_on(ours).await.0.negotiated().to_string(), negotiated);
    }
}

#[tokio::test]
async fn a_refused_peer_still_gets_our_line_and_then_the_end() {
    for line in [
        "ssh manager 1.1",
        "ssh manager",
        "codervpn manager 2.0,3.0",
        "codervpn 0.1 manager",
        "codervpn 1.1 supervisor",
        "codervpn 1.1 tunnel",
    ] {
        // One byte at a time: our line leaves only if we wait for it.
        let (ours, mut theirs) = duplex(1);
        let (read, write) = split(ours);
        let connecting = tokio::spawn(tunnel(read, write, SOON));
        theirs.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let mut seen = Vec::new();
        theirs.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, OUR_LINE, "{line}");
        let error = connecting.await.unwrap().unwrap_err();
        assert!(
            error.to_string().starts_with(&format!("handshake failed: validate header ({line}): ")),
            "{error}"
        );
        assert_eq!(error.is_version_mismatch(), line.contains("2.0"));
    }
}

#[tokio::test]
async fn a_line_without_an_end_is_hung_up_on_while_the_peer_is_still_writing() {
    let (ours, mut theirs) = duplex(64);
    let (read, write) = split(ours);
    let connecting = tokio::spawn(tunnel(read, write, SOON));
    assert!(theirs.write_all(&[b'A'; 768]).await.is_err());
    let error = connecting.await.unwrap().unwrap_err().to_string();
    assert_eq!(error, format!("handshake failed: header malformed or too large: {}", "A".repeat(256)));
}

#[tokio::test]
async fn a_handshake_fails_with_its_transport() {
    let (ours, theirs) = duplex(64);
    drop(theirs);
    let (read, write) = split(ours);
    let error = tunnel(read, write, SOON).await.unwrap_err().to_string();
    assert!(error.starts_with("handshake failed: write header: "), "{error}");

    let (ours, mut theirs) = duplex(64);
    theirs.shutdown().await.unwrap();
    let (read, write) = split(ours);
    let error = tunnel(read, write, SOON).await.unwrap_err().to_string();
    assert_eq!(error, "handshake failed: read header: EOF");
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_given_up_at_the_limit() {
    let (ours, _theirs) = duplex(64);
    let (read, write) = split(ours);
    let error = tunnel(read, write, SOON).await.unwrap_err();
    assert!(matches!(error, SpeakerError::Deadline(SOON)), "{error}");
}

#[tokio::test]
async fn nothing_behind_the_line_is_lost() {
    let (ours, mut theirs) = duplex(256);
    let first = [THEIR_LINE, &wake(1), &wake(2)].concat();
    theirs.write_all(&first).await.unwrap();
    let (_speaker, mut inbox) = tunnel_on(ours).await;
    assert_eq!(inbox.recv().await.unwrap().kind, Kind::Request(1));
    assert_eq!(inbox.recv().await.unwrap().kind, Kind::Request(2));
}

#[tokio::test]
async fn a_message_is_a_big_endian_length_and_its_bytes() {
    let (speaker, _inbox, mut peer) = raw_peer().await;
    speaker.respond(3, message(tunnel_message::Msg::Wake(vpn::WakeResponse {}))).await.unwrap();
    assert_eq!(take(&mut peer, 10).await, [0, 0, 0, 6, 0x0a, 0x02, 0x10, 0x03, 0x3a, 0x00]);
}

#[tokio::test]
async fn notifications_have_no_rpc_whatever_they_came_with() {
    let (speaker, _inbox, mut peer) = raw_peer().await;
    let mut update = message(tunnel_message::Msg::PeerUpdate(vpn::PeerUpdate::default()));
    update.rpc = Some(vpn::Rpc { msg_id: 4, response_to: 4 });
    speaker.notify(update).await.unwrap();
    assert_eq!(take(&mut peer, 6).await, [0, 0, 0, 2, 0x1a, 0x00]);
}

#[tokio::test]
async fn a_message_without_a_body_is_never_sent() {
    let (speaker, _inbox, _peer) = raw_peer().await;
    let bare = speaker.respond(5, TunnelMessage::default()).await;
    assert_eq!(bare, Err(SendError::Unsendable(FrameError::Empty)));
}

#[tokio::test]
async fn undecodable_frames_end_the_connection() {
    for bytes in [&[0_u8, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &[1, 0, 0, 1], &[0xff; 4]] {
        let (speaker, mut inbox, mut peer) = raw_peer().await;
        peer.write_all(bytes).await.unwrap();
        assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
        assert!(inbox.recv().await.is_none());
        assert!(matches!(speaker.closed().await, End::Protocol(_)));
    }
}

#[tokio::test]
async fn a_call_gets_its_own_response_in_whatever_order_they_come() {
    let (mut ours, theirs) = speakers().await;
    let first = tokio::spawn(call(&theirs.0, manager_message::Msg::Wake(vpn::WakeRequest {})));
    let Kind::Request(first_id) = ours.1.recv().await.unwrap().kind else { panic!("not a request") };
    let second = tokio::spawn(call(&theirs.0, manager_message::Msg::Stop(vpn::StopRequest {})));
    let Kind::Request(second_id) = ours.1.recv().await.unwrap().kind else { panic!("not a request") };
    assert_eq!((first_id, second_id), (1, 2));
    let stopped = vpn::StopResponse { success: true, error_message: String::new() };
    ours.0.respond(second_id, message(tunnel_message::Msg::Stop(stopped))).await.unwrap();
    ours.0.respond(first_id, message(tunnel_message::Msg::Wake(vpn::WakeResponse {}))).await.unwrap();
    assert!(matches!(first.await.unwrap().unwrap().msg, Some(tunnel_message::Msg::Wake(_))));
    assert!(matches!(second.await.unwrap().unwrap().msg, Some(tunnel_message::Msg::Stop(_))));
}

#[tokio::test]
async fn a_response_passes_requests_that_nobody_handles() {
    let (speaker, _unread, mut peer) = raw_peer().await;
    let call = tokio::spawn(async move { speaker.request(settings(), SOON).await });
    let frame = take_frame(&mut peer).await;
    assert!(!frame.is_empty());
    for id in 1..=200 {
        peer.write_all(&wake(id)).await.unwrap();
    }
    peer.write_all(&[0, 0, 0, 8, 0x0a, 0x02, 0x10, 0x01, 0x1a, 0x02, 0x08, 0x01]).await.unwrap();
    let answer = call.await.unwrap().unwrap();
    assert!(matches!(answer.msg, Some(manager_message::Msg::NetworkSettings(it)) if it.success));
}

#[tokio::test(start_paused = true)]
async fn requests_beyond_the_inbox_end_the_connection() {
    let (speaker, _unread, mut peer) = raw_peer().await;
    let mut id = 0;
    while peer.write_all(&wake(id + 1)).await.is_ok() {
        id += 1;
        assert!(id < 100_000, "the peer is never hung up on");
    }
    assert_eq!(speaker.closed().await, End::Overflow);
}

#[tokio::test]
async fn the_end_of_the_peer_ends_our_request_stream() {
    let (mut ours, theirs) = speakers().await;
    assert!(theirs.0.close(SOON).await);
    assert!(ours.1.recv().await.is_none());
    assert_eq!(ours.0.closed().await, End::Eof);
    assert_eq!(theirs.0.closed().await, End::Closed);
}

#[tokio::test]
async fn a_cancelled_call_ends_and_its_late_response_is_ignored() {
    let (mut ours, theirs) = speakers().await;
    let abandoned = tokio::spawn(call(&theirs.0, manager_message::Msg::Wake(vpn::WakeRequest {})));
    assert_eq!(ours.1.recv().await.unwrap().kind, Kind::Request(1));
    abandoned.abort();
    assert!(abandoned.await.unwrap_err().is_cancelled());
    ours.0.respond(1, message(tunnel_message::Msg::Wake(vpn::WakeResponse {}))).await.unwrap();
    let next = tokio::spawn(call(&theirs.0, manager_message::Msg::Wake(vpn::WakeRequest {})));
    assert_eq!(ours.1.recv().await.unwrap().kind, Kind::Request(2));
    ours.0.respond(2, message(tunnel_message::Msg::Wake(vpn::WakeResponse {}))).await.unwrap();
    assert!(next.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_call_without_a_response_ends_at_its_deadline() {
    let (speaker, _inbox, _peer) = raw_peer().await;
    assert_eq!(speaker.request(settings(), SOON).await, Err(CallError::Deadline));
    assert!(lock(&speaker.connection.calls).as_ref().unwrap().is_empty());
}

#[tokio::test]
async fn a_peer_that_closes_instead_of_answering_fails_every_pending_call_at_once() {
    let (speaker, _inbox, mut peer) = raw_peer().await;
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let speaker = speaker.clone();
            tokio::spawn(async move { speaker.request(settings(), Duration::from_secs(3600)).await })
        })
        .collect();
    for _ in 0..3 {
        take_frame(&mut peer).await;
    }
    drop(peer);
    for call in calls {
        assert_eq!(call.await.unwrap(), Err(CallError::Ended(End::Eof)));
    }
}

#[tokio::test]
async fn a_call_after_the_end_fails_without_hanging() {
    let (speaker, _inbox, peer) = raw_peer().await;
    drop(peer);
    speaker.closed().await;
    let call = speaker.request(settings(), Duration::from_secs(3600)).await.unwrap_err();
    assert_eq!(call.to_string(), "unexpected EOF");
}

#[tokio::test]
async fn frames_that_were_accepted_leave_whole_and_the_last_frame_is_the_last() {
    let (speaker, _inbox, mut peer) = raw_peer_with_room_for(16).await;
    let long = "x".repeat(4000);
    for _ in 0..3 {
        speaker.notify(log(&long)).await.unwrap();
    }
    let pending = tokio::spawn({
        let speaker = speaker.clone();
        async move { speaker.request(settings(), Duration::from_secs(3600)).await }
    });
    // The writer is stuck in the first log; the request waits behind the third.
    while lock(&speaker.connection.calls).as_ref().is_some_and(Correlator::is_empty)
        || speaker.queue.capacity() > QUEUE - 3
    {
        tokio::task::yield_now().await;
    }
    let stopped =
        message(tunnel_message::Msg::Stop(vpn::StopResponse { success: true, ..Default::default() }));
    let closing = tokio::spawn({
        let speaker = speaker.clone();
        async move { speaker.close_with(9, stopped, SOON).await }
    });
    assert_eq!(pending.await.unwrap(), Err(CallError::Ended(End::Closed)));
    assert_eq!(speaker.notify(log("late")).await, Err(SendError::Ended(End::Closed)));

    let mut all = Vec::new();
    peer.read_to_end(&mut all).await.unwrap();
    assert_eq!(closing.await.unwrap(), Ok(true));
    let mut decoder = Decoder::new(MAX_FRAME);
    decoder.extend(&all);
    let mut methods = Vec::new();
    while let Some(message) = decoder.next::<TunnelMessage>().unwrap() {
        methods.push((message.method(), message.rpc));
    }
    assert!(decoder.is_between_frames(), "a frame was cut");
    let expected = [
        ("log", None),
        ("log", None),
        ("log", None),
        ("network_settings", Some(vpn::Rpc::request(1))),
        ("stop", Some(vpn::Rpc::response(9))),
    ];
    assert_eq!(methods, expected);
}

#[tokio::test]
async fn closing_releases_senders_that_wait_for_room() {
    let (speaker, _inbox, mut peer) = raw_peer_with_room_for(1).await;
    let long = "x".repeat(100_000);
    while speaker.try_notify(log(&long)).is_ok() {
        tokio::task::yield_now().await;
    }
    let blocked: Vec<_> = (0..4)
        .map(|_| {
            let (speaker, long) = (speaker.clone(), long.clone());
            tokio::spawn(async move { speaker.notify(log(&long)).await })
        })
        .collect();
    tokio::task::yield_now().await;
    let closing = tokio::spawn({
        let speaker = speaker.clone();
        async move { speaker.close(Duration::from_secs(60)).await }
    });
    let reading = tokio::spawn(async move { peer.read_to_end(&mut Vec::new()).await });
    for sender in blocked {
        // Released either way: as the last that was accepted, or refused.
        let _ = sender.await.unwrap();
    }
    assert!(closing.await.unwrap());
    reading.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_gives_up_on_a_peer_that_does_not_read() {
    let (speaker, _inbox, _peer) = raw_peer_with_room_for(1).await;
    speaker.notify(log("nobody reads this")).await.unwrap();
    assert!(!speaker.close(SOON).await);
    assert_eq!(speaker.closed().await, End::Closed);
}

#[tokio::test]
async fn closing_twice_is_closing_once() {
    let (ours, theirs) = speakers().await;
    let (first, second) = tokio::join!(ours.0.close(SOON), ours.0.close(SOON));
    assert!(first && second);
    drop(theirs);
}

#[tokio::test]
async fn nothing_is_left_running_when_the_last_speaker_is_dropped() {
    let (speaker, inbox, mut peer) = raw_peer().await;
    speaker.notify(log("farewell")).await.unwrap();
    let clone = speaker.clone();
    drop((speaker, clone));
    let mut all = Vec::new();
    peer.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, encode(&log("farewell")).unwrap());
    drop(inbox);
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    while alive() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn nothing_is_left_running_when_the_peer_is_gone() {
    let (speaker, _inbox, peer) = raw_peer().await;
    drop(peer);
    speaker.closed().await;
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    while alive() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_is_written_is_reported_and_what_is_not_is_too() {
    let (speaker, _inbox, mut peer) = raw_peer_with_room_for(1).await;
    let first = speaker.reserve().await.unwrap().notify(log("a")).unwrap();
    let second = speaker.reserve().await.unwrap().notify(log("b")).unwrap();
    take_frame(&mut peer).await;
    assert!(first.wait().await);
    drop(peer);
    assert!(!second.wait().await);
}

#[tokio::test]
async fn pipes_in_blocking_mode_carry_a_connection() {
    let (their_read, our_write) = rustix::pipe::pipe().unwrap();
    let (our_read, their_write) = rustix::pipe::pipe().unwrap();
    talk_over((our_read, our_write).into(), (their_read, their_write).into()).await;
}

#[tokio::test]
async fn sockets_carry_a_connection() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let both = |it: std::os::unix::net::UnixStream| (it.try_clone().unwrap().into(), it.into());
    talk_over(both(ours).into(), both(theirs).into()).await;
}

async fn talk_over(ours: descriptors::Descriptors, theirs: descriptors::Descriptors) {
    let ((our_read, our_write), (their_read, their_write)) = (ours.open().unwrap(), theirs.open().unwrap());
    let (ours, theirs) = tokio::join!(
        tunnel(our_read, our_write, SOON),
        Speaker::<ManagerMessage, TunnelMessage>::connect(
            their_read,
            their_write,
            Role::Manager,
            Role::Tunnel,
            SOON
        ),
    );
    let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap());
    // Larger than what a pipe holds.
    let text = "x".repeat(300_000);
    ours.0.notify(log(&text)).await.unwrap();
    assert_eq!(theirs.1.recv().await.unwrap().message, log(&text));
    let stop = tokio::spawn(call(&theirs.0, manager_message::Msg::Stop(vpn::StopRequest {})));
    let Kind::Request(id) = ours.1.recv().await.unwrap().kind else { panic!("not a request") };
    let stopped =
        message(tunnel_message::Msg::Stop(vpn::StopResponse { success: true, ..Default::default() }));
    assert_eq!(ours.0.close_with(id, stopped, SOON).await, Ok(true));
    assert!(stop.await.unwrap().is_ok());
    assert!(theirs.1.recv().await.is_none());
}

#[test]
fn numbers_that_are_no_descriptors_are_refused_with_the_texts_of_the_command_line() {
    // SAFETY: none of these numbers is a descriptor, so nobody owns one.
    let refused =
        |read, write| unsafe { descriptors::Descriptors::adopt(read, write) }.unwrap_err().to_string();
    assert_eq!(refused(-1, 10), "rpc-read-handle (-1) and rpc-write-handle (10) must be positive");
    assert_eq!(refused(10, -1), "rpc-read-handle (10) and rpc-write-handle (-1) must be positive");
    assert_eq!(refused(10, 10), "rpc-read-handle (10) and rpc-write-handle (10) must be different");
    let not_open =
        "create bidirectional RPC pipe: stat pipe_read (fd=900000): stat pipe_read: bad file descriptor";
    assert_eq!(refused(900_000, 900_001), not_open);
    assert!(refused(i64::MAX, 900_001).contains("stat pipe_read (fd=9223372036854775807)"));
}

#[tokio::test]
async fn a_regular_file_is_no_connection() {
    let file = || tempfile::tempfile().unwrap().into();
    let error = descriptors::Descriptors::from((file(), file())).open().unwrap_err().to_string();
    assert!(error.contains("neither a pipe nor a socket"), "{error}");
}

/// Writes go to the channel, one item each.
struct Recorder(mpsc::Sender<Vec<u8>>);

impl AsyncWrite for Recorder {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.try_send(bytes.to_vec()).unwrap();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

async fn tunnel<R, W>(read: R, write: W, limit: Duration) -> Result<TunnelEnd, SpeakerError>
where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    Speaker::connect(read, write, Role::Tunnel, Role::Manager, limit).await
}

async fn tunnel_on(stream: DuplexStream) -> TunnelEnd {
    let (read, write) = split(stream);
    tunnel(read, write, SOON).await.unwrap()
}

async fn manager_on(stream: DuplexStream) -> ManagerEnd {
    let (read, write) = split(stream);
    Speaker::connect(read, write, Role::Manager, Role::Tunnel, SOON).await.unwrap()
}

async fn speakers() -> (TunnelEnd, ManagerEnd) {
    let (ours, theirs) = duplex(1024);
    tokio::join!(tunnel_on(ours), manager_on(theirs))
}

/// A tunnel's end that has shaken hands, and the bare other end.
async fn raw_peer() -> (Speaker<TunnelMessage, ManagerMessage>, Inbox<ManagerMessage>, DuplexStream) {
    raw_peer_with_room_for(1024).await
}

async fn raw_peer_with_room_for(
    bytes: usize,
) -> (Speaker<TunnelMessage, ManagerMessage>, Inbox<ManagerMessage>, DuplexStream) {
    let (ours, mut theirs) = duplex(bytes);
    let shake = async {
        theirs.write_all(THEIR_LINE).await.unwrap();
        assert_eq!(take(&mut theirs, OUR_LINE.len()).await, OUR_LINE);
        theirs
    };
    let ((speaker, inbox), theirs) = tokio::join!(tunnel_on(ours), shake);
    (speaker, inbox, theirs)
}

async fn take(peer: &mut DuplexStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    peer.read_exact(&mut bytes).await.unwrap();
    bytes
}

async fn take_frame(peer: &mut DuplexStream) -> Vec<u8> {
    let length = peer.read_u32().await.unwrap();
    take(peer, length as usize).await
}

fn call(
    speaker: &Speaker<ManagerMessage, TunnelMessage>,
    msg: manager_message::Msg,
) -> impl Future<Output = Result<TunnelMessage, CallError>> + use<> {
    let speaker = speaker.clone();
    async move { speaker.request(ManagerMessage { rpc: None, msg: Some(msg) }, SOON).await }
}

fn message(msg: tunnel_message::Msg) -> TunnelMessage {
    TunnelMessage { rpc: None, msg: Some(msg) }
}

fn log(text: &str) -> TunnelMessage {
    message(tunnel_message::Msg::Log(vpn::Log { message: text.to_owned(), ..Default::default() }))
}

fn settings() -> TunnelMessage {
    message(tunnel_message::Msg::NetworkSettings(vpn::NetworkSettingsRequest {
        mtu: 1280,
        ..Default::default()
    }))
}

fn wake(id: u64) -> Vec<u8> {
    let message = ManagerMessage {
        rpc: Some(vpn::Rpc::request(id)),
        msg: Some(manager_message::Msg::Wake(vpn::WakeRequest {})),
    };
    encode(&message).unwrap().to_vec()
}
