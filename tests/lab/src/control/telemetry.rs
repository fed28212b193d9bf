//! What clients say of themselves: the header that names their machine, and the events that they post
//! (tailnet-control 1.3 and 9.2).

use serde::Deserialize;
use warren_proto::tailnet::TelemetryEvent;

/// The header's name.
pub(crate) const HEADER: &str = "coder-desktop-telemetry";

/// The machine of a client, as its header tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Its ID.
    #[serde(rename = "device_id")]
    pub id: String,
    /// Its operating system.
    #[serde(rename = "device_os")]
    pub os: String,
    /// The version of the program that connects.
    #[serde(rename = "coder_desktop_version")]
    pub version: String,
}

impl Device {
    /// What a header says; nothing if it is empty or malformed, which is never an error.
    pub(crate) fn parse(header: &str) -> Option<Self> {
        serde_json::from_str(header).ok().filter(|device| device != &Self::default())
    }
}

/// Events that wait until enough of them are there, or somebody asks.
pub(crate) struct Batcher {
    most: usize,
    waiting: Vec<TelemetryEvent>,
}

impl Batcher {
    /// Batches hold at most `most` events, and at least one.
    pub(crate) fn new(most: usize) -> Self {
        Self { most: most.max(1), waiting: Vec::new() }
    }

    /// Takes events. Returns the batches that they fill.
    pub(crate) fn post(&mut self, events: Vec<TelemetryEvent>) -> Vec<Vec<TelemetryEvent>> {
        self.waiting.extend(events);
        let mut full = Vec::new();
        while self.waiting.len() >= self.most {
            let rest = self.waiting.split_off(self.most);
            full.push(std::mem::replace(&mut self.waiting, rest));
        }
        full
    }

    /// Whatever waits.
    pub(crate) fn flush(&mut self) -> Option<Vec<TelemetryEvent>> {
        Some(std::mem::take(&mut self.waiting)).filter(|batch| !batch.is_empty())
    }
}
