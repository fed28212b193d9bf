//! Calls over the control connection: one DRPC call on one yamux stream (tailnet-control 2).
//!
//! A stream that nobody reads holds up the whole connection, pings included: whoever holds [`Answers`] polls
//! them at all times, and waits for nothing else.

use std::{
    io,
    marker::PhantomData,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use futures::StreamExt;
use metrics::{counter, histogram};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tokio_yamux::{Config, Control, Session, StreamHandle};
use warren_observability::{names, redact::one_line};
use warren_proto::{
    drpc::{Decoder, DrpcError, ErrorBody, Kind, MAX_UNPACKED, Packet, PacketWriter},
    frame::Message,
    weight::{self, Shape},
};

/// A deployment that does not take what is written for so long is gone.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// For the session to take a new stream.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Our calls are a handful; the deployment opens no streams.
const MAX_STREAMS: usize = 64;
/// Each transport carries one call.
const STREAM: u64 = 1;
const READ_BUFFER: usize = 16 * 1024;
/// Of a deployment's error text this much is told.
pub(super) const MAX_SAID: usize = 1024;

/// The calls there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Coordinate,
    StreamDerpMaps,
    WorkspaceUpdates,
    RefreshResumeToken,
}

impl Method {
    fn path(self) -> String {
        format!("/coder.tailnet.v2.Tailnet/{}", self.name())
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Coordinate => "Coordinate",
            Self::StreamDerpMaps => "StreamDERPMaps",
            Self::WorkspaceUpdates => "WorkspaceUpdates",
            Self::RefreshResumeToken => "RefreshResumeToken",
        }
    }

    /// How its answers unpack.
    fn shape(self) -> Shape {
        match self {
            Self::Coordinate => weight::COORDINATE_RESPONSE,
            Self::StreamDerpMaps => weight::RELAY_MAP,
            Self::WorkspaceUpdates => weight::WORKSPACE_UPDATE,
            Self::RefreshResumeToken => weight::SINGLE,
        }
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The deployment does not have the method.
    #[error("the deployment does not have this call; it may be too old")]
    Unimplemented,
    /// The deployment answered with an error.
    #[error("the deployment reports: {0}")]
    Remote(String),
    /// It cancelled the call.
    #[error("the deployment cancelled the call")]
    Cancelled,
    /// It ended the call without the answer that it owes.
    #[error("the deployment ended the call without an answer")]
    NoAnswer,
    /// It did not answer in time.
    #[error("no answer within {} seconds", .0.as_secs())]
    Deadline(Duration),
    /// What came breaks the protocol.
    #[error("the deployment breaks the protocol: {0}")]
    Protocol(#[from] DrpcError),
    /// A packet that has no place in an answer.
    #[error("the deployment breaks the protocol: a packet of kind {0:?} in an answer")]
    Unexpected(Kind),
    /// The message is none of this schema.
    #[error("a message of the deployment cannot be read: {0}")]
    Malformed(String),
    /// It does not take what is sent.
    #[error("the deployment takes nothing any more")]
    Stalled,
    /// The connection is gone.
    #[error("the connection is gone: {0}")]
    Connection(#[from] io::Error),
}

impl CallError {
    fn result(&self) -> &'static str {
        match self {
            Self::Unimplemented => "unimplemented",
            Self::Remote(_) | Self::Cancelled => "error",
            Self::NoAnswer | Self::Connection(_) => "disconnected",
            Self::Deadline(_) | Self::Stalled => "deadline",
            Self::Protocol(_) | Self::Unexpected(_) | Self::Malformed(_) => "protocol",
        }
    }
}

/// Makes calls; cheap to clone.
#[derive(Clone)]
pub(super) struct Rpc {
    control: Control,
}

/// What moves the bytes of all calls of a connection.
pub(super) struct Driver<T> {
    session: Session<T>,
}

/// Begins calls over a byte stream. The driver must run.
pub(super) fn client<T: AsyncRead + AsyncWrite + Unpin>(transport: T) -> (Rpc, Driver<T>) {
    // The keep-alive is left on: managed deployments have proxies that see no WebSocket pings.
    let config = Config { max_stream_count: MAX_STREAMS, accept_backlog: 1, ..Config::default() };
    let session = Session::new_client(transport, config);
    (Rpc { control: session.control() }, Driver { session })
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    /// Runs until the connection ends, or until `stop`; what was written by then is sent.
    pub(super) async fn run(mut self, stop: CancellationToken) -> io::Result<()> {
        loop {
            tokio::select! {
                biased;
                incoming = self.session.next() => match incoming {
                    // The deployment has nothing to ask of us: dropping its stream resets it.
                    Some(stream) => drop(stream?),
                    None => return Ok(()),
                },
                () = stop.cancelled() => break,
            }
        }
        let _ = futures::poll!(self.session.next());
        Ok(())
    }
}

impl Rpc {
    /// One question, one answer.
    pub(super) async fn unary<Q: Message, A: Message + Default>(
        &self,
        method: Method,
        request: &Q,
        limit: Duration,
    ) -> Result<A, CallError> {
        let call = async {
            let (mut requests, mut answers) = self.open::<Q, A>(method).await?;
            requests.invoke(Some(request), Ends::Yes).await?;
            let answer = answers.next().await?.ok_or(CallError::NoAnswer);
            requests.close().await;
            answer
        };
        timeout(limit, call).await.unwrap_or(Err(CallError::Deadline(limit)))
    }

    /// One question, many answers.
    pub(super) async fn server_stream<Q: Message, A: Message + Default>(
        &self,
        method: Method,
        request: &Q,
    ) -> Result<(Requests<Q>, Answers<A>), CallError> {
        let (mut requests, answers) = self.open(method).await?;
        requests.invoke(Some(request), Ends::Yes).await?;
        Ok((requests, answers))
    }

    /// Many questions, many answers.
    pub(super) async fn bidirectional<Q: Message, A: Message + Default>(
        &self,
        method: Method,
    ) -> Result<(Requests<Q>, Answers<A>), CallError> {
        let (mut requests, answers) = self.open(method).await?;
        requests.invoke(None, Ends::No).await?;
        Ok((requests, answers))
    }

    async fn open<Q, A>(&self, method: Method) -> Result<(Requests<Q>, Answers<A>), CallError> {
        let mut control = self.control.clone();
        let opened = timeout(OPEN_LIMIT, control.open_stream()).await;
        let opened = opened.map_err(|_| CallError::Stalled)?;
        let stream = opened.map_err(|error| io::Error::other(error.to_string()))?;
        let (read, write) = tokio::io::split(stream);
        let requests = Requests {
            write,
            packets: PacketWriter::new(STREAM),
            method,
            has_closed: false,
            carries: PhantomData,
        };
        let answers = Answers {
            read,
            buffer: vec![0; READ_BUFFER].into_boxed_slice(),
            decoder: Decoder::new(),
            method,
            asked: Instant::now(),
            is_first: true,
            has_ended: false,
            carries: PhantomData,
        };
        Ok((requests, answers))
    }
}

/// Whether more messages will follow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ends {
    Yes,
    No,
}

/// Our side of a call.
pub(super) struct Requests<Q> {
    write: WriteHalf<StreamHandle>,
    packets: PacketWriter,
    method: Method,
    has_closed: bool,
    carries: PhantomData<fn(Q)>,
}

impl<Q: Message> Requests<Q> {
    async fn invoke(&mut self, request: Option<&Q>, ends: Ends) -> Result<(), CallError> {
        let mut out = BytesMut::new();
        self.packets.write(Kind::Invoke, self.method.path().as_bytes(), &mut out);
        if let Some(request) = request {
            self.packets.write(Kind::Message, &request.encode_to_vec(), &mut out);
        }
        if ends == Ends::Yes {
            self.packets.write(Kind::CloseSend, &[], &mut out);
        }
        self.send_bytes(&out).await
    }

    /// Sends messages, in one write.
    pub(super) async fn send(&mut self, requests: &[Q]) -> Result<(), CallError> {
        let mut out = BytesMut::new();
        for request in requests {
            self.packets.write(Kind::Message, &request.encode_to_vec(), &mut out);
        }
        self.send_bytes(&out).await
    }

    /// Ends the call in both directions, once.
    pub(super) async fn close(&mut self) {
        if std::mem::replace(&mut self.has_closed, true) {
            return;
        }
        let mut out = BytesMut::new();
        self.packets.write(Kind::Close, &[], &mut out);
        // Whether it arrives does not matter: the stream ends in any case.
        let _ = self.send_bytes(&out).await;
        let _ = self.write.shutdown().await;
    }

    async fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        timeout(WRITE_LIMIT, self.write.write_all(bytes)).await.map_err(|_| CallError::Stalled)??;
        Ok(())
    }
}

/// The deployment's side of a call.
pub(super) struct Answers<A> {
    read: ReadHalf<StreamHandle>,
    /// On the heap: the futures of all calls are one future.
    buffer: Box<[u8]>,
    decoder: Decoder,
    method: Method,
    asked: Instant,
    is_first: bool,
    has_ended: bool,
    carries: PhantomData<fn() -> A>,
}

impl<A: Message + Default> Answers<A> {
    /// The next message; `None` when the deployment ended the call. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Result<Option<A>, CallError> {
        let next = self.receive().await;
        if std::mem::take(&mut self.is_first) {
            let result = match &next {
                Ok(Some(_)) => "ok",
                Ok(None) => "disconnected",
                Err(error) => error.result(),
            };
            let method = self.method.name();
            counter!(names::RPC_REQUESTS, "leg" => "control", "method" => method, "result" => result)
                .increment(1);
            histogram!(names::RPC_DURATION, "leg" => "control", "method" => method)
                .record(self.asked.elapsed());
        }
        next
    }

    async fn receive(&mut self) -> Result<Option<A>, CallError> {
        while !self.has_ended {
            if let Some(packet) = self.decoder.next()? {
                if let Some(message) = self.take(packet)? {
                    return Ok(Some(message));
                }
                continue;
            }
            let count = self.read.read(&mut self.buffer).await?;
            self.has_ended = count == 0;
            self.decoder.extend(self.buffer.get(..count).unwrap_or_default());
        }
        Ok(None)
    }

    fn take(&mut self, packet: Packet) -> Result<Option<A>, CallError> {
        match packet.kind {
            Kind::Message => {
                let weight = self.method.shape().weigh(&packet.data);
                if weight > MAX_UNPACKED {
                    return Err(DrpcError::TooHeavy(weight).into());
                }
                let malformed = |error| CallError::Malformed(format!("{error}"));
                Ok(Some(A::decode(packet.data).map_err(malformed)?))
            }
            Kind::Close | Kind::CloseSend => {
                self.has_ended = true;
                Ok(None)
            }
            Kind::Error => {
                self.has_ended = true;
                let body = ErrorBody::decode(&packet.data)?;
                let error = if is_unimplemented(&body) {
                    CallError::Unimplemented
                } else {
                    CallError::Remote(one_line(&body.text, MAX_SAID))
                };
                Err(error)
            }
            Kind::Cancel => {
                self.has_ended = true;
                Err(CallError::Cancelled)
            }
            kind @ (Kind::Invoke | Kind::InvokeMetadata) => Err(CallError::Unexpected(kind)),
        }
    }
}

/// By its code, or by the words of a server that does not know the path (tailnet-control 2.7).
fn is_unimplemented(body: &ErrorBody) -> bool {
    const UNIMPLEMENTED: u64 = 12;
    body.code == UNIMPLEMENTED || body.text.contains("unknown rpc: ")
}

#[cfg(test)]
mod tests;
