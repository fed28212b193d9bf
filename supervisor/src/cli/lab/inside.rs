//! The lab from inside its namespaces: servers, service, and what a person sees of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::Ipv6Addr,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    process::{Child, Command},
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use warren_lab::Lab;
use warren_proto::vpn;
use warren_supervisor::sockets;

use super::{Args, Signals, display, display::Display, elapsed, metrics_url, namespace, options, probe};
use crate::cli::{
    Reach, VERSION,
    api::Api,
    exit::{CliError, Exit, Outcome},
    legb::ServiceClient,
    status::View,
};

/// How long the service may take to listen, and the tunnel to answer its Start.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long the service may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Pause between two rounds of pages and echoes.
const PROBE_EVERY: Duration = Duration::from_secs(5);

/// Probes that may wait for the display.
const PROBE_QUEUE: usize = 64;

/// Agents of a large lab that are fetched from and echoed; all are pinged.
const PROBED_AGENTS: usize = 16;

/// Runs the lab until its end and says whether every agent was pinged.
pub(crate) async fn run(args: Args) -> Outcome {
    let mut signals = Signals::listen()?;
    let folder = args.inside.clone().unwrap_or_default();
    let listener = sockets::inherited(args.metrics_fd.unwrap_or(-1)).map_err(CliError::failed)?;
    if !args.no_tun {
        loopback_up().await?;
    }
    let lab = Lab::start(options(&args)).await.map_err(CliError::failed)?;
    let mut service = Service::spawn(&args, &folder, &listener)?;
    let metrics = metrics_url(&listener)?;
    drop(listener);
    let outcome = attend(&args, &lab, &mut service, &folder, metrics, &mut signals).await;
    service.stop().await;
    if outcome.is_err() && !args.logs {
        service.show_log();
    }
    lab.stop().await;
    outcome
}

/// Connects to the service and has it start the tunnel.
async fn start(lab: &Lab, service: &mut Service, reach: &Reach) -> Result<ServiceClient, CliError> {
    let mut client = service.connect(reach).await?;
    let start = vpn::StartRequest {
        coder_url: lab.url().to_string(),
        api_token: lab.token().to_owned(),
        coder_desktop_version: VERSION.to_owned(),
        ..Default::default()
    };
    let deadline = Instant::now() + START_LIMIT;
    let answer = client.start(start, deadline, |stage| eprintln!("warren lab: {stage} ...")).await?;
    if !answer.success {
        return Err(CliError::failed(format!("the tunnel did not start: {}", answer.error_message)));
    }
    Ok(client)
}

/// Everything between the start of the service and its stop.
async fn attend(
    args: &Args,
    lab: &Lab,
    service: &mut Service,
    folder: &Path,
    metrics: String,
    signals: &mut Signals,
) -> Outcome {
    let reach = Reach { socket_dir: Some(folder.join("run")) };
    let mut client = tokio::select! {
        client = start(lab, service, &reach) => client?,
        () = signals.received() => return Ok(Exit::Ok),
    };
    let started = std::time::Instant::now();
    let status = Api::new(&reach).get("/v1/status").await?;
    let ready = display::Ready {
        metrics_url: metrics,
        socket: reach.socket("vpn.sock"),
        service_pid: service.pid(),
        tunnel_pid: status.get("tunnel_pid").and_then(serde_json::Value::as_u64),
        namespace: (!args.no_tun).then(std::process::id),
        started,
    };
    let mut display = Display::new(args.json, ready, lab)?;
    let (report, mut probes) = mpsc::channel(PROBE_QUEUE);
    let probing = (!args.no_tun).then(|| tokio::spawn(probe_agents(targets(lab), report)));

    let mut pinged = Pinged::default();
    let first = client.status(Instant::now() + START_LIMIT).await?;
    pinged.hear(&View::new(first), &mut display)?;
    let end = elapsed(args.duration);
    tokio::pin!(end);
    loop {
        tokio::select! {
            status = client.next_status() => {
                let status = match status {
                    Ok(status) => status,
                    // What serves clients was restarted, or the whole service has ended.
                    Err(_) => {
                        client = service.connect(&reach).await?;
                        client.status(Instant::now() + START_LIMIT).await?
                    }
                };
                pinged.hear(&View::new(status), &mut display)?;
            }
            Some(outcome) = probes.recv() => display.probe(&outcome)?,
            () = &mut end => break,
            () = signals.received() => break,
            status = service.child.wait() => {
                return Err(CliError::failed(format!("the service ended by itself: {}", status?)));
            }
        }
    }
    if let Some(probing) = probing {
        probing.abort();
    }
    let silent: Vec<_> = lab
        .agents()
        .iter()
        .map(|agent| format!("{}.{}", agent.workspace, agent.name))
        .filter(|name| !pinged.names.contains(name))
        .collect();
    display.end(&silent)?;
    // Without a duration a person ended it: nothing was promised by then.
    Ok(if silent.is_empty() || args.duration.is_none() { Exit::Ok } else { Exit::Unhealthy })
}

/// Which agents have answered, and which answers were shown.
#[derive(Default)]
struct Pinged {
    names: BTreeSet<String>,
    shown: BTreeMap<String, vpn::LastPing>,
    lifecycle: String,
}

impl Pinged {
    fn hear(&mut self, view: &View, display: &mut Display) -> io::Result<()> {
        let lifecycle = format!("{} {}", view.lifecycle(), view.error());
        if lifecycle != self.lifecycle {
            self.lifecycle = lifecycle;
            display.status(view)?;
        }
        for agent in view.agents() {
            let Some(ping) = &agent.agent.last_ping else { continue };
            let name = agent.name();
            // An answer is new when it differs: latencies have nanoseconds.
            if self.shown.get(&name) != Some(ping) {
                self.shown.insert(name.clone(), ping.clone());
                display.ping(&agent)?;
                self.names.insert(name);
            }
        }
        display.draw(view)
    }
}

/// The service process.
struct Service {
    child: Child,
    log: Option<PathBuf>,
}

impl Service {
    fn spawn(args: &Args, folder: &Path, listener: &OwnedFd) -> Result<Self, CliError> {
        let log = (!args.logs).then(|| folder.join("service.log"));
        let stderr = match &log {
            Some(path) => Stdio::from(fs::File::create(path)?),
            None => Stdio::inherit(),
        };
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("service").arg("--allow-faults");
        command.arg("--config").arg(folder.join("config.toml"));
        command.arg("--runtime-dir").arg(folder.join("run"));
        command.arg("--state-dir").arg(folder.join("state"));
        command.args(["--metrics-fd", &listener.as_raw_fd().to_string()]);
        command.args(args.no_tun.then_some("--no-tun"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).kill_on_drop(true);
        namespace::inherit(&mut command, vec![listener.as_raw_fd()]);
        fs::write(folder.join("config.toml"), "")?;
        Ok(Self { child: command.spawn()?, log })
    }

    fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Connects as soon as the service listens.
    async fn connect(&mut self, reach: &Reach) -> Result<ServiceClient, CliError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match ServiceClient::connect(reach).await {
                Err(error) if error.exit == Exit::NotRunning && Instant::now() < deadline => {
                    if let Some(status) = self.child.try_wait()? {
                        return Err(CliError::failed(format!("the service ended by itself: {status}")));
                    }
                    sleep(Duration::from_millis(20)).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn stop(&mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if timeout(STOP_LIMIT, self.child.wait()).await.is_err() {
            eprintln!("warren lab: the service did not end in time and is killed");
            let _ = self.child.kill().await;
        }
    }

    /// Shows the end of the service's log: the reason of a failure is there.
    fn show_log(&self) {
        const LINES: usize = 30;
        let Some(text) = self.log.as_ref().and_then(|path| fs::read_to_string(path).ok()) else { return };
        let lines: Vec<_> = text.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(LINES)) {
            eprintln!("  service: {line}");
        }
    }
}

/// A new network namespace has its loopback down.
async fn loopback_up() -> Result<(), CliError> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let task = tokio::spawn(connection);
    const LOOPBACK: u32 = 1;
    let up = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
    let outcome = handle.link().set(up).execute().await;
    task.abort();
    outcome.map_err(|error| CliError::failed(format!("cannot bring up the loopback of the lab: {error}")))
}

fn targets(lab: &Lab) -> Vec<(String, Ipv6Addr, u16)> {
    let name = |agent: &warren_lab::AgentInfo| format!("{}.{}", agent.workspace, agent.name);
    lab.agents()
        .iter()
        .take(PROBED_AGENTS)
        .map(|agent| (name(agent), agent.address, agent.http_port))
        .collect()
}

async fn probe_agents(targets: Vec<(String, Ipv6Addr, u16)>, report: mpsc::Sender<display::Probe>) {
    for sequence in 0.. {
        for (name, address, port) in &targets {
            let page = probe::fetch(*address, *port).await;
            let echo = probe::echo(*address, sequence).await;
            for probe in
                [display::Probe::page(name, *address, page), display::Probe::echo(name, *address, echo)]
            {
                if report.send(probe).await.is_err() {
                    return;
                }
            }
        }
        sleep(PROBE_EVERY).await;
    }
}
