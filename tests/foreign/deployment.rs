//! A deployment of theirs: control plane, relay and an agent, and our tunnel in it.

use std::{fs, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;
use warren_proto::{
    address::{coder_address, tailscale_address},
    key::NodePublic,
    vpn::{TunnelMessage, tunnel_message::Msg},
};

use crate::{
    doubles::{Greeting, Make, Manager},
    program::{Program, SCHEMA},
};

/// The number of their relay's region.
pub(crate) const REGION: u16 = 10_007;

const TOKEN: &str = "abcdefghij-0123456789abcdefghijkl";
/// What their control plane gives out.
pub(crate) const RESUME_TOKEN: &str = "theirs+to/resume=";

/// The call on which peers are told of each other.
const COORDINATE: &str = "Coordinate";

/// A deployment of theirs with one agent.
pub(crate) struct Theirs {
    pub(crate) control: Program,
    pub(crate) relay: Program,
    pub(crate) agent: Program,
    pub(crate) agent_id: Uuid,
    _folder: TempDir,
}

/// What a deployment of theirs is to be like.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shape {
    /// So many workspaces are listed besides the agent's, without agents.
    pub(crate) more_workspaces: usize,
    /// Clients are told to reach relays by websocket only.
    pub(crate) forces_websockets: bool,
    /// Something before the relay takes plain upgrades out of requests.
    pub(crate) strips_upgrades: bool,
}

/// How our tunnel made itself known.
#[derive(Debug, Clone)]
pub(crate) struct Introduced {
    /// Its node key, as they write it.
    pub(crate) node: String,
    /// Its disco key, as they write it.
    pub(crate) disco: String,
    /// What it sent of itself.
    pub(crate) told: Value,
}

impl Theirs {
    /// Starts one.
    pub(crate) fn start(shape: Shape) -> Self {
        let strip: &[&str] = if shape.strips_upgrades { &["--strip"] } else { &[] };
        let relay = Program::start("relay", strip);
        let websocket: &[&str] = if shape.strips_upgrades { &["--websocket"] } else { &[] };
        let agent = agent_at(&relay, websocket);
        Self::around(relay, agent, random_id(), shape)
    }

    /// Starts one around a relay and an agent.
    pub(crate) fn around(relay: Program, agent: Program, agent_id: Uuid, shape: Shape) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let plan = folder.path().join("plan.json");
        fs::write(&plan, plan_of(&relay, agent_id, shape).to_string()).unwrap();
        let control = start_control(&plan);
        Self { control, relay, agent, agent_id, _folder: folder }
    }

    /// Starts a tunnel of ours in it, under a manager.
    pub(crate) fn join(&mut self, make: Make) -> Manager {
        let mut manager = Manager::launch(make, "1.3", Greeting::Listens);
        let started = manager.start(self.control.said("url"), TOKEN);
        assert!(started.success, "{}", started.error_message);
        manager
    }

    /// Waits until the tunnel has asked for the agent and introduced itself, and introduces them to each
    /// other.
    pub(crate) fn introduce(&mut self) -> Introduced {
        let asked = self.control.message(COORDINATE, "/addTunnel/id");
        assert_eq!(asked["addTunnel"]["id"], bytes(self.agent_id.as_bytes()));
        let told = self.control.message(COORDINATE, "/updateSelf/node")["updateSelf"]["node"].take();
        let key = STANDARD.decode(told["key"].as_str().unwrap()).unwrap();
        let node = format!("nodekey:{}", NodePublic::from_binary(&key).unwrap().to_hex());
        let disco = told["disco"].as_str().unwrap().to_owned();
        self.agent.order(json!({"order": "know", "node": node, "disco": disco}));
        self.tell_agent();
        Introduced { node, disco, told }
    }

    /// Tells the tunnel how the agent is reached, and that it is ready.
    pub(crate) fn tell_agent(&mut self) {
        let id = bytes(self.agent_id.as_bytes());
        let addresses = [tailscale_address(&self.agent_id), coder_address(&self.agent_id)];
        let addresses = addresses.map(|address| format!("{address}/128"));
        let node = json!({
            "id": "1", "asOf": "2026-01-02T03:04:05.678901Z",
            "key": self.agent.said("node_binary"), "disco": self.agent.said("disco"),
            "preferredDerp": REGION, "derpLatency": {format!("{REGION}-v4"): 0.001},
            "addresses": addresses, "allowedIps": addresses, "endpoints": ["192.0.2.1:41641"],
        });
        let updates = json!([
            {"id": id, "kind": "NODE", "node": node, "reason": "add tunnel"},
            {"id": id, "kind": "READY_FOR_HANDSHAKE"},
        ]);
        self.send(COORDINATE, json!({"peerUpdates": updates}));
    }

    /// Sends a message to the tunnel on the stream of a call.
    pub(crate) fn send(&mut self, rpc: &str, message: Value) {
        self.control.order(json!({"order": "send", "rpc": rpc, "message": message}));
    }

    /// Lets another relay, and an agent at it, take the place of the ones there were.
    pub(crate) fn replace_relay(&mut self) {
        self.relay = Program::start("relay", &[]);
        self.agent = agent_at(&self.relay, &[]);
        let map = map_of(&self.relay);
        self.send("StreamDERPMaps", map);
    }
}

/// An agent of theirs at a relay.
pub(crate) fn agent_at(relay: &Program, more: &[&str]) -> Program {
    let (url, region) = (format!("{}/derp", relay.said("url")), REGION.to_string());
    let own = ["--relay", &url, "--region", &region];
    Program::start("node", &[&own, more].concat())
}

/// Whether a message of the tunnel tells of an agent that answered a ping.
pub(crate) fn has_ping(message: &TunnelMessage) -> bool {
    let Some(Msg::PeerUpdate(update)) = &message.msg else { return false };
    update.upserted_agents.iter().any(|agent| agent.last_ping.is_some())
}

pub(crate) fn random_id() -> Uuid {
    Uuid::from_bytes(warren_proto::key::random())
}

/// Bytes as JSON has them.
pub(crate) fn bytes(raw: &[u8]) -> String {
    STANDARD.encode(raw)
}

/// Bytes from JSON.
pub(crate) fn unbytes(text: &Value) -> Vec<u8> {
    STANDARD.decode(text.as_str().unwrap()).unwrap()
}

fn start_control(plan: &Path) -> Program {
    Program::start("control", &["--schema", SCHEMA, "--plan", plan.to_str().unwrap()])
}

fn plan_of(relay: &Program, agent: Uuid, shape: Shape) -> Value {
    let workspace = random_id();
    let first = json!({"id": bytes(workspace.as_bytes()), "name": "dev", "status": "RUNNING"});
    let more = (0..shape.more_workspaces).map(|number| {
        let id = Uuid::from_u128(number as u128);
        json!({"id": bytes(id.as_bytes()), "name": format!("w{number}"), "status": "STOPPED"})
    });
    let agents = json!([
        {"id": bytes(agent.as_bytes()), "name": "main", "workspaceId": bytes(workspace.as_bytes())}
    ]);
    json!({
        "token": TOKEN,
        "user": {"id": Uuid::from_u128(7), "username": "alice"},
        "connection": {
            "derp_map": json_map_of(relay), "derp_force_websockets": shape.forces_websockets,
            "disable_direct_connections": false, "hostname_suffix": "coder",
        },
        "derp_map": map_of(relay),
        "workspaces": {
            "upsertedWorkspaces": std::iter::once(first).chain(more).collect::<Vec<_>>(),
            "upsertedAgents": agents,
        },
        "refresh": {
            "token": RESUME_TOKEN, "refreshIn": "3600s", "expiresAt": "2100-01-01T00:00:00Z",
        },
    })
}

fn port_of(relay: &Program) -> u16 {
    relay.said("url").rsplit_once(':').unwrap().1.parse().unwrap()
}

/// The map as a stream tells it.
fn map_of(relay: &Program) -> Value {
    let node = json!({
        "name": "7a", "regionId": REGION.to_string(), "hostName": "127.0.0.1", "ipv4": "127.0.0.1",
        "stunPort": -1, "derpPort": port_of(relay), "forceHttp": true,
    });
    let region = json!({
        "regionId": REGION.to_string(), "regionCode": "theirs", "regionName": "Theirs", "nodes": [node],
    });
    json!({"homeParams": {}, "regions": {REGION.to_string(): region}})
}

/// The map as HTTP tells it.
fn json_map_of(relay: &Program) -> Value {
    let node = json!({
        "Name": "7a", "RegionID": REGION, "HostName": "127.0.0.1", "IPv4": "127.0.0.1",
        "STUNPort": -1, "DERPPort": port_of(relay), "ForceHTTP": true,
    });
    let region = json!({
        "EmbeddedRelay": false, "RegionID": REGION, "RegionCode": "theirs", "RegionName": "Theirs",
        "Nodes": [node],
    });
    json!({"Regions": {REGION.to_string(): region}})
}
