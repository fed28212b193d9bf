//! The rules alone, in a world where workers do exactly as their plans say: no actor, no runtime.

use std::collections::BTreeMap;

use super::{
    Theatre,
    otp::{Ended, Line, Millis, Node, Otp, found_hung_at},
    plan::{Blow, BossPlan, Deed, Plan, What, WorkerPlan},
    real::ended_of,
};
use crate::{
    child::{ChildSpec, Exit, How, SupervisorSpec},
    tree::{
        rules::{ChildId, Effect, Rules},
        tests::{Arc, Backoff, Duration},
    },
};
use std::time::Instant;

/// One supervisor's rules and its workers on paper.
pub(super) struct Paper {
    rules: Rules,
    begin: Instant,
    now: Millis,
    log: Vec<Line>,
    workers: BTreeMap<ChildId, Worker>,
    /// What will happen when, in the order it was decided.
    to_come: Vec<(Millis, ChildId, Coming)>,
    ended: Option<Ended>,
}

struct Worker {
    name: &'static str,
    plan: WorkerPlan,
    unlucky: u32,
    up_since: Option<Millis>,
    is_hanging: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Coming {
    Started,
    Failed,
    Gone(Exit),
    FoundHung,
}

impl Paper {
    pub(super) fn start(plan: &BossPlan) -> Self {
        let pause = Duration::from_millis(plan.pause);
        let spec = SupervisorSpec::new("root", plan.max, Duration::from_millis(plan.window))
            .strategy(plan.strategy)
            .auto_shutdown(plan.auto_shutdown)
            .backoff(Backoff::new(pause, pause, 1.0, 0.0));
        let spec = plan.children.iter().map(child).fold(spec, SupervisorSpec::child);
        let (rules, ids) = Rules::new(&spec);
        let workers = ids.into_iter().zip(plan.children.iter().map(Worker::new)).collect();
        let (log, to_come) = (Vec::new(), Vec::new());
        let mut paper = Self { rules, begin: Instant::now(), now: 0, log, workers, to_come, ended: None };
        paper.rules.handle_begin(paper.begin);
        paper.obey();
        paper
    }

    fn time(&self) -> Instant {
        self.begin + Duration::from_millis(self.now)
    }

    fn note(&mut self, what: &str, id: ChildId) {
        let name = self.workers[&id].name;
        self.log.push((self.now, format!("{what} {name}")));
    }

    fn id(&self, name: &str) -> ChildId {
        *self.workers.iter().find(|(_, worker)| worker.name == name).expect("it has a place").0
    }

    fn strike(&mut self, id: ChildId, blow: Blow) {
        let (now, worker) = (self.now, self.workers.get_mut(&id).expect("it has a place"));
        match blow {
            Blow::Fail => self.gone(id, Exit::abnormal(How::Error, "on purpose")),
            Blow::Panic => self.gone(id, Exit::abnormal(How::Panic, "on purpose")),
            Blow::Kill => self.gone(id, Exit::abnormal(How::Killed, "")),
            Blow::Exit => {
                let takes = worker.plan.ends_in.unwrap_or_default();
                self.note("stop", id);
                self.to_come.push((now + takes, id, Coming::Gone(Exit::Normal)));
            }
            Blow::Hang => {
                worker.is_hanging = true;
                let found = found_hung_at(worker.up_since.expect("it runs"), now).expect("it is clear");
                self.to_come.push((found, id, Coming::FoundHung));
            }
        }
    }

    fn gone(&mut self, id: ChildId, exit: Exit) {
        self.note("drop", id);
        self.to_come.retain(|(_, other, _)| *other != id);
        let worker = self.workers.get_mut(&id).expect("it has a place");
        (worker.up_since, worker.is_hanging) = (None, false);
        self.rules.handle_exit(id, exit, self.time());
        self.rules.handle_gone(id, self.time(), 0.0);
    }

    fn obey(&mut self) {
        loop {
            let effects = self.rules.poll_effects();
            if effects.is_empty() {
                return;
            }
            effects.into_iter().for_each(|effect| self.carry_out(effect));
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Start(id) => {
                self.note("start", id);
                let worker = self.workers.get_mut(&id).expect("it has a place");
                let fails = worker.unlucky > 0;
                worker.unlucky = worker.unlucky.saturating_sub(1);
                let outcome = if fails { Coming::Failed } else { Coming::Started };
                self.to_come.push((self.now + worker.plan.starts_in, id, outcome));
            }
            Effect::Stop(id) => self.stop(id),
            Effect::Kill(id) => self.gone(id, Exit::abnormal(How::Killed, "")),
            Effect::Added(id, outcome) => self.note(if outcome.is_ok() { "added" } else { "refused" }, id),
            Effect::Forget(id) => drop(self.workers.remove(&id)),
            Effect::End(end) => self.ended = Some(ended_of(&end)),
            Effect::Cancel(id) => panic!("{id:?} is given up, but no step of a case comes during a start"),
            Effect::Restarting(..) | Effect::Ready => {}
        }
    }

    fn stop(&mut self, id: ChildId) {
        let worker = &self.workers[&id];
        if worker.is_hanging {
            return;
        }
        let ends_in = worker.plan.ends_in;
        if let Some(takes) = ends_in {
            self.note("stop", id);
            self.to_come.push((self.now + takes, id, Coming::Gone(Exit::Normal)));
        }
    }

    /// The next thing that happens no later than this does.
    fn next(&mut self, until: Millis) -> bool {
        let due = self.rules.poll_timeout().map(|at| at.duration_since(self.begin).as_millis() as Millis);
        let first = self.to_come.iter().enumerate().min_by_key(|(place, (at, ..))| (*at, *place));
        let first = first.map(|(place, (at, ..))| (*at, place));
        match (first, due) {
            (Some((at, place)), due) if at <= until && due.is_none_or(|due| at <= due) => {
                self.now = at;
                let (_, id, coming) = self.to_come.remove(place);
                self.happen(id, coming);
            }
            (_, Some(due)) if due <= until => {
                self.now = due;
                self.rules.handle_timeout(self.time());
            }
            _ => return false,
        }
        self.obey();
        true
    }

    fn happen(&mut self, id: ChildId, coming: Coming) {
        let time = self.time();
        match coming {
            Coming::Started => {
                self.workers.get_mut(&id).expect("it has a place").up_since = Some(self.now);
                self.rules.handle_started(id, time);
            }
            Coming::Failed => {
                self.note("failed", id);
                self.rules.handle_start_failed(id, "no luck".to_owned(), time, 0.0);
            }
            Coming::Gone(exit) => self.gone(id, exit),
            Coming::FoundHung => self.rules.handle_hung(id, time),
        }
    }
}

impl Worker {
    fn new(plan: &Plan) -> Self {
        let What::Worker(worker) = plan.what else { panic!("these cases have one supervisor") };
        Self { name: plan.name, plan: worker, unlucky: worker.unlucky, up_since: None, is_hanging: false }
    }
}

fn child(plan: &Plan) -> ChildSpec {
    let What::Worker(worker) = plan.what else { panic!("these cases have one supervisor") };
    let never = Arc::new(|_| -> std::pin::Pin<Box<dyn Future<Output = _> + Send>> {
        Box::pin(std::future::pending())
    });
    let spec = ChildSpec::worker(plan.name, never).restarted(plan.restart);
    let spec = spec.grace(Duration::from_millis(worker.grace));
    if plan.significant { spec.significant() } else { spec }
}

impl Theatre for Paper {
    async fn perform(&mut self, deed: &Deed) {
        let time = self.time();
        match deed {
            Deed::Strike(name, blow) => self.strike(self.id(name), *blow),
            Deed::Unlucky(name, times) => {
                let id = self.id(name);
                self.workers.get_mut(&id).expect("it has a place").unlucky = *times;
            }
            Deed::Add(_, plan) => {
                let id = self.rules.handle_add(&child(plan), time);
                self.workers.insert(id, Worker::new(plan));
            }
            Deed::Remove(_, id) => self.rules.handle_remove(ChildId(*id), time),
            Deed::Wait(_) => {}
            Deed::Stop => self.rules.handle_stop(time),
        }
        self.obey();
    }

    async fn reach(&mut self, _: &[Line], expected: &Otp) {
        while self.next(expected.now()) {}
        self.now = expected.now();
    }

    fn take_log(&mut self) -> Vec<Line> {
        std::mem::take(&mut self.log)
    }

    fn nodes(&self) -> Vec<Node> {
        let node = |sight: crate::tree::rules::Sight<'_>| Node {
            depth: 1,
            name: self.workers[&sight.id].name,
            state: sight.phase,
            restarts: sight.restarts,
            last: sight.last_exit.map(|exit| exit.label().to_owned()),
            is_boss: false,
        };
        self.rules.sights().map(node).collect()
    }

    fn ended(&self) -> Option<Ended> {
        self.ended.clone()
    }
}
