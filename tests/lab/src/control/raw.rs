//! Bytes that a test wants on the wire as they are, past every rule: garbage, what is cut off or too large,
//! a slow drip.

use std::{io, time::Duration};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::sleep,
};

/// The layer of a control connection that is spoken no more; below it everything is in order. A single call
/// is spoilt by [`super::CallFault::Raw`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// The upgrade is granted; then come the bytes instead of frames.
    WebSocket,
    /// Binary messages carry the bytes instead of a session's.
    Yamux,
}

/// Bytes, how fast they come, and what follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raw {
    /// What is written.
    pub bytes: Bytes,
    /// The time before each byte; zero writes them all at once.
    pub drip: Duration,
    /// What follows them.
    pub then: Then,
}

/// What follows raw bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The end of the stream.
    HangUp,
    /// Nothing, until the client ends it.
    StaySilent,
}

impl Raw {
    /// These bytes at once, and then the end.
    #[must_use]
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self { bytes: bytes.into(), drip: Duration::ZERO, then: Then::HangUp }
    }

    /// The same, byte by byte.
    #[must_use]
    pub fn dripping(self, drip: Duration) -> Self {
        Self { drip, ..self }
    }

    /// The same, and then this.
    #[must_use]
    pub fn then(self, then: Then) -> Self {
        Self { then, ..self }
    }

    /// Writes the bytes.
    pub(crate) async fn write(&self, sink: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        if self.drip.is_zero() {
            sink.write_all(&self.bytes).await?;
            return sink.flush().await;
        }
        for byte in &self.bytes {
            sleep(self.drip).await;
            sink.write_all(&[*byte]).await?;
            sink.flush().await?;
        }
        Ok(())
    }

    /// Serves a stream so until one side ends it; what comes in is thrown away.
    pub(crate) async fn serve(&self, stream: impl AsyncRead + AsyncWrite) {
        let (mut read, mut write) = tokio::io::split(stream);
        let mut buffer = vec![0; 16 * 1024];
        let hearing = async { while matches!(read.read(&mut buffer).await, Ok(1..)) {} };
        let telling = async {
            if self.write(&mut write).await.is_ok() && self.then == Then::StaySilent {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = hearing => {}
            () = telling => {}
        }
    }
}
