//! A control connection with any peer: WebSocket, yamux, DRPC and the messages in it, in the order and at the
//! times that the input says.
#![no_main]

use std::time::Duration;

use bytes::BytesMut;
use warren_actors::coordinator::fuzzing::talk;
use warren_fuzz::{
    Input,
    peer::{MAX_STEPS, Manners, Step, meet},
};
use warren_proto::drpc::{Kind, PacketWriter};

warren_fuzz::target!(check);

/// Those that our end opens, in the order of its calls.
const STREAMS: [u32; 4] = [1, 3, 5, 7];
const KINDS: [Kind; 8] = [
    Kind::Message,
    Kind::Invoke,
    Kind::Error,
    Kind::Cancel,
    Kind::Close,
    Kind::CloseSend,
    Kind::InvokeMetadata,
    Kind::Message,
];

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    let manners = Manners::of(input.byte());
    let (ends, _) = meet(script(input), manners, talk);
    assert!(!ends.is_empty());
    for end in ends {
        assert!(end.len() < 4096 && !end.contains(['\n', '\x1b']), "{end:?}");
    }
}

fn script(mut input: Input<'_>) -> Vec<Step> {
    let mut writers = STREAMS.map(|_| PacketWriter::new(1));
    let mut script = Vec::new();
    while !input.is_empty() && script.len() < MAX_STEPS {
        let what = input.byte();
        let call = usize::from(what >> 3 & 3);
        let stream = STREAMS[call];
        script.push(match what & 7 {
            0 => Step::Write(input.chunk().to_vec()),
            1 => message(2, input.chunk()),
            2 => message(9, input.bytes(usize::from(what >> 1))),
            3 => Step::Wait(Duration::from_secs(u64::from(input.byte()))),
            4 => {
                let (kind, flags) = (input.byte(), input.byte());
                let number = u32::from(input.byte()) << (kind & 0x18);
                message(2, &yamux(kind & 7, flags, stream ^ u32::from(what >> 5), number))
            }
            5 => data(stream, input.chunk()),
            // With a message that the call expects, or none.
            other => {
                let kind = KINDS[usize::from(if other == 6 { 0 } else { what >> 5 })];
                let mut out = BytesMut::new();
                writers[call].write(kind, input.chunk(), &mut out);
                data(stream, &out)
            }
        });
    }
    script
}

fn data(stream: u32, bytes: &[u8]) -> Step {
    let length = u32::try_from(bytes.len()).expect("not more than there was input");
    message(2, &[yamux(0, 0, stream, length).as_slice(), bytes].concat())
}

fn yamux(kind: u8, flags: u8, stream: u32, number: u32) -> [u8; 12] {
    let mut header = [0, kind, 0, flags, 0, 0, 0, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&stream.to_be_bytes());
    header[8..].copy_from_slice(&number.to_be_bytes());
    header
}

/// A whole WebSocket message of this opcode.
fn message(opcode: u8, payload: &[u8]) -> Step {
    let length = payload.len();
    let head = match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ 0..126), _) => vec![0x80 | opcode, short],
        (_, Ok(long)) => [&[0x80 | opcode, 126], long.to_be_bytes().as_slice()].concat(),
        _ => [&[0x80 | opcode, 127], (length as u64).to_be_bytes().as_slice()].concat(),
    };
    Step::Write([head.as_slice(), payload].concat())
}
