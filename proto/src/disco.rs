//! Disco, the language of path probes: a sealed envelope, and the messages in it (tailnet-data 5.1).
//!
//! ```text
//! packet    = magic, disco key of the sender, nonce, box of the plaintext
//! plaintext = type u8, version u8, body
//! ```

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::key::{BoxShared, DiscoPublic, KEY_LEN, NONCE_LEN, NodePublic, Nonce, TAG_LEN};

/// Bytes of our pings and pongs: as many as the largest WireGuard datagram has, so that an answer proves that
/// such get through.
pub const PADDED: usize = 1312;

const MAGIC: &[u8; 6] = b"TS\xf0\x9f\x92\xac";
const SEALED_AT: usize = MAGIC.len() + KEY_LEN;
const TAG_AT: usize = SEALED_AT + NONCE_LEN;
const PLAINTEXT_AT: usize = TAG_AT + TAG_LEN;

const PING: u8 = 1;
const PONG: u8 = 2;
const CALL_ME_MAYBE: u8 = 3;
/// Of pings and pongs that are padded. No reader looks at it.
const PADDED_VERSION: u8 = 1;
const CALL_ME_MAYBE_VERSION: u8 = 0;
/// Bytes of an address and a port.
const ENDPOINT: usize = 18;

/// Tells which ping a pong answers.
pub type TxId = [u8; 12];

/// What a probe says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Are you there?
    Ping {
        /// To be sent back.
        txid: TxId,
        /// Who asks, if it says so.
        node: Option<NodePublic>,
    },
    /// Yes.
    Pong {
        /// Of the ping.
        txid: TxId,
        /// Where the ping seemed to come from.
        source: SocketAddr,
    },
    /// Probe these addresses of mine, and no others that I named before.
    CallMeMaybe(Vec<SocketAddr>),
}

/// Why a packet tells nothing. None of these is worth more than a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiscoError {
    /// It is no probe, or was not sealed with these keys.
    #[error("the probe does not open")]
    Sealed,
    /// A message that lacks something.
    #[error("the probe is too short")]
    Short,
    /// A message that newer peers may send; to be ignored.
    #[error("the probe is of the unknown type {0}")]
    Unknown(u8),
}

/// Whether a packet is a probe and not WireGuard's, as relays judge it.
#[must_use]
pub fn is_probe(packet: &[u8]) -> bool {
    packet.len() >= TAG_AT && packet.starts_with(MAGIC)
}

/// The key that a probe claims to be from.
#[must_use]
pub fn sender(packet: &[u8]) -> Option<DiscoPublic> {
    packet.strip_prefix(MAGIC)?.first_chunk().map(|key| DiscoPublic(*key))
}

/// What a probe says, if it was sealed with these keys.
pub fn open(packet: &[u8], shared: &BoxShared) -> Result<Message, DiscoError> {
    let sealed = packet.get(SEALED_AT..).filter(|_| packet.starts_with(MAGIC)).ok_or(DiscoError::Sealed)?;
    Message::decode(&shared.open_with_nonce(sealed).ok_or(DiscoError::Sealed)?)
}

/// The packet of a message: one buffer, sealed where it stands. Pings and pongs become [`PADDED`] bytes long.
#[must_use]
pub fn seal(message: &Message, own: &DiscoPublic, shared: &BoxShared, nonce: &Nonce) -> Vec<u8> {
    let mut packet = Vec::with_capacity(PADDED);
    packet.extend_from_slice(MAGIC);
    packet.extend_from_slice(&own.0);
    packet.extend_from_slice(nonce);
    packet.extend_from_slice(&[0; TAG_LEN]);
    message.encode(&mut packet);
    if let Message::Ping { .. } | Message::Pong { .. } = message {
        packet.resize(PADDED, 0);
    }
    let (front, plaintext) = packet.split_at_mut(PLAINTEXT_AT);
    let (_, tag) = front.split_at_mut(TAG_AT);
    tag.copy_from_slice(&shared.seal_in_place(nonce, plaintext));
    packet
}

impl Message {
    /// Reads a plaintext; padding, and the version where nothing depends on it, are not looked at.
    pub fn decode(plaintext: &[u8]) -> Result<Self, DiscoError> {
        let ([kind, version], body) = plaintext.split_first_chunk().ok_or(DiscoError::Short)?;
        match *kind {
            PING => decode_ping(body).ok_or(DiscoError::Short),
            PONG => decode_pong(body).ok_or(DiscoError::Short),
            CALL_ME_MAYBE => Ok(Self::CallMeMaybe(decode_endpoints(*version, body))),
            other => Err(DiscoError::Unknown(other)),
        }
    }

    /// Appends the plaintext, without padding.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Ping { txid, node } => {
                out.extend_from_slice(&[PING, PADDED_VERSION]);
                out.extend_from_slice(txid);
                // "Absent" and "all zero" are the same: readers cannot tell padding from a key.
                out.extend_from_slice(&node.map_or([0; KEY_LEN], |node| node.0));
            }
            Self::Pong { txid, source } => {
                out.extend_from_slice(&[PONG, PADDED_VERSION]);
                out.extend_from_slice(txid);
                put_endpoint(source, out);
            }
            Self::CallMeMaybe(endpoints) => {
                out.extend_from_slice(&[CALL_ME_MAYBE, CALL_ME_MAYBE_VERSION]);
                endpoints.iter().for_each(|endpoint| put_endpoint(endpoint, out));
            }
        }
    }
}

fn decode_ping(body: &[u8]) -> Option<Message> {
    let (txid, rest) = body.split_first_chunk()?;
    let node = rest.first_chunk().map(|key| NodePublic(*key)).filter(|key| !key.is_zero());
    Some(Message::Ping { txid: *txid, node })
}

fn decode_pong(body: &[u8]) -> Option<Message> {
    let (txid, rest) = body.split_first_chunk()?;
    Some(Message::Pong { txid: *txid, source: read_endpoint(rest.first_chunk()?) })
}

/// What is no list of endpoints is an empty one.
fn decode_endpoints(version: u8, body: &[u8]) -> Vec<SocketAddr> {
    match body.as_chunks::<ENDPOINT>() {
        (endpoints, []) if version == CALL_ME_MAYBE_VERSION => endpoints.iter().map(read_endpoint).collect(),
        _ => Vec::new(),
    }
}

fn read_endpoint(bytes: &[u8; ENDPOINT]) -> SocketAddr {
    let [ip @ .., high, low] = bytes;
    SocketAddr::new(Ipv6Addr::from_octets(*ip).to_canonical(), u16::from_be_bytes([*high, *low]))
}

fn put_endpoint(endpoint: &SocketAddr, out: &mut Vec<u8>) {
    let ip = match endpoint.ip() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    out.extend_from_slice(&ip.octets());
    out.extend_from_slice(&endpoint.port().to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::key::DiscoPrivate;

    fn shared() -> BoxShared {
        DiscoPrivate::from_bytes([1; 32]).shared(&DiscoPrivate::from_bytes([2; 32]).public())
    }

    #[test]
    fn pings_and_pongs_are_padded_and_calls_are_not() {
        let own = DiscoPublic([7; 32]);
        let length = |message: &Message| seal(message, &own, &shared(), &[3; 24]).len();
        let source = "127.3.3.40:999".parse().unwrap();
        assert_eq!(length(&Message::Ping { txid: [1; 12], node: None }), PADDED);
        assert_eq!(length(&Message::Pong { txid: [1; 12], source }), PADDED);
        assert_eq!(length(&Message::CallMeMaybe(vec![source])), PLAINTEXT_AT + 2 + ENDPOINT);
    }

    #[test]
    fn what_was_sealed_with_other_keys_does_not_open() {
        let packet = seal(&Message::CallMeMaybe(vec![]), &DiscoPublic([7; 32]), &shared(), &[3; 24]);
        assert_eq!(open(&packet, &shared()), Ok(Message::CallMeMaybe(vec![])));
        let other = DiscoPrivate::from_bytes([3; 32]).shared(&DiscoPublic([7; 32]));
        assert_eq!(open(&packet, &other), Err(DiscoError::Sealed));
    }

    fn any_message() -> impl Strategy<Value = Message> {
        let endpoint = any::<SocketAddr>()
            .prop_map(|endpoint| SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port()));
        prop_oneof![
            any::<(TxId, Option<[u8; 32]>)>().prop_map(|(txid, node)| Message::Ping {
                txid,
                node: node.map(NodePublic).filter(|node| !node.is_zero())
            }),
            (any::<TxId>(), endpoint.clone()).prop_map(|(txid, source)| Message::Pong { txid, source }),
            vec(endpoint, 0..100).prop_map(Message::CallMeMaybe),
        ]
    }

    proptest! {
        #[test]
        fn every_message_reads_back(message in any_message(), nonce: [u8; 24]) {
            let own = DiscoPrivate::from_bytes([1; 32]).public();
            let packet = seal(&message, &own, &shared(), &nonce);
            prop_assert!(is_probe(&packet));
            prop_assert_eq!(sender(&packet), Some(own));
            prop_assert_eq!(open(&packet, &shared()), Ok(message));
        }

        #[test]
        fn any_packet_and_any_plaintext_are_read_or_refused(bytes in vec(any::<u8>(), 0..200)) {
            let _ = (is_probe(&bytes), sender(&bytes), Message::decode(&bytes));
            let packet = [MAGIC.as_slice(), &bytes].concat();
            prop_assert_eq!(open(&packet, &shared()), Err(DiscoError::Sealed));
        }
    }
}
