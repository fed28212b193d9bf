//! Many ends at once, while the tree is still busy with the first. What comes of it depends on who is heard
//! first, so only the laws that hold in any case are checked.

use std::collections::{BTreeMap, BTreeSet};

use proptest::test_runner::TestCaseError;

use super::{
    Theatre,
    otp::{Line, Node, Otp},
    plan::{Blow, Case, Deed, Plan, What},
    real::{Clock, RealTree},
};
use crate::{child::Restart, tree::Phase};

/// Strikes many at once, waits until all is calm again, and stops the tree.
pub(super) async fn storm(
    case: &Case,
    clock: Clock,
    model: &Otp,
    mut real: RealTree,
) -> Result<(), TestCaseError> {
    let workers = model.strikable(Blow::Kill);
    let struck: BTreeMap<_, _> = case
        .storm
        .iter()
        .filter(|_| !workers.is_empty())
        .map(|(index, blow)| (workers[index % workers.len()], *blow))
        .collect();
    for (name, blow) in &struck {
        real.perform(&Deed::Strike(name, *blow)).await;
    }
    let mut lives = Lives { alive: workers.into_iter().map(str::to_owned).collect() };
    let always = permanent(&case.root.children);
    real.calm(|log, nodes| {
        let mut lives = lives.clone();
        let is_heard = struck.keys().all(|name| log.iter().any(|(_, line)| *line == format!("drop {name}")));
        is_heard && lives.follow(log).is_ok() && lives.is_shown(nodes) && all_run(&always, nodes)
    })
    .await;
    lives.follow(&real.take_log())?;
    if real.ended().is_some() {
        return lives.check(lives.alive.is_empty(), "somebody outlived the tree");
    }
    let nodes = real.nodes();
    lives.check(lives.is_shown(&nodes), "the tree shows others than those who live")?;
    lives.check(all_run(&always, &nodes), "a permanent child is down")?;
    real.perform(&Deed::Stop).await;
    let log = real.take_log();
    let in_reverse: Vec<_> =
        nodes.iter().rev().map(|node| node.name).filter(|name| lives.alive.contains(*name)).collect();
    lives.follow(&log)?;
    lives.check(lives.alive.is_empty(), "somebody outlived the tree")?;
    // With real threads the last blow may have met the stop.
    let dropped: Vec<_> = log.iter().filter_map(|(_, line)| line.strip_prefix("drop ")).collect();
    let is_right = clock == Clock::Real || dropped == in_reverse;
    lives.check(is_right, &format!("stopped in another order: {dropped:?}, not {in_reverse:?}"))
}

/// Who lives, as far as the journal tells.
#[derive(Debug, Clone)]
struct Lives {
    alive: BTreeSet<String>,
}

impl Lives {
    /// Nobody starts twice, and nobody ends without having started.
    fn follow(&mut self, log: &[Line]) -> Result<(), TestCaseError> {
        for (at, line) in log {
            let (what, name) = line.split_once(' ').unwrap();
            let is_right = match what {
                "start" => self.alive.insert(name.to_owned()),
                "drop" | "failed" => self.alive.remove(name),
                "stop" => self.alive.contains(name),
                _ => true,
            };
            self.check(is_right, &format!("{line:?} at {at}, in {log:?}"))?;
        }
        Ok(())
    }

    /// Nobody is on the way, and those who live are those whom the tree shows.
    fn is_shown(&self, nodes: &[Node]) -> bool {
        let is_settled = |node: &Node| matches!(node.state, Phase::Running | Phase::Stopped);
        let working = nodes.iter().filter(|node| node.state == Phase::Running && !node.is_boss);
        let working: BTreeSet<_> = working.map(|node| node.name.to_owned()).collect();
        nodes.iter().all(is_settled) && working == self.alive
    }

    fn check(&self, is_right: bool, what: &str) -> Result<(), TestCaseError> {
        if is_right {
            Ok(())
        } else {
            Err(TestCaseError::fail(format!("after many ends at once: {what}: {self:?}")))
        }
    }
}

fn all_run(names: &BTreeSet<&str>, nodes: &[Node]) -> bool {
    nodes.iter().all(|node| !names.contains(node.name) || node.state == Phase::Running)
}

fn permanent(plans: &[Plan]) -> BTreeSet<&'static str> {
    let below = |plan: &Plan| match &plan.what {
        What::Boss(boss) => permanent(&boss.children),
        What::Worker(_) => BTreeSet::new(),
    };
    let own = plans.iter().filter(|plan| plan.restart == Restart::Permanent).map(|plan| plan.name);
    own.chain(plans.iter().flat_map(below)).collect()
}
