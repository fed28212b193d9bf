use rtnetlink::{
    LinkUnspec,
    packet_route::route::{RouteHeader, RouteScope},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use warren_core::network::{Change, is_inner};

use super::*;
use crate::apart::{Apart, is_apart};

/// Generous: a loaded machine is no failure.
const PATIENCE: Duration = Duration::from_secs(60);
/// The index of a network's loopback interface.
const LO: u32 = 1;
const ADDRESS: &str = "192.0.2.7";

#[tokio::test]
async fn this_machine_has_a_loopback_interface() {
    let network = list().await.unwrap();
    let loopback = network.interfaces.iter().find(|interface| interface.name == "lo");
    assert_eq!(loopback.unwrap().index, LO);
}

#[tokio::test]
async fn an_address_and_a_way_out_that_come_and_go_are_told() {
    if !is_apart(
        "interfaces::tests::an_address_and_a_way_out_that_come_and_go_are_told",
        Apart::InANetworkOfItsOwn,
    ) {
        return;
    }
    let (kernel, mut watcher) = (Kernel::connect(), Watcher::new().unwrap());
    let empty = timeout(PATIENCE, watcher.next()).await.unwrap().unwrap();
    assert_eq!((&empty.uplinks, addresses(&empty)), (&BTreeSet::new(), Vec::new()));

    kernel.up().await;
    kernel.add(ADDRESS).await;
    let addressed = told(&mut watcher, |network| addresses(network) == [ADDRESS]).await;
    assert_eq!(empty.change_to(&addressed), Some(Change::Minor));

    kernel.add_default_route().await;
    let routed = told(&mut watcher, |network| !network.uplinks.is_empty()).await;
    let uplink = Uplink {
        destination: Ipv4Addr::UNSPECIFIED.into(),
        gateway: None,
        interface: Some(LO),
        table: RouteHeader::RT_TABLE_MAIN.into(),
        metric: 0,
    };
    assert_eq!(routed.uplinks, [uplink].into());
    assert_eq!(addressed.change_to(&routed), Some(Change::Major));

    kernel.remove(ADDRESS).await;
    let lost = told(&mut watcher, |network| addresses(network).is_empty()).await;
    assert_eq!(routed.change_to(&lost), Some(Change::Major));
}

#[tokio::test]
async fn what_nobody_outside_sees_is_not_told_and_hides_nothing() {
    if !is_apart(
        "interfaces::tests::what_nobody_outside_sees_is_not_told_and_hides_nothing",
        Apart::InANetworkOfItsOwn,
    ) {
        return;
    }
    let (kernel, mut watcher) = (Kernel::connect(), Watcher::new().unwrap());
    timeout(PATIENCE, watcher.next()).await.unwrap().unwrap();
    kernel.up().await;
    kernel.add("127.0.0.9").await;
    kernel.add("fd60:627a:a42b::9").await;
    assert!(timeout(5 * QUIET, watcher.next()).await.is_err());
    kernel.add(ADDRESS).await;
    // A wait that is given up while there is something to look at loses nothing.
    match timeout(QUIET / 2, watcher.next()).await {
        Ok(early) => assert_eq!(addresses(&early.unwrap()), [ADDRESS]),
        Err(_) => drop(told(&mut watcher, |network| addresses(network) == [ADDRESS]).await),
    }
}

#[tokio::test]
async fn the_network_is_handed_over_at_first_and_after_each_change() {
    if !is_apart(
        "interfaces::tests::the_network_is_handed_over_at_first_and_after_each_change",
        Apart::InANetworkOfItsOwn,
    ) {
        return;
    }
    let kernel = Kernel::connect();
    let (sender, mut networks) = tokio::sync::mpsc::channel(1);
    let hand_over = move |network| {
        let sender = sender.clone();
        async move { sender.send(network).await.unwrap() }
    };
    let _watching = AbortOnDropHandle::new(tokio::spawn(watch(hand_over)));
    let first = timeout(PATIENCE, networks.recv()).await.unwrap().unwrap();
    assert!(addresses(&first).is_empty());
    kernel.up().await;
    kernel.add(ADDRESS).await;
    let second = timeout(PATIENCE, networks.recv()).await.unwrap().unwrap();
    assert_eq!(addresses(&second), [ADDRESS]);
}

#[tokio::test(start_paused = true)]
async fn a_network_that_cannot_be_watched_is_given_up_and_nothing_breaks() {
    if !is_apart(
        "interfaces::tests::a_network_that_cannot_be_watched_is_given_up_and_nothing_breaks",
        Apart::InAProcess,
    ) {
        return;
    }
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..limit }).unwrap();
    assert!(matches!(Watcher::new(), Err(InterfacesError::Socket(_))));
    watch(|_| async { panic!("there is nothing to hand over") }).await;
}

#[test]
fn after_some_failures_in_a_row_it_is_given_up() {
    let mut trouble = Trouble::new();
    for _ in 0..20 {
        assert!(trouble.pause(0.5).is_some_and(|pause| pause <= LEAST_PAUSE));
        trouble.is_over();
    }
    let pauses: Vec<Duration> = std::iter::from_fn(|| trouble.pause(0.0)).collect();
    assert_eq!(pauses.len(), MOST_FAILURES - 1);
    assert!(pauses.is_sorted() && pauses.iter().all(|pause| *pause <= MOST_PAUSE));
}

#[test]
fn routes_to_everywhere_and_to_half_of_it_are_ways_out_and_others_are_not() {
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let v4 = || RouteMessageBuilder::<Ipv4Addr>::new();
    let rows: [(&str, RouteMessage, &[&str]); 7] = [
        (
            "the default route",
            v4().gateway([192, 0, 2, 1].into()).output_interface(2).build(),
            &["0.0.0.0 192.0.2.1 2"],
        ),
        (
            "half of the world",
            v4().destination_prefix([128, 0, 0, 0].into(), 1).output_interface(7).build(),
            &["128.0.0.0 - 7"],
        ),
        (
            "IPv6",
            RouteMessageBuilder::<Ipv6Addr>::new()
                .gateway("fe80::1".parse().unwrap())
                .output_interface(2)
                .build(),
            &[":: fe80::1 2"],
        ),
        ("a part", v4().destination_prefix([10, 0, 0, 0].into(), 8).output_interface(2).build(), &[]),
        ("nowhere", v4().kind(RouteType::Unreachable).output_interface(1).build(), &[]),
        ("the machine's own", v4().table_id(LOCAL_TABLE).output_interface(1).build(), &[]),
        ("a cable that is not there", dead(v4().output_interface(2).build()), &[]),
    ];
    for (what, route, expected) in rows {
        let uplinks = uplinks_of(&route);
        assert!(uplinks.iter().all(|uplink| uplink.table == main), "{what}");
        assert_eq!(uplinks.iter().map(text).collect::<Vec<_>>(), expected, "{what}");
    }
}

#[test]
fn a_route_with_several_next_hops_is_several_ways_out() {
    let hop = |index, last| {
        let mut hop = RouteNextHop::default();
        hop.interface_index = index;
        hop.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet([192, 0, 2, last].into()))];
        hop
    };
    let mut route = RouteMessageBuilder::<Ipv4Addr>::new().build();
    route.attributes.push(RouteAttribute::MultiPath(vec![hop(2, 1), hop(3, 2)]));
    let uplinks: Vec<String> = uplinks_of(&route).iter().map(text).collect();
    assert_eq!(uplinks, ["0.0.0.0 192.0.2.1 2", "0.0.0.0 192.0.2.2 3"]);
}

#[test]
fn an_address_counts_once_it_is_ready_and_is_our_end() {
    let (own, other): (IpAddr, IpAddr) = (ADDRESS.parse().unwrap(), "192.0.2.8".parse().unwrap());
    let mut message = AddressMessage::default();
    message.attributes = vec![AddressAttribute::Address(own)];
    assert_eq!(ready_address(&message), Some(own));
    message.attributes = vec![AddressAttribute::Address(other), AddressAttribute::Local(own)];
    assert_eq!(ready_address(&message), Some(own));
    for flag in [AddressHeaderFlags::Tentative, AddressHeaderFlags::Dadfailed, AddressHeaderFlags::Deprecated]
    {
        message.header.flags = flag | AddressHeaderFlags::Permanent;
        assert_eq!(ready_address(&message), None, "{flag:?}");
    }
}

fn dead(mut route: RouteMessage) -> RouteMessage {
    route.header.flags = RouteFlags::Linkdown;
    route
}

fn text(uplink: &Uplink) -> String {
    let gateway = uplink.gateway.map_or("-".to_owned(), |gateway| gateway.to_string());
    format!("{} {gateway} {}", uplink.destination, uplink.interface.unwrap_or_default())
}

/// The addresses that somebody outside might see.
fn addresses(network: &Network) -> Vec<String> {
    let up = network.interfaces.iter().filter(|interface| interface.is_up);
    let all = up
        .flat_map(|interface| &interface.addresses)
        .filter(|address| !address.is_loopback() && !is_inner(**address));
    all.map(ToString::to_string).collect()
}

/// Waits until a network like this is told.
async fn told(watcher: &mut Watcher, is_it: impl Fn(&Network) -> bool) -> Arc<Network> {
    let wait = async {
        loop {
            let network = watcher.next().await.unwrap();
            if is_it(&network) {
                return network;
            }
        }
    };
    timeout(PATIENCE, wait).await.expect("the change is told")
}

/// Changes the network, as a person would with `ip`.
struct Kernel {
    handle: Handle,
    _connection: AbortOnDropHandle<()>,
}

impl Kernel {
    fn connect() -> Self {
        let (connection, handle, _messages) = new_connection().unwrap();
        Self { handle, _connection: AbortOnDropHandle::new(tokio::spawn(connection)) }
    }

    async fn up(&self) {
        let up = LinkUnspec::new_with_index(LO).up().build();
        self.handle.link().change(up).execute().await.unwrap();
    }

    async fn add(&self, address: &str) {
        let address: IpAddr = address.parse().unwrap();
        let bits = if address.is_ipv4() { 32 } else { 128 };
        self.handle.address().add(LO, address, bits).execute().await.unwrap();
    }

    async fn remove(&self, address: &str) {
        let all: Vec<_> = self.handle.address().get().execute().try_collect().await.unwrap();
        let address = address.parse().ok();
        let message = all.into_iter().find(|message| ready_address(message) == address).unwrap();
        self.handle.address().del(message).execute().await.unwrap();
    }

    async fn add_default_route(&self) {
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().scope(RouteScope::Link).output_interface(LO).build();
        self.handle.route().add(route).execute().await.unwrap();
    }
}
