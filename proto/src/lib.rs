//! The wire of the Coder tailnet. Sans-IO; knows nobody.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod address;
pub mod correlator;
pub mod derp;
pub mod disco;
pub mod drpc;
pub mod frame;
pub mod header;
pub mod key;
pub mod link;
pub mod name;
pub mod network;
pub mod stun;
pub mod tailnet;
pub mod tsmp;
pub mod vpn;
pub mod weight;
