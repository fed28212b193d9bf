//! Frames of all four kinds of messages: cut anyhow, weighed before they are unpacked, written again.
#![no_main]

use std::fmt::Debug;

use warren_actors::speaker::SpeakerMessage;
use warren_fuzz::{Input, lengths, limits};
use warren_proto::{
    frame::{self, Decoder, FrameError},
    vpn,
};

warren_fuzz::target!(check);

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.byte();
    match kind & 3 {
        0 => read_twice::<vpn::ManagerMessage>(kind >> 2, input.rest()),
        1 => read_twice::<vpn::TunnelMessage>(kind >> 2, input.rest()),
        2 => read_twice::<vpn::ClientMessage>(kind >> 2, input.rest()),
        _ => read_twice::<vpn::ServiceMessage>(kind >> 2, input.rest()),
    }
}

type Read<M> = (Vec<M>, Option<FrameError>, bool);

fn read_twice<M: SpeakerMessage + Clone + Debug + PartialEq>(seed: u8, stream: &[u8]) {
    let whole: Read<M> = read(stream, || usize::MAX);
    assert_eq!(read(stream, lengths(seed)), whole, "a stream means the same however it is cut");
    let (messages, error, is_between) = whole;
    if error.is_none() && is_between {
        let taken: usize = frames(stream);
        assert_eq!(taken, messages.len(), "every frame is one message");
    }
    for message in messages {
        match frame::encode(&message) {
            Ok(bytes) => {
                let (again, error, is_between) = read::<M>(&bytes, || usize::MAX);
                assert_eq!((again, error, is_between), (vec![message], None, true));
            }
            Err(error) => assert_eq!((error, message.encoded_len()), (FrameError::Empty, 0)),
        }
    }
}

fn read<M: SpeakerMessage>(mut stream: &[u8], mut length: impl FnMut() -> usize) -> Read<M> {
    let (mut decoder, mut messages) = (Decoder::new(M::LIMITS.frame), Vec::new());
    while !stream.is_empty() {
        let (piece, rest) = stream.split_at(length().min(stream.len()));
        decoder.extend(piece);
        stream = rest;
        loop {
            let unpacked = match decoder.next_payload() {
                Ok(None) => break,
                Ok(Some(payload)) => {
                    let weight = M::SHAPE.weigh(&payload);
                    let kept = payload.clone();
                    let before = limits::held();
                    let message = frame::unpack(payload);
                    let held = limits::held() - before;
                    drop(kept);
                    assert!(held <= weight + limits::SLACK, "{held} bytes are held, {weight} were weighed");
                    message
                }
                Err(error) => Err(error),
            };
            match unpacked {
                Ok(message) => messages.push(message),
                Err(error) => return (messages, Some(error), false),
            }
        }
    }
    let is_between = decoder.is_between_frames();
    (messages, None, is_between)
}

/// How many frames there are, told another way.
fn frames(mut stream: &[u8]) -> usize {
    let mut count = 0;
    while let Some((length, rest)) = stream.split_first_chunk() {
        stream = &rest[u32::from_be_bytes(*length) as usize..];
        count += 1;
    }
    count
}
