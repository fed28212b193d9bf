//! TSMP, and the inner packets that the data plane reads and answers.
#![no_main]

use std::net::Ipv6Addr;

use warren_actors::data_plane::fuzzing::inner;
use warren_fuzz::Input;
use warren_proto::tsmp::{Message, PROTOCOL};

warren_fuzz::target!(check);

const ICMPV6: u8 = 58;
const HEADER: usize = 40;

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() {
        0 => packet(input.rest()),
        1 => packet(&between(PROTOCOL, input.rest())),
        2 => packet(&between(ICMPV6, input.rest())),
        _ => payload(input.rest()),
    }
}

fn payload(payload: &[u8]) {
    let Some(message) = Message::decode(payload) else { return };
    assert_eq!(Message::decode(&message.encode()), Some(message));
    let longer = [payload, &[0; 1]].concat();
    assert!(Message::decode(&longer).is_some(), "payloads may be longer than is known");
}

fn packet(packet: &[u8]) {
    let it = inner(packet);
    let Some((source, destination)) = it.ends else {
        return assert_eq!((it.pong, it.echo), (None, None));
    };
    for answer in [it.pong.clone(), it.echo.clone()].into_iter().flatten() {
        let again = inner(&answer);
        assert_eq!(again.ends, Some((destination, source)), "an answer goes back");
        assert_eq!((again.pong, again.echo), (None, None), "no answer is answered");
        let length = usize::from(u16::from_be_bytes([answer[4], answer[5]]));
        assert_eq!(length, answer.len() - HEADER);
    }
    if let Some(echo) = it.echo.filter(|echo| echo[6] == ICMPV6) {
        assert_eq!(echo[44..], packet[44..]);
        assert_eq!(sum(destination, source, &echo[HEADER..]), 0xffff, "the checksum is right");
    }
}

fn between(next_header: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, next_header, 64];
    packet.extend((0x40..0x60_u8).map(|byte| byte.rotate_left(3)));
    packet.extend(body);
    packet
}

/// The ones' complement sum of an ICMPv6 message and its pseudo header, told another way than ours is.
fn sum(from: Ipv6Addr, to: Ipv6Addr, body: &[u8]) -> u32 {
    let length = u32::try_from(body.len()).expect("a packet").to_be_bytes();
    let all = [&from.octets(), &to.octets(), &length[..], &[0, 0, 0, ICMPV6], body].concat();
    all.chunks(2).fold(0, |sum, pair| {
        let sum = sum + (u32::from(pair[0]) << 8) + u32::from(pair.get(1).copied().unwrap_or(0));
        (sum & 0xffff) + (sum >> 16)
    })
}
