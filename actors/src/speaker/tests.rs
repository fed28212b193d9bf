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

/// Conforms: vpn:S1
#[tokio::test]
async fn our_line_leaves_as_one_write_before_anything_was_read() {
    let (written, mut writes) = mpsc::channel(4);
    let (silent, _kept) = duplex(1);
    let connecting = tokio::spawn(tunnel(silent, Recorder(written), SOON));
    assert_eq!(writes.recv().await.unwrap(), OUR_LINE);
    connecting.abort();
}

/// Conforms: vpn:S1
#[tokio::test]
async fn lines_cross_on_a_pipe_that_holds_a_single_byte() {
    let (ours, theirs) = duplex(1);
    let (ours, theirs) = tokio::join!(tunnel_on(ours), manager_on(theirs));
    assert_eq!(ours.0.negotiated().to_string(), "1.3");
    assert_eq!(theirs.0.negotiated(), ours.0.negotiated());
}

/// Conforms: vpn:S2 vpn:S9
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

/// Conforms: vpn:S8
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

/// Conforms: vpn:S7 vpn:W8
#[tokio::test]
async fn a_line_without_an_end_is_hung_up_on_while_the_peer_is_still_writing() {
    let (ours, mut theirs) = duplex(64);
    let (read, write) = split(ours);
    let connecting = tokio::spawn(tunnel(read, write, SOON));
    assert!(theirs.write_all(&[b'A'; 768]).await.is_err());
    let error = connecting.await.unwrap().unwrap_err().to_string();
    assert_eq!(error, format!("handshake failed: header malformed or too large: {}", "A".repeat(256)));
}

/// Conforms: vpn:S5
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

/// Conforms: vpn:S6
#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_given_up_at_the_limit() {
    let (ours, _theirs) = duplex(64);
    let (read, write) = split(ours);
    let error = tunnel(read, write, SOON).await.unwrap_err();
    assert!(matches!(error, SpeakerError::Deadline(SOON)), "{error}");
    assert_eq!(error.to_string(), "handshake failed: no answer within 5s");
}

/// Conforms: vpn:S6
#[tokio::test]
async fn a_handshake_that_is_cancelled_lets_go_of_its_pipe() {
    let (ours, mut theirs) = duplex(64);
    let (read, write) = split(ours);
    let connecting = tokio::spawn(tunnel(read, write, SOON));
    assert_eq!(take(&mut theirs, OUR_LINE.len()).await, OUR_LINE);
    connecting.abort();
    assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
    assert!(connecting.await.unwrap_err().is_cancelled());
}

/// Conforms: vpn:W7
#[tokio::test]
async fn what_the_system_says_during_a_handshake_is_passed_on_as_it_is() {
    let error = tunnel(tokio::io::empty(), Broken, SOON).await.unwrap_err();
    let SpeakerError::Write(inner) = &error else { panic!("{error}") };
    assert_eq!((inner.kind(), inner.to_string()), (io::ErrorKind::StorageFull, "cats".to_owned()));

    let error = tunnel(Broken, tokio::io::sink(), SOON).await.unwrap_err();
    let SpeakerError::Read(inner) = &error else { panic!("{error}") };
    assert_eq!((inner.kind(), inner.to_string()), (io::ErrorKind::StorageFull, "cats".to_owned()));
    assert_eq!(error.to_string(), "handshake failed: read header: cats");
}

/// Conforms: vpn:W9
#[tokio::test]
async fn a_manager_refuses_a_tunnel_in_the_words_of_the_protocol() {
    let duplicate = "parse version list \"1.0,1.2\": invalid parsed version list \"1.0,1.2\": duplicate major \
                     version: 1";
    let unsorted = "parse version list \"2.0,3.1,1.2\": invalid parsed version list \"2.0,3.1,1.2\": versions are \
                    not sorted";
    for (line, reason) in [
        ("invalid", "wrong number of parts"),
        ("cats tunnel 1.0", "invalid preamble"),
        ("codervpn  1.0", "unexpected role"),
        ("codervpn cats 1.0", "unexpected role"),
        ("codervpn manager 1.0", "unexpected role"),
        (
            "codervpn tunnel 1000.1",
            "current supported versions \"1.3\" is not compatible with peer versions \"1000.1\"",
        ),
        ("codervpn tunnel 0.1", "parse version list \"0.1\": invalid version list: 0.1"),
        ("codervpn tunnel 1.0,1.2", duplicate),
        ("codervpn tunnel 2.0,3.1,1.2", unsorted),
    ] {
        let (ours, mut theirs) = duplex(1024);
        theirs.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let (read, write) = split(ours);
        let refused =
            Speaker::<ManagerMessage, TunnelMessage>::connect(read, write, Role::Manager, Role::Tunnel, SOON)
                .await
                .unwrap_err();
        assert_eq!(refused.to_string(), format!("handshake failed: validate header ({line}): {reason}"));
    }
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

/// Conforms: vpn:S3
#[tokio::test]
async fn a_message_is_a_big_endian_length_and_its_bytes() {
    let (speaker, _inbox, mut peer) = raw_peer().await;
    speaker.respond(3, message(tunnel_message::Msg::Wake(vpn::WakeResponse {}))).await.unwrap();
    assert_eq!(take(&mut peer, 10).await, [0, 0, 0, 6, 0x0a, 0x02, 0x10, 0x03, 0x3a, 0x00]);
}

/// Conforms: vpn:W6 vpn:16.2.4
#[tokio::test]
async fn every_kind_of_message_has_its_ids_and_never_both() {
    let (mut ours, mut theirs) = speakers().await;
    let both = Some(vpn::Rpc { msg_id: 4, response_to: 4 });
    let with_both = |msg| TunnelMessage { rpc: both, msg: Some(msg) };
    ours.0.notify(with_both(tunnel_message::Msg::PeerUpdate(vpn::PeerUpdate::default()))).await.unwrap();
    let notification = theirs.1.recv().await.unwrap();
    assert_eq!((notification.kind, notification.message.rpc), (Kind::Notification, None));

    let asking = theirs.0.clone();
    let wake = ManagerMessage { rpc: both, msg: Some(manager_message::Msg::Wake(vpn::WakeRequest {})) };
    let call = tokio::spawn(async move { asking.request(wake, SOON).await });
    let request = ours.1.recv().await.unwrap();
    let Kind::Request(id) = request.kind else { panic!("{request:?}") };
    assert_ne!(id, 0);
    assert_eq!(request.message.rpc, Some(vpn::Rpc { msg_id: id, response_to: 0 }));
    ours.0.respond(id, with_both(tunnel_message::Msg::Wake(vpn::WakeResponse {}))).await.unwrap();
    assert_eq!(call.await.unwrap().unwrap().rpc, Some(vpn::Rpc { msg_id: 0, response_to: id }));
}

/// Conforms: vpn:16.2.4
#[tokio::test]
async fn no_way_of_sending_lets_an_empty_or_too_long_message_through() {
    let (speaker, _inbox, mut peer) = raw_peer().await;
    let too_long = || log(&"x".repeat(MAX_FRAME));
    for message in [TunnelMessage::default, too_long] {
        assert!(matches!(speaker.notify(message()).await, Err(SendError::Unsendable(_))));
        assert!(matches!(speaker.respond(1, message()).await, Err(SendError::Unsendable(_))));
        assert!(matches!(speaker.request(message(), SOON).await, Err(CallError::Unsendable(_))));
        assert!(speaker.close_with(1, message(), SOON).await.is_err());
    }
    assert!(speaker.close(SOON).await);
    assert_eq!(peer.read(&mut [0]).await.unwrap(), 0, "something was sent");
}

/// Conforms: vpn:W4
#[tokio::test]
async fn an_empty_frame_is_put_up_with_by_tunnels_and_ends_the_connection_of_a_manager() {
    let (_speaker, mut inbox, mut peer) = raw_peer().await;
    peer.write_all(&[0; 4]).await.unwrap();
    assert_eq!(inbox.recv().await.unwrap().kind, Kind::Notification);

    let (speaker, _inbox, mut peer) = raw_tunnel().await;
    peer.write_all(&[0; 4]).await.unwrap();
    assert_eq!(speaker.closed().await, End::Protocol(FrameError::Empty));
}

/// Conforms: vpn:W10
#[tokio::test]
async fn a_send_that_cannot_be_written_fails_with_what_the_system_said() {
    let (line, mut ours) = duplex(64);
    ours.write_all(THEIR_LINE).await.unwrap();
    let (speaker, _inbox) = tunnel(line, FailsAfter(1), SOON).await.unwrap();
    let broken = End::Broken { action: "write", error: "cats".to_owned() };
    assert_eq!(speaker.request(settings(), SOON).await, Err(CallError::Ended(broken.clone())));
    assert_eq!(speaker.notify(log("late")).await, Err(SendError::Ended(broken)));
}

/// Conforms: vpn:W11
#[tokio::test]
async fn a_read_error_ends_the_connection_once_and_says_why() {
    let (mut line, rest) = duplex(64);
    line.write_all(THEIR_LINE).await.unwrap();
    line.shutdown().await.unwrap();
    let (speaker, mut inbox) = tunnel(rest.chain(Broken), tokio::io::sink(), SOON).await.unwrap();
    assert!(timeout(SOON, inbox.recv()).await.unwrap().is_none());
    let end = timeout(SOON, speaker.closed()).await.unwrap();
    assert_eq!(end, End::Broken { action: "read", error: "cats".to_owned() });
    assert!(inbox.recv().await.is_none());
    assert_eq!(speaker.end(), Some(end));
}

/// Conforms: vpn:W12 vpn:W13
#[tokio::test(start_paused = true)]
async fn closing_while_the_peer_is_silent_is_quick_and_fails_what_waits() {
    let (speaker, _inbox, _peer) = raw_peer().await;
    let asking = speaker.clone();
    let pending = tokio::spawn(async move { asking.request(settings(), Duration::from_secs(3600)).await });
    while lock(&speaker.connection.calls).as_ref().is_some_and(Correlator::is_empty) {
        tokio::task::yield_now().await;
    }
    let begun = tokio::time::Instant::now();
    assert!(speaker.close(SOON).await);
    assert_eq!(pending.await.unwrap(), Err(CallError::Ended(End::Closed)));
    assert!(begun.elapsed() < SOON);
}

#[tokio::test]
async fn notifications_have_no_rpc_whatever_they_came_with() {
    let (speaker, _inbox, mut peer) = raw_peer().await;
    let mut update = message(tunnel_message::Msg::PeerUpdate(vpn::PeerUpdate::default()));
    update.rpc = Some(vpn::Rpc { msg_id: 4, response_to: 4 });
    speaker.notify(update).await.unwrap();
    assert_eq!(take(&mut peer, 6).await, [0, 0, 0, 2, 0x1a, 0x00]);
}

/// Conforms: vpn:15.9
#[tokio::test]
async fn a_message_without_a_body_is_never_sent() {
    let (speaker, _inbox, _peer) = raw_peer().await;
    let bare = speaker.respond(5, TunnelMessage::default()).await;
    assert_eq!(bare, Err(SendError::Unsendable(FrameError::Empty)));
}

/// Conforms: vpn:S9
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

/// Conforms: vpn:S10 vpn:15.6
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

/// Conforms: vpn:15.5
#[tokio::test]
async fn a_response_passes_requests_that_nobody_handles() {
    let (speaker, _unread, mut peer) = raw_peer().await;
    let call = tokio::spawn(async move { speaker.request(settings(), SOON).await });
    let frame = take_frame(&mut peer).await;
    assert!(!frame.is_empty());
    for id in 1..(INBOX + OVERFLOW) as u64 {
        peer.write_all(&wake(id)).await.unwrap();
    }
    peer.write_all(&[0, 0, 0, 8, 0x0a, 0x02, 0x10, 0x01, 0x1a, 0x02, 0x08, 0x01]).await.unwrap();
    let answer = call.await.unwrap().unwrap();
    assert!(matches!(answer.msg, Some(manager_message::Msg::NetworkSettings(it)) if it.success));
}

#[tokio::test]
async fn what_was_said_before_a_response_is_there_when_the_response_is() {
    let (speaker, mut inbox, mut peer) = raw_peer().await;
    let call = tokio::spawn(async move { speaker.request(settings(), SOON).await });
    take_frame(&mut peer).await;
    let answer = [0, 0, 0, 8, 0x0a, 0x02, 0x10, 0x01, 0x1a, 0x02, 0x08, 0x01];
    let said = [wake(1), wake(2), answer.to_vec(), wake(3)].concat();
    peer.write_all(&said).await.unwrap();
    call.await.unwrap().unwrap();
    assert_eq!(inbox.messages.try_recv().unwrap().kind, Kind::Request(1));
    assert_eq!(inbox.messages.try_recv().unwrap().kind, Kind::Request(2));
    assert_eq!(inbox.recv().await.unwrap().kind, Kind::Request(3));
}

/// Conforms: vpn:15.31
#[tokio::test]
async fn an_end_and_a_bad_frame_show_behind_requests_that_nobody_handles() {
    for bad in [Some([0xff; 4]), None] {
        let (speaker, _unread, mut peer) = raw_peer().await;
        let asking = speaker.clone();
        let call = tokio::spawn(async move { asking.request(settings(), Duration::from_secs(3600)).await });
        take_frame(&mut peer).await;
        for id in 1..=400 {
            peer.write_all(&wake(id)).await.unwrap();
        }
        let expected = match bad {
            Some(bad) => {
                peer.write_all(&bad).await.unwrap();
                End::Protocol(FrameError::TooLong { length: u32::MAX as usize, limit: 1 << 20 })
            }
            None => {
                peer.shutdown().await.unwrap();
                End::Eof
            }
        };
        assert_eq!(call.await.unwrap(), Err(CallError::Ended(expected.clone())));
        assert_eq!(speaker.end(), Some(expected));
    }
}

#[tokio::test]
async fn a_frame_over_our_own_limit_is_refused_by_its_length_with_both_numbers() {
    let (speaker, _inbox, mut peer) = raw_peer().await;
    peer.write_all(&[0, 0x10, 0, 1]).await.unwrap();
    let end = speaker.closed().await.to_string();
    assert_eq!(end, "protocol error: a frame of 1048577 bytes exceeds the limit of 1048576");

    // What a tunnel says may be larger: all that the protocol allows.
    let (speaker, _inbox, mut peer) = raw_tunnel().await;
    peer.write_all(&[1, 0, 0, 1]).await.unwrap();
    let end = speaker.closed().await.to_string();
    assert_eq!(end, "protocol error: a frame of 16777217 bytes exceeds the limit of 16777216");
}

#[tokio::test]
async fn a_start_with_a_megabyte_of_headers_is_accepted() {
    let header = vpn::start_request::Header { name: "X-Gate".into(), value: "open sesame".into() };
    let start = start_with(vec![header; 40_000]);
    assert!(start.len() > 900_000 && start.len() < 1 << 20);
    let (_speaker, mut inbox, mut peer) = raw_peer().await;
    let writing = tokio::spawn(async move { peer.write_all(&start).await.map(|()| peer) });
    assert_eq!(inbox.recv().await.unwrap().kind, Kind::Request(1));
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_message_that_would_unpack_to_too_much_is_refused_as_it_is() {
    let (speaker, mut inbox, mut peer) = raw_tunnel().await;
    // Two bytes an agent.
    let mut update = vec![0x1a, 0x80, 0x89, 0x7a];
    update.extend([0x12, 0x00].repeat(1_000_000));
    let frame = [&u32::try_from(update.len()).unwrap().to_be_bytes(), update.as_slice()].concat();
    let writing = tokio::spawn(async move { peer.write_all(&frame).await });
    let end = speaker.closed().await;
    let End::Protocol(FrameError::TooHeavy { weight, limit }) = end else { panic!("{end}") };
    assert_eq!(limit, 64 << 20);
    assert!(weight > 1_000_000 * size_of::<vpn::Agent>());
    assert!(inbox.recv().await.is_none());
    let _ = writing.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_waits_is_bounded_in_bytes_too() {
    let (speaker, _unread, mut peer) = raw_peer().await;
    let mut accepted = 0;
    while peer.write_all(&heavy_start()).await.is_ok() {
        accepted += 1;
        assert!(accepted < 10, "the peer is never hung up on");
    }
    // Three find room, and one more has been read.
    assert!(accepted >= 4, "{accepted}");
    assert_eq!(speaker.closed().await, End::Overflow);
}

#[tokio::test]
async fn room_is_there_again_when_a_message_has_been_dealt_with() {
    let (speaker, mut inbox, mut peer) = raw_peer().await;
    let writing = tokio::spawn(async move {
        for _ in 0..12 {
            peer.write_all(&heavy_start()).await.unwrap();
        }
        peer
    });
    for _ in 0..12 {
        assert_eq!(inbox.recv().await.unwrap().kind, Kind::Request(1));
    }
    drop(writing.await.unwrap());
    assert_eq!(speaker.closed().await, End::Eof);
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

/// Conforms: vpn:S4 vpn:S11
#[tokio::test]
async fn the_end_of_the_peer_ends_our_request_stream() {
    let (mut ours, theirs) = speakers().await;
    assert!(theirs.0.close(SOON).await);
    assert!(ours.1.recv().await.is_none());
    assert_eq!(ours.0.closed().await, End::Eof);
    assert_eq!(theirs.0.closed().await, End::Closed);
}

/// Conforms: vpn:S12
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

/// Conforms: vpn:15.30
#[tokio::test(start_paused = true)]
async fn a_call_without_a_response_ends_at_its_deadline() {
    let (speaker, _inbox, _peer) = raw_peer().await;
    assert_eq!(speaker.request(settings(), SOON).await, Err(CallError::Deadline));
    assert!(lock(&speaker.connection.calls).as_ref().unwrap().is_empty());
}

/// Conforms: vpn:S13
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

/// Conforms: vpn:S14
#[tokio::test]
async fn a_call_after_the_end_fails_without_hanging() {
    let (speaker, _inbox, peer) = raw_peer().await;
    drop(peer);
    speaker.closed().await;
    let call = speaker.request(settings(), Duration::from_secs(3600)).await.unwrap_err();
    assert_eq!(call.to_string(), "unexpected EOF");
}

/// Conforms: vpn:D1 vpn:D2 vpn:D6 vpn:15.7
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
    assert_eq!(speaker.request(settings(), SOON).await, Err(CallError::Ended(End::Closed)));

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

/// Conforms: vpn:D5
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

/// Conforms: vpn:15.6
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_that_races_the_end_of_its_call_stops_nothing() {
    let (mut ours, theirs) = speakers().await;
    let answering = tokio::spawn(async move {
        while let Some(incoming) = ours.1.recv().await {
            let Kind::Request(id) = incoming.kind else { panic!("{incoming:?}") };
            ours.0.respond(id, message(tunnel_message::Msg::Wake(vpn::WakeResponse {}))).await.unwrap();
        }
    });
    for round in 0..500 {
        let wake = ManagerMessage { rpc: None, msg: Some(manager_message::Msg::Wake(vpn::WakeRequest {})) };
        let _ = theirs.0.request(wake, Duration::from_micros(round)).await;
    }
    let last = call(&theirs.0, manager_message::Msg::Wake(vpn::WakeRequest {})).await;
    assert!(last.is_ok(), "{last:?}");
    assert!(theirs.0.close(SOON).await);
    answering.await.unwrap();
}

/// Conforms: vpn:S15
#[test]
fn no_way_for_a_connection_to_end_leaves_a_task_behind() {
    use futures::FutureExt;

    let ways = [
        ("never begun", async { drop(duplex(1)) }.boxed_local()),
        ("refused", refused().boxed_local()),
        ("given up in the handshake", given_up().boxed_local()),
        ("closed", async { assert!(raw_peer().await.0.close(SOON).await) }.boxed_local()),
        ("closed by the peer", async { drop(raw_peer().await.2) }.boxed_local()),
        ("closed while nobody reads", closed_unread().boxed_local()),
        ("dropped", async { drop(raw_peer().await) }.boxed_local()),
        ("a bad frame", after_writing(vec![0xff; 4]).boxed_local()),
        ("too much", after_writing((1..5000).flat_map(wake).collect()).boxed_local()),
        ("a call cut off", call_cut_off().boxed_local()),
    ];
    for (way, scenario) in ways {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            scenario.await;
            let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
            let ending = async {
                while alive() > 0 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            assert!(timeout(Duration::from_secs(60), ending).await.is_ok(), "{way}: {} tasks", alive());
        });
    }
}

async fn refused() {
    let (ours, mut theirs) = duplex(64);
    theirs.write_all(b"ssh manager 1.1\n").await.unwrap();
    let (read, write) = split(ours);
    assert!(tunnel(read, write, SOON).await.is_err());
}

async fn given_up() {
    let (ours, _theirs) = duplex(64);
    let (read, write) = split(ours);
    assert!(tunnel(read, write, SOON).await.is_err());
}

async fn closed_unread() {
    let (speaker, _inbox, _peer) = raw_peer_with_room_for(1).await;
    speaker.notify(log("nobody reads this")).await.unwrap();
    assert!(!speaker.close(SOON).await);
}

async fn after_writing(bytes: Vec<u8>) {
    let (speaker, _unread, mut peer) = raw_peer().await;
    let _ = peer.write_all(&bytes).await;
    assert!(matches!(speaker.closed().await, End::Protocol(_) | End::Overflow));
}

async fn call_cut_off() {
    let (speaker, _inbox, mut peer) = raw_peer().await;
    let asking = speaker.clone();
    let call = tokio::spawn(async move { asking.request(settings(), SOON).await });
    take_frame(&mut peer).await;
    drop(peer);
    assert_eq!(call.await.unwrap(), Err(CallError::Ended(End::Eof)));
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

/// Fails with an error that no system has.
struct Broken;

fn cats() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, "cats")
}

impl AsyncRead for Broken {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Ready(Err(cats()))
    }
}

impl AsyncWrite for Broken {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(cats()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Lets so many writes through.
struct FailsAfter(usize);

impl AsyncWrite for FailsAfter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.0 == 0 {
            return Pin::new(&mut Broken).poll_write(context, bytes);
        }
        self.0 -= 1;
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

/// A manager's end that has shaken hands, and the bare other end.
async fn raw_tunnel() -> (Speaker<ManagerMessage, TunnelMessage>, Inbox<TunnelMessage>, DuplexStream) {
    let (ours, mut theirs) = duplex(1024);
    theirs.write_all(OUR_LINE).await.unwrap();
    let (speaker, inbox) = manager_on(ours).await;
    assert_eq!(take(&mut theirs, THEIR_LINE.len()).await, THEIR_LINE);
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

fn start_with(headers: Vec<vpn::start_request::Header>) -> Vec<u8> {
    let start = manager_message::Msg::Start(vpn::StartRequest { headers, ..Default::default() });
    encode(&ManagerMessage { rpc: Some(vpn::Rpc::request(1)), msg: Some(start) }).unwrap().to_vec()
}

/// A hundred kilobytes that unpack to a hundred times that.
fn heavy_start() -> Vec<u8> {
    start_with(vec![vpn::start_request::Header::default(); 50_000])
}
