//! How fuzz targets reach leg B: a client at any stream, and the check of what it orders.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    runtime::Runtime,
};
use warren_proto::vpn;

use super::{order, serve_over};
use crate::{
    access::Caller,
    config::Config,
    facts::{Service, TunnelState, stand_in},
    intent::Order,
    process::Spawner,
};

/// A service in which nothing runs, whose tunnel belongs to this user.
#[expect(clippy::expect_used, reason = "a fuzz target that cannot begin")]
pub fn service(owner: u32, allow_http_hosts: BTreeSet<String>) -> Arc<Service> {
    let runtime = Runtime::new().expect("a runtime");
    let spawner = Spawner::start(runtime.handle().clone()).expect("a thread");
    let config = Config { allow_http_hosts, ..Config::default() };
    let service =
        Service::new(stand_in::paths(Path::new("/nonexistent")), config, stand_in::options(), spawner);
    let tunnel = service.tunnel.claim().expect("nobody else writes");
    tunnel.set(TunnelState { owner: Some(owner), ..TunnelState::default() });
    Arc::new(service)
}

/// Serves one client of this user until it is gone or turned out.
pub async fn serve<R, W>(service: Arc<Service>, uid: u32, read: R, write: W)
where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    serve_over(service, Caller { uid }, read, write).await;
}

/// The order of this user, or what is wrong with it.
pub fn check(start: vpn::StartRequest, uid: u32, http_hosts: &BTreeSet<String>) -> Result<Order, String> {
    order::order(start, uid, http_hosts)
}
