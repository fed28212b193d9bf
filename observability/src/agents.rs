//! The metrics of single agents: opt-in, since their number grows with the deployment. They are made anew for
//! each scrape from what is known by then, so that an agent that is gone leaves nothing behind.

use std::{
    collections::BTreeMap,
    fmt::Write,
    time::{Duration, SystemTime},
};

use crate::{
    exporter::{Process, head},
    names,
};

/// Agents with series of their own; a scrape stays below half a megabyte.
pub const MAX_AGENTS: usize = 500;
/// Longest name that stands in a label, in bytes.
const MAX_NAME: usize = 64;

/// One agent.
#[derive(Debug, Clone, Copy)]
pub struct Agent<'a> {
    /// Name of its workspace.
    pub workspace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// How the last ping reached it: `p2p`, `derp` or `none`.
    pub connection_type: &'static str,
    /// Latency of its last answered ping.
    pub latency: Option<Duration>,
    /// When its last handshake was completed.
    pub last_handshake: Option<SystemTime>,
    /// Bytes of inner packets from it.
    pub received_bytes: u64,
    /// Bytes of inner packets to it.
    pub sent_bytes: u64,
}

/// The exposition of these agents, Prometheus text format.
pub fn render<'a>(agents: impl Iterator<Item = Agent<'a>>) -> String {
    let (mut kept, mut left_out) = (BTreeMap::new(), 0_u32);
    for agent in agents {
        let labels = labels(&agent);
        if kept.len() >= MAX_AGENTS || kept.contains_key(&labels) {
            left_out += 1;
        } else {
            kept.insert(labels, agent);
        }
    }
    let mut text = String::new();
    let mut family = |name: &str, value: &dyn Fn(&Agent<'_>) -> Option<f64>| {
        head(&mut text, name);
        for (labels, agent) in &kept {
            if let Some(value) = value(agent) {
                let _ = writeln!(text, "{name}{{{labels}}} {value}");
            }
        }
    };
    family(names::AGENT_PING_LATENCY, &|agent| Some(agent.latency?.as_secs_f64()));
    family(names::AGENT_LAST_HANDSHAKE, &|agent| {
        Some(agent.last_handshake?.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs_f64())
    });
    family(names::AGENT_RECEIVE_BYTES, &|agent| Some(agent.received_bytes as f64));
    family(names::AGENT_TRANSMIT_BYTES, &|agent| Some(agent.sent_bytes as f64));
    head(&mut text, names::AGENTS_LEFT_OUT);
    let process = Process::Tunnel.label();
    let _ = writeln!(text, "{}{{process=\"{process}\"}} {left_out}", names::AGENTS_LEFT_OUT);
    text
}

fn labels(agent: &Agent<'_>) -> String {
    format!(
        "process=\"{}\",workspace_name=\"{}\",agent_name=\"{}\",connection_type=\"{}\"",
        Process::Tunnel.label(),
        plain(agent.workspace),
        plain(agent.name),
        agent.connection_type
    )
}

/// Names come from the deployment. Those it allows stay as they are.
fn plain(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    name.chars().take(MAX_NAME).map(|c| if is_plain(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::merge;

    fn agent<'a>(workspace: &'a str, name: &'a str) -> Agent<'a> {
        Agent {
            workspace,
            name,
            connection_type: "derp",
            latency: Some(Duration::from_millis(5)),
            last_handshake: None,
            received_bytes: 7,
            sent_bytes: 8,
        }
    }

    #[test]
    fn every_agent_has_its_series_and_they_pass_the_service() {
        let text = merge("", Some(&render([agent("dev", "main"), agent("test", "main")].into_iter())));
        let labels =
            "{process=\"tunnel\",workspace_name=\"dev\",agent_name=\"main\",connection_type=\"derp\"}";
        for line in [
            format!("warren_agent_ping_latency_seconds{labels} 0.005"),
            format!("warren_agent_receive_bytes_total{labels} 7"),
            format!("warren_agent_transmit_bytes_total{labels} 8"),
            "warren_agents_left_out{process=\"tunnel\"} 0".to_owned(),
        ] {
            assert!(text.contains(&line), "{line} is missing:\n{text}");
        }
        assert!(!text.contains("handshake_timestamp_seconds{"), "never is no time");
    }

    #[test]
    fn too_many_agents_and_names_that_are_alike_are_left_out_and_counted() {
        let names: Vec<String> = (0..MAX_AGENTS + 3).map(|number| format!("w{number}")).collect();
        let text = render(names.iter().map(|name| agent(name, "a")));
        assert!(text.ends_with("warren_agents_left_out{process=\"tunnel\"} 3\n"), "{text}");
        let text = render([agent("a b", "x"), agent("a\"b", "x")].into_iter());
        assert!(text.contains("workspace_name=\"a_b\"") && text.ends_with("} 1\n"), "{text}");
    }
}
