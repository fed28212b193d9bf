//! The lab's tasks: all end with it.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Runs tasks that end when the lab does.
#[derive(Clone, Default)]
pub(crate) struct Work {
    tracker: TaskTracker,
    token: CancellationToken,
}

impl Work {
    /// Runs `task` until it is done or the lab ends.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let token = self.token.clone();
        self.tracker.spawn(async move {
            let _ = token.run_until_cancelled(task).await;
        });
    }

    /// Tasks that end with these, or alone.
    pub(crate) fn child(&self) -> Self {
        Self { tracker: self.tracker.clone(), token: self.token.child_token() }
    }

    /// Cancels these tasks.
    pub(crate) fn cancel(&self) {
        self.token.cancel();
    }

    /// Ends when these tasks are cancelled.
    pub(crate) async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// How many tasks run, those of all children included.
    pub(crate) fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Cancels all tasks and waits for their end.
    pub(crate) async fn stop(&self) {
        self.token.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}
