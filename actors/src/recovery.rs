//! How long it takes until things work again after the machine woke up or the network changed.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use metrics::histogram;
use warren_observability::names;

/// What has to work again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// Packets: an agent has answered a ping that was sent since, whichever way.
    Data,
    /// The connection to the deployment: it has answered since, or there is a new one.
    Control,
}

/// What does not work yet. The coordinator says when something may have changed, and the pinger if agents answered until
/// then; whoever sees that it works says so, and that is measured.
#[derive(Debug, Default)]
pub struct Recovery(Mutex<[Option<Instant>; 2]>);

impl Recovery {
    /// What worked may not any more. What is still waited for goes on being waited for.
    pub fn begin(&self, plane: Plane, now: Instant) {
        self.lock()[plane as usize].get_or_insert(now);
    }

    /// There is nobody any more who could show that it works.
    pub fn give_up(&self, plane: Plane) {
        self.lock()[plane as usize] = None;
    }

    /// It works, as of a question that was asked at `asked`: answers to earlier ones say nothing.
    pub fn works(&self, plane: Plane, asked: Instant, now: Instant) {
        let mut waiting = self.lock();
        let since = &mut waiting[plane as usize];
        if let Some(since) = since.take_if(|since| *since <= asked) {
            let label = match plane {
                Plane::Data => "data",
                Plane::Control => "control",
            };
            let took = now.saturating_duration_since(since);
            histogram!(names::RESUME_RECOVERY, "plane" => label).record(took);
            tracing::info!(
                plane = label,
                ?took,
                "works again after the network changed or the machine woke up"
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Instant>; 2]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is waited for.
    #[cfg(test)]
    pub(crate) fn waits_for(&self) -> Vec<Plane> {
        let waiting = self.lock();
        [Plane::Data, Plane::Control].into_iter().filter(|plane| waiting[*plane as usize].is_some()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_what_was_asked_since_shows_that_something_works() {
        let (recovery, start) = (Recovery::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        recovery.works(Plane::Data, at(0), at(0));
        for plane in [Plane::Data, Plane::Control] {
            recovery.begin(plane, at(10));
            recovery.begin(plane, at(12));
        }
        recovery.works(Plane::Data, at(9), at(13));
        recovery.works(Plane::Control, at(11), at(14));
        assert_eq!(recovery.waits_for(), [Plane::Data]);
        recovery.works(Plane::Data, at(10), at(14));
        assert_eq!(recovery.waits_for(), []);
        recovery.begin(Plane::Data, at(15));
        recovery.give_up(Plane::Data);
        assert_eq!(recovery.waits_for(), []);
    }
}
