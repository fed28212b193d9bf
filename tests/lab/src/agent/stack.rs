//! An agent's TCP: smoltcp over packets that come out of the tunnel and go back into it. It exists only
//! while somebody is connected, so that a thousand idle agents cost nothing here.

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv6Addr,
    time::{Duration, Instant},
};

use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{self, DeviceCapabilities, Medium},
    socket::tcp,
    time::Instant as StackInstant,
    wire::{HardwareAddress, IpCidr},
};

use super::{
    page::Exchange,
    small::{IPV6, TCP},
};

/// The port of the HTTP server.
pub(crate) const HTTP_PORT: u16 = 80;
/// Inner packets are at most so long.
pub(super) const MTU: usize = 1280;

/// Room each way of a connection. What is in flight must stay below the relay's queue of 512 packets.
const BUFFER: usize = 512 * 1024;
/// Connections at a time; a SYN beyond them is refused.
const MAX_CONNECTIONS: usize = 64;
/// A peer that does not answer for so long is gone.
const TIMEOUT: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(60);
/// Rounds between sockets and packets in one turn, so that others get theirs.
const ROUNDS: usize = 8;
/// Buffers that are kept for the next packets.
const SPARE: usize = 1024;

/// One agent's stack.
pub(super) struct Stack {
    device: Device,
    interface: Interface,
    sockets: SocketSet<'static>,
    exchanges: BTreeMap<SocketHandle, Exchange>,
    title: String,
    started: Instant,
    /// There is work that waits for nothing.
    is_busy: bool,
    requests: u64,
}

impl Stack {
    pub(super) fn new(addresses: &[Ipv6Addr], title: String, now: Instant) -> Self {
        let mut device = Device::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_ne_bytes(warren_proto::key::random());
        let mut interface = Interface::new(config, &mut device, StackInstant::ZERO);
        interface.update_ip_addrs(|own| {
            for address in addresses {
                let _ = own.push(IpCidr::new((*address).into(), 128));
            }
        });
        if let Some(first) = addresses.first() {
            let _ = interface.routes_mut().add_default_ipv6_route(*first);
        }
        Self {
            device,
            interface,
            sockets: SocketSet::new(Vec::new()),
            exchanges: BTreeMap::new(),
            title,
            started: now,
            is_busy: false,
            requests: 0,
        }
    }

    /// Takes a packet in.
    pub(super) fn receive(&mut self, packet: &[u8]) {
        if is_syn_for(packet, HTTP_PORT) {
            self.listen();
        }
        let mut buffer = self.device.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(packet);
        self.device.incoming.push_back(buffer);
    }

    /// Lets packets, sockets and time work; `send` takes what goes out.
    pub(super) fn poll(&mut self, now: Instant, mut send: impl FnMut(&[u8])) {
        for _ in 0..ROUNDS {
            let at = self.at(now);
            self.interface.poll(at, &mut self.device, &mut self.sockets);
            self.is_busy = self.serve();
            while let Some(packet) = self.device.outgoing.pop_front() {
                send(&packet);
                self.device.recycle(packet);
            }
            if !self.is_busy {
                break;
            }
        }
        self.collect();
    }

    /// When [`Stack::poll`] is due without a packet.
    pub(super) fn due(&mut self, now: Instant) -> Option<Instant> {
        if self.is_busy || !self.device.incoming.is_empty() {
            return Some(now);
        }
        let delay = self.interface.poll_delay(self.at(now), &self.sockets)?;
        Some(now + Duration::from_micros(delay.total_micros()))
    }

    /// Whether nobody is connected.
    pub(super) fn is_idle(&self) -> bool {
        self.exchanges.is_empty() && self.device.incoming.is_empty()
    }

    /// Requests since the last time this was asked.
    pub(super) fn take_requests(&mut self) -> u64 {
        std::mem::take(&mut self.requests)
    }

    fn listen(&mut self) {
        if self.exchanges.len() >= MAX_CONNECTIONS {
            return;
        }
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(TIMEOUT));
        if socket.listen(HTTP_PORT).is_ok() {
            let handle = self.sockets.add(socket);
            self.exchanges.insert(handle, Exchange::new(self.title.clone()));
        }
    }

    /// Moves bytes between sockets and what they are for. Returns whether anything moved.
    fn serve(&mut self) -> bool {
        let mut has_moved = false;
        for (handle, exchange) in &mut self.exchanges {
            let socket = self.sockets.get_mut::<tcp::Socket>(*handle);
            while socket.can_recv() {
                let taken = socket.recv(|bytes| {
                    let taken = exchange.receive(bytes);
                    (taken, taken)
                });
                match taken {
                    Ok(taken) if taken > 0 => has_moved = true,
                    _ => break,
                }
            }
            has_moved |= exchange.work();
            while exchange.has_output() && socket.can_send() {
                let filled = socket.send(|buffer| {
                    let filled = exchange.send(buffer);
                    (filled, filled)
                });
                match filled {
                    Ok(filled) if filled > 0 => has_moved = true,
                    _ => break,
                }
            }
            self.requests += exchange.take_requests();
            let is_half_closed = socket.state() == tcp::State::CloseWait && !socket.can_recv();
            if (exchange.is_over() || is_half_closed && exchange.is_waiting()) && socket.may_send() {
                socket.close();
                has_moved = true;
            }
        }
        has_moved
    }

    /// Forgets what has ended.
    fn collect(&mut self) {
        let sockets = &mut self.sockets;
        self.exchanges.retain(|handle, _| {
            let is_open = sockets.get::<tcp::Socket>(*handle).is_open();
            // What is over but in its last wait needs no more than the wait, and a new stack knows enough
            // to refuse what may still come.
            let is_waiting = sockets.get::<tcp::Socket>(*handle).state() == tcp::State::TimeWait;
            if !is_open || is_waiting {
                sockets.remove(*handle);
            }
            is_open && !is_waiting
        });
    }

    fn at(&self, now: Instant) -> StackInstant {
        let elapsed = now.saturating_duration_since(self.started);
        StackInstant::from_micros(i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX))
    }
}

fn is_syn_for(packet: &[u8], port: u16) -> bool {
    const NEXT_HEADER: usize = 6;
    const FLAGS: usize = IPV6 + 13;
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let destination =
        packet.get(IPV6 + 2..).and_then(|bytes| bytes.first_chunk()).map(|raw| u16::from_be_bytes(*raw));
    packet.get(NEXT_HEADER) == Some(&TCP)
        && destination == Some(port)
        && packet.get(FLAGS).is_some_and(|flags| flags & (SYN | ACK) == SYN)
}

/// The queues of packets that smoltcp takes for a network card.
#[derive(Default)]
struct Device {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
}

impl Device {
    fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE {
            self.spare.push(buffer);
        }
    }
}

impl phy::Device for Device {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Sender<'_>)> {
        let packet = self.incoming.pop_front()?;
        Some((Received(packet), Sender(self)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Sender<'_>> {
        Some(Sender(self))
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

struct Sender<'a>(&'a mut Device);

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut buffer = self.0.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.resize(length, 0);
        let result = write(&mut buffer);
        self.0.outgoing.push_back(buffer);
        result
    }
}
