//! A network namespace and its one uplink. The only unsafe code of the internet is here.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, OwnedFd},
    thread,
};

use futures::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder, new_connection,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags},
        link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute},
    },
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use warren_actors::packet_io::tun::Tun;

/// What a host's uplink is called.
pub const UPLINK: &str = "uplink0";
const LOOPBACK: u32 = 1;

/// A network namespace. It ends with the last socket, process and handle in it.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

impl Namespace {
    /// Makes one with nothing in it; root of the user namespace may.
    pub(super) fn make() -> io::Result<Self> {
        on_its_own(|| {
            // SAFETY: the calling thread alone gets another network; memory and descriptors stay shared, and it ends
            // right behind.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            Self::here()
        })
    }

    /// The one where we are.
    pub(super) fn here() -> io::Result<Self> {
        Ok(Self(File::open("/proc/thread-self/ns/net")?.into()))
    }

    /// Does something inside, on a thread of its own: sockets and processes made there are of this network for ever.
    pub fn enter<T: Send>(&self, what: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_its_own(|| {
            move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(what())
        })
    }

    /// Makes the uplink, up and without an address, and brings up the loopback. The device ends with the descriptor.
    pub(super) fn make_uplink(&self) -> io::Result<OwnedFd> {
        self.enter(|| {
            let device = Tun::create(UPLINK).map_err(io::Error::other)?;
            with_netlink(async |handle| {
                let no_link_local = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
                let quiet = LinkUnspec::new_with_index(index(&handle).await?)
                    .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![no_link_local]))
                    .build();
                handle.link().change(quiet).execute().await?;
                for link in [LOOPBACK, index(&handle).await?] {
                    handle.link().change(LinkUnspec::new_with_index(link).up().build()).execute().await?;
                }
                Ok(())
            })?;
            Ok(device)
        })?
    }

    /// Gives the uplink these addresses instead of those it has, and routes what their families know to it.
    pub(super) fn set_addresses(&self, addresses: &[IpAddr]) -> io::Result<()> {
        self.enter(|| {
            with_netlink(async |handle| {
                let link = index(&handle).await?;
                let present = handle.address().get().set_link_index_filter(link).execute();
                for old in present.try_collect::<Vec<_>>().await? {
                    handle.address().del(old).execute().await?;
                }
                for address in addresses {
                    add_address(&handle, link, *address).await?;
                    add_default_route(&handle, link, *address).await?;
                }
                Ok(())
            })
        })?
    }
}

async fn add_address(handle: &Handle, link: u32, address: IpAddr) -> Result<(), rtnetlink::Error> {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let mut request = handle.address().add(link, address, bits);
    if address.is_ipv6() {
        // Nobody else can have it.
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    request.execute().await
}

/// The kernel takes a route away with the last address of its family, for IPv4, and leaves it for IPv6.
async fn add_default_route(handle: &Handle, link: u32, address: IpAddr) -> Result<(), rtnetlink::Error> {
    let route = match address {
        IpAddr::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().output_interface(link).build(),
        IpAddr::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().output_interface(link).build(),
    };
    handle.route().add(route).replace().execute().await
}

async fn index(handle: &Handle) -> Result<u32, rtnetlink::Error> {
    let found = handle.link().get().match_name(UPLINK.to_owned()).execute().try_next().await?;
    found.map(|link| link.header.index).ok_or(rtnetlink::Error::RequestFailed)
}

/// Speaks to the kernel about the network of the calling thread.
fn with_netlink(what: impl AsyncFnOnce(Handle) -> Result<(), rtnetlink::Error>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _messages) = new_connection()?;
        tokio::spawn(connection);
        what(handle).await.map_err(io::Error::other)
    })
}

/// Runs on a thread that ends with it, as its network does not matter to anybody afterwards.
fn on_its_own<T: Send>(what: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| scope.spawn(what).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
