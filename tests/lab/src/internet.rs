//! A small internet on one machine: hosts in network namespaces, each with a TUN device as its uplink, and one
//! router in this process between them, with translators, firewalls and bad lines as sites have them. Real programs
//! run on its hosts. It needs the privileges of a user namespace's root, and no package.
//!
//! ```text
//!  namespace                     this process                      namespace
//!  host ── uplink0 ═══╗   ┌── site: line, translator ──┐   ╔═══ uplink0 ── host
//!  host ── uplink0 ═══╬═══╡                            ╞═══╣
//!                     ║   └── site: line, translator ──┘   ╚═══ uplink0 ── where we are
//! ```
//! A packet to a host of the same site stays there. Any other meets the line of its own site and that of its
//! destination, is translated where it leaves and where it enters, and dropped if it is of nobody's or to nobody.
//! The router's rules are in `internet/router.rs`, without devices; what becomes of each packet is counted.
//!
//! What real ones do and this one does not: pieces of packets, ICMP through translators, hairpins, queues.

mod namespace;
mod packet;
mod router;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};

use self::router::{Onward, Router};
pub use self::{
    namespace::{Namespace, UPLINK},
    router::{Fate, HostId, Line, Mtu, SiteId},
};
use crate::{agent::udp::UdpBinder, nat::Kind};

/// What the kernel puts in front of a packet: how it is to be segmented, which is not at all.
const VIRTIO: usize = 10;
/// The largest packet of a device.
const LARGEST: usize = VIRTIO + 1500;
/// Packets that are taken from a device before others get their turn.
const BATCH: usize = 64;
/// Packets under way; what is more is lost.
const MAX_UNDER_WAY: usize = 4096;

/// A running internet. All of it ends with it and with the processes on its hosts.
#[derive(Debug)]
pub struct Internet {
    shared: Arc<Shared>,
    namespaces: Vec<Arc<Namespace>>,
    router: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Tells the thread that the state is another.
    changed: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    router: Router,
    /// By host.
    uplinks: Vec<Arc<OwnedFd>>,
    is_over: bool,
}

impl Internet {
    /// Starts one without any sites.
    pub fn start() -> io::Result<Self> {
        let changed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed });
        let serving = Arc::clone(&shared);
        let router = thread::Builder::new().name("router".to_owned()).spawn(move || serve(&serving))?;
        Ok(Self { shared, namespaces: Vec::new(), router: Some(router) })
    }

    /// Adds a site whose hosts have addresses of the world.
    pub fn add_site(&self) -> SiteId {
        self.shared.lock().router.add_site(None)
    }

    /// Adds a site behind a translator with this address in the world. IPv6 passes it untouched.
    pub fn add_home(&self, kind: Kind, outer: Ipv4Addr) -> SiteId {
        self.shared.lock().router.add_site(Some((kind, outer)))
    }

    /// Adds a host in a namespace of its own.
    pub fn add_host(&mut self, site: SiteId, addresses: &[IpAddr]) -> io::Result<HostId> {
        self.add(Namespace::make()?, site, addresses)
    }

    /// Makes the namespace where we are a host.
    pub fn add_ourselves(&mut self, site: SiteId, addresses: &[IpAddr]) -> io::Result<HostId> {
        self.add(Namespace::here()?, site, addresses)
    }

    fn add(&mut self, namespace: Namespace, site: SiteId, addresses: &[IpAddr]) -> io::Result<HostId> {
        let uplink = Arc::new(namespace.make_uplink()?);
        namespace.set_addresses(addresses)?;
        let mut state = self.shared.lock();
        let host = state.router.add_host(site, addresses);
        state.uplinks.push(uplink);
        drop(state);
        self.namespaces.push(Arc::new(namespace));
        self.shared.tell();
        Ok(host)
    }

    /// Where a host is.
    ///
    /// # Panics
    /// If the host is one of another internet.
    #[must_use]
    pub fn namespace(&self, host: HostId) -> Arc<Namespace> {
        Arc::clone(&self.namespaces[host.0])
    }

    /// How lab agents bind their sockets on a host.
    #[must_use]
    pub fn binder(&self, host: HostId) -> UdpBinder {
        let namespace = self.namespace(host);
        UdpBinder::by(move |at: SocketAddr| namespace.enter(|| UdpSocket::bind(at))?)
    }

    /// Plugs a host in elsewhere: what it sends from its old addresses gets nowhere any more.
    pub fn move_host(&self, host: HostId, site: SiteId, addresses: &[IpAddr]) -> io::Result<()> {
        self.shared.lock().router.move_host(host, site, addresses);
        self.namespaces[host.0].set_addresses(addresses)
    }

    /// What lies between a site and the world from now on.
    pub fn set_line(&self, site: SiteId, line: Line) {
        self.shared.lock().router.set_line(site, line);
    }

    /// What became of all packets so far.
    #[must_use]
    pub fn fates(&self) -> BTreeMap<Fate, u64> {
        self.shared.lock().router.fates().clone()
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.tell();
        if let Some(router) = self.router.take() {
            let _ = router.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        // A counter that is full tells as well.
        let _ = rustix::io::write(&self.changed, &1_u64.to_ne_bytes());
    }
}

/// Packets under way, by the moment of their arrival and the order of sending.
#[derive(Default)]
struct UnderWay {
    packets: BTreeMap<(Instant, u64), (HostId, Vec<u8>)>,
    count: u64,
}

impl UnderWay {
    fn put(&mut self, due: Instant, to: HostId, packet: Vec<u8>) -> Result<(), Fate> {
        if self.packets.len() >= MAX_UNDER_WAY {
            return Err(Fate::Lost);
        }
        self.count += 1;
        self.packets.insert((due, self.count), (to, packet));
        Ok(())
    }

    fn take(&mut self, now: Instant) -> Option<(HostId, Vec<u8>)> {
        let first = self.packets.first_entry().filter(|first| first.key().0 <= now)?;
        Some(first.remove())
    }

    fn due(&self) -> Option<Instant> {
        self.packets.first_key_value().map(|((due, _), _)| *due)
    }
}

/// Carries packets until it is over.
fn serve(shared: &Shared) {
    let mut under_way = UnderWay::default();
    loop {
        let uplinks = {
            let state = shared.lock();
            if state.is_over {
                return;
            }
            state.uplinks.clone()
        };
        wait(shared, &uplinks, under_way.due());
        for (host, uplink) in uplinks.iter().enumerate() {
            for _ in 0..BATCH {
                let Some(packet) = receive(uplink) else { break };
                route(shared, &mut under_way, HostId(host), packet);
            }
        }
        let now = Instant::now();
        while let Some((to, packet)) = under_way.take(now) {
            let is_taken = uplinks.get(to.0).is_some_and(|uplink| send(uplink, &packet).is_ok());
            if !is_taken {
                shared.lock().router.count(Fate::Lost);
            }
        }
    }
}

fn route(shared: &Shared, under_way: &mut UnderWay, from: HostId, mut packet: Vec<u8>) {
    let now = Instant::now();
    let mut state = shared.lock();
    let Some(Onward { to, after }) = state.router.handle_packet(now, from, &mut packet) else { return };
    if let Err(fate) = under_way.put(now + after, to, packet) {
        state.router.count(fate);
    }
}

/// Until there is a packet, one arrives, or something has changed.
fn wait(shared: &Shared, uplinks: &[Arc<OwnedFd>], due: Option<Instant>) {
    let left = due.map(|due| due.saturating_duration_since(Instant::now()));
    let limit =
        left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
    let waiting = uplinks.iter().map(|uplink| uplink.as_fd()).chain([shared.changed.as_fd()]);
    let mut waiting: Vec<_> = waiting.map(|it| PollFd::from_borrowed_fd(it, PollFlags::IN)).collect();
    if poll(&mut waiting, limit.as_ref()).is_err() {
        // Interrupted, or no memory: a pause instead of a storm.
        thread::sleep(Duration::from_millis(1));
    }
    let _ = rustix::io::read(&shared.changed, &mut [0; 8]);
}

fn receive(uplink: &OwnedFd) -> Option<Vec<u8>> {
    let mut buffer = [0; LARGEST];
    let length = rustix::io::read(uplink, &mut buffer).ok()?;
    buffer.get(VIRTIO..length).map(<[u8]>::to_vec)
}

fn send(uplink: &OwnedFd, packet: &[u8]) -> Result<(), Errno> {
    rustix::io::write(uplink, &[&[0; VIRTIO], packet].concat()).map(drop)
}
