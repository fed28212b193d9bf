//! Recorded handshakes and messages of a deployment, played to the client as they were.

use serde_json::Value;

use super::*;

fn entries(file: &str) -> Vec<Value> {
    let file: Value = serde_json::from_str(file).unwrap();
    file["entries"].as_array().unwrap().clone()
}

fn bytes(step: &Value) -> Bytes {
    let hex = step["hex"].as_str().unwrap_or_default();
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn recorded_handshakes_are_accepted_unless_a_subprotocol_was_chosen() {
    let mut accepted = 0;
    for entry in entries(include_str!("../../../tests/vectors/http.json")) {
        let lines = entry["request"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let headers = lines.filter_map(|line| line.split_once(": "));
        let mut keys = headers.filter(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-key"));
        let (Some((_, key)), true) = (keys.next(), entry["status"] == 101) else { continue };
        let headers = entry["headers"].as_array().unwrap().iter().map(|header| {
            let [name, value] = [0, 1].map(|index| header[index].as_str().unwrap());
            (name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap())
        });
        // Those that chose a subprotocol, or are no WebSockets, are of the relay.
        let is_relay = entry["name"].as_str().unwrap().starts_with("derp-");
        let headers = headers.collect();
        let checked = check_response(&headers, key, None);
        assert_eq!(checked.is_err(), is_relay, "{}: {checked:?}", entry["name"]);
        let chosen = headers.get(header::SEC_WEBSOCKET_PROTOCOL).is_some_and(|it| it == "derp");
        assert_eq!(check_response(&headers, key, Some("derp")).is_ok(), chosen, "{}", entry["name"]);
        accepted += usize::from(checked.is_ok());
    }
    assert!(accepted > 20, "{accepted}");
}

/// What the server sent, as the library says it; nothing for what is no message.
fn message(step: &Value) -> Option<Message> {
    let payload = bytes(step);
    let meaning = &step["meaning"];
    Some(match (step["layer"].as_str()?, meaning["op"].as_str()) {
        ("yamux", _) | ("ws", Some("binary")) => Message::Binary(payload),
        ("ws", Some("ping")) => Message::Ping(payload),
        ("ws", Some("pong")) => Message::Pong(payload),
        ("ws", Some("close")) => Message::Close(Some(CloseFrame {
            code: u16::try_from(meaning["code"].as_u64()?).unwrap().into(),
            reason: meaning["reason"].as_str()?.to_owned().into(),
        })),
        _ => return None,
    })
}

#[tokio::test]
async fn what_a_server_sent_is_one_byte_stream_and_ends_as_recorded() {
    for entry in entries(include_str!("../../../tests/vectors/websocket.json")) {
        let (name, steps) = (&entry["name"], entry["steps"].as_array().unwrap());
        let sent: Vec<_> = steps.iter().filter(|step| step["dir"] == "S").filter_map(message).collect();
        let expected: Vec<u8> = sent
            .iter()
            .filter_map(
                |message| if let Message::Binary(payload) = message { Some(payload.to_vec()) } else { None },
            )
            .flatten()
            .collect();
        let close = sent.iter().find_map(|message| {
            if let Message::Close(Some(frame)) = message { Some(frame.clone()) } else { None }
        });
        let (mut stream, _handle, mut server) = pair(LIMITS).await;
        for message in sent {
            server.send(message).await.unwrap();
        }
        let mut read = vec![0; expected.len()];
        stream.read_exact(&mut read).await.unwrap();
        assert_eq!(read, expected, "{name}");
        let Some(close) = close else { continue };
        let end = stream.read(&mut [0; 1]).await;
        if [CloseCode::Normal, CloseCode::Away].contains(&close.code) {
            assert_eq!(end.unwrap(), 0, "{name}");
        } else {
            let error = StreamError::Closed { code: close.code.into(), reason: close.reason.to_string() };
            assert_eq!(end.unwrap_err().to_string(), error.to_string(), "{name}");
        }
    }
}
