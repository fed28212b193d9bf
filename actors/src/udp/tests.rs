//! Sockets on loopback.

use std::time::Duration;

use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use tokio::time::timeout;

use super::*;
use crate::apart::skipped;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn both_families_are_bound_at_one_port_and_take_only_their_own() {
    let sockets = UdpSockets::bind(0).unwrap();
    let ports = sockets.ports();
    assert_ne!(ports.v4, 0);
    let Some(v6) = &sockets.v6 else {
        let test = "both_families_are_bound_at_one_port_and_take_only_their_own";
        return skipped(test, "in part: this machine has no IPv6");
    };
    assert_eq!(ports.v6, Some(ports.v4));
    assert!(sockopt::ipv6_v6only(v6).unwrap());
}

#[test]
fn the_port_that_is_asked_for_is_taken_and_another_one_where_it_is_not_free() {
    let first = UdpSockets::bind(0).unwrap();
    let taken = first.ports().v4;
    let second = UdpSockets::bind(taken).unwrap();
    assert_ne!(second.ports().v4, taken);
    drop(first);
    assert_eq!(UdpSockets::bind(taken).unwrap().ports().v4, taken);
}

#[test]
fn a_port_that_somebody_else_has_in_the_other_family_is_given_up_for_another() {
    let mut asked = Vec::new();
    let sockets = UdpSockets::bind_with(0, |port| {
        asked.push(port);
        if asked.len() < 3 { Err(io::ErrorKind::AddrInUse.into()) } else { v4_in_its_place() }
    });
    assert_eq!(asked.len(), 3);
    assert_eq!(sockets.unwrap().ports().v4, asked[2]);
}

#[test]
fn where_no_port_is_free_in_both_families_ipv4_does_alone() {
    let sockets = UdpSockets::bind_with(0, |_| Err(io::ErrorKind::AddrInUse.into())).unwrap();
    assert_eq!(sockets.ports().v6, None);
}

#[test]
fn a_machine_without_ipv6_has_one_socket() {
    let none = |_| Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
    let sockets = UdpSockets::bind_with(0, none).unwrap();
    assert_eq!(sockets.ports().v6, None);
    assert_ne!(sockets.ports().v4, 0);
}

#[tokio::test]
async fn datagrams_are_not_fragmented_and_the_receive_buffer_is_as_large_as_we_may_have_it() {
    let bound = UdpSockets::bind(0).unwrap();
    let limit: usize =
        std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap().trim().parse().unwrap();
    // The kernel doubles what it is asked for.
    let size = sockopt::socket_recv_buffer_size(&bound.v4).unwrap();
    assert!(size >= 2 * RECEIVE_BUFFER.min(limit), "{size}");
    let (v4, v6) = (bound.v4.try_clone().unwrap(), bound.v6.as_ref().map(|v6| v6.try_clone().unwrap()));
    let _registered = Sockets::register(bound).unwrap();
    assert_eq!(sockopt::ip_mtu_discover(&v4).unwrap(), Ipv4PathMtuDiscovery::DO);
    if let Some(v6) = v6 {
        assert_eq!(sockopt::ipv6_mtu_discover(&v6).unwrap(), Ipv6PathMtuDiscovery::DO);
    }
}

#[tokio::test]
async fn runs_arrive_whole_and_in_order_in_both_families() {
    let (a, b) = (sockets(), sockets());
    let mut ways = vec![(&b.v4, SocketAddr::from((Ipv4Addr::LOCALHOST, b.ports().v4)))];
    match (&b.v6, b.ports().v6) {
        (Some(v6), Some(port)) => ways.push((v6, (Ipv6Addr::LOCALHOST, port).into())),
        _ => {
            skipped("runs_arrive_whole_and_in_order_in_both_families", "in part: this machine has no IPv6");
        }
    }
    for (socket, to) in ways {
        let mut runs = Runs::default();
        // More than one run, and a shorter one at the end.
        let sent: Vec<Vec<u8>> = (0..=120).map(|n: u8| vec![n; if n == 120 { 40 } else { 1312 }]).collect();
        for datagram in &sent {
            runs.push(to, datagram).unwrap();
        }
        runs.send(&a, |_, why, count| panic!("{why:?}, {count}")).await;
        assert!(runs.is_empty());
        let (got, messages) = receive(socket, sent.len()).await;
        assert_eq!(got, sent);
        assert!(messages < sent.len(), "the kernel glued none of them together");
    }
}

#[tokio::test]
async fn a_destination_that_refuses_is_told_by_its_own_address() {
    let a = sockets();
    let gone = SocketAddr::from((Ipv4Addr::LOCALHOST, sockets().ports().v4));
    a.send(gone, b"nobody is there").unwrap();
    let mut told = Vec::new();
    while told.is_empty() {
        let ready = timeout(LIMIT, a.v4.ready()).await.unwrap().unwrap();
        assert!(ready.is_error());
        a.v4.read_complaints(|to| told.push(to));
    }
    assert_eq!(told, [gone]);
}

#[tokio::test]
async fn an_error_of_one_destination_does_not_lose_the_next_datagram_to_another() {
    let (a, b) = (sockets(), sockets());
    let gone = SocketAddr::from((Ipv4Addr::LOCALHOST, sockets().ports().v4));
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.ports().v4));
    for number in 0..10 {
        a.send(gone, b"nobody is there").unwrap();
        assert_eq!(a.send(to, &[number; 50]), Ok(()));
    }
    assert_eq!(receive(&b.v4, 10).await.0.len(), 10);
}

#[tokio::test]
async fn what_the_path_does_not_carry_is_told_and_the_rest_of_the_run_goes_on() {
    let (a, b) = (sockets(), sockets());
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.ports().v4));
    assert_eq!(a.send(to, &[0; 65_536]), Err(Unsent::TooBig));
    let nowhere = "[2001:db8::1]:1".parse().unwrap();
    let without_ipv6 = Sockets { v6: None, ..sockets() };
    assert_eq!(without_ipv6.send(nowhere, b"x"), Err(Unsent::Unreachable));
    let mut runs = Runs::default();
    runs.room(10).unwrap();
    runs.commit(nowhere, 10);
    runs.room(10).unwrap();
    runs.commit(to, 10);
    let mut lost = Vec::new();
    runs.send(&without_ipv6, |to, why, count| lost.push((to, why, count))).await;
    assert_eq!(lost, [(nowhere, Unsent::Unreachable, 1)]);
    assert_eq!(receive(&b.v4, 1).await.0, [[0; 10]]);
}

#[tokio::test]
async fn a_run_that_no_device_cuts_is_sent_singly() {
    let (a, b) = (sockets(), sockets());
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.ports().v4));
    a.v4.pause_segmentation();
    let mut runs = Runs::default();
    for number in 0..5 {
        runs.room(1000).unwrap().fill(number);
        runs.commit(to, 1000);
    }
    runs.send(&a, |_, why, count| panic!("{why:?}, {count}")).await;
    let (got, messages) = receive(&b.v4, 5).await;
    assert_eq!((got.len(), messages), (5, 5));
}

#[tokio::test]
async fn single_datagrams_are_told_from_runs_and_more_of_them_from_the_last() {
    let (a, b) = (sockets(), sockets());
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.ports().v4));
    (0..20_u8).for_each(|number| a.send(to, &[number; 100]).unwrap());
    b.v4.ready().await.unwrap();
    let mut received = Received::default();
    let reads = std::iter::from_fn(|| {
        b.v4.receive(&mut received).ok()?;
        Some((received.singles(), received.is_full_of_singles()))
    });
    assert_eq!(reads.collect::<Vec<_>>(), [(8, true), (8, true), (4, false)]);
    (0..8).for_each(|_| a.v4.send(to, &[7; 800], Some(100)).unwrap());
    b.v4.ready().await.unwrap();
    b.v4.receive(&mut received).unwrap();
    assert_eq!((received.messages(), received.is_full_of_singles()), (8, false));
}

#[tokio::test]
async fn sockets_that_somebody_else_made_are_used_as_they_are() {
    let made = UdpSockets::bind(0).unwrap();
    let ports = made.ports();
    let (v4, v6) = made.into_owned();
    let handed_over = UdpSockets::from_owned(v4, v6).unwrap();
    assert_eq!(handed_over.ports(), ports);
    let (a, b) = (sockets(), Sockets::register(handed_over).unwrap());
    a.send((Ipv4Addr::LOCALHOST, ports.v4).into(), b"hello").unwrap();
    assert_eq!(receive(&b.v4, 1).await.0, [b"hello"]);
}

fn sockets() -> Sockets {
    Sockets::register(UdpSockets::bind(0).unwrap()).unwrap()
}

fn v4_in_its_place() -> io::Result<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
}

/// So many datagrams, and in how many messages they came.
async fn receive(socket: &Socket, count: usize) -> (Vec<Vec<u8>>, usize) {
    let (mut received, mut datagrams, mut messages) = (Received::default(), Vec::new(), 0);
    while datagrams.len() < count {
        timeout(LIMIT, socket.ready()).await.unwrap().unwrap();
        if socket.receive(&mut received).is_ok() {
            messages += received.messages();
            datagrams.extend(received.by_source().flat_map(|(_, sent)| sent).map(<[u8]>::to_vec));
        }
    }
    (datagrams, messages)
}
