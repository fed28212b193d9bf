//! The parts of a tunnel: actors, their runtime, and the data plane that outlives them.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

#[cfg(test)]
mod apart;
pub mod coordinator;
pub mod data_plane;
pub mod dial;
pub mod facts;
pub mod interfaces;
pub mod packet_io;
pub mod pinger;
pub mod recovery;
pub mod registry;
pub mod relay;
pub mod resume;
pub mod runtime;
pub mod session;
pub mod speaker;
pub mod udp;
pub mod watched;
mod websocket;
pub mod wireguard;
