//! The net: everything that lives between Start and Stop. One task keeps it equal to the `boot` cell: builds
//! it, adds its parts to the tree, publishes it, and ends it in order.
//!
//! A net is built anew for each Boot, with fresh keys and a fresh address, and nothing of its predecessor is
//! left by then. It outlives every part in it, the supervisor of the parts included.

use std::{io, sync::Arc, time::Duration};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use warren_actors::{
    coordinator::{ControlMemory, Coordinator},
    data_plane::{DataPlane, DataPlaneConfig, Events, LinkChange, PathChange, Pong, StunAnswer, TsmpPong},
    dial::Dialer,
    facts::{Addresses, Boot, HostState, Identity, Net, NetworkOwner},
    packet_io::PacketIo,
    pinger::{self, Pinger},
    registry::{self, Registry},
    relay::{self, RelayPart},
    runtime::{Address, Cell, CellWriter, View},
    udp::MakeSockets,
};
use warren_core::relay_map::RegionId;
use warren_proto::key::NodePublic;

use super::host::Host;
use crate::{
    child::{ChildSpec, SupervisorSpec},
    tree::{ChildId, Tree},
};

/// How long the parts may take to end, one after the other; the coordinator needs up to 1 s to say goodbye.
/// Less than the session waits for the whole net before it answers a Stop.
const PARTS_LIMIT: Duration = Duration::from_millis(2500);

/// Whichever is free.
const ANY_PORT: u16 = 0;
/// What waits for the host part: changes of one cell.
const HOST_MAILBOX: usize = 64;

/// Keeps `net` equal to what `boots` says until `stop`, and ends it then.
pub(super) async fn follow(
    tree: Tree,
    mut boots: View<Option<Arc<Boot>>>,
    net: Cell<Option<Arc<Net>>>,
    means: Means,
    stop: CancellationToken,
) {
    let Ok(published) = net.claim() else {
        tracing::error!("somebody else builds nets");
        return;
    };
    let builder = Builder { tree, published, means };
    let mut built: Option<Built> = None;
    while let Some(Some(boot)) = stop.run_until_cancelled(boots.changed()).await {
        let boot = boot.as_ref().clone();
        let wanted = boot.as_ref().map(|boot| boot.generation);
        if wanted == built.as_ref().map(|built| built.net.boot.generation) {
            continue;
        }
        if let Some(built) = built.take() {
            builder.end(built).await;
        }
        if let Some(boot) = boot {
            built = builder.build(boot).await;
        }
    }
    if let Some(built) = built {
        builder.end(built).await;
    }
}

/// What every net is built with.
pub(super) struct Means {
    /// How servers are reached.
    pub(super) dialer: Arc<Dialer>,
    /// Who makes the sockets for direct paths.
    pub(super) sockets: Arc<dyn MakeSockets>,
}

struct Builder {
    tree: Tree,
    published: CellWriter<Option<Arc<Net>>>,
    means: Means,
}

/// A net, and its parts if they could start.
struct Built {
    net: Arc<Net>,
    parts: Option<ChildId>,
}

impl Builder {
    /// A net whose parts could not start is published too, with the reason: it fails the Start at once.
    async fn build(&self, boot: Arc<Boot>) -> Option<Built> {
        let generation = boot.generation;
        let net = match assemble(boot, &self.means).await {
            Ok(net) => Arc::new(net),
            Err(error) => {
                tracing::error!(generation, %error, "the data plane cannot be started");
                return None;
            }
        };
        let added = self.tree.add(ChildSpec::supervisor(parts(&net))).await;
        let parts = added.inspect_err(|error| tell_failure(&net, &error.to_string())).ok();
        tracing::debug!(generation, "the net is built");
        self.published.set(Some(Arc::clone(&net)));
        Some(Built { net, parts })
    }

    async fn end(&self, built: Built) {
        if let Some(parts) = built.parts
            && timeout(PARTS_LIMIT, self.tree.remove(parts)).await.is_err()
        {
            tracing::warn!(limit = ?PARTS_LIMIT, "a part of the net does not end");
        }
        built.net.data_plane.stop().await;
        tracing::debug!(generation = built.net.boot.generation, "the net has ended");
        self.published.set(None);
    }
}

fn tell_failure(net: &Net, reason: &str) {
    tracing::error!(reason, "the net cannot be started");
    let error = match net.boot.network {
        NetworkOwner::Manager(_) => format!("failed to create networking stack dependencies: {reason}"),
        NetworkOwner::Tunnel | NetworkOwner::Nobody => reason.to_owned(),
    };
    if let Ok(host) = net.host.claim() {
        host.set(HostState { applied: None, error: Some(error) });
    }
}

/// The parts, in the order of their start. The device comes before any contact with the network
/// (vpn-protocol 6.2); the coordinator is the last to come and the first to go, so that everybody hears what
/// it learns, and the deployment hears early that we leave.
fn parts(net: &Arc<Net>) -> SupervisorSpec {
    let memory = Arc::new(ControlMemory::default());
    let host = (net.boot.network == NetworkOwner::Tunnel).then(|| {
        let net = Arc::clone(net);
        ChildSpec::part(&Address::new("host", HOST_MAILBOX), move || Host::new(Arc::clone(&net)))
    });
    let [packet_io, registry, relay, pinger, coordinator] = [(); 5].map(|()| Arc::clone(net));
    let children = [
        Some(ChildSpec::part(&net.packet_io, move || PacketIo::new(Arc::clone(&packet_io)))),
        host,
        Some(ChildSpec::part(&net.registry, move || Registry::new(Arc::clone(&registry)))),
        Some(ChildSpec::part(&net.relay, move || RelayPart::new(Arc::clone(&relay)))),
        Some(ChildSpec::part(&net.pinger, move || Pinger::new(Arc::clone(&pinger)))),
        Some(ChildSpec::part(&net.coordinator, move || {
            Coordinator::new(Arc::clone(&coordinator), Arc::clone(&memory))
        })),
    ];
    let spec = SupervisorSpec::new("net", 5, Duration::from_secs(60));
    SupervisorSpec { children: children.into_iter().flatten().collect(), ..spec }
}

pub(super) async fn assemble(boot: Arc<Boot>, means: &Means) -> io::Result<Net> {
    let (identity, addresses) = (Identity::generate(), Addresses::default());
    let udp = Arc::clone(&means.sockets).make(ANY_PORT).await;
    let udp =
        udp.inspect_err(|error| tracing::warn!(%error, "there are no direct paths; everything is relayed"));
    let data_plane = DataPlane::start(DataPlaneConfig {
        node: identity.node.clone(),
        disco: identity.disco.clone(),
        address: identity.address,
        dialer: Arc::clone(&means.dialer),
        events: Arc::new(Ears(addresses.clone())),
        udp: udp.ok(),
    })?;
    Ok(Net::new(boot, identity, data_plane, addresses))
}

/// Hands over what happens on the data plane's thread, which must not wait. What finds no room is made up
/// for: every one of these parts also looks by itself every 5 s.
struct Ears(Addresses);

impl Events for Ears {
    fn pong(&self, pong: Pong) {
        let _ = self.0.pinger.try_send(pinger::Message::Pong(pong));
    }

    fn tsmp_pong(&self, pong: TsmpPong) {
        let _ = self.0.pinger.try_send(pinger::Message::TsmpPong(pong));
    }

    fn link_changed(&self, region: RegionId, change: LinkChange) {
        let _ = self.0.relay.try_send(relay::Message::LinkChanged { region, change });
        if change == LinkChange::Up {
            let _ = self.0.pinger.try_send(pinger::Message::PathUp);
        }
    }

    fn stun(&self, answer: StunAnswer) {
        let _ = self.0.relay.try_send(relay::Message::Stun(answer));
    }

    fn endpoints_wanted(&self) {
        let _ = self.0.relay.try_send(relay::Message::EndpointsWanted);
    }

    fn path_changed(&self, change: PathChange) {
        let _ = self.0.registry.try_send(registry::Message::PathChanged(change));
    }

    fn handshake(&self, peer: NodePublic) {
        let _ = self.0.registry.try_send(registry::Message::Handshake(peer));
    }
}

#[cfg(test)]
pub(super) mod tests;
