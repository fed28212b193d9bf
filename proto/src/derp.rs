//! DERP, the language of relays: frames and the login (tailnet-data 3).
//!
//! ```text
//! frame = type u8, length u32 (big-endian), body
//! ```
//!
//! Bodies are read where they stand. A packet is sent behind [`send_header`], which can be put in front of it
//! where it stands, too.

use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::key::{BoxShared, KEY_LEN, NONCE_LEN, NodePublic, Nonce};

/// Bytes of a frame's type and length.
pub const HEADER: usize = 5;
/// Bytes of the longest packet.
pub const MAX_PACKET: usize = 64 << 10;
/// Bytes of the longest body of any frame.
pub const MAX_BODY: usize = 1 << 20;
/// Bytes in front of a packet that is sent: type, length and key.
pub const PACKET_HEADER: usize = HEADER + KEY_LEN;
/// The version that both ends say they speak.
pub const VERSION: u32 = 2;

const MAGIC: &[u8; 8] = b"DERP\xf0\x9f\x94\x91";
/// Relays of the future may append to the first frame, up to here.
const MAX_SERVER_KEY: usize = 1024;
const MAX_CLIENT_INFO: usize = 256 << 10;
/// A key and a nonce: there is nothing sealed in less.
const MIN_CLIENT_INFO: usize = KEY_LEN + NONCE_LEN;
const DATA: usize = 8;

/// The types of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The relay's first.
    ServerKey = 0x01,
    /// The client's first.
    ClientInfo = 0x02,
    /// The relay's answer to it.
    ServerInfo = 0x03,
    /// A packet to a peer.
    SendPacket = 0x04,
    /// A packet of a peer.
    RecvPacket = 0x05,
    /// A sign of life.
    KeepAlive = 0x06,
    /// Whether the relay is the client's home.
    NotePreferred = 0x07,
    /// A peer is not here.
    PeerGone = 0x08,
    /// A peer is here; told to other relays.
    PeerPresent = 0x09,
    /// A packet between relays.
    ForwardPacket = 0x0a,
    /// Asks for [`Kind::PeerPresent`]; between relays.
    WatchConnections = 0x10,
    /// Closes a peer's connection; between relays.
    ClosePeer = 0x11,
    /// To be answered.
    Ping = 0x12,
    /// The answer.
    Pong = 0x13,
    /// A problem that the relay sees.
    Health = 0x14,
    /// The relay will go away.
    Restarting = 0x15,
}

impl Kind {
    const ALL: [Self; 16] = [
        Self::ServerKey,
        Self::ClientInfo,
        Self::ServerInfo,
        Self::SendPacket,
        Self::RecvPacket,
        Self::KeepAlive,
        Self::NotePreferred,
        Self::PeerGone,
        Self::PeerPresent,
        Self::ForwardPacket,
        Self::WatchConnections,
        Self::ClosePeer,
        Self::Ping,
        Self::Pong,
        Self::Health,
        Self::Restarting,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// What is wrong with what came. Which of these end a connection depends on the end: see each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DerpError {
    /// A body over the limit of its type. Always fatal: there is no telling where the next frame begins.
    #[error("a frame of {0} bytes is too long")]
    TooLong(usize),
    /// A body that has the wrong size for its type. Clients skip such a frame, relays hang up.
    #[error("a frame of type {0:?} cannot have {1} bytes")]
    Size(Kind, usize),
    /// The first frame is no relay's. Fatal during the login; nobody sends it later.
    #[error("the server is no relay")]
    Greeting,
    /// What one end says of itself was not sealed with its key, or is no information. Always fatal.
    #[error("the login does not open, or makes no sense")]
    Login,
}

/// What stands in front of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: Result<Kind, u8>,
    /// Bytes of the body.
    pub length: usize,
}

impl Header {
    /// The header at the front of `bytes`, if it has arrived; refuses a length before the body arrives.
    pub fn read(bytes: &[u8]) -> Result<Option<Self>, DerpError> {
        let Some([kind, length @ ..]) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
        let kind = Kind::from_byte(*kind).ok_or(*kind);
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let limit = match kind {
            Ok(Kind::ServerKey) => MAX_SERVER_KEY,
            Ok(Kind::ClientInfo) => MAX_CLIENT_INFO,
            _ => MAX_BODY,
        };
        if length > limit { Err(DerpError::TooLong(length)) } else { Ok(Some(Self { kind, length })) }
    }

    /// The type, if it is a known one.
    pub fn kind(&self) -> Option<Kind> {
        self.kind.ok()
    }
}

/// Why a peer is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// It was here until now.
    Disconnected,
    /// It is not here, and there was a path probe to it.
    NotHere,
    /// A reason not known here.
    Other(u8),
}

impl Gone {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Disconnected,
            1 => Self::NotHere,
            other => Self::Other(other),
        }
    }

    const fn byte(self) -> u8 {
        match self {
            Self::Disconnected => 0,
            Self::NotHere => 1,
            Self::Other(other) => other,
        }
    }
}

/// A whole frame; what is long stays where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The relay's key.
    ServerKey(NodePublic),
    /// Who the client is, and a [`ClientInfo`] sealed to the relay.
    ClientInfo(NodePublic, &'a [u8]),
    /// A [`ServerInfo`] sealed to the client.
    ServerInfo(&'a [u8]),
    /// A packet to this peer.
    SendPacket(NodePublic, &'a [u8]),
    /// A packet of this peer.
    RecvPacket(NodePublic, &'a [u8]),
    /// A sign of life.
    KeepAlive,
    /// Whether the relay is the client's home.
    NotePreferred(bool),
    /// This peer cannot be reached here.
    PeerGone(NodePublic, Gone),
    /// This peer is here.
    PeerPresent(NodePublic),
    /// A packet from the first to the second.
    ForwardPacket(NodePublic, NodePublic, &'a [u8]),
    /// Asks for every [`Frame::PeerPresent`].
    WatchConnections,
    /// Closes a peer's connection.
    ClosePeer(NodePublic),
    /// To be answered with the same bytes.
    Ping([u8; DATA]),
    /// The answer.
    Pong([u8; DATA]),
    /// A problem, as a text; empty when there is none any more.
    Health(&'a [u8]),
    /// The relay goes away.
    Restarting {
        /// When to dial it again.
        reconnect_in: Duration,
        /// How long to go on trying.
        try_for: Duration,
    },
    /// Of a type that is not known; to be skipped.
    Unknown,
}

impl<'a> Frame<'a> {
    /// What the body behind a header means. Bytes beyond what is known of a type are ignored.
    pub fn read(header: &Header, body: &'a [u8]) -> Result<Self, DerpError> {
        let Ok(kind) = header.kind else { return Ok(Self::Unknown) };
        if kind == Kind::ServerKey {
            let key = body.strip_prefix(MAGIC).and_then(<[u8]>::first_chunk).ok_or(DerpError::Greeting)?;
            return Ok(Self::ServerKey(NodePublic(*key)));
        }
        Self::read_body(kind, body).ok_or(DerpError::Size(kind, body.len()))
    }

    fn read_body(kind: Kind, body: &'a [u8]) -> Option<Self> {
        let frame = match kind {
            Kind::ServerKey => return None,
            Kind::ClientInfo if body.len() < MIN_CLIENT_INFO => return None,
            Kind::ClientInfo => split_key(body).map(|(key, sealed)| Self::ClientInfo(key, sealed))?,
            Kind::ServerInfo => Self::ServerInfo(body),
            Kind::SendPacket => split_packet(body).map(|(key, packet)| Self::SendPacket(key, packet))?,
            Kind::RecvPacket => split_packet(body).map(|(key, packet)| Self::RecvPacket(key, packet))?,
            Kind::KeepAlive => Self::KeepAlive,
            Kind::NotePreferred => match body {
                [is_home] => Self::NotePreferred(*is_home != 0),
                _ => return None,
            },
            Kind::PeerGone => {
                let (peer, rest) = split_key(body)?;
                Self::PeerGone(peer, Gone::from_byte(rest.first().copied().unwrap_or_default()))
            }
            Kind::PeerPresent => Self::PeerPresent(split_key(body)?.0),
            Kind::ForwardPacket => {
                let (from, rest) = split_key(body)?;
                let (to, packet) = split_packet(rest)?;
                Self::ForwardPacket(from, to, packet)
            }
            Kind::WatchConnections => Self::WatchConnections,
            Kind::ClosePeer => Self::ClosePeer(split_key(body)?.0),
            Kind::Ping => Self::Ping(*body.first_chunk()?),
            Kind::Pong => Self::Pong(*body.first_chunk()?),
            Kind::Health => Self::Health(body),
            Kind::Restarting => {
                let (reconnect_in, rest) = body.split_first_chunk()?;
                Self::Restarting {
                    reconnect_in: millis(*reconnect_in),
                    try_for: millis(*rest.first_chunk()?),
                }
            }
        };
        Some(frame)
    }

    /// The bytes of the frame; nothing for an unknown one.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::ServerKey(key) => encode(Kind::ServerKey, &[MAGIC, &key.0]),
            Self::ClientInfo(client, sealed) => encode(Kind::ClientInfo, &[&client.0, sealed]),
            Self::ServerInfo(sealed) => encode(Kind::ServerInfo, &[sealed]),
            Self::SendPacket(to, packet) => encode(Kind::SendPacket, &[&to.0, packet]),
            Self::RecvPacket(from, packet) => encode(Kind::RecvPacket, &[&from.0, packet]),
            Self::KeepAlive => encode(Kind::KeepAlive, &[]),
            Self::NotePreferred(is_home) => encode(Kind::NotePreferred, &[&[u8::from(*is_home)]]),
            Self::PeerGone(peer, reason) => encode(Kind::PeerGone, &[&peer.0, &[reason.byte()]]),
            Self::PeerPresent(peer) => encode(Kind::PeerPresent, &[&peer.0]),
            Self::ForwardPacket(from, to, packet) => encode(Kind::ForwardPacket, &[&from.0, &to.0, packet]),
            Self::WatchConnections => encode(Kind::WatchConnections, &[]),
            Self::ClosePeer(peer) => encode(Kind::ClosePeer, &[&peer.0]),
            Self::Ping(data) => encode(Kind::Ping, &[data]),
            Self::Pong(data) => encode(Kind::Pong, &[data]),
            Self::Health(problem) => encode(Kind::Health, &[problem]),
            Self::Restarting { reconnect_in, try_for } => {
                encode(Kind::Restarting, &[&as_millis(*reconnect_in), &as_millis(*try_for)])
            }
            Self::Unknown => Vec::new(),
        }
    }
}

/// What stands in front of a packet of so many bytes, at most [`MAX_PACKET`], to a peer.
pub fn send_header(to: &NodePublic, packet: usize) -> [u8; PACKET_HEADER] {
    let mut bytes = [0; PACKET_HEADER];
    let (front, key) = bytes.split_at_mut(HEADER);
    front.copy_from_slice(&header(Kind::SendPacket, KEY_LEN + packet));
    key.copy_from_slice(&to.0);
    bytes
}

/// What a client says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientInfo {
    /// The version it speaks; 0 if it does not say.
    #[serde(default)]
    pub version: u32,
    /// Whether it answers pings.
    #[serde(rename = "CanAckPings", alias = "canackpings", alias = "canAckPings", default)]
    pub can_answer_pings: bool,
}

/// What a relay says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerInfo {
    /// The version it speaks; 0 if it does not say.
    #[serde(default)]
    pub version: u32,
    /// How much of frames with packets it takes in a second; 0 if it does not mind.
    #[serde(rename = "TokenBucketBytesPerSecond", default, skip_serializing_if = "is_zero")]
    pub bytes_per_second: u64,
    /// How much of them it takes at once.
    #[serde(rename = "TokenBucketBytesBurst", default, skip_serializing_if = "is_zero")]
    pub burst: u64,
}

impl ClientInfo {
    /// What this program says of itself: exactly what relays expect to hear.
    pub const OURS: Self = Self { version: VERSION, can_answer_pings: true };

    /// The information, sealed to the relay.
    pub fn seal(&self, shared: &BoxShared, nonce: &Nonce) -> Vec<u8> {
        seal(self, shared, nonce)
    }

    /// Reads what a client sealed, which proves that it holds its key.
    pub fn open(sealed: &[u8], shared: &BoxShared) -> Result<Self, DerpError> {
        open(sealed, shared)
    }
}

impl ServerInfo {
    /// The information, sealed to the client.
    pub fn seal(&self, shared: &BoxShared, nonce: &Nonce) -> Vec<u8> {
        seal(self, shared, nonce)
    }

    /// Reads what a relay sealed, which proves that it holds the key it showed.
    pub fn open(sealed: &[u8], shared: &BoxShared) -> Result<Self, DerpError> {
        open(sealed, shared)
    }
}

#[expect(clippy::expect_used, reason = "numbers and flags always have a JSON form")]
fn seal(info: &impl Serialize, shared: &BoxShared, nonce: &Nonce) -> Vec<u8> {
    shared.seal_with_nonce(nonce, &serde_json::to_vec(info).expect("plain members"))
}

fn open<T: DeserializeOwned>(sealed: &[u8], shared: &BoxShared) -> Result<T, DerpError> {
    let info = shared.open_with_nonce(sealed).ok_or(DerpError::Login)?;
    // The parser would take a list for an object.
    let is_object = info.trim_ascii_start().starts_with(b"{");
    serde_json::from_slice(&info).ok().filter(|_| is_object).ok_or(DerpError::Login)
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn split_key(body: &[u8]) -> Option<(NodePublic, &[u8])> {
    body.split_first_chunk().map(|(key, rest)| (NodePublic(*key), rest))
}

fn split_packet(body: &[u8]) -> Option<(NodePublic, &[u8])> {
    split_key(body).filter(|(_, packet)| packet.len() <= MAX_PACKET)
}

fn header(kind: Kind, body: usize) -> [u8; HEADER] {
    let [a, b, c, d] = u32::try_from(body).unwrap_or(u32::MAX).to_be_bytes();
    [kind as u8, a, b, c, d]
}

fn encode(kind: Kind, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.iter().map(|part| part.len()).sum();
    let mut frame = Vec::with_capacity(HEADER + body);
    frame.extend(header(kind, body));
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    frame
}

fn millis(bytes: [u8; 4]) -> Duration {
    Duration::from_millis(u64::from(u32::from_be_bytes(bytes)))
}

fn as_millis(duration: Duration) -> [u8; 4] {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::key::NodePrivate;

    fn read(frame: &[u8]) -> Result<Frame<'_>, DerpError> {
        let header = Header::read(frame)?.unwrap();
        Frame::read(&header, &frame[HEADER..HEADER + header.length])
    }

    #[test]
    fn the_header_of_a_packet_is_what_a_whole_frame_begins_with() {
        let (to, packet) = (NodePublic([7; 32]), [9; 100]);
        let whole = Frame::SendPacket(to, &packet).encode();
        assert_eq!(whole, [send_header(&to, packet.len()).as_slice(), &packet].concat());
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_body_arrives() {
        assert_eq!(Header::read(&[0x05, 0, 0, 0]), Ok(None));
        assert!(Header::read(&[0x05, 0, 16, 0, 0]).is_ok());
        assert_eq!(Header::read(&[0x05, 0, 16, 0, 1]), Err(DerpError::TooLong(MAX_BODY + 1)));
        assert_eq!(Header::read(&[0x01, 0, 0, 4, 1]), Err(DerpError::TooLong(1025)));
        assert_eq!(Header::read(&[0x02, 0, 4, 0, 1]), Err(DerpError::TooLong((256 << 10) + 1)));
    }

    #[test]
    fn the_longest_packet_passes_and_one_byte_more_does_not() {
        let key = NodePublic([7; 32]);
        let mut packet = vec![0; MAX_PACKET];
        assert!(read(&Frame::RecvPacket(key, &packet).encode()).is_ok());
        packet.push(0);
        let error = DerpError::Size(Kind::RecvPacket, KEY_LEN + MAX_PACKET + 1);
        assert_eq!(read(&Frame::RecvPacket(key, &packet).encode()), Err(error));
    }

    #[test]
    fn information_that_is_no_object_is_refused() {
        let (client, server) = (NodePrivate::generate(), NodePrivate::generate());
        let shared = server.shared(&client.public());
        for text in ["", "[]", "[2]", "2", "null", "{", r#"{"version":-1}"#] {
            let sealed = shared.seal_with_nonce(&[1; 24], text.as_bytes());
            assert_eq!(ServerInfo::open(&sealed, &shared), Err(DerpError::Login), "{text}");
        }
    }

    #[test]
    fn information_sealed_by_another_is_refused() {
        let [client, server, other] = [1, 2, 3].map(|byte| NodePrivate::from_bytes([byte; 32]));
        let sealed = ClientInfo::OURS.seal(&other.shared(&server.public()), &[1; 24]);
        assert_eq!(ClientInfo::open(&sealed, &server.shared(&client.public())), Err(DerpError::Login));
        assert!(ClientInfo::open(&sealed, &server.shared(&other.public())).is_ok());
    }

    fn any_frame() -> impl Strategy<Value = (u8, NodePublic, NodePublic, Vec<u8>, u32)> {
        (0..17_u8, any::<[u8; 32]>(), any::<[u8; 32]>(), vec(any::<u8>(), 24..80), any::<u32>())
            .prop_map(|(which, a, b, data, number)| (which, NodePublic(a), NodePublic(b), data, number))
    }

    proptest! {
        #[test]
        fn every_frame_reads_back((which, a, b, data, number) in any_frame()) {
            let eight = *data.first_chunk().unwrap();
            let pause = Duration::from_millis(number.into());
            let frame = match which {
                0 => Frame::ServerKey(a),
                1 => Frame::ClientInfo(a, &data),
                2 => Frame::ServerInfo(&data),
                3 => Frame::SendPacket(a, &data),
                4 => Frame::RecvPacket(a, &data),
                5 => Frame::KeepAlive,
                6 => Frame::NotePreferred(number % 2 == 0),
                7 => Frame::PeerGone(a, Gone::from_byte(eight[0])),
                8 => Frame::PeerPresent(a),
                9 => Frame::ForwardPacket(a, b, &data),
                10 => Frame::WatchConnections,
                11 => Frame::ClosePeer(a),
                12 => Frame::Ping(eight),
                13 => Frame::Pong(eight),
                14 => Frame::Health(&data),
                _ => Frame::Restarting { reconnect_in: pause, try_for: pause },
            };
            let bytes = frame.encode();
            prop_assert_eq!(Header::read(&bytes).unwrap().unwrap().length, bytes.len() - HEADER);
            prop_assert_eq!(read(&bytes), Ok(frame));
        }

        #[test]
        fn any_bytes_are_read_or_refused(kind: u8, body in vec(any::<u8>(), 0..200)) {
            let length = u32::try_from(body.len()).unwrap().to_be_bytes();
            let _ = read(&[[kind].as_slice(), &length, &body].concat());
            let _ = Header::read(&body);
        }

        #[test]
        fn the_login_reads_back(version: u32, can_answer_pings: bool, bytes_per_second: u64, burst: u64) {
            let (client, server) = (NodePrivate::from_bytes([1; 32]), NodePrivate::from_bytes([2; 32]));
            let (ours, theirs) = (client.shared(&server.public()), server.shared(&client.public()));
            let info = ClientInfo { version, can_answer_pings };
            prop_assert_eq!(ClientInfo::open(&info.seal(&ours, &[3; 24]), &theirs), Ok(info));
            let info = ServerInfo { version, bytes_per_second, burst };
            prop_assert_eq!(ServerInfo::open(&info.seal(&theirs, &[4; 24]), &ours), Ok(info));
        }
    }
}
