//! The facts that parts share: what each cell of a running tunnel holds, and who writes it.
//!
//! | Cell | Writer |
//! |---|---|
//! | [`Net::link`], [`Net::network_map`], [`Net::relay_map`], [`Net::upgrades`], [`Net::direct`], [`Net::workspaces`] | coordinator |
//! | [`Net::peers`], [`Net::interface`], [`Net::paths`] | registry |
//! | [`Net::relays`], [`Net::forced_websocket`], [`Net::home`], [`Net::latencies`], [`Net::netcheck`] | relay |
//! | [`Net::network`], [`Net::families`], [`Net::endpoints`] | packet I/O |
//! | [`Net::host`] | session (the manager owns the network) or host (the tunnel owns it) |

use std::{
    collections::{BTreeMap, VecDeque},
    net::{Ipv6Addr, SocketAddr},
    os::fd::RawFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use secrecy::{ExposeSecret, SecretString};
use url::Url;
use uuid::Uuid;
use warren_core::{
    coordination::NetworkMap,
    home::RegionLatency,
    netcheck::{Families, Mappings, Report},
    network::Network,
    path::Direct,
    path_news::PathEvent,
    relay_map::{RegionId, RelayMap},
    roster::{Snapshot, Workspaces},
};
use warren_observability::redact::LEAST_SECRET;
use warren_proto::{
    address::coder_address,
    key::{DiscoPrivate, NodePrivate, random},
};

use crate::{
    coordinator,
    data_plane::DataPlane,
    packet_io, pinger,
    recovery::Recovery,
    registry,
    relay::{self, upgrade::Upgrades},
    runtime::{Address, Cell},
    udp::LocalPorts,
};

/// What Start asked for. The session writes it, the root reconciles the `net` tree with it.
#[derive(Debug)]
pub struct Boot {
    /// Counts the Starts of this process; a later one replaces everything of an earlier one.
    pub generation: u64,
    /// The deployment's access URL.
    pub url: Url,
    /// The user's session token.
    pub token: SecretString,
    /// Extra HTTP headers for the deployment, in order, names as given.
    pub headers: Vec<(String, SecretString)>,
    /// The value of the `Coder-Desktop-Telemetry` header, if any field of it was given.
    pub telemetry: Option<String>,
    /// Who owns the network.
    pub network: NetworkOwner,
}

impl Boot {
    /// What nobody may be shown: the token, and the values of headers.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = &SecretString> {
        let values = self.headers.iter().map(|(_, value)| value);
        let is_secret = |value: &&SecretString| value.expose_secret().len() >= LEAST_SECRET;
        values.filter(is_secret).chain([&self.token])
    }
}

/// Who owns TUN, addresses and routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkOwner {
    /// The manager: it handed over this descriptor and is asked by `NetworkSettingsRequest`.
    Manager(RawFd),
    /// The tunnel itself (needs `CAP_NET_ADMIN`).
    Tunnel,
    /// Nobody: no device, only pings (`--no-device`).
    Nobody,
}

/// Who we are for the life of one Boot.
#[derive(Debug, Clone)]
pub struct Identity {
    /// WireGuard key, and name at relays.
    pub node: NodePrivate,
    /// Path discovery key.
    pub disco: DiscoPrivate,
    /// Our own inner address, a random /128 of the Coder prefix.
    pub address: Ipv6Addr,
    /// A random label for node messages, 63 bits.
    pub node_id: i64,
}

impl Identity {
    /// A stranger to everybody.
    pub fn generate() -> Self {
        Self {
            node: NodePrivate::generate(),
            disco: DiscoPrivate::generate(),
            address: coder_address(&Uuid::from_bytes(random())),
            // The sign bit stays clear.
            node_id: i64::from_be_bytes(random()) & i64::MAX,
        }
    }
}

/// How the connection to the control plane stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkState {
    /// The first attempt has no verdict yet.
    Connecting,
    /// The control connection is up and has proved useful.
    Up {
        /// Since when.
        since: SystemTime,
    },
    /// It is down and is tried again by itself.
    Waiting {
        /// What is wrong and what to do, in words for a person.
        error: String,
        /// The pause before the next attempt.
        retry_in: Duration,
    },
    /// It was refused for good: trying again does not help until a person has acted.
    Refused {
        /// What is wrong and what to do, in words for a person.
        error: String,
    },
}

/// What the host's interface should look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceConfig {
    /// Our address, a /128.
    pub address: Ipv6Addr,
    /// The prefixes to route to the device: address and length.
    pub routes: Vec<(Ipv6Addr, u8)>,
    /// The device's MTU in bytes.
    pub mtu: u32,
}

/// What became of the last [`InterfaceConfig`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostState {
    /// The configuration that was last acknowledged.
    pub applied: Option<InterfaceConfig>,
    /// Why the last attempt failed, if it did.
    pub error: Option<String>,
}

/// How one relay link stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayLink {
    /// Being dialled.
    Dialing,
    /// Logged in.
    Up {
        /// Since when.
        since: SystemTime,
    },
    /// Down; tried again after a pause if it is still wanted.
    Down {
        /// What is wrong, in words for a person.
        error: String,
    },
}

/// Messages that wait at parts which hear mostly from their own tasks.
const MAILBOX: usize = 64;
/// Links change state in bursts, all regions at once.
const RELAY_MAILBOX: usize = 256;
/// Every agent may answer at the same moment, and each answer that does not fit is a ping that failed.
const AGENTS_MAILBOX: usize = 8192;
/// Bytes that the mailboxes of answers can hold at worst.
const AGENTS_BYTES: usize =
    AGENTS_MAILBOX * (size_of::<pinger::Message>() + size_of::<registry::Message>() + 256);
const _: () = assert!(AGENTS_BYTES <= 8 << 20, "answers that wait must not exhaust a small machine");

/// How the parts of one net are reached, before and while they run.
#[derive(Clone)]
pub struct Addresses {
    /// The coordinator.
    pub coordinator: Address<coordinator::Message>,
    /// The registry.
    pub registry: Address<registry::Message>,
    /// Packet I/O.
    pub packet_io: Address<packet_io::Message>,
    /// The relay.
    pub relay: Address<relay::Message>,
    /// The pinger.
    pub pinger: Address<pinger::Message>,
}

impl Default for Addresses {
    fn default() -> Self {
        Self {
            coordinator: Address::new("coordinator", MAILBOX),
            registry: Address::new("registry", AGENTS_MAILBOX),
            packet_io: Address::new("packet_io", MAILBOX),
            relay: Address::new("relay", RELAY_MAILBOX),
            pinger: Address::new("pinger", AGENTS_MAILBOX),
        }
    }
}

/// Everything that lives as long as one Boot: cells, addresses and the data plane. Made by the
/// composition, lent to the parts; outlives every one of them.
pub struct Net {
    /// What Start asked for.
    pub boot: Arc<Boot>,
    /// Who we are.
    pub identity: Identity,
    /// TUN, relay links, sessions and their tasks.
    pub data_plane: DataPlane,
    /// How the control connection stands.
    pub link: Cell<LinkState>,
    /// The peers to program.
    pub network_map: Cell<NetworkMap>,
    /// Where relays are, embedded ones rewritten.
    pub relay_map: Cell<RelayMap>,
    /// Which upgrades relays are asked for; set before the first relay map.
    pub upgrades: Cell<Upgrades>,
    /// Whether the deployment allows direct paths.
    pub direct: Cell<Direct>,
    /// The user's workspaces.
    pub workspaces: Cell<Workspaces>,
    /// What a manager is told.
    pub peers: Cell<Snapshot>,
    /// Which paths changed lately.
    pub paths: Cell<PathLog>,
    /// What the host's interface should look like.
    pub interface: Cell<Option<InterfaceConfig>>,
    /// What became of it.
    pub host: Cell<HostState>,
    /// How each relay link stands.
    pub relays: Cell<BTreeMap<RegionId, RelayLink>>,
    /// Why relays of a region had to be reached by WebSocket; what is once in it stays.
    pub forced_websocket: Cell<BTreeMap<RegionId, String>>,
    /// Our home region.
    pub home: Cell<Option<RegionId>>,
    /// Our latency to each region.
    pub latencies: Cell<BTreeMap<RegionId, RegionLatency>>,
    /// How the world sees us.
    pub netcheck: Cell<Seen>,
    /// The network that this machine is on, as everybody knows it whom a change of it concerns.
    pub network: Cell<Option<Network>>,
    /// The families in which this machine has an address that leads anywhere.
    pub families: Cell<Families>,
    /// Where peers may reach us, best first.
    pub endpoints: Cell<Vec<SocketAddr>>,
    /// What has to show that it works after a change of the network.
    pub recovery: Recovery,
    /// The coordinator.
    pub coordinator: Address<coordinator::Message>,
    /// The registry.
    pub registry: Address<registry::Message>,
    /// Packet I/O.
    pub packet_io: Address<packet_io::Message>,
    /// The relay.
    pub relay: Address<relay::Message>,
    /// The pinger.
    pub pinger: Address<pinger::Message>,
}

/// How the world sees us, as far as it was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Counts looks: what is the same as before was confirmed.
    pub looks: u64,
    /// The addresses of our sockets.
    pub mappings: Mappings,
    /// Where those were bound when the look began: it says nothing of sockets elsewhere.
    pub ports: Option<LocalPorts>,
    /// What the last whole look found out.
    pub report: Option<(SystemTime, Report)>,
}

/// Changes of paths that are kept for who asks; each is about 100 bytes.
const MAX_EVENTS: usize = 256;

/// The latest changes of paths, for who follows them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathLog {
    /// The number of the latest; the first has 1.
    pub newest: u64,
    /// The latest, in order.
    pub events: VecDeque<(SystemTime, PathEvent)>,
}

impl PathLog {
    /// Adds what is told now.
    pub fn add(&mut self, at: SystemTime, events: Vec<PathEvent>) {
        self.newest += events.len() as u64;
        self.events.extend(events.into_iter().map(|event| (at, event)));
        self.events.drain(..self.events.len().saturating_sub(MAX_EVENTS));
    }

    /// What came after the event of this number, as far as it is kept.
    pub fn after(&self, number: u64) -> impl Iterator<Item = &(SystemTime, PathEvent)> {
        let news = usize::try_from(self.newest.saturating_sub(number)).unwrap_or(usize::MAX);
        self.events.iter().skip(self.events.len().saturating_sub(news))
    }
}

impl Net {
    /// A net about which nothing is known yet, and none of whose parts has started.
    pub fn new(boot: Arc<Boot>, identity: Identity, data_plane: DataPlane, addresses: Addresses) -> Self {
        let Addresses { coordinator, registry, packet_io, relay, pinger } = addresses;
        Self {
            boot,
            identity,
            data_plane,
            link: Cell::new(LinkState::Connecting),
            network_map: Cell::default(),
            relay_map: Cell::default(),
            upgrades: Cell::default(),
            direct: Cell::default(),
            workspaces: Cell::default(),
            peers: Cell::default(),
            paths: Cell::default(),
            interface: Cell::default(),
            host: Cell::default(),
            relays: Cell::default(),
            forced_websocket: Cell::default(),
            home: Cell::default(),
            latencies: Cell::default(),
            netcheck: Cell::default(),
            network: Cell::default(),
            // Until somebody has looked, everything is tried.
            families: Cell::new(Families { v4: true, v6: true }),
            endpoints: Cell::default(),
            recovery: Recovery::default(),
            coordinator,
            registry,
            packet_io,
            relay,
            pinger,
        }
    }
}
