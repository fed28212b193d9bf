//! A Coder deployment on one machine: control plane, relay and agents, in their real wire formats, with
//! handles that make them fail and tell what they heard.
//!
//! ```text
//!             one HTTP listener (further relays have their own)
//!             ├─ /api/v2/...          control plane: users, connection, tailnet     control.rs
//!             └─ /derp                relay: routes packets by node key             relay.rs
//!                  ▲
//!  agents ─────────┘ by a pipe in memory: WireGuard, pings, a TCP stack, HTTP       agent.rs
//! ```
//! Everything ends with the [`Lab`]. Nothing here is for production: randomness aside, no secret is kept.
//!
//! What a real deployment does and this one does not: HTTP/2, TLS, `Derp-Fast-Start`,
//! rate limits that count, the per-agent endpoints. Agents answer over their home relay, and directly where that
//! is wanted ([`LabOptions::direct`]).
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod agent;
mod control;
pub mod internet;
pub mod nat;
pub mod payload;
pub mod reference;
mod relay;
mod seat;
mod stun;
#[cfg(test)]
mod tests;
mod work;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    net::{TcpListener, UdpSocket},
    sync::{mpsc, watch},
};
use uuid::Uuid;
use warren_proto::{
    address::coder_address,
    key::{NodePublic, random},
    name::{self, DEFAULT_SUFFIX, OnlyAgent},
    tailnet::{CoordinateResponse, DerpMap},
};

use self::{
    agent::{Agent, HTTP_PORT, Home, Wild, faults::UdpFaults},
    control::{State, listener, map_source, relay_map},
    work::Work,
};
pub use self::{
    agent::{
        AgentStats, End,
        direct::{AgentPath, Best, Direct, Packets, PeerPath, Probes, Taken},
        faults::Cut,
        udp::{Sending, UdpBinder},
    },
    control::{
        BUILD_VERSION, CallFault, Check, Connection, Control, Device, EMBEDDED_REGION, Ended, Endpoint,
        FIRST_FURTHER_REGION, HttpFault, Layer, MapError, MapSource, Method, Raw, Recording, ReplicaHealth,
        Report, Reported, Request, Status, Then, Times, Workspace, Workspaces,
    },
    relay::Relay,
    seat::Seat,
};

/// How often a waiting call looks again.
const LOOK: Duration = Duration::from_millis(5);

/// What a lab is to be like.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// How many workspaces with one agent each.
    pub agents: usize,
    /// Where everything listens.
    pub listen: IpAddr,
    /// The deployment's port; 0 takes a free one.
    pub port: u16,
    /// The user's name.
    pub username: String,
    /// The suffix of host names; empty as in old deployments, which do not tell one.
    pub suffix: String,
    /// Workspaces are called so, with a number behind it.
    pub workspace_prefix: String,
    /// Agents are called so.
    pub agent_name: String,
    /// Relays besides the deployment's own, each a region with a listener of its own.
    pub further_regions: usize,
    /// Whether the agents' homes are spread over all regions.
    pub spread_agents: bool,
    /// Whether agents whose home leaves the relay map move to the first region that is left.
    pub agents_follow_map: bool,
    /// The tailnet API that is spoken.
    pub api_version: (i64, i64),
    /// What is told about websockets to relays.
    pub force_websockets: bool,
    /// What is told about direct connections.
    pub disable_direct: bool,
    /// Whether agents have sockets for direct paths, and the lab a STUN server. With `disable_direct` they have
    /// them and must not use them.
    pub direct: bool,
    /// Where agents bind those: at a free port of the first address of each family, or, where nothing is named, of
    /// where the lab listens. A family that the machine lacks is left out; wildcard addresses are not told.
    pub direct_addresses: Vec<IpAddr>,
    /// How they bind them.
    pub direct_binder: UdpBinder,
    /// How they send through them.
    pub direct_sending: Sending,
    /// STUN servers, each `host:port`, that the relay map names; nothing listens there for the lab.
    pub stun_servers: Vec<String>,
    /// A relay map to begin with, to which the lab's own regions are added.
    pub relay_map: Option<MapSource>,
    /// Whether only browsers may connect, as a licence can say.
    pub is_browser_only: bool,
    /// Whether the user owns the deployment.
    pub is_owner: bool,
    /// How many telemetry events are handed on together.
    pub telemetry_batch: usize,
    /// After how long telemetry events are handed on, if they are fewer.
    pub telemetry_interval: Duration,
    /// How often websocket clients are pinged, and how long they may take to answer.
    pub websocket_ping: Duration,
    /// How often yamux clients are pinged.
    pub yamux_keepalive: Duration,
    /// How often relay clients hear something.
    pub relay_keep_alive: Duration,
    /// How long resume tokens are good.
    pub resume_lifetime: Duration,
    /// How many replicas of the coordinator share its work; 0 is a coordinator on its own, the only one that
    /// can pretend, repeat, inject and hold back.
    pub replicas: usize,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            agents: 3,
            listen: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            username: "alice".to_owned(),
            suffix: DEFAULT_SUFFIX.to_owned(),
            workspace_prefix: "lab".to_owned(),
            agent_name: "main".to_owned(),
            further_regions: 0,
            spread_agents: false,
            agents_follow_map: false,
            api_version: (2, 10),
            force_websockets: false,
            disable_direct: false,
            direct: false,
            direct_addresses: Vec::new(),
            direct_binder: UdpBinder::default(),
            direct_sending: Sending::default(),
            stun_servers: Vec::new(),
            relay_map: None,
            is_browser_only: false,
            is_owner: false,
            telemetry_batch: 1000,
            telemetry_interval: Duration::from_secs(60),
            websocket_ping: Duration::from_secs(15),
            yamux_keepalive: Duration::from_secs(30),
            relay_keep_alive: Duration::from_secs(60),
            resume_lifetime: Duration::from_secs(24 * 60 * 60),
            replicas: 0,
        }
    }
}

/// Why a lab cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Nothing can listen there.
    #[error("cannot listen at {address}: {error}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// There is no relay map to tell.
    #[error(transparent)]
    RelayMap(#[from] MapError),
}

/// One agent, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentInfo {
    /// Its ID.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// The name of its workspace.
    pub workspace: String,
    /// Its host names with a dot at the end, the shortest first.
    pub fqdn: Vec<String>,
    /// Its address inside the tunnel.
    pub address: Ipv6Addr,
    /// Where its HTTP server listens.
    pub http_port: u16,
}

/// A running deployment. Dropping it ends everything at the next await; [`Lab::stop`] also waits for it.
pub struct Lab {
    control: Control,
    url: String,
    token: String,
    relays: Vec<(u16, Relay)>,
    /// Where the lab's own STUN server is, if it has one.
    stun_server: Vec<SocketAddr>,
    agents: Arc<Mutex<Vec<Slot>>>,
    work: Work,
}

/// An agent's place: it outlives the agent's single lives.
struct Slot {
    id: Uuid,
    workspace: Uuid,
    region: usize,
    title: String,
    lasting: Lasting,
    running: Option<Agent>,
}

/// What an agent's lives have in common.
#[derive(Clone, Default)]
struct Lasting {
    counters: Arc<agent::core::Counters>,
    faults: Arc<UdpFaults>,
}

impl Lab {
    /// Starts a deployment on the current runtime.
    pub async fn start(options: LabOptions) -> Result<Self, LabError> {
        let work = Work::default();
        let (listener, address) = bind(SocketAddr::new(options.listen, options.port)).await?;
        let embedded = Relay::new(options.relay_keep_alive);
        let mut further = Vec::new();
        for _ in 0..options.further_regions {
            further.push(bind(SocketAddr::new(options.listen, 0)).await?);
        }
        let places: Vec<SocketAddr> = further.iter().map(|(_, address)| *address).collect();
        let base = match &options.relay_map {
            Some(source) => map_source::load(source).await?,
            None => Default::default(),
        };
        let own = relay_map::own_regions(address, &places);
        let mut options = options;
        let mut stun_server = Vec::new();
        if options.direct {
            let (socket, address) = bind_udp(options.listen)?;
            stun::serve(socket, &work);
            options.stun_servers.push(address.to_string());
            stun_server.push(address);
        }
        let stun = (!options.disable_direct).then_some(options.stun_servers.as_slice());
        let map = relay_map::build(base, own, stun)?;
        let (url, token) = (format!("http://{address}"), random_token());
        let state = Arc::new(State::new(options, url.clone(), token.clone(), embedded.clone(), map));
        let mut relays = vec![(region_number(EMBEDDED_REGION), embedded)];
        for (id, (listener, _)) in (FIRST_FURTHER_REGION..).zip(further) {
            let relay = Relay::new(state.options.relay_keep_alive);
            relays.push((region_number(id), relay.clone()));
            let site = listener::Site::Relay(Arc::clone(&state), relay);
            work.spawn(listener::listen(listener, site, work.clone()));
        }
        let site = listener::Site::Deployment(Arc::clone(&state));
        work.spawn(listener::listen(listener, site, work.clone()));
        let (telling, every) = (Arc::clone(&state), state.options.telemetry_interval);
        work.spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                telling.flush_telemetry();
            }
        });
        let agents = Arc::default();
        let lab = Self { control: Control(state), url, token, relays, stun_server, agents, work };
        let ticking = Arc::clone(&lab.agents);
        lab.work.spawn(agent::tick_all(move |each| {
            lock(&ticking).iter().filter_map(|slot| slot.running.as_ref()).for_each(each);
        }));
        if lab.control.0.options.agents_follow_map {
            let maps = lab.control.0.relay_map.subscribe();
            lab.work.spawn(follow_map(maps, lab.relays.clone(), Arc::clone(&lab.agents)));
        }
        lab.populate();
        Ok(lab)
    }

    /// The deployment's URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The one token that is accepted, unless [`Control::set_token`] replaced it.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The control plane's handle.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// The deployment's own relay.
    #[must_use]
    pub fn relay(&self) -> Relay {
        self.control.0.relay.clone()
    }

    /// All relays by region.
    #[must_use]
    pub fn relays(&self) -> Vec<(u16, Relay)> {
        self.relays.clone()
    }

    /// All agents that the lab runs or has stopped, in order of their workspaces.
    #[must_use]
    pub fn agents(&self) -> Vec<AgentInfo> {
        let ids: Vec<Uuid> = lock(&self.agents).iter().map(|slot| slot.id).collect();
        ids.into_iter().filter_map(|id| self.agent(id)).collect()
    }

    /// One agent.
    #[must_use]
    pub fn agent(&self, id: Uuid) -> Option<AgentInfo> {
        let options = &self.control.0.options;
        let all = self.control.0.workspaces.borrow();
        let workspace = lock(&self.agents).iter().find(|slot| slot.id == id)?.workspace;
        let workspace = all.0.get(&workspace)?;
        let name = workspace.agents.get(&id)?;
        let only = if workspace.agents.len() == 1 { OnlyAgent::Yes } else { OnlyAgent::No };
        let suffix =
            Some(options.suffix.as_str()).filter(|suffix| !suffix.is_empty()).unwrap_or(DEFAULT_SUFFIX);
        Some(AgentInfo {
            id,
            name: name.clone(),
            workspace: workspace.name.clone(),
            fqdn: name::agent_names(name, &workspace.name, &options.username, suffix, only)
                .unwrap_or_default(),
            address: coder_address(&id),
            http_port: HTTP_PORT,
        })
    }

    /// What has happened to an agent so far.
    #[must_use]
    pub fn agent_stats(&self, id: Uuid) -> AgentStats {
        let agents = lock(&self.agents);
        agents
            .iter()
            .find(|slot| slot.id == id)
            .map(|slot| agent::stats(&slot.lasting.counters))
            .unwrap_or_default()
    }

    /// Waits until something has happened to an agent, at most `limit`. Returns whether it has.
    pub async fn wait_for_agent(
        &self,
        id: Uuid,
        limit: Duration,
        accept: impl Fn(&AgentStats) -> bool,
    ) -> bool {
        let waiting = async {
            while !accept(&self.agent_stats(id)) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(limit, waiting).await.is_ok()
    }

    /// An agent's node key; `None` while it does not run.
    #[must_use]
    pub fn agent_key(&self, id: Uuid) -> Option<NodePublic> {
        lock(&self.agents).iter().find(|slot| slot.id == id)?.running.as_ref().map(Agent::key)
    }

    /// Ends an agent; its workspace still lists it.
    pub fn stop_agent(&self, id: Uuid, end: End) {
        let running =
            lock(&self.agents).iter_mut().find(|slot| slot.id == id).and_then(|slot| slot.running.take());
        if let Some(agent) = running {
            agent.end(id, &self.control.0.coordinator, end);
        }
    }

    /// Starts an agent anew: the same addresses, new keys. One that runs is ended first.
    pub fn start_agent(&self, id: Uuid, end: End) {
        self.stop_agent(id, end);
        let mut agents = lock(&self.agents);
        if let Some(slot) = agents.iter_mut().find(|slot| slot.id == id) {
            slot.running = self.run(slot.id, slot.region, &slot.title, &slot.lasting);
        }
    }

    /// Ends an agent and gives its place at the coordinator to somebody else, until [`Lab::start_agent`], with what
    /// the coordinator says there. One that is about to take its place gets it first, or it would after this.
    pub async fn seat(&self, id: Uuid) -> (Seat, mpsc::Receiver<CoordinateResponse>) {
        while self.agent_key(id).is_some() && self.control.node(id).is_none() {
            tokio::time::sleep(LOOK).await;
        }
        self.stop_agent(id, End::Crash);
        Seat::take(id, &self.control.0.coordinator)
    }

    /// Makes an agent deaf and dumb inside the tunnel, or ends that. The coordinator does not notice.
    pub fn mute_agent(&self, id: Uuid, is_mute: bool) {
        self.with_running(id, |agent| agent.mute(is_mute));
    }

    /// Has an agent lose what comes out of its tunnel, or ends that: it shakes hands and answers probes as before.
    pub fn shut_tunnel(&self, id: Uuid, is_shut: bool) {
        self.with_running(id, |agent| agent.shut(is_shut));
    }

    fn with_running(&self, id: Uuid, change: impl FnOnce(&Agent)) {
        let agents = lock(&self.agents);
        let slot = agents.iter().find(|slot| slot.id == id);
        if let Some(agent) = slot.and_then(|slot| slot.running.as_ref()) {
            change(agent);
        }
    }

    /// Which ways an agent's packets take; nothing is told of one that does not run or talks over its relay only.
    #[must_use]
    pub fn agent_path(&self, id: Uuid) -> AgentPath {
        let mut path = self.ask(id, Agent::path).unwrap_or_default();
        self.with_faults(id, |faults| path.dropped = faults.dropped());
        path
    }

    /// Waits until an agent's packets take certain ways, at most `limit`. Returns whether they do.
    pub async fn wait_for_path(
        &self,
        id: Uuid,
        limit: Duration,
        accept: impl Fn(&AgentPath) -> bool,
    ) -> bool {
        let waiting = async {
            while !accept(&self.agent_path(id)) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(limit, waiting).await.is_ok()
    }

    /// Loses datagrams of an agent from now on, STUN included, without a word to anybody.
    pub fn cut_udp(&self, id: Uuid, cut: Cut) {
        self.with_faults(id, |faults| faults.cut(cut));
    }

    /// Loses a part of an agent's datagrams, both directions, the same ones with the same seed.
    pub fn lose_udp(&self, id: Uuid, percent: u8, seed: u64) {
        self.with_faults(id, |faults| faults.lose(percent, seed));
    }

    /// Sends each of an agent's datagrams later.
    pub fn delay_udp(&self, id: Uuid, delay: Duration) {
        self.with_faults(id, |faults| faults.delay(delay));
    }

    /// Ends all that goes wrong with an agent's datagrams.
    pub fn heal_udp(&self, id: Uuid) {
        self.with_faults(id, UdpFaults::heal);
    }

    /// Blocks an agent's direct paths (its `blockEndpoints`), or allows them again, until it ends.
    pub fn set_direct(&self, id: Uuid, direct: Direct) {
        self.ask(id, |agent| agent.set_direct(direct));
    }

    /// Gives an agent sockets at other ports, as a change of its network does.
    pub fn rebind_udp(&self, id: Uuid) {
        self.ask(id, Agent::rebind);
    }

    /// Lets agents be peers, the first as the one who asks for it; not where there are replicas.
    pub fn introduce(&self, from: Uuid, to: Uuid) {
        self.control.0.coordinator.introduce(from, to);
    }

    /// Has an agent ask a node for an echo. Returns whether that node is its peer.
    pub fn send_echo(&self, from: Uuid, to: Ipv6Addr) -> bool {
        self.ask(from, |agent| agent.send_echo(to)).unwrap_or(false)
    }

    /// Has an agent ping a node for a person. Returns whether that node is its peer.
    pub fn user_ping(&self, from: Uuid, to: Ipv6Addr) -> bool {
        self.ask(from, |agent| agent.user_ping(to)).unwrap_or(false)
    }

    fn ask<T>(&self, id: Uuid, what: impl FnOnce(&Agent) -> T) -> Option<T> {
        lock(&self.agents).iter().find(|slot| slot.id == id)?.running.as_ref().map(what)
    }

    fn with_faults(&self, id: Uuid, change: impl FnOnce(&UdpFaults)) {
        if let Some(slot) = lock(&self.agents).iter().find(|slot| slot.id == id) {
            change(&slot.lasting.faults);
        }
    }

    /// Adds a running workspace with agents of these names. Returns the agents.
    pub fn add_workspace(&self, name: &str, agent_names: &[&str]) -> Vec<AgentInfo> {
        let workspace = random_id();
        let agents: Vec<(Uuid, String)> =
            agent_names.iter().map(|agent| (random_id(), (*agent).to_owned())).collect();
        for (id, agent) in &agents {
            self.admit(*id, workspace, format!("{agent}.{name}"));
        }
        self.control.change_workspaces(|all| {
            let agents = agents.iter().cloned().collect();
            all.0.insert(workspace, Workspace { name: name.to_owned(), status: Status::Running, agents });
        });
        agents.iter().filter_map(|(id, _)| self.agent(*id)).collect()
    }

    /// Adds an agent to a workspace. Returns it, if there is that workspace.
    pub fn add_agent(&self, workspace: &str, name: &str) -> Option<AgentInfo> {
        let workspace_id = self.control.workspaces().find(workspace)?;
        let id = random_id();
        self.admit(id, workspace_id, format!("{name}.{workspace}"));
        self.control.change_workspaces(|all| {
            if let Some(workspace) = all.0.get_mut(&workspace_id) {
                workspace.agents.insert(id, name.to_owned());
            }
        });
        self.agent(id)
    }

    /// Takes an agent out of its workspace and ends it.
    pub fn remove_agent(&self, id: Uuid) {
        self.control.change_workspaces(|all| {
            all.0.values_mut().for_each(|workspace| {
                workspace.agents.remove(&id);
            });
        });
        self.dismiss(id);
    }

    /// Removes a workspace and ends its agents. Returns whether there was one.
    pub fn remove_workspace(&self, name: &str) -> bool {
        let Some(id) = self.control.workspaces().find(name) else { return false };
        let mut removed = None;
        self.control.change_workspaces(|all| removed = all.0.remove(&id));
        removed
            .into_iter()
            .flat_map(|workspace| workspace.agents.into_keys())
            .for_each(|agent| self.dismiss(agent));
        true
    }

    /// Ends everything and waits for it.
    pub async fn stop(self) {
        lock(&self.agents).clear();
        self.work.stop().await;
    }

    /// How many tasks the lab runs.
    #[must_use]
    pub fn tasks(&self) -> usize {
        self.work.len()
    }

    /// The workspaces of the start, told together.
    fn populate(&self) {
        let options = &self.control.0.options;
        let mut first = Workspaces::default();
        for number in 1..=options.agents {
            let (workspace, agent) = (random_id(), random_id());
            let name = format!("{}-{number}", options.workspace_prefix);
            self.admit(agent, workspace, format!("{}.{name}", options.agent_name));
            let agents = [(agent, options.agent_name.clone())].into();
            first.0.insert(workspace, Workspace { name, status: Status::Running, agents });
        }
        self.control.change_workspaces(|all| *all = first);
    }

    fn admit(&self, id: Uuid, workspace: Uuid, title: String) {
        let lasting = Lasting::default();
        let mut agents = lock(&self.agents);
        let is_spread = self.control.0.options.spread_agents;
        let region = if is_spread { agents.len() % self.relays.len() } else { 0 };
        let running = self.run(id, region, &title, &lasting);
        agents.push(Slot { id, workspace, region, title, lasting, running });
    }

    fn run(&self, id: Uuid, region: usize, title: &str, lasting: &Lasting) -> Option<Agent> {
        let (number, relay) = self.relays.get(region)?;
        let options = &self.control.0.options;
        let here = std::slice::from_ref(&options.listen);
        let addresses = if options.direct_addresses.is_empty() { here } else { &options.direct_addresses };
        let wild = options.direct.then(|| Wild {
            addresses: addresses.to_vec(),
            binder: options.direct_binder.clone(),
            stun: self.stun_server.clone(),
            direct: if options.disable_direct { Direct::Blocked } else { Direct::Allowed },
            faults: Arc::clone(&lasting.faults),
            sending: options.direct_sending,
        });
        let coordinator = Arc::clone(&self.control.0.coordinator);
        let home = Home { region: *number, relay: relay.clone(), coordinator, wild };
        Some(Agent::start(id, title.to_owned(), home, &self.work, Arc::clone(&lasting.counters)))
    }

    fn dismiss(&self, id: Uuid) {
        self.stop_agent(id, End::Graceful);
        self.control.0.coordinator.forget(id);
        lock(&self.agents).retain(|slot| slot.id != id);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.work.cancel();
        self.control.0.flush_telemetry();
    }
}

/// Moves agents whose home is not in the map any more.
async fn follow_map(
    mut maps: watch::Receiver<DerpMap>,
    relays: Vec<(u16, Relay)>,
    agents: Arc<Mutex<Vec<Slot>>>,
) {
    while maps.changed().await.is_ok() {
        let map = maps.borrow_and_update().clone();
        let is_there = |(region, _): &(u16, Relay)| map.regions.contains_key(&i64::from(*region));
        let Some((place, (region, relay))) = relays.iter().enumerate().find(|(_, home)| is_there(home))
        else {
            continue;
        };
        let mut agents = lock(&agents);
        for slot in agents.iter_mut().filter(|slot| !relays.get(slot.region).is_some_and(is_there)) {
            slot.region = place;
            if let Some(agent) = &slot.running {
                agent.move_to(*region, relay.clone());
            }
        }
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), LabError> {
    let fail = |error| LabError::Listen { address, error };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let bound = listener.local_addr().map_err(fail)?;
    Ok((listener, bound))
}

fn bind_udp(ip: IpAddr) -> Result<(UdpSocket, SocketAddr), LabError> {
    let address = SocketAddr::new(ip, 0);
    let fail = |error| LabError::Listen { address, error };
    let socket = std::net::UdpSocket::bind(address).map_err(fail)?;
    socket.set_nonblocking(true).map_err(fail)?;
    let bound = socket.local_addr().map_err(fail)?;
    Ok((UdpSocket::from_std(socket).map_err(fail)?, bound))
}

fn lock(agents: &Mutex<Vec<Slot>>) -> MutexGuard<'_, Vec<Slot>> {
    agents.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Regions of the lab have numbers that are ports, too.
fn region_number(id: i64) -> u16 {
    u16::try_from(id).unwrap_or(u16::MAX)
}

/// A token as deployments make them: ten characters, a dash, 22 characters.
fn random_token() -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let letter =
        |byte: u8| ALPHABET.get(usize::from(byte) % ALPHABET.len()).map_or('x', |letter| char::from(*letter));
    let letters: String = random::<32>().into_iter().map(letter).collect();
    let (key, secret) = letters.split_at(10);
    format!("{key}-{secret}")
}

fn random_id() -> Uuid {
    uuid::Builder::from_random_bytes(random()).into_uuid()
}
