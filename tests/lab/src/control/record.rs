//! What arrived at the control plane, in order, and waiting for it.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::watch;
use uuid::Uuid;
use warren_proto::tailnet;

use super::telemetry::Device;

/// Entries of each kind that are kept; beyond it the record stands still.
const MAX_ENTRIES: usize = 100_000;

/// One HTTP request, upgrades included.
#[derive(Clone, Debug)]
pub struct Request {
    /// The method.
    pub method: String,
    /// The path as it came.
    pub path: String,
    /// The query's pairs, decoded, in order.
    pub query: Vec<(String, String)>,
    /// The headers, names in lower case, in order. They may hold the token.
    pub headers: Vec<(String, String)>,
    /// What was answered; `None` while there is no answer or if there never will be.
    pub status: Option<u16>,
}

impl Request {
    /// The values of a header.
    pub fn header<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The first value of a query parameter.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// One control connection.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    /// The peer's ID on it, which is never told to the client.
    pub peer: Uuid,
    /// The name under which the coordinator has the peer.
    pub name: String,
    /// Who connected.
    pub user: Uuid,
    /// The machine that connected, if it says so.
    pub device: Option<Device>,
    /// The paths of the calls that were made, in order.
    pub calls: Vec<String>,
    /// Every coordination request, in order.
    pub requests: Vec<tailnet::CoordinateRequest>,
    /// How the connection ended; `None` while it lives.
    pub ended: Option<Ended>,
}

/// How a control connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The client sent a close frame with this code and reason.
    Closed(u16, String),
    /// The lab closed it.
    ByLab,
    /// The transport ended without a close frame.
    Lost,
}

/// What a deployment tells of its clients' comings and goings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What happened.
    pub what: Reported,
    /// Who it was.
    pub user: Uuid,
    /// The peer's ID, the same for both reports of a connection.
    pub peer: Uuid,
    /// The machine, if it said so.
    pub device: Option<Device>,
}

/// What a [`Report`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// A control connection began.
    Connected,
    /// A control connection ended.
    Disconnected,
}

/// Everything that was recorded.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// HTTP requests in order of arrival.
    pub requests: Vec<Request>,
    /// Control connections in order of their upgrades.
    pub connections: Vec<Connection>,
    /// Telemetry events that were posted.
    pub telemetry: Vec<tailnet::TelemetryEvent>,
    /// The same events as they are handed on: when a batch is full, by a timer, and at the end of the lab.
    pub telemetry_batches: Vec<Vec<tailnet::TelemetryEvent>>,
    /// Connections that began and ended.
    pub reports: Vec<Report>,
}

pub(crate) struct Recorder {
    recording: Mutex<Recording>,
    changed: watch::Sender<()>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { recording: Mutex::default(), changed: watch::Sender::new(()) }
    }
}

impl Recorder {
    pub(crate) fn read<T>(&self, look: impl FnOnce(&Recording) -> T) -> T {
        look(&self.recording.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds a request and returns its place.
    pub(crate) fn request(&self, request: Request) -> usize {
        self.write(|recording| push(&mut recording.requests, request))
    }

    pub(crate) fn answered(&self, place: usize, status: u16) {
        self.write(|recording| {
            if let Some(request) = recording.requests.get_mut(place) {
                request.status = Some(status);
            }
        });
    }

    /// Adds a connection and returns its place.
    pub(crate) fn connection(&self, connection: Connection) -> usize {
        self.write(|recording| {
            push(&mut recording.reports, report(&connection, Reported::Connected));
            push(&mut recording.connections, connection)
        })
    }

    pub(crate) fn call(&self, connection: usize, path: &str) {
        self.on_connection(connection, |connection| push(&mut connection.calls, path.to_owned()));
    }

    pub(crate) fn coordinate(&self, connection: usize, request: tailnet::CoordinateRequest) {
        self.on_connection(connection, |connection| push(&mut connection.requests, request));
    }

    pub(crate) fn ended(&self, connection: usize, ended: Ended) {
        self.write(|recording| {
            let Some(connection) = recording.connections.get_mut(connection) else { return };
            if connection.ended.is_none() {
                connection.ended = Some(ended);
                push(&mut recording.reports, report(connection, Reported::Disconnected));
            }
        });
    }

    pub(crate) fn telemetry(&self, events: Vec<tailnet::TelemetryEvent>) {
        self.write(|recording| {
            events.into_iter().for_each(|event| {
                push(&mut recording.telemetry, event);
            });
        });
    }

    pub(crate) fn telemetry_batch(&self, batch: Vec<tailnet::TelemetryEvent>) {
        self.write(|recording| push(&mut recording.telemetry_batches, batch));
    }

    /// Waits until the recording satisfies `accept`, at most `limit`. Returns what it made of it.
    pub(crate) async fn wait<T>(
        &self,
        limit: Duration,
        mut accept: impl FnMut(&Recording) -> Option<T>,
    ) -> Option<T> {
        let mut changed = self.changed.subscribe();
        let waiting = async {
            loop {
                changed.borrow_and_update();
                if let Some(found) = self.read(&mut accept) {
                    return Some(found);
                }
                changed.changed().await.ok()?;
            }
        };
        tokio::time::timeout(limit, waiting).await.ok().flatten()
    }

    fn on_connection(&self, place: usize, change: impl FnOnce(&mut Connection) -> usize) {
        self.write(|recording| {
            if let Some(connection) = recording.connections.get_mut(place) {
                change(connection);
            }
        });
    }

    fn write<T>(&self, change: impl FnOnce(&mut Recording) -> T) -> T {
        let outcome = change(&mut self.recording.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_replace(());
        outcome
    }
}

fn report(connection: &Connection, what: Reported) -> Report {
    Report { what, user: connection.user, peer: connection.peer, device: connection.device.clone() }
}

fn push<T>(entries: &mut Vec<T>, entry: T) -> usize {
    if entries.len() < MAX_ENTRIES {
        entries.push(entry);
    }
    // A place beyond the end is nobody's.
    if entries.len() < MAX_ENTRIES { entries.len() - 1 } else { usize::MAX }
}
