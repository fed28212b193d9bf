//! What a manager is sent: the whole table, or the difference to what it has seen (vpn-protocol 7.4).
//! Deletes and upserts never name the same id, no id comes twice, and the order is that of the ids.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use uuid::Uuid;
use warren_proto::vpn;

use super::{AgentEntry, PingReport, Snapshot, WorkspaceEntry};

/// What one reader was sent so far. Answers to its questions only add, and it may or may not apply them: where
/// they said anything else than the differences before them, the next difference says it again.
#[derive(Debug, Clone, Default)]
pub struct Sent {
    told: Arc<Snapshot>,
    /// Where answers since then said something else.
    answered: Snapshot,
}

impl Sent {
    /// The message after which the reader shows `present`, or `None` if it does already.
    pub fn difference(&self, present: &Snapshot) -> Option<vpn::PeerUpdate> {
        let Self { told, answered } = self;
        let update = vpn::PeerUpdate {
            upserted_workspaces: changed(&told.workspaces, &answered.workspaces, &present.workspaces)
                .map(workspace)
                .collect(),
            upserted_agents: changed(&told.agents, &answered.agents, &present.agents).map(agent).collect(),
            deleted_workspaces: vanished(&told.workspaces, &answered.workspaces, &present.workspaces)
                .map(workspace)
                .collect(),
            deleted_agents: vanished(&told.agents, &answered.agents, &present.agents)
                .map(deleted_agent)
                .collect(),
        };
        Some(update).filter(|update| *update != vpn::PeerUpdate::default())
    }

    /// The difference to `present` was sent.
    pub fn note_difference(&mut self, present: Arc<Snapshot>) {
        *self = Self { told: present, answered: Snapshot::default() };
    }

    /// A question was answered with everything in `present`.
    pub fn note_answer(&mut self, present: &Snapshot) {
        note(&self.told.workspaces, &mut self.answered.workspaces, &present.workspaces);
        note(&self.told.agents, &mut self.answered.agents, &present.agents);
    }
}

/// The message that tells everything, whatever was seen before: upserts only.
pub fn complete(snapshot: &Snapshot) -> vpn::PeerUpdate {
    vpn::PeerUpdate {
        upserted_workspaces: snapshot.workspaces.iter().map(workspace).collect(),
        upserted_agents: snapshot.agents.iter().map(agent).collect(),
        ..vpn::PeerUpdate::default()
    }
}

type Table<T> = BTreeMap<Uuid, T>;

fn changed<'a, T: PartialEq>(
    told: &Table<T>,
    answered: &Table<T>,
    present: &'a Table<T>,
) -> impl Iterator<Item = (&'a Uuid, &'a T)> {
    present.iter().filter(|(id, entry)| told.get(*id) != Some(*entry) || answered.contains_key(*id))
}

/// With what was said of them last.
fn vanished<'a, T>(
    told: &'a Table<T>,
    answered: &'a Table<T>,
    present: &Table<T>,
) -> impl Iterator<Item = (&'a Uuid, &'a T)> {
    let known = told.iter().chain(answered);
    known.filter(|(id, _)| !present.contains_key(*id)).collect::<BTreeMap<_, _>>().into_iter()
}

fn note<T: Clone + PartialEq>(told: &Table<T>, answered: &mut Table<T>, present: &Table<T>) {
    for (id, entry) in present {
        if told.get(id) != Some(entry) || answered.contains_key(id) {
            answered.insert(*id, entry.clone());
        }
    }
}

fn workspace((id, entry): (&Uuid, &WorkspaceEntry)) -> vpn::Workspace {
    vpn::Workspace { id: raw(id), name: entry.name.clone(), status: entry.status }
}

fn agent((id, entry): (&Uuid, &AgentEntry)) -> vpn::Agent {
    vpn::Agent {
        last_handshake: entry.last_handshake.and_then(timestamp),
        last_ping: entry.last_ping.as_ref().map(last_ping),
        ..deleted_agent((id, entry))
    }
}

fn deleted_agent((id, entry): (&Uuid, &AgentEntry)) -> vpn::Agent {
    vpn::Agent {
        id: raw(id),
        name: entry.name.clone(),
        workspace_id: raw(&entry.workspace_id),
        fqdn: entry.fqdn.clone(),
        ip_addrs: entry.addresses.iter().map(ToString::to_string).collect(),
        last_handshake: None,
        last_ping: None,
    }
}

fn last_ping(report: &PingReport) -> vpn::LastPing {
    vpn::LastPing {
        latency: Some(duration(report.latency)),
        did_p2p: report.direct,
        preferred_derp: report.region_name.clone(),
        preferred_derp_latency: report.region_latency.map(duration),
    }
}

fn raw(id: &Uuid) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

/// Unset for a time at or before 1970: managers would read it as a real handshake of that day.
fn timestamp(time: SystemTime) -> Option<prost_types::Timestamp> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok().filter(|since| !since.is_zero())?;
    let seconds = i64::try_from(since.as_secs()).ok()?;
    Some(prost_types::Timestamp { seconds, nanos: nanos(since) })
}

fn duration(span: Duration) -> prost_types::Duration {
    prost_types::Duration { seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX), nanos: nanos(span) }
}

fn nanos(span: Duration) -> i32 {
    i32::try_from(span.subsec_nanos()).unwrap_or(i32::MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    /// The message that leads a reader from `old` to `new`, or `None` if nothing differs.
    pub(in crate::roster) fn difference(old: &Snapshot, new: &Snapshot) -> Option<vpn::PeerUpdate> {
        let mut sent = Sent::default();
        sent.note_difference(Arc::new(old.clone()));
        sent.difference(new)
    }

    /// Conforms: vpn:T9
    #[test]
    fn agents_and_workspaces_are_told_field_by_field_and_a_deleted_agent_without_times() {
        let (workspace_id, agent_id) = (Uuid::from_u128(1), Uuid::from_u128(0xb));
        let entry = AgentEntry {
            name: "Main".to_owned(),
            workspace_id,
            fqdn: vec!["dev.coder.".to_owned(), "main.dev.me.coder.".to_owned()],
            addresses: vec![Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 0, 0, 0, 0, 0xb)],
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
            last_ping: None,
        };
        let workspace = WorkspaceEntry { name: "Dev".to_owned(), status: 3 };
        let known =
            Snapshot { workspaces: [(workspace_id, workspace)].into(), agents: [(agent_id, entry)].into() };

        let told = difference(&Snapshot::default(), &known).unwrap();
        let workspace = vpn::Workspace {
            id: raw(&workspace_id),
            name: "Dev".to_owned(),
            status: vpn::workspace::Status::Running.into(),
        };
        let agent = vpn::Agent {
            id: raw(&agent_id),
            name: "Main".to_owned(),
            workspace_id: raw(&workspace_id),
            fqdn: vec!["dev.coder.".to_owned(), "main.dev.me.coder.".to_owned()],
            ip_addrs: vec!["fd60:627a:a42b::b".to_owned()],
            last_handshake: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            last_ping: None,
        };
        assert_eq!(
            (told.upserted_workspaces, told.upserted_agents),
            (vec![workspace.clone()], vec![agent.clone()])
        );

        let gone = difference(&known, &Snapshot::default()).unwrap();
        let agent = vpn::Agent { last_handshake: None, ..agent };
        assert_eq!((gone.deleted_workspaces, gone.deleted_agents), (vec![workspace], vec![agent]));
    }
}
