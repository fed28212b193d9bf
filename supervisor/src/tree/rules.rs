//! The rules of supervision, as OTP has them: who is started, stopped, killed and restarted, when, and in
//! which order. Pure: what happened comes in with `now`, what to do comes out of [`Rules::poll_effects`].
//!
//! Level, not edge: each child has a goal and a state, and after every input [`Rules::settle`] asks for what
//! brings the states closer to the goals. Children end one at a time, the last one first; those of one batch
//! start one at a time, the first one first. So nothing here ever waits, and a sibling that blocks delays
//! nobody but those who must wait for it.

use std::time::{Duration, Instant};

use warren_core::{
    backoff::Backoff,
    budget::{Budget, Verdict},
};

use crate::child::{AutoShutdown, ChildSpec, DROP_LIMIT, End, Exit, How, Restart, Strategy, SupervisorSpec};

/// Names one child of one supervisor, however often it is restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChildId(pub(crate) u64);

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Effect {
    /// Start it; say [`Rules::handle_started`] or [`Rules::handle_start_failed`].
    Start(ChildId),
    /// It is being started: give that up, and say how it came out.
    Cancel(ChildId),
    /// End it in order.
    Stop(ChildId),
    /// End it at once.
    Kill(ChildId),
    /// It ended and will be started again, for this reason.
    Restarting(ChildId, Exit),
    /// The child that was added later runs, or could not start.
    Added(ChildId, Result<(), String>),
    /// It is gone for good.
    Forget(ChildId),
    /// Every first child runs.
    Ready,
    /// Nothing runs any more; the supervisor ends.
    End(End),
}

/// Where a child should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    /// Running.
    Up,
    /// Down first, together with others, then running.
    Restart,
    /// Down; it ended for good, only its siblings' restart can bring it back.
    Rest,
    /// Down and forgotten.
    Gone,
}

/// Where a child is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Down,
    Starting,
    Up {
        since: Instant,
    },
    /// Without a limit if its own children's are enough.
    Stopping {
        until: Option<Instant>,
    },
    Killed {
        until: Instant,
        exit: Exit,
    },
    /// It has ended; what it held is being dropped.
    Leaving {
        until: Instant,
        exit: Exit,
    },
}

/// What a person sees of a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// On its way up for the first time.
    Starting,
    /// At work.
    Running,
    /// On its way up again, its pause included.
    Restarting,
    /// Down, or on its way there.
    Stopped,
}

struct Entry {
    id: ChildId,
    name: &'static str,
    restart: Restart,
    significant: bool,
    grace: Option<Duration>,
    goal: Goal,
    state: State,
    /// Children of one batch are started in order.
    batch: u64,
    backoff: Backoff,
    /// Not started before this.
    not_before: Option<Instant>,
    /// Whether it ever ran.
    proven: bool,
    /// Whether somebody who added it waits to hear how its start came out.
    is_asked_for: bool,
    restarts: u64,
    last_exit: Option<Exit>,
}

/// One supervisor's rules and the state of its children.
pub(super) struct Rules {
    name: &'static str,
    strategy: Strategy,
    auto_shutdown: AutoShutdown,
    budget: Budget,
    backoff: Backoff,
    entries: Vec<Entry>,
    last_id: u64,
    last_batch: u64,
    is_ready: bool,
    ending: Option<End>,
    has_ended: bool,
    effects: Vec<Effect>,
}

/// What there is to see of a child.
pub(super) struct Sight<'a> {
    pub(super) id: ChildId,
    pub(super) phase: Phase,
    pub(super) restarts: u64,
    pub(super) last_exit: Option<&'a Exit>,
}

impl Rules {
    /// The rules of a supervisor whose first children are yet to be started, and their ids in order.
    pub(super) fn new(spec: &SupervisorSpec) -> (Self, Vec<ChildId>) {
        let mut rules = Self {
            name: spec.name,
            strategy: spec.strategy,
            auto_shutdown: spec.auto_shutdown,
            budget: spec.budget.clone(),
            backoff: spec.backoff.clone(),
            entries: Vec::new(),
            last_id: 0,
            last_batch: 1,
            is_ready: false,
            ending: None,
            has_ended: false,
            effects: Vec::new(),
        };
        let ids = spec.children.iter().map(|child| rules.enter(child, false)).collect();
        (rules, ids)
    }

    /// Begins with the first child.
    pub(super) fn handle_begin(&mut self, now: Instant) {
        self.settle(now);
    }

    /// One more child, after all others.
    pub(super) fn handle_add(&mut self, child: &ChildSpec, now: Instant) -> ChildId {
        self.last_batch += 1;
        let id = self.enter(child, true);
        self.settle(now);
        id
    }

    /// A child is no longer wanted.
    pub(super) fn handle_remove(&mut self, id: ChildId, now: Instant) {
        if let Some(entry) = self.entry(id) {
            entry.goal = Goal::Gone;
        }
        self.settle(now);
    }

    /// All children, and the supervisor with them, are no longer wanted.
    pub(super) fn handle_stop(&mut self, now: Instant) {
        self.begin_end(End::Stopped);
        self.settle(now);
    }

    /// As a stop, but nobody gets a grace any more.
    pub(super) fn handle_abort(&mut self, now: Instant) {
        self.begin_end(End::Stopped);
        for entry in &mut self.entries {
            entry.grace = Some(Duration::ZERO);
            if let State::Stopping { until } = &mut entry.state {
                *until = Some(now);
            }
        }
        self.handle_timeout(now);
    }

    /// A start came out well.
    pub(super) fn handle_started(&mut self, id: ChildId, now: Instant) {
        let Some(entry) = self.entry(id).filter(|entry| entry.is_awaited()) else { return };
        entry.state = State::Up { since: now };
        entry.proven = true;
        if std::mem::take(&mut entry.is_asked_for) && entry.goal == Goal::Up {
            self.effects.push(Effect::Added(id, Ok(())));
        }
        self.settle(now);
    }

    /// A start failed or was given up; nothing of it is left.
    pub(super) fn handle_start_failed(&mut self, id: ChildId, reason: String, now: Instant, random: f64) {
        let Some(entry) = self.entry(id).filter(|entry| entry.is_awaited()) else { return };
        entry.state = State::Down;
        let (child, proven, goal) = (entry.name, entry.proven, entry.goal);
        match goal {
            Goal::Up if proven => {
                self.handle_failure(id, Exit::abnormal(How::Error, format!("start: {reason}")), now, random);
            }
            Goal::Up if entry.is_asked_for => {
                entry.goal = Goal::Gone;
                self.effects.push(Effect::Added(id, Err(reason)));
            }
            Goal::Up => self.begin_end(End::StartFailed { child, reason }),
            Goal::Restart | Goal::Rest | Goal::Gone => {}
        }
        self.settle(now);
    }

    /// A child has ended; what it held may not have dropped yet.
    pub(super) fn handle_exit(&mut self, id: ChildId, exit: Exit, now: Instant) {
        let window = self.budget.window();
        let Some(entry) = self.entry(id) else { return };
        let exit = match &entry.state {
            State::Killed { exit, .. } => exit.clone(),
            State::Down | State::Starting | State::Leaving { .. } => return,
            State::Up { .. } | State::Stopping { .. } => exit,
        };
        if matches!(entry.state, State::Up { since } if now.saturating_duration_since(since) >= window) {
            entry.backoff.reset();
        }
        entry.state = State::Leaving { until: now + DROP_LIMIT, exit };
    }

    /// Nothing is left of a child's last incarnation.
    pub(super) fn handle_gone(&mut self, id: ChildId, now: Instant, random: f64) {
        // A child that vanished without a word did not end of its own will.
        self.handle_exit(id, Exit::abnormal(How::Killed, "its task vanished"), now);
        let Some(entry) = self.entry(id) else { return };
        let State::Leaving { exit, .. } = &entry.state else { return };
        let exit = exit.clone();
        entry.state = State::Down;
        entry.last_exit = Some(exit.clone());
        if entry.goal == Goal::Up {
            self.handle_end(id, exit, now, random);
        }
        self.settle(now);
    }

    /// A child does not answer.
    pub(super) fn handle_hung(&mut self, id: ChildId, now: Instant) {
        let Some(entry) = self.entry(id) else { return };
        if matches!(entry.state, State::Up { .. }) {
            let exit = Exit::abnormal(How::Hung, "it did not answer");
            entry.state = State::Killed { until: now + DROP_LIMIT, exit };
            self.effects.push(Effect::Kill(id));
        }
    }

    /// Time has passed.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        let mut unkillable = None;
        for entry in &mut self.entries {
            match &entry.state {
                State::Stopping { until: Some(until) } if *until <= now => {
                    let exit = Exit::abnormal(How::Killed, "it did not end within its grace");
                    entry.state = State::Killed { until: now + DROP_LIMIT, exit };
                    self.effects.push(Effect::Kill(entry.id));
                }
                State::Killed { until, .. } | State::Leaving { until, .. } if *until <= now => {
                    entry.state = State::Down;
                    entry.last_exit = Some(Exit::abnormal(How::Hung, "it blocks its thread"));
                    unkillable = Some(entry.name);
                }
                State::Down
                | State::Starting
                | State::Up { .. }
                | State::Stopping { .. }
                | State::Killed { .. }
                | State::Leaving { .. } => {}
            }
        }
        if let Some(child) = unkillable {
            self.begin_end(End::Unkillable { child });
        }
        self.settle(now);
    }

    /// When [`Self::handle_timeout`] is due.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.entries.iter().filter_map(Entry::due).min()
    }

    /// What to do, in order.
    pub(super) fn poll_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// What there is to see, in the order of the children.
    pub(super) fn sights(&self) -> impl Iterator<Item = Sight<'_>> {
        self.entries.iter().map(|entry| Sight {
            id: entry.id,
            phase: entry.phase(),
            restarts: entry.restarts,
            last_exit: entry.last_exit.as_ref(),
        })
    }

    fn enter(&mut self, child: &ChildSpec, is_asked_for: bool) -> ChildId {
        self.last_id += 1;
        let id = ChildId(self.last_id);
        self.entries.push(Entry {
            id,
            name: child.name,
            restart: child.restart,
            significant: child.significant,
            grace: child.grace,
            goal: if self.ending.is_some() { Goal::Gone } else { Goal::Up },
            state: State::Down,
            batch: self.last_batch,
            backoff: self.backoff.clone(),
            not_before: None,
            proven: false,
            is_asked_for,
            restarts: 0,
            last_exit: None,
        });
        id
    }

    fn entry(&mut self, id: ChildId) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    /// A child that was wanted has ended.
    fn handle_end(&mut self, id: ChildId, exit: Exit, now: Instant, random: f64) {
        let Some(entry) = self.entry(id) else { return };
        let is_over = match entry.restart {
            Restart::Permanent => false,
            Restart::Transient => exit == Exit::Normal,
            Restart::Temporary => true,
        };
        if !is_over {
            return self.handle_failure(id, exit, now, random);
        }
        entry.goal = if entry.restart == Restart::Temporary { Goal::Gone } else { Goal::Rest };
        if entry.significant {
            self.handle_significant_end();
        }
    }

    fn handle_significant_end(&mut self) {
        let is_left = |entry: &Entry| entry.significant && matches!(entry.goal, Goal::Up | Goal::Restart);
        let is_due = match self.auto_shutdown {
            AutoShutdown::Never => false,
            AutoShutdown::AnySignificant => true,
            AutoShutdown::AllSignificant => !self.entries.iter().any(is_left),
        };
        if is_due {
            self.begin_end(End::AutoShutdown);
        }
    }

    /// A child is to be restarted, if the budget allows.
    fn handle_failure(&mut self, id: ChildId, exit: Exit, now: Instant, random: f64) {
        let (supervisor, strategy) = (self.name, self.strategy);
        let Some(place) = self.entries.iter().position(|entry| entry.id == id) else { return };
        let verdict = self.budget.record(now);
        let Some(entry) = self.entries.get_mut(place) else { return };
        entry.last_exit = Some(exit.clone());
        if verdict == Verdict::Spent {
            let (child, reason) = (entry.name, exit.to_string());
            return self.begin_end(End::BudgetSpent { supervisor, child, reason });
        }
        let not_before = Some(now + entry.backoff.next(random));
        self.last_batch += 1;
        let batch = self.last_batch;
        let affected = match strategy {
            Strategy::OneForOne => place..place + 1,
            Strategy::RestForOne => place..self.entries.len(),
            Strategy::OneForAll => 0..self.entries.len(),
        };
        for entry in self.entries.get_mut(affected).unwrap_or_default() {
            entry.restart_with(batch, not_before, entry.id == id);
        }
        self.effects.push(Effect::Restarting(id, exit));
    }

    fn begin_end(&mut self, end: End) {
        if self.ending.is_none() {
            self.ending = Some(end);
            self.entries.iter_mut().for_each(|entry| entry.goal = Goal::Gone);
        }
    }

    fn settle(&mut self, now: Instant) {
        self.stop_last(now);
        self.release_restarts();
        self.forget_gone();
        self.start_next(now);
        self.conclude();
    }

    /// Ends the last of those that should be down, unless one of them is still on its way.
    fn stop_last(&mut self, now: Instant) {
        let leaving = |entry: &&mut Entry| entry.goal != Goal::Up && entry.state != State::Down;
        let Some(last) = self.entries.iter_mut().rev().find(leaving) else { return };
        let effect = match last.state {
            State::Up { .. } => Effect::Stop(last.id),
            State::Starting => Effect::Cancel(last.id),
            State::Down | State::Stopping { .. } | State::Killed { .. } | State::Leaving { .. } => return,
        };
        last.state = State::Stopping { until: last.grace.map(|grace| now + grace) };
        self.effects.push(effect);
    }

    /// Once all that go down together are down, those of them that restart may come up.
    fn release_restarts(&mut self) {
        let is_leaving = |entry: &&Entry| entry.goal != Goal::Up && entry.state != State::Down;
        let busy: Vec<u64> = self.entries.iter().filter(is_leaving).map(|entry| entry.batch).collect();
        for entry in self.entries.iter_mut().filter(|entry| !busy.contains(&entry.batch)) {
            if entry.goal == Goal::Restart {
                entry.goal = Goal::Up;
            }
        }
    }

    fn forget_gone(&mut self) {
        if self.ending.is_some() {
            // They stay to be seen until the supervisor itself has ended.
            return;
        }
        let is_gone = |entry: &Entry| entry.goal == Goal::Gone && entry.state == State::Down;
        self.effects
            .extend(self.entries.iter().filter(|entry| is_gone(entry)).map(|entry| Effect::Forget(entry.id)));
        self.entries.retain(|entry| !is_gone(entry));
    }

    /// Starts whoever may start: nobody before those of its batch that come first.
    fn start_next(&mut self, now: Instant) {
        let mut busy = Vec::new();
        for entry in &mut self.entries {
            let is_up = matches!(entry.state, State::Up { .. });
            if entry.goal != Goal::Up || is_up {
                continue;
            }
            // A pause that has passed is no deadline any more, even for one who must wait for another.
            entry.not_before = entry.not_before.filter(|at| *at > now);
            let may_start =
                entry.state == State::Down && entry.not_before.is_none() && !busy.contains(&entry.batch);
            if may_start {
                entry.begin_start();
                self.effects.push(Effect::Start(entry.id));
            }
            busy.push(entry.batch);
        }
    }

    fn conclude(&mut self) {
        if !self.is_ready
            && self.ending.is_none()
            && self.entries.iter().all(|entry| entry.goal != Goal::Up || entry.proven)
        {
            self.is_ready = true;
            self.effects.push(Effect::Ready);
        }
        let all_down = self.entries.iter().all(|entry| entry.state == State::Down);
        if let (Some(end), true, false) = (&self.ending, all_down, self.has_ended) {
            self.effects.push(Effect::End(end.clone()));
            self.has_ended = true;
        }
    }
}

impl Entry {
    /// Joins a restart: as the one who caused it, or with its siblings.
    fn restart_with(&mut self, batch: u64, not_before: Option<Instant>, is_cause: bool) {
        self.goal = match (self.goal, self.restart) {
            (Goal::Gone, _) => Goal::Gone,
            (_, Restart::Temporary) if !is_cause => Goal::Gone,
            (Goal::Up | Goal::Restart | Goal::Rest, _) => Goal::Restart,
        };
        self.batch = batch;
        self.not_before = not_before;
    }

    fn begin_start(&mut self) {
        self.state = State::Starting;
        self.not_before = None;
        self.restarts += u64::from(self.proven);
    }

    /// Whether a start may still come out.
    fn is_awaited(&self) -> bool {
        match self.state {
            State::Starting | State::Stopping { .. } | State::Killed { .. } => true,
            State::Down | State::Up { .. } | State::Leaving { .. } => false,
        }
    }

    fn due(&self) -> Option<Instant> {
        match &self.state {
            State::Down => self.not_before.filter(|_| self.goal == Goal::Up),
            State::Starting | State::Up { .. } => None,
            State::Stopping { until } => *until,
            State::Killed { until, .. } | State::Leaving { until, .. } => Some(*until),
        }
    }

    fn phase(&self) -> Phase {
        match (&self.state, self.goal) {
            (State::Up { .. }, Goal::Up) => Phase::Running,
            (_, Goal::Rest | Goal::Gone) => Phase::Stopped,
            (_, Goal::Up | Goal::Restart) if self.proven => Phase::Restarting,
            (_, Goal::Up | Goal::Restart) => Phase::Starting,
        }
    }
}

#[cfg(test)]
mod tests;
