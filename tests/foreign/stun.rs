//! Questions about our own address: our codec and theirs read what the other writes.

use std::net::SocketAddr;

use serde_json::json;
use warren_proto::{key::random, stun};

use crate::{
    deployment::{bytes, unbytes},
    program::{Program, has_program},
};

const ADDRESSES: [&str; 4] = ["192.0.2.1:41641", "255.255.255.255:1", "[2001:db8::1]:41641", "[::]:65535"];

#[test]
fn our_questions_are_answered_by_their_server_and_we_read_its_answers() {
    if !has_program("their STUN server") {
        return;
    }
    let mut theirs = Program::start("stun", &[]);
    for address in ADDRESSES {
        let txid: stun::TxId = random();
        theirs.order(json!({ "order": "answer", "bytes": bytes(&stun::request(&txid)), "address": address }));
        let answered = theirs.event("answered");
        let answer = stun::Response::decode(&unbytes(&answered["bytes"])).unwrap();
        assert_eq!(answer, stun::Response { txid, address: address.parse().unwrap() });
    }
}

#[test]
fn their_questions_are_read_and_our_answers_to_them_understood() {
    if !has_program("their STUN client") {
        return;
    }
    let mut theirs = Program::start("stun", &[]);
    for address in ADDRESSES {
        theirs.order(json!({ "order": "ask" }));
        let asked = theirs.event("asked");
        let txid = stun::read_request(&unbytes(&asked["bytes"])).unwrap();
        assert_eq!(json!(bytes(&txid)), asked["id"]);
        let address: SocketAddr = address.parse().unwrap();
        let answer = stun::Response { txid, address }.encode();
        theirs.order(json!({ "order": "read", "bytes": bytes(&answer) }));
        let read = theirs.event("read");
        assert_eq!((&read["id"], &read["address"]), (&json!(bytes(&txid)), &json!(address.to_string())));
    }
}
