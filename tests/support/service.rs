//! `warren service` as a process, with a home of its own for the client.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use serde_json::Value;

use super::{Deployment, Namespace, WARREN, body, eventually, process, signal, stderr, unix_get};

/// A `warren service` of its own.
pub(crate) struct ServiceProcess {
    child: Child,
    folder: tempfile::TempDir,
}

impl ServiceProcess {
    /// Starts a service without a device, and waits until it listens.
    pub(crate) fn start() -> Self {
        Self::start_with("")
    }

    /// Starts a service without a device and with this configuration, and waits until it listens.
    pub(crate) fn start_with(config: &str) -> Self {
        Self::start_by(Command::new(WARREN), config)
    }

    /// Starts a service without a device by a command, with this configuration, and waits until it listens.
    pub(crate) fn start_by(command: Command, config: &str) -> Self {
        Self::begin(command, &["--no-tun"], config)
    }

    /// Starts a service with this configuration, and waits until it listens.
    pub(crate) fn start_configured(config: &str) -> Self {
        Self::begin(Command::new(WARREN), &[], config)
    }

    /// Starts a service with this configuration in a namespace, and waits until it listens.
    pub(crate) fn start_configured_in(namespace: &Namespace, config: &str) -> Self {
        Self::begin(namespace.enter(WARREN), &[], config)
    }

    /// Starts a service with a device in a namespace, and waits until it listens.
    pub(crate) fn start_in(namespace: &Namespace) -> Self {
        Self::begin(namespace.enter(WARREN), &[], "")
    }

    /// Starts a service without a device that logs what it logs as shipped, and waits until it listens.
    pub(crate) fn start_as_shipped() -> Self {
        Self::begin(Command::new(WARREN), &["--no-tun", "--log-filter", "info"], "")
    }

    fn begin(command: Command, more: &[&str], config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.toml"), config).unwrap();
        let child = spawn(command, more, folder.path());
        let service = Self { child, folder };
        service.wait_until_it_listens();
        service
    }

    fn wait_until_it_listens(&self) {
        eventually("the service listens", || self.warren(&["status"]).status.code() != Some(3));
    }

    /// Kills the service as a power cut would.
    pub(crate) fn kill(&mut self) {
        signal(self.child.id(), "KILL");
        self.child.wait().unwrap();
    }

    /// Starts a successor without a device on the same state.
    pub(crate) fn start_again(&mut self) {
        self.start_again_as(Command::new(WARREN), &["--no-tun"]);
    }

    /// Starts a successor with a device on the same state.
    pub(crate) fn start_again_in(&mut self, namespace: &Namespace) {
        self.start_again_as(namespace.enter(WARREN), &[]);
    }

    fn start_again_as(&mut self, command: Command, more: &[&str]) {
        self.child = spawn(command, more, self.folder.path());
        self.wait_until_it_listens();
    }

    /// Process id of the service.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Process id of its tunnel, if there is one.
    pub(crate) fn tunnel_pid(&self) -> Option<u32> {
        let pid = process(&self.tree(), "tunnel")?["pid"].as_u64()?;
        u32::try_from(pid).ok()
    }

    /// Everything the service and its tunnel have logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("service.log")).unwrap()
    }

    /// The directory of its sockets.
    pub(crate) fn socket_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// The directory of what outlives it.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// What the local API says to a GET, head included.
    pub(crate) fn api(&self, path: &str) -> String {
        unix_get(&self.socket_dir().join("api.sock"), path).unwrap_or_default()
    }

    /// What the metrics endpoint says.
    pub(crate) fn metrics(&self) -> String {
        body(&self.api("/metrics")).to_owned()
    }

    /// Keeps a token for the client without asking the deployment.
    pub(crate) fn pretend_login(&self, url: &str, token: &str) {
        let folder = self.folder.path().join("config/warren");
        std::fs::create_dir_all(&folder).unwrap();
        let content = serde_json::json!({ "url": url, "token": token }).to_string();
        std::fs::write(folder.join("credentials.json"), content).unwrap();
    }

    /// Logs in at a deployment, brings the tunnel up, and waits until packets get to all agents and back.
    pub(crate) fn connect(&self, deployment: &Deployment) {
        let (url, token) = deployment.access();
        self.pretend_login(&url, &token);
        let up = self.warren(&["up", "--wait"]);
        assert!(up.status.success(), "{}{}", stderr(&up), self.log());
    }

    /// A client verb, as the user who runs the service.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(WARREN);
        command.env("XDG_CONFIG_HOME", self.folder.path().join("config"));
        command.arg("--socket-dir").arg(self.socket_dir()).args(arguments);
        command
    }

    /// Runs a client verb.
    pub(crate) fn warren(&self, arguments: &[&str]) -> Output {
        self.command(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// The service's status as JSON.
    pub(crate) fn status(&self) -> Value {
        serde_json::from_slice(&self.warren(&["status", "--json"]).stdout).unwrap_or(Value::Null)
    }

    /// The supervision trees of both processes.
    pub(crate) fn tree(&self) -> Value {
        serde_json::from_slice(&self.warren(&["debug", "tree", "--json"]).stdout).unwrap_or(Value::Null)
    }
}

impl Drop for ServiceProcess {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), "TERM");
            let _ = self.child.wait();
        }
    }
}

fn spawn(mut command: Command, more: &[&str], folder: &Path) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("service.log")).unwrap();
    command
        .args(["service", "--metrics-listen", "127.0.0.1:0"])
        .args(if more.contains(&"--log-filter") { [].as_slice() } else { &["--log-filter", "trace"] })
        .args(more)
        .arg("--config")
        .arg(folder.join("config.toml"))
        .arg("--runtime-dir")
        .arg(folder.join("run"))
        .arg("--state-dir")
        .arg(folder.join("state"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}
