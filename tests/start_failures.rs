//! What a person reads at `warren up` and the other verbs when it does not work, and that the next `up`
//! works. No privilege needed: the service runs without a device.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use support::{Deployment, ServiceProcess, eventually, is_alive, signal, stderr, within};
use warren_lab::{CallFault, Check, Endpoint, HttpFault, Method, Times};

/// Longest that a person waits for the words.
const PATIENCE: Duration = Duration::from_secs(60);

/// A service, and a deployment that it will be made to fail at.
fn arranged() -> (Deployment, ServiceProcess) {
    let (deployment, service) = (Deployment::start(1), ServiceProcess::start());
    let (url, token) = deployment.access();
    service.pretend_login(&url, &token);
    (deployment, service)
}

fn up_fails(service: &ServiceProcess, status: i32, words: &[&str]) {
    let begun = Instant::now();
    let output = service.warren(&["up"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
}

fn up_works(deployment: &Deployment, service: &ServiceProcess) {
    let (url, token) = deployment.access();
    deployment.control().heal();
    service.pretend_login(&url, &token);
    let before = service.pid();
    let output = service.warren(&["up", "--wait"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let status = service.status();
    assert_eq!(status["lifecycle"], "started", "{status}");
    assert!(status["agents"][0]["latency_seconds"].as_f64().is_some(), "{status}");
    assert!(service.pid() == before && is_alive(before));
    assert_eq!(support::sum(&service.metrics(), "warren_tunnel_restarts_total", &[]), 0.0);
}

#[test]
fn a_wrong_token_is_named_and_login_is_asked_for() {
    let (deployment, service) = arranged();
    let (url, _) = deployment.access();
    service.pretend_login(&url, "AAAAAAAAAA-BBBBBBBBBBBBBBBBBBBBBB");
    up_fails(&service, 5, &["401", "warren login"]);
    up_works(&deployment, &service);
}

#[test]
fn an_unreachable_server_is_named() {
    let (deployment, service) = arranged();
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    service.pretend_login(&format!("http://{nobody}"), &deployment.access().1);
    up_fails(&service, 1, &[&nobody, "refused"]);
    up_works(&deployment, &service);
}

#[test]
fn a_refused_upgrade_is_told_in_the_deployments_words() {
    let (deployment, service) = arranged();
    let control = deployment.control();
    control.fail_check(Check::Browser, Times::Always);
    up_fails(&service, 1, &["409", "Non-browser connections are disabled for your deployment"]);
    control.heal();
    control.fail_check(Check::Version, Times::Always);
    up_fails(&service, 1, &["400", "Unknown or unsupported API version"]);
    control.heal();
    let message = "Only on Tuesdays".to_owned();
    control.fail(Endpoint::Tailnet, HttpFault::Status(http_status(403), message), Times::Always);
    up_fails(&service, 1, &["403", "Only on Tuesdays"]);
    up_works(&deployment, &service);
}

#[test]
fn a_server_that_never_answers_is_given_up_and_named() {
    let (deployment, service) = arranged();
    deployment.control().fail(Endpoint::Tailnet, HttpFault::Silent, Times::Always);
    up_fails(&service, 1, &["did not answer"]);
    up_works(&deployment, &service);
}

#[test]
fn a_server_that_accepts_and_stays_silent_is_given_up_and_named() {
    let (deployment, service) = arranged();
    for method in [Method::Coordinate, Method::StreamDerpMaps, Method::WorkspaceUpdates] {
        deployment.control().fail_call(method, CallFault::Silent, Times::Always);
    }
    up_fails(&service, 1, &["accepted the connection, but sent no", "seconds"]);
    up_works(&deployment, &service);
}

#[test]
fn a_token_that_is_refused_while_the_tunnel_runs_is_told_in_the_status() {
    let (deployment, service) = arranged();
    up_works(&deployment, &service);
    deployment.control().set_token("CCCCCCCCCC-DDDDDDDDDDDDDDDDDDDDDD");
    deployment.control().drop_connections();
    let is_told = || support::sum(&service.metrics(), "warren_auth_valid", &[]) == 0.0;
    eventually("the metrics say that the token is refused", is_told);
    service.pretend_login(&deployment.access().0, "CCCCCCCCCC-DDDDDDDDDDDDDDDDDDDDDD");
    let again = service.warren(&["up", "--wait"]);
    assert!(again.status.success(), "{}", stderr(&again));
}

#[test]
fn without_a_login_up_says_so() {
    let service = ServiceProcess::start();
    let output = service.warren(&["up"]);
    assert_eq!(output.status.code(), Some(5));
    assert!(stderr(&output).contains("warren login"), "{}", stderr(&output));
}

#[test]
fn without_a_service_every_verb_says_how_to_start_it() {
    let folder = tempfile::tempdir().unwrap();
    for verb in [&["status"][..], &["down"], &["ping", "main.dev"], &["debug", "tree"]] {
        let mut command = Command::new(support::WARREN);
        let output = command.arg("--socket-dir").arg(folder.path()).args(verb).output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{verb:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("warren service"), "{}", stderr(&output));
    }
}

#[test]
fn login_checks_the_token_and_logout_forgets_it() {
    let (deployment, service) = (Deployment::start(1), ServiceProcess::start());
    let (url, token) = deployment.access();

    let wrong = login(&service, &url, "AAAAAAAAAA-BBBBBBBBBBBBBBBBBBBBBB");
    assert_eq!(wrong.status.code(), Some(5), "{}", stderr(&wrong));
    let right = login(&service, &url, &token);
    assert!(right.status.success(), "{}", stderr(&right));
    let up = service.warren(&["up"]);
    assert!(up.status.success(), "{}", stderr(&up));
    assert!(service.warren(&["down"]).status.success());
    assert_eq!(service.status()["lifecycle"], "stopped");
    assert!(service.warren(&["up"]).status.success(), "down keeps the token");
    assert!(service.warren(&["down"]).status.success());
    assert!(service.warren(&["logout"]).status.success());
    assert_eq!(service.warren(&["up"]).status.code(), Some(5));
}

fn login(service: &ServiceProcess, url: &str, token: &str) -> Output {
    let mut command = service.command(&["login", url]);
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("{token}\n").as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn an_agent_can_be_pinged_by_name_and_an_unknown_one_is_named() {
    let (deployment, service) = arranged();
    up_works(&deployment, &service);
    let ping = service.warren(&["ping", "main.lab-1", "--count", "2", "--json"]);
    assert!(ping.status.success(), "{}", stderr(&ping));
    assert_eq!(support::stdout(&ping).lines().count(), 2);
    let unknown = service.warren(&["ping", "nobody.nowhere"]);
    assert!(!unknown.status.success());
    assert!(stderr(&unknown).contains("nobody.nowhere"), "{}", stderr(&unknown));
}

#[test]
fn pings_go_on_until_they_are_interrupted_and_are_summed_up_then() {
    let (deployment, service) = arranged();
    up_works(&deployment, &service);
    let mut command = service.command(&["ping", "main.lab-1"]);
    let mut ping = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(ping.stdout.take().unwrap()).lines().map(Result::unwrap);
    for sequence in 1..=2 {
        let line = lines.next().unwrap();
        assert!(line.contains(&format!("seq={sequence} time=")) && line.contains("path=relay"), "{line}");
    }
    signal(ping.id(), "INT");
    let summary = lines.find(|line| line.contains(" sent, ")).unwrap();
    assert!(summary.contains(" 0 % lost, min/avg/max/dev = "), "{summary}");
    assert!(ping.wait().unwrap().success());
}

#[test]
fn a_wait_for_a_direct_path_that_does_not_come_fails_and_says_so() {
    let (deployment, service) = arranged();
    up_works(&deployment, &service);
    let ping = service.warren(&["ping", "main.lab-1", "--until-direct", "--count", "1"]);
    assert_eq!(ping.status.code(), Some(6));
    assert!(stderr(&ping).contains("no direct path to main.lab-1"), "{}", stderr(&ping));
}

#[test]
fn a_killed_service_takes_its_tunnel_with_it_and_a_new_one_resumes_what_was_wanted() {
    let (deployment, mut service) = arranged();
    up_works(&deployment, &service);
    let tunnel = service.tunnel_pid().unwrap();

    service.kill();

    within(Duration::from_secs(5), "the tunnel ends", || !is_alive(tunnel));
    service.start_again();
    eventually("the tunnel is up again", || service.status()["lifecycle"] == "started");
    let ping = service.warren(&["ping", "main.lab-1", "--count", "1"]);
    assert!(ping.status.success(), "{}", stderr(&ping));
}

#[test]
fn what_is_down_stays_down_after_a_service_is_killed() {
    let (deployment, mut service) = arranged();
    up_works(&deployment, &service);
    assert!(service.warren(&["down"]).status.success());

    service.kill();
    service.start_again();

    assert_eq!(service.status()["lifecycle"], "stopped");
    assert_eq!(service.tunnel_pid(), None);
}

fn http_status(code: u16) -> hyper::StatusCode {
    hyper::StatusCode::from_u16(code).unwrap()
}
