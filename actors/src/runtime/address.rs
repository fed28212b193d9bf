//! How a part is reached. An [`Address`] outlives the actor behind it: the supervisor binds each
//! successor to the same address, so that nobody holds a stale reference. ractor's mailboxes are
//! unbounded; credits bound them here, and the credits in use are the depth that metrics show.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use ractor::ActorRef;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::{
    Reply,
    part::{Envelope, Fare},
};

/// How a part is reached, whichever incarnation of it runs at the moment.
pub struct Address<M: Send + 'static> {
    shared: Arc<Shared<M>>,
}

struct Shared<M: Send + 'static> {
    name: &'static str,
    capacity: usize,
    credits: Arc<Semaphore>,
    actor: ArcSwapOption<ActorRef<Envelope<M>>>,
}

/// Nobody is at the address at the moment: the part is down or being restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not running")]
pub struct SendError(pub &'static str);

/// Why a message was not taken at once; it comes back to the sender.
#[derive(Debug, thiserror::Error)]
pub enum TrySendError<M> {
    /// All credits are in use.
    #[error("the mailbox is full")]
    Full(M),
    /// The part is down or being restarted.
    #[error("the part is not running")]
    Down(M),
}

/// Why a question got no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The part is down, or died before it answered.
    #[error("{0} is not running")]
    Down(&'static str),
    /// The deadline passed.
    #[error("{0} did not answer in time")]
    Deadline(&'static str),
}

impl<M: Send + 'static> Clone for Address<M> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<M: Send + 'static> Address<M> {
    /// An address nobody is at yet. At most `capacity` messages wait at it at any time.
    pub fn new(name: &'static str, capacity: usize) -> Self {
        let credits = Arc::new(Semaphore::new(capacity));
        let shared = Shared { name, capacity, credits, actor: ArcSwapOption::empty() };
        Self { shared: Arc::new(shared) }
    }

    /// The part's name, as metrics and `debug tree` show it.
    pub fn name(&self) -> &'static str {
        self.shared.name
    }

    /// How many messages wait or are being handled.
    pub fn depth(&self) -> usize {
        self.shared.capacity - self.shared.credits.available_permits()
    }

    /// Delivers `message`, waiting for a credit.
    pub async fn send(&self, message: M) -> Result<(), SendError> {
        let down = SendError(self.shared.name);
        let credit = Arc::clone(&self.shared.credits).acquire_owned().await.map_err(|_| down)?;
        self.deliver(message, credit, None).map_err(|_| down)
    }

    /// Delivers `message`, waiting for a credit, and waits until it is handled or lost.
    pub(super) async fn hand_over(&self, message: M) -> Result<(), SendError> {
        let down = SendError(self.shared.name);
        let credit = Arc::clone(&self.shared.credits).acquire_owned().await.map_err(|_| down)?;
        let (handled, is_handled) = oneshot::channel();
        self.deliver(message, credit, Some(handled)).map_err(|_| down)?;
        // It is never sent: that it is dropped tells as much.
        let _ = is_handled.await;
        Ok(())
    }

    /// Delivers `message` at once or gives it back.
    pub fn try_send(&self, message: M) -> Result<(), TrySendError<M>> {
        match Arc::clone(&self.shared.credits).try_acquire_owned() {
            Ok(credit) => self.deliver(message, credit, None).map_err(TrySendError::Down),
            Err(_) => Err(TrySendError::Full(message)),
        }
    }

    /// Asks a question and waits for the answer, at most until `deadline`, mailbox included.
    pub async fn ask<R: Send + 'static>(
        &self,
        deadline: Duration,
        question: impl FnOnce(Reply<R>) -> M,
    ) -> Result<R, AskError> {
        let name = self.shared.name;
        let (reply, answer) = oneshot::channel();
        let conversation = async {
            self.send(question(reply)).await.map_err(|_| AskError::Down(name))?;
            answer.await.map_err(|_| AskError::Down(name))
        };
        tokio::time::timeout(deadline, conversation).await.unwrap_or(Err(AskError::Deadline(name)))
    }

    pub(super) fn bind(&self, actor: ActorRef<Envelope<M>>) {
        self.shared.actor.store(Some(Arc::new(actor)));
    }

    fn deliver(
        &self,
        message: M,
        credit: OwnedSemaphorePermit,
        handled: Option<oneshot::Sender<()>>,
    ) -> Result<(), M> {
        let actor = self.shared.actor.load();
        let Some(actor) = actor.as_ref() else { return Err(message) };
        let fare = Fare { _credit: credit, _handled: handled };
        match actor.cast(Envelope::Message(message, fare)) {
            Ok(()) => Ok(()),
            Err(ractor::MessagingErr::SendErr(Envelope::Message(message, _))) => Err(message),
            Err(_) => unreachable_delivery(),
        }
    }
}

#[expect(
    clippy::panic,
    reason = "ractor hands back exactly what it was given; anything else is a broken invariant"
)]
fn unreachable_delivery<M>() -> Result<(), M> {
    panic!("ractor returned another message than the one it was given")
}
