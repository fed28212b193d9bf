//! What this process tells its service over the private link. It only reads what the parts publish; a ping
//! alone asks one of them.

use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use uuid::Uuid;
use warren_actors::{
    facts::{LinkState, Net, NetworkOwner, RelayLink},
    pinger, registry,
    runtime::Cell,
};
use warren_core::{
    netcheck::{Mappings, Report},
    path::Direct,
    path_news,
    roster::PingReport,
};
use warren_observability::{agents, exporter::Exporter, netcheck as netcheck_series, regions};
use warren_proto::link::{
    Netcheck, PathEvents, TunnelStatus, netcheck::Region, path_events::PathEvent, tunnel_status::Relay,
};

use super::TunnelArgs;
use crate::{
    link::{AgentPing, Answers, PingBy},
    tree::{NodeInfo, Tree},
};

/// What people may expect and this build does not have.
const ABSENT: &[&str] = &["host names (use the addresses)"];
/// What is missing besides where no sockets could be had.
const NO_SOCKETS: &str = "direct paths (there are no UDP sockets; everything is relayed)";
/// What is missing besides where there is no device.
const NO_DEVICE: &str = "a device (only pings work)";
/// The pinger counts the limit itself, and its word that there was no answer should still arrive.
const PING_MARGIN: Duration = Duration::from_secs(1);

/// The answers of one tunnel process.
pub(super) struct Own {
    tree: Tree,
    net: Cell<Option<Arc<Net>>>,
    exporter: Exporter,
    allow_faults: bool,
    agent_metrics: bool,
}

impl Own {
    /// Over these.
    pub(super) fn new(
        tree: Tree,
        net: Cell<Option<Arc<Net>>>,
        exporter: Exporter,
        args: &TunnelArgs,
    ) -> Self {
        let TunnelArgs { allow_faults, agent_metrics, .. } = *args;
        Self { tree, net, exporter, allow_faults, agent_metrics }
    }
}

impl Answers for Own {
    fn exposition(&self) -> String {
        self.tree.measure();
        let mut text = self.exporter.render();
        if let Some(net) = self.net.get().as_ref() {
            text.push_str(&region_metrics(net));
            text.push_str(&netcheck_metrics(net));
            if self.agent_metrics {
                text.push_str(&agent_metrics(net));
            }
        }
        text
    }

    fn tree(&self) -> Vec<NodeInfo> {
        self.tree.snapshot()
    }

    fn status(&self) -> TunnelStatus {
        self.net.get().as_ref().as_ref().map_or_else(idle, |net| status(net))
    }

    fn path_events(&self, after: u64) -> PathEvents {
        let log = self.net.get().as_ref().as_ref().map(|net| net.paths.get());
        log.map_or_else(PathEvents::default, |log| PathEvents {
            newest: log.newest,
            events: log.after(after).map(path_event).collect(),
        })
    }

    fn ping(
        &self,
        agent: Uuid,
        by: PingBy,
        limit: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<AgentPing, String>> + Send>> {
        let pinger = self.net.get().as_ref().as_ref().map(|net| net.pinger.clone());
        Box::pin(async move {
            let pinger = pinger.ok_or("the tunnel is not started")?;
            let wait = limit + PING_MARGIN;
            match by {
                PingBy::Disco => {
                    let question = |reply| pinger::Message::PingNow { agent, limit, reply };
                    let answer = pinger.ask(wait, question).await.map_err(|error| error.to_string())?;
                    let PingReport { latency, direct, region_name, .. } =
                        answer.map_err(|error| error.to_string())?;
                    Ok(AgentPing { latency, direct, region: region_name })
                }
                PingBy::Tsmp => {
                    let question = |reply| pinger::Message::Reach { agent, limit, reply };
                    let answer = pinger.ask(wait, question).await.map_err(|error| error.to_string())?;
                    let latency = answer.map_err(|error| error.to_string())?;
                    Ok(AgentPing { latency, ..AgentPing::default() })
                }
            }
        })
    }

    fn fault(&self, actor: &str, kind: &str) {
        if self.allow_faults {
            self.force(actor, kind);
        } else {
            tracing::warn!(actor, kind, "a fault was asked for, which is not allowed here");
        }
    }
}

/// Of the regions of the present map, whatever was measured or connected before.
fn region_metrics(net: &Net) -> String {
    let (map, links, latencies) = (net.relay_map.get(), net.relays.get(), net.latencies.get());
    regions::render(map.regions.keys().map(|region| regions::Region {
        id: region.0,
        is_connected: links.get(region).map(|link| matches!(link, RelayLink::Up { .. })),
        latency: latencies.get(region).and_then(|latency| latency.best()),
    }))
}

fn netcheck_metrics(net: &Net) -> String {
    let seen = net.netcheck.get();
    let report = seen.report.as_ref();
    netcheck_series::render(&netcheck_series::Netcheck {
        direct_allowed: *net.direct.get() == Direct::Allowed && net.data_plane.local_ports().is_some(),
        at: report.map(|(at, _)| *at),
        udp: report.and_then(|(_, report)| udp(report)),
        varies: seen.mappings.varies_by_destination,
    })
}

/// Whether UDP gets out and back; `None` where nobody could be asked.
fn udp(report: &Report) -> Option<bool> {
    let was_asked = report.can_send_v4.is_some() || report.can_send_v6.is_some();
    (report.has_udp() || was_asked).then_some(report.has_udp())
}

fn agent_metrics(net: &Net) -> String {
    let (peers, map, stats) = (net.peers.get(), net.network_map.get(), net.data_plane.stats());
    agents::render(peers.agents.iter().map(|(id, agent)| {
        let workspace = peers.workspaces.get(&agent.workspace_id);
        let stats = map.peers.get(id).and_then(|peer| stats.get(&peer.node_key)).copied().unwrap_or_default();
        agents::Agent {
            workspace: workspace.map_or("", |workspace| &workspace.name),
            name: &agent.name,
            connection_type: registry::connection_type(agent),
            latency: agent.last_ping.as_ref().map(|ping| ping.latency),
            last_handshake: agent.last_handshake,
            received_bytes: stats.received_bytes,
            sent_bytes: stats.sent_bytes,
        }
    }))
}

impl Own {
    #[cfg(feature = "faults")]
    fn force(&self, actor: &str, kind: &str) {
        match kind.parse() {
            Ok(kind) if self.tree.inject(actor, kind) => tracing::warn!(actor, ?kind, "a fault is forced"),
            Ok(_) => tracing::warn!(actor, "there is no such part to force a fault into"),
            Err(error) => tracing::warn!(actor, %error, "a fault cannot be forced"),
        }
    }

    #[cfg(not(feature = "faults"))]
    fn force(&self, actor: &str, kind: &str) {
        tracing::warn!(actor, kind, "a fault was asked for, which this build cannot force");
    }
}

fn path_event((at, event): &(SystemTime, path_news::PathEvent)) -> PathEvent {
    let address = |address: Option<SocketAddr>| address.map(|it| it.to_string()).unwrap_or_default();
    PathEvent {
        at: Some((*at).into()),
        agent_id: event.agent.as_bytes().to_vec().into(),
        from: address(event.from),
        to: address(event.to),
        reason: event.why.label().to_owned(),
        changes: event.changes,
    }
}

fn idle() -> TunnelStatus {
    TunnelStatus { control: "idle".to_owned(), absent: absent(None), ..TunnelStatus::default() }
}

fn status(net: &Net) -> TunnelStatus {
    let (control, control_error) = match net.link.get().as_ref() {
        LinkState::Connecting => ("connecting", String::new()),
        LinkState::Up { .. } => ("up", String::new()),
        LinkState::Waiting { error, .. } => ("waiting", error.clone()),
        LinkState::Refused { error } => ("refused", error.clone()),
    };
    let (map, home) = (net.relay_map.get(), *net.home.get());
    let home_latency = home.and_then(|home| net.latencies.get().get(&home)?.best());
    let relay = |(region, link): (&_, &RelayLink)| {
        let (state, error) = match link {
            RelayLink::Dialing => ("dialing", String::new()),
            RelayLink::Up { .. } => ("up", String::new()),
            RelayLink::Down { error } => ("down", error.clone()),
        };
        Relay { region: map.region_name(Some(*region)), state: state.to_owned(), error }
    };
    TunnelStatus {
        control: control.to_owned(),
        control_error,
        home_region: home.map(|home| map.region_name(Some(home))).unwrap_or_default(),
        home_latency: home_latency.and_then(|latency| latency.try_into().ok()),
        relays: net.relays.get().iter().map(relay).collect(),
        absent: absent(Some(net)),
        netcheck: netcheck(net),
    }
}

fn netcheck(net: &Net) -> Option<Netcheck> {
    let (seen, map, home) = (net.netcheck.get(), net.relay_map.get(), *net.home.get());
    let (at, report) = seen.report.as_ref()?;
    let region = |region: &warren_core::relay_map::Region| {
        let latency = report.latencies.get(&region.id).copied().unwrap_or_default();
        let [v4, v6] = [latency.v4, latency.v6].map(|it| it.and_then(|it| it.try_into().ok()));
        Region { name: region.name.clone(), v4, v6, home: Some(region.id) == home }
    };
    let Mappings { v4, v6, varies_by_destination } = seen.mappings;
    Some(Netcheck {
        at: Some((*at).into()),
        mapped_v4: v4.map(|it| it.to_string()).unwrap_or_default(),
        mapped_v6: v6.map(|it| it.to_string()).unwrap_or_default(),
        varies_by_destination,
        udp: udp(report),
        direct_allowed: *net.direct.get() == Direct::Allowed,
        endpoints: net.endpoints.get().iter().map(ToString::to_string).collect(),
        regions: map.relay_regions().map(region).collect(),
    })
}

fn absent(net: Option<&Net>) -> Vec<String> {
    let no_device = net.is_some_and(|net| net.boot.network == NetworkOwner::Nobody);
    let no_sockets = net.is_some_and(|net| net.data_plane.local_ports().is_none());
    let here = [(no_device, &NO_DEVICE), (no_sockets, &NO_SOCKETS)];
    let here = here.into_iter().filter_map(|(is_missing, what)| is_missing.then_some(what));
    ABSENT.iter().chain(here).map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use warren_actors::facts::Seen;
    use warren_core::relay_map::{Region, RegionId, RelayMap};

    use super::*;
    use crate::tunnel::net::{
        assemble,
        tests::{boot, means},
    };

    #[test]
    fn a_tunnel_that_is_not_started_is_idle() {
        assert_eq!(idle().control, "idle");
        assert_eq!(idle().absent.len(), ABSENT.len());
    }

    #[tokio::test]
    async fn status_says_how_control_and_relays_stand_and_what_is_absent() {
        let net = assemble(boot(1, NetworkOwner::Nobody), &means()).await.unwrap();
        let error = "no route".to_owned();
        net.link.claim().unwrap().set(LinkState::Waiting { error: error.clone(), retry_in: Duration::ZERO });
        let region = RegionId(7);
        net.home.claim().unwrap().set(Some(region));
        net.relays.claim().unwrap().set([(region, RelayLink::Down { error: error.clone() })].into());

        let status = status(&net);

        assert_eq!((status.control.as_str(), &status.control_error), ("waiting", &error));
        let relay = Relay { region: status.home_region.clone(), state: "down".to_owned(), error };
        assert_eq!(status.relays, [relay]);
        assert!(status.absent.iter().any(|absent| absent == NO_DEVICE));
        net.data_plane.stop().await;
    }

    #[tokio::test]
    async fn a_region_that_has_left_the_relay_map_has_no_metrics_any_more() {
        let net = assemble(boot(1, NetworkOwner::Nobody), &means()).await.unwrap();
        let map = |numbers: &[u16]| {
            let region = |number: &u16| Region {
                id: RegionId(*number),
                code: String::new(),
                name: String::new(),
                avoid: false,
                embedded: false,
                nodes: Vec::new(),
            };
            let regions = numbers.iter().map(region).map(|region| (region.id, region)).collect();
            RelayMap { regions, ..RelayMap::default() }
        };
        let relay_map = net.relay_map.claim().unwrap();
        net.relays
            .claim()
            .unwrap()
            .set([(RegionId(7), RelayLink::Dialing), (RegionId(8), RelayLink::Dialing)].into());
        relay_map.set(map(&[7, 8]));
        assert!(region_metrics(&net).contains("region=\"7\"} 0"));
        relay_map.set(map(&[8]));
        let text = region_metrics(&net);
        assert!(!text.contains("region=\"7\"") && text.contains("region=\"8\""), "{text}");
        net.data_plane.stop().await;
    }

    #[tokio::test]
    async fn what_netcheck_found_out_is_in_the_metrics_and_what_nobody_could_be_asked_is_not() {
        let net = assemble(boot(1, NetworkOwner::Nobody), &means()).await.unwrap();
        let looked = net.netcheck.claim().unwrap();
        let mut report = Report::default();
        looked.set(Seen { report: Some((SystemTime::now(), report.clone())), ..Seen::default() });
        let text = netcheck_metrics(&net);
        assert!(text.contains("warren_direct_allowed{process=\"tunnel\"} 1"), "{text}");
        assert!(text.contains("warren_netcheck_last_timestamp_seconds") && !text.contains("_udp"), "{text}");
        report.can_send_v4 = Some(true);
        looked.set(Seen { report: Some((SystemTime::now(), report)), ..Seen::default() });
        assert!(netcheck_metrics(&net).contains("warren_netcheck_udp{process=\"tunnel\"} 0"));
        net.data_plane.stop().await;
    }
}
