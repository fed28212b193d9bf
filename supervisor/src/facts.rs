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
use warren_proto::{
    frame::{MAX_FRAME, Message},
    vpn::{self, status::Lifecycle},
};

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

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod stand_in;

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
/// Bytes of the largest of them, unpacked: several times what the longest names come to.
const MAX_PEER: usize = 4096;
const _: () =
    assert!(2 * MAX_PEERS * MAX_PEER <= 400 << 20, "what a tunnel tells must not exhaust a machine");
/// Bytes that all of them may take in a message: a status tells everything in one frame, and a little more.
const MAX_TOLD: usize = MAX_FRAME - (1 << 20);
/// Bytes in a message beside those of an entry: its tag and its length.
const AROUND: usize = 8;

/// What the tunnel has told of workspaces and agents, by id.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Peers {
    workspaces: Table<vpn::Workspace>,
    agents: Table<vpn::Agent>,
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
    /// `MAX_PEERS` or larger than `MAX_PEER` is not kept. Returns whether it fits what was known: it deletes nothing unknown, and
    /// every agent has its workspace.
    pub fn apply(&mut self, update: vpn::PeerUpdate) -> Fit {
        let mut fits = true;
        for agent in &update.deleted_agents {
            fits &= self.agents.remove(&agent.id);
        }
        for workspace in &update.deleted_workspaces {
            fits &= self.workspaces.remove(&workspace.id);
        }
        for workspace in update.upserted_workspaces {
            if workspace.encoded_len() <= MAX_PEER {
                let id = own(&workspace.id);
                self.workspaces.put(id.clone(), vpn::Workspace { id, ..workspace });
            }
        }
        for agent in update.upserted_agents {
            fits &= self.workspace(&agent.workspace_id).is_some();
            if unpacked(&agent) <= MAX_PEER {
                let (id, workspace_id) = (own(&agent.id), own(&agent.workspace_id));
                self.agents.put(id.clone(), vpn::Agent { id, workspace_id, ..agent });
            }
        }
        self.workspaces.cut(MAX_TOLD);
        self.agents.cut(MAX_TOLD.saturating_sub(self.workspaces.bytes));
        if fits { Fit::Whole } else { Fit::Gap }
    }

    /// The agents, in the order of their ids.
    pub fn agents(&self) -> impl Iterator<Item = &vpn::Agent> {
        self.agents.entries.values()
    }

    /// The workspace of this id.
    pub fn workspace(&self, id: &[u8]) -> Option<&vpn::Workspace> {
        self.workspaces.entries.get(id)
    }

    /// Everything as a status tells it: upserts only, each list sorted by name (vpn-protocol 11.5).
    pub fn complete(&self) -> vpn::PeerUpdate {
        let mut workspaces: Vec<_> = self.workspaces.entries.values().cloned().collect();
        workspaces.sort_by(|a, b| a.name.cmp(&b.name));
        let mut agents: Vec<_> = self.agents.entries.values().cloned().collect();
        agents.sort_by(|a, b| a.name.cmp(&b.name));
        vpn::PeerUpdate { upserted_workspaces: workspaces, upserted_agents: agents, ..Default::default() }
    }
}

/// Entries by id, and the bytes that they take in a message.
#[derive(Debug, Clone, PartialEq)]
struct Table<T> {
    entries: BTreeMap<Bytes, T>,
    bytes: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), bytes: 0 }
    }
}

impl<T: Message> Table<T> {
    fn put(&mut self, id: Bytes, entry: T) {
        self.bytes += told(&entry);
        self.bytes -= self.entries.insert(id, entry).as_ref().map_or(0, told);
    }

    /// Whether it was there.
    fn remove(&mut self, id: &[u8]) -> bool {
        let removed = self.entries.remove(id);
        self.bytes -= removed.as_ref().map_or(0, told);
        removed.is_some()
    }

    /// Forgets the last ones until the others are few and small enough.
    fn cut(&mut self, most: usize) {
        while self.entries.len() > MAX_PEERS || self.bytes > most {
            let Some((_, last)) = self.entries.pop_last() else { return };
            self.bytes -= told(&last);
        }
    }
}

fn told(entry: &impl Message) -> usize {
    entry.encoded_len() + AROUND
}

/// An id that does not keep the frame in memory that it came in.
fn own(id: &Bytes) -> Bytes {
    Bytes::copy_from_slice(id)
}

/// Bytes that an agent takes, with the places of its texts.
fn unpacked(agent: &vpn::Agent) -> usize {
    agent.encoded_len() + (agent.fqdn.len() + agent.ip_addrs.len()) * size_of::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(workspace: &Bytes) -> vpn::Agent {
        let fqdn = vec![format!("{}.coder.", "a".repeat(200)); 4];
        vpn::Agent { id: workspace.clone(), workspace_id: workspace.clone(), fqdn, ..Default::default() }
    }

    #[test]
    fn what_a_tunnel_tells_of_its_peers_does_not_keep_its_frames_in_memory() {
        let frame = Bytes::from(vec![7; 1 << 20]);
        let id = frame.slice(..16);
        let mut peers = Peers::default();
        let workspace = vpn::Workspace { id: id.clone(), ..Default::default() };
        let (upserted_workspaces, upserted_agents) = (vec![workspace], vec![agent(&id)]);
        let update = vpn::PeerUpdate { upserted_workspaces, upserted_agents, ..Default::default() };
        assert_eq!(peers.apply(update), Fit::Whole);
        assert_eq!(peers.agents().next().map(|agent| &agent.workspace_id), Some(&id));
        drop(id);
        assert!(frame.is_unique(), "nothing that is kept points into it");
    }

    #[test]
    fn a_status_of_all_that_is_kept_fits_in_a_frame() {
        let id = |number: u32| Bytes::copy_from_slice(&number.to_be_bytes());
        let mut peers = Peers::default();
        for number in 0..20_000 {
            let agent = vpn::Agent { name: "n".repeat(1000), ..agent(&id(number)) };
            peers.apply(vpn::PeerUpdate { upserted_agents: vec![agent], ..Default::default() });
        }
        assert!(peers.agents().count() > 5000);
        let (deleted, kept) = (peers.complete(), peers.complete());
        assert!(kept.encoded_len() <= MAX_TOLD, "{}", kept.encoded_len());
        peers.apply(vpn::PeerUpdate { deleted_agents: deleted.upserted_agents, ..Default::default() });
        assert_eq!(peers, Peers::default(), "nothing is counted any more");
    }

    #[test]
    fn peers_of_no_bearable_size_are_not_kept() {
        let id = Bytes::from_static(&[1; 16]);
        let name = "n".repeat(MAX_PEER);
        let workspaces = [
            vpn::Workspace { id: id.clone(), ..Default::default() },
            vpn::Workspace { name, ..Default::default() },
        ];
        let agents =
            [agent(&id), vpn::Agent { fqdn: vec![String::new(); MAX_PEER / 8], ..agent(&Bytes::new()) }];
        let mut peers = Peers::default();
        peers.apply(vpn::PeerUpdate {
            upserted_workspaces: workspaces.to_vec(),
            upserted_agents: agents.to_vec(),
            ..Default::default()
        });
        let kept = peers.complete();
        assert_eq!((kept.upserted_workspaces.len(), kept.upserted_agents.as_slice()), (1, &agents[..1]));
    }
}
