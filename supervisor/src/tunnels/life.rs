//! The rules of the tunnel's life: what happens goes in, what to do comes out. Plain values; no process, no
//! clock.
//!
//! ```text
//!          Start                    answered
//! Down ──────────> Starting ──────────────────> Up
//!   ^                │  ^                        │
//!   │ ended    refused  │ pause over        died │
//!   │                v  │                        v
//!   └── Ending <──── Pausing <───────────────────┘
//! ```
//!
//! One operation of a person at a time: a second waits a moment for the first. What the service does by
//! itself (resuming, restarting) gives way to a person. A death counts against the budget; a tunnel that says
//! why it cannot start does not, and is asked again, unless only a person can help.

use std::{
    collections::{BTreeSet, VecDeque},
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use warren_core::{
    backoff::Backoff,
    budget::{Budget, Verdict},
};
use warren_proto::vpn::{StartProgressStage, status::Lifecycle};

use super::death::{Death, Failure, Reason};
use crate::{facts::TunnelState, host::footprint::Trace, intent::Order};

/// Deaths that are made good within [`WINDOW`].
const MAX_RESTARTS: usize = 5;
/// What a process survives that is not the one that keeps dying.
const WINDOW: Duration = Duration::from_secs(600);
/// The first pause: a killed tunnel is back within two seconds, the third time too.
const FLOOR: Duration = Duration::from_millis(250);
/// The longest pause: a person who waits should see that something is tried.
const CAP: Duration = Duration::from_secs(30);
/// How long an operation waits for another one (vpn-protocol 11.2).
const LOCK_LIMIT: Duration = Duration::from_millis(500);
/// Operations that wait; each belongs to a client, and clients are few.
const MAX_WAITING: usize = 64;

/// What an operation is told that waited in vain (vpn-protocol 11.2).
const LOCKED: &str = "Could not acquire tunnel operation lock, another operation is in progress";

/// What is said of a start whose asker can no longer be told.
const INTERRUPTED: &str = "the start was interrupted by a fault in the service; run `warren up` again";

/// Names whoever asked for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(pub(super) u64);

/// What a person asks for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Wish {
    /// This tunnel.
    Up(Arc<Order>),
    /// None.
    Down,
}

/// Whose tunnel a person may replace and end. It counts when the wish is served: while it waits, another
/// person may have got a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Power {
    /// Anybody's.
    All,
    /// This user's.
    Own(u32),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Effect {
    /// Start a process for this order.
    Launch(Arc<Order>),
    /// End whatever process there is, or is about to be.
    End(Ending),
    /// Tell whoever asked.
    Answer(Ticket, Result<(), String>),
    /// Tell whoever asked that the tunnel is this user's.
    Refuse(Ticket, u32),
    /// A process died for this reason and will have a successor.
    Count(Reason),
}

/// What goes with the end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// A person wants no tunnel: that is remembered, and the device goes.
    Unwanted,
    /// There is no tunnel until a person acts, but one is wanted: the device goes.
    GivenUp,
    /// Another process follows: the device stays.
    Replaced,
}

/// The rules and their state.
#[derive(Debug)]
pub(super) struct Life {
    phase: Phase,
    /// Names the present process, or the one that is being started or ended.
    generation: u64,
    shown: TunnelState,
    budget: Budget,
    after_death: Backoff,
    after_refusal: Backoff,
    waiting: VecDeque<Waiting>,
    effects: Vec<Effect>,
}

#[derive(Debug)]
enum Phase {
    Down,
    Starting { order: Arc<Order>, asked: Option<Ticket> },
    Up { order: Arc<Order>, since: Instant },
    Pausing { order: Arc<Order>, until: Instant },
    Ending(Then),
}

/// What an end leads to.
#[derive(Debug)]
enum Then {
    /// Nothing more.
    Rest,
    /// A person who wanted no tunnel is told.
    Answer(Ticket),
    /// A person wants another tunnel.
    Start(Arc<Order>, Ticket),
    /// A person is told why there is none.
    Fail(Ticket, String),
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    wish: Wish,
    power: Power,
    until: Instant,
}

impl Life {
    /// Nothing runs. `shown` is what the predecessor said last.
    pub(super) fn new(shown: TunnelState) -> Self {
        Self {
            phase: Phase::Down,
            generation: 0,
            shown,
            budget: Budget::new(MAX_RESTARTS, WINDOW),
            after_death: Backoff::new(FLOOR, CAP, 2.0, 0.2),
            after_refusal: Backoff::new(FLOOR, CAP, 2.0, 0.2),
            waiting: VecDeque::new(),
            effects: Vec::new(),
        }
    }

    /// A process runs that a predecessor has started.
    pub(super) fn handle_found(&mut self, order: Arc<Order>, pid: u32, now: Instant) {
        self.generation += 1;
        self.shown.pid = Some(pid);
        self.shown.owner = Some(order.owner);
        self.show_up();
        self.phase = Phase::Up { order, since: now };
    }

    /// A tunnel is wanted from before: nobody waits for it.
    pub(super) fn handle_resume(&mut self, order: Arc<Order>) {
        self.start(order, None);
    }

    /// A predecessor was ending the process, or crashed while it started one.
    pub(super) fn handle_unfinished(&mut self, ending: Ending) {
        if self.shown.lifecycle == Lifecycle::Starting {
            self.shown.error = INTERRUPTED.to_owned();
        }
        self.end(ending, Then::Rest);
    }

    /// A person asks for something.
    pub(super) fn handle_wish(&mut self, ticket: Ticket, wish: Wish, power: Power, now: Instant) {
        if self.waiting.len() >= MAX_WAITING {
            self.effects.push(Effect::Answer(ticket, Err(LOCKED.to_owned())));
            return;
        }
        self.waiting.push_back(Waiting { ticket, wish, power, until: now + LOCK_LIMIT });
        self.serve();
    }

    /// The process has been spawned.
    pub(super) fn handle_spawned(&mut self, generation: u64, pid: u32) {
        if self.is_current(generation) {
            self.shown.pid = Some(pid);
        }
    }

    /// The process speaks; it is being asked to start.
    pub(super) fn handle_finalizing(&mut self, generation: u64) {
        if self.is_current(generation) && self.shown.progress.is_some() {
            self.shown.progress = Some(StartProgressStage::Finalizing);
        }
    }

    /// The process has answered its Start, or there is none.
    pub(super) fn handle_launched(
        &mut self,
        generation: u64,
        outcome: Result<(), Failure>,
        now: Instant,
        random: f64,
    ) {
        if !self.is_current(generation) {
            return;
        }
        let Phase::Starting { order, asked } = mem::replace(&mut self.phase, Phase::Down) else { return };
        match (outcome, asked) {
            (Ok(()), asked) => {
                self.after_refusal.reset();
                self.show_up();
                self.phase = Phase::Up { order, since: now };
                self.effects.extend(asked.map(|ticket| Effect::Answer(ticket, Ok(()))));
            }
            (Err(failure), Some(ticket)) => {
                self.end(Ending::Unwanted, Then::Fail(ticket, failure.into_text()));
            }
            (Err(Failure::Died(death)), None) => self.recover(order, death, None, now, random),
            (Err(Failure::Later(text)), None) => {
                self.shown.error = text;
                self.pause(order, now, |life| life.after_refusal.next(random));
            }
            (Err(Failure::Person(text)), None) => self.give_up(text),
        }
        self.serve();
    }

    /// The process has died.
    pub(super) fn handle_died(&mut self, generation: u64, death: Death, now: Instant, random: f64) {
        if !self.is_current(generation) {
            return;
        }
        let Phase::Up { order, since } = &self.phase else { return };
        let (order, since) = (Arc::clone(order), *since);
        self.recover(order, death, Some(since), now, random);
        self.serve();
    }

    /// Nothing is left of the process, or it cannot be ended.
    pub(super) fn handle_ended(&mut self, generation: u64, outcome: Result<(), String>) {
        if !self.is_current(generation) || !matches!(self.phase, Phase::Ending(_)) {
            return;
        }
        let Phase::Ending(then) = mem::replace(&mut self.phase, Phase::Down) else { return };
        self.shown.pid = None;
        match (then, outcome) {
            (Then::Rest, Ok(())) => self.shown.lifecycle = Lifecycle::Stopped,
            (Then::Answer(ticket), Ok(())) => self.rest(String::new(), ticket, Ok(())),
            (Then::Start(order, ticket), Ok(())) => self.start(order, Some(ticket)),
            (Then::Fail(ticket, text), _) => self.rest(text.clone(), ticket, Err(text)),
            (Then::Rest, Err(text)) => self.show_stopped(text),
            (Then::Answer(ticket) | Then::Start(_, ticket), Err(text)) => {
                self.rest(text.clone(), ticket, Err(text));
            }
        }
        self.serve();
    }

    /// What foreign processes have left on the host, now that none runs.
    pub(super) fn handle_left_behind(&mut self, left_behind: BTreeSet<Trace>) {
        self.shown.left_behind = left_behind;
    }

    /// A deadline has passed.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        let (late, waiting) = mem::take(&mut self.waiting).into_iter().partition(|it| it.until <= now);
        self.waiting = waiting;
        let late: VecDeque<Waiting> = late;
        self.effects.extend(late.into_iter().map(|it| Effect::Answer(it.ticket, Err(LOCKED.to_owned()))));
        if let Phase::Pausing { order, until } = &self.phase
            && *until <= now
        {
            let order = Arc::clone(order);
            self.start(order, None);
        }
    }

    /// When [`Self::handle_timeout`] is next due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let pause = match &self.phase {
            Phase::Pausing { until, .. } => Some(*until),
            Phase::Down | Phase::Starting { .. } | Phase::Up { .. } | Phase::Ending(_) => None,
        };
        self.waiting.iter().map(|it| it.until).chain(pause).min()
    }

    /// What is to be done, in order.
    pub(super) fn poll_effects(&mut self) -> Vec<Effect> {
        mem::take(&mut self.effects)
    }

    /// What clients are told.
    pub(super) fn shown(&self) -> &TunnelState {
        &self.shown
    }

    /// Names the present process.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether what is said of this process still matters.
    pub(super) fn is_current(&self, generation: u64) -> bool {
        self.generation == generation
    }

    /// Whether somebody waits for the process that is being started.
    pub(super) fn is_asked_for(&self) -> bool {
        matches!(self.phase, Phase::Starting { asked: Some(_), .. })
    }

    /// Serves who waits, as long as no operation of a person is under way.
    fn serve(&mut self) {
        while !matches!(self.phase, Phase::Ending(_) | Phase::Starting { asked: Some(_), .. })
            && let Some(Waiting { ticket, wish, power, .. }) = self.waiting.pop_front()
        {
            if let (Power::Own(user), Some(owner)) = (power, self.shown.owner)
                && user != owner
            {
                self.effects.push(Effect::Refuse(ticket, owner));
                continue;
            }
            match wish {
                Wish::Up(order) => self.serve_up(order, ticket),
                Wish::Down => {
                    self.shown.lifecycle = Lifecycle::Stopping;
                    self.end(Ending::Unwanted, Then::Answer(ticket));
                }
            }
        }
    }

    fn serve_up(&mut self, order: Arc<Order>, ticket: Ticket) {
        match &mut self.phase {
            Phase::Up { order: present, .. } if *present == order => {
                self.effects.push(Effect::Answer(ticket, Ok(())));
            }
            Phase::Starting { order: present, asked } if *present == order => {
                *asked = Some(ticket);
                self.shown.progress = Some(StartProgressStage::Initializing);
                self.forgive();
            }
            Phase::Up { .. } | Phase::Starting { .. } => {
                self.forgive();
                self.show_starting(&order, Some(StartProgressStage::Initializing));
                self.end(Ending::Replaced, Then::Start(order, ticket));
            }
            Phase::Down | Phase::Pausing { .. } | Phase::Ending(_) => {
                self.forgive();
                self.start(order, Some(ticket));
            }
        }
    }

    /// A person has acted: what went wrong before no longer counts.
    fn forgive(&mut self) {
        self.budget.reset();
        self.after_death.reset();
        self.after_refusal.reset();
        self.shown.circuit_open = false;
        self.shown.error.clear();
    }

    fn start(&mut self, order: Arc<Order>, asked: Option<Ticket>) {
        self.generation += 1;
        self.show_starting(&order, asked.map(|_| StartProgressStage::Initializing));
        self.effects.push(Effect::Launch(Arc::clone(&order)));
        self.phase = Phase::Starting { order, asked };
    }

    fn end(&mut self, ending: Ending, then: Then) {
        self.generation += 1;
        self.shown.progress = None;
        self.effects.push(Effect::End(ending));
        self.phase = Phase::Ending(then);
    }

    fn recover(
        &mut self,
        order: Arc<Order>,
        death: Death,
        up_since: Option<Instant>,
        now: Instant,
        random: f64,
    ) {
        self.shown.last_reason = Some(death.text.clone());
        self.shown.pid = None;
        if up_since.is_some_and(|since| now.saturating_duration_since(since) >= WINDOW) {
            self.after_death.reset();
        }
        if self.budget.record(now) == Verdict::Spent {
            self.shown.circuit_open = true;
            self.give_up(format!(
                "{}, and that too often (more than {MAX_RESTARTS} times in {} minutes); it is not started again until \
                 you run `warren up`",
                death.text,
                WINDOW.as_secs() / 60
            ));
            return;
        }
        self.shown.restarts += 1;
        self.shown.error = format!("{}; it is being started again", death.text);
        self.effects.push(Effect::Count(death.reason));
        self.pause(order, now, |life| life.after_death.next(random));
    }

    fn pause(&mut self, order: Arc<Order>, now: Instant, pause: impl FnOnce(&mut Self) -> Duration) {
        self.shown.lifecycle = Lifecycle::Starting;
        self.shown.pid = None;
        let until = now + pause(self);
        self.phase = Phase::Pausing { order, until };
    }

    fn give_up(&mut self, text: String) {
        let owner = self.shown.owner;
        self.show_stopped(text);
        self.shown.owner = owner;
        self.end(Ending::GivenUp, Then::Rest);
    }

    fn rest(&mut self, error: String, ticket: Ticket, outcome: Result<(), String>) {
        self.show_stopped(error);
        self.effects.push(Effect::Answer(ticket, outcome));
    }

    fn show_starting(&mut self, order: &Order, progress: Option<StartProgressStage>) {
        self.shown.lifecycle = Lifecycle::Starting;
        self.shown.progress = progress;
        self.shown.owner = Some(order.owner);
        self.shown.pid = None;
    }

    fn show_up(&mut self) {
        self.shown.lifecycle = Lifecycle::Started;
        self.shown.progress = None;
        self.shown.error.clear();
        self.shown.circuit_open = false;
        // The present process uses, and may remove, what its predecessor has left.
        self.shown.left_behind.clear();
    }

    fn show_stopped(&mut self, error: String) {
        self.shown.lifecycle = Lifecycle::Stopped;
        self.shown.error = error;
        self.shown.progress = None;
        self.shown.owner = None;
        self.shown.pid = None;
    }
}

#[cfg(test)]
mod tests;
