//! What changes something: for the tunnel's owner, root, and the service's own user.

use std::{sync::Arc, time::Duration};

use axum::{Extension, extract::State};
use http::StatusCode;

use super::{Shared, answer::Refusal};
use crate::{
    access::{Caller, may_control},
    intent, tunnels,
};

/// For the tunnel to end: what the whole ladder takes at worst.
const STOP_LIMIT: Duration = Duration::from_secs(25);
/// For the disk.
const STORE_LIMIT: Duration = Duration::from_secs(5);

/// Ends the tunnel, and forgets the token that it was started with.
pub(super) async fn forget(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
) -> Result<StatusCode, Refusal> {
    may_control(&caller, &shared.service).map_err(Refusal::forbidden)?;
    // A task of its own: a client that does not wait for the end must not keep the token on the disk.
    let work = tokio::spawn(async move { end_and_forget(&shared, caller).await });
    work.await.map_err(|_| Refusal::failed("a fault in the service; try again"))?
}

async fn end_and_forget(shared: &Shared, caller: Caller) -> Result<StatusCode, Refusal> {
    let service = &shared.service;
    let stopped = service.tunnels.ask(STOP_LIMIT, |reply| tunnels::Message::Stop { caller, reply }).await;
    // Whether or not it ends: what is not wanted is not to be known any more.
    let forgotten = service.intent.ask(STORE_LIMIT, |reply| intent::Message::Forget { reply }).await;
    let forgotten = forgotten.map_err(|error| Refusal::failed(error.to_string()))?;
    forgotten.map_err(|error| Refusal::failed(error.to_string()))?;
    let stopped = stopped.map_err(|error| Refusal::failed(error.to_string()))?;
    if !stopped.success {
        return Err(Refusal::failed(stopped.error_message));
    }
    service.log.clear();
    Ok(StatusCode::NO_CONTENT)
}

/// Which fault, and where.
#[cfg(feature = "faults")]
#[derive(serde::Deserialize)]
pub(super) struct Fault {
    process: String,
    actor: String,
    kind: String,
}

/// Forces a fault into a part of either process.
#[cfg(feature = "faults")]
pub(super) async fn fault(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    axum::Json(fault): axum::Json<Fault>,
) -> Result<StatusCode, Refusal> {
    let service = &shared.service;
    if !service.options.allow_faults {
        return Err(Refusal::not_found("faults are not allowed here"));
    }
    may_control(&caller, service).map_err(Refusal::forbidden)?;
    let kind = fault.kind.parse().map_err(Refusal::bad_request)?;
    match fault.process.as_str() {
        "tunnel" => {
            let link = service.link.get().as_ref().clone();
            let link = link.ok_or_else(|| Refusal::unavailable("there is no tunnel"))?;
            let told = link.fault(&fault.actor, &fault.kind, super::TUNNEL_LIMIT).await;
            told.map_err(|error| Refusal::failed(error.to_string()))?;
        }
        "service" => {
            let tree = shared.surface.tree.get().ok_or_else(|| Refusal::unavailable("it only begins"))?;
            if !tree.inject(&fault.actor, kind) {
                return Err(Refusal::not_found(format!("there is no part {:?}", fault.actor)));
            }
        }
        other => return Err(Refusal::bad_request(format!("there is no process {other:?}"))),
    }
    Ok(StatusCode::ACCEPTED)
}
