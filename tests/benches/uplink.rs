//! How long it takes until data and the control plane get through again when this machine's network becomes another
//! one, again and again under load: another address, every other time behind another translator. All hosts are
//! namespaces on this machine, 5 ms from the world each; the agent follows the reference's rules.
//!
//! ```sh
//! cargo bench --bench uplink                  # 50 changes, about two minutes; no root
//! cargo bench --bench uplink -- --changes 10
//! ```
#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a bench")]

mod figures;
#[path = "../nat/load.rs"]
mod load;
#[path = "../nat/scene.rs"]
mod scene;
#[path = "../support/mod.rs"]
mod support;

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use load::Load;
use scene::{Edge, Scene, Shape};
use support::{can_isolate, eventually};
use warren_lab::nat::Kind;

/// The most that have addresses.
const MOST: u8 = 150;
/// Between two changes, so that each finds the path as it is to be.
const REST: Duration = Duration::from_secs(1);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = arguments.windows(2).find(|pair| pair[0] == "--changes").map(|pair| pair[1].parse().unwrap());
    let changes: u8 = value.unwrap_or(50);
    if arguments.iter().any(|argument| argument == "--inside") {
        return roam(changes.min(MOST));
    }
    if !can_isolate("the bench") {
        return;
    }
    let inside = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net"])
        .arg(std::env::current_exe().unwrap())
        .args(["--inside", "--changes", &changes.to_string()])
        .status();
    assert!(inside.unwrap().success());
}

fn roam(changes: u8) {
    let scene = Scene::up(&Shape::of(Edge::Home(Kind::PortRestricted), Edge::Home(Kind::PortRestricted)));
    let agent = scene.meet().agent;
    let load = Load::begin(&scene.namespace(), &agent);
    let control_plane = scene.deployment.control();
    let connections =
        || control_plane.read(|seen| seen.connections.iter().filter(|it| !it.requests.is_empty()).count());
    let (mut data, mut control) = (Vec::new(), Vec::new());
    for number in 0..changes {
        thread::sleep(REST);
        let (before, begun) = (connections(), Instant::now());
        scene.roam(number, if number % 2 == 0 { Edge::Open } else { Edge::Home(Kind::PortRestricted) });
        thread::scope(|scope| {
            let connected = scope.spawn(|| {
                eventually("there is a control connection", || connections() > before);
                begun.elapsed().as_secs_f64()
            });
            data.push(load.recovers(begun).as_secs_f64());
            control.push(connected.join().unwrap());
        });
        eventually("TCP goes on", load.goes_on());
    }
    println!("{changes} changes of the network under load; one TCP connection lived through all of them");
    for (name, values) in [("data", &mut data), ("control plane", &mut control)] {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        println!(
            "  {name:<14} again after {:.2} s (median), {:.2} s (p95), {:.2} s (most)",
            at(0.5),
            at(0.95),
            at(1.0)
        );
    }
}
