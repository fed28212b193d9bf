//! What a supervisor is told about its children, and what it learns of their ends. Plain values, no actor.

use std::{fmt, time::Duration};

use warren_actors::runtime::{Address, Part, StartFn, starter};
use warren_core::{backoff::Backoff, budget::Budget};

/// How long a worker may take to start.
pub const START_LIMIT: Duration = Duration::from_secs(10);
/// How long a worker may take to end in order, unless its specification says otherwise.
pub const GRACE: Duration = Duration::from_secs(2);
/// How long what was killed or has crashed may take to let go of what it holds. Only code that blocks its
/// thread takes longer, and nothing inside the process can end that.
pub const DROP_LIMIT: Duration = Duration::from_secs(5);

/// One child: what it is, and what its end means.
#[derive(Clone)]
pub struct ChildSpec {
    /// What logs, metrics and `debug tree` call it.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// When it is restarted.
    pub restart: Restart,
    /// Whether its end for good counts for the supervisor's [`AutoShutdown`].
    pub significant: bool,
    /// How long it may take to end in order before it is killed. A supervisor may take as long as its
    /// children, which have limits of their own.
    pub grace: Option<Duration>,
}

/// What a child is.
#[derive(Clone)]
pub enum Kind {
    /// An actor that does work.
    Worker(StartFn),
    /// A supervisor with children of its own.
    Supervisor(Box<SupervisorSpec>),
}

/// When a child is restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// Always.
    Permanent,
    /// When it ended against its will.
    Transient,
    /// Never, not even with its siblings.
    Temporary,
}

/// Who is restarted with a child that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Nobody else.
    OneForOne,
    /// Those that were started after it.
    RestForOne,
    /// All.
    OneForAll,
}

/// Whether the end of significant children ends the supervisor, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoShutdown {
    /// It does not.
    Never,
    /// The first such end does.
    AnySignificant,
    /// The last such end does.
    AllSignificant,
}

/// A supervisor and its first children, in the order of their start.
#[derive(Clone)]
pub struct SupervisorSpec {
    /// What logs, metrics and `debug tree` call it.
    pub name: &'static str,
    /// Who is restarted with whom.
    pub strategy: Strategy,
    /// How many restarts are allowed before it gives up.
    pub budget: Budget,
    /// The pauses before a child is started again. A child that ran for a whole window of the budget
    /// begins at the floor again.
    pub backoff: Backoff,
    /// Whether it ends with its significant children.
    pub auto_shutdown: AutoShutdown,
    /// Its children.
    pub children: Vec<ChildSpec>,
}

impl ChildSpec {
    /// A permanent worker.
    pub fn worker(name: &'static str, start: StartFn) -> Self {
        Self {
            name,
            kind: Kind::Worker(start),
            restart: Restart::Permanent,
            significant: false,
            grace: Some(GRACE),
        }
    }

    /// A permanent part, reached at `address`; `make` builds its configuration for each incarnation.
    pub fn part<P: Part>(
        address: &Address<P::Message>,
        make: impl Fn() -> P + Send + Sync + 'static,
    ) -> Self {
        Self::worker(address.name(), starter(address.clone(), make))
    }

    /// A permanent supervisor.
    pub fn supervisor(spec: SupervisorSpec) -> Self {
        Self {
            name: spec.name,
            grace: None,
            kind: Kind::Supervisor(Box::new(spec)),
            restart: Restart::Permanent,
            significant: false,
        }
    }

    /// The same child, restarted so.
    pub fn restarted(self, restart: Restart) -> Self {
        Self { restart, ..self }
    }

    /// The same child, significant.
    pub fn significant(self) -> Self {
        Self { significant: true, ..self }
    }

    /// The same child with another grace.
    pub fn grace(self, grace: Duration) -> Self {
        Self { grace: Some(grace), ..self }
    }
}

impl SupervisorSpec {
    /// A one_for_one supervisor without children: `max` restarts within `window`, then it gives up.
    pub fn new(name: &'static str, max: usize, window: Duration) -> Self {
        Self {
            name,
            strategy: Strategy::OneForOne,
            budget: Budget::new(max, window),
            backoff: Backoff::new(Duration::from_millis(20), Duration::from_secs(2), 4.0, 0.5),
            auto_shutdown: AutoShutdown::Never,
            children: Vec::new(),
        }
    }

    /// The same supervisor with one more child.
    pub fn child(mut self, child: ChildSpec) -> Self {
        self.children.push(child);
        self
    }

    /// The same supervisor with another strategy.
    pub fn strategy(self, strategy: Strategy) -> Self {
        Self { strategy, ..self }
    }

    /// The same supervisor with another auto-shutdown.
    pub fn auto_shutdown(self, auto_shutdown: AutoShutdown) -> Self {
        Self { auto_shutdown, ..self }
    }

    /// The same supervisor with other pauses before restarts.
    pub fn backoff(self, backoff: Backoff) -> Self {
        Self { backoff, ..self }
    }
}

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// As it wanted.
    Normal,
    /// Against its will.
    Abnormal {
        /// In which way.
        how: How,
        /// What there is to say about it.
        text: String,
    },
}

/// In which way something ended against its will.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It panicked.
    Panic,
    /// It returned an error, or could not start.
    Error,
    /// It did not answer and was killed.
    Hung,
    /// Somebody killed it.
    Killed,
}

impl Exit {
    /// An end against its will.
    pub fn abnormal(how: How, text: impl Into<String>) -> Self {
        Self::Abnormal { how, text: text.into() }
    }

    /// The reason as metrics name it.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Normal => "exit",
            Self::Abnormal { how: How::Panic, .. } => "panic",
            Self::Abnormal { how: How::Error, .. } => "error",
            Self::Abnormal { how: How::Hung, .. } => "hung",
            Self::Abnormal { how: How::Killed, .. } => "killed",
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Normal => f.write_str("exit"),
            Self::Abnormal { text, .. } if text.is_empty() => f.write_str(self.label()),
            Self::Abnormal { text, .. } => write!(f, "{}: {text}", self.label()),
        }
    }
}

/// Why a supervisor ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// It was asked to.
    #[error("stopped")]
    Stopped,
    /// Its significant children have ended.
    #[error("its significant children have ended")]
    AutoShutdown,
    /// A child needed more restarts than allowed.
    #[error("{supervisor} gave up: {child} needed too many restarts, the last time because of {reason}")]
    BudgetSpent {
        /// The supervisor that gave up.
        supervisor: &'static str,
        /// The child.
        child: &'static str,
        /// Why the child ended the last time.
        reason: String,
    },
    /// One of the first children could not start.
    #[error("{child} could not start: {reason}")]
    StartFailed {
        /// The child.
        child: &'static str,
        /// Why.
        reason: String,
    },
    /// A child that was killed goes on: it blocks its thread, and what it holds cannot be had.
    #[error("{child} cannot be ended: it blocks its thread")]
    Unkillable {
        /// The child.
        child: &'static str,
    },
    /// The supervisor itself was killed or has a defect.
    #[error("the supervisor itself crashed")]
    Crashed,
}

impl End {
    /// Whether nobody needs to do anything about it.
    pub fn is_orderly(&self) -> bool {
        match self {
            Self::Stopped | Self::AutoShutdown => true,
            Self::BudgetSpent { .. } | Self::StartFailed { .. } | Self::Unkillable { .. } | Self::Crashed => {
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_has_a_reason_of_the_closed_set() {
        let labels =
            [How::Panic, How::Error, How::Hung, How::Killed].map(|how| Exit::abnormal(how, "x").label());
        assert_eq!(labels, ["panic", "error", "hung", "killed"]);
        assert_eq!(Exit::Normal.label(), "exit");
        assert_eq!(Exit::abnormal(How::Panic, "oh").to_string(), "panic: oh");
    }
}
