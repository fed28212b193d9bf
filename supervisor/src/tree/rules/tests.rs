use std::{collections::BTreeMap, sync::Arc};

use proptest::prelude::{Just, Strategy as _, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn child(name: &'static str) -> ChildSpec {
    ChildSpec::worker(name, Arc::new(|_| Box::pin(std::future::pending())))
}

fn spec(strategy: Strategy, children: impl IntoIterator<Item = ChildSpec>) -> SupervisorSpec {
    let spec = SupervisorSpec::new("boss", 3, 60 * SECOND).strategy(strategy);
    let spec = spec.backoff(Backoff::new(Duration::ZERO, Duration::ZERO, 1.0, 0.0));
    children.into_iter().fold(spec, SupervisorSpec::child)
}

fn crash() -> Exit {
    Exit::abnormal(How::Panic, "oh")
}

/// A world in which children do what they are told, unless they are told not to.
struct World {
    rules: Rules,
    names: BTreeMap<ChildId, &'static str>,
    now: Instant,
    log: Vec<String>,
    /// Those whose start fails.
    broken: Vec<&'static str>,
    /// Those whose start does not come out.
    slow: Vec<&'static str>,
    /// Those that ignore a stop.
    stubborn: Vec<&'static str>,
    /// Those that ignore being killed, too.
    blocked: Vec<&'static str>,
}

impl World {
    fn new(spec: SupervisorSpec) -> Self {
        let (rules, ids) = Rules::new(&spec);
        let names = ids.into_iter().zip(spec.children.iter().map(|child| child.name)).collect();
        let none = || Vec::new();
        let (broken, slow, stubborn, blocked) = (none(), none(), none(), none());
        Self { rules, names, now: Instant::now(), log: Vec::new(), broken, slow, stubborn, blocked }
    }

    fn started(spec: SupervisorSpec) -> Self {
        let mut world = Self::new(spec);
        world.begin();
        world.log.clear();
        world
    }

    fn begin(&mut self) {
        self.rules.handle_begin(self.now);
        self.run();
    }

    fn id(&self, name: &str) -> ChildId {
        *self.names.iter().find(|(_, known)| **known == name).unwrap().0
    }

    fn exit(&mut self, name: &str, exit: Exit) {
        let id = self.id(name);
        self.rules.handle_exit(id, exit, self.now);
        self.rules.handle_gone(id, self.now, 0.0);
        self.run();
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.rules.handle_timeout(self.now);
        self.run();
    }

    fn add(&mut self, child: ChildSpec) {
        let id = self.rules.handle_add(&child, self.now);
        self.names.insert(id, child.name);
        self.run();
    }

    fn run(&mut self) {
        loop {
            let effects = self.rules.poll_effects();
            if effects.is_empty() {
                return;
            }
            effects.into_iter().for_each(|effect| self.obey(effect));
        }
    }

    fn obey(&mut self, effect: Effect) {
        let name = |id: &ChildId| self.names.get(id).copied().unwrap_or("?");
        match effect {
            Effect::Start(id) => {
                let name = name(&id);
                self.log.push(format!("start {name}"));
                if self.broken.contains(&name) {
                    self.rules.handle_start_failed(id, "broken".into(), self.now, 0.0);
                } else if !self.slow.contains(&name) {
                    self.rules.handle_started(id, self.now);
                }
            }
            Effect::Cancel(id) => {
                self.log.push(format!("cancel {}", name(&id)));
                self.rules.handle_start_failed(id, "given up".into(), self.now, 0.0);
            }
            Effect::Stop(id) => {
                let name = name(&id);
                self.log.push(format!("stop {name}"));
                if !self.stubborn.contains(&name) {
                    self.rules.handle_exit(id, Exit::Normal, self.now);
                    self.rules.handle_gone(id, self.now, 0.0);
                }
            }
            Effect::Kill(id) => {
                let name = name(&id);
                self.log.push(format!("kill {name}"));
                if !self.blocked.contains(&name) {
                    self.rules.handle_exit(id, Exit::abnormal(How::Killed, ""), self.now);
                    self.rules.handle_gone(id, self.now, 0.0);
                }
            }
            Effect::Restarting(id, exit) => {
                self.log.push(format!("restarting {} {}", name(&id), exit.label()))
            }
            Effect::Added(id, outcome) => self.log.push(format!("added {} {}", name(&id), outcome.is_ok())),
            Effect::Forget(id) => self.log.push(format!("forget {}", name(&id))),
            Effect::Ready => self.log.push("ready".to_owned()),
            Effect::End(end) => self.log.push(format!("end: {end}")),
        }
    }

    fn log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }
}

fn abc() -> [ChildSpec; 3] {
    ["a", "b", "c"].map(child)
}

#[test]
fn children_start_in_order_each_when_the_one_before_runs() {
    let mut world = World::new(spec(Strategy::OneForOne, abc()));
    world.slow.push("b");
    world.begin();
    assert_eq!(world.log(), ["start a", "start b"]);
    world.rules.handle_started(world.id("b"), world.now);
    world.run();
    assert_eq!(world.log(), ["start c", "ready"]);
}

#[test]
fn a_supervisor_without_children_is_ready_at_once() {
    let mut world = World::new(spec(Strategy::OneForAll, []));
    world.begin();
    assert_eq!(world.log(), ["ready"]);
}

#[test]
fn children_stop_in_reverse_each_when_nothing_is_left_of_the_one_after() {
    let mut world = World::started(spec(Strategy::OneForOne, abc()));
    world.stubborn.push("b");
    world.rules.handle_stop(world.now);
    world.run();
    assert_eq!(world.log(), ["stop c", "stop b"]);
    world.rules.handle_exit(world.id("b"), Exit::Normal, world.now);
    world.run();
    assert_eq!(world.log(), [""; 0]);
    world.rules.handle_gone(world.id("b"), world.now, 0.0);
    world.run();
    assert_eq!(world.log(), ["stop a", "end: stopped"]);
}

#[test]
fn a_child_that_outstays_its_grace_is_killed_and_the_others_still_get_theirs() {
    let mut world = World::started(spec(Strategy::OneForOne, abc()));
    world.stubborn.push("b");
    world.rules.handle_stop(world.now);
    world.run();
    world.wait(crate::child::GRACE);
    assert_eq!(world.log(), ["stop c", "stop b", "kill b", "stop a", "end: stopped"]);
}

#[test]
fn strategies_restart_the_child_those_after_it_or_all() {
    let table: [(Strategy, &[&str]); 3] = [
        (Strategy::OneForOne, &["restarting b panic", "start b"]),
        (Strategy::RestForOne, &["restarting b panic", "stop c", "start b", "start c"]),
        (Strategy::OneForAll, &["restarting b panic", "stop c", "stop a", "start a", "start b", "start c"]),
    ];
    for (strategy, expected) in table {
        let mut world = World::started(spec(strategy, abc()));
        world.exit("b", crash());
        let mut log = world.log();
        log.sort_by_key(|line| !line.starts_with("restarting"));
        assert_eq!(log, expected, "{strategy:?}");
    }
}

#[test]
fn what_an_exit_means_depends_on_the_restart_type() {
    let table = [
        (Restart::Permanent, Exit::Normal, true),
        (Restart::Permanent, crash(), true),
        (Restart::Transient, Exit::Normal, false),
        (Restart::Transient, crash(), true),
        (Restart::Temporary, Exit::Normal, false),
        (Restart::Temporary, crash(), false),
    ];
    for (restart, exit, is_restarted) in table {
        let mut world = World::started(spec(Strategy::OneForOne, [child("a").restarted(restart)]));
        world.exit("a", exit.clone());
        assert_eq!(world.log().contains(&"start a".to_owned()), is_restarted, "{restart:?} {exit:?}");
    }
}

#[test]
fn siblings_that_ended_in_order_come_back_with_the_others_and_temporary_ones_do_not() {
    let children =
        [child("a").restarted(Restart::Transient), child("b").restarted(Restart::Temporary), child("c")];
    let mut world = World::started(spec(Strategy::OneForAll, children));
    world.exit("a", Exit::Normal);
    assert_eq!(world.log(), [""; 0]);
    world.exit("c", crash());
    assert_eq!(world.log(), ["restarting c panic", "stop b", "forget b", "start a", "start c"]);
}

#[test]
fn a_spent_budget_ends_everything_in_reverse_and_says_why() {
    let mut world = World::started(spec(Strategy::OneForOne, abc()));
    for _ in 0..3 {
        world.exit("b", crash());
    }
    world.log.clear();
    world.exit("b", crash());
    let end = "end: boss gave up: b needed too many restarts, the last time because of panic: oh";
    assert_eq!(world.log(), ["stop c", "stop a", end]);
}

#[test]
fn restarts_far_apart_do_not_spend_the_budget() {
    let mut world = World::started(spec(Strategy::OneForOne, abc()));
    for _ in 0..10 {
        world.exit("b", crash());
        world.wait(21 * SECOND);
    }
    assert!(!world.log().iter().any(|line| line.starts_with("end")));
}

#[test]
fn a_failed_first_start_stops_those_before_it_and_ends_the_supervisor() {
    let mut world = World::new(spec(Strategy::OneForOne, abc()));
    world.broken.push("b");
    world.begin();
    assert_eq!(world.log(), ["start a", "start b", "stop a", "end: b could not start: broken"]);
}

#[test]
fn a_failed_restart_is_tried_again_until_the_budget_is_spent() {
    let mut world = World::started(spec(Strategy::OneForOne, [child("a")]));
    world.broken.push("a");
    world.exit("a", crash());
    let log = world.log();
    assert_eq!(log.iter().filter(|line| *line == "start a").count(), 3);
    assert!(log.last().unwrap().ends_with("because of error: start: broken"), "{log:?}");
}

#[test]
fn restarts_wait_for_the_back_off_which_begins_anew_after_a_window_without_trouble() {
    let mut patient = spec(Strategy::OneForOne, abc());
    patient.backoff = Backoff::new(SECOND, 8 * SECOND, 2.0, 0.0);
    let mut world = World::started(patient);
    for pause in [1, 2, 1] {
        world.exit("b", crash());
        world.wait(pause * SECOND - Duration::from_millis(1));
        assert_eq!(world.log(), ["restarting b panic"], "{pause}");
        assert_eq!(world.rules.poll_timeout(), Some(world.now + Duration::from_millis(1)));
        world.wait(Duration::from_millis(1));
        assert_eq!(world.log(), ["start b"], "{pause}");
        if pause == 2 {
            world.wait(60 * SECOND);
        }
    }
}

#[test]
fn a_child_that_waits_for_its_restart_keeps_nobody_else_waiting() {
    let mut patient = spec(Strategy::OneForOne, abc());
    patient.backoff = Backoff::new(SECOND, SECOND, 1.0, 0.0);
    let mut world = World::started(patient);
    world.exit("a", crash());
    world.wait(SECOND / 2);
    world.exit("c", crash());
    world.log.clear();
    world.wait(SECOND / 2);
    assert_eq!(world.log(), ["start a"]);
    world.wait(SECOND / 2);
    assert_eq!(world.log(), ["start c"]);
}

/// Found by the model: the timer was set to the past, again and again, until the sibling ran.
#[test]
fn one_who_waits_for_a_sibling_that_starts_slowly_is_no_reason_to_wake_up() {
    let mut patient = spec(Strategy::OneForAll, abc());
    patient.backoff = Backoff::new(SECOND, SECOND, 1.0, 0.0);
    let mut world = World::started(patient);
    world.slow.push("a");
    world.exit("b", crash());
    world.wait(SECOND);
    assert_eq!(world.log(), ["restarting b panic", "stop c", "stop a", "start a"]);
    assert_eq!(world.rules.poll_timeout(), None);
    world.rules.handle_started(world.id("a"), world.now);
    world.run();
    assert_eq!(world.log(), ["start b", "start c"]);
}

#[test]
fn a_child_removed_during_its_back_off_does_not_come_back() {
    let mut patient = spec(Strategy::OneForOne, abc());
    patient.backoff = Backoff::new(SECOND, SECOND, 1.0, 0.0);
    let mut world = World::started(patient);
    world.exit("b", crash());
    world.rules.handle_remove(world.id("b"), world.now);
    world.run();
    world.wait(10 * SECOND);
    assert_eq!(world.log(), ["restarting b panic", "forget b"]);
}

#[test]
fn a_stop_during_a_back_off_ends_it() {
    let mut patient = spec(Strategy::OneForAll, abc());
    patient.backoff = Backoff::new(SECOND, SECOND, 1.0, 0.0);
    let mut world = World::started(patient);
    world.exit("b", crash());
    world.log.clear();
    world.rules.handle_stop(world.now);
    world.run();
    world.wait(10 * SECOND);
    assert_eq!(world.log(), ["end: stopped"]);
}

#[test]
fn a_start_under_way_is_given_up_when_the_supervisor_stops() {
    let mut world = World::new(spec(Strategy::OneForOne, abc()));
    world.slow.push("b");
    world.begin();
    world.log.clear();
    world.rules.handle_stop(world.now);
    world.run();
    assert_eq!(world.log(), ["cancel b", "stop a", "end: stopped"]);
}

#[test]
fn a_start_that_comes_out_well_after_all_is_stopped_in_order() {
    let mut world = World::new(spec(Strategy::OneForOne, [child("a")]));
    world.slow.push("a");
    world.begin();
    world.rules.handle_stop(world.now);
    let cancelled = world.rules.poll_effects();
    assert_eq!(cancelled, [Effect::Cancel(world.id("a"))]);
    world.log.clear();
    world.rules.handle_started(world.id("a"), world.now);
    world.run();
    assert_eq!(world.log(), ["stop a", "end: stopped"]);
}

#[test]
fn an_abort_kills_at_once_and_still_in_reverse() {
    let mut world = World::started(spec(Strategy::OneForOne, abc()));
    world.stubborn = vec!["a", "c"];
    world.rules.handle_stop(world.now);
    world.run();
    world.rules.handle_abort(world.now);
    world.run();
    world.wait(Duration::ZERO);
    assert_eq!(world.log(), ["stop c", "kill c", "stop b", "stop a", "kill a", "end: stopped"]);
}

#[test]
fn a_hung_child_is_killed_and_started_again_when_nothing_is_left_of_it() {
    let mut world = World::started(spec(Strategy::OneForOne, abc()));
    world.rules.handle_hung(world.id("b"), world.now);
    world.run();
    assert_eq!(world.log(), ["kill b", "restarting b hung", "start b"]);
}

#[test]
fn a_child_that_cannot_be_killed_ends_the_supervisor_but_not_its_siblings_order() {
    let mut world = World::started(spec(Strategy::OneForOne, abc()));
    world.blocked.push("b");
    world.rules.handle_hung(world.id("b"), world.now);
    world.run();
    world.wait(DROP_LIMIT);
    let end = "end: b cannot be ended: it blocks its thread";
    assert_eq!(world.log(), ["kill b", "stop c", "stop a", end]);
}

#[test]
fn what_a_crash_leaves_behind_is_waited_for_but_not_for_ever() {
    let mut world = World::started(spec(Strategy::OneForOne, abc()));
    world.rules.handle_exit(world.id("b"), crash(), world.now);
    world.run();
    assert_eq!(world.log(), [""; 0]);
    world.wait(DROP_LIMIT);
    assert!(world.log().last().unwrap().starts_with("end: b cannot be ended"));
}

#[test]
fn a_child_that_vanishes_without_a_word_did_not_end_as_it_wanted() {
    let children = [child("a").restarted(Restart::Transient)];
    let mut world = World::started(spec(Strategy::OneForOne, children));
    world.rules.handle_gone(world.id("a"), world.now, 0.0);
    world.run();
    assert_eq!(world.log(), ["restarting a killed", "start a"]);
}

#[test]
fn children_come_and_go_while_the_supervisor_runs() {
    let mut world = World::started(spec(Strategy::OneForOne, [child("a")]));
    world.add(child("b"));
    assert_eq!(world.log(), ["start b", "added b true"]);
    world.rules.handle_remove(world.id("b"), world.now);
    world.run();
    assert_eq!(world.log(), ["stop b", "forget b"]);
}

#[test]
fn a_child_that_is_added_and_cannot_start_is_told_of_and_forgotten() {
    let mut world = World::started(spec(Strategy::OneForOne, [child("a")]));
    world.broken.push("b");
    world.add(child("b"));
    assert_eq!(world.log(), ["start b", "added b false", "forget b"]);
}

#[test]
fn significant_children_take_the_supervisor_with_them_as_asked_for() {
    let children = || ["a", "b"].map(|name| child(name).restarted(Restart::Transient).significant());
    let with = |auto| spec(Strategy::OneForOne, children()).auto_shutdown(auto);
    let end = "end: its significant children have ended";

    let mut world = World::started(with(AutoShutdown::AnySignificant));
    world.exit("a", Exit::Normal);
    assert_eq!(world.log(), ["stop b", end]);

    let mut world = World::started(with(AutoShutdown::AllSignificant));
    world.exit("a", Exit::Normal);
    assert_eq!(world.log(), [""; 0]);
    world.exit("b", Exit::Normal);
    assert_eq!(world.log(), [end]);

    let mut world = World::started(with(AutoShutdown::Never));
    world.exit("a", Exit::Normal);
    world.exit("b", Exit::Normal);
    assert_eq!(world.log(), [""; 0]);
}

#[derive(Debug, Clone)]
enum Step {
    Exit(u64, bool),
    Hung(u64),
    Started(u64),
    StartFailed(u64),
    Gone(u64),
    Wait(u64),
    Add,
    Remove(u64),
    Stop,
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    prop_oneof![
        4 => (1..8_u64, any::<bool>()).prop_map(|(id, normal)| Step::Exit(id, normal)),
        1 => (1..8_u64).prop_map(Step::Hung),
        6 => (1..8_u64).prop_map(Step::Started),
        1 => (1..8_u64).prop_map(Step::StartFailed),
        6 => (1..8_u64).prop_map(Step::Gone),
        3 => (0..4_000_u64).prop_map(Step::Wait),
        1 => Just(Step::Add),
        1 => (1..8_u64).prop_map(Step::Remove),
        1 => Just(Step::Stop),
    ]
}

/// What really runs, as a shell would know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Starting,
    Alive,
    Ended,
}

proptest! {
    #[test]
    fn whatever_happens_nothing_is_started_twice_and_a_stop_always_ends_it(
        which in 0..3_usize,
        restarts in proptest::collection::vec(0..3_usize, 0..4),
        steps in proptest::collection::vec(step(), 0..120),
    ) {
        let strategy = [Strategy::OneForOne, Strategy::RestForOne, Strategy::OneForAll][which];
        let kinds = [Restart::Permanent, Restart::Transient, Restart::Temporary];
        let children = restarts.iter().map(|kind| child("x").restarted(kinds[*kind]));
        let (mut rules, _) = Rules::new(&spec(strategy, children));
        let (mut now, mut lives, mut ended) = (Instant::now(), BTreeMap::new(), false);
        rules.handle_begin(now);
        let steps = steps.into_iter().chain([Step::Stop]);
        let finale = (0..40).flat_map(|_| {
            (1..30).flat_map(|id| [Step::StartFailed(id), Step::Gone(id)]).chain([Step::Wait(6_000)])
        });
        for step in steps.chain(finale) {
            match step {
                Step::Exit(id, normal) if lives.get(&ChildId(id)) == Some(&Life::Alive) => {
                    lives.insert(ChildId(id), Life::Ended);
                    rules.handle_exit(ChildId(id), if normal { Exit::Normal } else { crash() }, now);
                }
                Step::Gone(id) if matches!(lives.get(&ChildId(id)), Some(Life::Alive | Life::Ended)) => {
                    lives.remove(&ChildId(id));
                    rules.handle_gone(ChildId(id), now, 0.5);
                }
                Step::Started(id) if lives.get(&ChildId(id)) == Some(&Life::Starting) => {
                    lives.insert(ChildId(id), Life::Alive);
                    rules.handle_started(ChildId(id), now);
                }
                Step::StartFailed(id) if lives.get(&ChildId(id)) == Some(&Life::Starting) => {
                    lives.remove(&ChildId(id));
                    rules.handle_start_failed(ChildId(id), "no".into(), now, 0.5);
                }
                Step::Hung(id) => rules.handle_hung(ChildId(id), now),
                Step::Wait(millis) => {
                    now += Duration::from_millis(millis);
                    rules.handle_timeout(now);
                }
                Step::Add => drop(rules.handle_add(&child("x"), now)),
                Step::Remove(id) => rules.handle_remove(ChildId(id), now),
                Step::Stop => rules.handle_stop(now),
                Step::Exit(..) | Step::Gone(_) | Step::Started(_) | Step::StartFailed(_) => {}
            }
            for effect in rules.poll_effects() {
                prop_assert!(!ended, "{effect:?} after the end");
                match effect {
                    Effect::Start(id) => {
                        let before = lives.insert(id, Life::Starting);
                        prop_assert_eq!(before, None, "{:?} is started while it runs", id);
                    }
                    Effect::End(_) => ended = true,
                    _ => {}
                }
            }
        }
        prop_assert!(ended);
    }
}
