//! The rules at work together: what a deployment says of workspaces becomes tunnels, names and messages, and
//! what agents answer to pings becomes what a manager is told.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::{
    collections::BTreeMap,
    net::Ipv6Addr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use uuid::Uuid;
use warren_core::{
    coordination::Coordination,
    home::{RegionLatency, Report},
    ping::{self, Ping, Pings, TICK},
    relay_map::{Region, RegionId, RelayMap},
    roster::{
        Roster, Sent,
        Update::{self, Diff, Snapshot as Everything},
        UpdateError, Workspaces, complete,
    },
};
use warren_proto::{
    address::coder_address,
    key::{DiscoPublic, NodePublic},
    tailnet::{
        self, CoordinateRequest, CoordinateResponse, WorkspaceUpdate,
        coordinate_request::Tunnel as Destination,
        coordinate_response::{PeerUpdate, peer_update::Kind},
    },
    vpn,
};

const MS: Duration = Duration::from_millis(1);
const RUNNING: i32 = 3;

mod updates {
    use super::*;

    /// What the first message leads to, but for the name that only a resolver answers.
    #[test]
    fn a_first_snapshot_asks_for_a_tunnel_to_each_agent_and_is_told_as_it_is_known() {
        let mut tunnel = Tunnel::connected();
        let first = snapshot(&[(1, "dev"), (2, "pair")], &[(11, "main", 1), (21, "a", 2), (22, "b", 2)]);
        assert_eq!(tunnel.hear(&first, Everything), ["+11", "+21", "+22"]);
        let hosts = hosts(&[
            ("dev.coder.", 11),
            ("main.dev.me.coder.", 11),
            ("main.dev.alice.coder.", 11),
            ("a.pair.me.coder.", 21),
            ("a.pair.alice.coder.", 21),
            ("b.pair.me.coder.", 22),
            ("b.pair.alice.coder.", 22),
        ]);
        assert_eq!(tunnel.hosts(), hosts);
        let told = tunnel.tell().unwrap();
        assert_eq!(told, complete(tunnel.roster.snapshot()), "what is asked for is what was told");
        assert!(told.deleted_workspaces.is_empty() && told.deleted_agents.is_empty());
        assert_eq!((told.upserted_workspaces.len(), told.upserted_agents.len()), (2, 3));
    }

    /// Conforms: vpn:K2 control:W3
    #[test]
    fn an_agent_that_takes_the_place_of_another_takes_its_short_name_and_the_old_tunnel_goes_last() {
        let mut tunnel = Tunnel::connected();
        tunnel.hear(&snapshot(&[(1, "dev")], &[(11, "main", 1)]), Everything);
        tunnel.tell();
        let replaced = WorkspaceUpdate {
            upserted_agents: vec![agent(12, "next", 1)],
            deleted_agents: vec![agent(11, "main", 1)],
            ..WorkspaceUpdate::default()
        };
        assert_eq!(tunnel.hear(&replaced, Diff), ["+12", "-11"]);
        let next = hosts(&[("dev.coder.", 12), ("next.dev.me.coder.", 12), ("next.dev.alice.coder.", 12)]);
        assert_eq!(tunnel.hosts(), next);
        let told = tunnel.tell().unwrap();
        assert_eq!(told.upserted_agents.iter().map(|it| &it.id).collect::<Vec<_>>(), [&raw(12)]);
        let gone = vpn::Agent {
            id: raw(11),
            name: "main".to_owned(),
            workspace_id: raw(1),
            fqdn: ["dev.coder.", "main.dev.me.coder.", "main.dev.alice.coder."].map(String::from).into(),
            ip_addrs: vec![coder_address(&id(11)).to_string()],
            last_handshake: None,
            last_ping: None,
        };
        assert_eq!(told.deleted_agents, [gone], "it still carries its names");
    }

    /// Conforms: vpn:K6 control:W7
    #[test]
    fn a_snapshot_after_a_reconnect_gives_back_and_forgets_what_it_does_not_list() {
        let mut tunnel = Tunnel::connected();
        tunnel.hear(&snapshot(&[(1, "dev"), (2, "old")], &[(11, "main", 1), (21, "main", 2)]), Everything);
        tunnel.tell();
        tunnel.coordination.disconnected(tunnel.now, |_| None);
        assert_eq!(texts(&tunnel.coordination.connected(tunnel.now)), ["+11", "+21"], "as remembered");
        let kept = hosts(&[("dev.coder.", 11), ("main.dev.me.coder.", 11), ("main.dev.alice.coder.", 11)]);
        assert!(kept.keys().all(|name| tunnel.hosts().contains_key(name)), "until the snapshot comes");

        assert_eq!(tunnel.hear(&snapshot(&[(1, "dev")], &[(11, "main", 1)]), Everything), ["-21"]);
        assert_eq!(tunnel.hosts(), kept);
        let told = tunnel.tell().unwrap();
        assert_eq!(told.deleted_agents.iter().map(|it| &it.id).collect::<Vec<_>>(), [&raw(21)]);
        assert_eq!(told.deleted_workspaces.iter().map(|it| &it.id).collect::<Vec<_>>(), [&raw(2)]);
        assert!(told.upserted_agents.is_empty() && told.upserted_workspaces.is_empty());
    }
}

mod pings {
    use super::*;

    /// The seconds between 1970 and the handshake that these tests tell of.
    const SHOOK_HANDS: u64 = 1_700_000_000;

    /// A tick without news tells nothing: managers keep what they were told (vpn-protocol 7.4, REC).
    ///
    /// Conforms: vpn:T10
    #[test]
    fn a_tick_tells_agents_and_their_handshakes_and_nothing_when_there_is_nothing_new() {
        let mut tunnel = Tunnel::with_agents(&[11]);
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        for tick in 0..3 {
            let shook_hands = SHOOK_HANDS + 120 * tick;
            tunnel.roster.set_handshakes(|_| Some(at(shook_hands)));
            let told = tunnel.tell().unwrap();
            assert_eq!(told.upserted_agents.len(), 1);
            let time = told.upserted_agents[0].last_handshake.unwrap();
            assert_eq!((time.seconds, time.nanos), (i64::try_from(shook_hands).unwrap(), 0));
            let only_agents =
                vpn::PeerUpdate { upserted_agents: told.upserted_agents.clone(), ..<_>::default() };
            assert_eq!(told, only_agents);
            tunnel.roster.set_handshakes(|_| Some(at(shook_hands)));
            assert_eq!(tunnel.tell(), None);
        }
    }

    /// Conforms: vpn:T11
    #[test]
    fn an_answer_is_told_with_its_round_trip_and_the_region_it_came_through() {
        let mut tunnel = Tunnel::with_agents(&[11]);
        let sent = tunnel.ping();
        tunnel.answer(&sent[0], 100 * MS);
        let last_ping = vpn::LastPing {
            latency: Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 }),
            did_p2p: false,
            preferred_derp: "Coder Region".to_owned(),
            preferred_derp_latency: Some(prost_types::Duration { seconds: 0, nanos: 7_000_000 }),
        };
        assert_eq!(tunnel.tell().unwrap().upserted_agents[0].last_ping, Some(last_ping));
    }

    /// Conforms: vpn:T12 vpn:T14
    #[test]
    fn an_agent_that_comes_later_is_pinged_too_and_the_result_of_the_first_stays() {
        let mut tunnel = Tunnel::with_agents(&[11]);
        let sent = tunnel.ping();
        tunnel.answer(&sent[0], 100 * MS);
        tunnel.tell();
        tunnel.add_agent(12);
        let told = tunnel.tell().unwrap();
        assert!(told.upserted_agents.iter().any(|it| it.id == raw(12) && it.last_ping.is_none()));
        assert_eq!(tunnel.latency(id(11)), Some(100 * MS), "what was answered before is still there");

        let sent = tunnel.ping();
        assert_eq!(sent.iter().map(|ping| ping.agent).collect::<Vec<_>>(), [id(12)], "at once");
        tunnel.answer(&sent[0], 30 * MS);
        let told = tunnel.tell().unwrap();
        assert_eq!(told.upserted_agents.iter().map(|it| &it.id).collect::<Vec<_>>(), [&raw(12)]);
        assert_eq!((tunnel.latency(id(11)), tunnel.latency(id(12))), (Some(100 * MS), Some(30 * MS)));
        tunnel.now += TICK;
        assert_eq!(tunnel.ping().len(), 2, "both on the next tick");
    }

    /// Conforms: vpn:T13
    #[test]
    fn an_agent_that_is_gone_is_pinged_and_told_of_no_more() {
        let mut tunnel = Tunnel::with_agents(&[11, 12]);
        let sent = tunnel.ping();
        let gone =
            WorkspaceUpdate { deleted_agents: vec![agent(12, "a12", 1)], ..WorkspaceUpdate::default() };
        tunnel.hear(&gone, Diff);
        tunnel.take_map();
        tunnel.tell();
        for ping in &sent {
            tunnel.answer(ping, 50 * MS);
        }
        let told = tunnel.tell().unwrap();
        assert_eq!(told.upserted_agents.iter().map(|it| &it.id).collect::<Vec<_>>(), [&raw(11)]);
        tunnel.now += TICK;
        assert_eq!(tunnel.ping().iter().map(|ping| ping.agent).collect::<Vec<_>>(), [id(11)]);
    }

    /// Conforms: vpn:T17
    #[test]
    fn slow_answers_delay_no_tick_and_no_result_is_invented() {
        let mut tunnel = Tunnel::with_agents(&[11, 12]);
        let mut last = tunnel.ping();
        for tick in 1..4 {
            tunnel.now += TICK;
            last = tunnel.ping();
            assert_eq!(last.len(), 2, "tick {tick}: everybody is pinged though nobody has answered");
            assert_eq!(tunnel.tell(), None, "tick {tick}: there is nothing to tell");
        }
        tunnel.answer(&last[1], TICK - MS);
        assert_eq!(tunnel.latency(last[1].agent), Some(TICK - MS));
        assert_eq!(tunnel.latency(last[0].agent), None);
        assert_eq!(tunnel.tell().unwrap().upserted_agents.len(), 1);
    }
}

/// What stands between a deployment and a manager, without the parts that move it.
struct Tunnel {
    now: Instant,
    workspaces: Workspaces,
    coordination: Coordination,
    roster: Roster,
    pings: Pings<()>,
    sent: Sent,
    next_txid: u8,
}

impl Tunnel {
    fn connected() -> Self {
        let now = Instant::now();
        let (username, suffix) = ("alice".to_owned(), "coder".to_owned());
        let mut tunnel = Self {
            now,
            workspaces: Workspaces { username, suffix, ..Workspaces::default() },
            coordination: Coordination::default(),
            roster: Roster::default(),
            pings: Pings::new(now),
            sent: Sent::default(),
            next_txid: 0,
        };
        assert_eq!(tunnel.coordination.connected(now), []);
        tunnel
    }

    /// With agents of one workspace, all of them ready, and that was told.
    fn with_agents(numbers: &[u8]) -> Self {
        let mut tunnel = Self::connected();
        tunnel.hear(&snapshot(&[(1, "dev")], &[]), Everything);
        numbers.iter().for_each(|number| tunnel.add_agent(*number));
        tunnel.tell();
        tunnel
    }

    fn add_agent(&mut self, number: u8) {
        let name = format!("a{number}");
        self.hear(&snapshot(&[], &[(number.into(), &name, 1)]), Diff);
        let key = NodePublic([number; 32]);
        let node = tailnet::Node {
            key: Bytes::copy_from_slice(&key.to_binary()),
            disco: DiscoPublic([number; 32]).to_string(),
            preferred_derp: 1,
            ..tailnet::Node::default()
        };
        let update = |kind: Kind, node| PeerUpdate {
            id: raw(number.into()),
            node,
            kind: kind.into(),
            reason: String::new(),
        };
        let peer_updates = vec![update(Kind::Node, Some(node)), update(Kind::ReadyForHandshake, None)];
        let response = CoordinateResponse { peer_updates, error: String::new() };
        assert!(self.coordination.handle_response(self.now, &response, |_| None).map_changed);
        self.take_map();
    }

    fn take_map(&mut self) {
        self.pings.set_peers(self.now, self.coordination.network_map());
    }

    /// Takes an update; says which tunnels are asked for and given back, in order.
    fn hear(&mut self, message: &WorkspaceUpdate, update: Update) -> Vec<String> {
        let applied: Result<(), UpdateError> = self.workspaces.apply(message, update);
        applied.unwrap();
        assert_eq!(self.roster.set_workspaces(&self.workspaces), []);
        let wanted = self.workspaces.agent_ids();
        texts(&self.coordination.set_destinations(self.now, &wanted, update).requests)
    }

    /// What a manager is told now.
    fn tell(&mut self) -> Option<vpn::PeerUpdate> {
        let told = self.sent.difference(self.roster.snapshot());
        self.sent.note_difference(Arc::new(self.roster.snapshot().clone()));
        told
    }

    fn hosts(&self) -> BTreeMap<String, Vec<Ipv6Addr>> {
        let agents = self.roster.snapshot().agents.values();
        agents.flat_map(|it| it.fqdn.iter().map(|name| (name.clone(), it.addresses.clone()))).collect()
    }

    /// Sends what is due.
    fn ping(&mut self) -> Vec<Ping> {
        let next = &mut self.next_txid;
        let due = self.pings.handle_timeout(self.now, || {
            *next += 1;
            [*next; 12]
        });
        due.pings
    }

    /// An answer comes this long from now; it is recorded if it counts.
    fn answer(&mut self, ping: &Ping, after: Duration) {
        self.now += after;
        let Some(answer) = self.pings.handle_pong(&ping.txid, &ping.peer, self.now) else { return };
        let region = RegionId(1);
        let of_map = Region {
            id: region,
            code: String::new(),
            name: "Coder Region".to_owned(),
            embedded: true,
            avoid: false,
            nodes: Vec::new(),
        };
        let map = RelayMap { regions: [(region, of_map)].into(), ..RelayMap::default() };
        let latencies = Report::from([(region, RegionLatency { v4: Some(9 * MS), v6: Some(7 * MS) })]);
        let report = ping::report(answer.latency, Some(region), &map, Some(region), &latencies);
        self.roster.set_ping(&answer.agent, report);
    }

    fn latency(&self, agent: Uuid) -> Option<Duration> {
        let agent = &self.roster.snapshot().agents[&agent];
        agent.last_ping.as_ref().map(|ping| ping.latency)
    }
}

fn hosts(names: &[(&str, u128)]) -> BTreeMap<String, Vec<Ipv6Addr>> {
    names.iter().map(|(name, agent)| ((*name).to_owned(), vec![coder_address(&id(*agent))])).collect()
}

fn texts(requests: &[CoordinateRequest]) -> Vec<String> {
    let text =
        |sign, tunnel: &Destination| format!("{sign}{}", Uuid::from_slice(&tunnel.id).unwrap().as_u128());
    let of = |it: &CoordinateRequest| match (&it.add_tunnel, &it.remove_tunnel) {
        (Some(added), None) => text('+', added),
        (None, Some(removed)) => text('-', removed),
        other => panic!("{other:?}"),
    };
    requests.iter().map(of).collect()
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn raw(number: u128) -> Bytes {
    Bytes::copy_from_slice(id(number).as_bytes())
}

fn agent(number: u128, name: &str, workspace: u128) -> tailnet::Agent {
    tailnet::Agent { id: raw(number), name: name.to_owned(), workspace_id: raw(workspace) }
}

fn snapshot(workspaces: &[(u128, &str)], agents: &[(u128, &str, u128)]) -> WorkspaceUpdate {
    let workspace =
        |it: &(u128, &str)| tailnet::Workspace { id: raw(it.0), name: it.1.to_owned(), status: RUNNING };
    WorkspaceUpdate {
        upserted_workspaces: workspaces.iter().map(workspace).collect(),
        upserted_agents: agents.iter().map(|(it, name, workspace)| agent(*it, name, *workspace)).collect(),
        ..WorkspaceUpdate::default()
    }
}
