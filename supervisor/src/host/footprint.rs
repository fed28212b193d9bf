//! What a foreign tunnel leaves on the host (vpn-protocol 6.8, 13.3). It owns its network itself, and one that is
//! killed, or has a defect, leaves traces: an interface, routes, policy rules, a dead resolver. They are named, and
//! left alone: who else uses them, nobody can tell.
//!
//! What was there before the first foreign process is not its own: another client of the same make uses the
//! same rules.

use std::{collections::BTreeSet, fmt, io::Read, net::Ipv6Addr, path::PathBuf, sync::Arc};

use tokio::sync::Mutex;
use warren_proto::address::CODER_DNS;

use super::netlink;

/// What foreign tunnels call their interface.
pub(super) const FOREIGN_DEVICE: &str = "coder0";
/// The priorities of their policy rules.
pub(super) const FOREIGN_RULES: [u32; 4] = [5210, 5230, 5250, 5270];

/// Where programs look for resolvers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Far above any such file.
const MAX_RESOLV_CONF: u64 = 64 * 1024;

/// One thing on the host that a foreign tunnel puts there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trace {
    /// An interface of its name, or with an address of the Coder prefix.
    Interface(String),
    /// A route into the Coder prefix.
    Route {
        /// What is routed.
        destination: Ipv6Addr,
        /// Length of its prefix.
        bits: u8,
        /// In which table.
        table: u32,
        /// Where to, if that interface has a name.
        interface: Option<String>,
    },
    /// A policy rule of one of its priorities.
    Rule {
        /// For which packets.
        family: Family,
        /// The rule's place.
        priority: u32,
    },
    /// The file names the tunnel's resolver, which is gone with it.
    Resolver(PathBuf),
}

/// The packets that a policy rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl fmt::Display for Trace {
    /// What it is, and in parentheses how it is removed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(f, "the interface {name} (ip link delete {name})"),
            Self::Route { destination, bits, table, interface } => {
                let to = interface.as_ref().map_or_else(String::new, |name| format!(" to {name}"));
                write!(
                    f,
                    "the route {destination}/{bits}{to} (ip -6 route del {destination}/{bits} table {table})"
                )
            }
            Self::Rule { family: Family::V4, priority } => {
                write!(f, "the IPv4 policy rule {priority} (ip rule del priority {priority})")
            }
            Self::Rule { family: Family::V6, priority } => {
                write!(f, "the IPv6 policy rule {priority} (ip -6 rule del priority {priority})")
            }
            Self::Resolver(path) => {
                write!(f, "the resolver {CODER_DNS} in {} (put its last content back)", path.display())
            }
        }
    }
}

/// What is left, as one text for a person; `None` if nothing is.
pub fn words(left: &BTreeSet<Trace>) -> Option<String> {
    if left.is_empty() {
        return None;
    }
    let traces: Vec<_> = left.iter().map(ToString::to_string).collect();
    Some(format!(
        "the tunnel program has left on this machine: {}; remove what no other program uses, then `warren down` looks \
         again",
        traces.join(", ")
    ))
}

/// Looks at the host before and after foreign processes. Clones share what was seen before.
#[derive(Debug, Clone)]
pub struct Footprint {
    resolv_conf: PathBuf,
    before: Arc<Mutex<Option<BTreeSet<Trace>>>>,
}

impl Default for Footprint {
    fn default() -> Self {
        Self { resolv_conf: RESOLV_CONF.into(), before: Arc::default() }
    }
}

impl Footprint {
    /// Notes what is there before a foreign process is started. What an earlier one has left is not forgotten.
    pub async fn before(&self) {
        let mut before = self.before.lock().await;
        if before.is_none() {
            *before = self.look().await;
        }
    }

    /// What foreign processes have left, now that none runs.
    pub async fn left(&self) -> BTreeSet<Trace> {
        let mut before = self.before.lock().await;
        let Some(known) = before.as_ref() else { return BTreeSet::new() };
        let Some(now) = self.look().await else { return BTreeSet::new() };
        let left: BTreeSet<_> = now.difference(known).cloned().collect();
        if left.is_empty() {
            *before = None;
        }
        left
    }

    async fn look(&self) -> Option<BTreeSet<Trace>> {
        let traces = netlink::traces().await;
        let traces =
            traces.inspect_err(|error| tracing::warn!(%error, "nobody can tell what is left on this host"));
        let mut traces = traces.ok()?;
        if self.names_resolver() {
            traces.insert(Trace::Resolver(self.resolv_conf.clone()));
        }
        Some(traces)
    }

    fn names_resolver(&self) -> bool {
        let Ok(file) = std::fs::File::open(&self.resolv_conf) else { return false };
        let mut text = Vec::new();
        let read = file.take(MAX_RESOLV_CONF).read_to_end(&mut text);
        let names = |line: &str| {
            let mut words = line.split_whitespace();
            words.next() == Some("nameserver") && words.next().is_some_and(|it| it.parse() == Ok(CODER_DNS))
        };
        read.is_ok() && String::from_utf8_lossy(&text).lines().any(names)
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::IpVersion;
    use warren_actors::{facts::InterfaceConfig, packet_io::tun::Tun};

    use super::*;
    use crate::host::netlink::tests::{add_rule, in_namespace, remove};

    fn footprint(folder: &tempfile::TempDir) -> Footprint {
        Footprint { resolv_conf: folder.path().join("resolv.conf"), before: Arc::default() }
    }

    #[test]
    fn what_a_foreign_tunnel_leaves_is_named_and_what_was_there_before_is_not() {
        in_namespace(
            "what_a_foreign_tunnel_leaves_is_named_and_what_was_there_before_is_not",
            [],
            async |[]| {
                let folder = tempfile::tempdir().unwrap();
                let host = footprint(&folder);
                add_rule(IpVersion::V4, 5210).await;
                host.before().await;
                assert!(host.left().await.is_empty());

                host.before().await;
                let device = Tun::create(FOREIGN_DEVICE).unwrap();
                let address = "fd60:627a:a42b::1".parse().unwrap();
                let routes = vec![("fd60:627a:a42b::".parse().unwrap(), 48)];
                netlink::apply(FOREIGN_DEVICE, &InterfaceConfig { address, routes, mtu: 1280 })
                    .await
                    .unwrap();
                add_rule(IpVersion::V6, 5270).await;
                std::fs::write(&host.resolv_conf, "# x\nnameserver fd60:627a:a42b::53\n").unwrap();

                let text = words(&host.left().await).unwrap();
                for word in [
                    "the interface coder0 (ip link delete coder0)",
                    "fd60:627a:a42b::/48 to coder0",
                    "the IPv6 policy rule 5270 (ip -6 rule del priority 5270)",
                    "resolv.conf",
                ] {
                    assert!(text.contains(word), "{word} is missing in: {text}");
                }
                assert!(!text.contains("5210"), "{text}");

                remove(FOREIGN_DEVICE).await;
                drop(device);
                // A process that is started meanwhile does not make what is left its predecessor's own.
                host.before().await;
                let left = host.left().await;
                let rule = Trace::Rule { family: Family::V6, priority: 5270 };
                assert_eq!(left, [rule, Trace::Resolver(host.resolv_conf.clone())].into());
            },
        );
    }

    #[test]
    fn nothing_left_has_no_words() {
        assert_eq!(words(&BTreeSet::new()), None);
    }
}
