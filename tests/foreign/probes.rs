//! Probes of paths: our tunnel and their agent, their client and the lab's agent, over either's relay.

use serde_json::{Value, json};
use warren_proto::disco;

use crate::{
    deployment::{REGION, Shape, Theirs, bytes, has_ping, unbytes},
    doubles::Make,
    program::{Program, SCHEMA, has_program},
    support::Deployment,
};

/// What their deployments pad probes with.
const PADDING: usize = 1186;
/// The first message of a WireGuard handshake.
const INITIATION: (u8, usize) = (1, 148);

fn transaction(number: u8) -> [u8; 12] {
    [number; 12]
}

fn is_pong(number: u8) -> impl Fn(&Value) -> bool {
    move |event| event["event"] == "pong" && unbytes(&event["transaction"]) == transaction(number)
}

#[test]
fn our_tunnel_and_their_agent_answer_each_other_over_their_relay() {
    if !has_program("probes between our tunnel and their agent") {
        return;
    }
    let mut theirs = Theirs::start(Shape::default());
    let mut manager = theirs.join(Make::Service);
    let known = theirs.introduce();

    let ping = theirs.agent.event("ping");
    assert_eq!((&ping["from"], &ping["node"]), (&json!(known.node), &json!(known.node)));
    assert_eq!(ping["length"], disco::PADDED);
    manager.wait_for(has_ping);
    let first = theirs.agent.event("packet");
    let packet = unbytes(&first["bytes"]);
    assert_eq!((packet[0], packet.len()), INITIATION, "a handshake begins: {first}");

    for (number, padding) in [(1, 0), (2, PADDING)] {
        let asked = bytes(&transaction(number));
        theirs.agent.order(json!({"order": "ping", "node": known.node, "bytes": asked, "padding": padding}));
        let pong = theirs.agent.wait(is_pong(number));
        assert_eq!((&pong["from"], &pong["length"]), (&json!(known.node), &json!(disco::PADDED)));
        assert_eq!(pong["src"], format!("127.3.3.40:{REGION}"));
    }
}

#[test]
fn our_tunnel_takes_their_calls_for_direct_paths_and_goes_on() {
    if !has_program("calls of their agent") {
        return;
    }
    let mut theirs = Theirs::start(Shape::default());
    let _manager = theirs.join(Make::Service);
    let known = theirs.introduce();
    theirs.agent.event("ping");
    for endpoints in [json!([]), json!(["192.0.2.1:41641", "[2001:db8::1]:41641"])] {
        theirs.agent.order(json!({"order": "call_me_maybe", "node": known.node, "endpoints": endpoints}));
    }
    theirs.agent.order(json!({"order": "ping", "node": known.node, "bytes": bytes(&transaction(3))}));
    theirs.agent.wait(is_pong(3));
}

#[test]
fn their_client_and_the_labs_agent_answer_each_other_over_the_labs_relay() {
    if !has_program("probes between their client and the lab's agent") {
        return;
    }
    let deployment = Deployment::start(1);
    let agent = deployment.lab.agents()[0].clone();
    let (url, token) = deployment.access();
    let mut node = Program::start("node", &["--relay", &format!("{url}/derp")]);
    let mut client =
        Program::start("control-client", &["--schema", SCHEMA, "--url", &url, "--token", &token]);
    let address = "fd60:627a:a42b:1:2:3:4:5/128";
    let own = json!({
        "id": "5", "key": node.said("node_binary"), "disco": node.said("disco"), "preferredDerp": 999,
        "addresses": [address], "allowedIps": [address],
    });
    let tunnel = json!({"addTunnel": {"id": bytes(agent.id.as_bytes())}});
    client.order(json!({"order": "open", "rpc": "Coordinate", "message": tunnel}));
    client.order(json!({"order": "send", "rpc": "Coordinate", "message": {"updateSelf": {"node": own}}}));

    let update = client.message("Coordinate", "/peerUpdates/0/node");
    let told = &update["peerUpdates"][0]["node"];
    let key = deployment.lab.agent_key(agent.id).unwrap();
    assert_eq!(unbytes(&told["key"]), key.to_binary());
    let its = format!("nodekey:{}", key.to_hex());
    node.order(json!({"order": "know", "node": its, "disco": told["disco"]}));
    let is_ready = |event: &Value| {
        let updates = event["message"]["peerUpdates"].as_array().cloned().unwrap_or_default();
        updates.iter().any(|update| update["kind"] == "READY_FOR_HANDSHAKE")
    };
    client.wait(is_ready);

    for (number, padding) in [(1, 0), (2, PADDING)] {
        let asked = bytes(&transaction(number));
        node.order(json!({"order": "ping", "node": its, "bytes": asked, "padding": padding}));
        let pong = node.wait(is_pong(number));
        assert_eq!((&pong["from"], &pong["src"]), (&json!(its), &json!("127.3.3.40:999")));
    }
}
