//! The peer registry: the one table of who is there. It joins what the control plane lists, what WireGuard
//! says of handshakes and what the pinger heard, and publishes what managers are told.
//!
//! Owns the cells `peers` and `interface`. A successor restores the table from the cell: pings and handshakes
//! survive a crash. It never asks anyone but the data plane.

use std::{collections::BTreeMap, net::Ipv6Addr, sync::Arc, time::Duration};

use metrics::{Gauge, counter, gauge};
use tokio::time::Instant;
use uuid::Uuid;
use warren_core::roster::{AgentEntry, PingReport, Roster, Snapshot};
use warren_observability::names;
use warren_proto::{key::NodePublic, vpn::workspace::Status};

use crate::{
    data_plane::PathChange,
    facts::{InterfaceConfig, Net},
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

    /// For people: by the agent's name, which the data plane does not know.
    fn tell_of_path(&self, state: &State, change: &PathChange) {
        let map = self.net.network_map.get();
        let Some((id, _)) = map.peers.iter().find(|(_, peer)| peer.node_key == change.peer) else { return };
        let agent = state.roster.snapshot().agents.get(id).and_then(|agent| agent.fqdn.first());
        let agent = agent.map_or_else(|| id.to_string(), |name| name.trim_end_matches('.').to_owned());
        match (change.from, change.to) {
            (None, Some(to)) => tracing::info!(agent, %to, "an agent is reached directly"),
            (Some(from), Some(to)) => {
                tracing::info!(agent, %from, %to, "an agent is reached by another direct path")
            }
            (Some(from), None) => tracing::info!(agent, %from, "an agent is reached by relay again"),
            (None, None) => {}
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

impl Part for Registry {
    type Message = Message;
    type State = State;

    async fn start(&self, context: &Context<Message>) -> Result<State, PartError> {
        let peers = self.net.peers.claim()?;
        self.net.interface.claim()?.set_if_changed(Some(self.interface()));
        context.follow(self.net.workspaces.view(), || Message::WorkspacesChanged);
        context.tick(TICK, || Message::Tick);
        let roster = Roster::restore(Snapshot::clone(&peers.get()));
        Ok(State { roster, peers, gauges: Gauges::default(), is_gathering: false, published_at: None })
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
            Message::PathChanged(change) => self.tell_of_path(state, &change),
            Message::Handshake(_) | Message::Tick => self.gather(context, state),
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
    use warren_core::roster::{Workspace, Workspaces};

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
