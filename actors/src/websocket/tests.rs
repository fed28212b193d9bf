use futures::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

mod vectors;

const LIMITS: Limits =
    Limits { idle: Duration::from_secs(45), largest_received: 4 * 1024 * 1024, largest_sent: 64 * 1024 };

type Peer = WebSocketStream<DuplexStream>;

#[tokio::test]
async fn messages_are_one_byte_stream_and_empty_ones_do_not_end_it() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    for payload in [&b"he"[..], b"", b"llo"] {
        server.send(Message::Binary(Bytes::from_static(payload))).await.unwrap();
    }
    let mut read = [0; 5];
    stream.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"hello");
}

#[tokio::test]
async fn a_message_larger_than_the_readers_buffer_is_read_in_parts() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    let sent: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let payload = Bytes::from(sent.clone());
    let sending = tokio::spawn(async move {
        server.send(Message::Binary(payload)).await.unwrap();
        server
    });
    let mut read = vec![0; sent.len()];
    stream.read_exact(&mut read).await.unwrap();
    assert!(read == sent);
    drop(sending.await.unwrap());
}

#[tokio::test]
async fn what_is_written_arrives_whole_in_binary_messages_of_limited_size() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    let sent = vec![7; 300_000];
    let expected = sent.len();
    let receiving = tokio::spawn(async move {
        let mut received = 0;
        while received < expected {
            let Message::Binary(payload) = server.next().await.unwrap().unwrap() else {
                panic!("not binary")
            };
            assert!(payload.len() <= LIMITS.largest_sent);
            received += payload.len();
        }
        received
    });
    stream.write_all(&sent).await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(receiving.await.unwrap(), expected);
}

#[tokio::test]
async fn pings_are_answered_while_reading_though_there_is_no_data() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    tokio::spawn(async move { stream.read_u8().await });
    server.send(Message::Ping(Bytes::from_static(b"1"))).await.unwrap();
    assert_eq!(server.next().await.unwrap().unwrap(), Message::Pong(Bytes::from_static(b"1")));
}

#[tokio::test]
async fn text_is_an_error() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    server.send(Message::text("hello")).await.unwrap();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.to_string(), "the server sent a text message");
}

#[tokio::test]
async fn normal_closure_and_going_away_end_the_stream_in_order() {
    for code in [CloseCode::Normal, CloseCode::Away] {
        let (mut stream, _handle, mut server) = pair(LIMITS).await;
        server.send(Message::Close(Some(CloseFrame { code, reason: "".into() }))).await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn any_other_close_code_is_an_error_with_its_reason() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    let frame = CloseFrame { code: CloseCode::Error, reason: "no\u{7} pong".into() };
    server.send(Message::Close(Some(frame))).await.unwrap();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.to_string(), "the server closed the connection with code 1011: no  pong");
}

#[tokio::test]
async fn a_message_beyond_the_limit_is_an_error() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    let sending = tokio::spawn(async move {
        let _ = server.send(Message::Binary(vec![0; LIMITS.largest_received + 1].into())).await;
    });
    let error = stream.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
    drop(stream);
    drop(_handle);
    sending.await.unwrap();
}

/// tailnet-control, appendix D 5.
#[tokio::test(start_paused = true)]
async fn a_silent_server_is_noticed_but_one_that_only_pings_is_not() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    let pinging = tokio::spawn(async move {
        for _ in 0..10 {
            sleep(Duration::from_secs(15)).await;
            server.send(Message::Ping(Bytes::new())).await.unwrap();
            server.next().await;
        }
        server
    });
    let begun = Instant::now();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(error.to_string(), "the server has been silent for 45 seconds");
    assert_eq!(begun.elapsed().as_secs(), 195);
    drop(pinging.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_sends_and_does_not_read_is_given_up_and_little_of_it_is_taken() {
    let (stream, _handle, server) = pair(LIMITS).await;
    let (mut to_us, _unread) = server.split();
    let flood = tokio::spawn(async move {
        let message = || Message::Binary(vec![0; 1000].into());
        while to_us.send(message()).await.is_ok() {}
    });
    let (mut read, mut write) = tokio::io::split(stream);
    let writing = tokio::spawn(async move {
        loop {
            if let Err(error) = async {
                write.write_all(&[0; 1000]).await?;
                write.flush().await
            }
            .await
            {
                return error;
            }
        }
    });
    let (begun, mut heard, mut buffer) = (Instant::now(), 0, vec![0; 16 * 1024]);
    let error = loop {
        match read.read(&mut buffer).await {
            Ok(count) => heard += count,
            Err(error) => break error,
        }
    };
    assert_eq!(error.to_string(), "the server has taken nothing for 10 seconds");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!((10..45).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert!((100_000..2 * MAX_UNANSWERED).contains(&heard), "{heard}");
    let failed = writing.await.unwrap();
    assert!(!failed.to_string().is_empty());
    drop(read);
    flood.abort();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_reads_slowly_is_waited_for() {
    let (mut stream, _handle, mut server) = pair(LIMITS).await;
    let sent = 400_000;
    let writing = tokio::spawn(async move {
        stream.write_all(&vec![7; sent]).await?;
        stream.flush().await
    });
    let mut received = 0;
    while received < sent {
        sleep(Duration::from_secs(9)).await;
        let Message::Binary(payload) = server.next().await.unwrap().unwrap() else { panic!("not binary") };
        received += payload.len();
    }
    writing.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_probe_tells_a_living_server_from_a_dead_one() {
    let (mut stream, handle, mut server) = pair(LIMITS).await;
    tokio::spawn(async move { stream.read_u8().await });
    let answering = tokio::spawn(async move {
        assert!(matches!(server.next().await.unwrap().unwrap(), Message::Ping(_)));
        server.flush().await.unwrap();
        server
    });
    assert!(handle.is_alive(Duration::from_secs(3)).await);
    let _silent = answering.await.unwrap();
    assert!(!handle.is_alive(Duration::from_secs(3)).await);
}

#[tokio::test]
async fn closing_says_normal_closure_without_a_reason_and_waits_for_the_echo() {
    let (stream, handle, mut server) = pair(LIMITS).await;
    drop(stream);
    let echoing = tokio::spawn(async move {
        let message = server.next().await.unwrap().unwrap();
        let _ = server.flush().await;
        message
    });
    handle.close(Duration::from_secs(20)).await;
    let expected = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    assert_eq!(echoing.await.unwrap(), Message::Close(Some(expected)));
}

#[test]
fn the_accept_key_is_that_of_the_standard() {
    assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
}

#[test]
fn a_handshake_is_accepted_only_as_it_should_be() {
    let good = || {
        let mut headers = request_headers("k", None);
        headers.insert(header::CONNECTION, HeaderValue::from_static("keep-alive, UPGRADE"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept_key("k").parse().unwrap());
        headers
    };
    assert!(check_response(&good(), "k", None).is_ok());
    for (name, value) in [
        (header::CONNECTION, "close"),
        (header::UPGRADE, "DERP"),
        (header::SEC_WEBSOCKET_ACCEPT, "x"),
        (header::SEC_WEBSOCKET_PROTOCOL, "derp"),
        (header::SEC_WEBSOCKET_EXTENSIONS, "permessage-deflate"),
    ] {
        let mut headers = good();
        headers.insert(&name, HeaderValue::from_static(value));
        let error = check_response(&headers, "k", None).unwrap_err().to_string();
        assert!(error.contains("handshake") && error.contains("proxy"), "{error}");
    }
}

#[test]
fn each_request_has_a_key_of_16_bytes_and_version_13_and_nothing_that_is_not_needed() {
    let headers = request_headers("k", None);
    assert_eq!(headers.len(), 4);
    assert_eq!(headers[header::SEC_WEBSOCKET_VERSION], "13");
}

async fn pair(limits: Limits) -> (ByteStream<DuplexStream>, Handle<DuplexStream>, Peer) {
    let (ours, theirs) = duplex(64 * 1024);
    let (stream, handle) = byte_stream(ours, limits).await;
    (stream, handle, WebSocketStream::from_raw_socket(theirs, Role::Server, None).await)
}
