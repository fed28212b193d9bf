//! Conversations with a real deployment, recorded byte by byte: what its clients said then is said to the lab.

use std::{collections::BTreeMap, net::Ipv6Addr, path::Path};

use futures::FutureExt;
use prost::Message;
use serde_json::Value;

use super::*;
use crate::control::coordinator::Coordinator;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_calls_are_answered_in_the_same_packets() {
    let owners = ["empty-snapshot", "foreign-owner", "unknown-owner", "bad-owner", "no-owner"];
    let mut replayed = 0;
    for file in ["drpc.json", "telemetry.json", "workspace-updates.json", "errors.json"] {
        for entry in entries(file) {
            let name = entry["name"].as_str().unwrap();
            let is_single = match file {
                "workspace-updates.json" => owners.contains(&name),
                "errors.json" => name.starts_with("unimplemented-") || name == "coordinate-bad-proto",
                _ => true,
            };
            if is_single {
                replay(name, entry["steps"].as_array().unwrap()).await;
                replayed += 1;
            }
        }
    }
    assert_eq!(replayed, 28 + 3 + 5 + 5);
}

#[test]
fn recorded_requests_are_refused_in_the_same_words() {
    let mut refused = 0;
    for entry in entries("errors.json") {
        let name = entry["name"].as_str().unwrap();
        let is_other = name.ends_with("bad-proto") || name.starts_with("coordinate-per-agent");
        if !name.starts_with("coordinate-") || is_other {
            continue;
        }
        let frames: Vec<&Value> = entry["steps"].as_array().unwrap().iter().flat_map(frames_of).collect();
        let requests = frames.iter().filter(|frame| frame["protobuf"] == "CoordinateRequest");
        let requests: Vec<tailnet::CoordinateRequest> = requests.map(|frame| request(frame)).collect();
        let expected = frames.iter().find_map(|frame| frame["value"]["error"].as_str()).unwrap_or_default();
        let auth = if name.starts_with("coordinate-agent-") { Auth::Agent } else { Auth::Client };

        let coordinator = Coordinator::default();
        if expected.is_empty() {
            let tunnels = requests.iter().filter_map(|request| request.add_tunnel.as_ref());
            tunnels.for_each(|tunnel| coordinator.allow(Uuid::from_slice(&tunnel.id).unwrap()));
        }
        let (place, _responses) = coordinator.open(own_id(&requests), auth);
        let refusal = requests.into_iter().find_map(|request| coordinator.handle(place, request).err());
        assert_eq!(refusal.as_deref().unwrap_or_default(), expected, "{name}");
        refused += usize::from(!expected.is_empty());
    }
    assert_eq!(refused, 17);
}

/// Says what a client said, and compares what a server answered.
async fn replay(name: &str, steps: &[Value]) {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    if let Some(method) = name.strip_prefix("unimplemented-") {
        let method = Method::ALL.into_iter().find(|known| known.path().ends_with(method)).unwrap();
        lab.control().fail_call(method, CallFault::Unimplemented, Times::Always);
    }
    let mut client = Client::connect(&lab, "").await;
    let mut calls = BTreeMap::new();
    for step in steps.iter().filter(|step| step["layer"] == "yamux") {
        let bytes = unhex(step["hex"].as_str().unwrap());
        let (is_client, kind, flags, stream) = (step["dir"] == "C", bytes[1], bytes[3], bytes[7]);
        if kind > WINDOW_UPDATE {
            continue;
        }
        if is_client && flags & SYN != 0 {
            calls.insert(stream, client.open().await);
        }
        let call: &mut Call = calls.get_mut(&stream).unwrap();
        if is_client {
            call.stream.write_all(&bytes[HEADER..]).await.unwrap();
            call.stream.flush().await.unwrap();
            if flags & FIN != 0 {
                call.stream.shutdown().await.unwrap();
            }
            continue;
        }
        for frame in frames_of(step) {
            expect(name, call, frame).await;
        }
        if flags & FIN != 0 {
            assert_eq!(call.packet().await, None, "{name}: the stream ends");
        }
    }
    for (stream, mut call) in calls {
        let more = call.packet().now_or_never().flatten();
        assert!(
            more.as_ref().is_none_or(|(kind, _)| *kind == drpc::CLOSE_SEND),
            "{name}: {stream}: {more:?}"
        );
    }
}

async fn expect(name: &str, call: &mut Call, frame: &Value) {
    let recorded = packet(frame);
    let mut got = call.packet().await.unwrap_or_else(|| panic!("{name}: the stream has ended"));
    if got.0 == drpc::CLOSE_SEND && recorded.kind != drpc::CLOSE_SEND {
        // It crosses the client's close or does not.
        got = call.packet().await.unwrap_or_else(|| panic!("{name}: the stream has ended"));
    }
    assert_eq!(got.0, recorded.kind, "{name}");
    if frame["protobuf"] == "RefreshResumeTokenResponse" {
        assert!(!got.1.is_empty(), "{name}");
    } else {
        assert_eq!(got.1, recorded.data, "{name}");
    }
}

const WINDOW_UPDATE: u8 = 1;
const SYN: u8 = 1;
const FIN: u8 = 4;
/// Bytes of a yamux header.
const HEADER: usize = 12;

fn entries(file: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto/tests/vectors/control").join(file);
    let mut file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    file["entries"].as_array_mut().map(std::mem::take).unwrap()
}

fn frames_of(step: &Value) -> impl Iterator<Item = &Value> {
    step["meaning"]["frames"].as_array().into_iter().flatten()
}

fn packet(frame: &Value) -> drpc::Packet {
    let mut reader = Reader::default();
    reader.buffer.extend_from_slice(&unhex(frame["drpc_hex"].as_str().unwrap()));
    reader.next().unwrap().unwrap()
}

fn request(frame: &Value) -> tailnet::CoordinateRequest {
    tailnet::CoordinateRequest::decode(packet(frame).data).unwrap()
}

/// An ID with the addresses that an agent says are its own.
fn own_id(requests: &[tailnet::CoordinateRequest]) -> Uuid {
    let nodes = requests.iter().filter_map(|request| request.update_self.as_ref()?.node.as_ref());
    let mut prefixes = nodes.flat_map(|node| node.addresses.iter().chain(&node.allowed_ips));
    let own = prefixes.find_map(|prefix| prefix.strip_suffix("/128").filter(|text| text.starts_with("fd7a")));
    own.map_or(OWN, |text| Uuid::from_bytes(text.parse::<Ipv6Addr>().unwrap().octets()))
}

fn unhex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}
