//! What time brings. Every step does what is due and sets its own timer later, so that the whole may be called at
//! any time, and is, after every input.

use std::time::{Duration, Instant};

use warren_proto::disco::TxId;

use super::{
    Effect, Number, Path, Standing, astray::Next, rounds::Round, suspicion::Verdict, withdrawal::Say,
};

/// How old an answer of the path that is taken may become while data goes both ways: that the peer's comes says nothing
/// of ours.
const BUSY: Duration = Duration::from_millis(500);
/// And while the peer is talked to.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// And while hardly anything is sent: users' pings, every 5 s, keep the path as well.
const RENEWAL: Duration = Duration::from_millis(5500);
/// How long after the last packet the peer is still talked to.
const ACTIVE: Duration = Duration::from_secs(45);

/// The peer is talked to.
#[derive(Debug)]
pub(super) struct Session {
    last_sent: Instant,
    heartbeat: Instant,
}

impl Session {
    /// Something is sent: a session begins or goes on.
    pub(super) fn note_sent(session: &mut Option<Self>, now: Instant) {
        match session {
            Some(session) => {
                session.last_sent = now;
                session.heartbeat = session.heartbeat.min(now + BUSY);
            }
            None => *session = Some(Self { last_sent: now, heartbeat: now + HEARTBEAT }),
        }
    }

    /// How long ago the last packet was sent.
    fn quiet(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last_sent)
    }

    /// Whether a heartbeat is due.
    fn take_beat(&mut self, now: Instant) -> bool {
        let is_due = self.heartbeat <= now;
        if is_due {
            self.heartbeat = now + HEARTBEAT;
        }
        is_due
    }
}

impl Path {
    /// When [`Self::handle_timeout`] is due next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let suspicion = self.standing.taken().and_then(|taken| taken.suspicion.poll_timeout());
        let heartbeat = self.session.as_ref().map(|session| session.heartbeat);
        let bar = if let Standing::Barred { until, .. } = self.standing { Some(until) } else { None };
        let always = [suspicion, heartbeat, bar, self.withdrawal.poll_timeout(), self.calling.poll_timeout()];
        let astray = self.astray.poll_timeout();
        let probing = [self.round_due(), self.lost_due(), self.candidates.poll_timeout(), astray];
        let probing = probing.into_iter().filter(|_| self.may_probe());
        always.into_iter().chain(probing).flatten().min()
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.judge(now);
        self.withdraw(now);
        self.unbar(now);
        self.beat(now);
        self.seek(now);
        self.ping_hurried(now);
        self.look_for_astray(now);
        let telling = self.calling.handle_timeout(now);
        self.tell(telling);
    }

    /// Is the path taken dead?
    fn judge(&mut self, now: Instant) {
        let patience = self.patience(now);
        let Some(taken) = self.standing.taken_mut() else { return };
        let address = taken.address();
        match taken.suspicion.handle_timeout(now, patience) {
            // A dead path is left as soon as the relay is alive.
            None | Some(Verdict::Dead) => {}
            Some(Verdict::First) => self.ping(now, &address, Number::Any(None)),
            Some(Verdict::Again) => {
                // If this one is dead, another that answers is better than the relay.
                self.candidates.hurry_all();
                self.ping(now, &address, Number::Any(None));
            }
        }
    }

    /// Is the peer to be told something, so that it leaves a path?
    fn withdraw(&mut self, now: Instant) {
        if self.standing.is_condemned() {
            self.withdrawal.start(now);
        }
        match self.withdrawal.handle_timeout(now) {
            None => {}
            Some(Say::Prove) => {
                self.push(Effect::ProveRelay);
                if let Some(condemned) = self.standing.address().filter(|_| self.standing.is_condemned()) {
                    self.candidates.hurry_all();
                    self.ping(now, &condemned, Number::Any(None));
                }
            }
            // Neither way works. The relay is the one that comes back by itself.
            Some(Say::GiveUp) if self.standing.is_condemned() => {
                self.leave_dead(now);
            }
            Some(Say::GiveUp) => {}
            Some(Say::All) => {
                let all = self.calling.all(now);
                self.push(Effect::CallMeMaybe(all));
            }
            Some(Say::None) => self.push(Effect::CallMeMaybe(Vec::new())),
            Some(Say::Present) => self.call_with_present(now),
        }
    }

    /// Is the peer still talked to, does its path still work, is there a better one?
    fn beat(&mut self, now: Instant) {
        let Some(session) = &mut self.session else { return };
        if !session.take_beat(now) {
            return;
        }
        if session.quiet(now) > ACTIVE {
            self.session = None;
            return;
        }
        let Some(taken) = self.standing.taken() else { return };
        let (address, latency) = (taken.address(), taken.latency());
        if !taken.suspicion.is_calm() {
            return;
        }
        let age = match session.quiet(now) {
            quiet if quiet <= BUSY && taken.suspicion.hears(now) => BUSY,
            quiet if quiet < HEARTBEAT => HEARTBEAT,
            _ => RENEWAL,
        };
        let due = taken.ages_at(age);
        if due > now {
            session.heartbeat = due;
            return;
        }
        self.ping(now, &address, Number::Any(None));
        if self.rounds.should_upgrade(now, latency) {
            self.begin_round(now, None);
        }
    }

    /// Is a path to be sought?
    fn seek(&mut self, now: Instant) {
        if self.lost_due().is_some_and(|due| due <= now)
            && let (Standing::Lost(lost), Some(session)) = (&mut self.standing, &self.session)
        {
            lost.handle_ping(now, session.quiet(now));
            let address = lost.address;
            self.ping(now, &address, Number::Any(None));
        }
        if self.round_due().is_some_and(|due| due <= now) {
            self.begin_round(now, None);
        }
    }

    /// Pings whoever was not pinged just now, and then has the peer do so: our pings open our NAT for its. Its pings
    /// open its own, where ours before them were stopped: where there is news ours are repeated once.
    pub(super) fn begin_round(&mut self, now: Instant, user: Option<TxId>) {
        if !self.may_probe() {
            return;
        }
        let keep = self.answering(now);
        self.candidates.forget_expired(now, keep);
        self.follow_candidates(now);
        let round = self.rounds.begin(now);
        for address in self.candidates.spaced(now) {
            self.ping(now, &address, Number::Any(user));
        }
        if round == Round::OfNews && !self.standing.is_trusted(now) {
            self.candidates.hurry_all();
        }
        self.wish_to_call(now);
    }

    /// Does what the peer sends go astray?
    fn look_for_astray(&mut self, now: Instant) {
        if !self.may_probe() {
            return;
        }
        match self.astray.handle_timeout(now) {
            None => {}
            Some(Next::Ask(from)) => self.ping(now, &from, Number::Any(None)),
            Some(Next::Withdraw) => {
                self.withdrawal.start(now);
                self.withdraw(now);
            }
        }
    }

    fn ping_hurried(&mut self, now: Instant) {
        if self.may_probe() {
            for address in self.candidates.hurried(now) {
                self.ping(now, &address, Number::Any(None));
            }
        }
    }

    /// When a round is due: while the peer is talked to and no path is trusted.
    fn round_due(&self) -> Option<Instant> {
        let due = self.rounds.due().filter(|_| self.session.is_some())?;
        Some(self.standing.taken().map_or(due, |taken| due.max(taken.best().trusted_until)))
    }

    fn lost_due(&self) -> Option<Instant> {
        match &self.standing {
            Standing::Lost(lost) if self.session.is_some() => Some(lost.next()),
            Standing::Lost(_) | Standing::Seeking | Standing::Direct(_) | Standing::Barred { .. } => None,
        }
    }
}
