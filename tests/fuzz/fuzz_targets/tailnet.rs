//! What a deployment says inside of a packet: weighed before it is unpacked, and taken by the rules. An input
//! may say the same again and again, up to the largest packet.
#![no_main]

use std::{fmt::Debug, time::Instant};

use bytes::Bytes;
use warren_core::{
    coordination::{Coordination, MAX_PEERS},
    relay_map::RelayMap,
    roster::{Update, Workspaces},
};
use warren_fuzz::{Input, limits};
use warren_proto::{
    drpc::{MAX_PACKET, MAX_UNPACKED},
    frame::Message,
    tailnet::{CoordinateResponse, DerpMap, WorkspaceUpdate},
    weight::{COORDINATE_RESPONSE, RELAY_MAP, Shape, WORKSPACE_UPDATE},
};

warren_fuzz::target!(check);

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    let what = input.byte();
    let said = input.chunk();
    // Mostly once: a large packet takes the time of a thousand small ones.
    let times = match what >> 2 {
        0..48 => 1,
        many => (1_usize << (many - 42)).min(MAX_PACKET / said.len().max(1)),
    };
    let packet = Bytes::from([said.repeat(times).as_slice(), input.rest()].concat());
    match what & 3 {
        0 => workspaces(packet, Update::Snapshot),
        1 => workspaces(packet, Update::Diff),
        2 => relay_map(packet),
        _ => coordination(packet),
    }
}

fn workspaces(packet: Bytes, update: Update) {
    let Some(message) = unpack::<WorkspaceUpdate>(WORKSPACE_UPDATE, packet) else { return };
    let mut workspaces = Workspaces::default();
    let before = workspaces.clone();
    match workspaces.apply(&message, update) {
        Ok(()) => {
            let agents = workspaces.agent_ids();
            workspaces.apply(&WorkspaceUpdate::default(), Update::Diff).expect("nothing has changed");
            assert_eq!(workspaces.agent_ids(), agents);
        }
        Err(error) => {
            assert!(workspaces == before, "on an error nothing has changed");
            assert!(error.to_string().len() < 4096);
        }
    }
}

fn relay_map(packet: Bytes) {
    let Some(message) = unpack::<DerpMap>(RELAY_MAP, packet) else { return };
    let map = RelayMap::from_proto(&message);
    let changes = map.difference(&map.clone());
    assert!(changes.added.is_empty() && changes.changed.is_empty(), "a map does not differ from itself");
    assert!(map.relay_regions().all(|region| !map.region_name(Some(region.id)).is_empty()));
}

fn coordination(packet: Bytes) {
    let Some(message) = unpack::<CoordinateResponse>(COORDINATE_RESPONSE, packet) else { return };
    let (mut coordination, now) = (Coordination::default(), Instant::now());
    let outcome = coordination.handle_response(now, &message, |_| None);
    assert!(outcome.ignored.len() <= message.peer_updates.len());
    assert!(coordination.network_map().peers.len() <= message.peer_updates.len().min(MAX_PEERS));
    while let Some(due) = coordination.poll_timeout() {
        drop(coordination.handle_timeout(due, |_| None));
        assert!(coordination.poll_timeout().is_none_or(|next| next > due), "time goes on");
    }
}

/// As a connection does it.
fn unpack<M: Message + Default + Debug + PartialEq>(shape: Shape, packet: Bytes) -> Option<M> {
    let weight = shape.weigh(&packet);
    if weight > MAX_UNPACKED {
        return None;
    }
    let before = limits::held();
    let message = M::decode(packet.clone()).ok();
    let held = limits::held() - before;
    assert!(held <= weight + limits::SLACK, "{held} bytes are held, {weight} were weighed");
    message
}
