//! A lab, a service and a deployment as processes, driven as a person or a script would drive them.
#![allow(dead_code, reason = "each test target uses its own part of it")]

mod deployment;
pub(crate) mod host;
mod lab;
mod service;
pub(crate) mod tunnel;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

#[allow(unused_imports, reason = "each test target uses its own part of it")]
pub(crate) use self::{
    deployment::Deployment,
    lab::{Event, LabProcess, Namespace},
    service::ServiceProcess,
};

/// The program under test.
pub(crate) const WARREN: &str = env!("CARGO_BIN_EXE_warren");

/// Generous: a loaded machine is no failure.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Says in the test's own output, past the harness's capture, that something was not tested and why.
pub(crate) fn skipped(what: &str, why: &str) {
    say(&format!("\nSKIPPED {what}: {why}"));
}

/// Says a measured figure in the test's own output, past the harness's capture.
pub(crate) fn figure(text: &str) {
    say(&format!("\nFIGURE {text}"));
}

/// Says a line in the test's own output, past the harness's capture.
pub(crate) fn say(line: &str) {
    // The harness captures the macros, not the stream itself.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Whether this kernel lets us make a user and network namespace with a device in it; says so loudly
/// where it does not.
pub(crate) fn can_isolate(what: &str) -> bool {
    let namespace = Command::new("unshare").args(["--user", "--map-root-user", "--net", "true"]).output();
    match namespace {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            skipped(
                what,
                &format!("no user namespace: {why}; allow them (sudo sysctl user.max_user_namespaces=10000)"),
            );
            return false;
        }
        Err(error) => {
            skipped(what, &format!("unshare (util-linux) is missing: {error}"));
            return false;
        }
    }
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => true,
        Err(error) => {
            skipped(what, &format!("/dev/net/tun cannot be opened ({error}): sudo chmod 0666 /dev/net/tun"));
            false
        }
    }
}

/// Whether a program is installed; says so loudly where it is not.
pub(crate) fn has(program: &str, what: &str) -> bool {
    let found = Command::new(program).arg("-V").output().is_ok();
    if !found {
        skipped(what, &format!("{program} is missing"));
    }
    found
}

/// Sends a signal by name.
pub(crate) fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status();
    assert!(status.is_ok_and(|status| status.success()), "kill -{name} {pid}");
}

/// Whether a process exists and is not a zombie.
pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// The most memory that a process ever had, in bytes; `None` once it is gone.
pub(crate) fn peak_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(peak.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

/// Polls until `done`, or fails at the limit.
pub(crate) fn eventually(what: &str, done: impl FnMut() -> bool) {
    within(LIMIT, what, done);
}

/// Polls until `done`, or fails at `limit`. Returns how long it took.
pub(crate) fn within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < limit, "in vain for {limit:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
    begun.elapsed()
}

/// The whole answer to a plain HTTP GET; `None` if nobody answers.
pub(crate) fn get(url: &str) -> Option<String> {
    let rest = url.strip_prefix("http://")?;
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let stream = std::net::TcpStream::connect(host).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    ask(stream, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
}

/// The whole answer to a plain HTTP GET on a Unix socket; `None` if nobody answers.
pub(crate) fn unix_get(socket: &Path, path: &str) -> Option<String> {
    let stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    ask(stream, &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
}

/// The whole answer to a POST of JSON on a Unix socket; `None` if nobody answers.
pub(crate) fn unix_post(socket: &Path, path: &str, body: &str) -> Option<String> {
    let stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    ask(stream, &request)
}

fn ask(mut stream: impl Read + Write, request: &str) -> Option<String> {
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// The body of an HTTP answer.
pub(crate) fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

/// The sum of all samples of a family whose labels contain every one of `labels`, as `name="value"`.
pub(crate) fn sum(exposition: &str, family: &str, labels: &[&str]) -> f64 {
    let samples = exposition.lines().filter(|line| {
        let is_family = line.strip_prefix(family).is_some_and(|rest| rest.starts_with(['{', ' ']));
        is_family && labels.iter().all(|label| line.contains(label))
    });
    samples.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// Standard error as text.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output as text.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// One process of the trees that `warren debug tree --json` shows.
pub(crate) fn process<'a>(tree: &'a serde_json::Value, name: &str) -> Option<&'a serde_json::Value> {
    tree["processes"].as_array()?.iter().find(|process| process["process"] == name)
}
