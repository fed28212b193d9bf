//! When the paths' time comes: one entry a peer, and one task for all of them.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tokio::sync::Notify;
use warren_proto::key::NodePublic;

use super::{Plane, WARM_UP_BATCH, peers::Ways};

/// The entries, the earliest first.
#[derive(Debug, Default)]
pub(super) struct Timers {
    entries: Mutex<BTreeSet<(Instant, NodePublic)>>,
    earlier: Notify,
}

impl Timers {
    /// Sees to it that a peer's path is called in time. Too early does no harm: the call sets the timer again.
    pub(super) fn set(&self, peer: NodePublic, ways: &mut Ways) {
        let Some(due) = ways.path.poll_timeout() else { return };
        if ways.due.is_some_and(|set| set <= due) {
            return;
        }
        let mut entries = self.lock();
        if let Some(set) = ways.due.replace(due) {
            entries.remove(&(set, peer));
        }
        let is_first = entries.first().is_none_or(|(first, _)| due < *first);
        entries.insert((due, peer));
        drop(entries);
        if is_first {
            self.earlier.notify_one();
        }
    }

    /// Waits until somebody is due.
    async fn wait(&self) {
        loop {
            let first = self.lock().first().map(|(due, _)| *due);
            let sleep = async {
                match first {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = sleep => return,
                () = self.earlier.notified() => {}
            }
        }
    }

    /// Takes out who is due.
    fn take_due(&self, now: Instant) -> Vec<NodePublic> {
        let mut entries = self.lock();
        let due = std::iter::from_fn(|| {
            let first = entries.first().filter(|(due, _)| *due <= now).copied()?;
            entries.remove(&first);
            Some(first.1)
        });
        due.collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<(Instant, NodePublic)>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets time pass for the paths of all peers.
pub(super) async fn serve(plane: Arc<Plane>) {
    // Nobody is forgotten where this begins again in the middle of its work.
    for peer in plane.peers.all() {
        peer.ways().due = None;
        plane.feed(&peer, |_| ());
    }
    loop {
        plane.timers.wait().await;
        let now = Instant::now();
        for (number, key) in plane.timers.take_due(now).iter().enumerate() {
            let Some(peer) = plane.peers.by_key(key) else { continue };
            peer.ways().due = None;
            plane.feed(&peer, |path| path.handle_timeout(now));
            if number % WARM_UP_BATCH == WARM_UP_BATCH - 1 {
                tokio::task::yield_now().await;
            }
        }
        tokio::task::yield_now().await;
    }
}
