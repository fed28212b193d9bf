//! Packet I/O: keeps the data plane's peers equal to the network map, and gives it the device that Start
//! asked for.
//!
//! It only controls; packets move in the data plane's tasks ([`crate::data_plane`]), which go on when this
//! part crashes. Its successor finds the device in place and reconciles.

use std::{sync::Arc, time::Duration};

use crate::{
    facts::{Net, NetworkOwner},
    pinger,
    runtime::{Context, Part, PartError},
};

pub mod batch;
pub mod tun;

use tun::{Tun, TunError};

/// The interface that a tunnel makes for itself when it owns the network.
pub const DEVICE_NAME: &str = "warren0";

/// How often it is looked whether the device is still there: more often than the budget forgives.
const LOOK_PERIOD: Duration = Duration::from_secs(2);

/// What packet I/O hears.
#[derive(Debug)]
pub enum Message {
    /// The network map changed; which one is in the cell.
    MapChanged,
    /// It is time to look whether the device is still there.
    Look,
}

/// The part.
pub struct PacketIo {
    net: Arc<Net>,
}

impl PacketIo {
    /// For one Boot.
    pub fn new(net: Arc<Net>) -> Self {
        Self { net }
    }

    fn has_lost_its_device(&self) -> bool {
        self.net.boot.network != NetworkOwner::Nobody && !self.net.data_plane.has_tun()
    }

    fn attach_device(&self) -> Result<(), TunError> {
        if self.net.data_plane.has_tun() {
            return Ok(());
        }
        let tun = match self.net.boot.network {
            NetworkOwner::Manager(descriptor) => Tun::from_fd(descriptor)?,
            NetworkOwner::Tunnel => Tun::from_owned(Tun::create(DEVICE_NAME)?)?,
            NetworkOwner::Nobody => return Ok(()),
        };
        self.net.data_plane.attach_tun(tun);
        Ok(())
    }
}

impl Part for PacketIo {
    type Message = Message;
    type State = ();

    async fn start(&self, context: &Context<Message>) -> Result<(), PartError> {
        self.attach_device()?;
        context.follow(self.net.network_map.view(), || Message::MapChanged);
        context.tick(LOOK_PERIOD, || Message::Look);
        Ok(())
    }

    async fn handle(&self, _: &Context<Message>, _: &mut (), message: Message) -> Result<(), PartError> {
        match message {
            Message::MapChanged => {
                let net = Arc::clone(&self.net);
                tokio::task::spawn_blocking(move || net.data_plane.follow_peers(&net.network_map)).await?;
                // Pings to peers that were not here yet went nowhere; if this is lost, they are repeated soon.
                let _ = self.net.pinger.try_send(pinger::Message::PathUp);
            }
            // A restart attaches it again; one that cannot be had spends the budget, and the process says so.
            Message::Look if self.has_lost_its_device() => return Err("the device is gone".into()),
            Message::Look => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsRawFd, unix::net::UnixDatagram};

    use uuid::Uuid;
    use warren_core::{
        coordination::{NetworkMap, Peer},
        relay_map::RegionId,
    };
    use warren_proto::key::{DiscoPublic, NodePrivate};

    use super::*;
    use crate::{relay::tests::net, runtime::Tasks};

    #[tokio::test]
    async fn the_managers_descriptor_becomes_the_device_and_stays_it_over_a_restart() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let net = Arc::new(net(NetworkOwner::Manager(ours.as_raw_fd())));
        start(&net).await.unwrap();
        assert!(net.data_plane.has_tun());
        drop(ours);
        start(&net).await.unwrap();
        theirs.send(b"the data plane holds a copy of its own").unwrap();
    }

    #[tokio::test]
    async fn without_a_device_nothing_is_attached() {
        let net = Arc::new(net(NetworkOwner::Nobody));
        start(&net).await.unwrap();
        assert!(!net.data_plane.has_tun());
    }

    #[tokio::test]
    async fn a_descriptor_that_is_not_open_is_an_error_that_names_it() {
        let net = Arc::new(net(NetworkOwner::Manager(-1)));
        let error = start(&net).await.unwrap_err();
        assert_eq!(error.to_string(), "descriptor -1 is not open in this process");
    }

    #[tokio::test]
    async fn peers_follow_the_network_map() {
        let net = Arc::new(net(NetworkOwner::Nobody));
        let key = NodePrivate::generate().public();
        let peer = Peer {
            node_key: key,
            disco_key: DiscoPublic([1; 32]),
            home: RegionId(1),
            addresses: Vec::new(),
            keepalive: false,
            endpoints: Vec::new(),
            ready: true,
        };
        let map = net.network_map.claim().unwrap();
        map.set(NetworkMap { peers: [(Uuid::nil(), peer)].into() });
        hear_change(&net).await;
        assert_eq!(net.data_plane.stats().into_keys().collect::<Vec<_>>(), [key]);
        map.set(NetworkMap::default());
        hear_change(&net).await;
        assert!(net.data_plane.stats().is_empty());
    }

    async fn start(net: &Arc<Net>) -> Result<(), PartError> {
        PacketIo::new(Arc::clone(net)).start(&context(net)).await
    }

    async fn hear_change(net: &Arc<Net>) {
        let part = PacketIo::new(Arc::clone(net));
        part.handle(&context(net), &mut (), Message::MapChanged).await.unwrap();
    }

    fn context(net: &Arc<Net>) -> Context<Message> {
        Context { me: net.packet_io.clone(), tasks: Tasks::default() }
    }
}
