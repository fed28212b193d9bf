//! The hand-off from HTTP to WebSocket: whatever a server answers, in whatever pieces; what stands behind the
//! head in the same segment belongs to the stream.
#![no_main]

use warren_actors::coordinator::fuzzing::{accept, hand_off};
use warren_fuzz::{
    Input,
    peer::{Manners, Step, meet},
};

warren_fuzz::target!(check);

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    let manners = Manners { closes: true, ..Manners::of(input.byte()) };
    let answer = match input.byte() & 1 {
        0 => input.rest().to_vec(),
        _ => [switch().as_slice(), input.rest()].concat(),
    };
    let in_one = Manners { cut: u8::MAX, ..manners };
    let talk = |manners| meet(vec![Step::Write(answer.clone())], manners, hand_off).0;
    let (read, error) = talk(manners);
    let (read_in_one, error_in_one) = talk(in_one);
    assert_eq!(read, read_in_one, "a stream means the same however it is cut");
    assert_eq!(error.is_some(), error_in_one.is_some(), "{error:?} {error_in_one:?}");
}

/// The head with which a server switches.
fn switch() -> Vec<u8> {
    let head = [
        "HTTP/1.1 101 Switching Protocols",
        "Connection: Upgrade",
        "Upgrade: websocket",
        &format!("Sec-WebSocket-Accept: {}", accept()),
        "",
        "",
    ];
    head.join("\r\n").into_bytes()
}
