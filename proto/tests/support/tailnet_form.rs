//! The decoded form of the control plane's messages in the vectors: field names of the schema, 16-byte ids as
//! UUIDs, other bytes as `hex:`, 64-bit numbers as text, enum names, and nothing for a default.

#![allow(dead_code, reason = "not every test binary needs all of it")]

use std::{collections::BTreeMap, fmt::Display};

use serde_json::{Value, json};
use uuid::Uuid;
use warren_proto::tailnet::{
    Agent, CoordinateRequest, CoordinateResponse, DerpMap, Node, RefreshResumeTokenResponse, TelemetryEvent,
    TelemetryRequest, Workspace, WorkspaceUpdate, WorkspaceUpdatesRequest,
    coordinate_request::{ReadyForHandshake, Tunnel, UpdateSelf},
    coordinate_response::{PeerUpdate, peer_update},
    derp_map::{HomeParams, Region, region},
    workspace,
};

use crate::json::{Fields, fields, to_hex};

fn identifier(bytes: &[u8]) -> String {
    match Uuid::from_slice(bytes) {
        Ok(id) => id.to_string(),
        Err(_) if bytes.is_empty() => String::new(),
        Err(_) => format!("hex:{}", to_hex(bytes)),
    }
}

fn shown<T: Display>(value: &T) -> Value {
    json!(value.to_string())
}

fn long(fields: Fields, name: &str, value: impl Display) -> Fields {
    let text = value.to_string();
    if text == "0" { fields } else { fields.text(name, &text) }
}

fn map<K: Display, V>(
    fields: Fields,
    name: &str,
    map: &BTreeMap<K, V>,
    form: impl Fn(&V) -> Value,
) -> Fields {
    if map.is_empty() {
        return fields;
    }
    fields.set(name, map.iter().map(|(key, value)| (key.to_string(), form(value))).collect())
}

/// A message without fields.
pub(crate) fn empty<T>(_: &T) -> Value {
    json!({})
}

pub(crate) fn node(it: &Node) -> Value {
    let fields = long(fields(), "id", it.id).optional("as_of", &it.as_of, shown);
    let fields = fields.text("key", &identifier(&it.key)).text("disco", &it.disco);
    let fields = fields.number("preferred_derp", it.preferred_derp);
    let fields = map(fields, "derp_latency", &it.derp_latency, |seconds| json!(seconds));
    let fields = map(fields, "derp_forced_websocket", &it.derp_forced_websocket, |reason| json!(reason));
    let fields = fields.texts("addresses", &it.addresses).texts("allowed_ips", &it.allowed_ips);
    fields.texts("endpoints", &it.endpoints).done()
}

/// The form of the data plane's file: names in camel case, and the key as plain hex.
pub(crate) fn node_in_camel_case(it: &Node) -> Value {
    let Value::Object(members) = node(it) else { panic!("no object") };
    let renamed = members.into_iter().map(|(name, value)| {
        let mut words = name.split('_');
        let first = words.next().unwrap_or_default().to_owned();
        let name = words.fold(first, |name, word| name + &word[..1].to_uppercase() + &word[1..]);
        let value = if name == "key" { json!(to_hex(&it.key)) } else { value };
        (name, value)
    });
    Value::Object(renamed.collect())
}

pub(crate) fn coordinate_request(it: &CoordinateRequest) -> Value {
    let tunnel = |it: &Tunnel| fields().text("id", &identifier(&it.id)).done();
    let ready = |it: &ReadyForHandshake| fields().text("id", &identifier(&it.id)).done();
    let update = |it: &UpdateSelf| fields().optional("node", &it.node, node).done();
    let fields = fields().optional("update_self", &it.update_self, update);
    let fields = fields.optional("disconnect", &it.disconnect, empty);
    let fields = fields.optional("add_tunnel", &it.add_tunnel, tunnel);
    let fields = fields.optional("remove_tunnel", &it.remove_tunnel, tunnel);
    fields.list("ready_for_handshake", &it.ready_for_handshake, ready).done()
}

pub(crate) fn coordinate_response(it: &CoordinateResponse) -> Value {
    fields().list("peer_updates", &it.peer_updates, peer_update).text("error", &it.error).done()
}

fn peer_update(it: &PeerUpdate) -> Value {
    let kind = peer_update::Kind::try_from(it.kind).ok();
    let fields = fields().text("id", &identifier(&it.id)).optional("node", &it.node, node);
    fields.named("kind", it.kind, kind.map(|kind| kind.as_str_name())).text("reason", &it.reason).done()
}

pub(crate) fn derp_map(it: &DerpMap) -> Value {
    let scores =
        |it: &HomeParams| map(fields(), "region_score", &it.region_score, |score| json!(score)).done();
    map(fields().optional("home_params", &it.home_params, scores), "regions", &it.regions, derp_region).done()
}

fn derp_region(it: &Region) -> Value {
    let fields = long(fields(), "region_id", it.region_id).flag("embedded_relay", it.embedded_relay);
    let fields = fields.text("region_code", &it.region_code).text("region_name", &it.region_name);
    fields.flag("avoid", it.avoid).list("nodes", &it.nodes, derp_node).done()
}

fn derp_node(it: &region::Node) -> Value {
    let fields = long(fields().text("name", &it.name), "region_id", it.region_id);
    let fields = fields.text("host_name", &it.host_name).text("cert_name", &it.cert_name);
    let fields = fields.text("ipv4", &it.ipv4).text("ipv6", &it.ipv6);
    let fields = fields.number("stun_port", it.stun_port).flag("stun_only", it.stun_only);
    let fields = fields.number("derp_port", it.derp_port).flag("insecure_for_tests", it.insecure_for_tests);
    let fields = fields.flag("force_http", it.force_http).text("stun_test_ip", &it.stun_test_ip);
    fields.flag("can_port_80", it.can_port_80).done()
}

pub(crate) fn workspace_updates_request(it: &WorkspaceUpdatesRequest) -> Value {
    fields().text("workspace_owner_id", &identifier(&it.workspace_owner_id)).done()
}

pub(crate) fn workspace_update(it: &WorkspaceUpdate) -> Value {
    let workspace = |it: &Workspace| {
        let status = workspace::Status::try_from(it.status).ok();
        let fields = fields().text("id", &identifier(&it.id)).text("name", &it.name);
        fields.named("status", it.status, status.map(|status| status.as_str_name())).done()
    };
    let agent = |it: &Agent| {
        let fields = fields().text("id", &identifier(&it.id)).text("name", &it.name);
        fields.text("workspace_id", &identifier(&it.workspace_id)).done()
    };
    let fields = fields().list("upserted_workspaces", &it.upserted_workspaces, workspace);
    let fields = fields.list("upserted_agents", &it.upserted_agents, agent);
    let fields = fields.list("deleted_workspaces", &it.deleted_workspaces, workspace);
    fields.list("deleted_agents", &it.deleted_agents, agent).done()
}

pub(crate) fn refresh_resume_token_response(it: &RefreshResumeTokenResponse) -> Value {
    let fields = fields().text("token", &it.token).optional("refresh_in", &it.refresh_in, shown);
    fields.optional("expires_at", &it.expires_at, shown).done()
}

pub(crate) fn telemetry_request(it: &TelemetryRequest) -> Value {
    fields().list("events", &it.events, telemetry_event).done()
}

/// The fields that were recorded.
fn telemetry_event(it: &TelemetryEvent) -> Value {
    let fields = fields().text("id", &identifier(&it.id)).optional("time", &it.time, shown);
    let fields = long(fields.text("application", &it.application), "node_id_self", it.node_id_self);
    let fields = long(fields, "node_id_remote", it.node_id_remote).number("home_derp", it.home_derp);
    let fields = fields.optional("connection_age", &it.connection_age, shown);
    let fields = fields.optional("throughput_mbits", &it.throughput_mbits, |it| json!(it));
    fields.text("client_version", &it.client_version).done()
}
