//! What a WebSocket is spoken over, with a limit for a server that sends and does not read: it is given up, and
//! meanwhile no more than a bounded part of what it sends is taken.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::{MAX_UNANSWERED, StreamError};

/// A transport that fails once nothing was taken of a write for `limit`.
pub(super) struct Transport<S> {
    io: S,
    limit: Duration,
    stall: Option<Stall>,
}

/// A write waits for the server.
struct Stall {
    ends: Pin<Box<Sleep>>,
    /// What was read since it waits.
    read: usize,
    /// Who reads no more until something is taken.
    reader: Option<Waker>,
}

impl<S> Transport<S> {
    pub(super) fn new(io: S, limit: Duration) -> Self {
        Self { io, limit, stall: None }
    }

    /// Ready when the stall has lasted too long.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let Some(stall) = &mut self.stall else { return Poll::Pending };
        ready!(stall.ends.as_mut().poll(cx));
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, StreamError::Stalled(self.limit)))
    }

    fn note_progress(&mut self) {
        if let Some(reader) = self.stall.take().and_then(|stall| stall.reader) {
            reader.wake();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Transport<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.poll_stall(cx) {
            return Poll::Ready(Err(error));
        }
        if let Some(stall) = self.stall.as_mut().filter(|stall| stall.read >= MAX_UNANSWERED) {
            stall.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buffer);
        if let Some(stall) = &mut self.stall {
            stall.read += buffer.filled().len() - before;
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Transport<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(cx, bytes);
        if polled.is_ready() {
            self.note_progress();
            return polled;
        }
        if self.stall.is_none() {
            let ends = Box::pin(sleep(self.limit));
            self.stall = Some(Stall { ends, read: 0, reader: None });
        }
        self.poll_stall(cx).map(Err)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
