//! One HTTP request to a relay's server, for links and for latency measurements.

use std::{net::Ipv6Addr, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, header};
use http_body_util::Empty;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use warren_core::relay_map::{Node, NodeAddress};

use crate::dial::{Alpn, DialError, Scheme, Target, TlsError, Verify};

/// The most that a relay's response head may take.
const MAX_HEAD: usize = 16 * 1024;

/// Extra headers of a request; their values may be secrets.
pub type Headers = Vec<(HeaderName, HeaderValue)>;

/// Why a relay's server did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// No connection came about.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The region has no relay.
    #[error("the region has no relay")]
    NoRelay,
    /// The node's host name cannot stand in a request.
    #[error("the relay's host name is malformed")]
    Host(#[source] http::Error),
    /// The connection failed, or what came is not HTTP.
    #[error("the relay's answer is not HTTP: {0}")]
    Http(hyper::Error),
    /// It took too long.
    #[error("no answer within {} seconds", .0.as_secs())]
    Deadline(Duration),
}

impl From<hyper::Error> for RequestError {
    fn from(error: hyper::Error) -> Self {
        let refused = TlsError::of_request(&error);
        let tls = |reason| DialError::Tls { host: "the relay".to_owned(), reason }.into();
        refused.map_or(Self::Http(error), tls)
    }
}

/// How a node is dialled.
pub(super) fn target(node: &Node) -> Target {
    Target {
        scheme: if node.force_http { Scheme::Http } else { Scheme::Https },
        host: node.host_name.clone(),
        port: node.derp_port,
        ipv4: node.ipv4,
        ipv6: node.ipv6,
        server_name: node.cert_name.clone(),
        verify: if node.insecure_for_tests { Verify::SkipForTests } else { Verify::Yes },
        alpn: Alpn::Http1,
    }
}

/// A GET request for `path` at a node.
pub(super) fn get(node: &Node, path: &str, headers: &Headers) -> Result<Request<Empty<Bytes>>, RequestError> {
    let mut request =
        Request::get(path).header(header::HOST, host(node)).body(Empty::new()).map_err(RequestError::Host)?;
    request.headers_mut().extend(headers.iter().map(|(name, value)| (name.clone(), value.clone())));
    Ok(request)
}

/// Sends a request as the first one on a connection, and returns the head of the response. An upgraded
/// connection is in the response.
pub(super) async fn send<S>(
    stream: S,
    request: Request<Empty<Bytes>>,
) -> Result<Response<Incoming>, RequestError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(MAX_HEAD).handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender.send_request(request).await?)
}

/// What stands in the Host header (tailnet-data 2.3).
fn host(node: &Node) -> String {
    let host = match node.ipv4 {
        NodeAddress::Fixed(address) => address.to_string(),
        NodeAddress::Resolve | NodeAddress::Disabled if node.host_name.parse::<Ipv6Addr>().is_ok() => {
            format!("[{}]", node.host_name)
        }
        NodeAddress::Resolve | NodeAddress::Disabled => node.host_name.clone(),
    };
    let usual = if node.force_http { 80 } else { 443 };
    if node.derp_port == usual { host } else { format!("{host}:{}", node.derp_port) }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn the_host_header_has_the_address_if_given_and_the_port_if_unusual() {
        let node = Node { host_name: "relay.example".to_owned(), derp_port: 443, ..Node::default() };
        assert_eq!(host(&node), "relay.example");
        let plain = Node { force_http: true, ..node.clone() };
        assert_eq!(host(&plain), "relay.example:443");
        let fixed = Node { ipv4: NodeAddress::Fixed(Ipv4Addr::LOCALHOST), derp_port: 8080, ..node.clone() };
        assert_eq!(host(&fixed), "127.0.0.1:8080");
        let six = Node { host_name: "::1".to_owned(), ..node };
        assert_eq!(host(&six), "[::1]");
    }

    #[test]
    fn a_host_name_with_a_line_break_is_refused() {
        let node = Node { host_name: "a\r\nb".to_owned(), ..Node::default() };
        assert!(matches!(get(&node, "/derp", &Headers::new()), Err(RequestError::Host(_))));
    }
}
