//! The tunnel process's life: started, supervised, restarted, stopped.
//!
//! ```text
//! clients ── Start, Stop ──> Tunnels ── life.rs ──> effects
//!                               ├─ launch.rs      device, process, greetings, Start    ─> Launched
//!                               ├─ watch.rs       whether it lives, speaks, answers    ─> Died
//!                               └─ ending         Stop, EOF, SIGTERM, SIGKILL          ─> Ended
//! Service::running ── Arc<Running> (running.rs): the process, its connections, and who listens to it
//! ```
//!
//! | Survives a crash of this part | Where |
//! |---|---|
//! | the process that has answered its Start, its connections, and what it says meanwhile | `Service::running` |
//! | what clients were told last, restarts, an open circuit | `Service::tunnel` |
//! | what is wanted | `Service::desired` |
//!
//! A process that is just being started does not survive it; its asker hears that at once, and a tunnel
//! that was wanted before is started again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{task::JoinHandle, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use warren_actors::{
    resume,
    runtime::{CellWriter, Context, Part, PartError, Reply},
};
use warren_core::wakes::{Cause, Wakes};
use warren_observability::names;
use warren_proto::vpn::{self, status::Lifecycle};

use crate::{
    access::{self, Caller},
    facts::{Service, TunnelState},
    host::footprint::Trace,
    intent::Order,
    link::LinkClient,
};

mod death;
mod header_command;
mod launch;
mod life;
mod logind;
mod neighbours;
mod running;
mod telemetry;
#[cfg(test)]
mod tests;
mod watch;

pub use running::Running;

use death::{Death, Failure};
use launch::{Launch, Step};
use life::{Effect, Ending, Life, Power, Ticket, Wish};

/// How long this part may take to end in order: what ending a tunnel process takes at worst.
pub const STOP_GRACE: Duration = Duration::from_secs(18);

/// How long an attempt that was given up, or an end that was begun, may take.
const END_LIMIT: Duration = Duration::from_secs(16);
/// How long a process that has ended may take to be reaped.
const REAPED_LIMIT: Duration = Duration::from_secs(1);

/// What the tunnels part hears.
#[derive(Debug)]
pub enum Message {
    /// Somebody wants this tunnel.
    Start {
        /// Which.
        order: Arc<Order>,
        /// Who asks.
        caller: Caller,
        /// What the person who asked is told.
        reply: Reply<vpn::StartResponse>,
    },
    /// Somebody wants no tunnel.
    Stop {
        /// Who asks.
        caller: Caller,
        /// What the person who asked is told.
        reply: Reply<vpn::StopResponse>,
    },
    /// What its own tasks report.
    Event(Event),
}

/// What the part's own tasks report. Only they can.
#[derive(Debug)]
pub struct Event(Report);

#[derive(Debug)]
enum Report {
    Stepped(u64, Step),
    Launched(u64, Result<Arc<Running>, Failure>),
    Died(u64, Death),
    Ended(u64, Ended),
    /// The machine woke up, as somebody noticed.
    Awake(Cause),
    Timeout,
    #[cfg(test)]
    Fault,
}

impl From<Report> for Message {
    fn from(report: Report) -> Self {
        Self::Event(Event(report))
    }
}

/// What an end has led to.
#[derive(Debug)]
struct Ended {
    /// Whether the process is gone.
    outcome: Result<(), String>,
    /// What it has left on the host, if it was a foreign one.
    left_behind: BTreeSet<Trace>,
}

/// The part.
pub struct Tunnels {
    service: Arc<Service>,
}

impl Tunnels {
    /// The tunnel of this service.
    pub fn new(service: Arc<Service>) -> Self {
        Self { service }
    }
}

/// One incarnation of the part.
pub struct State {
    life: Life,
    tunnel: CellWriter<TunnelState>,
    running: CellWriter<Option<Arc<Running>>>,
    link: CellWriter<Option<LinkClient>>,
    askers: BTreeMap<Ticket, Asker>,
    tickets: u64,
    launching: Option<Launching>,
    ending: Option<JoinHandle<Option<()>>>,
    watching: Option<AbortOnDropHandle<Option<()>>>,
    timer: Option<(Instant, AbortOnDropHandle<Option<()>>)>,
    wakes: Wakes,
}

/// Who waits for an answer.
enum Asker {
    Start(Reply<vpn::StartResponse>),
    Stop(Reply<vpn::StopResponse>),
}

/// An attempt that is under way.
struct Launching {
    cancelled: CancellationToken,
    task: JoinHandle<Option<()>>,
}

impl Part for Tunnels {
    type Message = Message;
    type State = State;

    async fn start(&self, context: &Context<Message>) -> Result<State, PartError> {
        let tunnel = self.service.tunnel.claim()?;
        let mut state = State {
            life: Life::new(TunnelState::clone(&tunnel.get())),
            tunnel,
            running: self.service.running.claim()?,
            link: self.service.link.claim()?,
            askers: BTreeMap::new(),
            tickets: 0,
            launching: None,
            ending: None,
            watching: None,
            timer: None,
            wakes: Wakes::default(),
        };
        self.reconcile(context, &mut state);
        self.act(context, &mut state);
        let awake = |cause| {
            let me = context.me.clone();
            move || {
                let me = me.clone();
                async move { me.send(Report::Awake(cause).into()).await.unwrap_or_default() }
            }
        };
        context.tasks.spawn(resume::watch(awake(Cause::Resumed)));
        context.tasks.spawn(logind::watch(awake(Cause::Logind)));
        Ok(state)
    }

    async fn handle(
        &self,
        context: &Context<Message>,
        state: &mut State,
        message: Message,
    ) -> Result<(), PartError> {
        match message {
            Message::Start { order, caller, reply } => {
                state.hear_wish(Asker::Start(reply), Wish::Up(order), self.power(&caller));
            }
            Message::Stop { caller, reply } => {
                state.hear_wish(Asker::Stop(reply), Wish::Down, self.power(&caller));
            }
            Message::Event(Event(report)) => self.hear(context, state, report),
        }
        self.act(context, state);
        Ok(())
    }

    /// The service ends: the tunnel ends with it, and is wanted again by the next service.
    async fn stop(&self, mut state: State) {
        state.watching = None;
        if let Some(ending) = state.ending.take() {
            let _ = timeout(END_LIMIT, ending).await;
        }
        let (launching, running) = (state.launching.take(), state.running.get().as_ref().clone());
        if let Err(error) = end(&self.service, launching, running, Ending::Replaced).await.outcome {
            tracing::warn!(%error, "the tunnel process could not be ended");
        }
        state.link.set(None);
        state.running.set(None);
        let before = TunnelState::clone(&state.tunnel.get());
        let (lifecycle, error) = (Lifecycle::Stopped, "the service is ending".to_owned());
        state.publish(TunnelState { lifecycle, error, progress: None, pid: None, ..before });
    }
}

impl Tunnels {
    fn power(&self, caller: &Caller) -> Power {
        if access::is_privileged(caller, &self.service) { Power::All } else { Power::Own(caller.uid) }
    }

    /// Goes on where a predecessor, or the last service, has left off.
    fn reconcile(&self, context: &Context<Message>, state: &mut State) {
        let shown = state.tunnel.get();
        let wanted = self.service.desired.get().wanted().cloned();
        let has_rested = shown.lifecycle == Lifecycle::Stopped && !shown.error.is_empty();
        match (state.running.get().as_ref(), wanted) {
            (Some(_), _) if shown.lifecycle == Lifecycle::Stopping => {
                state.life.handle_unfinished(Ending::Unwanted);
            }
            (Some(running), _) => self.adopt(context, state, running),
            // A person has to act first, and was told so.
            (None, Some(_)) if has_rested => {}
            (None, Some(order)) => state.life.handle_resume(order),
            (None, None) if shown.lifecycle == Lifecycle::Stopped => {}
            (None, None) => state.life.handle_unfinished(Ending::Unwanted),
        }
    }

    fn adopt(&self, context: &Context<Message>, state: &mut State, running: &Arc<Running>) {
        tracing::info!(pid = running.process().pid(), "the running tunnel is taken over");
        state.life.handle_found(Arc::clone(running.order()), running.process().pid(), now());
        state.link.set(running.link().cloned());
        self.watch(context, state, Arc::clone(running));
        let (service, order) = (Arc::clone(&self.service), Arc::clone(running.order()));
        context.tasks.spawn(async move { neighbours::remember(&service, &order).await });
    }

    fn hear(&self, context: &Context<Message>, state: &mut State, report: Report) {
        match report {
            Report::Stepped(generation, Step::Spawned(pid)) => state.life.handle_spawned(generation, pid),
            Report::Stepped(generation, Step::Finalizing) => state.life.handle_finalizing(generation),
            Report::Launched(generation, outcome) if state.life.is_current(generation) => {
                state.launching = None;
                let outcome = outcome.map(|running| {
                    tracing::info!(pid = running.process().pid(), "the tunnel is up");
                    state.link.set(running.link().cloned());
                    state.running.set(Some(Arc::clone(&running)));
                    self.watch(context, state, running);
                });
                if let Err(failure) = &outcome {
                    tracing::warn!(?failure, "the tunnel did not start");
                }
                state.life.handle_launched(generation, outcome, now(), random());
            }
            Report::Died(generation, death) if state.life.is_current(generation) => {
                // What is left of it is killed with the last holder.
                state.let_go();
                state.life.handle_died(generation, death, now(), random());
            }
            Report::Ended(generation, Ended { outcome, left_behind })
                if state.life.is_current(generation) =>
            {
                state.ending = None;
                state.let_go();
                state.life.handle_left_behind(left_behind);
                state.life.handle_ended(generation, outcome);
            }
            // Of a process that nobody waits for any more.
            Report::Launched(..) | Report::Died(..) | Report::Ended(..) => {}
            Report::Awake(cause) => {
                let Some(running) = state.running.get().as_ref().clone() else { return };
                if !state.wakes.is_news(now(), resume::slept(), cause) {
                    return;
                }
                tracing::info!(?cause, "the machine has slept; the tunnel is told");
                context.tasks.spawn(async move { running.wake().await });
            }
            Report::Timeout => {
                state.timer = None;
                state.life.handle_timeout(now());
            }
            #[cfg(test)]
            Report::Fault => panic!("a test forced this panic"),
        }
    }

    fn act(&self, context: &Context<Message>, state: &mut State) {
        let mut answers = Vec::new();
        for effect in state.life.poll_effects() {
            match effect {
                Effect::Launch(order) => self.launch(context, state, order),
                Effect::End(ending) => self.end(context, state, ending),
                Effect::Answer(ticket, outcome) => answers.push((ticket, outcome)),
                Effect::Refuse(ticket, owner) => answers.push((ticket, Err(access::refusal(owner)))),
                Effect::Count(reason) => {
                    metrics::counter!(names::TUNNEL_RESTARTS, "reason" => reason.label()).increment(1);
                }
            }
        }
        // Whoever gets an answer and asks for the status at once finds them to agree.
        state.publish(state.life.shown().clone());
        answers.into_iter().for_each(|(ticket, outcome)| state.answer(ticket, outcome));
        state.set_timer(context);
    }

    fn launch(&self, context: &Context<Message>, state: &mut State, order: Arc<Order>) {
        if state.life.is_asked_for() {
            self.service.log.clear();
        }
        let (generation, cancelled) = (state.life.generation(), CancellationToken::new());
        let (me, teller) = (context.me.clone(), context.me.clone());
        let launch = Launch {
            service: Arc::clone(&self.service),
            order,
            cancelled: cancelled.clone(),
            tell: move |step| {
                let teller = teller.clone();
                async move {
                    let _ = teller.send(Report::Stepped(generation, step).into()).await;
                }
            },
        };
        let task = context.tasks.spawn(async move {
            let outcome = launch.run().await;
            let _ = me.send(Report::Launched(generation, outcome).into()).await;
        });
        state.launching = Some(Launching { cancelled, task });
    }

    fn end(&self, context: &Context<Message>, state: &mut State, ending: Ending) {
        state.watching = None;
        state.link.set(None);
        let (launching, running) = (state.launching.take(), state.running.get().as_ref().clone());
        let (service, me, generation) =
            (Arc::clone(&self.service), context.me.clone(), state.life.generation());
        state.ending = Some(context.tasks.spawn(async move {
            let outcome = end(&service, launching, running, ending).await;
            let _ = me.send(Report::Ended(generation, outcome).into()).await;
        }));
    }

    fn watch(&self, context: &Context<Message>, state: &mut State, running: Arc<Running>) {
        let (me, log, generation) = (context.me.clone(), self.service.log.clone(), state.life.generation());
        let watching = context.tasks.spawn(async move {
            let death = watch::watch(running, log).await;
            let _ = me.send(Report::Died(generation, death).into()).await;
        });
        state.watching = Some(AbortOnDropHandle::new(watching));
    }
}

impl State {
    fn hear_wish(&mut self, asker: Asker, wish: Wish, power: Power) {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.askers.insert(ticket, asker);
        self.life.handle_wish(ticket, wish, power, now());
    }

    fn answer(&mut self, ticket: Ticket, outcome: Result<(), String>) {
        let (success, error_message) = (outcome.is_ok(), outcome.err().unwrap_or_default());
        match self.askers.remove(&ticket) {
            Some(Asker::Start(reply)) => drop(reply.send(vpn::StartResponse { success, error_message })),
            Some(Asker::Stop(reply)) => drop(reply.send(vpn::StopResponse { success, error_message })),
            None => {}
        }
    }

    fn let_go(&mut self) {
        self.watching = None;
        self.link.set(None);
        self.running.set(None);
    }

    fn publish(&self, shown: TunnelState) {
        let before = self.tunnel.get();
        let since = if shown.lifecycle == before.lifecycle { before.since } else { SystemTime::now() };
        for lifecycle in LIFECYCLES {
            let is_present = f64::from(shown.lifecycle == lifecycle);
            metrics::gauge!(names::TUNNEL_LIFECYCLE, "state" => lifecycle.label()).set(is_present);
        }
        metrics::gauge!(names::TUNNEL_CIRCUIT_OPEN).set(f64::from(shown.circuit_open));
        self.tunnel.set_if_changed(TunnelState { since, ..shown });
    }

    fn set_timer(&mut self, context: &Context<Message>) {
        let deadline = self.life.deadline();
        if deadline == self.timer.as_ref().map(|(due, _)| *due) {
            return;
        }
        self.timer = deadline.map(|due| {
            let me = context.me.clone();
            let sleep = context.tasks.spawn(async move {
                tokio::time::sleep_until(due.into()).await;
                let _ = me.send(Report::Timeout.into()).await;
            });
            (due, AbortOnDropHandle::new(sleep))
        });
    }
}

const LIFECYCLES: [Lifecycle; 4] =
    [Lifecycle::Starting, Lifecycle::Started, Lifecycle::Stopping, Lifecycle::Stopped];

/// Ends whatever there is, in order, and what goes with it.
async fn end(
    service: &Service,
    launching: Option<Launching>,
    running: Option<Arc<Running>>,
    ending: Ending,
) -> Ended {
    if ending == Ending::Unwanted {
        neighbours::forget(service).await;
    }
    if let Some(Launching { cancelled, task }) = launching {
        cancelled.cancel();
        let _ = timeout(END_LIMIT, task).await;
    }
    if let Some(running) = running {
        let exit = running.end().await;
        tracing::info!(pid = running.process().pid(), "the tunnel process {exit}");
    }
    let is_gone = service.slot.acquire(REAPED_LIMIT).await.is_some();
    if ending != Ending::Replaced {
        neighbours::release(service).await;
    }
    // A process that follows may still remove what this one has left.
    let left_behind =
        if ending == Ending::Replaced { BTreeSet::new() } else { service.footprint.left().await };
    Ended { outcome: if is_gone { Ok(()) } else { Err(STUCK.to_owned()) }, left_behind }
}

const STUCK: &str = "the tunnel process cannot be ended; it may hang in the kernel, and only a restart of the machine \
                     would help then";

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// From 0 to 1. Without randomness a pause has no jitter, and nothing worse happens.
fn random() -> f64 {
    getrandom::u32().map_or(0.0, |number| f64::from(number) / f64::from(u32::MAX))
}
