//! The supervisor as an actor: tells the [`Rules`] what happens and does what they say. It never waits in a
//! handler: starts, ends and pauses run in tasks of their own and come back as messages.
//!
//! A child's end comes in two steps. ractor's event says how it ended, and may carry its old state, which is
//! dropped here at once; the join handle says that nothing is left of it. Only then may a successor start.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use warren_actors::runtime::HandlerError;
use warren_observability::names;

use super::{
    board::Group,
    launch::{Child, Up},
    rules::{ChildId, Effect, Rules},
};
use crate::child::{ChildSpec, End, Exit, How, Kind, SupervisorSpec};

/// What a supervisor hears.
pub(super) enum Message {
    /// It may start its children.
    Begin,
    /// A start came out so.
    Started(ChildId, Result<Up, String>),
    /// Nothing is left of this incarnation.
    Gone(ChildId, ActorId),
    /// This incarnation does not answer.
    Hung(ChildId, ActorId),
    /// A deadline has passed.
    Timeout,
    /// One more child.
    Add(ChildSpec, oneshot::Sender<Result<ChildId, String>>),
    /// One child less.
    Remove(ChildId, oneshot::Sender<()>),
    /// No children any more, and no supervisor.
    Stop,
    /// The same, and no graces.
    Abort,
}

/// What a supervisor is started with.
pub(super) struct Arguments {
    pub(super) spec: SupervisorSpec,
    pub(super) group: Arc<Group>,
    /// Hears when every first child runs.
    pub(super) ready: oneshot::Sender<()>,
    /// Hears why the supervisor ended.
    pub(super) ended: watch::Sender<Option<End>>,
}

/// One supervisor.
pub(super) struct Supervisor;

/// What one incarnation of a supervisor holds.
pub(super) struct State {
    name: &'static str,
    rules: Rules,
    children: BTreeMap<ChildId, Child>,
    /// How children ended whose start has not been reported yet.
    early_exits: HashMap<ActorId, Exit>,
    adding: BTreeMap<ChildId, oneshot::Sender<Result<ChildId, String>>>,
    removing: Vec<(ChildId, oneshot::Sender<()>)>,
    group: Arc<Group>,
    ready: Option<oneshot::Sender<()>>,
    ended: watch::Sender<Option<End>>,
    timer: Option<(Instant, AbortOnDropHandle<()>)>,
}

impl Actor for Supervisor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(
        &self,
        myself: ActorRef<Message>,
        arguments: Arguments,
    ) -> Result<State, ActorProcessingErr> {
        let Arguments { spec, group, ready, ended } = arguments;
        let (rules, ids) = Rules::new(&spec);
        group.open(myself.clone());
        let mut state = State {
            name: spec.name,
            rules,
            children: BTreeMap::new(),
            early_exits: HashMap::new(),
            adding: BTreeMap::new(),
            removing: Vec::new(),
            group,
            ready: Some(ready),
            ended,
            timer: None,
        };
        for (id, child) in ids.into_iter().zip(spec.children) {
            state.enter(id, child);
        }
        myself.cast(Message::Begin).map_err(|_| "its own mailbox is closed")?;
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        state.hear(message, &myself);
        state.act(&myself)
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Message>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let (actor, exit) = match event {
            SupervisionEvent::ActorTerminated(cell, old_state, reason) => {
                drop(old_state);
                (cell.get_id(), exit_of(reason.as_deref()))
            }
            SupervisionEvent::ActorFailed(cell, error) => (cell.get_id(), failure_of(&error)),
            SupervisionEvent::ActorStarted(_) | SupervisionEvent::ProcessGroupChanged(_) => return Ok(()),
        };
        state.hear_exit(actor, exit);
        state.act(&myself)
    }
}

/// A killed actor looks almost like one that ended by itself.
fn exit_of(reason: Option<&str>) -> Exit {
    match reason {
        Some("killed") => Exit::abnormal(How::Killed, ""),
        Some(reason @ "actor_task_cancelled") => Exit::abnormal(How::Killed, reason),
        Some(_) | None => Exit::Normal,
    }
}

fn failure_of(error: &ActorProcessingErr) -> Exit {
    let is_error = error.is::<HandlerError>() || error.is::<End>();
    Exit::abnormal(if is_error { How::Error } else { How::Panic }, error.to_string())
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// From 0 to 1. Without randomness a pause has no jitter, and nothing worse happens.
fn random() -> f64 {
    getrandom::u32().map_or(0.0, |number| f64::from(number) / f64::from(u32::MAX))
}

impl State {
    fn enter(&mut self, id: ChildId, spec: ChildSpec) {
        let group = matches!(spec.kind, Kind::Supervisor(_)).then(Group::new);
        self.group.enter(id, spec.name, group.clone());
        self.children.insert(id, Child { spec, group, starting: None, incarnation: None });
    }

    fn hear(&mut self, message: Message, myself: &ActorRef<Message>) {
        match message {
            Message::Begin => self.rules.handle_begin(now()),
            Message::Started(id, Ok(up)) => self.hear_started(id, up, myself),
            Message::Started(id, Err(reason)) => self.hear_start_failed(id, reason),
            Message::Gone(id, actor) => self.hear_gone(id, actor),
            Message::Hung(id, actor) => {
                if self.children.get(&id).is_some_and(|child| child.is(actor)) {
                    self.rules.handle_hung(id, now());
                }
            }
            Message::Timeout => {
                self.timer = None;
                self.rules.handle_timeout(now());
            }
            Message::Add(spec, reply) => {
                let id = self.rules.handle_add(&spec, now());
                self.enter(id, spec);
                self.adding.insert(id, reply);
            }
            Message::Remove(id, reply) => {
                if self.children.contains_key(&id) {
                    self.removing.push((id, reply));
                    self.rules.handle_remove(id, now());
                }
            }
            Message::Stop => self.rules.handle_stop(now()),
            Message::Abort => self.rules.handle_abort(now()),
        }
    }

    fn hear_started(&mut self, id: ChildId, up: Up, myself: &ActorRef<Message>) {
        let Some(child) = self.children.get_mut(&id) else { return };
        let (actor, hooks) = (up.actor(), up.hooks());
        child.starting = None;
        child.incarnation = Some(up.settle(id, myself));
        self.group.set_hooks(id, hooks);
        self.rules.handle_started(id, now());
        if let Some(exit) = self.early_exits.remove(&actor) {
            self.hear_exit(actor, exit);
        }
        self.forget_early_exits();
    }

    fn hear_start_failed(&mut self, id: ChildId, reason: String) {
        let Some(child) = self.children.get_mut(&id) else { return };
        tracing::warn!(supervisor = self.name, actor = child.spec.name, %reason, "a start failed");
        child.starting = None;
        self.rules.handle_start_failed(id, reason, now(), random());
        self.forget_early_exits();
    }

    /// Nobody will ask for them once no start is under way.
    fn forget_early_exits(&mut self) {
        if self.children.values().all(|child| child.starting.is_none()) {
            self.early_exits.clear();
        }
    }

    fn hear_exit(&mut self, actor: ActorId, exit: Exit) {
        match self.children.iter().find(|(_, child)| child.is(actor)) {
            Some((id, _)) => self.rules.handle_exit(*id, exit, now()),
            None => drop(self.early_exits.insert(actor, exit)),
        }
    }

    fn hear_gone(&mut self, id: ChildId, actor: ActorId) {
        let Some(child) = self.children.get_mut(&id).filter(|child| child.is(actor)) else { return };
        child.incarnation = None;
        self.group.set_hooks(id, None);
        self.rules.handle_gone(id, now(), random());
    }

    fn act(&mut self, myself: &ActorRef<Message>) -> Result<(), ActorProcessingErr> {
        let mut end = None;
        for effect in self.rules.poll_effects() {
            match effect {
                Effect::Start(id) => self.with(id, |child| child.start(id, myself)),
                Effect::Cancel(id) => self.with(id, |child| child.cancel()),
                Effect::Stop(id) => self.with(id, |child| child.stop()),
                Effect::Kill(id) => self.with(id, |child| child.kill()),
                Effect::Restarting(id, exit) => self.note_restart(id, &exit),
                Effect::Added(id, outcome) => self.answer_add(id, outcome),
                Effect::Forget(id) => self.forget(id),
                Effect::Ready => drop(self.ready.take().map(|ready| ready.send(()))),
                Effect::End(reason) => end = Some(reason),
            }
        }
        self.group.show(self.rules.sights());
        self.set_timer(myself);
        end.map_or(Ok(()), |end| self.finish(myself, end))
    }

    fn with(&mut self, id: ChildId, action: impl FnOnce(&mut Child)) {
        if let Some(child) = self.children.get_mut(&id) {
            action(child);
        }
    }

    fn note_restart(&self, id: ChildId, exit: &Exit) {
        let Some(child) = self.children.get(&id) else { return };
        let (actor, reason) = (child.spec.name, exit.label());
        metrics::counter!(names::ACTOR_RESTARTS, "actor" => actor, "reason" => reason).increment(1);
        tracing::warn!(supervisor = self.name, actor, %exit, "a child has ended and is started again");
    }

    fn answer_add(&mut self, id: ChildId, outcome: Result<(), String>) {
        if let Some(reply) = self.adding.remove(&id) {
            let _ = reply.send(outcome.map(|()| id));
        }
    }

    fn forget(&mut self, id: ChildId) {
        self.children.remove(&id);
        self.adding.remove(&id);
        self.group.forget(id);
        for (_, reply) in self.removing.extract_if(.., |(removed, _)| *removed == id) {
            let _ = reply.send(());
        }
    }

    fn set_timer(&mut self, myself: &ActorRef<Message>) {
        let due = self.rules.poll_timeout();
        if due == self.timer.as_ref().map(|(at, _)| *at) {
            return;
        }
        self.timer = due.map(|at| {
            let me = myself.clone();
            let task = tokio::spawn(async move {
                tokio::time::sleep_until(at.into()).await;
                let _ = me.cast(Message::Timeout);
            });
            (at, AbortOnDropHandle::new(task))
        });
    }

    fn finish(&mut self, myself: &ActorRef<Message>, end: End) -> Result<(), ActorProcessingErr> {
        self.adding.clear();
        self.removing.clear();
        let is_orderly = end.is_orderly();
        let _ = self.ended.send(Some(end.clone()));
        if is_orderly {
            tracing::debug!(supervisor = self.name, reason = %end, "a supervisor has ended");
            myself.stop(None);
            return Ok(());
        }
        tracing::error!(supervisor = self.name, reason = %end, "a supervisor has ended");
        Err(end.into())
    }
}
