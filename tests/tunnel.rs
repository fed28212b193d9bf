//! The tunnel process as managers see it: its command line, its frames, its exit status. No privilege
//! needed: where a device is wanted, a socket that carries bare packets stands for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::{os::unix::net::UnixDatagram, path::Path, process::Stdio, time::Duration};

use futures::TryStreamExt;
use rustix::process::Signal;
use support::{
    LIMIT, WARREN, can_isolate,
    tunnel::{DESCRIPTOR, Handed, Tunnel, answer, lab, lines, start},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::{sleep, timeout},
};
use warren_lab::{Ended, Lab, LabOptions, Recording};
use warren_proto::{
    frame,
    vpn::{
        Agent, GetPeerUpdate, ManagerMessage, NetworkSettingsResponse, PeerUpdate, Rpc, StartRequest,
        StartResponse, StopRequest, StopResponse, WakeRequest, manager_message::Msg as Order, start_request,
        tunnel_message::Msg,
    },
};
use warren_supervisor::link::{LinkClient, PingBy};

mod command_line {
    use super::*;

    /// What the reference says after its own error, from closing what the manager had closed.
    const ITS_OWN_DEFECT: &str = "vpn-daemon run --rpc-read-handle 0 --rpc-write-handle 1";

    /// Conforms: vpn:C7
    #[tokio::test]
    async fn every_recorded_command_line_is_answered_as_recorded() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/tests/vectors/vpn/command-line.json");
        let vectors: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let entries = vectors["entries"].as_array().unwrap();
        assert!(entries.len() > 20);
        for entry in entries.iter().filter(|entry| entry["name"] != ITS_OWN_DEFECT) {
            let arguments = entry["args"].as_array().unwrap().iter().map(|it| it.as_str().unwrap());
            let variables = entry["env"].as_object().unwrap().iter();
            let output = Command::new(WARREN)
                .args(arguments)
                .envs(variables.map(|(name, value)| (name, value.as_str().unwrap())))
                .stdin(Stdio::null())
                .output()
                .await
                .unwrap();
            let expected: Vec<_> = entry["stderr"].as_array().unwrap().iter().map(program).collect();
            assert_eq!(lines(&output.stderr), expected, "{entry}");
            assert_eq!(
                i64::from(output.status.code().unwrap()),
                entry["status"].as_i64().unwrap(),
                "{entry}"
            );
            assert_eq!(output.stdout.is_empty(), entry["stdout_empty"] == true, "{entry}");
        }
    }

    /// The recorded line, of a program with our name.
    fn program(line: &serde_json::Value) -> String {
        line.as_str().unwrap().replace("\"coder ", "\"warren ")
    }

    #[tokio::test]
    async fn a_manager_that_leaves_before_the_handshake_is_named_with_its_descriptor() {
        let mut tunnel = Tunnel::spawn(&[], Handed::Nothing).await;
        drop(tunnel.stdin.take());
        assert_eq!(tunnel.exit().await, 1);
        let error = "error: create new tunnel for client: handshake failed: read header: read from pipe_read \
                     (fd=0): EOF";
        assert_eq!(lines(&tunnel.stderr().await).last().unwrap(), error);
    }

    /// Conforms: vpn:C8
    #[tokio::test]
    async fn a_handshake_that_cannot_be_understood_ends_with_status_1_and_says_what_came() {
        for (line, error) in [
            ("codervpn client 1.3", "validate header (codervpn client 1.3): unexpected role"),
            ("garbage", "validate header (garbage): wrong number of parts"),
        ] {
            let mut tunnel = Tunnel::spawn(&[], Handed::Nothing).await;
            tunnel.write(format!("{line}\n").as_bytes()).await;
            assert_eq!(tunnel.exit().await, 1);
            let error = format!("error: create new tunnel for client: handshake failed: {error}");
            assert_eq!(lines(&tunnel.stderr().await).last().unwrap(), &error);
        }
    }

    #[tokio::test]
    async fn a_log_filter_that_does_not_parse_is_named_with_a_remedy() {
        let output = Command::new(WARREN)
            .args(["vpn-daemon", "run", "--rpc-read-handle", "0", "--rpc-write-handle", "1"])
            .env("WARREN_LOG", "a=b=c")
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("a=b=c") && text.contains("Use directives"), "{text}");
    }
}

mod requests {
    use super::*;

    /// Conforms: vpn:15.2
    #[tokio::test]
    async fn peers_are_told_before_a_start_too_and_then_there_are_none() {
        let mut tunnel = Tunnel::greeted().await;
        tunnel.send(1, Order::GetPeerUpdate(GetPeerUpdate {})).await;
        assert_eq!(tunnel.frame().await, answer(1, Msg::PeerUpdate(PeerUpdate::default())));
    }

    /// Conforms: vpn:T1 vpn:16.2.5
    #[tokio::test]
    async fn what_a_start_names_has_reached_the_deployment_when_it_is_answered_and_each_header_once() {
        let lab = lab().await;
        let mut tunnel = Tunnel::greeted().await;
        let gate = start_request::Header { name: "X-Gate".to_owned(), value: "open".to_owned() };
        let Order::Start(plain) = start(&lab, lab.token(), 0) else { unreachable!() };
        let order = StartRequest {
            headers: vec![gate],
            device_id: "device".to_owned(),
            device_os: "Linux".to_owned(),
            coder_desktop_version: "1.2.3".to_owned(),
            ..plain
        };
        tunnel.send(1, Order::Start(order)).await;
        let response = tunnel.start_response(1).await;
        assert!(response.success, "{response:?}");
        assert_eq!(lab.control().connections(), 1, "the connection exists");
        let telemetry = r#"{"device_id":"device","device_os":"Linux","coder_desktop_version":"1.2.3"}"#;
        let asked = lab.control().recording().requests;
        for path in ["/api/v2/users/me", "/api/v2/workspaceagents/connection", "/api/v2/tailnet"] {
            let request = asked.iter().find(|request| request.path == path).expect(path);
            for (name, value) in [
                ("coder-session-token", lab.token()),
                ("x-gate", "open"),
                ("coder-desktop-telemetry", telemetry),
            ] {
                assert_eq!(request.header(name).collect::<Vec<_>>(), [value], "{path}: {name}");
            }
        }
        tunnel.pinged().await;
        let asked = lab.control().recording().requests;
        assert!(asked.iter().any(|request| request.path == "/derp"));
        for request in asked {
            let (tokens, gates) =
                (request.header("coder-session-token").count(), request.header("x-gate").count());
            assert_eq!((tokens, gates), (1, 1), "{}", request.path);
        }
    }

    /// Conforms: vpn:T7 vpn:C5 control:H4
    #[tokio::test]
    async fn what_is_told_on_request_is_what_was_told_unasked() {
        let lab = Lab::start(LabOptions { agents: 2, ..LabOptions::default() }).await.unwrap();
        let mut tunnel = Tunnel::greeted().await;
        tunnel.send(1, start(&lab, lab.token(), 0)).await;
        let (mut told, mut has_started) = (PeerUpdate::default(), false);
        while !has_started || told.upserted_workspaces.is_empty() {
            let message = tunnel.frame().await;
            match message.msg {
                Some(Msg::Start(response)) => has_started = response.success,
                Some(Msg::PeerUpdate(update)) if told.upserted_workspaces.is_empty() => {
                    assert_eq!(message.rpc, None);
                    told = update;
                }
                Some(Msg::PeerUpdate(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        tunnel.send(2, Order::GetPeerUpdate(GetPeerUpdate {})).await;
        let known = loop {
            let message = tunnel.frame().await;
            match message.msg {
                Some(Msg::PeerUpdate(update)) if message.rpc == Some(Rpc::response(2)) => break update,
                Some(Msg::PeerUpdate(_)) => assert_eq!(message.rpc, None),
                other => panic!("{other:?}"),
            }
        };
        let agents = |update: &PeerUpdate| {
            let plain = |it: &Agent| Agent { last_handshake: None, last_ping: None, ..it.clone() };
            update.upserted_agents.iter().map(plain).collect::<Vec<_>>()
        };
        assert_eq!(known.upserted_workspaces, told.upserted_workspaces);
        assert_eq!(agents(&known), agents(&told));
        assert_eq!((known.upserted_workspaces.len(), known.upserted_agents.len()), (2, 2));
        assert!(known.upserted_workspaces.is_sorted_by(|a, b| a.id < b.id));
        assert!(known.deleted_workspaces.is_empty() && known.deleted_agents.is_empty());
        assert!(told.deleted_workspaces.is_empty() && told.deleted_agents.is_empty());
        for agent in lab.agents() {
            let known =
                known.upserted_agents.iter().find(|it| it.id == agent.id.as_bytes().as_slice()).unwrap();
            assert_eq!((&known.fqdn, &known.ip_addrs), (&agent.fqdn, &vec![agent.address.to_string()]));
        }
    }

    /// Conforms: vpn:15.18 vpn:15.38
    #[tokio::test]
    async fn a_start_that_was_refused_leaves_nothing_in_the_way_of_the_next() {
        let lab = lab().await;
        let mut tunnel = Tunnel::greeted().await;
        tunnel.send(1, Order::Start(StartRequest::default())).await;
        let missing = StartResponse { success: false, error_message: "missing coder url".to_owned() };
        assert_eq!(tunnel.frame().await, answer(1, Msg::Start(missing)));

        tunnel.send(2, start(&lab, "wrong-token", 0)).await;
        let refused = tunnel.start_response(2).await;
        assert!(!refused.success, "a wrong token was accepted");
        assert!(refused.error_message.starts_with("failed to start connection: "), "{refused:?}");

        tunnel.send(3, start(&lab, lab.token(), 0)).await;
        let response = tunnel.start_response(3).await;
        assert!(response.success, "{response:?}");
        tunnel.pinged().await;
    }

    #[tokio::test]
    async fn a_device_that_is_not_open_fails_the_start_before_any_contact_with_the_network() {
        let lab = lab().await;
        let mut tunnel = Tunnel::greeted().await;
        tunnel.send(1, start(&lab, lab.token(), 99)).await;
        let response = tunnel.start_response(1).await;
        assert!(!response.success);
        let error = "failed to create networking stack dependencies: packet_io could not start: descriptor 99 is \
                     not open in this process";
        assert_eq!(response.error_message, error);
        assert!(lab.control().recording().requests.is_empty());
    }

    #[tokio::test]
    async fn a_manager_that_gives_a_device_is_asked_to_set_it_up_and_is_sent_the_log() {
        let lab = lab().await;
        let (_ours, theirs) = UnixDatagram::pair().unwrap();
        let mut tunnel = Tunnel::spawn(&[], Handed::Device(theirs)).await.greet().await;
        tunnel.send(1, start(&lab, lab.token(), DESCRIPTOR)).await;
        let (mut asked, mut logged) = (None, false);
        let response = loop {
            let message = tunnel.frame().await;
            match message.msg.unwrap() {
                Msg::NetworkSettings(settings) => {
                    let id = message.rpc.unwrap().msg_id;
                    let agreed = NetworkSettingsResponse { success: true, error_message: String::new() };
                    tunnel.respond(id, Order::NetworkSettings(agreed)).await;
                    asked = Some(settings);
                }
                Msg::Log(_) => logged = true,
                Msg::Start(response) => break response,
                Msg::PeerUpdate(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert!(response.success, "{response:?}");
        let settings = asked.unwrap();
        assert_eq!(settings.mtu, 1280);
        assert!(settings.ipv6_settings.unwrap().addrs[0].starts_with("fd60:627a:a42b:"));
        assert!(logged);
    }
}

mod own_network {
    use super::*;

    const NAME: &str =
        "own_network::a_tunnel_that_owns_its_network_makes_and_sets_a_device_that_goes_with_it";
    /// Set for the test's second life, inside namespaces of its own.
    const INSIDE: &str = "WARREN_TEST_INSIDE";

    /// Conforms: vpn:15.17 vpn:15.18 vpn:15.38 vpn:16.2.3
    #[tokio::test]
    async fn a_tunnel_that_owns_its_network_makes_and_sets_a_device_that_goes_with_it() {
        if std::env::var_os(INSIDE).is_some() {
            return inside().await;
        }
        if !can_isolate(NAME) {
            return;
        }
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "--net"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", NAME])
            .env(INSIDE, "1")
            .output()
            .await
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        assert!(text(&output.stdout).contains("1 passed"), "{}", text(&output.stdout));
    }

    async fn inside() {
        loopback_up().await;
        let lab = lab().await;
        for (end, status) in [("stop", 0), ("EOF", 69), ("SIGTERM", 0)] {
            made_used_and_gone(&lab, end, status).await;
        }
    }

    async fn made_used_and_gone(lab: &Lab, end: &str, status: i32) {
        let rules = rules().await;
        let mut tunnel = Tunnel::spawn(&["--no-device=false"], Handed::Nothing).await.greet().await;
        tunnel.send(8, start(lab, "wrong-token", 0)).await;
        assert!(!tunnel.start_response(8).await.success);
        eventually(|| !has("dev", "warren0:")).await;
        tunnel.start(lab).await;
        // Start does not wait for the kernel to have everything.
        eventually(|| has("if_inet6", "fd60627aa42b")).await;
        eventually(|| has("ipv6_route", "fd60627aa42b00000000000000000000 30 ")).await;
        let agent = &lab.agents()[0];
        let page = timeout(LIMIT, fetch((agent.address, agent.http_port))).await.unwrap();
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        assert_eq!(self::rules().await, rules, "one route is all it takes");

        match end {
            "stop" => tunnel.send(2, Order::Stop(StopRequest {})).await,
            "EOF" => drop(tunnel.stdin.take()),
            _ => tunnel.signal(Signal::TERM),
        }

        assert_eq!(tunnel.exit().await, status, "{end}");
        assert!(!has("dev", "warren0:") && !has("if_inet6", "fd60"), "{end}");
        assert!(!has("ipv6_route", "fd60"), "{end}");
    }

    /// Whether a line of this table of the kernel begins so and is about our device.
    fn has(table: &str, prefix: &str) -> bool {
        let table = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap();
        table.lines().any(|line| line.trim_start().starts_with(prefix) && line.contains("warren0"))
    }

    /// A new network namespace has its loopback down.
    async fn loopback_up() {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let up = rtnetlink::LinkUnspec::new_with_index(1).up().build();
        handle.link().set(up).execute().await.unwrap();
    }

    /// The rules of all tables of routes.
    async fn rules() -> String {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let rules: Vec<_> =
            handle.rule().get(rtnetlink::IpVersion::V6).execute().try_collect().await.unwrap();
        assert!(!rules.is_empty());
        format!("{rules:?}")
    }

    async fn fetch(server: (std::net::Ipv6Addr, u16)) -> String {
        let mut stream = tokio::net::TcpStream::connect(server).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut page = Vec::new();
        stream.read_to_end(&mut page).await.unwrap();
        String::from_utf8_lossy(&page).into_owned()
    }
}

mod ends {
    use super::*;

    /// Conforms: vpn:T2 vpn:15.1 vpn:16.2.3 vpn:D6
    #[tokio::test]
    async fn the_answer_to_a_stop_is_the_last_frame_and_the_deployment_hears_a_goodbye() {
        let lab = lab().await;
        let mut tunnel = Tunnel::started(&lab).await;
        tunnel.send(9, Order::Stop(StopRequest {})).await;
        let stopped = StopResponse { success: true, error_message: String::new() };
        let last = tunnel.rest().await.pop().unwrap();
        assert_eq!(last, answer(9, Msg::Stop(stopped)));
        assert_eq!(tunnel.exit().await, 0);
        said_goodbye(&lab).await;
    }

    /// Conforms: vpn:T18
    #[tokio::test]
    async fn a_stop_waits_for_no_ping() {
        let lab = lab().await;
        let agent = lab.agents()[0].id;
        let (mut tunnel, link) = Tunnel::linked(&[]).await;
        tunnel.start(&lab).await;
        tunnel.pinged().await;
        lab.mute_agent(agent, true);
        let asker = link.clone();
        let pinging =
            tokio::spawn(
                async move { asker.ping_agent(agent, PingBy::Disco, Duration::from_secs(30)).await },
            );
        let impatient = link.ping_agent(agent, PingBy::Disco, Duration::from_millis(200)).await.unwrap();
        assert!(impatient.is_err() && !pinging.is_finished(), "{impatient:?}");
        tunnel.send(9, Order::Stop(StopRequest {})).await;
        let stopped = StopResponse { success: true, error_message: String::new() };
        assert_eq!(tunnel.rest().await.pop().unwrap(), answer(9, Msg::Stop(stopped)));
        assert_eq!(tunnel.exit().await, 0);
        let unanswered = pinging.await.unwrap();
        assert!(!matches!(unanswered, Ok(Ok(_))), "{unanswered:?}");
    }

    /// Conforms: vpn:15.1 vpn:16.2.3
    #[tokio::test]
    async fn a_manager_that_goes_ends_the_tunnel_with_status_69() {
        let lab = lab().await;
        let mut tunnel = Tunnel::started(&lab).await;
        drop(tunnel.stdin.take());
        assert_eq!(tunnel.exit().await, 69);
        said_goodbye(&lab).await;
    }

    #[tokio::test]
    async fn a_manager_that_dies_takes_stderr_with_it_and_the_tunnel_still_ends_in_order() {
        let lab = lab().await;
        let mut tunnel = Tunnel::started(&lab).await;
        drop(tunnel.child.stderr.take());
        drop(tunnel.stdin.take());
        assert_eq!(tunnel.exit().await, 69);
        said_goodbye(&lab).await;
    }

    /// Conforms: vpn:15.15 vpn:16.2.3
    #[tokio::test]
    async fn a_signal_ends_the_tunnel_in_order_with_status_0() {
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let lab = lab().await;
            let mut tunnel = Tunnel::started(&lab).await;
            tunnel.signal(signal);
            assert_eq!(tunnel.exit().await, 0);
            said_goodbye(&lab).await;
        }
    }

    #[tokio::test]
    async fn a_manager_that_breaks_the_protocol_ends_the_tunnel_with_status_76() {
        let mut tunnel = Tunnel::greeted().await;
        tunnel.write(&[0xff; 8]).await;
        assert_eq!(tunnel.exit().await, 76);
    }

    /// Conforms: vpn:16.2.6
    #[tokio::test]
    async fn a_manager_that_does_not_read_costs_no_packet_and_little_memory() {
        let lab = lab().await;
        let (mut tunnel, link) = Tunnel::linked(&[]).await;
        tunnel.start(&lab).await;
        tunnel.pinged().await;
        let before = tunnel.peak_memory();
        let dropped =
            async || support::sum(&link.scrape(LIMIT).await.unwrap(), "warren_dropped_packets_total", &[]);
        let lost = dropped().await;
        // More answers than its pipe and its queue hold, and less than would be too much for it.
        for id in 2..400 {
            tunnel.send(id, Order::GetPeerUpdate(GetPeerUpdate {})).await;
        }

        for _ in 0..20 {
            let ping =
                link.ping_agent(lab.agents()[0].id, PingBy::Disco, Duration::from_secs(20)).await.unwrap();
            assert!(ping.is_ok(), "{ping:?}");
        }

        assert_eq!(dropped().await, lost);
        let grown = tunnel.peak_memory().saturating_sub(before);
        assert!(grown < 32 << 20, "{grown} bytes more");
        tunnel.send(400, Order::Stop(StopRequest {})).await;
        let last = tunnel.rest().await.pop().unwrap();
        assert_eq!(last.rpc, Some(Rpc::response(400)));
    }

    #[tokio::test]
    async fn requests_that_unpack_to_a_hundred_times_their_size_cost_little_memory() {
        let mut tunnel = Tunnel::greeted().await;
        tunnel.send(1, Order::Wake(WakeRequest {})).await;
        tunnel.frame().await;
        let before = tunnel.peak_memory();
        // Together they would be 250 MB.
        let heavy = StartRequest {
            headers: vec![start_request::Header::default(); 50_000],
            ..StartRequest::default()
        };
        for id in 2..102 {
            tunnel.send(id, Order::Start(heavy.clone())).await;
        }
        for id in 2..102 {
            assert!(!tunnel.start_response(id).await.success);
        }
        let grown = tunnel.peak_memory().saturating_sub(before);
        assert!(grown < 48 << 20, "{grown} bytes more");
    }

    #[tokio::test]
    async fn a_manager_that_does_not_read_keeps_no_tunnel_from_ending() {
        let lab = lab().await;
        let mut tunnel = Tunnel::started(&lab).await;
        for id in 2..2000 {
            let message = ManagerMessage {
                rpc: Some(Rpc::request(id)),
                msg: Some(Order::GetPeerUpdate(GetPeerUpdate {})),
            };
            let frame = frame::encode(&message).unwrap();
            let Some(stdin) = &mut tunnel.stdin else { break };
            if !timeout(Duration::from_secs(1), stdin.write_all(&frame)).await.is_ok_and(|sent| sent.is_ok())
            {
                break;
            }
        }
        tunnel.signal(Signal::TERM);
        // What it was sent meanwhile may have been too much for it.
        let status = tunnel.exit().await;
        assert!([0, 76].contains(&status), "{status}");
    }
}

mod private_link {
    use super::*;

    #[tokio::test]
    async fn the_service_hears_metrics_tree_and_status_and_pings_by_the_private_link() {
        let lab = lab().await;
        let (mut tunnel, link) = Tunnel::linked(&[]).await;
        assert_eq!(link.status(LIMIT).await.unwrap().control, "idle");
        tunnel.start(&lab).await;
        tunnel.pinged().await;

        let status = link.status(LIMIT).await.unwrap();
        assert_eq!(status.control, "up");
        assert!(!status.home_region.is_empty() && !status.absent.is_empty(), "{status:?}");
        let names: Vec<_> = link.tree(LIMIT).await.unwrap().into_iter().map(|node| node.name).collect();
        let parts =
            ["root", "session", "net", "packet_io", "registry", "relay", "pinger", "coordinator"].as_slice();
        assert_eq!(names, parts);
        let exposition = link.scrape(LIMIT).await.unwrap();
        assert!(exposition.contains("process=\"tunnel\""), "{exposition}");
        assert!(exposition.contains("warren_actor_mailbox_depth"), "{exposition}");
        assert!(!exposition.contains(lab.token()));
        let ping = link
            .ping_agent(lab.agents()[0].id, PingBy::Disco, Duration::from_secs(20))
            .await
            .unwrap()
            .unwrap();
        assert!(!ping.direct && ping.latency > Duration::ZERO);
    }

    /// Conforms: control:D11
    #[tokio::test]
    async fn pings_go_on_after_the_relay_the_control_plane_and_both_were_gone() {
        let lab = lab().await;
        let (mut tunnel, link) = Tunnel::linked(&[]).await;
        tunnel.start(&lab).await;
        tunnel.pinged().await;
        let (control, agent) = (lab.control(), lab.agents()[0].id);
        for (relay_goes, control_goes) in [(true, false), (false, true), (true, true)] {
            let dials = control.recording().connections.len();
            if relay_goes {
                lab.relay().kill_connections();
            }
            if control_goes {
                control.drop_connections();
                let is_back = |seen: &Recording| (seen.connections.len() > dials).then_some(());
                control.wait(LIMIT, is_back).await.expect("another connection");
            }
            let before = lab.agent_stats(agent).disco_pings;
            let answered = async {
                while !matches!(
                    link.ping_agent(agent, PingBy::Disco, Duration::from_secs(5)).await,
                    Ok(Ok(_))
                ) {}
            };
            timeout(LIMIT, answered).await.expect("an answer");
            assert!(lab.agent_stats(agent).disco_pings > before);
        }
    }

    #[tokio::test]
    async fn faults_are_forced_only_where_they_are_allowed() {
        let (_tunnel, link) = Tunnel::linked(&[]).await;
        link.fault("session", "panic", LIMIT).await.unwrap();
        let tree = link.tree(LIMIT).await.unwrap();
        assert!(tree.iter().all(|node| node.restarts == 0), "{tree:?}");
    }

    #[tokio::test]
    async fn a_session_that_crashes_is_restarted_and_one_that_goes_on_crashing_ends_with_status_70() {
        let lab = lab().await;
        let (mut tunnel, link) = Tunnel::linked(&["--allow-faults"]).await;
        tunnel.start(&lab).await;
        for crash in 1..=3 {
            link.fault("session", "panic", LIMIT).await.unwrap();
            restarted(&link, "session", crash).await;
        }
        tunnel.send(9, Order::GetPeerUpdate(GetPeerUpdate {})).await;
        while tunnel.frame().await.rpc != Some(Rpc::response(9)) {}

        link.fault("session", "panic", LIMIT).await.unwrap();

        assert_eq!(tunnel.exit().await, 70);
        said_goodbye(&lab).await;
    }

    #[tokio::test]
    async fn a_part_of_the_net_that_crashes_is_restarted_alone() {
        let lab = lab().await;
        let (mut tunnel, link) = Tunnel::linked(&["--allow-faults"]).await;
        tunnel.start(&lab).await;
        for part in ["packet_io", "registry", "relay", "pinger", "coordinator"] {
            link.fault(part, "panic", LIMIT).await.unwrap();
            restarted(&link, part, 1).await;
        }
        let tree = link.tree(LIMIT).await.unwrap();
        assert!(tree.iter().filter(|node| node.restarts > 0).count() == 5, "{tree:?}");
        let ping = link.ping_agent(lab.agents()[0].id, PingBy::Disco, Duration::from_secs(20)).await.unwrap();
        assert!(ping.is_ok(), "{ping:?}");
    }

    async fn restarted(link: &LinkClient, part: &str, times: u64) {
        let watching = async {
            let is_back = |tree: Vec<warren_proto::link::tree::Node>| {
                tree.iter().any(|node| node.name == part && node.restarts == times && node.state == "running")
            };
            while !is_back(link.tree(LIMIT).await.unwrap()) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LIMIT, watching).await.unwrap();
    }
}

/// Looks until `done`.
async fn eventually(mut done: impl FnMut() -> bool) {
    let looking = async {
        while !done() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, looking).await.unwrap();
}

/// Waits until the control plane has seen the tunnel leave of its own will.
async fn said_goodbye(lab: &Lab) {
    let left = lab.control().wait(LIMIT, |recording| recording.connections.first()?.ended.clone()).await;
    assert!(matches!(left, Some(Ended::Closed(..))), "{left:?}");
}
