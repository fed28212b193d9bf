//! What can go wrong with the control plane, in words for people, and what follows from it.

use std::{io, time::Duration};

use warren_core::{relay_map::JsonError, roster::UpdateError};

use super::{http::ApiError, refusal::Refusal, rpc::CallError, upgrade::OpenError};

/// Why there is no control connection (any more).
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The user could not be asked for.
    #[error("get user: {0}")]
    User(#[source] ApiError),
    /// The connection information could not be asked for.
    #[error("get connection info: {0}")]
    ConnectionInfo(#[source] ApiError),
    /// The connection information cannot be read.
    #[error("get connection info: the answer is not that of a Coder deployment: {0}; check the URL")]
    Unreadable(#[from] JsonError),
    /// The control connection could not be opened.
    #[error("connect to the control plane: {0}")]
    Open(#[from] OpenError),
    /// A call that must live as long as the connection failed.
    #[error("the control connection failed in {call}: {source}")]
    Call {
        /// The call.
        call: &'static str,
        /// Why.
        source: CallError,
    },
    /// A call that must live as long as the connection was ended by the deployment.
    #[error("the deployment ended {call}{}", because(said.as_deref()))]
    Ended {
        /// The call.
        call: &'static str,
        /// What the deployment said last, if anything.
        said: Option<String>,
    },
    /// The deployment accepted the connection and never said what it owes.
    #[error(
        "the deployment accepted the connection, but sent no {owed} within {} seconds; it may be \
         overloaded or shutting down", limit.as_secs()
    )]
    Silent {
        /// What was owed.
        owed: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// A workspace update makes no sense.
    #[error("the deployment sent an update that cannot be applied: {0}")]
    Update(#[from] UpdateError),
    /// The connection broke.
    #[error("the control connection broke: {0}")]
    Broken(#[from] io::Error),
    /// The deployment hung up.
    #[error("the deployment closed the control connection")]
    HungUp,
    /// After a change of the network or a sleep the connection was found dead.
    #[error("the control connection was dead after a change of the network")]
    DeadOnWake,
    /// What was said to the deployment was not answered, nor was a question whether it is there.
    #[error("the deployment does not answer any more")]
    Unanswered,
    /// The deployment does not read what is sent.
    #[error("the deployment takes nothing any more")]
    Stalled,
}

fn because(said: Option<&str>) -> String {
    said.map_or_else(String::new, |said| format!(": {said}"))
}

impl ControlError {
    /// Whether a first attempt that meets it has failed for good: the HTTP statuses that say so, and
    /// everything that means that this is not a deployment, or not one that can be reached.
    pub(super) fn fails_start(&self) -> bool {
        match self {
            Self::User(_) | Self::ConnectionInfo(_) | Self::Unreadable(_) => true,
            Self::Open(OpenError::Api(error)) => error.refusal().is_none_or(Refusal::fails_start),
            Self::Open(OpenError::Handshake(_)) => true,
            _ => false,
        }
    }

    /// Whether trying again soon is pointless: somebody has to act first.
    pub(super) fn requires_action(&self) -> bool {
        self.api_error().is_some_and(|error| match error {
            ApiError::Refused(refusal) => refusal.requires_action(),
            ApiError::Url(_) | ApiError::Token | ApiError::Version(_) => true,
            _ => false,
        })
    }

    /// Whether the session token is not accepted (any more).
    pub fn requires_sign_in(&self) -> bool {
        self.api_error().is_some_and(ApiError::requires_sign_in)
    }

    /// Whether the deployment asks to be spared for a while.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        let refusal = self.api_error().and_then(ApiError::refusal)?;
        refusal.retry_after.map(|seconds| Duration::from_secs(seconds.into()))
    }

    /// Whether only the resume token was not accepted.
    pub(super) fn drops_resume_token(&self) -> bool {
        let refusal = self.api_error().and_then(ApiError::refusal);
        refusal.is_some_and(Refusal::is_about_resume_token)
    }

    /// Whether the next connection would end in the same way.
    pub(super) fn is_likely_to_repeat(&self) -> bool {
        matches!(
            self,
            Self::Update(_) | Self::Call { source: CallError::Malformed(_) | CallError::Protocol(_), .. }
        )
    }

    /// Whether nothing can be said over the connection any more.
    pub(super) fn is_broken(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::HungUp | Self::DeadOnWake | Self::Unanswered)
    }

    /// The reason as metrics know it, from a closed set.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::User(error) | Self::ConnectionInfo(error) | Self::Open(OpenError::Api(error)) => {
                match error {
                    _ if error.requires_sign_in() => "signed_out",
                    ApiError::Refused(_) | ApiError::Redirect(_) => "refused",
                    ApiError::Deadline { .. } => "silent",
                    _ => "unreachable",
                }
            }
            Self::Unreadable(_) | Self::Open(OpenError::Handshake(_)) => "protocol",
            Self::Call { source: CallError::Connection(_), .. } => "broken",
            Self::Call { .. } | Self::Ended { .. } => "stream_ended",
            Self::Silent { .. } | Self::Unanswered => "silent",
            Self::Update(_) => "bad_update",
            Self::Broken(_) | Self::HungUp | Self::Stalled => "broken",
            Self::DeadOnWake => "wake",
        }
    }

    fn api_error(&self) -> Option<&ApiError> {
        match self {
            Self::User(error) | Self::ConnectionInfo(error) | Self::Open(OpenError::Api(error)) => {
                Some(error)
            }
            _ => None,
        }
    }
}
