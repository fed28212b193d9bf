//! A link to a relay: whether the relay is still there, and when it is dialled again (tailnet-data 4). Moments are
//! counted from when the link was made.

use std::time::Duration;

/// How often a session is to be looked at.
pub const WATCH_PERIOD: Duration = Duration::from_millis(500);
/// A link without any frame for this long is dead, used or not: relays send something every 65 s.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// A link that is written to and silent for this long is asked whether it lives.
const SILENCE: Duration = Duration::from_secs(2);
/// For the answer.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// A session that lived so long was a good one: the next back-off begins anew.
const GOOD_SESSION: Duration = Duration::from_secs(5);
/// The longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause that a relay which restarts may ask for.
const MAX_RESTART_PAUSE: Duration = Duration::from_secs(30);

/// What was seen of a link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    /// When anything came from the relay last.
    pub heard: Duration,
    /// When something of ours was sent last that may be answered through it; what asks whether it lives does not count.
    pub used: Duration,
}

/// Why a session is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occasion {
    /// [`WATCH_PERIOD`] has passed.
    Usual,
    /// Somebody wants to know whether the relay is there.
    Doubt,
}

/// What is to be done about a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Keep,
    /// The relay is to be asked whether it is there.
    Ask,
    /// The relay is gone.
    Silent,
}

/// The watch over one session.
#[derive(Debug, Default)]
pub struct Watch {
    /// When a question went out that nothing has come after.
    asked: Option<Duration>,
}

impl Watch {
    /// Looks at the session.
    pub fn look(&mut self, now: Duration, activity: Activity, occasion: Occasion) -> Verdict {
        let Activity { heard, used } = activity;
        let silence = now.saturating_sub(heard);
        self.asked = self.asked.filter(|asked| heard < *asked);
        let is_unanswered = self.asked.is_some_and(|asked| now.saturating_sub(asked) >= ANSWER_LIMIT);
        if is_unanswered || silence >= SILENCE_LIMIT {
            return Verdict::Silent;
        }
        let is_odd = used > heard && silence >= SILENCE;
        if self.asked.is_some() || !(is_odd || occasion == Occasion::Doubt) {
            return Verdict::Keep;
        }
        self.asked = Some(now);
        Verdict::Ask
    }
}

/// How an attempt, or the session that came of it, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// How long there was a session, if there was one.
    pub lived: Option<Duration>,
    /// The pause that the relay wants, because it restarts.
    pub wanted: Option<Duration>,
}

/// The pauses between attempts.
#[derive(Debug, Default)]
pub struct Redial {
    failures: u32,
}

impl Redial {
    /// An attempt or a session ended. Returns the pause before the next attempt; `random` is 0 to 1.
    pub fn handle_ended(&mut self, ended: Ended, random: f64) -> Duration {
        let was_good = ended.lived.is_some_and(|lived| lived >= GOOD_SESSION);
        self.failures = if was_good { 1 } else { self.failures.saturating_add(1) };
        let base = Duration::from_millis(10).saturating_mul(self.failures.saturating_mul(self.failures));
        let pause = base.min(MAX_PAUSE).mul_f64(0.5 + random).min(MAX_PAUSE);
        ended.wanted.map_or(pause, |wanted| wanted.min(MAX_RESTART_PAUSE).max(pause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);
    const NEVER: Ended = Ended { lived: None, wanted: None };

    /// What is done at each look, from now to the end, about a session of which this was seen.
    fn looks(activity: impl Fn(Duration) -> Activity, end: Duration) -> Vec<(Duration, Verdict)> {
        let mut watch = Watch::default();
        let moments = (0..).map(|n| WATCH_PERIOD * n).take_while(|now| *now <= end);
        let looks = moments.map(|now| (now, watch.look(now, activity(now), Occasion::Usual)));
        looks.filter(|(_, verdict)| *verdict != Verdict::Keep).collect()
    }

    #[test]
    fn a_link_in_use_is_asked_after_two_silent_seconds_and_given_up_three_later() {
        let used = |now| Activity { heard: Duration::ZERO, used: now };
        assert_eq!(looks(used, 5 * S), [(2 * S, Verdict::Ask), (5 * S, Verdict::Silent)]);
    }

    #[test]
    fn a_link_that_answers_is_kept() {
        let answered = |now: Duration| {
            // Each question is answered a second later.
            let heard = Duration::from_secs(now.as_secs() / 3 * 3);
            Activity { heard, used: now }
        };
        let looks = looks(answered, 600 * S);
        assert!(looks.iter().all(|(_, verdict)| *verdict == Verdict::Ask));
        assert_eq!(looks.len(), 200);
    }

    /// Conforms: data:20.2.4
    #[test]
    fn an_unused_link_is_not_asked_and_given_up_only_after_two_silent_minutes() {
        assert_eq!(looks(|_| Activity::default(), SILENCE_LIMIT), [(SILENCE_LIMIT, Verdict::Silent)]);
    }

    #[test]
    fn a_link_is_asked_at_once_if_somebody_wants_it_and_not_twice_before_the_answer() {
        let (mut watch, seen) = (Watch::default(), Activity::default());
        assert_eq!(watch.look(S, seen, Occasion::Doubt), Verdict::Ask);
        assert_eq!(watch.look(2 * S, seen, Occasion::Doubt), Verdict::Keep);
        let heard = Activity { heard: 2 * S, ..seen };
        assert_eq!(watch.look(3 * S, heard, Occasion::Doubt), Verdict::Ask);
        assert_eq!(watch.look(6 * S, heard, Occasion::Usual), Verdict::Silent, "since the second question");
    }

    #[test]
    fn the_pause_grows_with_the_square_of_the_failures_up_to_five_seconds() {
        let mut redial = Redial::default();
        let pauses: Vec<u128> = (0..1000).map(|_| redial.handle_ended(NEVER, 0.5).as_millis()).collect();
        assert_eq!([pauses[0], pauses[1], pauses[9], pauses[21], pauses[999]], [10, 40, 1000, 4840, 5000]);
        assert_eq!(redial.handle_ended(NEVER, 1.0), MAX_PAUSE);
        assert_eq!(redial.handle_ended(NEVER, 0.0), MAX_PAUSE / 2);
    }

    #[test]
    fn a_session_that_lived_a_while_makes_the_pauses_begin_anew_and_a_short_one_does_not() {
        for (lived, expected) in [(S, 1210), (GOOD_SESSION, 10)] {
            let mut redial = Redial::default();
            for _ in 0..10 {
                redial.handle_ended(NEVER, 0.5);
            }
            let pause = redial.handle_ended(Ended { lived: Some(lived), wanted: None }, 0.5);
            assert_eq!(pause.as_millis(), expected);
        }
    }

    #[test]
    fn a_relay_that_restarts_may_ask_for_a_longer_pause_within_reason() {
        let wanting = |wanted| Ended { lived: Some(60 * S), wanted: Some(wanted) };
        let pause = |wanted| Redial::default().handle_ended(wanting(wanted), 0.5);
        assert_eq!(
            [pause(Duration::ZERO), pause(7 * S), pause(7000 * S)],
            [S / 100, 7 * S, MAX_RESTART_PAUSE]
        );
    }
}
