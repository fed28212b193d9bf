//! What goes wrong with an agent's datagrams, on demand. It outlives the agent's single lives.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Which datagrams of an agent or a site are lost without a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// What it sends.
    pub sent: bool,
    /// What is sent to it.
    pub received: bool,
}

impl Cut {
    /// All of them.
    pub const BOTH: Self = Self { sent: true, received: true };
}

/// The faults of one agent.
#[derive(Debug, Default)]
pub(crate) struct UdpFaults(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    cut: Cut,
    loss: Option<Loss>,
    delay: Duration,
    /// Datagrams that were dropped on purpose.
    dropped: u64,
}

/// Which part is lost.
#[derive(Debug)]
pub(crate) struct Loss {
    percent: u8,
    random: u64,
}

impl UdpFaults {
    pub(crate) fn cut(&self, cut: Cut) {
        self.lock().cut = cut;
    }

    pub(crate) fn lose(&self, percent: u8, seed: u64) {
        self.lock().loss = Some(Loss::new(percent, seed));
    }

    pub(crate) fn delay(&self, delay: Duration) {
        self.lock().delay = delay;
    }

    pub(crate) fn heal(&self) {
        let mut state = self.lock();
        *state = State { dropped: state.dropped, ..State::default() };
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Whether the next datagram from outside arrives.
    pub(super) fn arrives(&self) -> bool {
        let mut state = self.lock();
        let is_cut = state.cut.received;
        state.passes(is_cut)
    }

    /// After how long the next datagram of the agent is sent, if it is.
    pub(super) fn leaves(&self) -> Option<Duration> {
        let mut state = self.lock();
        let is_cut = state.cut.sent;
        state.passes(is_cut).then_some(state.delay)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn passes(&mut self, is_cut: bool) -> bool {
        let is_dropped = is_cut || self.loss.as_mut().is_some_and(Loss::strikes);
        self.dropped += u64::from(is_dropped);
        !is_dropped
    }
}

impl Loss {
    pub(crate) fn new(percent: u8, seed: u64) -> Self {
        Self { percent, random: seed }
    }

    /// Whether the next one is lost.
    pub(crate) fn strikes(&mut self) -> bool {
        self.next() % 100 < u64::from(self.percent)
    }

    /// SplitMix64: the same seed loses the same datagrams.
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_lets_only_the_other_direction_through() {
        let faults = UdpFaults::default();
        for (received, sent) in [(true, false), (false, true), (true, true)] {
            faults.cut(Cut { sent, received });
            assert_eq!((faults.arrives(), faults.leaves().is_none()), (!received, sent));
        }
        faults.heal();
        assert!(faults.arrives() && faults.leaves() == Some(Duration::ZERO));
    }

    #[test]
    fn as_much_is_lost_as_asked_for_and_with_one_seed_always_the_same() {
        let run = |percent, seed| -> Vec<bool> {
            let faults = UdpFaults::default();
            faults.lose(percent, seed);
            (0..1000).map(|_| faults.leaves().is_none()).collect()
        };
        let lost = run(30, 7).into_iter().filter(|is_lost| *is_lost).count();
        assert!((250..350).contains(&lost), "{lost}");
        assert_eq!(run(30, 7), run(30, 7));
        assert_ne!(run(30, 7), run(30, 8));
        assert!(run(100, 1).into_iter().all(|is_lost| is_lost));
        assert!(!run(0, 1).into_iter().any(|is_lost| is_lost));
    }

    #[test]
    fn datagrams_leave_as_late_as_asked_for() {
        let faults = UdpFaults::default();
        faults.delay(Duration::from_millis(40));
        assert_eq!(faults.leaves(), Some(Duration::from_millis(40)));
    }
}
