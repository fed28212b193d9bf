//! Golden vectors of the data plane: what was recorded is read as it means, and written again byte for byte.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

#[path = "support/json.rs"]
mod json;
#[path = "support/tailnet_form.rs"]
mod tailnet_form;

use std::net::{IpAddr, Ipv6Addr};

use json::{array, hex, list, text, to_hex};
use prost::Message as _;
use serde_json::{Value, json};
use uuid::Uuid;
use warren_proto::{
    address::{self, CODER_PREFIX, TAILSCALE_PREFIX},
    derp::{self, ClientInfo, DerpError, Frame, Gone, Header, ServerInfo},
    disco,
    key::{BoxShared, DiscoPrivate, DiscoPublic, NodePrivate, NodePublic},
    stun, tailnet, tsmp,
};

/// The vectors whose names start so.
fn vectors(file: &str, prefix: &str) -> Vec<Value> {
    let all = json::load("data", file);
    let found: Vec<_> =
        list(&all, "vectors").iter().filter(|it| text(it, "name").starts_with(prefix)).cloned().collect();
    assert!(!found.is_empty(), "{file}: {prefix}");
    found
}

fn bytes(vector: &Value) -> Vec<u8> {
    hex(vector, "bytes")
}

#[test]
fn keys_have_the_forms_recorded() {
    for vector in vectors("keys", "node-key-") {
        let key = NodePrivate::from_bytes(array(&vector["inputs"], "private_before_clamp"));
        let (public, expected) = (key.public(), &vector["decoded"]);
        assert_eq!(public.to_binary().as_slice(), bytes(&vector));
        assert_eq!(NodePublic::from_binary(&bytes(&vector)), Ok(public));
        assert_eq!(public.to_hex(), text(expected, "public_hex"));
        assert_eq!(public.to_string(), text(expected, "public_text"));
        assert_eq!(format!("{public:?}"), text(expected, "short"));
    }
    for vector in vectors("keys", "disco-key-") {
        let public = DiscoPrivate::from_bytes(array(&vector["inputs"], "private_clamped")).public();
        assert_eq!(public.as_bytes().as_slice(), bytes(&vector));
        assert_eq!(public.to_string(), text(&vector["decoded"], "public_text"));
        assert_eq!(format!("{public:?}"), text(&vector["decoded"], "short"));
    }
}

#[test]
fn key_texts_and_bytes_are_accepted_as_recorded() {
    let outcome =
        |is_zero: Option<bool>| json!({"accepted": is_zero.is_some(), "is_zero": is_zero == Some(true)});
    for vector in vectors("keys", "node-text-") {
        let key = text(&vector["inputs"], "text").parse::<NodePublic>().ok();
        assert_eq!(outcome(key.map(|key| key.is_zero())), vector["decoded"], "{}", text(&vector, "name"));
    }
    for vector in vectors("keys", "disco-text-") {
        let key = text(&vector["inputs"], "text").parse::<DiscoPublic>().ok();
        assert_eq!(outcome(key.map(|key| key.is_zero())), vector["decoded"], "{}", text(&vector, "name"));
    }
    for vector in vectors("keys", "node-binary-") {
        let is_accepted = NodePublic::from_binary(&bytes(&vector)).is_ok();
        assert_eq!(json!(is_accepted), vector["decoded"]["accepted"], "{}", text(&vector, "name"));
    }
}

#[test]
fn shared_secrets_are_those_recorded() {
    use crypto_secretbox::{
        KeyInit, XSalsa20Poly1305,
        aead::{Aead, generic_array::GenericArray},
    };
    for vector in vectors("keys", "box-shared-") {
        let private = NodePrivate::from_bytes(array(&vector["inputs"], "private"));
        let shared = private.shared(&NodePublic(array(&vector["inputs"], "peer_public")));
        let recorded = XSalsa20Poly1305::new(GenericArray::from_slice(&bytes(&vector)));
        let opened =
            recorded.decrypt(GenericArray::from_slice(&[3; 24]), shared.seal(&[3; 24], b"hello").as_slice());
        assert_eq!(opened.unwrap(), b"hello", "{}", text(&vector, "name"));
    }
}

#[test]
fn boxes_are_sealed_and_opened_as_recorded() {
    for vector in vectors("boxes", "") {
        let inputs = &vector["inputs"];
        let receiver = NodePrivate::from_bytes(array(inputs, "receiver_private"));
        let theirs = receiver.shared(&NodePublic(array(inputs, "sender_public")));
        if vector["decoded"]["opens"] == false {
            assert_eq!(theirs.open_with_nonce(&bytes(&vector)), None);
            continue;
        }
        let sender = NodePrivate::from_bytes(array(inputs, "sender_private"));
        assert_eq!(sender.public(), NodePublic(array(inputs, "sender_public")));
        let ours = sender.shared(&receiver.public());
        let plaintext = hex(inputs, "plaintext");
        assert_eq!(theirs.open_with_nonce(&bytes(&vector)).unwrap(), plaintext, "{}", text(&vector, "name"));
        assert_eq!(ours.seal_with_nonce(&array(inputs, "nonce"), &plaintext), bytes(&vector));
    }
}

/// Conforms: control:N12
#[test]
fn an_id_gives_the_addresses_and_the_label_recorded() {
    for vector in vectors("addresses", "uuid-") {
        let id: Uuid = text(&vector["inputs"], "uuid").parse().unwrap();
        let decoded = json!({
            "coder_prefix": format!("{}/128", address::coder_address(&id)),
            "tailscale_prefix": format!("{}/128", address::tailscale_address(&id)),
            "node_id": address::node_id(&id).to_string(),
        });
        assert_eq!(decoded, vector["decoded"]);
        assert_eq!(id.as_bytes().as_slice(), bytes(&vector));
    }
    let prefixes = &vectors("addresses", "prefixes")[0]["decoded"];
    assert_eq!(CODER_PREFIX.to_string(), text(prefixes, "coder"));
    assert_eq!(TAILSCALE_PREFIX.to_string(), text(prefixes, "tailscale"));
}

/// Conforms: data:20.1.5
#[test]
fn the_addresses_of_the_specifications_id_are_its_own() {
    let id: Uuid = "01020304-0506-0708-090a-0b0c0d0e0f10".parse().unwrap();
    let address = |text: &str| text.parse::<Ipv6Addr>().unwrap();
    let tailscale = address("fd7a:115c:a1e0:0708:090a:0b0c:0d0e:0f10");
    assert_eq!(address::tailscale_address(&id), tailscale);
    assert_eq!(address::coder_address(&id), address("fd60:627a:a42b:0708:090a:0b0c:0d0e:0f10"));
}

/// The first frame, if it is whole.
fn first_frame(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, DerpError> {
    let Some(header) = Header::read(bytes)? else { return Ok(None) };
    let Some(body) = bytes[derp::HEADER..].get(..header.length) else { return Ok(None) };
    Frame::read(&header, body).map(|frame| Some((frame, derp::HEADER + header.length)))
}

/// What the two ends of recorded logins share.
fn login_shared() -> BoxShared {
    let server = NodePrivate::from_bytes([2; 32]).public();
    NodePrivate::from_bytes([1; 32]).shared(&server)
}

#[test]
fn frames_are_written_as_recorded_and_read_back() {
    let (nonce, shared) = ([3; 24], login_shared());
    let [client, server] = [1, 2].map(|byte| NodePrivate::from_bytes([byte; 32]).public());
    let (a, b) = (NodePublic([0x33; 32]), NodePublic([0x44; 32]));
    let hello = ClientInfo::OURS.seal(&shared, &nonce);
    let frames = [
        ("server-key", Frame::ServerKey(server)),
        ("client-info", Frame::ClientInfo(client, &hello)),
        ("note-preferred-true", Frame::NotePreferred(true)),
        ("note-preferred-false", Frame::NotePreferred(false)),
        ("send-packet", Frame::SendPacket(a, &[0xde, 0xad, 0xbe, 0xef])),
        ("send-packet-empty", Frame::SendPacket(a, &[])),
        ("ping", Frame::Ping([1, 2, 3, 4, 5, 6, 7, 8])),
        ("pong", Frame::Pong([8, 7, 6, 5, 4, 3, 2, 1])),
        ("watch-conns", Frame::WatchConnections),
        ("close-peer", Frame::ClosePeer(a)),
        ("forward-packet", Frame::ForwardPacket(b, a, &[1, 2, 3])),
    ];
    for (name, frame) in frames {
        let vector = &vectors("derp-frames", name)[0];
        assert_eq!(frame.encode(), bytes(vector), "{name}");
        assert_eq!(first_frame(&bytes(vector)), Ok(Some((frame, bytes(vector).len()))), "{name}");
        assert_eq!(json!(bytes(vector)[0]), vector["decoded"]["type"], "{name}");
    }
}

/// Conforms: data:20.1.2
#[test]
fn the_login_of_the_specification_is_written_byte_for_byte() {
    let sealed = ClientInfo::OURS.seal(&login_shared(), &[3; 24]);
    let frame = Frame::ClientInfo(NodePrivate::from_bytes([1; 32]).public(), &sealed).encode();
    let expected = "0200000068a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209\
                    030303030303030303030303030303030303030303030303\
                    e7b00139777df0c828b9b7fc70d6759a9809096a596553c14a221c455688839aa41bc3de387d64832579893200101f4e";
    assert_eq!(to_hex(&frame), expected);
}

/// What a client makes of frames after the login: the events, unless it ends the connection.
fn client_events(mut bytes: &[u8]) -> Option<Vec<Value>> {
    let mut events = Vec::new();
    while let Some(header) = Header::read(bytes).ok()? {
        let (body, rest) = bytes[derp::HEADER..].split_at(header.length);
        bytes = rest;
        match Frame::read(&header, body) {
            Ok(frame) => events.extend(client_event(frame)?),
            // What is too short is skipped.
            Err(DerpError::Size(..) | DerpError::Greeting) => {}
            Err(error) => panic!("{error}"),
        }
    }
    Some(events)
}

/// The event of a frame; `Some(None)` if there is none, `None` if it is fatal.
fn client_event(frame: Frame<'_>) -> Option<Option<Value>> {
    Some(Some(match frame {
        Frame::ServerInfo(sealed) => {
            let info = ServerInfo::open(sealed, &login_shared()).ok()?;
            json!({"event": "server_info", "bytes_per_second": info.bytes_per_second, "burst": info.burst})
        }
        Frame::RecvPacket(from, packet) => {
            json!({"event": "packet", "source": from.to_hex(), "data": to_hex(packet)})
        }
        Frame::KeepAlive => json!({"event": "keepalive"}),
        Frame::PeerGone(peer, reason) => {
            let reason = match reason {
                Gone::Disconnected => 0,
                Gone::NotHere => 1,
                Gone::Other(other) => other,
            };
            json!({"event": "peer_gone", "peer": peer.to_hex(), "reason": reason})
        }
        Frame::PeerPresent(peer) => json!({"event": "peer_present", "peer": peer.to_hex()}),
        Frame::Ping(data) => json!({"event": "ping", "data": to_hex(&data)}),
        Frame::Pong(data) => json!({"event": "pong", "data": to_hex(&data)}),
        Frame::Health(problem) => json!({"event": "health", "problem": String::from_utf8_lossy(problem)}),
        Frame::Restarting { reconnect_in, try_for } => json!({
            "event": "restarting",
            "reconnect_in_ms": reconnect_in.as_millis() as u64,
            "try_for_ms": try_for.as_millis() as u64,
        }),
        Frame::ServerKey(_)
        | Frame::ClientInfo(..)
        | Frame::SendPacket(..)
        | Frame::NotePreferred(_)
        | Frame::ForwardPacket(..)
        | Frame::WatchConnections
        | Frame::ClosePeer(_)
        | Frame::Unknown => return Some(None),
    }))
}

#[test]
fn a_client_reads_each_frame_as_recorded() {
    for vector in vectors("derp-frames", "in-") {
        let events = client_events(&bytes(&vector));
        let expected = list(&vector["decoded"], "events");
        assert_eq!(json!(events.is_none()), vector["decoded"]["fatal"], "{}", text(&vector, "name"));
        assert_eq!(events.unwrap_or_default(), expected, "{}", text(&vector, "name"));
    }
}

#[test]
fn frames_of_relays_are_written_as_recorded() {
    for vector in vectors("derp-frames", "in-") {
        // Those without unknown parts come out as they came in.
        let odd = ["payload", "trailing", "old", "long", "short", "type", "bad", "future"];
        if vector["decoded"]["fatal"] == true || odd.iter().any(|word| text(&vector, "name").contains(word)) {
            continue;
        }
        let bytes = bytes(&vector);
        let (frame, _) = first_frame(&bytes).unwrap().unwrap();
        assert_eq!(frame.encode(), bytes, "{}", text(&vector, "name"));
    }
}

#[test]
fn what_relays_say_of_themselves_is_written_as_recorded() {
    let cases = [("in-server-info", 4, 0, 0), ("in-server-info-rate", 5, 1_000_000, 65_536)];
    for (name, nonce, bytes_per_second, burst) in cases {
        let info = ServerInfo { version: derp::VERSION, bytes_per_second, burst };
        let sealed = info.seal(&login_shared(), &[nonce; 24]);
        assert_eq!(Frame::ServerInfo(&sealed).encode(), bytes(&vectors("derp-frames", name)[0]), "{name}");
    }
}

#[test]
fn greetings_are_accepted_as_recorded() {
    for vector in vectors("derp-frames", "greeting-") {
        let bytes = bytes(&vector);
        let is_accepted = matches!(first_frame(&bytes), Ok(Some((Frame::ServerKey(_), _))));
        assert_eq!(json!(is_accepted), vector["decoded"]["accepted"], "{}", text(&vector, "name"));
    }
}

#[test]
fn logins_are_accepted_as_recorded() {
    let server = NodePrivate::from_bytes([2; 32]);
    for vector in vectors("derp-frames", "login-") {
        let bytes = bytes(&vector);
        let is_accepted = match first_frame(&bytes) {
            Ok(Some((Frame::ClientInfo(client, sealed), _))) => {
                ClientInfo::open(sealed, &server.shared(&client)).is_ok()
            }
            _ => false,
        };
        assert_eq!(json!(is_accepted), vector["decoded"]["accepted"], "{}", text(&vector, "name"));
    }
}

#[test]
fn what_makes_a_relay_hang_up_is_refused_or_known_for_it() {
    for vector in vectors("derp-frames", "srv-") {
        let inputs = &vector["inputs"];
        let bytes = match inputs["payload_length"].as_u64() {
            Some(length) => {
                let packet = vec![0; usize::try_from(length).unwrap() - 32];
                Frame::SendPacket(NodePublic([0x33; 32]), &packet).encode()
            }
            None => bytes(&vector),
        };
        let survives = match first_frame(&bytes) {
            // Meant for other relays, or too long for a ping: for the relay to judge.
            Ok(Some((Frame::WatchConnections | Frame::ClosePeer(_) | Frame::ForwardPacket(..), _))) => false,
            Ok(Some((Frame::Ping(_), length))) => length - derp::HEADER <= 1000,
            other => other.is_ok(),
        };
        assert_eq!(json!(survives), vector["decoded"]["connection_survives"], "{}", text(&vector, "name"));
    }
}

/// The `decoded` form of a probe's message.
fn disco_form(message: &disco::Message) -> Value {
    match message {
        disco::Message::Ping { txid, node: Some(node) } => {
            json!({"message": "ping", "txid": to_hex(txid), "node_key": node.to_hex()})
        }
        disco::Message::Ping { txid, node: None } => json!({"message": "ping", "txid": to_hex(txid)}),
        disco::Message::Pong { txid, source } => {
            json!({"message": "pong", "txid": to_hex(txid), "src": source.to_string()})
        }
        disco::Message::CallMeMaybe(endpoints) => json!({
            "message": "call-me-maybe",
            "endpoints": endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }),
    }
}

#[test]
fn plaintexts_of_probes_are_read_as_recorded() {
    for vector in vectors("disco", "parse-") {
        let message = disco::Message::decode(&bytes(&vector));
        let mut decoded = message.as_ref().map_or_else(|_| json!({}), disco_form);
        decoded["accepted"] = json!(message.is_ok());
        assert_eq!(decoded, vector["decoded"], "{}", text(&vector, "name"));
    }
}

#[test]
fn envelopes_of_probes_open_as_recorded_and_are_sealed_again_byte_for_byte() {
    let all = ["ping-", "pong-", "call-me-maybe"].map(|prefix| vectors("disco", prefix)).concat();
    for vector in all {
        let (name, inputs, decoded) = (text(&vector, "name"), &vector["inputs"], &vector["decoded"]);
        let sender = DiscoPrivate::from_bytes(array(inputs, "sender_private"));
        let receiver = DiscoPrivate::from_bytes(array(inputs, "receiver_private"));
        let (ours, theirs) = (sender.shared(&receiver.public()), receiver.shared(&sender.public()));
        let packet = bytes(&vector);
        assert!(disco::is_probe(&packet), "{name}");
        assert_eq!(disco::sender(&packet), Some(sender.public()), "{name}");
        let message = disco::open(&packet, &theirs).unwrap();
        let form = disco_form(&message);
        for member in ["txid", "node_key", "src", "endpoints"] {
            assert_eq!(form[member], decoded[member], "{name}: {member}");
        }
        let plaintext = hex(inputs, "plaintext");
        let is_call = matches!(message, disco::Message::CallMeMaybe(_));
        if decoded["version"] == if is_call { 0 } else { 1 } {
            let mut written = Vec::new();
            message.encode(&mut written);
            assert!(written.len() <= plaintext.len(), "{name}");
            // What is left is padding.
            written.resize(plaintext.len(), 0);
            assert_eq!(to_hex(&written), to_hex(&plaintext), "{name}");
        }
        let nonce = array(inputs, "nonce");
        if packet.len() == disco::PADDED || is_call {
            assert_eq!(disco::seal(&message, &sender.public(), &ours, &nonce), packet, "{name}");
        }
        assert!(packet.ends_with(&ours.seal_with_nonce(&nonce, &plaintext)), "{name}");
    }
}

/// Conforms: data:20.1.1
#[test]
fn the_probe_of_the_specification_is_sealed_byte_for_byte_and_opens() {
    let [a, b] = [1, 2].map(|byte| DiscoPrivate::from_bytes([byte; 32]));
    let packet = "5453f09f92aca4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209\
                  030303030303030303030303030303030303030303030303\
                  bf133a6a2fac7a435ec75c765b320456e22b7f0e29153eab22072e7e70a1d1ea\
                  db4bb1a479051bf5474aa25763746b22038bd5a513f9b0be4a24540e0dce";
    let packet = hex(&json!({"packet": packet}), "packet");
    let message = disco::Message::Ping {
        txid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        node: Some(NodePublic([0x11; 32])),
    };
    assert_eq!(disco::open(&packet, &b.shared(&a.public())), Ok(message.clone()));
    // Version 0, which we never send: sealed by hand.
    let mut plaintext = Vec::new();
    message.encode(&mut plaintext);
    plaintext[1] = 0;
    let sealed = a.shared(&b.public()).seal_with_nonce(&[3; 24], &plaintext);
    let written = [packet[..6].as_ref(), a.public().as_bytes(), &sealed].concat();
    assert_eq!(to_hex(&written), to_hex(&packet));
}

#[test]
fn what_looks_like_a_probe_does_so_as_recorded() {
    for vector in vectors("disco", "look-") {
        let (packet, decoded) = (bytes(&vector), &vector["decoded"]);
        assert_eq!(json!(disco::is_probe(&packet)), decoded["relay_says_disco"]);
        assert_eq!(json!(disco::sender(&packet).is_some()), decoded["receiver_consumes_as_disco"]);
    }
}

/// Conforms: data:20.1.3
#[test]
fn questions_for_our_address_are_asked_as_recorded() {
    for (name, prefix) in [("request", "0001"), ("request-2", "abab")] {
        let vector = &vectors("stun", name)[0];
        let txid = array(&vector["inputs"], "txid");
        assert!(to_hex(&txid).starts_with(prefix));
        assert_eq!(to_hex(&stun::request(&txid)), text(vector, "bytes"));
    }
}

#[test]
fn questions_for_an_address_are_answered_or_not_as_recorded() {
    for vector in vectors("stun", "srv-request-") {
        let (read, decoded) = (stun::read_request(&bytes(&vector)), &vector["decoded"]);
        assert_eq!(json!(read.is_ok()), decoded["accepted"], "{}", text(&vector, "name"));
        assert_eq!(to_hex(&read.unwrap_or_default()), text(decoded, "txid"));
    }
}

#[test]
fn answers_about_our_address_are_read_as_recorded() {
    for vector in vectors("stun", "response-") {
        let (name, packet) = (text(&vector, "name"), bytes(&vector));
        let mut decoded = json!({"is_stun": stun::is_stun(&packet), "accepted": false});
        if let Ok(stun::Response { txid, address }) = stun::Response::decode(&packet) {
            decoded["accepted"] = json!(true);
            decoded["txid"] = json!(to_hex(&txid));
            decoded["address"] = json!(address.to_string());
        }
        assert_eq!(decoded, vector["decoded"], "{name}");
    }
    for name in ["response-v4", "response-v6"] {
        let packet = bytes(&vectors("stun", name)[0]);
        assert_eq!(stun::Response::decode(&packet).unwrap().encode(), packet, "{name}");
    }
}

/// Source, destination and payload of an IPv6 packet.
fn inner(packet: &[u8]) -> (String, String, &[u8]) {
    let address = |at: usize| {
        let octets: [u8; 16] = packet[at..at + 16].try_into().unwrap();
        IpAddr::from(Ipv6Addr::from(octets)).to_string()
    };
    (address(8), address(24), &packet[40..])
}

#[test]
fn messages_inside_the_tunnel_are_read_as_recorded_and_written_again() {
    for vector in vectors("tsmp-icmp", "tsmp-") {
        let (name, decoded, packet) = (text(&vector, "name"), &vector["decoded"], bytes(&vector));
        let (source, destination, payload) = inner(&packet);
        assert_eq!(packet[6], tsmp::PROTOCOL, "{name}");
        let message = tsmp::Message::decode(payload);
        let expected = match text(decoded, "tsmp") {
            "ping" => Some(tsmp::Message::Ping(array(decoded, "data"))),
            "pong" => Some(tsmp::Message::Pong {
                data: array(decoded, "data"),
                port: decoded["peer_api_port"].as_u64().unwrap().try_into().unwrap(),
            }),
            "rejected" => {
                let Some(tsmp::Message::Rejected(it)) = message else { panic!("{name}") };
                assert_eq!(json!(it.protocol), decoded["proto"]);
                assert_eq!(char::from(it.reason).to_string(), text(decoded, "reason"));
                assert_eq!(json!(it.is_maybe_broken), decoded["maybe_broken"]);
                // The one who is told is the source of what was refused.
                assert_eq!(format!("[{destination}]:{}", it.source_port), text(decoded, "flow_src"));
                assert_eq!(format!("[{source}]:{}", it.destination_port), text(decoded, "flow_dst"));
                message
            }
            "not understood" => None,
            other => panic!("{other}"),
        };
        assert_eq!(message, expected, "{name}");
        if !["tsmp-pong-9", "tsmp-ping-long", "tsmp-ping-8"].contains(&name) {
            assert_eq!(message.unwrap().encode(), payload, "{name}");
        }
    }
}

#[test]
fn node_messages_mean_what_they_say_and_are_written_again() {
    for vector in vectors("node-messages", "") {
        let (name, bytes) = (text(&vector, "name"), bytes(&vector));
        let node = tailnet::Node::decode(bytes.as_slice()).unwrap();
        assert_eq!(tailnet_form::node_in_camel_case(&node), vector["decoded"], "{name}");
        // Maps have no order: what is written again means the same.
        assert_eq!(node.encoded_len(), bytes.len(), "{name}");
        assert_eq!(tailnet::Node::decode(node.encode_to_vec().as_slice()), Ok(node), "{name}");
    }
}
