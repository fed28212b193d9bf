//! What a part is, and how it becomes an actor. A part sees its messages and its state; ractor, the
//! credits, liveness probes and the timing of handlers stay in this file.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SpawnErr};
use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use warren_observability::names;

use super::{Address, Tasks, View};

/// Why a part could not start or go on. Out of a handler it means "restart me".
pub type PartError = Box<dyn std::error::Error + Send + Sync>;

/// The error that a part's handler returned, as its supervisor sees it. Anything else that ends a part
/// against its will is a panic.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HandlerError(PartError);

/// One supervised part: `self` is configuration, `State` is what a crash loses.
pub trait Part: Send + Sync + 'static {
    /// What the part hears.
    type Message: Send + 'static;
    /// What one incarnation of the part holds.
    type State: Send + 'static;

    /// Builds the state of a new incarnation: reads cells, claims writers, reconciles.
    fn start(
        &self,
        context: &Context<Self::Message>,
    ) -> impl Future<Output = Result<Self::State, PartError>> + Send;

    /// Handles one message, in milliseconds; long work goes to `context.tasks`.
    fn handle(
        &self,
        context: &Context<Self::Message>,
        state: &mut Self::State,
        message: Self::Message,
    ) -> impl Future<Output = Result<(), PartError>> + Send;

    /// Ends an incarnation in order. Not called after a crash: what must happen belongs in `Drop`.
    fn stop(&self, _state: Self::State) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// What a part may use of its surroundings.
pub struct Context<M: Send + 'static> {
    /// The part's own address, for its tasks to report to.
    pub me: Address<M>,
    /// The part's own work; ends with this incarnation. A task that panics takes the part with it.
    pub tasks: Tasks,
}

impl<M: Send + 'static> Context<M> {
    /// Tells the part of the value in a cell: of the present one at once, and of a later one when it has
    /// handled the one before. What changes meanwhile is told once, so that a burst costs no more than it must.
    pub fn follow<T: Send + Sync + 'static>(
        &self,
        mut view: View<T>,
        tell: impl Fn() -> M + Send + Sync + 'static,
    ) {
        let me = self.me.clone();
        self.tasks.spawn(async move {
            while view.changed().await.is_some() && me.hand_over(tell()).await.is_ok() {}
        });
    }

    /// Tells the part that time passes: at once, and then every `period`. What it is too busy for is lost.
    pub fn tick(&self, period: Duration, tell: impl Fn() -> M + Send + Sync + 'static) {
        let me = self.me.clone();
        self.tasks.spawn(async move {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                if me.hand_over(tell()).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// What travels to an actor: a message with what it holds until it is handled, or something for the shell
/// itself.
pub(super) enum Envelope<M> {
    Message(M, Fare),
    Probe(oneshot::Sender<()>),
    TaskPanicked(String),
    #[cfg(feature = "faults")]
    Fault(FaultKind),
}

/// What a message holds until it is handled, or lost: its credit, and who waits for that moment.
pub(super) struct Fare {
    pub(super) _credit: OwnedSemaphorePermit,
    pub(super) _handled: Option<oneshot::Sender<()>>,
}

/// A fault that tests force into a running part.
#[cfg(feature = "faults")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The handler panics.
    Panic,
    /// The handler returns an error.
    Error,
    /// The handler never returns.
    Hang,
}

#[cfg(feature = "faults")]
impl std::str::FromStr for FaultKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "panic" => Ok(Self::Panic),
            "error" => Ok(Self::Error),
            "hang" => Ok(Self::Hang),
            other => Err(format!("unknown fault {other:?}: use panic, error or hang")),
        }
    }
}

/// A started child as its supervisor holds it.
pub struct Running {
    /// The actor, to stop or kill it.
    pub cell: ActorCell,
    /// Ends when the actor's state has dropped and its tasks have ended: only then may its successor start.
    pub join: JoinHandle<()>,
    /// A look at it from outside.
    pub hooks: Arc<dyn Hooks>,
}

/// What can be asked of one running incarnation without a place in its mailbox.
pub trait Hooks: Send + Sync {
    /// Asks whether it is alive; the receiver hears when it reads its mailbox, or ends with it.
    fn probe(&self) -> oneshot::Receiver<()>;

    /// How many messages it has handled. One that grows is busy, not hung.
    fn handled(&self) -> u64;

    /// How many messages wait or are being handled.
    fn depth(&self) -> usize;

    /// Forces a fault into it.
    #[cfg(feature = "faults")]
    fn inject(&self, kind: FaultKind);
}

/// Starts one incarnation of a child, linked to the given supervisor.
pub type StartFn =
    Arc<dyn Fn(ActorCell) -> Pin<Box<dyn Future<Output = Result<Running, SpawnErr>> + Send>> + Send + Sync>;

/// How a supervisor starts a part: `make` builds its configuration for each incarnation, and the
/// incarnation is bound to `address`.
pub fn starter<P: Part>(
    address: Address<P::Message>,
    make: impl Fn() -> P + Send + Sync + 'static,
) -> StartFn {
    let make = Arc::new(make);
    Arc::new(move |supervisor| {
        let (address, make) = (address.clone(), Arc::clone(&make));
        Box::pin(async move { start(make(), address, supervisor).await })
    })
}

async fn start<P: Part>(
    part: P,
    address: Address<P::Message>,
    supervisor: ActorCell,
) -> Result<Running, SpawnErr> {
    let (handled, (tasks, ended)) = (Arc::new(AtomicU64::new(0)), oneshot::channel());
    let shell = Shell { part, address: address.clone(), handled: Arc::clone(&handled) };
    let spawned = Actor::spawn_linked(None, shell, tasks, supervisor).await;
    let ended = ended.await;
    let (actor, ended) = match (spawned, ended) {
        (Ok((actor, join)), Ok(ended)) => (actor, (join, ended)),
        (Err(error), ended) => {
            // The failed incarnation's tasks may hold what the next attempt claims.
            if let Ok(ended) = ended {
                ended.await;
            }
            return Err(error);
        }
        (Ok(_), Err(_)) => return Err(SpawnErr::StartupFailed("the part has no tasks".into())),
    };
    let join = tokio::spawn(async move {
        let (actor, tasks) = ended;
        let _ = actor.await;
        tasks.await;
    });
    Ok(Running { cell: actor.get_cell(), join, hooks: Arc::new(Incarnated { address, actor, handled }) })
}

/// One incarnation, as seen from outside.
struct Incarnated<M: Send + 'static> {
    address: Address<M>,
    actor: ActorRef<Envelope<M>>,
    handled: Arc<AtomicU64>,
}

impl<M: Send + 'static> Hooks for Incarnated<M> {
    fn probe(&self) -> oneshot::Receiver<()> {
        let (alive, answer) = oneshot::channel();
        let _ = self.actor.cast(Envelope::Probe(alive));
        answer
    }

    fn handled(&self) -> u64 {
        self.handled.load(Ordering::Relaxed)
    }

    fn depth(&self) -> usize {
        self.address.depth()
    }

    #[cfg(feature = "faults")]
    fn inject(&self, kind: FaultKind) {
        let _ = self.actor.cast(Envelope::Fault(kind));
    }
}

struct Shell<P: Part> {
    part: P,
    address: Address<P::Message>,
    handled: Arc<AtomicU64>,
}

/// Where the shell says how to wait for the end of its tasks.
type TasksEnded = oneshot::Sender<Pin<Box<dyn Future<Output = ()> + Send>>>;

struct Incarnation<P: Part> {
    state: Option<P::State>,
    context: Context<P::Message>,
    timing: metrics::Histogram,
}

impl<P: Part> Actor for Shell<P> {
    type Msg = Envelope<P::Message>;
    type State = Incarnation<P>;
    type Arguments = TasksEnded;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        tasks_ended: TasksEnded,
    ) -> Result<Self::State, ActorProcessingErr> {
        let alarmed = myself.clone();
        let tasks = Tasks::with_alarm(move |text| drop(alarmed.cast(Envelope::TaskPanicked(text))));
        let _ = tasks_ended.send(Box::pin(tasks.ended()));
        // Bound already here: tasks that `start` spawns may report before the spawn has returned.
        self.address.bind(myself);
        let context = Context { me: self.address.clone(), tasks };
        let state = Some(self.part.start(&context).await?);
        let timing = metrics::histogram!(names::ACTOR_HANDLE_DURATION, "actor" => self.address.name());
        Ok(Incarnation { state, context, timing })
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        envelope: Self::Msg,
        incarnation: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match envelope {
            Envelope::Message(message, _fare) => {
                let Some(state) = incarnation.state.as_mut() else { return Ok(()) };
                let begun = Instant::now();
                let handled = self.part.handle(&incarnation.context, state, message).await;
                incarnation.timing.record(begun.elapsed());
                self.handled.fetch_add(1, Ordering::Relaxed);
                handled.map_err(|error| HandlerError(error).into())
            }
            Envelope::Probe(alive) => {
                let _ = alive.send(());
                Ok(())
            }
            Envelope::TaskPanicked(text) => Err(format!("a task panicked: {text}").into()),
            #[cfg(feature = "faults")]
            Envelope::Fault(kind) => suffer(kind).await,
        }
    }

    async fn post_stop(
        &self,
        _myself: ActorRef<Self::Msg>,
        incarnation: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        if let Some(state) = incarnation.state.take() {
            self.part.stop(state).await;
        }
        Ok(())
    }
}

#[cfg(feature = "faults")]
async fn suffer(kind: FaultKind) -> Result<(), ActorProcessingErr> {
    match kind {
        #[expect(clippy::panic, reason = "forced by a test, to be survived")]
        FaultKind::Panic => panic!("a test forced this panic"),
        FaultKind::Error => Err(HandlerError("a test forced this error".into()).into()),
        FaultKind::Hang => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use ractor::SupervisionEvent;
    use tokio::sync::{Notify, mpsc};

    use super::*;

    /// How an incarnation ended.
    #[derive(Debug, PartialEq, Eq)]
    enum Ended {
        Handler(String),
        Other(String),
        Terminated(Option<String>),
    }

    /// A supervisor that only takes notes.
    struct Clerk(mpsc::Sender<Ended>);

    impl Actor for Clerk {
        type Msg = ();
        type State = ();
        type Arguments = ();

        async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
            Ok(())
        }

        async fn handle_supervisor_evt(
            &self,
            _: ActorRef<()>,
            event: SupervisionEvent,
            _: &mut (),
        ) -> Result<(), ActorProcessingErr> {
            let ended = match event {
                SupervisionEvent::ActorFailed(_, error) if error.is::<HandlerError>() => {
                    Ended::Handler(error.to_string())
                }
                SupervisionEvent::ActorFailed(_, error) => Ended::Other(error.to_string()),
                SupervisionEvent::ActorTerminated(_, _, reason) => Ended::Terminated(reason),
                _ => return Ok(()),
            };
            self.0.send(ended).await?;
            Ok(())
        }
    }

    /// What the part under test is told.
    #[derive(Debug)]
    enum Order {
        Echo(u32, super::super::Reply<u32>),
        Fail,
        Panic,
        PanicInTask,
        Hold(Arc<Notify>),
    }

    /// Holds a flag in a task, as parts hold sockets.
    struct Puppet(Arc<AtomicBool>);

    struct Flag(Arc<AtomicBool>);

    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }

    impl Part for Puppet {
        type Message = Order;
        type State = ();

        async fn start(&self, context: &Context<Order>) -> Result<(), PartError> {
            if self.0.swap(true, Ordering::SeqCst) {
                return Err("the predecessor's task still holds the flag".into());
            }
            let flag = Flag(Arc::clone(&self.0));
            context.tasks.spawn(async move {
                let _flag = flag;
                std::future::pending::<()>().await;
            });
            Ok(())
        }

        async fn handle(&self, context: &Context<Order>, _: &mut (), order: Order) -> Result<(), PartError> {
            match order {
                Order::Echo(number, reply) => drop(reply.send(number)),
                Order::Fail => return Err("on purpose".into()),
                Order::Panic => panic!("on purpose"),
                Order::PanicInTask => drop(context.tasks.spawn(async { panic!("on purpose") })),
                Order::Hold(until) => until.notified().await,
            }
            Ok(())
        }
    }

    struct Rig {
        address: Address<Order>,
        supervisor: ActorRef<()>,
        ended: mpsc::Receiver<Ended>,
        start: StartFn,
    }

    impl Rig {
        async fn new(capacity: usize) -> Self {
            let (tell, ended) = mpsc::channel(8);
            let (supervisor, _) = Actor::spawn(None, Clerk(tell), ()).await.unwrap();
            let (address, flag) = (Address::new("puppet", capacity), Arc::new(AtomicBool::new(false)));
            let start = starter(address.clone(), move || Puppet(Arc::clone(&flag)));
            Self { address, supervisor, ended, start }
        }

        async fn run(&self) -> Running {
            (self.start)(self.supervisor.get_cell()).await.unwrap()
        }
    }

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn an_address_outlives_the_incarnations_behind_it() {
        let mut rig = Rig::new(4).await;
        let down = rig.address.ask(SOON, |reply| Order::Echo(1, reply)).await;
        assert_eq!(down, Err(super::super::AskError::Down("puppet")));
        for number in 0..3 {
            let running = rig.run().await;
            assert_eq!(rig.address.ask(SOON, |reply| Order::Echo(number, reply)).await, Ok(number));
            running.cell.kill();
            running.join.await.unwrap();
            assert_eq!(rig.ended.recv().await, Some(Ended::Terminated(Some("killed".to_owned()))));
        }
    }

    #[tokio::test]
    async fn the_join_handle_waits_for_the_tasks_of_the_incarnation() {
        let mut rig = Rig::new(4).await;
        for _ in 0..20 {
            let running = rig.run().await;
            rig.address.send(Order::Panic).await.unwrap();
            running.join.await.unwrap();
            assert_eq!(rig.ended.recv().await, Some(Ended::Other("on purpose".to_owned())));
        }
    }

    #[tokio::test]
    async fn an_error_and_a_panic_are_told_apart() {
        let mut rig = Rig::new(4).await;
        let running = rig.run().await;
        rig.address.send(Order::Fail).await.unwrap();
        assert_eq!(rig.ended.recv().await, Some(Ended::Handler("on purpose".to_owned())));
        running.join.await.unwrap();
        let _running = rig.run().await;
        rig.address.send(Order::PanicInTask).await.unwrap();
        let text = "a task panicked: on purpose".to_owned();
        assert_eq!(rig.ended.recv().await, Some(Ended::Other(text)));
    }

    #[tokio::test]
    async fn a_mailbox_takes_no_more_than_its_credits_and_gives_them_back() {
        let rig = Rig::new(2).await;
        let _running = rig.run().await;
        let gates = [Arc::new(Notify::new()), Arc::new(Notify::new())];
        rig.address.send(Order::Hold(Arc::clone(&gates[0]))).await.unwrap();
        rig.address.try_send(Order::Hold(Arc::clone(&gates[1]))).unwrap();
        assert_eq!(rig.address.depth(), 2);
        let refused = rig.address.try_send(Order::Fail);
        assert!(matches!(refused, Err(super::super::TrySendError::Full(Order::Fail))));
        let asked = rig.address.clone();
        let answer = tokio::spawn(async move { asked.ask(SOON, |reply| Order::Echo(9, reply)).await });
        gates.iter().for_each(|gate| gate.notify_one());
        assert_eq!(answer.await.unwrap(), Ok(9));
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_has_a_deadline_and_the_mailbox_counts_into_it() {
        let rig = Rig::new(1).await;
        let _running = rig.run().await;
        rig.address.send(Order::Hold(Arc::new(Notify::new()))).await.unwrap();
        let answer = rig.address.ask(Duration::from_secs(2), |reply| Order::Echo(1, reply)).await;
        assert_eq!(answer, Err(super::super::AskError::Deadline("puppet")));
    }

    #[tokio::test]
    async fn messages_that_a_crash_leaves_behind_give_their_credits_back_and_their_askers_hear_of_it() {
        let rig = Rig::new(3).await;
        let running = rig.run().await;
        rig.address.send(Order::Hold(Arc::new(Notify::new()))).await.unwrap();
        let asked = rig.address.clone();
        let answer = tokio::spawn(async move { asked.ask(SOON, |reply| Order::Echo(1, reply)).await });
        while rig.address.depth() < 2 {
            tokio::task::yield_now().await;
        }
        running.cell.kill();
        assert_eq!(answer.await.unwrap(), Err(super::super::AskError::Down("puppet")));
        running.join.await.unwrap();
        assert_eq!(rig.address.depth(), 0);
    }

    #[tokio::test]
    async fn a_probe_is_answered_by_a_live_part_and_ends_with_a_dead_one() {
        let rig = Rig::new(3).await;
        let running = rig.run().await;
        assert!(running.hooks.probe().await.is_ok());
        rig.address.ask(SOON, |reply| Order::Echo(1, reply)).await.unwrap();
        assert_eq!(running.hooks.handled(), 1);
        rig.address.send(Order::Hold(Arc::new(Notify::new()))).await.unwrap();
        let unanswered = running.hooks.probe();
        running.cell.kill();
        assert!(unanswered.await.is_err());
        running.join.await.unwrap();
        assert!(running.hooks.probe().await.is_err());
    }

    /// Follows a cell, and is as slow as the test lets it be.
    struct Follower {
        cell: super::super::Cell<u32>,
        seen: mpsc::Sender<u32>,
        may_go_on: Arc<tokio::sync::Semaphore>,
    }

    impl Part for Follower {
        type Message = ();
        type State = ();

        async fn start(&self, context: &Context<()>) -> Result<(), PartError> {
            context.follow(self.cell.view(), || ());
            Ok(())
        }

        async fn handle(&self, _: &Context<()>, _: &mut (), (): ()) -> Result<(), PartError> {
            self.seen.send(*self.cell.get()).await?;
            self.may_go_on.acquire().await?.forget();
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_follower_is_told_once_of_what_changes_while_it_is_busy() {
        let (tell, _ended) = mpsc::channel(8);
        let (supervisor, _) = Actor::spawn(None, Clerk(tell), ()).await.unwrap();
        let (seen, mut values) = mpsc::channel(8);
        let (cell, may_go_on) = (super::super::Cell::new(0), Arc::new(tokio::sync::Semaphore::new(0)));
        let (followed, gate) = (cell.clone(), Arc::clone(&may_go_on));
        let start = starter(Address::new("follower", 4), move || Follower {
            cell: followed.clone(),
            seen: seen.clone(),
            may_go_on: Arc::clone(&gate),
        });
        let _running = start(supervisor.get_cell()).await.unwrap();
        assert_eq!(values.recv().await, Some(0));
        let writer = cell.claim().unwrap();
        (1..=100).for_each(|value| writer.set(value));
        may_go_on.add_permits(2);
        assert_eq!(values.recv().await, Some(100));
        assert!(tokio::time::timeout(Duration::from_millis(50), values.recv()).await.is_err());
    }
}
