//! Applying the control plane's workspace updates (vpn-protocol 7.2, tailnet-control 8). An update is
//! applied whole or not at all; one that cannot be applied ends the stream, and the next stream begins
//! with a snapshot that repairs the state.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use warren_proto::tailnet;

use super::{Workspace, Workspaces};

/// Workspaces and agents that are handled at most, far beyond what one user has: every one costs memory, a
/// peer, and a ping every 5 s.
pub const MAX_ENTRIES: usize = 20_000;
/// Bytes of the longest name that is kept, far beyond what any deployment allows.
pub const MAX_NAME: usize = 1024;

/// What kind of update a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// The first message of a stream: everything there is, replaces everything known.
    Snapshot,
    /// Any later message: what changed.
    Diff,
}

/// Why an update could not be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// An id is not 16 bytes.
    #[error("parse {what} ID: invalid UUID (got {length} bytes)")]
    InvalidId {
        /// Whose id.
        what: &'static str,
        /// Its length.
        length: usize,
    },
    /// A workspace that is not known was deleted, or has to do with an agent.
    #[error("workspace {0} not found")]
    UnknownWorkspace(Uuid),
    /// An agent that is not known was deleted.
    #[error("agent {agent} not found in workspace {workspace}")]
    UnknownAgent {
        /// The agent.
        agent: Uuid,
        /// Where it was said to be.
        workspace: Uuid,
    },
    /// There are more of them than can be handled.
    #[error("{0} workspaces and agents: {MAX_ENTRIES} are handled at most")]
    TooMany(usize),
    /// A name is longer than any can be.
    #[error("{what} {id} has a name of {length} bytes: {MAX_NAME} are the most")]
    LongName {
        /// Whose name.
        what: &'static str,
        /// Its id.
        id: Uuid,
        /// Its length.
        length: usize,
    },
}

impl Workspaces {
    /// Applies one message of the stream; on an error nothing has changed.
    pub fn apply(&mut self, message: &tailnet::WorkspaceUpdate, update: Update) -> Result<(), UpdateError> {
        let mut table = match update {
            Update::Snapshot => BTreeMap::new(),
            Update::Diff => self.workspaces.clone(),
        };
        upsert_workspaces(&mut table, &message.upserted_workspaces)?;
        delete_agents(&mut table, &message.deleted_agents)?;
        delete_workspaces(&mut table, &message.deleted_workspaces)?;
        upsert_agents(&mut table, &message.upserted_agents)?;
        let entries = table.values().map(|workspace| 1 + workspace.agents.len()).sum();
        if entries > MAX_ENTRIES {
            return Err(UpdateError::TooMany(entries));
        }
        self.workspaces = table;
        self.known = true;
        Ok(())
    }

    /// Every agent: the destinations that tunnels are wanted to.
    pub fn agent_ids(&self) -> BTreeSet<Uuid> {
        self.agents().map(|(_, _, id, _)| id).collect()
    }
}

type Table = BTreeMap<Uuid, Workspace>;

fn upsert_workspaces(table: &mut Table, upserted: &[tailnet::Workspace]) -> Result<(), UpdateError> {
    for upsert in upserted {
        let id = id("workspace", &upsert.id)?;
        check_name("workspace", id, &upsert.name)?;
        let workspace = table.entry(id).or_insert_with(|| Workspace {
            name: String::new(),
            status: 0,
            agents: BTreeMap::new(),
        });
        workspace.name.clone_from(&upsert.name);
        workspace.status = upsert.status;
    }
    Ok(())
}

fn delete_agents(table: &mut Table, deleted: &[tailnet::Agent]) -> Result<(), UpdateError> {
    for delete in deleted {
        let (agent, workspace) = (id("agent", &delete.id)?, id("workspace", &delete.workspace_id)?);
        let home = table.get_mut(&workspace).ok_or(UpdateError::UnknownWorkspace(workspace))?;
        home.agents.remove(&agent).ok_or(UpdateError::UnknownAgent { agent, workspace })?;
    }
    Ok(())
}

fn delete_workspaces(table: &mut Table, deleted: &[tailnet::Workspace]) -> Result<(), UpdateError> {
    for delete in deleted {
        let workspace = id("workspace", &delete.id)?;
        table.remove(&workspace).ok_or(UpdateError::UnknownWorkspace(workspace))?;
    }
    Ok(())
}

fn upsert_agents(table: &mut Table, upserted: &[tailnet::Agent]) -> Result<(), UpdateError> {
    for upsert in upserted {
        let (agent, workspace) = (id("agent", &upsert.id)?, id("workspace", &upsert.workspace_id)?);
        let home = table.get_mut(&workspace).ok_or(UpdateError::UnknownWorkspace(workspace))?;
        check_name("agent", agent, &upsert.name)?;
        home.agents.insert(agent, upsert.name.clone());
    }
    Ok(())
}

fn check_name(what: &'static str, id: Uuid, name: &str) -> Result<(), UpdateError> {
    let length = name.len();
    if length > MAX_NAME { Err(UpdateError::LongName { what, id, length }) } else { Ok(()) }
}

fn id(what: &'static str, bytes: &[u8]) -> Result<Uuid, UpdateError> {
    Uuid::from_slice(bytes).map_err(|_| UpdateError::InvalidId { what, length: bytes.len() })
}
