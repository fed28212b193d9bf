//! What the tunnels part asks of intent and host. Either may just be being restarted: it is asked again.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use warren_actors::runtime::{Address, AskError, Reply};

use crate::{
    facts::Service,
    host,
    intent::{self, Order},
};

/// How long one question may take: a write to the disk, or an interface that is made or removed.
const LIMIT: Duration = Duration::from_secs(5);
/// Attempts while nobody is there.
const TRIES: u32 = 5;
/// Pause between them: a part is back within milliseconds.
const PAUSE: Duration = Duration::from_millis(100);

/// This tunnel is wanted, also by the next service.
pub(super) async fn remember(service: &Service, order: &Arc<Order>) {
    if service.desired.get().wanted() != Some(order) {
        let order = Arc::clone(order);
        note(service, |reply| intent::Message::Up { order: Arc::clone(&order), reply }).await;
    }
}

/// No tunnel is wanted, nor by the next service.
pub(super) async fn forget(service: &Service) {
    if service.desired.get().up {
        note(service, |reply| intent::Message::Down { reply }).await;
    }
}

/// What could not be written is said by the intent itself.
async fn note<Q>(service: &Service, question: Q)
where
    Q: Fn(Reply<Result<(), intent::IntentError>>) -> intent::Message,
{
    if let Err(error) = insist(&service.intent, question).await {
        tracing::warn!(%error, "what is wanted could not be noted; the next service will not know of it");
    }
}

/// The device, made if there is none, or why there is none, in words for a person.
pub(super) async fn device(service: &Service) -> Result<Arc<OwnedFd>, String> {
    let device = insist(&service.host_part, |reply| host::Message::Device { reply }).await;
    device.unwrap_or_else(|error| Err(format!("there is no device: {error}")))
}

/// The device goes.
pub(super) async fn release(service: &Service) {
    if let Err(error) = insist(&service.host_part, |reply| host::Message::Release { reply }).await {
        tracing::warn!(%error, "the device could not be removed");
    }
}

async fn insist<M: Send + 'static, R: Send + 'static>(
    address: &Address<M>,
    question: impl Fn(Reply<R>) -> M,
) -> Result<R, AskError> {
    let mut answer = address.ask(LIMIT, &question).await;
    for _ in 1..TRIES {
        if !matches!(answer, Err(AskError::Down(_))) {
            break;
        }
        tokio::time::sleep(PAUSE).await;
        answer = address.ask(LIMIT, &question).await;
    }
    answer
}
