//! Wakes a part when something is due.

use std::time::Instant;

use tokio::task::JoinHandle;

use super::Context;

/// One alarm of a part; another setting replaces the one before, and the part's end ends it.
#[derive(Default)]
pub struct Alarm(Option<(Instant, JoinHandle<Option<()>>)>);

impl Alarm {
    /// Has `message` sent at `due`, or nothing if nothing is due.
    pub fn set<M: Send + 'static>(&mut self, context: &Context<M>, due: Option<Instant>, message: M) {
        if let (Some((at, task)), Some(due)) = (&self.0, due)
            && *at == due
            && !task.is_finished()
        {
            return;
        }
        let task = due.map(|due| {
            let me = context.me.clone();
            let ringing = async move {
                tokio::time::sleep_until(due.into()).await;
                // A part that is down sets another one when it is back.
                let _ = me.send(message).await;
            };
            (due, context.tasks.spawn(ringing))
        });
        if let Some((_, old)) = std::mem::replace(&mut self.0, task) {
            old.abort();
        }
    }
}
