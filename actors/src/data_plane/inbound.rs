//! From a link or a socket to the TUN: opens what one read brought, packet by packet under one lock for each run
//! from one peer, answers what is answered inside the tunnel, and writes the rest as one batch.

use std::{net::SocketAddr, ops::Range, sync::Arc, time::Instant};

use warren_proto::{disco::is_probe, key::NodePublic, stun};

use super::{
    Plane, StunAnswer, TsmpPong,
    counters::{Drop, Tally, Way},
    direct::Kind,
    disco,
    inner::{self, Content, Header},
    paths::Origin,
    peers::{Peer, Settings},
};
use crate::{
    packet_io::{batch::Coalescer, batch::MAX_FRAME, tun::Tun},
    relay::{frames::Packet, link::Link},
    udp::{Received, Runs},
    wireguard::{Engine, OVERHEAD, Opened, Sealed, Session, open_room, padded, seal_room},
};

/// Opened packets of one batch. A read brings at most 128 KiB from a link; a batch that is larger, as those of a
/// socket may be, is written in parts.
const BUFFER: usize = 256 * 1024;

const _: () = assert!(BUFFER >= 2 * seal_room(MAX_FRAME));

/// The receiving side of one link or socket; keeps its memory from batch to batch.
pub(crate) struct Inbound {
    packets: Vec<Packet>,
    buffer: Vec<u8>,
    filled: usize,
    opened: Vec<Range<usize>>,
    coalescer: Coalescer,
    /// What is answered over UDP; sent when no lock is held.
    answers: Runs,
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            packets: Vec::new(),
            buffer: vec![0; BUFFER],
            filled: 0,
            opened: Vec::new(),
            coalescer: Coalescer::default(),
            answers: Runs::default(),
        }
    }
}

/// What handling one batch needs besides the buffers.
struct Batch<'a> {
    plane: &'a Plane,
    tun: Option<Arc<Tun>>,
    now: Instant,
    tally: Tally,
}

impl<'a> Batch<'a> {
    fn new(plane: &'a Plane, now: Instant) -> Self {
        Self { plane, tun: plane.tun.load_full(), now, tally: Tally::default() }
    }
}

/// Whom a run is from, and by which way.
#[derive(Clone, Copy)]
struct Sender<'a> {
    peer: &'a Peer,
    settings: &'a Settings,
    origin: Origin<'a>,
}

impl Inbound {
    /// Adds a packet to the batch.
    pub(crate) fn add(&mut self, packet: Packet) {
        self.packets.push(packet);
    }

    /// Handles the batch of a link; `bytes` is what its packets refer to.
    pub(crate) fn receive(&mut self, plane: &Plane, link: &Link, bytes: &[u8], now: Instant) {
        if self.packets.is_empty() {
            return;
        }
        let mut batch = Batch::new(plane, now);
        let packets = std::mem::take(&mut self.packets);
        let mut rest = packets.as_slice();
        while let Some((source, _)) = rest.first().and_then(|first| first.of(bytes)) {
            let is_same = |packet: &&Packet| packet.of(bytes).is_some_and(|(key, _)| key == source);
            let (run, later) = rest.split_at(rest.iter().take_while(is_same).count());
            let run = run.iter().filter_map(|packet| packet.of(bytes)).map(|(_, packet)| packet);
            self.receive_relayed(&mut batch, link, NodePublic(*source), run);
            rest = later;
        }
        self.packets = packets;
        self.packets.clear();
        self.finish(batch);
    }

    /// Handles the batch of a socket: what was read, and what `more` reads to it.
    pub(crate) fn receive_direct(
        &mut self,
        plane: &Plane,
        received: &mut Received,
        now: Instant,
        mut more: impl FnMut(&mut Received) -> bool,
    ) {
        let mut batch = Batch::new(plane, now);
        loop {
            for (from, datagrams) in received.by_source() {
                self.receive_from(&mut batch, from, datagrams);
            }
            if !more(received) {
                break;
            }
        }
        self.finish(batch);
    }

    fn receive_relayed<'a>(
        &mut self,
        batch: &mut Batch<'_>,
        link: &Link,
        source: NodePublic,
        run: impl Iterator<Item = &'a [u8]> + Clone,
    ) {
        let Some(peer) = batch.plane.peers.by_key(&source) else {
            return batch.tally.drop_many(Drop::UnknownPeer, run.count() as u64);
        };
        peer.learn_region(link.region());
        for probe in run.clone().filter(|packet| is_probe(packet)) {
            if !disco::handle_relayed(batch.plane, link, &peer, probe, batch.now) {
                batch.tally.drop(Drop::Disco);
            }
        }
        let packets = run.filter(|packet| !is_probe(packet));
        if packets.clone().next().is_some() {
            peer.note_answering(link.region());
        }
        self.receive_run(batch, &peer, Origin::Relay(link), packets);
    }

    fn receive_from<'a>(
        &mut self,
        batch: &mut Batch<'_>,
        from: SocketAddr,
        datagrams: impl Iterator<Item = &'a [u8]> + Clone,
    ) {
        let mut encrypted = 0;
        for datagram in datagrams.clone() {
            match Kind::of(datagram) {
                Kind::WireGuard => encrypted += 1,
                Kind::Probe if disco::handle_direct(batch.plane, from, datagram, batch.now) => {}
                Kind::Probe => batch.tally.drop(Drop::Disco),
                Kind::Stun => hear_stun(batch, from, datagram),
            }
        }
        if encrypted == 0 {
            return;
        }
        let Some(peer) = batch.plane.peers.by_source(&from) else {
            return batch.tally.drop_many(Drop::UnknownSource, encrypted);
        };
        let run = datagrams.filter(|datagram| Kind::of(datagram) == Kind::WireGuard);
        self.receive_run(batch, &peer, Origin::Direct(from), run);
    }

    fn receive_run<'a>(
        &mut self,
        batch: &mut Batch<'_>,
        peer: &Peer,
        origin: Origin<'_>,
        run: impl Iterator<Item = &'a [u8]>,
    ) {
        let settings = peer.settings();
        let sender = Sender { peer, settings: &settings, origin };
        let (received, sent) = (batch.tally.received.total(), batch.tally.sent.total());
        let (mut session, mut is_authentic) = (Session::Unchanged, false);
        let mut engine = peer.engine();
        for datagram in run {
            let Some(now) = self.open(batch, sender, &mut **engine, datagram) else { continue };
            is_authentic = true;
            if now == Session::New {
                session = Session::New;
            }
        }
        if session == Session::New {
            self.drain(batch, sender, &mut **engine);
        }
        drop(engine);
        peer.count(batch.tally.received.total().since(received), batch.tally.sent.total().since(sent));
        if is_authentic {
            batch.plane.feed(peer, |path| path.handle_received(batch.now, origin.via()));
        }
        if session == Session::New {
            batch.plane.counters.handshakes_completed.increment(1);
            batch.plane.events.handshake(peer.key);
        }
    }

    /// Opens one datagram; `None` where it is not authentic.
    fn open(
        &mut self,
        batch: &mut Batch<'_>,
        sender: Sender<'_>,
        engine: &mut dyn Engine,
        datagram: &[u8],
    ) -> Option<Session> {
        let start = self.room(batch, open_room(datagram.len()));
        let Some(out) = self.buffer.get_mut(start..start + open_room(datagram.len())) else {
            batch.tally.drop(Drop::Refused);
            return None;
        };
        match engine.open(batch.now, datagram, out) {
            Opened::Packet { len, session } => {
                batch.tally.received.by(sender.origin.way()).add(len);
                self.deliver(batch, sender, engine, start..start + len);
                Some(session)
            }
            Opened::Answer { len, session } => {
                let message = self.buffer.get(start..start + len).unwrap_or_default();
                if let Err(reason) = answer(&mut self.answers, batch, sender, message) {
                    batch.tally.drop(reason);
                }
                Some(session)
            }
            Opened::Nothing { session } => Some(session),
            Opened::Malformed { session } => {
                batch.tally.drop(Drop::Inner);
                Some(session)
            }
            Opened::Refused => {
                batch.tally.drop(Drop::Refused);
                None
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
        sender: Sender<'_>,
        engine: &mut dyn Engine,
        range: Range<usize>,
    ) {
        let Some(bytes) = self.buffer.get(range.clone()) else { return };
        let Some(header) = Header::of(bytes) else { return batch.tally.drop(Drop::Source) };
        if !sender.settings.addresses.contains(&header.source) {
            return batch.tally.drop(Drop::Source);
        }
        if header.destination != batch.plane.address {
            return batch.tally.drop(Drop::Destination);
        }
        let answer = match header.content {
            Content::Tsmp => match inner::tsmp_pong(bytes) {
                Some(answer) => Some(answer),
                None => {
                    // Other messages of this kind are for nobody else either.
                    let Some(data) = inner::tsmp_answered(bytes) else { return };
                    if sender.peer.take_tsmp() {
                        let (peer, received_at) = (sender.peer.key, batch.now);
                        batch.plane.events.tsmp_pong(TsmpPong { peer, data, received_at });
                    }
                    return;
                }
            },
            Content::Icmpv6 if batch.tun.is_none() => inner::echo_reply(bytes),
            Content::Icmpv6 | Content::Other => None,
        };
        match answer {
            Some(answer) => self.seal(batch, sender, engine, answer),
            None if batch.tun.is_none() => batch.tally.drop(Drop::NoDevice),
            None => {
                self.filled = range.end;
                self.opened.push(range);
            }
        }
    }

    /// Seals an answer made here.
    fn seal(
        &mut self,
        batch: &mut Batch<'_>,
        sender: Sender<'_>,
        engine: &mut dyn Engine,
        mut packet: Vec<u8>,
    ) {
        let len = packet.len();
        packet.resize(padded(len), 0);
        let mut sealed = vec![0; seal_room(len)];
        let (message, is_data) = match engine.seal(batch.now, &packet, &mut sealed) {
            Sealed::Data(sealed) => (sealed, true),
            Sealed::Handshake(sealed) => (sealed, false),
            Sealed::Waiting => return,
            Sealed::Refused => return batch.tally.drop(Drop::Unsealed),
        };
        let message = sealed.get(..message).unwrap_or_default();
        match answer(&mut self.answers, batch, sender, message) {
            Ok(way) if is_data => batch.tally.sent.by(way).add(len),
            Ok(_) => {}
            Err(reason) => batch.tally.drop(reason),
        }
    }

    /// Sends the packets that waited for a session. They count with their padding: the engine has forgotten how
    /// long they were.
    fn drain(&mut self, batch: &mut Batch<'_>, sender: Sender<'_>, engine: &mut dyn Engine) {
        let room = seal_room(MAX_FRAME);
        let start = self.room(batch, room);
        while let Some(out) = self.buffer.get_mut(start..start + room)
            && let Some(len) = engine.drain(batch.now, out)
        {
            let message = out.get(..len).unwrap_or_default();
            match answer(&mut self.answers, batch, sender, message) {
                Ok(way) => batch.tally.sent.by(way).add(len.saturating_sub(OVERHEAD)),
                Err(reason) => batch.tally.drop(reason),
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

    fn finish(&mut self, mut batch: Batch<'_>) {
        self.flush(&mut batch);
        let Batch { plane, mut tally, .. } = batch;
        if !self.answers.is_empty() {
            match &*plane.udp.load() {
                Some(sockets) => {
                    self.answers.send_now(sockets, |to, why, count| plane.lose(&mut tally, to, why, count));
                }
                None => tally.drop_many(Drop::QueueFull, self.answers.clear()),
            }
        }
        plane.counters.add(&tally);
    }
}

/// Sends a sealed message back, over the way that the peer's path names; through a relay by the link it came by.
fn answer(answers: &mut Runs, batch: &Batch<'_>, sender: Sender<'_>, message: &[u8]) -> Result<Way, Drop> {
    let Sender { peer, origin, .. } = sender;
    // The engine is locked: what follows from this for the path is done after the run.
    let route = peer.ways().path.route(batch.now);
    let relayed = route.relay.then(|| {
        let sent = match origin {
            Origin::Relay(link) => link.send(&peer.key, message),
            Origin::Direct(_) => batch.plane.edge(peer).ok_or(Drop::NoLink)?.send(&peer.key, message),
        };
        sent.map_err(|_| Drop::QueueFull)
    });
    let direct = route.direct.map(|to| answers.push(to, message).map_err(|_| Drop::QueueFull));
    match (direct, relayed) {
        (Some(Ok(())), _) => Ok(Way::Direct),
        (_, Some(relayed)) => relayed.map(|()| Way::Relay),
        (Some(Err(reason)), None) => Err(reason),
        (None, None) => Err(Drop::NoLink),
    }
}

fn hear_stun(batch: &mut Batch<'_>, from: SocketAddr, datagram: &[u8]) {
    match stun::Response::decode(datagram) {
        Ok(stun::Response { txid, address }) => {
            batch.plane.events.stun(StunAnswer { from, txid, address, received_at: batch.now });
        }
        Err(_) => batch.tally.drop(Drop::Stun),
    }
}
