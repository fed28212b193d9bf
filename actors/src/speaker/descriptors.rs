//! Descriptors that another process handed over by number, as a pair of streams. Managers pass pipes or
//! sockets, usually in blocking mode; anything that can be polled will do.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustix::{fs::OFlags, io::FdFlags};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use crate::watched::watched;

/// Why two numbers do not make a connection (texts of vpn-protocol 1.2).
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// One is below zero.
    #[error("rpc-read-handle ({read}) and rpc-write-handle ({write}) must be positive")]
    Negative {
        /// To read from.
        read: i64,
        /// To write to.
        write: i64,
    },
    /// Both are the same.
    #[error("rpc-read-handle ({0}) and rpc-write-handle ({0}) must be different")]
    Equal(i64),
    /// One is not open.
    #[error("create bidirectional RPC pipe: stat {side} (fd={number}): stat {side}: bad file descriptor")]
    NotOpen {
        /// Which.
        side: Side,
        /// Its number.
        number: i64,
    },
    /// One cannot be polled: a regular file, for instance.
    #[error("create bidirectional RPC pipe: {side} (fd={number}) is neither a pipe nor a socket: {error}")]
    Unsuitable {
        /// Which.
        side: Side,
        /// Its number.
        number: RawFd,
        /// What the system said.
        error: io::Error,
    },
}

/// One end of the pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What is read from.
    Read,
    /// What is written to.
    Write,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "pipe_read",
            Self::Write => "pipe_write",
        })
    }
}

/// Two open descriptors with different numbers.
#[derive(Debug)]
pub struct Descriptors {
    read: OwnedFd,
    write: OwnedFd,
}

impl Descriptors {
    /// Takes ownership of two descriptors by number, after the checks of the command line. They are closed
    /// on exec from now on.
    ///
    /// # Safety
    ///
    /// Nothing else in this process may own either number.
    pub unsafe fn adopt(read: i64, write: i64) -> Result<Self, DescriptorError> {
        if read < 0 || write < 0 {
            return Err(DescriptorError::Negative { read, write });
        }
        if read == write {
            return Err(DescriptorError::Equal(read));
        }
        let (reading, writing) = (check(Side::Read, read)?, check(Side::Write, write)?);
        // SAFETY: both are open, and the caller says that nobody else owns them.
        let owned = unsafe { (OwnedFd::from_raw_fd(reading), OwnedFd::from_raw_fd(writing)) };
        Ok(Self { read: owned.0, write: owned.1 })
    }

    /// The pair as streams. Must be called inside a tokio runtime.
    pub fn open(self) -> Result<(ReadEnd, WriteEnd), DescriptorError> {
        Ok((ReadEnd(register(Side::Read, self.read)?), WriteEnd(register(Side::Write, self.write)?)))
    }
}

impl From<(OwnedFd, OwnedFd)> for Descriptors {
    fn from((read, write): (OwnedFd, OwnedFd)) -> Self {
        Self { read, write }
    }
}

fn check(side: Side, number: i64) -> Result<RawFd, DescriptorError> {
    let not_open = DescriptorError::NotOpen { side, number };
    let Ok(raw) = RawFd::try_from(number) else { return Err(not_open) };
    // SAFETY: not negative, and used for nothing but to ask whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    match rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC) {
        Ok(()) => Ok(raw),
        Err(_) => Err(not_open),
    }
}

fn register(side: Side, descriptor: OwnedFd) -> Result<AsyncFd<OwnedFd>, DescriptorError> {
    let number = descriptor.as_raw_fd();
    let interest = match side {
        Side::Read => Interest::READABLE,
        Side::Write => Interest::WRITABLE,
    };
    let registered = set_nonblocking(descriptor.as_fd()).and_then(|()| watched(descriptor, interest));
    registered.map_err(|error| DescriptorError::Unsuitable { side, number, error })
}

fn set_nonblocking(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(descriptor)?;
    Ok(rustix::fs::fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)?)
}

/// The descriptor that is read from.
#[derive(Debug)]
pub struct ReadEnd(AsyncFd<OwnedFd>);

/// The descriptor that is written to.
#[derive(Debug)]
pub struct WriteEnd(AsyncFd<OwnedFd>);

impl AsyncRead for ReadEnd {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(context))?;
            let room = buffer.initialize_unfilled();
            match ready.try_io(|descriptor| Ok(rustix::io::read(descriptor.get_ref(), &mut *room)?)) {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for WriteEnd {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(context))?;
            match ready.try_io(|descriptor| Ok(rustix::io::write(descriptor.get_ref(), bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Says the end of the stream on a socket, which may have another owner; a pipe says it when it closes.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(self.0.get_ref(), rustix::net::Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTSOCK | rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}
