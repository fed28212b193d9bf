//! Recorded answers of a deployment, played to the client as they were.

use serde_json::Value;

use super::*;

fn entries() -> Vec<Value> {
    let file = include_str!("../../../../tests/vectors/http.json");
    let file: Value = serde_json::from_str(file).unwrap();
    file["entries"].as_array().unwrap().clone()
}

/// The answer, if it is HTTP.
fn answer(entry: &Value) -> Option<String> {
    let hex = entry["response_hex"].as_str().unwrap();
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    String::from_utf8((0..hex.len()).step_by(2).map(byte).collect()).ok().filter(|it| it.starts_with("HTTP/"))
}

#[tokio::test]
async fn every_recorded_answer_is_read_or_told_in_the_words_of_the_deployment() {
    let mut refused = 0;
    for entry in entries() {
        let (name, status, body) = (&entry["name"], &entry["status"], &entry["body"]);
        let Some(answer) = answer(&entry).filter(|_| status != 101) else { continue };
        let server = Server::answering(&answer).await;
        match server.client(None, &[]).get("/api/v2/x", LIMIT).await {
            Ok(read) => {
                assert_eq!(*status, 200, "{name}");
                match body {
                    Value::String(text) => assert_eq!(read, text.as_bytes(), "{name}"),
                    json => assert_eq!(serde_json::from_slice::<Value>(&read).unwrap(), *json, "{name}"),
                }
            }
            Err(error) => {
                let refusal = error.refusal().unwrap_or_else(|| panic!("{name}: {error}"));
                assert_eq!(*status, refusal.status.as_u16(), "{name}");
                assert_is_told(name, refusal, body);
                refused += 1;
            }
        }
    }
    assert!(refused > 40, "{refused}");
}

fn assert_is_told(name: &Value, refusal: &Refusal, body: &Value) {
    let plain =
        |value: &Value| value.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    if !body.is_object() {
        assert!(refusal.message.starts_with("unexpected non-JSON response"), "{name}");
        assert_eq!(refusal.detail, plain(body), "{name}");
        return;
    }
    assert_eq!(refusal.message, plain(&body["message"]), "{name}");
    assert_eq!(refusal.detail, plain(&body["detail"]), "{name}");
    let text = refusal.to_string();
    let validations = body["validations"].as_array().map_or(&[][..], Vec::as_slice);
    assert_eq!(refusal.validations.len(), validations.len(), "{name}");
    for (told, recorded) in refusal.validations.iter().zip(validations) {
        assert_eq!(recorded["field"], told.field, "{name}");
        assert_eq!(recorded["detail"], told.detail, "{name}");
        assert!(text.contains(&plain(&recorded["detail"])), "{name}: {text}");
    }
    assert!(text.contains(plain(&body["message"]).trim_end_matches('.')), "{name}: {text}");
    let is_about_resume_token = validations.iter().any(|it| it["field"] == "resume_token");
    assert_eq!(refusal.is_about_resume_token(), is_about_resume_token, "{name}");
}

#[tokio::test]
async fn recorded_answers_are_read_as_what_they_say() {
    for entry in entries() {
        let name = entry["name"].as_str().unwrap();
        let Some(answer) = answer(&entry).filter(|_| entry["status"] == 200) else { continue };
        let server = Server::answering(&answer).await;
        let client = server.client(None, &[]);
        if name.starts_with("users-me") {
            let user = client.current_user().await.unwrap();
            assert_eq!(
                (entry["body"]["username"].as_str(), entry["body"]["id"].as_str()),
                (Some(user.username.as_str()), Some(user.id.to_string().as_str()))
            );
        }
        if name == "buildinfo" {
            let info = client.build_info().await.unwrap();
            assert_eq!(entry["body"]["version"], info.version);
            assert_eq!(entry["body"]["external_url"], info.external_url);
        }
    }
}

#[tokio::test]
async fn a_recorded_limit_says_when_to_try_again() {
    let limited = entries().into_iter().find(|entry| entry["name"] == "rate-limited").unwrap();
    let server = Server::answering(&answer(&limited).unwrap()).await;
    let error = server.client(None, &[]).current_user().await.unwrap_err();
    assert_eq!(error.refusal().unwrap().retry_after, Some(60));
}

#[tokio::test]
async fn every_recorded_switch_of_protocols_is_one() {
    for entry in entries() {
        let Some(answer) = answer(&entry).filter(|_| entry["status"] == 101) else { continue };
        let server = Server::answering(&answer).await;
        let switched = server.client(None, &[]).upgrade("/x", "y=z", HeaderMap::new(), LIMIT).await.unwrap();
        for header in entry["headers"].as_array().unwrap() {
            let [name, value] = [0, 1].map(|index| header[index].as_str().unwrap());
            assert!(switched.headers.get_all(name).iter().any(|it| it == value), "{}: {name}", entry["name"]);
        }
    }
}
