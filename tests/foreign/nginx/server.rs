//! nginx as a process of its own group, with everything it writes in a folder that ends with it.
//!
//! Beside what it stands for it answers on a Unix socket with the number of its configuration: only by that is
//! it known when a reload has come into force.
#![allow(dead_code, reason = "each test target uses its own part of it")]

use std::{
    net::{IpAddr, Ipv4Addr, TcpListener},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, geteuid, kill_process_group};
use tempfile::TempDir;
use warren_proto::key;

use super::authority::Pair;
use crate::support::{LIMIT, body, eventually, signal, skipped, unix_get};

/// Where it may be: not every user's path has the place that Debian puts it.
const PLACES: [&str; 2] = ["nginx", "/usr/sbin/nginx"];
/// Ports below those that systems give to clients and to listeners that do not care.
const PORTS: std::ops::Range<u16> = 12_000..32_000;
/// How often another port is tried.
const ATTEMPTS: usize = 20;
/// How long its workers may take to end once told to.
const GRACE: Duration = Duration::from_secs(5);

/// Every request is marked, so that whoever gets it knows that it came this way.
const MARK: &str = "X-Through";

fn program() -> Option<&'static str> {
    PLACES.into_iter().find(|place| Command::new(place).arg("-v").stderr(Stdio::null()).status().is_ok())
}

/// Whether nginx is installed; says so loudly where it is not.
pub(crate) fn has_nginx(what: &str) -> bool {
    let found = program().is_some();
    if !found {
        skipped(what, "nginx is missing (Debian: nginx-light)");
    }
    found
}

/// What stands in front of a deployment.
#[derive(Clone, Debug)]
pub(crate) struct Front {
    /// Where requests go: host and port.
    upstream: String,
    /// The variable with the upgrade that is passed on.
    passed: &'static str,
    is_encrypted: bool,
    listen: IpAddr,
    directives: String,
}

impl Front {
    /// One that passes everything on.
    pub(crate) fn of(upstream: &str) -> Self {
        let (upstream, listen) = (upstream.to_owned(), Ipv4Addr::LOCALHOST.into());
        Self { upstream, passed: "$http_upgrade", is_encrypted: false, listen, directives: String::new() }
    }

    /// The same, but for requests that go elsewhere.
    pub(crate) fn to(self, upstream: &str) -> Self {
        Self { upstream: upstream.to_owned(), ..self }
    }

    /// The same at another address of this machine.
    pub(crate) fn at(self, listen: IpAddr) -> Self {
        Self { listen, ..self }
    }

    /// The same, but for upgrades that are not to WebSockets: their requests go on without.
    pub(crate) fn stripping(self) -> Self {
        Self { passed: "$websocket", ..self }
    }

    /// The same with a directive more.
    pub(crate) fn with(mut self, directive: &str) -> Self {
        self.directives.push_str(directive);
        self.directives.push('\n');
        self
    }

    /// The same behind TLS with a certificate.
    pub(crate) fn encrypted(mut self, pair: &Pair) -> Self {
        self.is_encrypted = true;
        let Pair { certificate, key } = pair;
        self.with(&format!("ssl_certificate {certificate:?}; ssl_certificate_key {key:?};"))
    }

    /// The scheme of its URL.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.is_encrypted { "https" } else { "http" }
    }

    fn text(&self, port: u16, marker: &Path, generation: usize) -> String {
        let Self { upstream, passed, listen, directives, .. } = self;
        let user = if geteuid().is_root() { "user root;" } else { "" };
        let tls = if self.is_encrypted { " ssl" } else { "" };
        let marker = marker.display();
        format!(
            r#"{user}
worker_processes 1;
worker_shutdown_timeout 1s;
pid nginx.pid;
error_log error.log notice;
events {{ worker_connections 256; }}
http {{
    log_format seen '$status "$http_upgrade" $uri';
    access_log access.log seen;
    default_type text/plain;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    map $http_upgrade $websocket {{ default ''; ~*^websocket$ websocket; }}
    map {passed} $passed_connection {{ default upgrade; '' close; }}
    server {{
        listen unix:{marker};
        access_log off;
        location / {{ return 200 "generation {generation}"; }}
    }}
    server {{
        listen {listen}:{port}{tls};
        {directives}
        location / {{
            proxy_pass http://{upstream};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade {passed};
            proxy_set_header Connection $passed_connection;
            proxy_set_header {MARK} nginx;
        }}
    }}
}}
"#
        )
    }
}

/// One request that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// What was answered.
    pub(crate) status: u16,
    /// The upgrade that was asked for; `-` for none.
    pub(crate) upgrade: String,
    /// Where.
    pub(crate) path: String,
}

/// Whether a request came through here.
pub(crate) fn came_through(request: &warren_lab::Request) -> bool {
    request.header(&MARK.to_ascii_lowercase()).eq(["nginx"])
}

/// A running nginx.
pub(crate) struct Nginx {
    child: Child,
    folder: TempDir,
    port: u16,
    generation: usize,
}

impl Nginx {
    /// Starts one and waits until it serves.
    pub(crate) fn start(front: &Front) -> Self {
        // Told apart from any other nginx of the machine by the folder's name.
        let folder = tempfile::Builder::new().prefix("warren-nginx-").tempdir().unwrap();
        let mut errors = String::new();
        for _ in 0..ATTEMPTS {
            let port = free_port();
            std::fs::write(folder.path().join("nginx.conf"), front.text(port, &marker(&folder), 0)).unwrap();
            let mut child = launch(folder.path());
            if serves(&mut child, &marker(&folder), 0) {
                return Self { child, folder, port, generation: 0 };
            }
            errors = std::fs::read_to_string(folder.path().join("error.log")).unwrap_or_default();
            assert!(errors.contains("Address already in use"), "{errors}");
        }
        panic!("no port is free: {errors}");
    }

    /// Its port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Has it read another configuration, and waits until that alone is in force. What was connected before is
    /// cut a second later.
    pub(crate) fn reload(&mut self, front: &Front) {
        self.generation += 1;
        let text = front.text(self.port, &marker(&self.folder), self.generation);
        std::fs::write(self.folder.path().join("nginx.conf"), text).unwrap();
        signal(self.child.id(), "HUP");
        assert!(
            serves(&mut self.child, &marker(&self.folder), self.generation),
            "it ended: {}",
            self.errors()
        );
        // Until it has been told, the worker of before takes connections too.
        eventually("only the new worker listens", || self.listeners() == 1);
    }

    /// How many workers take connections. One that is leaving says so in its title.
    fn listeners(&self) -> usize {
        let master = self.child.id();
        let workers = std::fs::read_to_string(format!("/proc/{master}/task/{master}/children")).unwrap();
        let title = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        workers.split_whitespace().filter(|pid| title(pid).starts_with("nginx: worker process\0")).count()
    }

    /// Kills it as a power cut would.
    pub(crate) fn kill(&mut self) {
        kill_group(&self.child);
        self.child.wait().unwrap();
    }

    /// Starts it where it was killed.
    pub(crate) fn start_again(&mut self) {
        // Whoever is killed cannot clear its socket away.
        let _ = std::fs::remove_file(marker(&self.folder));
        self.child = launch(self.folder.path());
        assert!(
            serves(&mut self.child, &marker(&self.folder), self.generation),
            "it ended: {}",
            self.errors()
        );
    }

    /// The requests that have ended, in that order. Upgrades end with their connections.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        let log = std::fs::read_to_string(self.folder.path().join("access.log")).unwrap_or_default();
        log.lines().map(|line| seen(line).unwrap_or_else(|| panic!("{line}"))).collect()
    }

    /// Everything it complained of.
    pub(crate) fn errors(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("error.log")).unwrap_or_default()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // A master that ends in order reaps its workers; one that does not is killed with them.
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), "TERM");
            let begun = Instant::now();
            while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < GRACE {
                thread::sleep(Duration::from_millis(5));
            }
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            kill_group(&self.child);
            let _ = self.child.wait();
        }
    }
}

fn seen(line: &str) -> Option<Seen> {
    let (status, rest) = line.split_once(" \"")?;
    let (upgrade, path) = rest.split_once("\" ")?;
    Some(Seen { status: status.parse().ok()?, upgrade: upgrade.to_owned(), path: path.to_owned() })
}

fn marker(folder: &TempDir) -> std::path::PathBuf {
    folder.path().join("marker.sock")
}

fn launch(folder: &Path) -> Child {
    Command::new(program().unwrap())
        .arg("-p")
        .arg(folder)
        .args(["-e", "error.log", "-c", "nginx.conf", "-g", "daemon off;"])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until a configuration is in force. Returns whether it is: nginx may have ended.
fn serves(child: &mut Child, marker: &Path, generation: usize) -> bool {
    let wanted = format!("generation {generation}");
    let mut is_there = false;
    eventually("nginx serves", || {
        is_there = unix_get(marker, "/").is_some_and(|answer| body(&answer) == wanted);
        is_there || !matches!(child.try_wait(), Ok(None))
    });
    is_there
}

fn kill_group(child: &Child) {
    let group = Pid::from_raw(child.id().cast_signed()).unwrap();
    let _ = kill_process_group(group, Signal::KILL);
}

/// A port at which nobody listens, and at which nothing will by chance.
pub(crate) fn free_port() -> u16 {
    let begun = Instant::now();
    loop {
        let port = PORTS.start + u16::from_le_bytes(key::random()) % (PORTS.end - PORTS.start);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
        assert!(begun.elapsed() < LIMIT, "no port is free");
    }
}
