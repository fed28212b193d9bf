//! Counting what leaves: only the lowest layer knows whether a slow connection still moves. What lies above
//! it (TLS, WebSocket) buffers, and tells nothing before a whole buffer has left.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::origin::Origin;

/// How many bytes have left through one connection, as anybody may read it.
#[derive(Debug, Clone, Default)]
pub struct Sent(Arc<AtomicU64>);

impl Sent {
    /// The number so far.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.0.fetch_add(u64::try_from(bytes).unwrap_or_default(), Ordering::Relaxed);
    }
}

/// A byte stream that counts what is written to it.
#[derive(Debug)]
pub struct Counted<S> {
    stream: S,
    sent: Sent,
    /// Where it was made from, if that can be lost.
    origin: Option<Arc<Origin>>,
}

impl<S> Counted<S> {
    /// Counts from zero.
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, sent: Sent::default(), origin: None }
    }

    /// The same, which fails once its origin is lost.
    pub(super) fn made_from(self, origin: Arc<Origin>) -> Self {
        Self { origin: Some(origin), ..self }
    }

    fn check(&self) -> io::Result<()> {
        self.origin.as_ref().map_or(Ok(()), |origin| origin.check())
    }

    /// The count, which outlives the stream.
    pub(crate) fn sent(&self) -> &Sent {
        &self.sent
    }

    pub(super) fn get_ref(&self) -> &S {
        &self.stream
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(origin) = &this.origin {
            origin.check_read(cx)?;
        }
        Pin::new(&mut this.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check()?;
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, bytes))?;
        this.sent.add(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check()?;
        let written = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, parts))?;
        this.sent.add(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
