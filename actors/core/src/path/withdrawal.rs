//! Making the peer leave a path (tailnet-data 7.12, step 2): three messages through the relay, which must have
//! proved alive, because the peer will have nothing else.
//!
//! ```text
//!   Idle ──> Proving ──alive──> Calling: all, 20 ms, none, 20 ms, present ──> Listening ──heard──> Idle
//!             │  ^ once a second             ^                                  │
//!             └──┘ five times, then Idle     └─ silence, four times, ever longer ┘
//! ```
//! If the path answers before "none" was said, all of it ends. Where direct paths become blocked nothing is proved
//! first, and "present" is not said.

use std::time::{Duration, Instant};

/// Between two messages: peers handle each in a task of its own, and must not swap them.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the peer may take to be heard, at first; each time it is not, twice as long, since its relay may be down.
/// After all of them four seconds have passed: a path that it was told to leave is out of its trust soon.
const PATIENCE: Duration = Duration::from_millis(250);
const MAX_REPEATS: u8 = 4;
/// Between two questions whether the relay is alive.
const PROOF_PAUSE: Duration = Duration::from_secs(1);
const MAX_PROOFS: u8 = 5;

/// What the peer is told after it was made to forget our addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// The present addresses again, so that a false alarm heals at once.
    Return,
    /// Nothing: it shall stay on the relay.
    Stay,
}

/// How far the peer is from having left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Withdrawal {
    /// Nothing is to be left.
    #[default]
    Idle,
    /// Whether the relay is alive is not known yet.
    Proving {
        /// How often it was asked.
        asked: u8,
        /// When to ask again.
        next: Instant,
    },
    /// The messages are going out.
    Calling(Call),
    /// They are out.
    Listening {
        /// The series they were.
        call: Call,
        /// Until when the peer should have been heard.
        until: Instant,
    },
}

/// One series of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    ending: Ending,
    repeats: u8,
    said: Said,
    next: Instant,
    /// Before then "present" is not said: an answer of ours that is still under way would have the peer return.
    present_from: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Nothing,
    All,
    None,
}

/// What is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Say {
    /// To the relay: are you alive?
    Prove,
    /// To nobody: the relay did not prove alive.
    GiveUp,
    /// To the peer: all addresses that it may know of us.
    All,
    /// To the peer: no address at all.
    None,
    /// To the peer: the addresses that we have now.
    Present,
}

impl Withdrawal {
    /// Has the relay prove itself, unless that or the rest is under way.
    pub(super) fn start(&mut self, now: Instant) {
        match self {
            Self::Idle | Self::Listening { .. } => *self = Self::Proving { asked: 0, next: now },
            Self::Proving { .. } | Self::Calling(_) => {}
        }
    }

    /// Has the peer leave and stay, by a relay that may be dead: whatever comes of it, there is no other way any more.
    pub(super) fn for_good(now: Instant) -> Self {
        Self::Calling(Call::new(now, Ending::Stay))
    }

    /// Our link changed: the relay may be alive by the new one, and where we are now is worth telling.
    pub(super) fn handle_link_change(&mut self, now: Instant) {
        match self {
            Self::Idle => {}
            Self::Proving { asked, next } => (*asked, *next) = (0, now),
            Self::Calling(call) | Self::Listening { call, .. } => call.ending = Ending::Return,
        }
    }

    pub(super) fn is_proving(&self) -> bool {
        matches!(self, Self::Proving { .. })
    }

    /// The relay is alive. The peer may be told where we are from then on.
    pub(super) fn handle_proof(&mut self, now: Instant, ending: Ending, present_from: Instant) {
        if self.is_proving() {
            *self = Self::Calling(Call { present_from, ..Call::new(now, ending) });
        }
    }

    /// The path answers: as long as the peer was not told to leave, it need not.
    pub(super) fn handle_answer(&mut self) {
        if let Self::Proving { .. } | Self::Calling(Call { said: Said::Nothing | Said::All, .. }) = self {
            *self = Self::Idle;
        }
    }

    /// Data or a ping came from the peer, which shows that it sends where it is heard.
    pub(super) fn handle_heard(&mut self) {
        if let Self::Listening { .. } = self {
            *self = Self::Idle;
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Self::Idle => None,
            Self::Proving { next, .. } => Some(*next),
            Self::Calling(call) => Some(call.next),
            Self::Listening { until, .. } => Some(*until),
        }
    }

    /// Lets time pass.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Option<Say> {
        if self.poll_timeout().is_none_or(|due| now < due) {
            return None;
        }
        match self {
            Self::Idle => None,
            Self::Proving { asked, .. } if *asked >= MAX_PROOFS => {
                *self = Self::Idle;
                Some(Say::GiveUp)
            }
            Self::Proving { asked, next } => {
                *asked += 1;
                *next = now + PROOF_PAUSE;
                Some(Say::Prove)
            }
            Self::Calling(call) => {
                let (say, after) = call.speak(now);
                *self = after;
                Some(say)
            }
            Self::Listening { call, .. } if call.repeats >= MAX_REPEATS => {
                *self = Self::Idle;
                None
            }
            Self::Listening { call, .. } => {
                let (repeats, said) = (call.repeats + 1, Said::Nothing);
                let (say, after) = Call { repeats, said, ..*call }.speak(now);
                *self = after;
                Some(say)
            }
        }
    }
}

impl Call {
    fn new(now: Instant, ending: Ending) -> Self {
        Self { ending, repeats: 0, said: Said::Nothing, next: now, present_from: now }
    }

    /// The next message, and what follows it.
    fn speak(self, now: Instant) -> (Say, Withdrawal) {
        let calling = |said, from: Instant| Withdrawal::Calling(Self { said, next: from + PAUSE, ..self });
        let listen = Withdrawal::Listening { call: self, until: now + PATIENCE * (1 << self.repeats) };
        match (self.said, self.ending) {
            (Said::Nothing, _) => (Say::All, calling(Said::All, now)),
            (Said::All, Ending::Return) => (Say::None, calling(Said::None, now.max(self.present_from))),
            (Said::All, Ending::Stay) => (Say::None, listen),
            (Said::None, _) => (Say::Present, listen),
        }
    }
}
