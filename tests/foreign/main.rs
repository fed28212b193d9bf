//! Peers that we did not write, on the wire: where both ends are ours, a mistake that both make is invisible.
//!
//! * [`program`]: the libraries that deployments are made of (drpc, yamux, websocket, DERP, disco), in one Go
//!   program that plays control plane, control client, relay and agent. Its source is in `peer/`.
//! * [`direct`]: `magicsock`, the path engine that deployed agents have an older one of, in the same program, with
//!   `wireguard-go` as a library and a TCP stack behind it.
//! * [`wireguard`]: `wireguard-go` as a distribution packages it.
//! * [`logind`]: the bus of a distribution, where our service hears of sleeps.
//! * [`nginx`]: nginx in front of a deployment, and a proxy on the way there.
//!
//! What is not installed is skipped, with a line that says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod control;
mod deployment;
mod direct;
#[path = "../doubles/mod.rs"]
mod doubles;
mod isolated;
mod logind;
mod nginx;
mod probes;
mod program;
mod relay;
mod stun;
#[path = "../support/mod.rs"]
mod support;
mod wireguard;
