//! What stands in front of some deployments, as the configuration of the service meets it: gateways that want
//! more headers or a client certificate. No privilege needed: the service runs without a device.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::process::{Command, Stdio};

use support::{Deployment, ServiceProcess, WARREN, stderr};

#[test]
fn each_start_runs_the_header_command_and_every_request_to_the_deployment_carries_what_it_prints() {
    let deployment = Deployment::start(1);
    let folder = tempfile::tempdir().unwrap();
    let count = folder.path().join("count");
    let script = format!("echo run >> {0}; echo X-Gate=sesame-$(wc -l < {0})", count.display());
    let service = ServiceProcess::start_with(&format!("header_command = [\"sh\", \"-c\", {script:?}]\n"));
    let (url, token) = deployment.access();
    service.pretend_login(&url, &token);
    for run in ["1", "2"] {
        let before = deployment.control().recording().requests.len();
        let up = service.warren(&["up"]);
        assert!(up.status.success(), "{}", stderr(&up));
        let requests = deployment.control().recording().requests.split_off(before);
        let gate = format!("sesame-{run}");
        assert!(requests.len() >= 3, "{requests:?}");
        for request in requests {
            assert_eq!(request.header("x-gate").collect::<Vec<_>>(), [gate.as_str()], "{}", request.path);
        }
        assert!(service.warren(&["down"]).status.success());
    }
    assert!(!service.log().contains("sesame"));
    assert!(!std::fs::read_to_string(service.state_dir().join("intent.json")).unwrap().contains("sesame"));
}

#[test]
fn a_header_command_that_fails_fails_the_start_with_its_name_and_without_what_it_printed() {
    let deployment = Deployment::start(0);
    let service =
        ServiceProcess::start_with("header_command = [\"sh\", \"-c\", \"echo X=sesame; exit 9\"]\n");
    let (url, token) = deployment.access();
    service.pretend_login(&url, &token);
    let text = stderr(&service.warren(&["up"]));
    assert!(text.contains("the header command sh: it failed (exit status: 9)"), "{text}");
    assert!(!text.contains("sesame") && !service.log().contains("sesame"), "{text}");
    assert!(deployment.control().recording().requests.is_empty(), "nothing was asked without the headers");
}

#[test]
fn a_client_certificate_of_no_use_ends_the_service_at_its_start_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let (config, nothing) = (folder.path().join("config.toml"), folder.path().join("nothing.pem"));
    std::fs::write(&nothing, "sesame").unwrap();
    let text = format!("client_cert_file = {nothing:?}\nclient_key_file = {nothing:?}\n");
    std::fs::write(&config, text).unwrap();
    let output = Command::new(WARREN)
        .args(["service", "--no-tun", "--config"])
        .arg(&config)
        .arg("--runtime-dir")
        .arg(folder.path().join("run"))
        .arg("--state-dir")
        .arg(folder.path().join("state"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains(&nothing.display().to_string()) && text.contains("no private key"), "{text}");
    assert!(!text.contains("sesame"), "{text}");
}
