//! One UDP socket in use: sends runs by segmentation offload, receives batches, and tells what the network says
//! of destinations.
//!
//! quinn-udp does the system calls. Whether a run can be cut by the kernel is remembered here and not there: it
//! gives that up for good at the first error, though the next route may lead to another device.

use std::{
    io::{self, IoSliceMut},
    net::{SocketAddr, SocketAddrV6, UdpSocket as StdUdpSocket},
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use tokio::{
    io::{Interest, Ready},
    net::UdpSocket,
    time::timeout,
};

use super::errors;

/// The most bytes of a datagram, and of a message that the kernel glued together.
pub(crate) const MAX_DATAGRAM: usize = 65535;
/// The most bytes of a run: what one IPv4 packet carries.
pub(super) const MAX_RUN_BYTES: usize = 65507;
/// Messages read at once; more gains nothing where each is a run.
const MESSAGES: usize = 8;
/// A socket that takes nothing for so long loses what is left of a batch: the TUN is not read meanwhile.
const WRITE_LIMIT: Duration = Duration::from_millis(100);
/// After a device refused to cut a run, datagrams are sent singly for this long.
const SEGMENTATION_PAUSE: Duration = Duration::from_secs(10);
/// Entries of the error queue that are read at once.
const COMPLAINTS: usize = 64;

/// Why a datagram was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unsent {
    /// The socket takes nothing at the moment.
    Blocked,
    /// There is no way to the destination.
    Unreachable,
    /// It is larger than the path or the device carries.
    TooBig,
    /// Anything else.
    Failed,
}

/// Datagrams to one destination side by side, all of `size` but the last, which may be shorter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) to: SocketAddr,
    pub(super) bytes: &'a [u8],
    pub(super) size: usize,
}

impl Run<'_> {
    fn left(&self) -> u64 {
        self.bytes.len().div_ceil(self.size.max(1)) as u64
    }
}

/// How far a run got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    Blocked,
}

/// A socket on the runtime of the data plane. Sending is possible from any thread.
#[derive(Debug)]
pub(crate) struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
    can_segment: bool,
    made: Instant,
    /// Milliseconds since `made`.
    unsegmented_until: AtomicU64,
}

impl Socket {
    pub(super) fn register(socket: StdUdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        // quinn-udp lets probes be larger than the path's known MTU; we have no use for datagrams that get lost.
        if socket.local_addr()?.is_ipv4() {
            sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO)?;
        } else {
            sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO)?;
        }
        state.enable_transport_errors((&socket).into())?;
        Ok(Self {
            can_segment: state.max_gso_segments() > 1,
            state,
            socket: UdpSocket::from_std(socket)?,
            made: Instant::now(),
            unsegmented_until: AtomicU64::new(0),
        })
    }

    /// Sends a datagram, or a run whose datagrams are of `segment` bytes, now or not at all.
    pub(crate) fn send(&self, to: SocketAddr, contents: &[u8], segment: Option<usize>) -> Result<(), Unsent> {
        let transmit = Transmit { destination: to, ecn: None, contents, segment_size: segment, src_ip: None };
        let attempt = || self.state.try_send((&self.socket).into(), &transmit);
        // An error may be that of an earlier datagram to anybody: the kernel tells it once and sends nothing.
        let outcome = attempt().or_else(|error| if is_blocked(&error) { Err(error) } else { attempt() });
        let Err(error) = outcome else { return Ok(()) };
        if segment.is_some() && matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) {
            self.pause_segmentation();
        }
        Err(match error.raw_os_error() {
            _ if is_blocked(&error) => Unsent::Blocked,
            // A firewall of ours says EPERM.
            Some(
                libc::ECONNREFUSED
                | libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::ENETDOWN
                | libc::EADDRNOTAVAIL
                | libc::EPERM
                | libc::EACCES,
            ) => Unsent::Unreachable,
            Some(libc::EMSGSIZE) => Unsent::TooBig,
            _ => Unsent::Failed,
        })
    }

    /// Sends a run, waiting while the socket takes nothing. Tells `lost` what was not sent. Returns whether the
    /// socket still takes something.
    pub(super) async fn send_run(
        &self,
        mut run: Run<'_>,
        lost: &mut impl FnMut(SocketAddr, Unsent, u64),
    ) -> bool {
        while self.send_some(&mut run, lost) == Progress::Blocked {
            if !self.wait_until_writable().await {
                lost(run.to, Unsent::Blocked, run.left());
                return false;
            }
        }
        true
    }

    /// Sends of a run what the socket takes now. Tells `lost` what was not sent.
    pub(super) fn send_run_now(&self, mut run: Run<'_>, lost: &mut impl FnMut(SocketAddr, Unsent, u64)) {
        if self.send_some(&mut run, lost) == Progress::Blocked {
            lost(run.to, Unsent::Blocked, run.left());
        }
    }

    fn send_some(&self, run: &mut Run<'_>, lost: &mut impl FnMut(SocketAddr, Unsent, u64)) -> Progress {
        let mut is_cut_by_kernel = self.may_segment();
        while !run.bytes.is_empty() {
            let is_whole = is_cut_by_kernel && run.bytes.len() > run.size;
            let len = if is_whole { run.bytes.len() } else { run.size.clamp(1, run.bytes.len()) };
            let (now, later) = run.bytes.split_at(len);
            match self.send(run.to, now, is_whole.then_some(run.size)) {
                Ok(()) => run.bytes = later,
                Err(Unsent::Blocked) => return Progress::Blocked,
                Err(Unsent::Unreachable) => {
                    lost(run.to, Unsent::Unreachable, run.left());
                    run.bytes = &[];
                }
                Err(Unsent::TooBig | Unsent::Failed) if is_whole => is_cut_by_kernel = false,
                Err(why @ (Unsent::TooBig | Unsent::Failed)) => {
                    lost(run.to, why, 1);
                    run.bytes = later;
                }
            }
        }
        Progress::Done
    }

    /// Waits until there is something to read, or to complain about.
    pub(crate) async fn ready(&self) -> io::Result<Ready> {
        self.socket.ready(Interest::READABLE | Interest::ERROR).await
    }

    /// Reads one batch; `WouldBlock` when there is nothing.
    pub(crate) fn receive(&self, received: &mut Received) -> io::Result<()> {
        received.count = 0;
        let Received { buffer, metas, count } = received;
        let mut rooms = buffer.chunks_exact_mut(MAX_DATAGRAM);
        let mut slices: [IoSliceMut<'_>; MESSAGES] =
            std::array::from_fn(|_| IoSliceMut::new(rooms.next().unwrap_or_default()));
        *count = self.socket.try_io(Interest::READABLE, || {
            self.state.recv((&self.socket).into(), &mut slices, metas.as_mut_slice())
        })?;
        Ok(())
    }

    /// Reads what the network complained about, and tells `unreachable` where nothing arrives.
    pub(crate) fn read_complaints(&self, mut unreachable: impl FnMut(SocketAddr)) {
        for _ in 0..COMPLAINTS {
            let next = self.socket.try_io(Interest::ERROR, || errors::next(self.socket.as_fd()));
            let Ok(complaint) = next else { return };
            if let Some(to) = complaint.to
                && matches!(complaint.errno, libc::ECONNREFUSED | libc::ENETUNREACH | libc::EHOSTUNREACH)
            {
                unreachable(to);
            }
        }
    }

    /// Whether it takes something again, soon.
    async fn wait_until_writable(&self) -> bool {
        let writable = async {
            loop {
                self.socket.writable().await?;
                // What the runtime believes may be older than the refusal: the kernel is asked.
                let is_writable = self.socket.try_io(Interest::WRITABLE, || is_writable(self.socket.as_fd()));
                match is_writable {
                    Err(error) if is_blocked(&error) => {}
                    outcome => return outcome,
                }
            }
        };
        matches!(timeout(WRITE_LIMIT, writable).await, Ok(Ok(())))
    }

    fn may_segment(&self) -> bool {
        self.can_segment && self.age() >= self.unsegmented_until.load(Ordering::Relaxed)
    }

    pub(super) fn pause_segmentation(&self) {
        let pause = u64::try_from(SEGMENTATION_PAUSE.as_millis()).unwrap_or(u64::MAX);
        self.unsegmented_until.store(self.age().saturating_add(pause), Ordering::Relaxed);
    }

    fn age(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Where a batch is received; keeps its memory from batch to batch.
pub(crate) struct Received {
    buffer: Vec<u8>,
    metas: [RecvMeta; MESSAGES],
    count: usize,
}

impl Default for Received {
    fn default() -> Self {
        Self { buffer: vec![0; MESSAGES * MAX_DATAGRAM], metas: Default::default(), count: 0 }
    }
}

impl Received {
    /// The datagrams of the last batch, by source, as far as they came one after the other.
    pub(crate) fn by_source(
        &self,
    ) -> impl Iterator<Item = (SocketAddr, impl Iterator<Item = &[u8]> + Clone)> {
        let mut rooms = self.buffer.chunks_exact(MAX_DATAGRAM);
        let metas = self.metas.get(..self.count).unwrap_or_default();
        metas.chunk_by(|one, next| one.addr == next.addr).filter_map(move |run| {
            let from = without_flow(run.first()?.addr);
            let messages = run.iter().zip(rooms.clone());
            rooms.nth(run.len() - 1);
            let datagrams = messages
                .flat_map(|(meta, room)| room.get(..meta.len).unwrap_or_default().chunks(meta.stride.max(1)));
            Some((from, datagrams))
        })
    }

    /// How many datagrams the last batch brought; 0 if the kernel glued some together.
    pub(crate) fn singles(&self) -> usize {
        let metas = self.metas.get(..self.count).unwrap_or_default();
        if metas.iter().any(|meta| meta.stride < meta.len) { 0 } else { metas.len() }
    }

    /// Whether the last batch brought nothing but single datagrams, and as many as one can.
    pub(crate) fn is_full_of_singles(&self) -> bool {
        self.singles() == MESSAGES
    }

    /// In how many messages the last batch came.
    #[cfg(test)]
    pub(super) fn messages(&self) -> usize {
        self.count
    }
}

/// Worst memory of a socket's receiving side.
const _: () = assert!(MESSAGES * MAX_DATAGRAM <= 512 * 1024);

fn without_flow(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(_) => address,
        SocketAddr::V6(it) => SocketAddrV6::new(*it.ip(), it.port(), 0, it.scope_id()).into(),
    }
}

fn is_writable(socket: impl AsFd) -> io::Result<()> {
    let mut polled = [rustix::event::PollFd::new(&socket, rustix::event::PollFlags::OUT)];
    let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut polled, Some(&at_once))? {
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    }
}

fn is_blocked(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
