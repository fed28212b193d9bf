//! Who asks, and what they may do: the peer credentials of a Unix socket, the rule of ownership, and how
//! many may come at the same time.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

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
    match owner {
        Some(owner) if !is_privileged(caller, service) && owner != caller.uid => Err(refusal(owner)),
        Some(_) | None => Ok(()),
    }
}

/// Whether the caller may do everything.
pub fn is_privileged(caller: &Caller, service: &Service) -> bool {
    caller.uid == 0 || caller.uid == service.options.uid
}

/// What somebody hears who may not touch the tunnel of this user.
pub fn refusal(owner: u32) -> String {
    let owner = user_name(owner);
    format!("the tunnel belongs to {owner}: ask them to run `warren down`, or do it as root")
}

/// A user's name, or the number where it has none.
fn user_name(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("user {uid}"), |user| user.name)
}

/// The connections of one kind, counted by user: only so many at the same time, and no user shuts out the
/// others.
#[derive(Clone)]
pub struct Places {
    most: usize,
    most_per_user: usize,
    taken: Arc<Mutex<BTreeMap<u32, usize>>>,
}

/// One connection's place, given back when dropped.
pub struct Place {
    places: Places,
    uid: u32,
}

impl Places {
    /// Room for `most` connections, and for `most_per_user` of the same user.
    pub fn new(most: usize, most_per_user: usize) -> Self {
        Self { most, most_per_user, taken: Arc::default() }
    }

    /// A place for the caller, if there is one.
    pub fn take(&self, caller: Caller) -> Option<Place> {
        let mut taken = self.lock();
        let (total, own) = (taken.values().sum::<usize>(), taken.get(&caller.uid).copied().unwrap_or(0));
        if total >= self.most || own >= self.most_per_user {
            return None;
        }
        taken.insert(caller.uid, own + 1);
        Some(Place { places: self.clone(), uid: caller.uid })
    }

    /// No guard is held where anything can panic, so a poisoned lock guards sound data.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        if let Some(own) = taken.get_mut(&self.uid) {
            *own -= 1;
        }
        taken.retain(|_, own| *own > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_takes_no_more_than_his_share_of_the_places() {
        let places = Places::new(5, 3);
        let (alice, bob) = (Caller { uid: 1 }, Caller { uid: 2 });
        let taken: Vec<_> = std::iter::from_fn(|| places.take(alice)).collect();
        assert_eq!(taken.len(), 3);
        let others: Vec<_> = std::iter::from_fn(|| places.take(bob)).collect();
        assert_eq!(others.len(), 2, "no more than there are");
        drop(taken);
        assert!(places.take(alice).is_some());
    }
}
