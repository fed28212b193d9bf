//! A start: what is asked for, and how it came out (vpn-protocol 6.2).

use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use secrecy::SecretString;
use serde::Serialize;
use tokio::time::{Instant, timeout_at};
use url::Url;
use warren_proto::vpn::{StartRequest, StartResponse, start_request::Header};

use super::START_LIMIT;
use crate::{
    facts::{Boot, HostState, LinkState, Net, NetworkOwner},
    runtime::View,
};

pub(super) const ALREADY_RUNNING: &str = "tunnel is already running";
pub(super) const CRASHES: &str = "starting failed repeatedly inside the tunnel; its log says why";
pub(super) const CANCELLED: &str = "the start was cancelled by a stop";

/// Headers that are ours to set: each request carries them exactly once.
const SESSION_TOKEN: &str = "Coder-Session-Token";
const TELEMETRY: &str = "Coder-Desktop-Telemetry";

/// Names a failure while something is being connected, as deployed tunnels do.
fn connecting(error: impl std::fmt::Display) -> String {
    format!("failed to start connection: {error}")
}

/// What `start` asks for, or why it cannot be had.
pub(super) fn boot(
    start: &StartRequest,
    generation: u64,
    default_network: NetworkOwner,
) -> Result<Boot, String> {
    if start.coder_url.is_empty() {
        return Err("missing coder url".to_owned());
    }
    let url = parse_url(&start.coder_url)?;
    if start.api_token.is_empty() {
        return Err("missing api token".to_owned());
    }
    if !matches!(url.scheme(), "http" | "https") {
        return Err(connecting(format!("unsupported protocol scheme {:?}", url.scheme())));
    }
    HeaderValue::from_str(&start.api_token)
        .map_err(|_| connecting("the token has characters no token has"))?;
    let telemetry = telemetry(start);
    Ok(Boot {
        generation,
        url,
        token: SecretString::from(start.api_token.clone()),
        headers: headers(&start.headers, telemetry.is_some())?,
        telemetry,
        network: network(start.tunnel_file_descriptor, default_network)?,
    })
}

fn parse_url(text: &str) -> Result<Url, String> {
    let reason = match Url::parse(text) {
        // The standard that the parser follows drops these; a URL that holds one is a mistake.
        _ if text.chars().any(char::is_control) => "invalid control character in URL".to_owned(),
        Ok(url) => return Ok(url),
        Err(url::ParseError::RelativeUrlWithoutBase) => "missing protocol scheme".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(format!("parse url {text:?}: parse {text:?}: {reason}"))
}

fn headers(given: &[Header], has_telemetry: bool) -> Result<Vec<(String, SecretString)>, String> {
    let is_ours = |name: &str| {
        name.eq_ignore_ascii_case(SESSION_TOKEN) || (has_telemetry && name.eq_ignore_ascii_case(TELEMETRY))
    };
    let theirs = given.iter().filter(|header| !is_ours(&header.name));
    theirs
        .map(|header| check(header).map(|()| (header.name.clone(), SecretString::from(header.value.clone()))))
        .collect()
}

fn check(header: &Header) -> Result<(), String> {
    let name = &header.name;
    HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| connecting(format!("invalid header field name {name:?}")))?;
    // The value may be a secret: only its name is told.
    HeaderValue::from_bytes(header.value.as_bytes())
        .map_err(|_| connecting(format!("invalid header field value for {name:?}")))?;
    Ok(())
}

/// The telemetry header's value. All keys are there once one is.
#[derive(Serialize)]
struct Telemetry<'a> {
    device_id: &'a str,
    device_os: &'a str,
    coder_desktop_version: &'a str,
}

fn telemetry(start: &StartRequest) -> Option<String> {
    let telemetry = Telemetry {
        device_id: &start.device_id,
        device_os: &start.device_os,
        coder_desktop_version: &start.coder_desktop_version,
    };
    let values = [telemetry.device_id, telemetry.device_os, telemetry.coder_desktop_version];
    values.iter().any(|value| !value.is_empty()).then(|| serde_json::to_string(&telemetry).ok()).flatten()
}

fn network(descriptor: i32, default_network: NetworkOwner) -> Result<NetworkOwner, String> {
    match descriptor {
        0 => Ok(default_network),
        1.. => Ok(NetworkOwner::Manager(descriptor)),
        ..0 => {
            Err("failed to create networking stack dependencies: dup tun fd: bad file descriptor".to_owned())
        }
    }
}

/// The answer to a start.
pub(super) fn response(outcome: Result<(), String>) -> StartResponse {
    StartResponse { success: outcome.is_ok(), error_message: outcome.err().unwrap_or_default() }
}

/// Waits for the outcome of the start of this generation, at most until `deadline`.
pub(super) async fn verdict(
    nets: View<Option<Arc<Net>>>,
    generation: u64,
    deadline: Instant,
) -> Result<(), String> {
    let mut waiting_for = "the tunnel's parts did not come up; its log says why".to_owned();
    let watching = watch(nets, generation, &mut waiting_for);
    match timeout_at(deadline, watching).await {
        Ok(outcome) => outcome,
        Err(_) => Err(connecting(format!("no success within {START_LIMIT:?}: {waiting_for}"))),
    }
}

async fn watch(
    mut nets: View<Option<Arc<Net>>>,
    generation: u64,
    waiting_for: &mut String,
) -> Result<(), String> {
    let is_ours = |net: &Option<Arc<Net>>| net.as_ref().is_some_and(|net| net.boot.generation == generation);
    let gone = || connecting("the tunnel is shutting down");
    loop {
        let net = nets.wait_for(is_ours).await.ok_or_else(gone)?;
        let Some(net) = net.as_ref() else { continue };
        tokio::select! {
            outcome = judge_until_clear(net, waiting_for) => return outcome,
            // Built anew for the same start: what the old one says no longer counts.
            replaced = nets.changed() => drop(replaced.ok_or_else(gone)?),
        }
    }
}

async fn judge_until_clear(net: &Net, waiting_for: &mut String) -> Result<(), String> {
    let (mut link, mut host) = (net.link.view(), net.host.view());
    loop {
        match judge(&link.get(), &host.get(), net.boot.network) {
            Judgement::Success => return Ok(()),
            Judgement::Failure(error) => return Err(error),
            Judgement::Waiting(reason) => *waiting_for = reason,
        }
        // The net is lent to us, so its cells are there.
        tokio::select! {
            _ = link.changed() => {}
            _ = host.changed() => {}
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    Success,
    Failure(String),
    /// Not yet; for what, in words for a person.
    Waiting(String),
}

fn judge(link: &LinkState, host: &HostState, network: NetworkOwner) -> Judgement {
    if let Some(error) = &host.error {
        return Judgement::Failure(match network {
            NetworkOwner::Manager(_) => error.clone(),
            NetworkOwner::Tunnel | NetworkOwner::Nobody => {
                format!("failed to create networking stack dependencies: {error}")
            }
        });
    }
    let is_acknowledged = host.applied.is_some() || !matches!(network, NetworkOwner::Manager(_));
    match link {
        LinkState::Refused { error } => Judgement::Failure(connecting(error)),
        LinkState::Waiting { error, .. } => Judgement::Waiting(error.clone()),
        LinkState::Connecting => Judgement::Waiting(
            "the deployment has not answered; check its URL and that this machine can reach it".to_owned(),
        ),
        LinkState::Up { .. } if is_acknowledged => Judgement::Success,
        LinkState::Up { .. } => {
            Judgement::Waiting("the manager has not acknowledged the network settings".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use secrecy::ExposeSecret;

    use super::*;
    use crate::facts::InterfaceConfig;

    fn request() -> StartRequest {
        StartRequest {
            coder_url: "https://coder.example.com".into(),
            api_token: "fakeToken".into(),
            ..StartRequest::default()
        }
    }

    fn header(name: &str, value: &str) -> Header {
        Header { name: name.into(), value: value.into() }
    }

    fn error(start: &StartRequest) -> String {
        boot(start, 1, NetworkOwner::Tunnel).unwrap_err()
    }

    #[test]
    fn a_start_is_refused_with_the_texts_of_deployed_tunnels_in_their_order() {
        let start = |url: &str, token: &str| StartRequest {
            coder_url: url.into(),
            api_token: token.into(),
            ..StartRequest::default()
        };
        assert_eq!(error(&start("", "")), "missing coder url");
        assert_eq!(error(&start("", "x")), "missing coder url");
        assert_eq!(error(&start("http://192.0.2.1:40681", "")), "missing api token");
        let no_scheme = r#"parse url "://x": parse "://x": missing protocol scheme"#;
        assert_eq!(error(&start("://x", "t")), no_scheme);
        assert_eq!(error(&start("://x", "")), no_scheme);
        for url in ["http://[::1", "http://a b/", "%zz", "http://x:abc", "\u{7f}", "http://ü\n", "foo"] {
            let text = error(&start(url, "t"));
            assert!(text.starts_with(&format!("parse url {url:?}: parse {url:?}: ")), "{text}");
        }
        assert_eq!(
            error(&start("ftp://192.0.2.1/", "t")),
            r#"failed to start connection: unsupported protocol scheme "ftp""#
        );
    }

    #[test]
    fn a_start_keeps_headers_in_order_and_sets_telemetry_whole() {
        let start = StartRequest {
            headers: vec![header("X-A", "1"), header("x-a", ""), header("X-B", "größe")],
            device_os: "Linux".into(),
            ..request()
        };
        let boot = boot(&start, 7, NetworkOwner::Tunnel).unwrap();
        let headers: Vec<_> =
            boot.headers.iter().map(|(name, value)| (name.as_str(), value.expose_secret())).collect();
        assert_eq!(headers, [("X-A", "1"), ("x-a", ""), ("X-B", "größe")]);
        let telemetry = r#"{"device_id":"","device_os":"Linux","coder_desktop_version":""}"#;
        assert_eq!(boot.telemetry.as_deref(), Some(telemetry));
        assert_eq!(boot.generation, 7);
    }

    #[test]
    fn headers_that_are_ours_are_not_taken_from_the_manager() {
        let theirs = vec![header("coder-session-token", "other"), header("CODER-desktop-telemetry", "{}")];
        let with = |start| boot(&start, 1, NetworkOwner::Tunnel).unwrap();
        let without_telemetry = with(StartRequest { headers: theirs.clone(), ..request() });
        assert_eq!(without_telemetry.telemetry, None);
        assert_eq!(without_telemetry.headers.len(), 1);
        let with_telemetry = with(StartRequest { headers: theirs, device_id: "d".into(), ..request() });
        assert!(with_telemetry.headers.is_empty());
    }

    #[test]
    fn headers_that_cannot_be_sent_are_refused_without_telling_their_values() {
        for bad in [
            header("", "sesame"),
            header("X Y", "sesame"),
            header("X", "sesame\r\nY: 1"),
            header("X", "sesame\0"),
        ] {
            let text = error(&StartRequest { headers: vec![bad], ..request() });
            assert!(text.starts_with("failed to start connection: invalid header field "), "{text}");
            assert!(!text.contains("sesame"), "{text}");
        }
    }

    #[test]
    fn the_descriptor_says_who_owns_the_network() {
        let network = |descriptor, default| {
            let start = StartRequest { tunnel_file_descriptor: descriptor, ..request() };
            boot(&start, 1, default).map(|boot| boot.network)
        };
        assert_eq!(network(7, NetworkOwner::Nobody), Ok(NetworkOwner::Manager(7)));
        assert_eq!(network(0, NetworkOwner::Tunnel), Ok(NetworkOwner::Tunnel));
        assert_eq!(network(0, NetworkOwner::Nobody), Ok(NetworkOwner::Nobody));
        assert!(network(-1, NetworkOwner::Tunnel).unwrap_err().contains("bad file descriptor"));
    }

    #[test]
    fn a_boot_does_not_tell_its_secrets() {
        let start = StartRequest { headers: vec![header("X-Gate", "sesame")], ..request() };
        let text = format!("{:?}", boot(&start, 1, NetworkOwner::Tunnel).unwrap());
        assert!(!text.contains("fakeToken") && !text.contains("sesame"), "{text}");
    }

    #[test]
    fn a_start_succeeds_when_the_link_is_up_and_the_owner_of_the_network_agrees() {
        let up = LinkState::Up { since: SystemTime::UNIX_EPOCH };
        let refused = LinkState::Refused { error: "log in again".into() };
        let waiting = LinkState::Waiting { error: "no route".into(), retry_in: Duration::ZERO };
        let config = InterfaceConfig { address: std::net::Ipv6Addr::LOCALHOST, routes: vec![], mtu: 1280 };
        let applied = HostState { applied: Some(config), error: None };
        let failed = HostState { applied: None, error: Some("network settings failed: no".into()) };
        let none = HostState::default();
        let manager = NetworkOwner::Manager(3);
        let is_waiting = |judgement| matches!(judgement, Judgement::Waiting(_));

        assert_eq!(judge(&up, &none, NetworkOwner::Tunnel), Judgement::Success);
        assert_eq!(judge(&up, &none, NetworkOwner::Nobody), Judgement::Success);
        assert!(is_waiting(judge(&up, &none, manager)));
        assert_eq!(judge(&up, &applied, manager), Judgement::Success);
        assert_eq!(judge(&up, &failed, manager), Judgement::Failure("network settings failed: no".into()));
        assert_eq!(
            judge(&refused, &applied, manager),
            Judgement::Failure("failed to start connection: log in again".into())
        );
        assert_eq!(judge(&waiting, &applied, manager), Judgement::Waiting("no route".into()));
        assert!(is_waiting(judge(&LinkState::Connecting, &none, NetworkOwner::Tunnel)));
    }
}
