//! STUN: any packet as a question and as an answer.
#![no_main]

use warren_proto::stun::{REQUEST, Response, StunError, is_stun, read_request, request};

warren_fuzz::target!(check);

fn check(packet: &[u8]) {
    let (asked, answered) = (read_request(packet), Response::decode(packet));
    assert!(is_stun(packet) || (asked, answered) == (Err(StunError::NotStun), Err(StunError::NotStun)));
    assert!(asked.is_err() || answered.is_err(), "no packet is both");
    // What is behind the declared length is no part of the message.
    let longer = [packet, &[0x20, 0, 0, 0xff]].concat();
    if let Ok(txid) = asked {
        assert_eq!(read_request(&request(&txid)), Ok(txid));
        assert_eq!(request(&txid).len(), REQUEST);
        assert_eq!(read_request(&longer), asked);
    }
    if let Ok(response) = answered {
        assert_eq!(Response::decode(&response.encode()), Ok(response));
        assert_eq!(Response::decode(&longer), answered);
        let cut = &packet[..packet.len().min(20)];
        assert!(Response::decode(cut).is_err(), "there is no address in a header");
    }
}
