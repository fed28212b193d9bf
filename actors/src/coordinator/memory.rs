//! What the coordinator must not forget when it crashes: who we are to the deployment, and the peer table.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use secrecy::SecretString;
use uuid::Uuid;
use warren_core::coordination::Coordination;
use warren_proto::tailnet::RefreshResumeTokenResponse;

/// Lives as long as one Boot; the coordinator's alone.
#[derive(Default)]
pub struct ControlMemory(Mutex<Memory>);

impl std::fmt::Debug for ControlMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlMemory").finish_non_exhaustive()
    }
}

/// What is remembered.
#[derive(Default)]
pub(super) struct Memory {
    /// Counts attempts to keep a connection, of all incarnations: reports of any but the latest are void.
    pub(super) attempts: u64,
    /// What the deployment said about the user; asked once.
    pub(super) owner: Option<Uuid>,
    /// Whether a control connection was ever accepted: from then on no failure is final.
    pub(super) was_accepted: bool,
    /// The resume token, unless it was rejected since.
    pub(super) resume: Option<ResumeToken>,
    /// Peers and wanted destinations.
    pub(super) coordination: Coordination,
}

impl ControlMemory {
    /// Never held across an await. A panic in between leaves nothing half-done that the next snapshot does
    /// not repair.
    pub(super) fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the token that an attempt was given, unless the attempt was superseded: its token is that of
    /// another peer than the one that speaks now.
    pub(super) fn keep_resume_token(&self, attempt: u64, token: Option<ResumeToken>) {
        let mut memory = self.lock();
        if memory.attempts == attempt {
            memory.resume = token;
        }
    }
}

/// Lets us be the same peer after a reconnect; as secret as the session token.
pub(super) struct ResumeToken {
    pub(super) token: SecretString,
    expires_at: Option<SystemTime>,
}

/// Where the deployment does not say when to refresh.
const REFRESH_FALLBACK: Duration = Duration::from_secs(30 * 60);
/// A deployment that asks for more is refused.
const REFRESH_FLOOR: Duration = Duration::from_secs(10);

impl ResumeToken {
    /// The token and when to ask for the next one; `None` for an empty token.
    pub(super) fn of(response: RefreshResumeTokenResponse) -> (Option<Self>, Duration) {
        let refresh_in = response.refresh_in.and_then(|it| Duration::try_from(it).ok());
        let refresh_in = refresh_in.filter(|it| !it.is_zero()).unwrap_or(REFRESH_FALLBACK).max(REFRESH_FLOOR);
        let expires_at = response.expires_at.and_then(|it| SystemTime::try_from(it).ok());
        let token = (!response.token.is_empty()).then(|| Self { token: response.token.into(), expires_at });
        (token, refresh_in)
    }

    pub(super) fn is_usable(&self, now: SystemTime) -> bool {
        self.expires_at.is_none_or(|expires_at| now < expires_at)
    }
}
