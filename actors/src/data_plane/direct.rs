//! The sockets in use: what comes is told apart without a copy, and sockets are bound anew on demand.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tokio::{sync::Mutex, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use warren_proto::{disco::is_probe, stun};

use super::{Plane, endure, inbound::Inbound};
use crate::udp::{Gather, LocalPorts, MakeSockets, Received, Socket, Sockets, UdpError};

/// For whoever still uses the old sockets.
const RELEASE_LIMIT: Duration = Duration::from_millis(300);
const RELEASE_LOOK: Duration = Duration::from_millis(1);
/// Reads of a batch while single datagrams come fast: 64 of them. Of runs, one read is a batch.
const MAX_READS: u32 = 8;
/// After so many errors in a row a socket is left alone for a while.
const MAX_ERRORS: u32 = 16;
const ERROR_PAUSE: Duration = Duration::from_millis(50);

/// Why sockets were not bound anew.
#[derive(Debug, thiserror::Error)]
pub enum RebindError {
    /// There are none: this data plane only relays.
    #[error("this tunnel was started without UDP sockets: every packet is relayed")]
    NoSockets,
    /// They cannot be made; until a later attempt succeeds everything is relayed.
    #[error(transparent)]
    Sockets(#[from] UdpError),
    /// They cannot be used; until a later attempt succeeds everything is relayed.
    #[error("cannot use the new UDP sockets: {0}; every packet is relayed until they are bound again")]
    Register(#[from] io::Error),
    /// The data plane has stopped.
    #[error("the tunnel is stopping")]
    Stopped,
}

/// The tasks that read the sockets; who holds the lock may replace them.
#[derive(Debug, Default)]
pub(super) struct Readers {
    /// Who makes sockets; once there were any.
    maker: OnceLock<Arc<dyn MakeSockets>>,
    reading: Mutex<Reading>,
}

impl Readers {
    /// Whether there are sockets, perhaps about to be bound anew.
    pub(super) fn has_sockets(&self) -> bool {
        self.maker.get().is_some()
    }
}

#[derive(Debug, Default)]
struct Reading {
    /// The port that was bound last.
    port: u16,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// What a datagram is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An answer of a STUN server.
    Stun,
    /// A path probe.
    Probe,
    /// Anything else can only be WireGuard's.
    WireGuard,
}

impl Kind {
    pub(super) fn of(datagram: &[u8]) -> Self {
        match datagram {
            it if is_probe(it) => Self::Probe,
            it if stun::is_stun(it) => Self::Stun,
            _ => Self::WireGuard,
        }
    }
}

impl Plane {
    /// Reads from these sockets, and sends through them, from now on.
    pub(super) fn use_sockets(self: &Arc<Self>, sockets: Sockets) {
        let _ = self.readers.maker.set(sockets.maker());
        // Nobody holds the lock before the data plane is handed out.
        if let Ok(mut reading) = self.readers.reading.try_lock() {
            self.start_readers(&mut reading, sockets);
        }
    }

    fn start_readers(self: &Arc<Self>, reading: &mut Reading, sockets: Sockets) {
        let sockets = Arc::new(sockets);
        reading.port = sockets.ports().v4;
        reading.stop = self.stop.child_token();
        reading.tasks = sockets.all().map(|socket| self.start_reader(&reading.stop, socket)).collect();
        self.udp.store(Some(sockets));
    }

    fn start_reader(self: &Arc<Self>, stop: &CancellationToken, socket: &Arc<Socket>) -> JoinHandle<()> {
        let (plane, socket) = (Arc::clone(self), Arc::clone(socket));
        let work = endure("udp", move || receive(Arc::clone(&plane), Arc::clone(&socket)));
        let stop = stop.clone();
        self.runtime.spawn(async move {
            stop.run_until_cancelled(work).await;
        })
    }

    /// Closes the sockets and binds new ones, at the same port if nobody else took it meanwhile.
    pub(super) async fn rebind(self: &Arc<Self>) -> Result<LocalPorts, RebindError> {
        let mut reading = self.readers.reading.lock().await;
        let maker = self.readers.maker.get().ok_or(RebindError::NoSockets)?;
        self.close(&mut reading).await;
        let sockets = Sockets::register(Arc::clone(maker).make(reading.port).await?)?;
        let ports = sockets.ports();
        self.start_readers(&mut reading, sockets);
        // Nothing is awaited in between: a peer that does not know where we are now hears a ping before data.
        self.distrust_paths();
        self.runtime.spawn(super::stir(Arc::clone(self), Vec::new()));
        Ok(ports)
    }

    /// Every direct path has to prove itself anew.
    pub(super) fn distrust_paths(&self) {
        let now = Instant::now();
        self.peers.all().iter().for_each(|peer| peer.ways().path.handle_link_change(now));
    }

    async fn close(&self, reading: &mut Reading) {
        reading.stop.cancel();
        for task in reading.tasks.drain(..) {
            let _ = task.await;
        }
        if let Some(old) = self.udp.swap(None) {
            let left = Arc::downgrade(&old);
            drop(old);
            let released = async {
                while left.strong_count() > 0 {
                    tokio::time::sleep(RELEASE_LOOK).await;
                }
            };
            // Whoever is that slow makes us take another port.
            let _ = tokio::time::timeout(RELEASE_LIMIT, released).await;
        }
    }

    /// Closes the sockets, as if they were lost.
    #[cfg(test)]
    pub(super) async fn close_sockets(&self) {
        let mut reading = self.readers.reading.lock().await;
        self.close(&mut reading).await;
    }
}

/// Reads a socket for as long as it is in use.
async fn receive(plane: Arc<Plane>, socket: Arc<Socket>) {
    if let Err(error) = receive_all(&plane, &socket).await {
        tracing::error!(%error, "a UDP socket cannot be read any more");
    }
}

async fn receive_all(plane: &Plane, socket: &Socket) -> io::Result<()> {
    let (mut received, mut inbound) = (Received::default(), Inbound::default());
    let (mut gather, mut errors) = (Gather::new()?, 0);
    loop {
        if socket.ready().await?.is_error() {
            socket.read_complaints(|to: SocketAddr| plane.note_unreachable(to));
        }
        gather.wait().await?;
        match socket.receive(&mut received) {
            Ok(()) => {
                errors = 0;
                let (now, mut reads) = (Instant::now(), 1);
                gather.note(now, received.singles());
                inbound.receive_direct(plane, &mut received, now, |received| {
                    let goes_on = reads < MAX_READS && received.is_full_of_singles();
                    let has_more = goes_on && socket.receive(received).is_ok();
                    if has_more {
                        reads += 1;
                        gather.note(now, received.singles());
                    }
                    has_more
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Of a datagram sent before; which one, the next round reads.
            Err(_) => errors += 1,
        }
        if errors >= MAX_ERRORS {
            errors = 0;
            tokio::time::sleep(ERROR_PAUSE).await;
        }
        // The TUN, the links and the other socket get their turn between two batches.
        tokio::task::yield_now().await;
    }
}
