//! Peers that are not ours: a manager, a tunnel and a client as the specification describes deployed ones, with
//! their quirks. Only the messages' fields are the project's; handshake, frames, ids and manners are their own.
#![allow(dead_code, unused_imports, reason = "each test target uses its own part of it")]

mod client;
mod codec;
mod manager;
mod tunnel;

pub(crate) use self::{
    client::Gui,
    codec::{Greeting, is_sound},
    manager::{Make, Manager},
    tunnel::{ForeignTunnel, play},
};
