//! What outlives every actor: the TUN device, the relay links, the UDP sockets, the WireGuard sessions with the
//! paths to their peers, and their tasks, all on one thread of their own.
//!
//! ```text
//!                                   ┌──► relay link ──► relay
//!  TUN ──► outbound ──► peer's engine, by the route of its path
//!                                   └──► runs ──► UDP socket ──► peer
//!                                   ┌─── relay link ◄── relay
//!  TUN ◄── inbound  ◄── peer's engine
//!                │                  └─── UDP socket ◄── peer, STUN servers
//!                └────► disco: pings answered, the rest to the peer's path; pongs and STUN to [`Events`]
//! ```
//!
//! What a path wants done is done in `paths`; its time comes in `timers`.
//!
//! [`DataPlane`] is a handle that the composition lends to the parts. Packet I/O writes peers and the TUN,
//! the relay writes links; whoever restarts reads what stands ([`DataPlane::links`]) and reconciles. A task
//! that panics is started again and leaves the others alone.

use std::{
    any::Any,
    collections::BTreeMap,
    future::Future,
    io,
    net::{Ipv6Addr, SocketAddr},
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use futures::FutureExt;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};
use warren_core::{
    coordination::NetworkMap,
    path::{Best, Direct, Why},
    relay_map::RegionId,
};
use warren_proto::{
    key::{DiscoPrivate, DiscoPublic, NodePrivate, NodePublic},
    stun, tsmp,
};

use crate::{
    dial::Dialer,
    packet_io::tun::Tun,
    relay::link::{self, Link},
    runtime::Cell,
    udp::{LocalPorts, Sockets, UdpSockets, Unsent},
    wireguard::{self, Engines, LEAST_ROOM, Sealed, Ticked},
};

mod counters;
mod direct;
mod disco;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub(crate) mod inbound;
mod inner;
mod outbound;
mod paths;
mod peers;
#[cfg(test)]
mod tests;
mod timers;

pub use self::direct::RebindError;
pub use crate::relay::link::{LinkInfo, LinkTarget};
pub use warren_proto::disco::TxId;

use counters::{Counters, Drop, Tally};
use direct::Readers;
use paths::Pinged;
use peers::{Peer, Peers};
use timers::Timers;

/// How long [`DataPlane::stop`] waits for the thread.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// The pause before a task that panicked goes on.
const RESTART_PAUSE: Duration = Duration::from_millis(100);
/// Peers whose handshake is started before other tasks get their turn: one costs about 0.1 ms.
const WARM_UP_BATCH: usize = 16;

/// What a data plane is started with.
pub struct DataPlaneConfig {
    /// WireGuard key, and name at relays.
    pub node: NodePrivate,
    /// Path discovery key.
    pub disco: DiscoPrivate,
    /// Our own inner address.
    pub address: Ipv6Addr,
    /// How relays are dialled.
    pub dialer: Arc<Dialer>,
    /// Who hears what happens.
    pub events: Arc<dyn Events>,
    /// The sockets for direct paths; without any everything is relayed.
    pub udp: Option<UdpSockets>,
}

/// Who hears what happens. Called on the data plane's thread: implementations only hand over.
pub trait Events: Send + Sync {
    /// A pong arrived.
    fn pong(&self, pong: Pong);
    /// A pong to a ping through WireGuard arrived.
    fn tsmp_pong(&self, _pong: TsmpPong) {}
    /// A link became something else; [`DataPlane::links`] tells what.
    fn link_changed(&self, region: RegionId, change: LinkChange);
    /// A handshake with a peer was completed.
    fn handshake(&self, peer: NodePublic);
    /// The direct path to a peer changed.
    fn path_changed(&self, _change: PathChange) {}
    /// A STUN server answered, or somebody who says so: only the number tells.
    fn stun(&self, _answer: StunAnswer) {}
    /// A peer is to be told where we are, and what we know of that is old: [`DataPlane::set_own_endpoints`] is
    /// waited for.
    fn endpoints_wanted(&self) {}
}

/// The answer to a ping through WireGuard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TsmpPong {
    /// Who answered: what came out of its tunnel says so.
    pub peer: NodePublic,
    /// Of the ping.
    pub data: tsmp::Data,
    /// When the batch that it was in was received.
    pub received_at: Instant,
}

/// Another direct path is taken, or none any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathChange {
    /// To whom.
    pub peer: NodePublic,
    /// The address before; `None` for the relay.
    pub from: Option<SocketAddr>,
    /// The address now; `None` for the relay.
    pub to: Option<SocketAddr>,
    /// Why.
    pub why: Why,
}

/// What a STUN server said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StunAnswer {
    /// Who answered.
    pub from: SocketAddr,
    /// The number of the question.
    pub txid: stun::TxId,
    /// Where it saw us.
    pub address: SocketAddr,
    /// When it arrived.
    pub received_at: Instant,
}

/// How a peer is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathInfo {
    /// The direct path, if one is taken.
    pub direct: Option<Best>,
    /// The region where it listens.
    pub region: RegionId,
}

/// An answer to one of our pings, from a peer that holds its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pong {
    /// Who answered.
    pub peer: NodePublic,
    /// The number of the ping; of one that its path sent by itself, any.
    pub txid: TxId,
    /// The relay region it came through; `None` for a direct path.
    pub region: Option<RegionId>,
    /// The round trip.
    pub latency: Duration,
    /// Whether it answers [`DataPlane::send_ping`]. Whoever waits for this peer may take any.
    pub is_user: bool,
    /// When it arrived.
    pub received_at: Instant,
}

/// What became of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkChange {
    /// It is being dialled.
    Dialing,
    /// It is up.
    Up,
    /// It is down, and tried again after a pause.
    Down,
    /// It is gone.
    Closed,
}

/// What there is to say about a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerStats {
    /// When the last handshake was completed.
    pub last_handshake: Option<SystemTime>,
    /// Bytes of inner packets from it.
    pub received_bytes: u64,
    /// Bytes of inner packets to it.
    pub sent_bytes: u64,
}

/// Why a ping was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PingUnsent {
    /// No peer with this key is programmed.
    #[error("no such peer is programmed")]
    UnknownPeer,
    /// There is no link to where the peer listens.
    #[error("there is no link to the peer's relay region")]
    NoLink,
    /// The link's queue, or the socket's, is full.
    #[error("the link's queue is full")]
    QueueFull,
    /// The system says that there is no way to the peer's address.
    #[error("the peer's address cannot be reached from here")]
    Unreachable,
}

/// Why a STUN question was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StunUnsent {
    /// There is no socket for its kind of address, or none at the moment.
    #[error("there is no UDP socket that reaches this kind of address")]
    NoSocket,
    /// The system says that there is no way to the server.
    #[error("the STUN server cannot be reached from here")]
    Unreachable,
    /// The socket takes nothing at the moment.
    #[error("the UDP socket takes nothing at the moment")]
    Busy,
}

/// The handle of a running data plane. The data plane stops with [`DataPlane::stop`] or the last handle.
#[derive(Clone)]
pub struct DataPlane {
    plane: Arc<Plane>,
    runtime: Handle,
    stopped: CancellationToken,
    _guard: Arc<DropGuard>,
}

impl DataPlane {
    /// Starts the thread. Metrics go to the recorder that is installed by now.
    pub fn start(config: DataPlaneConfig) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = (CancellationToken::new(), CancellationToken::new());
        let (mut config, registering) = (config, runtime.enter());
        let sockets = config.udp.take().map(Sockets::register).transpose()?;
        drop(registering);
        let policy = if sockets.is_some() { Direct::Allowed } else { Direct::Blocked };
        let plane = Plane::new(config, policy, handle.clone(), stop.clone());
        if let Some(sockets) = sockets {
            plane.use_sockets(sockets);
        }
        let (timed, ended) = (Arc::clone(&plane), stopped.clone().drop_guard());
        let paths = Arc::clone(&plane);
        std::thread::Builder::new().name("data-plane".to_owned()).spawn(move || {
            let _ended = ended;
            let stop = timed.stop.clone();
            runtime.spawn(endure("timers", move || keep_time(Arc::clone(&timed))));
            runtime.spawn(endure("paths", move || timers::serve(Arc::clone(&paths))));
            runtime.block_on(stop.cancelled());
            runtime.shutdown_background();
        })?;
        Ok(Self { plane, runtime: handle, stopped, _guard: Arc::new(stop.drop_guard()) })
    }

    /// The runtime of the data plane's thread. Nothing else should run there.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// How relays are dialled.
    pub fn dialer(&self) -> &Arc<Dialer> {
        &self.plane.dialer
    }

    /// Makes the programmed peers equal to `map`; sessions stay unless a key changed. Peers to be kept
    /// warm get a handshake at once. Costs about 0.1 ms for each new peer: call it where that may block.
    pub fn set_peers(&self, map: &NetworkMap) {
        self.stir(self.plane.peers.set(|| map, &self.plane.engines, Instant::now()));
    }

    /// As [`Self::set_peers`], with what `map` holds when it is this caller's turn: one that was overtaken
    /// while it waited brings nothing old back.
    pub fn follow_peers(&self, map: &Cell<NetworkMap>) {
        self.stir(self.plane.peers.set(|| map.get(), &self.plane.engines, Instant::now()));
    }

    /// What there is to say about a peer; `None` if it is not programmed.
    pub fn stats_of(&self, peer: &NodePublic) -> Option<PeerStats> {
        Some(self.plane.peers.by_key(peer)?.stats())
    }

    /// What there is to say about each peer.
    pub fn stats(&self) -> BTreeMap<NodePublic, PeerStats> {
        self.plane.peers.all().iter().map(|peer| (peer.key, peer.stats())).collect()
    }

    /// Reads and writes packets at `tun` from now on, instead of the device before it.
    pub fn attach_tun(&self, tun: Tun) {
        let tun = Arc::new(tun);
        self.plane.tun.store(Some(Arc::clone(&tun)));
        let token = self.plane.stop.child_token();
        let plane = Arc::clone(&self.plane);
        let work = endure("tun", move || outbound::serve(Arc::clone(&plane), Arc::clone(&tun)));
        self.runtime.spawn(token.clone().run_until_cancelled_owned(work));
        *lock(&self.plane.tun_task) = Some(token.drop_guard());
    }

    /// Lets go of the device.
    pub fn detach_tun(&self) {
        self.plane.tun.store(None);
        *lock(&self.plane.tun_task) = None;
    }

    /// Whether a device is attached.
    pub fn has_tun(&self) -> bool {
        self.plane.tun.load().is_some()
    }

    /// What the attached device is called; `None` without one, and for what is no TUN device.
    pub fn device_name(&self) -> Option<String> {
        self.plane.tun.load().as_ref()?.name()
    }

    /// How each link stands.
    pub fn links(&self) -> BTreeMap<RegionId, LinkInfo> {
        self.plane.links.load().iter().map(|(region, link)| (*region, link.info())).collect()
    }

    /// Makes sure that there is a link as described; one that is described otherwise is replaced. A link
    /// dials again by itself until it is closed.
    pub fn ensure_link(&self, target: LinkTarget) {
        let _writer = lock(&self.plane.links_writer);
        let region = target.region;
        let present = self.plane.links.load().get(&region).cloned();
        match present {
            Some(link) if link.is_like(&target) => return,
            Some(link) => link.close(),
            None => {}
        }
        let link = Arc::new(Link::new(target, self.plane.stop.child_token()));
        link.prefer(self.plane.home.load(Ordering::Relaxed) == region.0);
        let (plane, served) = (Arc::clone(&self.plane), Arc::clone(&link));
        self.runtime.spawn(link.token().run_until_cancelled_owned(endure("relay link", move || {
            link::serve(Arc::clone(&plane), Arc::clone(&served))
        })));
        self.plane.change_links(|links| drop(links.insert(region, Arc::clone(&link))));
    }

    /// Closes the link to a region, if there is one.
    pub fn close_link(&self, region: RegionId) {
        let _writer = lock(&self.plane.links_writer);
        if let Some(link) = self.plane.links.load().get(&region) {
            link.close();
        }
        self.plane.change_links(|links| drop(links.remove(&region)));
        self.plane.forget_routes(region);
        self.plane.events.link_changed(region, LinkChange::Closed);
    }

    /// Tells every relay whether it is our home.
    pub fn prefer_link(&self, home: RegionId) {
        self.plane.home.store(home.0, Ordering::Relaxed);
        for (region, link) in self.plane.links.load().iter() {
            link.prefer(*region == home);
        }
    }

    /// Asks every link at once whether it is alive; one that does not answer is dialled again.
    pub fn probe_links(&self) {
        self.plane.links.load().values().for_each(|link| link.probe());
    }

    /// Sends a ping to a peer over the direct path that is trusted; where there is none through its relay region,
    /// and over UDP as far as that is due. The answer goes to [`Events::pong`].
    pub fn send_ping(&self, peer: NodePublic, txid: TxId) -> Result<(), PingUnsent> {
        let peer = self.plane.peers.by_key(&peer).ok_or(PingUnsent::UnknownPeer)?;
        let mut pinged = Pinged::default();
        self.plane.feed_and_note(&peer, &mut pinged, |path| path.user_ping(Instant::now(), txid));
        pinged.outcome()
    }

    /// Sends a ping to a peer through WireGuard, by the way that its packets go (tailnet-data 12.2). The answer goes to
    /// [`Events::tsmp_pong`]. Without a session it is lost, and one is begun.
    pub fn send_tsmp_ping(&self, peer: &NodePublic, data: tsmp::Data) -> Result<(), PingUnsent> {
        let peer = self.plane.peers.by_key(peer).ok_or(PingUnsent::UnknownPeer)?;
        let to = peer.settings().addresses.first().copied().ok_or(PingUnsent::UnknownPeer)?;
        peer.ask_tsmp();
        self.plane.send_inner(&peer, inner::tsmp_ping(self.plane.address, to, data));
        Ok(())
    }

    /// Binds the sockets anew, at the same port if it can be had. Sessions and addresses stay as they are; paths do, too,
    /// and have to prove themselves.
    pub async fn rebind(&self) -> Result<LocalPorts, RebindError> {
        let plane = Arc::clone(&self.plane);
        // On the data plane's thread, so that nobody there is in the middle of sending.
        let rebinding = self.runtime.spawn(async move { plane.rebind().await });
        rebinding.await.unwrap_or(Err(RebindError::Stopped))
    }

    /// Where the sockets are bound; `None` without any.
    pub fn local_ports(&self) -> Option<LocalPorts> {
        self.plane.udp.load().as_ref().map(|sockets| sockets.ports())
    }

    /// Whether there are to be sockets, but those could not be bound the last time.
    pub fn lacks_sockets(&self) -> bool {
        self.plane.readers.has_sockets() && self.local_ports().is_none()
    }

    /// Allows direct paths or not, whatever there was. Without sockets there are none.
    pub fn set_direct(&self, policy: Direct) {
        let policy = if self.plane.readers.has_sockets() { policy } else { Direct::Blocked };
        self.plane.peers.set_policy(Instant::now(), policy);
        self.stir(Vec::new());
    }

    /// Our own endpoints, as they were collected just now: what peers are told.
    pub fn set_own_endpoints(&self, endpoints: Vec<SocketAddr>) {
        self.plane.peers.set_own_endpoints(Instant::now(), endpoints);
        self.stir(Vec::new());
    }

    /// Asks a STUN server, from the socket that carries everything else. The answer goes to [`Events::stun`].
    pub fn send_stun(&self, to: SocketAddr, txid: stun::TxId) -> Result<(), StunUnsent> {
        let sockets = self.plane.udp.load();
        let socket = sockets.as_ref().and_then(|sockets| sockets.of(to)).ok_or(StunUnsent::NoSocket)?;
        socket.send(to, &stun::request(&txid), None).map_err(|why| match why {
            Unsent::Blocked => StunUnsent::Busy,
            Unsent::Unreachable | Unsent::TooBig | Unsent::Failed => StunUnsent::Unreachable,
        })
    }

    /// The link to the network changed, or we woke from sleep: every direct path has to prove itself anew.
    pub fn link_changed(&self) {
        self.plane.distrust_paths();
        self.stir(Vec::new());
    }

    /// How each peer is reached.
    pub fn paths(&self) -> BTreeMap<NodePublic, PathInfo> {
        let info =
            |peer: &Arc<Peer>| PathInfo { direct: peer.ways().path.best(), region: peer.settings().home };
        self.plane.peers.all().iter().map(|peer| (peer.key, info(peer))).collect()
    }

    /// Ends every task, closes links and device, and waits until that is done.
    pub async fn stop(&self) {
        self.plane.stop.cancel();
        let _ = tokio::time::timeout(STOP_LIMIT, self.stopped.cancelled()).await;
        self.detach_tun();
        self.plane.links.store(Arc::default());
        self.plane.udp.store(None);
    }

    /// Does what follows for the paths from what they were told, and warms up who is cold.
    fn stir(&self, cold: Vec<Arc<Peer>>) {
        self.runtime.spawn(stir(Arc::clone(&self.plane), cold));
    }
}

type Links = BTreeMap<RegionId, Arc<Link>>;

/// What the tasks share.
pub(crate) struct Plane {
    pub(crate) node: NodePrivate,
    pub(crate) node_public: NodePublic,
    disco: DiscoPrivate,
    disco_public: DiscoPublic,
    address: Ipv6Addr,
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) events: Arc<dyn Events>,
    runtime: Handle,
    me: Weak<Plane>,
    engines: Engines,
    pub(crate) peers: Peers,
    links: ArcSwap<Links>,
    links_writer: Mutex<()>,
    /// Our home region; 0 for none.
    home: AtomicU16,
    timers: Timers,
    /// `None` without sockets, and for moments while they are bound anew.
    udp: ArcSwapOption<Sockets>,
    readers: Readers,
    tun: ArcSwapOption<Tun>,
    tun_task: Mutex<Option<DropGuard>>,
    counters: Counters,
    stop: CancellationToken,
}

impl Plane {
    fn new(config: DataPlaneConfig, policy: Direct, runtime: Handle, stop: CancellationToken) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            node_public: config.node.public(),
            disco_public: config.disco.public(),
            engines: Engines::new(&config.node),
            node: config.node,
            disco: config.disco,
            address: config.address,
            dialer: config.dialer,
            events: config.events,
            runtime,
            me: Weak::clone(me),
            peers: Peers::new(policy),
            links: ArcSwap::default(),
            links_writer: Mutex::new(()),
            home: AtomicU16::new(0),
            timers: Timers::default(),
            udp: ArcSwapOption::empty(),
            readers: Readers::default(),
            tun: ArcSwapOption::empty(),
            tun_task: Mutex::new(None),
            counters: Counters::new(),
            stop,
        })
    }

    /// The link for packets to a peer (tailnet-data 4): its home region's if that is up, else that of the
    /// region it was heard from, else its home region's, which is being dialled.
    fn edge(&self, peer: &Peer) -> Option<Arc<Link>> {
        let links = self.links.load();
        let home = links.get(&peer.settings().home);
        if let Some(home) = home.filter(|home| home.is_up()) {
            return Some(Arc::clone(home));
        }
        let learned = peer.learned_region().and_then(|region| links.get(&region)).filter(|link| link.is_up());
        learned.or(home).cloned()
    }

    /// The link by which a peer's answers come, if it is another than the one for packets to it: peers prefer our home
    /// region, and we theirs. One that is down and not our home any more is none.
    fn way_back(&self, peer: &Peer, there: &Link) -> Option<Arc<Link>> {
        let region = peer.answering_region().filter(|region| *region != there.region())?;
        let is_home = region.0 == self.home.load(Ordering::Relaxed);
        self.links.load().get(&region).filter(|link| link.is_up() || is_home).cloned()
    }

    /// The link for data to a peer. What is sent there may be answered by another link, which has to be alive as well.
    fn edge_for_data(&self, peer: &Peer) -> Option<Arc<Link>> {
        let link = self.edge(peer)?;
        if let Some(back) = self.way_back(peer, &link) {
            back.expect();
        }
        Some(link)
    }

    /// A link has logged in: handshakes that were lost while it was down are started again.
    pub(crate) fn link_up(self: &Arc<Self>, link: &Link) {
        let lost_some = link.take_lost();
        let is_cold = |peer: &Arc<Peer>| {
            let settings = peer.settings();
            let is_there = settings.home == link.region() && settings.keepalive == wireguard::Keepalive::On;
            is_there && (peer.take_cold() || lost_some) && !peer.engine().has_session()
        };
        let cold: Vec<Arc<Peer>> = self.peers.all().into_iter().filter(is_cold).collect();
        if !cold.is_empty() {
            self.runtime.spawn(warm_up(Arc::clone(self), cold));
        }
    }

    /// Nobody is to be reached over what was heard through this region.
    pub(crate) fn forget_routes(&self, region: RegionId) {
        self.peers.all().iter().for_each(|peer| peer.forget_region(region));
    }

    /// Starts a handshake with a peer, or sends a keepalive where there is a session.
    fn warm(&self, peer: &Peer) {
        let mut out = [0; LEAST_ROOM];
        let now = Instant::now();
        let message = {
            let mut engine = peer.engine();
            engine.initiate(now, &mut out).or_else(|| match engine.seal(now, &[], &mut out) {
                Sealed::Data(len) | Sealed::Handshake(len) => Some(len),
                Sealed::Waiting | Sealed::Refused => None,
            })
        };
        if let Some(message) = message.and_then(|len| out.get(..len))
            && self.send(peer, message).is_none()
        {
            peer.set_cold();
        }
    }

    /// Lets time pass for every peer. The handshakes of many can come due together, and each costs about
    /// 0.1 ms: other tasks get their turn in between.
    async fn tick(&self, now: Instant) {
        let (mut out, mut sent) = ([0; LEAST_ROOM], 0_usize);
        for peer in self.peers.all() {
            let ticked = peer.engine().tick(now, &mut out);
            match ticked {
                Ticked::Nothing => {}
                Ticked::Send(len) => {
                    let _ = out.get(..len).map(|message| self.send(&peer, message));
                    sent += 1;
                    if sent.is_multiple_of(WARM_UP_BATCH) {
                        tokio::task::yield_now().await;
                    }
                }
                Ticked::GaveUp { lost } => {
                    self.counters.handshakes_given_up.increment(1);
                    let mut tally = Tally::default();
                    tally.drop_many(Drop::NoSession, lost);
                    self.counters.add(&tally);
                }
            }
        }
    }

    /// A device failed: it is not written to any more, and another may be attached.
    fn lose_tun(&self, lost: &Arc<Tun>) {
        let present = self.tun.load();
        if present.as_ref().is_some_and(|present| Arc::ptr_eq(present, lost)) {
            self.tun.compare_and_swap(&*present, None);
        }
    }

    fn change_links(&self, change: impl Fn(&mut Links)) {
        self.links.rcu(|links| {
            let mut links = Links::clone(links);
            change(&mut links);
            links
        });
    }
}

async fn stir(plane: Arc<Plane>, cold: Vec<Arc<Peer>>) {
    for batch in plane.peers.all().chunks(WARM_UP_BATCH) {
        batch.iter().for_each(|peer| plane.feed(peer, |_| ()));
        tokio::task::yield_now().await;
    }
    warm_up(plane, cold).await;
}

async fn warm_up(plane: Arc<Plane>, peers: Vec<Arc<Peer>>) {
    for batch in peers.chunks(WARM_UP_BATCH) {
        batch.iter().for_each(|peer| plane.warm(peer));
        tokio::task::yield_now().await;
    }
}

async fn keep_time(plane: Arc<Plane>) {
    let mut ticks = tokio::time::interval(wireguard::TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut guard_reset = Instant::now();
    loop {
        ticks.tick().await;
        let now = Instant::now();
        if now.saturating_duration_since(guard_reset) >= wireguard::GUARD_RESET {
            guard_reset = now;
            plane.engines.reset_guard();
        }
        plane.tick(now).await;
    }
}

/// Runs a task of the data plane; one that panics begins again.
async fn endure<W: Future<Output = ()>>(name: &'static str, work: impl Fn() -> W) {
    while let Err(panic) = AssertUnwindSafe(work()).catch_unwind().await {
        tracing::error!(
            task = name,
            panic = panic_text(&*panic),
            "a data plane task panicked and begins again"
        );
        tokio::time::sleep(RESTART_PAUSE).await;
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a text")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
