//! How connections to the deployment and to relays are made: proxy or not, both address families, TLS or
//! not, all within one limit. What comes out is a byte stream; what goes wrong is told in words for people.
//!
//! ```text
//! Target -> proxy from the environment? -> CONNECT -+
//!        -> addresses -> race of attempts ----------+-> TLS? -> Stream
//! ```

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::client::TlsStream;
use url::{Host, Url};
use warren_core::relay_map::NodeAddress;

mod client;
mod counted;
mod error;
mod origin;
mod proxy;
pub(crate) mod race;
mod tls;

pub use client::ClientCertificate;
pub use counted::{Counted, Sent};
pub use error::{DialError, SetupError, Step, TlsError};

use origin::Origins;
use proxy::{Proxies, Proxy};
use tls::Tls;

/// Hosts whose last good addresses are remembered: a deployment and its relays are a handful.
const MAX_REMEMBERED: usize = 64;

/// What a dialer is made with.
#[derive(Debug, Clone, Default)]
pub struct DialOptions {
    /// A PEM file with certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// What is shown to servers that ask who we are.
    pub client: Option<ClientCertificate>,
}

/// Whether a connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Plain TCP.
    Http,
    /// TLS.
    Https,
}

/// Whether the certificate is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verify {
    /// It must be valid and trusted.
    Yes,
    /// Anything goes; only where a relay map says so for tests.
    SkipForTests,
}

/// What a connection over TLS announces that it is going to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// HTTP/1.1: everything here is an upgrade of it, so nothing newer may be negotiated.
    Http1,
    /// Nothing, for servers that refuse whoever does not announce HTTP/2 and still speak HTTP/1.1.
    Nothing,
}

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Encrypted or not.
    pub scheme: Scheme,
    /// Host name or address, without brackets. Also what is sent as the TLS server name.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// How to reach it over IPv4.
    pub ipv4: NodeAddress<Ipv4Addr>,
    /// How to reach it over IPv6.
    pub ipv6: NodeAddress<Ipv6Addr>,
    /// The name that the certificate must be for, if another than `host`.
    pub server_name: Option<String>,
    /// Whether the certificate is looked at.
    pub verify: Verify,
    /// What is announced.
    pub alpn: Alpn,
}

impl Target {
    /// The host of an `http` or `https` URL; `None` for other schemes and without a host.
    pub fn of_url(url: &Url) -> Option<Self> {
        let scheme = match url.scheme() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return None,
        };
        let host = match url.host()? {
            Host::Domain(name) => name.to_owned(),
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        };
        Some(Self {
            scheme,
            host,
            port: url.port_or_known_default()?,
            ipv4: NodeAddress::Resolve,
            ipv6: NodeAddress::Resolve,
            server_name: None,
            verify: Verify::Yes,
            alpn: Alpn::Http1,
        })
    }

    /// Host and port as they stand in requests and messages, an IPv6 address in brackets.
    pub fn authority(&self) -> String {
        authority(&self.host, self.port)
    }
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Makes connections. One serves a whole process; lent as an `Arc`.
pub struct Dialer {
    tls: Tls,
    proxies: Proxies,
    /// The addresses that a host was last reached at: used where its name does not resolve any more,
    /// perhaps because of the very tunnel this process provides.
    last_good: Mutex<HashMap<String, IpAddr>>,
    origins: Origins,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer").finish_non_exhaustive()
    }
}

impl Dialer {
    /// Reads the certificates to trust and the environment's proxies (`HTTPS_PROXY`, `HTTP_PROXY`,
    /// `ALL_PROXY`, `NO_PROXY`), once.
    pub fn new(options: DialOptions) -> Result<Self, SetupError> {
        Self::with_proxies(&options, Proxies::from_environment())
    }

    fn with_proxies(options: &DialOptions, proxies: Proxies) -> Result<Self, SetupError> {
        let tls = Tls::new(options.ca_file.as_deref(), options.client.as_ref())?;
        Ok(Self { tls, proxies, last_good: Mutex::default(), origins: Origins::default() })
    }

    /// Connects to `target`, name resolution, proxy and TLS included, within `limit`.
    pub async fn connect(&self, target: &Target, limit: Duration) -> Result<Stream, DialError> {
        let deadline = Deadline { at: Instant::now() + limit, limit };
        let carrier = match self.proxies.for_target(target) {
            Some(proxy) => self.through(&proxy, target, deadline).await?,
            None => Carrier::Tcp(self.tcp(target, deadline).await?),
        };
        match target.scheme {
            Scheme::Http => Ok(Stream::Plain(carrier)),
            Scheme::Https => {
                let wrapped = deadline.hold(target, Step::Tls, self.tls.wrap(target, carrier)).await??;
                Ok(Stream::Tls(Box::new(wrapped)))
            }
        }
    }

    /// The network has changed: fails every connection that was made from an address which this machine has no
    /// more.
    pub fn fail_lost(&self) {
        self.origins.fail_lost(origin::is_ours);
    }

    async fn through(
        &self,
        proxy: &Proxy,
        target: &Target,
        deadline: Deadline,
    ) -> Result<Carrier, DialError> {
        let at_proxy = |source| DialError::Proxy { proxy: proxy.name(), source: Box::new(source) };
        let place = proxy.target().map_err(at_proxy)?;
        let tcp = self.tcp(&place, deadline).await.map_err(at_proxy)?;
        let carrier = match place.scheme {
            Scheme::Http => Carrier::Tcp(tcp),
            Scheme::Https => {
                let wrapped = deadline.hold(&place, Step::Tls, self.tls.wrap(&place, tcp)).await;
                Carrier::TlsToProxy(Box::new(wrapped.and_then(|result| result).map_err(at_proxy)?))
            }
        };
        deadline.hold(target, Step::Proxy, proxy.tunnel(carrier, target)).await?
    }

    async fn tcp(&self, target: &Target, deadline: Deadline) -> Result<Counted<TcpStream>, DialError> {
        let addresses = deadline.hold(target, Step::Resolve, self.addresses(target)).await??;
        let raced = deadline.hold(target, Step::Connect, race::connect(&addresses)).await?;
        let stream = raced.map_err(|error| DialError::of_connect(target, error))?;
        stream.set_nodelay(true).map_err(|error| DialError::of_connect(target, error))?;
        if let Ok(peer) = stream.peer_addr() {
            self.remember(target, peer.ip());
        }
        let origin = stream.local_addr().map_err(|error| DialError::of_connect(target, error))?;
        Ok(Counted::new(stream).made_from(self.origins.add(origin.ip())))
    }

    async fn addresses(&self, target: &Target) -> Result<Vec<SocketAddr>, DialError> {
        let addresses = match resolve(target).await {
            Ok(addresses) => addresses,
            Err(source) => match self.remembered(target) {
                Some(address) => vec![address],
                None => return Err(DialError::Resolve { host: target.host.clone(), source }),
            },
        };
        if addresses.is_empty() {
            return Err(DialError::NoAddress { host: target.host.clone() });
        }
        Ok(race::interleave(&addresses, target.port))
    }

    fn remember(&self, target: &Target, address: IpAddr) {
        let mut last_good = self.last_good.lock().unwrap_or_else(PoisonError::into_inner);
        if last_good.len() >= MAX_REMEMBERED && !last_good.contains_key(&target.host) {
            last_good.clear();
        }
        last_good.insert(target.host.clone(), address);
    }

    fn remembered(&self, target: &Target) -> Option<IpAddr> {
        let last_good = self.last_good.lock().unwrap_or_else(PoisonError::into_inner);
        last_good.get(&target.host).copied().filter(|address| match address {
            IpAddr::V4(_) => target.ipv4 == NodeAddress::Resolve,
            IpAddr::V6(_) => target.ipv6 == NodeAddress::Resolve,
        })
    }
}

/// The addresses of a target, fixed ones first; its name is asked for only where it counts.
async fn resolve(target: &Target) -> io::Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    if let NodeAddress::Fixed(address) = target.ipv6 {
        addresses.push(IpAddr::V6(address));
    }
    if let NodeAddress::Fixed(address) = target.ipv4 {
        addresses.push(IpAddr::V4(address));
    }
    // A fixed address stands for the whole host: resolving its other family could only delay it.
    let by_name = addresses.is_empty();
    let (v4, v6) = (target.ipv4 == NodeAddress::Resolve, target.ipv6 == NodeAddress::Resolve);
    if by_name && (v4 || v6) {
        let found = tokio::net::lookup_host((target.host.as_str(), target.port)).await?;
        addresses.extend(found.map(|it| it.ip()).filter(|it| if it.is_ipv4() { v4 } else { v6 }));
    }
    Ok(addresses)
}

#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    async fn hold<F: Future>(self, target: &Target, step: Step, work: F) -> Result<F::Output, DialError> {
        let late = |_| DialError::TimedOut { place: target.authority(), step, limit: self.limit };
        timeout_at(self.at, work).await.map_err(late)
    }
}

/// What carries a connection: TCP to the target or the proxy, or TLS to the proxy.
#[derive(Debug)]
pub enum Carrier {
    /// TCP.
    Tcp(Counted<TcpStream>),
    /// TLS that ends at the proxy.
    TlsToProxy(Box<TlsStream<Counted<TcpStream>>>),
}

/// An established connection.
#[derive(Debug)]
pub enum Stream {
    /// Not encrypted up to the target.
    Plain(Carrier),
    /// Encrypted up to the target.
    Tls(Box<TlsStream<Carrier>>),
}

impl Stream {
    /// The other end of the TCP connection: the target, or the proxy.
    pub fn peer_ip(&self) -> Option<IpAddr> {
        self.tcp().get_ref().peer_addr().ok().map(|peer| peer.ip().to_canonical())
    }

    /// What leaves this machine through it.
    pub fn sent(&self) -> Sent {
        self.tcp().sent().clone()
    }

    fn tcp(&self) -> &Counted<TcpStream> {
        let carrier = match self {
            Self::Plain(carrier) => carrier,
            Self::Tls(stream) => stream.get_ref().0,
        };
        match carrier {
            Carrier::Tcp(tcp) => tcp,
            Carrier::TlsToProxy(stream) => stream.get_ref().0,
        }
    }
}

/// Both enums are byte streams in the same way: whichever is held does the work.
macro_rules! byte_stream {
    ($name:ident { $($variant:ident),+ }) => {
        impl AsyncRead for $name {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                match self.get_mut() { $( Self::$variant(held) => Pin::new(held).poll_read(cx, buffer), )+ }
            }
        }

        impl AsyncWrite for $name {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() { $( Self::$variant(held) => Pin::new(held).poll_write(cx, bytes), )+ }
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                parts: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $( Self::$variant(held) => Pin::new(held).poll_write_vectored(cx, parts), )+
                }
            }

            fn is_write_vectored(&self) -> bool {
                match self { $( Self::$variant(held) => held.is_write_vectored(), )+ }
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $( Self::$variant(held) => Pin::new(held).poll_flush(cx), )+ }
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $( Self::$variant(held) => Pin::new(held).poll_shutdown(cx), )+ }
            }
        }
    };
}

byte_stream!(Carrier { Tcp, TlsToProxy });
byte_stream!(Stream { Plain, Tls });

#[cfg(test)]
mod tests;
