//! The control plane: our client at their server, and their client at the lab's.

use serde_json::json;
use warren_lab::Ended;
use warren_proto::vpn::tunnel_message::Msg;

use crate::{
    deployment::{REGION, RESUME_TOKEN, Shape, Theirs, bytes, has_ping},
    doubles::Make,
    program::{Program, SCHEMA, has_program},
    support::{Deployment, LIMIT},
};

mod our_client {
    use super::*;

    /// Conforms: control:H1 control:H2
    #[test]
    fn introduces_itself_to_their_server_and_says_goodbye() {
        if !has_program("our client at their control plane") {
            return;
        }
        let mut theirs = Theirs::start(Shape::default());
        let manager = theirs.join(Make::Service);
        for path in ["/api/v2/users/me", "/api/v2/workspaceagents/connection", "/api/v2/tailnet"] {
            let request = theirs.control.wait(|event| event["path"] == path);
            assert_eq!(request["tokens"], 1, "{request}");
            let query = if path.ends_with("tailnet") { json!({"version": ["2.3"]}) } else { json!({}) };
            assert_eq!(request["query"], query, "{request}");
        }
        let owner = theirs.control.message("WorkspaceUpdates", "/workspaceOwnerId");
        assert_eq!(owner["workspaceOwnerId"], bytes(uuid::Uuid::from_u128(7).as_bytes()));

        let told = theirs.introduce().told;

        assert_eq!(told["preferredDerp"], REGION);
        assert_eq!(told["addresses"], told["allowedIps"]);
        let address = told["addresses"][0].as_str().unwrap();
        assert!(address.starts_with("fd60:627a:a42b:") && address.ends_with("/128"), "{told}");
        let ended = manager.stop();
        assert_eq!(ended.status.code(), Some(0));
        theirs.control.message("Coordinate", "/disconnect");
        theirs.control.event("disconnected");
        assert_eq!(theirs.control.unseen("odd"), Vec::<serde_json::Value>::new());
    }

    #[test]
    fn tells_its_latency_as_they_write_it_with_what_it_tells_next() {
        if !has_program("latencies at their control plane") {
            return;
        }
        let mut theirs = Theirs::start(Shape::default());
        let _manager = theirs.join(Make::Service);
        theirs.introduce();
        let name = format!("{REGION}-v4");
        let told = (0..50).find_map(|_| {
            theirs.control.forget();
            theirs.control.order(json!({"order": "drop"}));
            theirs.introduce().told["derpLatency"][&name].as_f64()
        });
        assert!(told.is_some_and(|seconds| seconds > 0.0 && seconds < 60.0), "{told:?}");
    }

    #[test]
    fn takes_a_snapshot_of_many_frames_and_windows_whole() {
        if !has_program("a large snapshot of their control plane") {
            return;
        }
        // Some 400 KiB: seven frames of DRPC, and more than one window of yamux.
        const MORE: usize = 12_000;
        let mut theirs = Theirs::start(Shape { more_workspaces: MORE, ..Shape::default() });
        let mut manager = theirs.join(Make::Service);
        theirs.introduce();
        manager.wait_for(has_ping);
        let told = &manager.peer().told;
        let workspaces = told.iter().filter_map(|heard| match &heard.message.msg {
            Some(Msg::PeerUpdate(update)) => Some(update.upserted_workspaces.len()),
            _ => None,
        });
        assert_eq!(workspaces.sum::<usize>(), MORE + 1);
    }

    #[test]
    fn answers_the_pings_of_their_websocket_and_of_their_yamux() {
        if !has_program("pings of their control plane") {
            return;
        }
        let mut theirs = Theirs::start(Shape::default());
        let _manager = theirs.join(Make::Service);
        theirs.introduce();
        theirs.control.order(json!({"order": "ping"}));
        let pinged = theirs.control.event("pinged");
        assert_eq!(pinged["error"], json!(null));
    }

    #[test]
    fn comes_back_as_the_same_peer_whether_their_server_drops_or_closes_the_connection() {
        if !has_program("a reconnect at their control plane") {
            return;
        }
        let mut theirs = Theirs::start(Shape::default());
        let mut manager = theirs.join(Make::Service);
        let first = theirs.introduce();
        for end in [json!({"order": "drop"}), json!({"order": "close", "code": 1001, "text": "going away"})] {
            // By then it has the token.
            theirs.control.wait(|event| event["event"] == "finished" && event["rpc"] == "RefreshResumeToken");
            theirs.control.forget();

            theirs.control.order(end);

            let dialled = theirs.control.wait(|event| event["path"] == "/api/v2/tailnet");
            assert_eq!(dialled["query"], json!({"version": ["2.3"], "resume_token": [RESUME_TOKEN]}));
            let again = theirs.introduce();
            assert_eq!((again.node, again.disco), (first.node.clone(), first.disco.clone()));
        }
        manager.wait_for(has_ping);
    }

    #[test]
    fn lives_without_resume_tokens_where_their_server_has_none() {
        if !has_program("their control plane without resume tokens") {
            return;
        }
        let mut theirs = Theirs::start(Shape::default());
        theirs.control.order(
            json!({"order": "fail", "rpc": "RefreshResumeToken", "code": 12, "text": "Unimplemented"}),
        );
        let mut manager = theirs.join(Make::Service);
        theirs.introduce();
        manager.wait_for(has_ping);
        theirs.control.forget();
        theirs.control.order(json!({"order": "drop"}));
        let dialled = theirs.control.wait(|event| event["path"] == "/api/v2/tailnet");
        assert_eq!(dialled["query"], json!({"version": ["2.3"]}));
        theirs.introduce();
    }
}

mod their_client {
    use super::*;

    fn at(deployment: &Deployment) -> Program {
        let (url, token) = deployment.access();
        Program::start("control-client", &["--schema", SCHEMA, "--url", &url, "--token", &token])
    }

    #[test]
    fn is_served_every_call_of_the_lab() {
        if !has_program("their client at the lab's control plane") {
            return;
        }
        let deployment = Deployment::start(2);
        let mut client = at(&deployment);
        assert_eq!(client.ready["user"]["username"], "alice");
        assert!(client.ready["connection"]["derp_map"]["Regions"]["999"].is_object(), "{}", client.ready);
        let owner: uuid::Uuid = client.ready["user"]["id"].as_str().unwrap().parse().unwrap();

        client.order(json!({"order": "open", "rpc": "StreamDERPMaps"}));
        let map = client.message("StreamDERPMaps", "/homeParams");
        assert_eq!(map["regions"]["999"]["embeddedRelay"], true);

        let request = json!({"workspaceOwnerId": bytes(owner.as_bytes())});
        client.order(json!({"order": "open", "rpc": "WorkspaceUpdates", "message": request}));
        let snapshot = client.message("WorkspaceUpdates", "/upsertedAgents");
        assert_eq!(snapshot["upsertedWorkspaces"].as_array().unwrap().len(), 2);
        deployment.runtime.block_on(async { deployment.lab.add_workspace("late", &["main"]) });
        let difference = client.message("WorkspaceUpdates", "/upsertedAgents/0");
        assert_eq!(difference["upsertedWorkspaces"][0]["name"], "late");

        client.order(json!({"order": "call", "rpc": "RefreshResumeToken"}));
        let token = client.message("RefreshResumeToken", "/token");
        assert!(token["expiresAt"].is_string() && token["refreshIn"].is_string(), "{token}");

        let telemetry = json!({"events": [{"application": "theirs", "clientType": "CLI"}]});
        client.order(json!({"order": "call", "rpc": "PostTelemetry", "message": telemetry}));
        client.message("PostTelemetry", "");

        client.order(json!({"order": "call", "rpc": "Nothing"}));
        let unknown = client.event("ended");
        assert!(unknown["error"].as_str().unwrap().contains("unknown rpc"), "{unknown}");

        client.order(json!({"order": "ping"}));
        assert_eq!(client.event("pinged")["error"], json!(null));
        client.order(json!({"order": "close"}));
        client.event("disconnected");
        let control = deployment.control();
        let ended = deployment
            .runtime
            .block_on(control.wait(LIMIT, |recording| recording.connections.first()?.ended.clone()));
        assert!(matches!(ended, Some(Ended::Closed(..))), "{ended:?}");
    }

    #[test]
    fn gets_a_snapshot_of_many_frames_and_windows_from_the_lab() {
        if !has_program("a large snapshot for their client") {
            return;
        }
        const AGENTS: usize = 6_000;
        let deployment = Deployment::start(0);
        let names: Vec<String> = (0..AGENTS).map(|number| format!("a{number}")).collect();
        deployment.control().change_workspaces(|all| {
            let agents =
                names.iter().map(|name| (uuid::Uuid::from_bytes(warren_proto::key::random()), name.clone()));
            let workspace = warren_lab::Workspace {
                name: "many".to_owned(),
                status: warren_lab::Status::Running,
                agents: agents.collect(),
            };
            all.0.insert(uuid::Uuid::from_u128(1), workspace);
        });
        let mut client = at(&deployment);
        let owner: uuid::Uuid = client.ready["user"]["id"].as_str().unwrap().parse().unwrap();
        let request = json!({"workspaceOwnerId": bytes(owner.as_bytes())});
        client.order(json!({"order": "open", "rpc": "WorkspaceUpdates", "message": request}));
        let snapshot = client.message("WorkspaceUpdates", "/upsertedAgents");
        assert_eq!(snapshot["upsertedAgents"].as_array().unwrap().len(), AGENTS);
    }

    #[test]
    fn is_refused_by_the_lab_in_words_that_it_understands() {
        if !has_program("their client without a token") {
            return;
        }
        let deployment = Deployment::start(1);
        let (url, token) = deployment.access();
        let own = ["--schema", SCHEMA, "--url", &url];
        let wrong = Program::refused("control-client", &[&own[..], &["--token", "a-b"]].concat());
        assert!(wrong.contains("401") && wrong.contains("Please sign in again"), "{wrong}");
        let future = ["--token", &token, "--query", "version=9.9"];
        let refused = Program::refused("control-client", &[&own[..], &future].concat());
        assert!(refused.contains("Unknown or unsupported API version"), "{refused}");
    }
}
