//! Path probes: packets as they come, and whatever a peer may have sealed.
#![no_main]

use std::sync::LazyLock;

use warren_fuzz::Input;
use warren_proto::{
    disco::{DiscoError, Message, PADDED, is_probe, open, seal, sender},
    key::{BoxShared, DiscoPrivate, DiscoPublic},
};

warren_fuzz::target!(check);

static SENDER: LazyLock<DiscoPublic> = LazyLock::new(|| DiscoPrivate::from_bytes([1; 32]).public());
static SHARED: LazyLock<BoxShared> = LazyLock::new(|| DiscoPrivate::from_bytes([2; 32]).shared(&SENDER));

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() & 1 {
        0 => packet(input.rest()),
        _ => plaintext(input.rest()),
    }
}

fn packet(packet: &[u8]) {
    let opened = open(packet, &SHARED);
    assert!(sender(packet).is_some() || !is_probe(packet));
    if opened != Err(DiscoError::Sealed) {
        assert!(is_probe(packet), "only a probe opens");
        // One bit, anywhere in what is sealed.
        let mut changed = packet.to_vec();
        let last = changed.len() - 1;
        changed[last] ^= 1;
        assert_eq!(open(&changed, &SHARED), Err(DiscoError::Sealed));
    }
}

fn plaintext(plaintext: &[u8]) {
    let Ok(message) = Message::decode(plaintext) else { return };
    let mut written = Vec::new();
    message.encode(&mut written);
    assert_eq!(Message::decode(&written), Ok(message.clone()));
    let packet = seal(&message, &SENDER, &SHARED, &[3; 24]);
    assert!(packet.len() == PADDED || matches!(message, Message::CallMeMaybe(_)));
    assert_eq!(sender(&packet), Some(*SENDER));
    assert_eq!(open(&packet, &SHARED), Ok(message));
    assert_eq!(open(&packet[..packet.len() - 1], &SHARED), Err(DiscoError::Sealed));
}
