//! The machine's network as the kernel tells it, and when it changes (tailnet-data 7.9). Needs no privilege.
//!
//! ```text
//! kernel ──notice──> Watcher ──quiet for 100 ms──> list ──differs?──> whoever follows
//! ```
//!
//! A notice only says that it is time to look: what it was about is not read, so that a storm of them costs one
//! look, and one that was lost costs nothing. What is handed over is the whole network. Who cannot look goes
//! without: the tunnel stays as it is, and [`watch`] says so.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, RouteMessageBuilder, new_connection,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
        link::{LinkAttribute, LinkFlags, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteType, RouteVia},
    },
};
use rustix::net::{
    AddressFamily as SocketFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink,
    recv, socket_with,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use warren_core::{
    backoff::Backoff,
    network::{Interface, Network, Uplink},
};

use crate::watched::watched;

/// What is told of: links, addresses and routes.
const GROUPS: u32 = (libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE) as u32;
/// How long the kernel must have been quiet: a move to another network is a dozen notices within
/// milliseconds.
const QUIET: Duration = Duration::from_millis(100);
/// A kernel that is never quiet is looked at so often.
const MOST_PATIENCE: Duration = Duration::from_millis(500);
/// How long a look may take: milliseconds, unless something holds the kernel's routing lock or there are
/// millions of routes.
const LIMIT: Duration = Duration::from_secs(2);
/// Default routes and addresses beyond these are not looked at: nobody has so many, and each costs memory.
const MAX_UPLINKS: usize = 64;
const MAX_INTERFACES: usize = 4096;
const MAX_ADDRESSES: usize = 4096;
/// A route of this prefix length leads to everything or to half of it.
const UPLINK_BITS: u8 = 1;
const LOCAL_TABLE: u32 = libc::RT_TABLE_LOCAL as u32;

/// Pauses between tries to watch, after a failure.
const LEAST_PAUSE: Duration = Duration::from_millis(500);
const MOST_PAUSE: Duration = Duration::from_secs(60);
/// Failures in a row after which nobody tries any more; some minutes.
const MOST_FAILURES: usize = 8;

/// Why the network cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InterfacesError {
    /// No socket to the kernel.
    #[error("cannot speak to the kernel by netlink (is AF_NETLINK allowed here?): {0}")]
    Socket(#[from] io::Error),
    /// The kernel does not say.
    #[error("the kernel does not list {what}: {error}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        error: rtnetlink::Error,
    },
    /// The kernel took too long.
    #[error("the kernel did not list the network within {0:?}")]
    Deadline(Duration),
}

/// The network as it is now.
pub async fn list() -> Result<Network, InterfacesError> {
    let (connection, handle, _messages) = new_connection()?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let look = async {
        let (interfaces, uplinks) = (interfaces(&handle).await?, uplinks(&handle).await?);
        Ok(Network { interfaces, uplinks })
    };
    timeout(LIMIT, look).await.unwrap_or(Err(InterfacesError::Deadline(LIMIT)))
}

/// Tells of changes of the network.
pub struct Watcher {
    notices: AsyncFd<OwnedFd>,
    /// Whether there was a notice since the last look.
    is_stale: bool,
    known: Option<Arc<Network>>,
}

impl Watcher {
    /// One that has told nothing yet.
    pub fn new() -> Result<Self, InterfacesError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(SocketFamily::NETLINK, SocketType::RAW, flags, None).map_err(io::Error::from)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS)).map_err(io::Error::from)?;
        let notices = watched(socket, Interest::READABLE)?;
        Ok(Self { notices, is_stale: true, known: None })
    }

    /// The network: at once for the first time, then each time that it became another. May be dropped and
    /// called again without losing a change.
    pub async fn next(&mut self) -> Result<Arc<Network>, InterfacesError> {
        loop {
            if !self.is_stale {
                self.notice().await?;
                self.is_stale = true;
                self.quiet().await?;
            }
            let network = list().await?;
            self.is_stale = false;
            let is_news = self.known.as_ref().is_none_or(|known| known.change_to(&network).is_some());
            let network = Arc::new(network);
            self.known = Some(Arc::clone(&network));
            if is_news {
                return Ok(network);
            }
        }
    }

    async fn quiet(&self) -> Result<(), InterfacesError> {
        let end = Instant::now() + MOST_PATIENCE;
        loop {
            tokio::select! {
                biased;
                () = sleep(QUIET) => return Ok(()),
                noticed = self.notice(), if Instant::now() < end => noticed?,
            }
        }
    }

    /// Waits for one notice and takes it.
    async fn notice(&self) -> Result<(), InterfacesError> {
        let take = |socket: &OwnedFd| match recv(socket, &mut [0_u8; 64], RecvFlags::empty()) {
            // There were more than the kernel keeps for us: the next look shows what they were about.
            Ok(_) | Err(rustix::io::Errno::NOBUFS) => Ok(()),
            Err(error) => Err(error.into()),
        };
        Ok(self.notices.async_io(Interest::READABLE, take).await?)
    }
}

/// Hands over the network now and after every change, for as long as it can be watched. Ends only when it
/// cannot: by then it has said so.
pub async fn watch<F: Future<Output = ()>>(hand_over: impl FnMut(Arc<Network>) -> F) {
    let mut hand_over = hand_over;
    let mut trouble = Trouble::new();
    loop {
        let Err(error) = follow(&mut trouble, &mut hand_over).await;
        let Some(pause) = trouble.pause(rand::random()) else {
            tracing::warn!(
                %error,
                "changes of the network are not noticed any more: direct paths will be slow to follow a move to another \
                 network; start the tunnel again once this is resolved"
            );
            return;
        };
        tracing::debug!(%error, ?pause, "the network cannot be watched for now");
        sleep(pause).await;
    }
}

async fn follow<F: Future<Output = ()>>(
    trouble: &mut Trouble,
    hand_over: &mut impl FnMut(Arc<Network>) -> F,
) -> Result<std::convert::Infallible, InterfacesError> {
    let mut watcher = Watcher::new()?;
    loop {
        let network = watcher.next().await?;
        trouble.is_over();
        hand_over(network).await;
    }
}

/// When to try again, and when no more.
struct Trouble {
    backoff: Backoff,
    failures: usize,
}

impl Trouble {
    fn new() -> Self {
        Self { backoff: Backoff::new(LEAST_PAUSE, MOST_PAUSE, 2.0, 0.2), failures: 0 }
    }

    fn pause(&mut self, random: f64) -> Option<Duration> {
        self.failures += 1;
        (self.failures < MOST_FAILURES).then(|| self.backoff.next(random))
    }

    fn is_over(&mut self) {
        self.failures = 0;
        self.backoff.reset();
    }
}

async fn interfaces(handle: &Handle) -> Result<Vec<Interface>, InterfacesError> {
    let links = handle.link().get().execute().take(MAX_INTERFACES).try_collect::<Vec<_>>().await;
    let links = links.map_err(|error| InterfacesError::Refused { what: "interfaces", error })?;
    let addresses = handle.address().get().execute().take(MAX_ADDRESSES).try_collect::<Vec<_>>().await;
    let addresses = addresses.map_err(|error| InterfacesError::Refused { what: "addresses", error })?;
    let mut of_index: BTreeMap<u32, BTreeSet<IpAddr>> = BTreeMap::new();
    for message in &addresses {
        if let Some(address) = ready_address(message) {
            of_index.entry(message.header.index).or_default().insert(address);
        }
    }
    let mut interfaces: Vec<Interface> = links
        .iter()
        .map(|link| interface(link, of_index.remove(&link.header.index).unwrap_or_default()))
        .collect();
    interfaces.sort_by_key(|interface| interface.index);
    Ok(interfaces)
}

fn interface(link: &LinkMessage, addresses: BTreeSet<IpAddr>) -> Interface {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    Interface {
        index: link.header.index,
        name: name.unwrap_or_default(),
        // Without a carrier an interface keeps its addresses, and nothing arrives there.
        is_up: link.header.flags.contains(LinkFlags::Up | LinkFlags::Running),
        addresses,
    }
}

/// The address, unless the kernel would not send from it yet or any more.
fn ready_address(message: &AddressMessage) -> Option<IpAddr> {
    let unready =
        AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed | AddressHeaderFlags::Deprecated;
    if message.header.flags.intersects(unready) {
        return None;
    }
    let (mut own, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => own = Some(*address),
            // Between two points this is the other end's.
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    own.or(other)
}

async fn uplinks(handle: &Handle) -> Result<BTreeSet<Uplink>, InterfacesError> {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut uplinks = BTreeSet::new();
    for request in [v4, v6] {
        let mut routes = Box::pin(handle.route().get(request).execute());
        while let Some(route) = routes.next().await {
            let route = route.map_err(|error| InterfacesError::Refused { what: "routes", error })?;
            uplinks.extend(uplinks_of(&route));
        }
    }
    while uplinks.len() > MAX_UPLINKS {
        uplinks.pop_last();
    }
    Ok(uplinks)
}

/// The ways out that a route is: one, or one each where it has several next hops; none for a route that leads
/// to a part of the world, or nowhere.
fn uplinks_of(route: &RouteMessage) -> Vec<Uplink> {
    let Some(mut uplink) = blank_uplink(route) else { return Vec::new() };
    let mut hops = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                uplink.destination = ip(address).unwrap_or(uplink.destination);
            }
            RouteAttribute::Oif(index) => uplink.interface = Some(*index),
            RouteAttribute::Table(table) => uplink.table = *table,
            RouteAttribute::Priority(metric) => uplink.metric = *metric,
            RouteAttribute::MultiPath(all) => hops.extend(all),
            other => uplink.gateway = gateway(other).or(uplink.gateway),
        }
    }
    if uplink.table == LOCAL_TABLE {
        return Vec::new();
    }
    let by_hop = |hop: &&RouteNextHop| Uplink {
        interface: Some(hop.interface_index),
        gateway: hop.attributes.iter().find_map(gateway),
        ..uplink.clone()
    };
    if hops.is_empty() { vec![uplink] } else { hops.iter().map(by_hop).collect() }
}

fn blank_uplink(route: &RouteMessage) -> Option<Uplink> {
    let header = &route.header;
    let is_dead = header.flags.intersects(RouteFlags::Dead | RouteFlags::Linkdown);
    let leads_out =
        header.kind == RouteType::Unicast && header.destination_prefix_length <= UPLINK_BITS && !is_dead;
    let destination = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    leads_out.then_some(Uplink {
        destination,
        gateway: None,
        interface: None,
        table: header.table.into(),
        metric: 0,
    })
}

fn gateway(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
