//! The relay: which regions we hold links to, which of them is our home, and how far each is.
//!
//! It only decides. Links dial, log in and reconnect by themselves in the data plane, and stay up when this
//! part crashes; its successor reads [`DataPlane::links`](crate::data_plane::DataPlane::links) and the cells,
//! and reconciles. Writes the cells `relays`, `forced_websocket`, `home` and `latencies`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue};
use secrecy::ExposeSecret;
use warren_core::{
    home::{self, HomeLink, Homes, RegionLatency},
    netcheck::{RunId, Trigger, Unsent},
    relay_map::{Region, RegionId, RelayMap},
};

use warren_proto::stun;

use crate::{
    data_plane::{LinkChange, LinkInfo, LinkTarget, StunAnswer},
    facts::{Net, RelayLink},
    pinger,
    runtime::{CellWriter, Context, Part, PartError},
};

pub(crate) mod frames;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod latency;
pub mod link;
pub(crate) mod queue;
pub mod request;
mod survey;
pub mod upgrade;

use latency::Probe;
pub use latency::Stage;
use request::Headers;
use survey::Survey;

/// A link that nobody needs is closed when nothing was sent through it for this long (tailnet-data 4).
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// How often idle links and measurements that are due are looked for.
const TICK: Duration = Duration::from_secs(5);
/// A home whose link was silent for longer is not healthy (tailnet-data 8.6).
const HEALTHY_SILENCE: Duration = Duration::from_secs(120);

/// Links at the same time, home first. Each holds up to 1.5 MB; deployments have a handful of regions.
const MAX_LINKS: usize = 32;

/// Regions whose reason is told; each is about 1 KiB of our node.
const MAX_REASONS: usize = 64;

const TOKEN_HEADER: HeaderName = HeaderName::from_static("coder-session-token");

/// What the relay hears.
#[derive(Debug)]
pub enum Message {
    /// A link became something else; what is in [`DataPlane::links`](crate::data_plane::DataPlane::links).
    LinkChanged {
        /// Its region.
        region: RegionId,
        /// What it became.
        change: LinkChange,
    },
    /// The relay map, the network map or the families of addresses changed; which is in the cells.
    MapChanged,
    /// A measurement of its own has results.
    Measured {
        /// Which measurement; an older one than the present is ignored.
        run: RunId,
        /// How much of it this is.
        stage: Stage,
        /// The results.
        report: home::Report,
    },
    /// A STUN server answered.
    Stun(StunAnswer),
    /// A question to a STUN server could not be sent.
    StunUnsent {
        /// Which one.
        txid: stun::TxId,
        /// Why.
        why: Unsent,
    },
    /// What is known of where we are is too old: a peer is to be told it, or this machine has other addresses besides
    /// those that matter.
    EndpointsWanted,
    /// It is time for whatever netcheck has due.
    SurveyDue,
    /// Time passes.
    Tick,
    /// The network may have changed: asks every link whether it is alive, and measures anew.
    NetworkChanged,
    /// The sockets were bound anew: what was found out of those before is worth nothing.
    SocketsBound,
}

/// The part.
pub struct RelayPart {
    net: Arc<Net>,
}

/// One incarnation of the part.
pub struct State {
    homes: Homes,
    map: Arc<RelayMap>,
    relays: CellWriter<BTreeMap<RegionId, RelayLink>>,
    forced_websocket: CellWriter<BTreeMap<RegionId, String>>,
    home: CellWriter<Option<RegionId>>,
    latencies: CellWriter<BTreeMap<RegionId, RegionLatency>>,
    survey: Survey,
}

impl Part for RelayPart {
    type Message = Message;
    type State = State;

    async fn start(&self, context: &Context<Message>) -> Result<State, PartError> {
        let home = self.net.home.claim()?;
        let state = State {
            homes: Homes::new(*home.get(), self.seed()),
            map: Arc::default(),
            relays: self.net.relays.claim()?,
            forced_websocket: self.net.forced_websocket.claim()?,
            home,
            latencies: self.net.latencies.claim()?,
            survey: Survey::new(self.net.netcheck.claim()?),
        };
        context.follow(self.net.relay_map.view(), || Message::MapChanged);
        context.follow(self.net.network_map.view(), || Message::MapChanged);
        context.follow(self.net.families.view(), || Message::MapChanged);
        context.tick(TICK, || Message::Tick);
        Ok(state)
    }

    async fn handle(
        &self,
        context: &Context<Message>,
        state: &mut State,
        message: Message,
    ) -> Result<(), PartError> {
        match message {
            Message::MapChanged => self.take_maps(state),
            Message::LinkChanged { change, .. } => {
                self.publish(state);
                match change {
                    LinkChange::Up => {
                        // If this is lost, silent agents are pinged again soon.
                        let _ = self.net.pinger.try_send(pinger::Message::PathUp);
                    }
                    LinkChange::Down => state.survey.trigger(Trigger::Refresh),
                    LinkChange::Dialing | LinkChange::Closed => {}
                }
            }
            Message::Measured { run, stage, report } => match stage {
                // The first answers only serve who has no home yet: it would be unfair to the slower ones.
                Stage::First if state.homes.home().is_none() && run == state.survey.run() => {
                    self.take_latencies(state, &report);
                }
                Stage::First => {}
                Stage::Complete => state.survey.take_latencies(run, &report),
            },
            Message::Stun(answer) => state.survey.take_stun(&answer),
            Message::StunUnsent { txid, why } => state.survey.take_unsent(&txid, why),
            Message::EndpointsWanted => state.survey.trigger(Trigger::Refresh),
            Message::SurveyDue => {}
            Message::Tick => self.reconcile(state),
            Message::NetworkChanged => {
                // A probed link forgets why it uses a WebSocket.
                self.publish(state);
                self.net.data_plane.probe_links();
                state.survey.trigger(Trigger::NetworkChanged);
            }
            Message::SocketsBound => state.survey.trigger(Trigger::NetworkChanged),
        }
        self.survey(context, state);
        Ok(())
    }
}

impl RelayPart {
    /// For one Boot.
    pub fn new(net: Arc<Net>) -> Self {
        Self { net }
    }

    /// Where nothing was measured, a choice that is the same for the life of our key.
    fn seed(&self) -> u64 {
        let key = self.net.identity.node.public();
        key.0.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }

    fn take_maps(&self, state: &mut State) {
        let map = self.net.relay_map.get();
        let has_changed = !state.map.difference(&map).is_empty() || state.map.scores != map.scores;
        state.map = map;
        if has_changed {
            state.homes.handle_map(&state.map);
            state.survey.set_map(&state.map);
        }
        self.settle(state);
    }

    /// Does what netcheck has due, and takes what it has found out.
    fn survey(&self, context: &Context<Message>, state: &mut State) {
        state.survey.follow(&self.net);
        let map = Arc::clone(&state.map);
        let reports = state.survey.drive(context, &self.net, || self.probes(&map));
        for report in reports {
            self.take_latencies(state, &report.latencies);
            state.latencies.set_if_changed(report.latencies);
        }
    }

    fn take_latencies(&self, state: &mut State, latencies: &home::Report) {
        let link = self.home_link(state.homes.home());
        state.homes.handle_report(Instant::now(), &state.map, latencies, link);
        self.settle(state);
    }

    fn home_link(&self, home: Option<RegionId>) -> HomeLink {
        let info = home.and_then(|home| self.net.data_plane.links().remove(&home));
        let is_healthy =
            |info: LinkInfo| matches!(info.state, RelayLink::Up { .. }) && info.silent < HEALTHY_SILENCE;
        if info.is_some_and(is_healthy) { HomeLink::Healthy } else { HomeLink::Unhealthy }
    }

    /// Makes home and links what they should be, and tells how they are.
    fn settle(&self, state: &mut State) {
        let home = state.homes.home();
        if let Some(home) = home {
            self.net.data_plane.prefer_link(home);
        }
        self.reconcile(state);
        if state.home.set_if_changed(home) {
            tracing::info!(home = home.map(|home| home.0), "the home relay region is chosen");
        }
    }

    fn reconcile(&self, state: &mut State) {
        let wanted = self.wanted(state);
        let home = state.homes.home();
        let (homes, others): (Vec<&Region>, Vec<&Region>) = state
            .map
            .relay_regions()
            .filter(|region| wanted.contains(&region.id))
            .partition(|region| home == Some(region.id));
        let kept: Vec<&Region> = homes.into_iter().chain(others).take(MAX_LINKS).collect();
        for region in &kept {
            self.net.data_plane.ensure_link(self.target(region));
        }
        let links = self.net.data_plane.links();
        let are_too_many = links.len() > MAX_LINKS;
        for (id, info) in links {
            let is_relay = state.map.relay_regions().any(|region| region.id == id);
            let is_surplus = are_too_many && !kept.iter().any(|region| region.id == id);
            if !is_relay || is_surplus || (!wanted.contains(&id) && info.idle >= IDLE_LIMIT) {
                self.net.data_plane.close_link(id);
            }
        }
        self.publish(state);
    }

    /// Our home, and where peers listen: they are reached in their own regions.
    fn wanted(&self, state: &State) -> BTreeSet<RegionId> {
        let network = self.net.network_map.get();
        network.peers.values().map(|peer| peer.home).chain(state.homes.home()).collect()
    }

    fn target(&self, region: &Region) -> LinkTarget {
        LinkTarget {
            region: region.id,
            nodes: region.relays().cloned().collect(),
            headers: self.headers(region),
            upgrades: *self.net.upgrades.get(),
        }
    }

    /// The deployment's own relays get what the deployment's other requests get; nobody else sees it.
    fn headers(&self, region: &Region) -> Headers {
        if !region.embedded {
            return Headers::new();
        }
        let token = (TOKEN_HEADER, self.net.boot.token.expose_secret());
        let extra = self.net.boot.headers.iter();
        let extra = extra.filter_map(|(name, value)| Some((name.parse().ok()?, value.expose_secret())));
        let secret = |(name, value): (HeaderName, &str)| {
            let mut value = HeaderValue::from_str(value).ok()?;
            value.set_sensitive(true);
            Some((name, value))
        };
        extra.chain([token]).filter_map(secret).collect()
    }

    fn publish(&self, state: &mut State) {
        let infos = self.net.data_plane.links();
        state.note_forced(&infos);
        let links: BTreeMap<RegionId, RelayLink> =
            infos.into_iter().map(|(region, info)| (region, info.state)).collect();
        state.relays.set_if_changed(links);
    }

    fn probes(&self, map: &RelayMap) -> Vec<Probe> {
        let probe = |region: &Region| Probe {
            region: region.id,
            nodes: region.relays().cloned().collect(),
            headers: self.headers(region),
        };
        map.relay_regions().map(probe).collect()
    }
}

impl State {
    /// Deployments are told why a relay was once reached by WebSocket for as long as we live.
    fn note_forced(&self, links: &BTreeMap<RegionId, LinkInfo>) {
        let mut reasons = BTreeMap::clone(&self.forced_websocket.get());
        for (region, info) in links {
            let has_room = reasons.len() < MAX_REASONS || reasons.contains_key(region);
            if let Some(reason) = info.forced_websocket.clone().filter(|_| has_room) {
                reasons.insert(*region, reason);
            }
        }
        self.forced_websocket.set_if_changed(reasons);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use secrecy::SecretString;
    use uuid::Uuid;
    use warren_core::{
        coordination::{NetworkMap, Peer},
        relay_map::Node,
    };
    use warren_proto::key::{DiscoPrivate, NodePrivate, NodePublic};

    use super::*;
    use crate::{
        data_plane::{DataPlane, DataPlaneConfig, Events, Pong},
        dial::{DialOptions, Dialer},
        facts::{Addresses, Boot, Identity, NetworkOwner},
        runtime::Tasks,
        udp::UdpSockets,
    };

    #[tokio::test]
    async fn the_only_region_is_home_at_once_and_gets_a_link() {
        let mut setting = Setting::new().await;
        setting.set_map(&[region(999, true)]);
        setting.hear(Message::MapChanged).await;
        assert_eq!(*setting.net.home.get(), Some(RegionId(999)));
        assert_eq!(setting.links(), [RegionId(999)]);
        assert!(setting.net.relays.get().contains_key(&RegionId(999)));
    }

    #[tokio::test]
    async fn among_several_regions_the_first_report_chooses_and_a_later_one_needs_a_reason() {
        let mut setting = Setting::new().await;
        setting.set_map(&[region(1, false), region(2, false)]);
        setting.hear(Message::MapChanged).await;
        assert_eq!(*setting.net.home.get(), None);
        setting.measured(Stage::First, &[(2, 50)]).await;
        assert_eq!(*setting.net.home.get(), Some(RegionId(2)));
        setting.measured(Stage::First, &[(1, 1)]).await;
        assert_eq!(*setting.net.home.get(), Some(RegionId(2)), "a first report does not move a home");
        setting.measured(Stage::Complete, &[(1, 1), (2, 50)]).await;
        assert_eq!(*setting.net.home.get(), Some(RegionId(1)));
        assert_eq!(setting.net.latencies.get().len(), 2);
    }

    #[tokio::test]
    async fn the_results_of_an_older_measurement_are_ignored() {
        let mut setting = Setting::new().await;
        setting.set_map(&[region(1, false), region(2, false)]);
        setting.hear(Message::MapChanged).await;
        let old = setting.state.survey.run();
        setting.hear(Message::NetworkChanged).await;
        setting.hear(Message::Measured { run: old, stage: Stage::Complete, report: report(&[(1, 5)]) }).await;
        assert_eq!(*setting.net.home.get(), None);
    }

    #[tokio::test]
    async fn peers_are_reached_in_their_own_regions_and_only_in_those_that_have_a_relay() {
        let mut setting = Setting::new().await;
        let mut stun_only = region(3, false);
        stun_only.nodes.iter_mut().for_each(|node| node.stun_only = true);
        setting.set_map(&[region(1, false), region(2, false), stun_only]);
        setting.set_peers(&[2, 3, 4]);
        setting.hear(Message::MapChanged).await;
        assert_eq!(setting.links(), [RegionId(2)]);
        setting.measured(Stage::Complete, &[(1, 5)]).await;
        assert_eq!(setting.links(), [RegionId(1), RegionId(2)]);
    }

    #[tokio::test]
    async fn the_link_to_a_region_that_vanished_is_closed_and_one_that_is_merely_unused_is_kept_for_a_while()
    {
        let mut setting = Setting::new().await;
        setting.set_map(&[region(1, false), region(2, false)]);
        setting.set_peers(&[1, 2]);
        setting.hear(Message::MapChanged).await;
        setting.set_peers(&[]);
        setting.hear(Message::MapChanged).await;
        assert_eq!(setting.links(), [RegionId(1), RegionId(2)]);
        setting.set_map(&[region(1, false)]);
        setting.hear(Message::MapChanged).await;
        assert_eq!(setting.links(), [RegionId(1)]);
    }

    #[tokio::test]
    async fn only_the_deployments_own_relays_see_token_and_headers() {
        let setting = Setting::new().await;
        assert!(setting.part.headers(&region(1, false)).is_empty());
        let headers = setting.part.headers(&region(1, true));
        let shown: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(shown, [("x-extra", "yes"), ("coder-session-token", "secret-token")]);
        assert!(headers.iter().all(|(_, value)| value.is_sensitive()));
        assert!(!format!("{:?}", setting.part.target(&region(1, true))).contains("secret-token"));
    }

    #[tokio::test]
    async fn a_successor_finds_the_home_and_the_links_of_its_predecessor() {
        let mut setting = Setting::new().await;
        setting.set_map(&[region(1, false), region(2, false)]);
        setting.hear(Message::MapChanged).await;
        setting.measured(Stage::Complete, &[(2, 5)]).await;
        let mut setting = setting.crash().await;
        setting.hear(Message::MapChanged).await;
        assert_eq!(*setting.net.home.get(), Some(RegionId(2)));
        assert_eq!(setting.links(), [RegionId(2)]);
    }

    #[tokio::test]
    async fn the_reason_for_a_websocket_is_told_for_good_and_also_by_a_successor() {
        let mut setting = Setting::new().await;
        let relay = upgrade::tests::FakeRelay::start().await;
        relay.refuse_plain(Some("HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone"));
        let refusing = Region { nodes: vec![relay.node()], ..region(1, false) };
        setting.set_map(std::slice::from_ref(&refusing));
        setting.hear(Message::MapChanged).await;
        let waiting = async {
            while setting.net.forced_websocket.get().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
                setting.hear(Message::Tick).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap();
        setting.set_map(&[region(2, false)]);
        setting.hear(Message::MapChanged).await;
        let mut setting = setting.crash().await;
        setting.hear(Message::MapChanged).await;
        let reasons = setting.net.forced_websocket.get();
        assert!(reasons[&RegionId(1)].ends_with("'Upgrade: derp'): none"), "{reasons:?}");
        assert_eq!(setting.links(), [RegionId(2)]);
    }

    #[tokio::test]
    async fn the_links_of_a_deployment_that_forces_websockets_ask_for_nothing_else() {
        let setting = Setting::new().await;
        assert_eq!(setting.part.target(&region(1, false)).upgrades, upgrade::Upgrades::PlainFirst);
        setting.net.upgrades.claim().unwrap().set(upgrade::Upgrades::WebSocketOnly);
        assert_eq!(setting.part.target(&region(1, false)).upgrades, upgrade::Upgrades::WebSocketOnly);
    }

    struct Setting {
        net: Arc<Net>,
        part: RelayPart,
        context: Context<Message>,
        state: State,
    }

    struct Nobody;

    impl Events for Nobody {
        fn pong(&self, _: Pong) {}
        fn link_changed(&self, _: RegionId, _: LinkChange) {}
        fn handshake(&self, _: NodePublic) {}
    }

    impl Setting {
        async fn new() -> Self {
            Self::with(Arc::new(net(NetworkOwner::Nobody))).await
        }

        async fn with(net: Arc<Net>) -> Self {
            let part = RelayPart::new(Arc::clone(&net));
            let context = Context { me: net.relay.clone(), tasks: Tasks::default() };
            let state = part.start(&context).await.unwrap();
            Self { net, part, context, state }
        }

        async fn crash(self) -> Self {
            let net = Arc::clone(&self.net);
            drop(self);
            Self::with(net).await
        }

        async fn hear(&mut self, message: Message) {
            self.part.handle(&self.context, &mut self.state, message).await.unwrap();
        }

        async fn measured(&mut self, stage: Stage, millis: &[(u16, u64)]) {
            let run = self.state.survey.run();
            self.hear(Message::Measured { run, stage, report: report(millis) }).await;
        }

        fn set_map(&self, regions: &[Region]) {
            let regions = regions.iter().map(|region| (region.id, region.clone())).collect();
            self.net.relay_map.claim().unwrap().set(RelayMap { regions, scores: BTreeMap::new() });
        }

        fn set_peers(&self, homes: &[u16]) {
            let peer = |home: &u16| Peer {
                node_key: NodePrivate::generate().public(),
                disco_key: DiscoPrivate::generate().public(),
                home: RegionId(*home),
                addresses: Vec::new(),
                keepalive: false,
                endpoints: Vec::new(),
                announcements: 1,
            };
            let peers = homes.iter().map(|home| (Uuid::from_u128(u128::from(*home)), peer(home))).collect();
            self.net.network_map.claim().unwrap().set(NetworkMap { peers });
        }

        fn links(&self) -> Vec<RegionId> {
            self.net.data_plane.links().into_keys().collect()
        }
    }

    /// What one Boot shares, with nobody at any address.
    pub(crate) fn net(network: NetworkOwner) -> Net {
        net_with(network, None)
    }

    /// The same, with these sockets.
    pub(crate) fn net_with(network: NetworkOwner, udp: Option<UdpSockets>) -> Net {
        let identity = Identity::generate();
        let config = DataPlaneConfig {
            node: identity.node.clone(),
            disco: identity.disco.clone(),
            address: identity.address,
            dialer: Arc::new(Dialer::new(DialOptions::default()).unwrap()),
            events: Arc::new(Nobody),
            udp,
        };
        let boot = Boot {
            generation: 1,
            url: "http://127.0.0.1:1".parse().unwrap(),
            token: SecretString::from("secret-token"),
            headers: vec![
                ("x-extra".to_owned(), SecretString::from("yes")),
                ("not a name".to_owned(), SecretString::from("no")),
                ("x-broken".to_owned(), SecretString::from("a\r\nb")),
            ],
            telemetry: None,
            network,
        };
        let data_plane = DataPlane::start(config).unwrap();
        Net::new(Arc::new(boot), identity, data_plane, Addresses::default())
    }

    fn region(id: u16, embedded: bool) -> Region {
        let node =
            Node { host_name: "127.0.0.1".to_owned(), derp_port: 1, force_http: true, ..Node::default() };
        let (code, name) = (format!("r{id}"), format!("Region {id}"));
        Region { id: RegionId(id), code, name, embedded, avoid: false, nodes: vec![node] }
    }

    fn report(millis: &[(u16, u64)]) -> home::Report {
        let latency = |millis| RegionLatency { v4: Some(Duration::from_millis(millis)), v6: None };
        millis.iter().map(|(id, millis)| (RegionId(*id), latency(*millis))).collect()
    }
}
