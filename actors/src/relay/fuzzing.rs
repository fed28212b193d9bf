//! How fuzz targets reach the reading side of a relay connection.

use warren_proto::derp::DerpError;

use super::frames::{Frames, Incoming};

/// A frame as a link takes it: what it is, and the bytes that count.
pub type Taken = (&'static str, Vec<u8>);

/// Reads a stream in pieces of the lengths that `piece` gives, and returns the frames and what ended it.
pub fn frames(mut stream: &[u8], mut piece: impl FnMut() -> usize) -> (Vec<Taken>, Option<DerpError>) {
    let (mut frames, mut taken) = (Frames::default(), Vec::new());
    while !stream.is_empty() {
        let space = frames.space();
        assert!(!space.is_empty(), "no room for what comes");
        let length = piece().clamp(1, space.len()).min(stream.len());
        let (now, later) = stream.split_at(length);
        space.iter_mut().zip(now).for_each(|(space, byte)| *space = *byte);
        frames.advance(length);
        stream = later;
        loop {
            match frames.next() {
                Ok(Some(frame)) => taken.push(form(&frames, frame)),
                Ok(None) => break,
                Err(error) => return (taken, Some(error)),
            }
        }
    }
    (taken, None)
}

fn form(frames: &Frames, frame: Incoming) -> Taken {
    match frame {
        Incoming::Packet(packet) => {
            let (source, content) = packet.of(frames.bytes()).unwrap_or((&[0; 32], &[]));
            ("packet", [source.as_slice(), content].concat())
        }
        Incoming::ServerKey(key) => ("server key", key.0.to_vec()),
        Incoming::ServerInfo(range) => ("server info", bytes(frames, range)),
        Incoming::Ping(data) => ("ping", data.to_vec()),
        Incoming::PeerGone(peer) => ("peer gone", peer.0.to_vec()),
        Incoming::Health(range) => ("health", frames.text(range).into_bytes()),
        Incoming::Restarting(pause) => ("restarting", pause.as_millis().to_be_bytes().to_vec()),
        Incoming::Other => ("other", Vec::new()),
    }
}

fn bytes(frames: &Frames, range: std::ops::Range<usize>) -> Vec<u8> {
    frames.bytes().get(range).unwrap_or_default().to_vec()
}
