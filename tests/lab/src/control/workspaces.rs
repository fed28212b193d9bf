//! The workspaces of the lab's user, and what a reader of their stream has not seen yet (tailnet-control 8).

use std::collections::BTreeMap;

use bytes::Bytes;
use uuid::Uuid;
use warren_proto::tailnet;

pub use warren_proto::tailnet::workspace::Status;

/// One workspace with its agents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Its name.
    pub name: String,
    /// How it stands.
    pub status: Status,
    /// Names by ID.
    pub agents: BTreeMap<Uuid, String>,
}

/// All workspaces by ID, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workspaces(pub BTreeMap<Uuid, Workspace>);

impl Workspaces {
    /// The ID of the workspace with this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Uuid> {
        self.0.iter().find(|(_, workspace)| workspace.name == name).map(|(id, _)| *id)
    }

    /// Everything, as the first message of a stream tells it.
    pub(crate) fn snapshot(&self) -> tailnet::WorkspaceUpdate {
        self.difference(&Self::default())
    }

    /// What changed since `old`, as a later message of a stream tells it; empty if nothing did.
    pub(crate) fn difference(&self, old: &Self) -> tailnet::WorkspaceUpdate {
        let mut update = tailnet::WorkspaceUpdate::default();
        for (id, workspace) in &self.0 {
            let before = old.0.get(id);
            let is_same =
                |before: &&Workspace| before.name == workspace.name && before.status == workspace.status;
            if before.filter(is_same).is_none() {
                update.upserted_workspaces.push(workspace_message(id, workspace));
            }
            for (agent, name) in &workspace.agents {
                if before.and_then(|before| before.agents.get(agent)) != Some(name) {
                    update.upserted_agents.push(agent_message(id, agent, name));
                }
            }
        }
        for (id, workspace) in &old.0 {
            let now = self.0.get(id);
            if now.is_none() {
                update.deleted_workspaces.push(workspace_message(id, workspace));
            }
            for (agent, name) in &workspace.agents {
                if now.is_none_or(|now| !now.agents.contains_key(agent)) {
                    update.deleted_agents.push(agent_message(id, agent, name));
                }
            }
        }
        update
    }
}

fn workspace_message(id: &Uuid, workspace: &Workspace) -> tailnet::Workspace {
    tailnet::Workspace { id: raw(id), name: workspace.name.clone(), status: workspace.status.into() }
}

fn agent_message(workspace: &Uuid, id: &Uuid, name: &str) -> tailnet::Agent {
    tailnet::Agent { id: raw(id), name: name.to_owned(), workspace_id: raw(workspace) }
}

fn raw(id: &Uuid) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(status: Status, agents: &[(u128, &str)]) -> Workspaces {
        let agents = agents.iter().map(|(id, name)| (Uuid::from_u128(*id), (*name).to_owned())).collect();
        let workspace = Workspace { name: "dev".to_owned(), status, agents };
        Workspaces(BTreeMap::from([(Uuid::from_u128(1), workspace)]))
    }

    #[test]
    fn a_snapshot_has_upserts_only_and_an_empty_one_is_an_empty_message() {
        let update = one(Status::Running, &[(7, "main")]).snapshot();
        assert_eq!((update.upserted_workspaces.len(), update.upserted_agents.len()), (1, 1));
        assert!(update.deleted_workspaces.is_empty() && update.deleted_agents.is_empty());
        assert_eq!(Workspaces::default().snapshot(), tailnet::WorkspaceUpdate::default());
    }

    #[test]
    fn a_difference_tells_what_changed_and_nothing_else() {
        let before = one(Status::Running, &[(7, "main"), (8, "gpu")]);
        assert_eq!(before.difference(&before), tailnet::WorkspaceUpdate::default());
        let after = one(Status::Stopping, &[(8, "gpu"), (9, "new")]);
        let update = after.difference(&before);
        assert_eq!(update.upserted_workspaces[0].status(), Status::Stopping);
        let names =
            |agents: &[tailnet::Agent]| agents.iter().map(|agent| agent.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&update.upserted_agents), ["new"]);
        assert_eq!(names(&update.deleted_agents), ["main"]);
    }

    #[test]
    fn a_workspace_that_is_gone_takes_its_agents_with_it() {
        let update = Workspaces::default().difference(&one(Status::Deleting, &[(7, "main")]));
        assert_eq!(update.deleted_workspaces[0].status(), Status::Deleting);
        assert_eq!(update.deleted_agents.len(), 1);
    }
}
