//! The relay: a DERP server (tailnet-data 3). It routes packets by node key among the clients of one
//! region, and can be made to fail.
//!
//! A client has a task that reads and one that writes; between clients there are only the bounded queues of
//! the receiver, so nobody waits for a slow reader.

mod queue;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{Notify, watch},
    time::{Instant, timeout},
};
use warren_proto::key::{NodePrivate, NodePublic, random};

use self::queue::Queue;
use crate::work::Work;

/// For a client to log in.
const LOGIN_LIMIT: Duration = Duration::from_secs(10);
/// A client that takes nothing for so long is disconnected.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// Least and most room for one read: clients that are idle cost little.
const READ: std::ops::RangeInclusive<usize> = 2048..=64 * 1024;
/// Answers to packets for nobody: so many at once, then one in a second.
const NOT_HERE_BURST: u32 = 3;
const NOT_HERE_PERIOD: Duration = Duration::from_secs(1);
/// Others that a client sent to and that hear of its end.
const MAX_SENT_TO: usize = 100_000;

const GONE_DISCONNECTED: u8 = 0;
const GONE_NOT_HERE: u8 = 1;

/// A relay of the lab, and its faults.
#[derive(Clone)]
pub struct Relay(Arc<Inner>);

struct Inner {
    private: NodePrivate,
    public: NodePublic,
    keep_alive: Duration,
    clients: Mutex<HashMap<NodePublic, Entry>>,
    next: AtomicU64,
    packets: AtomicU64,
    manners: Mutex<Manners>,
    stalled: watch::Sender<bool>,
    changed: Notify,
}

/// How requests to the relay's server are answered.
#[derive(Clone, Default)]
pub(crate) struct Manners {
    /// Nobody answers at all.
    pub(crate) is_gone: bool,
    /// To every upgrade.
    pub(crate) refusal: Option<StatusCode>,
    /// To plain upgrades, with a body.
    pub(crate) plain_refusal: Option<(StatusCode, String)>,
    /// To WebSockets.
    pub(crate) websocket_refusal: Option<StatusCode>,
    /// WebSockets are granted without the subprotocol.
    pub(crate) omits_subprotocol: bool,
    /// The greeting has more in it than there is today.
    pub(crate) greets_at_length: bool,
    /// The greeting goes out in one segment with the answer to a plain upgrade.
    pub(crate) greets_at_once: bool,
    /// Before the answer to a latency check.
    pub(crate) latency: Duration,
}

/// The connections of one key, and whom it sent to.
#[derive(Default)]
struct Entry {
    /// The last is the one that receives.
    connections: Vec<Arc<Client>>,
    sent_to: HashSet<NodePublic>,
}

struct Client {
    number: u64,
    queue: Queue,
    kill: Work,
}

impl Relay {
    pub(crate) fn new(keep_alive: Duration) -> Self {
        let private = NodePrivate::generate();
        Self(Arc::new(Inner {
            public: private.public(),
            private,
            keep_alive,
            clients: Mutex::default(),
            next: AtomicU64::new(0),
            packets: AtomicU64::new(0),
            manners: Mutex::default(),
            stalled: watch::Sender::new(false),
            changed: Notify::new(),
        }))
    }

    /// The relay's own key.
    #[must_use]
    pub fn public(&self) -> NodePublic {
        self.0.public
    }

    /// The keys that are logged in.
    #[must_use]
    pub fn clients(&self) -> Vec<NodePublic> {
        self.lock().keys().copied().collect()
    }

    /// Packets that were passed on so far.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.0.packets.load(Ordering::Relaxed)
    }

    /// Packets for a key that were dropped since it does not read fast enough.
    #[must_use]
    pub fn dropped(&self, key: &NodePublic) -> u64 {
        let clients = self.lock();
        let connections = clients.get(key).map_or(&[][..], |entry| &entry.connections);
        connections.iter().map(|client| client.queue.dropped()).sum()
    }

    /// Cuts every connection. The relay goes on: who dials again is served.
    pub fn kill_connections(&self) {
        for entry in self.lock().values() {
            entry.connections.iter().for_each(|client| client.kill.cancel());
        }
    }

    /// Cuts the connections of one key.
    pub fn kill(&self, key: &NodePublic) {
        if let Some(entry) = self.lock().get(key) {
            entry.connections.iter().for_each(|client| client.kill.cancel());
        }
    }

    /// Goes silent: connections stay, nothing is read or written any more, new ones hear nothing after
    /// their upgrade. `false` ends it.
    pub fn stall(&self, is_stalled: bool) {
        self.0.stalled.send_replace(is_stalled);
    }

    /// Answers upgrades with a status instead; `None` ends it. The lab's own agents do not upgrade and stay.
    pub fn refuse_upgrades(&self, status: Option<StatusCode>) {
        self.change(|manners| manners.refusal = status);
    }

    /// Answers plain upgrades with a status and a body, as a proxy in between would, and still grants
    /// WebSockets; `None` ends it.
    pub fn refuse_plain_upgrades(&self, answer: Option<(StatusCode, &str)>) {
        let answer = answer.map(|(status, body)| (status, body.to_owned()));
        self.change(|manners| manners.plain_refusal = answer);
    }

    /// Answers requests for WebSockets with a status instead; `None` ends it.
    pub fn refuse_websockets(&self, status: Option<StatusCode>) {
        self.change(|manners| manners.websocket_refusal = status);
    }

    /// Greets whoever logs in from now on as a newer relay might: with more bytes behind its key.
    pub fn greet_at_length(&self, is_long: bool) {
        self.change(|manners| manners.greets_at_length = is_long);
    }

    /// Greets whoever connects from now on and upgrades plainly in one segment with the answer to that.
    pub fn greet_at_once(&self, is_at_once: bool) {
        self.change(|manners| manners.greets_at_once = is_at_once);
    }

    /// Grants WebSockets without naming the subprotocol, as a proxy might that knows none; `false` ends it.
    pub fn omit_subprotocol(&self, is_omitted: bool) {
        self.change(|manners| manners.omits_subprotocol = is_omitted);
    }

    /// Goes away with every connection, the lab's own agents' too, and hangs up on whoever comes; `false`
    /// brings it back.
    pub fn go(&self, is_gone: bool) {
        self.change(|manners| manners.is_gone = is_gone);
        if is_gone {
            self.kill_connections();
        }
    }

    /// Answers latency checks only after this time, as a relay far away would.
    pub fn set_latency(&self, latency: Duration) {
        self.change(|manners| manners.latency = latency);
    }

    /// Sends a frame to every client, whatever it is: a health report, a restart, a ping, an unknown type.
    pub fn inject(&self, kind: u8, body: &[u8]) {
        let frame = wire::frame(kind, &[body]);
        for entry in self.lock().values() {
            entry.connections.iter().for_each(|client| client.queue.control(frame.clone()));
        }
    }

    /// Waits until a key is logged in, or is no more; at most `limit`. Returns whether that came true.
    pub async fn wait_for(&self, key: &NodePublic, is_here: bool, limit: Duration) -> bool {
        let waiting = async {
            loop {
                let changed = self.0.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if self.lock().contains_key(key) == is_here {
                    return;
                }
                changed.await;
            }
        };
        timeout(limit, waiting).await.is_ok()
    }

    pub(crate) fn manners(&self) -> Manners {
        self.0.manners.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.0.manners.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Serves one client until either side ends it.
    pub(crate) async fn serve<S>(&self, work: &Work, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send,
    {
        self.serve_held(work, stream, ()).await;
    }

    /// The same, and lets go of something once the client is greeted.
    pub(crate) async fn serve_held<S, H>(&self, work: &Work, stream: S, held: H)
    where
        S: AsyncRead + AsyncWrite + Send,
        H: Send,
    {
        if self.manners().is_gone {
            return;
        }
        let (mut read, mut write) = tokio::io::split(stream);
        let login = timeout(LOGIN_LIMIT, async {
            self.greet(&mut write).await?;
            drop(held);
            self.log_in(&mut read).await
        });
        let Ok(Some((key, mut buffer))) = login.await else { return };
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let client = Arc::new(Client { number, queue: Queue::default(), kill: work.child() });
        client.queue.control(wire::server_info(&self.0.private, &key));
        self.lock().entry(key).or_default().connections.push(Arc::clone(&client));
        self.0.changed.notify_waiters();
        if self.manners().is_gone {
            // It went while this client logged in.
            client.kill.cancel();
        }
        // Also when this future is dropped in the middle.
        let _leave = Leave { relay: self, key, number };
        tokio::select! {
            () = self.read(&client, key, &mut read, &mut buffer) => {}
            () = self.write(&client, &mut write) => {}
            () = client.kill.cancelled() => {}
        }
    }

    async fn greet(&self, write: &mut (impl AsyncWrite + Unpin)) -> Option<()> {
        self.unstalled().await;
        let more: &[u8] = if self.manners().greets_at_length { b"what newer relays say" } else { &[] };
        write.write_all(&wire::server_key(&self.0.public, more)).await.ok()?;
        write.flush().await.ok()
    }

    async fn log_in(&self, read: &mut (impl AsyncRead + Unpin)) -> Option<(NodePublic, BytesMut)> {
        let mut buffer = BytesMut::new();
        loop {
            if let Some((kind, body)) = wire::take(&mut buffer).ok()? {
                let key = wire::open_client_info(&self.0.private, &body)?;
                return (kind == wire::CLIENT_INFO).then_some((key, buffer));
            }
            if read.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        }
    }

    async fn read(
        &self,
        client: &Client,
        key: NodePublic,
        read: &mut (impl AsyncRead + Unpin),
        buffer: &mut BytesMut,
    ) {
        let mut session = Reading::default();
        let mut room = *READ.start();
        loop {
            loop {
                match wire::take(buffer) {
                    Ok(Some((kind, body))) => {
                        if !self.receive(client, key, &mut session, kind, body) {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(wire::TooLong) => return,
                }
            }
            self.unstalled().await;
            buffer.reserve(room);
            match read.read_buf(buffer).await {
                Ok(0) | Err(_) => return,
                Ok(got) if got >= room => room = (room * 2).min(*READ.end()),
                Ok(got) if got < room / 8 => room = (room / 2).max(*READ.start()),
                Ok(_) => {}
            }
            self.touch(client, key);
        }
    }

    /// Handles a frame. Returns whether the client may stay.
    fn receive(
        &self,
        client: &Client,
        key: NodePublic,
        session: &mut Reading,
        kind: u8,
        body: Bytes,
    ) -> bool {
        match kind {
            wire::SEND_PACKET => return self.route(client, key, session, body),
            wire::PING => {
                const LENGTHS: std::ops::RangeInclusive<usize> = 8..=1000;
                let Some(data) = body.first_chunk().filter(|_| LENGTHS.contains(&body.len())) else {
                    return false;
                };
                client.queue.pong(*data);
            }
            wire::NOTE_PREFERRED => return body.len() == 1,
            // Only for other relays.
            wire::FORWARD_PACKET | wire::WATCH_CONNECTIONS | wire::CLOSE_PEER => return false,
            _ => {}
        }
        true
    }

    fn route(&self, client: &Client, key: NodePublic, session: &mut Reading, mut body: Bytes) -> bool {
        const KEY: usize = 32;
        let Some(to) = body.first_chunk().map(|to| NodePublic(*to)) else { return false };
        let packet = body.split_off(KEY);
        if packet.len() > wire::MAX_PACKET {
            return false;
        }
        let mut clients = self.lock();
        if session.sent_to.len() < MAX_SENT_TO && session.sent_to.insert(to) {
            clients.entry(key).or_default().sent_to.insert(to);
        }
        match clients.get(&to).and_then(|entry| entry.connections.last()) {
            Some(receiver) => {
                let receiver = Arc::clone(receiver);
                drop(clients);
                self.0.packets.fetch_add(1, Ordering::Relaxed);
                receiver.queue.packet(key, packet);
            }
            None if wire::is_disco(&packet) && session.may_tell_not_here() => {
                client.queue.control(wire::frame(wire::PEER_GONE, &[&to.0, &[GONE_NOT_HERE]]));
            }
            None => {}
        }
        true
    }

    /// The connection that was heard last receives what is for its key.
    fn touch(&self, client: &Client, key: NodePublic) {
        let mut clients = self.lock();
        let Some(entry) = clients.get_mut(&key) else { return };
        if entry.connections.last().is_some_and(|last| last.number == client.number) {
            return;
        }
        if let Some(place) = entry.connections.iter().position(|other| other.number == client.number) {
            let own = entry.connections.remove(place);
            entry.connections.push(own);
        }
    }

    async fn write(&self, client: &Client, write: &mut (impl AsyncWrite + Unpin)) {
        // Spread, so that a thousand clients are not all told in the same moment.
        let [spread] = random::<1>();
        let period = self.0.keep_alive + self.0.keep_alive.mul_f64(f64::from(spread) / 255.0 / 12.0);
        let mut buffer = BytesMut::new();
        let mut due = Instant::now() + period;
        loop {
            tokio::select! {
                () = client.queue.next(&mut buffer) => {}
                () = tokio::time::sleep_until(due) => {
                    due = Instant::now() + period;
                    wire::put(&mut buffer, wire::KEEP_ALIVE, &[]);
                }
            }
            self.unstalled().await;
            let written = timeout(WRITE_LIMIT, async {
                write.write_all(&buffer).await?;
                write.flush().await
            });
            if !matches!(written.await, Ok(Ok(()))) {
                return;
            }
            buffer.clear();
            if buffer.capacity() > *READ.end() * 2 {
                buffer = BytesMut::new();
            }
        }
    }

    fn leave(&self, key: NodePublic, number: u64) {
        let mut clients = self.lock();
        let Some(entry) = clients.get_mut(&key) else { return };
        entry.connections.retain(|client| client.number != number);
        if !entry.connections.is_empty() {
            return;
        }
        let sent_to = clients.remove(&key).map(|entry| entry.sent_to).unwrap_or_default();
        let gone = wire::frame(wire::PEER_GONE, &[&key.0, &[GONE_DISCONNECTED]]);
        for other in sent_to {
            if let Some(receiver) = clients.get(&other).and_then(|entry| entry.connections.last()) {
                receiver.queue.control(gone.clone());
            }
        }
        drop(clients);
        self.0.changed.notify_waiters();
    }

    async fn unstalled(&self) {
        if *self.0.stalled.borrow() {
            let _ = self.0.stalled.subscribe().wait_for(|is_stalled| !is_stalled).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodePublic, Entry>> {
        self.0.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the reading side of a connection remembers.
#[derive(Default)]
struct Reading {
    sent_to: HashSet<NodePublic>,
    told: Option<(Instant, u32)>,
}

impl Reading {
    /// A bucket of [`NOT_HERE_BURST`] that gains one in each [`NOT_HERE_PERIOD`].
    fn may_tell_not_here(&mut self) -> bool {
        let now = Instant::now();
        let (since, left) = self.told.unwrap_or((now, NOT_HERE_BURST));
        let gained =
            u32::try_from(now.duration_since(since).as_secs() / NOT_HERE_PERIOD.as_secs()).unwrap_or(0);
        let left = left.saturating_add(gained).min(NOT_HERE_BURST);
        let since = since + NOT_HERE_PERIOD * gained;
        self.told = Some((since, left.saturating_sub(1)));
        left > 0
    }
}

struct Leave<'a> {
    relay: &'a Relay,
    key: NodePublic,
    number: u64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.relay.leave(self.key, self.number);
    }
}
