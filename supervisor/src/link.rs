//! The private link between a service and its own tunnel process: one socketpair, the framing of the
//! CoderVPN protocol with a limit of its own, Hello first each way, then the service asks and the tunnel
//! answers.
//!
//! ```text
//! service                                    tunnel
//! LinkClient ── Ping, Scrape, Tree, … ──>  serve ── Answers
//!            <── Pong, Exposition, … ───
//! ```
//!
//! What comes from the tunnel is hostile input: frames, texts and lists are capped here; the exposition's
//! families and labels are judged by whoever merges it.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
};
use warren_proto::{
    frame::{self, Decoder, FrameError},
    link::{Frame, Hello, frame::Body},
};

mod client;
mod server;
mod sockets;
#[cfg(test)]
mod tests;

pub use client::LinkClient;
pub use server::{Answers, serve};
pub use sockets::{ServiceSockets, SocketChannel, serve_sockets};

/// The version of the link. The two ends are one program, so any other is a mistake.
pub const VERSION: u32 = 1;

/// Bytes of the largest frame.
pub const MAX_FRAME: usize = 1024 * 1024;

/// How long the other end may take to say Hello.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long one frame may take to leave: longer, and nobody reads at the other end.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// Frames that wait to be written.
const QUEUE: usize = 16;
/// Bytes that the queue can hold at worst.
const QUEUE_BYTES: usize = QUEUE * (MAX_FRAME + frame::PREFIX);
const _: () = assert!(QUEUE_BYTES <= 17 << 20, "frames that wait must not exhaust a small machine");

/// Bytes read at a time.
const READ: usize = 16 * 1024;

/// Why a link ended, or a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The other end closed it, or died.
    #[error("the private link was closed by the other process")]
    Closed,
    /// Reading or writing failed.
    #[error("the private link failed: {0}")]
    Io(String),
    /// The other end sent what is no frame.
    #[error("the other process broke the private link's protocol: {0}")]
    Frame(String),
    /// The other end speaks another version.
    #[error("the other process speaks version {0} of the private link, not {VERSION}")]
    Version(u32),
    /// The other end did not begin with Hello.
    #[error("the other process did not say hello")]
    NoHello,
    /// The answer is not one to that question.
    #[error("the other process gave an answer that does not fit the question")]
    Unfitting,
    /// No answer in time.
    #[error("the other process did not answer in time")]
    Deadline,
    /// Too many questions are waiting for an answer already.
    #[error("too many questions to the other process are waiting")]
    Busy,
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Self::Closed
            }
            _ => Self::Io(error.to_string()),
        }
    }
}

impl From<FrameError> for LinkError {
    fn from(error: FrameError) -> Self {
        Self::Frame(error.to_string())
    }
}

/// What an agent is asked by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PingBy {
    /// One disco message, over its path.
    Disco,
    /// TSMP messages through WireGuard, until one is answered.
    Tsmp,
}

/// How an agent answered a ping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentPing {
    /// Round trip.
    pub latency: Duration,
    /// Whether a direct path answered. Only disco messages say so.
    pub direct: bool,
    /// Name of the relay region the answer came through; the same.
    pub region: String,
}

/// The reading half. What was read stays when a read is cancelled.
struct Reader {
    half: OwnedReadHalf,
    decoder: Decoder,
    /// On the heap: as part of a future it would overflow a worker's stack.
    arriving: Box<[u8]>,
}

impl Reader {
    fn new(half: OwnedReadHalf) -> Self {
        Self { half, decoder: Decoder::new(MAX_FRAME), arriving: vec![0; READ].into() }
    }

    async fn next(&mut self) -> Result<Frame, LinkError> {
        loop {
            if let Some(frame) = self.decoder.next::<Frame>()? {
                return Ok(frame);
            }
            let length = self.half.read(&mut self.arriving).await?;
            let arrived = self.arriving.get(..length).unwrap_or_default();
            if arrived.is_empty() {
                return Err(LinkError::Closed);
            }
            self.decoder.extend(arrived);
        }
    }

    /// The first frame, which must be a Hello of our version.
    async fn hello(&mut self) -> Result<(), LinkError> {
        let first =
            tokio::time::timeout(HELLO_LIMIT, self.next()).await.map_err(|_| LinkError::NoHello)??;
        match first.body {
            Some(Body::Hello(Hello { version: VERSION, .. })) => Ok(()),
            Some(Body::Hello(Hello { version, .. })) => Err(LinkError::Version(version)),
            Some(_) | None => Err(LinkError::NoHello),
        }
    }
}

/// The writing half.
struct Writer {
    half: OwnedWriteHalf,
}

impl Writer {
    async fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        let bytes = frame::encode_within(frame, MAX_FRAME)?;
        tokio::time::timeout(WRITE_LIMIT, self.half.write_all(&bytes))
            .await
            .map_err(|_| LinkError::Deadline)??;
        Ok(())
    }

    async fn hello(&mut self) -> Result<(), LinkError> {
        let hello = Hello { version: VERSION, program: env!("CARGO_PKG_VERSION").to_owned() };
        self.send(&Frame { id: 0, body: Some(Body::Hello(hello)) }).await
    }
}
