//! A peer's link to the relay: the rules of ours, over a connection that may be ended, or swallow everything. What it
//! does not carry is lost at once; that queues and TCP may yet deliver it makes things easier.

use std::time::{Duration, Instant};

use warren_core::relay_link::{Activity, Ended, Occasion, Redial, Verdict, WATCH_PERIOD, Watch};

use super::world::RELAY_DELAY;

/// TCP, the upgrade and the login.
const LOGIN: Duration = RELAY_DELAY.saturating_mul(6);
/// A relay that is dialled and says nothing is let be after so long; meanwhile TCP tries again after 1 and 2 s more.
const DIAL_LIMIT: Duration = Duration::from_secs(4);
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// How often a relay shows of its own accord that it is there.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// What becomes of a connection to the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Relay {
    Answers,
    /// It is ended, and no other one begins.
    Refuses,
    /// Nobody says anything.
    Swallows,
}

/// The link.
#[derive(Debug)]
pub(crate) struct Link {
    made: Instant,
    relay: Relay,
    state: State,
    redial: Redial,
    /// Since when it is asked for a sign of life.
    proving: Option<Instant>,
    /// Somebody wanted to know whether the relay is there while it was dialled.
    is_doubted: bool,
}

#[derive(Debug)]
enum State {
    Up { since: Instant, watch: Watch, activity: Activity, next_look: Instant, next_word: Instant },
    Dialing { since: Instant, next: Instant, retry: Duration },
    Pausing { until: Instant },
}

impl Link {
    /// One that is logged in.
    pub(crate) fn new(now: Instant) -> Self {
        let (relay, redial) = (Relay::Answers, Redial::default());
        let state = State::Pausing { until: now };
        let mut link = Self { made: now, relay, state, redial, proving: None, is_doubted: false };
        link.log_in(now);
        link
    }

    /// From now on this becomes of its connections.
    pub(crate) fn set_relay(&mut self, now: Instant, relay: Relay, random: f64) {
        self.relay = relay;
        match (&mut self.state, relay) {
            (State::Up { .. } | State::Dialing { .. }, Relay::Refuses) => self.end(now, random),
            // What the relay has said in vain TCP says again.
            (State::Up { next_word, .. }, Relay::Answers) => {
                *next_word = (*next_word).min(now + RELAY_DELAY);
            }
            (State::Dialing { .. }, Relay::Answers) | (State::Pausing { .. }, _) | (_, Relay::Swallows) => {}
        }
    }

    /// Whether it is logged in, and what it is given arrives.
    pub(crate) fn carries(&self) -> bool {
        self.is_up() && self.relay == Relay::Answers
    }

    /// Whether it is logged in, as far as it knows.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// Something is sent through it. Returns whether it leaves.
    pub(crate) fn send(&mut self, now: Instant) -> bool {
        let at = now - self.made;
        if let State::Up { activity, .. } = &mut self.state {
            activity.used = at;
        }
        self.carries()
    }

    /// Something has come to the relay for it. Returns whether it arrives.
    pub(crate) fn receive(&mut self, now: Instant) -> bool {
        let carries = self.carries();
        if carries {
            self.hear(now);
        }
        carries
    }

    /// Somebody wants to know whether the relay is alive.
    pub(crate) fn prove(&mut self, now: Instant) {
        self.proving = Some(now);
        self.probe(now);
    }

    /// Whether it was asked then, and has not shown it since.
    pub(crate) fn take_unproved(&mut self, since: Instant) -> bool {
        self.proving.take_if(|asked| *asked == since).is_some()
    }

    /// Whether it has shown what it was asked for; only once.
    pub(crate) fn take_proved(&mut self) -> bool {
        let State::Up { activity, .. } = &self.state else { return false };
        let heard = self.made + activity.heard;
        self.proving.take_if(|asked| *asked < heard).is_some()
    }

    /// Asks the relay at once, or dials it.
    pub(crate) fn probe(&mut self, now: Instant) {
        match &mut self.state {
            State::Up { .. } => drop(self.look(now, Occasion::Doubt)),
            State::Pausing { until } => *until = now,
            State::Dialing { .. } => self.is_doubted = true,
        }
    }

    pub(crate) fn poll_timeout(&self) -> Instant {
        match &self.state {
            State::Up { next_look, next_word, .. } => *next_look.min(next_word),
            State::Dialing { next, .. } => *next,
            State::Pausing { until } => *until,
        }
    }

    /// Lets time pass. Returns whether it has logged in anew.
    pub(crate) fn handle_timeout(&mut self, now: Instant, random: f64) -> bool {
        if now < self.poll_timeout() {
            return false;
        }
        match &mut self.state {
            State::Up { next_word, .. } if *next_word <= now => {
                *next_word = now + KEEPALIVE;
                self.receive(now);
            }
            State::Up { next_look, .. } => {
                *next_look = now + WATCH_PERIOD;
                if self.look(now, Occasion::Usual) == Verdict::Silent {
                    self.end(now, random);
                }
            }
            State::Dialing { .. } if self.relay == Relay::Answers => {
                self.log_in(now);
                return true;
            }
            State::Dialing { since, next, retry }
                if self.relay == Relay::Swallows && now + *retry < *since + DIAL_LIMIT =>
            {
                *next = now + *retry;
                *retry *= 2;
            }
            State::Dialing { .. } => self.end(now, random),
            State::Pausing { .. } => {
                self.state = State::Dialing { since: now, next: now + LOGIN, retry: FIRST_RETRY };
            }
        }
        false
    }

    fn look(&mut self, now: Instant, occasion: Occasion) -> Verdict {
        let at = now - self.made;
        let State::Up { watch, activity, next_word, .. } = &mut self.state else { return Verdict::Keep };
        let verdict = watch.look(at, *activity, occasion);
        if verdict == Verdict::Ask && self.relay == Relay::Answers {
            *next_word = (*next_word).min(now + 2 * RELAY_DELAY);
        }
        verdict
    }

    fn hear(&mut self, now: Instant) {
        let at = now - self.made;
        if let State::Up { activity, .. } = &mut self.state {
            activity.heard = at;
        }
    }

    fn log_in(&mut self, now: Instant) {
        let heard = now - self.made;
        let activity = Activity { heard, used: heard };
        let (watch, next_look, next_word) = (Watch::default(), now + WATCH_PERIOD, now + KEEPALIVE);
        self.state = State::Up { since: now, watch, activity, next_look, next_word };
        if std::mem::take(&mut self.is_doubted) {
            self.probe(now);
        }
    }

    fn end(&mut self, now: Instant, random: f64) {
        let lived = if let State::Up { since, .. } = self.state { Some(now - since) } else { None };
        let pause = self.redial.handle_ended(Ended { lived, wanted: None }, random);
        self.state = State::Pausing { until: now + pause };
        if std::mem::take(&mut self.is_doubted) {
            self.probe(now);
        }
    }
}
