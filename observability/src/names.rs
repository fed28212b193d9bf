//! Every metric of warren: names, kinds, units, labels and help, once. What is not in [`FAMILIES`] is
//! neither described nor accepted from the other process.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// What kind of series a family holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; starts again at 0 with its process.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution, in seconds.
    Histogram,
}

/// One metric family.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// The name, with prefix and unit.
    pub name: &'static str,
    /// What kind of series it holds.
    pub kind: Kind,
    /// The base unit, where there is one.
    pub unit: Option<Unit>,
    /// The label names it may carry, besides `process`.
    pub labels: &'static [&'static str],
    /// One sentence for operators.
    pub help: &'static str,
}

macro_rules! families {
    ($( $(#[doc = $help:literal])+ $constant:ident = $name:literal, $kind:ident, $unit:expr, [$($label:literal),*]; )+) => {
        $( $(#[doc = $help])+ pub const $constant: &str = $name; )+

        /// Every family, in the order of the groups.
        pub const FAMILIES: &[Family] = &[
            $( Family {
                name: $name,
                kind: Kind::$kind,
                unit: $unit,
                labels: &[$($label),*],
                help: concat!($($help),+),
            }, )+
        ];
    };
}

const SECONDS: Option<Unit> = Some(Unit::Seconds);
const BYTES: Option<Unit> = Some(Unit::Bytes);

families! {
    /// The running program; always 1.
    BUILD_INFO = "warren_build_info", Gauge, None, ["version"];
    /// Whether the configuration was read without an error (1) or not (0).
    CONFIG_LAST_RELOAD_SUCCESSFUL = "warren_config_last_reload_successful", Gauge, None, [];
    /// Whether the tunnel process answered the last scrape (1) or its series are missing (0).
    TUNNEL_SCRAPE_SUCCESS = "warren_tunnel_scrape_success", Gauge, None, [];

    /// The tunnel's lifecycle: 1 for the present state, 0 for the others.
    TUNNEL_LIFECYCLE = "warren_tunnel_lifecycle", Gauge, None, ["state"];
    /// Restarts of the tunnel process, by reason.
    TUNNEL_RESTARTS = "warren_tunnel_restarts_total", Counter, None, ["reason"];
    /// Time a start of the tunnel took, by stage.
    TUNNEL_START_DURATION = "warren_tunnel_start_duration_seconds", Histogram, SECONDS, ["stage"];
    /// Whether restarts were given up until a person acts (1).
    TUNNEL_CIRCUIT_OPEN = "warren_tunnel_circuit_open", Gauge, None, [];

    /// Restarts of an actor by its supervisor, by reason.
    ACTOR_RESTARTS = "warren_actor_restarts_total", Counter, None, ["actor", "reason"];
    /// Messages that wait at an actor or are being handled.
    ACTOR_MAILBOX_DEPTH = "warren_actor_mailbox_depth", Gauge, None, ["actor"];
    /// Time an actor took to handle a message.
    ACTOR_HANDLE_DURATION = "warren_actor_handle_duration_seconds", Histogram, SECONDS, ["actor"];

    /// Requests handled or made, by leg (a, b, control), method and result.
    RPC_REQUESTS = "warren_rpc_requests_total", Counter, None, ["leg", "method", "result"];
    /// Time from a request to its response.
    RPC_DURATION = "warren_rpc_duration_seconds", Histogram, SECONDS, ["leg", "method"];
    /// Frames of the manager and client protocols, by message type.
    RPC_FRAMES = "warren_rpc_frames_total", Counter, None, ["leg", "direction", "type"];

    /// Whether the control connection is up (1).
    CONTROL_CONNECTED = "warren_control_connected", Gauge, None, [];
    /// Ends of the control connection, by reason.
    CONTROL_DISCONNECTS = "warren_control_disconnects_total", Counter, None, ["reason"];
    /// When the control plane last sent an update, in Unix time.
    CONTROL_LAST_UPDATE = "warren_control_last_update_timestamp_seconds", Gauge, SECONDS, [];
    /// Whether the deployment accepts the session token (1).
    AUTH_VALID = "warren_auth_valid", Gauge, None, [];

    /// Agents, by how the last ping reached them.
    PEERS = "warren_peers", Gauge, None, ["connection_type"];
    /// Workspaces, by status.
    WORKSPACES = "warren_workspaces", Gauge, None, ["status"];
    /// Round trip of answered pings.
    PING_DURATION = "warren_ping_duration_seconds", Histogram, SECONDS, ["connection_type"];
    /// Changes of the path by which pings reach an agent.
    PATH_CHANGES = "warren_path_changes_total", Counter, None, ["from", "to"];
    /// Pings, by result.
    PINGS = "warren_pings_total", Counter, None, ["result"];

    /// Latency of an agent's last answered ping (only with metrics_per_agent).
    AGENT_PING_LATENCY = "warren_agent_ping_latency_seconds", Gauge, SECONDS, ["workspace_name", "agent_name", "connection_type"];
    /// When WireGuard last completed a handshake with an agent, in Unix time (only with metrics_per_agent).
    AGENT_LAST_HANDSHAKE = "warren_agent_last_handshake_timestamp_seconds", Gauge, SECONDS, ["workspace_name", "agent_name", "connection_type"];
    /// Bytes of inner packets received from an agent (only with metrics_per_agent).
    AGENT_RECEIVE_BYTES = "warren_agent_receive_bytes_total", Counter, BYTES, ["workspace_name", "agent_name", "connection_type"];
    /// Bytes of inner packets sent to an agent (only with metrics_per_agent).
    AGENT_TRANSMIT_BYTES = "warren_agent_transmit_bytes_total", Counter, BYTES, ["workspace_name", "agent_name", "connection_type"];
    /// Agents without series of their own, because there are too many or their names are alike.
    AGENTS_LEFT_OUT = "warren_agents_left_out", Gauge, None, [];

    /// Bytes of inner packets received from peers.
    RECEIVE_BYTES = "warren_receive_bytes_total", Counter, BYTES, ["path"];
    /// Bytes of inner packets sent to peers.
    TRANSMIT_BYTES = "warren_transmit_bytes_total", Counter, BYTES, ["path"];
    /// Inner packets received from peers.
    RECEIVE_PACKETS = "warren_receive_packets_total", Counter, None, ["path"];
    /// Inner packets sent to peers.
    TRANSMIT_PACKETS = "warren_transmit_packets_total", Counter, None, ["path"];
    /// Packets given up, by direction and reason.
    DROPPED_PACKETS = "warren_dropped_packets_total", Counter, None, ["direction", "reason"];
    /// WireGuard handshakes, by result.
    WIREGUARD_HANDSHAKES = "warren_wireguard_handshakes_total", Counter, None, ["result"];

    /// Whether the relay link to a region is up (1).
    DERP_CONNECTED = "warren_derp_connected", Gauge, None, ["region"];
    /// Latency of a region's relay, as measured over HTTP.
    DERP_LATENCY = "warren_derp_latency_seconds", Gauge, SECONDS, ["region"];

    /// Whether direct paths are tried (1); not where the deployment forbids them or no UDP sockets could be had.
    DIRECT_ALLOWED = "warren_direct_allowed", Gauge, None, [];
    /// Direct paths found, exchanged and left, by reason; of single agents the log and the local API's events tell.
    DIRECT_PATH_CHANGES = "warren_direct_path_changes_total", Counter, None, ["reason"];
    /// Path probes to and from peers.
    DISCO_MESSAGES = "warren_disco_messages_total", Counter, None, ["direction", "type", "path"];
    /// When it was last looked how the world sees this machine, in Unix time.
    NETCHECK_LAST = "warren_netcheck_last_timestamp_seconds", Gauge, SECONDS, [];
    /// Whether UDP gets out and back (1), as last looked at; absent where nobody could be asked.
    NETCHECK_UDP = "warren_netcheck_udp", Gauge, None, [];
    /// Whether others see this machine at an address that depends on who they are (1): direct paths are hard to find then.
    NETCHECK_MAPPING_VARIES = "warren_netcheck_mapping_varies", Gauge, None, [];
    /// Times that this machine's network became another one.
    NETWORK_CHANGES = "warren_network_changes_total", Counter, None, [];
    /// Time from a change of the network, or from waking up, until packets (data) and the deployment (control) got
    /// through again.
    RESUME_RECOVERY = "warren_resume_recovery_seconds", Histogram, SECONDS, ["plane"];

    /// Log lines that were dropped because the manager reads too slowly.
    LOGS_DROPPED = "warren_logs_dropped_total", Counter, None, [];
}

/// Describes every family to the installed recorder.
pub fn describe_all() {
    for family in FAMILIES {
        let unit = family.unit.unwrap_or(Unit::Count);
        let help = family.help.trim();
        match family.kind {
            Kind::Counter => describe_counter!(family.name, unit, help),
            Kind::Gauge => describe_gauge!(family.name, unit, help),
            Kind::Histogram => describe_histogram!(family.name, unit, help),
        }
    }
}

/// The family called `name`, if it is one of ours.
pub fn family(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions_of_prometheus() {
        for family in FAMILIES {
            assert!(family.name.starts_with("warren_"), "{}", family.name);
            assert_eq!(family.kind == Kind::Counter, family.name.ends_with("_total"), "{}", family.name);
            let in_seconds = family.name.ends_with("_seconds");
            assert_eq!(family.unit == SECONDS, in_seconds, "{}", family.name);
            assert!(family.help.trim().ends_with('.'), "{}", family.name);
        }
    }

    #[test]
    fn no_family_is_listed_twice() {
        for (index, family) in FAMILIES.iter().enumerate() {
            assert!(
                FAMILIES.iter().skip(index + 1).all(|other| other.name != family.name),
                "{}",
                family.name
            );
        }
    }

    #[test]
    fn no_label_names_a_user_an_address_or_a_key() {
        const FORBIDDEN: &[&str] = &["user", "address", "key", "url", "error", "token"];
        let labels = FAMILIES.iter().flat_map(|family| family.labels);
        assert!(labels.clone().count() > 10);
        assert!(labels.into_iter().all(|label| !FORBIDDEN.contains(label)));
    }
}
