//! Setting an interface by rtnetlink: MTU, up, one address, its routes. What is there already stays, what
//! we set earlier and is no longer wanted goes, and what belongs to others is named and left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use futures::TryStreamExt;
use rtnetlink::{
    Error, Handle, IpVersion, LinkUnspec, RouteMessageBuilder, new_connection,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage},
        link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType},
        rule::{RuleAttribute, RuleMessage},
    },
};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use warren_actors::facts::InterfaceConfig;
use warren_proto::address::{CODER_PREFIX, is_coder};

use super::footprint::{FOREIGN_DEVICE, FOREIGN_RULES, Family, Trace};

/// How long the kernel may take for all of it: a few milliseconds, unless something holds its routing lock.
/// Below what a supervisor waits for an answer.
const LIMIT: Duration = Duration::from_secs(2);

/// The table of the machine's own addresses.
const LOCAL_TABLE: u32 = libc::RT_TABLE_LOCAL as u32;
const MAIN_TABLE: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// Our own address is one address.
const ADDRESS_BITS: u8 = 128;

/// Why an interface is not as it should be, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel cannot be spoken to.
    #[error("cannot open a netlink socket: {0}")]
    Connect(#[from] io::Error),
    /// There is no such interface.
    #[error("the interface {0} is gone; start the tunnel again")]
    NoInterface(String),
    /// We may not change it.
    #[error("not permitted to {action}: run with CAP_NET_ADMIN, as root or by the systemd unit")]
    Permission {
        /// What was tried.
        action: &'static str,
    },
    /// The kernel does no IPv6 there.
    #[error("IPv6 is switched off on {0}: allow it (sudo sysctl net.ipv6.conf.all.disable_ipv6=0)")]
    NoIpv6(String),
    /// Somebody else routes these addresses.
    #[error(
        "{destination}/{bits} is routed to the interface {interface} already, perhaps by another Coder client: stop it, \
         then try again"
    )]
    Conflict {
        /// What is routed.
        destination: Ipv6Addr,
        /// Length of its prefix.
        bits: u8,
        /// Where to.
        interface: String,
    },
    /// The kernel refused.
    #[error("cannot {action}: {error}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        error: Error,
    },
    /// The kernel did not answer.
    #[error(
        "the kernel did not set the interface within {0:?}; is its network being changed by something else?"
    )]
    Deadline(Duration),
}

/// Makes the interface `name` look like `config`. Doing it again changes nothing.
pub async fn apply(name: &str, config: &InterfaceConfig) -> Result<(), NetlinkError> {
    let (connection, handle, _messages) = new_connection()?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let set = async {
        let interface = Interface::find(handle, name).await?;
        let routes = interface.routes().await?;
        interface.find_conflict(&routes).await?;
        interface.set_link(config.mtu).await?;
        interface.set_address(config.address).await?;
        interface.set_routes(&config.routes, &routes).await
    };
    timeout(LIMIT, set).await.unwrap_or(Err(NetlinkError::Deadline(LIMIT)))
}

/// The interfaces, routes and policy rules that a tunnel of another make may have put on this host.
pub(super) async fn traces() -> Result<BTreeSet<Trace>, NetlinkError> {
    let (connection, handle, _messages) = new_connection()?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    timeout(LIMIT, look_for_traces(&handle)).await.unwrap_or(Err(NetlinkError::Deadline(LIMIT)))
}

async fn look_for_traces(handle: &Handle) -> Result<BTreeSet<Trace>, NetlinkError> {
    let refused = |action| move |error| NetlinkError::Refused { action, error };
    let links = handle.link().get().execute().try_collect::<Vec<_>>().await;
    let names: BTreeMap<u32, String> = links
        .map_err(refused("list interfaces"))?
        .iter()
        .filter_map(|link| Some((link.header.index, name(link)?)))
        .collect();
    let addresses = handle.address().get().execute().try_collect::<Vec<_>>().await;
    let addresses = addresses.map_err(refused("list addresses"))?;
    let addressed =
        addresses.iter().filter(|it| own_address(it).is_some()).filter_map(|it| names.get(&it.header.index));
    let foreign = names.values().filter(|name| name.as_str() == FOREIGN_DEVICE);
    let mut traces: BTreeSet<_> = addressed.chain(foreign).cloned().map(Trace::Interface).collect();
    let routes = handle.route().get(RouteMessageBuilder::<Ipv6Addr>::new().build()).execute();
    let routes = routes.try_collect::<Vec<_>>().await.map_err(refused("list routes"))?;
    traces.extend(routes.into_iter().filter_map(Route::of).filter(|route| !route.is_kernels).map(|route| {
        Trace::Route {
            destination: route.destination,
            bits: route.bits,
            table: route.table,
            interface: route.interface.and_then(|index| names.get(&index).cloned()),
        }
    }));
    for (family, version) in [(Family::V4, IpVersion::V4), (Family::V6, IpVersion::V6)] {
        let rules = handle.rule().get(version).execute().try_collect::<Vec<_>>().await;
        let rules = rules.map_err(refused("list policy rules"))?;
        let priorities = rules.iter().filter_map(priority).filter(|it| FOREIGN_RULES.contains(it));
        traces.extend(priorities.map(|priority| Trace::Rule { family, priority }));
    }
    Ok(traces)
}

fn name(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn priority(rule: &RuleMessage) -> Option<u32> {
    rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    })
}

struct Interface<'a> {
    handle: Handle,
    name: &'a str,
    index: u32,
}

/// What matters of a route inside the Coder prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Route {
    destination: Ipv6Addr,
    bits: u8,
    interface: Option<u32>,
    table: u32,
    is_kernels: bool,
    message: RouteMessage,
}

impl<'a> Interface<'a> {
    async fn find(handle: Handle, name: &'a str) -> Result<Self, NetlinkError> {
        let mut links = handle.link().get().match_name(name).execute();
        let gone = || NetlinkError::NoInterface(name.to_owned());
        let link = match links.try_next().await {
            Ok(link) => link.ok_or_else(gone)?,
            Err(error) if errno(&error) == Some(libc::ENODEV) => return Err(gone()),
            Err(error) => return Err(NetlinkError::Refused { action: "look for the interface", error }),
        };
        drop(links);
        Ok(Self { handle, name, index: link.header.index })
    }

    async fn set_link(&self, mtu: u32) -> Result<(), NetlinkError> {
        // Without this the kernel invents a link-local address and talks to routers that nobody will find.
        let no_link_local = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let quiet = LinkUnspec::new_with_index(self.index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![no_link_local]))
            .build();
        if let Err(error) = self.handle.link().change(quiet).execute().await {
            tracing::debug!(device = self.name, %error, "the interface keeps its link-local address");
        }
        let message = LinkUnspec::new_with_index(self.index).mtu(mtu).up().build();
        let changed = self.handle.link().change(message).execute().await;
        changed.map_err(|error| self.refused("set the interface's MTU and bring it up", error))
    }

    async fn set_address(&self, address: Ipv6Addr) -> Result<(), NetlinkError> {
        let present = self.handle.address().get().set_link_index_filter(self.index).execute();
        let present: Vec<_> =
            present.try_collect().await.map_err(|error| self.refused("list addresses", error))?;
        let mut is_set = false;
        for message in present {
            match own_address(&message) {
                Some(own) if own == address && message.header.prefix_len == ADDRESS_BITS => is_set = true,
                Some(_) => {
                    let removed = self.handle.address().del(message).execute().await;
                    removed.map_err(|error| self.refused("remove the old address", error))?;
                }
                None => {}
            }
        }
        if is_set {
            return Ok(());
        }
        let mut request = self.handle.address().add(self.index, IpAddr::V6(address), ADDRESS_BITS);
        // Nobody else can have it, and nobody could tell us.
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        let added = request.replace().execute().await;
        added.map_err(|error| self.refused("set the address", error))
    }

    async fn set_routes(&self, wanted: &[(Ipv6Addr, u8)], present: &[Route]) -> Result<(), NetlinkError> {
        let is_ours = |route: &&Route| route.interface == Some(self.index) && route.table == MAIN_TABLE;
        let ours: Vec<_> = present.iter().filter(is_ours).collect();
        let is_wanted = |route: &Route| wanted.contains(&(route.destination, route.bits));
        for stale in ours.iter().filter(|route| !route.is_kernels && !is_wanted(route)) {
            let removed = self.handle.route().del(stale.message.clone()).execute().await;
            removed.map_err(|error| self.refused("remove an old route", error))?;
        }
        for &(destination, bits) in wanted {
            if ours.iter().any(|route| (route.destination, route.bits) == (destination, bits)) {
                continue;
            }
            let route = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(destination, bits)
                .output_interface(self.index)
                .build();
            let added = self.handle.route().add(route).execute().await;
            added.map_err(|error| self.refused("set a route", error))?;
        }
        Ok(())
    }

    /// The routes inside the Coder prefix, whoever they belong to.
    async fn routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let all = self.handle.route().get(RouteMessageBuilder::<Ipv6Addr>::new().build()).execute();
        let routes = all.try_filter_map(|message| futures::future::ready(Ok(Route::of(message))));
        routes.try_collect().await.map_err(|error| self.refused("list routes", error))
    }

    async fn find_conflict(&self, routes: &[Route]) -> Result<(), NetlinkError> {
        let Some(foreign) = conflict(routes, self.index) else { return Ok(()) };
        let interface = match foreign.interface {
            Some(index) => self.name_of(index).await.unwrap_or_else(|| format!("number {index}")),
            None => "of somebody else".to_owned(),
        };
        Err(NetlinkError::Conflict { destination: foreign.destination, bits: foreign.bits, interface })
    }

    async fn name_of(&self, index: u32) -> Option<String> {
        name(&self.handle.link().get().match_index(index).execute().try_next().await.ok()??)
    }

    fn refused(&self, action: &'static str, error: Error) -> NetlinkError {
        match errno(&error) {
            Some(libc::EPERM) => NetlinkError::Permission { action },
            Some(libc::EACCES) => NetlinkError::NoIpv6(self.name.to_owned()),
            Some(libc::ENODEV) => NetlinkError::NoInterface(self.name.to_owned()),
            _ => NetlinkError::Refused { action, error },
        }
    }
}

/// The first route that takes packets of the Coder prefix elsewhere.
fn conflict(routes: &[Route], index: u32) -> Option<&Route> {
    routes.iter().find(|route| route.interface != Some(index))
}

impl Route {
    /// `None` for what is outside of the prefix, and for what the kernel keeps beside each address.
    fn of(message: RouteMessage) -> Option<Self> {
        let kind = message.header.kind;
        if matches!(kind, RouteType::Local | RouteType::Anycast | RouteType::Multicast | RouteType::Broadcast)
        {
            return None;
        }
        let bits = message.header.destination_prefix_length;
        let destination = message.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(*address),
            _ => None,
        });
        let destination =
            destination.filter(|destination| is_coder(destination) && bits >= CODER_PREFIX.bits())?;
        let number = |wanted: fn(&RouteAttribute) -> Option<u32>| message.attributes.iter().find_map(wanted);
        let interface = number(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        let table = number(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
        let table = table.unwrap_or_else(|| u32::from(message.header.table));
        let is_kernels = message.header.protocol == RouteProtocol::Kernel;
        (table != LOCAL_TABLE).then_some(Self { destination, bits, interface, table, is_kernels, message })
    }
}

/// The address inside the Coder prefix that a message is about.
fn own_address(message: &AddressMessage) -> Option<Ipv6Addr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(IpAddr::V6(address)) if is_coder(address) => Some(*address),
        _ => None,
    })
}

fn errno(error: &Error) -> Option<i32> {
    match error {
        Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{fs, io::Write, os::fd::OwnedFd, thread};

    use rtnetlink::packet_route::rule::RuleAction;
    use warren_actors::packet_io::tun::Tun;

    use super::*;

    fn prefix() -> (Ipv6Addr, u8) {
        ("fd60:627a:a42b::".parse().unwrap(), 48)
    }

    fn config(address: &str, mtu: u32) -> InterfaceConfig {
        InterfaceConfig { address: address.parse().unwrap(), routes: vec![prefix()], mtu }
    }

    fn route(destination: &str, bits: u8, interface: u32) -> RouteMessage {
        RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(destination.parse().unwrap(), bits)
            .output_interface(interface)
            .build()
    }

    #[test]
    fn only_routes_into_the_prefix_by_another_interface_are_conflicts() {
        let conflicts = |message| conflict(&Vec::from_iter(Route::of(message)), 7).is_some();
        assert!(conflicts(route("fd60:627a:a42b::", 48, 8)));
        assert!(conflicts(route("fd60:627a:a42b:1::1", 128, 8)));
        assert!(!conflicts(route("fd60:627a:a42b::", 48, 7)));
        assert!(!conflicts(route("fd60:627a::", 32, 8)));
        assert!(!conflicts(route("fd7a:115c:a1e0::", 48, 8)));
        let mut local = route("fd60:627a:a42b::1", 128, 8);
        local.header.kind = RouteType::Local;
        assert!(!conflicts(local));
    }

    #[tokio::test]
    async fn an_interface_that_is_gone_is_named() {
        let error = apply("warren-gone", &config("fd60:627a:a42b::1", 1280)).await.unwrap_err();
        assert!(error.to_string().contains("warren-gone is gone"), "{error}");
    }

    /// Says past the harness's capture that something was not tested.
    fn skipped(what: &str) {
        let line =
            format!("\nSKIPPED {what}: a network namespace of its own or a device is not permitted here\n");
        let err = fs::OpenOptions::new().append(true).open("/dev/stderr");
        let _ = err.and_then(|mut err| err.write_all(line.as_bytes()));
    }

    /// Runs `test` on a thread in a network namespace of its own, with devices of these names.
    pub(in crate::host) fn in_namespace<const N: usize, F: Future<Output = ()>>(
        what: &'static str,
        names: [&'static str; N],
        test: impl FnOnce([OwnedFd; N]) -> F + Send + 'static,
    ) {
        let outcome = thread::spawn(move || {
            // SAFETY: unshare changes only this thread, which runs the test and ends.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return skipped(what);
            }
            let made: Result<Vec<_>, _> = names.into_iter().map(Tun::create).collect();
            let Ok(devices) = made else { return skipped(what) };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test(devices.try_into().unwrap()));
        });
        outcome.join().unwrap();
    }

    /// Removes an interface, as a person would with `ip link delete`.
    pub(in crate::host) async fn remove(name: &str) {
        let (connection, handle, _messages) = new_connection().unwrap();
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let interface = Interface::find(handle, name).await.unwrap();
        interface.handle.link().del(interface.index).execute().await.unwrap();
    }

    /// Adds a policy rule, as a tunnel of another make does.
    pub(in crate::host) async fn add_rule(version: IpVersion, priority: u32) {
        let (connection, handle, _messages) = new_connection().unwrap();
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let rule = handle.rule().add().table_id(52).priority(priority).action(RuleAction::ToTable);
        match version {
            IpVersion::V4 => rule.v4().execute().await.unwrap(),
            IpVersion::V6 => rule.v6().execute().await.unwrap(),
        }
    }

    /// The interface's addresses and routes inside the prefix, its MTU, and whether it is up.
    async fn look(name: &str) -> (Vec<Ipv6Addr>, Vec<(Ipv6Addr, u8)>, u32) {
        let (connection, handle, _messages) = new_connection().unwrap();
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let link = handle.link().get().match_name(name).execute().try_next().await.unwrap().unwrap();
        let mtu = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
        let interface = Interface::find(handle, name).await.unwrap();
        let addresses = interface.handle.address().get().set_link_index_filter(interface.index).execute();
        let addresses: Vec<_> = addresses.try_collect().await.unwrap();
        let routes = interface.routes().await.unwrap();
        let routes = routes.iter().filter(|route| !route.is_kernels).map(|it| (it.destination, it.bits));
        (addresses.iter().filter_map(own_address).collect(), routes.collect(), mtu.unwrap())
    }

    #[test]
    fn an_interface_is_set_again_and_otherwise_and_keeps_nothing_of_before() {
        let what = "an_interface_is_set_again_and_otherwise_and_keeps_nothing_of_before";
        in_namespace(what, ["warren-t"], async |_device| {
            let (first, second) = ("fd60:627a:a42b::1", "fd60:627a:a42b:9::2");
            for (address, mtu) in [(first, 1280), (first, 1280), (second, 1400)] {
                apply("warren-t", &config(address, mtu)).await.unwrap();
                let expected = (vec![address.parse().unwrap()], vec![prefix()], mtu);
                assert_eq!(look("warren-t").await, expected);
            }
            let narrow = InterfaceConfig {
                routes: vec![("fd60:627a:a42b:7::".parse().unwrap(), 64)],
                ..config(second, 1280)
            };
            apply("warren-t", &narrow).await.unwrap();
            assert_eq!(look("warren-t").await.1, narrow.routes);
        });
    }

    #[test]
    fn another_owner_of_the_prefix_is_named_and_left_alone() {
        let what = "another_owner_of_the_prefix_is_named_and_left_alone";
        in_namespace(what, ["other0", "warren-t"], async |_devices| {
            apply("other0", &config("fd60:627a:a42b::1", 1280)).await.unwrap();
            let error = apply("warren-t", &config("fd60:627a:a42b::2", 1280)).await.unwrap_err();
            assert!(error.to_string().contains("other0"), "{error}");
            assert_eq!(look("other0").await.1, [prefix()]);
            assert!(look("warren-t").await.0.is_empty());
        });
    }

    #[test]
    fn what_was_set_vanishes_with_the_device() {
        in_namespace("what_was_set_vanishes_with_the_device", ["warren-t"], async |device| {
            apply("warren-t", &config("fd60:627a:a42b::1", 1280)).await.unwrap();
            drop(device);
            let error = apply("warren-t", &config("fd60:627a:a42b::1", 1280)).await.unwrap_err();
            assert!(matches!(error, NetlinkError::NoInterface(_)), "{error}");
        });
    }
}
