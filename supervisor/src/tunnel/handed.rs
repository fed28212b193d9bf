//! Descriptors that were handed over by number when the process was started. With the TUN device's, in
//! `packet_io`, these are all: nobody else in this process knows numbers.

use std::{
    io,
    os::{
        fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use rustix::io::FdFlags;
use warren_actors::speaker::descriptors::{DescriptorError, Descriptors};

use super::{TunnelArgs, TunnelError};

/// The connection to the manager.
pub(super) fn manager(read: i64, write: i64) -> Result<Descriptors, DescriptorError> {
    // SAFETY: called once, before anything in this process opens descriptors of its own; standard input and
    // output, which managers may name, have no owner.
    unsafe { Descriptors::adopt(read, write) }
}

/// The private link.
pub(super) fn link(number: RawFd, args: &TunnelArgs) -> Result<UnixStream, TunnelError> {
    let stream = UnixStream::from(adopt("link", number, &[args.read, args.write])?);
    stream.set_nonblocking(true).map_err(|error| TunnelError::Handed { what: "link", number, error })?;
    Ok(stream)
}

/// The channel by which the service is asked for UDP sockets.
pub(super) fn sockets(number: RawFd, args: &TunnelArgs) -> Result<OwnedFd, TunnelError> {
    adopt("sockets", number, &[args.read, args.write, args.link.map_or(-1, i64::from)])
}

/// Takes over a descriptor that nothing else in this process knows.
fn adopt(what: &'static str, number: RawFd, others: &[i64]) -> Result<OwnedFd, TunnelError> {
    let refused = |error| TunnelError::Handed { what, number, error };
    if number < 0 || others.contains(&i64::from(number)) {
        return Err(refused(io::Error::new(io::ErrorKind::InvalidInput, "not a number of its own")));
    }
    // SAFETY: not negative, and used for nothing but to ask whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(|error| refused(error.into()))?;
    // SAFETY: open, and as in `manager` nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
