//! The peers of the data plane: one engine and one path each, behind a lock of its own, and the tables that find
//! them. Where both locks are held, the engine's was taken first.

use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv6Addr, SocketAddr},
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use warren_core::{
    coordination::{self, NetworkMap},
    path::{Direct, Path, ReceiveMap},
    relay_map::RegionId,
};
use warren_proto::key::{BoxShared, DiscoPrivate, DiscoPublic, NodePublic};

use super::{PeerStats, counters::Amount};
use crate::wireguard::{Engine, Engines, Keepalive};

/// The peers by address: what a packet from the TUN asks.
pub(crate) type Routes = HashMap<Ipv6Addr, Arc<Peer>>;

/// With the session number that completes it, a receiver index would stand where STUN has its magic cookie.
const LOOKS_LIKE_STUN: u32 = 0x42_a412;

/// More answers than this nobody hears at once.
const MAX_TSMP_ASKED: u32 = 64;

/// One peer. Its engine lives as long as both of its keys stay.
pub(crate) struct Peer {
    /// Its WireGuard key and name at relays.
    pub(crate) key: NodePublic,
    /// Its disco key.
    pub(crate) disco_key: DiscoPublic,
    index: u32,
    engine: Mutex<Box<dyn Engine>>,
    ways: Mutex<Ways>,
    settings: ArcSwap<Settings>,
    disco: OnceLock<BoxShared>,
    /// The region it was heard from last; 0 for none.
    learned: AtomicU16,
    /// The region by which its packets came last: probes are answered by the region that they came by.
    answering: AtomicU16,
    /// A handshake could not be sent; to be started when there is a link.
    cold: AtomicBool,
    /// Pings through WireGuard that it may still answer, [`MAX_TSMP_ASKED`] at most: it may have lost them.
    tsmp_asked: AtomicU32,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
}

/// The ways to a peer, and when their time comes.
#[derive(Debug, Default)]
pub(crate) struct Ways {
    pub(crate) path: Path,
    /// For when the timers have it; `None` while they do not.
    pub(super) due: Option<Instant>,
}

/// What may change while the sessions stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Where it listens.
    pub(crate) home: RegionId,
    /// The addresses that are its own.
    pub(crate) addresses: Vec<Ipv6Addr>,
    /// Whether its tunnel is kept warm.
    pub(crate) keepalive: Keepalive,
    /// Where it says that it is reached over UDP.
    endpoints: Vec<SocketAddr>,
    /// How often it said that it knows us.
    announcements: u32,
}

/// What every path has to know about ourselves.
#[derive(Debug, Default)]
struct Surroundings {
    policy: Direct,
    /// Our endpoints, and when they were collected.
    own: Option<(Instant, Vec<SocketAddr>)>,
}

impl Peer {
    fn new(peer: &coordination::Peer, index: u32, mut engine: Box<dyn Engine>, path: Path) -> Self {
        let settings = Settings::of(peer);
        engine.set_keepalive(settings.keepalive);
        Self {
            key: peer.node_key,
            disco_key: peer.disco_key,
            index,
            engine: Mutex::new(engine),
            ways: Mutex::new(Ways { path, due: None }),
            settings: ArcSwap::from_pointee(settings),
            disco: OnceLock::new(),
            learned: AtomicU16::new(0),
            answering: AtomicU16::new(0),
            cold: AtomicBool::new(false),
            tsmp_asked: AtomicU32::new(0),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        }
    }

    /// The engine; never held across an await or a system call.
    pub(crate) fn engine(&self) -> MutexGuard<'_, Box<dyn Engine>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ways to it; never held across an await or a system call.
    pub(super) fn ways(&self) -> MutexGuard<'_, Ways> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it listens, what is its own.
    pub(crate) fn settings(&self) -> arc_swap::Guard<Arc<Settings>> {
        self.settings.load()
    }

    /// The boxes between our disco key and its own; made when first needed, since they cost 0.1 ms.
    pub(crate) fn disco(&self, own: &DiscoPrivate) -> &BoxShared {
        self.disco.get_or_init(|| own.shared(&self.disco_key))
    }

    /// The region it was heard from last.
    pub(crate) fn learned_region(&self) -> Option<RegionId> {
        RegionId::new(i64::from(self.learned.load(Ordering::Relaxed)))
    }

    /// Remembers where it was heard from.
    pub(crate) fn learn_region(&self, region: RegionId) {
        self.learned.store(region.0, Ordering::Relaxed);
    }

    /// Forgets that it was heard from `region`.
    pub(crate) fn forget_region(&self, region: RegionId) {
        let _ = self.learned.compare_exchange(region.0, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The region by which its packets came last.
    pub(crate) fn answering_region(&self) -> Option<RegionId> {
        RegionId::new(i64::from(self.answering.load(Ordering::Relaxed)))
    }

    /// Remembers by which region its packets come.
    pub(crate) fn note_answering(&self, region: RegionId) {
        self.answering.store(region.0, Ordering::Relaxed);
    }

    /// Remembers that its handshake could not be sent.
    pub(crate) fn set_cold(&self) {
        self.cold.store(true, Ordering::Relaxed);
    }

    /// Whether its handshake could not be sent; only once.
    pub(crate) fn take_cold(&self) -> bool {
        self.cold.swap(false, Ordering::Relaxed)
    }

    /// It is asked through WireGuard.
    pub(crate) fn ask_tsmp(&self) {
        let asked = |asked: u32| Some((asked + 1).min(MAX_TSMP_ASKED));
        // It cannot fail.
        let _ = self.tsmp_asked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, asked);
    }

    /// It answers such a question. Returns whether there was one for each answer: nobody is kept busy by others.
    pub(crate) fn take_tsmp(&self) -> bool {
        let asked = |asked: u32| asked.checked_sub(1);
        self.tsmp_asked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, asked).is_ok()
    }

    /// Counts traffic for the statistics.
    pub(crate) fn count(&self, received: Amount, sent: Amount) {
        if received.bytes > 0 {
            self.received_bytes.fetch_add(received.bytes, Ordering::Relaxed);
        }
        if sent.bytes > 0 {
            self.sent_bytes.fetch_add(sent.bytes, Ordering::Relaxed);
        }
    }

    /// What there is to say about it.
    pub(crate) fn stats(&self) -> PeerStats {
        PeerStats {
            last_handshake: self.engine().last_handshake(),
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
        }
    }
}

impl Settings {
    fn of(peer: &coordination::Peer) -> Self {
        let keepalive = if peer.keepalive { Keepalive::On } else { Keepalive::Off };
        Self {
            home: peer.home,
            addresses: peer.addresses.clone(),
            keepalive,
            endpoints: peer.endpoints.clone(),
            announcements: peer.announcements,
        }
    }
}

impl Surroundings {
    /// Who is programmed may be probed: the time for READY is over.
    fn path_to(&self, now: Instant, peer: &coordination::Peer) -> Path {
        let mut path = Path::new();
        path.set_policy(now, self.policy);
        if let Some((collected_at, own)) = &self.own {
            path.handle_own_endpoints(*collected_at, own);
        }
        path.handle_node(now, &peer.endpoints);
        path.handle_ready(now);
        path
    }
}

/// The tables. One writer (packet I/O, through [`Peers::set`]), readers on any thread.
pub(crate) struct Peers {
    by_key: DashMap<NodePublic, Arc<Peer>>,
    by_index: DashMap<u32, Arc<Peer>>,
    by_disco: DashMap<DiscoPublic, Vec<Arc<Peer>>>,
    /// From where WireGuard over UDP is taken.
    sources: RwLock<ReceiveMap>,
    /// Who was asked last at an address, whether or not it is there.
    asked: Mutex<ReceiveMap>,
    routes: ArcSwap<Routes>,
    writer: Mutex<Surroundings>,
}

impl Peers {
    /// Nobody.
    pub(crate) fn new(policy: Direct) -> Self {
        Self {
            by_key: DashMap::new(),
            by_index: DashMap::new(),
            by_disco: DashMap::new(),
            sources: RwLock::default(),
            asked: Mutex::default(),
            routes: ArcSwap::from_pointee(Routes::new()),
            writer: Mutex::new(Surroundings { policy, own: None }),
        }
    }

    /// The peer with this key.
    pub(crate) fn by_key(&self, key: &NodePublic) -> Option<Arc<Peer>> {
        self.by_key.get(key).map(|peer| Arc::clone(&peer))
    }

    /// The peers with this disco key; almost always one.
    pub(super) fn by_disco(&self, key: &DiscoPublic) -> Vec<Arc<Peer>> {
        self.by_disco.get(key).map(|peers| peers.clone()).unwrap_or_default()
    }

    /// The peer that is known to send from an address.
    pub(super) fn by_source(&self, from: &SocketAddr) -> Option<Arc<Peer>> {
        let key = self.sources.read().unwrap_or_else(PoisonError::into_inner).get(from).copied();
        self.by_key(&key?)
    }

    /// The peer that is at an address, or was last asked there.
    pub(super) fn by_destination(&self, to: &SocketAddr) -> Option<Arc<Peer>> {
        self.by_source(to).or_else(|| {
            let key = lock(&self.asked).get(to).copied();
            self.by_key(&key?)
        })
    }

    /// A peer sends from this address. That is nearly always known.
    pub(super) fn add_source(&self, from: SocketAddr, peer: &NodePublic) {
        if self.sources.read().unwrap_or_else(PoisonError::into_inner).get(&from) == Some(peer) {
            return;
        }
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        if !sources.insert(from, *peer) {
            tracing::debug!("the table of peers' addresses is full: a peer stays relayed");
        }
    }

    /// A peer does not send from this address any more.
    pub(super) fn remove_source(&self, from: &SocketAddr, peer: &NodePublic) {
        self.sources.write().unwrap_or_else(PoisonError::into_inner).remove(from, peer);
        lock(&self.asked).remove(from, peer);
    }

    /// A peer is asked whether it is at this address.
    pub(super) fn note_asked(&self, to: SocketAddr, peer: &NodePublic) {
        let _ = lock(&self.asked).insert(to, *peer);
    }

    /// Whether direct paths may be used. What follows for the paths is to be carried out.
    pub(super) fn set_policy(&self, now: Instant, policy: Direct) {
        let mut surroundings = lock(&self.writer);
        surroundings.policy = policy;
        self.all().iter().for_each(|peer| peer.ways().path.set_policy(now, policy));
    }

    /// Our endpoints, collected just now. What follows for the paths is to be carried out.
    pub(super) fn set_own_endpoints(&self, now: Instant, own: Vec<SocketAddr>) {
        let mut surroundings = lock(&self.writer);
        self.all().iter().for_each(|peer| peer.ways().path.handle_own_endpoints(now, &own));
        surroundings.own = Some((now, own));
    }

    /// The present routes.
    pub(crate) fn routes(&self) -> arc_swap::Guard<Arc<Routes>> {
        self.routes.load()
    }

    /// Everybody.
    pub(crate) fn all(&self) -> Vec<Arc<Peer>> {
        self.by_key.iter().map(|peer| Arc::clone(&peer)).collect()
    }

    /// Makes the tables equal to the latest map. Returns the peers whose tunnel is to be warmed up at once.
    /// `latest` is asked only when no other writer can come in between: who was overtaken must not bring back
    /// an older map.
    pub(crate) fn set<M: Deref<Target = NetworkMap>>(
        &self,
        latest: impl FnOnce() -> M,
        engines: &Engines,
        now: Instant,
    ) -> Vec<Arc<Peer>> {
        let surroundings = lock(&self.writer);
        let map = &*latest();
        let wanted: BTreeMap<NodePublic, &coordination::Peer> =
            map.peers.values().map(|peer| (peer.node_key, peer)).collect();
        let gone = |key: &NodePublic, peer: &Arc<Peer>| {
            wanted.get(key).is_none_or(|wanted| wanted.disco_key != peer.disco_key)
        };
        let removed: Vec<Arc<Peer>> =
            self.by_key.iter().filter(|it| gone(it.key(), it.value())).map(|it| Arc::clone(&it)).collect();
        removed.iter().for_each(|peer| self.remove(peer));
        let cold =
            wanted.values().filter_map(|peer| self.set_one(&surroundings, peer, engines, now)).collect();
        self.routes.store(Arc::new(self.make_routes(map)));
        cold
    }

    fn set_one(
        &self,
        surroundings: &Surroundings,
        wanted: &coordination::Peer,
        engines: &Engines,
        now: Instant,
    ) -> Option<Arc<Peer>> {
        let settings = Settings::of(wanted);
        let Some(peer) = self.by_key(&wanted.node_key) else {
            let peer = self.insert(wanted, engines, surroundings.path_to(now, wanted), now);
            return (settings.keepalive == Keepalive::On).then_some(peer);
        };
        if **peer.settings() == settings {
            return None;
        }
        let was = Settings::clone(&peer.settings());
        peer.engine().set_keepalive(settings.keepalive);
        if was.endpoints != settings.endpoints {
            peer.ways().path.handle_node(now, &settings.endpoints);
        }
        let (is_warm, is_ready) =
            (settings.keepalive == Keepalive::On, was.announcements < settings.announcements);
        if is_ready {
            peer.ways().path.handle_ready(now);
        }
        peer.settings.store(Arc::new(settings));
        // Who knows us only now did not understand the handshake that was sent before.
        let is_cold = was.keepalive == Keepalive::Off || is_ready && !peer.engine().has_session();
        (is_warm && is_cold).then_some(peer)
    }

    fn insert(&self, wanted: &coordination::Peer, engines: &Engines, path: Path, now: Instant) -> Arc<Peer> {
        let index = self.free_index();
        let peer = Arc::new(Peer::new(wanted, index, engines.engine(&wanted.node_key, index, now), path));
        self.by_index.insert(index, Arc::clone(&peer));
        self.by_disco.entry(wanted.disco_key).or_default().push(Arc::clone(&peer));
        self.by_key.insert(wanted.node_key, Arc::clone(&peer));
        peer
    }

    fn remove(&self, peer: &Arc<Peer>) {
        self.by_key.remove(&peer.key);
        self.by_index.remove(&peer.index);
        if let Some(mut sharing) = self.by_disco.get_mut(&peer.disco_key) {
            sharing.retain(|other| !Arc::ptr_eq(other, peer));
        }
        self.by_disco.remove_if(&peer.disco_key, |_, sharing| sharing.is_empty());
        self.sources.write().unwrap_or_else(PoisonError::into_inner).forget(&peer.key);
        lock(&self.asked).forget(&peer.key);
    }

    fn free_index(&self) -> u32 {
        loop {
            // 24 bits: the engine puts its session number below them.
            let index = rand::random::<u32>() >> 8;
            if index != LOOKS_LIKE_STUN && !self.by_index.contains_key(&index) {
                return index;
            }
        }
    }

    /// Where two peers claim one address, the first one in the map has it.
    fn make_routes(&self, map: &NetworkMap) -> Routes {
        let mut routes = Routes::new();
        for peer in map.peers.values().filter_map(|peer| self.by_key(&peer.node_key)) {
            for address in &peer.settings().addresses {
                routes.entry(*address).or_insert_with(|| Arc::clone(&peer));
            }
        }
        routes
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use warren_proto::key::NodePrivate;

    use super::*;

    #[test]
    fn a_peer_keeps_its_engine_when_only_home_addresses_or_keepalive_change() {
        let (peers, engines) = (Peers::new(Direct::Blocked), engines());
        let mut map = network(1);
        peers.set(|| &map, &engines, Instant::now());
        let before = peers.by_key(&key(0)).unwrap();
        let peer = map.peers.get_mut(&Uuid::from_u128(0)).unwrap();
        peer.home = RegionId(7);
        peer.addresses = vec![address(99)];
        peers.set(|| &map, &engines, Instant::now());
        let after = peers.by_key(&key(0)).unwrap();
        assert!(Arc::ptr_eq(&before, &after));
        assert_eq!(after.settings().home, RegionId(7));
        assert!(peers.routes().contains_key(&address(99)));
        assert!(!peers.routes().contains_key(&address(0)));
    }

    #[test]
    fn another_disco_or_node_key_makes_another_peer() {
        let (peers, engines) = (Peers::new(Direct::Blocked), engines());
        let mut map = network(1);
        peers.set(|| &map, &engines, Instant::now());
        let before = peers.by_key(&key(0)).unwrap();
        map.peers.get_mut(&Uuid::from_u128(0)).unwrap().disco_key = DiscoPublic([9; 32]);
        peers.set(|| &map, &engines, Instant::now());
        assert!(!Arc::ptr_eq(&before, &peers.by_key(&key(0)).unwrap()));
        map.peers.get_mut(&Uuid::from_u128(0)).unwrap().node_key = key(5);
        peers.set(|| &map, &engines, Instant::now());
        assert!(peers.by_key(&key(0)).is_none());
        assert!(peers.by_key(&key(5)).is_some());
        assert_eq!(peers.by_index.len(), 1);
    }

    #[test]
    fn a_peer_is_warmed_up_when_it_comes_or_becomes_ready() {
        let (peers, engines) = (Peers::new(Direct::Blocked), engines());
        let mut map = network(2);
        map.peers.get_mut(&Uuid::from_u128(1)).unwrap().keepalive = false;
        let keys = |peers: Vec<Arc<Peer>>| peers.iter().map(|peer| peer.key).collect::<Vec<_>>();
        assert_eq!(keys(peers.set(|| &map, &engines, Instant::now())), [key(0)]);
        map.peers.get_mut(&Uuid::from_u128(1)).unwrap().keepalive = true;
        assert_eq!(keys(peers.set(|| &map, &engines, Instant::now())), [key(1)]);
        assert!(peers.set(|| &map, &engines, Instant::now()).is_empty());
    }

    #[test]
    fn a_removed_peer_leaves_every_table() {
        let (peers, engines) = (Peers::new(Direct::Blocked), engines());
        let map = network(3);
        peers.set(|| &map, &engines, Instant::now());
        let from = "192.0.2.1:1".parse().unwrap();
        peers.add_source(from, &key(2));
        peers.note_asked(from, &key(2));
        assert_eq!(peers.by_source(&from).unwrap().key, key(2));
        let map = network(2);
        peers.set(|| &map, &engines, Instant::now());
        assert!(peers.by_key(&key(2)).is_none());
        assert!(peers.by_disco(&DiscoPublic([3; 32])).is_empty());
        assert!(peers.by_source(&from).is_none() && peers.by_destination(&from).is_none());
        assert_eq!(peers.by_index.len(), 2);
        assert_eq!(peers.routes().len(), 2);
    }

    #[test]
    fn the_first_peer_that_claims_an_address_has_it() {
        let (peers, engines) = (Peers::new(Direct::Blocked), engines());
        let mut map = network(2);
        map.peers.get_mut(&Uuid::from_u128(1)).unwrap().addresses = vec![address(0)];
        peers.set(|| &map, &engines, Instant::now());
        assert_eq!(peers.routes().get(&address(0)).unwrap().key, key(0));
    }

    #[test]
    fn the_map_is_read_by_the_one_writer_and_not_before_its_turn() {
        let (peers, engines, map) = (Peers::new(Direct::Blocked), engines(), network(1));
        let latest = || {
            assert!(peers.writer.try_lock().is_err());
            &map
        };
        assert_eq!(peers.set(latest, &engines, Instant::now()).len(), 1);
    }

    #[test]
    fn a_handshake_that_was_sent_before_the_peer_knew_us_is_repeated_once_it_does() {
        let (peers, engines) = (Peers::new(Direct::Blocked), engines());
        let mut map = network(1);
        map.peers.get_mut(&Uuid::from_u128(0)).unwrap().announcements = 0;
        assert_eq!(peers.set(|| &map, &engines, Instant::now()).len(), 1);
        map.peers.get_mut(&Uuid::from_u128(0)).unwrap().announcements = 1;
        assert_eq!(peers.set(|| &map, &engines, Instant::now()).len(), 1);
        assert!(peers.set(|| &map, &engines, Instant::now()).is_empty());
    }

    #[test]
    fn peers_that_share_a_disco_key_are_found_by_it_and_leave_one_by_one() {
        let (peers, engines) = (Peers::new(Direct::Blocked), engines());
        let mut map = network(2);
        map.peers.get_mut(&Uuid::from_u128(1)).unwrap().disco_key = DiscoPublic([1; 32]);
        peers.set(|| &map, &engines, Instant::now());
        assert_eq!(peers.by_disco(&DiscoPublic([1; 32])).len(), 2);
        map.peers.remove(&Uuid::from_u128(0));
        peers.set(|| &map, &engines, Instant::now());
        let left: Vec<NodePublic> = peers.by_disco(&DiscoPublic([1; 32])).iter().map(|it| it.key).collect();
        assert_eq!(left, [key(1)]);
    }

    fn engines() -> Engines {
        Engines::new(&NodePrivate::generate())
    }

    fn network(peers: u8) -> NetworkMap {
        let peer = |number: u8| coordination::Peer {
            node_key: key(number),
            disco_key: DiscoPublic([number + 1; 32]),
            home: RegionId(1),
            addresses: vec![address(number)],
            keepalive: true,
            endpoints: Vec::new(),
            announcements: 1,
        };
        let peers = (0..peers).map(|number| (Uuid::from_u128(u128::from(number)), peer(number))).collect();
        NetworkMap { peers }
    }

    fn key(number: u8) -> NodePublic {
        NodePrivate::from_bytes([number + 1; 32]).public()
    }

    fn address(number: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd60, 0, 0, 0, 0, 0, 0, u16::from(number))
    }
}
