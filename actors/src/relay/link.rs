//! One link to a relay region: a task that dials, logs in, moves frames both ways, notices when the relay
//! is gone, and dials again (tailnet-data 2 to 4). It belongs to the data plane and ends when it is closed.
//!
//! The reader hands packets to `Inbound` and never waits for anybody; what it has to answer goes into the
//! queue that the writer empties.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::Notify,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use warren_core::{
    relay_link::{Activity, Ended, Occasion, Redial, Verdict, WATCH_PERIOD, Watch},
    relay_map::{Node, RegionId},
};
use warren_proto::{
    derp::{ClientInfo, DerpError, Frame},
    key::{NodePublic, random},
};

use super::{
    frames::{Frames, Incoming},
    queue::{Full, Outgoing},
    request::Headers,
    upgrade::{self, Fallback, Opened, UpgradeError, Upgrades, Wire},
};
use crate::{
    data_plane::{LinkChange, Plane, inbound::Inbound},
    dial::{Alpn, Sent},
    facts::RelayLink,
};

/// For everything from the first packet to the login (tailnet-data 2.1).
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A relay that takes nothing for so long is gone. One that takes little is slow.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// The most that is written at once.
const WRITE_BYTES: usize = 64 * 1024;
/// From one logged problem of a relay to the next.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(10);

/// What a link leads to.
#[derive(Clone, PartialEq, Eq)]
pub struct LinkTarget {
    /// The region.
    pub region: RegionId,
    /// Its relays, preferred ones first.
    pub nodes: Vec<Node>,
    /// Extra headers of the upgrade request.
    pub headers: Headers,
    /// Which upgrades it asks for.
    pub upgrades: Upgrades,
}

impl fmt::Debug for LinkTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkTarget")
            .field("region", &self.region)
            .field("nodes", &self.nodes)
            .field("upgrades", &self.upgrades)
            .finish_non_exhaustive()
    }
}

/// How a link stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkInfo {
    /// Its state.
    pub state: RelayLink,
    /// How long ago something was sent through it; since it was made, if never.
    pub idle: Duration,
    /// How long ago anything came from the relay.
    pub silent: Duration,
    /// Why plain upgrades do not pass, if the link has found that out.
    pub forced_websocket: Option<String>,
}

/// A link as others see it. All of it may be used from any thread.
pub(crate) struct Link {
    target: LinkTarget,
    outgoing: Outgoing,
    state: Mutex<RelayLink>,
    /// Set once the plain upgrade was refused, until the network may have changed.
    fallback: Mutex<Option<Fallback>>,
    is_up: AtomicBool,
    is_preferred: AtomicBool,
    /// Frames were lost with a session or in a queue that was given up.
    has_lost: AtomicBool,
    made: tokio::time::Instant,
    /// Microseconds since `made`: coarser, an answer would seem to be as old as its question.
    used: AtomicU64,
    /// When something was sent elsewhere that may be answered through it.
    expected: AtomicU64,
    heard: AtomicU64,
    complained: AtomicU64,
    probe: Notify,
    answered: Notify,
    token: CancellationToken,
}

impl Link {
    /// A link that [`serve`] is going to keep up until `token` is cancelled.
    pub(crate) fn new(target: LinkTarget, token: CancellationToken) -> Self {
        Self {
            target,
            outgoing: Outgoing::default(),
            state: Mutex::new(RelayLink::Dialing),
            fallback: Mutex::new(None),
            is_up: AtomicBool::new(false),
            is_preferred: AtomicBool::new(false),
            has_lost: AtomicBool::new(false),
            made: tokio::time::Instant::now(),
            used: AtomicU64::new(0),
            expected: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            complained: AtomicU64::new(0),
            probe: Notify::new(),
            answered: Notify::new(),
            token,
        }
    }

    /// The region it leads to.
    pub(crate) fn region(&self) -> RegionId {
        self.target.region
    }

    /// Whether it leads to just this.
    pub(crate) fn is_like(&self, target: &LinkTarget) -> bool {
        self.target == *target
    }

    /// Whether it is logged in.
    pub(crate) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Relaxed)
    }

    /// How it stands.
    pub(crate) fn info(&self) -> LinkInfo {
        let now = self.now();
        LinkInfo {
            state: self.lock_state().clone(),
            idle: now.saturating_sub(since(&self.used)),
            silent: now.saturating_sub(since(&self.heard)),
            forced_websocket: self.lock_fallback().as_ref().map(|it| it.reason.clone()),
        }
    }

    /// Ends it.
    pub(crate) fn close(&self) {
        self.is_up.store(false, Ordering::Relaxed);
        self.token.cancel();
    }

    /// What ends with it.
    pub(crate) fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// The network may have changed: asks the relay at once whether it is there, or ends a pause between two
    /// attempts. What refused the plain upgrade may not be in the way any more: the next attempt asks again.
    pub(crate) fn probe(&self) {
        *self.lock_fallback() = None;
        self.probe.notify_one();
    }

    /// Asks the relay whether it is there. Returns whether anything comes from it within `limit`.
    pub(crate) async fn answers_within(&self, limit: Duration) -> bool {
        let asked_at = micros(self.now());
        self.probe.notify_one();
        let answer = async {
            loop {
                let next = self.answered.notified();
                tokio::pin!(next);
                next.as_mut().enable();
                if self.heard.load(Ordering::Relaxed) > asked_at {
                    return;
                }
                next.await;
            }
        };
        timeout(limit, answer).await.is_ok() && self.is_up()
    }

    /// Tells the relay whether it is our home.
    pub(crate) fn prefer(&self, is_preferred: bool) {
        let was_preferred = self.is_preferred.swap(is_preferred, Ordering::Relaxed);
        if was_preferred != is_preferred && self.is_up() {
            self.tell_preference();
        }
    }

    /// The last word counts: what was chosen while we logged in comes after what the login said.
    fn tell_preference(&self) {
        let is_preferred = self.is_preferred.load(Ordering::Relaxed);
        let _ = self.outgoing.control(&Frame::NotePreferred(is_preferred).encode());
    }

    /// The queue, to seal packets in. Whoever did calls [`Self::wake`].
    pub(crate) fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    /// Tells the writer that there is something to write.
    pub(crate) fn wake(&self) {
        self.used.store(micros(self.now()), Ordering::Relaxed);
        self.outgoing.wake();
    }

    /// Sends one packet to a peer.
    pub(crate) fn send(&self, to: &NodePublic, packet: &[u8]) -> Result<(), Full> {
        self.used.store(micros(self.now()), Ordering::Relaxed);
        self.outgoing.send(to, packet)
    }

    /// Something was sent elsewhere that may be answered through it: that it is silent is odd from now on.
    pub(crate) fn expect(&self) {
        self.expected.store(micros(self.now()), Ordering::Relaxed);
    }

    /// Whether frames were lost; only once.
    pub(crate) fn take_lost(&self) -> bool {
        self.has_lost.swap(false, Ordering::Relaxed)
    }

    fn now(&self) -> Duration {
        Duration::from_micros(micros(self.made.elapsed()))
    }

    fn activity(&self) -> Activity {
        let [heard, used, expected] = [&self.heard, &self.used, &self.expected].map(since);
        Activity { heard, used: used.max(expected) }
    }

    /// Whether a problem may be logged: a relay that repeats itself must not fill the log.
    fn may_complain(&self) -> bool {
        let now = micros(self.now()).max(1);
        let last = self.complained.load(Ordering::Relaxed);
        let is_due = last == 0 || now.saturating_sub(last) >= micros(COMPLAINT_PAUSE);
        if is_due {
            self.complained.store(now, Ordering::Relaxed);
        }
        is_due
    }

    fn note_heard(&self) {
        self.heard.store(micros(self.now()), Ordering::Relaxed);
        self.answered.notify_waiters();
    }

    fn lock_state(&self) -> std::sync::MutexGuard<'_, RelayLink> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_fallback(&self) -> std::sync::MutexGuard<'_, Option<Fallback>> {
        self.fallback.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn become_state(&self, plane: &Plane, state: RelayLink) {
        let change = match &state {
            RelayLink::Dialing => LinkChange::Dialing,
            RelayLink::Up { .. } => LinkChange::Up,
            RelayLink::Down { .. } => LinkChange::Down,
        };
        self.is_up.store(change == LinkChange::Up && !self.token.is_cancelled(), Ordering::Relaxed);
        *self.lock_state() = state;
        plane.events.link_changed(self.region(), change);
    }
}

/// Why a link is not up.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    #[error("{0}")]
    Frame(#[from] DerpError),
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("the relay closed the connection")]
    Closed,
    #[error("the relay takes nothing any more")]
    Stuck,
    #[error("the relay does not answer any more")]
    Silent,
    #[error("the relay restarts")]
    Restarting(Duration),
    #[error("the login took longer than {} seconds", .0.as_secs())]
    Login(Duration),
}

/// Keeps a link up until it is closed.
pub(crate) async fn serve(plane: Arc<Plane>, link: Arc<Link>) {
    let mut redial = Redial::default();
    loop {
        link.become_state(&plane, RelayLink::Dialing);
        let mut up_since = None;
        let error = match connect(&plane, &link).await {
            Ok(LoggedIn { opened, frames, said_preferred }) => {
                up_since = Some(Instant::now());
                link.become_state(&plane, RelayLink::Up { since: SystemTime::now() });
                if link.is_preferred.load(Ordering::Relaxed) != said_preferred {
                    link.tell_preference();
                }
                tracing::info!(region = %link.region(), "a relay link is up");
                plane.link_up(&link);
                let sent = opened.sent;
                let Err(error) = match opened.wire {
                    Wire::Plain(stream) => run(&plane, &link, stream, frames, &sent).await,
                    Wire::WebSocket(stream) => run(&plane, &link, stream, frames, &sent).await,
                };
                error
            }
            Err(error) => {
                // What waits for a relay that cannot be reached is too old once it can.
                link.outgoing.clear();
                error
            }
        };
        link.has_lost.store(true, Ordering::Relaxed);
        link.become_state(&plane, RelayLink::Down { error: error.to_string() });
        plane.forget_routes(link.region());
        let lived = up_since.map(|since| since.elapsed());
        let wanted = if let LinkError::Restarting(wanted) = error { Some(wanted) } else { None };
        let pause = redial.handle_ended(Ended { lived, wanted }, rand::random());
        tracing::info!(region = %link.region(), %error, ?pause, "a relay link is down");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = link.probe.notified() => {}
        }
    }
}

/// A connection that is logged in, what of it was read already, and what the login said of our home.
struct LoggedIn {
    opened: Opened,
    frames: Frames,
    said_preferred: bool,
}

async fn connect(plane: &Plane, link: &Link) -> Result<LoggedIn, LinkError> {
    let attempt = async {
        let mut opened = open(plane, link).await?;
        let said_preferred = link.is_preferred.load(Ordering::Relaxed);
        let frames = match &mut opened.wire {
            Wire::Plain(stream) => log_in(plane, link, said_preferred, stream).await?,
            Wire::WebSocket(stream) => log_in(plane, link, said_preferred, stream).await?,
        };
        Ok(LoggedIn { opened, frames, said_preferred })
    };
    timeout(CONNECT_LIMIT, attempt).await.unwrap_or(Err(LinkError::Login(CONNECT_LIMIT)))
}

/// Plainly, unless the deployment or an earlier refusal says otherwise (tailnet-data 2.5).
async fn open(plane: &Plane, link: &Link) -> Result<Opened, UpgradeError> {
    let LinkTarget { nodes, headers, upgrades, .. } = &link.target;
    if *upgrades == Upgrades::WebSocketOnly {
        return upgrade::web_socket(&plane.dialer, nodes, headers, Alpn::Http1).await;
    }
    let known = link.lock_fallback().clone();
    let fallback = match known {
        Some(known) => known,
        None => match upgrade::plain(&plane.dialer, nodes, headers).await {
            Ok(opened) => return Ok(opened),
            Err(error) => {
                let fallback = error.fallback().ok_or(error)?;
                tracing::info!(region = %link.region(), reason = fallback.reason, "a relay is reached by WebSocket");
                link.lock_fallback().insert(fallback).clone()
            }
        },
    };
    let opened = upgrade::web_socket(&plane.dialer, nodes, headers, fallback.alpn).await;
    opened.map_err(|error| UpgradeError::Fallback { error: Box::new(error), reason: fallback.reason })
}

/// Logs in (tailnet-data 3.2).
async fn log_in<S>(
    plane: &Plane,
    link: &Link,
    is_preferred: bool,
    stream: &mut S,
) -> Result<Frames, LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut frames = Frames::default();
    let Incoming::ServerKey(server) = next(stream, &mut frames).await? else {
        return Err(DerpError::Greeting.into());
    };
    let shared = plane.node.shared(&server);
    let info = ClientInfo::OURS.seal(&shared, &random());
    let mut hello = Frame::ClientInfo(plane.node_public, &info).encode();
    if is_preferred {
        hello.extend(Frame::NotePreferred(true).encode());
    }
    stream.write_all(&hello).await?;
    stream.flush().await?;
    loop {
        if let Incoming::ServerInfo(sealed) = next(stream, &mut frames).await? {
            frames.open_server_info(sealed, &shared)?;
            link.note_heard();
            return Ok(frames);
        }
    }
}

async fn next<S: AsyncRead + Unpin>(stream: &mut S, frames: &mut Frames) -> Result<Incoming, LinkError> {
    loop {
        if let Some(frame) = frames.next()? {
            return Ok(frame);
        }
        fill(stream, frames).await?;
    }
}

async fn fill<S: AsyncRead + Unpin>(stream: &mut S, frames: &mut Frames) -> Result<(), LinkError> {
    let read = stream.read(frames.space()).await?;
    if read == 0 {
        return Err(LinkError::Closed);
    }
    frames.advance(read);
    Ok(())
}

/// Moves frames until something ends it. `sent` counts what leaves below `stream`.
async fn run<S>(
    plane: &Plane,
    link: &Link,
    stream: S,
    frames: Frames,
    sent: &Sent,
) -> Result<std::convert::Infallible, LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (read, write) = tokio::io::split(stream);
    tokio::select! {
        ended = receive(plane, link, read, frames) => ended,
        ended = transmit(link, write, sent) => ended,
        ended = watch(link) => ended,
    }
}

async fn receive<R>(
    plane: &Plane,
    link: &Link,
    mut stream: R,
    mut frames: Frames,
) -> Result<std::convert::Infallible, LinkError>
where
    R: AsyncRead + Unpin,
{
    let mut inbound = Inbound::default();
    loop {
        // What the login read beyond itself comes first.
        link.note_heard();
        let outcome = loop {
            match frames.next() {
                Ok(Some(Incoming::Packet(packet))) => inbound.add(packet),
                Ok(Some(other)) => match react(plane, link, &frames, other) {
                    Ok(()) => {}
                    Err(error) => break Err(error),
                },
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
        };
        // What arrived whole before an end is delivered.
        inbound.receive(plane, link, frames.bytes(), Instant::now());
        outcome?;
        // The writer, the TUN and the other links get their turn between two batches.
        tokio::task::yield_now().await;
        fill(&mut stream, &mut frames).await?;
    }
}

fn react(plane: &Plane, link: &Link, frames: &Frames, frame: Incoming) -> Result<(), LinkError> {
    match frame {
        Incoming::Ping(data) => drop(link.outgoing.control(&Frame::Pong(data).encode())),
        Incoming::PeerGone(key) => {
            if let Some(peer) = plane.peers.by_key(&key) {
                peer.forget_region(link.region());
            }
        }
        Incoming::Health(text) => {
            let problem = frames.text(text);
            if !problem.is_empty() && link.may_complain() {
                tracing::warn!(region = %link.region(), problem, "the relay reports a problem");
            }
        }
        Incoming::Restarting(pause) => return Err(LinkError::Restarting(pause)),
        Incoming::ServerKey(_) | Incoming::ServerInfo(_) | Incoming::Packet(_) | Incoming::Other => {}
    }
    Ok(())
}

async fn transmit<W>(link: &Link, mut stream: W, sent: &Sent) -> Result<std::convert::Infallible, LinkError>
where
    W: AsyncWrite + Unpin,
{
    let mut waiting = super::queue::Frames::default();
    loop {
        link.outgoing.take(&mut waiting).await;
        for chunk in waiting.bytes().chunks(WRITE_BYTES) {
            while_moving(sent, stream.write_all(chunk)).await?;
        }
        if link.outgoing.is_empty() {
            while_moving(sent, stream.flush()).await?;
        }
    }
}

/// Waits for a write for as long as something leaves, however slowly.
async fn while_moving(
    sent: &Sent,
    writing: impl Future<Output = std::io::Result<()>>,
) -> Result<(), LinkError> {
    tokio::pin!(writing);
    loop {
        let before = sent.bytes();
        match timeout(WRITE_LIMIT, &mut writing).await {
            Ok(written) => return Ok(written?),
            Err(_) if sent.bytes() == before => return Err(LinkError::Stuck),
            Err(_) => {}
        }
    }
}

/// Ends when the relay is silent although it should not be.
async fn watch(link: &Link) -> Result<std::convert::Infallible, LinkError> {
    let mut watch = Watch::default();
    loop {
        let occasion = tokio::select! {
            () = tokio::time::sleep(WATCH_PERIOD) => Occasion::Usual,
            () = link.probe.notified() => Occasion::Doubt,
        };
        match watch.look(link.now(), link.activity(), occasion) {
            Verdict::Keep => {}
            Verdict::Ask => drop(link.outgoing.control(&Frame::Ping(rand::random()).encode())),
            Verdict::Silent => return Err(LinkError::Silent),
        }
    }
}

fn since(at: &AtomicU64) -> Duration {
    Duration::from_micros(at.load(Ordering::Relaxed))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use warren_core::relay_link::ANSWER_LIMIT;

    use super::*;
    use crate::dial::Counted;

    #[tokio::test(start_paused = true)]
    async fn a_silent_relay_is_asked_once_and_its_link_ends_three_seconds_later() {
        let link = link();
        link.send(&NodePublic([1; 32]), b"packet").unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        link.send(&NodePublic([1; 32]), b"packet").unwrap();
        let begun = tokio::time::Instant::now();
        let ended = watch(&link).await;
        assert!(matches!(ended, Err(LinkError::Silent)));
        assert!((Duration::from_secs(5)..=Duration::from_secs(6)).contains(&begun.elapsed()));
        assert_eq!(asked(&link), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_through_which_answers_are_expected_is_watched_and_no_less_idle() {
        let link = link();
        tokio::time::sleep(Duration::from_secs(30)).await;
        link.expect();
        assert_eq!(link.info().idle, Duration::from_secs(30));
        let begun = tokio::time::Instant::now();
        assert!(matches!(watch(&link).await, Err(LinkError::Silent)));
        assert!(begun.elapsed() <= ANSWER_LIMIT + WATCH_PERIOD);
        assert_eq!(asked(&link), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_probed_link_is_asked_at_once() {
        let link = link();
        tokio::time::sleep(Duration::from_millis(1)).await;
        link.probe();
        let begun = tokio::time::Instant::now();
        assert!(matches!(watch(&link).await, Err(LinkError::Silent)));
        assert!(begun.elapsed() <= ANSWER_LIMIT + WATCH_PERIOD);
        assert_eq!(asked(&link), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_is_proved_alive_by_what_comes_after_the_question_and_by_nothing_before() {
        let link = link();
        link.is_up.store(true, Ordering::Relaxed);
        link.note_heard();
        assert!(!link.answers_within(Duration::from_secs(1)).await);
        let answer = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            link.note_heard();
        };
        let (is_alive, ()) = tokio::join!(link.answers_within(Duration::from_secs(1)), answer);
        assert!(is_alive);
    }

    #[tokio::test(start_paused = true)]
    async fn an_uplink_that_takes_minutes_for_one_write_is_slow_and_not_dead() {
        let link = link();
        let (near, mut far) = tokio::io::duplex(1024);
        let near = Counted::new(near);
        let sent = near.sent().clone();
        // What TLS and WebSockets do: all is taken at once, and the flush tells nothing until it has left.
        let buffered = tokio::io::BufWriter::with_capacity(256 * 1024, near);
        (0..100).for_each(|_| link.send(&NodePublic([1; 32]), &[7; 1300]).unwrap());
        let begun = tokio::time::Instant::now();
        let trickle = async {
            let mut received = 0;
            while received < 100 * 1337 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                received += far.read(&mut [0; 1000]).await.unwrap();
            }
        };
        let transmit = transmit(&link, buffered, &sent);
        tokio::pin!(transmit);
        tokio::select! {
            ended = &mut transmit => panic!("{ended:?}"),
            () = trickle => {}
        }
        assert!(begun.elapsed() > Duration::from_secs(130));
        (0..10).for_each(|_| link.send(&NodePublic([1; 32]), &[7; 1300]).unwrap());
        let begun = tokio::time::Instant::now();
        assert!(matches!(transmit.await, Err(LinkError::Stuck)));
        assert!(begun.elapsed() <= 2 * WRITE_LIMIT + Duration::from_secs(1));
    }

    fn link() -> Link {
        let (nodes, headers) = (Vec::new(), Headers::new());
        let target = LinkTarget { region: RegionId(1), nodes, headers, upgrades: Upgrades::default() };
        Link::new(target, CancellationToken::new())
    }

    /// How many pings wait to be sent.
    fn asked(link: &Link) -> usize {
        let queue = link.outgoing.lock();
        queue.bytes().windows(5).filter(|window| window == &[0x12, 0, 0, 0, 8]).count()
    }
}
