//! Peers of the desktop that we did not write: our tunnel under a foreign manager, our service over a foreign tunnel
//! and under a foreign client. What they do stands in `doubles/`, as the specification describes it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod doubles;
mod support;

use std::{fs, os::unix::fs::PermissionsExt, process::Command, thread, time::Duration};

use doubles::{ForeignTunnel, Greeting, Gui, Make, Manager};
use support::{
    Deployment, Namespace, ServiceProcess, can_isolate, eventually, has, is_alive, signal, stderr,
};
use warren_lab::{Endpoint, HttpFault, Times};
use warren_proto::vpn::{
    self, ManagerMessage, Rpc, manager_message::Msg as Order, status::Lifecycle, tunnel_message::Msg,
};

/// Where the client of the recorded bytes wants to go; the foreign tunnel goes nowhere.
const URL: &str = "https://coder.example.com";
const TOKEN: &str = "fakeToken";

/// Not a test: the foreign tunnel of the others, in a process of its own.
#[test]
#[ignore = "the foreign tunnel of other tests"]
fn the_foreign_tunnel() {
    doubles::play();
}

mod our_tunnel {
    use super::*;

    fn has_agent(message: &vpn::TunnelMessage) -> bool {
        matches!(&message.msg, Some(Msg::PeerUpdate(update)) if !update.upserted_agents.is_empty())
    }

    /// Conforms: vpn:16.2.2
    #[test]
    fn works_under_the_windows_and_the_linux_service_of_every_version_and_in_either_order_of_greeting() {
        let deployment = Deployment::start(1);
        let (url, token) = deployment.access();
        for (versions, greeting) in
            [("1.0", Greeting::Speaks), ("1.1", Greeting::Listens), ("1.3,2.1", Greeting::Listens)]
        {
            let mut manager = Manager::launch(Make::Service, versions, greeting);
            assert_eq!(manager.line, "codervpn tunnel 1.3");
            let started = manager.start(&url, &token);
            assert!(started.success, "{}", started.error_message);
            manager.wait_for(has_agent);
            let told = std::mem::take(&mut manager.peer().told);
            for heard in &told {
                let message = &heard.message.msg;
                assert!(
                    matches!(message, Some(Msg::PeerUpdate(_))),
                    "this manager expects nothing else: {message:?}"
                );
                assert_eq!(heard.ids, None, "{message:?}");
            }
            let said = manager.said();
            assert!(!said.is_empty() && said.iter().all(|line| line.starts_with("stderr: ")), "{said:#?}");

            let ended = manager.stop();

            assert!(ended.answer.success && ended.is_last);
            assert_eq!(ended.status.code(), Some(0), "before the manager would kill it");
        }
    }

    /// Conforms: vpn:16.2.2
    #[test]
    fn works_under_the_helper_of_macos_with_its_device_and_is_not_harmed_by_its_signal() {
        let deployment = Deployment::start(1);
        let (url, token) = deployment.access();
        let mut manager = Manager::launch(Make::Helper, "1.3", Greeting::Listens);
        let started = manager.start(&url, &token);
        assert!(started.success, "{}", started.error_message);
        manager.wait_for(has_agent);
        assert!(manager.settings > 0);
        let told = std::mem::take(&mut manager.peer().told);
        assert!(
            told.iter().any(|heard| matches!(heard.message.msg, Some(Msg::Log(_)))),
            "its log comes this way"
        );
        let wake = manager.ask(Order::Wake(vpn::WakeRequest {}));
        assert!(matches!(manager.answer_to(wake), Msg::Wake(_)));

        let ended = manager.stop();

        assert!(ended.answer.success && ended.is_last);
        assert_eq!(ended.status.code(), Some(0));
    }

    /// Conforms: vpn:15.34
    #[test]
    fn a_stop_does_not_wait_for_settings_that_the_manager_never_answers() {
        let deployment = Deployment::start(1);
        let (url, token) = deployment.access();
        let mut manager = Manager::launch(Make::Helper, "1.1", Greeting::Speaks);
        manager.answers_settings = false;
        let request = manager.start_request(&url, &token);
        manager.ask(Order::Start(request));
        manager.wait_for(|message| matches!(message.msg, Some(Msg::NetworkSettings(_))));
        let ended = manager.stop();
        assert!(ended.answer.success && ended.is_last);
        assert_eq!(ended.status.code(), Some(0));
    }

    #[test]
    fn the_flags_of_another_system_are_refused_by_name() {
        let output = Command::new(support::WARREN)
            .args(["vpn-daemon", "run", "--rpc-read-fd", "3", "--rpc-write-fd", "4"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("unknown flag: --rpc-read-fd"), "{}", stderr(&output));
    }

    /// Conforms: vpn:15.9
    #[test]
    fn what_it_does_not_know_has_no_answer_and_answers_that_nobody_waits_for_are_ignored() {
        let mut manager = Manager::launch(Make::Service, "1.3", Greeting::Speaks);
        let peer = manager.peer();
        let id = peer.next_id();
        peer.send(&ManagerMessage { rpc: Some(Rpc { msg_id: id, response_to: 0 }), msg: None });
        let settings = Order::NetworkSettings(vpn::NetworkSettingsResponse::default());
        peer.send(&ManagerMessage { rpc: Some(Rpc { msg_id: 0, response_to: 4711 }), msg: Some(settings) });
        peer.send(&ManagerMessage { rpc: Some(Rpc::default()), msg: Some(Order::Wake(vpn::WakeRequest {})) });
        peer.send(&ManagerMessage { rpc: None, msg: Some(Order::Wake(vpn::WakeRequest {})) });
        let id = manager.ask(Order::GetPeerUpdate(vpn::GetPeerUpdate {}));
        assert!(matches!(manager.answer_to(id), Msg::PeerUpdate(_)));
        assert!(manager.peer().told.is_empty(), "nothing before the answer");
        assert!(manager.peer().is_silent_for(Duration::from_millis(200)), "and nothing after it");
    }

    #[test]
    fn a_manager_that_reads_late_and_answers_in_any_order_gets_every_answer_whole() {
        let mut manager = Manager::launch(Make::Service, "1.3", Greeting::Listens);
        // In one write, as from a buffer that was full for a while; ids in no order.
        let ids: Vec<u64> = (1..=100).map(|number| number * 37 % 101).collect();
        let mut bytes = Vec::new();
        for &id in &ids {
            let id = u8::try_from(id).unwrap();
            bytes.extend([0, 0, 0, 6, 0x0a, 2, 0x08, id, 0x12, 0]);
        }
        assert!(manager.peer().write(&bytes));
        thread::sleep(Duration::from_secs(1));
        let mut answered: Vec<u64> =
            (0..100).map(|_| manager.peer().next().unwrap().ids.unwrap().1).collect();
        answered.sort_unstable();
        assert_eq!(answered, Vec::from_iter(1..=100));
    }

    #[test]
    fn a_manager_that_vanishes_during_a_start_or_in_a_frame_takes_the_process_with_it() {
        let deployment = Deployment::start(1);
        deployment.control().fail(Endpoint::Tailnet, HttpFault::Silent, Times::Always);
        let (url, token) = deployment.access();
        let mut manager = Manager::launch(Make::Helper, "1.3", Greeting::Speaks);
        let request = manager.start_request(&url, &token);
        manager.ask(Order::Start(request));
        manager.wait_for(|_| true);
        assert_eq!(manager.vanish().code(), Some(69));
        let mut manager = Manager::launch(Make::Service, "1.3", Greeting::Speaks);
        assert!(manager.peer().write(&[0, 0, 0, 9, 10]));
        assert!(matches!(manager.vanish().code(), Some(69 | 76)));
    }
}

mod our_service {
    use super::*;

    fn arranged(mode: &str) -> (ForeignTunnel, ServiceProcess) {
        let tunnel = ForeignTunnel::new(mode);
        let service = ServiceProcess::start_configured(&tunnel.config());
        service.pretend_login(URL, TOKEN);
        (tunnel, service)
    }

    fn up(service: &ServiceProcess) {
        let output = service.warren(&["up"]);
        assert!(output.status.success(), "{}\n{}", stderr(&output), service.log());
    }

    fn up_fails(service: &ServiceProcess, words: &[&str]) {
        let output = service.warren(&["up"]);
        let text = stderr(&output);
        assert!(!output.status.success(), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?} in: {text}");
    }

    fn error(service: &ServiceProcess) -> String {
        service.status()["error"].as_str().unwrap_or_default().to_owned()
    }

    /// Conforms: vpn:16.2.2 vpn:W24
    #[test]
    fn runs_a_foreign_tunnel_as_its_own_manager_would() {
        let (tunnel, service) = arranged("good");
        let mut gui = Gui::connect(&service.socket_dir().join("vpn.sock"), "1.1", Greeting::Speaks);
        assert!(gui.start(URL, TOKEN).success);
        let status = service.status();
        assert_eq!((&status["lifecycle"], &status["agents"][0]["name"]), (&"started".into(), &"main".into()));
        let record = tunnel.record();
        let begin = &record[0];
        assert_eq!(begin["arguments"], "vpn-daemon run");
        let variables = begin["variables"].as_array().unwrap();
        let is_expected = |name: &str| {
            ["CODER_VPN_DAEMON_RPC_READ_HANDLE", "CODER_VPN_DAEMON_RPC_WRITE_HANDLE", "PATH", "PWD"]
                .contains(&name)
                || name.to_uppercase().ends_with("_PROXY")
                || name.starts_with("SSL_CERT_")
        };
        // A shell adds some of its own; there is nothing of ours.
        let strange = variables.iter().filter(|name| !is_expected(name.as_str().unwrap()));
        assert!(
            strange.clone().all(|name| ["_", "OLDPWD", "SHLVL"].contains(&name.as_str().unwrap())),
            "{variables:?}"
        );
        let descriptors: Vec<_> =
            begin["descriptors"].as_array().unwrap().iter().filter_map(|it| it.as_i64()).collect();
        // The process looks at its descriptors through one more.
        assert!([0, 1, 2, 3, 4].iter().all(|number| descriptors.contains(number)), "{descriptors:?}");
        assert!(descriptors.len() <= 6, "no link and no device: {descriptors:?}");
        assert_eq!(record[1]["line"], "codervpn manager 1.3");
        let start = &record[2];
        assert_eq!(
            (&start["url"], &start["token"], &start["descriptor"]),
            (&URL.into(), &TOKEN.into(), &0.into())
        );
        assert_eq!((&start["device_os"], start["version"] != ""), (&"Linux".into(), true));
        let machine_id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let device_id = start["device_id"].as_str().unwrap();
        assert_eq!(device_id.is_empty(), machine_id.trim().len() != 32);
        assert!(machine_id.trim().is_empty() || !device_id.contains(machine_id.trim()));
        assert!(!fs::exists("/sys/class/net/warren0").unwrap());

        up(&service);
        assert_eq!(tunnel.pids().len(), 1, "the same again changes nothing");
        let down = service.warren(&["down"]);

        assert!(down.status.success(), "{}", stderr(&down));
        assert_eq!(tunnel.events(), ["begin", "greeted", "start", "stop"], "a stop, and only then a signal");
        assert!(!is_alive(tunnel.pids()[0]), "it never ends by itself");
        up(&service);
        let starts: Vec<_> = tunnel.record().into_iter().filter(|entry| entry["event"] == "start").collect();
        assert_eq!(starts[0]["device_id"], starts[1]["device_id"], "it is counted once");
    }

    #[test]
    fn a_start_that_failed_is_followed_by_a_fresh_process() {
        let (tunnel, service) = arranged("fails-once");
        up_fails(&service, &["get user: nope"]);
        assert_eq!(tunnel.events(), ["begin", "greeted", "start", "stop"]);
        up(&service);
        let pids = tunnel.pids();
        assert!(pids.len() == 2 && pids[0] != pids[1] && !is_alive(pids[0]));
    }

    #[test]
    fn a_tunnel_that_minds_no_stop_is_asked_before_it_is_killed() {
        let (tunnel, service) = arranged("deaf-to-stop");
        up(&service);
        assert!(service.warren(&["down"]).status.success());
        assert_eq!(tunnel.events(), ["begin", "greeted", "start", "stop", "eof"]);
        assert!(!is_alive(tunnel.pids()[0]));
    }

    /// Conforms: vpn:15.27
    #[test]
    fn what_a_tunnel_says_out_of_turn_is_borne_and_settings_that_are_not_made_are_not_said_to_be() {
        let (tunnel, service) = arranged("chatty");
        up(&service);
        eventually("the settings are answered", || tunnel.events().contains(&"settings".to_owned()));
        let record = tunnel.record();
        let settings = record.iter().find(|entry| entry["event"] == "settings").unwrap();
        assert_eq!(settings["success"], false);
        assert!(settings["error"].as_str().unwrap().contains("no device"), "{settings}");
        assert!(!tunnel.events().contains(&"eof".to_owned()));
        assert_eq!(service.status()["lifecycle"], "started");
    }

    /// Conforms: vpn:15.25 vpn:15.26 vpn:15.29
    #[test]
    fn a_tunnel_that_does_not_speak_as_expected_is_given_up_and_named() {
        let (tunnel, service) = arranged("closes-at-once");
        for (mode, words) in [
            ("closes-at-once", "EOF"),
            ("closes-at-start", "did not start"),
            ("half-a-frame", "did not start"),
            ("too-large", "did not start"),
            ("mute", "within"),
        ] {
            tunnel.change_mode(mode);
            up_fails(&service, &[words]);
            assert!(error(&service).contains(words), "{mode}: {}", service.status());
            assert_eq!(service.status()["lifecycle"], "stopped");
            assert!(!is_alive(*tunnel.pids().last().unwrap()), "{mode}");
        }
        tunnel.change_mode("good");
        up(&service);
    }

    /// Conforms: vpn:15.19 vpn:15.29
    #[test]
    fn the_death_of_a_tunnel_is_told_with_its_reason_and_made_good() {
        let (tunnel, service) = arranged("good");
        let mut gui = Gui::connect(&service.socket_dir().join("vpn.sock"), "1.1", Greeting::Speaks);
        assert!(gui.start(URL, TOKEN).success);
        tunnel.change_mode("silent");
        signal(tunnel.pids()[0], "KILL");
        let told = gui
            .wait_for(|status| status.lifecycle() != Lifecycle::Started && !status.error_message.is_empty());
        assert!(told.error_message.contains("signal 9"), "{}", told.error_message);
        assert!(told.peer_update.unwrap().upserted_agents.is_empty(), "nobody is connected any more");
        assert!(gui.stop().success);
        assert_eq!(gui.status().error_message, "");
        tunnel.change_mode("good");
        assert!(gui.start(URL, TOKEN).success);
    }

    /// Conforms: vpn:15.28
    #[test]
    fn an_update_that_does_not_fit_has_the_tunnel_asked_for_everything() {
        let (tunnel, service) = arranged("gap");
        up(&service);
        eventually("the table is the tunnel's", || {
            let status = service.status();
            let names = |list: &str| status[list].as_array().map_or(0, Vec::len);
            (names("workspaces"), names("agents")) == (2, 2)
        });
        let asked = tunnel.events().into_iter().filter(|event| event == "get-peer-update");
        assert_eq!(asked.count(), 1);
    }

    /// Conforms: vpn:15.21
    #[test]
    fn updates_are_taken_and_told_in_their_order() {
        let (_tunnel, service) = arranged("in-order");
        let mut gui = Gui::connect(&service.socket_dir().join("vpn.sock"), "1.1", Greeting::Listens);
        assert!(gui.start(URL, TOKEN).success);
        let name = |status: &vpn::Status| {
            status.peer_update.as_ref()?.upserted_agents.first().map(|it| it.name.clone())
        };
        gui.wait_for(|status| name(status).as_deref() == Some("name-499"));
        let told = gui.peer().told.iter().filter_map(|heard| match &heard.message.msg {
            Some(vpn::service_message::Msg::Status(status)) => {
                name(status)?.strip_prefix("name-")?.parse::<u32>().ok()
            }
            _ => None,
        });
        assert!(told.is_sorted(), "an older name after a newer one");
    }

    /// Deployed managers download what they run, and stay with what they have once it is refused. Nothing is
    /// downloaded here, so that an address serves nobody for an attack; what is refused is looked at again.
    ///
    /// Conforms: vpn:W22 vpn:W23 vpn:15.23 vpn:15.24
    #[test]
    fn a_program_that_is_not_in_order_is_never_run_and_once_it_is_the_next_up_works() {
        let (tunnel, service) = arranged("good");
        let path = tunnel.path();
        let with_mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        // The first thing that is wrong is the one that is told.
        for (mode, words) in [(0o666, "chmod go-w"), (0o644, "chmod 0755")] {
            with_mode(mode);
            up_fails(&service, &[path.to_str().unwrap(), words]);
            assert!(error(&service).contains(words));
        }
        let aside = path.with_extension("aside");
        fs::rename(&path, &aside).unwrap();
        up_fails(&service, &["No such file", "tunnel.binary"]);
        assert!(!path.exists(), "nothing is put in its place");
        assert!(tunnel.events().is_empty());
        fs::rename(&aside, &path).unwrap();
        with_mode(0o755);
        up(&service);
    }

    /// Conforms: vpn:W21 vpn:W22
    #[test]
    fn a_program_of_another_version_than_configured_is_never_run() {
        let tunnel = ForeignTunnel::new("good");
        for (version, is_right) in [("2.31.2", false), ("2.31.1", true)] {
            let config = format!("{}version = \"{version}\"\n", tunnel.config());
            let service = ServiceProcess::start_configured(&config);
            service.pretend_login(URL, TOKEN);
            if is_right {
                up(&service);
            } else {
                up_fails(&service, &["v2.31.1+foreign", "2.31.2", "tunnel.version"]);
                assert!(tunnel.events().is_empty());
            }
        }
    }

    #[test]
    fn what_a_foreign_tunnel_leaves_on_the_host_is_named_in_the_status() {
        const NAME: &str = "what_a_foreign_tunnel_leaves_on_the_host_is_named_in_the_status";
        if !can_isolate(NAME) || !has("ip", NAME) {
            return;
        }
        let (namespace, tunnel) = (Namespace::new(), ForeignTunnel::new("leaves"));
        let service = ServiceProcess::start_configured_in(&namespace, &tunnel.config());
        service.pretend_login(URL, TOKEN);
        up(&service);
        assert!(error(&service).is_empty(), "as long as it runs it is its own");
        assert!(!namespace.has_device("warren0"));
        assert!(service.warren(&["down"]).status.success());
        let (text, ip) = (error(&service), tunnel.record());
        for word in [
            "the interface coder0",
            "ip link delete coder0",
            "IPv4 policy rule 5270",
            "IPv6 policy rule 5210",
        ] {
            assert!(text.contains(word), "{word} is missing in: {text}; {ip:#?}");
        }
        for line in ["link delete coder0", "rule del priority 5270", "-6 rule del priority 5210"] {
            assert!(namespace.enter("ip").args(line.split(' ')).status().unwrap().success());
        }
        assert!(service.warren(&["down"]).status.success());
        assert_eq!(error(&service), "", "it looks again");
    }
}

mod under_a_foreign_client {
    use super::*;

    /// A start as recorded: URL and token, and nothing else.
    const START: &str =
        "0000002c0a0208021226121968747470733a2f2f636f6465722e6578616d706c652e636f6d1a0966616b65546f6b656e";
    const STATUS: &str = "000000060a0208012200";
    const EMPTY: &str = "000000040a020805";
    const STOP: &str = "000000060a0208041a00";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<_> = hex.chars().map(|digit| digit.to_digit(16).unwrap() as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    fn arranged() -> (ForeignTunnel, ServiceProcess, std::path::PathBuf) {
        let tunnel = ForeignTunnel::new("good");
        let service = ServiceProcess::start_configured(&tunnel.config());
        let socket = service.socket_dir().join("vpn.sock");
        (tunnel, service, socket)
    }

    /// Conforms: vpn:16.2.2
    #[test]
    fn a_desktop_of_1_0_and_of_1_1_is_told_the_whole_story_of_a_start_and_a_stop() {
        let (_tunnel, _service, socket) = arranged();
        for (versions, greeting) in [("1.0", Greeting::Speaks), ("1.1", Greeting::Listens)] {
            let mut gui = Gui::connect(&socket, versions, greeting);
            assert_eq!(gui.line, "codervpn service 1.3");
            assert!(gui.peer().is_silent_for(Duration::from_millis(100)), "nothing until it asks");
            assert!(gui.peer().write(&bytes(STATUS)));
            let status = gui.peer().answer_to(1).msg;
            assert!(
                matches!(status, Some(vpn::service_message::Msg::Status(status)) if status.lifecycle() == Lifecycle::Stopped)
            );
            assert!(gui.peer().write(&bytes(START)));
            let started = gui.started(2);
            assert!(started.success, "{}", started.error_message);
            let status = gui.status_by(6);
            assert_eq!(status.lifecycle(), Lifecycle::Started);
            assert_eq!(status.peer_update.unwrap().upserted_agents.len(), 1);
            gui.wait_for(|status| status.lifecycle() == Lifecycle::Started);
            // Deployed clients ignore stages outside of STARTING; one that reads late is told less, in order.
            let mut whole = ["Initializing", "STARTING", "Finalizing", "STARTING", "STARTED"].iter();
            let story = gui.story();
            assert!(story.iter().all(|step| whole.any(|it| it == step)), "{story:?}");
            assert!(story.iter().any(|step| step == "STARTING"), "{story:?}");
            assert!(gui.peer().write(&bytes(EMPTY)));
            assert!(gui.peer().write(&bytes(STOP)));
            gui.peer().answer_to(4);
            gui.wait_for(|status| status.lifecycle() == Lifecycle::Stopped);
        }
    }

    #[test]
    fn a_client_that_leaves_during_its_start_does_not_end_it_and_others_are_told() {
        let (tunnel, _service, socket) = arranged();
        let mut other = Gui::connect(&socket, "1.1", Greeting::Speaks);
        let mut gui = Gui::connect(&socket, "1.1", Greeting::Speaks);
        assert!(gui.peer().write(&bytes(START)));
        drop(gui);
        other.wait_for(|status| status.lifecycle() == Lifecycle::Started);
        assert!(is_alive(tunnel.pids()[0]));
    }

    /// Conforms: vpn:15.20
    #[test]
    fn a_client_that_does_not_read_gets_whole_frames_later_and_delays_nobody() {
        let tunnel = ForeignTunnel::new("in-order");
        let service = ServiceProcess::start_configured(&tunnel.config());
        let socket = service.socket_dir().join("vpn.sock");
        let mut slow = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        use std::io::{Read, Write};
        slow.write_all(b"codervpn client 1.1\n").unwrap();
        let mut gui = Gui::connect(&socket, "1.1", Greeting::Speaks);
        assert!(gui.start(URL, TOKEN).success);
        let has_last = |status: &vpn::Status| {
            status
                .peer_update
                .as_ref()
                .is_some_and(|it| it.upserted_agents.iter().any(|agent| agent.name == "name-499"))
        };
        gui.wait_for(has_last);
        slow.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let mut heard = Vec::new();
        // Up to the end of what is there.
        let _ = slow.read_to_end(&mut heard);
        let mut rest = heard.strip_prefix(b"codervpn service 1.3\n").unwrap();
        while let Some((prefix, after)) = rest.split_first_chunk::<4>() {
            let (frame, after) = after.split_at(u32::from_be_bytes(*prefix) as usize);
            assert!(doubles::is_sound(frame), "a frame that was cut");
            rest = after;
        }
        assert!(rest.is_empty());
    }
}

mod concurrent_steps {
    use super::*;

    /// What a start, and a login, asks for at the same time is given up with the first failure, and that is told.
    ///
    /// Conforms: vpn:W19
    #[test]
    fn the_first_failure_ends_the_other_questions_and_is_the_one_that_is_told() {
        let (deployment, service) = (Deployment::start(1), ServiceProcess::start());
        let (url, token) = deployment.access();
        let login = |token: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), token).unwrap();
            service.warren(&["login", &url, "--token-file", file.path().to_str().unwrap()])
        };
        let none = login(&token);
        assert!(none.status.success(), "{}", stderr(&none));
        // The one question fails, the other is never answered: nobody waits for it.
        deployment.control().fail(Endpoint::BuildInfo, HttpFault::Silent, Times::Always);
        let begun = std::time::Instant::now();
        let refused = login("AAAAAAAAAA-BBBBBBBBBBBBBBBBBBBBBB");
        assert_eq!(refused.status.code(), Some(5), "{}", stderr(&refused));
        assert!(begun.elapsed() < Duration::from_secs(8), "the other question takes 10 s");
        deployment.control().heal();
        deployment.control().fail(Endpoint::UsersMe, HttpFault::Silent, Times::Always);
        deployment.control().fail(
            Endpoint::BuildInfo,
            HttpFault::Status(status(503), "closed".into()),
            Times::Always,
        );
        let refused = login(&token);
        assert!(
            stderr(&refused).contains("503") && stderr(&refused).contains("buildinfo"),
            "{}",
            stderr(&refused)
        );
        // Both fail: one of them is told, once.
        deployment.control().heal();
        deployment.control().fail(
            Endpoint::BuildInfo,
            HttpFault::Status(status(503), "closed".into()),
            Times::Always,
        );
        let refused = login("AAAAAAAAAA-BBBBBBBBBBBBBBBBBBBBBB");
        assert!(!refused.status.success());
        assert_eq!(stderr(&refused).matches("GET http").count(), 1, "{}", stderr(&refused));
    }

    fn status(code: u16) -> hyper::StatusCode {
        hyper::StatusCode::from_u16(code).unwrap()
    }

    /// Conforms: vpn:W18
    #[test]
    fn a_deployment_that_is_too_old_is_told_at_login_and_at_up() {
        let service = ServiceProcess::start();
        let old = OldDeployment::start();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), TOKEN).unwrap();
        let login = service.warren(&["login", &old.url, "--token-file", file.path().to_str().unwrap()]);
        service.pretend_login(&old.url, TOKEN);
        let up = service.warren(&["up"]);
        for output in [login, up] {
            assert_eq!(output.status.code(), Some(1));
            let text = stderr(&output);
            assert!(text.contains("v2.19.0") && text.contains("2.20.0 or newer"), "{text}");
        }
    }

    /// A deployment that answers everything, with an old version.
    struct OldDeployment {
        url: String,
    }

    impl OldDeployment {
        fn start() -> Self {
            use std::io::{Read, Write};
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let body =
                r#"{"id":"fe63f96c-0f1a-427a-ac22-9876664914f7","username":"alice","version":"v2.19.0+abc"}"#;
            let answer = format!(
                "HTTP/1.1 200 OK\r\nX-Coder-Build-Version: v2.19.0+abc\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            thread::spawn(move || {
                for mut stream in listener.incoming().map_while(Result::ok) {
                    let mut request = [0; 4096];
                    let _ = stream.read(&mut request);
                    let _ = stream.write_all(answer.as_bytes());
                }
            });
            Self { url }
        }
    }
}
