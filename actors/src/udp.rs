//! The UDP sockets of the data plane: one a family, both on one port, for WireGuard, path probes and STUN
//! alike (tailnet-data 7.11).
//!
//! [`UdpSockets`] are made by the composition, or elsewhere and handed over; the data plane registers them on
//! its own thread as `Sockets`, and has whoever made them make others when they are to be bound anew. What is
//! sent in batches is gathered in `Runs`; what comes is read into `Received`. Nothing here knows peers.

use std::{
    fmt,
    future::Future,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    pin::Pin,
    sync::{Arc, Once},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

mod errors;
mod gather;
mod runs;
mod socket;
#[cfg(test)]
mod tests;

pub(crate) use gather::Gather;
pub(crate) use runs::Runs;
pub(crate) use socket::{Received, Socket, Unsent};

/// What a socket holds for us while we are busy: below it a burst is lost, above it only stands.
const RECEIVE_BUFFER: usize = 1024 * 1024;
/// Ports that are tried until one is free in both families.
const ATTEMPTS: usize = 8;

/// Why there are no sockets.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// The socket that every machine has cannot be made.
    #[error("cannot open a UDP socket for IPv4: {0}; without one every packet is relayed")]
    V4(#[source] io::Error),
    /// A socket cannot be prepared.
    #[error("cannot set up a UDP socket: {0}; without one every packet is relayed")]
    Options(#[source] io::Error),
}

/// The sockets of both families, bound and not yet in use.
#[derive(Debug)]
pub struct UdpSockets {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    maker: Arc<dyn MakeSockets>,
}

/// Who makes sockets, at first and whenever they are to be bound anew.
pub trait MakeSockets: fmt::Debug + Send + Sync {
    /// As [`UdpSockets::bind`], by somebody who may be asked again. Takes no longer than a link that changed can
    /// be waited for.
    fn make(self: Arc<Self>, port: u16) -> SocketsFuture;
}

/// Sockets that are being made.
pub type SocketsFuture = Pin<Box<dyn Future<Output = Result<UdpSockets, UdpError>> + Send>>;

/// This process makes its sockets, with buffers as large as it may.
#[derive(Debug, Clone, Copy)]
pub struct OwnSockets;

impl MakeSockets for OwnSockets {
    fn make(self: Arc<Self>, port: u16) -> SocketsFuture {
        Box::pin(std::future::ready(UdpSockets::bind(port)))
    }
}

/// The ports at which the sockets are bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalPorts {
    /// For IPv4.
    pub v4: u16,
    /// For IPv6, where there is any; the same unless somebody else has it.
    pub v6: Option<u16>,
}

impl UdpSockets {
    /// Binds both sockets at `port`, or at another one where that is taken; 0 leaves the choice to the kernel.
    /// Where there is no IPv6, IPv4 does alone.
    pub fn bind(port: u16) -> Result<Self, UdpError> {
        Self::bind_with(port, |port| open(AddressFamily::INET6, (Ipv6Addr::UNSPECIFIED, port).into()))
    }

    fn bind_with(port: u16, mut open_v6: impl FnMut(u16) -> io::Result<UdpSocket>) -> Result<Self, UdpError> {
        let (mut wanted, mut attempts) = (port, ATTEMPTS);
        loop {
            attempts -= 1;
            let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, wanted));
            let v4 = match open(AddressFamily::INET, at) {
                Err(error) if is_taken(&error) && wanted != 0 => {
                    wanted = 0;
                    continue;
                }
                opened => opened.map_err(UdpError::V4)?,
            };
            match open_v6(port_of(&v4)) {
                Ok(v6) => return Ok(Self { v4, v6: Some(v6), maker: Arc::new(OwnSockets) }),
                Err(error) if is_taken(&error) && attempts > 0 => wanted = 0,
                Err(error) => {
                    say_that_there_is_no_ipv6(&error);
                    return Ok(Self { v4, v6: None, maker: Arc::new(OwnSockets) });
                }
            }
        }
    }

    /// Takes over bound sockets that somebody else made, who may raise their buffers.
    pub fn from_owned(v4: OwnedFd, v6: Option<OwnedFd>) -> Result<Self, UdpError> {
        let prepare = |socket: &UdpSocket| socket.set_nonblocking(true).map_err(UdpError::Options);
        let (v4, v6) = (UdpSocket::from(v4), v6.map(UdpSocket::from));
        prepare(&v4)?;
        v6.iter().try_for_each(prepare)?;
        Ok(Self { v4, v6, maker: Arc::new(OwnSockets) })
    }

    /// The same, to be made by `maker` when they are bound anew.
    pub fn made_by(self, maker: Arc<dyn MakeSockets>) -> Self {
        Self { maker, ..self }
    }

    /// To hand them over: IPv4's, and IPv6's where there is any.
    pub fn into_owned(self) -> (OwnedFd, Option<OwnedFd>) {
        (self.v4.into(), self.v6.map(OwnedFd::from))
    }

    /// Bytes that the kernel holds for us while we are busy, its own bookkeeping included.
    pub fn receive_buffer(&self) -> io::Result<usize> {
        Ok(sockopt::socket_recv_buffer_size(&self.v4)?)
    }

    /// Where they are bound.
    pub fn ports(&self) -> LocalPorts {
        LocalPorts { v4: port_of(&self.v4), v6: self.v6.as_ref().map(port_of) }
    }
}

/// The sockets of both families, in use on the data plane's thread.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) v4: Arc<Socket>,
    pub(crate) v6: Option<Arc<Socket>>,
    ports: LocalPorts,
    maker: Arc<dyn MakeSockets>,
}

impl Sockets {
    /// Registers them on the runtime that this is called on.
    pub(crate) fn register(sockets: UdpSockets) -> io::Result<Self> {
        let ports = sockets.ports();
        tracing::debug!(port = ports.v4, receive_buffer = sockets.receive_buffer()?, "UDP sockets are bound");
        let v6 = sockets.v6.map(Socket::register).transpose()?.map(Arc::new);
        Ok(Self { v4: Arc::new(Socket::register(sockets.v4)?), v6, ports, maker: sockets.maker })
    }

    /// Who makes those that follow them.
    pub(crate) fn maker(&self) -> Arc<dyn MakeSockets> {
        Arc::clone(&self.maker)
    }

    /// Where they are bound.
    pub(crate) fn ports(&self) -> LocalPorts {
        self.ports
    }

    /// Each of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Socket>> {
        std::iter::once(&self.v4).chain(self.v6.as_ref())
    }

    /// The socket that reaches `to`.
    pub(crate) fn of(&self, to: SocketAddr) -> Option<&Arc<Socket>> {
        if to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() }
    }

    /// Sends one datagram now or not at all.
    pub(crate) fn send(&self, to: SocketAddr, datagram: &[u8]) -> Result<(), Unsent> {
        self.of(to).ok_or(Unsent::Unreachable)?.send(to, datagram, None)
    }
}

fn open(family: AddressFamily, at: SocketAddr) -> io::Result<UdpSocket> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    if family == AddressFamily::INET6 {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    // More than the host's limit takes a privilege; without it the limit is what we get.
    if sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).is_err() {
        sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER)?;
    }
    rustix::net::bind(&socket, &at)?;
    Ok(socket.into())
}

fn is_taken(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrInUse
}

fn port_of(socket: &UdpSocket) -> u16 {
    socket.local_addr().map_or(0, |address| address.port())
}

fn say_that_there_is_no_ipv6(error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| tracing::info!(%error, "no UDP over IPv6 on this machine; IPv4 does alone"));
}
