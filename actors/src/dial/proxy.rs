//! Proxies of the environment. Everything goes through `CONNECT`, plain HTTP included: the connections are
//! upgraded, which a forwarding proxy would not survive.

use std::net::IpAddr;

use bytes::Bytes;
use http::{HeaderValue, Request, Uri, header};
use http_body_util::Empty;
use hyper::{client::conn::http1, upgrade::Upgraded};
use hyper_util::{client::proxy::matcher::Matcher, rt::TokioIo};
use warren_core::relay_map::NodeAddress;

use super::{Alpn, Carrier, DialError, Scheme, Target, Verify, authority};

/// The most that a proxy's answer may take before the tunnel begins.
const MAX_HEAD: usize = 16 * 1024;

pub(super) struct Proxies(Matcher);

impl Proxies {
    pub(super) fn from_environment() -> Self {
        Self(Matcher::from_env())
    }

    #[cfg(test)]
    pub(super) fn all(proxy: &str) -> Self {
        Self(Matcher::builder().all(proxy.to_owned()).build())
    }

    /// The proxy for a target, if one applies. This machine itself is never reached through one.
    pub(super) fn for_target(&self, target: &Target) -> Option<Proxy> {
        if is_loopback(&target.host) {
            return None;
        }
        let scheme = match target.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        let uri: Uri = format!("{scheme}://{}/", target.authority()).parse().ok()?;
        let intercept = self.0.intercept(&uri)?;
        Some(Proxy { uri: intercept.uri().clone(), authorization: intercept.basic_auth().cloned() })
    }
}

fn is_loopback(host: &str) -> bool {
    let name = host.trim_end_matches('.');
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

pub(super) struct Proxy {
    uri: Uri,
    authorization: Option<HeaderValue>,
}

impl Proxy {
    /// Host and port; credentials are not part of it.
    pub(super) fn name(&self) -> String {
        authority(self.host(), self.port())
    }

    pub(super) fn target(&self) -> Result<Target, DialError> {
        let scheme = match self.uri.scheme_str() {
            Some("https") => Scheme::Https,
            Some("http") | None => Scheme::Http,
            Some(other) => return Err(DialError::ProxyScheme(other.to_owned())),
        };
        Ok(Target {
            scheme,
            host: self.host().to_owned(),
            port: self.port(),
            ipv4: NodeAddress::Resolve,
            ipv6: NodeAddress::Resolve,
            server_name: None,
            verify: Verify::Yes,
            alpn: Alpn::Http1,
        })
    }

    /// Has the proxy connect to `target`.
    pub(super) async fn tunnel(&self, carrier: Carrier, target: &Target) -> Result<Carrier, DialError> {
        let odd = |reason: String| DialError::ProxyAnswer { proxy: self.name(), reason };
        let request = self.request(target).map_err(|error| odd(error.to_string()))?;
        let builder = http1::Builder::new().max_buf_size(MAX_HEAD).clone();
        let (mut sender, connection) =
            builder.handshake(TokioIo::new(carrier)).await.map_err(|error| odd(error.to_string()))?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(|error| odd(error.to_string()))?;
            let status = response.status();
            if !status.is_success() {
                let (proxy, place) = (self.name(), target.authority());
                return Err(DialError::ProxyRefused { proxy, place, status });
            }
            let upgraded = hyper::upgrade::on(response).await.map_err(|error| odd(error.to_string()))?;
            carrier_of(upgraded).ok_or_else(|| odd("it sent data of its own".to_owned()))
        };
        // The connection is what moves the bytes of the exchange; how it ends, the exchange tells.
        let (_, tunnel) = futures::future::join(connection.with_upgrades(), exchange).await;
        tunnel
    }

    fn request(&self, target: &Target) -> Result<Request<Empty<Bytes>>, http::Error> {
        let place = target.authority();
        let mut request = Request::connect(&place).header(header::HOST, &place).body(Empty::new())?;
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(header::PROXY_AUTHORIZATION, authorization.clone());
        }
        Ok(request)
    }

    fn host(&self) -> &str {
        self.uri.host().unwrap_or_default().trim_matches(['[', ']'])
    }

    fn port(&self) -> u16 {
        let usual = if self.uri.scheme_str() == Some("https") { 443 } else { 80 };
        self.uri.port_u16().unwrap_or(usual)
    }
}

/// The connection beneath; servers speak only after us, so nothing may have come yet.
fn carrier_of(upgraded: Upgraded) -> Option<Carrier> {
    let parts = upgraded.downcast::<TokioIo<Carrier>>().ok()?;
    parts.read_buf.is_empty().then(|| parts.io.into_inner())
}
