//! The relay's frames, both ways (tailnet-data 3.1 and 3.2). On purpose not the code that warren itself
//! uses: a mistake must not be on both ends.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use warren_proto::key::{NodePrivate, NodePublic, random};

pub(crate) const SERVER_KEY: u8 = 0x01;
pub(crate) const CLIENT_INFO: u8 = 0x02;
pub(crate) const SERVER_INFO: u8 = 0x03;
pub(crate) const SEND_PACKET: u8 = 0x04;
pub(crate) const RECV_PACKET: u8 = 0x05;
pub(crate) const KEEP_ALIVE: u8 = 0x06;
pub(crate) const NOTE_PREFERRED: u8 = 0x07;
pub(crate) const PEER_GONE: u8 = 0x08;
pub(crate) const FORWARD_PACKET: u8 = 0x0a;
pub(crate) const WATCH_CONNECTIONS: u8 = 0x10;
pub(crate) const CLOSE_PEER: u8 = 0x11;
pub(crate) const PING: u8 = 0x12;
pub(crate) const PONG: u8 = 0x13;

/// Type and length.
const HEADER: usize = 5;
/// A longer frame ends the connection.
const MAX_FRAME: usize = 1 << 20;
/// The largest packet of a SendPacket.
pub(crate) const MAX_PACKET: usize = 65_536;

const MAGIC: &[u8; 8] = b"DERP\xf0\x9f\x94\x91";
const DISCO_MAGIC: &[u8; 6] = b"TS\xf0\x9f\x92\xac";
/// The shortest that a relay takes for a path probe.
const LEAST_DISCO: usize = 62;

/// A frame is longer than any may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame is too long")]
pub(crate) struct TooLong;

/// Takes the next whole frame off the front of what has arrived.
pub(crate) fn take(buffer: &mut BytesMut) -> Result<Option<(u8, Bytes)>, TooLong> {
    let Some((header, rest)) = buffer.split_first_chunk::<HEADER>() else { return Ok(None) };
    let [kind, length @ ..] = *header;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(TooLong);
    }
    if rest.len() < length {
        return Ok(None);
    }
    buffer.advance(HEADER);
    Ok(Some((kind, buffer.split_to(length).freeze())))
}

/// Appends a frame whose body stands in parts.
pub(crate) fn put(buffer: &mut impl BufMut, kind: u8, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    buffer.put_u8(kind);
    buffer.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    parts.iter().for_each(|part| buffer.put_slice(part));
}

/// A frame by itself.
pub(crate) fn frame(kind: u8, parts: &[&[u8]]) -> Bytes {
    let mut buffer = BytesMut::new();
    put(&mut buffer, kind, parts);
    buffer.freeze()
}

/// The first frame of a server; a newer one may say more in it.
pub(crate) fn server_key(key: &NodePublic, more: &[u8]) -> Bytes {
    frame(SERVER_KEY, &[MAGIC, &key.0, more])
}

/// The key in a server's first frame.
pub(crate) fn open_server_key(body: &[u8]) -> Option<NodePublic> {
    body.strip_prefix(MAGIC)?.first_chunk().map(|key| NodePublic(*key))
}

/// What a client says of itself.
pub(crate) fn client_info(own: &NodePrivate, public: &NodePublic, server: &NodePublic) -> Bytes {
    let sealed = own.shared(server).seal_with_nonce(&random(), br#"{"version":2,"CanAckPings":true}"#);
    frame(CLIENT_INFO, &[&public.0, &sealed])
}

/// Who the client is, if it holds that key and says what clients say.
pub(crate) fn open_client_info(own: &NodePrivate, body: &[u8]) -> Option<NodePublic> {
    const LENGTHS: std::ops::RangeInclusive<usize> = 56..=256 << 10;
    let (key, sealed) = body.split_first_chunk()?;
    let key = NodePublic(*key);
    let info = own.shared(&key).open_with_nonce(sealed).filter(|_| LENGTHS.contains(&body.len()))?;
    let info: serde_json::Value = serde_json::from_slice(&info).ok()?;
    (info.get("version")?.as_u64()? >= 2).then_some(key)
}

/// What a server says of itself.
pub(crate) fn server_info(own: &NodePrivate, client: &NodePublic) -> Bytes {
    frame(SERVER_INFO, &[&own.shared(client).seal_with_nonce(&random(), br#"{"version":2}"#)])
}

/// Whether a server's information opens and is JSON.
pub(crate) fn open_server_info(own: &NodePrivate, server: &NodePublic, body: &[u8]) -> bool {
    let info = own.shared(server).open_with_nonce(body);
    info.is_some_and(|info| serde_json::from_slice::<serde_json::Value>(&info).is_ok())
}

/// Whether a packet is a path probe, as relays see it.
pub(crate) fn is_disco(packet: &[u8]) -> bool {
    packet.len() >= LEAST_DISCO && packet.starts_with(DISCO_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_whole_in_whatever_pieces_they_arrive() {
        let mut stream = BytesMut::new();
        put(&mut stream, SEND_PACKET, &[&[7; 32], b"packet"]);
        put(&mut stream, KEEP_ALIVE, &[]);
        let (mut arrived, mut seen) = (BytesMut::new(), Vec::new());
        for byte in stream {
            arrived.put_u8(byte);
            seen.extend(take(&mut arrived).unwrap());
        }
        assert_eq!(seen[0], (SEND_PACKET, Bytes::from([[7; 32].as_slice(), b"packet"].concat())));
        assert_eq!(seen[1], (KEEP_ALIVE, Bytes::new()));
        assert_eq!(take(&mut BytesMut::from(&[4, 0, 16, 0, 1][..])), Err(TooLong));
    }

    #[test]
    fn the_frames_of_a_recorded_login_open_and_carry_what_was_recorded() {
        let server = NodePrivate::from_bytes([2; 32]);
        let client = NodePrivate::from_bytes([1; 32]);
        let hex = "a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209e152622e55613974a1b9a51f425c35f4ad2b632df4ef016de7907f079cddb4c1e3fe26891eec611596c6a330a10352770efd7f347f430dc58a4b0c88eef402ef3429f3fe9b56f1ce";
        assert_eq!(open_client_info(&server, &unhex(hex)), Some(client.public()));
        let info = unhex(
            "c075392ac2ef378e19848c8a8a3368b68bcaa91f71d8baa9ad581c17969c4b8a8339f4a37c238228c2298a0df0946e459d81d59fbb",
        );
        assert!(open_server_info(&client, &server.public(), &info));
        let key = unhex(
            "010000002844455250f09f9491ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d59",
        );
        assert_eq!(server_key(&server.public(), &[]), key);
    }

    #[test]
    fn a_login_under_a_foreign_key_is_refused() {
        let (server, client, other) =
            (NodePrivate::generate(), NodePrivate::generate(), NodePrivate::generate());
        let info = client_info(&client, &other.public(), &server.public());
        assert_eq!(open_client_info(&server, &info[HEADER..]), None);
    }

    fn unhex(digits: &str) -> Vec<u8> {
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }
}
