//! From a link to the TUN: opens what one read brought, packet by packet under one lock for each run from
//! one peer, answers what is answered inside the tunnel, and writes the rest as one batch.

use std::{ops::Range, sync::Arc, time::Instant};

use warren_proto::{disco::is_probe, key::NodePublic};

use super::{
    Plane,
    counters::{Drop, Tally},
    disco,
    inner::{self, Content, Header},
    peers::{Peer, Settings},
};
use crate::{
    packet_io::{batch::Coalescer, batch::MAX_FRAME, tun::Tun},
    relay::{
        frames::Packet,
        link::Link,
        queue::{Frames, Full},
    },
    wireguard::{Engine, OVERHEAD, Opened, Sealed, Session, open_room, padded, seal_room},
};

/// Opened packets of one batch. A read brings at most 128 KiB; a batch that is larger is written in two.
const BUFFER: usize = 256 * 1024;

const _: () = assert!(BUFFER >= 2 * seal_room(MAX_FRAME));

/// The receiving side of one link; keeps its memory from batch to batch.
pub(crate) struct Inbound {
    packets: Vec<Packet>,
    buffer: Vec<u8>,
    filled: usize,
    opened: Vec<Range<usize>>,
    coalescer: Coalescer,
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            packets: Vec::new(),
            buffer: vec![0; BUFFER],
            filled: 0,
            opened: Vec::new(),
            coalescer: Coalescer::default(),
        }
    }
}

/// What handling one batch needs besides the buffers.
struct Batch<'a> {
    plane: &'a Plane,
    link: &'a Link,
    tun: Option<Arc<Tun>>,
    now: Instant,
    tally: Tally,
}

impl Inbound {
    /// Adds a packet to the batch.
    pub(crate) fn add(&mut self, packet: Packet) {
        self.packets.push(packet);
    }

    /// Handles the batch; `bytes` is what its packets refer to.
    pub(crate) fn receive(&mut self, plane: &Plane, link: &Link, bytes: &[u8], now: Instant) {
        if self.packets.is_empty() {
            return;
        }
        let mut batch = Batch { plane, link, tun: plane.tun.load_full(), now, tally: Tally::default() };
        let packets = std::mem::take(&mut self.packets);
        let mut rest = packets.as_slice();
        while let Some((source, _)) = rest.first().and_then(|first| first.of(bytes)) {
            let is_same = |packet: &&Packet| packet.of(bytes).is_some_and(|(key, _)| key == source);
            let (run, later) = rest.split_at(rest.iter().take_while(is_same).count());
            self.receive_run(
                &mut batch,
                NodePublic(*source),
                run.iter().filter_map(|packet| packet.of(bytes)),
            );
            rest = later;
        }
        self.packets = packets;
        self.packets.clear();
        self.flush(&mut batch);
        plane.counters.add(&batch.tally);
    }

    fn receive_run<'a>(
        &mut self,
        batch: &mut Batch<'_>,
        source: NodePublic,
        run: impl Iterator<Item = (&'a [u8; 32], &'a [u8])>,
    ) {
        let Some(peer) = batch.plane.peers.by_key(&source) else {
            return batch.tally.drop_many(Drop::UnknownPeer, run.count() as u64);
        };
        peer.learn_region(batch.link.region());
        let settings = peer.settings();
        let (received, sent) = (batch.tally.received, batch.tally.sent);
        let mut engine = peer.engine();
        let mut session = Session::Unchanged;
        for (_, packet) in run {
            if is_probe(packet) {
                if !disco::handle(batch.plane, batch.link, &peer, packet, batch.now) {
                    batch.tally.drop(Drop::Disco);
                }
            } else if self.open(batch, &peer, &settings, &mut **engine, packet) == Session::New {
                session = Session::New;
            }
        }
        if session == Session::New {
            self.drain(batch, &peer, &mut **engine);
        }
        drop(engine);
        peer.count(batch.tally.received.since(received), batch.tally.sent.since(sent));
        if session == Session::New {
            batch.plane.counters.handshakes_completed.increment(1);
            batch.plane.events.handshake(peer.key);
        }
    }

    fn open(
        &mut self,
        batch: &mut Batch<'_>,
        peer: &Peer,
        settings: &Settings,
        engine: &mut dyn Engine,
        datagram: &[u8],
    ) -> Session {
        let start = self.room(batch, open_room(datagram.len()));
        let Some(out) = self.buffer.get_mut(start..start + open_room(datagram.len())) else {
            batch.tally.drop(Drop::Refused);
            return Session::Unchanged;
        };
        match engine.open(batch.now, datagram, out) {
            Opened::Packet { len, session } => {
                batch.tally.received.add(len);
                self.deliver(batch, peer, settings, engine, start..start + len);
                session
            }
            Opened::Answer { len, session } => {
                if let Some(answer) = out.get(..len) {
                    count_unsent(batch.link.send(&peer.key, answer), &mut batch.tally);
                }
                session
            }
            Opened::Nothing { session } => session,
            Opened::Malformed { session } => {
                batch.tally.drop(Drop::Inner);
                session
            }
            Opened::Refused => {
                batch.tally.drop(Drop::Refused);
                Session::Unchanged
            }
        }
    }

    /// Where `room` bytes are free; what was opened before is written if it must be.
    fn room(&mut self, batch: &mut Batch<'_>, room: usize) -> usize {
        if self.filled + room > self.buffer.len() {
            self.flush(batch);
        }
        self.filled
    }

    /// Checks an inner packet, answers it if that is ours to do, and else keeps it for the TUN.
    fn deliver(
        &mut self,
        batch: &mut Batch<'_>,
        peer: &Peer,
        settings: &Settings,
        engine: &mut dyn Engine,
        range: Range<usize>,
    ) {
        let Some(bytes) = self.buffer.get(range.clone()) else { return };
        let Some(header) = Header::of(bytes) else { return batch.tally.drop(Drop::Source) };
        if !settings.addresses.contains(&header.source) {
            return batch.tally.drop(Drop::Source);
        }
        if header.destination != batch.plane.address {
            return batch.tally.drop(Drop::Destination);
        }
        let answer = match header.content {
            Content::Tsmp => match inner::tsmp_pong(bytes) {
                Some(answer) => Some(answer),
                // Other messages of this kind are for nobody else either.
                None => return,
            },
            Content::Icmpv6 if batch.tun.is_none() => inner::echo_reply(bytes),
            Content::Icmpv6 | Content::Other => None,
        };
        match answer {
            Some(answer) => seal(batch, peer, engine, &answer),
            None if batch.tun.is_none() => batch.tally.drop(Drop::NoDevice),
            None => {
                self.filled = range.end;
                self.opened.push(range);
            }
        }
    }

    /// Sends the packets that waited for a session. They count with their padding: the engine has forgotten how
    /// long they were.
    fn drain(&mut self, batch: &mut Batch<'_>, peer: &Peer, engine: &mut dyn Engine) {
        let room = seal_room(MAX_FRAME);
        let start = self.room(batch, room);
        while let Some(out) = self.buffer.get_mut(start..start + room)
            && let Some(len) = engine.drain(batch.now, out)
        {
            let Some(packet) = out.get(..len) else { continue };
            match batch.link.send(&peer.key, packet) {
                Ok(()) => batch.tally.sent.add(len.saturating_sub(OVERHEAD)),
                Err(Full) => batch.tally.drop(Drop::QueueFull),
            }
        }
    }

    fn flush(&mut self, batch: &mut Batch<'_>) {
        if let Some(tun) = &batch.tun {
            let refused = tun.write(&mut self.buffer, &self.opened, &mut self.coalescer);
            batch.tally.drop_many(Drop::Device, refused);
        }
        self.opened.clear();
        self.filled = 0;
    }
}

/// Seals an answer made here.
fn seal(batch: &mut Batch<'_>, peer: &Peer, engine: &mut dyn Engine, packet: &[u8]) {
    let mut packet = packet.to_vec();
    let len = packet.len();
    packet.resize(padded(len), 0);
    let mut frames = batch.link.outgoing().lock();
    let sealed = frames.room(seal_room(len)).map(|room| engine.seal(batch.now, &packet, room));
    commit(&mut frames, peer, sealed, len, &mut batch.tally);
    drop(frames);
    batch.link.wake();
}

fn commit(frames: &mut Frames, peer: &Peer, sealed: Result<Sealed, Full>, len: usize, tally: &mut Tally) {
    match sealed {
        Ok(Sealed::Data(sealed)) => {
            frames.commit(&peer.key, sealed);
            tally.sent.add(len);
        }
        Ok(Sealed::Handshake(sealed)) => frames.commit(&peer.key, sealed),
        Ok(Sealed::Waiting) => {}
        Ok(Sealed::Refused) => tally.drop(Drop::Unsealed),
        Err(Full) => tally.drop(Drop::QueueFull),
    }
}

fn count_unsent(outcome: Result<(), Full>, tally: &mut Tally) {
    if outcome == Err(Full) {
        tally.drop(Drop::QueueFull);
    }
}
