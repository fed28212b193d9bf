//! What the lab prints: lines and a live table for people, or one JSON object a line for programs.

use std::{
    io::{self, IsTerminal, Write},
    net::Ipv6Addr,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Value, json};
use warren_lab::Lab;

use super::probe::Page;
use crate::cli::status::{AgentView, View};

/// What is known once the tunnel has answered its Start. Process ids are as seen from outside: the lab
/// has no process namespace.
pub(crate) struct Ready {
    /// Where metrics are served, outside of the lab's network.
    pub(crate) metrics_url: String,
    /// The socket of leg B.
    pub(crate) socket: PathBuf,
    /// The service process.
    pub(crate) service_pid: Option<u32>,
    /// The tunnel process.
    pub(crate) tunnel_pid: Option<u64>,
    /// A process inside the namespaces, if there are any.
    pub(crate) namespace: Option<u32>,
    /// When StartResponse came.
    pub(crate) started: Instant,
}

/// One page or echo, and what became of it.
pub(crate) struct Probe {
    event: &'static str,
    agent: String,
    address: Ipv6Addr,
    outcome: Result<(Duration, String, Value), String>,
}

impl Probe {
    /// A page fetched by TCP through the device.
    pub(crate) fn page(agent: &str, address: Ipv6Addr, outcome: io::Result<Page>) -> Self {
        let outcome = outcome.map_err(|error| error.to_string()).map(|page| {
            let words = format!("HTTP {}, {} bytes", page.status, page.bytes);
            (page.took, words, json!({ "status": page.status, "bytes": page.bytes }))
        });
        Self { event: "fetch", agent: agent.to_owned(), address, outcome }
    }

    /// An echo by ICMPv6 through the device.
    pub(crate) fn echo(agent: &str, address: Ipv6Addr, outcome: io::Result<Duration>) -> Self {
        let outcome = outcome.map_err(|error| error.to_string());
        let outcome = outcome.map(|took| (took, "echo reply".to_owned(), json!({})));
        Self { event: "echo", agent: agent.to_owned(), address, outcome }
    }

    fn json(&self) -> Value {
        let mut line = json!({ "event": self.event, "agent": self.agent, "address": self.address, "ok": self.outcome.is_ok() });
        let more = match &self.outcome {
            Ok((took, _, more)) => {
                line["seconds"] = json!(took.as_secs_f64());
                more.clone()
            }
            Err(error) => json!({ "error": error }),
        };
        if let (Some(line), Value::Object(more)) = (line.as_object_mut(), more) {
            line.extend(more);
        }
        line
    }

    fn text(&self) -> String {
        let Self { event, agent, .. } = self;
        match &self.outcome {
            Ok((took, words, _)) => {
                format!("{event:<6} {agent:<20} {:>9.2} ms  {words}", took.as_secs_f64() * 1e3)
            }
            Err(error) => format!("{event:<6} {agent:<20} failed: {error}"),
        }
    }
}

/// The running lab's output.
pub(crate) struct Display {
    json: bool,
    live: bool,
    drawn: usize,
    recent: Vec<String>,
    started: Instant,
}

/// Lines of recent events above the live table.
const RECENT: usize = 12;

impl Display {
    /// Says that the lab is ready.
    pub(crate) fn new(json: bool, ready: Ready, lab: &Lab) -> io::Result<Self> {
        let mut out = io::stdout().lock();
        let shell =
            ready.namespace.map(|pid| format!("nsenter --preserve-credentials --user --net --target {pid}"));
        if json {
            let line = json!({
                "event": "ready",
                "metrics_url": ready.metrics_url,
                "socket": ready.socket,
                "service_pid": ready.service_pid,
                "tunnel_pid": ready.tunnel_pid,
                "namespace_pid": ready.namespace,
                "shell": shell,
                "coder_url": lab.url(),
                "agents": agents(lab),
            });
            writeln!(out, "{line}")?;
        } else {
            writeln!(
                out,
                "The lab is up: {} agent(s) and a relay, all on this machine.\n",
                lab.agents().len()
            )?;
            writeln!(out, "  metrics  {}", ready.metrics_url)?;
            let socket_dir = ready.socket.parent().unwrap_or(&ready.socket);
            writeln!(out, "  status   warren --socket-dir {} status --watch", socket_dir.display())?;
            writeln!(out, "  tree     warren --socket-dir {} debug tree", socket_dir.display())?;
            if let Some(shell) = shell {
                writeln!(out, "  a shell  {shell}")?;
                if let Some(agent) = lab.agents().first() {
                    writeln!(
                        out,
                        "           then: curl http://[{}]/   ping {}",
                        agent.address, agent.address
                    )?;
                }
            }
            writeln!(out, "\nCtrl-C ends it and leaves nothing behind.\n")?;
        }
        Ok(Self {
            json,
            live: !json && out.is_terminal(),
            drawn: 0,
            recent: Vec::new(),
            started: ready.started,
        })
    }

    /// A change of the lifecycle or of the problem.
    pub(crate) fn status(&mut self, view: &View) -> io::Result<()> {
        let error = Some(view.error()).filter(|error| !error.is_empty());
        let line = json!({ "event": "status", "lifecycle": view.lifecycle(), "error": error });
        self.line(&line, || match error {
            Some(error) => format!("status {}: {error}", view.lifecycle()),
            None => format!("status {}", view.lifecycle()),
        })
    }

    /// An answered ping.
    pub(crate) fn ping(&mut self, agent: &AgentView<'_>) -> io::Result<()> {
        let ping = agent.agent.last_ping.clone().unwrap_or_default();
        let seconds = agent.latency_seconds().unwrap_or_default();
        let line = json!({
            "event": "ping", "agent": agent.name(), "latency_seconds": seconds,
            "p2p": ping.did_p2p, "region": ping.preferred_derp,
            "since_start_seconds": self.started.elapsed().as_secs_f64(),
        });
        let path = if ping.did_p2p { "direct".to_owned() } else { format!("relay {}", ping.preferred_derp) };
        self.line(&line, || format!("ping   {:<20} {:>9.2} ms  {path}", agent.name(), seconds * 1e3))
    }

    /// A page or an echo.
    pub(crate) fn probe(&mut self, probe: &Probe) -> io::Result<()> {
        self.line(&probe.json(), || probe.text())
    }

    /// Redraws the live table, on a terminal.
    pub(crate) fn draw(&mut self, view: &View) -> io::Result<()> {
        if !self.live {
            return Ok(());
        }
        let mut block = self.recent.join("\n");
        block.push_str("\n\n");
        block.push_str(&view.text(SystemTime::now()));
        let mut out = io::stdout().lock();
        if self.drawn > 0 {
            write!(out, "\x1b[{}A\x1b[J", self.drawn)?;
        }
        self.drawn = block.matches('\n').count();
        write!(out, "{block}")?;
        out.flush()
    }

    /// The end, with the agents that never answered.
    pub(crate) fn end(&mut self, silent: &[String]) -> io::Result<()> {
        let line = json!({ "event": "end", "silent": silent });
        self.live = false;
        self.line(&line, || match silent {
            [] => "Every agent was pinged.".to_owned(),
            silent => format!("Never answered: {}", silent.join(", ")),
        })
    }

    fn line(&mut self, json: &Value, text: impl FnOnce() -> String) -> io::Result<()> {
        if self.json {
            return writeln!(io::stdout().lock(), "{json}");
        }
        if !self.live {
            return writeln!(io::stdout().lock(), "{}", text());
        }
        self.recent.push(text());
        if self.recent.len() > RECENT {
            self.recent.remove(0);
        }
        Ok(())
    }
}

/// Says where a lab without a tunnel listens.
pub(crate) fn serving(lab: &Lab, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let line =
            json!({ "event": "ready", "coder_url": lab.url(), "token": lab.token(), "agents": agents(lab) });
        return writeln!(out, "{line}");
    }
    writeln!(out, "A deployment is up with {} agent(s).\n", lab.agents().len())?;
    writeln!(out, "  url    {}\n  token  {}\n\nCtrl-C ends it.", lab.url(), lab.token())
}

fn agents(lab: &Lab) -> Vec<Value> {
    let agent = |agent: &warren_lab::AgentInfo| {
        json!({
            "name": format!("{}.{}", agent.workspace, agent.name),
            "fqdn": agent.fqdn,
            "address": agent.address,
            "port": agent.http_port,
        })
    };
    lab.agents().iter().map(agent).collect()
}
