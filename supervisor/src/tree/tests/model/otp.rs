//! A model of supervision, written from what the documentation of OTP's `supervisor` says and from nothing
//! else, as simply as it can be said: a supervisor deals with one thing after the other, and waits for what
//! it has begun.
//!
//! | OTP says | Here |
//! |---|---|
//! | children start in order, each when the one before has started; one that cannot ends the start | [`Boss::open`] |
//! | they end in reverse order, each within its `shutdown` time, and are then killed | [`Boss::close`], [`stop`] |
//! | what an end means: permanent, transient, temporary | [`Boss::bury`] |
//! | who is restarted with whom: one_for_one, rest_for_one, one_for_all; never a temporary sibling | [`Boss::restart`] |
//! | more than `intensity` restarts within `period` end the supervisor, its children first | [`Boss::restart`] |
//! | a restart that fails is one more restart | [`Boss::come_back`] |
//! | `significant` children and `auto_shutdown` | [`Boss::bury`] |
//!
//! Where the tree departs from OTP on purpose, so does the model:
//!
//! * *Pauses*: a restart begins when the pause of the supervisor has passed since the end, not at once. Siblings
//!   that go down with the child do so at once; all of them come back after the pause.
//! * *Liveness*: a worker that does not read its mailbox is asked every 5 s, and killed after the second
//!   question without an answer within 2 s. OTP leaves that to others.
//! * *Giving up is a failure*: a supervisor whose budget is spent ends with an error. In OTP it ends with
//!   `shutdown`, which a transient place in its own supervisor takes for an orderly end, so that the escalation
//!   stops there without a word.
//! * *A supervisor's shutdown time* is as long as its children need, as OTP recommends with `infinity`.
//! * *Nobody waits needlessly*: what happens while a supervisor still waits for something else is dealt with
//!   at once, where OTP lets it queue. The model says [`Unclear`] then, and those steps are left to the laws
//!   that the test of many ends at once checks.

use std::collections::BTreeMap;

use super::plan::{Blow, BossPlan, Deed, Plan, What};
use crate::{
    child::{AutoShutdown, Restart, Strategy},
    tree::Phase,
};

/// Since the begin of the case.
pub(super) type Millis = u64;

/// How often a worker is asked whether it is alive.
const ASKED_EVERY: Millis = 5_000;
/// How long it may take to answer; the second silence is one too many.
const ANSWERS_WITHIN: Millis = 2_000;
/// How long nothing else may happen after a step, so that it is clear what comes first.
const REST: Millis = 1;

/// Two things happen at once, or one while a supervisor is busy with another: the order is not determined.
#[derive(Debug)]
pub(super) struct Unclear;

/// Why a supervisor ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    Stopped,
    AutoShutdown,
    BudgetSpent { supervisor: &'static str, child: &'static str, reason: &'static str },
    StartFailed { child: &'static str },
}

/// A line of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) depth: u32,
    pub(super) name: &'static str,
    pub(super) state: Phase,
    pub(super) restarts: u64,
    pub(super) last: Option<String>,
    pub(super) is_boss: bool,
}

/// What happened when.
pub(super) type Line = (Millis, String);

/// The model of one tree.
#[derive(Clone)]
pub(super) struct Otp {
    root: Boss,
    world: World,
    pub(super) ended: Option<Ended>,
}

#[derive(Clone, Default)]
struct World {
    now: Millis,
    log: Vec<Line>,
    unlucky: BTreeMap<&'static str, u32>,
    /// Something was to happen by itself while a supervisor was busy with something else.
    is_unclear: bool,
}

#[derive(Clone)]
struct Boss {
    name: &'static str,
    plan: BossPlan,
    children: Vec<Child>,
    last_id: u64,
    last_group: u64,
    /// When children were restarted.
    restarts: Vec<Millis>,
}

#[derive(Clone)]
struct Child {
    id: u64,
    plan: Plan,
    life: Life,
    /// Its own children, if it supervises.
    boss: Option<Boss>,
    /// Whether it ever ran.
    proven: bool,
    restarts: u64,
    last: Option<&'static str>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Down,
    Up { since: Millis, found_hung: Option<Millis> },
    Waiting { until: Millis, group: u64 },
}

/// What happens to the child at the end of a path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Blow(Blow),
    /// What was to happen at this time.
    Due,
}

impl Otp {
    /// The tree has started, or could not.
    pub(super) fn start(plan: &BossPlan) -> Result<Self, Unclear> {
        let mut model = Self { root: Boss::new("root", plan.clone()), world: World::default(), ended: None };
        model.world.take_in(&plan.children);
        if let Err(child) = model.root.open(&mut model.world) {
            model.ended = Some(Ended::StartFailed { child });
        }
        model.rest(0)?;
        Ok(model)
    }

    /// Does it, and lets everything come to rest.
    pub(super) fn perform(&mut self, deed: &Deed) -> Result<(), Unclear> {
        let mut until = 0;
        match deed {
            Deed::Strike(name, Blow::Hang) => self.hang(name)?,
            Deed::Strike(name, blow) => {
                let path = self.root.path_to(name).expect("it was chosen");
                self.happen(&path, Event::Blow(*blow));
            }
            Deed::Unlucky(name, times) => drop(self.world.unlucky.insert(name, *times)),
            Deed::Add(boss, plan) => {
                self.world.take_in(std::slice::from_ref(plan));
                let boss = self.root.find(*boss).expect("it was chosen");
                let is_up = boss.add(plan.clone(), &mut self.world);
                self.world.note(if is_up { "added" } else { "refused" }, plan.name);
            }
            Deed::Remove(boss, id) => {
                self.root.find(*boss).expect("it was chosen").remove(*id, &mut self.world);
            }
            Deed::Wait(time) => until = self.world.now + time,
            Deed::Stop => self.ended = Some(self.root.close(Ended::Stopped, &mut self.world)),
        }
        self.rest(until)
    }

    pub(super) fn now(&self) -> Millis {
        self.world.now
    }

    pub(super) fn take_log(&mut self) -> Vec<Line> {
        std::mem::take(&mut self.world.log)
    }

    /// Every supervisor and worker that has a place, but nobody below a supervisor that is down.
    pub(super) fn nodes(&self) -> Vec<Node> {
        let mut nodes = Vec::new();
        self.root.show(1, &mut nodes);
        nodes
    }

    /// Those that this can happen to.
    pub(super) fn strikable(&self, blow: Blow) -> Vec<&'static str> {
        let mut found = Vec::new();
        self.root.each(&mut |child| {
            let (What::Worker(plan), Life::Up { found_hung, .. }) = (&child.plan.what, child.life) else {
                return;
            };
            let can = match blow {
                Blow::Kill => true,
                Blow::Fail | Blow::Panic | Blow::Hang => found_hung.is_none(),
                // One that never finishes its end is hung, and that is another blow.
                Blow::Exit => found_hung.is_none() && plan.ends_in.is_some(),
            };
            if can {
                found.push(child.plan.name);
            }
        });
        found
    }

    /// How often anybody who is there was started again.
    pub(super) fn restarts(&self) -> u64 {
        self.nodes().iter().map(|node| node.restarts).sum()
    }

    /// Workers that have a place.
    pub(super) fn workers(&self) -> Vec<&'static str> {
        let mut found = Vec::new();
        self.root.each(&mut |child| {
            if matches!(child.plan.what, What::Worker(_)) {
                found.push(child.plan.name);
            }
        });
        found
    }

    /// Supervisors that run; the root has no name.
    pub(super) fn bosses(&self) -> Vec<(Option<&'static str>, AutoShutdown)> {
        let mut found = vec![(None, self.root.plan.auto_shutdown)];
        self.root.each(&mut |child| {
            if let Some(boss) = &child.boss {
                found.push((Some(child.plan.name), boss.plan.auto_shutdown));
            }
        });
        found
    }

    /// Children of supervisors that run.
    pub(super) fn removable(&self) -> Vec<(Option<&'static str>, u64)> {
        let mut found: Vec<_> = self.root.children.iter().map(|child| (None, child.id)).collect();
        self.root.each(&mut |child| {
            let below = child.boss.iter().flat_map(|boss| &boss.children);
            found.extend(below.map(|below| (Some(child.plan.name), below.id)));
        });
        found
    }

    fn happen(&mut self, path: &[usize], event: Event) {
        self.ended = self.root.happen(path, event, &mut self.world);
    }

    fn hang(&mut self, name: &str) -> Result<(), Unclear> {
        let path = self.root.path_to(name).expect("it was chosen");
        let now = self.world.now;
        let Life::Up { since, found_hung } = &mut self.root.at(&path).life else { return Err(Unclear) };
        *found_hung = Some(found_hung_at(*since, now)?);
        Ok(())
    }

    /// Lets time pass until then and until everything is at rest.
    fn rest(&mut self, until: Millis) -> Result<(), Unclear> {
        let mut until = until.max(self.world.now + REST);
        while self.ended.is_none() {
            self.world.is_clear()?;
            self.root.is_clear(self.world.now)?;
            let Some((due, path)) = self.root.next_due() else { break };
            if due == until {
                return Err(Unclear);
            }
            if due > until {
                break;
            }
            self.world.now = due;
            self.happen(&path, Event::Due);
            until = until.max(self.world.now + REST);
        }
        self.world.now = until;
        self.world.is_clear()
    }
}

/// When a worker is killed that was asked from `since` on and hangs from `now` on.
pub(super) fn found_hung_at(since: Millis, now: Millis) -> Result<Millis, Unclear> {
    if (now - since).is_multiple_of(ASKED_EVERY) {
        return Err(Unclear);
    }
    let first_question = since + (now - since).next_multiple_of(ASKED_EVERY);
    Ok(first_question + ASKED_EVERY + ANSWERS_WITHIN)
}

impl World {
    fn is_clear(&self) -> Result<(), Unclear> {
        if self.is_unclear { Err(Unclear) } else { Ok(()) }
    }

    fn note(&mut self, what: &str, name: &str) {
        self.log.push((self.now, format!("{what} {name}")));
    }

    fn take_in(&mut self, plans: &[Plan]) {
        for plan in plans {
            match &plan.what {
                What::Worker(worker) => drop(self.unlucky.insert(plan.name, worker.unlucky)),
                What::Boss(boss) => self.take_in(&boss.children),
            }
        }
    }

    fn is_unlucky(&mut self, name: &str) -> bool {
        let Some(left) = self.unlucky.get_mut(name).filter(|left| **left > 0) else { return false };
        *left -= 1;
        self.note("failed", name);
        true
    }
}

impl Boss {
    fn new(name: &'static str, plan: BossPlan) -> Self {
        let mut boss =
            Self { name, plan, children: Vec::new(), last_id: 0, last_group: 0, restarts: Vec::new() };
        boss.plan.children.clone().into_iter().for_each(|child| boss.enter(child));
        boss
    }

    fn enter(&mut self, plan: Plan) {
        self.last_id += 1;
        let (id, life) = (self.last_id, Life::Down);
        self.children.push(Child { id, plan, life, boss: None, proven: false, restarts: 0, last: None });
    }

    /// Starts the first children, or says which could not start.
    fn open(&mut self, world: &mut World) -> Result<(), &'static str> {
        for place in 0..self.children.len() {
            if !start(&mut self.children[place], world) {
                let child = self.children[place].plan.name;
                self.close(Ended::StartFailed { child }, world);
                return Err(child);
            }
        }
        Ok(())
    }

    /// Ends the children and then itself.
    fn close(&mut self, end: Ended, world: &mut World) -> Ended {
        self.children.iter_mut().rev().for_each(|child| stop(child, world));
        end
    }

    fn add(&mut self, plan: Plan, world: &mut World) -> bool {
        self.enter(plan);
        let is_up = self.children.last_mut().is_some_and(|child| start(child, world));
        if !is_up {
            self.children.pop();
        }
        is_up
    }

    fn remove(&mut self, id: u64, world: &mut World) {
        let place = self.children.iter().position(|child| child.id == id).expect("it was chosen");
        stop(&mut self.children[place], world);
        self.children.remove(place);
    }

    /// Something happens to somebody below; says whether it ends this supervisor.
    fn happen(&mut self, path: &[usize], event: Event, world: &mut World) -> Option<Ended> {
        let (place, below) = path.split_first()?;
        let child = &mut self.children[*place];
        if !below.is_empty() {
            let end = child.boss.as_mut()?.happen(below, event, world)?;
            child.boss = None;
            return self.bury(*place, exit_of(&end), world);
        }
        let exit = match (event, child.life) {
            (Event::Due, Life::Waiting { group, .. }) => return self.come_back(group, world),
            (Event::Due, Life::Up { .. } | Life::Down) => "hung",
            (Event::Blow(Blow::Fail), _) => "error",
            (Event::Blow(Blow::Panic), _) => "panic",
            (Event::Blow(Blow::Kill | Blow::Hang), _) => "killed",
            (Event::Blow(Blow::Exit), _) => {
                world.note("stop", child.plan.name);
                world.now += ends_in(&child.plan).unwrap_or(0);
                "exit"
            }
        };
        world.note("drop", child.plan.name);
        self.bury(*place, exit, world)
    }

    /// A child has ended by itself.
    fn bury(&mut self, place: usize, exit: &'static str, world: &mut World) -> Option<Ended> {
        let child = &mut self.children[place];
        (child.life, child.last) = (Life::Down, Some(exit));
        let (restart, significant) = (child.plan.restart, child.plan.significant);
        let is_over = match restart {
            Restart::Permanent => false,
            Restart::Transient => exit == "exit",
            Restart::Temporary => true,
        };
        if !is_over {
            return self.restart(place, exit, world);
        }
        if restart == Restart::Temporary {
            self.children.remove(place);
        }
        let others = self.children.iter().any(|child| child.plan.significant && child.life != Life::Down);
        let is_due = significant
            && match self.plan.auto_shutdown {
                AutoShutdown::Never => false,
                AutoShutdown::AnySignificant => true,
                AutoShutdown::AllSignificant => !others,
            };
        is_due.then(|| self.close(Ended::AutoShutdown, world))
    }

    /// A child is to be restarted, and whom the strategy says with it.
    fn restart(&mut self, place: usize, reason: &'static str, world: &mut World) -> Option<Ended> {
        let (now, window) = (world.now, self.plan.window);
        self.children[place].last = Some(reason);
        self.restarts.retain(|at| now - at <= window);
        if self.restarts.len() >= self.plan.max {
            let (supervisor, child) = (self.name, self.children[place].plan.name);
            return Some(self.close(Ended::BudgetSpent { supervisor, child, reason }, world));
        }
        self.restarts.push(now);
        let cause = self.children[place].id;
        let with_it = match self.plan.strategy {
            Strategy::OneForOne => place..place + 1,
            Strategy::RestForOne => place..self.children.len(),
            Strategy::OneForAll => 0..self.children.len(),
        };
        self.last_group += 1;
        for sibling in self.children[with_it].iter_mut().rev() {
            stop(sibling, world);
            sibling.life = Life::Waiting { until: now + self.plan.pause, group: self.last_group };
        }
        let group = self.last_group;
        let is_gone = |child: &Child| {
            child.plan.restart == Restart::Temporary && child.id != cause && child.is_in(group)
        };
        self.children.retain(|child| !is_gone(child));
        if now + self.plan.pause > world.now { None } else { self.come_back(group, world) }
    }

    /// Those that went down together start again, in order.
    fn come_back(&mut self, group: u64, world: &mut World) -> Option<Ended> {
        for child in self.children.iter_mut().filter(|child| child.is_in(group)) {
            // It no longer waits for the time, only for its siblings.
            child.life = Life::Waiting { until: Millis::MAX, group };
        }
        for place in 0..self.children.len() {
            if self.children[place].is_in(group) && !start(&mut self.children[place], world) {
                return self.restart(place, "error", world);
            }
        }
        None
    }

    /// The next thing that happens by itself, and to whom.
    fn next_due(&self) -> Option<(Millis, Vec<usize>)> {
        self.dues().into_iter().min()
    }

    /// Nothing happens at the same time as something else, or should have happened by now.
    fn is_clear(&self, now: Millis) -> Result<(), Unclear> {
        let mut dues: Vec<Millis> = self.dues().into_iter().map(|(due, _)| due).collect();
        dues.sort_unstable();
        let is_clear =
            dues.first().is_none_or(|due| *due > now) && dues.windows(2).all(|pair| pair[0] != pair[1]);
        if is_clear { Ok(()) } else { Err(Unclear) }
    }

    /// What happens by itself; once for those who come back together.
    fn dues(&self) -> Vec<(Millis, Vec<usize>)> {
        let (mut dues, mut groups) = (Vec::new(), Vec::new());
        for (place, child) in self.children.iter().enumerate() {
            match child.life {
                Life::Waiting { until, group } if !groups.contains(&group) => {
                    groups.push(group);
                    dues.push((until, vec![place]));
                }
                Life::Up { found_hung: Some(at), .. } => dues.push((at, vec![place])),
                Life::Waiting { .. } | Life::Up { .. } | Life::Down => {}
            }
            for (due, path) in child.boss.iter().flat_map(Self::dues) {
                dues.push((due, [vec![place], path].concat()));
            }
        }
        dues
    }

    fn each<'a>(&'a self, look: &mut impl FnMut(&'a Child)) {
        for child in &self.children {
            look(child);
            if let Some(boss) = &child.boss {
                boss.each(look);
            }
        }
    }

    fn path_to(&self, name: &str) -> Option<Vec<usize>> {
        self.children.iter().enumerate().find_map(|(place, child)| {
            if child.plan.name == name {
                return Some(vec![place]);
            }
            let below = child.boss.as_ref()?.path_to(name)?;
            Some([vec![place], below].concat())
        })
    }

    fn at(&mut self, path: &[usize]) -> &mut Child {
        let (place, below) = path.split_first().expect("paths lead somewhere");
        let child = &mut self.children[*place];
        if below.is_empty() { child } else { child.boss.as_mut().expect("it has children").at(below) }
    }

    fn find(&mut self, name: Option<&'static str>) -> Option<&mut Self> {
        let Some(name) = name else { return Some(self) };
        let path = self.path_to(name)?;
        self.at(&path).boss.as_mut()
    }

    fn show(&self, depth: u32, nodes: &mut Vec<Node>) {
        for child in &self.children {
            let state = match child.life {
                Life::Up { .. } => Phase::Running,
                Life::Waiting { .. } => Phase::Restarting,
                Life::Down => Phase::Stopped,
            };
            let (name, restarts) = (child.plan.name, child.restarts);
            let (last, is_boss) = (child.last.map(str::to_owned), matches!(child.plan.what, What::Boss(_)));
            nodes.push(Node { depth, name, state, restarts, last, is_boss });
            if let Some(boss) = &child.boss {
                boss.show(depth + 1, nodes);
            }
        }
    }
}

impl Child {
    fn is_in(&self, wanted: u64) -> bool {
        matches!(self.life, Life::Waiting { group, .. } if group == wanted)
    }
}

/// Starts a child; says whether it runs. Nothing is left of one that does not.
fn start(child: &mut Child, world: &mut World) -> bool {
    child.restarts += u64::from(child.proven);
    let name = child.plan.name;
    let is_up = match &child.plan.what {
        What::Worker(plan) => {
            world.note("start", name);
            world.now += plan.starts_in;
            !world.is_unlucky(name)
        }
        What::Boss(plan) => {
            let mut boss = Boss::new(name, plan.clone());
            let is_up = boss.open(world).is_ok();
            child.boss = is_up.then_some(boss);
            is_up
        }
    };
    if is_up {
        (child.life, child.proven) = (Life::Up { since: world.now, found_hung: None }, true);
    }
    is_up
}

/// Stops a child, if it runs: in order if it can within its grace.
fn stop(child: &mut Child, world: &mut World) {
    let is_late = |due: Millis| due <= world.now;
    let Life::Up { found_hung, .. } = child.life else {
        world.is_unclear |= matches!(child.life, Life::Waiting { until, .. } if is_late(until));
        child.life = Life::Down;
        return;
    };
    let below_is_late =
        child.boss.as_ref().is_some_and(|boss| boss.dues().iter().any(|(due, _)| is_late(*due)));
    world.is_unclear |= found_hung.is_some_and(is_late) || below_is_late;
    child.life = Life::Down;
    child.last = Some("exit");
    if let Some(mut boss) = child.boss.take() {
        boss.close(Ended::Stopped, world);
        return;
    }
    let What::Worker(plan) = &child.plan.what else { return };
    // One that never ends says nothing either: with real threads it may be killed before it could.
    if found_hung.is_none() && plan.ends_in.is_some() {
        world.note("stop", child.plan.name);
    }
    let takes = plan.ends_in.filter(|takes| found_hung.is_none() && *takes < plan.grace);
    if takes.is_none() {
        child.last = Some("killed");
    }
    world.now += takes.unwrap_or(plan.grace);
    world.note("drop", child.plan.name);
}

fn ends_in(plan: &Plan) -> Option<Millis> {
    match &plan.what {
        What::Worker(worker) => worker.ends_in,
        What::Boss(_) => None,
    }
}

fn exit_of(end: &Ended) -> &'static str {
    match end {
        Ended::Stopped | Ended::AutoShutdown => "exit",
        Ended::BudgetSpent { .. } | Ended::StartFailed { .. } => "error",
    }
}
