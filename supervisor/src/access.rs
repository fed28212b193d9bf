//! Who asks, and what they may do: the peer credentials of a Unix socket, and the rule of ownership.

use std::io;

use nix::unistd::{Uid, User};
use tokio::net::UnixStream;

use crate::facts::Service;

/// The user at the other end of a connection, as the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The user.
    pub uid: u32,
}

impl Caller {
    /// Whoever opened this connection.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        Ok(Self { uid: stream.peer_cred()?.uid() })
    }
}

/// Whether the caller may start, stop or forget the tunnel: who started it, root, and the user that the
/// service runs as. Everybody may, while it is nobody's. The error is in words for a person.
pub fn may_control(caller: &Caller, service: &Service) -> Result<(), String> {
    let wanted = service.desired.get().wanted().map(|order| order.owner);
    let owner = service.tunnel.get().owner.or(wanted);
    let is_privileged = caller.uid == 0 || caller.uid == service.options.uid;
    match owner {
        Some(owner) if !is_privileged && owner != caller.uid => Err(format!(
            "the tunnel belongs to {}: ask them to run `warren down`, or do it as root",
            user_name(owner)
        )),
        Some(_) | None => Ok(()),
    }
}

/// A user's name, or the number where it has none.
fn user_name(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("user {uid}"), |user| user.name)
}
