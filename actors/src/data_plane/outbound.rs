//! From the TUN to the links: reads a batch, finds each packet's peer, seals it in the queue of that
//! peer's link. Nothing waits for a link: when its queue is full, the newest packet is dropped.

use std::{io, net::Ipv6Addr, sync::Arc, time::Instant};

use super::{
    Plane,
    counters::{Amount, Drop, Tally},
    peers::{Peer, Routes},
};
use crate::{
    packet_io::{
        batch::{self, SLACK},
        tun::{Frame, READ_ROOM, Tun},
    },
    relay::link::Link,
    wireguard::{Sealed, seal_room},
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
    let mut buffer = vec![0; READ_ROOM];
    loop {
        let mut ready = readiness.readable().await?;
        match read_batch(plane, tun, &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            outcome => outcome?,
        }
        // The links' writers get their turn before the next batch.
        tokio::task::yield_now().await;
    }
}

fn read_batch(plane: &Plane, tun: &Tun, buffer: &mut [u8]) -> io::Result<()> {
    let routes = plane.peers.routes();
    let mut tally = Tally::default();
    let now = Instant::now();
    let outcome = (0..READS).try_for_each(|_| {
        match tun.read(buffer) {
            Ok(frame) => transmit(plane, &routes, buffer, frame, now, &mut tally),
            // A read that a signal interrupts, or that brings less than a header, says nothing of the next.
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::InvalidData) => {
            }
            Err(error) => return Err(error),
        }
        Ok(())
    });
    plane.counters.add(&tally);
    outcome
}

/// Seals one packet or superpacket; all its segments have one destination.
fn transmit(
    plane: &Plane,
    routes: &Routes,
    buffer: &mut [u8],
    frame: Frame,
    now: Instant,
    tally: &mut Tally,
) {
    let Some(packet) = buffer.get_mut(frame.start..) else { return };
    let Some(destination) = packet.get(..frame.len).and_then(destination) else {
        return tally.drop(Drop::Malformed);
    };
    let Some(peer) = routes.get(&destination) else { return tally.drop(Drop::NoRoute) };
    let Some(link) = plane.edge(peer) else { return tally.drop(Drop::NoLink) };
    seal(peer, &link, packet, frame, now, tally);
    link.wake();
}

fn seal(peer: &Peer, link: &Link, packet: &mut [u8], frame: Frame, now: Instant, tally: &mut Tally) {
    let mut sent = Amount::default();
    let mut engine = peer.engine();
    let mut frames = link.outgoing().lock();
    let outcome = batch::split(&frame.virtio, packet, frame.len, |segment| {
        let Ok(room) = frames.room(seal_room(segment.len)) else { return tally.drop(Drop::QueueFull) };
        match engine.seal(now, segment.padded, room) {
            Sealed::Data(len) => {
                frames.commit(&peer.key, len);
                sent.add(segment.len);
            }
            Sealed::Handshake(len) => frames.commit(&peer.key, len),
            Sealed::Waiting => {}
            Sealed::Refused => tally.drop(Drop::Unsealed),
        }
    });
    drop((engine, frames));
    if outcome.is_err() {
        tally.drop(Drop::Malformed);
    }
    tally.sent.packets += sent.packets;
    tally.sent.bytes += sent.bytes;
    peer.count(Amount::default(), sent);
}

fn destination(packet: &[u8]) -> Option<Ipv6Addr> {
    let is_ipv6 = packet.first()? >> 4 == 6;
    let (address, _) = packet.get(24..)?.split_first_chunk::<16>()?;
    is_ipv6.then(|| Ipv6Addr::from(*address))
}

const _: () = assert!(READ_ROOM >= SLACK + batch::MAX_FRAME);
