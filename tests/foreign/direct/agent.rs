//! The Go program as an agent in the lab: the test carries what it and the coordinator tell each other.

use std::{
    net::{Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::sync::mpsc;
use uuid::Uuid;
use warren_lab::Seat;
use warren_proto::{
    address::coder_address,
    key::NodePublic,
    tailnet::{
        CoordinateRequest, CoordinateResponse, Node,
        coordinate_request::{ReadyForHandshake, UpdateSelf},
        coordinate_response::{PeerUpdate, peer_update::Kind},
    },
};

use crate::{
    deployment::unbytes,
    program::{Orders, Program},
    support::Deployment,
};

/// An agent of theirs in place of the lab's.
pub(super) struct ForeignAgent {
    pub(super) program: Program,
    address: Ipv6Addr,
    heard: Arc<Mutex<Vec<(Instant, Value)>>>,
}

/// Whether it says that its packets go directly from now on.
pub(super) fn is_direct(event: &Value) -> bool {
    event["event"] == "path" && event["address"] != ""
}

/// Whether it says that they go by the relay from now on.
pub(super) fn is_relayed(event: &Value) -> bool {
    event["event"] == "path" && event["address"] == ""
}

impl ForeignAgent {
    /// Takes the place of the first agent, and waits until it has told where it is.
    pub(super) fn start(deployment: &Deployment) -> Self {
        let id = deployment.lab.agents()[0].id;
        let address = coder_address(&id);
        let (seat, responses) = deployment.runtime.block_on(deployment.lab.seat(id));
        let (url, token) = deployment.access();
        let own = ["--url", &url, "--token", &token, "--address", &address.to_string()];
        let heard = Arc::new(Mutex::new(Vec::new()));
        let mut speaker = Speaker { seat, address, keys: Value::Null, told: Value::Null };
        let record = Arc::clone(&heard);
        let mut program = Program::start_overheard("agent", &own, move |event| {
            record.lock().unwrap().push((Instant::now(), event.clone()));
            speaker.hear(event);
        });
        deployment.runtime.spawn(listen(responses, program.orders()));
        program.wait(|event| {
            event["event"] == "self" && !event["endpoints"].as_array().is_none_or(Vec::is_empty)
        });
        Self { program, address, heard }
    }

    /// Loses its datagrams from now on: those `sent`, those `received`, or `both`.
    pub(super) fn block_udp(&mut self, direction: &str) {
        self.program.order(json!({"order": "block_udp", "text": direction}));
    }

    /// Loses none any more.
    pub(super) fn allow_udp(&mut self) {
        self.program.order(json!({"order": "allow_udp"}));
    }

    /// Where its stack sends back what it gets.
    pub(super) fn echoes_at(&self) -> SocketAddr {
        let port = self.program.ready["port"].as_u64().unwrap();
        (self.address, u16::try_from(port).unwrap()).into()
    }

    /// How many datagrams of WireGuard it has got.
    pub(super) fn wireguard_over_udp(&mut self) -> u64 {
        self.program.order(json!({"order": "count"}));
        self.program.event("counted")["wireguard"].as_u64().unwrap()
    }

    /// How long after the first event of one kind the first of another was heard.
    pub(super) fn between(&self, from: impl Fn(&Value) -> bool, to: impl Fn(&Value) -> bool) -> Duration {
        let heard = self.heard.lock().unwrap();
        let first = |is_it: &dyn Fn(&Value) -> bool| heard.iter().find(|(_, event)| is_it(event)).unwrap().0;
        first(&to).saturating_duration_since(first(&from))
    }
}

/// Tells the coordinator what the agent says.
struct Speaker {
    seat: Seat,
    address: Ipv6Addr,
    keys: Value,
    told: Value,
}

impl Speaker {
    fn hear(&mut self, event: &Value) {
        match event["event"].as_str() {
            Some("ready") => self.keys = event.clone(),
            Some("self") => self.told = event.clone(),
            Some("knows") => {
                let id: Uuid = event["id"].as_str().unwrap().parse().unwrap();
                let ready_for_handshake = vec![ReadyForHandshake { id: id.as_bytes().to_vec().into() }];
                self.seat.say(CoordinateRequest { ready_for_handshake, ..CoordinateRequest::default() });
                return;
            }
            _ => return,
        }
        if self.keys != Value::Null && self.told != Value::Null {
            let update_self = Some(UpdateSelf { node: Some(self.node()) });
            self.seat.say(CoordinateRequest { update_self, ..CoordinateRequest::default() });
        }
    }

    fn node(&self) -> Node {
        let addresses = vec![format!("{}/128", self.address)];
        let endpoints = self.told["endpoints"].as_array().into_iter().flatten();
        Node {
            id: 1,
            key: unbytes(&self.keys["node_binary"]).into(),
            disco: self.keys["disco"].as_str().unwrap().to_owned(),
            preferred_derp: i32::try_from(self.told["region"].as_i64().unwrap()).unwrap(),
            allowed_ips: addresses.clone(),
            addresses,
            endpoints: endpoints.map(|endpoint| endpoint.as_str().unwrap().to_owned()).collect(),
            ..Node::default()
        }
    }
}

/// Tells the agent what the coordinator says of its peers.
async fn listen(mut responses: mpsc::Receiver<CoordinateResponse>, orders: Orders) {
    while let Some(response) = responses.recv().await {
        for order in response.peer_updates.iter().filter_map(order_of) {
            if orders.give(&order).is_err() {
                return;
            }
        }
    }
}

fn order_of(update: &PeerUpdate) -> Option<Value> {
    let (Kind::Node, Some(node)) = (update.kind(), &update.node) else { return None };
    let key = NodePublic::from_binary(&node.key).unwrap();
    Some(json!({
        "order": "know", "text": Uuid::from_slice(&update.id).unwrap(), "region": node.preferred_derp,
        "node": format!("nodekey:{}", key.to_hex()), "disco": node.disco,
        "endpoints": node.endpoints, "addresses": node.addresses,
    }))
}
