//! Frames: a length (u32, big-endian) and that many bytes of one encoded message (vpn-protocol 3).

use bytes::{Buf, BufMut, Bytes, BytesMut};
/// What can be framed.
pub use prost::Message;

/// Bytes of the largest payload, inclusive, that the CoderVPN protocol allows.
pub const MAX_FRAME: usize = 16 * 1024 * 1024;

/// Bytes of the length in front of a payload.
pub const PREFIX: usize = 4;

/// Why a frame cannot be written or read. A reader cannot go on after any of these.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FrameError {
    /// The message encodes to nothing: peers exist that end the connection at an empty frame.
    #[error("an empty message is never sent")]
    Empty,
    /// The payload is larger than the limit.
    #[error("a frame of {length} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Bytes of the payload.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The payload would take more than the limit once it is unpacked.
    #[error("a frame that unpacks to {weight} bytes exceeds the limit of {limit}")]
    TooHeavy {
        /// Bytes it would take.
        weight: usize,
        /// The limit.
        limit: usize,
    },
    /// The payload is not such a message.
    #[error("undecodable frame: {0}")]
    Malformed(prost::DecodeError),
}

/// The frame of a message, as one buffer, at most [`MAX_FRAME`].
pub fn encode<M: Message>(message: &M) -> Result<Bytes, FrameError> {
    encode_within(message, MAX_FRAME)
}

/// The frame of a message, as one buffer, under another limit.
pub fn encode_within<M: Message>(message: &M, limit: usize) -> Result<Bytes, FrameError> {
    let length = message.encoded_len();
    if length == 0 {
        return Err(FrameError::Empty);
    }
    let too_long = FrameError::TooLong { length, limit };
    let prefix = u32::try_from(length).ok().filter(|_| length <= limit).ok_or(too_long)?;
    let mut frame = BytesMut::with_capacity(PREFIX + length);
    frame.put_u32(prefix);
    message.encode_raw(&mut frame);
    Ok(frame.freeze())
}

/// The message of a payload.
pub fn unpack<M: Message + Default>(payload: Bytes) -> Result<M, FrameError> {
    M::decode(payload).map_err(FrameError::Malformed)
}

/// Turns bytes as they arrive into messages. Memory grows with what has arrived, never with what a
/// length announces.
#[derive(Debug)]
pub struct Decoder {
    limit: usize,
    buffer: BytesMut,
}

impl Decoder {
    /// A decoder that accepts payloads of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, buffer: BytesMut::new() }
    }

    /// Takes bytes as they arrived.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, `None` until more bytes have arrived. An empty frame is an empty message. After
    /// an error the stream has lost its frame borders and is of no further use.
    #[expect(clippy::should_implement_trait, reason = "each call says which message it expects")]
    pub fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        self.next_payload()?.map(unpack).transpose()
    }

    /// The next payload as it was sent, for [`unpack`]; `None` until more bytes have arrived.
    pub fn next_payload(&mut self) -> Result<Option<Bytes>, FrameError> {
        let Some((prefix, arrived)) = self.buffer.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if length > self.limit {
            return Err(FrameError::TooLong { length, limit: self.limit });
        }
        if arrived.len() < length {
            return Ok(None);
        }
        self.buffer.advance(PREFIX);
        let payload = self.buffer.split_to(length).freeze();
        if self.buffer.is_empty() {
            // The room of a large frame is given back rather than kept for the life of the connection.
            self.buffer = BytesMut::new();
        }
        Ok(Some(payload))
    }

    /// Whether no frame has begun: where a stream may end in order.
    pub fn is_between_frames(&self) -> bool {
        self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vpn;

    fn log(text: &str) -> vpn::TunnelMessage {
        let log = vpn::Log { message: text.to_owned(), ..Default::default() };
        vpn::TunnelMessage { rpc: None, msg: Some(vpn::tunnel_message::Msg::Log(log)) }
    }

    /// Conforms: vpn:W2 vpn:16.2.4
    #[test]
    fn nothing_empty_and_nothing_over_the_limit_is_encoded() {
        assert_eq!(encode(&vpn::TunnelMessage::default()), Err(FrameError::Empty));
        let error = encode(&log(&"x".repeat(MAX_FRAME))).unwrap_err().to_string();
        assert_eq!(error, "a frame of 16777226 bytes exceeds the limit of 16777216");
        let message = log("hello");
        let length = message.encoded_len();
        assert!(encode_within(&message, length).is_ok());
        let limit = length - 1;
        assert_eq!(encode_within(&message, limit), Err(FrameError::TooLong { length, limit }));
    }

    /// Conforms: vpn:W3
    #[test]
    fn a_length_over_the_limit_is_refused_before_its_body_arrives() {
        let mut decoder = Decoder::new(MAX_FRAME);
        decoder.extend(&[0x01, 0x00, 0x00, 0x00]);
        assert_eq!(decoder.next::<vpn::ManagerMessage>(), Ok(None));
        let mut decoder = Decoder::new(MAX_FRAME);
        decoder.extend(&[0x01, 0x00, 0x00, 0x01]);
        let error = FrameError::TooLong { length: MAX_FRAME + 1, limit: MAX_FRAME };
        assert_eq!(decoder.next::<vpn::ManagerMessage>(), Err(error));
    }

    #[test]
    fn an_announced_length_reserves_nothing() {
        let mut decoder = Decoder::new(MAX_FRAME);
        decoder.extend(&[0x01, 0x00, 0x00, 0x00, 0xff]);
        assert_eq!(decoder.next::<vpn::ManagerMessage>(), Ok(None));
        assert!(decoder.buffer.capacity() < 1024, "{}", decoder.buffer.capacity());
    }

    /// Conforms: vpn:W5
    #[test]
    fn a_frame_of_one_zero_byte_is_refused_in_the_words_of_the_decoder() {
        let mut decoder = Decoder::new(MAX_FRAME);
        decoder.extend(&[0, 0, 0, 1, 0]);
        let Err(FrameError::Malformed(inner)) = decoder.next::<vpn::TunnelMessage>() else {
            panic!("a zero byte was decoded")
        };
        assert_eq!(FrameError::Malformed(inner.clone()).to_string(), format!("undecodable frame: {inner}"));
    }

    #[test]
    fn an_empty_frame_is_an_empty_message_and_zero_bytes_are_none() {
        let mut decoder = Decoder::new(MAX_FRAME);
        decoder.extend(&[0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(decoder.next(), Ok(Some(vpn::ManagerMessage::default())));
        assert!(matches!(decoder.next::<vpn::ManagerMessage>(), Err(FrameError::Malformed(_))));
    }

    proptest! {
        /// Conforms: vpn:W1 vpn:S3
        #[test]
        fn frames_survive_any_cutting(texts in proptest::collection::vec(".{0,40}", 1..6), step in 1_usize..50) {
            let messages: Vec<_> = texts.iter().map(|text| log(text)).collect();
            let bytes: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
            let mut decoder = Decoder::new(MAX_FRAME);
            let mut read = Vec::new();
            for piece in bytes.chunks(step) {
                decoder.extend(piece);
                while let Some(message) = decoder.next::<vpn::TunnelMessage>().unwrap() {
                    read.push(message);
                }
            }
            prop_assert_eq!(read, messages);
            prop_assert!(decoder.is_between_frames());
        }

        #[test]
        fn no_bytes_break_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::new(200);
            decoder.extend(&bytes);
            while let Ok(Some(_)) = decoder.next::<vpn::ManagerMessage>() {}
        }
    }
}
