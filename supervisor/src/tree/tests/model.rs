//! The tree against a model of OTP: trees and what happens to them are made up, and after every step the tree
//! must have done what the model says: who was started, stopped and dropped, in which order and when, who
//! runs, how often each was restarted, why it last ended, and how the tree ends.
//!
//! ```text
//! plan.rs   what is made up          otp.rs    what must come of it
//! paper.rs  the rules alone          real.rs   real actors: in virtual time, and with real threads
//!                                    storm.rs  many ends at once, where only laws can be checked
//! ```
//!
//! `WARREN_MODEL_CASES` sets how many cases each test runs, and `WARREN_MODEL_SEED` is the seed that a failure
//! prints; with real threads a seed makes the same trees, but the threads are as they are.

use std::{collections::BTreeMap, fmt::Write as _, future::Future, sync::Mutex};

use futures::FutureExt;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner};

mod otp;
mod paper;
mod plan;
mod real;
mod storm;

use otp::{Ended, Line, Node, Otp};
use paper::Paper;
use plan::{Case, Deed, Setting};
use real::{Clock, RealTree};
use storm::storm;

/// In CI these make 10,000 cases of real actors, and as many of the rules alone.
const PAUSED: u32 = 9_500;
const THREADS: u32 = 500;
const RULES: u32 = 10_000;

/// A run of fewer cases may miss something rare.
const ENOUGH: u32 = 400;

/// Something that can be compared with the model.
trait Theatre {
    /// Does it.
    fn perform(&mut self, deed: &Deed) -> impl Future<Output = ()>;

    /// Lets time pass until the model's present, or, in real time, until everything has come to rest.
    fn reach(&mut self, lines: &[Line], expected: &Otp) -> impl Future<Output = ()>;

    /// What happened since it was last asked.
    fn take_log(&mut self) -> Vec<Line>;

    /// What there is to see.
    fn nodes(&self) -> Vec<Node>;

    /// Why it ended, if it has.
    fn ended(&self) -> Option<Ended>;
}

#[test]
fn the_rules_do_what_otp_would_do() {
    run(Setting::Flat, RULES, |case, tally| {
        let Ok(model) = Otp::start(&case.root) else { return Ok(()) };
        let playing = play(case, Setting::Flat, model, Paper::start(&case.root), tally);
        playing.now_or_never().expect("paper does not wait").map(drop)
    });
}

#[test]
fn the_tree_does_what_otp_would_do_event_by_event() {
    run(Setting::Paused, PAUSED, |case, tally| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(act(case, Setting::Paused, Clock::Virtual, tally))
    });
}

#[test]
fn the_tree_does_what_otp_would_do_with_real_threads_too() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    run(Setting::Threads, THREADS, |case, tally| {
        runtime.block_on(act(case, Setting::Threads, Clock::Real, tally))
    });
}

/// Plays a case with real actors, and ends it by many ends at once.
async fn act(case: &Case, setting: Setting, clock: Clock, tally: &Tally) -> Result<(), TestCaseError> {
    let Ok(model) = Otp::start(&case.root) else { return Ok(()) };
    let real = RealTree::start(&case.root, clock).await;
    match play(case, setting, model, real, tally).await? {
        Some((model, real)) if !case.storm.is_empty() => storm(case, clock, &model, real).await,
        Some((model, real)) => finish(setting, model, real, tally).await,
        None => Ok(()),
    }
}

/// Plays the steps of a case, and hands back what still runs at their end.
async fn play<T: Theatre>(
    case: &Case,
    setting: Setting,
    mut model: Otp,
    mut real: T,
    tally: &Tally,
) -> Result<Option<(Otp, T)>, TestCaseError> {
    compare(setting, "the start", &mut model, &mut real).await?;
    for step in &case.steps {
        if model.ended.is_some() {
            break;
        }
        let Some(deed) = step.choose(&model) else { continue };
        let mut next = model.clone();
        if next.perform(&deed).is_err() {
            tally.skip();
            continue;
        }
        real.perform(&deed).await;
        compare(setting, &format!("{deed:?}"), &mut next, &mut real).await?;
        tally.count(&deed, &model, &next);
        model = next;
    }
    tally.count_end(model.ended.as_ref());
    Ok(model.ended.is_none().then_some((model, real)))
}

/// Ends a tree in order.
async fn finish(
    setting: Setting,
    mut model: Otp,
    mut real: impl Theatre,
    tally: &Tally,
) -> Result<(), TestCaseError> {
    if model.perform(&Deed::Stop).is_err() {
        tally.skip();
        return Ok(());
    }
    real.perform(&Deed::Stop).await;
    tally.count_end(model.ended.as_ref());
    compare(setting, "the stop", &mut model, &mut real).await
}

async fn compare(
    setting: Setting,
    deed: &str,
    model: &mut Otp,
    real: &mut impl Theatre,
) -> Result<(), TestCaseError> {
    let expected = model.take_log();
    real.reach(&expected, model).await;
    let (expected, found) = (told(setting, expected), told(setting, real.take_log()));
    let fail = |what: String| Err(TestCaseError::fail(format!("after {deed}: {what}")));
    if expected != found {
        return fail(side_by_side(&expected, &found));
    }
    if model.ended != real.ended() {
        return fail(format!("the end should be {:?} and is {:?}", model.ended, real.ended()));
    }
    if model.ended.is_none() && model.nodes() != real.nodes() {
        return fail(side_by_side(&model.nodes(), &real.nodes()));
    }
    Ok(())
}

/// What is compared of a log: with real threads times do not count.
fn told(setting: Setting, log: Vec<Line>) -> Vec<Line> {
    let time = |at| if setting == Setting::Threads { 0 } else { at };
    log.into_iter().map(|(at, words)| (time(at), words)).collect()
}

fn side_by_side<T: std::fmt::Debug>(expected: &[T], found: &[T]) -> String {
    let mut text = String::from("\n");
    for place in 0..expected.len().max(found.len()) {
        let show = |side: &[T]| side.get(place).map_or("-".to_owned(), |line| format!("{line:?}"));
        let (expected, found) = (show(expected), show(found));
        let mark = if expected == found { ' ' } else { '!' };
        let _ = writeln!(text, "{mark} expected {expected}, found {found}");
    }
    text
}

/// What a run has met, so that it cannot become one that meets nothing.
#[derive(Default)]
struct Tally(Mutex<BTreeMap<String, u64>>);

impl Tally {
    fn add(&self, what: impl Into<String>) {
        *self.0.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    fn skip(&self) {
        self.add("skipped");
    }

    fn count(&self, deed: &Deed, before: &Otp, after: &Otp) {
        self.add("done");
        match deed {
            Deed::Strike(_, blow) => self.add(format!("{blow:?}")),
            Deed::Unlucky(..) => self.add("Unlucky"),
            Deed::Add(..) => self.add("Add"),
            Deed::Remove(..) => self.add("Remove"),
            Deed::Wait(_) => self.add("Wait"),
            Deed::Stop => {}
        }
        let restarted = after.restarts().saturating_sub(before.restarts());
        self.add(match restarted {
            0 => "nobody restarted",
            1 => "one restarted",
            _ => "several restarted",
        });
    }

    fn count_end(&self, end: Option<&Ended>) {
        let end = end.map(|end| format!("{end:?}"));
        self.add(end.as_deref().and_then(|end| end.split(' ').next()).unwrap_or("went on"));
    }

    /// Every kind of step and of end was met, and few steps were left out.
    fn is_rich(&self, setting: Setting) {
        let met = self.0.lock().unwrap();
        let count = |what: &str| met.get(what).copied().unwrap_or_default();
        let timed = ["Hang", "Wait"].iter().filter(|_| setting != Setting::Threads);
        let deeds = ["Fail", "Panic", "Kill", "Exit", "Unlucky", "Add", "Remove"];
        let outcomes = ["one restarted", "several restarted", "BudgetSpent", "AutoShutdown", "StartFailed"];
        for what in deeds.iter().chain(&outcomes).chain(timed) {
            assert!(count(what) > 0, "no case with {what}: {met:?}");
        }
        assert!(count("skipped") * 4 < count("done"), "too many steps left out: {met:?}");
    }
}

fn run(setting: Setting, cases: u32, test: impl Fn(&Case, &Tally) -> Result<(), TestCaseError>) {
    let number = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    let seed = number("WARREN_MODEL_SEED").unwrap_or_else(|| getrandom::u64().unwrap());
    let cases = number("WARREN_MODEL_CASES").map_or(cases, |cases| u32::try_from(cases).unwrap());
    let config = Config {
        cases,
        rng_seed: RngSeed::Fixed(seed),
        source_file: Some(file!()),
        max_shrink_time: 60_000,
        ..Config::default()
    };
    let tally = Tally::default();
    let outcome = TestRunner::new(config).run(&plan::case(setting), |case| test(&case, &tally));
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(reason, case)) => {
            panic!("WARREN_MODEL_SEED={seed} WARREN_MODEL_CASES={cases}: {reason}\nsmallest: {case:?}")
        }
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
    if cases >= ENOUGH {
        tally.is_rich(setting);
    }
}
