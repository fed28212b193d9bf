//! DRPC: the bytes of a transport cut anyhow, and packets of any kind and length written and read.
#![no_main]

use bytes::BytesMut;
use warren_fuzz::{Input, lengths};
use warren_proto::drpc::{Decoder, DrpcError, ErrorBody, Kind, MAX_PACKET, Packet, PacketWriter};

warren_fuzz::target!(check);

const KINDS: [Kind; 7] = [
    Kind::Invoke,
    Kind::Message,
    Kind::Error,
    Kind::Cancel,
    Kind::Close,
    Kind::CloseSend,
    Kind::InvokeMetadata,
];

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    let seed = input.byte();
    if seed & 0x80 == 0 { transport(seed, input.rest()) } else { packets(seed, input) }
}

/// What a peer sends.
fn transport(seed: u8, stream: &[u8]) {
    let (packets, error) = read(stream, || usize::MAX);
    assert_eq!(
        read(stream, lengths(seed)),
        (packets.clone(), error),
        "a stream means the same however it is cut"
    );
    let ids = packets.iter().map(|packet| (packet.stream, packet.message));
    assert!(ids.clone().zip(ids.skip(1)).all(|(id, next)| id < next), "ids go up");
    for packet in packets {
        assert!(packet.data.len() <= MAX_PACKET);
        let mut out = BytesMut::new();
        PacketWriter::new(packet.stream.max(1)).write(packet.kind, &packet.data, &mut out);
        let (again, error) = read(&out, || usize::MAX);
        assert_eq!((error, again.len()), (None, 1));
        assert_eq!((again[0].kind, &again[0].data), (packet.kind, &packet.data));
        if let Ok(body) = ErrorBody::decode(&packet.data) {
            assert_eq!(ErrorBody::decode(&body.encode()), Ok(body));
        } else {
            assert!(packet.data.len() < 8);
        }
    }
}

/// What we send.
fn packets(seed: u8, mut input: Input<'_>) {
    let stream = u64::from(input.byte()) << (seed & 0x38) | 1;
    let (mut writer, mut out, mut written) = (PacketWriter::new(stream), BytesMut::new(), Vec::new());
    while !input.is_empty() && out.len() < MAX_PACKET / 4 {
        let kind = KINDS[usize::from(input.byte()) % KINDS.len()];
        let data = vec![input.byte(); input.number() * 5];
        writer.write(kind, &data, &mut out);
        written.push((kind, data));
    }
    let (packets, error) = read(&out, || 4096);
    assert_eq!(error, None);
    for (index, packet) in packets.iter().enumerate() {
        assert_eq!((packet.stream, packet.message), (stream, index as u64 + 1));
    }
    let packets: Vec<_> = packets.into_iter().map(|packet| (packet.kind, packet.data.to_vec())).collect();
    assert!(packets == written, "packets are read as they were written");
}

fn read(mut stream: &[u8], mut length: impl FnMut() -> usize) -> (Vec<Packet>, Option<DrpcError>) {
    let (mut decoder, mut packets) = (Decoder::new(), Vec::new());
    while !stream.is_empty() {
        let (piece, rest) = stream.split_at(length().min(stream.len()));
        decoder.extend(piece);
        stream = rest;
        loop {
            match decoder.next() {
                Ok(Some(packet)) => packets.push(packet),
                Ok(None) => break,
                Err(error) => return (packets, Some(error)),
            }
        }
    }
    (packets, None)
}
