//! Two data planes and a small relay between them, in one process.

use std::{
    net::{Ipv4Addr, UdpSocket as StdUdpSocket},
    os::unix::net::UnixDatagram as StdUnixDatagram,
    sync::atomic::{AtomicBool, AtomicUsize},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket, UnixDatagram},
    sync::{broadcast, mpsc},
    time::timeout,
};
use uuid::Uuid;
use warren_core::{coordination, path::RelayStands, relay_map::Node};
use warren_proto::{key::random, stun::Response};

use super::*;
use crate::{
    apart::skipped,
    dial::DialOptions,
    facts::RelayLink,
    relay::upgrade::Upgrades,
    udp::{MakeSockets, SocketsFuture},
};

const LIMIT: Duration = Duration::from_secs(20);
const REGION: RegionId = RegionId(999);
/// An IPv6 header, a type, 8 bytes of the ping, a port.
const TSMP_PONG: u64 = 40 + 1 + 8 + 2;

/// Conforms: data:20.2.1
#[tokio::test]
async fn two_peers_shake_hands_at_once_and_talk_both_ways() {
    let world = World::new().await;
    let (mut a, mut b) = (world.side(1), world.side(2));
    world.join(&a, &b);
    a.hear_handshake().await;
    b.hear_handshake().await;
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 100));
    b.device.send(&packet(&b, &a, 1280)).await.unwrap();
    assert_eq!(a.read_packet().await, packet(&b, &a, 1280));
    let stats = a.plane.stats()[&b.key];
    assert!(stats.last_handshake.is_some());
    assert_eq!((stats.sent_bytes, stats.received_bytes), (100, 1280));
}

/// In real time: WireGuard's own clock renews keys after 120 s. What a loaded machine adds is what a sleep
/// takes too long.
///
/// Conforms: data:20.2.10
#[tokio::test]
async fn keys_are_renewed_after_two_minutes_without_a_stall_in_either_direction() {
    const RENEWED: Duration = Duration::from_secs(120);
    const TICK: Duration = Duration::from_millis(20);
    let world = World::new().await;
    let (mut a, mut b) = (world.side(1), world.side(2));
    world.join(&a, &b);
    a.hear_handshake().await;
    b.hear_handshake().await;
    let handshake = |a: &Side, b: &Side| a.plane.stats()[&b.key].last_handshake.unwrap();
    let (first, begun) = (handshake(&a, &b), Instant::now());
    let (mut longest, mut overslept) = (Duration::ZERO, Duration::ZERO);
    while begun.elapsed() < RENEWED + Duration::from_secs(8) {
        let sent = Instant::now();
        a.device.send(&packet(&a, &b, 500)).await.unwrap();
        assert_eq!(b.read_packet().await, packet(&a, &b, 500));
        b.device.send(&packet(&b, &a, 900)).await.unwrap();
        assert_eq!(a.read_packet().await, packet(&b, &a, 900));
        longest = longest.max(sent.elapsed());
        let slept = Instant::now();
        tokio::time::sleep(TICK).await;
        overslept = overslept.max(slept.elapsed().saturating_sub(TICK));
    }
    let renewed = handshake(&a, &b).duration_since(first).unwrap();
    assert!(renewed >= RENEWED - Duration::from_secs(1), "keys were renewed after {renewed:?}");
    assert!(longest < Duration::from_secs(1) + 4 * overslept, "{longest:?} and {overslept:?}");
}

#[tokio::test]
async fn a_handshake_that_found_no_link_starts_when_the_link_is_up() {
    let world = World::new().await;
    let (mut a, b) = (world.side(1), world.side(2));
    let (map_a, map_b) = (network(&[&b], true), network(&[&a], false));
    a.plane.set_peers(&map_a);
    b.plane.set_peers(&map_b);
    b.plane.ensure_link(world.target());
    b.hear_link_up().await;
    a.plane.ensure_link(world.target());
    a.hear_handshake().await;
}

#[tokio::test]
async fn a_packet_without_a_session_waits_for_the_handshake_it_starts() {
    let world = World::new().await;
    let (a, mut b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    for len in [100, 200, 300] {
        a.device.send(&packet(&a, &b, len)).await.unwrap();
    }
    for len in [100, 200, 300] {
        assert_eq!(b.read_packet().await, packet(&a, &b, len));
    }
}

/// What is left of the device's 1280 bytes behind the headers of IPv6 and UDP.
///
/// Conforms: control:D11
#[tokio::test]
async fn a_datagram_of_1232_bytes_is_echoed() {
    let world = World::new().await;
    let (mut a, mut b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    for _ in 0..10 {
        a.device.send(&packet(&a, &b, 40 + 8 + 1232)).await.unwrap();
        assert_eq!(b.read_packet().await, packet(&a, &b, 1280));
        b.device.send(&packet(&b, &a, 1280)).await.unwrap();
        assert_eq!(a.read_packet().await, packet(&b, &a, 1280));
    }
}

#[tokio::test]
async fn packets_that_waited_for_a_session_count_as_sent() {
    let world = World::new().await;
    let (mut a, mut b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    for _ in 0..3 {
        a.device.send(&packet(&a, &b, 96)).await.unwrap();
    }
    for _ in 0..3 {
        b.read_packet().await;
    }
    // Its last answer has come: what was drained before has been counted.
    b.device.send(&packet(&b, &a, 100)).await.unwrap();
    a.read_packet().await;
    assert_eq!(a.plane.stats()[&b.key].sent_bytes, 3 * 96);
}

#[tokio::test]
async fn a_ping_is_answered_with_a_pong_that_names_the_region() {
    let world = World::new().await;
    let (mut a, b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    a.plane.send_ping(b.key, [7; 12]).unwrap();
    let pong = a.hear_pong().await;
    assert_eq!((pong.peer, pong.txid, pong.region), (b.key, [7; 12], Some(REGION)));
    assert_eq!(a.plane.send_ping(NodePublic([1; 32]), [7; 12]), Err(PingUnsent::UnknownPeer));
    a.plane.close_link(REGION);
    assert_eq!(a.plane.send_ping(b.key, [7; 12]), Err(PingUnsent::NoLink));
}

#[tokio::test]
async fn a_ping_from_a_disco_key_that_is_not_the_peers_gets_no_answer() {
    let world = World::new().await;
    let (mut a, mut b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    let mut map = network(&[&a], false);
    map.peers.values_mut().for_each(|peer| peer.disco_key = DiscoPrivate::generate().public());
    b.plane.set_peers(&map);
    a.plane.send_ping(b.key, [1; 12]).unwrap();
    // A pong would come before this answer.
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    b.read_packet().await;
    b.device.send(&packet(&b, &a, 100)).await.unwrap();
    a.read_packet().await;
    assert!(a.pong.try_recv().is_err());
}

#[tokio::test]
async fn a_broken_link_is_dialled_again_and_no_session_is_lost() {
    let world = World::new().await;
    let (mut a, mut b) = (world.side(1), world.side(2));
    world.join(&a, &b);
    a.hear_handshake().await;
    b.hear_handshake().await;
    for _ in 0..3 {
        a.forget_events();
        b.forget_events();
        world.relay.cut();
        a.hear_link_up().await;
        b.hear_link_up().await;
        a.device.send(&packet(&a, &b, 100)).await.unwrap();
        assert_eq!(b.read_packet().await, packet(&a, &b, 100));
    }
    assert_eq!(a.handshakes() + b.handshakes(), 0, "after the first ones");
}

#[tokio::test]
async fn a_relay_that_went_silent_is_replaced_while_in_use() {
    let world = World::new().await;
    let (mut a, b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    a.forget_events();
    world.relay.fall_silent();
    a.plane.send_ping(b.key, [1; 12]).unwrap();
    a.hear_link_up().await;
    b.plane.probe_links();
}

/// Each sends by the other's home region, and only what comes shows that its own is there.
#[tokio::test]
async fn the_relay_by_which_answers_come_is_watched_too_although_nothing_is_sent_through_it() {
    const HOME: RegionId = RegionId(1);
    let (world, home) = (World::new().await, Relay::start().await);
    let (mut a, mut b) = (world.side(1), world.side(2));
    for side in [&a, &b] {
        for target in [world.target(), home.target(HOME)] {
            side.plane.ensure_link(target);
            side.hear_link_up().await;
        }
    }
    a.plane.set_peers(&network(&[&b], false));
    let mut map = network(&[&a], false);
    map.peers.values_mut().for_each(|peer| peer.home = HOME);
    b.plane.set_peers(&map);
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    b.read_packet().await;
    b.device.send(&packet(&b, &a, 100)).await.unwrap();
    a.read_packet().await;
    a.plane.prefer_link(HOME);
    let peer = a.plane.plane.peers.by_key(&b.key).unwrap();
    assert_eq!((peer.settings().home, peer.answering_region()), (REGION, Some(HOME)));
    assert_eq!(a.plane.plane.relay_stands(&peer).await, RelayStands::Alive);
    a.forget_events();
    home.fall_silent();
    let sending = async {
        loop {
            a.device.send(&packet(&a, &b, 100)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = sending => {}
        () = a.hear_link_up() => {}
    }
    home.fall_silent();
    // What was under way may still come.
    let falls = async { while a.plane.plane.relay_stands(&peer).await != RelayStands::Down {} };
    timeout(LIMIT, falls).await.unwrap();
}

#[tokio::test]
async fn a_relay_that_restarts_is_left_and_met_again() {
    let world = World::new().await;
    let (mut a, b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    a.forget_events();
    world.relay.inject(&[0x15, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 1]);
    a.hear_link_up().await;
}

#[tokio::test]
async fn the_relay_is_told_once_that_it_is_home_and_once_that_it_is_not() {
    let mut world = World::new().await;
    let a = world.side(1);
    a.plane.prefer_link(REGION);
    a.plane.ensure_link(world.target());
    a.hear_link_up().await;
    assert_eq!(world.relay.hear(0x07).await, [1]);
    a.plane.prefer_link(REGION);
    a.plane.prefer_link(RegionId(1));
    assert_eq!(world.relay.hear(0x07).await, [0]);
}

#[tokio::test]
async fn a_ping_of_the_relay_is_answered() {
    let mut world = World::new().await;
    let a = world.side(1);
    a.plane.ensure_link(world.target());
    a.hear_link_up().await;
    world.relay.inject(&[0x12, 0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(world.relay.hear(0x13).await, [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[tokio::test]
async fn garbage_from_the_relay_is_survived() {
    let world = World::new().await;
    let (mut a, mut b) = (world.side(1), world.side(2));
    world.join(&a, &b);
    a.hear_handshake().await;
    b.hear_handshake().await;
    let received = |source: [u8; 32], packet: &[u8]| {
        let length = u32::try_from(32 + packet.len()).unwrap().to_be_bytes();
        [[5].as_slice(), &length, &source, packet].concat()
    };
    for round in 0..200 {
        let noise: [u8; 300] = random();
        let mut looks_like_data = noise;
        looks_like_data[..4].copy_from_slice(&[4, 0, 0, 0]);
        let disco = [b"TS\xf0\x9f\x92\xac".as_slice(), &noise].concat();
        let source = if round % 2 == 0 { b.key.0 } else { random() };
        world.relay.inject(&received(source, &noise[..round]));
        world.relay.inject(&received(source, &looks_like_data[..round]));
        world.relay.inject(&received(source, &disco));
        world.relay.inject(&[0xff, 0, 0, 0, 3, 1, 2, 3]);
    }
    b.device.send(&packet(&b, &a, 99)).await.unwrap();
    assert_eq!(a.read_packet().await, packet(&b, &a, 99));
}

#[tokio::test]
async fn a_packet_that_is_not_from_the_peers_or_not_to_our_address_is_dropped() {
    let world = World::new().await;
    let (a, mut b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    let mut spoofed = packet(&a, &b, 100);
    spoofed[23] ^= 1;
    a.device.send(&spoofed).await.unwrap();
    let other = world.side(3);
    // A believes that B has one more address; B knows that it has not.
    let mut map = network(&[&b], false);
    map.peers.values_mut().for_each(|peer| peer.addresses.push(other.address));
    a.plane.set_peers(&map);
    a.device.send(&packet(&a, &other, 100)).await.unwrap();
    a.device.send(&packet(&a, &b, 101)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 101));
}

/// Conforms: data:20.2.1
#[tokio::test]
async fn without_a_device_echo_and_tsmp_are_answered_by_the_data_plane() {
    let world = World::new().await;
    let (mut a, b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    b.plane.detach_tun();
    a.device.send(&echo_request(&a, &b)).await.unwrap();
    let reply = a.read_packet().await;
    assert_eq!((reply[6], reply[40]), (58, 129));
    assert_eq!(&reply[8..24], &b.address.octets());
    let before = a.plane.stats()[&b.key].received_bytes;
    a.device.send(&tsmp_ping(&a, &b)).await.unwrap();
    a.receives_bytes_of(&b, before + TSMP_PONG).await;
}

#[tokio::test]
async fn with_a_device_echo_goes_to_the_kernel_and_tsmp_does_not() {
    let world = World::new().await;
    let (a, mut b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    a.device.send(&tsmp_ping(&a, &b)).await.unwrap();
    a.device.send(&echo_request(&a, &b)).await.unwrap();
    assert_eq!(b.read_packet().await, echo_request(&a, &b));
    a.receives_bytes_of(&b, TSMP_PONG).await;
}

#[tokio::test]
async fn a_ping_through_wireguard_is_answered_by_the_peer_that_was_asked() {
    let world = World::new().await;
    let (mut a, b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    // Without a session the first begins one.
    while a.plane.stats()[&b.key].last_handshake.is_none() {
        a.plane.send_tsmp_ping(&b.key, [0; 8]).unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for data in [*b"ask once", *b"and more"] {
        a.plane.send_tsmp_ping(&b.key, data).unwrap();
        let pong = timeout(LIMIT, a.tsmp.recv()).await.unwrap().unwrap();
        assert_eq!((pong.peer, pong.data), (b.key, data));
    }
    // It may still answer as many as were lost, and no more.
    for _ in 0..200 {
        b.device.send(&tsmp(&b, &a, b"ounwanted\0\0")).await.unwrap();
    }
    b.device.send(&packet(&b, &a, 100)).await.unwrap();
    assert_eq!(a.read_packet().await, packet(&b, &a, 100));
    let heard = std::iter::from_fn(|| a.tsmp.try_recv().ok()).count();
    assert!(heard <= 64, "{heard}");
    let nobody = NodePrivate::generate().public();
    assert_eq!(a.plane.send_tsmp_ping(&nobody, [0; 8]), Err(PingUnsent::UnknownPeer));
    let stats = a.plane.stats()[&b.key];
    assert!(stats.sent_bytes >= 49 && stats.received_bytes >= TSMP_PONG, "{stats:?}");
}

#[tokio::test]
async fn another_device_takes_the_place_of_the_first() {
    let world = World::new().await;
    let (mut a, mut b) = (world.side(1), world.side(2));
    world.join_cold(&a, &b).await;
    let (ours, theirs) = device();
    b.plane.attach_tun(ours);
    b.device = theirs;
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 100));
    b.device.send(&packet(&b, &a, 100)).await.unwrap();
    assert_eq!(a.read_packet().await, packet(&b, &a, 100));
}

#[tokio::test]
async fn a_refused_upgrade_is_told_in_words_and_tried_again() {
    let world = World::new().await;
    world.relay.refuse(2);
    let a = world.side(1);
    a.plane.ensure_link(world.target());
    a.hear_link(LinkChange::Down).await;
    let RelayLink::Down { error } = a.plane.links()[&REGION].state.clone() else { panic!("not down") };
    assert!(error.contains("503"), "{error}");
    a.hear_link_up().await;
}

#[tokio::test]
async fn a_link_that_is_described_anew_is_replaced_and_the_same_one_kept() {
    let world = World::new().await;
    let a = world.side(1);
    a.plane.ensure_link(world.target());
    a.hear_link_up().await;
    a.plane.ensure_link(world.target());
    assert_eq!(world.relay.logins(), 1);
    let mut target = world.target();
    target.nodes[0].name = "moved".to_owned();
    a.plane.ensure_link(target);
    a.hear_link_up().await;
    assert_eq!(world.relay.logins(), 2);
    a.plane.close_link(REGION);
    a.hear_link(LinkChange::Closed).await;
    assert!(a.plane.links().is_empty());
}

#[tokio::test]
async fn a_task_that_panics_begins_again() {
    let runs = AtomicUsize::new(0);
    endure("test", || async {
        assert!(runs.fetch_add(1, Ordering::Relaxed) > 1, "a test forced this panic");
    })
    .await;
    assert_eq!(runs.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_stopped_data_plane_has_closed_its_links_and_its_device() {
    let world = World::new().await;
    let a = world.side(1);
    a.plane.ensure_link(world.target());
    a.hear_link_up().await;
    a.plane.stop().await;
    assert!(a.plane.links().is_empty());
    assert!(!a.plane.has_tun());
    assert!(a.plane.stopped.is_cancelled());
    timeout(LIMIT, async {
        while a.device.send(&[0; 40]).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn two_peers_without_any_relay_become_direct_and_talk_both_ways() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    a.plane.set_peers(&direct_network(&[&b]));
    b.plane.set_peers(&direct_network(&[&a]));
    assert_eq!(a.hear_direct().await, b.endpoint());
    assert_eq!(b.hear_direct().await, a.endpoint());
    for len in [100, 1280] {
        a.device.send(&packet(&a, &b, len)).await.unwrap();
        assert_eq!(b.read_packet().await, packet(&a, &b, len));
        b.device.send(&packet(&b, &a, len)).await.unwrap();
        assert_eq!(a.read_packet().await, packet(&b, &a, len));
    }
    let path = a.plane.paths()[&b.key];
    assert_eq!(path.direct.unwrap().address, b.endpoint());
    assert_eq!(path.region, REGION);
}

#[tokio::test]
async fn peers_that_meet_at_a_relay_become_direct_by_calling_each_other() {
    let mut world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    for (side, other) in [(&a, &b), (&b, &a)] {
        side.plane.ensure_link(world.target());
        side.hear_link_up().await;
        // Only B is told where the other is: A learns it from B's pings.
        let map = if side.key == a.key { network(&[other], false) } else { direct_network(&[other]) };
        side.plane.set_peers(&map);
    }
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 100));
    b.device.send(&packet(&b, &a, 101)).await.unwrap();
    assert_eq!(a.read_packet().await, packet(&b, &a, 101));
    assert_eq!(a.hear_direct().await, b.endpoint());
    assert_eq!(b.hear_direct().await, a.endpoint());
    // What goes over UDP alone does not touch the relay.
    while world.relay.heard.try_recv().is_ok() {}
    a.device.send(&packet(&a, &b, 102)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 102));
    let relayed = std::iter::from_fn(|| world.relay.heard.try_recv().ok());
    assert_eq!(relayed.filter(|(kind, body)| *kind == 4 && body[32..].starts_with(&[4, 0, 0, 0])).count(), 0);
}

#[tokio::test]
async fn two_peers_become_direct_over_ipv6_alone() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    if a.plane.local_ports().unwrap().v6.is_none() {
        return skipped("two_peers_become_direct_over_ipv6_alone", "this machine has no IPv6");
    }
    let endpoint =
        |side: &Side| SocketAddr::from((Ipv6Addr::LOCALHOST, side.plane.local_ports().unwrap().v6.unwrap()));
    for (side, other) in [(&a, &b), (&b, &a)] {
        let mut map = network(&[other], false);
        map.peers.values_mut().for_each(|peer| peer.endpoints = vec![endpoint(other)]);
        side.plane.set_peers(&map);
    }
    assert_eq!(a.hear_direct().await, endpoint(&b));
    assert_eq!(b.hear_direct().await, endpoint(&a));
    a.device.send(&packet(&a, &b, 1280)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 1280));
}

#[tokio::test]
async fn a_side_without_ipv6_becomes_direct_over_ipv4() {
    let world = World::new().await;
    let mut a = world.side_with(1, Arc::new(V4Only).make(0).await.unwrap());
    let mut b = world.direct_side(2);
    let mut map = direct_network(&[&b]);
    let out_of_reach = "[::1]:9".parse().unwrap();
    map.peers.values_mut().for_each(|peer| peer.endpoints.insert(0, out_of_reach));
    a.plane.set_peers(&map);
    b.plane.set_peers(&direct_network(&[&a]));
    assert_eq!(a.hear_direct().await, b.endpoint());
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 100));
    assert_eq!(a.plane.rebind().await.unwrap().v6, None, "whoever made them makes the others as well");
}

#[tokio::test]
async fn a_ping_over_the_direct_path_names_no_region() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    a.plane.set_peers(&direct_network(&[&b]));
    b.plane.set_peers(&direct_network(&[&a]));
    a.hear_direct().await;
    b.hear_direct().await;
    a.plane.send_ping(b.key, [7; 12]).unwrap();
    let pong = loop {
        let pong = a.hear_pong().await;
        if pong.is_user {
            break pong;
        }
    };
    assert_eq!((pong.peer, pong.txid, pong.region), (b.key, [7; 12], None));
    assert!(pong.latency < LIMIT);
}

#[tokio::test]
async fn sockets_that_are_bound_anew_keep_their_port_and_the_path() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    a.plane.set_peers(&direct_network(&[&b]));
    b.plane.set_peers(&direct_network(&[&a]));
    a.hear_direct().await;
    b.hear_direct().await;
    let before = a.plane.local_ports();
    for _ in 0..3 {
        assert_eq!(Some(a.plane.rebind().await.unwrap()), before);
        a.device.send(&packet(&a, &b, 100)).await.unwrap();
        assert_eq!(b.read_packet().await, packet(&a, &b, 100));
        b.device.send(&packet(&b, &a, 100)).await.unwrap();
        assert_eq!(a.read_packet().await, packet(&b, &a, 100));
    }
    assert_eq!(a.plane.paths()[&b.key].direct.unwrap().address, b.endpoint());
    assert!(a.path.try_recv().is_err(), "the path did not change");
    let relay_only = world.side(3);
    assert!(matches!(relay_only.plane.rebind().await, Err(RebindError::NoSockets)));
    assert_eq!(relay_only.plane.local_ports(), None);
}

#[tokio::test]
async fn a_peer_that_is_gone_is_left_for_the_relay_at_once() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    for (side, other) in [(&a, &b), (&b, &a)] {
        side.plane.ensure_link(world.target());
        side.hear_link_up().await;
        side.plane.set_peers(&direct_network(&[other]));
    }
    a.hear_direct().await;
    b.hear_direct().await;
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 100));
    // Its sockets are closed, and the kernel refuses for it.
    b.plane.plane.close_sockets().await;
    // The first packet may be the one that is refused.
    let sending = async {
        loop {
            a.device.send(&packet(&a, &b, 100)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let mut buffer = [0; 2000];
    tokio::select! {
        () = sending => {}
        read = timeout(LIMIT, b.device.recv(&mut buffer)) => drop(read.unwrap().unwrap()),
    }
    assert_eq!(a.plane.paths()[&b.key].direct, None);
}

/// The recipe of tailnet-data 7.12: without it a silent path is taken until its trust is over, and never forgotten.
#[tokio::test]
async fn a_direct_path_that_dies_silently_is_left_by_both_for_the_relay_and_taken_again_when_it_lives() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    let between = Between::start(a.endpoint(), b.endpoint()).await;
    for (side, other, own, its) in [(&a, &b, between.a, between.b), (&b, &a, between.b, between.a)] {
        side.plane.set_own_endpoints(vec![own]);
        side.plane.ensure_link(world.target());
        side.hear_link_up().await;
        let mut map = network(&[other], false);
        map.peers.values_mut().for_each(|peer| peer.endpoints = vec![its]);
        side.plane.set_peers(&map);
    }
    for round in 0..2 {
        assert_eq!(a.hear_direct().await, between.b, "{round}");
        assert_eq!(b.hear_direct().await, between.a, "{round}");
        a.device.send(&packet(&a, &b, 100)).await.unwrap();
        b.read_packet().await;
        b.device.send(&packet(&b, &a, 100)).await.unwrap();
        a.read_packet().await;
        between.is_cut.store(true, Ordering::Relaxed);
        let (to_b, to_a) = (packet(&a, &b, 200), packet(&b, &a, 200));
        let (Side { device: device_a, path: path_a, .. }, Side { device: device_b, path: path_b, .. }) =
            (&mut a, &mut b);
        let traffic = async {
            loop {
                device_a.send(&to_b).await.unwrap();
                device_b.send(&to_a).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let arrival = async {
            let (mut one, mut other) = ([0; 2000], [0; 2000]);
            device_a.recv(&mut one).await.unwrap();
            device_b.recv(&mut other).await.unwrap();
        };
        let left = async {
            let is_relayed = |change: Option<PathChange>| change.unwrap().to.is_none();
            while !is_relayed(path_a.recv().await) {}
            while !is_relayed(path_b.recv().await) {}
            arrival.await;
        };
        tokio::select! {
            () = traffic => {}
            left = timeout(LIMIT, left) => left.unwrap(),
        }
        between.is_cut.store(false, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_side_that_only_relays_and_one_with_sockets_talk_through_the_relay() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.side(2));
    a.plane.ensure_link(world.target());
    b.plane.ensure_link(world.target());
    a.hear_link_up().await;
    b.hear_link_up().await;
    a.plane.set_peers(&network(&[&b], false));
    b.plane.set_peers(&direct_network(&[&a]));
    for _ in 0..3 {
        a.device.send(&packet(&a, &b, 100)).await.unwrap();
        assert_eq!(b.read_packet().await, packet(&a, &b, 100));
        b.device.send(&packet(&b, &a, 100)).await.unwrap();
        assert_eq!(a.read_packet().await, packet(&b, &a, 100));
    }
    assert_eq!(b.plane.paths()[&a.key].direct, None);
    assert_eq!(a.plane.paths()[&b.key].direct, None);
}

/// Conforms: data:20.2.11
#[tokio::test]
async fn where_either_side_forbids_direct_paths_everything_is_relayed() {
    for blocks_a in [true, false] {
        let world = World::new().await;
        let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
        (if blocks_a { &a } else { &b }).plane.set_direct(Direct::Blocked);
        for (side, other) in [(&a, &b), (&b, &a)] {
            side.plane.ensure_link(world.target());
            side.hear_link_up().await;
            side.plane.set_peers(&direct_network(&[other]));
        }
        for _ in 0..50 {
            a.device.send(&packet(&a, &b, 100)).await.unwrap();
            assert_eq!(b.read_packet().await, packet(&a, &b, 100));
            b.device.send(&packet(&b, &a, 100)).await.unwrap();
            assert_eq!(a.read_packet().await, packet(&b, &a, 100));
        }
        a.plane.send_ping(b.key, [7; 12]).unwrap();
        assert_eq!(a.hear_pong().await.region, Some(REGION));
        assert!(a.path.try_recv().is_err() && b.path.try_recv().is_err(), "{blocks_a}");
    }
}

#[tokio::test]
async fn direct_paths_that_are_forbidden_are_left_and_taken_again_when_they_are_allowed() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    for (side, other) in [(&a, &b), (&b, &a)] {
        side.plane.ensure_link(world.target());
        side.hear_link_up().await;
        side.plane.set_peers(&direct_network(&[other]));
    }
    a.hear_direct().await;
    b.hear_direct().await;
    a.device.send(&packet(&a, &b, 99)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 99));
    a.plane.set_direct(Direct::Blocked);
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 100));
    assert_eq!(a.plane.paths()[&b.key].direct, None);
    a.plane.set_direct(Direct::Allowed);
    a.device.send(&packet(&a, &b, 101)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 101));
    assert_eq!(a.hear_direct().await, b.endpoint());
}

#[tokio::test]
async fn a_stun_server_is_asked_and_its_answer_told_and_anything_else_dropped() {
    let world = World::new().await;
    let mut a = world.direct_side(1);
    let server = StdUdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    a.plane.send_stun(server.local_addr().unwrap(), [9; 12]).unwrap();
    let mut question = [0; 100];
    let (len, from) = server.recv_from(&mut question).unwrap();
    assert_eq!(from, a.endpoint());
    assert_eq!(stun::read_request(&question[..len]), Ok([9; 12]));
    // Its own question is STUN too, and no answer.
    server.send_to(&question[..len], from).unwrap();
    let address = "192.0.2.1:1234".parse().unwrap();
    server.send_to(&Response { txid: [9; 12], address }.encode(), from).unwrap();
    let answer = timeout(LIMIT, a.stun.recv()).await.unwrap().unwrap();
    assert_eq!((answer.from, answer.txid, answer.address), (server.local_addr().unwrap(), [9; 12], address));
    let without = world.side(2);
    assert_eq!(without.plane.send_stun(address, [9; 12]), Err(StunUnsent::NoSocket));
}

#[tokio::test]
async fn what_comes_from_an_unknown_source_is_dropped_and_counted() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let metrics = recorder.handle();
    let world = World::new().await;
    let mut a = metrics::with_local_recorder(&recorder, || world.direct_side(1));
    let mut b = world.direct_side(2);
    a.plane.set_peers(&direct_network(&[&b]));
    b.plane.set_peers(&direct_network(&[&a]));
    a.hear_direct().await;
    b.hear_direct().await;
    let stranger = StdUdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    for _ in 0..3 {
        stranger.send_to(&[4; 100], a.endpoint()).unwrap();
    }
    let probe = [b"TS\xf0\x9f\x92\xac".as_slice(), &b.disco.0, &[7; 100]].concat();
    stranger.send_to(&probe, a.endpoint()).unwrap();
    // What came before it has been handled once this is through.
    b.device.send(&packet(&b, &a, 100)).await.unwrap();
    a.read_packet().await;
    let wanted = [
        r#"warren_dropped_packets_total{direction="receive",reason="unknown_source"} 3"#,
        r#"warren_dropped_packets_total{direction="receive",reason="disco"} 1"#,
        r#"warren_receive_packets_total{path="direct"} 1"#,
        r#"warren_receive_bytes_total{path="direct"} 100"#,
        r#"warren_receive_packets_total{path="derp"} 0"#,
        r#"warren_direct_path_changes_total{reason="found"} 1"#,
        r#"warren_disco_messages_total{direction="transmit",type="ping",path="derp"} 0"#,
    ];
    let wait = async {
        loop {
            let text = metrics.render();
            if wanted.iter().all(|line| text.contains(line)) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    if timeout(LIMIT, wait).await.is_err() {
        panic!("{}", metrics.render());
    }
}

#[tokio::test]
async fn bursts_over_udp_arrive_whole_and_in_order() {
    let world = World::new().await;
    let (mut a, mut b) = (world.direct_side(1), world.direct_side(2));
    a.plane.set_peers(&direct_network(&[&b]));
    b.plane.set_peers(&direct_network(&[&a]));
    a.hear_direct().await;
    b.hear_direct().await;
    a.device.send(&packet(&a, &b, 100)).await.unwrap();
    assert_eq!(b.read_packet().await, packet(&a, &b, 100));
    let (from, to) = (a.address, b.address);
    let numbered = |number: u16| {
        let mut packet = packet_between(from, to, 1200);
        packet[60..62].copy_from_slice(&number.to_be_bytes());
        packet
    };
    for round in 0..50 {
        // As many as the device's socket holds at least.
        let burst = round * 8..(round + 1) * 8;
        for number in burst.clone() {
            a.device.send(&numbered(number)).await.unwrap();
        }
        for number in burst {
            assert!(b.read_packet().await == numbered(number), "number {number}");
        }
    }
}

/// A relay, and how to reach it.
struct World {
    relay: Relay,
}

impl World {
    async fn new() -> Self {
        Self { relay: Relay::start().await }
    }

    fn side(&self, number: u8) -> Side {
        Side::start(number, None)
    }

    /// With sockets, and knowing where they are.
    fn direct_side(&self, number: u8) -> Side {
        self.side_with(number, UdpSockets::bind(0).unwrap())
    }

    fn side_with(&self, number: u8, sockets: UdpSockets) -> Side {
        let side = Side::start(number, Some(sockets));
        side.plane.set_own_endpoints(vec![side.endpoint()]);
        side
    }

    fn target(&self) -> LinkTarget {
        self.relay.target(REGION)
    }

    /// Both know each other and keep the tunnel warm.
    fn join(&self, a: &Side, b: &Side) {
        for (side, other) in [(a, b), (b, a)] {
            side.plane.set_peers(&network(&[other], true));
            side.plane.ensure_link(self.target());
        }
    }

    /// Both know each other and have links, and nothing was sent.
    async fn join_cold(&self, a: &Side, b: &Side) {
        for (side, other) in [(a, b), (b, a)] {
            side.plane.set_peers(&network(&[other], false));
            side.plane.ensure_link(self.target());
            side.hear_link_up().await;
        }
    }
}

/// What is between two sides, and can be cut without either being told: A is seen at `a`, B at `b`.
struct Between {
    a: SocketAddr,
    b: SocketAddr,
    is_cut: Arc<AtomicBool>,
}

impl Between {
    async fn start(real_a: SocketAddr, real_b: SocketAddr) -> Self {
        let at = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
        let (near_a, near_b) = (Arc::new(at().await.unwrap()), Arc::new(at().await.unwrap()));
        let (a, b) = (near_b.local_addr().unwrap(), near_a.local_addr().unwrap());
        let is_cut = Arc::new(AtomicBool::new(false));
        for (from, through, to) in [(&near_a, &near_b, real_b), (&near_b, &near_a, real_a)] {
            let (from, through, is_cut) = (Arc::clone(from), Arc::clone(through), Arc::clone(&is_cut));
            tokio::spawn(async move {
                let mut buffer = [0; 2000];
                loop {
                    let len = from.recv(&mut buffer).await.unwrap();
                    if !is_cut.load(Ordering::Relaxed) {
                        let _ = through.send_to(&buffer[..len], to).await;
                    }
                }
            });
        }
        Self { a, b, is_cut }
    }
}

/// One data plane with a socket for its device.
struct Side {
    plane: DataPlane,
    key: NodePublic,
    disco: DiscoPublic,
    address: Ipv6Addr,
    device: UnixDatagram,
    heard: Arc<Heard>,
    handshake: tokio::sync::Mutex<mpsc::Receiver<NodePublic>>,
    pong: mpsc::Receiver<Pong>,
    tsmp: mpsc::Receiver<TsmpPong>,
    path: mpsc::Receiver<PathChange>,
    stun: mpsc::Receiver<StunAnswer>,
    link: tokio::sync::Mutex<mpsc::Receiver<LinkChange>>,
}

struct Heard {
    handshake: mpsc::Sender<NodePublic>,
    pong: mpsc::Sender<Pong>,
    tsmp: mpsc::Sender<TsmpPong>,
    path: mpsc::Sender<PathChange>,
    stun: mpsc::Sender<StunAnswer>,
    link: mpsc::Sender<LinkChange>,
}

impl Events for Heard {
    fn pong(&self, pong: Pong) {
        // Paths ping without end.
        let _ = self.pong.try_send(pong);
    }

    fn tsmp_pong(&self, pong: TsmpPong) {
        self.tsmp.try_send(pong).unwrap();
    }

    fn path_changed(&self, change: PathChange) {
        self.path.try_send(change).unwrap();
    }

    fn stun(&self, answer: StunAnswer) {
        self.stun.try_send(answer).unwrap();
    }

    fn link_changed(&self, _: RegionId, change: LinkChange) {
        let _ = self.link.try_send(change);
    }

    fn handshake(&self, peer: NodePublic) {
        self.handshake.try_send(peer).unwrap();
    }
}

/// Makes sockets as on a machine without IPv6.
#[derive(Debug)]
struct V4Only;

impl MakeSockets for V4Only {
    fn make(self: Arc<Self>, port: u16) -> SocketsFuture {
        let v4 = StdUdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        let made = UdpSockets::from_owned(v4.into(), None).map(|made| made.made_by(self));
        Box::pin(std::future::ready(made))
    }
}

impl Side {
    fn start(number: u8, udp: Option<UdpSockets>) -> Self {
        let (handshake_out, handshake) = mpsc::channel(100);
        let (pong_out, pong) = mpsc::channel(100);
        let (tsmp_out, tsmp) = mpsc::channel(100);
        let (link_out, link) = mpsc::channel(100);
        let (path_out, path) = mpsc::channel(100);
        let (stun_out, stun) = mpsc::channel(100);
        let heard = Arc::new(Heard {
            handshake: handshake_out,
            pong: pong_out,
            tsmp: tsmp_out,
            path: path_out,
            stun: stun_out,
            link: link_out,
        });
        let (node, disco) = (NodePrivate::generate(), DiscoPrivate::generate());
        let (key, disco_key) = (node.public(), disco.public());
        let address = Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 0, 0, 0, 0, u16::from(number));
        let dialer = Arc::new(Dialer::new(DialOptions::default()).unwrap());
        let events: Arc<dyn Events> = Arc::clone(&heard) as _;
        let plane = DataPlane::start(DataPlaneConfig { node, disco, address, dialer, events, udp }).unwrap();
        let (tun, device) = device();
        plane.attach_tun(tun);
        let (handshake, link) = (tokio::sync::Mutex::new(handshake), tokio::sync::Mutex::new(link));
        Self { plane, key, disco: disco_key, address, device, heard, handshake, pong, tsmp, path, stun, link }
    }

    async fn read_packet(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; 2000];
        let len = timeout(LIMIT, self.device.recv(&mut buffer)).await.unwrap().unwrap();
        buffer.truncate(len);
        buffer
    }

    async fn receives_bytes_of(&self, other: &Self, bytes: u64) {
        let wait = async {
            while self.plane.stats()[&other.key].received_bytes < bytes {
                tokio::task::yield_now().await;
            }
        };
        timeout(LIMIT, wait).await.unwrap();
        assert_eq!(self.plane.stats()[&other.key].received_bytes, bytes);
    }

    async fn hear_handshake(&mut self) -> NodePublic {
        timeout(LIMIT, self.handshake.get_mut().recv()).await.unwrap().unwrap()
    }

    async fn hear_pong(&mut self) -> Pong {
        timeout(LIMIT, self.pong.recv()).await.unwrap().unwrap()
    }

    /// Where it is reached over UDP.
    fn endpoint(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.plane.local_ports().unwrap().v4).into()
    }

    /// Waits until it has a direct path, and returns the address.
    async fn hear_direct(&mut self) -> SocketAddr {
        let wait = async {
            loop {
                if let Some(to) = self.path.recv().await.unwrap().to {
                    return to;
                }
            }
        };
        timeout(LIMIT, wait).await.unwrap()
    }

    async fn hear_link_up(&self) {
        self.hear_link(LinkChange::Up).await;
    }

    async fn hear_link(&self, expected: LinkChange) {
        let mut link = self.link.lock().await;
        let wait = async { while link.recv().await.unwrap() != expected {} };
        timeout(LIMIT, wait).await.unwrap();
    }

    fn forget_events(&mut self) {
        while self.link.get_mut().try_recv().is_ok() {}
        while self.handshake.get_mut().try_recv().is_ok() {}
    }

    fn handshakes(&self) -> usize {
        self.heard.handshake.max_capacity() - self.heard.handshake.capacity()
    }
}

fn device() -> (Tun, UnixDatagram) {
    let (ours, theirs) = StdUnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Tun::from_owned(ours.into()).unwrap(), UnixDatagram::from_std(theirs).unwrap())
}

/// As the control plane has it: where each of them is, too.
fn direct_network(peers: &[&Side]) -> NetworkMap {
    let mut map = network(peers, false);
    for side in peers {
        let id = Uuid::from_bytes(side.address.octets());
        map.peers.get_mut(&id).unwrap().endpoints = vec![side.endpoint()];
    }
    map
}

fn network(peers: &[&Side], keepalive: bool) -> NetworkMap {
    let peer = |side: &&Side| coordination::Peer {
        node_key: side.key,
        disco_key: side.disco,
        home: REGION,
        addresses: vec![side.address],
        keepalive,
        endpoints: Vec::new(),
        announcements: 1,
    };
    NetworkMap {
        peers: peers.iter().map(|side| (Uuid::from_bytes(side.address.octets()), peer(side))).collect(),
    }
}

fn packet(from: &Side, to: &Side, len: usize) -> Vec<u8> {
    packet_between(from.address, to.address, len)
}

fn packet_between(from: Ipv6Addr, to: Ipv6Addr, len: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; len];
    packet[..4].copy_from_slice(&[0x60, 0, 0, 0]);
    packet[4..6].copy_from_slice(&u16::try_from(len - 40).unwrap().to_be_bytes());
    packet[6..8].copy_from_slice(&[17, 64]);
    packet[8..24].copy_from_slice(&from.octets());
    packet[24..40].copy_from_slice(&to.octets());
    packet
}

fn echo_request(from: &Side, to: &Side) -> Vec<u8> {
    let mut packet = packet(from, to, 56);
    packet[6] = 58;
    packet[40..48].copy_from_slice(&[128, 0, 0, 0, 0, 1, 0, 1]);
    let words = packet[8..].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum::<u32>() + 58 + 16;
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[42..44].copy_from_slice(&(!((folded & 0xffff) as u16 + (folded >> 16) as u16)).to_be_bytes());
    packet
}

fn tsmp_ping(from: &Side, to: &Side) -> Vec<u8> {
    tsmp(from, to, b"p12345678")
}

fn tsmp(from: &Side, to: &Side, message: &[u8]) -> Vec<u8> {
    let mut packet = packet(from, to, 40 + message.len());
    packet[6] = 99;
    packet[40..].copy_from_slice(message);
    packet
}

/// A relay with one region, and levers to spoil its connections.
struct Relay {
    port: u16,
    shared: Arc<RelayShared>,
    heard: mpsc::Receiver<(u8, Vec<u8>)>,
}

struct RelayShared {
    key: NodePrivate,
    clients: Mutex<BTreeMap<NodePublic, mpsc::Sender<Vec<u8>>>>,
    orders: broadcast::Sender<Order>,
    heard: mpsc::Sender<(u8, Vec<u8>)>,
    refusals: AtomicUsize,
    logins: AtomicUsize,
}

#[derive(Debug, Clone)]
enum Order {
    Cut,
    FallSilent,
    Inject(Vec<u8>),
}

impl Relay {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (heard_out, heard) = mpsc::channel(1000);
        let shared = Arc::new(RelayShared {
            key: NodePrivate::generate(),
            clients: Mutex::default(),
            orders: broadcast::channel(1000).0,
            heard: heard_out,
            refusals: AtomicUsize::new(0),
            logins: AtomicUsize::new(0),
        });
        let served = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let served = Arc::clone(&served);
                tokio::spawn(async move { served.serve(stream).await });
            }
        });
        Self { port, shared, heard }
    }

    fn target(&self, region: RegionId) -> LinkTarget {
        let node = Node {
            host_name: "127.0.0.1".to_owned(),
            derp_port: self.port,
            force_http: true,
            ..Node::default()
        };
        LinkTarget { region, nodes: vec![node], headers: Vec::new(), upgrades: Upgrades::default() }
    }

    fn cut(&self) {
        self.shared.orders.send(Order::Cut).unwrap();
    }

    /// The present connections stay open and carry nothing any more.
    fn fall_silent(&self) {
        self.shared.orders.send(Order::FallSilent).unwrap();
    }

    fn inject(&self, frames: &[u8]) {
        self.shared.orders.send(Order::Inject(frames.to_vec())).unwrap();
    }

    fn refuse(&self, attempts: usize) {
        self.shared.refusals.store(attempts, Ordering::Relaxed);
    }

    fn logins(&self) -> usize {
        self.shared.logins.load(Ordering::Relaxed)
    }

    /// The next frame of this type that a client sent.
    async fn hear(&mut self, kind: u8) -> Vec<u8> {
        let wait = async {
            loop {
                let (heard, body) = self.heard.recv().await.unwrap();
                if heard == kind {
                    return body;
                }
            }
        };
        timeout(LIMIT, wait).await.unwrap()
    }
}

impl RelayShared {
    async fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
        }
        if self.refusals.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
        {
            stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n").await.ok()?;
            return None;
        }
        let mut hello =
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n".to_vec();
        hello.extend(frame(
            1,
            &[b"DERP\xf0\x9f\x94\x91".as_slice(), &self.key.public().0, b"future"].concat(),
        ));
        stream.write_all(&hello).await.ok()?;
        let (kind, body) = read_frame(&mut stream).await?;
        let client = NodePublic::from_slice(body.get(..32)?)?;
        let shared = self.key.shared(&client);
        assert_eq!(kind, 2);
        shared.open_with_nonce(&body[32..]).unwrap();
        // What is ordered once the client is up concerns it.
        let mut orders = self.orders.subscribe();
        stream.write_all(&frame(3, &shared.seal_with_nonce(&random(), br#"{"version":2}"#))).await.ok()?;
        self.logins.fetch_add(1, Ordering::Relaxed);
        let (to_client, mut outgoing) = mpsc::channel::<Vec<u8>>(512);
        self.clients.lock().unwrap().insert(client, to_client);
        let (mut read, mut write) = stream.into_split();
        let reader = async {
            while let Some((kind, body)) = read_frame(&mut read).await {
                self.handle(&client, kind, &body);
            }
        };
        let writer = async {
            loop {
                tokio::select! {
                    biased;
                    Ok(order) = orders.recv() => match order {
                        Order::Cut => return Some(()),
                        Order::FallSilent => std::future::pending().await,
                        Order::Inject(frames) => write.write_all(&frames).await.ok()?,
                    },
                    Some(frame) = outgoing.recv() => write.write_all(&frame).await.ok()?,
                }
            }
        };
        tokio::select! {
            () = reader => {}
            _ = writer => {}
        }
        Some(())
    }

    fn handle(&self, from: &NodePublic, kind: u8, body: &[u8]) {
        let _ = self.heard.try_send((kind, body.to_vec()));
        match kind {
            4 => {
                let to = NodePublic::from_slice(&body[..32]).unwrap();
                if let Some(client) = self.clients.lock().unwrap().get(&to) {
                    let _ = client.try_send(frame(5, &[from.0.as_slice(), &body[32..]].concat()));
                }
            }
            0x12 => {
                if let Some(client) = self.clients.lock().unwrap().get(from) {
                    let _ = client.try_send(frame(0x13, body));
                }
            }
            _ => {}
        }
    }
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    [[kind].as_slice(), &u32::try_from(body.len()).unwrap().to_be_bytes(), body].concat()
}

async fn read_frame<R: tokio::io::AsyncRead + Unpin>(stream: &mut R) -> Option<(u8, Vec<u8>)> {
    let kind = stream.read_u8().await.ok()?;
    let len = stream.read_u32().await.ok()?;
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body).await.ok()?;
    Some((kind, body))
}
