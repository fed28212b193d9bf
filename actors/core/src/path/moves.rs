//! What changes how a peer is reached, and what such a change brings with it.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{
    Direct, Effect, Lost, Measured, Number, Path, Pending, Standing, Why,
    astray::Astray,
    better,
    calling::Telling,
    candidates::SPACING,
    choice::{TRUST, Taken},
    suspicion::Patience,
    withdrawal::{Ending, Withdrawal},
};

/// How old an answer may be for which another path is taken than the one that is left: while that one is doubted the
/// others are pinged along with it, at least once a second.
const RECENT: Duration = Duration::from_secs(2);

/// A peer whose ping was answered may take that path for so long: its trust begins when the answer has come.
const TRUSTED: Duration = TRUST.saturating_add(Duration::from_millis(500));

impl Path {
    /// A candidate answered.
    pub(super) fn consider(&mut self, now: Instant, measured: Measured) {
        let patience = self.alarms.patience(now);
        match &mut self.standing {
            Standing::Barred { .. } => {}
            Standing::Seeking | Standing::Lost(_) => self.find(now, measured),
            Standing::Direct(taken) if taken.address() == measured.address => {
                // What was begun because it did not answer need not be ended.
                if taken.suspicion.is_condemned() {
                    self.withdrawal.handle_answer();
                }
                taken.handle_answer(now, measured.latency, patience);
            }
            Standing::Direct(taken) => {
                if better(Some(measured), taken.rival(now)) {
                    // Whether the one that is left is dead will not be known: the peer shall not stay on it.
                    if !taken.suspicion.is_calm() {
                        self.withdrawal.start(now);
                    }
                    self.stand(Standing::Direct(Taken::new(now, measured)), Why::Better);
                }
            }
        }
    }

    /// There is a direct path. Its other end is told, so that it need not wait for its next round to find it too.
    fn find(&mut self, now: Instant, measured: Measured) {
        let before = self.stand(Standing::Direct(Taken::new(now, measured)), Why::Found);
        self.candidates.calm_except_callers(&measured.address);
        self.astray.handle_found();
        match before {
            // What another address answers says nothing of the one that was lost, and that the peer has to leave.
            Standing::Lost(lost) => {
                if lost.address == measured.address {
                    self.alarms.handle_answer(now);
                    self.withdrawal.handle_answer();
                }
                self.call_with_present(now);
            }
            Standing::Seeking | Standing::Direct(_) | Standing::Barred { .. } => {
                self.withdrawal.handle_answer();
                if !self.candidates.pinged_us_within(now, SPACING) {
                    self.wish_to_call(now);
                }
            }
        }
    }

    /// The path taken does not answer, and the relay is alive.
    pub(super) fn leave_dead(&mut self, now: Instant) -> Ending {
        let Some(taken) = self.standing.taken() else { return Ending::Return };
        let (address, since) = (taken.address(), taken.suspicion.since().unwrap_or(now));
        self.rounds.postpone(now);
        if let Some(other) = self.best_other(address, now.saturating_duration_since(since).min(RECENT), now) {
            self.stand(Standing::Direct(other), Why::Dead);
            return Ending::Return;
        }
        match self.alarms.raise(now) {
            Some(until) => {
                self.candidates.calm();
                self.calling.cancel();
                self.stand(Standing::Barred { address, until }, Why::Flapping);
                Ending::Stay
            }
            None => {
                self.stand(Standing::Lost(Lost::new(now, address)), Why::Dead);
                Ending::Return
            }
        }
    }

    /// The path taken cannot be reached: there is nothing to wait for.
    pub(super) fn leave_unreachable(&mut self, now: Instant, address: SocketAddr) {
        let latency = self.standing.taken().map_or(Duration::ZERO, Taken::latency);
        let standing = match self.best_other(address, RECENT, now) {
            Some(other) => Standing::Direct(other),
            None => Standing::Lost(Lost::unreachable(now, address, latency)),
        };
        self.stand(standing, Why::Unreachable);
        self.withdrawal.start(now);
        self.rounds.hasten(now);
    }

    /// The best of those that answered lately, besides one.
    fn best_other(&self, address: SocketAddr, within: Duration, now: Instant) -> Option<Taken> {
        let answered = self.candidates.answered_within(now, within).filter(|(_, it)| it.address != address);
        let best = answered.reduce(|best, it| if better(Some(it.1), Some(best.1)) { it } else { best });
        best.map(|(at, measured)| Taken::new(at, measured))
    }

    /// What worked over another link has to answer again; what was given up may work.
    pub(super) fn distrust(&mut self, now: Instant) {
        match &mut self.standing {
            Standing::Seeking => {}
            Standing::Direct(taken) => taken.distrust(now),
            Standing::Lost(Lost { address, .. }) | Standing::Barred { address, .. } => {
                self.standing = Standing::Lost(Lost::at_once(now, *address));
            }
        }
    }

    /// The path taken is left if its address is none of the peer's any more.
    pub(super) fn follow_candidates(&mut self, now: Instant) {
        if self.standing.address().is_some_and(|it| !self.candidates.contains(&it)) {
            self.stand(Standing::Seeking, Why::Withdrawn);
            self.withdrawal = Withdrawal::Idle;
            self.rounds.hasten(now);
        }
    }

    /// Direct paths are forbidden. The peer is told, so that it does not go on with one, which we may not even have.
    pub(super) fn block(&mut self, now: Instant) {
        self.policy = Direct::Blocked;
        let had_path = self.stand(Standing::Seeking, Why::Forbidden).taken().is_some();
        let may_leave = had_path || self.candidates.pinged_us_within(now, TRUSTED);
        self.withdrawal = Withdrawal::Idle;
        if may_leave {
            // This is enough where all our addresses were told, and comes at once.
            self.push(Effect::CallMeMaybe(Vec::new()));
            self.withdrawal = Withdrawal::for_good(now);
        }
        self.astray = Astray::default();
        self.calling.cancel();
        self.candidates.clear();
        self.rounds.hasten(now);
        for address in self.verified.take() {
            self.push(Effect::Forgotten(address));
        }
    }

    /// Direct paths are allowed again.
    pub(super) fn unblock(&mut self, now: Instant) {
        self.policy = Direct::Allowed;
        self.withdrawal = Withdrawal::Idle;
        self.candidates.set_listed(now, &self.listed, None);
        self.rounds.hasten(now);
    }

    /// Changes how the peer is reached, tells it, and returns how it was.
    fn stand(&mut self, standing: Standing, why: Why) -> Standing {
        let before = std::mem::replace(&mut self.standing, standing);
        let (from, to) = (before.address(), self.standing.address());
        if from != to {
            self.push(Effect::Changed { from, to, why });
        }
        before
    }

    /// Ends a bar.
    pub(super) fn unbar(&mut self, now: Instant) {
        if let Standing::Barred { address, until } = self.standing
            && until <= now
        {
            self.standing = Standing::Lost(Lost::at_once(now, address));
            self.astray.forget();
            self.rounds.hasten(now);
        }
    }
}

/// What all of these need.
impl Path {
    /// The path taken, if it answered lately: it stays a candidate whatever becomes of its sources.
    pub(super) fn answering(&self, now: Instant) -> Option<SocketAddr> {
        self.standing.address().filter(|_| self.standing.is_trusted(now))
    }

    /// How much silence the path taken may keep.
    pub(super) fn patience(&self, now: Instant) -> Patience {
        let latency = self.standing.taken().map_or(Duration::ZERO, Taken::latency);
        self.alarms.patience(now).on(latency)
    }

    /// Whether anything may be sent over UDP of our own accord.
    pub(super) fn may_probe(&self) -> bool {
        self.is_ready && self.policy == Direct::Allowed && !self.standing.is_barred()
    }

    /// Pings a candidate.
    pub(super) fn ping(&mut self, now: Instant, to: &SocketAddr, number: Number) {
        if !self.may_probe() || !self.candidates.note_pinged(now, to) {
            return;
        }
        // As if it were lost.
        if !self.candidates.has_answered(to) && !self.blind_pings.take(now) {
            return;
        }
        let patience = self.patience(now);
        if let Some(taken) = self.standing.taken_mut().filter(|taken| taken.address() == *to) {
            taken.suspicion.handle_asked(now, patience);
        }
        self.outbox.push(Pending::Ping { to: *to, at: now, number });
    }

    /// Notes that an address is the peer's. It is said each time: another peer may have been there meanwhile.
    pub(super) fn verify(&mut self, address: SocketAddr) {
        self.push(Effect::Verified(address));
        if let Some(gone) = self.verified.note(address) {
            self.push(Effect::Forgotten(gone));
        }
    }

    /// Has the peer told where we are, when it may be.
    pub(super) fn wish_to_call(&mut self, now: Instant) {
        let telling = self.calling.wish(now);
        self.tell(telling);
    }

    /// Tells the peer where we are, at once.
    pub(super) fn call_with_present(&mut self, now: Instant) {
        let present = self.calling.present(now);
        self.push(Effect::CallMeMaybe(present));
    }

    pub(super) fn tell(&mut self, telling: Option<Telling>) {
        match telling {
            None => {}
            Some(Telling::Now(endpoints)) => self.push(Effect::CallMeMaybe(endpoints)),
            Some(Telling::Refresh) => self.push(Effect::RefreshEndpoints),
        }
    }

    pub(super) fn push(&mut self, effect: Effect) {
        self.outbox.push(Pending::Effect(effect));
    }
}
