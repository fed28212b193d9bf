//! DRPC from the server's side: frames to packets, and packets to frames (tailnet-control 2.4). Written
//! apart from warren's own codec on purpose: a mistake must not be on both ends.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use tokio::io::{AsyncWrite, AsyncWriteExt};

pub(crate) const INVOKE: u8 = 1;
pub(crate) const MESSAGE: u8 = 2;
pub(crate) const ERROR: u8 = 3;
pub(crate) const CANCEL: u8 = 4;
pub(crate) const CLOSE: u8 = 5;
pub(crate) const CLOSE_SEND: u8 = 6;
pub(crate) const INVOKE_METADATA: u8 = 7;

/// Bytes of a frame's data when a packet is cut.
const SPLIT: usize = 64 * 1024;
/// Bytes of the longest packet.
const MAX_PACKET: usize = 4 << 20;
/// Bytes of the longest varint.
const MAX_VARINT: usize = 10;

/// The transport breaks a rule and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Violation;

/// One packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) stream: u64,
    pub(crate) kind: u8,
    pub(crate) is_control: bool,
    pub(crate) data: Bytes,
}

/// Frames of one transport become packets.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) buffer: BytesMut,
    /// The least stream and message that may come next.
    least: (u64, u64),
    partial: Option<Partial>,
}

#[derive(Debug)]
struct Partial {
    id: (u64, u64),
    kind: u8,
    data: BytesMut,
}

impl Default for Reader {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), least: (1, 1), partial: None }
    }
}

impl Reader {
    /// The next packet, if it has arrived whole.
    pub(crate) fn next(&mut self) -> Result<Option<Packet>, Violation> {
        while let Some(frame) = self.frame()? {
            if frame.id < self.least {
                return Err(Violation);
            }
            self.least = frame.id;
            let partial = self.partial.take().filter(|partial| partial.id == frame.id);
            if partial.as_ref().is_some_and(|partial| partial.kind != frame.kind) {
                return Err(Violation);
            }
            let mut data = partial.map(|partial| partial.data).unwrap_or_default();
            if data.len() + frame.data.len() > MAX_PACKET {
                return Err(Violation);
            }
            if !frame.is_done {
                data.extend_from_slice(&frame.data);
                self.partial = Some(Partial { id: frame.id, kind: frame.kind, data });
                continue;
            }
            let (stream, message) = frame.id;
            self.least = (stream, message + 1);
            let data = if data.is_empty() {
                frame.data
            } else {
                data.extend_from_slice(&frame.data);
                data.freeze()
            };
            return Ok(Some(Packet { stream, kind: frame.kind, is_control: frame.is_control, data }));
        }
        Ok(None)
    }

    fn frame(&mut self) -> Result<Option<Frame>, Violation> {
        let mut rest = self.buffer.as_ref();
        let Some(control) = rest.split_off_first().copied() else { return Ok(None) };
        let mut numbers = [0; 3];
        for number in &mut numbers {
            match varint(&mut rest)? {
                Some(value) => *number = value,
                None => return Ok(None),
            }
        }
        let [stream, message, length] = numbers;
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_PACKET).ok_or(Violation)?;
        if rest.len() < length {
            return Ok(None);
        }
        let header = self.buffer.len() - rest.len();
        self.buffer.advance(header);
        Ok(Some(Frame {
            is_done: control & 0x01 != 0,
            kind: (control & 0x7e) >> 1,
            is_control: control & 0x80 != 0,
            id: (stream, message),
            data: self.buffer.split_to(length).freeze(),
        }))
    }
}

struct Frame {
    is_done: bool,
    kind: u8,
    is_control: bool,
    id: (u64, u64),
    data: Bytes,
}

fn varint(bytes: &mut &[u8]) -> Result<Option<u64>, Violation> {
    let mut value = 0_u64;
    for place in 0..MAX_VARINT {
        let Some(byte) = bytes.split_off_first() else { return Ok(None) };
        value |= u64::from(byte & 0x7f).checked_shl(7 * place as u32).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Ok(Some(value));
        }
    }
    Err(Violation)
}

/// What goes to the client on one transport.
pub(crate) struct Writer<W> {
    sink: W,
    stream: u64,
    message: u64,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(crate) fn new(sink: W) -> Self {
        Self { sink, stream: 0, message: 0 }
    }

    /// Answers a call from now on.
    pub(crate) fn begin(&mut self, stream: u64) {
        (self.stream, self.message) = (stream, 0);
    }

    pub(crate) async fn message(&mut self, message: &impl Message) -> io::Result<()> {
        self.packet(MESSAGE, &message.encode_to_vec()).await
    }

    pub(crate) async fn close(&mut self) -> io::Result<()> {
        self.packet(CLOSE, &[]).await
    }

    pub(crate) async fn error(&mut self, code: u64, text: &str) -> io::Result<()> {
        self.packet(ERROR, &[code.to_be_bytes().as_slice(), text.as_bytes()].concat()).await
    }

    pub(crate) async fn packet(&mut self, kind: u8, data: &[u8]) -> io::Result<()> {
        self.message += 1;
        let mut frames = BytesMut::with_capacity(data.len() + 64);
        let mut chunks = data.chunks(SPLIT).peekable();
        let mut next = chunks.next().or(Some(&[]));
        while let Some(chunk) = next {
            next = chunks.next();
            put_frame(
                &mut frames,
                (kind << 1) | u8::from(next.is_none()),
                (self.stream, self.message),
                chunk,
            );
        }
        self.sink.write_all(&frames).await?;
        self.sink.flush().await
    }

    /// What the frames are written to.
    pub(crate) fn raw(&mut self) -> &mut W {
        &mut self.sink
    }

    /// Ends the transport in this direction.
    pub(crate) async fn finish(&mut self) {
        let _ = self.sink.shutdown().await;
    }
}

/// Appends a frame.
pub(crate) fn put_frame(buffer: &mut BytesMut, control: u8, (stream, message): (u64, u64), data: &[u8]) {
    buffer.extend_from_slice(&[control]);
    for number in [stream, message, data.len() as u64] {
        let mut left = number;
        while left >= 0x80 {
            buffer.extend_from_slice(&[(left as u8) | 0x80]);
            left >>= 7;
        }
        buffer.extend_from_slice(&[left as u8]);
    }
    buffer.extend_from_slice(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_packets_are_read_in_whatever_pieces_they_come() {
        let stream = unhex("0301010a2f742e532f556e617279050102 0568656c6c6f0d010300");
        for step in [1, 3, 100] {
            let mut reader = Reader::default();
            let mut packets = Vec::new();
            for piece in stream.chunks(step) {
                reader.buffer.extend_from_slice(piece);
                while let Some(packet) = reader.next().unwrap() {
                    packets.push((packet.kind, packet.data));
                }
            }
            let expected = [(INVOKE, "/t.S/Unary"), (MESSAGE, "hello"), (CLOSE_SEND, "")];
            assert_eq!(packets, expected.map(|(kind, data)| (kind, Bytes::from(data))));
        }
    }

    #[test]
    fn broken_rules_end_the_transport() {
        let frame = |control: u8, id: (u64, u64), data: &[u8]| {
            let mut buffer = BytesMut::new();
            put_frame(&mut buffer, control, id, data);
            buffer
        };
        let cases = [
            ("stream id 0", vec![frame(3, (0, 1), b"x")]),
            ("an id that goes down", vec![frame(5, (1, 5), b""), frame(5, (1, 4), b"")]),
            ("an id used twice", vec![frame(5, (1, 5), b""), frame(5, (1, 5), b"")]),
            ("another kind inside a packet", vec![frame(4, (1, 1), b"a"), frame(3, (1, 1), b"b")]),
            ("an older stream", vec![frame(3, (2, 1), b""), frame(5, (1, 9), b"")]),
            ("a packet over the limit", vec![frame(4, (1, 1), &vec![0; MAX_PACKET]), frame(5, (1, 1), b"x")]),
        ];
        for (name, frames) in cases {
            let mut reader = Reader::default();
            frames.iter().for_each(|frame| reader.buffer.extend_from_slice(frame));
            let end = std::iter::from_fn(|| reader.next().transpose()).find_map(Result::err);
            assert_eq!(end, Some(Violation), "{name}");
        }
    }

    #[test]
    fn a_higher_id_drops_the_partial_packet_and_the_longest_packet_passes() {
        let mut reader = Reader::default();
        put_frame(&mut reader.buffer, 4, (1, 1), b"lost");
        put_frame(&mut reader.buffer, 5, (1, 2), b"kept");
        assert_eq!(reader.next().unwrap().unwrap().data, "kept");
        put_frame(&mut reader.buffer, 5, (1, 3), &vec![0; MAX_PACKET]);
        assert_eq!(reader.next().unwrap().unwrap().data.len(), MAX_PACKET);
    }

    #[tokio::test]
    async fn long_packets_are_cut_as_recorded() {
        let mut writer = Writer::new(Vec::new());
        writer.begin(1);
        writer.error(12, "Unimplemented").await.unwrap();
        assert_eq!(writer.sink, unhex("07010115000000000000000c556e696d706c656d656e746564"));
        writer.sink.clear();
        writer.packet(MESSAGE, &vec![0; 150_000]).await.unwrap();
        assert!(writer.sink.starts_with(&unhex("040102808004")));
        assert_eq!(writer.sink[2 * (65_536 + 6)..][..6], unhex("050102f09301")[..]);
    }

    fn unhex(digits: &str) -> Vec<u8> {
        let digits: String = digits.split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }
}
