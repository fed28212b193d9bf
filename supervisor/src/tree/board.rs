//! Who runs, for anyone to read without asking the actors. Each supervisor writes its own [`Group`]; a group
//! stays when its supervisor is restarted.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use ractor::ActorRef;
use tokio::sync::oneshot;
use warren_actors::runtime::Hooks;
use warren_observability::names;

use super::{
    AddError,
    actor::Message,
    rules::{ChildId, Phase, Sight},
};
use crate::child::ChildSpec;

/// Levels of the tree that are shown; ours has three.
const MAX_DEPTH: u32 = 16;

/// One line of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// How many supervisors are above it.
    pub depth: u32,
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: NodeKind,
    /// How it stands.
    pub state: Phase,
    /// Since when it stands so.
    pub since: SystemTime,
    /// How often it was started again.
    pub restarts: u64,
    /// Why it last ended.
    pub last_reason: Option<String>,
    /// How many messages wait at it or are being handled.
    pub mailbox_depth: usize,
}

impl NodeInfo {
    pub(super) fn new(name: &'static str, kind: NodeKind, since: SystemTime) -> Self {
        let state = Phase::Starting;
        Self { depth: 0, name, kind, state, since, restarts: 0, last_reason: None, mailbox_depth: 0 }
    }
}

/// What a line of the tree is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// An actor that supervises.
    Supervisor,
    /// An actor that works.
    Worker,
}

impl NodeKind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Supervisor => "supervisor",
            Self::Worker => "worker",
        }
    }
}

impl Phase {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Restarting => "restarting",
            Self::Stopped => "stopped",
        }
    }
}

/// One supervisor's part of the board, and how it is reached.
pub(super) struct Group {
    slots: Mutex<Vec<Slot>>,
    supervisor: Mutex<Option<ActorRef<Message>>>,
}

struct Slot {
    id: ChildId,
    info: NodeInfo,
    hooks: Option<Arc<dyn Hooks>>,
    group: Option<Arc<Group>>,
}

impl Group {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { slots: Mutex::default(), supervisor: Mutex::default() })
    }

    /// Begins anew with this incarnation of the supervisor.
    pub(super) fn open(&self, supervisor: ActorRef<Message>) {
        self.slots().clear();
        *lock(&self.supervisor) = Some(supervisor);
    }

    pub(super) async fn add(&self, child: ChildSpec) -> Result<ChildId, AddError> {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::Add(child, reply));
        answer.await.map_err(|_| AddError::Ending)?.map_err(AddError::StartFailed)
    }

    pub(super) async fn remove(&self, child: ChildId) {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::Remove(child, reply));
        let _ = answer.await;
    }

    fn tell(&self, message: Message) {
        if let Some(supervisor) = lock(&self.supervisor).as_ref() {
            let _ = supervisor.cast(message);
        }
    }

    /// One more child; `group` if it is a supervisor.
    pub(super) fn enter(&self, id: ChildId, name: &'static str, group: Option<Arc<Group>>) {
        let kind = if group.is_some() { NodeKind::Supervisor } else { NodeKind::Worker };
        let info = NodeInfo::new(name, kind, SystemTime::now());
        self.slots().push(Slot { id, info, hooks: None, group });
    }

    /// A look at the child's present incarnation, or that there is none.
    pub(super) fn set_hooks(&self, id: ChildId, hooks: Option<Arc<dyn Hooks>>) {
        if let Some(slot) = self.slots().iter_mut().find(|slot| slot.id == id) {
            slot.hooks = hooks;
        }
    }

    /// Brings the board up to date.
    pub(super) fn show<'a>(&self, sights: impl Iterator<Item = Sight<'a>>) {
        let mut slots = self.slots();
        for sight in sights {
            if let Some(slot) = slots.iter_mut().find(|slot| slot.id == sight.id) {
                slot.show(&sight);
            }
        }
    }

    /// The child is gone for good.
    pub(super) fn forget(&self, id: ChildId) {
        self.slots().retain(|slot| slot.id != id);
    }

    /// The lines of this group and those below it.
    pub(super) fn read(&self, depth: u32, lines: &mut Vec<NodeInfo>) {
        if depth > MAX_DEPTH {
            return;
        }
        for slot in self.slots().iter() {
            let mailbox_depth = slot.hooks.as_ref().map_or(0, |hooks| hooks.depth());
            lines.push(NodeInfo { depth, mailbox_depth, ..slot.info.clone() });
            if let Some(group) = &slot.group {
                group.read(depth + 1, lines);
            }
        }
    }

    /// The group of the first supervisor of that name below this one.
    pub(super) fn find_group(&self, name: &str) -> Option<Arc<Group>> {
        self.slots().iter().find_map(|slot| match &slot.group {
            Some(group) if slot.info.name == name => Some(Arc::clone(group)),
            Some(group) => group.find_group(name),
            None => None,
        })
    }

    /// The present incarnation of the first worker of that name, in this group or below it.
    #[cfg(feature = "faults")]
    pub(super) fn find(&self, name: &str) -> Option<Arc<dyn Hooks>> {
        self.slots().iter().find_map(|slot| match &slot.group {
            Some(group) => group.find(name),
            None if slot.info.name == name => slot.hooks.clone(),
            None => None,
        })
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        lock(&self.slots)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    fn show(&mut self, sight: &Sight<'_>) {
        if self.info.state != sight.phase || self.info.restarts != sight.restarts {
            self.info.since = SystemTime::now();
        }
        self.info.state = sight.phase;
        self.info.restarts = sight.restarts;
        self.info.last_reason = sight.last_exit.map(ToString::to_string);
    }
}

/// Writes the mailbox depths of these lines to the metrics.
pub(super) fn measure(lines: &[NodeInfo]) {
    for line in lines.iter().filter(|line| line.kind == NodeKind::Worker) {
        metrics::gauge!(names::ACTOR_MAILBOX_DEPTH, "actor" => line.name).set(line.mailbox_depth as f64);
    }
}
