//! The WireGuard tunnel to one peer: the engine of the data plane, worked as the data plane does. What an engine keeps
//! to itself is known here as well, so that of each packet it can be told what became of it.

use std::{
    collections::VecDeque,
    net::Ipv6Addr,
    time::{Duration, Instant},
};

use warren_actors::wireguard::{
    Engine, Keepalive, LEAST_ROOM, OVERHEAD, Opened, Sealed, Session, TICK, Ticked,
};

use super::loss::Loss;

/// Bytes of the largest data datagram. All count as that long, though what they carry is not.
const DATA_LENGTH: usize = 1312;
const RESPONSE: u8 = 2;
const TRANSPORT: u8 = 4;
/// Packets that an engine keeps for a session to come.
const MAX_WAITING: usize = 256;
/// What opens messages is kept for so long.
const SESSION_LIFE: Duration = Duration::from_secs(180);
/// An engine has so many places for that, and takes them by the last bits of its index.
const PLACES: usize = 8;
/// The header, and the packet's number.
const INNER: usize = 48;
const NO_NEXT_HEADER: u8 = 59;

/// A message of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    bytes: Vec<u8>,
    /// Of the packet that it carries, if any.
    pub(crate) number: Option<u64>,
}

impl Message {
    fn new(bytes: &[u8], number: Option<u64>) -> Self {
        Self { bytes: bytes.to_vec(), number }
    }

    /// What the network sees.
    pub(crate) fn length(&self) -> usize {
        if self.number.is_some() { DATA_LENGTH } else { self.bytes.len() }
    }
}

/// What a datagram brought.
#[derive(Debug, Default)]
pub(crate) struct Brought {
    /// The packet in it.
    pub(crate) number: Option<u64>,
    /// What is to be sent for it: an answer, and what waited for a session.
    pub(crate) messages: Vec<Message>,
}

/// What time brought.
#[derive(Debug)]
pub(crate) enum Passed {
    Nothing,
    Send(Message),
    /// A handshake was given up, and these packets with it.
    GaveUp(Vec<u64>),
}

/// A tunnel.
pub(crate) struct Tunnel {
    engine: Box<dyn Engine>,
    /// Ours, and the peer's.
    addresses: [Ipv6Addr; 2],
    keepalive: Keepalive,
    /// Packets that wait in the engine, in their order.
    waiting: VecDeque<u64>,
    /// What the engine has to open messages with: our index of it, and when it was made.
    openers: [Option<(u32, Instant)>; PLACES],
    shaken_at: Option<Instant>,
}

impl Tunnel {
    pub(crate) fn new(engine: Box<dyn Engine>, own: Ipv6Addr, of_peer: Ipv6Addr) -> Self {
        Self {
            engine,
            addresses: [own, of_peer],
            keepalive: Keepalive::Off,
            waiting: VecDeque::new(),
            openers: [None; PLACES],
            shaken_at: None,
        }
    }

    pub(crate) fn set_keepalive(&mut self, keepalive: Keepalive) {
        self.keepalive = keepalive;
        self.engine.set_keepalive(keepalive);
    }

    /// Whether it is kept warm.
    pub(crate) fn is_warm(&self) -> bool {
        self.keepalive == Keepalive::On
    }

    pub(crate) fn has_session(&self) -> bool {
        self.engine.has_session()
    }

    /// How long ago the last handshake was completed.
    pub(crate) fn last_handshake(&self, now: Instant) -> Option<Duration> {
        self.shaken_at.map(|at| now - at)
    }

    /// Packets that wait for a session.
    pub(crate) fn waiting(&self) -> &VecDeque<u64> {
        &self.waiting
    }

    /// Seals a packet. The message, if there is one, need not carry it.
    pub(crate) fn seal(&mut self, now: Instant, number: u64) -> Result<Option<Message>, Loss> {
        let mut out = [0; LEAST_ROOM];
        let message = match self.engine.seal(now, &self.inner(number), &mut out) {
            Sealed::Data(len) => return Ok(Some(Message::new(&out[..len], Some(number)))),
            Sealed::Handshake(len) => Some(Message::new(&out[..len], None)),
            Sealed::Waiting => None,
            Sealed::Refused => return Err(Loss::NoSession),
        };
        self.waiting.push_back(number);
        assert!(self.waiting.len() <= MAX_WAITING, "an engine keeps more packets than it has room for");
        Ok(message)
    }

    /// Opens a datagram.
    pub(crate) fn open(&mut self, now: Instant, message: &Message) -> Result<Brought, Loss> {
        let (mut out, datagram) = ([0; LEAST_ROOM], &message.bytes);
        let mut brought = Brought::default();
        let session = match self.engine.open(now, datagram, &mut out) {
            Opened::Packet { len, session } => {
                brought.number = Some(self.read(&out[..len]));
                session
            }
            Opened::Answer { len, session } => {
                let answer = &out[..len];
                if kind(answer) == RESPONSE {
                    self.note_opener(now, index(answer, 4));
                } else if kind(datagram) == RESPONSE {
                    self.note_opener(now, index(datagram, 8));
                }
                brought.messages.push(Message::new(answer, None));
                session
            }
            Opened::Nothing { session } => session,
            Opened::Malformed { .. } => panic!("a packet is not what was sealed"),
            Opened::Refused if self.has_opener(now, datagram) => return Err(Loss::Refused),
            Opened::Refused => return Err(Loss::NoSession),
        };
        assert_eq!(brought.number, message.number);
        if session == Session::New {
            self.shaken_at = Some(now);
            brought.messages.extend(self.drain(now));
        }
        Ok(brought)
    }

    /// Starts a handshake, or sends a keepalive where there is a session.
    pub(crate) fn warm(&mut self, now: Instant) -> Option<Message> {
        let mut out = [0; LEAST_ROOM];
        let len =
            self.engine.initiate(now, &mut out).or_else(|| match self.engine.seal(now, &[], &mut out) {
                Sealed::Data(len) | Sealed::Handshake(len) => Some(len),
                Sealed::Waiting | Sealed::Refused => None,
            });
        len.map(|len| Message::new(&out[..len], None))
    }

    /// Lets time pass.
    pub(crate) fn tick(&mut self, now: Instant) -> Passed {
        let mut out = [0; LEAST_ROOM];
        match self.engine.tick(now, &mut out) {
            Ticked::Nothing => Passed::Nothing,
            Ticked::Send(len) => Passed::Send(Message::new(&out[..len], None)),
            Ticked::GaveUp { lost } => {
                assert_eq!(lost, self.waiting.len() as u64, "an engine counts what is lost");
                self.openers = [None; PLACES];
                Passed::GaveUp(self.waiting.drain(..).collect())
            }
        }
    }

    fn drain(&mut self, now: Instant) -> Vec<Message> {
        let (mut messages, mut out) = (Vec::new(), [0; LEAST_ROOM]);
        while let Some(len) = self.engine.drain(now, &mut out) {
            // A keepalive may have waited as well.
            let number = if len > OVERHEAD { self.waiting.pop_front() } else { None };
            messages.push(Message::new(&out[..len], number));
        }
        assert!(self.waiting.is_empty(), "an engine has lost {:?}", self.waiting);
        messages
    }

    fn note_opener(&mut self, now: Instant, index: u32) {
        self.openers[index as usize % PLACES] = Some((index, now));
    }

    /// Whether what sealed a message has its counterpart here. In doubt, which lasts some ticks, it has not.
    fn has_opener(&self, now: Instant, datagram: &[u8]) -> bool {
        let index = index(datagram, 4);
        let opener = self.openers[index as usize % PLACES].filter(|(opener, _)| *opener == index);
        kind(datagram) != TRANSPORT || opener.is_some_and(|(_, since)| now + 2 * TICK < since + SESSION_LIFE)
    }

    /// A packet of IPv6 that carries its number and nothing else.
    fn inner(&self, number: u64) -> [u8; INNER] {
        let mut packet = [0; INNER];
        (packet[0], packet[5], packet[6]) = (0x60, 8, NO_NEXT_HEADER);
        let [own, of_peer] = self.addresses.map(|address| address.octets());
        packet[8..24].copy_from_slice(&own);
        packet[24..40].copy_from_slice(&of_peer);
        packet[40..].copy_from_slice(&number.to_be_bytes());
        packet
    }

    fn read(&self, packet: &[u8]) -> u64 {
        let [own, of_peer] = self.addresses.map(|address| address.octets());
        assert_eq!(
            (&packet[8..24], &packet[24..40]),
            (&of_peer[..], &own[..]),
            "it is from the peer, for us"
        );
        u64::from_be_bytes(packet[40..].try_into().unwrap())
    }
}

fn kind(message: &[u8]) -> u8 {
    message[0]
}

fn index(message: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(message[at..at + 4].try_into().unwrap())
}
