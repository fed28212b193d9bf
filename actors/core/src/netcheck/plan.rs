//! Whom a run asks by STUN, and when (tailnet-data 8.2). Everybody at once in a full run; otherwise the three
//! nearest, with repetitions that an answer makes needless.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use super::{Families, Family, Report};
use crate::{
    network::is_inner,
    relay_map::{Node, NodeAddress, Region, RegionId, RelayMap},
};

/// Regions that a full run asks; deployments have about six.
const MAX_REGIONS: usize = 32;
/// Regions that an incremental run asks.
const NEAREST: usize = 3;
/// How often a full run asks a region in each family.
const FULL_TRIES: u32 = 3;
/// How often an incremental run asks the home, which must not be lost for a lost packet.
const HOME_TRIES: u32 = 4;
/// The most questions that a run asks.
pub const MAX_PROBES: usize = MAX_REGIONS * 2 * FULL_TRIES as usize;
const _: () = assert!(MAX_PROBES >= NEAREST * 2 * HOME_TRIES as usize);

/// The pause before a question is repeated, as a multiple of what an answer took before.
const PATIENCE_FACTOR: f64 = 1.2;
const USUAL_PAUSE: Duration = Duration::from_millis(200);
/// By how much later repetitions wait longer.
const LATER_PAUSE: Duration = Duration::from_millis(50);

/// How many are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Every region.
    Full,
    /// The nearest.
    Incremental,
}

/// What earlier runs say about whom to ask.
#[derive(Debug, Clone, Copy)]
pub(super) struct Past<'a> {
    /// The last run's report.
    pub(super) report: Option<&'a Report>,
    /// The home region.
    pub(super) home: Option<RegionId>,
    /// How many runs in a row nobody answered by UDP: others are asked then.
    pub(super) unanswered: usize,
    /// Counts runs.
    pub(super) turn: u64,
}

/// A server to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StunTarget {
    /// Its region.
    pub region: RegionId,
    /// By which IP version it is to be asked.
    pub family: Family,
    /// Where it is.
    pub host: StunHost,
    /// Its UDP port.
    pub port: u16,
}

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StunHost {
    /// At this address, of the family that is wanted.
    Address(IpAddr),
    /// Where this name resolves to in the family that is wanted.
    Name(String),
}

/// A question that is planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Probe {
    /// How long after the run's begin.
    pub(super) after: Duration,
    /// Whom to ask.
    pub(super) to: StunTarget,
}

/// The questions of a run, in their order; at most [`MAX_PROBES`].
pub(super) fn probes(kind: Kind, map: &RelayMap, families: Families, past: &Past<'_>) -> Vec<Probe> {
    let mut probes: Vec<Probe> = match kind {
        Kind::Full => full(map, families, past),
        Kind::Incremental => incremental(map, families, past),
    };
    probes.sort_by_key(|probe| probe.after);
    probes
}

fn full(map: &RelayMap, families: Families, past: &Past<'_>) -> Vec<Probe> {
    let usable = by_distance(map, past).into_iter().filter(|region| is_usable(region, families));
    let ask = |region| {
        let ask = move |family| tries(region, family, FULL_TRIES, |_| Duration::ZERO);
        [Family::V4, Family::V6].into_iter().filter(move |family| families.has(*family)).flat_map(ask)
    };
    usable.take(MAX_REGIONS).flat_map(ask).collect()
}

fn incremental(map: &RelayMap, families: Families, past: &Past<'_>) -> Vec<Probe> {
    let may_be_asked = |region: &&Region| !region.avoid && is_usable(region, families);
    let nearest = by_distance(map, past).into_iter().filter(may_be_asked).take(NEAREST);
    let ask = |(rank, region): (usize, &Region)| {
        let pause = past.latency(region.id).map_or(USUAL_PAUSE, |latency| latency.mul_f64(PATIENCE_FACTOR));
        let after = |attempt: u32| {
            let later = if attempt > 1 { attempt * LATER_PAUSE } else { Duration::ZERO };
            attempt * pause + later
        };
        let asked = past.families_of(rank, families).into_iter();
        let ask = |family| tries(region, family, past.tries(rank, region.id, family), after);
        asked.flat_map(ask).collect::<Vec<_>>()
    };
    nearest.enumerate().flat_map(ask).collect()
}

/// So many questions to the region's servers in turn.
fn tries(region: &Region, family: Family, count: u32, after: impl Fn(u32) -> Duration) -> Vec<Probe> {
    let servers: Vec<StunTarget> =
        region.nodes.iter().filter_map(|node| target(region.id, node, family)).collect();
    let probe = |(attempt, to): (u32, &StunTarget)| Probe { after: after(attempt), to: to.clone() };
    (0..count).zip(servers.iter().cycle()).map(probe).collect()
}

impl Past<'_> {
    fn latency(&self, region: RegionId) -> Option<Duration> {
        self.report?.latencies.get(&region)?.best()
    }

    fn had(&self, family: Family) -> bool {
        self.report.is_some_and(|report| match family {
            Family::V4 => report.has_ipv4(),
            Family::V6 => report.has_ipv6(),
        })
    }

    /// Both for the two nearest. The third is asked in one only: in turns where both work, else in the one
    /// that is likelier to.
    fn families_of(&self, rank: usize, families: Families) -> Vec<Family> {
        let [v4, v6] = [Family::V4, Family::V6].map(|family| families.has(family).then_some(family));
        if rank + 1 < NEAREST {
            return v4.into_iter().chain(v6).collect();
        }
        let do_both_work = self.had(Family::V4) && self.had(Family::V6);
        let is_turn_of_v6 = do_both_work && self.turn.is_multiple_of(2);
        let (first, second) = if is_turn_of_v6 { (v6, v4) } else { (v4, v6) };
        first.or(second).into_iter().collect()
    }

    /// IPv6 is asked again only where it worked last time.
    fn tries(&self, rank: usize, region: RegionId, family: Family) -> u32 {
        match rank {
            _ if family == Family::V6 && !self.had(Family::V6) => 1,
            _ if self.home == Some(region) => HOME_TRIES,
            0 | 1 => 2,
            _ => 1,
        }
    }
}

/// The regions, nearest first. Those of unknown distance come last, in the order of their numbers; where
/// nobody answered, others come first among them the next time.
fn by_distance<'a>(map: &'a RelayMap, past: &Past<'_>) -> Vec<&'a Region> {
    let (mut known, mut unknown): (Vec<&Region>, Vec<&Region>) =
        map.regions.values().partition(|region| past.latency(region.id).is_some());
    known.sort_by_key(|region| past.latency(region.id));
    let turned = (past.unanswered * NEAREST).checked_rem(unknown.len()).unwrap_or_default();
    unknown.rotate_left(turned);
    known.append(&mut unknown);
    known
}

fn is_usable(region: &Region, families: Families) -> bool {
    let has_server = |family| {
        families.has(family) && region.nodes.iter().any(|node| target(region.id, node, family).is_some())
    };
    has_server(Family::V4) || has_server(Family::V6)
}

fn target(region: RegionId, node: &Node, family: Family) -> Option<StunTarget> {
    Some(StunTarget { region, family, host: host(node, family)?, port: node.stun_port? })
}

fn host(node: &Node, family: Family) -> Option<StunHost> {
    if let Some(address) = node.stun_test_ip {
        return at(address, family);
    }
    match family {
        Family::V4 => match node.ipv4 {
            NodeAddress::Fixed(address) => at(address.into(), family),
            NodeAddress::Disabled => None,
            NodeAddress::Resolve => by_name(&node.host_name, family),
        },
        Family::V6 => match node.ipv6 {
            NodeAddress::Fixed(address) => at(address.into(), family),
            NodeAddress::Disabled => None,
            NodeAddress::Resolve => by_name(&node.host_name, family),
        },
    }
}

/// A name that is an address has only that one.
fn by_name(name: &str, family: Family) -> Option<StunHost> {
    match name.parse::<IpAddr>() {
        Ok(address) => at(address, family),
        Err(_) => (!name.is_empty()).then(|| StunHost::Name(name.to_owned())),
    }
}

/// Whoever writes the map must not have us send to everybody around, nor into the tunnel.
fn at(address: IpAddr, family: Family) -> Option<StunHost> {
    let is_one_machine = !address.is_unspecified()
        && !address.is_multicast()
        && address != IpAddr::V4(Ipv4Addr::BROADCAST)
        && address == address.to_canonical()
        && !is_inner(address);
    (is_one_machine && Family::of(address) == family).then_some(StunHost::Address(address))
}
