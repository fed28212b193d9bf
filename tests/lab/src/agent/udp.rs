//! An agent's UDP sockets, one a family, and the task that serves them.

mod socket;

use std::{
    collections::VecDeque,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

pub use self::socket::Sending;
use self::socket::{Received, Socket};
use super::{Shared, Wild, at, direct::Datagram, faults::UdpFaults};

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

    /// At a free port of an address.
    fn bind(&self, address: IpAddr) -> io::Result<Socket> {
        let address = SocketAddr::new(address, 0);
        Socket::new(match &self.0 {
            Some(bind) => bind(address)?,
            None => std::net::UdpSocket::bind(address)?,
        })
    }
}

impl fmt::Debug for UdpBinder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "UdpBinder(elsewhere)" } else { "UdpBinder(here)" })
    }
}

/// A socket a family; a family that the machine lacks has none.
struct Sockets {
    v4: Option<Socket>,
    v6: Option<Socket>,
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

    fn all(&self) -> impl Iterator<Item = &Socket> {
        [&self.v4, &self.v6].into_iter().flatten()
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.all().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    async fn readable(&self) {
        let wait = async |socket: &Option<Socket>| match socket {
            Some(socket) => drop(socket.readable().await),
            None => std::future::pending().await,
        };
        tokio::select! {
            () = wait(&self.v4) => {}
            () = wait(&self.v6) => {}
        }
    }

    /// What came, up to a batch of each.
    fn receive(&self, received: &mut [Received; 2]) {
        for (socket, received) in [&self.v4, &self.v6].into_iter().zip(received) {
            received.fill(socket.as_ref());
        }
    }

    fn of(&self, to: &SocketAddr) -> Option<&Socket> {
        if to.is_ipv4() { self.v4.as_ref() } else { self.v6.as_ref() }
    }
}

/// What is on its way out of an agent.
struct Outgoing {
    faults: Arc<UdpFaults>,
    sending: Sending,
    delayed: VecDeque<(Instant, Datagram)>,
    due: Vec<Datagram>,
    buffer: Vec<u8>,
}

impl Outgoing {
    fn new(faults: Arc<UdpFaults>, sending: Sending) -> Self {
        Self { faults, sending, delayed: VecDeque::new(), due: Vec::new(), buffer: Vec::new() }
    }

    /// Lets each datagram meet what is wrong on purpose.
    fn put(&mut self, now: Instant, datagram: Datagram) {
        match self.faults.leaves() {
            Some(delay) if delay.is_zero() => self.due.push(datagram),
            Some(delay) if self.delayed.len() < MAX_DELAYED => {
                self.delayed.push_back((now + delay, datagram));
            }
            Some(_) | None => {}
        }
    }

    /// When the next delayed one is to be sent.
    fn next(&self) -> Option<Instant> {
        self.delayed.front().map(|(due, _)| *due)
    }

    /// Sends what is due, and tells `unsent` of what the network refuses.
    fn send(&mut self, now: Instant, sockets: &Sockets, mut unsent: impl FnMut(&Datagram)) {
        while self.next().is_some_and(|due| due <= now) {
            self.due.extend(self.delayed.pop_front().map(|(_, datagram)| datagram));
        }
        for run in socket::runs(&self.due) {
            match run.first().and_then(|first| sockets.of(&first.to)) {
                Some(socket) => socket.send(run, self.sending, &mut self.buffer, &mut unsent),
                None => run.iter().for_each(&mut unsent),
            }
        }
        self.due.clear();
    }
}

/// Serves an agent's sockets until its life ends.
pub(super) async fn run(shared: Arc<Shared>, wild: Wild) {
    let Wild { addresses, binder, faults, sending, .. } = wild;
    let mut sockets = Sockets::bind(&addresses, &binder).await;
    shared.lock().handle_sockets(sockets.addresses());
    let (mut received, mut out) = (<[Received; 2]>::default(), VecDeque::new());
    let mut outgoing = Outgoing::new(Arc::clone(&faults), sending);
    loop {
        sockets.receive(&mut received);
        let now = Instant::now();
        let (due, has_frames, wants_rebind) = {
            let mut core = shared.lock();
            let datagrams = received.iter().flat_map(Received::datagrams);
            for (from, datagram) in datagrams.filter(|_| faults.arrives()) {
                core.datagram(canonical(from), datagram, now);
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
        out.drain(..).for_each(|datagram| outgoing.put(now, datagram));
        outgoing.send(now, &sockets, |datagram| shared.lock().handle_unsent(datagram));
        tokio::select! {
            () = sockets.readable() => {}
            () = shared.udp_wake.notified() => {}
            () = at([due, outgoing.next()].into_iter().flatten().min()) => {}
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
