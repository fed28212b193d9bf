//! An agent's UDP sockets, one a family, and the task that serves them.

use std::{
    collections::VecDeque,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use tokio::net::UdpSocket;

use super::{Shared, at, direct::Datagram, faults::UdpFaults};

/// Larger datagrams are not an agent's.
const LARGEST: usize = 2048;
/// Datagrams that are taken before what they led to is sent.
const BATCH: usize = 64;
/// Datagrams that wait because of a delay on purpose.
const MAX_DELAYED: usize = 4096;

/// How sockets are bound: where the lab runs, or in a network of somebody else's.
#[derive(Clone, Default)]
pub struct UdpBinder(Option<Arc<Bind>>);

type Bind = dyn Fn(SocketAddr) -> io::Result<std::net::UdpSocket> + Send + Sync;

impl UdpBinder {
    /// Binds in this way.
    pub fn by(bind: impl Fn(SocketAddr) -> io::Result<std::net::UdpSocket> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(bind)))
    }

    /// At a free port of an address. Nothing larger than the path is sent in pieces (13).
    fn bind(&self, address: IpAddr) -> io::Result<UdpSocket> {
        let address = SocketAddr::new(address, 0);
        let socket = match &self.0 {
            Some(bind) => bind(address)?,
            None => std::net::UdpSocket::bind(address)?,
        };
        match address {
            SocketAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO)?,
            SocketAddr::V6(_) => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO)?,
        }
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }
}

impl fmt::Debug for UdpBinder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "UdpBinder(elsewhere)" } else { "UdpBinder(here)" })
    }
}

/// A socket a family; a family that the machine lacks has none.
struct Sockets {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
}

impl Sockets {
    /// At a free port of these addresses, the first of each family.
    async fn bind(addresses: &[IpAddr], binder: &UdpBinder) -> Self {
        let bind = async |wanted: fn(&IpAddr) -> bool| {
            let address = addresses.iter().find(|address| wanted(address))?;
            let socket = binder.bind(*address).ok()?;
            // Until the runtime has seen a new socket it says of it that it is full.
            socket.writable().await.ok()?;
            Some(socket)
        };
        Self { v4: bind(IpAddr::is_ipv4).await, v6: bind(IpAddr::is_ipv6).await }
    }

    fn all(&self) -> impl Iterator<Item = &UdpSocket> {
        [&self.v4, &self.v6].into_iter().flatten()
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.all().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    async fn readable(&self) {
        let wait = async |socket: &Option<UdpSocket>| match socket {
            Some(socket) => drop(socket.readable().await),
            None => std::future::pending().await,
        };
        tokio::select! {
            () = wait(&self.v4) => {}
            () = wait(&self.v6) => {}
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
        self.all().find_map(|socket| socket.try_recv_from(buffer).ok())
    }

    fn send(&self, datagram: &Datagram) -> io::Result<()> {
        let socket = if datagram.to.is_ipv4() { &self.v4 } else { &self.v6 };
        let socket = socket.as_ref().ok_or(io::ErrorKind::NetworkUnreachable)?;
        match socket.try_send_to(&datagram.bytes, datagram.to) {
            // A full socket drops, as UDP does.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            sent => sent.map(drop),
        }
    }
}

/// Serves an agent's sockets until its life ends.
pub(super) async fn run(
    shared: Arc<Shared>,
    addresses: Vec<IpAddr>,
    binder: UdpBinder,
    faults: Arc<UdpFaults>,
) {
    let mut sockets = Sockets::bind(&addresses, &binder).await;
    shared.lock().handle_sockets(sockets.addresses());
    let mut buffer = [0; LARGEST];
    let mut out = VecDeque::new();
    let mut delayed: VecDeque<(Instant, Datagram)> = VecDeque::new();
    loop {
        let now = Instant::now();
        let (due, has_frames, wants_rebind) = {
            let mut core = shared.lock();
            for _ in 0..BATCH {
                let Some((length, from)) = sockets.receive(&mut buffer) else { break };
                if let Some(datagram) = buffer.get(..length).filter(|_| faults.arrives()) {
                    core.datagram(canonical(from), datagram, now);
                }
            }
            core.poll(now);
            let is_changed = core.pass_time(now);
            core.take_datagrams(&mut out);
            (core.direct_due(now), core.has_output() || is_changed, core.take_rebind())
        };
        if has_frames {
            shared.wake.notify_one();
        }
        if wants_rebind {
            sockets = Sockets::bind(&addresses, &binder).await;
            shared.lock().handle_sockets(sockets.addresses());
            continue;
        }
        for datagram in out.drain(..) {
            match faults.leaves() {
                Some(delay) if !delay.is_zero() && delayed.len() < MAX_DELAYED => {
                    delayed.push_back((now + delay, datagram));
                }
                Some(delay) if delay.is_zero() => send(&shared, &sockets, &datagram),
                Some(_) | None => {}
            }
        }
        while delayed.front().is_some_and(|(due, _)| *due <= now) {
            let Some((_, datagram)) = delayed.pop_front() else { break };
            send(&shared, &sockets, &datagram);
        }
        let due = [due, delayed.front().map(|(due, _)| *due)].into_iter().flatten().min();
        tokio::select! {
            () = sockets.readable() => {}
            () = shared.udp_wake.notified() => {}
            () = at(due) => {}
        }
    }
}

fn send(shared: &Shared, sockets: &Sockets, datagram: &Datagram) {
    if sockets.send(datagram).is_err() {
        shared.lock().handle_unsent(datagram);
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
