//! A tree of supervised actors with the semantics of OTP, on ractor: ordered start, reverse stop with a grace
//! each and then kill, restarts within a budget, orderly escalation when it is spent.
//!
//! ```text
//! Tree ── root supervisor ─┬─ worker          rules.rs   who is started and stopped when (pure)
//!                          └─ supervisor ─ …  actor.rs   what happens goes in, what to do comes out
//!                                             launch.rs  the tasks around one incarnation
//! snapshot() <── board.rs <── every supervisor           watch_worker.rs  whether a worker still answers
//! ```
//!
//! What ractor leaves open is settled here: no actor has a name, a successor starts only when nothing is left
//! of its predecessor, and a supervisor stops its children itself before it ends.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use ractor::{Actor, ActorRef};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

use crate::child::{ChildSpec, DROP_LIMIT, End, SupervisorSpec};

mod actor;
mod board;
mod launch;
mod rules;
#[cfg(test)]
mod tests;
mod watch_worker;

pub use board::{NodeInfo, NodeKind};
pub use rules::{ChildId, Phase};

use actor::{Arguments, Message, Supervisor};
use board::Group;

/// Why a child was not added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// It could not start.
    #[error("{0}")]
    StartFailed(String),
    /// There is no such supervisor, or it is ending.
    #[error("the supervisor is ending")]
    Ending,
}

/// The handle of a running tree. It goes on until it is stopped or its root gives up.
#[derive(Clone)]
pub struct Tree {
    name: &'static str,
    since: SystemTime,
    root: ActorRef<Message>,
    group: Arc<Group>,
    ended: watch::Receiver<Option<End>>,
    buried: Arc<watch::Sender<bool>>,
}

impl Tree {
    /// Starts the root and its first children, in order. If one of them cannot start, those before it are
    /// stopped again.
    pub async fn start(spec: SupervisorSpec) -> Result<Self, End> {
        let (group, name) = (Group::new(), spec.name);
        let (ready, is_ready) = oneshot::channel();
        let (ended, end) = watch::channel(None);
        let arguments = Arguments { spec, group: Arc::clone(&group), ready, ended };
        let spawned = Actor::spawn(None, Supervisor, arguments).await;
        let (root, join) =
            spawned.map_err(|error| End::StartFailed { child: name, reason: error.to_string() })?;
        let tree = Self { name, since: SystemTime::now(), root, group, ended: end, buried: bury(join) };
        match is_ready.await {
            Ok(()) => Ok(tree),
            Err(_) => Err(tree.ended().await),
        }
    }

    /// Every supervisor and worker, depth first, as the supervisors last wrote it down.
    pub fn snapshot(&self) -> Vec<NodeInfo> {
        let state = if self.ended.borrow().is_some() { Phase::Stopped } else { Phase::Running };
        let root = NodeInfo { state, ..NodeInfo::new(self.name, NodeKind::Supervisor, self.since) };
        let mut lines = vec![root];
        self.group.read(1, &mut lines);
        lines
    }

    /// Writes what only a look from outside tells to the metrics. Call it before they are rendered.
    pub fn measure(&self) {
        board::measure(&self.snapshot());
    }

    /// Starts one more child of the root.
    pub async fn add(&self, child: ChildSpec) -> Result<ChildId, AddError> {
        self.group.add(child).await
    }

    /// Stops a child of the root and forgets it. Ends when nothing is left of it.
    pub async fn remove(&self, child: ChildId) {
        self.group.remove(child).await;
    }

    /// The first supervisor of that name below the root, to add children to and remove them from.
    pub fn branch(&self, name: &str) -> Option<Branch> {
        self.group.find_group(name).map(|group| Branch { group })
    }

    /// Forces a fault into the first worker of that name. Returns whether there is one.
    #[cfg(feature = "faults")]
    pub fn inject(&self, worker: &str, kind: warren_actors::runtime::FaultKind) -> bool {
        let hooks = self.group.find(worker);
        hooks.inspect(|hooks| hooks.inject(kind)).is_some()
    }

    /// Stops everything in reverse order. What is left after `limit` is killed, without waiting much longer
    /// for it. Returns whether nothing was left.
    pub async fn stop(&self, limit: Duration) -> bool {
        let _ = self.root.cast(Message::Stop);
        if tokio::time::timeout(limit, self.ended()).await.is_ok() {
            return true;
        }
        let _ = self.root.cast(Message::Abort);
        if tokio::time::timeout(DROP_LIMIT, self.ended()).await.is_err() {
            self.root.get_cell().kill();
        }
        false
    }

    /// Waits until the tree has ended, and says why. By then nothing of it is left.
    pub async fn ended(&self) -> End {
        let _ = self.buried.subscribe().wait_for(|is_buried| *is_buried).await;
        self.ended.borrow().clone().unwrap_or(End::Crashed)
    }
}

/// One supervisor of a tree, whichever incarnation of it runs.
#[derive(Clone)]
pub struct Branch {
    group: Arc<Group>,
}

impl Branch {
    /// Starts one more child of this supervisor. A restart of the supervisor forgets it.
    pub async fn add(&self, child: ChildSpec) -> Result<ChildId, AddError> {
        self.group.add(child).await
    }

    /// Stops a child of this supervisor and forgets it. Ends when nothing is left of it.
    pub async fn remove(&self, child: ChildId) {
        self.group.remove(child).await;
    }
}

/// Remembers when the root is gone.
fn bury(root: JoinHandle<()>) -> Arc<watch::Sender<bool>> {
    let buried = Arc::new(watch::Sender::new(false));
    let bell = Arc::clone(&buried);
    tokio::spawn(async move {
        let _ = root.await;
        bell.send_replace(true);
    });
    buried
}
