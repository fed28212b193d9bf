//! A machine behind a tunnel's device, in this process: it asks agents for echoes, answers theirs, and moves bytes over
//! TCP, with a stack of its own. A thread of its own, so that what it measures waits for nobody else.

use std::{
    collections::VecDeque,
    net::Ipv6Addr,
    os::unix::net::UnixDatagram,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{self, DeviceCapabilities, Medium},
    socket::tcp,
    time::Instant as StackInstant,
    wire::{HardwareAddress, IpCidr},
};
use warren_lab::payload::{self, Checksum};

/// How long it sleeps at most: the resolution of what it measures.
const LOOK: Duration = Duration::from_millis(2);
/// Room each way of a connection.
const BUFFER: usize = 64 * 1024;
const MTU: usize = 1280;
const IPV6: usize = 40;
const TCP: u8 = 6;
const ICMPV6: u8 = 58;
const TSMP: u8 = 99;
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
/// What an echo carries besides its header.
const ECHO_BYTES: usize = 200;
const HTTP_PORT: u16 = 80;

/// The machine.
pub(crate) struct Host {
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
    /// Its address inside the tunnel.
    pub(crate) address: Ipv6Addr,
}

#[derive(Default)]
struct Shared {
    is_over: bool,
    asking: Option<Asking>,
    /// When each of the agents' requests came.
    heard: Vec<Instant>,
    /// Packets to be sent as they are.
    raw: Vec<Vec<u8>>,
    /// Transfers to be begun.
    orders: Vec<(Order, Arc<Mutex<Progress>>)>,
    /// The longest time that the thread was not at work.
    overslept: Duration,
}

/// A stream of echo requests, by number: when each was sent, and answered.
struct Asking {
    whom: Ipv6Addr,
    pause: Duration,
    echoes: Vec<(Instant, Option<Instant>)>,
}

/// What a transfer moves, and how fast at most.
#[derive(Clone, Copy)]
struct Order {
    whom: Ipv6Addr,
    length: u64,
    per_second: u64,
    direction: Direction,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Down,
    Up,
}

#[derive(Default)]
struct Progress {
    moved: u64,
    moved_at: Option<Instant>,
    longest_stall: Duration,
    /// What the agent said in the end, or why there is nothing.
    end: Option<Result<String, String>>,
}

/// A transfer over TCP.
pub(crate) struct Transfer {
    progress: Arc<Mutex<Progress>>,
    length: u64,
}

impl Host {
    /// Takes the far end of a device.
    pub(crate) fn start(device: UnixDatagram, address: Ipv6Addr) -> Self {
        device.set_read_timeout(Some(LOOK)).unwrap();
        let shared = Arc::<Mutex<Shared>>::default();
        let machine = Machine::new(device, address, Arc::clone(&shared));
        let thread = Some(thread::spawn(move || machine.run()));
        Self { shared, thread, address }
    }

    /// Asks an agent for an echo every `pause` from now on; those before are forgotten.
    pub(crate) fn ask(&self, whom: Ipv6Addr, pause: Duration) {
        lock(&self.shared).asking = Some(Asking { whom, pause, echoes: Vec::new() });
    }

    /// Asks nobody any more.
    pub(crate) fn rest(&self) {
        lock(&self.shared).asking = None;
    }

    /// When the first echo came of those that were asked for after `moment`.
    pub(crate) fn first_echo_after(&self, moment: Instant) -> Option<Instant> {
        let shared = lock(&self.shared);
        let echoes = &shared.asking.as_ref()?.echoes;
        let later = echoes.partition_point(|(sent, _)| *sent < moment);
        echoes.get(later..)?.iter().filter_map(|(_, answered)| *answered).min()
    }

    /// When the first of an agent's requests came after `moment`.
    pub(crate) fn first_heard_after(&self, moment: Instant) -> Option<Instant> {
        lock(&self.shared).heard.iter().find(|at| **at >= moment).copied()
    }

    /// The longest time without an echo, and without a request, since `moment`.
    pub(crate) fn longest_silence_since(&self, moment: Instant) -> Duration {
        let shared = lock(&self.shared);
        let echoes = shared.asking.iter().flat_map(|asking| &asking.echoes);
        let mut echoes: Vec<Instant> = echoes.filter_map(|(_, answered)| *answered).collect();
        echoes.sort();
        let of = |arrivals: &[Instant]| {
            let since = arrivals.iter().copied().filter(|at| *at >= moment);
            let all: Vec<Instant> = [moment].into_iter().chain(since).chain([Instant::now()]).collect();
            all.windows(2).map(|two| two[1] - two[0]).max().unwrap_or_default()
        };
        of(&echoes).max(of(&shared.heard))
    }

    /// Sends a TSMP ping.
    pub(crate) fn tsmp_ping(&self, whom: Ipv6Addr) {
        lock(&self.shared).raw.push(packet(TSMP, self.address, whom, b"p12345678"));
    }

    /// The longest time since the last call that this machine was not at work.
    pub(crate) fn take_overslept(&self) -> Duration {
        std::mem::take(&mut lock(&self.shared).overslept)
    }

    /// Fetches so many bytes from an agent.
    pub(crate) fn download(&self, whom: Ipv6Addr, length: u64, per_second: u64) -> Transfer {
        self.transfer(Order { whom, length, per_second, direction: Direction::Down })
    }

    /// Brings so many bytes to an agent.
    pub(crate) fn upload(&self, whom: Ipv6Addr, length: u64, per_second: u64) -> Transfer {
        self.transfer(Order { whom, length, per_second, direction: Direction::Up })
    }

    fn transfer(&self, order: Order) -> Transfer {
        let progress = Arc::<Mutex<Progress>>::default();
        lock(&self.shared).orders.push((order, Arc::clone(&progress)));
        Transfer { progress, length: order.length }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        lock(&self.shared).is_over = true;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Transfer {
    /// How many bytes have been moved.
    pub(crate) fn moved(&self) -> u64 {
        lock(&self.progress).moved
    }

    /// Whether it has ended, well or not.
    pub(crate) fn has_ended(&self) -> bool {
        lock(&self.progress).end.is_some()
    }

    /// Checks that every byte came as it was sent. Returns the longest time in which none was moved.
    #[track_caller]
    pub(crate) fn check(&self) -> Duration {
        let progress = lock(&self.progress);
        let expected = format!("{} {:016x}", self.length, payload::checksum(self.length));
        assert_eq!(progress.end, Some(Ok(expected)), "{} of {} bytes", progress.moved, self.length);
        progress.longest_stall
    }
}

/// What the thread works with.
struct Machine {
    socket: UnixDatagram,
    address: Ipv6Addr,
    shared: Arc<Mutex<Shared>>,
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    jobs: Vec<Job>,
    begun: Instant,
    port: u16,
}

struct Job {
    order: Order,
    socket: SocketHandle,
    progress: Arc<Mutex<Progress>>,
    begun: Instant,
    /// The request, as far as it is not sent.
    head: Vec<u8>,
    /// The answer, as far as it is not body.
    answer: Vec<u8>,
    has_body: bool,
    sum: Checksum,
}

impl Machine {
    fn new(socket: UnixDatagram, address: Ipv6Addr, shared: Arc<Mutex<Shared>>) -> Self {
        let mut card = Card::default();
        let config = Config::new(HardwareAddress::Ip);
        let mut interface = Interface::new(config, &mut card, StackInstant::ZERO);
        interface.update_ip_addrs(|own| own.push(IpCidr::new(address.into(), 128)).unwrap());
        interface.routes_mut().add_default_ipv6_route(address).unwrap();
        let (sockets, jobs) = (SocketSet::new(Vec::new()), Vec::new());
        let begun = Instant::now();
        Self { socket, address, shared, card, interface, sockets, jobs, begun, port: 40_000 }
    }

    fn run(mut self) {
        let mut buffer = [0; 2048];
        let mut worked_at = Instant::now();
        loop {
            if let Ok(length) = self.socket.recv(&mut buffer) {
                self.receive(&buffer[..length]);
            }
            let now = Instant::now();
            {
                let shared = Arc::clone(&self.shared);
                let mut shared = lock(&shared);
                if shared.is_over {
                    return;
                }
                let overslept = now.duration_since(worked_at).saturating_sub(LOOK);
                shared.overslept = shared.overslept.max(overslept);
                self.ask(&mut shared, now);
            }
            worked_at = now;
            self.work(now);
        }
    }

    fn receive(&mut self, packet: &[u8]) {
        let (now, mut shared) = (Instant::now(), lock(&self.shared));
        match (packet.get(6), packet.get(IPV6)) {
            (Some(&TCP), _) => self.card.incoming.push_back(packet.to_vec()),
            (Some(&ICMPV6), Some(&ECHO_REQUEST)) => {
                shared.heard.push(now);
                let from: [u8; 16] = packet[8..24].try_into().unwrap();
                let answer = echo(ECHO_REPLY, self.address, from.into(), &packet[IPV6 + 4..]);
                let _ = self.socket.send(&answer);
            }
            (Some(&ICMPV6), Some(&ECHO_REPLY)) => {
                let number = packet.get(IPV6 + 4..IPV6 + 8).and_then(|raw| raw.try_into().ok());
                let number = number.map(u32::from_be_bytes).unwrap_or_default() as usize;
                let echoes = shared.asking.as_mut().and_then(|asking| asking.echoes.get_mut(number));
                if let Some((_, answered)) = echoes {
                    answered.get_or_insert(now);
                }
            }
            _ => {}
        }
    }

    fn ask(&mut self, shared: &mut Shared, now: Instant) {
        for packet in shared.raw.drain(..) {
            let _ = self.socket.send(&packet);
        }
        for (order, progress) in shared.orders.drain(..) {
            let job = self.begin(order, progress);
            self.jobs.push(job);
        }
        let Some(asking) = &mut shared.asking else { return };
        if asking.echoes.last().is_none_or(|(last, _)| now >= *last + asking.pause) {
            let number = u32::try_from(asking.echoes.len()).unwrap_or(u32::MAX);
            let body = [number.to_be_bytes().as_slice(), &[0x5a; ECHO_BYTES]].concat();
            let _ = self.socket.send(&echo(ECHO_REQUEST, self.address, asking.whom, &body));
            asking.echoes.push((now, None));
        }
    }

    fn begin(&mut self, order: Order, progress: Arc<Mutex<Progress>>) -> Job {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        self.port += 1;
        socket.connect(self.interface.context(), (order.whom, HTTP_PORT), self.port).unwrap();
        let socket = self.sockets.add(socket);
        let Order { length, .. } = order;
        let head = match order.direction {
            Direction::Down => format!("GET /bytes/{length} HTTP/1.1\r\nConnection: close\r\n\r\n"),
            Direction::Up => {
                format!("POST /sink HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n")
            }
        };
        let (head, answer) = (head.into_bytes(), Vec::new());
        let (begun, sum) = (Instant::now(), Checksum::default());
        Job { order, socket, progress, begun, head, answer, has_body: false, sum }
    }

    fn work(&mut self, now: Instant) {
        let at = self.begun.elapsed().as_micros();
        let at = StackInstant::from_micros(i64::try_from(at).unwrap_or(i64::MAX));
        self.interface.poll(at, &mut self.card, &mut self.sockets);
        let sockets = &mut self.sockets;
        self.jobs.retain_mut(|job| {
            let goes_on = job.work(now, sockets.get_mut::<tcp::Socket>(job.socket));
            if !goes_on {
                sockets.remove(job.socket);
            }
            goes_on
        });
        self.interface.poll(at, &mut self.card, &mut self.sockets);
        while let Some(packet) = self.card.outgoing.pop_front() {
            let _ = self.socket.send(&packet);
        }
    }
}

impl Job {
    /// Moves what may be moved by now. Returns whether there is more to do.
    fn work(&mut self, now: Instant, socket: &mut tcp::Socket<'_>) -> bool {
        let progress = Arc::clone(&self.progress);
        let mut progress = lock(&progress);
        let allowed = u128::from(self.order.per_second) * now.duration_since(self.begun).as_millis() / 1000;
        let allowed = u64::try_from(allowed).unwrap_or(u64::MAX).min(self.order.length);
        let before = progress.moved;
        self.send(socket, &mut progress, allowed);
        self.receive(socket, &mut progress, allowed);
        if progress.moved > before {
            let stall = progress.moved_at.map(|at| now.duration_since(at)).unwrap_or_default();
            progress.longest_stall = progress.longest_stall.max(stall);
            progress.moved_at = Some(now);
        }
        if progress.end.is_none() && !socket.is_open() {
            progress.end = Some(Err(format!("the connection ended after {} bytes", progress.moved)));
        }
        progress.end.is_none()
    }

    fn send(&mut self, socket: &mut tcp::Socket<'_>, progress: &mut Progress, allowed: u64) {
        while socket.can_send() && !self.head.is_empty() {
            let sent = socket.send_slice(&self.head).unwrap_or_default();
            self.head.drain(..sent);
        }
        while self.order.direction == Direction::Up
            && self.head.is_empty()
            && socket.can_send()
            && progress.moved < allowed
        {
            let (offset, left) = (progress.moved, allowed - progress.moved);
            let filled = socket.send(|room| {
                let part = usize::try_from(left).unwrap_or(usize::MAX).min(room.len());
                payload::fill(offset, &mut room[..part]);
                (part, part)
            });
            progress.moved += filled.unwrap_or_default() as u64;
        }
    }

    fn receive(&mut self, socket: &mut tcp::Socket<'_>, progress: &mut Progress, allowed: u64) {
        let is_down = self.order.direction == Direction::Down;
        while socket.can_recv() && (!is_down || progress.moved < allowed || !self.has_body) {
            let taken = socket.recv(|bytes| match is_down && self.has_body {
                true => {
                    let left = usize::try_from(allowed - progress.moved).unwrap_or(usize::MAX);
                    let part = left.min(bytes.len());
                    self.sum.update(&bytes[..part]);
                    progress.moved += part as u64;
                    (part, part)
                }
                false => {
                    let part = bytes.len().min(1);
                    self.answer.extend_from_slice(&bytes[..part]);
                    (part, part)
                }
            });
            if taken.unwrap_or_default() == 0 {
                break;
            }
            self.has_body |= self.answer.ends_with(b"\r\n\r\n");
        }
        if is_down && self.has_body && progress.moved == self.order.length {
            progress.end = Some(Ok(format!("{} {:016x}", progress.moved, self.sum.finish())));
        }
        if !is_down && self.has_body && self.answer.ends_with(b"\n") && !self.answer.ends_with(b"\r\n") {
            let answer = String::from_utf8_lossy(&self.answer);
            progress.end = Some(Ok(answer.lines().last().unwrap_or_default().to_owned()));
        }
    }
}

/// The queues that the stack takes for a network card.
#[derive(Default)]
struct Card {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

impl phy::Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Sender<'_>)> {
        let packet = self.incoming.pop_front()?;
        Some((Received(packet), Sender(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Sender<'_>> {
        Some(Sender(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct Sender<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut packet = vec![0; length];
        let result = write(&mut packet);
        self.0.push_back(packet);
        result
    }
}

/// An echo message, with what follows its checksum.
fn echo(kind: u8, from: Ipv6Addr, to: Ipv6Addr, rest: &[u8]) -> Vec<u8> {
    let mut packet = packet(ICMPV6, from, to, &[[kind, 0, 0, 0].as_slice(), rest].concat());
    let length = (packet.len() - IPV6) as u32;
    let words =
        packet[8..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = words.sum::<u32>() + u32::from(ICMPV6) + length;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[IPV6 + 2..IPV6 + 4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}

fn packet(next: u8, from: Ipv6Addr, to: Ipv6Addr, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    [[0x60, 0, 0, 0].as_slice(), &length, &[next, 64], &from.octets(), &to.octets(), body].concat()
}

fn lock<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}
