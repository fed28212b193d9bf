//! The facts that the parts of the service share: what each cell holds, and who writes it.
//!
//! | Cell | Writer |
//! |---|---|
//! | [`Service::desired`] | intent |
//! | [`Service::tunnel`], [`Service::running`], [`Service::link`] | tunnels |
//! | [`Service::peers`] | the running tunnel's own task, which outlives the tunnels part |
//! | [`Service::device`], [`Service::host`] | host |
//!
//! The value itself outlives every part: a part that crashes finds it as it left it.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use bytes::Bytes;
use warren_actors::{
    dial::ClientCertificate,
    runtime::{Address, Cell},
};
use warren_proto::vpn::{self, status::Lifecycle};

use crate::{
    config::Config,
    host::{
        self,
        footprint::{Footprint, Trace},
    },
    intent::{self, Desired},
    link::LinkClient,
    paths::Paths,
    process::{LogRing, Slot, Spawner},
    tunnels,
};

/// Everything that lives as long as the service. Made by the composition, lent to the parts.
pub struct Service {
    /// Where sockets and state are.
    pub paths: Paths,
    /// What the configuration file says.
    pub config: Config,
    /// How the service was started.
    pub options: Options,
    /// What the user wants.
    pub desired: Cell<Desired>,
    /// How the tunnel stands.
    pub tunnel: Cell<TunnelState>,
    /// The tunnel process that has answered its Start, and what joins us to it. It lives here, so that a
    /// crash of the tunnels part does not touch it.
    pub running: Cell<Option<Arc<tunnels::Running>>>,
    /// What the tunnel has told of workspaces and agents.
    pub peers: Cell<Peers>,
    /// The private link to the present tunnel process, if it is our own program.
    pub link: Cell<Option<LinkClient>>,
    /// The device, as long as there is one.
    pub device: Cell<Option<Arc<OwnedFd>>>,
    /// What the host's interface was last set to.
    pub host: Cell<host::Applied>,
    /// What foreign tunnel programs do to the host.
    pub footprint: Footprint,
    /// The last words of tunnel processes.
    pub log: LogRing,
    /// The thread that starts processes.
    pub spawner: Spawner,
    /// The right to have a child process.
    pub slot: Slot,
    /// The intent part.
    pub intent: Address<intent::Message>,
    /// The host part.
    pub host_part: Address<host::Message>,
    /// The tunnels part.
    pub tunnels: Address<tunnels::Message>,
}

/// Everything the tunnels part hears is a wish of somebody or a report of its own.
const TUNNELS_MAILBOX: usize = 64;
/// Nobody but the tunnels part and its tunnel asks the host for anything.
const HOST_MAILBOX: usize = 16;
/// Wishes that are being written down.
const INTENT_MAILBOX: usize = 16;

impl Service {
    /// A service in which nothing runs yet.
    pub fn new(paths: Paths, config: Config, options: Options, spawner: Spawner) -> Self {
        Self {
            paths,
            config,
            options,
            desired: Cell::new(Desired::default()),
            tunnel: Cell::new(TunnelState::default()),
            running: Cell::new(None),
            peers: Cell::new(Peers::default()),
            link: Cell::new(None),
            device: Cell::new(None),
            host: Cell::new(host::Applied::default()),
            footprint: Footprint::default(),
            log: LogRing::default(),
            spawner,
            slot: Slot::default(),
            intent: Address::new("intent", INTENT_MAILBOX),
            host_part: Address::new("host", HOST_MAILBOX),
            tunnels: Address::new("tunnels", TUNNELS_MAILBOX),
        }
    }
}

/// How the service was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Whether there is a device.
    pub with_device: bool,
    /// Whether the local API may force faults into parts.
    pub allow_faults: bool,
    /// The program's version.
    pub version: &'static str,
    /// The user that the service runs as; may do everything, as root may.
    pub uid: u32,
    /// The tunnel's log directives.
    pub log_filter: String,
    /// Whether each agent has metrics of its own.
    pub agent_metrics: bool,
    /// Certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// What the tunnel shows to servers that ask who we are.
    pub client_certificate: Option<ClientCertificate>,
}

/// How the tunnel stands: the lifecycle of leg B, and what it cannot say.
#[derive(Debug, Clone, PartialEq)]
pub struct TunnelState {
    /// As clients are told. `Started` only with a tunnel process that has answered its Start.
    pub lifecycle: Lifecycle,
    /// Why it is not as it should be, in words for a person; empty where all is well.
    pub error: String,
    /// How far a start has come, while somebody waits for one.
    pub progress: Option<vpn::StartProgressStage>,
    /// The user whose tunnel it is, while one is wanted.
    pub owner: Option<u32>,
    /// The tunnel process.
    pub pid: Option<u32>,
    /// Since when the lifecycle is what it is.
    pub since: SystemTime,
    /// Restarts of the tunnel process since the service started.
    pub restarts: u64,
    /// Why the last tunnel process ended against our will.
    pub last_reason: Option<String>,
    /// Whether restarts were given up until a person acts.
    pub circuit_open: bool,
    /// What foreign tunnel programs have left on the host.
    pub left_behind: BTreeSet<Trace>,
}

impl Default for TunnelState {
    fn default() -> Self {
        Self {
            lifecycle: Lifecycle::Stopped,
            error: String::new(),
            progress: None,
            owner: None,
            pid: None,
            since: SystemTime::now(),
            restarts: 0,
            last_reason: None,
            circuit_open: false,
            left_behind: BTreeSet::new(),
        }
    }
}

/// Workspaces, and agents, that are kept at most: a tunnel that was taken over must not exhaust the service.
const MAX_PEERS: usize = 50_000;

/// What the tunnel has told of workspaces and agents, by id.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Peers {
    workspaces: BTreeMap<Bytes, vpn::Workspace>,
    agents: BTreeMap<Bytes, vpn::Agent>,
}

/// Whether an update fits what was known before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// It does.
    Whole,
    /// Something is missing: an update was lost, or ours and the tunnel's tables differ.
    Gap,
}

impl Peers {
    /// Takes one update of the tunnel: deletes first, then upserts (vpn-protocol 7.4). What is beyond
    /// `MAX_PEERS` is not kept. Returns whether it fits what was known: it deletes nothing unknown, and
    /// every agent has its workspace.
    pub fn apply(&mut self, update: vpn::PeerUpdate) -> Fit {
        let mut fits = true;
        for agent in &update.deleted_agents {
            fits &= self.agents.remove(&agent.id).is_some();
        }
        for workspace in &update.deleted_workspaces {
            fits &= self.workspaces.remove(&workspace.id).is_some();
        }
        let workspaces = update.upserted_workspaces.into_iter();
        self.workspaces.extend(workspaces.map(|workspace| (workspace.id.clone(), workspace)));
        fits &= update.upserted_agents.iter().all(|agent| self.workspaces.contains_key(&agent.workspace_id));
        self.agents.extend(update.upserted_agents.into_iter().map(|agent| (agent.id.clone(), agent)));
        while self.workspaces.len() > MAX_PEERS && self.workspaces.pop_last().is_some() {}
        while self.agents.len() > MAX_PEERS && self.agents.pop_last().is_some() {}
        if fits { Fit::Whole } else { Fit::Gap }
    }

    /// The agents, in the order of their ids.
    pub fn agents(&self) -> impl Iterator<Item = &vpn::Agent> {
        self.agents.values()
    }

    /// The workspace of this id.
    pub fn workspace(&self, id: &[u8]) -> Option<&vpn::Workspace> {
        self.workspaces.get(id)
    }

    /// Everything as a status tells it: upserts only, each list sorted by name (vpn-protocol 11.5).
    pub fn complete(&self) -> vpn::PeerUpdate {
        let mut workspaces: Vec<_> = self.workspaces.values().cloned().collect();
        workspaces.sort_by(|a, b| a.name.cmp(&b.name));
        let mut agents: Vec<_> = self.agents.values().cloned().collect();
        agents.sort_by(|a, b| a.name.cmp(&b.name));
        vpn::PeerUpdate { upserted_workspaces: workspaces, upserted_agents: agents, ..Default::default() }
    }
}
