//! One end of a CoderVPN connection: handshake, frames, calls (vpn-protocol 2 to 4). The session, the
//! service in both of its roles, and command line clients use it.
//!
//! ```text
//!            ┌─ response ─> its waiter
//! bytes ─> reader ─ anything else ─> Inbox (bounded; what overflows waits a while, then the connection ends)
//! bytes <─ writer <─ frames (bounded) <─ Speaker, cloned freely
//! ```
//!
//! The reader resolves responses itself and never waits for whoever handles requests, so that neither a
//! response nor the end of the stream goes unnoticed behind a slow request. The writer alone writes, each
//! frame whole from one buffer. What is read is bounded thrice by the [`Limits`] of the message: each frame before
//! its body comes, each message before it is unpacked, and everything together until it is dealt with. Both
//! tasks outlive any actor that uses the connection; they end with the
//! stream, with [`Speaker::close`], or when the last [`Speaker`] is dropped.

use std::{
    collections::VecDeque,
    fmt, io,
    marker::PhantomData,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{self, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use warren_observability::names;
use warren_proto::{
    correlator::{Correlator, Kind, classify},
    frame::{self, Decoder, FrameError, MAX_FRAME},
    header::{Role, Version},
    vpn,
};

pub mod descriptors;
mod handshake;
mod message;

pub use handshake::SpeakerError;
pub use message::{Limits, SpeakerMessage};

/// Frames that wait for the writer. Senders wait beyond that; nobody queues more than one or two at a time.
const QUEUE: usize = 16;
/// Bytes that the queue can hold at worst.
const QUEUE_BYTES: usize = QUEUE * (MAX_FRAME + frame::PREFIX);
const _: () = assert!(QUEUE_BYTES <= 300 << 20, "frames that wait must not exhaust a small machine");

/// Messages that wait for whoever handles them.
const INBOX: usize = 256;
/// Messages that wait for room in the inbox while the reader reads on: it looks for responses. Beyond that it
/// stops, and the peer has to wait.
const OVERFLOW: usize = 256;
/// How long no room may come. A burst of log lines is over by then; a peer that goes on without waiting for
/// answers is broken, and its connection ends.
const ROOM_LIMIT: Duration = Duration::from_secs(5);

/// Bytes read at a time.
const READ: usize = 16 * 1024;

/// How long frames that were accepted may take to leave once nobody can wait for them any more.
const LINGER: Duration = Duration::from_secs(1);

/// A message that another end sent, other than a response.
#[derive(Debug)]
pub struct Incoming<In> {
    /// The message.
    pub message: In,
    /// Whether it wants an answer, and to which id.
    pub kind: Kind,
    /// When it was read.
    pub received_at: Instant,
    /// Kept for as long as the message is.
    pub room: Room,
}

/// The room that a message takes among all that have been read; dropped, it is there for another.
#[derive(Debug)]
pub struct Room(#[expect(dead_code, reason = "held, never looked at")] OwnedSemaphorePermit);

/// Why a connection is over.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum End {
    /// This end closed it.
    #[error("closed by this end")]
    Closed,
    /// The other end closed it.
    #[error("unexpected EOF")]
    Eof,
    /// Reading or writing failed, which is how a peer that died shows itself.
    #[error("{action}: {error}")]
    Broken {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        error: String,
    },
    /// The other end broke the protocol.
    #[error("protocol error: {0}")]
    Protocol(#[from] FrameError),
    /// The other end sent more than anybody could handle.
    #[error("protocol error: messages came faster than they could be handled for {ROOM_LIMIT:?}")]
    Overflow,
}

/// Why a request has no response.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CallError {
    /// None came in time. A late one will be ignored.
    #[error("no response in time")]
    Deadline,
    /// The connection ended.
    #[error("{0}")]
    Ended(End),
    /// The request cannot be sent.
    #[error(transparent)]
    Unsendable(#[from] FrameError),
}

/// Why a message was not accepted for sending.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SendError {
    /// The connection ended, or is ending.
    #[error("{0}")]
    Ended(End),
    /// The message cannot be sent.
    #[error(transparent)]
    Unsendable(#[from] FrameError),
    /// The other end does not read as fast as this one writes; only the `try_` forms say so.
    #[error("the peer reads too slowly")]
    Full,
}

impl From<SendError> for CallError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Ended(end) => Self::Ended(end),
            SendError::Unsendable(error) => Self::Unsendable(error),
            SendError::Full => Self::Deadline,
        }
    }
}

/// The sending half of a connection, and where responses come back. The connection ends when the last
/// clone is dropped.
pub struct Speaker<Out, In> {
    connection: Arc<Connection<In>>,
    queue: mpsc::Sender<Outgoing>,
    life: Arc<DropGuard>,
    sends: PhantomData<fn(Out)>,
}

/// What the other end sends, other than responses.
#[derive(Debug)]
pub struct Inbox<In> {
    messages: mpsc::Receiver<Incoming<In>>,
}

/// Room for one message. Reserve first, then produce: what is sent is then never out of date.
pub struct Slot<Out> {
    permit: mpsc::OwnedPermit<Outgoing>,
    sends: PhantomData<fn(Out)>,
}

/// Tells when a message has been written.
pub struct Written(oneshot::Receiver<()>);

/// What the speaker, its reader and its writer share.
struct Connection<In> {
    negotiated: Version,
    leg: &'static str,
    /// `None` once no response can come any more.
    calls: Mutex<Option<Correlator<oneshot::Sender<In>>>>,
    closing: Mutex<Option<oneshot::Sender<Option<Bytes>>>>,
    /// Nothing new is accepted, and what was accepted has [`LINGER`] to leave.
    winding_down: CancellationToken,
    /// Both tasks end at once.
    hang_up: CancellationToken,
    end: OnceLock<End>,
    /// Everything that was accepted has been written.
    flushed: AtomicBool,
    /// Both tasks have ended, and the descriptors are closed.
    done: CancellationToken,
}

struct Outgoing {
    frame: Bytes,
    method: &'static str,
    written: Option<oneshot::Sender<()>>,
}

impl<Out, In> Clone for Speaker<Out, In> {
    fn clone(&self) -> Self {
        Self {
            connection: Arc::clone(&self.connection),
            queue: self.queue.clone(),
            life: Arc::clone(&self.life),
            sends: PhantomData,
        }
    }
}

impl<Out, In> fmt::Debug for Speaker<Out, In> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Speaker").field("end", &self.connection.end.get()).finish_non_exhaustive()
    }
}

impl<Out: SpeakerMessage, In: SpeakerMessage> Speaker<Out, In> {
    /// Shakes hands as `local` with a `peer`, within `limit`, and starts to read and write.
    pub async fn connect<R, W>(
        mut read: R,
        mut write: W,
        local: Role,
        peer: Role,
        limit: Duration,
    ) -> Result<(Self, Inbox<In>), SpeakerError>
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let handshake = handshake::shake(&mut read, &mut write, local, peer);
        let negotiated = timeout(limit, handshake).await.unwrap_or(Err(SpeakerError::Deadline(limit)))?;
        Ok(Self::start(read, write, local, negotiated))
    }

    fn start<R, W>(read: R, write: W, local: Role, negotiated: Version) -> (Self, Inbox<In>)
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (queue, frames) = mpsc::channel(QUEUE);
        let (inbox, messages) = mpsc::channel(INBOX);
        let (closing, close) = oneshot::channel();
        let connection = Arc::new(Connection {
            negotiated,
            leg: leg(local),
            calls: Mutex::new(Some(Correlator::default())),
            closing: Mutex::new(Some(closing)),
            winding_down: CancellationToken::new(),
            hang_up: CancellationToken::new(),
            end: OnceLock::new(),
            flushed: AtomicBool::new(false),
            done: CancellationToken::new(),
        });
        let life = Arc::new(connection.winding_down.clone().drop_guard());
        let reader = tokio::spawn(Arc::clone(&connection).run_reader(read, inbox));
        tokio::spawn(Arc::clone(&connection).run_writer(write, frames, close, reader));
        (Self { connection, queue, life, sends: PhantomData }, Inbox { messages })
    }

    /// The version both ends speak. New kinds of message are sent only to peers that know them.
    pub fn negotiated(&self) -> Version {
        self.connection.negotiated
    }

    /// Sends a request and waits for its response, at most until `deadline`. Cancelled or late, a response
    /// is ignored.
    pub async fn request(&self, message: Out, deadline: Duration) -> Result<In, CallError> {
        let (method, begun) = (message.method(), Instant::now());
        let result = timeout(deadline, self.call(message)).await.unwrap_or(Err(CallError::Deadline));
        let label = match &result {
            Ok(_) => "ok",
            Err(CallError::Deadline) => "deadline",
            Err(CallError::Ended(_)) => "ended",
            Err(CallError::Unsendable(_)) => "unsendable",
        };
        self.connection.count_request(method, label, begun);
        result
    }

    async fn call(&self, message: Out) -> Result<In, CallError> {
        let (waiter, answer) = oneshot::channel();
        let id =
            self.connection.register(waiter).ok_or_else(|| CallError::Ended(self.connection.reason()))?;
        let _forget = Forget { connection: &self.connection, id };
        self.reserve().await?.put(message, Some(vpn::Rpc::request(id)))?;
        answer.await.map_err(|_| CallError::Ended(self.connection.reason()))
    }

    /// Waits for room for one message.
    pub async fn reserve(&self) -> Result<Slot<Out>, SendError> {
        self.still_open()?;
        let permit = self.queue.clone().reserve_owned();
        let permit = tokio::select! {
            biased;
            () = self.connection.winding_down.cancelled() => return Err(self.ended()),
            permit = permit => permit.map_err(|_| self.ended())?,
        };
        Ok(Slot { permit, sends: PhantomData })
    }

    /// Room for one message, if there is any at once.
    pub fn try_reserve(&self) -> Result<Slot<Out>, SendError> {
        self.still_open()?;
        let permit = self.queue.clone().try_reserve_owned().map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SendError::Full,
            mpsc::error::TrySendError::Closed(_) => self.ended(),
        })?;
        Ok(Slot { permit, sends: PhantomData })
    }

    /// Sends a message that wants no answer, waiting for room.
    pub async fn notify(&self, message: Out) -> Result<(), SendError> {
        self.reserve().await?.notify(message).map(drop)
    }

    /// Sends a message that wants no answer, if there is room at once.
    pub fn try_notify(&self, message: Out) -> Result<(), SendError> {
        self.try_reserve()?.notify(message).map(drop)
    }

    /// Answers the request `id`, waiting for room.
    pub async fn respond(&self, id: u64, message: Out) -> Result<(), SendError> {
        self.reserve().await?.respond(id, message).map(drop)
    }

    /// Answers the request `id`, if there is room at once.
    pub fn try_respond(&self, id: u64, message: Out) -> Result<(), SendError> {
        self.try_reserve()?.respond(id, message).map(drop)
    }

    /// Writes every frame that was accepted, then ends the connection; pending calls fail at once.
    /// Returns whether all of it left within `limit`. Whoever comes second waits for the first.
    pub async fn close(&self, limit: Duration) -> bool {
        self.wind_up(None, limit).await
    }

    /// As [`Self::close`], with the answer to `id` as the last frame of all, whoever else tries to send.
    pub async fn close_with(&self, id: u64, mut last: Out, limit: Duration) -> Result<bool, FrameError> {
        last.set_rpc(Some(vpn::Rpc::response(id)));
        let frame = encode(&last)?;
        Ok(self.wind_up(Some(frame), limit).await)
    }

    async fn wind_up(&self, last: Option<Bytes>, limit: Duration) -> bool {
        let connection = &self.connection;
        let closing = lock(&connection.closing).take();
        if let Some(closing) = closing {
            connection.conclude(End::Closed);
            let _ = closing.send(last);
        }
        let in_time = timeout(limit, connection.done.cancelled()).await.is_ok();
        connection.hang_up.cancel();
        in_time && connection.end.get() == Some(&End::Closed) && connection.flushed.load(Ordering::Acquire)
    }

    /// Waits until the connection is over and its descriptors are closed, and says why. That the other end
    /// is gone shows itself earlier in [`Inbox::recv`].
    pub async fn closed(&self) -> End {
        self.connection.done.cancelled().await;
        self.connection.reason()
    }

    /// Why the connection is over or about to be, if it is.
    pub fn end(&self) -> Option<End> {
        self.connection.end.get().cloned()
    }

    fn still_open(&self) -> Result<(), SendError> {
        let is_over = self.connection.winding_down.is_cancelled() || self.connection.end.get().is_some();
        if is_over { Err(self.ended()) } else { Ok(()) }
    }

    fn ended(&self) -> SendError {
        SendError::Ended(self.connection.reason())
    }
}

impl<Out: SpeakerMessage> Slot<Out> {
    /// Sends a message that wants no answer.
    pub fn notify(self, message: Out) -> Result<Written, SendError> {
        self.put(message, None)
    }

    /// Answers the request `id`.
    pub fn respond(self, id: u64, message: Out) -> Result<Written, SendError> {
        self.put(message, Some(vpn::Rpc::response(id)))
    }

    fn put(self, mut message: Out, rpc: Option<vpn::Rpc>) -> Result<Written, SendError> {
        message.set_rpc(rpc);
        let frame = encode(&message)?;
        let (done, written) = oneshot::channel();
        self.permit.send(Outgoing { frame, method: message.method(), written: Some(done) });
        Ok(Written(written))
    }
}

/// A message without a body ends the connection at some peers, so it is never sent.
fn encode<M: SpeakerMessage>(message: &M) -> Result<Bytes, FrameError> {
    if message.is_bare() { Err(FrameError::Empty) } else { frame::encode(message) }
}

impl Written {
    /// Waits until the message is written, or never will be. Returns whether it is.
    pub async fn wait(self) -> bool {
        self.0.await.is_ok()
    }
}

impl<In> Inbox<In> {
    /// The next message; `None` when no more can come.
    pub async fn recv(&mut self) -> Option<Incoming<In>> {
        self.messages.recv().await
    }
}

/// A call that is dropped before its response waits no more.
struct Forget<'a, In> {
    connection: &'a Connection<In>,
    id: u64,
}

impl<In> Drop for Forget<'_, In> {
    fn drop(&mut self) {
        if let Some(calls) = lock(&self.connection.calls).as_mut() {
            calls.cancel(self.id);
        }
    }
}

impl<In> Connection<In> {
    fn register(&self, waiter: oneshot::Sender<In>) -> Option<u64> {
        let mut calls = lock(&self.calls);
        let calls = calls.as_mut()?;
        let id = calls.next_id();
        calls.register(id, waiter);
        Some(id)
    }

    /// Says why the connection is over, the first time; every pending call fails now.
    fn conclude(&self, end: End) {
        let _ = self.end.set(end);
        // Dropped outside the lock: each dropped waiter wakes its call.
        let calls = lock(&self.calls).take();
        drop(calls);
    }

    fn reason(&self) -> End {
        self.end.get().cloned().unwrap_or(End::Closed)
    }

    fn count_frame(&self, direction: &'static str, method: &'static str) {
        metrics::counter!(names::RPC_FRAMES, "leg" => self.leg, "direction" => direction, "type" => method)
            .increment(1);
    }

    fn count_request(&self, method: &'static str, result: &'static str, begun: Instant) {
        metrics::counter!(names::RPC_REQUESTS, "leg" => self.leg, "method" => method, "result" => result)
            .increment(1);
        metrics::histogram!(names::RPC_DURATION, "leg" => self.leg, "method" => method)
            .record(begun.elapsed());
    }
}

impl<In: SpeakerMessage> Connection<In> {
    async fn run_reader<R: AsyncRead + Unpin>(self: Arc<Self>, read: R, inbox: mpsc::Sender<Incoming<In>>) {
        let end = tokio::select! {
            end = self.read(read, &inbox) => end,
            () = self.hang_up.cancelled() => End::Closed,
        };
        self.conclude(end);
        self.winding_down.cancel();
    }

    /// Reads until the connection is over. What was read by then is still handed over, as far as there is room.
    async fn read<R: AsyncRead + Unpin>(&self, mut read: R, inbox: &mpsc::Sender<Incoming<In>>) -> End {
        let mut arrivals = Arrivals::new();
        let end = self.read_on(&mut read, &mut arrivals, inbox).await;
        while let Some(next) = arrivals.waiting.pop_front() {
            if inbox.try_send(next).is_err() {
                break;
            }
        }
        end
    }

    async fn read_on<R: AsyncRead + Unpin>(
        &self,
        read: &mut R,
        arrivals: &mut Arrivals<In>,
        inbox: &mpsc::Sender<Incoming<In>>,
    ) -> End {
        let mut piece = vec![0; READ];
        loop {
            if let Err(error) = self.sort(arrivals, inbox) {
                return error.into();
            }
            if arrivals.begins_to_pause(inbox) {
                tracing::warn!(
                    leg = self.leg,
                    "the peer has to wait: what it sent before is not handled yet"
                );
            }
            tokio::select! {
                biased;
                slot = inbox.reserve(), if !arrivals.waiting.is_empty() => arrivals.hand_over(slot.ok()),
                room = arrivals.room_for_stuck(), if arrivals.stuck.is_some() => arrivals.release(room),
                () = sleep_until(arrivals.moved_at + ROOM_LIMIT), if arrivals.is_blocked() => {
                    return End::Overflow;
                }
                arrived = read.read(&mut piece), if arrivals.may_read() => match arrived {
                    Ok(0) => return End::Eof,
                    Ok(length) => arrivals.decoder.extend(piece.get(..length).unwrap_or_default()),
                    Err(error) => return End::Broken { action: "read", error: error.to_string() },
                },
            }
        }
    }

    /// Takes messages out of what has been read: responses go to their calls, others to the inbox. Where there
    /// is room, what was said before a response is there before the response is.
    fn sort(
        &self,
        arrivals: &mut Arrivals<In>,
        inbox: &mpsc::Sender<Incoming<In>>,
    ) -> Result<(), FrameError> {
        while arrivals.may_read() {
            let Some((message, weight)) = arrivals.next()? else { return Ok(()) };
            self.count_frame("in", message.method());
            match classify(message.rpc()) {
                Kind::Response(id) => self.resolve(id, message),
                kind @ (Kind::Request(_) | Kind::Notification | Kind::Stray) => {
                    arrivals.keep(Unplaced { message, kind, received_at: Instant::now(), weight });
                    arrivals.hand_over_at_once(inbox);
                }
            }
        }
        Ok(())
    }

    fn resolve(&self, id: u64, message: In) {
        let waiter = lock(&self.calls).as_mut().and_then(|calls| calls.resolve(id));
        match waiter {
            Some(waiter) => drop(waiter.send(message)),
            None => tracing::debug!(id, "a response that nobody waits for"),
        }
    }

    async fn run_writer<W: AsyncWrite + Unpin>(
        self: Arc<Self>,
        write: W,
        frames: mpsc::Receiver<Outgoing>,
        close: oneshot::Receiver<Option<Bytes>>,
        reader: tokio::task::JoinHandle<()>,
    ) {
        let result = tokio::select! {
            result = self.write(write, frames, close) => result,
            () = self.overdue() => Err(io::ErrorKind::TimedOut.into()),
        };
        self.flushed.store(result.is_ok(), Ordering::Release);
        self.conclude(match result {
            Ok(()) => End::Closed,
            Err(error) => End::Broken { action: "write", error: error.to_string() },
        });
        self.winding_down.cancel();
        self.hang_up.cancel();
        let _ = reader.await;
        self.done.cancel();
    }

    /// Returns when nobody waits any longer for what was accepted.
    async fn overdue(&self) {
        let lingered = async {
            self.winding_down.cancelled().await;
            tokio::time::sleep(LINGER).await;
        };
        tokio::select! {
            () = lingered => {}
            () = self.hang_up.cancelled() => {}
        }
    }

    async fn write<W: AsyncWrite + Unpin>(
        &self,
        mut write: W,
        mut frames: mpsc::Receiver<Outgoing>,
        mut close: oneshot::Receiver<Option<Bytes>>,
    ) -> io::Result<()> {
        let last = loop {
            // A frame is written outside of the `select`: nothing can cut it.
            let next = tokio::select! {
                biased;
                last = &mut close => break last.ok().flatten(),
                () = self.winding_down.cancelled() => break None,
                next = frames.recv() => next,
            };
            match next {
                Some(next) => self.put(&mut write, next).await?,
                None => break None,
            }
        };
        self.drain(&mut write, &mut frames).await?;
        if let Some(last) = last {
            write.write_all(&last).await?;
        }
        write.flush().await?;
        // Beyond this point a peer that reads sees the end of the stream, even on a socket with two owners.
        let _ = write.shutdown().await;
        Ok(())
    }

    /// Accepts nothing more and writes what was accepted.
    async fn drain<W: AsyncWrite + Unpin>(
        &self,
        write: &mut W,
        frames: &mut mpsc::Receiver<Outgoing>,
    ) -> io::Result<()> {
        frames.close();
        while let Some(next) = frames.recv().await {
            self.put(write, next).await?;
        }
        Ok(())
    }

    async fn put<W: AsyncWrite + Unpin>(&self, write: &mut W, next: Outgoing) -> io::Result<()> {
        write.write_all(&next.frame).await?;
        write.flush().await?;
        self.count_frame("out", next.method);
        if let Some(written) = next.written {
            let _ = written.send(());
        }
        Ok(())
    }
}

/// What a reader has read and not handed over.
struct Arrivals<In> {
    decoder: Decoder,
    /// Bytes that messages may take from here until they are dealt with.
    room: Arc<Semaphore>,
    /// In the order they came.
    waiting: VecDeque<Incoming<In>>,
    /// Behind those, the one that there is no room for.
    stuck: Option<Unplaced<In>>,
    /// When the first of those began to wait, or one that did found room.
    moved_at: time::Instant,
    /// Nothing is read until there is room; said once.
    is_paused: bool,
}

/// A message that has no room yet.
struct Unplaced<In> {
    message: In,
    kind: Kind,
    received_at: Instant,
    weight: u32,
}

impl<In> Unplaced<In> {
    fn place(self, room: OwnedSemaphorePermit) -> Incoming<In> {
        let Self { message, kind, received_at, weight: _ } = self;
        Incoming { message, kind, received_at, room: Room(room) }
    }
}

impl<In: SpeakerMessage> Arrivals<In> {
    fn new() -> Self {
        Self {
            decoder: Decoder::new(In::LIMITS.frame),
            room: Arc::new(Semaphore::new(In::LIMITS.in_flight)),
            waiting: VecDeque::new(),
            stuck: None,
            moved_at: time::Instant::now(),
            is_paused: false,
        }
    }

    /// The next message and its weight.
    fn next(&mut self) -> Result<Option<(In, u32)>, FrameError> {
        let Some(payload) = self.decoder.next_payload()? else { return Ok(None) };
        if payload.is_empty() && !In::LIMITS.may_be_empty {
            return Err(FrameError::Empty);
        }
        let weight = size_of::<Incoming<In>>() + payload.len() + In::SHAPE.weigh(&payload);
        let limit = In::LIMITS.unpacked;
        let too_heavy = FrameError::TooHeavy { weight, limit };
        let weight = u32::try_from(weight).ok().filter(|_| weight <= limit).ok_or(too_heavy)?;
        Ok(Some((frame::unpack(payload)?, weight)))
    }

    /// Nobody may want requests; calls still get their responses.
    fn hand_over(&mut self, slot: Option<mpsc::Permit<'_, Incoming<In>>>) {
        if let (Some(next), Some(slot)) = (self.waiting.pop_front(), slot) {
            slot.send(next);
        }
        self.moved_at = time::Instant::now();
        self.is_paused &= !self.waiting.is_empty();
    }

    fn hand_over_at_once(&mut self, inbox: &mpsc::Sender<Incoming<In>>) {
        while !self.waiting.is_empty() {
            match inbox.try_reserve() {
                Ok(slot) => self.hand_over(Some(slot)),
                Err(mpsc::error::TrySendError::Closed(())) => self.hand_over(None),
                Err(mpsc::error::TrySendError::Full(())) => return,
            }
        }
    }

    fn keep(&mut self, arrived: Unplaced<In>) {
        if !self.is_blocked() {
            self.moved_at = time::Instant::now();
        }
        match Arc::clone(&self.room).try_acquire_many_owned(arrived.weight) {
            Ok(room) => self.waiting.push_back(arrived.place(room)),
            Err(_) => self.stuck = Some(arrived),
        }
    }

    /// Waits for room for the message that has none.
    async fn room_for_stuck(&self) -> Option<OwnedSemaphorePermit> {
        let weight = self.stuck.as_ref()?.weight;
        Arc::clone(&self.room).acquire_many_owned(weight).await.ok()
    }

    fn release(&mut self, room: Option<OwnedSemaphorePermit>) {
        self.moved_at = time::Instant::now();
        if let (Some(stuck), Some(room)) = (self.stuck.take(), room) {
            self.waiting.push_back(stuck.place(room));
        }
    }

    fn may_read(&self) -> bool {
        self.stuck.is_none() && self.waiting.len() < OVERFLOW
    }

    /// Whether reading stops, and is not known to: said once until all that waited has gone.
    fn begins_to_pause(&mut self, inbox: &mpsc::Sender<Incoming<In>>) -> bool {
        let pauses = !self.may_read() && (self.stuck.is_some() || inbox.capacity() == 0);
        pauses && !std::mem::replace(&mut self.is_paused, true)
    }

    fn is_blocked(&self) -> bool {
        self.stuck.is_some() || !self.waiting.is_empty()
    }
}

fn leg(local: Role) -> &'static str {
    match local {
        Role::Manager | Role::Tunnel => "a",
        Role::Service | Role::Client => "b",
    }
}

/// No guard is held where anything can panic, so a poisoned lock guards sound data.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
