//! DRPC: the packets of one call on one transport, cut into frames (tailnet-control 2.4).
//!
//! ```text
//! frame = control byte, stream id, message id, length, data      ids and length are varints
//! control = 1 bit "control", 6 bits kind, 1 bit "done"
//! ```
//!
//! Every packet has an id of its own, which its frames share and which never goes down.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes of the longest packet, inclusive, in both directions.
pub const MAX_PACKET: usize = 4 << 20;

/// Bytes that a message may take once it is unpacked. The largest packet of nodes as agents send them, with what
/// they hold, takes half of it.
pub const MAX_UNPACKED: usize = 48 << 20;

/// Bytes of data after which a packet is cut.
pub const SPLIT: usize = 64 << 10;

/// Bytes of the longest varint.
const MAX_VARINT: usize = 10;
/// A control byte and three varints.
const MAX_HEADER: usize = 1 + 3 * MAX_VARINT;

const DONE: u8 = 0x01;
const CONTROL: u8 = 0x80;

/// What a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Begins a call; the data is its path.
    Invoke = 1,
    /// A message, maybe an empty one.
    Message = 2,
    /// Ends the call with an [`ErrorBody`].
    Error = 3,
    /// Ends the call: its answer is no longer wanted.
    Cancel = 4,
    /// Ends the call in both directions.
    Close = 5,
    /// No more messages from this side.
    CloseSend = 6,
    /// Metadata of the call that is invoked next.
    InvokeMetadata = 7,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Invoke,
        Self::Message,
        Self::Error,
        Self::Cancel,
        Self::Close,
        Self::CloseSend,
        Self::InvokeMetadata,
    ];

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// The control byte of its frames, but for "done": an end that knows no cancelling may ignore it.
    const fn control_byte(self) -> u8 {
        let number = (self as u8) << 1;
        if matches!(self, Self::Cancel) { number | CONTROL } else { number }
    }
}

/// Why a transport cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DrpcError {
    /// An id or a length does not end.
    #[error("a number of more than {MAX_VARINT} bytes")]
    Varint,
    /// An id is lower than one before, or was finished.
    #[error("message {message} of stream {stream} out of order")]
    Order {
        /// The stream.
        stream: u64,
        /// The message.
        message: u64,
    },
    /// Two frames of one packet disagree.
    #[error("a packet changes its kind")]
    KindChanged,
    /// A packet that may not be ignored is of no known kind.
    #[error("a packet of the unknown kind {0}")]
    UnknownKind(u8),
    /// The packet is over [`MAX_PACKET`].
    #[error("a packet of more than {MAX_PACKET} bytes")]
    TooLong,
    /// The message would take more than [`MAX_UNPACKED`].
    #[error("a message that unpacks to {0} bytes: {MAX_UNPACKED} are the most")]
    TooHeavy(usize),
    /// An error without its code.
    #[error("an error packet of {0} bytes")]
    ShortError(usize),
}

/// A whole packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What it says.
    pub kind: Kind,
    /// Which call of the transport it is about.
    pub stream: u64,
    /// Its own id.
    pub message: u64,
    /// What it carries.
    pub data: Bytes,
}

/// Turns the bytes of one transport into packets. Memory grows with what has arrived, never with what a
/// length announces. After an error the transport is of no more use.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    /// The last packet that is complete.
    finished: Id,
    partial: Option<Partial>,
}

/// Stream, then message: they compare in this order.
type Id = (u64, u64);

#[derive(Debug)]
struct Partial {
    id: Id,
    kind: u8,
    data: BytesMut,
}

struct FrameHeader {
    id: Id,
    kind: u8,
    is_done: bool,
    is_control: bool,
    /// Bytes of this header.
    size: usize,
    /// Bytes of data that follow.
    length: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), finished: (1, 0), partial: None }
    }
}

impl Decoder {
    /// A decoder at the beginning of a transport.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes as they arrived.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next packet, if it has arrived whole.
    #[expect(clippy::should_implement_trait, reason = "no iterator: there may be more later")]
    pub fn next(&mut self) -> Result<Option<Packet>, DrpcError> {
        while let Some(header) = parse_header(&self.buffer)? {
            self.admit(&header)?;
            if self.buffer.len() - header.size < header.length {
                break;
            }
            self.buffer.advance(header.size);
            let data = self.buffer.split_to(header.length);
            if let Some(packet) = self.assemble(&header, data)? {
                return Ok(Some(packet));
            }
        }
        if self.buffer.is_empty() {
            // The room of a large packet is given back rather than kept for the life of the call.
            self.buffer = BytesMut::new();
        }
        Ok(None)
    }

    /// Checks a frame against those before it, without waiting for its data.
    fn admit(&self, header: &FrameHeader) -> Result<(), DrpcError> {
        let (stream, message) = header.id;
        let is_older = self.partial.as_ref().is_some_and(|partial| header.id < partial.id);
        if header.id <= self.finished || is_older {
            return Err(DrpcError::Order { stream, message });
        }
        let begun = self.partial.as_ref().filter(|partial| partial.id == header.id);
        if begun.is_some_and(|partial| partial.kind != header.kind) {
            return Err(DrpcError::KindChanged);
        }
        let arrived = begun.map_or(0, |partial| partial.data.len());
        if header.length > MAX_PACKET - arrived {
            return Err(DrpcError::TooLong);
        }
        Ok(())
    }

    /// Adds an admitted frame to its packet. One with a higher id drops what was not finished.
    fn assemble(&mut self, header: &FrameHeader, data: BytesMut) -> Result<Option<Packet>, DrpcError> {
        let (id, kind) = (header.id, header.kind);
        let data = match self.partial.take().filter(|partial| partial.id == id) {
            Some(mut partial) => {
                partial.data.extend_from_slice(&data);
                partial.data
            }
            None => data,
        };
        if !header.is_done {
            self.partial = Some(Partial { id, kind, data });
            return Ok(None);
        }
        self.finished = id;
        let (stream, message) = id;
        match Kind::from_number(kind) {
            Some(kind) => Ok(Some(Packet { kind, stream, message, data: data.freeze() })),
            None if header.is_control => Ok(None),
            None => Err(DrpcError::UnknownKind(kind)),
        }
    }
}

fn parse_header(buffer: &[u8]) -> Result<Option<FrameHeader>, DrpcError> {
    let mut rest = buffer;
    let Some(control) = rest.split_off_first() else { return Ok(None) };
    let mut numbers = [0; 3];
    for number in &mut numbers {
        let Some(value) = parse_varint(&mut rest)? else { return Ok(None) };
        *number = value;
    }
    let [stream, message, length] = numbers;
    Ok(Some(FrameHeader {
        id: (stream, message),
        kind: (control & !CONTROL) >> 1,
        is_done: control & DONE != 0,
        is_control: control & CONTROL != 0,
        size: buffer.len() - rest.len(),
        length: usize::try_from(length).unwrap_or(usize::MAX),
    }))
}

/// Bits beyond the 64th are dropped, as other implementations do.
fn parse_varint(rest: &mut &[u8]) -> Result<Option<u64>, DrpcError> {
    let mut value = 0;
    for index in 0..MAX_VARINT {
        let Some(byte) = rest.split_off_first() else { return Ok(None) };
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some(value));
        }
    }
    Err(DrpcError::Varint)
}

/// Writes the packets of one stream, in order.
#[derive(Debug)]
pub struct PacketWriter {
    stream: u64,
    message: u64,
}

impl PacketWriter {
    /// A writer for the packets of this stream of a transport.
    pub const fn new(stream: u64) -> Self {
        Self { stream, message: 0 }
    }

    /// Appends a packet, in as many frames as it needs.
    pub fn write(&mut self, kind: Kind, data: &[u8], out: &mut BytesMut) {
        self.message += 1;
        out.reserve(data.len() + MAX_HEADER * (1 + data.len() / SPLIT));
        let mut rest = data;
        while let Some((piece, more)) = rest.split_at_checked(SPLIT).filter(|(_, more)| !more.is_empty()) {
            self.write_frame(kind.control_byte(), piece, out);
            rest = more;
        }
        self.write_frame(kind.control_byte() | DONE, rest, out);
    }

    fn write_frame(&self, control: u8, data: &[u8], out: &mut BytesMut) {
        out.put_u8(control);
        for number in [self.stream, self.message, data.len() as u64] {
            put_varint(number, out);
        }
        out.put_slice(data);
    }
}

fn put_varint(mut number: u64, out: &mut BytesMut) {
    while number >= 0x80 {
        out.put_u8(number as u8 | 0x80);
        number >>= 7;
    }
    out.put_u8(number as u8);
}

/// What an error packet carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorBody {
    /// What went wrong, as a number; 0 if it has none.
    pub code: u64,
    /// What went wrong, in words.
    pub text: String,
}

impl ErrorBody {
    /// Reads the data of an error packet.
    pub fn decode(data: &[u8]) -> Result<Self, DrpcError> {
        let (code, text) = data.split_first_chunk().ok_or(DrpcError::ShortError(data.len()))?;
        Ok(Self { code: u64::from_be_bytes(*code), text: String::from_utf8_lossy(text).into_owned() })
    }

    /// The data of an error packet.
    pub fn encode(&self) -> Vec<u8> {
        [self.code.to_be_bytes().as_slice(), self.text.as_bytes()].concat()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, id: Id, data: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        PacketWriter { stream: id.0, message: id.1 }.write_frame(kind, data, &mut out);
        out
    }

    /// What a decoder makes of frames that arrive at once.
    fn decode(frames: &[BytesMut]) -> Result<Vec<Packet>, DrpcError> {
        let mut decoder = Decoder::new();
        frames.iter().for_each(|frame| decoder.extend(frame));
        std::iter::from_fn(|| decoder.next().transpose()).collect()
    }

    const INVOKE: u8 = 0x03;
    const MESSAGE: u8 = 0x05;
    const PART: u8 = 0x04;

    #[test]
    fn ids_never_go_down_and_are_never_used_twice() {
        let order = |stream, message| Err(DrpcError::Order { stream, message });
        assert_eq!(decode(&[frame(INVOKE, (0, 1), b"/x")]), order(0, 1));
        assert_eq!(decode(&[frame(INVOKE, (1, 0), b"/x")]), order(1, 0));
        assert_eq!(decode(&[frame(INVOKE, (1, 5), b""), frame(MESSAGE, (1, 4), b"")]), order(1, 4));
        assert_eq!(decode(&[frame(INVOKE, (1, 5), b""), frame(MESSAGE, (1, 5), b"")]), order(1, 5));
        assert_eq!(decode(&[frame(PART, (1, 5), b""), frame(MESSAGE, (1, 4), b"")]), order(1, 4));
        assert_eq!(decode(&[frame(INVOKE, (2, 1), b""), frame(MESSAGE, (1, 9), b"")]), order(1, 9));
        let last = u64::MAX;
        assert_eq!(
            decode(&[frame(MESSAGE, (last, last), b""), frame(MESSAGE, (last, last), b"")]),
            order(last, last)
        );
    }

    #[test]
    fn a_higher_id_drops_the_unfinished_packet() {
        let packets = decode(&[frame(PART, (1, 1), b"lost"), frame(MESSAGE, (1, 3), b"kept")]).unwrap();
        assert_eq!(packets, [Packet { kind: Kind::Message, stream: 1, message: 3, data: "kept".into() }]);
    }

    #[test]
    fn the_frames_of_a_packet_are_joined_and_are_all_of_one_kind() {
        let parts = [frame(PART, (1, 1), b"he"), frame(PART, (1, 1), b""), frame(MESSAGE, (1, 1), b"llo")];
        assert_eq!(decode(&parts).unwrap()[0].data, "hello");
        let parts = [frame(PART, (1, 1), b"a"), frame(INVOKE, (1, 1), b"b")];
        assert_eq!(decode(&parts), Err(DrpcError::KindChanged));
    }

    #[test]
    fn an_unknown_kind_is_ignored_only_if_it_says_so() {
        let ignored = frame(0xd1, (1, 1), b"xyz");
        assert_eq!(decode(&[ignored, frame(MESSAGE, (1, 2), b"")]).unwrap().len(), 1);
        assert_eq!(decode(&[frame(0x51, (1, 1), b"")]), Err(DrpcError::UnknownKind(40)));
    }

    #[test]
    fn four_mebibytes_pass_and_one_byte_more_is_refused_before_it_arrives() {
        let half = vec![7; MAX_PACKET / 2];
        let packets = decode(&[frame(PART, (1, 1), &half), frame(MESSAGE, (1, 1), &half)]).unwrap();
        assert_eq!(packets[0].data.len(), MAX_PACKET);
        let full = frame(PART, (1, 1), &vec![7; MAX_PACKET]);
        assert_eq!(decode(&[full, frame(MESSAGE, (1, 1), b"7")]), Err(DrpcError::TooLong));
        let mut header = BytesMut::from(&[MESSAGE, 1, 1][..]);
        put_varint(MAX_PACKET as u64 + 1, &mut header);
        assert_eq!(decode(&[header]), Err(DrpcError::TooLong));
        let mut header = BytesMut::from(&[MESSAGE, 1, 1][..]);
        put_varint(u64::MAX, &mut header);
        assert_eq!(decode(&[header]), Err(DrpcError::TooLong));
    }

    #[test]
    fn an_announced_length_reserves_nothing() {
        let mut decoder = Decoder::new();
        decoder.extend(&[MESSAGE, 1, 1, 0x80, 0x80, 0x80, 0x02, 0xff]);
        assert_eq!(decoder.next(), Ok(None));
        assert!(decoder.buffer.capacity() < 1024, "{}", decoder.buffer.capacity());
    }

    #[test]
    fn a_number_ends_after_ten_bytes() {
        assert_eq!(decode(&[BytesMut::from([0xff; 10].as_slice())]), Ok(vec![]));
        assert_eq!(decode(&[BytesMut::from([0xff; 11].as_slice())]), Err(DrpcError::Varint));
    }

    #[test]
    fn a_long_packet_is_cut_after_every_64_kibibytes() {
        let written = |length| {
            let mut out = BytesMut::new();
            PacketWriter::new(1).write(Kind::Message, &vec![0; length], &mut out);
            out
        };
        assert!(written(SPLIT).starts_with(&[0x05, 1, 1, 0x80, 0x80, 0x04]));
        let cut = written(SPLIT + 1);
        assert!(cut.starts_with(&[0x04, 1, 1, 0x80, 0x80, 0x04]));
        assert_eq!(cut[6 + SPLIT..], [0x05, 1, 1, 1, 0]);
    }

    #[test]
    fn an_error_has_a_code_and_a_text_that_is_always_readable() {
        let body = ErrorBody::decode(b"\0\0\0\0\0\0\0\x0cUnimplemented\xff").unwrap();
        assert_eq!(body, ErrorBody { code: 12, text: "Unimplemented\u{fffd}".to_owned() });
        assert_eq!(ErrorBody::decode(&[0; 7]), Err(DrpcError::ShortError(7)));
    }

    proptest! {
        #[test]
        fn packets_survive_any_cutting(
            packets in proptest::collection::vec((0..7_usize, 0..200_usize, any::<bool>()), 1..6),
            step in 1..100_usize,
            stream in 1..u64::MAX,
        ) {
            let mut writer = PacketWriter::new(stream);
            let mut bytes = BytesMut::new();
            let packets: Vec<_> = packets
                .into_iter()
                .map(|(kind, length, is_long)| {
                    (Kind::ALL[kind], vec![7; if is_long { SPLIT * 2 + length } else { length }])
                })
                .collect();
            for (kind, data) in &packets {
                writer.write(*kind, data, &mut bytes);
            }
            let step = if bytes.len() > SPLIT { step * 1000 } else { step };
            let mut decoder = Decoder::new();
            let mut read = Vec::new();
            for piece in bytes.chunks(step) {
                decoder.extend(piece);
                while let Some(packet) = decoder.next().unwrap() {
                    prop_assert_eq!((packet.stream, packet.message), (stream, read.len() as u64 + 1));
                    read.push((packet.kind, packet.data.to_vec()));
                }
            }
            prop_assert_eq!(read, packets);
        }

        #[test]
        fn errors_survive(code: u64, text in ".{0,40}") {
            let body = ErrorBody { code, text };
            prop_assert_eq!(ErrorBody::decode(&body.encode()), Ok(body));
        }

        #[test]
        fn no_bytes_break_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::new();
            decoder.extend(&bytes);
            while let Ok(Some(_)) = decoder.next() {}
        }
    }
}
