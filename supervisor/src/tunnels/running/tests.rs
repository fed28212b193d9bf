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
