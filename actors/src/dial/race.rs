//! Racing the addresses of a host: a family that leads nowhere costs 200 ms, not a timeout (RFC 8305, light).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use tokio::{net::TcpStream, time::sleep};

/// The next address gets its chance when the one before has not answered for so long.
const STAGGER: Duration = Duration::from_millis(200);
/// Addresses of one host that are tried; the resolver puts the best ones first.
const MAX_ADDRESSES: usize = 8;

/// Alternates families, in the resolver's order otherwise.
pub(super) fn interleave(addresses: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    let is_v6_first = addresses.first().is_some_and(IpAddr::is_ipv6);
    let of = |v6: bool| addresses.iter().filter(move |it| it.is_ipv6() == v6);
    let (mut one, mut other) = (of(is_v6_first), of(!is_v6_first));
    let mut order = Vec::new();
    loop {
        let pair = [one.next(), other.next()];
        if pair == [None, None] || order.len() >= MAX_ADDRESSES {
            return order;
        }
        order.extend(pair.into_iter().flatten().map(|address| SocketAddr::new(*address, port)));
    }
}

/// Connects to the first address that answers. If none does, the first failure is told.
pub(super) async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let attempts = addresses.iter().map(|address| TcpStream::connect(*address)).collect();
    first(attempts, STAGGER).await.unwrap_or_else(|| Err(io::ErrorKind::AddrNotAvailable.into()))
}

/// The first success. Each attempt begins when the one before has failed, or has not succeeded for so long. If none
/// succeeds, the first failure is told; without attempts there is nothing.
pub(crate) async fn first<T, E>(
    attempts: Vec<impl Future<Output = Result<T, E>>>,
    stagger: Duration,
) -> Option<Result<T, E>> {
    let mut waiting = attempts.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut failure = None;
    loop {
        attempts.extend(waiting.next());
        let answered = if waiting.len() == 0 {
            attempts.next().await
        } else {
            tokio::select! {
                answered = attempts.next().fuse() => answered,
                () = sleep(stagger) => continue,
            }
        };
        match answered {
            Some(Ok(success)) => return Some(Ok(success)),
            Some(Err(error)) => failure = failure.or(Some(error)),
            None => return failure.map(Err),
        }
    }
}
