//! Segmentation offload at the edge to the kernel, as pure functions: superpackets from the TUN are
//! split into packets, and packets for the TUN are coalesced into superpackets (tailnet-data 14.1).
//!
//! Nothing is copied but headers. [`split`] writes each segment's headers over the tail of the payload
//! before it, which its taker has sealed by then. [`Coalescer`] leaves payloads where they are and tells
//! which pieces make one write. IPv6 only, as the tunnel is.

use std::ops::Range;

use crate::wireguard::{PADDING, padded};

/// Bytes of the header in front of every packet of a TUN with offload, in the machine's byte order.
pub const VIRTIO_LEN: usize = 10;
/// The most bytes of one packet at the TUN: the kernel's limit of a superpacket.
pub const MAX_FRAME: usize = 65535;
/// Bytes behind a frame that [`split`] may use for padding.
pub const SLACK: usize = PADDING;

const IPV6_LEN: usize = 40;
const TCP_LEN: usize = 20;
const UDP_LEN: usize = 8;
/// The most headers a segment may have: IPv6 with extensions, TCP with options.
const MAX_HEADERS: usize = 256;
const TCP: u8 = 6;
const UDP: u8 = 17;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// How the kernel segments, or should segment, a superpacket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Segmentation {
    /// It is one packet.
    #[default]
    None,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams of one size.
    Udp,
    /// Anything else; we ask the kernel for nothing else.
    Other(u8),
}

/// The header in front of every packet of a TUN with offload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Virtio {
    /// The checksum at `checksum_start + checksum_offset` is unfinished: it holds the sum of the pseudo header.
    pub needs_checksum: bool,
    /// How the packet is segmented.
    pub segmentation: Segmentation,
    /// Length of all headers; as the kernel gives it, not to be trusted.
    pub headers: u16,
    /// Payload of each segment but the last.
    pub segment: u16,
    /// Where the transport header begins.
    pub checksum_start: u16,
    /// Where in the transport header the checksum stands.
    pub checksum_offset: u16,
}

/// A frame that cannot be split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the offload header contradicts the packet")]
pub struct Malformed;

impl Virtio {
    const NEEDS_CHECKSUM: u8 = 1;
    const TCP6: u8 = 4;
    const UDP: u8 = 5;
    /// Marks segments of a flow that uses ECN; tells nothing about how to split.
    const ECN: u8 = 0x80;

    /// Reads a header.
    pub fn decode(bytes: &[u8; VIRTIO_LEN]) -> Self {
        let [flags, kind, a, b, c, d, e, f, g, h] = *bytes;
        let segmentation = match kind & !Self::ECN {
            0 => Segmentation::None,
            Self::TCP6 => Segmentation::Tcp6,
            Self::UDP => Segmentation::Udp,
            other => Segmentation::Other(other),
        };
        Self {
            needs_checksum: flags & Self::NEEDS_CHECKSUM != 0,
            segmentation,
            headers: u16::from_ne_bytes([a, b]),
            segment: u16::from_ne_bytes([c, d]),
            checksum_start: u16::from_ne_bytes([e, f]),
            checksum_offset: u16::from_ne_bytes([g, h]),
        }
    }

    /// Writes a header.
    pub fn encode(&self) -> [u8; VIRTIO_LEN] {
        let kind = match self.segmentation {
            Segmentation::None => 0,
            Segmentation::Tcp6 => Self::TCP6,
            Segmentation::Udp => Self::UDP,
            Segmentation::Other(kind) => kind,
        };
        let flags = if self.needs_checksum { Self::NEEDS_CHECKSUM } else { 0 };
        let ([a, b], [c, d]) = (self.headers.to_ne_bytes(), self.segment.to_ne_bytes());
        let ([e, f], [g, h]) = (self.checksum_start.to_ne_bytes(), self.checksum_offset.to_ne_bytes());
        [flags, kind, a, b, c, d, e, f, g, h]
    }
}

/// One packet as it goes to the engine.
#[derive(Debug)]
pub struct Segment<'a> {
    /// The packet, padded with zeros.
    pub padded: &'a [u8],
    /// Its own length.
    pub len: usize,
}

/// Splits the frame of `len` bytes at the start of `buffer` into packets with complete checksums, and
/// hands them out in order. `buffer` must have [`SLACK`] bytes behind the frame; it is scratch afterwards.
pub fn split(
    virtio: &Virtio,
    buffer: &mut [u8],
    len: usize,
    mut take: impl FnMut(Segment<'_>),
) -> Result<(), Malformed> {
    if len > MAX_FRAME || buffer.len() < len + SLACK {
        return Err(Malformed);
    }
    match virtio.segmentation {
        Segmentation::None => {
            if virtio.needs_checksum {
                finish_checksum(virtio, buffer.get_mut(..len).ok_or(Malformed)?)?;
            }
            emit(buffer, 0, len, &mut take)
        }
        Segmentation::Tcp6 | Segmentation::Udp => split_segments(virtio, buffer, len, &mut take),
        Segmentation::Other(_) => Err(Malformed),
    }
}

fn finish_checksum(virtio: &Virtio, packet: &mut [u8]) -> Result<(), Malformed> {
    let start = usize::from(virtio.checksum_start);
    let transport = packet.get_mut(start..).ok_or(Malformed)?;
    let at = usize::from(virtio.checksum_offset);
    if transport.len() < at + 2 {
        return Err(Malformed);
    }
    // The field holds the pseudo header's sum and takes part in the sum as it stands.
    let checksum = !fold(sum(transport));
    // For UDP, zero would say that there is no checksum.
    let checksum = if at == UDP_CHECKSUM && checksum == 0 { 0xffff } else { checksum };
    put_u16(transport, at, checksum)
}

const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

fn split_segments(
    virtio: &Virtio,
    buffer: &mut [u8],
    len: usize,
    take: &mut impl FnMut(Segment<'_>),
) -> Result<(), Malformed> {
    let transport = usize::from(virtio.checksum_start);
    let headers = header_length(virtio, buffer, len, transport)?;
    let step = usize::from(virtio.segment);
    if step == 0 || headers > MAX_HEADERS || headers >= len {
        return Err(Malformed);
    }
    let mut copy = [0; MAX_HEADERS];
    let original = copy.get_mut(..headers).ok_or(Malformed)?;
    original.copy_from_slice(buffer.get(..headers).ok_or(Malformed)?);
    let payload = len - headers;
    let pseudo = addresses_sum(original);
    for (index, from) in (0..payload).step_by(step).enumerate() {
        let part = step.min(payload - from);
        let position = if from + part == payload { Position::Last } else { Position::Before };
        let segment = buffer.get_mut(from..from + headers + part).ok_or(Malformed)?;
        segment.get_mut(..headers).ok_or(Malformed)?.copy_from_slice(original);
        put_u16(segment, 4, narrow(headers - IPV6_LEN + part)?)?;
        let segment = segment.get_mut(transport..).ok_or(Malformed)?;
        match virtio.segmentation {
            Segmentation::Tcp6 => {
                advance_tcp(segment, from, index, position)?;
                put_checksum(segment, TCP, TCP_CHECKSUM, pseudo)?;
            }
            _ => {
                put_u16(segment, 4, narrow(UDP_LEN + part)?)?;
                put_checksum(segment, UDP, UDP_CHECKSUM, pseudo)?;
            }
        }
        emit(buffer, from, headers + part, take)?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Position {
    Before,
    Last,
}

fn header_length(virtio: &Virtio, buffer: &[u8], len: usize, transport: usize) -> Result<usize, Malformed> {
    let is_ipv6 = buffer.first().is_some_and(|first| first >> 4 == 6);
    if !is_ipv6 || transport < IPV6_LEN || !virtio.needs_checksum {
        return Err(Malformed);
    }
    let own = match virtio.segmentation {
        Segmentation::Tcp6 => tcp_length(buffer.get(transport..len).ok_or(Malformed)?).ok_or(Malformed)?,
        _ => UDP_LEN,
    };
    Ok(transport + own)
}

/// The length of a TCP header with its options, if it is all there.
fn tcp_length(tcp: &[u8]) -> Option<usize> {
    let len = usize::from(tcp.get(12)? >> 4) * 4;
    (len >= TCP_LEN && len <= tcp.len()).then_some(len)
}

fn advance_tcp(tcp: &mut [u8], from: usize, index: usize, position: Position) -> Result<(), Malformed> {
    let sequence = tcp.get_mut(4..8).and_then(|bytes| bytes.first_chunk_mut::<4>()).ok_or(Malformed)?;
    let offset = u32::try_from(from).map_err(|_| Malformed)?;
    *sequence = u32::from_be_bytes(*sequence).wrapping_add(offset).to_be_bytes();
    let flags = tcp.get_mut(13).ok_or(Malformed)?;
    if position != Position::Last {
        *flags &= !(FIN | PSH);
    }
    if index > 0 {
        *flags &= !CWR;
    }
    Ok(())
}

fn put_checksum(transport: &mut [u8], protocol: u8, at: usize, addresses: u64) -> Result<(), Malformed> {
    put_u16(transport, at, 0)?;
    let checksum = !fold(addresses + pseudo_sum(protocol, transport.len()) + sum(transport));
    let checksum = if protocol == UDP && checksum == 0 { 0xffff } else { checksum };
    put_u16(transport, at, checksum)
}

/// Hands out one packet with its padding, and puts back what the padding covered.
fn emit(
    buffer: &mut [u8],
    from: usize,
    len: usize,
    take: &mut impl FnMut(Segment<'_>),
) -> Result<(), Malformed> {
    let packet = buffer.get_mut(from..from + padded(len)).ok_or(Malformed)?;
    let pad = packet.get_mut(len..).ok_or(Malformed)?;
    let mut covered = [0; PADDING];
    let covered = covered.get_mut(..pad.len()).ok_or(Malformed)?;
    covered.copy_from_slice(pad);
    pad.fill(0);
    take(Segment { padded: packet, len });
    packet.get_mut(len..).ok_or(Malformed)?.copy_from_slice(covered);
    Ok(())
}

/// Plans the writes for one batch of packets, in the order of each flow. Keeps its memory from batch to batch.
#[derive(Debug, Default)]
pub struct Coalescer {
    packets: Vec<Packet>,
    writes: Vec<Write>,
}

/// A packet of the batch, and the next one in the same write.
#[derive(Debug, Clone)]
struct Packet {
    range: Range<usize>,
    headers: usize,
    next: Option<usize>,
}

/// One write: a packet alone, or a superpacket.
#[derive(Debug)]
struct Write {
    first: usize,
    last: usize,
    pieces: usize,
    /// Payload of a segment.
    segment: usize,
    payload: usize,
    next_sequence: u32,
    state: State,
    /// The first packet's length, flags and checksum before they became those of the superpacket.
    original: Option<Original>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// More may be appended. Its first packet's checksum was not looked at yet.
    Unverified,
    /// More may be appended.
    Open,
    /// A packet of a TCP flow that nothing may be appended to.
    Closed,
    /// No TCP: there is no order to keep.
    Foreign,
}

#[derive(Debug, Clone, Copy)]
struct Original {
    length: [u8; 2],
    flags: u8,
    checksum: [u8; 2],
}

/// What a packet is to the coalescer.
enum Candidate {
    /// A data segment that others may be appended to, or that may be appended.
    Data {
        headers: usize,
        payload: usize,
        sequence: u32,
        pushes: bool,
    },
    /// A packet of a TCP flow to be written alone, in order.
    Alone,
    Foreign,
}

/// Pieces of one superpacket; more would not fit into a list of this size, made on the stack.
pub const MAX_PIECES: usize = 62;
/// How far back a flow's newest write is looked for. Beyond, a new write is begun, still in order.
const LOOK_BACK: usize = 16;

impl Coalescer {
    /// Plans the writes of `ranges` of `buffer`, one packet each. The first packet of each superpacket
    /// gets the superpacket's headers.
    pub fn plan(&mut self, buffer: &mut [u8], ranges: impl Iterator<Item = Range<usize>>) {
        self.packets.clear();
        self.writes.clear();
        for range in ranges {
            self.add(buffer, range);
        }
        for index in 0..self.writes.len() {
            self.make_super(buffer, index);
        }
    }

    /// How many writes are planned.
    pub fn len(&self) -> usize {
        self.writes.len()
    }

    /// Whether nothing is planned.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// The header of a planned write.
    pub fn virtio(&self, write: usize) -> Virtio {
        let Some(write) = self.writes.get(write).filter(|write| write.original.is_some()) else {
            return Virtio::default();
        };
        let headers = self.packets.get(write.first).map_or(0, |packet| packet.headers);
        Virtio {
            needs_checksum: true,
            segmentation: Segmentation::Tcp6,
            headers: u16::try_from(headers).unwrap_or(u16::MAX),
            segment: u16::try_from(write.segment).unwrap_or(u16::MAX),
            checksum_start: IPV6_LEN as u16,
            checksum_offset: TCP_CHECKSUM as u16,
        }
    }

    /// The pieces of the batch's buffer that make a planned write: a whole packet, then payloads.
    pub fn pieces(&self, write: usize) -> impl Iterator<Item = Range<usize>> {
        let first = self.writes.get(write).map(|write| write.first);
        self.chain(first).enumerate().map(|(index, packet)| {
            let skipped = if index == 0 { 0 } else { packet.headers };
            packet.range.start + skipped..packet.range.end
        })
    }

    /// Undoes the superpacket of a planned write that the kernel refused, and tells its packets, to be written singly.
    pub fn undo<'a>(
        &'a mut self,
        buffer: &mut [u8],
        write: usize,
    ) -> impl Iterator<Item = Range<usize>> + 'a {
        if let Some(write) = self.writes.get_mut(write)
            && let Some(original) = write.original.take()
            && let Some(packet) = self.packets.get(write.first)
            && let Some(bytes) = buffer.get_mut(packet.range.clone())
        {
            original.put_back(bytes);
        }
        let first = self.writes.get(write).map(|write| write.first);
        self.chain(first).map(|packet| packet.range.clone())
    }

    fn chain(&self, first: Option<usize>) -> impl Iterator<Item = &Packet> {
        std::iter::successors(first.and_then(|first| self.packets.get(first)), |packet| {
            packet.next.and_then(|next| self.packets.get(next))
        })
    }

    fn add(&mut self, buffer: &[u8], range: Range<usize>) {
        let Some(packet) = buffer.get(range.clone()) else { return };
        match classify(packet) {
            Candidate::Data { headers, payload, sequence, pushes } => {
                let own = self.packets.len();
                self.packets.push(Packet { range, headers, next: None });
                let newest = self.newest_of_flow(buffer, packet);
                if newest.is_some_and(|index| self.append(buffer, index, own, payload, sequence, pushes)) {
                    return;
                }
                let state = if pushes { State::Closed } else { State::Unverified };
                let next_sequence = sequence.wrapping_add(u32::try_from(payload).unwrap_or(0));
                self.begin(own, payload, next_sequence, state);
            }
            Candidate::Alone => self.add_single(range, State::Closed),
            Candidate::Foreign => self.add_single(range, State::Foreign),
        }
    }

    fn add_single(&mut self, range: Range<usize>, state: State) {
        let own = self.packets.len();
        self.packets.push(Packet { range, headers: 0, next: None });
        self.begin(own, 0, 0, state);
    }

    fn begin(&mut self, first: usize, payload: usize, next_sequence: u32, state: State) {
        self.writes.push(Write {
            first,
            last: first,
            pieces: 1,
            segment: payload,
            payload,
            next_sequence,
            state,
            original: None,
        });
    }

    fn newest_of_flow(&self, buffer: &[u8], packet: &[u8]) -> Option<usize> {
        let recent = self.writes.iter().enumerate().rev().take(LOOK_BACK);
        let mut tcp = recent.filter(|(_, write)| write.state != State::Foreign);
        let flow = |write: &Write| {
            let first = self.packets.get(write.first)?;
            flow_of(buffer.get(first.range.clone())?)
        };
        let own = flow_of(packet)?;
        tcp.find(|(_, write)| flow(write) == Some(own)).map(|(index, _)| index)
    }

    /// Appends a packet to a write if the rules allow it.
    fn append(
        &mut self,
        buffer: &[u8],
        index: usize,
        own: usize,
        payload: usize,
        sequence: u32,
        pushes: bool,
    ) -> bool {
        let Some(write) = self.writes.get(index) else { return false };
        let (Some(first), Some(packet)) = (self.packets.get(write.first), self.packets.get(own)) else {
            return false;
        };
        let (Some(head), Some(tail)) = (buffer.get(first.range.clone()), buffer.get(packet.range.clone()))
        else {
            return false;
        };
        let fits = payload <= write.segment
            && sequence == write.next_sequence
            && write.pieces < MAX_PIECES
            && first.headers + write.payload + payload <= MAX_FRAME
            && matches!(write.state, State::Unverified | State::Open)
            && have_like_headers(head, tail, first.headers, packet.headers);
        if !fits {
            return false;
        }
        if write.state == State::Unverified && !has_valid_checksum(head) {
            self.close(index);
            return false;
        }
        if !has_valid_checksum(tail) {
            return false;
        }
        let last = write.last;
        if let Some(last) = self.packets.get_mut(last) {
            last.next = Some(own);
        }
        let Some(write) = self.writes.get_mut(index) else { return false };
        write.last = own;
        write.pieces += 1;
        write.payload += payload;
        write.next_sequence = sequence.wrapping_add(u32::try_from(payload).unwrap_or(0));
        write.state = if pushes || payload < write.segment { State::Closed } else { State::Open };
        true
    }

    fn close(&mut self, index: usize) {
        if let Some(write) = self.writes.get_mut(index) {
            write.state = State::Closed;
        }
    }

    fn make_super(&mut self, buffer: &mut [u8], index: usize) {
        let Some(write) = self.writes.get_mut(index).filter(|write| write.pieces > 1) else { return };
        let (Some(first), Some(last)) = (self.packets.get(write.first), self.packets.get(write.last)) else {
            return;
        };
        let pushes = buffer.get(last.range.start + IPV6_LEN + 13).map_or(0, |flags| flags & PSH);
        let Some(packet) = buffer.get_mut(first.range.clone()) else { return };
        let Some(original) = Original::of(packet) else { return };
        let length = first.headers - IPV6_LEN + write.payload;
        let pseudo = addresses_sum(packet) + pseudo_sum(TCP, length);
        let Ok(length) = u16::try_from(length) else { return };
        let changed = Original {
            length: length.to_be_bytes(),
            flags: original.flags | pushes,
            // Not inverted: the kernel goes on summing from here.
            checksum: fold(pseudo).to_be_bytes(),
        };
        changed.put_back(packet);
        write.original = Some(original);
    }
}

impl Original {
    fn of(packet: &[u8]) -> Option<Self> {
        let at = IPV6_LEN + TCP_CHECKSUM;
        Some(Self {
            length: *packet.get(4..6)?.first_chunk()?,
            flags: *packet.get(IPV6_LEN + 13)?,
            checksum: *packet.get(at..at + 2)?.first_chunk()?,
        })
    }

    fn put_back(self, packet: &mut [u8]) {
        let at = IPV6_LEN + TCP_CHECKSUM;
        if let Some(length) = packet.get_mut(4..6) {
            length.copy_from_slice(&self.length);
        }
        if let Some(flags) = packet.get_mut(IPV6_LEN + 13) {
            *flags = self.flags;
        }
        if let Some(checksum) = packet.get_mut(at..at + 2) {
            checksum.copy_from_slice(&self.checksum);
        }
    }
}

fn classify(packet: &[u8]) -> Candidate {
    let is_tcp = packet.first().is_some_and(|first| first >> 4 == 6) && packet.get(6) == Some(&TCP);
    let Some(tcp) = packet.get(IPV6_LEN..).filter(|_| is_tcp) else { return Candidate::Foreign };
    data_segment(packet, tcp).unwrap_or(Candidate::Alone)
}

fn data_segment(packet: &[u8], tcp: &[u8]) -> Option<Candidate> {
    let (length, _) = packet.get(4..)?.split_first_chunk()?;
    let (sequence, _) = tcp.get(4..)?.split_first_chunk()?;
    let headers = tcp_length(tcp)?;
    let flags = *tcp.get(13)?;
    let payload = tcp.len().checked_sub(headers).filter(|payload| *payload > 0)?;
    let is_plain = flags & !PSH == ACK && usize::from(u16::from_be_bytes(*length)) == tcp.len();
    is_plain.then_some(Candidate::Data {
        headers: IPV6_LEN + headers,
        payload,
        sequence: u32::from_be_bytes(*sequence),
        pushes: flags & PSH != 0,
    })
}

/// Addresses and ports.
fn flow_of(packet: &[u8]) -> Option<(&[u8], &[u8])> {
    Some((packet.get(8..IPV6_LEN)?, packet.get(IPV6_LEN..IPV6_LEN + 4)?))
}

/// Whether two packets differ only in length, sequence number, PSH and checksum.
fn have_like_headers(a: &[u8], b: &[u8], a_headers: usize, b_headers: usize) -> bool {
    const TCP_AT: usize = IPV6_LEN;
    let same = |range: Range<usize>| a.get(range.clone()) == b.get(range);
    let urgent_and_options = TCP_AT + 18..a_headers;
    a_headers == b_headers
        && same(0..4)
        && same(6..TCP_AT + 4)
        && same(TCP_AT + 8..TCP_AT + 13)
        && same(TCP_AT + 14..TCP_AT + TCP_CHECKSUM)
        && same(urgent_and_options)
}

/// Whether a TCP packet's checksum is right: the kernel believes what we mark as verified.
fn has_valid_checksum(packet: &[u8]) -> bool {
    let Some(tcp) = packet.get(IPV6_LEN..) else { return false };
    fold(addresses_sum(packet) + pseudo_sum(TCP, tcp.len()) + sum(tcp)) == 0xffff
}

fn addresses_sum(packet: &[u8]) -> u64 {
    packet.get(8..IPV6_LEN).map_or(0, sum)
}

/// The pseudo header's share besides the addresses, in the byte order of [`sum`].
fn pseudo_sum(protocol: u8, len: usize) -> u64 {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    sum(&len.to_be_bytes()) + sum(&[0, protocol])
}

/// Sums 16-bit words in memory order, as 32-bit words: one's complement sums do not mind. At most
/// 64 KiB of input leave the sum far from overflowing.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    words.iter().chain([&last]).map(|word| u64::from(u32::from_ne_bytes(*word))).sum()
}

/// Folds a [`sum`] to 16 bits, in network order's value.
fn fold(sum: u64) -> u16 {
    let mut sum = sum;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // INVARIANT: the loop leaves 16 bits.
    u16::from_be(sum as u16)
}

fn narrow(len: usize) -> Result<u16, Malformed> {
    u16::try_from(len).map_err(|_| Malformed)
}

fn put_u16(bytes: &mut [u8], at: usize, value: u16) -> Result<(), Malformed> {
    bytes.get_mut(at..at + 2).ok_or(Malformed)?.copy_from_slice(&value.to_be_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_checksum_matches_the_example_of_rfc_1071() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
        assert_eq!(fold(sum(&[0x12])), 0x1200, "an odd byte counts as the high one");
    }

    #[test]
    fn a_superpacket_of_equal_segments_becomes_one_write() {
        let packets: Vec<_> = (0..53).map(|index| segment(1, index * 1208, 1208, ACK)).collect();
        let planned = plan(&packets);
        assert_eq!(planned.len(), 1);
        let (virtio, bytes) = &planned[0];
        assert_eq!(virtio.segment, 1208);
        assert_eq!(virtio.headers, 72);
        assert_eq!((virtio.checksum_start, virtio.checksum_offset), (40, 16));
        assert_eq!(bytes.len(), 72 + 53 * 1208);
        assert_eq!(usize::from(u16::from_be_bytes([bytes[4], bytes[5]])), bytes.len() - 40);
        assert_eq!(split_all(&planned), packets);
    }

    #[test]
    fn a_shorter_segment_or_psh_closes_a_superpacket() {
        let short = [segment(1, 0, 500, ACK), segment(1, 500, 100, ACK), segment(1, 600, 100, ACK)];
        assert_eq!(sizes(&plan(&short)), [2, 1]);
        let push = [segment(1, 0, 500, ACK), segment(1, 500, 500, ACK | PSH), segment(1, 1000, 500, ACK)];
        assert_eq!(sizes(&plan(&push)), [2, 1]);
        assert_eq!(split_all(&plan(&push)), push);
    }

    #[test]
    fn a_longer_segment_begins_a_new_superpacket() {
        let packets = [segment(1, 0, 100, ACK), segment(1, 100, 500, ACK), segment(1, 600, 500, ACK)];
        assert_eq!(sizes(&plan(&packets)), [1, 2]);
    }

    #[test]
    fn a_gap_in_the_sequence_is_not_bridged() {
        let packets = [segment(1, 0, 500, ACK), segment(1, 501, 500, ACK)];
        assert_eq!(sizes(&plan(&packets)), [1, 1]);
    }

    #[test]
    fn packets_that_differ_in_more_than_they_may_stay_single() {
        let first = segment(1, 0, 500, ACK);
        for at in [1, 3, 6, 7, 9, 25, 40, 43, 48, 55, 58, 61, 70] {
            let mut second = segment(1, 500, 500, ACK);
            second[at] ^= 0x04;
            repair(&mut second);
            let planned = plan(&[first.clone(), second.clone()]);
            assert_eq!(planned.len(), 2, "byte {at}");
            assert_eq!(planned[1], (Virtio::default(), second), "byte {at}");
        }
    }

    #[test]
    fn only_plain_data_is_coalesced() {
        for flags in [ACK | FIN, ACK | CWR, ACK | 0x40, ACK | 0x20, ACK | 0x02, ACK | 0x04, 0] {
            let packets = [segment(1, 0, 500, ACK), segment(1, 500, 500, flags)];
            assert_eq!(sizes(&plan(&packets)), [1, 1], "{flags:#x}");
        }
        let pure_acks = [segment(1, 0, 0, ACK), segment(1, 0, 0, ACK)];
        assert_eq!(sizes(&plan(&pure_acks)), [1, 1]);
    }

    #[test]
    fn a_wrong_checksum_keeps_a_packet_single_and_untouched() {
        let mut wrong = segment(1, 500, 500, ACK);
        wrong[57] ^= 1;
        let packets = [segment(1, 0, 500, ACK), wrong.clone(), segment(1, 1000, 500, ACK)];
        let planned = plan(&packets);
        assert_eq!(planned.len(), 3);
        assert_eq!(planned[1], (Virtio::default(), wrong));
        let mut first_wrong = packets;
        first_wrong.swap(0, 1);
        first_wrong[0] = segment(1, 0, 500, ACK);
        first_wrong[0][57] ^= 1;
        first_wrong[1] = segment(1, 500, 500, ACK);
        assert_eq!(sizes(&plan(&first_wrong)), [1, 2]);
    }

    #[test]
    fn interleaved_flows_are_coalesced_each() {
        let packets: Vec<_> = (0..20).map(|index| segment(index % 2, (index / 2) * 700, 700, ACK)).collect();
        assert_eq!(sizes(&plan(&packets)), [10, 10]);
    }

    #[test]
    fn a_flow_keeps_its_order_around_a_packet_that_stands_alone() {
        let packets = [
            segment(1, 0, 500, ACK),
            segment(1, 500, 500, ACK),
            segment(1, 1000, 500, ACK | FIN),
            segment(1, 1000, 500, ACK),
        ];
        assert_eq!(sizes(&plan(&packets)), [2, 1, 1]);
        assert_eq!(split_all(&plan(&packets)), packets);
    }

    /// Conforms: data:20.2.12
    #[test]
    fn a_refused_superpacket_falls_back_to_its_packets() {
        let packets: Vec<_> = (0..5).map(|index| segment(1, index * 600, 600, ACK)).collect();
        let (mut buffer, ranges) = concat(&packets);
        let mut coalescer = Coalescer::default();
        coalescer.plan(&mut buffer, ranges.into_iter());
        assert_eq!(coalescer.len(), 1);
        let singles: Vec<_> = coalescer.undo(&mut buffer, 0).collect();
        let singles: Vec<_> = singles.into_iter().map(|range| buffer[range].to_vec()).collect();
        assert_eq!(singles, packets);
        assert_eq!(coalescer.virtio(0), Virtio::default());
    }

    #[test]
    fn fin_and_psh_stay_on_the_last_segment_and_cwr_on_the_first() {
        let mut frame = segment(1, 7, 2500, ACK | FIN | PSH | CWR);
        let segments = split_frame(&tcp_virtio(1000), &mut frame).unwrap();
        let flags: Vec<u8> = segments.iter().map(|segment| segment[53]).collect();
        assert_eq!(flags, [ACK | CWR, ACK, ACK | FIN | PSH]);
        let sequences: Vec<u8> = segments.iter().map(|segment| segment[47]).collect();
        assert_eq!(sequences, [7, (1007 % 256) as u8, (2007 % 256) as u8]);
        assert!(segments.iter().all(|segment| has_valid_checksum(segment)));
        assert_eq!(segments.iter().map(Vec::len).collect::<Vec<_>>(), [1072, 1072, 572]);
    }

    #[test]
    fn a_udp_superpacket_is_split_into_datagrams_with_their_own_lengths() {
        let mut frame = datagram(2100);
        let virtio = Virtio { segmentation: Segmentation::Udp, checksum_offset: 6, ..tcp_virtio(1000) };
        let segments = split_frame(&virtio, &mut frame).unwrap();
        assert_eq!(segments.iter().map(Vec::len).collect::<Vec<_>>(), [1048, 1048, 148]);
        for segment in &segments {
            assert_eq!(usize::from(u16::from_be_bytes([segment[44], segment[45]])), segment.len() - 40);
            let total = addresses_sum(segment) + pseudo_sum(UDP, segment.len() - 40) + sum(&segment[40..]);
            assert_eq!(fold(total), 0xffff);
        }
    }

    #[test]
    fn an_unfinished_checksum_is_finished() {
        let complete = segment(1, 0, 100, ACK);
        let mut unfinished = complete.clone();
        let pseudo = fold(addresses_sum(&complete) + pseudo_sum(TCP, complete.len() - 40));
        unfinished[56..58].copy_from_slice(&pseudo.to_be_bytes());
        let virtio = Virtio { segmentation: Segmentation::None, segment: 0, ..tcp_virtio(0) };
        assert_eq!(split_frame(&virtio, &mut unfinished).unwrap(), [complete]);
    }

    #[test]
    fn the_padding_is_zero_and_covers_nothing_for_good() {
        let mut frame = segment(1, 0, 2505, ACK);
        frame.resize(frame.len() + SLACK, 0xee);
        let len = frame.len() - SLACK;
        let mut payloads = Vec::new();
        split(&tcp_virtio(501), &mut frame, len, |segment| {
            assert_eq!(segment.padded.len(), padded(segment.len));
            assert!(segment.padded[segment.len..].iter().all(|byte| *byte == 0));
            payloads.extend_from_slice(&segment.padded[72..segment.len]);
        })
        .unwrap();
        assert_eq!(payloads, segment(1, 0, 2505, ACK)[72..]);
        assert!(frame[len..].iter().all(|byte| *byte == 0xee));
    }

    #[test]
    fn impossible_headers_are_refused() {
        let frame = segment(1, 0, 2000, ACK);
        let good = tcp_virtio(1000);
        for virtio in [
            Virtio { segment: 0, ..good },
            Virtio { needs_checksum: false, ..good },
            Virtio { checksum_start: 0, ..good },
            Virtio { checksum_start: 60000, ..good },
            Virtio { segmentation: Segmentation::Other(1), ..good },
            Virtio { segmentation: Segmentation::None, checksum_offset: 60000, ..good },
        ] {
            assert_eq!(split_frame(&virtio, &mut frame.clone()), Err(Malformed), "{virtio:?}");
        }
        assert_eq!(split(&good, &mut [0x60; 40], 40, |_| {}), Err(Malformed), "no slack");
    }

    proptest! {
        #[test]
        fn headers_read_back(bytes: [u8; VIRTIO_LEN]) {
            let virtio = Virtio::decode(&bytes);
            prop_assert_eq!(Virtio::decode(&virtio.encode()), virtio);
        }

        #[test]
        fn any_frame_under_any_header_is_split_or_refused(
            header: [u8; VIRTIO_LEN],
            kind in prop::sample::select(vec![0u8, 1, 4, 5]),
            start in 0u16..120,
            bytes in prop::collection::vec(any::<u8>(), 0..3000),
        ) {
            let mut virtio = Virtio::decode(&header);
            virtio.segmentation = Virtio::decode(&[0, kind, 0, 0, 0, 0, 0, 0, 0, 0]).segmentation;
            virtio.checksum_start = start;
            let mut buffer = bytes;
            let len = buffer.len();
            buffer.resize(len + SLACK, 0);
            let mut emitted = 0;
            let _ = split(&virtio, &mut buffer, len, |segment| emitted += segment.len);
            prop_assert!(emitted <= len * MAX_HEADERS);
        }

        #[test]
        fn any_packets_are_planned_and_none_is_lost(
            packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20),
        ) {
            let planned = plan(&packets);
            let total: usize = planned.iter().map(|(_, bytes)| bytes.len()).sum();
            prop_assert_eq!(total, packets.iter().map(Vec::len).sum::<usize>());
        }

        /// Conforms: data:20.2.12
        #[test]
        fn splitting_what_was_coalesced_gives_back_every_flow(shapes in prop::collection::vec(shape(), 1..60)) {
            let mut sequences = [0u32; 3];
            let packets: Vec<_> = shapes.iter().map(|shape| shape.packet(&mut sequences)).collect();
            let again = split_all(&plan(&packets));
            for flow in 0..3u8 {
                let of = |packets: &[Vec<u8>]| -> Vec<Vec<u8>> {
                    packets.iter().filter(|packet| packet[41] == flow).cloned().collect()
                };
                prop_assert_eq!(of(&again), of(&packets));
            }
        }
    }

    /// What the next packet of a flow is like.
    #[derive(Debug, Clone)]
    struct Shape {
        flow: u8,
        payload: usize,
        flags: u8,
        skips: bool,
        is_damaged: bool,
    }

    impl Shape {
        fn packet(&self, sequences: &mut [u32; 3]) -> Vec<u8> {
            let sequence = &mut sequences[usize::from(self.flow)];
            *sequence = sequence.wrapping_add(u32::from(self.skips));
            let mut packet = segment(u32::from(self.flow), *sequence, self.payload, self.flags);
            *sequence = sequence.wrapping_add(u32::try_from(self.payload).unwrap());
            if self.is_damaged {
                packet[60] ^= 0x80;
            }
            packet
        }
    }

    fn shape() -> impl Strategy<Value = Shape> {
        let payload = prop::sample::select(vec![0usize, 1, 99, 100, 100, 100, 1208, 1208]);
        let flags = prop::sample::select(vec![ACK, ACK, ACK, ACK, ACK | PSH, ACK | FIN, ACK | CWR]);
        (0u8..3, payload, flags, prop::bool::weighted(0.1), prop::bool::weighted(0.05)).prop_map(
            |(flow, payload, flags, skips, is_damaged)| Shape { flow, payload, flags, skips, is_damaged },
        )
    }

    /// A TCP packet with 12 bytes of options.
    fn segment(flow: u32, sequence: u32, payload: usize, flags: u8) -> Vec<u8> {
        let mut packet = vec![0; 72 + payload];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&((32 + payload).min(65535) as u16).to_be_bytes());
        packet[6] = TCP;
        packet[7] = 64;
        packet[8] = 0xfd;
        packet[24] = 0xfd;
        packet[39] = 9;
        packet[40..42].copy_from_slice(&(flow as u16).to_be_bytes());
        packet[42..44].copy_from_slice(&443u16.to_be_bytes());
        packet[44..48].copy_from_slice(&sequence.to_be_bytes());
        packet[48..52].copy_from_slice(&77u32.to_be_bytes());
        packet[52] = 8 << 4;
        packet[53] = flags;
        packet[54..56].copy_from_slice(&501u16.to_be_bytes());
        packet[60] = 1;
        for (index, byte) in packet[72..].iter_mut().enumerate() {
            *byte = (index as u32 * 7 + sequence) as u8;
        }
        repair(&mut packet);
        packet
    }

    fn datagram(payload: usize) -> Vec<u8> {
        let mut packet = vec![0x3c; 48 + payload];
        packet[0] = 0x60;
        packet[6] = UDP;
        packet
    }

    fn repair(packet: &mut [u8]) {
        let addresses = addresses_sum(packet);
        put_checksum(&mut packet[40..], TCP, TCP_CHECKSUM, addresses).unwrap();
    }

    fn tcp_virtio(segment: u16) -> Virtio {
        Virtio {
            needs_checksum: true,
            segmentation: Segmentation::Tcp6,
            headers: 0,
            segment,
            checksum_start: 40,
            checksum_offset: 16,
        }
    }

    fn concat(packets: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
        let mut buffer = Vec::new();
        let mut ranges = Vec::new();
        for packet in packets {
            ranges.push(buffer.len()..buffer.len() + packet.len());
            buffer.extend_from_slice(packet);
        }
        (buffer, ranges)
    }

    fn plan(packets: &[Vec<u8>]) -> Vec<(Virtio, Vec<u8>)> {
        let (mut buffer, ranges) = concat(packets);
        let mut coalescer = Coalescer::default();
        coalescer.plan(&mut buffer, ranges.into_iter());
        let bytes = |index| coalescer.pieces(index).flat_map(|piece| buffer[piece].to_vec()).collect();
        (0..coalescer.len()).map(|index| (coalescer.virtio(index), bytes(index))).collect()
    }

    /// How many packets each write holds.
    fn sizes(planned: &[(Virtio, Vec<u8>)]) -> Vec<usize> {
        let packets = |(virtio, bytes): &(Virtio, Vec<u8>)| match virtio.segment {
            0 => 1,
            segment => (bytes.len() - 72).div_ceil(usize::from(segment)),
        };
        planned.iter().map(packets).collect()
    }

    fn split_frame(virtio: &Virtio, frame: &mut Vec<u8>) -> Result<Vec<Vec<u8>>, Malformed> {
        let len = frame.len();
        frame.resize(len + SLACK, 0);
        let mut segments = Vec::new();
        split(virtio, frame, len, |segment| segments.push(segment.padded[..segment.len].to_vec()))?;
        Ok(segments)
    }

    fn split_all(planned: &[(Virtio, Vec<u8>)]) -> Vec<Vec<u8>> {
        planned.iter().flat_map(|(virtio, bytes)| split_frame(virtio, &mut bytes.clone()).unwrap()).collect()
    }
}
