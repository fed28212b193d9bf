//! Our own node: what the control plane is told of us, and when (tailnet-control 5, tailnet-data 8.7).
//!
//! Nothing is told without a home. A change of latency alone is no news; it rides along with the next
//! message. Other changes within a second of the last message are gathered into one.

use std::{
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use warren_proto::{
    key::{DiscoPublic, NodePublic},
    tailnet::{CoordinateRequest, Node, coordinate_request::UpdateSelf},
};

use crate::{home::Report, relay_map::RegionId};

/// The pause between two messages on one stream.
const PAUSE: Duration = Duration::from_secs(1);

/// Who we are; constant for the life of one start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnIdentity {
    /// A random label, not negative.
    pub node_id: i64,
    /// Our WireGuard key.
    pub node_key: NodePublic,
    /// Our disco key.
    pub disco_key: DiscoPublic,
    /// Our inner address.
    pub address: Ipv6Addr,
}

/// What is told of us besides our identity; a difference makes a message due.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct News {
    home: Option<RegionId>,
    forced_websocket: BTreeMap<RegionId, String>,
    endpoints: Vec<SocketAddr>,
}

/// Decides when an `UpdateSelf` is due, and encodes it.
#[derive(Debug)]
pub struct OwnNode {
    identity: OwnIdentity,
    news: News,
    latencies: Report,
    stream: Option<Told>,
}

/// What was told on the present stream.
#[derive(Debug, Default)]
struct Told {
    news: Option<News>,
    at: Option<Instant>,
}

impl OwnNode {
    /// A node that has no home yet and no stream to tell it on.
    pub fn new(identity: OwnIdentity) -> Self {
        Self { identity, news: News::default(), latencies: Report::new(), stream: None }
    }

    /// A new stream began: it knows nothing of us.
    pub fn connected(&mut self) {
        self.stream = Some(Told::default());
    }

    /// The stream ended.
    pub fn disconnected(&mut self) {
        self.stream = None;
    }

    /// Takes the home region.
    pub fn set_home(&mut self, home: Option<RegionId>) {
        self.news.home = home;
    }

    /// Takes our latencies; they are told with the next message, and cause none.
    pub fn set_latencies(&mut self, latencies: Report) {
        self.latencies = latencies;
    }

    /// Takes the reasons why relays are reached by WebSocket.
    pub fn set_forced_websocket(&mut self, reasons: BTreeMap<RegionId, String>) {
        self.news.forced_websocket = reasons;
    }

    /// Takes our endpoints, best first; none where direct paths are forbidden.
    pub fn set_endpoints(&mut self, endpoints: Vec<SocketAddr>) {
        self.news.endpoints = endpoints;
    }

    /// When [`Self::poll_update`] is due next, `now` if at once.
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let told = self.stream.as_ref().filter(|told| self.is_news_to(told))?;
        Some(told.at.map_or(now, |at| at + PAUSE))
    }

    /// The message to send now, if one is due; it counts as sent. `wall` is the time it carries.
    pub fn poll_update(&mut self, now: Instant, wall: SystemTime) -> Option<CoordinateRequest> {
        self.poll_timeout(now).filter(|due| *due <= now)?;
        let node = self.encode(wall)?;
        self.stream = Some(Told { news: Some(self.news.clone()), at: Some(now) });
        let update_self = Some(UpdateSelf { node: Some(node) });
        Some(CoordinateRequest { update_self, ..CoordinateRequest::default() })
    }

    fn is_news_to(&self, told: &Told) -> bool {
        self.news.home.is_some() && told.news.as_ref() != Some(&self.news)
    }

    fn encode(&self, wall: SystemTime) -> Option<Node> {
        let addresses = vec![format!("{}/128", self.identity.address)];
        let forced = self.news.forced_websocket.iter();
        Some(Node {
            id: self.identity.node_id,
            as_of: Some(rounded_to_microseconds(wall)),
            key: Bytes::copy_from_slice(&self.identity.node_key.to_binary()),
            disco: self.identity.disco_key.to_string(),
            preferred_derp: i32::from(self.news.home?.0),
            derp_latency: latency_map(&self.latencies),
            derp_forced_websocket: forced.map(|(id, reason)| (i32::from(id.0), reason.clone())).collect(),
            allowed_ips: addresses.clone(),
            addresses,
            endpoints: self.news.endpoints.iter().map(ToString::to_string).collect(),
        })
    }
}

fn latency_map(latencies: &Report) -> BTreeMap<String, f64> {
    let key = |id: &RegionId, family, latency: Option<Duration>| {
        latency.map(|latency| (format!("{id}-{family}"), latency.as_secs_f64()))
    };
    latencies.iter().flat_map(|(id, it)| [key(id, "v4", it.v4), key(id, "v6", it.v6)]).flatten().collect()
}

fn rounded_to_microseconds(wall: SystemTime) -> prost_types::Timestamp {
    let since = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let micros = i32::try_from(since.subsec_micros()).unwrap_or_default();
    prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: micros * 1000,
    }
}

#[cfg(test)]
mod tests;
