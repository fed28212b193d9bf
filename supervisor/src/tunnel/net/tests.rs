//! Nets that come and go with the `boot` cell.

use std::{
    os::{fd::AsRawFd, unix::net::UnixDatagram},
    sync::Arc,
};

use tokio::task::JoinHandle;
use warren_actors::{dial::DialOptions, udp::OwnSockets};

use super::*;

/// A Start of this generation, for a deployment that nobody serves.
pub(in super::super) fn boot(generation: u64, network: NetworkOwner) -> Arc<Boot> {
    Arc::new(Boot {
        generation,
        url: "http://127.0.0.1:9".parse().unwrap(),
        token: "fakeToken".into(),
        headers: Vec::new(),
        telemetry: None,
        network,
    })
}

/// Nothing but what this process can do by itself.
pub(in super::super) fn means() -> Means {
    Means { dialer: Arc::new(Dialer::new(DialOptions::default()).unwrap()), sockets: Arc::new(OwnSockets) }
}

struct Rig {
    tree: Tree,
    boot: CellWriter<Option<Arc<Boot>>>,
    net: Cell<Option<Arc<Net>>>,
    stop: CancellationToken,
    follower: JoinHandle<()>,
}

impl Rig {
    async fn new() -> Self {
        let (boots, net) = (Cell::new(None), Cell::new(None));
        let tree = Tree::start(SupervisorSpec::new("root", 3, Duration::from_secs(120))).await.unwrap();
        let stop = CancellationToken::new();
        let following = follow(tree.clone(), boots.view(), net.clone(), means(), stop.clone());
        Self { tree, boot: boots.claim().unwrap(), net, stop, follower: tokio::spawn(following) }
    }

    async fn start(&self, generation: u64, network: NetworkOwner) -> Arc<Net> {
        self.boot.set(Some(boot(generation, network)));
        let is_built =
            |net: &Option<Arc<Net>>| net.as_ref().is_some_and(|net| net.boot.generation == generation);
        self.net.view().wait_for(is_built).await.unwrap().as_ref().clone().unwrap()
    }

    async fn gone(&self) {
        self.net.view().wait_for(Option::is_none).await.unwrap();
    }

    fn parts(&self) -> Vec<&'static str> {
        self.tree.snapshot().iter().map(|line| line.name).collect()
    }
}

const ALL: &[&str] = &["root", "net", "packet_io", "registry", "relay", "pinger", "coordinator"];

#[tokio::test]
async fn a_net_lives_as_long_as_its_boot() {
    let rig = Rig::new().await;
    let net = rig.start(1, NetworkOwner::Nobody).await;
    assert_eq!(rig.parts(), ALL);
    assert_eq!(net.interface.get().as_ref().as_ref().map(|it| it.address), Some(net.identity.address));
    rig.boot.set(None);
    rig.gone().await;
    assert_eq!(rig.parts(), ["root"]);
}

#[tokio::test]
async fn parts_that_cannot_start_fail_the_start_with_the_reason_and_the_next_start_works() {
    let rig = Rig::new().await;
    let refused = rig.start(1, NetworkOwner::Manager(-1)).await;
    let error = refused.host.get().error.clone().unwrap();
    assert!(error.starts_with("failed to create networking stack dependencies: "), "{error}");
    assert!(error.contains("descriptor -1 is not open"), "{error}");
    assert_eq!(rig.parts(), ["root"]);

    rig.boot.set(None);
    rig.gone().await;
    let net = rig.start(2, NetworkOwner::Nobody).await;

    assert_eq!(rig.parts(), ALL);
    assert_eq!(*net.host.get(), HostState::default());
}

/// Conforms: control:N12
/// Conforms: control:P14
#[tokio::test]
async fn each_boot_has_keys_and_an_address_of_its_own_and_lets_go_of_the_device() {
    let rig = Rig::new().await;
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let first = rig.start(1, NetworkOwner::Manager(ours.as_raw_fd())).await;
    drop(ours);
    assert!(first.data_plane.has_tun());

    let second = rig.start(2, NetworkOwner::Nobody).await;

    assert_ne!(first.identity.node.public(), second.identity.node.public());
    assert_ne!(first.identity.disco.public(), second.identity.disco.public());
    assert_ne!(first.identity.address, second.identity.address);
    assert!(warren_proto::address::is_coder(&second.identity.address));
    assert!(second.identity.node_id >= 0);
    assert_eq!(rig.parts(), ALL);
    let refused = theirs.send(b"nobody holds the other end").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn the_end_of_the_process_ends_the_net() {
    let mut rig = Rig::new().await;
    rig.start(1, NetworkOwner::Nobody).await;
    rig.stop.cancel();
    (&mut rig.follower).await.unwrap();
    assert!(rig.net.get().is_none());
    assert_eq!(rig.parts(), ["root"]);
}

#[tokio::test]
async fn a_net_of_a_tree_that_has_ended_can_still_be_ended() {
    let rig = Rig::new().await;
    rig.start(1, NetworkOwner::Nobody).await;
    rig.tree.stop(Duration::from_secs(20)).await;
    rig.stop.cancel();
    rig.follower.await.unwrap();
    assert!(rig.net.get().is_none());
}
