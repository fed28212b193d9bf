//! WireGuard: our engine and `wireguard-go`, over UDP and through the lab's relay, and our whole tunnel with it.
//!
//! ```text
//! our engine ── UDP ────────────────────────────────┐
//! our engine ── lab's relay ── bridge of ours ─ UDP ┼─ wireguard-go ── wg0 ── kernel
//! our tunnel ── their relay ── their node ───── UDP ┘
//! ```
//! The kernel behind `wireguard-go` answers our echoes, so that what went there has come back. Everything runs
//! in namespaces of its own and needs no privilege.

mod echo;
mod guest;
mod wire;

use std::{
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;
use warren_actors::wireguard::{
    Engine, Engines, Keepalive, Opened, Sealed, Session, TICK, Ticked, open_room, padded, seal_room,
};
use warren_proto::{
    address::coder_address,
    key::{NodePrivate, NodePublic},
};

use self::{
    echo::{Echoes, Received},
    guest::Guest,
    wire::{RelayWire, UdpWire, Wire, bridge},
};
use crate::{
    deployment::{Shape, Theirs, agent_at, random_id},
    doubles::Make,
    isolated,
    program::{Program, has_program},
    support::{Deployment, LIMIT, skipped},
};

/// Our address inside the tunnel, and theirs.
const OURS: Ipv6Addr = Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 0, 0, 0, 0, 1);
const THEIRS: Ipv6Addr = Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 0, 0, 0, 0, 2);

/// How long a packet that got lost is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

#[test]
fn our_engine_and_wireguard_go_meet_renew_and_carry_a_megabyte_each_way_over_udp() {
    isolated(|| {
        let (keys, mut guest) = (NodePrivate::generate(), Guest::start(THEIRS));
        let wire = UdpWire::to(guest.listen(51_820));
        guest.know(&keys.public(), OURS, Some(wire.address()));
        meet_renew_and_carry(&mut Ours::new(&keys, &guest.key(), wire), &mut guest);
    });
}

#[test]
fn our_engine_and_wireguard_go_meet_renew_and_carry_a_megabyte_each_way_through_the_labs_relay() {
    isolated(|| {
        let (keys, mut guest) = (NodePrivate::generate(), Guest::start(THEIRS));
        let deployment = Deployment::start(0);
        let address = deployment.lab.url().strip_prefix("http://").unwrap().parse().unwrap();
        let theirs = RelayWire::log_in(address, guest.private(), keys.public());
        let bridged = bridge(theirs, guest.listen(51_820));
        guest.know(&keys.public(), OURS, Some(bridged));
        let wire = RelayWire::log_in(address, &keys, guest.key());
        meet_renew_and_carry(&mut Ours::new(&keys, &guest.key(), wire), &mut guest);
        assert!(deployment.lab.relay().packets() > 2 * u64::from(echo::MEGABYTE));
    });
}

#[test]
fn both_follow_the_other_to_another_port() {
    isolated(|| {
        let (keys, mut guest) = (NodePrivate::generate(), Guest::start(THEIRS));
        let wire = UdpWire::to(guest.listen(51_820));
        guest.know(&keys.public(), OURS, Some(wire.address()));
        let mut ours = Ours::new(&keys, &guest.key(), wire);
        ours.echo(1);
        let handshake = guest.last_handshake();

        ours.wire.move_away();
        ours.echo(1);
        assert_eq!(guest.endpoint(), ours.wire.address());

        let moved = guest.listen(51_821);
        guest.say(OURS, b"from elsewhere");
        assert_eq!(ours.hear(), b"from elsewhere");
        assert_eq!(ours.wire.peer, moved);
        ours.echo(1);
        assert_eq!(guest.last_handshake(), handshake, "none of it needs a handshake");
    });
}

#[test]
fn our_tunnel_carries_a_megabyte_each_way_to_wireguard_go_in_their_deployment() {
    if has_program("our tunnel and wireguard-go in their deployment") {
        isolated(|| through_their_deployment(Shape::default()));
    }
}

#[test]
fn our_tunnel_carries_a_megabyte_each_way_to_wireguard_go_by_websocket() {
    if has_program("our tunnel and wireguard-go by websocket") {
        isolated(|| through_their_deployment(Shape { forces_websockets: true, ..Shape::default() }));
    }
}

fn through_their_deployment(shape: Shape) {
    let agent_id = random_id();
    let mut guest = Guest::start(coder_address(&agent_id));
    let listens = guest.listen(51_820);
    let relay = Program::start("relay", &[]);
    let agent = agent_at(&relay, &["--private", &guest::hex(&guest.private().to_bytes())]);
    let mut theirs = Theirs::around(relay, agent, agent_id, shape);

    let manager = theirs.join(Make::Helper);
    let known = theirs.introduce();
    let own: Ipv6Addr =
        known.told["addresses"][0].as_str().unwrap().strip_suffix("/128").unwrap().parse().unwrap();
    let tunnel = NodePublic::from_hex(known.node.strip_prefix("nodekey:").unwrap()).unwrap();
    guest.know(&tunnel, own, None);
    theirs.agent.order(json!({"order": "bridge", "node": known.node, "address": listens.to_string()}));

    let device = manager.device().unwrap();
    device.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = vec![0; 2048];
    let mut echoes = Echoes::new(own, coder_address(&agent_id), echo::MEGABYTE);
    echoes.run(
        |packet| drop(device.send(packet)),
        || device.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec()),
    );
    assert!(guest.received() >= 1 << 20 && guest.sent() >= 1 << 20);
}

/// What both must do whatever carries their datagrams.
fn meet_renew_and_carry<W: Wire>(ours: &mut Ours<W>, guest: &mut Guest) {
    // We begin.
    ours.echo(1);
    let first = guest.last_handshake();
    assert!(first > Duration::ZERO);
    ours.echo(echo::MEGABYTE);
    assert!(guest.received() >= 1 << 20 && guest.sent() >= 1 << 20);

    // We renew the session while the old one is good.
    ours.begin_anew();
    ours.echo(1);
    let second = guest.last_handshake();
    assert!(second > first);

    // They begin, having forgotten the session that we still have.
    let endpoint = guest.endpoint();
    guest.forget(&ours.public);
    guest.know(&ours.public, OURS, Some(endpoint));
    guest.say(OURS, b"hello");
    assert_eq!(ours.hear(), b"hello");
    assert!(guest.last_handshake() > second);
    ours.echo(1);
}

/// Our engine on a wire.
struct Ours<W> {
    keys: Engines,
    public: NodePublic,
    peer: NodePublic,
    engine: Box<dyn Engine>,
    index: u32,
    ticked: Instant,
    wire: W,
}

impl<W: Wire> Ours<W> {
    fn new(private: &NodePrivate, peer: &NodePublic, wire: W) -> Self {
        let (keys, index, now) = (Engines::new(private), 1, Instant::now());
        let engine = keys.engine(peer, index, now);
        Self { public: private.public(), peer: *peer, keys, engine, index, ticked: now, wire }
    }

    /// Forgets the session, as a process that starts again with its key.
    fn begin_anew(&mut self) {
        self.index += 1;
        self.engine = self.keys.engine(&self.peer, self.index, Instant::now());
        self.engine.set_keepalive(Keepalive::Off);
    }

    /// Sends so many echoes and gets every one back as it was.
    fn echo(&mut self, count: u16) {
        let mut echoes = Echoes::new(OURS, THEIRS, count);
        let this = std::cell::RefCell::new(self);
        echoes.run(|packet| this.borrow_mut().send(packet), || this.borrow_mut().receive(PATIENCE));
    }

    /// The payload of the next UDP datagram inside.
    fn hear(&mut self) -> Vec<u8> {
        let until = Instant::now() + LIMIT;
        loop {
            let packet = self.receive(until.saturating_duration_since(Instant::now())).expect("a packet");
            if let Some(Received::Datagram(payload)) = echo::read(&packet, THEIRS, OURS) {
                return payload;
            }
        }
    }

    fn send(&mut self, packet: &[u8]) {
        let mut plain = packet.to_vec();
        plain.resize(padded(packet.len()), 0);
        let mut out = vec![0; seal_room(packet.len())];
        match self.engine.seal(Instant::now(), &plain, &mut out) {
            Sealed::Data(length) | Sealed::Handshake(length) => self.wire.send(&out[..length]),
            Sealed::Waiting => {}
            Sealed::Refused => panic!("the engine does not take a packet of {} bytes", packet.len()),
        }
    }

    /// The next packet from inside, if one comes in time.
    fn receive(&mut self, limit: Duration) -> Option<Vec<u8>> {
        let until = Instant::now() + limit;
        loop {
            self.tick();
            let left = until.checked_duration_since(Instant::now())?;
            let Some(datagram) = self.wire.receive(left.min(TICK)) else { continue };
            let mut out = vec![0; open_room(datagram.len())];
            let session = match self.engine.open(Instant::now(), &datagram, &mut out) {
                Opened::Packet { len, session } => {
                    self.drain(session);
                    out.truncate(len);
                    return Some(out);
                }
                Opened::Answer { len, session } => {
                    self.wire.send(&out[..len]);
                    session
                }
                Opened::Nothing { session } => session,
                Opened::Malformed { .. } => panic!("what came is no packet"),
                // Of a session that was given up meanwhile.
                Opened::Refused => Session::Unchanged,
            };
            self.drain(session);
        }
    }

    fn drain(&mut self, session: Session) {
        if session == Session::New {
            let mut out = vec![0; 2048];
            while let Some(length) = self.engine.drain(Instant::now(), &mut out) {
                self.wire.send(&out[..length]);
            }
        }
    }

    fn tick(&mut self) {
        if self.ticked.elapsed() < TICK {
            return;
        }
        self.ticked = Instant::now();
        self.keys.reset_guard();
        let mut out = vec![0; 2048];
        if let Ticked::Send(length) = self.engine.tick(self.ticked, &mut out) {
            self.wire.send(&out[..length]);
        }
    }
}

/// Runs the test's body in namespaces of its own, if `wireguard-go` is there.
fn isolated<Body: FnOnce()>(body: Body) {
    match Command::new("wireguard-go").arg("--version").output() {
        Ok(_) => isolated::isolated(body),
        Err(error) => skipped(isolated::test_of::<Body>(), &format!("wireguard-go is missing: {error}")),
    }
}

/// Where something listens on the loopback.
fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn free_socket() -> UdpSocket {
    UdpSocket::bind(loopback(0)).unwrap()
}
