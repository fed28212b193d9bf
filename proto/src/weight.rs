//! What a message takes in memory once it is unpacked, told from its bytes before it is. A peer can pack a
//! million empty elements into two megabytes, and each costs a hundred times what it took on the wire.
//!
//! Only what repeats is looked at; everything else is no larger than its bytes, or part of its parent.

use crate::{
    tailnet::{self, coordinate_response, derp_map},
    vpn::{
        Agent, Workspace, log,
        network_settings_request::{i_pv4_settings::IPv4Route, i_pv6_settings::IPv6Route},
        start_request,
    },
};

/// How a list may be larger than what is in it: it begins with four places and doubles, and while it grows
/// the old one is still there.
const GROWTH: usize = 4;

/// Bytes that the shortest text takes, if it is not empty.
const LEAST: usize = 8;

/// What the field of a message can hold.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// Texts or bytes, which are copied as they are.
    Text,
    /// Numbers that take less on the wire.
    Numbers,
    /// Messages of so many bytes, without what their lists and texts hold, and their fields that can repeat or
    /// hold what does.
    Message(usize, &'static [(u64, Shape)]),
}

use Shape::{Message, Numbers, Text};

const HEADER: Shape = Message(size_of::<start_request::Header>(), &[]);
const START: Shape = Message(0, &[(4, HEADER)]);
const LOG: Shape = Message(0, &[(3, Text), (4, Message(size_of::<log::Field>(), &[]))]);
const WORKSPACE: Shape = Message(size_of::<Workspace>(), &[]);
const AGENT: Shape = Message(size_of::<Agent>(), &[(4, Text), (5, Text)]);
const PEER_UPDATE: Shape = Message(0, &[(1, WORKSPACE), (2, AGENT), (3, WORKSPACE), (4, AGENT)]);
const DNS: Shape = Message(0, &[(1, Text), (2, Text), (4, Text)]);
const IPV4_ROUTE: Shape = Message(size_of::<IPv4Route>(), &[]);
const IPV4: Shape = Message(0, &[(1, Text), (2, Text), (4, IPV4_ROUTE), (5, IPV4_ROUTE)]);
const IPV6_ROUTE: Shape = Message(size_of::<IPv6Route>(), &[]);
const IPV6: Shape = Message(0, &[(1, Text), (2, Numbers), (3, IPV6_ROUTE), (4, IPV6_ROUTE)]);
const NETWORK_SETTINGS: Shape = Message(0, &[(3, DNS), (5, IPV4), (6, IPV6)]);
const STATUS: Shape = Message(0, &[(3, PEER_UPDATE)]);

/// An entry of a map, as a message. A map begins with eleven places, and is never more than half empty.
const fn entry<T>(parts: &'static [(u64, Shape)]) -> Shape {
    Message(3 * size_of::<T>(), parts)
}

const LATENCY: Shape = entry::<(String, f64)>(&[]);
const FORCED_WEBSOCKET: Shape = entry::<(i32, String)>(&[]);
const NODE: Shape = Message(0, &[(6, LATENCY), (7, FORCED_WEBSOCKET), (8, Text), (9, Text), (10, Text)]);
const PEER: Shape = Message(size_of::<coordinate_response::PeerUpdate>(), &[(2, NODE)]);
const SCORES: Shape = Message(0, &[(1, entry::<(i64, f64)>(&[]))]);
const RELAY: Shape = Message(size_of::<derp_map::region::Node>(), &[]);
const REGION: Shape = Message(0, &[(6, RELAY)]);
const TOLD_WORKSPACE: Shape = Message(size_of::<tailnet::Workspace>(), &[]);
const TOLD_AGENT: Shape = Message(size_of::<tailnet::Agent>(), &[]);

/// What a coordinator tells of peers.
pub const COORDINATE_RESPONSE: Shape = Message(0, &[(1, PEER)]);
/// The relays of a deployment.
pub const RELAY_MAP: Shape =
    Message(0, &[(1, SCORES), (2, entry::<(i64, derp_map::Region)>(&[(2, REGION)]))]);
/// What a deployment tells of workspaces.
pub const WORKSPACE_UPDATE: Shape =
    Message(0, &[(1, TOLD_WORKSPACE), (2, TOLD_AGENT), (3, TOLD_WORKSPACE), (4, TOLD_AGENT)]);
/// A message in which nothing repeats.
pub const SINGLE: Shape = Message(0, &[]);

/// What a manager sends.
pub const MANAGER_MESSAGE: Shape = Message(0, &[(4, START)]);
/// What a tunnel sends.
pub const TUNNEL_MESSAGE: Shape = Message(0, &[(2, LOG), (3, PEER_UPDATE), (4, NETWORK_SETTINGS)]);
/// What a client sends.
pub const CLIENT_MESSAGE: Shape = Message(0, &[(2, START)]);
/// What a service sends.
pub const SERVICE_MESSAGE: Shape = Message(0, &[(4, STATUS)]);

impl Shape {
    /// Bytes that the lists and texts of these encoded contents take at most, beside the contents themselves,
    /// which ids go on pointing into. Reading stops where they are malformed, as a decoder does.
    pub fn weigh(self, encoded: &[u8]) -> usize {
        match self {
            Text => encoded.len().max(LEAST),
            Numbers => encoded.len() * GROWTH * size_of::<u32>(),
            Message(_, parts) => weigh_fields(encoded, parts),
        }
    }

    /// Bytes that one more element of this shape takes in its list.
    fn place(self) -> usize {
        GROWTH
            * match self {
                Text => size_of::<String>(),
                Numbers => size_of::<u32>(),
                Message(size, _) => size,
            }
    }
}

fn weigh_fields(mut rest: &[u8], parts: &[(u64, Shape)]) -> usize {
    let mut weight = 0;
    while let Some(tag) = take_varint(&mut rest) {
        let shape = parts.iter().find(|(number, _)| *number == tag >> 3).map(|(_, shape)| *shape);
        weight += shape.map_or(0, Shape::place);
        let skipped = match tag & 7 {
            0 => take_varint(&mut rest).map(drop),
            1 => take(&mut rest, 8).map(drop),
            2 => take_varint(&mut rest)
                .and_then(|length| take(&mut rest, usize::try_from(length).ok()?))
                .map(|contents| weight += shape.unwrap_or(Text).weigh(contents)),
            // A group has no length. What is in it counts as if it were not in one, which is never too little.
            3 | 4 => Some(()),
            5 => take(&mut rest, 4).map(drop),
            _ => None,
        };
        if skipped.is_none() {
            break;
        }
    }
    weight
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    prost::encoding::decode_varint(rest).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::vpn::{self, PeerUpdate, StartRequest, TunnelMessage, manager_message, tunnel_message};

    /// Bytes that a peer update really holds, without its ids, which stay in the frame.
    fn held(update: &PeerUpdate) -> usize {
        let texts = |list: &Vec<String>| {
            list.capacity() * size_of::<String>() + list.iter().map(String::capacity).sum::<usize>()
        };
        let workspaces = |list: &Vec<Workspace>| {
            list.capacity() * size_of::<Workspace>() + list.iter().map(|it| it.name.capacity()).sum::<usize>()
        };
        let agents = |list: &Vec<Agent>| {
            let inside = |it: &Agent| {
                let region = it.last_ping.as_ref().map_or(0, |ping| ping.preferred_derp.capacity());
                it.name.capacity() + region + texts(&it.fqdn) + texts(&it.ip_addrs)
            };
            list.capacity() * size_of::<Agent>() + list.iter().map(inside).sum::<usize>()
        };
        workspaces(&update.upserted_workspaces)
            + workspaces(&update.deleted_workspaces)
            + agents(&update.upserted_agents)
            + agents(&update.deleted_agents)
    }

    fn weigh(update: &PeerUpdate) -> usize {
        let msg = Some(tunnel_message::Msg::PeerUpdate(update.clone()));
        TUNNEL_MESSAGE.weigh(&TunnelMessage { rpc: Some(vpn::Rpc::response(1)), msg }.encode_to_vec())
    }

    #[test]
    fn empty_elements_weigh_what_they_take_and_not_what_they_cost_to_send() {
        let update = PeerUpdate { upserted_agents: vec![Agent::default(); 10_000], ..Default::default() };
        assert!(update.encoded_len() <= 20_000);
        assert!(weigh(&update) >= 10_000 * size_of::<Agent>(), "{}", weigh(&update));

        let headers = vec![start_request::Header::default(); 10_000];
        let start = manager_message::Msg::Start(StartRequest { headers, ..Default::default() });
        let bytes = vpn::ManagerMessage { rpc: None, msg: Some(start) }.encode_to_vec();
        assert!(MANAGER_MESSAGE.weigh(&bytes) >= 10_000 * size_of::<start_request::Header>());
    }

    #[test]
    fn elements_inside_an_unknown_group_and_of_a_wrong_kind_are_no_way_around() {
        let agents = [0x12, 0x00].repeat(100);
        let inside = [&[0x1a, 0xc8, 0x01], agents.as_slice()].concat();
        let grouped = [&[0xc3, 0x3e], inside.as_slice(), &[0xc4, 0x3e]].concat();
        assert!(TUNNEL_MESSAGE.weigh(&inside) >= 100 * size_of::<Agent>());
        assert!(TUNNEL_MESSAGE.weigh(&grouped) >= TUNNEL_MESSAGE.weigh(&inside));
        // Numbers one by one instead of in one piece.
        let numbers = [&[0x22, 0xc9, 0x01, 0x32, 0xc6, 0x01], [0x10, 0x01].repeat(99).as_slice()].concat();
        assert!(TUNNEL_MESSAGE.weigh(&numbers) >= 99 * size_of::<u32>());
    }

    #[test]
    fn a_packet_of_empty_peers_weighs_a_hundred_times_its_bytes() {
        let packet = [0x0a, 0x00].repeat(100_000);
        let response = tailnet::CoordinateResponse::decode(packet.as_slice()).unwrap();
        let held = response.peer_updates.capacity() * size_of::<coordinate_response::PeerUpdate>();
        assert!(held > 50 * packet.len());
        assert!(COORDINATE_RESPONSE.weigh(&packet) >= held);
    }

    #[test]
    fn a_map_of_one_entry_weighs_as_much_as_the_eleven_that_it_has_room_for() {
        let node = tailnet::Node { derp_latency: [("1-v4".to_owned(), 0.5)].into(), ..Default::default() };
        let update = coordinate_response::PeerUpdate { node: Some(node), ..Default::default() };
        let response = tailnet::CoordinateResponse { peer_updates: vec![update], error: String::new() };
        let least = size_of::<coordinate_response::PeerUpdate>() + 11 * size_of::<(String, f64)>();
        assert!(COORDINATE_RESPONSE.weigh(&response.encode_to_vec()) >= least);
    }

    fn agent() -> impl Strategy<Value = Agent> {
        let texts = || proptest::collection::vec(".{0,8}", 0..6);
        let ping = proptest::option::of(".{0,8}");
        (".{0,8}", texts(), texts(), ping).prop_map(|(name, fqdn, ip_addrs, region)| Agent {
            id: vec![7; 16].into(),
            name,
            fqdn,
            ip_addrs,
            last_ping: region.map(|preferred_derp| vpn::LastPing { preferred_derp, ..Default::default() }),
            ..Default::default()
        })
    }

    proptest! {
        #[test]
        fn what_is_unpacked_never_takes_more_than_was_weighed(
            upserted_agents in proptest::collection::vec(agent(), 0..20),
            deleted_agents in proptest::collection::vec(agent(), 0..3),
            workspaces in 0_usize..9,
        ) {
            let upserted_workspaces = vec![Workspace { name: "w".into(), ..Default::default() }; workspaces];
            let update =
                PeerUpdate { upserted_agents, deleted_agents, upserted_workspaces, ..Default::default() };
            let unpacked = PeerUpdate::decode(update.encode_to_vec().as_slice()).unwrap();
            prop_assert!(held(&unpacked) <= weigh(&update), "{} > {}", held(&unpacked), weigh(&update));
        }

        #[test]
        fn no_bytes_break_the_scales(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for shape in [TUNNEL_MESSAGE, SERVICE_MESSAGE, COORDINATE_RESPONSE, RELAY_MAP, WORKSPACE_UPDATE] {
                shape.weigh(&bytes);
            }
        }
    }
}
