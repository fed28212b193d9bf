//! What a relay sends: frames by themselves, as a link reads them out of a stream, and the login.
#![no_main]

use std::sync::LazyLock;

use warren_actors::relay::fuzzing::{Taken, frames};
use warren_fuzz::{Input, lengths};
use warren_proto::{
    derp::{
        ClientInfo, DerpError, Frame, HEADER, Header, MAX_BODY, MAX_PACKET, PACKET_HEADER, ServerInfo,
        send_header,
    },
    key::{BoxShared, KEY_LEN, NodePrivate, NodePublic},
};

warren_fuzz::target!(check);

static SHARED: LazyLock<BoxShared> =
    LazyLock::new(|| NodePrivate::from_bytes([1; 32]).shared(&NodePrivate::from_bytes([2; 32]).public()));

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    let seed = input.byte();
    if seed & 0x80 == 0 { stream(seed, input.rest()) } else { login(input.rest()) }
}

fn stream(seed: u8, stream: &[u8]) {
    let whole = frames(stream, || usize::MAX);
    assert_eq!(frames(stream, lengths(seed)), whole, "a stream means the same however it is cut");
    assert_eq!(walk(stream), whole, "a link reads what there is");
}

/// The same, told frame by frame.
fn walk(mut stream: &[u8]) -> (Vec<Taken>, Option<DerpError>) {
    let mut taken = Vec::new();
    loop {
        let header = match Header::read(stream) {
            Ok(Some(header)) => header,
            Ok(None) => return (taken, None),
            Err(error) => return (taken, Some(error)),
        };
        let rest = &stream[HEADER..];
        if header.length > MAX_PACKET + KEY_LEN {
            // Skipped as it comes, whatever it is.
            stream = rest.get(header.length..).unwrap_or_default();
            continue;
        }
        let Some(body) = rest.get(..header.length) else { return (taken, None) };
        let frame = Frame::read(&header, body);
        if let Ok(frame) = &frame {
            written_again(frame, body.len());
        }
        match form(frame) {
            Ok(form) => taken.push(form),
            Err(error) => return (taken, Some(error)),
        }
        stream = &rest[header.length..];
    }
}

fn written_again(frame: &Frame<'_>, length: usize) {
    assert!(length <= MAX_BODY);
    let written = frame.encode();
    if *frame == Frame::Unknown {
        return assert!(written.is_empty());
    }
    let header = Header::read(&written).expect("a header of ours").expect("a whole one");
    assert_eq!(header.length, written.len() - HEADER);
    assert_eq!(Frame::read(&header, &written[HEADER..]), Ok(*frame));
    if let Frame::SendPacket(to, packet) = frame {
        assert_eq!(written[..PACKET_HEADER], send_header(to, packet.len()));
    }
}

fn form(frame: Result<Frame<'_>, DerpError>) -> Result<Taken, DerpError> {
    Ok(match frame {
        Ok(Frame::RecvPacket(NodePublic(source), packet)) => ("packet", [source.as_slice(), packet].concat()),
        Ok(Frame::ServerKey(key)) => ("server key", key.0.to_vec()),
        Ok(Frame::ServerInfo(sealed)) => ("server info", sealed.to_vec()),
        Ok(Frame::Ping(data)) => ("ping", data.to_vec()),
        Ok(Frame::PeerGone(peer, _)) => ("peer gone", peer.0.to_vec()),
        Ok(Frame::Health(text)) => {
            let text = String::from_utf8_lossy(text);
            let line = text.chars().take(200).map(|c| if c.is_control() { ' ' } else { c });
            ("health", line.collect::<String>().into_bytes())
        }
        Ok(Frame::Restarting { reconnect_in, .. }) => {
            ("restarting", reconnect_in.as_millis().to_be_bytes().to_vec())
        }
        Ok(_) | Err(DerpError::Size(..)) => ("other", Vec::new()),
        Err(error) => return Err(error),
    })
}

/// What an end that holds its key may have sealed.
fn login(plaintext: &[u8]) {
    let sealed = SHARED.seal_with_nonce(&[3; 24], plaintext);
    if let Ok(info) = ServerInfo::open(&sealed, &SHARED) {
        assert_eq!(ServerInfo::open(&info.seal(&SHARED, &[4; 24]), &SHARED), Ok(info));
    }
    if let Ok(info) = ClientInfo::open(&sealed, &SHARED) {
        assert_eq!(ClientInfo::open(&info.seal(&SHARED, &[4; 24]), &SHARED), Ok(info));
    }
    for length in [sealed.len() - 1, 39, 0] {
        assert_eq!(ServerInfo::open(&sealed[..length.min(sealed.len() - 1)], &SHARED), Err(DerpError::Login));
    }
}
