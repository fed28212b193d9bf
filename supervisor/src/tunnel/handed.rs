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
    let taken = number < 0 || [args.read, args.write].contains(&i64::from(number));
    let refused = |error| TunnelError::Link { number, error };
    if taken {
        return Err(refused(io::Error::new(io::ErrorKind::InvalidInput, "not a number of its own")));
    }
    // SAFETY: not negative, and used for nothing but to ask whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(|error| refused(error.into()))?;
    // SAFETY: open, and as in `manager` nobody else owns it.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(number) });
    stream.set_nonblocking(true).map_err(refused)?;
    Ok(stream)
}
