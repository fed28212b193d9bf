//! The peer registry: the one table of who is there. It joins what the control plane lists, what WireGuard
//! says of handshakes and what the pinger heard, and publishes what managers are told.
//!
//! Owns the cells `peers`, `interface` and `paths`. A successor restores the table from the cell: pings and handshakes
//! survive a crash. It never asks anyone but the data plane.

use std::{
    collections::BTreeMap,
    net::Ipv6Addr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use metrics::{Gauge, counter, gauge};
use tokio::time::Instant;
use uuid::Uuid;
use warren_core::{
    path_news::{PathEvent, PathNews},
    roster::{AgentEntry, PingReport, Roster, Snapshot},
};
use warren_observability::names;
use warren_proto::{key::NodePublic, vpn::workspace::Status};

use crate::{
    data_plane::PathChange,
    facts::{InterfaceConfig, Net, PathLog},
    runtime::{CellWriter, Context, Part, PartError},
};

/// How often handshakes are read and, if anything changed, published (vpn-protocol 7.4).
const TICK: Duration = Duration::from_secs(5);
/// Inner MTU everywhere (tailnet-data 13).
const MTU: u32 = 1280;
/// The only prefix that leads into the tunnel (tailnet-control 6).
const CODER_ROUTE: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 0, 0, 0, 0, 0), 48);
/// Facts that arrive within this are published together: at the start of a thousand agents each has news.
const PAUSE: Duration = Duration::from_millis(50);
/// Changes of paths that are logged one by one within a tick: those of a thousand agents can come together.
const MAX_LINES: usize = 64;

/// What the registry hears.
#[derive(Debug)]
pub enum Message {
    /// The workspaces changed; which is in the cell.
    WorkspacesChanged,
    /// An agent answered a ping.
    Pinged {
        /// The agent.
        agent: Uuid,
        /// How.
        report: PingReport,
    },
    /// A handshake with this peer was completed.
    Handshake(NodePublic),
    /// Another way to a peer is taken.
    PathChanged(PathChange),
    /// It is time to read the handshakes.
    Tick,
    /// It is time to publish what was gathered.
    Publish,
}

/// The part.
pub struct Registry {
    net: Arc<Net>,
}

/// One incarnation of the registry.
pub struct State {
    roster: Roster,
    peers: CellWriter<Snapshot>,
    paths: CellWriter<PathLog>,
    news: PathNews,
    /// Changes of paths that were told since the last tick.
    lines: usize,
    gauges: Gauges,
    /// Whether a publication is due anyway.
    is_gathering: bool,
    published_at: Option<Instant>,
}

impl Registry {
    /// For one Boot.
    pub fn new(net: Arc<Net>) -> Self {
        Self { net }
    }

    fn interface(&self) -> InterfaceConfig {
        InterfaceConfig { address: self.net.identity.address, routes: vec![CODER_ROUTE], mtu: MTU }
    }

    fn take_change(&self, state: &mut State, change: &PathChange) {
        let map = self.net.network_map.get();
        let Some((agent, _)) = map.peers.iter().find(|(_, peer)| peer.node_key == change.peer) else {
            return;
        };
        let PathChange { from, to, why, .. } = *change;
        let event = PathEvent { agent: *agent, from, to, why, changes: 1 };
        if let Some(event) = state.news.handle_change(std::time::Instant::now(), event) {
            state.tell(vec![event]);
        }
    }

    /// Publishes at once, or soon where something was published a moment ago.
    fn gather(&self, context: &Context<Message>, state: &mut State) {
        if state.is_gathering {
            return;
        }
        let Some(wait) = state.published_at.and_then(|at| PAUSE.checked_sub(at.elapsed())) else {
            return self.publish(state);
        };
        state.is_gathering = true;
        let me = context.me.clone();
        context.tasks.spawn(async move {
            tokio::time::sleep(wait).await;
            let _ = me.send(Message::Publish).await;
        });
    }

    fn publish(&self, state: &mut State) {
        let (map, data_plane) = (self.net.network_map.get(), &self.net.data_plane);
        state
            .roster
            .set_handshakes(|agent| data_plane.stats_of(&map.peers.get(agent)?.node_key)?.last_handshake);
        state.published_at = Some(Instant::now());
        if state.peers.set_if_changed(state.roster.snapshot().clone()) {
            state.gauges.show(state.roster.snapshot());
        }
    }
}

impl State {
    /// Tells of the paths that changed several times, and of how many were not logged.
    fn tell_held_news(&mut self) {
        if let Some(more) = self.lines.checked_sub(MAX_LINES).filter(|more| *more > 0) {
            tracing::debug!(agents = more, "more agents are reached by another way than before");
        }
        self.lines = 0;
        let due = self.news.handle_timeout(std::time::Instant::now());
        self.tell(due);
    }

    fn tell(&mut self, events: Vec<PathEvent>) {
        if events.is_empty() {
            return;
        }
        for event in &events {
            self.lines += 1;
            if self.lines <= MAX_LINES {
                self.log(event);
            }
        }
        let mut log = PathLog::clone(&self.paths.get());
        log.add(SystemTime::now(), events);
        self.paths.set(log);
    }

    /// For people: by the agent's name, which the data plane does not know.
    fn log(&self, event: &PathEvent) {
        let PathEvent { agent: id, from, to, why, changes } = event;
        let agent = self.roster.snapshot().agents.get(id).and_then(|agent| agent.fqdn.first());
        let agent = agent.map_or_else(|| id.to_string(), |name| name.trim_end_matches('.').to_owned());
        let reason = why.label();
        match (from, to) {
            (None, Some(to)) => tracing::debug!(agent, %to, reason, changes, "an agent is reached directly"),
            (Some(from), Some(to)) if from == to => {
                tracing::debug!(agent, %to, reason, changes, "an agent is reached by the same direct path again");
            }
            (Some(from), Some(to)) => {
                tracing::debug!(agent, %from, %to, reason, changes, "an agent is reached by another direct path");
            }
            (Some(from), None) => {
                tracing::debug!(agent, %from, reason, changes, "an agent is reached by relay again");
            }
            (None, None) => tracing::debug!(agent, reason, changes, "a direct path to an agent did not last"),
        }
    }
}

impl Part for Registry {
    type Message = Message;
    type State = State;

    async fn start(&self, context: &Context<Message>) -> Result<State, PartError> {
        let peers = self.net.peers.claim()?;
        self.net.interface.claim()?.set_if_changed(Some(self.interface()));
        context.follow(self.net.workspaces.view(), || Message::WorkspacesChanged);
        context.tick(TICK, || Message::Tick);
        let roster = Roster::restore(Snapshot::clone(&peers.get()));
        Ok(State {
            roster,
            peers,
            paths: self.net.paths.claim()?,
            news: PathNews::default(),
            lines: 0,
            gauges: Gauges::default(),
            is_gathering: false,
            published_at: None,
        })
    }

    async fn handle(
        &self,
        context: &Context<Message>,
        state: &mut State,
        message: Message,
    ) -> Result<(), PartError> {
        match message {
            Message::WorkspacesChanged => {
                for left_out in state.roster.set_workspaces(&self.net.workspaces.get()) {
                    let (agent, error) = (left_out.agent, left_out.error);
                    tracing::error!(%agent, %error, "an agent cannot have a name and is left out");
                }
                self.publish(state);
            }
            Message::Pinged { agent, report } => {
                let before = state.roster.snapshot().agents.get(&agent).map(connection_type);
                if state.roster.set_ping(&agent, report) {
                    let after = state.roster.snapshot().agents.get(&agent).map(connection_type);
                    count_change(before, after);
                    self.gather(context, state);
                }
            }
            Message::PathChanged(change) => self.take_change(state, &change),
            Message::Handshake(_) => self.gather(context, state),
            Message::Tick => {
                state.tell_held_news();
                self.gather(context, state);
            }
            Message::Publish => {
                state.is_gathering = false;
                self.publish(state);
            }
        }
        Ok(())
    }
}

/// How the last ping reached an agent, as metrics name it.
pub fn connection_type(agent: &AgentEntry) -> &'static str {
    match &agent.last_ping {
        Some(ping) if ping.direct => "p2p",
        Some(_) => "derp",
        None => "none",
    }
}

fn count_change(before: Option<&'static str>, after: Option<&'static str>) {
    if let (Some(from), Some(to)) = (before, after)
        && from != to
    {
        counter!(names::PATH_CHANGES, "from" => from, "to" => to).increment(1);
    }
}

/// The handles of what the table shows in metrics, by label.
#[derive(Default)]
struct Gauges {
    peers: BTreeMap<&'static str, Gauge>,
    workspaces: BTreeMap<&'static str, Gauge>,
}

impl Gauges {
    fn show(&mut self, snapshot: &Snapshot) {
        let agents = snapshot.agents.values().map(connection_type);
        let statuses = snapshot.workspaces.values().map(|workspace| status_label(workspace.status));
        set(&mut self.peers, names::PEERS, "connection_type", &["p2p", "derp", "none"], agents);
        set(&mut self.workspaces, names::WORKSPACES, "status", &["running"], statuses);
    }
}

/// Sets each label's count; a label that was shown once is shown as 0 from then on.
fn set(
    gauges: &mut BTreeMap<&'static str, Gauge>,
    name: &'static str,
    label: &'static str,
    always: &[&'static str],
    values: impl Iterator<Item = &'static str>,
) {
    let mut counts: BTreeMap<&'static str, u32> = always.iter().map(|value| (*value, 0)).collect();
    values.for_each(|value| *counts.entry(value).or_default() += 1);
    for value in counts.keys() {
        gauges.entry(value).or_insert_with(|| gauge!(name, label => *value));
    }
    for (value, gauge) in gauges {
        gauge.set(f64::from(counts.get(value).copied().unwrap_or_default()));
    }
}

/// Numbers that this schema does not name count as unknown.
fn status_label(status: i32) -> &'static str {
    Status::try_from(status).unwrap_or_default().label()
}

#[cfg(test)]
mod tests {
    use warren_core::{
        coordination::{NetworkMap, Peer},
        path::Why,
        relay_map::RegionId,
        roster::{Workspace, Workspaces},
    };
    use warren_proto::key::DiscoPublic;

    use super::*;
    use crate::{facts::NetworkOwner, relay::tests::net, runtime::Tasks};

    #[tokio::test]
    async fn the_table_is_what_the_control_plane_lists_and_what_pings_found() {
        let mut setting = Setting::new(Arc::new(net(NetworkOwner::Nobody))).await;
        setting.list(&[("dev", 1)]);
        setting.hear(Message::WorkspacesChanged).await;
        assert_eq!(setting.agent(1).unwrap().fqdn[0], "dev.coder.");
        setting.hear(Message::Pinged { agent: Uuid::from_u128(1), report: report() }).await;
        setting.hear(Message::Publish).await;
        assert_eq!(setting.agent(1).unwrap().last_ping, Some(report()));
    }

    #[tokio::test]
    async fn a_successor_remembers_the_pings_of_agents_that_stay() {
        let mut setting = Setting::new(Arc::new(net(NetworkOwner::Nobody))).await;
        setting.list(&[("dev", 1), ("test", 2)]);
        setting.hear(Message::WorkspacesChanged).await;
        setting.hear(Message::Pinged { agent: Uuid::from_u128(1), report: report() }).await;
        setting.hear(Message::Publish).await;
        let net = Arc::clone(&setting.part.net);
        drop(setting);
        let mut setting = Setting::new(net).await;
        setting.list(&[("dev", 1)]);
        setting.hear(Message::WorkspacesChanged).await;
        assert_eq!(setting.agent(1).unwrap().last_ping, Some(report()));
        assert!(setting.agent(2).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_results_is_published_together() {
        let mut setting = Setting::new(Arc::new(net(NetworkOwner::Nobody))).await;
        setting.list(&[("dev", 1)]);
        setting.hear(Message::WorkspacesChanged).await;
        let before = setting.part.net.peers.view().generation();
        for millis in 0..100 {
            let report = PingReport { latency: Duration::from_millis(millis), ..report() };
            setting.hear(Message::Pinged { agent: Uuid::from_u128(1), report }).await;
        }
        assert_eq!(setting.part.net.peers.view().generation(), before);
        setting.hear(Message::Publish).await;
        assert_eq!(setting.part.net.peers.view().generation(), before + 1);
        assert_eq!(setting.agent(1).unwrap().last_ping.unwrap().latency, Duration::from_millis(99));
    }

    #[tokio::test]
    async fn who_follows_paths_is_told_of_each_change_by_agent_and_of_a_peer_that_is_gone_nothing() {
        let mut setting = Setting::new(Arc::new(net(NetworkOwner::Nobody))).await;
        let (key, stranger) = (NodePublic([1; 32]), NodePublic([2; 32]));
        let peer = Peer {
            node_key: key,
            disco_key: DiscoPublic([1; 32]),
            home: RegionId(1),
            addresses: Vec::new(),
            keepalive: true,
            endpoints: Vec::new(),
            announcements: 1,
        };
        let peers = [(Uuid::from_u128(1), peer)].into();
        setting.part.net.network_map.claim().unwrap().set(NetworkMap { peers });
        let to = "192.0.2.1:41641".parse().ok();
        for (peer, from, to, why) in
            [(stranger, None, to, Why::Found), (key, None, to, Why::Found), (key, to, None, Why::Dead)]
        {
            setting.hear(Message::PathChanged(PathChange { peer, from, to, why })).await;
        }
        let log = setting.part.net.paths.get();
        let told: Vec<_> = log.after(0).map(|(_, event)| (event.agent, event.to, event.why)).collect();
        assert_eq!(told, [(Uuid::from_u128(1), to, Why::Found)], "the second within 10 s waits");
        assert_eq!((log.newest, log.after(1).count(), log.after(9).count()), (1, 0, 0));
    }

    #[test]
    fn the_log_of_paths_keeps_the_latest_and_their_numbers() {
        let mut log = PathLog::default();
        let event =
            |id| PathEvent { agent: Uuid::from_u128(id), from: None, to: None, why: Why::Found, changes: 1 };
        (0..1000).for_each(|id| log.add(SystemTime::now(), vec![event(id)]));
        assert_eq!(log.newest, 1000);
        assert_eq!(log.after(998).map(|it| it.1).collect::<Vec<_>>(), [event(998), event(999)]);
        assert_eq!(log.after(0).count(), 256);
    }

    /// Conforms: vpn:15.17
    #[tokio::test]
    async fn the_interface_has_our_address_and_the_one_route() {
        let setting = Setting::new(Arc::new(net(NetworkOwner::Nobody))).await;
        let interface = setting.part.net.interface.get().as_ref().clone().unwrap();
        assert_eq!(interface.address, setting.part.net.identity.address);
        assert_eq!(interface.routes, [("fd60:627a:a42b::".parse().unwrap(), 48)]);
        assert_eq!(interface.mtu, 1280);
    }

    struct Setting {
        part: Registry,
        context: Context<Message>,
        state: State,
    }

    impl Setting {
        async fn new(net: Arc<Net>) -> Self {
            let context = Context { me: net.registry.clone(), tasks: Tasks::default() };
            let part = Registry::new(net);
            let state = part.start(&context).await.unwrap();
            Self { part, context, state }
        }

        async fn hear(&mut self, message: Message) {
            self.part.handle(&self.context, &mut self.state, message).await.unwrap();
        }

        fn list(&self, agents: &[(&str, u128)]) {
            let workspace = |(name, agent): &(&str, u128)| Workspace {
                name: (*name).to_owned(),
                status: 3,
                agents: [(Uuid::from_u128(*agent), "main".to_owned())].into(),
            };
            let workspaces = agents.iter().map(|it| (Uuid::from_u128(it.1 << 64), workspace(it))).collect();
            let (username, suffix) = ("alice".to_owned(), "coder".to_owned());
            let present = Workspaces { username, suffix, known: true, workspaces };
            self.part.net.workspaces.claim().unwrap().set(present);
        }

        fn agent(&self, id: u128) -> Option<warren_core::roster::AgentEntry> {
            self.part.net.peers.get().agents.get(&Uuid::from_u128(id)).cloned()
        }
    }

    fn report() -> PingReport {
        let latency = Duration::from_millis(7);
        PingReport { latency, direct: false, region_name: "Lab".to_owned(), region_latency: None }
    }
}
