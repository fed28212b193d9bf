//! The relay: our client at their server, and their client at the lab's.

use serde_json::{Value, json};
use warren_proto::key::NodePublic;

use crate::{
    deployment::{REGION, Shape, Theirs, bytes, has_ping, unbytes},
    doubles::Make,
    program::{Program, has_program},
    support::{Deployment, LIMIT},
};

/// The most that a relay carries in one packet.
const LARGEST: usize = 64 << 10;

#[test]
fn our_client_logs_in_at_their_relay_without_their_fast_start() {
    if !has_program("our client at their relay") {
        return;
    }
    let mut theirs = Theirs::start(Shape::default());
    let mut manager = theirs.join(Make::Service);
    theirs.introduce();
    manager.wait_for(has_ping);
    let upgrade = upgrade_of_ours(&mut theirs);
    assert_eq!(upgrade["to"], "DERP");
    assert_eq!(upgrade["header"]["Derp-Fast-Start"], json!(null), "{upgrade}");
    assert_eq!(upgrade["header"]["Coder-Session-Token"], json!(null), "a secret for a stranger: {upgrade}");
    theirs.relay.event("latency_check");
}

/// The next upgrade that our tunnel asked their relay for; the agent is written in Go, and says so.
fn upgrade_of_ours(theirs: &mut Theirs) -> Value {
    theirs.relay.wait(|event| event["event"] == "upgrade" && event["header"]["User-Agent"] == json!(null))
}

#[test]
fn our_client_speaks_websocket_with_their_relay_where_that_is_told() {
    if !has_program("our client at their relay, by websocket") {
        return;
    }
    let mut theirs = Theirs::start(Shape { forces_websockets: true, ..Shape::default() });
    let mut manager = theirs.join(Make::Service);
    theirs.introduce();
    manager.wait_for(has_ping);
    let upgrade = upgrade_of_ours(&mut theirs);
    assert_eq!(
        (&upgrade["to"], &upgrade["header"]["Sec-Websocket-Protocol"][0]),
        (&json!("websocket"), &json!("derp"))
    );
}

#[test]
fn our_client_falls_back_to_websocket_where_their_relay_never_sees_the_upgrade() {
    if !has_program("our client at their relay behind a proxy") {
        return;
    }
    let mut theirs = Theirs::start(Shape { strips_upgrades: true, ..Shape::default() });
    let mut manager = theirs.join(Make::Service);
    theirs.introduce();
    manager.wait_for(has_ping);
    assert_eq!(upgrade_of_ours(&mut theirs)["to"], "DERP");
    assert_eq!(upgrade_of_ours(&mut theirs)["to"], "websocket");
    theirs.control.forget();
    theirs.control.order(json!({"order": "drop"}));
    let told = theirs.introduce().told;
    let reason = told["derpForcedWebsocket"][REGION.to_string()].as_str().unwrap_or_default().to_owned();
    assert!(reason.starts_with("GET failed with status code 426"), "{told}");
}

#[test]
fn our_client_moves_on_when_their_relay_ends_and_the_map_names_another() {
    if !has_program("a change of their relay") {
        return;
    }
    let mut theirs = Theirs::start(Shape::default());
    let mut manager = theirs.join(Make::Service);
    let known = theirs.introduce();
    manager.wait_for(has_ping);

    theirs.replace_relay();
    theirs.agent.order(json!({"order": "know", "node": known.node, "disco": known.disco}));
    theirs.tell_agent();

    let ping = theirs.agent.event("ping");
    assert_eq!(ping["from"], known.node);
}

fn two_at(deployment: &Deployment, more: &[&str]) -> (Program, Program) {
    let url = format!("{}/derp", deployment.lab.url());
    let arguments = [&["--relay", &url], more].concat();
    (Program::start("node", &arguments), Program::start("node", &arguments))
}

#[test]
fn their_clients_pass_packets_of_every_size_through_the_lab_by_upgrade_and_by_websocket() {
    if !has_program("their clients at the lab's relay") {
        return;
    }
    let deployment = Deployment::start(0);
    let relay = deployment.lab.relay();
    for more in [&[][..], &["--websocket"]] {
        // Each way in is the only one.
        let refused = hyper::StatusCode::BAD_REQUEST;
        relay.refuse_plain_upgrades((!more.is_empty()).then_some((refused, "")));
        relay.refuse_websockets(more.is_empty().then_some(refused));
        let (mut one, mut two) = two_at(&deployment, more);
        assert_eq!(one.said("relay"), format!("nodekey:{}", relay.public().to_hex()));
        for length in [1, 1312, LARGEST] {
            let packet: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            one.order(json!({"order": "send", "node": two.said("node"), "bytes": bytes(&packet)}));
            let received = two.event("packet");
            assert_eq!(received["from"], one.said("node"));
            assert_eq!(unbytes(&received["bytes"]), packet);
        }
        two.order(json!({"order": "prefer", "preferred": true}));
        two.order(json!({"order": "relay_ping"}));
        assert_eq!(two.event("relay_pong")["error"], json!(null));
    }
}

#[test]
fn their_clients_hear_of_peers_that_leave_or_are_not_there() {
    if !has_program("their clients at the lab's relay, alone") {
        return;
    }
    let deployment = Deployment::start(0);
    let (mut one, mut two) = two_at(&deployment, &[]);
    // Who was sent something hears that the sender is gone.
    two.order(json!({"order": "send", "node": one.said("node"), "bytes": bytes(b"hello")}));
    one.event("packet");
    let left = two.said("node").to_owned();
    drop(two);
    let gone = one.event("gone");
    assert_eq!((&gone["node"], &gone["reason"]), (&json!(left), &json!(0)));
    // Only probes are answered so.
    one.order(json!({"order": "know", "node": left, "disco": one.said("disco")}));
    one.order(json!({"order": "ping", "node": left}));
    let absent = one.event("gone");
    assert_eq!((&absent["node"], &absent["reason"]), (&json!(left), &json!(1)));
}

#[test]
fn their_clients_understand_what_the_lab_says_of_itself_and_log_in_again_when_it_closes() {
    if !has_program("their clients at a relay of ours that closes") {
        return;
    }
    const PING: u8 = 0x12;
    const HEALTH: u8 = 0x14;
    const RESTARTING: u8 = 0x15;
    let deployment = Deployment::start(0);
    let (mut one, mut two) = two_at(&deployment, &[]);
    let relay = deployment.lab.relay();
    relay.inject(HEALTH, b"not well");
    assert_eq!(one.event("health")["problem"], "not well");
    relay.inject(RESTARTING, &[0, 0, 0x03, 0xe8, 0, 0, 0x07, 0xd0]);
    let restarting = one.event("restarting");
    assert_eq!((&restarting["in"], &restarting["for"]), (&json!("1s"), &json!("2s")));
    relay.inject(PING, b"12345678");
    one.event("relay_ping");

    one.forget();
    let key = NodePublic::from_hex(one.said("node").strip_prefix("nodekey:").unwrap()).unwrap();
    relay.kill(&key);

    one.event("lost");
    one.event("server_info");
    assert!(deployment.runtime.block_on(relay.wait_for(&key, true, LIMIT)));
    one.order(json!({"order": "send", "node": two.said("node"), "bytes": bytes(b"again")}));
    assert_eq!(unbytes(&two.event("packet")["bytes"]), b"again");
}
