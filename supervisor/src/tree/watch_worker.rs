//! The look at a running worker from outside: whether it still answers. A worker that handles messages is
//! busy, not hung, however long its mailbox.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::oneshot,
    time::{MissedTickBehavior, interval, timeout},
};
use warren_actors::runtime::Hooks;

/// How often a worker is asked.
pub(super) const PERIOD: Duration = Duration::from_secs(5);
/// How long it may take to answer.
pub(super) const DEADLINE: Duration = Duration::from_secs(2);
/// How many misses in a row make it hung.
const MISSES: u32 = 2;

/// Ends when the worker is hung. Never ends with a worker that lives, or that dies by itself.
pub(super) async fn hung(hooks: Arc<dyn Hooks>) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let (mut asked, mut misses) = (None, 0);
    while misses < MISSES {
        ticks.tick().await;
        let handled = hooks.handled();
        // A question that waits in the mailbox is not asked again: a hung worker's mailbox must not grow.
        let question = asked.take().unwrap_or_else(|| hooks.probe());
        match answer(question).await {
            Answer::Alive => misses = 0,
            Answer::Gone => return std::future::pending().await,
            Answer::None(question) => {
                misses = if hooks.handled() == handled { misses + 1 } else { 0 };
                asked = Some(question);
            }
        }
    }
}

enum Answer {
    Alive,
    Gone,
    None(oneshot::Receiver<()>),
}

async fn answer(mut question: oneshot::Receiver<()>) -> Answer {
    match timeout(DEADLINE, &mut question).await {
        Ok(Ok(())) => Answer::Alive,
        Ok(Err(_)) => Answer::Gone,
        Err(_) => Answer::None(question),
    }
}
