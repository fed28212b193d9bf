//! Several writes in one segment, which nobody who writes to a connection can ask for once HTTP has it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::net::sockopt::set_tcp_cork;

/// A connection's socket, beside whoever reads and writes it.
#[derive(Clone)]
pub(super) struct Socket(Arc<OwnedFd>);

impl Socket {
    pub(super) fn of(connection: &impl AsFd) -> io::Result<Self> {
        Ok(Self(Arc::new(connection.as_fd().try_clone_to_owned()?)))
    }

    /// Keeps back what is written from now on.
    pub(super) fn cork(self) -> io::Result<Cork> {
        set_tcp_cork(&self.0, true)?;
        Ok(Cork(self))
    }
}

/// While it is there, what is written waits: for 200 ms at most, or a full segment.
pub(super) struct Cork(Socket);

impl Drop for Cork {
    fn drop(&mut self) {
        if let Err(error) = set_tcp_cork(&self.0.0, false) {
            tracing::debug!(%error, "a corked connection sends on only after its time");
        }
    }
}
