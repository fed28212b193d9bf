//! What a relay, or whoever stands before it, can do to a tunnel.

use std::{io::Write, net::TcpStream, time::Duration};

use super::{
    Scene,
    crook::{self, Prey},
};

/// The crook spoils connections to the relay; the fault is named, and once the crook repents agents are pinged.
#[track_caller]
fn spoilt(words: &[&str], deed: impl Fn(&mut TcpStream, &mut TcpStream) + Send + Sync + 'static) {
    let scene = Scene::up(1);
    scene.crook.spoil(Prey::Relay, deed);
    scene.deployment.lab.relay().kill_connections();
    scene.relay_error(words);
    scene.has_stood();
    scene.crook.repent();
    scene.is_whole_again();
}

#[test]
fn garbage_instead_of_a_greeting_is_named() {
    spoilt(&["relay"], |client, _| crook::flood(client, &[0xa5, 0x5a, 0x01], 1));
}

#[test]
fn a_frame_without_end_is_refused_and_costs_no_memory() {
    let frame = [&[1][..], &u32::MAX.to_be_bytes()].concat();
    spoilt(&[], move |client, _| {
        let _ = client.write_all(&frame);
        crook::flood(client, &[0], 256);
    });
}

#[test]
fn a_relay_that_lies_about_its_key_is_not_logged_in_to() {
    // The greeting is magic and key: its last byte is another's.
    spoilt(&[], |client, server| {
        crook::pass_only(server, client, 5 + 8 + 31);
        let mut last = [0];
        let _ = std::io::Read::read_exact(server, &mut last);
        let _ = client.write_all(&[last[0] ^ 1]);
        crook::pass(server, client);
    });
}

#[test]
fn a_login_that_drips_is_given_up() {
    spoilt(&["10 seconds"], |client, server| crook::drip(server, client, Duration::from_secs(1)));
}

#[test]
fn a_relay_that_goes_silent_after_its_greeting_is_given_up() {
    spoilt(&["10 seconds"], |client, server| {
        crook::pass_only(server, client, 5 + 8 + 32);
        crook::hold();
    });
}

#[test]
fn a_relay_that_ends_in_the_middle_of_a_frame_is_dialled_again() {
    spoilt(&[], |client, server| crook::pass_only(server, client, 60));
}

#[test]
fn what_a_relay_says_twice_does_no_harm() {
    let scene = Scene::up(1);
    scene.crook.spoil(Prey::Relay, |client, server| {
        // The login may come once only.
        crook::pass_only(server, client, 5 + 8 + 32);
        crook::repeat(server, client);
    });
    scene.deployment.lab.relay().kill_connections();
    scene.is_pinged_again();
    scene.crook.repent();
    scene.is_whole_again();
}

#[test]
fn packets_from_keys_that_are_nobodys_or_anothers_change_nothing() {
    let scene = Scene::up(2);
    let relay = scene.deployment.lab.relay();
    let keys: Vec<[u8; 32]> = relay.clients().iter().map(|key| *key.as_bytes()).collect();
    for key in keys.iter().chain([&[0; 32], &[0xff; 32]]) {
        for payload in [&[][..], &[0; 1], &[1, 0, 0, 0], &[4; 32], &[0xff; 1400], b"TS\xf0\x9f\x92\xac"] {
            relay.inject(5, &[&key[..], payload].concat());
        }
        relay.inject(8, key);
        relay.inject(8, &[&key[..], &[0xff]].concat());
    }
    // Health, restarting soon and unknown kinds, each too short or too long.
    for (kind, body) in
        [(20, vec![0xff; 4000]), (20, vec![]), (21, vec![0; 3]), (200, vec![7; 60_000]), (6, vec![])]
    {
        relay.inject(kind, &body);
    }
    scene.is_pinged_again();
    scene.is_whole_again();
}

#[test]
fn a_flood_of_packets_from_strangers_costs_no_memory() {
    let scene = Scene::up(1);
    let relay = scene.deployment.lab.relay();
    for number in 0..200_000_u32 {
        let stranger = [&number.to_be_bytes()[..], &[9; 28]].concat();
        relay.inject(5, &[&stranger[..], &[1, 0, 0, 0], &[0; 144]].concat());
    }
    scene.is_pinged_again();
    scene.is_whole_again();
}
