//! Golden vectors of the control plane: every recorded DRPC packet is read as it means and written again
//! byte for byte, and so is every message in one.

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

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use json::{hex, list, text};
use prost::Message;
use serde_json::Value;
use tailnet_form as form;
use warren_proto::{
    drpc::{Decoder, DrpcError, ErrorBody, Kind, Packet, PacketWriter},
    tailnet,
};

const FILES: &[&str] =
    &["coordinate", "derpmap", "drpc", "errors", "resume-token", "telemetry", "workspace-updates", "yamux"];

/// Bytes of a yamux frame's header.
const YAMUX_HEADER: usize = 12;

/// One direction of one yamux stream.
#[derive(Default)]
struct Transport {
    /// The bytes, as they were cut into yamux frames.
    pieces: Vec<Vec<u8>>,
    /// The DRPC frames in them, as they were recorded.
    frames: Vec<Value>,
    is_closed: bool,
}

impl Transport {
    /// The packets, and why there are no more.
    fn packets(&self) -> (Vec<Packet>, Result<(), DrpcError>) {
        let (mut decoder, mut packets) = (Decoder::new(), Vec::new());
        for piece in &self.pieces {
            decoder.extend(piece);
            loop {
                match decoder.next() {
                    Ok(Some(packet)) => packets.push(packet),
                    Ok(None) => break,
                    Err(error) => return (packets, Err(error)),
                }
            }
        }
        (packets, Ok(()))
    }

    /// The frames that end a packet of a known kind.
    fn last_frames(&self) -> impl Iterator<Item = &Value> {
        self.frames.iter().filter(|frame| frame["done"] != false && frame["kind"].is_string())
    }

    /// Whether a writer that cuts no short packets and knows all kinds has written this.
    fn is_regular(&self) -> bool {
        self.frames.iter().zip(1..).all(|(frame, id)| {
            frame["message"] == id
                && frame["drpc_stream"] == self.frames[0]["drpc_stream"]
                && frame["done"] != false
                && frame["kind"].is_string()
        })
    }
}

/// A direction of a stream of a connection of an entry of a file.
type Place = (String, u64, u64, String);

fn transports() -> BTreeMap<Place, Transport> {
    let mut transports: BTreeMap<Place, Transport> = BTreeMap::new();
    for file in FILES {
        for entry in list(&json::load("control", file), "entries") {
            let steps = list(entry, "steps").iter();
            for step in steps.filter(|it| it["meaning"]["stream"].is_u64() && it["hex"].is_string()) {
                let (conn, meaning) = (step["conn"].as_u64().unwrap_or(0), &step["meaning"]);
                let name = format!("{file}: {}", text(entry, "name"));
                let place = (name, conn, meaning["stream"].as_u64().unwrap(), text(step, "dir").to_owned());
                let transport = transports.entry(place).or_default();
                if meaning["type"] == "Data" {
                    transport.pieces.push(hex(step, "hex")[YAMUX_HEADER..].to_vec());
                }
                transport.frames.extend(list(meaning, "frames").iter().cloned());
                transport.is_closed |= list(meaning, "flags").iter().any(|flag| flag == "FIN");
            }
        }
    }
    transports
}

/// Every packet with the frame that ends it.
fn packets() -> Vec<(String, Packet, Value)> {
    let transports = transports();
    let packets = transports.iter().flat_map(|((name, ..), transport)| {
        let packets = transport.packets().0.into_iter();
        packets.zip(transport.last_frames()).map(|(packet, frame)| (name.clone(), packet, frame.clone()))
    });
    packets.collect()
}

#[test]
fn every_packet_is_read_in_whatever_pieces_it_came() {
    for (place, transport) in transports() {
        let (packets, end) = transport.packets();
        let expected: Vec<_> = transport.last_frames().collect();
        if end.is_ok() {
            assert_eq!(packets.len(), expected.len(), "{place:?}");
        }
        for (packet, frame) in packets.iter().zip(expected) {
            assert_eq!(format!("{:?}", packet.kind), text(frame, "kind"), "{place:?}");
            assert_eq!(frame["drpc_stream"], packet.stream, "{place:?}");
            assert_eq!(frame["message"], packet.message, "{place:?}");
            if packet.kind == Kind::Invoke {
                assert_eq!(packet.data, text(frame, "path").as_bytes(), "{place:?}");
            }
            if frame["body_hex"].is_string() {
                assert_eq!(packet.data, hex(frame, "body_hex"), "{place:?}");
            }
        }
    }
}

#[test]
fn what_ended_a_transport_is_an_error() {
    let transports = transports();
    let errors: BTreeMap<_, _> = transports
        .iter()
        .filter_map(|(place, transport)| Some((place, transport.packets().1.err()?)))
        .collect();
    for place in errors.keys() {
        let (name, conn, stream, dir) = place;
        assert_eq!(dir, "C", "{name}: a server keeps the rules");
        let answers = &transports.get(&(name.clone(), *conn, *stream, "S".to_owned()));
        // Before a call the recorded server is deaf instead.
        let is_deaf = name == "drpc: unknown-kind";
        assert_eq!(answers.is_some_and(|it| it.is_closed), !is_deaf, "{name}");
    }
    let found: Vec<_> = errors.iter().map(|((name, ..), error)| (name.as_str(), *error)).collect();
    let order = |stream, message| DrpcError::Order { stream, message };
    assert_eq!(
        found,
        [
            ("drpc: id-decrease", order(1, 4)),
            ("drpc: id-repeat", order(1, 1)),
            ("drpc: kind-change-same-id", DrpcError::KindChanged),
            ("drpc: older-stream", order(4, 9)),
            ("drpc: unknown-kind", DrpcError::UnknownKind(40)),
            ("drpc: unknown-kind-after", DrpcError::UnknownKind(40)),
            ("drpc: zero-stream-id", order(0, 1)),
        ]
    );
}

#[test]
fn every_regular_transport_is_written_again_byte_for_byte() {
    let regular: Vec<_> = transports()
        .into_iter()
        .filter(|(_, transport)| !transport.frames.is_empty() && transport.is_regular())
        .collect();
    assert!(regular.len() > 250, "{}", regular.len());
    for (place, transport) in regular {
        let (packets, end) = transport.packets();
        let stream = transport.frames[0]["drpc_stream"].as_u64().unwrap();
        let mut writer = PacketWriter::new(stream);
        let mut written = BytesMut::new();
        for packet in packets {
            writer.write(packet.kind, &packet.data, &mut written);
        }
        let recorded: Vec<u8> = transport.frames.iter().flat_map(|frame| hex(frame, "drpc_hex")).collect();
        if end.is_ok() {
            assert_eq!(written, recorded, "{place:?}");
        }
    }
}

#[test]
fn every_error_is_read_and_written_again() {
    let errors: Vec<_> = packets().into_iter().filter(|(_, packet, _)| packet.kind == Kind::Error).collect();
    assert!(errors.len() > 10);
    for (name, packet, frame) in errors {
        let body = ErrorBody::decode(&packet.data).unwrap();
        assert_eq!(frame["code"], body.code, "{name}");
        assert_eq!(body.text, text(&frame, "text"), "{name}");
        assert_eq!(body.encode(), packet.data, "{name}");
    }
}

#[test]
fn every_message_means_what_it_says_and_is_written_again() {
    let messages: Vec<_> =
        packets().into_iter().filter(|(_, _, frame)| frame["protobuf"].is_string()).collect();
    assert!(messages.len() > 300, "{}", messages.len());
    for (name, packet, frame) in messages {
        let kind = text(&frame, "protobuf");
        let Some((meaning, written)) = reread(kind, packet.data.clone()) else {
            assert_eq!(frame["value"], Value::Null, "{name}: {kind} does not parse");
            continue;
        };
        assert_eq!(meaning, frame["value"], "{name}");
        match kind {
            // Unknown fields are not kept.
            _ if !list(&frame, "unknown_fields").is_empty() => assert!(written.is_empty(), "{name}"),
            // A map has no order: what is written again means the same.
            "DERPMap" => {
                assert_eq!(written.len(), packet.data.len(), "{name}");
                assert_eq!(reread(kind, written.into()).unwrap().0, meaning, "{name}");
            }
            _ => assert_eq!(written, packet.data, "{name}: {kind}"),
        }
    }
}

/// What a message means, and the bytes it is written as.
fn reread(kind: &str, data: Bytes) -> Option<(Value, Vec<u8>)> {
    match kind {
        "CoordinateRequest" => reread_as(data, form::coordinate_request),
        "CoordinateResponse" => reread_as(data, form::coordinate_response),
        "DERPMap" => reread_as(data, form::derp_map),
        "StreamDERPMapsRequest" => reread_as::<tailnet::StreamDerpMapsRequest>(data, form::empty),
        "WorkspaceUpdatesRequest" => reread_as(data, form::workspace_updates_request),
        "WorkspaceUpdate" => reread_as(data, form::workspace_update),
        "RefreshResumeTokenRequest" => reread_as::<tailnet::RefreshResumeTokenRequest>(data, form::empty),
        "RefreshResumeTokenResponse" => reread_as(data, form::refresh_resume_token_response),
        "TelemetryRequest" => reread_as(data, form::telemetry_request),
        "TelemetryResponse" => reread_as::<tailnet::TelemetryResponse>(data, form::empty),
        other => panic!("unknown message {other}"),
    }
}

fn reread_as<M: Message + Default>(data: Bytes, form: impl Fn(&M) -> Value) -> Option<(Value, Vec<u8>)> {
    let message = M::decode(data).ok()?;
    Some((form(&message), message.encode_to_vec()))
}

/// The calls of the specification's appendix, as far as they are not in the files.
#[test]
fn a_packet_of_150_000_bytes_is_cut_as_recorded() {
    let mut written = BytesMut::new();
    PacketWriter::new(1).write(Kind::Message, &[7; 150_000], &mut written);
    let piece = |header: &[u8], length: usize| [header, &vec![7; length]].concat();
    let full = piece(&[0x04, 0x01, 0x01, 0x80, 0x80, 0x04], 65_536);
    let last = piece(&[0x05, 0x01, 0x01, 0xf0, 0x93, 0x01], 18_928);
    assert_eq!(written, [full.as_slice(), &full, &last].concat());
}
