//! From the TUN to the links and sockets: reads a batch, finds each packet's peer, and seals it in the queue of
//! that peer's link, or in a run for the socket. Nothing waits for a link: when its queue is full, the newest packet
//! is dropped. A socket that is full is waited for, and the TUN is not read meanwhile.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr},
    sync::{Arc, MutexGuard},
    time::Instant,
};

use warren_core::path::Route;
use warren_proto::key::NodePublic;

use super::{
    Plane,
    counters::{Amount, Drop, Tally, Way},
    peers::{Peer, Routes},
};
use crate::{
    packet_io::{
        batch::{self, SLACK},
        tun::{Frame, READ_ROOM, Tun},
    },
    relay::queue::Frames,
    udp::Runs,
    wireguard::{Engine, Sealed, seal_room},
};

/// Reads per batch: one costs 10 % of the throughput, more than four gain nothing.
const READS: usize = 4;

/// Serves a device until it fails; what it reads goes to the peers.
pub(super) async fn serve(plane: Arc<Plane>, tun: Arc<Tun>) {
    if let Err(error) = read_all(&plane, &tun).await {
        tracing::error!(%error, "the TUN device cannot be read any more");
        plane.lose_tun(&tun);
    }
}

async fn read_all(plane: &Plane, tun: &Tun) -> io::Result<()> {
    let readiness = tun.readiness()?;
    let (mut buffer, mut runs) = (vec![0; READ_ROOM], Runs::default());
    loop {
        let mut ready = readiness.readable().await?;
        let outcome = read_batch(plane, tun, &mut buffer, &mut runs);
        send(plane, &mut runs).await;
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            outcome => outcome?,
        }
        // The links' writers get their turn before the next batch.
        tokio::task::yield_now().await;
    }
}

/// Sends what a batch has for the sockets.
async fn send(plane: &Plane, runs: &mut Runs) {
    if runs.is_empty() {
        return;
    }
    let mut tally = Tally::default();
    match plane.udp.load_full() {
        Some(sockets) => {
            runs.send(&sockets, |to, why, count| plane.lose(&mut tally, to, why, count)).await;
        }
        None => tally.drop_many(Drop::QueueFull, runs.clear()),
    }
    plane.counters.add(&tally);
}

/// What one batch keeps at hand.
struct Batch<'a> {
    plane: &'a Plane,
    routes: &'a Routes,
    now: Instant,
    tally: Tally,
    runs: &'a mut Runs,
    /// The way to the last peer: a path is asked once for packets that follow each other.
    asked: Option<(NodePublic, Route)>,
}

fn read_batch(plane: &Plane, tun: &Tun, buffer: &mut [u8], runs: &mut Runs) -> io::Result<()> {
    let (routes, now) = (plane.peers.routes(), Instant::now());
    let mut batch = Batch { plane, routes: &routes, now, tally: Tally::default(), runs, asked: None };
    let outcome = (0..READS).try_for_each(|_| {
        match tun.read(buffer) {
            Ok(frame) => batch.transmit(buffer, frame),
            // A read that a signal interrupts, or that brings less than a header, says nothing of the next.
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::InvalidData) => {
            }
            Err(error) => return Err(error),
        }
        Ok(())
    });
    plane.counters.add(&batch.tally);
    outcome
}

impl Batch<'_> {
    /// Seals one packet or superpacket; all its segments have one destination.
    fn transmit(&mut self, buffer: &mut [u8], frame: Frame) {
        let Some(packet) = buffer.get_mut(frame.start..) else { return };
        let Some(destination) = packet.get(..frame.len).and_then(destination) else {
            return self.tally.drop(Drop::Malformed);
        };
        let Some(peer) = self.routes.get(&destination) else { return self.tally.drop(Drop::NoRoute) };
        let route = self.route(peer);
        let link = if route.relay { self.plane.edge_for_data(peer) } else { None };
        let mut engine = peer.engine();
        let queue = link.as_ref().map(|link| link.outgoing().lock());
        let mut edge = match (route.direct, queue) {
            (Some(to), copy) => Edge::Direct { runs: self.runs, to, copy },
            (None, Some(queue)) => Edge::Relay(queue),
            (None, None) => return self.tally.drop(Drop::NoLink),
        };
        seal(peer, &mut **engine, &mut edge, packet, frame, self.now, &mut self.tally);
        drop((engine, edge));
        if let Some(link) = link {
            link.wake();
        }
    }

    fn route(&mut self, peer: &Peer) -> Route {
        match self.asked {
            Some((key, route)) if key == peer.key => route,
            _ => {
                let route = self.plane.route(peer, self.now);
                self.asked = Some((peer.key, route));
                route
            }
        }
    }
}
/// Where a batch to one peer is sealed.
enum Edge<'a> {
    /// In the queue of a link.
    Relay(MutexGuard<'a, Frames>),
    /// In a run for a socket, and copied to the queue of a link where there is one.
    Direct { runs: &'a mut Runs, to: SocketAddr, copy: Option<MutexGuard<'a, Frames>> },
}

impl Edge<'_> {
    fn way(&self) -> Way {
        match self {
            Self::Relay(_) => Way::Relay,
            Self::Direct { .. } => Way::Direct,
        }
    }

    fn room(&mut self, room: usize) -> Option<&mut [u8]> {
        match self {
            Self::Relay(queue) => queue.room(room).ok(),
            Self::Direct { runs, .. } => runs.room(room).ok(),
        }
    }

    fn commit(&mut self, peer: &Peer, len: usize) {
        match self {
            Self::Relay(queue) => queue.commit(&peer.key, len),
            Self::Direct { runs, to, copy } => {
                let sealed = runs.commit(*to, len);
                if let Some(queue) = copy {
                    // The same packet is on its way over UDP.
                    let _ = queue.push(&peer.key, sealed);
                }
            }
        }
    }
}

fn seal(
    peer: &Peer,
    engine: &mut dyn Engine,
    edge: &mut Edge<'_>,
    packet: &mut [u8],
    frame: Frame,
    now: Instant,
    tally: &mut Tally,
) {
    let mut sent = Amount::default();
    let outcome = batch::split(&frame.virtio, packet, frame.len, |segment| {
        let Some(room) = edge.room(seal_room(segment.len)) else { return tally.drop(Drop::QueueFull) };
        match engine.seal(now, segment.padded, room) {
            Sealed::Data(len) => {
                edge.commit(peer, len);
                sent.add(segment.len);
            }
            Sealed::Handshake(len) => edge.commit(peer, len),
            Sealed::Waiting => {}
            Sealed::Refused => tally.drop(Drop::Unsealed),
        }
    });
    if outcome.is_err() {
        tally.drop(Drop::Malformed);
    }
    let way = tally.sent.by(edge.way());
    way.packets += sent.packets;
    way.bytes += sent.bytes;
    peer.count(Amount::default(), sent);
}

fn destination(packet: &[u8]) -> Option<Ipv6Addr> {
    let is_ipv6 = packet.first()? >> 4 == 6;
    let (address, _) = packet.get(24..)?.split_first_chunk::<16>()?;
    is_ipv6.then(|| Ipv6Addr::from(*address))
}

const _: () = assert!(READ_ROOM >= SLACK + batch::MAX_FRAME);
