//! Real packets through the kernel and `warren0`: a page by TCP, an echo reply by ICMPv6. What a
//! browser and `ping` would do, so that the lab needs neither.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};

/// Longest that one probe takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// Largest page that is read, in bytes.
const MAX_PAGE: u64 = 64 * 1024;

const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;

/// What a page fetch brought.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    /// The HTTP status.
    pub(crate) status: u16,
    /// Length of the body in bytes.
    pub(crate) bytes: usize,
    /// From connect to the last byte.
    pub(crate) took: Duration,
}

/// Fetches `/` from an agent.
pub(crate) async fn fetch(address: Ipv6Addr, port: u16) -> io::Result<Page> {
    limited(async {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(SocketAddr::from((address, port))).await?;
        let request = format!("GET / HTTP/1.1\r\nHost: [{address}]:{port}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(MAX_PAGE).read_to_end(&mut answer).await?;
        let (status, bytes) = parse(&answer).ok_or_else(|| io::Error::other("the answer is not HTTP"))?;
        Ok(Page { status, bytes, took: begun.elapsed() })
    })
    .await
}

/// Sends one ICMPv6 echo request and waits for its reply. Returns the round trip.
pub(crate) async fn echo(address: Ipv6Addr, sequence: u16) -> io::Result<Duration> {
    limited(async {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::INET6, SocketType::RAW, flags, Some(ipproto::ICMPV6))?;
        // A raw socket moves datagrams, too.
        let socket = UdpSocket::from_std(std::net::UdpSocket::from(socket))?;
        let identifier = std::process::id() as u16;
        // The kernel fills in the checksum of raw ICMPv6.
        let mut request = vec![ECHO_REQUEST, 0, 0, 0];
        request.extend(identifier.to_be_bytes());
        request.extend(sequence.to_be_bytes());
        request.extend(b"warren lab");
        let begun = Instant::now();
        let destination = SocketAddrV6::new(address, 0, 0, 0);
        socket.send_to(&request, SocketAddr::from(destination)).await?;
        loop {
            let mut buffer = [0; 2048];
            let received = socket.recv(&mut buffer).await?;
            let reply = buffer.get(..received).unwrap_or_default();
            if reply.first() == Some(&ECHO_REPLY) && reply.get(4..) == request.get(4..) {
                return Ok(begun.elapsed());
            }
        }
    })
    .await
}

async fn limited<T>(probe: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", LIMIT.as_secs()));
    tokio::time::timeout(LIMIT, probe).await.unwrap_or_else(|_| Err(late()))
}

fn parse(answer: &[u8]) -> Option<(u16, usize)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(answer.get(..end)?).ok()?;
    let status = head.strip_prefix("HTTP/1.1 ").or_else(|| head.strip_prefix("HTTP/1.0 "))?.get(..3)?;
    Some((status.parse().ok()?, answer.len() - end - 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_length_are_read_from_an_answer() {
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nhello"), Some((200, 5)));
    }

    #[test]
    fn what_is_not_http_is_refused() {
        assert_eq!(parse(b"SSH-2.0-OpenSSH\r\n\r\n"), None);
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\n"), None);
    }
}
