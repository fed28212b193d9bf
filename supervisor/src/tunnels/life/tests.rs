use super::*;

fn order(url: &str) -> Arc<Order> {
    Arc::new(Order { url: url.into(), token: "hunter2".into(), headers: Vec::new(), owner: 1000 })
}

fn killed() -> Death {
    Death::new(Reason::Killed, "the tunnel process was ended by signal 9 (SIGKILL)")
}

fn refused() -> Failure {
    Failure::Later("dial tcp: connection refused".into())
}

/// Rules with a clock that only the test moves.
struct Bench {
    life: Life,
    now: Instant,
    tickets: u64,
}

impl Bench {
    fn new() -> Self {
        Self { life: Life::new(TunnelState::default()), now: Instant::now(), tickets: 0 }
    }

    fn up(url: &str) -> Self {
        let mut bench = Self::new();
        bench.wish(Wish::Up(order(url)));
        bench.launched(Ok(()));
        bench.effects();
        bench
    }

    fn wish(&mut self, wish: Wish) -> Ticket {
        self.tickets += 1;
        self.life.handle_wish(Ticket(self.tickets), wish, Power::All, self.now);
        Ticket(self.tickets)
    }

    /// As [`Self::wish`], by a user who may touch only what is his.
    fn wish_of(&mut self, user: u32, wish: Wish) -> Ticket {
        self.tickets += 1;
        self.life.handle_wish(Ticket(self.tickets), wish, Power::Own(user), self.now);
        Ticket(self.tickets)
    }

    fn launched(&mut self, outcome: Result<(), Failure>) {
        self.life.handle_launched(self.life.generation(), outcome, self.now, 0.0);
    }

    fn died(&mut self) {
        self.life.handle_died(self.life.generation(), killed(), self.now, 0.0);
    }

    fn ended(&mut self) {
        self.life.handle_ended(self.life.generation(), Ok(()));
    }

    fn effects(&mut self) -> Vec<Effect> {
        self.life.poll_effects()
    }

    /// Moves the clock to the next deadline, and returns how far that was.
    fn wait(&mut self) -> Duration {
        let due = self.life.deadline().unwrap();
        let waited = due.saturating_duration_since(self.now);
        self.now = due;
        self.life.handle_timeout(due);
        waited
    }

    fn lifecycle(&self) -> Lifecycle {
        self.life.shown().lifecycle
    }

    fn error(&self) -> &str {
        &self.life.shown().error
    }
}

#[test]
fn a_tunnel_is_started_only_when_it_has_answered() {
    let mut bench = Bench::new();
    let ticket = bench.wish(Wish::Up(order("a")));
    assert_eq!(bench.effects(), [Effect::Launch(order("a"))]);
    assert_eq!(bench.lifecycle(), Lifecycle::Starting);
    assert_eq!(bench.life.shown().progress, Some(StartProgressStage::Initializing));
    let generation = bench.life.generation();
    bench.life.handle_spawned(generation, 7);
    bench.life.handle_finalizing(generation);
    assert_eq!(bench.life.shown().progress, Some(StartProgressStage::Finalizing));
    assert_eq!(bench.lifecycle(), Lifecycle::Starting);

    bench.launched(Ok(()));

    assert_eq!(bench.effects(), [Effect::Answer(ticket, Ok(()))]);
    let shown = bench.life.shown();
    assert_eq!((shown.lifecycle, shown.pid, shown.owner), (Lifecycle::Started, Some(7), Some(1000)));
    assert_eq!((shown.progress, shown.error.as_str()), (None, ""));
}

#[test]
fn the_same_order_again_changes_nothing() {
    let mut bench = Bench::up("a");
    let ticket = bench.wish(Wish::Up(order("a")));
    assert_eq!(bench.effects(), [Effect::Answer(ticket, Ok(()))]);
    assert_eq!(bench.lifecycle(), Lifecycle::Started);
}

#[test]
fn another_order_ends_the_running_tunnel_first() {
    let mut bench = Bench::up("a");
    let ticket = bench.wish(Wish::Up(order("b")));
    assert_eq!(bench.effects(), [Effect::End(Ending::Replaced)]);
    assert_eq!(bench.lifecycle(), Lifecycle::Starting);
    bench.ended();
    assert_eq!(bench.effects(), [Effect::Launch(order("b"))]);
    bench.launched(Ok(()));
    assert_eq!(bench.effects(), [Effect::Answer(ticket, Ok(()))]);
}

#[test]
fn a_failed_start_is_told_when_nothing_is_left_and_the_next_one_works() {
    let mut bench = Bench::new();
    let ticket = bench.wish(Wish::Up(order("a")));
    bench.effects();
    bench.launched(Err(refused()));
    assert_eq!(bench.effects(), [Effect::End(Ending::Unwanted)]);
    bench.ended();
    let text = "dial tcp: connection refused";
    assert_eq!(bench.effects(), [Effect::Answer(ticket, Err(text.into()))]);
    assert_eq!((bench.lifecycle(), bench.error()), (Lifecycle::Stopped, text));
    assert_eq!(bench.life.shown().owner, None);

    bench.wish(Wish::Up(order("a")));

    assert_eq!(bench.effects(), [Effect::Launch(order("a"))]);
    assert_eq!(bench.error(), "");
}

#[test]
fn a_stop_is_answered_when_nothing_is_left() {
    let mut bench = Bench::up("a");
    let ticket = bench.wish(Wish::Down);
    assert_eq!(bench.effects(), [Effect::End(Ending::Unwanted)]);
    assert_eq!(bench.lifecycle(), Lifecycle::Stopping);
    bench.ended();
    assert_eq!(bench.effects(), [Effect::Answer(ticket, Ok(()))]);
    assert_eq!((bench.lifecycle(), bench.error()), (Lifecycle::Stopped, ""));
    assert_eq!((bench.life.shown().owner, bench.life.shown().pid), (None, None));
}

#[test]
fn a_process_that_cannot_be_ended_is_not_said_to_be_gone() {
    let mut bench = Bench::up("a");
    let ticket = bench.wish(Wish::Down);
    bench.effects();
    bench.life.handle_ended(bench.life.generation(), Err("it hangs".into()));
    assert_eq!(bench.effects(), [Effect::Answer(ticket, Err("it hangs".into()))]);
    assert_eq!(bench.error(), "it hangs");
}

#[test]
fn a_second_operation_waits_half_a_second_and_is_refused_in_the_words_that_clients_know() {
    let mut bench = Bench::new();
    bench.wish(Wish::Up(order("a")));
    bench.effects();
    let second = bench.wish(Wish::Down);
    assert_eq!(bench.effects(), []);
    assert_eq!(bench.wait(), Duration::from_millis(500));
    let text = "Could not acquire tunnel operation lock, another operation is in progress";
    assert_eq!(bench.effects(), [Effect::Answer(second, Err(text.into()))]);
    assert_eq!(bench.life.deadline(), None);
}

#[test]
fn a_second_operation_is_served_when_the_first_is_done_in_time() {
    let mut bench = Bench::new();
    let first = bench.wish(Wish::Up(order("a")));
    bench.effects();
    let second = bench.wish(Wish::Down);
    bench.launched(Ok(()));
    assert_eq!(bench.effects(), [Effect::Answer(first, Ok(())), Effect::End(Ending::Unwanted)]);
    bench.ended();
    assert_eq!(bench.effects(), [Effect::Answer(second, Ok(()))]);
}

#[test]
fn no_crowd_of_operations_waits() {
    let mut bench = Bench::new();
    for _ in 0..=MAX_WAITING {
        bench.wish(Wish::Up(order("a")));
    }
    bench.effects();
    let one_more = bench.wish(Wish::Down);
    assert_eq!(bench.effects(), [Effect::Answer(one_more, Err(LOCKED.into()))]);
}

#[test]
fn a_killed_tunnel_is_started_again_after_a_short_pause_and_the_reason_is_told() {
    let mut bench = Bench::up("a");
    bench.died();
    assert_eq!(bench.effects(), [Effect::Count(Reason::Killed)]);
    assert_eq!(bench.lifecycle(), Lifecycle::Starting);
    assert!(bench.error().contains("signal 9"), "{}", bench.error());
    assert_eq!((bench.life.shown().restarts, bench.life.shown().pid), (1, None));

    assert_eq!(bench.wait(), Duration::from_millis(250));
    assert_eq!(bench.effects(), [Effect::Launch(order("a"))]);
    assert!(bench.error().contains("signal 9"));
    assert_eq!(bench.life.shown().progress, None, "nobody waits for it");
    bench.launched(Ok(()));

    assert_eq!((bench.lifecycle(), bench.error()), (Lifecycle::Started, ""));
    assert_eq!(bench.effects(), []);
}

/// Kills the tunnel until it is given up, and returns the pauses.
fn exhaust(bench: &mut Bench) -> Vec<Duration> {
    let mut pauses = Vec::new();
    loop {
        bench.died();
        bench.effects();
        if bench.life.shown().circuit_open {
            return pauses;
        }
        pauses.push(bench.wait());
        bench.launched(Ok(()));
        bench.effects();
    }
}

#[test]
fn a_tunnel_that_dies_too_often_is_given_up_until_a_person_acts() {
    let mut bench = Bench::up("a");
    let pauses = exhaust(&mut bench);
    assert_eq!(pauses, [250, 500, 1000, 2000, 4000].map(Duration::from_millis));
    assert_eq!(bench.lifecycle(), Lifecycle::Stopped);
    assert!(bench.error().contains("signal 9") && bench.error().contains("`warren up`"), "{}", bench.error());
    assert_eq!(bench.life.shown().owner, Some(1000), "it is still wanted");
    bench.ended();
    assert_eq!((bench.life.deadline(), bench.lifecycle()), (None, Lifecycle::Stopped));
    assert!(bench.error().contains("`warren up`"));

    bench.wish(Wish::Up(order("a")));

    assert_eq!(bench.effects(), [Effect::Launch(order("a"))]);
    assert!(!bench.life.shown().circuit_open);
    bench.launched(Ok(()));
    assert_eq!(exhaust(&mut bench).len(), MAX_RESTARTS, "the budget is whole again");
}

#[test]
fn the_end_of_a_tunnel_that_was_given_up_leaves_the_intent_alone() {
    let mut bench = Bench::up("a");
    (0..MAX_RESTARTS).for_each(|_| {
        bench.died();
        bench.wait();
        bench.launched(Ok(()));
    });
    bench.effects();
    bench.died();
    assert_eq!(bench.effects(), [Effect::End(Ending::GivenUp)]);
}

#[test]
fn a_tunnel_that_ran_long_is_back_at_once_whatever_was_before() {
    let mut bench = Bench::up("a");
    for _ in 0..3 {
        bench.died();
        bench.wait();
        bench.launched(Ok(()));
    }
    bench.now += WINDOW;
    bench.died();
    assert_eq!(bench.wait(), FLOOR);
}

#[test]
fn a_resume_that_fails_is_tried_again_for_ever_and_spends_no_budget() {
    let mut bench = Bench::new();
    bench.life.handle_resume(order("a"));
    let mut pauses = Vec::new();
    for _ in 0..20 {
        assert_eq!(bench.effects(), [Effect::Launch(order("a"))]);
        bench.launched(Err(refused()));
        assert_eq!((bench.lifecycle(), bench.error()), (Lifecycle::Starting, "dial tcp: connection refused"));
        pauses.push(bench.wait());
    }
    assert_eq!((pauses[0], pauses[19]), (FLOOR, CAP));
    assert_eq!(bench.life.shown().restarts, 0);
    bench.launched(Ok(()));
    bench.effects();
    bench.died();
    assert_eq!(bench.wait(), FLOOR, "a death begins with a short pause");
}

#[test]
fn a_refused_token_ends_a_resume_with_the_reason() {
    let mut bench = Bench::new();
    bench.life.handle_resume(order("a"));
    bench.effects();
    bench.launched(Err(Failure::Person("sign in again (`warren login`)".into())));
    assert_eq!(bench.effects(), [Effect::End(Ending::GivenUp)]);
    bench.ended();
    assert_eq!((bench.lifecycle(), bench.error()), (Lifecycle::Stopped, "sign in again (`warren login`)"));
    assert_eq!(bench.life.deadline(), None);
    assert!(!bench.life.shown().circuit_open);
}

#[test]
fn a_process_that_dies_while_it_is_resumed_counts() {
    let mut bench = Bench::new();
    bench.life.handle_resume(order("a"));
    for _ in 0..MAX_RESTARTS {
        bench.launched(Err(Failure::Died(killed())));
        bench.wait();
    }
    bench.launched(Err(Failure::Died(killed())));
    assert!(bench.life.shown().circuit_open);
}

#[test]
fn what_the_service_does_by_itself_gives_way_to_a_person() {
    let mut bench = Bench::new();
    bench.life.handle_resume(order("a"));
    bench.effects();
    let ticket = bench.wish(Wish::Up(order("b")));
    assert_eq!(bench.effects(), [Effect::End(Ending::Replaced)]);
    bench.ended();
    assert_eq!(bench.effects(), [Effect::Launch(order("b"))]);
    bench.launched(Ok(()));
    assert_eq!(bench.effects(), [Effect::Answer(ticket, Ok(()))]);
}

#[test]
fn a_person_who_wants_what_is_being_resumed_waits_for_it() {
    let mut bench = Bench::new();
    bench.life.handle_resume(order("a"));
    bench.effects();
    let ticket = bench.wish(Wish::Up(order("a")));
    assert_eq!(bench.effects(), []);
    assert!(bench.life.is_asked_for());
    bench.launched(Err(refused()));
    bench.ended();
    let answers = bench.effects();
    assert!(matches!(&answers[..], [Effect::End(_), Effect::Answer(told, Err(_))] if *told == ticket));
}

#[test]
fn a_stop_ends_a_pause_and_a_start_does_not_wait_for_it() {
    let mut bench = Bench::up("a");
    bench.died();
    bench.effects();
    let start = bench.wish(Wish::Up(order("a")));
    assert_eq!(bench.effects(), [Effect::Launch(order("a"))]);
    bench.launched(Ok(()));
    assert_eq!(bench.effects(), [Effect::Answer(start, Ok(()))]);
    bench.died();
    bench.effects();
    let stop = bench.wish(Wish::Down);
    assert_eq!(bench.effects(), [Effect::End(Ending::Unwanted)]);
    assert_eq!(bench.life.deadline(), None);
    bench.ended();
    assert_eq!(bench.effects(), [Effect::Answer(stop, Ok(()))]);
}

#[test]
fn what_is_said_of_a_process_that_was_replaced_is_ignored() {
    let mut bench = Bench::up("a");
    let old = bench.life.generation();
    bench.wish(Wish::Up(order("b")));
    bench.ended();
    bench.effects();
    bench.life.handle_died(old, killed(), bench.now, 0.0);
    bench.life.handle_launched(old, Ok(()), bench.now, 0.0);
    bench.life.handle_ended(old, Ok(()));
    bench.life.handle_spawned(old, 9);
    assert_eq!(bench.effects(), []);
    assert_eq!((bench.lifecycle(), bench.life.shown().pid), (Lifecycle::Starting, None));
}

#[test]
fn a_successor_goes_on_with_the_tunnel_that_runs() {
    let shown = TunnelState { restarts: 3, lifecycle: Lifecycle::Started, ..TunnelState::default() };
    let mut life = Life::new(shown);
    life.handle_found(order("a"), 7, Instant::now());
    assert_eq!(life.poll_effects(), []);
    let shown = life.shown();
    assert_eq!((shown.lifecycle, shown.pid, shown.restarts), (Lifecycle::Started, Some(7), 3));
}

#[test]
fn a_successor_says_that_a_start_was_interrupted() {
    let shown = TunnelState { lifecycle: Lifecycle::Starting, ..TunnelState::default() };
    let mut life = Life::new(shown);
    life.handle_unfinished(Ending::Unwanted);
    assert_eq!(life.poll_effects(), [Effect::End(Ending::Unwanted)]);
    life.handle_ended(life.generation(), Ok(()));
    assert_eq!(life.shown().lifecycle, Lifecycle::Stopped);
    assert!(life.shown().error.contains("`warren up`"));
}

#[test]
fn a_wish_that_waited_for_anothers_start_cannot_touch_his_tunnel() {
    let mut bench = Bench::new();
    bench.wish(Wish::Up(order("https://a")));
    let (stop, start) = (bench.wish_of(4242, Wish::Down), bench.wish_of(4242, Wish::Up(order("https://b"))));
    bench.effects();
    bench.launched(Ok(()));
    let owner = order("https://a").owner;
    let refused = [Effect::Refuse(stop, owner), Effect::Refuse(start, owner)];
    assert!(bench.effects().ends_with(&refused));
    bench.wish_of(owner, Wish::Down);
    assert_eq!(bench.effects(), [Effect::End(Ending::Unwanted)]);
}
