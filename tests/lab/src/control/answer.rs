//! The answers of the deployment's HTTP layer: its JSON, its errors, its headers (tailnet-control 1.6 to 1.10).

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use serde_json::{Value, json};
use uuid::Uuid;
use warren_proto::key::random;

/// The version that the lab says it is.
pub const BUILD_VERSION: &str = "v2.31.1-lab";

pub(crate) const SIGNED_OUT: &str =
    "You are signed out or your session has expired. Please sign in again to continue.";

pub(crate) type Answer = Response<Full<Bytes>>;

/// JSON as the server writes it: indented with tabs, ending in a newline.
pub(crate) fn json(status: StatusCode, value: &Value) -> Answer {
    with_body(status, "application/json; charset=utf-8", pretty(value))
}

/// An error with a message only.
pub(crate) fn error(status: StatusCode, message: &str) -> Answer {
    json(status, &json!({ "message": message }))
}

/// An error about one parameter.
pub(crate) fn invalid(
    status: StatusCode,
    message: &str,
    detail: Option<&str>,
    field: &str,
    why: &str,
) -> Answer {
    let mut value = json!({ "message": message });
    if let Some(detail) = detail {
        value["detail"] = json!(detail);
    }
    value["validations"] = json!([{ "field": field, "detail": why }]);
    json(status, &value)
}

/// A 401 with the challenge that comes with it.
pub(crate) fn unauthorized(url: &str, reason: &str, value: &Value) -> Answer {
    let challenge = format!(
        "Bearer realm=\"coder\", error=\"invalid_token\", error_description=\"The access token {reason}\", \
         resource_metadata=\"{url}/.well-known/oauth-protected-resource\""
    );
    let mut answer = json(StatusCode::UNAUTHORIZED, value);
    set(&mut answer, header::WWW_AUTHENTICATE, &challenge);
    answer
}

/// Plain text.
pub(crate) fn text(status: StatusCode, text: &str) -> Answer {
    with_body(status, "text/plain; charset=utf-8", text.to_owned())
}

/// A refused websocket handshake: the reason, then JSON, in one body.
pub(crate) fn handshake(status: StatusCode, reason: &str) -> Answer {
    let detail = format!("failed to accept WebSocket connection: {reason}");
    let value = json!({ "message": "Failed to accept websocket.", "detail": detail });
    text(status, &format!("{reason}\n{}", pretty(&value)))
}

/// No body.
pub(crate) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    answer
}

pub(crate) fn with_body(status: StatusCode, content_type: &str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    set(&mut answer, header::CONTENT_TYPE, content_type);
    answer
}

pub(crate) fn set(answer: &mut Answer, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().insert(name, value);
    }
}

/// What every answer of the deployment carries.
pub(crate) fn finish(answer: &mut Answer) {
    let cookie = format!("csrf_token={}; Path=/; HttpOnly; SameSite=Lax", STANDARD.encode(random::<32>()));
    set(answer, header::SET_COOKIE, &cookie);
    let headers = answer.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    headers.append(header::VARY, HeaderValue::from_static("Cookie"));
    headers.insert("x-coder-build-version", HeaderValue::from_static(BUILD_VERSION));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    set(answer, header::HeaderName::from_static("x-coder-request-id"), &crate::random_id().to_string());
}

/// `users/me`
pub(crate) fn user(id: Uuid, name: &str, is_owner: bool) -> Value {
    const CREATED: &str = "2026-01-01T00:00:00Z";
    let roles = if is_owner { json!([{ "name": "owner", "display_name": "Owner" }]) } else { json!([]) };
    json!({
        "id": id.to_string(), "username": name, "name": name, "email": format!("{name}@example.com"),
        "created_at": CREATED, "updated_at": CREATED, "last_seen_at": CREATED,
        "status": "active", "login_type": "password",
        "organization_ids": [Uuid::from_u128(1).to_string()], "roles": roles, "has_ai_seat": false,
    })
}

/// `buildinfo`
pub(crate) fn build_info(url: &str, deployment: Uuid) -> Value {
    json!({
        "external_url": "https://coder.example.com/code", "version": BUILD_VERSION, "dashboard_url": url,
        "telemetry": false, "workspace_proxy": false, "agent_api_version": "1.0",
        "provisioner_api_version": "1.18", "upgrade_message": "", "deployment_id": deployment.to_string(),
    })
}

fn pretty(value: &Value) -> String {
    use serde::Serialize;
    let mut body = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    // Writing JSON values to memory cannot fail.
    let _ = value.serialize(&mut serde_json::Serializer::with_formatter(&mut body, formatter));
    body.push(b'\n');
    String::from_utf8(body).unwrap_or_default()
}
