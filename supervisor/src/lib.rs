//! Supervision and composition: the trees of the service and of the tunnel.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod access;
pub mod api;
pub mod child;
pub mod clients;
pub mod config;
pub mod facts;
pub(crate) mod headers;
pub mod host;
pub mod intent;
pub mod link;
pub mod paths;
pub mod process;
pub mod service;
pub mod sockets;
pub mod tree;
pub mod tunnel;
pub mod tunnels;
