//! The peer table: which workspaces and agents there are, their names and addresses, what is known of
//! each, and the difference between what a reader has seen and the present.
//!
//! ```text
//! WorkspaceUpdate -> Workspaces::apply -> Roster (+ handshakes, pings) -> Snapshot -> difference -> PeerUpdate
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
    time::{Duration, SystemTime},
};

use uuid::Uuid;
use warren_proto::{
    address,
    name::{self, NameError, OnlyAgent},
};

mod update;
mod workspaces;

pub use update::{Sent, complete};
pub use workspaces::{MAX_ENTRIES, MAX_NAME, Update, UpdateError};

/// The user's workspaces as the control plane lists them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workspaces {
    /// The authenticated user's name.
    pub username: String,
    /// The host name suffix, without dots around it.
    pub suffix: String,
    /// Whether a snapshot has been received since start.
    pub known: bool,
    /// The workspaces by id.
    pub workspaces: BTreeMap<Uuid, Workspace>,
}

/// One workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workspace {
    /// Its name, in the original case.
    pub name: String,
    /// Its status number, passed through even where this schema has no name for it.
    pub status: i32,
    /// Its agents' names by id.
    pub agents: BTreeMap<Uuid, String>,
}

/// What a manager is told: everything known of every workspace and agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The workspaces by id.
    pub workspaces: BTreeMap<Uuid, WorkspaceEntry>,
    /// The agents by id.
    pub agents: BTreeMap<Uuid, AgentEntry>,
}

/// A workspace as a manager is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceEntry {
    /// Its name, in the original case.
    pub name: String,
    /// Its status number.
    pub status: i32,
}

/// An agent as a manager is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentEntry {
    /// Its name, in the original case.
    pub name: String,
    /// The workspace it belongs to.
    pub workspace_id: Uuid,
    /// Its names with trailing dot, shortest first; never empty.
    pub fqdn: Vec<String>,
    /// Its addresses, distinct.
    pub addresses: Vec<Ipv6Addr>,
    /// When WireGuard last completed a handshake with it.
    pub last_handshake: Option<SystemTime>,
    /// Its last answered ping.
    pub last_ping: Option<PingReport>,
}

/// The outcome of an answered ping (vpn-protocol 8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PingReport {
    /// Round trip.
    pub latency: Duration,
    /// Whether a direct path answered.
    pub direct: bool,
    /// Name of the relay region the answer came through, or of our home.
    pub region_name: String,
    /// Our own latency to that region, if measured.
    pub region_latency: Option<Duration>,
}

/// The peer table. It alone says what managers hear of; successors of a crashed owner restore it from the
/// last snapshot, so that pings and handshakes are not forgotten.
#[derive(Debug, Default)]
pub struct Roster {
    snapshot: Snapshot,
    unnameable: BTreeSet<Uuid>,
}

/// An agent that is left out because it cannot have a name: managers cannot show one without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unnameable {
    /// The agent.
    pub agent: Uuid,
    /// What is wrong with its names.
    pub error: NameError,
}

/// Handshakes closer to each other than this are one, read twice: a session is never renewed so soon.
const SAME_HANDSHAKE: Duration = Duration::from_secs(1);

impl Roster {
    /// The table as a snapshot tells it.
    pub fn restore(snapshot: Snapshot) -> Self {
        Self { snapshot, unnameable: BTreeSet::new() }
    }

    /// What managers are told now.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Takes the present workspaces: who is there, under which names. What is known of agents that stay
    /// is kept, of others forgotten. Returns agents that are left out, each time it begins.
    pub fn set_workspaces(&mut self, present: &Workspaces) -> Vec<Unnameable> {
        if !present.known {
            return Vec::new();
        }
        let mut agents = BTreeMap::new();
        let mut unnameable = Vec::new();
        for (workspace_id, workspace, agent, name) in present.agents() {
            match present.names_of(workspace, name) {
                Ok(fqdn) => {
                    let entry = self.entry(agent, name, workspace_id, fqdn);
                    agents.insert(agent, entry);
                }
                Err(error) => unnameable.push(Unnameable { agent, error }),
            }
        }
        self.snapshot = Snapshot { workspaces: present.entries(), agents };
        self.newly_unnameable(unnameable)
    }

    /// Takes what the engine says about each agent's last handshake; `None` means never. Returns whether
    /// anything changed.
    pub fn set_handshakes(&mut self, last: impl Fn(&Uuid) -> Option<SystemTime>) -> bool {
        let mut changed = false;
        for (id, agent) in &mut self.snapshot.agents {
            let latest = last(id);
            if !is_same_handshake(agent.last_handshake, latest) {
                agent.last_handshake = latest;
                changed = true;
            }
        }
        changed
    }

    /// Takes the outcome of an answered ping. Returns whether the agent is still there.
    pub fn set_ping(&mut self, agent: &Uuid, report: PingReport) -> bool {
        let Some(agent) = self.snapshot.agents.get_mut(agent) else { return false };
        agent.last_ping = Some(report);
        true
    }

    fn entry(&self, id: Uuid, name: &str, workspace_id: Uuid, fqdn: Vec<String>) -> AgentEntry {
        let known = self.snapshot.agents.get(&id);
        AgentEntry {
            name: name.to_owned(),
            workspace_id,
            fqdn,
            addresses: vec![address::coder_address(&id)],
            last_handshake: known.and_then(|known| known.last_handshake),
            last_ping: known.and_then(|known| known.last_ping.clone()),
        }
    }

    fn newly_unnameable(&mut self, now: Vec<Unnameable>) -> Vec<Unnameable> {
        let before = std::mem::replace(&mut self.unnameable, now.iter().map(|it| it.agent).collect());
        now.into_iter().filter(|it| !before.contains(&it.agent)).collect()
    }
}

impl Workspaces {
    fn agents(&self) -> impl Iterator<Item = (Uuid, &Workspace, Uuid, &str)> {
        self.workspaces.iter().flat_map(|(workspace_id, workspace)| {
            workspace.agents.iter().map(move |(id, name)| (*workspace_id, workspace, *id, name.as_str()))
        })
    }

    fn names_of(&self, workspace: &Workspace, agent: &str) -> Result<Vec<String>, NameError> {
        let only = if workspace.agents.len() == 1 { OnlyAgent::Yes } else { OnlyAgent::No };
        name::agent_names(agent, &workspace.name, &self.username, &self.suffix, only)
    }

    fn entries(&self) -> BTreeMap<Uuid, WorkspaceEntry> {
        let entry = |it: &Workspace| WorkspaceEntry { name: it.name.clone(), status: it.status };
        self.workspaces.iter().map(|(id, workspace)| (*id, entry(workspace))).collect()
    }
}

fn is_same_handshake(a: Option<SystemTime>, b: Option<SystemTime>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return a == b };
    let apart = b.duration_since(a).unwrap_or_else(|backwards| backwards.duration());
    apart < SAME_HANDSHAKE
}

#[cfg(test)]
mod tests;
