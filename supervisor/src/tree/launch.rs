//! How children come up and go down: the tasks around one incarnation.

use std::{future::Future, panic::AssertUnwindSafe, sync::Arc};

use futures::FutureExt;
use ractor::{Actor, ActorCell, ActorId, ActorRef, SpawnErr};
use tokio::{
    sync::{oneshot, watch},
    task::{AbortHandle, JoinHandle},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use warren_actors::runtime::{Hooks, Running, StartFn};

use super::{
    actor::{Arguments, Message, Supervisor},
    board::Group,
    rules::ChildId,
    watch_worker::hung,
};
use crate::child::{ChildSpec, Kind, START_LIMIT, SupervisorSpec};

/// A child and what there is of it at the moment.
pub(super) struct Child {
    pub(super) spec: ChildSpec,
    /// Where a child that supervises shows its own children.
    pub(super) group: Option<Arc<Group>>,
    pub(super) starting: Option<Starting>,
    pub(super) incarnation: Option<Incarnation>,
}

/// A start that has not come out yet.
pub(super) struct Starting {
    cancel: CancellationToken,
    work: AbortHandle,
    _report: AbortOnDropHandle<()>,
}

/// A child that has just been started.
pub(super) struct Up {
    cell: ActorCell,
    join: JoinHandle<()>,
    inside: Inside,
}

enum Inside {
    Worker(Arc<dyn Hooks>),
    Supervisor(ActorRef<Message>),
}

/// A child that runs, until nothing is left of it.
pub(super) struct Incarnation {
    cell: ActorCell,
    inside: Inside,
    _watch: Option<AbortOnDropHandle<()>>,
}

impl Child {
    /// Starts it in a task, which says exactly once how that came out.
    pub(super) fn start(&mut self, id: ChildId, parent: &ActorRef<Message>) {
        let cancel = CancellationToken::new();
        let supervisor = parent.get_cell();
        let work = match (&self.spec.kind, &self.group) {
            (Kind::Supervisor(spec), Some(group)) => bring_up_supervisor(
                SupervisorSpec::clone(spec),
                Arc::clone(group),
                supervisor,
                cancel.clone(),
            )
            .boxed(),
            (Kind::Worker(start), _) => bring_up_worker(start.clone(), supervisor, cancel.clone()).boxed(),
            (Kind::Supervisor(_), None) => return,
        };
        let work = AbortOnDropHandle::new(tokio::spawn(AssertUnwindSafe(work).catch_unwind()));
        let (handle, parent) = (work.abort_handle(), parent.clone());
        let report = tokio::spawn(async move {
            let outcome = match work.await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_panic)) => Err("it panicked".to_owned()),
                Err(_aborted) => Err("it was killed".to_owned()),
            };
            let _ = parent.cast(Message::Started(id, outcome));
        });
        self.starting = Some(Starting { cancel, work: handle, _report: AbortOnDropHandle::new(report) });
    }

    /// Gives up a start.
    pub(super) fn cancel(&self) {
        if let Some(starting) = &self.starting {
            starting.cancel.cancel();
        }
    }

    /// Ends it in order.
    pub(super) fn stop(&self) {
        let Some(held) = &self.incarnation else { return };
        match &held.inside {
            Inside::Supervisor(actor) => drop(actor.cast(Message::Stop)),
            Inside::Worker(_) => held.cell.stop(None),
        }
    }

    /// Ends it at once. A supervisor that is killed would leave behind children that are just stopping, so
    /// it is told to kill them.
    pub(super) fn kill(&self) {
        if let Some(starting) = &self.starting {
            starting.work.abort();
        }
        let Some(held) = &self.incarnation else { return };
        match &held.inside {
            Inside::Supervisor(actor) => drop(actor.cast(Message::Abort)),
            Inside::Worker(_) => held.cell.kill(),
        }
    }

    /// Whether this actor is its present incarnation.
    pub(super) fn is(&self, actor: ActorId) -> bool {
        self.incarnation.as_ref().is_some_and(|held| held.cell.get_id() == actor)
    }
}

impl Up {
    pub(super) fn actor(&self) -> ActorId {
        self.cell.get_id()
    }

    pub(super) fn hooks(&self) -> Option<Arc<dyn Hooks>> {
        match &self.inside {
            Inside::Worker(hooks) => Some(Arc::clone(hooks)),
            Inside::Supervisor(_) => None,
        }
    }

    /// Takes its place as the present incarnation: watched for hanging, its end awaited.
    pub(super) fn settle(self, id: ChildId, parent: &ActorRef<Message>) -> Incarnation {
        let (actor, hooks) = (self.actor(), self.hooks());
        let (end, join) = (parent.clone(), self.join);
        tokio::spawn(async move {
            let _ = join.await;
            let _ = end.cast(Message::Gone(id, actor));
        });
        let watch = hooks.map(|hooks| {
            let parent = parent.clone();
            AbortOnDropHandle::new(tokio::spawn(async move {
                hung(hooks).await;
                let _ = parent.cast(Message::Hung(id, actor));
            }))
        });
        Incarnation { cell: self.cell, inside: self.inside, _watch: watch }
    }
}

async fn bring_up_worker(
    start: StartFn,
    supervisor: ActorCell,
    cancel: CancellationToken,
) -> Result<Up, String> {
    let in_time = unless_cancelled(cancel, timeout(START_LIMIT, start(supervisor))).await?;
    let started = in_time.map_err(|_| format!("it did not start within {START_LIMIT:?}"))?;
    let Running { cell, join, hooks } = started.map_err(reason)?;
    Ok(Up { cell, join, inside: Inside::Worker(hooks) })
}

/// A supervisor has started when its first children have.
async fn bring_up_supervisor(
    spec: SupervisorSpec,
    group: Arc<Group>,
    supervisor: ActorCell,
    cancel: CancellationToken,
) -> Result<Up, String> {
    let (ready, is_ready) = oneshot::channel();
    let (ended, end) = watch::channel(None);
    let arguments = Arguments { spec, group, ready, ended };
    let (actor, join) = Actor::spawn_linked(None, Supervisor, arguments, supervisor).await.map_err(reason)?;
    let unfinished = AbortOnDrop(Some(actor.clone()));
    match unless_cancelled(cancel, is_ready).await {
        Ok(Ok(())) => {
            unfinished.disarm();
            Ok(Up { cell: actor.get_cell(), join, inside: Inside::Supervisor(actor) })
        }
        Ok(Err(_ended)) => {
            let _ = join.await;
            let end = end.borrow();
            Err(end.as_ref().map_or_else(|| "it crashed".to_owned(), ToString::to_string))
        }
        Err(cancelled) => {
            let _ = actor.cast(Message::Stop);
            let _ = join.await;
            Err(cancelled)
        }
    }
}

async fn unless_cancelled<T>(cancel: CancellationToken, work: impl Future<Output = T>) -> Result<T, String> {
    cancel.run_until_cancelled_owned(work).await.ok_or_else(|| "its start was given up".to_owned())
}

fn reason(error: SpawnErr) -> String {
    match error {
        SpawnErr::StartupFailed(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// A supervisor whose start is aborted must not go on without anybody who knows it.
struct AbortOnDrop(Option<ActorRef<Message>>);

impl AbortOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(supervisor) = &self.0 {
            let _ = supervisor.cast(Message::Abort);
        }
    }
}
