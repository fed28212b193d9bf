//! Which packets have to arrive, and that of all others somebody knows what became of them.

use std::{ops::RangeInclusive, time::Instant};

use super::{UNDER_WAY, peer::PeerId, world::World};

/// Packets that have to arrive.
#[derive(Debug)]
pub(crate) struct Expected {
    from: PeerId,
    to: PeerId,
    numbers: RangeInclusive<u64>,
    /// Of these, the first that has to find a session.
    first_in_session: u64,
}

impl Expected {
    /// Those that were sent after then and until then.
    pub(crate) fn sent(world: &World, from: PeerId, to: PeerId, after: Instant, until: Instant) -> Self {
        let number = |moment| world.sent_until(from, to, moment);
        Self { from, to, numbers: number(after) + 1..=number(until), first_in_session: 0 }
    }

    /// Without those that were sent before then and found no session.
    pub(crate) fn but_for_sessions_until(self, world: &World, then: Instant) -> Self {
        Self { first_in_session: world.sent_until(self.from, self.to, then) + 1, ..self }
    }

    pub(crate) fn have_come(self, world: &World) {
        let Self { from, to, numbers, first_in_session } = self;
        let came = &world.peers[to.0].others[&from].received;
        let losses = &world.peers[from.0].others[&to].losses;
        let is_excused = |number: u64| number < first_in_session && losses.lacked_session(number);
        let missing: Vec<u64> = numbers.filter(|it| !came.contains(it) && !is_excused(*it)).collect();
        assert!(
            missing.is_empty(),
            "{} packets of {from:?} did not come, {missing:.10?}; lost were {:?}, the first by {:?}",
            missing.len(),
            losses.count(),
            losses.of(missing[0])
        );
    }
}

/// Each packet that was sent since then, and has had the time to, has come, or waits for a session, or one knows why not.
pub(crate) fn everything_is_accounted_for(world: &World, since: Instant) {
    for (from, to) in world.pairs() {
        let unexplained = world.unexplained(from, to, since, world.now - UNDER_WAY);
        assert_eq!(unexplained, [0; 0], "nobody knows what became of these packets of {from:?}");
    }
}
