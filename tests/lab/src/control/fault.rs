//! Faults that a test can ask for. Each says how often it strikes; all are off at first.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http::StatusCode;

use super::raw::{Layer, Raw};

/// What the listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Endpoint {
    /// `/api/v2/users/me`
    UsersMe,
    /// `/api/v2/workspaceagents/connection`
    Connection,
    /// `/api/v2/tailnet`
    Tailnet,
    /// `/api/v2/buildinfo`
    BuildInfo,
    /// `/derp`
    Derp,
    /// `/derp/latency-check`
    LatencyCheck,
    /// Everything else.
    Other,
}

/// How an endpoint fails.
#[derive(Clone, Debug)]
pub enum HttpFault {
    /// An error as the deployment writes them, with this message.
    Status(StatusCode, String),
    /// Any answer: status, content type, body.
    Answer(StatusCode, String, String),
    /// A redirect to somewhere.
    Redirect(String),
    /// The right answer, late.
    Slow(Duration),
    /// No answer, ever.
    Silent,
    /// The connection is closed instead of an answer.
    Hangup,
}

/// A check of the tailnet endpoint, in the order in which they are made (tailnet-control 1.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// 429
    RateLimit,
    /// 401: signed out.
    SignedIn,
    /// 401: the user is suspended.
    Active,
    /// 409: browsers only.
    Browser,
    /// 400: the version, whatever it is.
    Version,
    /// 401: the resume token, if there is one.
    ResumeToken,
    /// 500
    Authorization,
    /// 426: the websocket handshake.
    Handshake,
}

/// A call on a control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// `Coordinate`
    Coordinate,
    /// `StreamDERPMaps`
    StreamDerpMaps,
    /// `WorkspaceUpdates`
    WorkspaceUpdates,
    /// `RefreshResumeToken`
    RefreshResumeToken,
    /// `PostTelemetry`
    PostTelemetry,
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 5] = [
        Self::Coordinate,
        Self::StreamDerpMaps,
        Self::WorkspaceUpdates,
        Self::RefreshResumeToken,
        Self::PostTelemetry,
    ];

    /// The path that an Invoke names.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Coordinate => "/coder.tailnet.v2.Tailnet/Coordinate",
            Self::StreamDerpMaps => "/coder.tailnet.v2.Tailnet/StreamDERPMaps",
            Self::WorkspaceUpdates => "/coder.tailnet.v2.Tailnet/WorkspaceUpdates",
            Self::RefreshResumeToken => "/coder.tailnet.v2.Tailnet/RefreshResumeToken",
            Self::PostTelemetry => "/coder.tailnet.v2.Tailnet/PostTelemetry",
        }
    }

    pub(crate) fn from_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.path() == path)
    }
}

/// How a call fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallFault {
    /// As on a server that does not know the method.
    Unknown,
    /// As on a server whose stub answers: code 12.
    Unimplemented,
    /// An error with this code and text.
    Error(u64, String),
    /// Closed at once, without a message.
    Close,
    /// Accepted, and never answered.
    Silent,
    /// These bytes on the call's stream instead of an answer.
    Raw(Raw),
}

/// How often a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// Until it is healed.
    Always,
    /// So often, then no more.
    Next(u32),
}

#[derive(Default)]
pub(crate) struct Faults {
    http: Armed<Endpoint, HttpFault>,
    checks: Armed<Check, ()>,
    calls: Armed<Method, CallFault>,
    layers: Armed<Layer, Raw>,
}

impl Faults {
    pub(crate) fn http(&self) -> &Armed<Endpoint, HttpFault> {
        &self.http
    }

    pub(crate) fn checks(&self) -> &Armed<Check, ()> {
        &self.checks
    }

    pub(crate) fn calls(&self) -> &Armed<Method, CallFault> {
        &self.calls
    }

    pub(crate) fn layers(&self) -> &Armed<Layer, Raw> {
        &self.layers
    }

    pub(crate) fn heal(&self) {
        self.http.clear();
        self.checks.clear();
        self.calls.clear();
        self.layers.clear();
    }
}

/// Faults by what they strike.
pub(crate) struct Armed<K, F>(Mutex<BTreeMap<K, (F, Times)>>);

impl<K, F> Default for Armed<K, F> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Ord, F: Clone> Armed<K, F> {
    pub(crate) fn arm(&self, key: K, fault: F, times: Times) {
        self.lock().insert(key, (fault, times));
    }

    pub(crate) fn disarm(&self, key: &K) {
        self.lock().remove(key);
    }

    /// The fault that strikes now, if one does.
    pub(crate) fn strike(&self, key: &K) -> Option<F> {
        let mut armed = self.lock();
        let (fault, times) = armed.get_mut(key)?;
        let fault = fault.clone();
        match times {
            Times::Always => return Some(fault),
            Times::Next(0) => {
                armed.remove(key);
                return None;
            }
            Times::Next(left) => *left -= 1,
        }
        Some(fault)
    }

    fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<K, (F, Times)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_as_often_as_it_was_told() {
        let armed = Armed::default();
        armed.arm(1, "twice", Times::Next(2));
        armed.arm(2, "always", Times::Always);
        let struck: Vec<_> = (0..4).map(|_| (armed.strike(&1), armed.strike(&2))).collect();
        assert_eq!(struck.iter().filter(|(first, _)| first.is_some()).count(), 2);
        assert!(struck.iter().all(|(_, second)| *second == Some("always")));
        armed.disarm(&2);
        assert_eq!(armed.strike(&2), None);
    }
}
