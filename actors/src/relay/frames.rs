//! The reading side of a relay connection: a buffer that is filled by large reads, and the frames in it,
//! where they stand (tailnet-data 3.1).

use std::{ops::Range, time::Duration};

use warren_observability::redact::one_line;
use warren_proto::{
    derp::{DerpError, Frame, HEADER, Header, MAX_PACKET, ServerInfo},
    key::{BoxShared, KEY_LEN, NodePublic},
};

/// Holds the longest packet's frame and, beside it, one more read of the usual size.
const BUFFER: usize = 128 * 1024;
/// A key and the longest packet. No longer frame means anything to us; such are skipped as they come.
const MAX_KEPT: usize = KEY_LEN + MAX_PACKET;

const _: () = assert!(HEADER + MAX_KEPT + 60 * 1024 <= BUFFER);

/// What comes from a relay; ranges are of [`Frames::bytes`], until the next [`Frames::space`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Incoming {
    /// A packet of a peer.
    Packet(Packet),
    /// The relay's key.
    ServerKey(NodePublic),
    /// What the relay says of itself, sealed.
    ServerInfo(Range<usize>),
    /// To be answered with the same bytes.
    Ping([u8; 8]),
    /// A peer is not reachable through this relay.
    PeerGone(NodePublic),
    /// A problem of the relay, or of ours as it sees it; empty when it is over.
    Health(Range<usize>),
    /// The relay goes away and wants to see us again after a pause.
    Restarting(Duration),
    /// Signs of life, and whatever else there may be.
    Other,
}

/// Where a packet stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packet {
    start: usize,
    end: usize,
}

impl Packet {
    /// Whom it is from, and what it is.
    pub(crate) fn of<'a>(&self, bytes: &'a [u8]) -> Option<(&'a [u8; 32], &'a [u8])> {
        bytes.get(self.start..self.end)?.split_first_chunk()
    }
}

/// The buffer of one connection.
#[derive(Debug)]
pub(crate) struct Frames {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes of a frame that is not kept.
    skip: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self { buffer: vec![0; BUFFER], start: 0, end: 0, skip: 0 }
    }
}

impl Frames {
    /// The next whole frame, if it is there.
    pub(crate) fn next(&mut self) -> Result<Option<Incoming>, DerpError> {
        loop {
            let skipped = self.skip.min(self.end - self.start);
            self.start += skipped;
            self.skip -= skipped;
            let arrived = self.buffer.get(self.start..self.end).unwrap_or_default();
            let Some(header) = Header::read(arrived)? else { return Ok(None) };
            let length = HEADER + header.length;
            if header.length > MAX_KEPT {
                self.skip = length;
                continue;
            }
            let Some(body) = arrived.get(HEADER..length) else { return Ok(None) };
            let range = self.start + HEADER..self.start + length;
            self.start += length;
            return read(&header, body, range).map(Some);
        }
    }

    /// What the ranges of frames refer to.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// A text, at most a line of it.
    pub(crate) fn text(&self, range: Range<usize>) -> String {
        const SHOWN: usize = 200;
        one_line(&String::from_utf8_lossy(self.buffer.get(range).unwrap_or_default()), SHOWN)
    }

    /// Room for a read; never empty once [`Self::next`] has returned nothing. Ends the life of ranges.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }

    /// So many bytes were read into [`Self::space`].
    pub(crate) fn advance(&mut self, read: usize) {
        self.end = (self.end + read).min(self.buffer.len());
    }

    /// What the relay says of itself; refuses one that does not hold the key it showed.
    pub(crate) fn open_server_info(
        &self,
        sealed: Range<usize>,
        shared: &BoxShared,
    ) -> Result<ServerInfo, DerpError> {
        ServerInfo::open(self.buffer.get(sealed).unwrap_or_default(), shared)
    }
}

/// What a frame is to a client; `range` is where its body stands.
fn read(header: &Header, body: &[u8], range: Range<usize>) -> Result<Incoming, DerpError> {
    Ok(match Frame::read(header, body) {
        Ok(Frame::RecvPacket(..)) => Incoming::Packet(Packet { start: range.start, end: range.end }),
        Ok(Frame::ServerKey(key)) => Incoming::ServerKey(key),
        Ok(Frame::ServerInfo(_)) => Incoming::ServerInfo(range),
        Ok(Frame::Ping(data)) => Incoming::Ping(data),
        Ok(Frame::PeerGone(peer, _)) => Incoming::PeerGone(peer),
        Ok(Frame::Health(_)) => Incoming::Health(range),
        Ok(Frame::Restarting { reconnect_in, .. }) => Incoming::Restarting(reconnect_in),
        // What only others are sent; and known frames that are too short count as unknown ones.
        Ok(
            Frame::KeepAlive
            | Frame::Pong(_)
            | Frame::PeerPresent(_)
            | Frame::ClientInfo(..)
            | Frame::SendPacket(..)
            | Frame::NotePreferred(_)
            | Frame::ForwardPacket(..)
            | Frame::WatchConnections
            | Frame::ClosePeer(_)
            | Frame::Unknown,
        )
        | Err(DerpError::Size(..)) => Incoming::Other,
        Err(error) => return Err(error),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use warren_proto::key::{NodePrivate, random};

    use super::*;

    #[test]
    fn frames_are_read_in_whatever_pieces_they_come() {
        let stream = [
            frame(0x06, &[]),
            frame(0x05, &[[9; 32].as_slice(), b"packet"].concat()),
            frame(0x12, &[1, 2, 3, 4, 5, 6, 7, 8, 9]),
            frame(0x08, &[[8; 32].as_slice(), &[1]].concat()),
            frame(0x14, "too slow\n".as_bytes()),
            frame(0x15, &[0, 0, 3, 232, 0, 0, 0, 0]),
        ]
        .concat();
        for step in [1, 7, 64, stream.len()] {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            for piece in stream.chunks(step) {
                fill(&mut frames, piece);
                while let Some(frame) = frames.next().unwrap() {
                    if let Incoming::Packet(packet) = &frame {
                        assert_eq!(packet.of(frames.bytes()), Some((&[9; 32], b"packet".as_slice())));
                    }
                    if let Incoming::Health(range) = &frame {
                        assert_eq!(frames.text(range.clone()), "too slow ");
                    }
                    seen.push(frame);
                }
            }
            assert!(matches!(
                seen.as_slice(),
                [
                    Incoming::Other,
                    Incoming::Packet(_),
                    Incoming::Ping([1, 2, 3, 4, 5, 6, 7, 8]),
                    Incoming::PeerGone(NodePublic([8, ..])),
                    Incoming::Health(_),
                    Incoming::Restarting(pause),
                ] if *pause == Duration::from_secs(1)
            ));
        }
    }

    #[test]
    fn a_frame_that_is_longer_than_any_packet_is_skipped_and_one_above_the_limit_is_fatal() {
        let mut frames = Frames::default();
        let long = [frame(0x33, &vec![0; 300_000]), frame(0x12, &[7; 8])].concat();
        let mut seen = Vec::new();
        for piece in long.chunks(50_000) {
            fill(&mut frames, piece);
            seen.extend(frames.next().unwrap());
        }
        assert_eq!(seen, [Incoming::Ping([7; 8])]);
        fill(&mut frames, &[0x33, 0, 16, 0, 1]);
        assert_eq!(frames.next(), Err(DerpError::TooLong((1 << 20) + 1)));
    }

    #[test]
    fn known_frames_that_are_too_short_are_ignored() {
        let mut frames = Frames::default();
        for kind in [0x05, 0x08, 0x12, 0x15] {
            fill(&mut frames, &frame(kind, &[1, 2, 3]));
            assert_eq!(frames.next(), Ok(Some(Incoming::Other)), "{kind}");
        }
    }

    #[test]
    fn a_server_key_without_the_magic_is_refused_and_one_with_extra_bytes_taken() {
        let mut frames = Frames::default();
        fill(&mut frames, &frame(0x01, &[b"DERP\xf0\x9f\x94\x91".as_slice(), &[5; 32], &[1, 2, 3]].concat()));
        assert_eq!(frames.next(), Ok(Some(Incoming::ServerKey(NodePublic([5; 32])))));
        fill(&mut frames, &frame(0x01, &[0; 40]));
        assert_eq!(frames.next(), Err(DerpError::Greeting));
    }

    #[test]
    fn a_client_opens_what_its_relay_sealed_and_nothing_else() {
        let (node, server) = (NodePrivate::generate(), NodePrivate::generate());
        let shared = node.shared(&server.public());
        let mut frames = Frames::default();
        let sealed = server.shared(&node.public()).seal_with_nonce(&random(), b"{\"version\":2}");
        fill(&mut frames, &frame(0x03, &sealed));
        let Ok(Some(Incoming::ServerInfo(range))) = frames.next() else { panic!("no server info") };
        assert_eq!(frames.open_server_info(range.clone(), &shared).map(|info| info.version), Ok(2));
        let other = node.shared(&NodePrivate::generate().public());
        assert_eq!(frames.open_server_info(range, &other), Err(DerpError::Login));
    }

    proptest! {
        #[test]
        fn any_stream_is_read_or_refused(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..50)) {
            let mut frames = Frames::default();
            for piece in pieces {
                fill(&mut frames, &piece);
                while let Ok(Some(_)) = frames.next() {}
                prop_assert!(!frames.space().is_empty());
            }
        }
    }

    fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        [[kind].as_slice(), &length, body].concat()
    }

    fn fill(frames: &mut Frames, bytes: &[u8]) {
        frames.space()[..bytes.len()].copy_from_slice(bytes);
        frames.advance(bytes.len());
    }
}
