//! The HTTP layer as any client sees it: versions, resume tokens, what the deployment tells of itself.

use serde_json::{Value, json};

use super::*;
use crate::{control::relay_map, tests::rpc::refresh};

/// Conforms: control:H14 control:R5
#[tokio::test]
async fn a_version_that_the_deployment_does_not_speak_is_a_400_about_the_version() {
    let lab = lab(LabOptions::default()).await;
    let (status, refusal) = ask(&lab, "/api/v2/tailnet?version=99.99").await;
    assert_eq!((status, &refusal["message"]), (400, &"Unknown or unsupported API version".into()));
    let detail = "server is at version 2.10, behind requested major version 99.99";
    assert_eq!(refusal["validations"], json!([{ "field": "version", "detail": detail }]));

    let (status, refusal) = ask(&lab, "/api/v2/tailnet?version=1.0").await;
    let detail = "version 1.0 is no longer supported";
    assert_eq!((status, &refusal["validations"][0]["detail"]), (400, &detail.into()));
}

/// Conforms: control:H15
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_resume_token_is_a_new_peer_each_time() {
    let lab = lab(LabOptions::default()).await;
    let _first = Client::connect(&lab, "").await;
    let _second = Client::connect(&lab, "&resume_token=").await;
    let peers = peers(&lab, 2).await;
    assert!(peers.iter().all(|peer| peer.get_version_num() == 4), "{peers:?}");
    assert_ne!(peers[0], peers[1]);
}

/// Conforms: control:H16
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resumed_peer_keeps_its_id_and_gets_another_token_in_another_second() {
    let lab = lab(LabOptions::default()).await;
    let mut first = Client::connect(&lab, "").await;
    let shown = refresh(&mut first).await;
    let mut second = Client::connect(&lab, &format!("&resume_token={}", shown.token)).await;
    let peers = peers(&lab, 2).await;
    assert_eq!(peers[0], peers[1]);
    let another = async {
        while refresh(&mut second).await.token == shown.token {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIMIT, another).await.expect("the second changes");
}

/// Conforms: control:H17
#[tokio::test]
async fn a_resume_token_that_is_not_one_is_a_401_about_the_token_and_nobody_comes_in() {
    let lab = lab(LabOptions::default()).await;
    let (status, refusal) = ask(&lab, "/api/v2/tailnet?version=2.3&resume_token=invalid").await;
    assert_eq!((status, &refusal["message"]), (401, &"Invalid resume token".into()));
    let validations = json!([{ "field": "resume_token", "detail": "Invalid resume token" }]);
    assert_eq!(refusal["validations"], validations);
    assert!(refusal.get("token").is_none() && lab.control().recording().connections.is_empty());
}

/// Conforms: control:H18
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resume_token_without_a_key_is_taken_and_worth_nothing() {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    let lab = lab(LabOptions::default()).await;
    let named = Uuid::from_u128(7);
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let claims = part(&format!(r#"{{"sub":"{named}","exp":99999999999}}"#));
    let token = format!("{}.{claims}.{}", part(r#"{"alg":"HS512"}"#), part("signature"));
    let _client = Client::connect(&lab, &format!("&resume_token={token}")).await;
    let peers = peers(&lab, 1).await;
    assert!(!peers[0].is_nil() && peers[0] != named);
}

/// Conforms: control:H19
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_telemetry_header_never_refuses_anybody_and_is_reported_at_both_ends_if_it_is_good() {
    let lab = lab(LabOptions::default()).await;
    let (control, name) = (lab.control(), "Coder-Desktop-Telemetry");
    let full = r#"{"device_id":"d1","device_os":"Linux","coder_desktop_version":"0.7.0"}"#;
    let device = Device { id: "d1".to_owned(), os: "Linux".to_owned(), version: "0.7.0".to_owned() };
    let cases = [
        (vec![(name, full)], Some(device.clone())),
        (vec![(name, full), (name, "{}")], Some(device)),
        (vec![], None),
        (vec![(name, "")], None),
        (vec![(name, "{}")], None),
        (vec![(name, "{\"device_id\":")], None),
    ];
    for (number, (headers, device)) in cases.into_iter().enumerate() {
        let client = Client::dial(&lab, "version=2.3", &headers).await;
        let reports = |count: usize| {
            control.wait(LIMIT, move |seen| {
                (seen.reports.len() == count).then(|| seen.reports[count - 1].clone())
            })
        };
        let came = reports(2 * number + 1).await.unwrap();
        assert_eq!((came.what, came.user, &came.device), (Reported::Connected, control.user(), &device));
        client.hang_up();
        let went = reports(2 * number + 2).await.unwrap();
        assert_eq!(went, Report { what: Reported::Disconnected, ..came }, "{headers:?}");
    }
}

/// Conforms: control:H20
#[tokio::test]
async fn connection_info_tells_the_suffix_and_how_agents_and_relays_are_to_be_reached() {
    let suffix = "float".to_owned();
    let set = LabOptions { suffix, disable_direct: true, force_websockets: true, ..LabOptions::default() };
    for (options, suffix, is_set) in
        [(set, "float", true), (LabOptions::default(), warren_proto::name::DEFAULT_SUFFIX, false)]
    {
        let (status, info) = ask(&lab(options).await, "/api/v2/workspaceagents/connection").await;
        assert_eq!((status, &info["hostname_suffix"]), (200, &suffix.into()));
        assert_eq!(info["disable_direct_connections"], is_set);
        assert_eq!(info["derp_force_websockets"], is_set);
    }
}

/// Conforms: control:H21
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_direct_connections_no_map_names_a_stun_server_and_agents_are_met_at_their_relay() {
    let stun_servers = vec!["stun.example.com:3478".to_owned()];
    let with = LabOptions { stun_servers, agents: 1, ..LabOptions::default() };
    let open = Lab::start(with.clone()).await.unwrap();
    assert_eq!(open.control().relay_map().regions[&1000].nodes[0].stun_port, 3478);

    let lab = Lab::start(LabOptions { disable_direct: true, ..with }).await.unwrap();
    let mut client = Client::connect(&lab, "").await;
    let maps = tailnet::StreamDerpMapsRequest {};
    let map: tailnet::DerpMap = client.ask(Method::StreamDerpMaps, &maps).await.hear().await;
    let (_, info) = ask(&lab, "/api/v2/workspaceagents/connection").await;
    assert_eq!(info["derp_map"], relay_map::json(&map));
    let nodes: Vec<_> = map.regions.values().flat_map(|region| &region.nodes).collect();
    assert!(!nodes.is_empty() && nodes.iter().all(|node| !node.stun_only && node.stun_port == -1));

    let agent = lab.agents()[0].id;
    assert!(lab.wait_for_agent(agent, LIMIT, |stats| stats.relay_logins > 0).await);
    let mut stream = client.ask(Method::Coordinate, &add_tunnel(agent)).await;
    let told: tailnet::CoordinateResponse = stream.hear().await;
    assert!(told.peer_updates[0].node.as_ref().unwrap().endpoints.is_empty(), "there is no direct way");
    let mut peer = Peer::join(&lab, agent).await;
    assert!(!peer.probe().await.is_empty(), "it answers over the relay");
}

/// Conforms: control:H22
#[tokio::test]
async fn where_only_browsers_may_connect_the_owner_of_the_deployment_may_not_either() {
    let lab = lab(LabOptions { is_browser_only: true, is_owner: true, ..LabOptions::default() }).await;
    let (status, user) = ask(&lab, "/api/v2/users/me").await;
    assert_eq!((status, &user["roles"][0]["name"]), (200, &"owner".into()));
    let (status, refusal) = ask(&lab, "/api/v2/tailnet?version=2.3").await;
    let message = "Non-browser connections are disabled for your deployment.";
    assert_eq!((status, &refusal["message"]), (409, &message.into()));
}

/// Conforms: control:H23
#[tokio::test]
async fn health_and_latency_are_told_to_anybody() {
    let lab = lab(LabOptions::default()).await;
    for (path, body) in [("/derp/latency-check", ""), ("/latency-check", "OK"), ("/healthz", "OK")] {
        let answer = get(&lab, path, "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        assert_eq!(answer.split_once("\r\n\r\n").unwrap().1, body, "{path}");
    }
}

/// Conforms: control:H24
#[tokio::test]
async fn build_info_tells_the_version_and_where_it_comes_from() {
    let lab = lab(LabOptions::default()).await;
    let (status, info) = ask(&lab, "/api/v2/buildinfo").await;
    assert_eq!((status, &info["version"]), (200, &BUILD_VERSION.into()));
    assert!(info["external_url"].as_str().unwrap().starts_with("https://"), "{info}");
}

/// Conforms: control:D2
#[tokio::test]
async fn a_map_from_a_url_or_a_file_is_told_beside_the_deployments_own_region() {
    let remote = r#"{"HomeParams":{"RegionScore":{"7":0.5}},"Regions":{"7":{"RegionID":7,"RegionCode":"far",
        "RegionName":"Far","Nodes":[{"Name":"7a","RegionID":7,"HostName":"relay.example.com","IPv4":"192.0.2.1",
        "STUNPort":-1,"DERPPort":8443,"ForceHTTP":true,"CanPort80":true}]}}}"#;
    let origin = lab(LabOptions::default()).await;
    let answer = HttpFault::Answer(::http::StatusCode::OK, "application/json".to_owned(), remote.to_owned());
    origin.control().fail(Endpoint::Other, answer, Times::Always);
    let url = MapSource::Url(format!("{}/map.json", origin.url()));
    let path = std::env::temp_dir().join(format!("warren-lab-map-{}", crate::random_id()));
    std::fs::write(&path, remote).unwrap();

    for source in [url, MapSource::File(path.clone())] {
        let lab = lab(LabOptions { relay_map: Some(source), ..LabOptions::default() }).await;
        let (_, info) = ask(&lab, "/api/v2/workspaceagents/connection").await;
        let expected: Value = serde_json::from_str(remote).unwrap();
        let mut region = expected["Regions"]["7"].clone();
        region["EmbeddedRelay"] = json!(false);
        assert_eq!(info["derp_map"]["Regions"]["7"], region);
        assert_eq!(info["derp_map"]["HomeParams"], expected["HomeParams"]);
        assert_eq!(info["derp_map"]["Regions"]["999"]["EmbeddedRelay"], true);
    }
    std::fs::remove_file(&path).unwrap();
    let nowhere = Some(MapSource::File(path));
    let refusal = Lab::start(LabOptions { relay_map: nowhere, ..LabOptions::default() }).await.err().unwrap();
    assert!(refusal.to_string().starts_with("cannot read the relay map at "), "{refusal}");
}

/// A lab without agents, unless more is wanted.
async fn lab(options: LabOptions) -> Lab {
    Lab::start(LabOptions { agents: 0, ..options }).await.unwrap()
}

/// The status and the JSON of an answer.
async fn ask(lab: &Lab, path: &str) -> (u16, Value) {
    let answer = get(lab, path, lab.token()).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), serde_json::from_str(body).unwrap())
}

/// The peers of the first connections.
async fn peers(lab: &Lab, count: usize) -> Vec<Uuid> {
    let found = |seen: &Recording| {
        let peers: Vec<Uuid> = seen.connections.iter().map(|connection| connection.peer).collect();
        (peers.len() == count).then_some(peers)
    };
    lab.control().wait(LIMIT, found).await.unwrap()
}
