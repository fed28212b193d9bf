//! What agents cost that nobody talks to: probes a second, by what they are for, CPU and memory of the tunnel. Agents
//! that are reached directly, that are relayed because nothing comes through over UDP, and that are relayed because
//! the deployment says so. Agents, relay and tunnel share this machine.
//!
//! ```sh
//! cargo bench --bench idle                              # about seven minutes
//! cargo bench --bench idle -- --agents 100 --seconds 30
//! ```
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a bench")]

mod figures;
#[path = "../support/mod.rs"]
mod support;

use std::{
    thread,
    time::{Duration, Instant},
};

use figures::{cpu_seconds, memory};
use rustix::process::{Resource, getrlimit, setrlimit};
use support::{Deployment, ServiceProcess, within};
use warren_lab::{Cut, LabOptions, Probes};

/// Until everybody is known, pinged and as they are to stay, those that are looked for in vain rarely.
const SETTLED: Duration = Duration::from_secs(40);
/// For so many agents to have their sessions.
const UP: Duration = Duration::from_secs(60);

/// A second: the pings of the pinger, and WireGuard's keepalives.
const PINGED: f64 = 0.2;
const KEEPALIVES: f64 = 1.0 / 25.0;
/// Probes beyond the pinger's that one agent may cost in a second, both ways together.
const MOST: f64 = 1.0;

/// How the agents are reached.
#[derive(Clone, Copy, PartialEq)]
enum Reached {
    Directly,
    /// They have sockets and say where, but nothing comes through.
    RelayedWithoutUdp,
    RelayedByPolicy,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (mut agents, mut seconds) = (vec![100, 1000], 20);
    for pair in arguments.windows(2) {
        match pair[0].as_str() {
            "--agents" => agents = pair[1].split(',').map(|count| count.parse().unwrap()).collect(),
            "--seconds" => seconds = pair[1].parse().unwrap(),
            _ => {}
        }
    }
    // Every agent has sockets of its own, all in this process.
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limits.maximum, ..limits }).unwrap();
    println!("each agent is pinged every 5 s, which is 0.20 of the pings to it and of the pongs from it");
    for agents in agents {
        for reached in [Reached::Directly, Reached::RelayedWithoutUdp, Reached::RelayedByPolicy] {
            idle(agents, reached, Duration::from_secs(seconds));
        }
    }
}

fn idle(agents: usize, reached: Reached, span: Duration) {
    let is_forbidden = reached == Reached::RelayedByPolicy;
    let options = LabOptions { agents, direct: true, disable_direct: is_forbidden, ..LabOptions::default() };
    let deployment = Deployment::with(options);
    if reached == Reached::RelayedWithoutUdp {
        for agent in deployment.lab.agents() {
            deployment.lab.cut_udp(agent.id, Cut::BOTH);
        }
    }
    let service = ServiceProcess::start_as_shipped();
    let (url, token) = deployment.access();
    service.pretend_login(&url, &token);
    assert!(service.warren(&["up", "--wait"]).status.success());
    let tunnel = service.tunnel_pid().unwrap();
    let kind = if reached == Reached::Directly { "p2p" } else { "derp" };
    let is_settled = || {
        let kind = format!("connection_type=\"{kind}\"");
        support::sum(&service.metrics(), "warren_peers", &[kind.as_str()]) == agents as f64
    };
    within(UP, "every agent is reached as it should be", is_settled);
    let until_then = cpu_seconds(tunnel);
    thread::sleep(SETTLED);

    let (before, cpu, begun) = (probes(&deployment), cpu_seconds(tunnel), Instant::now());
    thread::sleep(span);
    let (after, cpu, took) = (probes(&deployment), cpu_seconds(tunnel) - cpu, begun.elapsed().as_secs_f64());
    println!(
        "\n{agents} agents, {}",
        match reached {
            Reached::Directly => "reached directly",
            Reached::RelayedWithoutUdp => "relayed, UDP comes through nowhere",
            Reached::RelayedByPolicy => "relayed, direct paths forbidden",
        }
    );
    let mut beyond = 0.0;
    for (way, before, after) in [("to", before.0, after.0), ("from", before.1, after.1)] {
        let each = |count: fn(&Probes) -> u64| (count(&after) - count(&before)) as f64 / agents as f64 / took;
        let all = each(|it| it.pings + it.relayed_pings + it.pongs + it.calls);
        println!(
            "  {way:<4} an agent: {all:.2} probes a second: pings {:.2}, pings by relay {:.2}, pongs {:.2}, calls {:.2}; {:.0} \
             packets a second {way} all of them",
            each(|it| it.pings),
            each(|it| it.relayed_pings),
            each(|it| it.pongs),
            each(|it| it.calls),
            (all + KEEPALIVES) * agents as f64
        );
        beyond += all - PINGED;
    }
    assert!(beyond <= MOST, "{beyond:.2} probes a second beyond the ping every 5 s");
    println!(
        "  tunnel: {:.2} % of a core, {}; {until_then:.2} CPU s until all were reached",
        100.0 * cpu / took,
        memory(tunnel)
    );
}

/// What the agents have got from the tunnel and sent to it, all together.
fn probes(deployment: &Deployment) -> (Probes, Probes) {
    let mut all = (Probes::default(), Probes::default());
    for agent in deployment.lab.agents() {
        for path in deployment.lab.agent_path(agent.id).peers.values() {
            add(&mut all.0, path.probes_received);
            add(&mut all.1, path.probes_sent);
        }
    }
    all
}

fn add(all: &mut Probes, one: Probes) {
    all.pings += one.pings;
    all.relayed_pings += one.relayed_pings;
    all.pongs += one.pongs;
    all.calls += one.calls;
}
