//! Golden vectors of the CoderVPN protocol: the bytes of deployed peers are read as they mean, and written
//! again byte for byte.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

#[path = "vpn_vectors/form.rs"]
mod form;
#[path = "support/json.rs"]
mod json;

use json::{list, text};
use serde_json::Value;
use warren_proto::{
    correlator::{Kind, classify},
    frame::{self, Decoder, FrameError, MAX_FRAME},
    header::{self, HeaderError, LineReader, Role, SUPPORTED},
    vpn,
};

const WITH_ENTRIES: &[&str] = &["leg-b", "log", "network-settings", "peer-update", "ping", "rpc", "start"];
const WITH_TRANSCRIPTS: &[&str] =
    &["exchange", "frames", "header", "log", "network-settings", "peer-update", "ping", "rpc", "start"];

fn load(file: &str) -> Value {
    json::load("vpn", file)
}

fn bytes(value: &Value) -> Vec<u8> {
    json::hex(value, "hex")
}

/// Every message of every file, whether it stands alone or in a transcript: what it is about, its frame.
fn frames(files: &[&str], found_in: &str) -> Vec<(String, Value)> {
    let mut frames = Vec::new();
    for file in files {
        for group in list(&load(file), found_in) {
            let nested = list(group, "entries").iter().filter(|entry| text(entry, "kind") == "frame");
            let alone = (found_in == "entries").then_some(group).into_iter();
            frames.extend(
                alone.chain(nested).map(|it| (format!("{file}: {}", text(group, "name")), it.clone())),
            );
        }
    }
    assert!(!frames.is_empty());
    frames
}

/// Reads a frame as its direction says; returns its meaning and the bytes it is written as.
fn reread(entry: &Value) -> (Value, Vec<u8>) {
    let frame = bytes(entry);
    match text(entry, "direction") {
        "manager->tunnel" => reread_as(&frame, form::manager),
        "tunnel->manager" => reread_as(&frame, form::tunnel),
        "client->service" => reread_as(&frame, form::client),
        "service->client" => reread_as(&frame, form::service),
        other => panic!("unknown direction {other}"),
    }
}

fn reread_as<M: prost::Message + Default>(frame: &[u8], form: impl Fn(&M) -> Value) -> (Value, Vec<u8>) {
    let mut decoder = Decoder::new(MAX_FRAME);
    decoder.extend(frame);
    let message: M = decoder.next().unwrap().unwrap();
    assert!(decoder.is_between_frames());
    (form(&message), frame::encode(&message).unwrap().to_vec())
}

fn assert_means_and_is_written_again(name: &str, entry: &Value) {
    let (meaning, written) = reread(entry);
    assert_eq!(meaning, entry["decoded"], "{name}");
    assert_eq!(written, bytes(entry), "{name}");
}

#[test]
fn every_message_means_what_it_says_and_is_written_again_byte_for_byte() {
    for (name, entry) in frames(WITH_ENTRIES, "entries") {
        assert_means_and_is_written_again(&name, &entry);
    }
}

#[test]
fn every_recorded_frame_means_what_it_says_and_is_written_again_byte_for_byte() {
    for (name, entry) in frames(WITH_TRANSCRIPTS, "transcripts") {
        assert_means_and_is_written_again(&name, &entry);
    }
}

#[test]
fn a_thousand_agents_are_read_and_written_again_byte_for_byte() {
    let file = load("peer-update-large");
    let entry = &list(&file, "entries")[0];
    let (meaning, written) = reread(entry);
    assert_eq!(written, bytes(entry));
    let agents = list(&meaning["peer_update"], "upserted_agents");
    let expected = &entry["decoded"]["peer_update"]["upserted_agents"];
    assert_eq!(agents.len() as u64, expected["count"].as_u64().unwrap());
    assert_eq!(Some(&expected["first"]), agents.first());
    assert_eq!(Some(&expected["last"]), agents.last());
}

#[test]
fn handshake_lines_are_accepted_and_refused_as_recorded() {
    let file = load("header");
    for entry in list(&file, "entries") {
        let (sender, shows) = (text(entry, "direction"), text(entry, "shows"));
        if sender == "tunnel->manager" {
            assert_eq!(header::line(Role::Tunnel, &SUPPORTED).as_bytes(), bytes(entry));
            continue;
        }
        match accept(&bytes(entry)) {
            Ok((negotiated, _)) => {
                assert_eq!(shows, "accepted");
                assert_eq!(negotiated, text(&entry["decoded"], "negotiated_with_1.3"));
            }
            Err(error) => {
                assert_eq!(format!("error: create new tunnel for client: {error}"), text(entry, "error"))
            }
        }
    }
}

#[test]
fn handshake_transcripts_end_as_recorded() {
    let file = load("header");
    for transcript in list(&file, "transcripts") {
        let name = text(transcript, "name");
        let from_manager =
            list(transcript, "entries").iter().filter(|it| text(it, "direction") == "manager->tunnel");
        let sent: Vec<u8> = from_manager.flat_map(bytes).collect();
        match (accept(&sent), transcript["accepted"].as_bool(), transcript["stderr_error"][0].as_str()) {
            (Ok((_, rest)), accepted, None) => {
                assert_ne!(accepted, Some(false), "{name}");
                // What follows the line is left for the frames, byte for byte.
                let mut decoder = Decoder::new(MAX_FRAME);
                decoder.extend(&rest);
                while decoder.next::<vpn::ManagerMessage>().unwrap().is_some() {}
                assert!(decoder.is_between_frames(), "{name}");
            }
            (Err(error), Some(false), Some(recorded)) => {
                assert_eq!(format!("error: create new tunnel for client: {error}"), recorded, "{name}");
            }
            (Err(error), _, _) => assert_eq!(error, UNFINISHED, "{name}"),
            (Ok(_), _, Some(recorded)) => panic!("{name}: accepted, but recorded is {recorded}"),
        }
    }
}

const UNFINISHED: &str = "unfinished";

/// What a tunnel makes of what a manager sends first: the negotiated version, and what it leaves unread.
fn accept(sent: &[u8]) -> Result<(String, Vec<u8>), String> {
    let mut reader = LineReader::default();
    let failed = |error: HeaderError| format!("handshake failed: {error}");
    for (index, byte) in sent.iter().enumerate() {
        let Some(line) = reader.push(*byte).map_err(failed)? else { continue };
        let refused = |error| {
            format!("handshake failed: validate header ({}): {error}", String::from_utf8_lossy(&line))
        };
        let theirs = header::parse_line(&line, Role::Manager).map_err(refused)?;
        let negotiated = SUPPORTED.negotiate(&theirs).map_err(refused)?;
        return Ok((negotiated.to_string(), sent[index + 1..].to_vec()));
    }
    Err(UNFINISHED.to_owned())
}

/// Everything that a manager wrote after its line, piece by piece.
fn written_by_manager(transcript: &Value) -> Vec<Vec<u8>> {
    let entries = list(transcript, "entries").iter();
    let written = entries.filter(|it| text(it, "direction") == "manager->tunnel");
    written.filter(|it| ["frame", "raw"].contains(&text(it, "kind"))).map(written_bytes).collect()
}

/// The one write too long to keep is a wake request padded by an unknown field.
fn written_bytes(entry: &Value) -> Vec<u8> {
    if !entry["hex"].is_null() {
        return bytes(entry);
    }
    let length = usize::try_from(entry["length"].as_u64().unwrap()).unwrap();
    let payload = length - frame::PREFIX;
    let mut write = u32::try_from(payload).unwrap().to_be_bytes().to_vec();
    // rpc, wake, then field 1000 with a length of four varint bytes.
    write.extend([0x0a, 0x02, 0x08, 0x01, 0x32, 0x00, 0xc2, 0x3e]);
    let padding = payload - 12;
    write.extend([0, 7, 14].map(|shift| 0x80 | u8::try_from(padding >> shift & 0x7f).unwrap()));
    write.push(u8::try_from(padding >> 21).unwrap());
    write.resize(length, 0);
    write
}

/// Requests in the order they were read, and how reading ended.
fn replay(transcript: &Value) -> (Vec<u64>, Result<(), FrameError>) {
    let mut decoder = Decoder::new(MAX_FRAME);
    let mut requests = Vec::new();
    for piece in written_by_manager(transcript) {
        decoder.extend(&piece);
        loop {
            match decoder.next::<vpn::ManagerMessage>() {
                Ok(None) => break,
                Ok(Some(message)) => match classify(&message.rpc) {
                    Kind::Request(id) => requests.push(id),
                    Kind::Response(_) | Kind::Notification | Kind::Stray => {}
                },
                Err(error) => return (requests, Err(error)),
            }
        }
    }
    (requests, Ok(()))
}

#[test]
fn odd_frames_are_read_or_end_the_connection_as_recorded() {
    for file in ["frames", "rpc"] {
        for transcript in list(&load(file), "transcripts") {
            let (name, shows) = (text(transcript, "name"), text(transcript, "shows"));
            let hangs_up = shows.contains("hangs up") || shows.starts_with("over the limit");
            assert_eq!(replay(transcript).1.is_err(), hangs_up, "{file}: {name}");
        }
    }
}

#[test]
fn what_is_a_request_is_answered_as_recorded_and_nothing_else_is() {
    for file in ["frames", "rpc"] {
        for transcript in list(&load(file), "transcripts") {
            let from_tunnel =
                list(transcript, "entries").iter().filter(|it| text(it, "direction") == "tunnel->manager");
            let answers = from_tunnel.filter_map(|it| it["decoded"]["rpc"]["response_to"].as_u64());
            assert_eq!(
                replay(transcript).0,
                answers.collect::<Vec<_>>(),
                "{file}: {}",
                text(transcript, "name")
            );
        }
    }
}
