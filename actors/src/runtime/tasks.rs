//! The work of one actor or process. Tasks end with their owner: dropping the owner cancels them at
//! their next await; an orderly stop gives them a grace first. A task that panics raises the alarm, so
//! that an owner never goes on without a task it relies on.

use std::{
    any::Any,
    future::Future,
    panic::{AssertUnwindSafe, resume_unwind},
    sync::Arc,
    time::Duration,
};

use futures::FutureExt;
use tokio::task::JoinHandle;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

/// Who hears that a task panicked, and why.
type Alarm = Arc<dyn Fn(String) + Send + Sync>;

/// The work of one owner. Dropped with it; every task is then cancelled at its next await.
pub struct Tasks {
    tracker: TaskTracker,
    token: CancellationToken,
    alarm: Option<Alarm>,
    _guard: DropGuard,
}

impl Default for Tasks {
    fn default() -> Self {
        let token = CancellationToken::new();
        Self { tracker: TaskTracker::new(), alarm: None, _guard: token.clone().drop_guard(), token }
    }
}

impl Tasks {
    /// Tasks whose panics are reported to `alarm`.
    pub fn with_alarm(alarm: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self { alarm: Some(Arc::new(alarm)), ..Self::default() }
    }

    /// Runs `work` until it is done or the owner ends.
    pub fn spawn<F>(&self, work: F) -> JoinHandle<Option<F::Output>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let alarm = self.alarm.clone();
        self.tracker.spawn(self.token.clone().run_until_cancelled_owned(async move {
            AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
                if let Some(alarm) = alarm {
                    alarm(panic_text(&*panic));
                }
                resume_unwind(panic)
            })
        }))
    }

    /// Tells work that wants to end in order that it is time.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// How many tasks run.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Whether no task runs.
    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Cancels all work and waits until it has ended, at most `grace`. Returns whether it has.
    pub async fn stop(&self, grace: Duration) -> bool {
        self.token.cancel();
        tokio::time::timeout(grace, self.ended()).await.is_ok()
    }

    /// Ends when the owner has and no task is left.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let (tracker, token) = (self.tracker.clone(), self.token.clone());
        async move {
            token.cancelled().await;
            tracker.close();
            tracker.wait().await;
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a text").to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    };

    use super::*;

    /// Notes that it was dropped.
    struct Marked(Arc<AtomicBool>);

    impl Drop for Marked {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn tasks_end_with_their_owner_and_what_they_hold_is_dropped_by_then() {
        let tasks = Tasks::default();
        let dropped = Arc::new(AtomicBool::new(false));
        let held = Marked(Arc::clone(&dropped));
        tasks.spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        let ended = tasks.ended();
        drop(tasks);
        ended.await;
        assert!(dropped.load(Ordering::SeqCst));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_says_whether_all_work_ended_within_the_grace() {
        let tasks = Tasks::default();
        tasks.spawn(std::future::pending::<()>());
        assert!(tasks.stop(Duration::from_secs(1)).await);
        assert!(tasks.is_empty());
    }

    #[tokio::test]
    async fn work_that_is_done_hands_over_its_result_and_cancelled_work_does_not() {
        let tasks = Tasks::default();
        assert_eq!(tasks.spawn(async { 7 }).await.unwrap(), Some(7));
        let endless = tasks.spawn(std::future::pending::<()>());
        drop(tasks);
        assert_eq!(endless.await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_panic_in_a_task_raises_the_alarm() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ear = Arc::clone(&heard);
        let tasks = Tasks::with_alarm(move |text| ear.lock().unwrap().push(text));
        let task = tasks.spawn(async {
            tokio::task::yield_now().await;
            panic!("on purpose");
        });
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!(*heard.lock().unwrap(), ["on purpose"]);
    }
}
