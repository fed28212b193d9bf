//! From what a person calls an agent to the agent.

use std::net::Ipv6Addr;

use uuid::Uuid;
use warren_proto::vpn;

use crate::facts::Peers;

/// Names that are listed where none fits, or several do.
const SUGGESTIONS: usize = 5;

/// The agent that is called so: `workspace.agent`, `agent.workspace`, a host name with or without its last
/// dot, an address or an id, in any case. The error is in words for a person.
pub(super) fn resolve(peers: &Peers, called: &str) -> Result<Uuid, String> {
    let called = called.trim().trim_end_matches('.').to_lowercase();
    let mut found: Vec<(Uuid, String)> = Vec::new();
    let mut others = Vec::new();
    for agent in peers.agents() {
        let (Ok(id), name) = (Uuid::from_slice(&agent.id), name(peers, agent)) else { continue };
        if is_called(peers, agent, &id, &called) {
            found.push((id, name));
        } else {
            others.push(name);
        }
    }
    match found.as_slice() {
        [(id, _)] => Ok(*id),
        [] => Err(unknown(&called, others)),
        several => {
            let names: Vec<&str> = several.iter().take(SUGGESTIONS).map(|(_, name)| name.as_str()).collect();
            Err(format!("{called:?} may be any of {}; use an address", names.join(", ")))
        }
    }
}

fn name(peers: &Peers, agent: &vpn::Agent) -> String {
    match peers.workspace(&agent.workspace_id) {
        Some(workspace) => format!("{}.{}", workspace.name, agent.name),
        None => agent.name.clone(),
    }
}

fn is_called(peers: &Peers, agent: &vpn::Agent, id: &Uuid, called: &str) -> bool {
    let address = called.parse::<Ipv6Addr>().ok();
    let by_name = peers.workspace(&agent.workspace_id).is_some_and(|workspace| {
        let (workspace, agent) = (workspace.name.to_lowercase(), agent.name.to_lowercase());
        called == format!("{workspace}.{agent}") || called == format!("{agent}.{workspace}")
    });
    by_name
        || agent.fqdn.iter().any(|fqdn| fqdn.trim_end_matches('.').eq_ignore_ascii_case(called))
        || agent.ip_addrs.iter().any(|held| address.is_some() && held.parse().ok() == address)
        || called.parse() == Ok(*id)
}

fn unknown(called: &str, mut others: Vec<String>) -> String {
    if others.is_empty() {
        return format!("there is no agent {called:?}: no workspace of yours is running");
    }
    // Those that share a part with what was typed come first.
    let shares =
        |name: &String| called.split('.').any(|part| !part.is_empty() && name.to_lowercase().contains(part));
    others.sort_by_key(|name| (!shares(name), name.clone()));
    let more = if others.len() > SUGGESTIONS { ", ..." } else { "" };
    others.truncate(SUGGESTIONS);
    format!("there is no agent {called:?}; there are {}{more}", others.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(agents: &[(&str, &str, u8)]) -> Peers {
        let mut peers = Peers::default();
        for (workspace, agent, number) in agents {
            let workspace_id = workspace.as_bytes().to_vec();
            let id = Uuid::from_bytes([*number; 16]);
            peers.apply(vpn::PeerUpdate {
                upserted_workspaces: vec![vpn::Workspace {
                    id: workspace_id.clone().into(),
                    name: (*workspace).into(),
                    ..Default::default()
                }],
                upserted_agents: vec![vpn::Agent {
                    id: id.as_bytes().to_vec().into(),
                    name: (*agent).into(),
                    workspace_id: workspace_id.into(),
                    fqdn: vec![format!("{agent}.{workspace}.me.coder.")],
                    ip_addrs: vec![format!("fd60:627a:a42b::{number}")],
                    ..Default::default()
                }],
                ..Default::default()
            });
        }
        peers
    }

    #[test]
    fn an_agent_answers_to_every_name_it_has() {
        let peers = peers(&[("Dev", "main", 1), ("test", "main", 2)]);
        let id = Uuid::from_bytes([1; 16]);
        for called in [
            "dev.main",
            "main.dev",
            "MAIN.Dev",
            "main.dev.me.coder",
            "main.dev.me.coder.",
            "fd60:627a:a42b::1",
            "fd60:627a:a42b:0::1",
            &id.to_string(),
        ] {
            assert_eq!(resolve(&peers, called), Ok(id), "{called}");
        }
    }

    #[test]
    fn an_unknown_name_lists_close_ones_first() {
        let peers = peers(&[("alpha", "main", 1), ("beta", "main", 2), ("dev", "side", 3)]);
        let error = resolve(&peers, "dev.main2").unwrap_err();
        assert_eq!(error, "there is no agent \"dev.main2\"; there are dev.side, alpha.main, beta.main");
        let many: Vec<_> = (0..9)
            .map(|number| ("dev", ["a", "b", "c", "d", "e", "f", "g", "h", "i"][number as usize], number))
            .collect();
        assert!(resolve(&self::peers(&many), "x").unwrap_err().ends_with(", ..."));
        assert!(resolve(&Peers::default(), "x").unwrap_err().contains("no workspace of yours is running"));
    }

    #[test]
    fn a_name_that_fits_two_is_refused() {
        let peers = peers(&[("a", "b", 1), ("b", "a", 2)]);
        assert!(resolve(&peers, "a.b").unwrap_err().contains("use an address"));
    }
}
