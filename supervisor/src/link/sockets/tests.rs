//! A tunnel that asks, and a service that answers, is away, or is not asked properly.

use std::net::{Ipv4Addr, UdpSocket};

use tokio::{sync::oneshot, task::JoinHandle};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

/// The tunnel's end, and what serves the other.
fn served() -> (Arc<ServiceSockets>, JoinHandle<()>) {
    let (service, tunnel) = ends();
    (Arc::new(ServiceSockets::new(tunnel)), tokio::spawn(serve_sockets(service)))
}

fn ends() -> (SocketChannel, SocketChannel) {
    let (ours, theirs) = SocketChannel::pair().unwrap();
    (ours, SocketChannel::new(theirs).unwrap())
}

#[tokio::test]
async fn the_service_makes_the_sockets_and_makes_them_again_at_the_same_port() {
    let (service, _serving) = served();
    let made = service.ask(0).await.unwrap();
    let port = made.ports().v4;
    assert_ne!(port, 0);
    drop(made);
    let again = service.ask(port).await.unwrap();
    assert_eq!(again.ports().v4, port);
    let own = UdpSockets::bind(0).unwrap();
    assert_eq!(again.ports().v6.is_some(), own.ports().v6.is_some());
    assert!(again.receive_buffer().unwrap() >= own.receive_buffer().unwrap());
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    sender.send_to(b"hello", (Ipv4Addr::LOCALHOST, port)).unwrap();
    let receiver = UdpSocket::from(again.into_owned().0);
    receiver.set_nonblocking(false).unwrap();
    let mut room = [0; 16];
    assert_eq!(receiver.recv(&mut room).unwrap(), 5);
}

#[tokio::test]
async fn a_tunnel_whose_service_is_away_or_silent_makes_its_sockets_itself() {
    let (gone, tunnel) = ends();
    drop(gone);
    let (silent, other) = ends();
    for channel in [tunnel, other] {
        let tunnel: Arc<dyn MakeSockets> = Arc::new(ServiceSockets::new(channel));
        assert_ne!(timeout(LIMIT, tunnel.make(0)).await.unwrap().unwrap().ports().v4, 0);
    }
    drop(silent);
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_not_taken_for_the_next() {
    let (service, tunnel) = ends();
    let tunnel = Arc::new(ServiceSockets::new(tunnel));
    let first = Arc::clone(&tunnel).make(0).await.unwrap();
    assert_ne!(first.ports().v4, 0, "made by the tunnel itself: nobody answered in time");
    let serving = tokio::spawn(serve_sockets(service));
    let wanted = UdpSockets::bind(0).unwrap().ports().v4;
    assert_eq!(tunnel.ask(wanted).await.unwrap().ports().v4, wanted);
    drop((tunnel, first));
    timeout(LIMIT, serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_cannot_be_made_is_told_and_what_is_no_request_is_passed_over() {
    let (service, tunnel) = ends();
    let serving = tokio::spawn(serve_sockets(service));
    tunnel.send(b"\xff\xff\xff", &[]).await.unwrap();
    tunnel.send(&[7; MAX_PACKET + 100], &[]).await.unwrap();
    tunnel.send(&SocketsRequest { id: 7, port: 70_000 }.encode_to_vec(), &[]).await.unwrap();
    let (packet, descriptors) = timeout(LIMIT, tunnel.receive()).await.unwrap().unwrap();
    let answer = SocketsReply::decode(packet.as_slice()).unwrap();
    assert_eq!((answer.id, answer.error.as_str()), (7, "70000 is no port"));
    assert!(descriptors.is_empty());
    drop(tunnel);
    timeout(LIMIT, serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn serving_ends_with_the_tunnel_even_one_that_takes_nothing() {
    let (service, tunnel) = ends();
    let serving = tokio::spawn(serve_sockets(service));
    let (asked, asking) = oneshot::channel();
    tokio::spawn(async move {
        for id in 0..8 {
            tunnel.send(&SocketsRequest { id, port: 0 }.encode_to_vec(), &[]).await.unwrap();
        }
        let _ = asked.send(());
        drop(tunnel);
    });
    asking.await.unwrap();
    timeout(LIMIT, serving).await.unwrap().unwrap();
}
