//! One UDP socket of an agent: takes what the kernel glued together, and sends runs that the kernel cuts.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
};

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use tokio::{io::Interest, net::UdpSocket};

use crate::agent::direct::Datagram;

/// The most bytes of what the kernel glued together.
const MAX_MESSAGE: usize = 65535;
/// The most bytes of a run: what one IPv4 packet carries.
const MAX_RUN: usize = 65507;
/// Messages that are read at once.
const MESSAGES: usize = 8;
/// What the kernel holds while the agent is busy, if the host allows it.
const BUFFER: usize = 1024 * 1024;

/// How an agent's datagrams are given to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sending {
    /// Those of one size and destination at once, for the kernel to cut.
    #[default]
    Runs,
    /// One by one, as the reference's agents do.
    Singly,
}

#[derive(Debug)]
pub(super) struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Socket {
    /// Nothing larger than the path is sent in pieces (13).
    pub(super) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        match socket.local_addr()? {
            SocketAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO)?,
            SocketAddr::V6(_) => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO)?,
        }
        // More than the host's limit takes a privilege; without it the limit is what we get.
        if sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket, BUFFER)?;
        }
        Ok(Self { socket: UdpSocket::from_std(socket)?, state })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    pub(super) async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Sends datagrams of one size to one destination, and tells `unsent` of those that the network refuses.
    pub(super) fn send(
        &self,
        datagrams: &[Datagram],
        sending: Sending,
        buffer: &mut Vec<u8>,
        unsent: &mut impl FnMut(&Datagram),
    ) {
        let size = datagrams.first().map_or(1, |first| first.bytes.len().max(1));
        let most = match sending {
            Sending::Runs => self.state.max_gso_segments().min(MAX_RUN / size).max(1),
            Sending::Singly => 1,
        };
        for run in datagrams.chunks(most) {
            buffer.clear();
            run.iter().for_each(|datagram| buffer.extend_from_slice(&datagram.bytes));
            let Some(first) = run.first() else { continue };
            if run.len() > 1 && self.give(first.to, buffer, Some(size)).is_ok() {
                continue;
            }
            // Not every device cuts a run, and a path may be too narrow: then one by one.
            for datagram in run {
                if self.give(datagram.to, &datagram.bytes, None).is_err() {
                    unsent(datagram);
                }
            }
        }
    }

    /// A full socket drops, as UDP does.
    fn give(&self, destination: SocketAddr, contents: &[u8], segment_size: Option<usize>) -> io::Result<()> {
        let transmit = Transmit { destination, ecn: None, contents, segment_size, src_ip: None };
        let send = || self.state.try_send((&self.socket).into(), &transmit);
        match self.socket.try_io(Interest::WRITABLE, send) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            sent => sent,
        }
    }
}

/// Where a batch is received; keeps its memory from batch to batch.
pub(super) struct Received {
    buffer: Vec<u8>,
    metas: [RecvMeta; MESSAGES],
    count: usize,
}

impl Default for Received {
    fn default() -> Self {
        Self { buffer: vec![0; MESSAGES * MAX_MESSAGE], metas: Default::default(), count: 0 }
    }
}

impl Received {
    /// Takes what a socket has, up to one batch; nothing of none.
    pub(super) fn fill(&mut self, socket: Option<&Socket>) {
        let Self { buffer, metas, count } = self;
        let mut rooms = buffer.chunks_exact_mut(MAX_MESSAGE);
        let mut slices: [IoSliceMut<'_>; MESSAGES] =
            std::array::from_fn(|_| IoSliceMut::new(rooms.next().unwrap_or_default()));
        let read = socket.and_then(|it| {
            let receive = || it.state.recv((&it.socket).into(), &mut slices, metas.as_mut_slice());
            it.socket.try_io(Interest::READABLE, receive).ok()
        });
        *count = read.unwrap_or(0);
    }

    /// The datagrams of the last batch, each with its source.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        let messages = self.metas.iter().zip(self.buffer.chunks_exact(MAX_MESSAGE)).take(self.count);
        messages.flat_map(|(meta, room)| {
            let datagrams = room.get(..meta.len).unwrap_or_default().chunks(meta.stride.max(1));
            datagrams.map(|datagram| (meta.addr, datagram))
        })
    }
}

/// The datagrams of one turn as runs: neighbours of one size and destination.
pub(super) fn runs(datagrams: &[Datagram]) -> impl Iterator<Item = &[Datagram]> {
    datagrams.chunk_by(|one, next| one.to == next.to && one.bytes.len() == next.bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_arrive_one_by_one_and_in_order_however_they_are_sent() {
        for sending in [Sending::Runs, Sending::Singly] {
            let (from, at) = (open().await, open().await);
            let to = at.local_addr().unwrap();
            let sizes = [vec![1312; 70], vec![100, 1312, 1312, 0, 5000]].concat();
            let bytes = |number: usize, size| vec![number as u8; size];
            let datagram = |(number, size)| Datagram { to, bytes: bytes(number, size), ping: None };
            let datagrams: Vec<Datagram> = sizes.iter().copied().enumerate().map(datagram).collect();
            for run in runs(&datagrams) {
                from.send(run, sending, &mut Vec::new(), &mut |_| panic!("refused"));
            }
            let (mut received, mut came) = (Received::default(), Vec::new());
            while came.len() < datagrams.len() - 1 {
                at.readable().await.unwrap();
                received.fill(Some(&at));
                came.extend(received.datagrams().map(|(source, it)| (source, it.to_vec())));
            }
            let source = from.local_addr().unwrap();
            // Nobody has a use for empty ones.
            let sent = datagrams.into_iter().filter(|it| !it.bytes.is_empty());
            assert_eq!(came, sent.map(|it| (source, it.bytes)).collect::<Vec<_>>(), "{sending:?}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_sent_is_told_one_by_one() {
        let from = open().await;
        let elsewhere: SocketAddr = ([192, 0, 2, 1], 9).into();
        let datagram = |size| Datagram { to: elsewhere, bytes: vec![7; size], ping: None };
        let mut unsent = 0;
        from.send(&[datagram(100), datagram(100)], Sending::Runs, &mut Vec::new(), &mut |_| unsent += 1);
        assert_eq!(unsent, 2, "a socket of the loopback reaches nobody else");
    }

    async fn open() -> Socket {
        let socket = Socket::new(std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
        socket.writable().await.unwrap();
        socket
    }
}
