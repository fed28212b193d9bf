//! `warren lab --json` as a process, and its namespaces.

use std::{
    io::{BufRead, BufReader},
    ops::Index,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Instant,
};

use serde_json::Value;

use super::{LIMIT, WARREN, get, is_alive, signal, unix_post};

/// One line of the lab's output.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// When it was read.
    pub(crate) at: Instant,
    /// What it says.
    pub(crate) json: Value,
}

impl Index<&str> for Event {
    type Output = Value;

    fn index(&self, key: &str) -> &Value {
        &self.json[key]
    }
}

/// Everything the lab has said. Its pipe is always read: a lab that cannot write stands still.
#[derive(Default)]
struct Said {
    events: Mutex<(Vec<Event>, bool)>,
    more: Condvar,
}

impl Said {
    fn read(&self, out: impl std::io::Read) {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let json = serde_json::from_str(&line).unwrap_or(Value::String(line));
            self.change(|(events, _)| events.push(Event { at: Instant::now(), json }));
        }
        self.change(|(_, ended)| *ended = true);
    }

    fn change(&self, change: impl FnOnce(&mut (Vec<Event>, bool))) {
        change(&mut self.events.lock().unwrap_or_else(PoisonError::into_inner));
        self.more.notify_all();
    }
}

/// A running `warren lab --json`.
pub(crate) struct LabProcess {
    child: Child,
    said: Arc<Said>,
    next: usize,
    network: Option<PathBuf>,
    /// The `ready` event.
    pub(crate) ready: Event,
}

impl LabProcess {
    /// Starts a lab and waits until it is ready.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_as(Command::new(WARREN).args(["lab", "--json"]).args(arguments))
    }

    /// Starts a lab by a command and waits until it is ready.
    pub(crate) fn start_as(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let (out, said) = (child.stdout.take().unwrap(), Arc::new(Said::default()));
        let reader = Arc::clone(&said);
        thread::spawn(move || reader.read(out));
        let ready = Event { at: Instant::now(), json: Value::Null };
        let mut lab = Self { child, said, next: 0, network: None, ready };
        lab.ready = lab.wait(|event| event["event"] == "ready");
        lab.network = lab.ready["namespace_pid"].as_u64().and_then(|pid| network_of(&pid.to_string()));
        lab
    }

    /// Waits for an event that has not been seen yet and satisfies `accept`.
    pub(crate) fn wait(&mut self, mut accept: impl FnMut(&Event) -> bool) -> Event {
        let deadline = Instant::now() + LIMIT;
        let mut held = self.said.events.lock().unwrap();
        loop {
            while let Some(event) = held.0.get(self.next) {
                self.next += 1;
                if accept(event) {
                    return event.clone();
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!held.1, "the lab has ended; it said: {:#?}", held.0);
            assert!(!left.is_zero(), "waited in vain; the lab said: {:#?}", held.0);
            held = self.said.more.wait_timeout(held, left).unwrap().0;
        }
    }

    /// Everything the lab has said so far.
    pub(crate) fn seen(&self) -> Vec<Event> {
        self.said.events.lock().unwrap().0.clone()
    }

    /// Waits until the lab has ended by itself. Returns its exit status.
    pub(crate) fn wait_for_end(&mut self) -> Option<i32> {
        let said = self.said.events.lock().unwrap();
        let (said, _) = self.said.more.wait_timeout_while(said, LIMIT, |said| !said.1).unwrap();
        assert!(said.1, "the lab does not end");
        drop(said);
        self.child.wait().unwrap().code()
    }

    /// Ends the lab as Ctrl-C would, and waits. Returns its exit status.
    pub(crate) fn interrupt(&mut self) -> Option<i32> {
        signal(self.child.id(), "INT");
        self.wait_for_end()
    }

    /// Ends the lab and checks that it did in good order and that nothing is left.
    pub(crate) fn end(mut self) {
        assert_eq!(self.interrupt(), Some(0), "{:#?}", self.seen());
        self.check_that_nothing_is_left();
    }

    /// Checks that an ended lab has left no process, and so no namespace and no device, and no file.
    pub(crate) fn check_that_nothing_is_left(&self) {
        let (service, tunnel) = self.pids();
        assert!(!is_alive(service) && !is_alive(tunnel));
        if let Some(network) = &self.network {
            let left: Vec<_> = processes().filter(|pid| network_of(pid).as_ref() == Some(network)).collect();
            assert!(left.is_empty(), "processes in the lab's network: {left:?}");
        }
        assert!(!self.socket_dir().parent().unwrap().exists());
        assert!(!Path::new("/sys/class/net/warren0").exists());
    }

    /// Process id of the service, then of the tunnel, as the `ready` event gave them.
    pub(crate) fn pids(&self) -> (u32, u32) {
        let pid = |key: &str| u32::try_from(self.ready[key].as_u64().unwrap()).unwrap();
        (pid("service_pid"), pid("tunnel_pid"))
    }

    /// Process id of the tunnel as the service says it now.
    pub(crate) fn tunnel_pid(&self) -> Option<u64> {
        super::process(&self.tree(), "tunnel")?["pid"].as_u64()
    }

    /// Where the lab keeps its sockets.
    pub(crate) fn socket_dir(&self) -> PathBuf {
        Path::new(self.ready["socket"].as_str().unwrap()).parent().unwrap().to_owned()
    }

    /// Runs a client verb against the lab's service.
    pub(crate) fn warren(&self, arguments: &[&str]) -> Output {
        Command::new(WARREN).arg("--socket-dir").arg(self.socket_dir()).args(arguments).output().unwrap()
    }

    /// A command that runs inside the lab's namespaces.
    pub(crate) fn enter(&self, program: &str) -> Command {
        enter(self.ready["namespace_pid"].as_u64().unwrap(), program)
    }

    /// Address of the first agent.
    pub(crate) fn address(&self) -> String {
        self.ready["agents"][0]["address"].as_str().unwrap().to_owned()
    }

    /// The names of the agents, as events tell them.
    pub(crate) fn agents(&self) -> Vec<String> {
        let agents = self.ready["agents"].as_array().unwrap();
        agents.iter().map(|agent| agent["name"].as_str().unwrap().to_owned()).collect()
    }

    /// What the metrics endpoint says; nothing while nobody answers there.
    pub(crate) fn metrics(&self) -> String {
        let answer = get(self.ready["metrics_url"].as_str().unwrap()).unwrap_or_default();
        super::body(&answer).to_owned()
    }

    /// The sum of samples, see [`super::sum`].
    pub(crate) fn sum(&self, family: &str, labels: &[&str]) -> f64 {
        super::sum(&self.metrics(), family, labels)
    }

    /// The number of pings of each agent so far.
    pub(crate) fn pings(&self, agent: &str) -> usize {
        self.seen().iter().filter(|event| event["event"] == "ping" && event["agent"] == agent).count()
    }

    /// Forces a fault through the local API. A part of the API itself may die before it answers.
    pub(crate) fn fault(&self, process: &str, actor: &str, kind: &str) {
        let body = serde_json::json!({ "process": process, "actor": actor, "kind": kind });
        let answer = unix_post(&self.socket_dir().join("api.sock"), "/v1/fault", &body.to_string());
        let answer = answer.unwrap_or_default();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 2"), "{actor}: {answer}");
    }

    /// The supervision trees of both processes.
    pub(crate) fn tree(&self) -> Value {
        let output = self.warren(&["debug", "tree", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }

    /// The names of a process's workers.
    pub(crate) fn workers(&self, process: &str) -> Vec<String> {
        let tree = self.tree();
        let nodes = super::process(&tree, process).and_then(|process| process["nodes"].as_array());
        let workers = nodes.into_iter().flatten().filter(|node| node["kind"] == "worker");
        workers.map(|node| node["name"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for LabProcess {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), "TERM");
            let _ = self.child.wait();
        }
    }
}

/// A user and network namespace with nothing in it but a loopback that is up.
pub(crate) struct Namespace {
    holder: Child,
}

impl Namespace {
    /// Takes over the namespaces of a lab, which is ended. `ip` would do it as well, and is not needed.
    pub(crate) fn new() -> Self {
        let mut lab = LabProcess::start(&["--agents", "1"]);
        let holder = lab.enter("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let network = lab.network.clone();
        let pid = holder.id().to_string();
        super::eventually("the holder is inside", || network_of(&pid) == network);
        lab.interrupt();
        Self { holder }
    }

    /// A command that runs inside.
    pub(crate) fn enter(&self, program: &str) -> Command {
        enter(self.holder.id().into(), program)
    }

    /// Whether there is a network device of this name inside.
    pub(crate) fn has_device(&self, name: &str) -> bool {
        let devices = self.enter("cat").arg("/proc/net/dev").output().unwrap();
        super::stdout(&devices).lines().any(|line| line.trim_start().starts_with(&format!("{name}:")))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn enter(target: u64, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--preserve-credentials", "--user", "--net", "--target", &target.to_string(), program]);
    command
}

fn network_of(pid: &str) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/net")).ok()
}

fn processes() -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
}
