//! Packet I/O: keeps the data plane's peers equal to the network map, gives it the device that Start asked for,
//! and knows where we are: our sockets, the machine's network, and what peers are told of both. Writes the cells
//! `network`, `families` and `endpoints`.
//!
//! It only controls; packets move in the data plane's tasks ([`crate::data_plane`]), which go on when this
//! part crashes. Its successor finds the device in place and reconciles.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;
use tokio::time::timeout;
use warren_core::{
    endpoints::{Endpoints, Ports},
    netcheck::Families,
    network::{Change, Network},
    path::Direct,
};
use warren_observability::names;

use crate::{
    coordinator::{self, Cause},
    data_plane::RebindError,
    facts::{Net, NetworkOwner},
    interfaces, pinger, relay,
    runtime::{CellWriter, Context, Part, PartError},
};

pub mod batch;
pub mod tun;

use tun::{Tun, TunError};

/// The interface that a tunnel makes for itself when it owns the network.
pub const DEVICE_NAME: &str = "warren0";

const EVERY_FAMILY: Families = Families { v4: true, v6: true };

/// How often it is looked whether the device is still there, and tried again what failed: more often than the budget
/// forgives.
const LOOK_PERIOD: Duration = Duration::from_secs(2);
/// How long a look at the network may keep sockets from being bound anew: it takes milliseconds.
const LIST_LIMIT: Duration = Duration::from_millis(250);

/// What packet I/O hears.
#[derive(Debug)]
pub enum Message {
    /// The network map changed; which one is in the cell.
    MapChanged,
    /// The deployment allows direct paths, or does not any more; which is in the cell.
    DirectChanged,
    /// The machine's network is this by now.
    Network(Arc<Network>),
    /// It was looked how the world sees us; how is in the cell.
    Seen,
    /// Packets leave by other ways than before, or the machine has slept.
    NetworkChanged,
    /// It is time to look whether the device is still there, and whether something is to be tried again.
    Look,
}

/// The part.
pub struct PacketIo {
    net: Arc<Net>,
}

impl PacketIo {
    /// For one Boot.
    pub fn new(net: Arc<Net>) -> Self {
        Self { net }
    }

    fn has_lost_its_device(&self) -> bool {
        self.net.boot.network != NetworkOwner::Nobody && !self.net.data_plane.has_tun()
    }

    fn attach_device(&self) -> Result<(), TunError> {
        if self.net.data_plane.has_tun() {
            return Ok(());
        }
        let tun = match self.net.boot.network {
            NetworkOwner::Manager(descriptor) => Tun::from_fd(descriptor)?,
            NetworkOwner::Tunnel => Tun::from_owned(Tun::create(DEVICE_NAME)?)?,
            NetworkOwner::Nobody => return Ok(()),
        };
        self.net.data_plane.attach_tun(tun);
        Ok(())
    }
}

/// One incarnation of the part.
pub struct State {
    whereabouts: Endpoints,
    /// As it is by now.
    network: Option<Network>,
    /// As those know it whom a change concerns.
    known: CellWriter<Option<Network>>,
    families: CellWriter<Families>,
    endpoints: CellWriter<Vec<SocketAddr>>,
}

impl State {
    /// How the network differs from the one that is known.
    fn change(&self) -> Option<Change> {
        let known = self.known.get();
        known
            .as_ref()
            .as_ref()
            .zip(self.network.as_ref())
            .and_then(|(known, network)| known.change_to(network))
    }
}

impl PacketIo {
    /// Tells the data plane where we are, as of now, and others if that is news.
    fn tell_whereabouts(&self, state: &mut State) {
        let now = Instant::now();
        state.whereabouts.handle_timeout(now);
        let is_allowed = *self.net.direct.get() == Direct::Allowed;
        let list = if is_allowed { state.whereabouts.list(now) } else { Vec::new() };
        self.net.data_plane.set_own_endpoints(list.clone());
        state.endpoints.set_if_changed(list);
    }

    /// Tells whom it concerns that the network is another. What is lost of that on its way is told again at the next
    /// look.
    fn tell_change(&self, state: &mut State) {
        match state.change() {
            // It tells everybody whom that concerns, us at last, and only then it is known: peers are made to leave
            // addresses that we lose once the paths know why.
            Some(Change::Major) => {
                if self.net.coordinator.try_send(coordinator::Message::Wake(Cause::Network)).is_ok() {
                    return;
                }
            }
            Some(Change::Minor) => {
                // The world may see us elsewhere as well. Without room it is being looked at.
                let _ = self.net.relay.try_send(relay::Message::EndpointsWanted);
                take_as_known(state);
            }
            None => take_as_known(state),
        }
        self.tell_whereabouts(state);
    }

    /// A socket that was bound on a network that is gone can be worth nothing on the next one. Which network this is for
    /// is looked up first: when the watcher tells of it, that is no news, and they are not bound anew again.
    async fn bind_anew(&self, state: &mut State) {
        if let Ok(Ok(network)) = timeout(LIST_LIMIT, interfaces::list()).await {
            self.note_network(state, &network);
        }
        take_as_known(state);
        self.net.data_plane.link_changed();
        self.bind().await;
        self.tell_sockets(state);
    }

    /// Binds the sockets anew, if there are to be any. Returns whether that was done.
    async fn bind(&self) -> bool {
        let was_unbound = self.net.data_plane.lacks_sockets();
        let failure = match self.net.data_plane.rebind().await {
            Ok(_) | Err(RebindError::NoSockets) => None,
            Err(error) => Some(error),
        };
        match &failure {
            Some(error) if !was_unbound => {
                tracing::warn!(%error, "the sockets for direct paths cannot be bound anew; everything is relayed until they can");
            }
            None if was_unbound => tracing::info!("the sockets for direct paths are bound again"),
            Some(_) | None => {}
        }
        failure.is_none()
    }

    fn tell_sockets(&self, state: &mut State) {
        state.whereabouts.set_ports(self.ports());
        self.tell_whereabouts(state);
        // Without room it is being looked at.
        let _ = self.net.relay.try_send(relay::Message::SocketsBound);
    }

    /// Takes how the world sees our sockets, if it is these that were looked at.
    fn take_seen(&self, state: &mut State) {
        let seen = self.net.netcheck.get();
        if seen.ports == self.net.data_plane.local_ports() {
            state.whereabouts.handle_mappings(Instant::now(), &seen.mappings);
            self.tell_whereabouts(state);
        }
    }

    /// Takes over which network the machine is on, our own device apart.
    fn note_network(&self, state: &mut State, network: &Network) {
        let own = self.net.data_plane.device_name();
        let network = own.map_or_else(|| network.clone(), |own| network.without(&own));
        state.whereabouts.set_interfaces(network.interfaces.clone());
        state.network = Some(network);
        let families = state.whereabouts.families();
        // A machine that is on no network can still have its deployment, a lab, on itself.
        let families = if families == Families::default() { EVERY_FAMILY } else { families };
        state.families.set_if_changed(families);
    }

    fn ports(&self) -> Ports {
        let ports = self.net.data_plane.local_ports();
        Ports { v4: ports.map(|ports| ports.v4), v6: ports.and_then(|ports| ports.v6) }
    }
}

/// Everybody whom it concerns knows of the network as it is by now.
fn take_as_known(state: &mut State) {
    if state.change() == Some(Change::Major) {
        tracing::info!("the network has changed");
        counter!(names::NETWORK_CHANGES).increment(1);
    }
    if state.network.is_some() {
        state.known.set_if_changed(state.network.clone());
    }
}

impl Part for PacketIo {
    type Message = Message;
    type State = State;

    async fn start(&self, context: &Context<Message>) -> Result<State, PartError> {
        self.attach_device()?;
        let (families, endpoints) = (self.net.families.claim()?, self.net.endpoints.claim()?);
        let known = self.net.network.claim()?;
        let mut whereabouts = Endpoints::new();
        whereabouts.set_ports(self.ports());
        context.follow(self.net.network_map.view(), || Message::MapChanged);
        context.follow(self.net.direct.view(), || Message::DirectChanged);
        context.follow(self.net.netcheck.view(), || Message::Seen);
        context.tick(LOOK_PERIOD, || Message::Look);
        let me = context.me.clone();
        context.tasks.spawn(interfaces::watch(move |network| {
            let me = me.clone();
            // A part that is down looks anew when it is back.
            async move { me.send(Message::Network(network)).await.unwrap_or_default() }
        }));
        Ok(State { whereabouts, network: None, known, families, endpoints })
    }

    async fn handle(
        &self,
        _: &Context<Message>,
        state: &mut State,
        message: Message,
    ) -> Result<(), PartError> {
        match message {
            Message::DirectChanged => {
                self.net.data_plane.set_direct(*self.net.direct.get());
                self.tell_whereabouts(state);
            }
            Message::Network(network) => {
                self.note_network(state, &network);
                self.tell_change(state);
            }
            Message::Seen => self.take_seen(state),
            Message::NetworkChanged => self.bind_anew(state).await,
            Message::MapChanged => {
                let net = Arc::clone(&self.net);
                tokio::task::spawn_blocking(move || net.data_plane.follow_peers(&net.network_map)).await?;
                // Pings to peers that were not here yet went nowhere; if this is lost, they are repeated soon.
                let _ = self.net.pinger.try_send(pinger::Message::PathUp);
            }
            // A restart attaches it again; one that cannot be had spends the budget, and the process says so.
            Message::Look if self.has_lost_its_device() => return Err("the device is gone".into()),
            Message::Look => {
                if state.change() == Some(Change::Major) {
                    self.tell_change(state);
                }
                if self.net.data_plane.lacks_sockets() && self.bind().await {
                    self.tell_sockets(state);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::ready,
        io,
        net::Ipv4Addr,
        os::{fd::AsRawFd, unix::net::UnixDatagram},
        sync::atomic::{AtomicBool, Ordering},
    };

    use uuid::Uuid;
    use warren_core::{
        coordination::{NetworkMap, Peer},
        netcheck::Mappings,
        network::{Interface, Uplink},
        relay_map::RegionId,
    };
    use warren_proto::key::{DiscoPublic, NodePrivate};

    use super::*;
    use crate::{
        facts::Seen,
        relay::tests::{net, net_with},
        runtime::{Tasks, ears::ears},
        udp::{LocalPorts, MakeSockets, SocketsFuture, UdpError, UdpSockets},
    };

    #[tokio::test]
    async fn the_managers_descriptor_becomes_the_device_and_stays_it_over_a_restart() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let net = Arc::new(net(NetworkOwner::Manager(ours.as_raw_fd())));
        start(&net).await.unwrap();
        assert!(net.data_plane.has_tun());
        drop(ours);
        start(&net).await.unwrap();
        theirs.send(b"the data plane holds a copy of its own").unwrap();
    }

    #[tokio::test]
    async fn without_a_device_nothing_is_attached() {
        let net = Arc::new(net(NetworkOwner::Nobody));
        start(&net).await.unwrap();
        assert!(!net.data_plane.has_tun());
    }

    #[tokio::test]
    async fn a_descriptor_that_is_not_open_is_an_error_that_names_it() {
        let net = Arc::new(net(NetworkOwner::Manager(-1)));
        let error = start(&net).await.unwrap_err();
        assert_eq!(error.to_string(), "descriptor -1 is not open in this process");
    }

    #[tokio::test]
    async fn peers_follow_the_network_map() {
        let net = Arc::new(net(NetworkOwner::Nobody));
        let key = NodePrivate::generate().public();
        let peer = Peer {
            node_key: key,
            disco_key: DiscoPublic([1; 32]),
            home: RegionId(1),
            addresses: Vec::new(),
            keepalive: false,
            endpoints: Vec::new(),
            announcements: 1,
        };
        let map = net.network_map.claim().unwrap();
        map.set(NetworkMap { peers: [(Uuid::nil(), peer)].into() });
        hear_change(&net).await;
        assert_eq!(net.data_plane.stats().into_keys().collect::<Vec<_>>(), [key]);
        map.set(NetworkMap::default());
        hear_change(&net).await;
        assert!(net.data_plane.stats().is_empty());
    }

    /// Conforms: control:N3
    #[tokio::test]
    async fn what_was_seen_of_sockets_elsewhere_is_not_told() {
        let net = Arc::new(net(NetworkOwner::Nobody));
        let (part, seen) = (PacketIo::new(Arc::clone(&net)), net.netcheck.claim().unwrap());
        let mut state = part.start(&context(&net)).await.unwrap();
        let mapped = "198.51.100.9:1111".parse().unwrap();
        let elsewhere = Some(LocalPorts { v4: 41641, v6: None });
        for (ports, told) in
            [(elsewhere, vec![]), (net.data_plane.local_ports(), vec![SocketAddr::V4(mapped)])]
        {
            let mappings = Mappings { v4: Some(mapped), ..Mappings::default() };
            seen.set(Seen { mappings, ports, ..Seen::default() });
            part.handle(&context(&net), &mut state, Message::Seen).await.unwrap();
            assert_eq!(**net.endpoints.get(), told);
        }
    }

    #[tokio::test]
    async fn a_network_for_which_the_sockets_were_bound_anew_is_no_news_when_the_watcher_tells_of_it() {
        let here = interfaces::list().await.unwrap();
        for (is_woken, news) in [(false, Some(Change::Major)), (true, None)] {
            let net = Arc::new(net(NetworkOwner::Nobody));
            let (part, context) = (PacketIo::new(Arc::clone(&net)), context(&net));
            let mut state = part.start(&context).await.unwrap();
            state.known.set(Some(elsewhere()));
            if is_woken {
                part.handle(&context, &mut state, Message::NetworkChanged).await.unwrap();
            }
            part.note_network(&mut state, &here);
            assert_eq!(state.change(), news);
        }
    }

    /// Whoever has to tell the others may be down just then; so may this part.
    #[tokio::test]
    async fn a_change_of_the_network_is_told_once_somebody_can_be_told_by_a_successor_too() {
        let net = Arc::new(net(NetworkOwner::Nobody));
        let (part, context) = (PacketIo::new(Arc::clone(&net)), context(&net));
        let mut state = part.start(&context).await.unwrap();
        part.handle(&context, &mut state, Message::Network(Arc::new(elsewhere()))).await.unwrap();
        let here = Arc::new(interfaces::list().await.unwrap());
        part.handle(&context, &mut state, Message::Network(Arc::clone(&here))).await.unwrap();
        drop(state);
        let mut state = part.start(&context).await.unwrap();
        part.handle(&context, &mut state, Message::Network(here)).await.unwrap();
        let mut coordinator = ears(&net.coordinator).await;
        // Until it has come back to us it may have been lost.
        for message in [Message::Look, Message::Look, Message::NetworkChanged, Message::Look] {
            part.handle(&context, &mut state, message).await.unwrap();
        }
        net.coordinator.try_send(coordinator::Message::Wake(Cause::Manager)).unwrap();
        for expected in [Cause::Network, Cause::Network, Cause::Manager] {
            let wake = coordinator.recv().await.unwrap();
            assert!(matches!(wake, coordinator::Message::Wake(cause) if cause == expected), "{wake:?}");
        }
    }

    /// Fails when it is asked next.
    #[derive(Debug, Default)]
    struct OutOfSockets(AtomicBool);

    impl MakeSockets for OutOfSockets {
        fn make(self: Arc<Self>, port: u16) -> SocketsFuture {
            let made = if self.0.swap(false, Ordering::Relaxed) {
                Err(UdpError::Options(io::Error::from_raw_os_error(24)))
            } else {
                UdpSockets::bind(port)
            };
            Box::pin(ready(made.map(|made| made.made_by(self))))
        }
    }

    #[tokio::test]
    async fn sockets_that_could_not_be_bound_anew_are_tried_again_and_told_of() {
        let maker = Arc::new(OutOfSockets::default());
        let sockets = Arc::clone(&maker).make(0).await.unwrap();
        let port = sockets.ports().v4;
        let net = Arc::new(net_with(NetworkOwner::Nobody, Some(sockets)));
        let (part, context) = (PacketIo::new(Arc::clone(&net)), context(&net));
        let mut state = part.start(&context).await.unwrap();
        let mut relay = ears(&net.relay).await;
        maker.0.store(true, Ordering::Relaxed);
        part.handle(&context, &mut state, Message::NetworkChanged).await.unwrap();
        assert_eq!((net.data_plane.local_ports(), net.endpoints.get().len()), (None, 0));
        for _ in 0..2 {
            part.handle(&context, &mut state, Message::Look).await.unwrap();
        }
        assert_eq!(net.data_plane.local_ports().map(|ports| ports.v4), Some(port));
        net.relay.try_send(relay::Message::EndpointsWanted).unwrap();
        for _ in 0..2 {
            assert!(matches!(relay.recv().await, Some(relay::Message::SocketsBound)));
        }
        let last = relay.recv().await;
        assert!(
            matches!(last, Some(relay::Message::EndpointsWanted)),
            "sockets that are there are left alone: {last:?}"
        );
    }

    /// A network that is not this machine's.
    fn elsewhere() -> Network {
        let addresses = ["192.0.2.7".parse().unwrap()].into();
        let interface = Interface { index: 99, name: "elsewhere".to_owned(), is_up: true, addresses };
        let uplink = Uplink {
            destination: Ipv4Addr::UNSPECIFIED.into(),
            gateway: "192.0.2.1".parse().ok(),
            interface: Some(99),
            table: 254,
            metric: 1,
        };
        Network { interfaces: vec![interface], uplinks: [uplink].into() }
    }

    async fn start(net: &Arc<Net>) -> Result<(), PartError> {
        PacketIo::new(Arc::clone(net)).start(&context(net)).await.map(drop)
    }

    async fn hear_change(net: &Arc<Net>) {
        let part = PacketIo::new(Arc::clone(net));
        let mut state = part.start(&context(net)).await.unwrap();
        part.handle(&context(net), &mut state, Message::MapChanged).await.unwrap();
    }

    fn context(net: &Arc<Net>) -> Context<Message> {
        Context { me: net.packet_io.clone(), tasks: Tasks::default() }
    }
}
