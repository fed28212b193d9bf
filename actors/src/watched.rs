//! Descriptors whose readiness is waited for.

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor that does not block with the runtime that this is called on.
pub fn watched(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what is returned, which never replaces or closes it before it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}
