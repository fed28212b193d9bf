//! The rules of warren's parts. Plain structs; `now` comes in, effects come out. No tokio, no ractor,
//! no clock and no randomness of its own; every file can be read alone.

pub mod backoff;
pub mod budget;
pub mod coordination;
pub mod endpoints;
pub mod home;
pub mod netcheck;
pub mod network;
pub mod own_node;
pub mod path;
pub mod path_news;
pub mod ping;
pub mod reach;
pub mod relay_link;
pub mod relay_map;
pub mod roster;
pub mod server_version;
pub mod wakes;
