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
    facts::{Options, Service, TunnelState},
    intent::Order,
    paths::{Paths, Scope},
    process::Spawner,
};

/// A service in which nothing runs, whose tunnel belongs to this user.
#[expect(clippy::expect_used, reason = "a fuzz target that cannot begin")]
pub fn service(owner: u32, allow_http_hosts: BTreeSet<String>) -> Arc<Service> {
    let folder = Path::new("/nonexistent");
    let paths = Paths {
        scope: Scope::User,
        runtime_dir: folder.to_owned(),
        state_dir: folder.to_owned(),
        config: folder.join("config.toml"),
        config_is_named: false,
    };
    let options = Options {
        with_device: false,
        allow_faults: false,
        version: "0.0.0",
        uid: 0,
        log_filter: "off".into(),
        agent_metrics: false,
        ca_file: None,
        client_certificate: None,
    };
    let runtime = Runtime::new().expect("a runtime");
    let spawner = Spawner::start(runtime.handle().clone()).expect("a thread");
    let config = Config { allow_http_hosts, ..Config::default() };
    let service = Service::new(paths, config, options, spawner);
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
