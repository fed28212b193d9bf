//! Each trap of ractor that was once measured, and that the tree does not step into it.

use std::{
    net::UdpSocket,
    sync::atomic::{AtomicBool, Ordering},
};

use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;
use warren_actors::runtime::{Hooks, Running, TrySendError};

use super::*;

/// A start that also hands out the actors it started.
pub(super) fn capturing(start: StartFn) -> (StartFn, Arc<Mutex<Vec<ActorCell>>>) {
    let cells = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&cells);
    let capture: StartFn = Arc::new(move |supervisor| {
        let (started, seen) = (start(supervisor), Arc::clone(&seen));
        Box::pin(async move {
            let running = started.await?;
            seen.lock().unwrap().push(running.cell.clone());
            Ok(running)
        })
    });
    (capture, cells)
}

pub(super) fn captured(actor: &Role) -> (ChildSpec, Arc<Mutex<Vec<ActorCell>>>) {
    let puppet = actor.puppet.clone();
    let (start, cells) = capturing(starter(actor.address.clone(), move || puppet.clone()));
    (ChildSpec::worker(actor.address.name(), start), cells)
}

#[tokio::test]
async fn mailboxes_are_unbounded_in_ractor_but_credits_bound_ours() {
    let stage = Stage::default();
    let a = stage.puppet("a");
    let tree = Tree::start(boss([a.spec()])).await.unwrap();
    a.tell(Order::Hang).await;
    let accepted = (0..1000).filter(|_| a.address.try_send(Order::Fail).is_ok()).count();
    assert_eq!(accepted, 15);
    assert!(matches!(a.address.try_send(Order::Fail), Err(TrySendError::Full(Order::Fail))));
    assert_eq!(node(&tree, "a").mailbox_depth, 16);
}

/// A part whose state holds a port, and takes its time to let go of it.
struct PortHolder {
    port: u16,
}

struct Port {
    _socket: UdpSocket,
    _slow: Slow,
}

/// Dropped before the socket is: fields drop in order, and this one blocks.
struct Slow;

impl Drop for Slow {
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
    }
}

impl Part for PortHolder {
    type Message = Order;
    type State = (Slow, Port);

    async fn start(&self, _: &Context<Order>) -> Result<Self::State, PartError> {
        Ok((Slow, Port { _socket: UdpSocket::bind(("127.0.0.1", self.port))?, _slow: Slow }))
    }

    async fn handle(&self, _: &Context<Order>, _: &mut Self::State, order: Order) -> Result<(), PartError> {
        match order {
            Order::Panic => panic!("on purpose"),
            Order::Echo(number, reply) => drop(reply.send(number)),
            Order::Fail | Order::Hang | Order::Block(_) | Order::Sleep(_) => {}
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_is_reported_before_the_state_has_dropped_but_the_successor_finds_the_port_free() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = Address::new("port", 4);
    let tree = Tree::start(boss([ChildSpec::part(&address, move || PortHolder { port })])).await.unwrap();
    for round in 1..=3 {
        address.send(Order::Panic).await.unwrap();
        let wait = async {
            while node(&tree, "port").restarts < round || node(&tree, "port").state != Phase::Running {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(MINUTE, wait).await.unwrap();
        assert_eq!(node(&tree, "port").last_reason.as_deref(), Some("panic: on purpose"));
    }
}

/// An actor of ractor's own kind, whose state is a claim that only one may have.
struct Claimant(Arc<AtomicBool>);

struct Claim(Arc<AtomicBool>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Actor for Claimant {
    type Msg = ();
    type State = Claim;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<Claim, ActorProcessingErr> {
        if self.0.swap(true, Ordering::SeqCst) {
            return Err("the predecessor's state still exists".into());
        }
        Ok(Claim(Arc::clone(&self.0)))
    }
}

struct NoHooks;

impl Hooks for NoHooks {
    fn probe(&self) -> oneshot::Receiver<()> {
        let (alive, answer) = oneshot::channel();
        let _ = alive.send(());
        answer
    }

    fn handled(&self) -> u64 {
        0
    }

    fn depth(&self) -> usize {
        0
    }

    #[cfg(feature = "faults")]
    fn inject(&self, _: warren_actors::runtime::FaultKind) {}
}

#[tokio::test]
async fn after_a_clean_exit_the_state_rides_inside_the_event_but_is_gone_before_the_successor_starts() {
    let claimed = Arc::new(AtomicBool::new(false));
    let start: StartFn = Arc::new(move |supervisor| {
        let claimant = Claimant(Arc::clone(&claimed));
        Box::pin(async move {
            let (actor, join) = Actor::spawn_linked(None, claimant, (), supervisor).await?;
            Ok(Running { cell: actor.get_cell(), join, hooks: Arc::new(NoHooks) })
        })
    });
    let (start, cells) = capturing(start);
    let tree = Tree::start(boss([ChildSpec::worker("claimant", start)])).await.unwrap();
    for round in 1..=3 {
        let cell = cells.lock().unwrap().last().unwrap().clone();
        cell.stop(None);
        let wait = async {
            while cells.lock().unwrap().len() <= round {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(MINUTE, wait).await.unwrap();
    }
    assert_eq!(node(&tree, "claimant").last_reason.as_deref(), Some("exit"));
}

#[tokio::test]
async fn a_stopping_parent_kills_its_children_in_ractor_but_ours_are_stopped_in_reverse_with_post_stop() {
    let stage = Stage::default();
    let [a, b, c] = stage.puppets(["a", "b", "c"]);
    let inner = ChildSpec::supervisor(group("inner", [a.spec(), b.spec(), c.spec()]));
    let tree = Tree::start(boss([])).await.unwrap();
    let id = tree.add(inner).await.unwrap();
    stage.journal.take();
    tree.remove(id).await;
    assert_eq!(stage.journal.take(), ["stop c", "drop c", "stop b", "drop b", "stop a", "drop a"]);
}

#[tokio::test]
async fn a_killed_child_looks_as_if_it_had_ended_by_itself_but_is_restarted() {
    let stage = Stage::default();
    let a = stage.puppet("a");
    let (spec, cells) = captured(&a);
    let tree = Tree::start(boss([spec.restarted(Restart::Transient)])).await.unwrap();
    stage.journal.take();
    cells.lock().unwrap()[0].kill();
    assert_eq!(stage.journal.take_when(2).await, ["drop a", "start a"]);
    assert!(a.answers().await);
    assert_eq!(node(&tree, "a").last_reason.as_deref(), Some("killed"));
}

#[tokio::test]
async fn names_are_global_in_ractor_so_no_actor_of_ours_has_one() {
    let stage = Stage::default();
    let start = || async {
        let (spec, cells) = captured(&stage.puppet("same name"));
        (Tree::start(boss([spec])).await.unwrap(), cells)
    };
    let (first, second) = (start().await, start().await);
    for cells in [&first.1, &second.1] {
        assert_eq!(cells.lock().unwrap()[0].get_name(), None);
    }
}

#[tokio::test]
async fn post_stop_does_not_run_after_a_kill_or_a_panic_but_drop_does() {
    let stage = Stage::default();
    let a = stage.puppet("a");
    let (spec, cells) = captured(&a);
    let _tree = Tree::start(boss([spec])).await.unwrap();
    stage.journal.take();
    cells.lock().unwrap()[0].kill();
    assert_eq!(stage.journal.take_when(2).await, ["drop a", "start a"]);
    assert!(a.answers().await);
    a.tell(Order::Panic).await;
    assert_eq!(stage.journal.take_when(2).await, ["drop a", "start a"]);
}

#[tokio::test(start_paused = true)]
async fn a_call_has_no_deadline_in_ractor_but_a_question_of_ours_has() {
    let stage = Stage::default();
    let a = stage.puppet("a");
    let _tree = Tree::start(boss([a.spec()])).await.unwrap();
    a.tell(Order::Hang).await;
    let answer = a.address.ask(Duration::from_secs(1), |reply| Order::Echo(1, reply)).await;
    assert_eq!(answer, Err(warren_actors::runtime::AskError::Deadline("a")));
}
