//! Whether the path that is taken is dead (tailnet-data 7.12, step 1).
//!
//! ```text
//!      silence, a ping without      unanswered pings
//!   Calm ──────────────────> Suspect ─────────────────────────> Condemned
//!    ^   answer, or an       data goes     one a pause         the relay has to prove itself
//!    │   accusation          both ways                         before the path is left
//!    └──────────── an answer; received data proves one direction only
//! ```

use std::time::{Duration, Instant};

/// How long silence is borne, how many pings, how far apart, decide, and how long the last is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Patience {
    silence: Duration,
    pings: u8,
    pause: Duration,
    last: Duration,
}

impl Patience {
    /// A dead path is left after half a second.
    pub(super) const USUAL: Self = Self::new(200, 3, 100);
    /// After a false alarm: after nine tenths of a second.
    pub(super) const CAREFUL: Self = Self::new(300, 4, 150);
    /// After another one: the same with more pings.
    pub(super) const MOST_CAREFUL: Self = Self::new(300, 6, 100);
    /// However slow the path, so long is no answer waited for.
    const MOST: Duration = Duration::from_secs(1);

    const fn new(silence: u64, pings: u8, pause: u64) -> Self {
        let pause = Duration::from_millis(pause);
        Self { silence: Duration::from_millis(silence), pings, pause, last: pause }
    }

    /// An answer takes a round trip, and a half more for good measure; the next ping need not wait for it.
    pub(super) fn on(self, latency: Duration) -> Self {
        let least = latency.saturating_mul(3).min(Self::MOST * 2) / 2;
        Self { silence: self.silence.max(least), last: self.last.max(least), ..self }
    }
}

/// So many pings more decide on a path over which the peer is heard: the one that raised the suspicion may just have
/// been lost, and there is no hurry, since our data goes both ways meanwhile.
const DOUBTS: u8 = 2;

/// What is thought of the path that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Suspicion {
    /// Nothing is wrong.
    Calm(Calm),
    /// The path has to answer.
    Suspect {
        /// When it came under suspicion.
        since: Instant,
        /// Pings that are yet to go unanswered; `None` before the first.
        left: Option<u8>,
        /// When the next is due, or the verdict.
        next: Instant,
    },
    /// It did not answer.
    Condemned {
        /// When it came under suspicion.
        since: Instant,
    },
}

/// When calm ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Calm {
    silence: Silence,
    /// Until when a ping should have been answered.
    answer_due: Option<Instant>,
}

/// When silence becomes suspicious.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Silence {
    /// Never: neither was anything sent since the peer was heard, nor was it sending.
    #[default]
    Natural,
    /// Then, because something was sent.
    AfterOurs(Instant),
    /// Then, because the peer was sending.
    AfterTheirs(Instant),
}

/// What is to be done about the path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Ping it.
    First,
    /// Ping it again: it did not answer, so that others may have to take over.
    Again,
    /// It is dead.
    Dead,
}

impl Default for Suspicion {
    fn default() -> Self {
        Self::Calm(Calm::default())
    }
}

impl Silence {
    fn due(self) -> Option<Instant> {
        match self {
            Self::Natural => None,
            Self::AfterOurs(at) | Self::AfterTheirs(at) => Some(at),
        }
    }
}

impl Calm {
    fn due(&self) -> Option<Instant> {
        [self.silence.due(), self.answer_due].into_iter().flatten().min()
    }

    /// Whether the peer's data is coming, as of `now`.
    fn hears(&self, now: Instant) -> bool {
        matches!(self.silence, Silence::AfterTheirs(at) if now < at)
    }
}

impl Suspicion {
    pub(super) fn is_calm(&self) -> bool {
        matches!(self, Self::Calm(_))
    }

    pub(super) fn is_condemned(&self) -> bool {
        matches!(self, Self::Condemned { .. })
    }

    /// Whether nothing is wrong and the peer's data is coming: then silence cannot tell that ours does not arrive.
    pub(super) fn hears(&self, now: Instant) -> bool {
        matches!(self, Self::Calm(calm) if calm.hears(now))
    }

    /// When the path came under suspicion, if it is.
    pub(super) fn since(&self) -> Option<Instant> {
        match self {
            Self::Calm(_) => None,
            Self::Suspect { since, .. } | Self::Condemned { since } => Some(*since),
        }
    }

    /// Something was sent over the path: the first since the peer was heard waits for an answer.
    pub(super) fn handle_sent(&mut self, now: Instant, patience: Patience) {
        if let Self::Calm(Calm { silence: silence @ Silence::Natural, .. }) = self {
            *silence = Silence::AfterOurs(now + patience.silence);
        }
    }

    /// The path was pinged. What is heard meanwhile answers nothing.
    pub(super) fn handle_asked(&mut self, now: Instant, patience: Patience) {
        self.handle_sent(now, patience);
        if let Self::Calm(calm) = self {
            calm.answer_due.get_or_insert(now + patience.silence);
        }
    }

    /// Data came from the peer over UDP: it is sending.
    pub(super) fn handle_data(&mut self, now: Instant, patience: Patience) {
        if let Self::Calm(calm) = self {
            calm.silence = Silence::AfterTheirs(now + patience.silence);
        }
    }

    /// The path answered.
    pub(super) fn handle_answer(&mut self, now: Instant, patience: Patience) {
        let silence = match self {
            Self::Calm(Calm { silence: Silence::AfterTheirs(_), .. }) => {
                Silence::AfterTheirs(now + patience.silence)
            }
            Self::Calm(_) | Self::Suspect { .. } | Self::Condemned { .. } => Silence::Natural,
        };
        *self = Self::Calm(Calm { silence, answer_due: None });
    }

    /// There is a reason to doubt the path besides silence.
    pub(super) fn accuse(&mut self, now: Instant) {
        if self.is_calm() {
            *self = Self::Suspect { since: now, left: None, next: now };
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Self::Calm(calm) => calm.due(),
            Self::Suspect { next, .. } => Some(*next),
            Self::Condemned { .. } => None,
        }
    }

    /// Lets time pass.
    pub(super) fn handle_timeout(&mut self, now: Instant, patience: Patience) -> Option<Verdict> {
        if self.poll_timeout().is_none_or(|due| now < due) {
            return None;
        }
        let pings = patience.pings + if self.hears(now) { DOUBTS } else { 0 };
        self.accuse(now);
        let Self::Suspect { since, left, next } = self else { return None };
        let verdict = match left {
            None => {
                *left = Some(pings - 1);
                Verdict::First
            }
            Some(0) => {
                *self = Self::Condemned { since: *since };
                return Some(Verdict::Dead);
            }
            Some(left) => {
                *left -= 1;
                Verdict::Again
            }
        };
        *next = now + if *left == Some(0) { patience.last } else { patience.pause };
        Some(verdict)
    }
}
