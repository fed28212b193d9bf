//! The tree with real actors. The rules have their own tests; these are about the tasks and ractor around
//! them. Time is paused where it matters.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::Notify;
use warren_actors::runtime::{Address, Context, Part, PartError, Reply, StartFn, starter};
use warren_core::backoff::Backoff;

use super::*;
use crate::child::{AutoShutdown, ChildSpec, Restart, Strategy, SupervisorSpec};

mod model;
mod traps;

const SOON: Duration = Duration::from_secs(5);
const MINUTE: Duration = Duration::from_secs(60);

/// What happened, in order, for everyone to write to.
#[derive(Clone, Default)]
struct Journal {
    lines: Arc<Mutex<Vec<String>>>,
    written: Arc<Notify>,
}

impl Journal {
    fn note(&self, line: impl Into<String>) {
        self.lines.lock().unwrap().push(line.into());
        self.written.notify_waiters();
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.lines.lock().unwrap())
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// Waits until there are so many lines, and takes them.
    async fn take_when(&self, count: usize) -> Vec<String> {
        self.until(|lines| lines.len() >= count).await;
        self.take()
    }

    async fn until(&self, mut accept: impl FnMut(&[String]) -> bool) {
        let waiting = async {
            loop {
                let written = self.written.notified();
                tokio::pin!(written);
                written.as_mut().enable();
                if accept(&self.lines.lock().unwrap()) {
                    return;
                }
                written.await;
            }
        };
        if tokio::time::timeout(10 * MINUTE, waiting).await.is_err() {
            panic!("the journal has only {:?}", self.lines.lock().unwrap());
        }
    }
}

/// What a puppet is told.
enum Order {
    Echo(u32, Reply<u32>),
    Fail,
    Panic,
    Hang,
    /// Blocks the thread.
    Block(Duration),
    /// Awaits.
    Sleep(Duration),
}

/// A part that does as it is told, and writes down its life.
#[derive(Clone)]
struct Puppet {
    name: &'static str,
    journal: Journal,
    /// How often a start fails before one succeeds.
    failures: Arc<Mutex<u32>>,
    manner: Manner,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Obedient,
    /// Its start never ends.
    NeverStarts,
    /// Its stop never ends.
    NeverStops,
}

/// Writes down that a state was dropped.
struct Diary {
    name: &'static str,
    journal: Journal,
}

impl Drop for Diary {
    fn drop(&mut self) {
        self.journal.note(format!("drop {}", self.name));
    }
}

impl Part for Puppet {
    type Message = Order;
    type State = Diary;

    async fn start(&self, _: &Context<Order>) -> Result<Diary, PartError> {
        self.journal.note(format!("start {}", self.name));
        if self.manner == Manner::NeverStarts {
            std::future::pending::<()>().await;
        }
        let mut failures = self.failures.lock().unwrap();
        if *failures > 0 {
            *failures -= 1;
            return Err("no luck".into());
        }
        Ok(Diary { name: self.name, journal: self.journal.clone() })
    }

    async fn handle(&self, _: &Context<Order>, _: &mut Diary, order: Order) -> Result<(), PartError> {
        match order {
            Order::Echo(number, reply) => drop(reply.send(number)),
            Order::Fail => return Err("on purpose".into()),
            Order::Panic => panic!("on purpose"),
            Order::Hang => std::future::pending().await,
            Order::Block(time) => std::thread::sleep(time),
            Order::Sleep(time) => tokio::time::sleep(time).await,
        }
        Ok(())
    }

    async fn stop(&self, state: Diary) {
        self.journal.note(format!("stop {}", self.name));
        if self.manner == Manner::NeverStops {
            std::future::pending::<()>().await;
        }
        drop(state);
    }
}

/// Makes puppets that share a journal.
#[derive(Clone, Default)]
struct Stage {
    journal: Journal,
}

struct Role {
    address: Address<Order>,
    puppet: Puppet,
}

impl Stage {
    fn puppet(&self, name: &'static str) -> Role {
        let (journal, failures) = (self.journal.clone(), Arc::default());
        let puppet = Puppet { name, journal, failures, manner: Manner::Obedient };
        Role { address: Address::new(name, 16), puppet }
    }

    fn puppets<const N: usize>(&self, names: [&'static str; N]) -> [Role; N] {
        names.map(|name| self.puppet(name))
    }
}

impl Role {
    fn manner(mut self, manner: Manner) -> Self {
        self.puppet.manner = manner;
        self
    }

    fn failing(self, failures: u32) -> Self {
        *self.puppet.failures.lock().unwrap() = failures;
        self
    }

    fn spec(&self) -> ChildSpec {
        let puppet = self.puppet.clone();
        ChildSpec::part(&self.address, move || puppet.clone())
    }

    async fn tell(&self, order: Order) {
        self.address.send(order).await.unwrap();
    }

    /// Whether it answers, if need be after its restart.
    async fn answers(&self) -> bool {
        let asking = async {
            while self.address.ask(SOON, |reply| Order::Echo(1, reply)).await != Ok(1) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(MINUTE, asking).await.is_ok()
    }
}

fn boss(children: impl IntoIterator<Item = ChildSpec>) -> SupervisorSpec {
    group("boss", children)
}

fn group(name: &'static str, children: impl IntoIterator<Item = ChildSpec>) -> SupervisorSpec {
    let spec = SupervisorSpec::new(name, 3, MINUTE);
    let spec = spec.backoff(Backoff::new(Duration::ZERO, Duration::ZERO, 1.0, 0.0));
    children.into_iter().fold(spec, SupervisorSpec::child)
}

fn node(tree: &Tree, name: &str) -> NodeInfo {
    tree.snapshot().into_iter().find(|node| node.name == name).unwrap()
}

#[tokio::test]
async fn children_start_in_order_and_stop_in_reverse_through_all_levels() {
    let stage = Stage::default();
    let [a, b, c, d] = stage.puppets(["a", "b", "c", "d"]);
    let inner = ChildSpec::supervisor(group("inner", [b.spec(), c.spec()]));
    let tree = Tree::start(boss([a.spec(), inner, d.spec()])).await.unwrap();
    assert_eq!(stage.journal.take(), ["start a", "start b", "start c", "start d"]);
    assert!(tree.stop(SOON).await);
    let expected = ["stop d", "drop d", "stop c", "drop c", "stop b", "drop b", "stop a", "drop a"];
    assert_eq!(stage.journal.take(), expected);
    assert_eq!(tree.ended().await, End::Stopped);
}

#[tokio::test]
async fn a_failed_first_start_is_an_error_of_the_tree_and_stops_what_had_started() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]);
    let inner = ChildSpec::supervisor(group("inner", [b.failing(1).spec()]));
    let error = Tree::start(boss([a.spec(), inner])).await.map(drop).unwrap_err();
    assert_eq!(error.to_string(), "inner could not start: b could not start: no luck");
    assert_eq!(stage.journal.take(), ["start a", "start b", "stop a", "drop a"]);
}

#[tokio::test]
async fn a_panic_and_an_error_restart_the_child_alone_and_are_told_apart() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]);
    let tree = Tree::start(boss([a.spec(), b.spec()])).await.unwrap();
    stage.journal.take();
    for (order, reason) in [(Order::Panic, "panic: on purpose"), (Order::Fail, "error: on purpose")] {
        a.tell(order).await;
        assert_eq!(stage.journal.take_when(2).await, ["drop a", "start a"]);
        assert!(a.answers().await);
        assert_eq!(node(&tree, "a").last_reason.as_deref(), Some(reason));
    }
    assert_eq!((node(&tree, "a").restarts, node(&tree, "b").restarts), (2, 0));
}

#[tokio::test]
async fn rest_for_one_restarts_those_after_it_and_one_for_all_restarts_all() {
    let table = [
        (Strategy::RestForOne, vec!["drop b", "stop c", "drop c", "start b", "start c"]),
        (
            Strategy::OneForAll,
            vec!["drop b", "stop c", "drop c", "stop a", "drop a", "start a", "start b", "start c"],
        ),
    ];
    for (strategy, expected) in table {
        let stage = Stage::default();
        let [a, b, c] = stage.puppets(["a", "b", "c"]);
        let spec = boss([a.spec(), b.spec(), c.spec()]).strategy(strategy);
        let _tree = Tree::start(spec).await.unwrap();
        stage.journal.take();
        b.tell(Order::Panic).await;
        assert_eq!(stage.journal.take_when(expected.len()).await, expected);
        assert!(a.answers().await && b.answers().await && c.answers().await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_transient_child_that_ends_as_it_wanted_is_not_restarted_and_may_take_its_supervisor_along() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]);
    let (b_spec, cells) = traps::captured(&b);
    let inner = group("inner", [b_spec.restarted(Restart::Transient).significant()]);
    let inner = ChildSpec::supervisor(inner.auto_shutdown(AutoShutdown::AnySignificant));
    let tree = Tree::start(boss([a.spec(), inner.restarted(Restart::Transient)])).await.unwrap();
    stage.journal.take();
    cells.lock().unwrap()[0].stop(None);
    assert_eq!(stage.journal.take_when(2).await, ["stop b", "drop b"]);
    tokio::time::sleep(MINUTE).await;
    assert_eq!(stage.journal.take(), [""; 0]);
    assert_eq!(node(&tree, "inner").state, Phase::Stopped);
    assert!(a.answers().await);
}

#[tokio::test]
async fn a_spent_budget_escalates_level_by_level_until_the_tree_ends_with_the_reason() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]);
    let inner =
        SupervisorSpec { budget: warren_core::budget::Budget::new(1, MINUTE), ..group("inner", [b.spec()]) };
    let outer = boss([a.spec(), ChildSpec::supervisor(inner)]);
    let outer = SupervisorSpec { budget: warren_core::budget::Budget::new(1, MINUTE), ..outer };
    let tree = Tree::start(outer).await.unwrap();
    for round in 0..4 {
        assert!(b.answers().await, "{round}");
        b.tell(Order::Panic).await;
    }
    let End::BudgetSpent { supervisor: "boss", child: "inner", reason } = tree.ended().await else {
        panic!("another end");
    };
    assert!(reason.contains("inner gave up: b needed too many restarts"), "{reason}");
    let lines = stage.journal.take();
    assert_eq!(lines.iter().filter(|line| *line == "start b").count(), 4);
    assert_eq!(lines[lines.len() - 2..], ["stop a", "drop a"]);
}

#[tokio::test(start_paused = true)]
async fn a_child_removed_during_its_back_off_does_not_come_back() {
    let stage = Stage::default();
    let (a, b) = (stage.puppet("a"), stage.puppet("b"));
    let patient = boss([a.spec()]).backoff(Backoff::new(SOON, SOON, 1.0, 0.0));
    let tree = Tree::start(patient).await.unwrap();
    let id = tree.add(b.spec()).await.unwrap();
    stage.journal.take();
    b.tell(Order::Panic).await;
    stage.journal.take_when(1).await;
    tree.remove(id).await;
    tokio::time::sleep(MINUTE).await;
    assert_eq!(stage.journal.take(), [""; 0]);
    assert!(a.answers().await);
}

#[tokio::test(start_paused = true)]
async fn a_hung_worker_is_killed_and_started_again() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]);
    let tree = Tree::start(boss([a.spec(), b.spec()])).await.unwrap();
    stage.journal.take();
    a.tell(Order::Hang).await;
    let before = tokio::time::Instant::now();
    assert_eq!(stage.journal.take_when(2).await, ["drop a", "start a"]);
    assert!(before.elapsed() <= Duration::from_secs(15), "{:?}", before.elapsed());
    assert!(a.answers().await);
    assert_eq!(node(&tree, "a").last_reason.as_deref(), Some("hung: it did not answer"));
    assert_eq!(node(&tree, "b").restarts, 0);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_works_off_a_full_mailbox_is_busy_and_not_hung() {
    let stage = Stage::default();
    let a = stage.puppet("a");
    let _tree = Tree::start(boss([a.spec()])).await.unwrap();
    for _ in 0..16 {
        a.tell(Order::Sleep(Duration::from_millis(1900))).await;
    }
    assert!(a.answers().await);
    assert_eq!(stage.journal.take(), ["start a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sibling_that_blocks_its_thread_does_not_melt_the_tree() {
    let stage = Stage::default();
    let [a, b, c] = stage.puppets(["a", "b", "c"]);
    let spec = boss([a.spec(), b.spec(), c.spec()]).strategy(Strategy::OneForAll);
    let tree = Tree::start(spec).await.unwrap();
    a.tell(Order::Block(Duration::from_millis(200))).await;
    b.tell(Order::Panic).await;
    stage.journal.until(|lines| lines.iter().filter(|line| line.starts_with("start")).count() == 6).await;
    assert!(a.answers().await && b.answers().await && c.answers().await);
    assert_eq!(node(&tree, "boss").state, Phase::Running);
    assert!(tree.stop(SOON).await);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_never_ends_is_given_up() {
    let stage = Stage::default();
    let a = stage.puppet("a").manner(Manner::NeverStarts);
    let error = Tree::start(boss([a.spec()])).await.map(drop).unwrap_err();
    assert_eq!(error.to_string(), "a could not start: it did not start within 10s");
}

#[tokio::test(start_paused = true)]
async fn a_tree_can_be_stopped_while_a_child_starts() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]);
    let inner = ChildSpec::supervisor(group("inner", [a.spec(), b.manner(Manner::NeverStarts).spec()]));
    let tree = Tree::start(boss([])).await.unwrap();
    let adding = tokio::spawn({
        let tree = tree.clone();
        async move { tree.add(inner).await }
    });
    assert_eq!(stage.journal.take_when(2).await, ["start a", "start b"]);
    assert!(tree.stop(SOON).await);
    assert_eq!(adding.await.unwrap(), Err(AddError::Ending));
    assert_eq!(stage.journal.take(), ["stop a", "drop a"]);
}

#[tokio::test(start_paused = true)]
async fn a_child_that_does_not_stop_is_killed_after_its_grace() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]);
    let b = b.manner(Manner::NeverStops);
    let tree = Tree::start(boss([a.spec(), b.spec().grace(Duration::from_secs(3))])).await.unwrap();
    stage.journal.take();
    let before = tokio::time::Instant::now();
    assert!(tree.stop(MINUTE).await);
    assert_eq!(before.elapsed().as_secs(), 3);
    assert_eq!(stage.journal.take(), ["stop b", "drop b", "stop a", "drop a"]);
}

/// Found by the model: a supervisor's grace was that of its first children.
#[tokio::test(start_paused = true)]
async fn children_that_were_added_to_a_supervisor_get_their_whole_grace_too() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]).map(|role| role.manner(Manner::NeverStops));
    let tree = Tree::start(boss([ChildSpec::supervisor(group("inner", []))])).await.unwrap();
    let inner = tree.branch("inner").unwrap();
    inner.add(a.spec().grace(SOON)).await.unwrap();
    inner.add(b.spec().grace(SOON)).await.unwrap();
    let before = tokio::time::Instant::now();
    assert!(tree.stop(MINUTE).await);
    assert_eq!(before.elapsed(), 2 * SOON);
}

#[tokio::test(start_paused = true)]
async fn a_stop_beyond_its_limit_kills_what_is_left_and_says_so() {
    let stage = Stage::default();
    let [a, b] = stage.puppets(["a", "b"]);
    let b = b.manner(Manner::NeverStops);
    let inner = ChildSpec::supervisor(group("inner", [a.spec(), b.spec().grace(MINUTE)]));
    let tree = Tree::start(boss([inner])).await.unwrap();
    stage.journal.take();
    assert!(!tree.stop(SOON).await);
    assert_eq!(tree.ended().await, End::Stopped);
    assert_eq!(stage.journal.take(), ["stop b", "drop b", "stop a", "drop a"]);
}

#[tokio::test]
async fn children_are_added_and_removed_at_any_level() {
    let stage = Stage::default();
    let [a, b, c] = stage.puppets(["a", "b", "c"]);
    let tree = Tree::start(boss([ChildSpec::supervisor(group("inner", []))])).await.unwrap();
    let inner = tree.branch("inner").unwrap();
    let first = tree.add(a.spec()).await.unwrap();
    inner.add(b.spec()).await.unwrap();
    let failed = inner.add(c.failing(1).spec()).await;
    assert_eq!(failed, Err(AddError::StartFailed("no luck".to_owned())));
    let names: Vec<_> = tree.snapshot().iter().map(|node| (node.depth, node.name)).collect();
    assert_eq!(names, [(0, "boss"), (1, "inner"), (2, "b"), (1, "a")]);
    tree.remove(first).await;
    tree.remove(first).await;
    assert_eq!(stage.journal.take()[3..], ["stop a", "drop a"]);
    assert!(tree.branch("nobody").is_none());
}

#[tokio::test]
async fn a_snapshot_asks_nobody_and_shows_who_waits() {
    let stage = Stage::default();
    let a = stage.puppet("a");
    let tree = Tree::start(boss([a.spec()])).await.unwrap();
    a.tell(Order::Hang).await;
    a.tell(Order::Fail).await;
    let shown = node(&tree, "a");
    assert_eq!((shown.kind, shown.state, shown.mailbox_depth), (NodeKind::Worker, Phase::Running, 2));
    assert_eq!(node(&tree, "boss").kind, NodeKind::Supervisor);
}

#[tokio::test]
async fn a_configuration_that_panics_is_a_start_that_failed() {
    let address: Address<Order> = Address::new("a", 4);
    let start: StartFn = starter::<Puppet>(address, || panic!("no configuration"));
    let error = Tree::start(boss([ChildSpec::worker("a", start)])).await.map(drop).unwrap_err();
    assert_eq!(error.to_string(), "a could not start: it panicked");
}

#[cfg(feature = "faults")]
#[tokio::test(start_paused = true)]
async fn forced_faults_end_in_restarts_with_their_reasons() {
    use warren_actors::runtime::FaultKind;
    let stage = Stage::default();
    let a = stage.puppet("a");
    let tree = Tree::start(boss([ChildSpec::supervisor(group("inner", [a.spec()]))])).await.unwrap();
    let faults = [(FaultKind::Panic, "panic"), (FaultKind::Error, "error"), (FaultKind::Hang, "hung")];
    for (round, (kind, reason)) in faults.into_iter().enumerate() {
        assert!(tree.inject("a", kind));
        stage
            .journal
            .until(|lines| lines.iter().filter(|line| *line == "start a").count() == round + 2)
            .await;
        assert!(a.answers().await);
        assert!(node(&tree, "a").last_reason.unwrap().starts_with(reason));
    }
    assert!(!tree.inject("nobody", FaultKind::Panic));
    assert!(!tree.inject("inner", FaultKind::Panic));
}
