//! STUN, how a node asks what address it has to the world (tailnet-data 6).
//!
//! ```text
//! message   = type u16, length u16, cookie, transaction id, attributes
//! attribute = type u16, length u16, value, padding to a multiple of four
//! ```
//!
//! A question must leave from the socket that carries WireGuard: the answer is about that socket.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes of a question.
pub const REQUEST: usize = 40;

const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const TXID: usize = 12;
const HEADER: usize = 4 + COOKIE.len() + TXID;
const ATTRIBUTE_HEADER: usize = 4;

const BINDING_REQUEST: u16 = 0x0001;
const BINDING_RESPONSE: u16 = 0x0101;

const MAPPED_ADDRESS: u16 = 0x0001;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
/// What some servers use instead of [`XOR_MAPPED_ADDRESS`].
const ALTERNATIVE_XOR_MAPPED_ADDRESS: u16 = 0x8020;
const SOFTWARE: u16 = 0x8022;
const FINGERPRINT: u16 = 0x8028;

const SOFTWARE_NAME: &[u8; 8] = b"tailnode";
const FINGERPRINT_MASK: u32 = 0x5354_554e;
const V4: u8 = 1;
const V6: u8 = 2;

/// Tells which question an answer is for.
pub type TxId = [u8; TXID];

/// Why a packet is no question, or no answer. None of these is worth more than a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StunError {
    /// Another protocol's packet.
    #[error("the packet is not STUN")]
    NotStun,
    /// A message that is neither the question nor the answer that was expected.
    #[error("the STUN message is of the unexpected type {0:#06x}")]
    Kind(u16),
    /// A length that goes beyond what there is.
    #[error("the STUN message is cut off")]
    CutOff,
    /// An answer that does not say what it was asked.
    #[error("the STUN answer has no address")]
    NoAddress,
    /// A question by other software, which servers of this kind leave unanswered.
    #[error("the STUN question does not have the software name that is expected")]
    Software,
    /// A question that was changed on its way.
    #[error("the STUN question does not have the fingerprint that it should")]
    Fingerprint,
}

/// Whether a packet is STUN, and neither WireGuard's nor a path probe.
#[must_use]
pub fn is_stun(packet: &[u8]) -> bool {
    read_header(packet).is_some()
}

/// The question with this id.
#[must_use]
pub fn request(txid: &TxId) -> Vec<u8> {
    let mut packet = Vec::with_capacity(REQUEST);
    put_header(BINDING_REQUEST, REQUEST - HEADER, txid, &mut packet);
    put_attribute(SOFTWARE, SOFTWARE_NAME, &mut packet);
    put_attribute(FINGERPRINT, &fingerprint(&packet), &mut packet);
    packet
}

/// The id of a question, as a server reads it: one without our software's name and its fingerprint is not
/// answered.
pub fn read_request(packet: &[u8]) -> Result<TxId, StunError> {
    let message = Message::read(packet, BINDING_REQUEST)?;
    let (mut has_name, mut is_whole) = (false, false);
    for attribute in message.attributes() {
        let Attribute { kind, value, at } = attribute?;
        match kind {
            SOFTWARE => has_name = value == SOFTWARE_NAME,
            FINGERPRINT => is_whole = packet.get(..at).is_some_and(|front| value == fingerprint(front)),
            _ => {}
        }
    }
    match (has_name, is_whole) {
        (false, _) => Err(StunError::Software),
        (true, false) => Err(StunError::Fingerprint),
        (true, true) => Ok(message.txid),
    }
}

/// An answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// Of the question.
    pub txid: TxId,
    /// Where the question came from.
    pub address: SocketAddr,
}

impl Response {
    /// Reads an answer. Its fingerprint is not looked at, nor what is behind its declared length; an address
    /// that middleboxes cannot have changed comes before a plain one.
    pub fn decode(packet: &[u8]) -> Result<Self, StunError> {
        let message = Message::read(packet, BINDING_RESPONSE)?;
        let (mut hidden, mut plain) = (None, None);
        for attribute in message.attributes() {
            let Attribute { kind, value, .. } = attribute?;
            match kind {
                XOR_MAPPED_ADDRESS | ALTERNATIVE_XOR_MAPPED_ADDRESS => {
                    hidden = hidden.or_else(|| read_address(value).map(|it| mask(it, &message.txid)));
                }
                MAPPED_ADDRESS => plain = plain.or_else(|| read_address(value)),
                _ => {}
            }
        }
        let address = hidden.or(plain).ok_or(StunError::NoAddress)?;
        Ok(Self { txid: message.txid, address })
    }

    /// The packet of the answer.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let value = address_value(&mask(self.address, &self.txid));
        let mut packet = Vec::new();
        put_header(BINDING_RESPONSE, ATTRIBUTE_HEADER + value.len(), &self.txid, &mut packet);
        put_attribute(XOR_MAPPED_ADDRESS, &value, &mut packet);
        packet
    }
}

/// A message of the expected type; what is behind its declared length is cut off.
struct Message<'a> {
    txid: TxId,
    attributes: &'a [u8],
}

struct Attribute<'a> {
    kind: u16,
    value: &'a [u8],
    /// Where it begins in the packet.
    at: usize,
}

impl<'a> Message<'a> {
    fn read(packet: &'a [u8], expected: u16) -> Result<Self, StunError> {
        let Header { kind, length, txid, rest } = read_header(packet).ok_or(StunError::NotStun)?;
        if kind != expected {
            return Err(StunError::Kind(kind));
        }
        Ok(Self { txid, attributes: rest.get(..length).ok_or(StunError::CutOff)? })
    }

    /// The attributes in order, up to the first that is cut off.
    fn attributes(&self) -> impl Iterator<Item = Result<Attribute<'a>, StunError>> + use<'a> {
        let (all, mut rest) = (self.attributes.len(), self.attributes);
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let at = HEADER + all - rest.len();
            let taken = take_attribute(&mut rest);
            if taken.is_none() {
                rest = &[];
            }
            Some(taken.map(|(kind, value)| Attribute { kind, value, at }).ok_or(StunError::CutOff))
        })
    }
}

struct Header<'a> {
    kind: u16,
    length: usize,
    txid: TxId,
    rest: &'a [u8],
}

fn read_header(packet: &[u8]) -> Option<Header<'_>> {
    let ([high, low, longer, shorter], rest) = packet.split_first_chunk()?;
    let (txid, rest) = rest.strip_prefix(&COOKIE)?.split_first_chunk()?;
    (high & 0xc0 == 0).then_some(Header {
        kind: u16::from_be_bytes([*high, *low]),
        length: usize::from(u16::from_be_bytes([*longer, *shorter])),
        txid: *txid,
        rest,
    })
}

fn take_attribute<'a>(rest: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let ([high, low, longer, shorter], body) = rest.split_first_chunk()?;
    let length = usize::from(u16::from_be_bytes([*longer, *shorter]));
    let (value, padding) = body.split_at_checked(length)?;
    *rest = padding.get(length.next_multiple_of(4) - length..)?;
    Some((u16::from_be_bytes([*high, *low]), value))
}

fn put_header(kind: u16, length: usize, txid: &TxId, out: &mut Vec<u8>) {
    out.extend(kind.to_be_bytes());
    // INVARIANT: what is written here has a few dozen bytes.
    out.extend((length as u16).to_be_bytes());
    out.extend(COOKIE);
    out.extend(txid);
}

/// For values that need no padding.
fn put_attribute(kind: u16, value: &[u8], out: &mut Vec<u8>) {
    out.extend(kind.to_be_bytes());
    // INVARIANT: what is written here has a few dozen bytes.
    out.extend((value.len() as u16).to_be_bytes());
    out.extend(value);
}

fn read_address(value: &[u8]) -> Option<SocketAddr> {
    let ([_, family, high, low], address) = value.split_first_chunk()?;
    let ip = match *family {
        V4 => IpAddr::from(*address.first_chunk::<4>()?),
        V6 => IpAddr::from(*address.first_chunk::<16>()?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes([*high, *low])))
}

fn address_value(address: &SocketAddr) -> Vec<u8> {
    let [high, low] = address.port().to_be_bytes();
    match address.ip() {
        IpAddr::V4(ip) => [[0, V4, high, low].as_slice(), &ip.octets()].concat(),
        IpAddr::V6(ip) => [[0, V6, high, low].as_slice(), &ip.octets()].concat(),
    }
}

/// Hides an address from middleboxes that translate every address they see, or shows it again.
fn mask(address: SocketAddr, txid: &TxId) -> SocketAddr {
    let [high, low, ..] = COOKIE;
    let port = address.port() ^ u16::from_be_bytes([high, low]);
    let ip = match address.ip() {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() ^ u32::from_be_bytes(COOKIE)).into(),
        IpAddr::V6(ip) => {
            let mut octets = ip.octets();
            let masks = COOKIE.iter().chain(txid);
            octets.iter_mut().zip(masks).for_each(|(octet, mask)| *octet ^= mask);
            Ipv6Addr::from(octets).into()
        }
    };
    SocketAddr::new(ip, port)
}

fn fingerprint(front: &[u8]) -> [u8; 4] {
    (crc32(front) ^ FINGERPRINT_MASK).to_be_bytes()
}

/// CRC-32 as IEEE 802.3 has it. Bit by bit: a few dozen bytes need no table.
fn crc32(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0xedb8_8320;
    let step = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
    let fed =
        bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)));
    !fed
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const ID: TxId = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];

    fn response(attributes: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        put_header(BINDING_RESPONSE, attributes.len(), &ID, &mut packet);
        [packet.as_slice(), attributes].concat()
    }

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn an_attribute_that_is_cut_off_or_lacks_its_padding_is_refused() {
        for attributes in [&[0, 0x20, 0][..], &[0, 0x20, 0, 8, 0, 1], &[0x80, 0x22, 0, 3, 1, 2, 3]] {
            assert_eq!(Response::decode(&response(attributes)), Err(StunError::CutOff), "{attributes:?}");
        }
    }

    #[test]
    fn an_address_of_an_unknown_family_or_of_too_few_bytes_is_none() {
        for value in [[0, 3, 1, 2, 9, 9, 9, 9], [0, V6, 1, 2, 9, 9, 9, 9]] {
            let mut attributes = Vec::new();
            put_attribute(XOR_MAPPED_ADDRESS, &value, &mut attributes);
            assert_eq!(Response::decode(&response(&attributes)), Err(StunError::NoAddress));
            put_attribute(MAPPED_ADDRESS, &[0, V4, 0, 53, 192, 0, 2, 1], &mut attributes);
            let address = "192.0.2.1:53".parse().unwrap();
            assert_eq!(Response::decode(&response(&attributes)), Ok(Response { txid: ID, address }));
        }
    }

    #[test]
    fn a_question_is_known_by_its_software_and_by_a_fingerprint_over_all_before_it() {
        assert_eq!(read_request(&request(&ID)), Ok(ID));
        for at in HEADER + ATTRIBUTE_HEADER..REQUEST {
            let mut packet = request(&ID);
            packet[at] ^= 1;
            assert!(read_request(&packet).is_err(), "{at}");
        }
        let mut other = request(&ID);
        other[8] ^= 1;
        assert_eq!(read_request(&other), Err(StunError::Fingerprint));
    }

    proptest! {
        #[test]
        fn every_answer_reads_back(txid: TxId, ip: IpAddr, port: u16) {
            let response = Response { txid, address: SocketAddr::new(ip, port) };
            prop_assert!(is_stun(&response.encode()));
            prop_assert_eq!(Response::decode(&response.encode()), Ok(response));
        }

        #[test]
        fn any_packet_is_read_or_refused(bytes in vec(any::<u8>(), 0..100)) {
            let _ = (is_stun(&bytes), read_request(&bytes), Response::decode(&bytes));
            let _ = Response::decode(&response(&bytes));
        }
    }
}
