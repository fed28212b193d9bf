//! Nothing that must stay secret is shown, whatever is asked and however loudly it logs.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::{fs, os::unix::fs::MetadataExt, time::Duration};

use support::{Deployment, ServiceProcess, stderr, stdout};
use tokio::net::UnixStream;
use warren_actors::speaker::Speaker;
use warren_proto::{
    header::Role,
    vpn::{self, client_message, service_message, start_request::Header},
};

const LIMIT: Duration = Duration::from_secs(60);
const HEADER: &str = "X-Gate";
const HEADER_CANARY: &str = "canary-in-a-header-5e7d";
const WRONG_CANARY: &str = "CANARYFALS-CanaryThatIsRefused5e7";

/// Starts as a desktop client does, which may send headers.
fn start(deployment: &Deployment, service: &ServiceProcess, token: &str) -> vpn::StartResponse {
    let start = vpn::StartRequest {
        coder_url: deployment.access().0,
        api_token: token.to_owned(),
        headers: vec![Header { name: HEADER.to_owned(), value: HEADER_CANARY.to_owned() }],
        ..Default::default()
    };
    let socket = service.socket_dir().join("vpn.sock");
    deployment.runtime.block_on(async {
        let (read, write) = UnixStream::connect(socket).await.unwrap().into_split();
        let connecting = Speaker::<vpn::ClientMessage, vpn::ServiceMessage>::connect(
            read,
            write,
            Role::Client,
            Role::Service,
            LIMIT,
        );
        let (speaker, mut inbox) = connecting.await.unwrap();
        tokio::spawn(async move { while inbox.recv().await.is_some() {} });
        let request = vpn::ClientMessage { rpc: None, msg: Some(client_message::Msg::Start(start)) };
        match speaker.request(request, LIMIT).await.unwrap().msg {
            Some(service_message::Msg::Start(answer)) => answer,
            other => panic!("{other:?}"),
        }
    })
}

/// Conforms: vpn:16.2.5
/// Conforms: vpn:15.22
#[test]
fn canaries_in_token_and_headers_are_shown_nowhere() {
    let (deployment, service) = (Deployment::start(1), ServiceProcess::start());
    let (url, token) = deployment.access();
    let mut shown = Vec::new();

    let refused = start(&deployment, &service, WRONG_CANARY);
    assert!(!refused.success);
    shown.push(("the error of a refused start", refused.error_message));
    let started = start(&deployment, &service, &token);
    assert!(started.success, "{}", started.error_message);
    let control = deployment.control();
    let gates = control.read(|seen| {
        seen.requests.iter().filter(|it| it.header("x-gate").any(|it| it == HEADER_CANARY)).count()
    });
    assert!(gates > 0, "the header must reach the deployment");
    // The next connection shows the resume token.
    control.drop_connections();
    let resume = deployment.runtime.block_on(control.wait(LIMIT, |seen| {
        seen.requests.iter().find_map(|request| request.parameter("resume_token").map(str::to_owned))
    }));
    let resume = resume.unwrap();
    service.pretend_login(&url, &token);
    let up = service.warren(&["up", "--wait"]);
    assert!(up.status.success(), "{}", stderr(&up));

    shown.push(("up", stderr(&up)));
    for verb in [
        &["status"][..],
        &["status", "--json"],
        &["debug", "tree"],
        &["debug", "tree", "--json"],
        &["debug", "logs"],
        &["ping", "main.lab-1", "--count", "1", "--json"],
        &["down"],
        &["logout"],
    ] {
        let output = service.warren(verb);
        shown.push((verb[0], stdout(&output) + &stderr(&output)));
    }
    for path in ["/metrics", "/v1/status", "/v1/tree", "/v1/logs", "/", "/healthz", "/readyz"] {
        shown.push((path, service.api(path)));
    }
    let log = service.log();
    assert!(log.contains("DEBUG"), "the log must be as loud as it can be");
    shown.push(("the log", log));
    let secrets = [
        ("the token", token.as_str()),
        ("the header", HEADER_CANARY),
        ("the refused token", WRONG_CANARY),
        ("the resume token", &resume),
    ];
    for (place, text) in &shown {
        for (what, secret) in &secrets {
            let line = text.lines().find(|line| line.contains(secret));
            assert!(line.is_none(), "{what} is shown in {place}: {}", line.unwrap_or_default());
        }
    }
}

#[test]
fn the_token_is_kept_in_private_files_and_logout_erases_the_services_copy() {
    let (deployment, service) = (Deployment::start(1), ServiceProcess::start());
    let (url, token) = deployment.access();
    service.pretend_login(&url, &token);
    assert!(service.warren(&["up"]).status.success());

    let holders = || {
        files(&service.state_dir())
            .into_iter()
            .filter(|path| fs::read_to_string(path).unwrap_or_default().contains(&token))
    };
    let kept: Vec<_> = holders().collect();
    assert!(!kept.is_empty());
    for path in kept {
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600, "{}", path.display());
    }
    assert!(service.warren(&["down"]).status.success());
    assert!(service.warren(&["logout"]).status.success());
    assert_eq!(holders().count(), 0);
}

#[test]
fn neither_process_can_be_dumped() {
    let (deployment, service) = (Deployment::start(1), ServiceProcess::start());
    let (url, token) = deployment.access();
    service.pretend_login(&url, &token);
    assert!(service.warren(&["up"]).status.success());

    for pid in [service.pid(), service.tunnel_pid().unwrap()] {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap().to_owned();
        assert!(core.split_whitespace().skip(4).take(2).all(|limit| limit == "0"), "{core}");
        // What belongs to a process that is not dumpable belongs to root.
        assert_eq!(fs::metadata(format!("/proc/{pid}/maps")).unwrap().uid(), 0);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.lines().any(|line| line == "NoNewPrivs:\t1"), "{status}");
    }
    let status = fs::read_to_string(format!("/proc/{}/status", service.tunnel_pid().unwrap())).unwrap();
    let capabilities = status.lines().filter(|line| line.starts_with("CapEff") || line.starts_with("CapPrm"));
    assert!(
        capabilities.clone().count() == 2
            && capabilities.clone().all(|line| line.ends_with("\t0000000000000000")),
        "{status}"
    );
}

fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}
