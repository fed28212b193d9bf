//! `warren status`: the tunnel, the workspaces, and how their agents answer.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
    time::{Duration, SystemTime},
};

use serde_json::json;
use tokio::time::Instant;
use uuid::Uuid;
use warren_proto::vpn::{self, status::Lifecycle};

use super::{
    Reach,
    api::Api,
    exit::{CliError, Exit, Outcome, printable},
    legb::ServiceClient,
};

const LIMIT: Duration = Duration::from_secs(5);

const EXAMPLES: &str = "\
Examples:
  warren status
  warren status --json | jq -r '.agents[].addresses[0]'
  warren status --watch

Exit status: 0 when the tunnel is up, or down as wanted; 6 when it should be up and is not.";

/// Show the tunnel, the workspaces and how their agents answer
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// One JSON object (with --watch: one a line)
    #[arg(long)]
    json: bool,
    /// Show every change until interrupted
    #[arg(long)]
    watch: bool,
}

/// Shows the status once or on every change.
pub(crate) async fn run(reach: Reach, args: Args) -> Outcome {
    let mut service = ServiceClient::connect(&reach).await?;
    let mut view = View::new(service.status(Instant::now() + LIMIT).await?);
    loop {
        view.absent = absent(&reach).await;
        show(&view, &args)?;
        if !args.watch {
            return Ok(view.exit());
        }
        view = View::new(service.next_status().await?);
    }
}

/// What the running tunnel says that it does not have: leg B has no word for it, the local API has. Nothing
/// where it cannot be asked, which is no reason to show no status.
async fn absent(reach: &Reach) -> Vec<String> {
    let asked = tokio::time::timeout(LIMIT, Api::new(reach).get("/v1/status")).await;
    let Ok(Ok(status)) = asked else { return Vec::new() };
    let absent = status.get("absent").and_then(|absent| absent.as_array());
    absent.into_iter().flatten().filter_map(|it| it.as_str()).map(str::to_owned).collect()
}

fn show(view: &View, args: &Args) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        return writeln!(out, "{}", view.json());
    }
    if args.watch && out.is_terminal() {
        write!(out, "\x1b[H\x1b[2J")?;
    }
    write!(out, "{}", view.text(SystemTime::now()))
}

/// A status as people and programs are shown it.
pub(crate) struct View {
    status: vpn::Status,
    absent: Vec<String>,
}

impl View {
    /// Wraps what the service sent.
    pub(crate) fn new(status: vpn::Status) -> Self {
        Self { status, absent: Vec::new() }
    }

    /// Whether the tunnel has answered its Start.
    pub(crate) fn is_started(&self) -> bool {
        self.status.lifecycle() == Lifecycle::Started
    }

    /// Whether nothing runs, and nothing is about to.
    pub(crate) fn is_stopped(&self) -> bool {
        self.status.lifecycle() == Lifecycle::Stopped
    }

    /// The lifecycle in lower case.
    pub(crate) fn lifecycle(&self) -> &'static str {
        self.status.lifecycle().label()
    }

    /// What is wrong, empty if nothing is.
    pub(crate) fn error(&self) -> &str {
        &self.status.error_message
    }

    /// The agents, by name.
    pub(crate) fn agents(&self) -> Vec<AgentView<'_>> {
        let workspaces: BTreeMap<&[u8], &vpn::Workspace> = self
            .peers()
            .flat_map(|peers| &peers.upserted_workspaces)
            .map(|workspace| (&workspace.id[..], workspace))
            .collect();
        let agents = self.peers().flat_map(|peers| &peers.upserted_agents);
        let mut agents: Vec<_> = agents
            .map(|agent| AgentView { agent, workspace: workspaces.get(&agent.workspace_id[..]).copied() })
            .collect();
        agents.sort_by_key(AgentView::name);
        agents
    }

    /// The agents in running workspaces, with their names.
    pub(crate) fn expected_agents(&self) -> Vec<(Uuid, String)> {
        let agents = self.agents();
        let expected = agents.iter().filter(|view| view.is_expected());
        expected.filter_map(|view| Some((Uuid::from_slice(&view.agent.id).ok()?, view.name()))).collect()
    }

    /// The names of agents in running workspaces that have not answered a ping yet.
    pub(crate) fn silent_agents(&self) -> Vec<String> {
        let silent = |view: &AgentView<'_>| view.is_expected() && view.agent.last_ping.is_none();
        self.agents().iter().filter(|view| silent(view)).map(AgentView::name).collect()
    }

    fn peers(&self) -> impl Iterator<Item = &vpn::PeerUpdate> {
        self.status.peer_update.iter()
    }

    fn exit(&self) -> Exit {
        match self.status.lifecycle() {
            Lifecycle::Started | Lifecycle::Stopping => Exit::Ok,
            Lifecycle::Stopped if self.error().is_empty() => Exit::Ok,
            Lifecycle::Stopped | Lifecycle::Starting | Lifecycle::Unknown => Exit::Unhealthy,
        }
    }

    /// The whole status as JSON. Durations are in seconds; an absent value is `null`.
    pub(crate) fn json(&self) -> serde_json::Value {
        let workspaces: Vec<_> = self
            .peers()
            .flat_map(|peers| &peers.upserted_workspaces)
            .map(|workspace| {
                let id = Uuid::from_slice(&workspace.id).ok();
                json!({ "id": id, "name": workspace.name, "status": status_name(workspace) })
            })
            .collect();
        let agents: Vec<_> = self.agents().iter().map(AgentView::json).collect();
        json!({
            "lifecycle": self.lifecycle(),
            "error": (!self.error().is_empty()).then(|| self.error()),
            "workspaces": workspaces,
            "agents": agents,
            "absent": self.absent,
        })
    }

    /// The whole status for people.
    pub(crate) fn text(&self, now: SystemTime) -> String {
        let mut text = format!("Tunnel: {}\n", self.lifecycle());
        if !self.error().is_empty() {
            text.push_str(&format!("Problem: {}\n", printable(self.error())));
        }
        let rows: Vec<_> = self.agents().iter().map(|view| view.row(now)).collect();
        if !rows.is_empty() {
            text.push('\n');
            text.push_str(&table(&["AGENT", "WORKSPACE", "ADDRESS", "PING", "PATH", "HANDSHAKE"], &rows));
        } else if self.is_started() {
            text.push_str("No agents: no workspace of yours is running.\n");
        }
        if self.is_started() && !self.absent.is_empty() {
            text.push_str(&format!("\nMissing here: {}.\n", printable(&self.absent.join(", "))));
        }
        text
    }
}

/// One agent of a status.
pub(crate) struct AgentView<'a> {
    /// The agent as the service reports it.
    pub(crate) agent: &'a vpn::Agent,
    workspace: Option<&'a vpn::Workspace>,
}

impl AgentView<'_> {
    /// `workspace.agent`, as people call it.
    pub(crate) fn name(&self) -> String {
        match self.workspace {
            Some(workspace) => format!("{}.{}", workspace.name, self.agent.name),
            None => self.agent.name.clone(),
        }
    }

    /// The agent's last answered ping in seconds.
    pub(crate) fn latency_seconds(&self) -> Option<f64> {
        let latency = self.agent.last_ping.as_ref()?.latency.as_ref()?;
        Some(latency.seconds as f64 + f64::from(latency.nanos) / 1e9)
    }

    fn is_expected(&self) -> bool {
        self.workspace.is_some_and(|workspace| workspace.status() == vpn::workspace::Status::Running)
    }

    fn path(&self) -> String {
        match &self.agent.last_ping {
            Some(ping) if ping.did_p2p => "direct".to_owned(),
            Some(ping) => format!("relay {}", ping.preferred_derp),
            None => "-".to_owned(),
        }
    }

    fn handshake_age(&self, now: SystemTime) -> Option<Duration> {
        let handshake = self.agent.last_handshake.as_ref()?;
        let since_epoch =
            Duration::from_secs(u64::try_from(handshake.seconds).ok().filter(|&seconds| seconds > 0)?);
        now.duration_since(SystemTime::UNIX_EPOCH + since_epoch).ok()
    }

    fn row(&self, now: SystemTime) -> Vec<String> {
        let ping = self
            .latency_seconds()
            .map_or_else(|| "-".to_owned(), |seconds| format!("{:.1} ms", seconds * 1e3));
        let handshake = self
            .handshake_age(now)
            .map_or_else(|| "never".to_owned(), |age| format!("{} s ago", age.as_secs()));
        let workspace = self.workspace.map_or("-", status_name);
        vec![
            self.name(),
            workspace.to_owned(),
            self.agent.ip_addrs.first().cloned().unwrap_or_default(),
            ping,
            self.path(),
            handshake,
        ]
    }

    fn json(&self) -> serde_json::Value {
        let ping = self.agent.last_ping.as_ref();
        json!({
            "id": Uuid::from_slice(&self.agent.id).ok(),
            "name": self.agent.name,
            "workspace": self.workspace.map(|workspace| &workspace.name),
            "fqdn": self.agent.fqdn,
            "addresses": self.agent.ip_addrs,
            "last_handshake_seconds": self.agent.last_handshake.as_ref().map(|at| at.seconds).filter(|&at| at > 0),
            "latency_seconds": self.latency_seconds(),
            "p2p": ping.map(|ping| ping.did_p2p),
            "region": ping.map(|ping| &ping.preferred_derp),
        })
    }
}

fn status_name(workspace: &vpn::Workspace) -> &'static str {
    workspace.status().label()
}

/// Lays out rows in columns as wide as their widest cell. Names come from elsewhere: a cell is one line.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let cell = |cell: &String| printable(cell).replace(['\n', '\t'], " ");
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(cell).collect()).collect();
    let all = || std::iter::once(&head).chain(&rows);
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            all().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in all() {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A reader that waits for broadcasts must learn that the service has gone.
pub(crate) fn service_gone() -> CliError {
    CliError::new(Exit::NotRunning, "the service has ended the connection; is it still running?")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(lifecycle: Lifecycle, error: &str) -> View {
        let mut status = vpn::Status { error_message: error.into(), ..Default::default() };
        status.set_lifecycle(lifecycle);
        let workspace_id = vec![1; 16];
        let mut workspace =
            vpn::Workspace { id: workspace_id.clone().into(), name: "dev".into(), ..Default::default() };
        workspace.set_status(vpn::workspace::Status::Running);
        let agent = vpn::Agent {
            id: vec![2; 16].into(),
            name: "main".into(),
            workspace_id: workspace_id.into(),
            fqdn: vec!["dev.coder.".into()],
            ip_addrs: vec!["fd60:627a:a42b::2".into()],
            ..Default::default()
        };
        status.peer_update = Some(vpn::PeerUpdate {
            upserted_workspaces: vec![workspace],
            upserted_agents: vec![agent],
            ..Default::default()
        });
        View::new(status)
    }

    #[test]
    fn an_agent_without_a_ping_is_waited_for_only_in_a_running_workspace() {
        let mut view = view(Lifecycle::Started, "");
        assert_eq!(view.silent_agents(), ["dev.main"]);
        let peers = view.status.peer_update.as_mut().unwrap();
        peers.upserted_workspaces[0].set_status(vpn::workspace::Status::Stopped);
        assert!(view.silent_agents().is_empty());
    }

    #[test]
    fn the_exit_status_tells_down_as_wanted_from_down_with_a_problem() {
        assert_eq!(view(Lifecycle::Stopped, "").exit(), Exit::Ok);
        assert_eq!(view(Lifecycle::Stopped, "refused").exit(), Exit::Unhealthy);
        assert_eq!(view(Lifecycle::Starting, "died").exit(), Exit::Unhealthy);
        assert_eq!(view(Lifecycle::Started, "").exit(), Exit::Ok);
    }

    #[test]
    fn a_name_cannot_move_the_cursor() {
        let row = vec!["dev\x1b[2J\r\nfake".to_owned()];
        assert_eq!(table(&["AGENT"], &[row]), "AGENT\ndev?[2J? fake\n");
    }

    #[test]
    fn text_shows_the_address_ready_to_paste() {
        let text = view(Lifecycle::Started, "").text(SystemTime::now());
        assert!(text.contains("fd60:627a:a42b::2"), "{text}");
        assert!(text.contains("never"), "{text}");
    }

    /// Conforms: control:P16
    #[test]
    fn path_region_and_last_handshake_of_an_agent_are_shown() {
        let mut view = view(Lifecycle::Started, "");
        let agent = &mut view.status.peer_update.as_mut().unwrap().upserted_agents[0];
        agent.last_handshake = Some(prost_types::Timestamp { seconds: 1_000, nanos: 0 });
        agent.last_ping = Some(vpn::LastPing {
            latency: Some(prost_types::Duration { seconds: 0, nanos: 12_500_000 }),
            preferred_derp: "Helsinki".to_owned(),
            ..Default::default()
        });
        let text = view.text(SystemTime::UNIX_EPOCH + Duration::from_secs(1_007));
        assert!(
            text.contains("12.5 ms") && text.contains("relay Helsinki") && text.contains("7 s ago"),
            "{text}"
        );
        let json = &view.json()["agents"][0];
        assert_eq!((&json["region"], &json["p2p"]), (&json!("Helsinki"), &json!(false)));
        assert_eq!(json["last_handshake_seconds"], 1_000);
    }

    #[test]
    fn what_the_tunnel_does_not_have_is_said_while_it_runs() {
        let mut view = view(Lifecycle::Started, "");
        view.absent = vec!["a device (only pings work)".to_owned(), "host\x1b names".to_owned()];
        let said = "\nMissing here: a device (only pings work), host? names.\n";
        assert!(view.text(SystemTime::now()).ends_with(said));
        assert_eq!(view.json()["absent"][0], "a device (only pings work)");
        view.status.set_lifecycle(Lifecycle::Starting);
        assert!(!view.text(SystemTime::now()).contains("Missing"));
    }

    #[test]
    fn json_holds_null_for_what_is_not_known() {
        let json = view(Lifecycle::Started, "").json();
        assert_eq!(json["agents"][0]["latency_seconds"], serde_json::Value::Null);
        assert_eq!(json["agents"][0]["addresses"][0], "fd60:627a:a42b::2");
        assert_eq!(json["error"], serde_json::Value::Null);
    }
}
