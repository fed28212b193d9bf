//! The real tree: real actors that do as their plans say and write down their lives.

use std::collections::BTreeMap;

use ractor::ActorCell;
use tokio::time::{Instant, sleep, timeout};

use super::{
    Theatre,
    otp::{Ended, Line, Millis, Node, Otp},
    plan::{Blow, BossPlan, Deed, Plan, What, WorkerPlan},
};
use crate::{
    child::{ChildSpec, End, SupervisorSpec},
    tree::{
        NodeInfo, NodeKind, Phase, Tree,
        rules::ChildId,
        tests::{
            Address, Arc, Backoff, Context, Duration, Journal, Mutex, Part, PartError, traps::capturing,
        },
    },
};
use warren_actors::runtime::starter;

/// How long real threads may take for what takes no time. A machine may be busy.
const PATIENCE: Duration = Duration::from_secs(20);
/// More than any stop of a case takes.
const STOP_LIMIT: Duration = Duration::from_secs(600);

/// What a worker is told.
enum Order {
    Fail,
    Panic,
    Hang,
}

/// A worker.
#[derive(Clone)]
struct Worker {
    name: &'static str,
    plan: WorkerPlan,
    unlucky: Arc<Mutex<u32>>,
    diary: Diary,
}

/// Where lives are written down, with the time where time is virtual.
#[derive(Clone)]
struct Diary {
    journal: Journal,
    begin: Instant,
}

/// What one incarnation holds: its drop is the end of it.
struct Held {
    name: &'static str,
    diary: Diary,
}

/// How a worker is reached from outside.
struct Lead {
    address: Address<Order>,
    cells: Arc<Mutex<Vec<ActorCell>>>,
    unlucky: Arc<Mutex<u32>>,
}

/// A tree of real actors.
pub(super) struct RealTree {
    diary: Diary,
    clock: Clock,
    leads: BTreeMap<&'static str, Lead>,
    tree: Option<Tree>,
    ended: Option<Ended>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Clock {
    Virtual,
    Real,
}

impl Diary {
    fn note(&self, what: &str, name: &str) {
        self.journal.note(format!("{} {what} {name}", self.begin.elapsed().as_millis()));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.diary.note("drop", self.name);
    }
}

/// A start that has not come out well.
struct Unfinished<'a>(&'a Worker);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.0.diary.note("failed", self.0.name);
    }
}

impl Part for Worker {
    type Message = Order;
    type State = Held;

    async fn start(&self, _: &Context<Order>) -> Result<Held, PartError> {
        self.diary.note("start", self.name);
        // Also where the start is given up.
        let unfinished = Unfinished(self);
        pause(self.plan.starts_in).await;
        let mut unlucky = self.unlucky.lock().unwrap();
        if *unlucky > 0 {
            *unlucky -= 1;
            return Err("no luck".into());
        }
        std::mem::forget(unfinished);
        Ok(Held { name: self.name, diary: self.diary.clone() })
    }

    async fn handle(&self, _: &Context<Order>, _: &mut Held, order: Order) -> Result<(), PartError> {
        match order {
            Order::Fail => Err("on purpose".into()),
            // As a panic, without its words on the terminal: there are thousands.
            Order::Panic => std::panic::resume_unwind(Box::new("on purpose")),
            Order::Hang => std::future::pending().await,
        }
    }

    async fn stop(&self, held: Held) {
        let Some(takes) = self.plan.ends_in else { return std::future::pending().await };
        self.diary.note("stop", self.name);
        pause(takes).await;
        drop(held);
    }
}

async fn pause(time: Millis) {
    if time > 0 {
        sleep(Duration::from_millis(time)).await;
    }
}

impl RealTree {
    pub(super) async fn start(plan: &BossPlan, clock: Clock) -> Self {
        let diary = Diary { journal: Journal::default(), begin: Instant::now() };
        let mut real = Self { diary, clock, leads: BTreeMap::new(), tree: None, ended: None };
        let spec = real.boss("root", plan);
        match Tree::start(spec).await {
            Ok(tree) => real.tree = Some(tree),
            Err(end) => real.ended = Some(ended_of(&end)),
        }
        real
    }

    fn boss(&mut self, name: &'static str, plan: &BossPlan) -> SupervisorSpec {
        let pause = Duration::from_millis(plan.pause);
        let spec = SupervisorSpec::new(name, plan.max, Duration::from_millis(plan.window))
            .strategy(plan.strategy)
            .auto_shutdown(plan.auto_shutdown)
            .backoff(Backoff::new(pause, pause, 1.0, 0.0));
        plan.children.iter().map(|child| self.child(child)).fold(spec, SupervisorSpec::child)
    }

    fn child(&mut self, plan: &Plan) -> ChildSpec {
        let spec = match &plan.what {
            What::Worker(worker) => self.worker(plan.name, *worker),
            What::Boss(boss) => ChildSpec::supervisor(self.boss(plan.name, boss)),
        };
        let spec = spec.restarted(plan.restart);
        if plan.significant { spec.significant() } else { spec }
    }

    fn worker(&mut self, name: &'static str, plan: WorkerPlan) -> ChildSpec {
        let (address, unlucky) = (Address::new(name, 16), Arc::new(Mutex::new(plan.unlucky)));
        let worker = Worker { name, plan, unlucky: Arc::clone(&unlucky), diary: self.diary.clone() };
        let (start, cells) = capturing(starter(address.clone(), move || worker.clone()));
        self.leads.insert(name, Lead { address, cells, unlucky });
        ChildSpec::worker(name, start).grace(Duration::from_millis(plan.grace))
    }

    fn running(&self) -> &Tree {
        self.tree.as_ref().expect("nothing happens to a tree that did not start")
    }

    fn strike(&self, name: &str, blow: Blow) {
        let lead = &self.leads[name];
        let tell = |order| drop(lead.address.try_send(order));
        let cell = || lead.cells.lock().unwrap().last().cloned().expect("it has started");
        match blow {
            Blow::Fail => tell(Order::Fail),
            Blow::Panic => tell(Order::Panic),
            Blow::Hang => tell(Order::Hang),
            Blow::Exit => cell().stop(None),
            Blow::Kill => cell().kill(),
        }
    }

    async fn add(&mut self, boss: Option<&'static str>, plan: &Plan) {
        let (spec, tree) = (self.child(plan), self.running());
        let outcome = match boss {
            None => tree.add(spec).await,
            Some(boss) => tree.branch(boss).expect("it runs").add(spec).await,
        };
        self.diary.note(if outcome.is_ok() { "added" } else { "refused" }, plan.name);
    }

    async fn remove(&self, boss: Option<&'static str>, id: ChildId) {
        match boss {
            None => self.running().remove(id).await,
            Some(boss) => self.running().branch(boss).expect("it runs").remove(id).await,
        }
    }

    /// Waits until the tree shows what is expected. With real threads it may take a moment; there is nothing
    /// to be told by, and if it never comes the comparison says what is different.
    async fn settle(&mut self, lines: usize, expected: &Otp) {
        let settled = async {
            self.diary.journal.until(|written| written.len() >= lines).await;
            if expected.ended.is_some() {
                self.running().ended().await;
                return;
            }
            while self.nodes() != expected.nodes() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let _ = timeout(PATIENCE, settled).await;
    }

    /// Lets everything come to rest after many ends at once: until `is_calm` says so of what happened and of
    /// what is shown, or the tree has ended.
    pub(super) async fn calm(&mut self, is_calm: impl Fn(&[Line], &[Node]) -> bool) {
        if self.clock == Clock::Virtual {
            // All graces, pauses and questions of a case take less.
            sleep(Duration::from_secs(90)).await;
        }
        let calm = async {
            while self.clock == Clock::Real
                && !self.has_ended()
                && !is_calm(&parse(self.diary.journal.lines()), &self.nodes())
            {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let _ = timeout(PATIENCE, calm).await;
        self.note_end().await;
    }

    fn has_ended(&self) -> bool {
        self.running().snapshot()[0].state == Phase::Stopped
    }

    async fn note_end(&mut self) {
        if self.has_ended() {
            self.ended = Some(ended_of(&self.running().ended().await));
        }
    }
}

impl Theatre for RealTree {
    async fn perform(&mut self, deed: &Deed) {
        match deed {
            Deed::Strike(name, blow) => self.strike(name, *blow),
            Deed::Unlucky(name, times) => *self.leads[name].unlucky.lock().unwrap() = *times,
            Deed::Add(boss, plan) => self.add(*boss, plan).await,
            Deed::Remove(boss, id) => self.remove(*boss, ChildId(*id)).await,
            Deed::Wait(_) => {}
            Deed::Stop => assert!(self.running().stop(STOP_LIMIT).await, "it took too long"),
        }
    }

    async fn reach(&mut self, lines: &[Line], expected: &Otp) {
        if self.tree.is_none() {
            return;
        }
        match self.clock {
            Clock::Virtual => {
                tokio::time::sleep_until(self.diary.begin + Duration::from_millis(expected.now())).await;
            }
            Clock::Real => self.settle(lines.len(), expected).await,
        }
        self.note_end().await;
    }

    fn take_log(&mut self) -> Vec<Line> {
        parse(self.diary.journal.take())
    }

    fn nodes(&self) -> Vec<Node> {
        let Some(tree) = &self.tree else { return Vec::new() };
        let mut nodes = Vec::new();
        // What a supervisor that is down last showed of its children does not matter.
        let mut shown_to = u32::MAX;
        for line in tree.snapshot().into_iter().skip(1).filter(|line| line.depth > 0) {
            if line.depth > shown_to {
                continue;
            }
            let is_open = line.state == Phase::Running || line.kind == NodeKind::Worker;
            shown_to = if is_open { u32::MAX } else { line.depth };
            nodes.push(node(line));
        }
        nodes
    }

    fn ended(&self) -> Option<Ended> {
        self.ended.clone()
    }
}

fn parse(lines: Vec<String>) -> Vec<Line> {
    let parse = |line: String| {
        let (time, words) = line.split_once(' ').unwrap();
        (time.parse().unwrap(), words.to_owned())
    };
    lines.into_iter().map(parse).collect()
}

fn node(line: NodeInfo) -> Node {
    let NodeInfo { depth, name, kind, state, restarts, last_reason, .. } = line;
    let last = last_reason.map(|reason| first_word(&reason).to_owned());
    Node { depth, name, state, restarts, last, is_boss: kind == NodeKind::Supervisor }
}

fn first_word(reason: &str) -> &str {
    reason.split([':', ' ']).next().unwrap_or_default()
}

/// The reason of a spent budget as metrics name it.
pub(super) fn ended_of(end: &End) -> Ended {
    match end {
        End::Stopped => Ended::Stopped,
        End::AutoShutdown => Ended::AutoShutdown,
        End::BudgetSpent { supervisor, child, reason } => {
            let known = ["error", "panic", "hung", "killed", "exit"];
            let reason = known.into_iter().find(|label| *label == first_word(reason)).unwrap_or("?");
            Ended::BudgetSpent { supervisor, child, reason }
        }
        End::StartFailed { child, .. } => Ended::StartFailed { child },
        End::Unkillable { .. } | End::Crashed => panic!("the tree ended because {end}"),
    }
}
