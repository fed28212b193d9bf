//! The trees and the steps that the model and the real thing are given, and how they are made up.

use std::sync::LazyLock;

use proptest::{
    collection::vec,
    option,
    prelude::{BoxedStrategy, Just, Strategy as Strategic, any, prop_oneof},
};

use super::otp::{Millis, Otp};
use crate::child::{AutoShutdown, Restart, Strategy};

/// A child to be.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) name: &'static str,
    pub(super) restart: Restart,
    pub(super) significant: bool,
    pub(super) what: What,
}

#[derive(Debug, Clone)]
pub(super) enum What {
    Worker(WorkerPlan),
    Boss(BossPlan),
}

/// How a worker behaves.
#[derive(Debug, Clone, Copy)]
pub(super) struct WorkerPlan {
    /// What a start takes.
    pub(super) starts_in: Millis,
    /// What an orderly end takes; `None` never ends.
    pub(super) ends_in: Option<Millis>,
    /// What its supervisor grants it for that.
    pub(super) grace: Millis,
    /// How many starts fail before one succeeds.
    pub(super) unlucky: u32,
}

/// A supervisor and its first children.
#[derive(Debug, Clone)]
pub(super) struct BossPlan {
    pub(super) strategy: Strategy,
    pub(super) auto_shutdown: AutoShutdown,
    /// So many restarts within the window.
    pub(super) max: usize,
    pub(super) window: Millis,
    /// Between the end of a child and its restart.
    pub(super) pause: Millis,
    pub(super) children: Vec<Plan>,
}

/// What happens to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blow {
    Fail,
    Panic,
    Exit,
    Kill,
    Hang,
}

/// A step as it is made up: who is meant depends on who is there by then.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Strike(usize, Blow),
    Unlucky(usize, u32),
    Add(usize, Plan),
    Remove(usize),
    Wait(Millis),
}

/// A step as it is done.
#[derive(Debug, Clone)]
pub(super) enum Deed {
    /// This happens to the worker.
    Strike(&'static str, Blow),
    /// The worker's next starts fail.
    Unlucky(&'static str, u32),
    /// The supervisor gets one more child; the root where there is no name.
    Add(Option<&'static str>, Plan),
    /// It loses one.
    Remove(Option<&'static str>, u64),
    /// Time passes.
    Wait(Millis),
    /// The whole tree is stopped.
    Stop,
}

/// One tree, what happens to it one after the other, and who is struck all at once at the end.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) root: BossPlan,
    pub(super) steps: Vec<Step>,
    pub(super) storm: Vec<(usize, Blow)>,
}

/// Where a case is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setting {
    /// Virtual time, so that everything may take its time.
    Paused,
    /// Real time: what takes long is left out, and pauses and windows play no part.
    Threads,
    /// As paused, one supervisor.
    Flat,
}

impl Plan {
    fn named(self, name: &mut impl FnMut() -> &'static str, auto: AutoShutdown) -> Self {
        let own = name();
        // OTP refuses other combinations.
        let significant =
            self.significant && self.restart != Restart::Permanent && auto != AutoShutdown::Never;
        let what = match self.what {
            What::Worker(worker) => What::Worker(worker),
            What::Boss(boss) => What::Boss(boss.named(name)),
        };
        Self { name: own, significant, what, ..self }
    }
}

impl BossPlan {
    fn named(self, name: &mut impl FnMut() -> &'static str) -> Self {
        let auto = self.auto_shutdown;
        let children = self.children.into_iter().map(|child| child.named(name, auto)).collect();
        Self { children, ..self }
    }
}

impl Case {
    /// Names everyone who is in the case, each by another name.
    fn named(self) -> Self {
        static NAMES: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
            (1..=999).map(|number| &*Box::leak(format!("n{number}").into_boxed_str())).collect()
        });
        let mut left = NAMES.iter();
        let mut name = || *left.next().expect("cases are smaller");
        let root = self.root.named(&mut name);
        let name_step = |step| match step {
            // Whether it may be significant is for the supervisor that gets it.
            Step::Add(boss, plan) => Step::Add(boss, plan.named(&mut name, AutoShutdown::AnySignificant)),
            other => other,
        };
        let steps = self.steps.into_iter().map(name_step).collect();
        Self { root, steps, ..self }
    }
}

impl Step {
    /// Who is meant, if there is anyone.
    pub(super) fn choose(&self, model: &Otp) -> Option<Deed> {
        let pick =
            |names: Vec<&'static str>, index: usize| (!names.is_empty()).then(|| names[index % names.len()]);
        match self {
            Self::Strike(index, blow) => {
                pick(model.strikable(*blow), *index).map(|name| Deed::Strike(name, *blow))
            }
            Self::Unlucky(index, times) => {
                pick(model.workers(), *index).map(|name| Deed::Unlucky(name, *times))
            }
            Self::Add(index, plan) => {
                let bosses = model.bosses();
                let (boss, auto) = bosses[index % bosses.len()];
                let significant = plan.significant && auto != AutoShutdown::Never;
                Some(Deed::Add(boss, Plan { significant, ..plan.clone() }))
            }
            Self::Remove(index) => {
                let all = model.removable();
                let (boss, id) = *all.get(index % all.len().max(1))?;
                Some(Deed::Remove(boss, id))
            }
            Self::Wait(time) => Some(Deed::Wait(*time)),
        }
    }
}

pub(super) fn case(setting: Setting) -> impl Strategic<Value = Case> {
    let depth = if setting == Setting::Flat { 1 } else { 3 };
    let storm = vec((any::<usize>(), sudden()), 0..4);
    (boss(setting, depth), vec(step(setting), 1..14), storm)
        .prop_map(|(root, steps, storm)| Case { root, steps, storm }.named())
}

fn step(setting: Setting) -> impl Strategic<Value = Step> {
    let hangs = if setting == Setting::Threads { 0 } else { 2 };
    let waits = if setting == Setting::Threads { 0 } else { 3 };
    let depth = if setting == Setting::Flat { 0 } else { 1 };
    let strike = |blow| any::<usize>().prop_map(move |index| Step::Strike(index, blow));
    prop_oneof![
        8 => (any::<usize>(), sudden()).prop_map(|(index, blow)| Step::Strike(index, blow)),
        3 => strike(Blow::Exit),
        hangs => strike(Blow::Hang),
        1 => (any::<usize>(), 1..3_u32).prop_map(|(index, times)| Step::Unlucky(index, times)),
        2 => (any::<usize>(), child(setting, depth)).prop_map(|(boss, plan)| Step::Add(boss, plan)),
        2 => any::<usize>().prop_map(Step::Remove),
        waits => prop_oneof![1..900_u64, 900..30_000_u64, Just(999)].prop_map(Step::Wait),
    ]
}

/// Ends that nobody asked for.
fn sudden() -> impl Strategic<Value = Blow> {
    prop_oneof![Just(Blow::Fail), Just(Blow::Panic), Just(Blow::Kill)]
}

fn boss(setting: Setting, depth: u32) -> BoxedStrategy<BossPlan> {
    let strategy =
        prop_oneof![Just(Strategy::OneForOne), Just(Strategy::RestForOne), Just(Strategy::OneForAll)];
    let auto_shutdown = prop_oneof![
        2 => Just(AutoShutdown::Never),
        1 => Just(AutoShutdown::AnySignificant),
        1 => Just(AutoShutdown::AllSignificant),
    ];
    let times = if setting == Setting::Threads {
        (Just(3_600_000).boxed(), Just(0).boxed())
    } else {
        (
            prop_oneof![Just(1_000_u64), Just(10_000), Just(60_000)].boxed(),
            prop_oneof![2 => Just(0), 1 => Just(50), 1 => 100..900_u64].boxed(),
        )
    };
    let max = prop_oneof![2 => 0..3_usize, 3 => 3..8_usize];
    let most = if depth == 3 { 5 } else { 4 };
    (strategy, auto_shutdown, max, times, vec(child(setting, depth - 1), 0..most))
        .prop_map(|(strategy, auto_shutdown, max, (window, pause), children)| BossPlan {
            strategy,
            auto_shutdown,
            max,
            window,
            pause,
            children,
        })
        .boxed()
}

/// A worker, or a supervisor with up to `depth` levels below itself.
fn child(setting: Setting, depth: u32) -> BoxedStrategy<Plan> {
    let restart = prop_oneof![
        3 => Just(Restart::Permanent),
        2 => Just(Restart::Transient),
        1 => Just(Restart::Temporary),
    ];
    let worker = worker(setting).prop_map(What::Worker);
    let what = if depth == 0 {
        worker.boxed()
    } else {
        prop_oneof![2 => worker, 1 => boss(setting, depth).prop_map(What::Boss)].boxed()
    };
    (restart, any::<bool>(), what)
        .prop_map(|(restart, significant, what)| Plan { name: "", restart, significant, what })
        .boxed()
}

/// What a worker takes is never exactly its grace, so that it is clear which comes first.
fn worker(setting: Setting) -> BoxedStrategy<WorkerPlan> {
    let unlucky = prop_oneof![30 => Just(0), 1 => Just(1_u32)];
    if setting == Setting::Threads {
        return (option::weighted(0.9, Just(0)), unlucky)
            .prop_map(|(ends_in, unlucky)| {
                let grace = if ends_in.is_none() { 20 } else { 30_000 };
                WorkerPlan { starts_in: 0, ends_in, grace, unlucky }
            })
            .boxed();
    }
    let starts_in = prop_oneof![4 => Just(0), 1 => Just(30_u64), 1 => 100..2_000_u64];
    let ends_in = prop_oneof![
        5 => Just(Some(0_u64)),
        2 => Just(Some(25)),
        1 => (100..1_500_u64).prop_map(Some),
        1 => Just(None),
    ];
    let grace = prop_oneof![Just(60_u64), Just(2_000)];
    (starts_in, ends_in, grace, unlucky)
        .prop_map(|(starts_in, ends_in, grace, unlucky)| WorkerPlan { starts_in, ends_in, grace, unlucky })
        .boxed()
}
