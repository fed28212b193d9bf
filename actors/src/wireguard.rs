//! The trait of a WireGuard engine, and the only file that names boringtun.
//!
//! One engine a peer, behind that peer's lock. It seals and opens packets in the buffers it is given, and
//! keeps the rules around boringtun that boringtun leaves to its caller: keepalives, the confirmation of
//! a session we answered, and no handshake only because a peer was idle (tailnet-data 10).

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use boringtun::{
    noise::{Tunn, TunnResult, errors::WireGuardError, rate_limiter::RateLimiter},
    x25519,
};
use warren_proto::key::{NodePrivate, NodePublic};

/// What sealing adds to a (padded) packet: 16 bytes in front and 16 behind.
pub const OVERHEAD: usize = 32;
/// Packets are padded with zeros to a multiple of this before they are sealed.
pub const PADDING: usize = 16;
/// The largest message of a handshake, and so the least room any call needs for its output.
pub const LEAST_ROOM: usize = 148;
/// How often [`Engine::tick`] must be called: an engine's time moves only there.
pub const TICK: Duration = Duration::from_millis(200);
/// How often [`Engines::reset_guard`] must be called.
pub const GUARD_RESET: Duration = Duration::from_secs(1);
/// The pause between keepalives to peers that are kept warm.
pub const KEEPALIVE: Duration = Duration::from_secs(25);

/// Handshake messages a second, of all peers together, after which cookies are asked for. A start with
/// a thousand agents brings as many answers within a second, and each costs about 0.1 ms.
const HANDSHAKES_PER_SECOND: u64 = 4096;
/// How long a first packet may stay unanswered until a new handshake is tried (wireguard: 10 s + 5 s).
const UNANSWERED_LIMIT: Duration = Duration::from_secs(15);
/// boringtun counts [`UNANSWERED_LIMIT`] from the last receive, rounded to its ticks: from here on it may fire.
const SILENCE_BEFORE_HOLD: Duration = Duration::from_secs(14);
/// A handshake that the peer began is completed or tried again by then (wireguard: 5 s).
const HANDSHAKE_RETRY: Duration = Duration::from_secs(5);
/// From this age on a session is renewed anyway, and boringtun's timers are never held.
const REKEY_AFTER: Duration = Duration::from_secs(120);

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const TRANSPORT: u8 = 4;
/// An empty transport message: nothing shorter is WireGuard's.
const SHORTEST: usize = 32;
/// boringtun keeps so many packets for a session to come, and drops the next ones without a word.
const MAX_WAITING: u64 = 256;

/// The length of a packet of `len` bytes when padded.
pub const fn padded(len: usize) -> usize {
    len.next_multiple_of(PADDING)
}

/// Room that [`Engine::seal`] needs for a packet of `len` bytes.
pub const fn seal_room(len: usize) -> usize {
    let room = padded(len) + OVERHEAD;
    if room < LEAST_ROOM { LEAST_ROOM } else { room }
}

/// Room that [`Engine::open`] needs for a datagram of `len` bytes.
pub const fn open_room(len: usize) -> usize {
    let room = len.saturating_sub(16);
    if room < LEAST_ROOM { LEAST_ROOM } else { room }
}

/// What became of a packet given to [`Engine::seal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealed {
    /// It is in the output, this many bytes.
    Data(usize),
    /// It waits for a session; the output holds this many bytes of a handshake message.
    Handshake(usize),
    /// It waits for a session that is on its way; the output is empty.
    Waiting,
    /// It was refused.
    Refused,
}

/// What became of a datagram given to [`Engine::open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// The output holds an inner packet of this many bytes, padding removed.
    Packet {
        /// Its length.
        len: usize,
        /// Whether it confirmed a session.
        session: Session,
    },
    /// The output holds an answer for the peer of this many bytes.
    Answer {
        /// Its length.
        len: usize,
        /// Whether a session began with it.
        session: Session,
    },
    /// A keepalive or a cookie; nothing to do.
    Nothing {
        /// Whether it confirmed a session.
        session: Session,
    },
    /// It is the peer's, but what was inside is no IP packet.
    Malformed {
        /// Whether it confirmed a session.
        session: Session,
    },
    /// It was not made by this peer for us, is a repetition, or nonsense.
    Refused,
}

/// Whether a session became usable: then [`Engine::drain`] has work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// A handshake is complete.
    New,
    /// As before.
    Unchanged,
}

/// What came due at a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ticked {
    /// Nothing.
    Nothing,
    /// The output holds this many bytes for the peer.
    Send(usize),
    /// A handshake was tried for 90 s and given up, with the packets that waited for it.
    GaveUp {
        /// How many they were.
        lost: u64,
    },
}

/// One peer's tunnel. Calls never wait; each output buffer must have the room that the functions above
/// tell. `now` never goes back.
pub trait Engine: Send {
    /// Seals a packet that is already padded to [`PADDING`].
    fn seal(&mut self, now: Instant, packet: &[u8], out: &mut [u8]) -> Sealed;
    /// Opens a datagram.
    fn open(&mut self, now: Instant, datagram: &[u8], out: &mut [u8]) -> Opened;
    /// The next of the packets that waited for a session, sealed; `None` when there is none. `out` needs
    /// [`seal_room`] of the largest packet.
    fn drain(&mut self, now: Instant, out: &mut [u8]) -> Option<usize>;
    /// Lets time pass.
    fn tick(&mut self, now: Instant, out: &mut [u8]) -> Ticked;
    /// Turns keepalives on or off.
    fn set_keepalive(&mut self, keepalive: Keepalive);
    /// Starts a handshake, again if one is under way; nothing if there is a session.
    fn initiate(&mut self, now: Instant, out: &mut [u8]) -> Option<usize>;
    /// Whether packets can be sealed at once.
    fn has_session(&self) -> bool;
    /// When the last handshake was completed.
    fn last_handshake(&self) -> Option<SystemTime>;
}

/// Whether a tunnel is kept warm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keepalive {
    /// A keepalive every [`KEEPALIVE`] without traffic.
    On,
    /// Only what WireGuard itself asks for.
    Off,
}

/// Makes the engines of one node key.
pub struct Engines {
    private: NodePrivate,
    guard: Arc<RateLimiter>,
}

impl Engines {
    /// For this node key.
    pub fn new(private: &NodePrivate) -> Self {
        let public = x25519::PublicKey::from(private.public().0);
        Self { private: private.clone(), guard: Arc::new(RateLimiter::new(&public, HANDSHAKES_PER_SECOND)) }
    }

    /// An engine for a peer. `index` is its receiver index, 24 bits, unique among the engines.
    pub fn engine(&self, peer: &NodePublic, index: u32, now: Instant) -> Box<dyn Engine> {
        Box::new(self.boring(peer, index, now))
    }

    fn boring(&self, peer: &NodePublic, index: u32, now: Instant) -> Boring {
        let private = x25519::StaticSecret::from(self.private.to_bytes());
        let public = x25519::PublicKey::from(peer.0);
        let tunnel = Tunn::new(private, public, None, None, index, Some(Arc::clone(&self.guard)));
        Boring {
            tunnel,
            source: pseudo_source(peer),
            keepalive: Keepalive::Off,
            last_traffic: now,
            last_received: now,
            unanswered_since: None,
            established: None,
            is_initiating: false,
            unconfirmed: None,
            waiting: 0,
            last_handshake: None,
        }
    }

    /// Lets the guard against floods of handshakes forget; due every [`GUARD_RESET`].
    pub fn reset_guard(&self) {
        self.guard.reset_count();
    }
}

/// Cookies need a source address; over a relay a peer's is made of its key, which is as stable.
fn pseudo_source(peer: &NodePublic) -> IpAddr {
    let (half, _) = peer.0.split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
    IpAddr::V6(Ipv6Addr::from(*half))
}

struct Boring {
    tunnel: Tunn,
    source: IpAddr,
    keepalive: Keepalive,
    /// The last packet either way, for keepalives.
    last_traffic: Instant,
    last_received: Instant,
    /// The first data sent since anything was received.
    unanswered_since: Option<Instant>,
    established: Option<Instant>,
    is_initiating: bool,
    /// The receiver index of a session we answered and the peer has not used yet.
    unconfirmed: Option<u32>,
    /// Packets that boringtun keeps for a session to come.
    waiting: u64,
    last_handshake: Option<SystemTime>,
}

impl Engine for Boring {
    fn seal(&mut self, now: Instant, packet: &[u8], out: &mut [u8]) -> Sealed {
        // boringtun would drop it and, without a handshake under way, not let us see that.
        if self.waiting == MAX_WAITING && !self.has_session() {
            return Sealed::Refused;
        }
        match self.tunnel.encapsulate(packet, out) {
            TunnResult::WriteToNetwork(sent) => {
                let (kind, len) = (kind(sent), sent.len());
                self.note_sent(now, kind);
                if kind != Some(TRANSPORT) {
                    self.waiting += 1;
                    return Sealed::Handshake(len);
                }
                if !packet.is_empty() {
                    self.unanswered_since.get_or_insert(now);
                }
                Sealed::Data(len)
            }
            TunnResult::Done => {
                self.waiting += 1;
                Sealed::Waiting
            }
            TunnResult::Err(_) | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                Sealed::Refused
            }
        }
    }

    fn open(&mut self, now: Instant, datagram: &[u8], out: &mut [u8]) -> Opened {
        // boringtun takes an empty datagram for a call to drain its queue.
        if datagram.len() < SHORTEST || out.len() < open_room(datagram.len()) {
            return Opened::Refused;
        }
        match self.tunnel.decapsulate(Some(self.source), datagram, out) {
            TunnResult::WriteToTunnelV6(packet, _) | TunnResult::WriteToTunnelV4(packet, _) => {
                let len = packet.len();
                Opened::Packet { len, session: self.note_received(now, datagram) }
            }
            TunnResult::Done => Opened::Nothing { session: self.note_received(now, datagram) },
            TunnResult::WriteToNetwork(answer) => {
                let (kind, index, len) = (kind(answer), sender_index(answer), answer.len());
                let session = self.note_answer(now, kind, index);
                Opened::Answer { len, session }
            }
            // boringtun has no other name for what it opened and could not read.
            TunnResult::Err(WireGuardError::InvalidPacket) if is_transport(datagram) => {
                Opened::Malformed { session: self.note_received(now, datagram) }
            }
            TunnResult::Err(_) => Opened::Refused,
        }
    }

    fn drain(&mut self, now: Instant, out: &mut [u8]) -> Option<usize> {
        if !self.has_session() {
            return None;
        }
        let TunnResult::WriteToNetwork(sent) = self.tunnel.decapsulate(None, &[], out) else {
            self.waiting = 0;
            return None;
        };
        let (kind, len) = (kind(sent), sent.len());
        self.waiting = self.waiting.saturating_sub(1);
        self.note_sent(now, kind);
        Some(len)
    }

    fn tick(&mut self, now: Instant, out: &mut [u8]) -> Ticked {
        if self.should_hold_timers(now) {
            return Ticked::Nothing;
        }
        match self.tunnel.update_timers(out) {
            TunnResult::WriteToNetwork(sent) => {
                let (kind, len) = (kind(sent), sent.len());
                self.note_sent(now, kind);
                return Ticked::Send(len);
            }
            TunnResult::Err(WireGuardError::ConnectionExpired) if self.is_initiating || self.waiting > 0 => {
                self.is_initiating = false;
                return Ticked::GaveUp { lost: std::mem::take(&mut self.waiting) };
            }
            _ => {}
        }
        if self.are_packets_stranded(now) {
            return self.send_initiation(now, out).map_or(Ticked::Nothing, Ticked::Send);
        }
        self.keep_alive(now, out)
    }

    fn set_keepalive(&mut self, keepalive: Keepalive) {
        self.keepalive = keepalive;
    }

    fn initiate(&mut self, now: Instant, out: &mut [u8]) -> Option<usize> {
        if self.has_session() { None } else { self.send_initiation(now, out) }
    }

    fn has_session(&self) -> bool {
        self.tunnel.time_since_last_handshake().is_some()
    }

    fn last_handshake(&self) -> Option<SystemTime> {
        self.last_handshake
    }
}

impl Boring {
    fn send_initiation(&mut self, now: Instant, out: &mut [u8]) -> Option<usize> {
        let TunnResult::WriteToNetwork(sent) = self.tunnel.format_handshake_initiation(out, true) else {
            return None;
        };
        let (kind, len) = (kind(sent), sent.len());
        self.note_sent(now, kind);
        Some(len)
    }

    fn note_sent(&mut self, now: Instant, kind: Option<u8>) {
        self.last_traffic = now;
        if kind == Some(INITIATION) {
            self.is_initiating = true;
        }
    }

    fn note_received(&mut self, now: Instant, datagram: &[u8]) -> Session {
        self.last_traffic = now;
        self.last_received = now;
        self.unanswered_since = None;
        // The receiver index of a transport message stands where the sender index of a response does.
        if is_transport(datagram) && self.unconfirmed.is_some() && self.unconfirmed == sender_index(datagram)
        {
            self.unconfirmed = None;
            return self.note_established(now);
        }
        // A peer that began two handshakes may use the first.
        if is_transport(datagram) && self.waiting > 0 && self.has_session() {
            return self.note_established(now);
        }
        Session::Unchanged
    }

    /// boringtun answered by itself: a response to an initiation, a keepalive to a response, or a cookie.
    fn note_answer(&mut self, now: Instant, kind: Option<u8>, index: Option<u32>) -> Session {
        match kind {
            Some(RESPONSE) => {
                self.note_received(now, &[]);
                self.unconfirmed = index;
                // boringtun gives up its own initiation when it answers the peer's.
                self.is_initiating = false;
                Session::Unchanged
            }
            Some(TRANSPORT) => {
                self.note_received(now, &[]);
                self.note_established(now)
            }
            _ => Session::Unchanged,
        }
    }

    fn note_established(&mut self, now: Instant) -> Session {
        self.established = Some(now);
        self.is_initiating = false;
        self.last_handshake = Some(SystemTime::now());
        Session::New
    }

    /// boringtun would start a handshake at the first packet after an idle time, since it measures the
    /// peer's silence from the last receive. Its time stands still until the answer is really late.
    fn should_hold_timers(&self, now: Instant) -> bool {
        let Some(unanswered_since) = self.unanswered_since else { return false };
        let is_young = self.established.is_some_and(|at| now.saturating_duration_since(at) < REKEY_AFTER);
        let was_idle = now.saturating_duration_since(self.last_received) >= SILENCE_BEFORE_HOLD;
        let is_patient = now.saturating_duration_since(unanswered_since) < UNANSWERED_LIMIT;
        // boringtun's clock goes on while the machine sleeps; ours does not.
        let is_alive = self.tunnel.time_since_last_handshake().is_some_and(|age| age < REKEY_AFTER);
        is_young && is_alive && was_idle && is_patient && !self.is_initiating
    }

    /// boringtun gives up its own handshake for one that the peer begins. When that comes to nothing, nobody tries for
    /// the packets that wait.
    fn are_packets_stranded(&self, now: Instant) -> bool {
        let is_late = now.saturating_duration_since(self.last_received) >= HANDSHAKE_RETRY;
        self.waiting > 0 && !self.is_initiating && is_late && !self.has_session()
    }

    fn keep_alive(&mut self, now: Instant, out: &mut [u8]) -> Ticked {
        let is_due = now.saturating_duration_since(self.last_traffic) >= KEEPALIVE;
        if self.keepalive == Keepalive::Off || !is_due || self.is_initiating {
            return Ticked::Nothing;
        }
        // boringtun renews sessions only for data: a warm tunnel would be without one for a while.
        let is_old = self.established.is_none_or(|at| now.saturating_duration_since(at) >= REKEY_AFTER);
        if is_old || !self.has_session() {
            return self.send_initiation(now, out).map_or(Ticked::Nothing, Ticked::Send);
        }
        match self.seal(now, &[], out) {
            Sealed::Data(len) | Sealed::Handshake(len) => Ticked::Send(len),
            Sealed::Waiting | Sealed::Refused => Ticked::Nothing,
        }
    }
}

fn kind(message: &[u8]) -> Option<u8> {
    message.first().copied()
}

/// Whether boringtun takes it for a transport message; the bytes behind the type must be zero.
fn is_transport(message: &[u8]) -> bool {
    message.len() >= SHORTEST && message.starts_with(&[TRANSPORT, 0, 0, 0])
}

fn sender_index(message: &[u8]) -> Option<u32> {
    let (index, _) = message.get(4..)?.split_first_chunk()?;
    Some(u32::from_le_bytes(*index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_engines_shake_hands_and_talk_both_ways() {
        let mut pair = Pair::new();
        pair.shake_hands();
        assert!(pair.a.last_handshake().is_some());
        assert!(pair.b.last_handshake().is_some(), "the keepalive confirmed the session");
        assert_eq!(pair.a_to_b(&packet(40)), packet(40));
        assert_eq!(pair.b_to_a(&packet(1280)), packet(1280));
    }

    #[test]
    fn a_sealed_packet_is_padded_and_opens_without_the_padding() {
        let mut pair = Pair::new();
        pair.shake_hands();
        for len in [40, 41, 51, 55, 56, 1279, 1280] {
            let sealed = seal(&mut *pair.a, &packet(len));
            assert_eq!(sealed.len(), padded(len) + OVERHEAD);
            assert_eq!(opened_packet(&mut *pair.b, &sealed), packet(len));
        }
    }

    #[test]
    fn packets_that_waited_for_the_handshake_are_sent_after_it() {
        let mut pair = Pair::new();
        let initiation = seal(&mut *pair.a, &packet(100));
        assert_eq!(initiation.len(), 148);
        let mut out = room();
        assert_eq!(pair.a.seal(Instant::now(), &packet_padded(200), &mut out), Sealed::Waiting);
        let response = answer(&mut *pair.b, &initiation, Session::Unchanged);
        let keepalive = answer(&mut *pair.a, &response, Session::New);
        let drained: Vec<Vec<u8>> = std::iter::from_fn(|| drain(&mut *pair.a)).collect();
        assert_eq!(drained.len(), 2);
        let confirmed = pair.b.open(Instant::now(), &keepalive, &mut out);
        assert_eq!(confirmed, Opened::Nothing { session: Session::New });
        assert_eq!(opened_packet(&mut *pair.b, &drained[0]), packet(100));
        assert_eq!(opened_packet(&mut *pair.b, &drained[1]), packet(200));
    }

    #[test]
    fn a_repeated_or_changed_datagram_is_refused() {
        let mut pair = Pair::new();
        pair.shake_hands();
        let mut sealed = seal(&mut *pair.a, &packet(100));
        opened_packet(&mut *pair.b, &sealed);
        assert_eq!(pair.b.open(Instant::now(), &sealed, &mut room()), Opened::Refused);
        sealed[40] ^= 1;
        assert_eq!(pair.b.open(Instant::now(), &sealed, &mut room()), Opened::Refused);
    }

    #[test]
    fn a_session_is_confirmed_also_by_a_packet_that_cannot_be_read() {
        let mut pair = Pair::new();
        let now = Instant::now();
        let mut out = room();
        let len = pair.a.initiate(now, &mut out).unwrap();
        let response = answer(&mut *pair.b, &out[..len], Session::Unchanged);
        let _confirmation = answer(&mut *pair.a, &response, Session::New);
        // B hears this instead of the confirmation.
        let nonsense = seal(&mut *pair.a, &[0xff; 48]);
        let opened = pair.b.open(now, &nonsense, &mut room());
        assert_eq!(opened, Opened::Malformed { session: Session::New });
        assert!(pair.b.last_handshake().is_some());
        let nonsense = seal(&mut *pair.a, &[0xff; 48]);
        let opened = pair.b.open(now, &nonsense, &mut room());
        assert_eq!(opened, Opened::Malformed { session: Session::Unchanged });
    }

    #[test]
    fn a_packet_too_many_for_the_session_to_come_is_refused() {
        let mut pair = Pair::new();
        let now = Instant::now();
        assert!(matches!(pair.a.seal(now, &packet_padded(64), &mut room()), Sealed::Handshake(148)));
        for _ in 1..MAX_WAITING {
            assert_eq!(pair.a.seal(now, &packet_padded(64), &mut room()), Sealed::Waiting);
        }
        assert_eq!(pair.a.seal(now, &packet_padded(64), &mut room()), Sealed::Refused);
        pair.shake_hands();
        assert_eq!(std::iter::from_fn(|| drain(&mut *pair.a)).count() as u64, MAX_WAITING);
        assert_eq!(pair.a_to_b(&packet(64)), packet(64));
    }

    #[test]
    fn packets_whose_handshake_gave_way_to_one_that_came_to_nothing_are_tried_for_again() {
        let mut pair = Pair::new();
        let now = Instant::now();
        assert!(matches!(pair.a.seal(now, &packet_padded(64), &mut room()), Sealed::Handshake(148)));
        let mut out = room();
        let len = pair.b.initiate(now, &mut out).unwrap();
        let _lost = answer(&mut *pair.a, &out[..len], Session::Unchanged);
        assert_eq!(pair.a.tick(now + Duration::from_secs(4), &mut out), Ticked::Nothing);
        assert_eq!(pair.a.tick(now + Duration::from_secs(6), &mut out), Ticked::Send(148));
        let response = answer(&mut *pair.b, &out[..148], Session::Unchanged);
        answer(&mut *pair.a, &response, Session::New);
        assert_eq!(opened_packet(&mut *pair.b, &drain(&mut *pair.a).unwrap()), packet(64));
    }

    #[test]
    fn packets_that_wait_are_sent_also_when_the_peer_uses_the_first_of_two_handshakes_that_it_began() {
        let mut pair = Pair::new();
        let now = Instant::now();
        let mut out = room();
        assert!(matches!(pair.a.seal(now, &packet_padded(64), &mut room()), Sealed::Handshake(148)));
        let initiations = [(); 2].map(|()| {
            let len = pair.b.initiate(now, &mut out).unwrap();
            out[..len].to_vec()
        });
        let [used, _lost] = initiations.map(|it| answer(&mut *pair.a, &it, Session::Unchanged));
        let keepalive = answer(&mut *pair.b, &used, Session::New);
        assert_eq!(pair.a.open(now, &keepalive, &mut out), Opened::Nothing { session: Session::New });
        assert_eq!(opened_packet(&mut *pair.b, &drain(&mut *pair.a).unwrap()), packet(64));
    }

    #[test]
    fn a_packet_too_many_is_refused_also_when_no_handshake_is_under_way() {
        let mut pair = Pair::new();
        let now = Instant::now();
        let mut out = room();
        for _ in 0..MAX_WAITING {
            assert_ne!(pair.a.seal(now, &packet_padded(64), &mut out), Sealed::Refused);
        }
        let len = pair.b.initiate(now, &mut out).unwrap();
        let _lost = answer(&mut *pair.a, &out[..len], Session::Unchanged);
        assert_eq!(pair.a.seal(now, &packet_padded(64), &mut room()), Sealed::Refused);
        pair.shake_hands();
        assert_eq!(std::iter::from_fn(|| drain(&mut *pair.a)).count() as u64, MAX_WAITING);
    }

    #[test]
    fn datagrams_of_every_length_and_type_are_survived() {
        let mut pair = Pair::new();
        pair.shake_hands();
        for len in 0..200 {
            for kind in 0..6 {
                let mut datagram = vec![0; len];
                if let Some(first) = datagram.first_mut() {
                    *first = kind;
                }
                let mut out = vec![0; open_room(len)];
                assert_eq!(pair.a.open(Instant::now(), &datagram, &mut out), Opened::Refused);
            }
        }
        assert_eq!(pair.b_to_a(&packet(60)), packet(60));
    }

    #[test]
    fn the_first_packet_after_an_idle_time_starts_no_handshake() {
        let mut pair = Pair::new();
        pair.shake_hands();
        let idle = Instant::now() + Duration::from_secs(60);
        let mut out = room();
        assert!(matches!(pair.a.seal(idle, &packet_padded(100), &mut out), Sealed::Data(_)));
        assert!(pair.a.should_hold_timers(idle + Duration::from_secs(14)));
        assert!(!pair.a.should_hold_timers(idle + Duration::from_secs(15)));
    }

    #[test]
    fn a_session_that_is_due_for_renewal_is_never_held() {
        let mut pair = Pair::new();
        pair.shake_hands();
        let late = Instant::now() + Duration::from_secs(121);
        assert!(matches!(pair.a.seal(late, &packet_padded(100), &mut room()), Sealed::Data(_)));
        assert!(!pair.a.should_hold_timers(late));
    }

    #[test]
    fn a_warm_tunnel_sends_a_keepalive_after_25_seconds_without_traffic() {
        let mut pair = Pair::new();
        pair.shake_hands();
        pair.a.set_keepalive(Keepalive::On);
        let now = Instant::now();
        assert_eq!(pair.a.tick(now + Duration::from_secs(24), &mut room()), Ticked::Nothing);
        assert_eq!(pair.a.tick(now + Duration::from_secs(26), &mut room()), Ticked::Send(32));
        pair.a.set_keepalive(Keepalive::Off);
        assert_eq!(pair.a.tick(now + Duration::from_secs(90), &mut room()), Ticked::Nothing);
    }

    #[test]
    fn a_warm_tunnel_renews_its_session_although_nothing_is_sent() {
        let mut pair = Pair::new();
        pair.shake_hands();
        pair.a.set_keepalive(Keepalive::On);
        let late = Instant::now() + Duration::from_secs(121);
        assert_eq!(pair.a.tick(late, &mut room()), Ticked::Send(148));
        assert!(pair.a.has_session(), "the old one serves until then");
    }

    #[test]
    fn a_warm_tunnel_without_a_session_starts_a_handshake() {
        let mut pair = Pair::new();
        pair.a.set_keepalive(Keepalive::On);
        let now = Instant::now();
        assert_eq!(pair.a.tick(now + Duration::from_secs(26), &mut room()), Ticked::Send(148));
        assert_eq!(
            pair.a.tick(now + Duration::from_secs(26), &mut room()),
            Ticked::Nothing,
            "one is under way"
        );
    }

    #[test]
    fn a_handshake_is_repeated_on_demand_and_not_once_there_is_a_session() {
        let mut pair = Pair::new();
        let mut out = room();
        assert_eq!(pair.a.initiate(Instant::now(), &mut out), Some(148));
        assert_eq!(pair.a.initiate(Instant::now(), &mut out), Some(148));
        let initiation = out[..148].to_vec();
        let response = answer(&mut *pair.b, &initiation, Session::Unchanged);
        answer(&mut *pair.a, &response, Session::New);
        assert_eq!(pair.a.initiate(Instant::now(), &mut out), None);
    }

    #[test]
    fn a_flood_of_initiations_is_answered_with_cookies() {
        let (a, b) = (NodePrivate::generate(), NodePrivate::generate());
        let guarded = Engines::new(&b);
        let mut victim = guarded.engine(&a.public(), 2, Instant::now());
        let mut flooder = Engines::new(&a).engine(&b.public(), 1, Instant::now());
        let mut out = room();
        flooder.initiate(Instant::now(), &mut out);
        let initiation = out[..148].to_vec();
        for _ in 0..HANDSHAKES_PER_SECOND {
            victim.open(Instant::now(), &initiation, &mut room());
        }
        let cookie = answer(&mut *victim, &initiation, Session::Unchanged);
        assert_eq!(cookie.len(), 64);
        let opened = flooder.open(Instant::now(), &cookie, &mut room());
        assert_eq!(opened, Opened::Nothing { session: Session::Unchanged });
    }

    #[test]
    fn recorded_initiations_are_answered_as_the_reference_answers_them() {
        let inputs = &vector("initiation")["inputs"];
        let key = |name: &str| <[u8; 32]>::try_from(hex(&inputs[name])).unwrap();
        let own = NodePrivate::from_bytes(key("responder_static_private"));
        let peer = NodePublic(key("initiator_static_public"));
        let mut engine = Engines::new(&own).engine(&peer, 1, Instant::now());
        let bytes = |name| hex(&vector(name)["bytes"]);
        let first = bytes("initiation");
        let mut wrong_mac = first.clone();
        wrong_mac[120] ^= 1;
        let mut open = |datagram: &[u8]| engine.open(Instant::now(), datagram, &mut room());
        let answered = Opened::Answer { len: 92, session: Session::Unchanged };
        assert_eq!(open(&wrong_mac), Opened::Refused);
        assert_eq!(open(&first[..147]), Opened::Refused);
        assert_eq!(open(&first), answered);
        assert_eq!(open(&first), Opened::Refused, "replayed timestamp");
        assert_eq!(open(&bytes("initiation-unknown-key")), Opened::Refused);
        assert_eq!(open(&bytes("initiation-second")), answered);
    }

    #[test]
    fn sizes_are_those_of_the_reference() {
        assert_eq!(padded(51) + OVERHEAD, hex(&vector("data-padded")["bytes"]).len());
        assert_eq!(OVERHEAD, hex(&vector("keepalive")["bytes"]).len());
        assert_eq!(padded(1280) + OVERHEAD, 1312);
    }

    fn vector(name: &str) -> serde_json::Value {
        let file: serde_json::Value =
            serde_json::from_str(include_str!("../tests/vectors/wireguard.json")).unwrap();
        let vectors = file["vectors"].as_array().unwrap();
        vectors.iter().find(|vector| vector["name"] == name).unwrap().clone()
    }

    fn hex(value: &serde_json::Value) -> Vec<u8> {
        let digits = value.as_str().unwrap().as_bytes();
        digits.chunks(2).map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    struct Pair {
        a: Box<Boring>,
        b: Box<dyn Engine>,
    }

    impl Pair {
        fn new() -> Self {
            let (a, b) = (NodePrivate::generate(), NodePrivate::generate());
            let now = Instant::now();
            let a_engine = Engines::new(&a).boring(&b.public(), 1, now);
            Self { a: Box::new(a_engine), b: Engines::new(&b).engine(&a.public(), 2, now) }
        }

        fn shake_hands(&mut self) {
            let mut out = room();
            let len = self.a.initiate(Instant::now(), &mut out).unwrap();
            let response = answer(&mut *self.b, &out[..len], Session::Unchanged);
            let keepalive = answer(&mut *self.a, &response, Session::New);
            let confirmed = self.b.open(Instant::now(), &keepalive, &mut out);
            assert_eq!(confirmed, Opened::Nothing { session: Session::New });
        }

        fn a_to_b(&mut self, packet: &[u8]) -> Vec<u8> {
            let sealed = seal(&mut *self.a, packet);
            opened_packet(&mut *self.b, &sealed)
        }

        fn b_to_a(&mut self, packet: &[u8]) -> Vec<u8> {
            let sealed = seal(&mut *self.b, packet);
            opened_packet(&mut *self.a, &sealed)
        }
    }

    fn room() -> Vec<u8> {
        vec![0; 2048]
    }

    fn packet(len: usize) -> Vec<u8> {
        let mut packet = vec![0x5a; len];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&u16::try_from(len - 40).unwrap().to_be_bytes());
        packet
    }

    fn packet_padded(len: usize) -> Vec<u8> {
        let mut packet = packet(len);
        packet.resize(padded(len), 0);
        packet
    }

    fn seal(engine: &mut dyn Engine, packet: &[u8]) -> Vec<u8> {
        let mut input = packet.to_vec();
        input.resize(padded(packet.len()), 0);
        let mut out = vec![0; seal_room(packet.len())];
        match engine.seal(Instant::now(), &input, &mut out) {
            Sealed::Data(len) | Sealed::Handshake(len) => out[..len].to_vec(),
            other => panic!("{other:?}"),
        }
    }

    fn drain(engine: &mut dyn Engine) -> Option<Vec<u8>> {
        let mut out = room();
        let len = engine.drain(Instant::now(), &mut out)?;
        Some(out[..len].to_vec())
    }

    fn answer(engine: &mut dyn Engine, datagram: &[u8], expected: Session) -> Vec<u8> {
        let mut out = room();
        match engine.open(Instant::now(), datagram, &mut out) {
            Opened::Answer { len, session } if session == expected => out[..len].to_vec(),
            other => panic!("{other:?}"),
        }
    }

    fn opened_packet(engine: &mut dyn Engine, datagram: &[u8]) -> Vec<u8> {
        let mut out = vec![0; open_room(datagram.len())];
        match engine.open(Instant::now(), datagram, &mut out) {
            Opened::Packet { len, .. } => out[..len].to_vec(),
            other => panic!("{other:?}"),
        }
    }
}
