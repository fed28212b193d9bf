//! Whether packets get to an agent and back, which an answer to a ping of its path does not say: a TSMP ping goes through
//! WireGuard (tailnet-data 12.2). Who wants to know has a series of them: two at once, then ever more rarely until one
//! is answered.

use std::time::{Duration, Instant};

use uuid::Uuid;
use warren_proto::{key::NodePublic, tsmp::Data};

use crate::{backoff::Backoff, coordination::NetworkMap};

/// How long an answer counts.
const VALID: Duration = Duration::from_secs(10);
/// The first pause after the first two, and the longest; each is longer than the last by half, and shortened by up to
/// half of itself.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));
const FACTOR: f64 = 1.5;
const JITTER: f64 = 0.5;
/// How many may want to know at the same time.
pub const MAX_SERIES: usize = 256;

/// The series that are under way. `W` is whatever the owner tells who wants to know by.
#[derive(Debug)]
pub struct Reaching<W> {
    all: Vec<Series<W>>,
}

#[derive(Debug)]
struct Series<W> {
    agent: Uuid,
    peer: NodePublic,
    until: Instant,
    /// The pings that may still be answered.
    sent: Vec<(Data, Instant)>,
    has_begun: bool,
    next: Instant,
    pauses: Backoff,
    reply: W,
}

/// What is due.
#[derive(Debug, PartialEq, Eq)]
pub struct Due<W> {
    /// What to send.
    pub pings: Vec<(NodePublic, Data)>,
    /// Who has waited long enough.
    pub gave_up: Vec<W>,
}

impl<W> Default for Reaching<W> {
    fn default() -> Self {
        Self { all: Vec::new() }
    }
}

impl<W> Reaching<W> {
    /// Begins a series to an agent, whose peer that is; `reply` comes back with its first answer, or when `until` has
    /// passed. Where [`MAX_SERIES`] are under way it comes back at once.
    pub fn begin(
        &mut self,
        now: Instant,
        (agent, peer): (Uuid, NodePublic),
        until: Instant,
        reply: W,
    ) -> Result<(), W> {
        if self.all.len() >= MAX_SERIES {
            return Err(reply);
        }
        let (floor, cap) = PAUSES;
        let pauses = Backoff::new(floor, cap, FACTOR, JITTER);
        let sent = Vec::new();
        self.all.push(Series { agent, peer, until, sent, has_begun: false, next: now, pauses, reply });
        Ok(())
    }

    /// Takes the peers that there are. Returns who asked for one that is gone, or is another by now.
    pub fn set_peers(&mut self, map: &NetworkMap) -> Vec<W> {
        let is_gone = |series: &mut Series<W>| {
            map.peers.get(&series.agent).is_none_or(|peer| peer.node_key != series.peer)
        };
        self.all.extract_if(.., is_gone).map(|series| series.reply).collect()
    }

    /// When [`Self::handle_timeout`] is due next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.all.iter().map(|series| series.next.min(series.until)).min()
    }

    /// Lets time pass. `data` gives a fresh random number for each ping, `random` one from 0 to 1.
    pub fn handle_timeout(
        &mut self,
        now: Instant,
        mut data: impl FnMut() -> Data,
        mut random: impl FnMut() -> f64,
    ) -> Due<W> {
        let gave_up =
            self.all.extract_if(.., |series| series.until <= now).map(|series| series.reply).collect();
        let mut pings = Vec::new();
        for series in self.all.iter_mut().filter(|series| series.next <= now) {
            series.sent.retain(|(_, at)| now.saturating_duration_since(*at) < VALID);
            let had_begun = std::mem::replace(&mut series.has_begun, true);
            for _ in 0..if had_begun { 1 } else { 2 } {
                let data = data();
                series.sent.push((data, now));
                pings.push((series.peer, data));
            }
            series.next = now + series.pauses.next(random());
        }
        Due { pings, gave_up }
    }

    /// Takes an answer from a peer. Returns who wanted to know, and how long after its ping it came; `None` for one that
    /// nobody asked for, that came too late, or from another peer.
    pub fn handle_pong(
        &mut self,
        peer: &NodePublic,
        data: &Data,
        received_at: Instant,
    ) -> Option<(W, Duration)> {
        let took = |series: &Series<W>| {
            let (_, at) = series.sent.iter().find(|(sent, _)| sent == data)?;
            let took = received_at.saturating_duration_since(*at);
            (series.peer == *peer && took <= VALID).then_some(took)
        };
        let (place, took) =
            self.all.iter().enumerate().find_map(|(place, series)| Some((place, took(series)?)))?;
        Some((self.all.swap_remove(place).reply, took))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use warren_proto::key::{DiscoPublic, NodePrivate};

    use super::*;
    use crate::{coordination::Peer, relay_map::RegionId};

    const MS: Duration = Duration::from_millis(1);
    const S: Duration = Duration::from_secs(1);

    #[test]
    fn two_pings_go_at_once_and_then_ever_fewer_until_one_is_answered() {
        let mut it = Setting::new();
        it.begin(60 * S);
        let pings = it.pass(3 * S, 0.0);
        let at: Vec<u128> = pings.iter().map(|(at, _)| at.as_millis()).collect();
        assert_eq!(at, [0, 0, 50, 125, 237, 406, 659, 1039, 1608, 2462]);
        let (_, last) = pings[9];
        assert_eq!(it.answer(last), Some(("asker", 537 * MS)));
        assert_eq!(it.answer(last), None, "once");
        assert_eq!(it.reaching.poll_timeout(), None);
    }

    #[test]
    fn chance_shortens_the_pauses_by_half_at_most() {
        let mut it = Setting::new();
        it.begin(S);
        let pings = it.pass(100 * MS, 1.0);
        assert_eq!(pings.iter().map(|(at, _)| at.as_millis()).collect::<Vec<_>>(), [0, 0, 25, 62]);
    }

    #[test]
    fn an_early_ping_may_be_answered_late_but_not_after_ten_seconds() {
        let mut it = Setting::new();
        it.begin(60 * S);
        let pings = it.pass(9 * S, 0.0);
        assert!(it.answer(pings[0].1).is_some());
        it.begin(60 * S);
        let first = it.pass(S, 0.0)[0].1;
        it.pass(9 * S + MS, 0.0);
        assert_eq!(it.answer(first), None);
    }

    #[test]
    fn who_has_waited_long_enough_hears_so() {
        let mut it = Setting::new();
        it.begin(S);
        it.pass(999 * MS, 0.0);
        assert_eq!(it.gave_up, Vec::<&str>::new());
        it.pass(2 * MS, 0.0);
        assert_eq!(it.gave_up, ["asker"]);
    }

    #[test]
    fn another_peer_cannot_answer_and_a_peer_that_is_gone_or_changed_is_told() {
        let mut it = Setting::new();
        it.begin(60 * S);
        let ping = it.pass(MS, 0.0)[0].1;
        let other = NodePrivate::from_bytes([9; 32]).public();
        assert_eq!(it.reaching.handle_pong(&other, &ping, it.now), None);
        assert_eq!(it.reaching.set_peers(&map(it.peer)), Vec::<&str>::new());
        assert_eq!(it.reaching.set_peers(&map(other)), ["asker"]);
        it.begin(60 * S);
        assert_eq!(it.reaching.set_peers(&NetworkMap::default()), ["asker"]);
    }

    #[test]
    fn no_more_than_so_many_wait() {
        let mut it = Setting::new();
        (0..MAX_SERIES).for_each(|_| it.begin(S));
        let again = it.reaching.begin(it.now, (Uuid::nil(), it.peer), it.now + S, "one more");
        assert_eq!(again, Err("one more"));
    }

    struct Setting {
        reaching: Reaching<&'static str>,
        start: Instant,
        now: Instant,
        peer: NodePublic,
        count: u64,
        gave_up: Vec<&'static str>,
    }

    impl Setting {
        fn new() -> Self {
            let (now, peer) = (Instant::now(), NodePrivate::from_bytes([1; 32]).public());
            Self { reaching: Reaching::default(), start: now, now, peer, count: 0, gave_up: Vec::new() }
        }

        fn begin(&mut self, limit: Duration) {
            let (now, whom) = (self.now, (Uuid::nil(), self.peer));
            self.reaching.begin(now, whom, now + limit, "asker").unwrap();
        }

        /// Lets time pass. Returns the pings, and when each was sent.
        fn pass(&mut self, span: Duration, random: f64) -> Vec<(Duration, Data)> {
            let (until, mut pings) = (self.now + span, Vec::new());
            while let Some(due) = self.reaching.poll_timeout().filter(|due| *due <= until) {
                self.now = self.now.max(due);
                let count = &mut self.count;
                let data = || {
                    *count += 1;
                    count.to_be_bytes()
                };
                let due = self.reaching.handle_timeout(self.now, data, || random);
                self.gave_up.extend(due.gave_up);
                let at = self.now - self.start;
                pings.extend(due.pings.into_iter().map(|(_, data)| (at, data)));
            }
            self.now = until;
            pings
        }

        fn answer(&mut self, data: Data) -> Option<(&'static str, Duration)> {
            self.reaching
                .handle_pong(&self.peer, &data, self.now)
                .map(|(asker, took)| (asker, Duration::from_millis(took.as_millis() as u64)))
        }
    }

    fn map(node_key: NodePublic) -> NetworkMap {
        let peer = Peer {
            node_key,
            disco_key: DiscoPublic([2; 32]),
            home: RegionId(1),
            addresses: Vec::new(),
            keepalive: false,
            endpoints: Vec::new(),
            announcements: 1,
        };
        NetworkMap { peers: BTreeMap::from([(Uuid::nil(), peer)]) }
    }
}
