//! The service process: what it is made of, and how long it lives.
//!
//! ```text
//! root      one_for_one  3 in 300 s
//! ├─ host      the device, its address and routes
//! ├─ intent    what is wanted, on the disk
//! ├─ tunnels   the tunnel process's life
//! ├─ api       local API, metrics, health
//! └─ clients   leg B
//! ```
//!
//! | It ends because | Exit status |
//! |---|---|
//! | configuration, directories or sockets are of no use | 1 |
//! | a signal asked for it | 0 |
//! | a part needed too many restarts | 70 |
//!
//! At its end the tunnel ends first, in order, and what is wanted stays on the disk for the next service.

use std::{
    io,
    net::TcpListener,
    os::{fd::RawFd, unix::net::UnixListener},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};
use warren_actors::{
    dial::{DialOptions, Dialer, SetupError},
    runtime::Address,
};
use warren_observability::{
    exporter::{Exporter, Process},
    logs::{self, Format, LogError},
    names,
};

use crate::{
    api::Api,
    child::{ChildSpec, End, SupervisorSpec},
    clients::Clients,
    config::{self, Config, ConfigError},
    facts::{Options, Service},
    host::Host,
    intent::Intent,
    paths::{Overrides, PathError, Paths},
    process::{
        Spawner,
        hardening::{self, Gains},
    },
    sockets::{self, Lock, SocketError},
    tree::Tree,
    tunnels::{self, Tunnels},
};

/// How long everything may take to end: the tunnel's ladder, and the other parts.
const STOP_LIMIT: Duration = Duration::from_secs(25);
/// How long what blocks a thread may keep the process from ending.
const THREADS_LIMIT: Duration = Duration::from_millis(500);
/// Two are enough for parts that finish in milliseconds; packets are the tunnel's.
const WORKERS: usize = 2;
/// Parts that hear from nobody but themselves.
const MAILBOX: usize = 16;
/// The exit status of a service that gave up.
const GAVE_UP: u8 = 70;

/// What the command line says.
#[derive(Debug, Clone)]
pub struct ServiceArgs {
    /// Configuration file.
    pub config: Option<PathBuf>,
    /// Directory for the sockets.
    pub runtime_dir: Option<PathBuf>,
    /// Directory for what outlives a restart.
    pub state_dir: Option<PathBuf>,
    /// Where metrics and health are served.
    pub metrics_listen: Option<String>,
    /// An inherited listener for metrics and health.
    pub metrics_fd: Option<RawFd>,
    /// How log lines look.
    pub log_format: Option<Format>,
    /// What is logged.
    pub log_filter: Option<String>,
    /// Whether to run without a device.
    pub no_tun: bool,
    /// Whether faults may be forced into parts.
    pub allow_faults: bool,
    /// The program's version.
    pub version: &'static str,
}

/// Why a service cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The configuration is of no use.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Certificates or a key cannot be used.
    #[error(transparent)]
    Certificates(#[from] SetupError),
    /// There is no place for sockets or state.
    #[error(transparent)]
    Paths(#[from] PathError),
    /// There is no socket to be had.
    #[error(transparent)]
    Sockets(#[from] SocketError),
    /// Logs cannot be set up.
    #[error(transparent)]
    Logs(#[from] LogError),
    /// Metrics cannot be set up.
    #[error("cannot set up metrics: {0}")]
    Metrics(String),
    /// There are no threads or signals to be had.
    #[error("cannot prepare the service: {0}")]
    Prepare(#[from] io::Error),
}

/// What the service shows to others: its sockets and its metrics. The sockets belong here, so that they
/// survive the parts that serve them.
pub struct Surface {
    /// Where clients of leg B connect.
    pub vpn: Arc<[UnixListener]>,
    /// Where the local API is served.
    pub api: UnixListener,
    /// Where metrics and health are served on loopback.
    pub metrics: Option<TcpListener>,
    /// The metrics of this process.
    pub exporter: Exporter,
    /// The supervision tree, once it runs.
    pub tree: OnceLock<Tree>,
}

/// Runs the service until its end, and returns the exit status that says why it ended.
pub fn run_service(args: ServiceArgs) -> ExitCode {
    match run(args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("warren: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: ServiceArgs) -> Result<u8, ServiceError> {
    let uid = rustix::process::geteuid().as_raw();
    let overrides =
        Overrides { runtime_dir: args.runtime_dir, state_dir: args.state_dir, config: args.config };
    let paths = Paths::resolve(&overrides, uid, |name| std::env::var_os(name))?;
    let config = config::load(&paths.config, paths.config_is_named)?;
    let listen = args.metrics_listen.as_deref().map_or(Ok(config.metrics_listen), config::metrics_flag)?;
    let inherited = args.metrics_fd.map(sockets::inherited).transpose()?;
    let log_options = config::log_options(args.log_format, args.log_filter, &config);
    // While there is one thread, and before anything secret is read.
    let gains = if config.tunnel_binary.is_some() { Gains::Foreign } else { Gains::Never };
    let failed = hardening::harden(gains);
    logs::init(&log_options, None)?;
    for (what, error) in failed {
        tracing::warn!(what, %error, "a precaution could not be taken");
    }
    check_certificates(&config)?;
    paths.prepare()?;
    let _lock = Lock::take(&paths.state_dir)?;
    let (group, mode) = (sockets::group(&paths, &config)?, paths.scope.socket_mode());
    let vpn_paths = std::iter::once(paths.vpn_socket()).chain(config.extra_socket.clone());
    let exporter = Exporter::install(Process::Service, args.version);
    let surface = Arc::new(Surface {
        vpn: vpn_paths.map(|path| sockets::listen(&path, mode, group)).collect::<Result<Arc<[_]>, _>>()?,
        api: sockets::listen(&paths.api_socket(), mode, group)?,
        metrics: sockets::metrics(inherited, listen)?,
        exporter: exporter.map_err(|error| ServiceError::Metrics(error.to_string()))?,
        tree: OnceLock::new(),
    });
    metrics::gauge!(names::CONFIG_LAST_RELOAD_SUCCESSFUL).set(1.0);
    let options = Options {
        with_device: !args.no_tun,
        allow_faults: args.allow_faults,
        version: args.version,
        uid,
        log_filter: log_options.filter,
        agent_metrics: config.metrics_per_agent,
        ca_file: config.ca_file.clone(),
        client_certificate: config.client_certificate.clone(),
    };
    let runtime = runtime()?;
    let spawner = Spawner::start(runtime.handle().clone())?;
    let service = Arc::new(Service::new(paths, config, options, spawner));
    let status = runtime.block_on(live(Arc::clone(&service), surface));
    runtime.shutdown_timeout(THREADS_LIMIT);
    for path in
        [service.paths.vpn_socket(), service.paths.api_socket()].iter().chain(&service.config.extra_socket)
    {
        let _ = std::fs::remove_file(path);
    }
    status
}

/// The tunnel reads them at its start, out of sight: what is wrong with them is told now.
fn check_certificates(config: &Config) -> Result<(), SetupError> {
    let (ca_file, client) = (config.ca_file.clone(), config.client_certificate.clone());
    if ca_file.is_some() || client.is_some() {
        Dialer::new(DialOptions { ca_file, client })?;
    }
    Ok(())
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()
}

/// Runs until there is a reason to end, and ends everything in order.
async fn live(service: Arc<Service>, surface: Arc<Surface>) -> Result<u8, ServiceError> {
    let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
    let [terminate, interrupt, hangup] = kinds.map(signal);
    let (mut terminate, mut interrupt, mut hangup) = (terminate?, interrupt?, hangup?);
    tracing::info!(
        version = service.options.version,
        socket = %service.paths.vpn_socket().display(),
        metrics = ?surface.metrics.as_ref().and_then(|listener| listener.local_addr().ok()),
        device = service.options.with_device,
        "the service begins"
    );
    let tree = match Tree::start(root(&service, &surface)).await {
        Ok(tree) => tree,
        Err(end) => {
            tracing::error!(reason = %end, "the service cannot begin");
            return Ok(GAVE_UP);
        }
    };
    let _ = surface.tree.set(tree.clone());
    let end = tokio::select! {
        _ = terminate.recv() => End::Stopped,
        _ = interrupt.recv() => End::Stopped,
        _ = hangup.recv() => End::Stopped,
        end = tree.ended() => end,
    };
    tracing::info!(reason = %end, "the service ends");
    if !tree.stop(STOP_LIMIT).await {
        tracing::warn!(limit = ?STOP_LIMIT, "the service did not end in time");
    }
    Ok(if end.is_orderly() { 0 } else { GAVE_UP })
}

/// The parts, in the order of their start. What is wanted is known before the tunnel is; clients are let in
/// when there is somebody to serve them.
fn root(service: &Arc<Service>, surface: &Arc<Surface>) -> SupervisorSpec {
    let [host, tunnels, api, clients] = [(); 4].map(|()| Arc::clone(service));
    let (shown, sockets) = (Arc::clone(surface), Arc::clone(&surface.vpn));
    let (state_dir, desired) = (service.paths.state_dir.clone(), service.desired.clone());
    let intent = move || Intent::new(state_dir.clone(), desired.clone());
    SupervisorSpec::new("root", 3, Duration::from_secs(300))
        .child(ChildSpec::part(&service.host_part, move || Host::new(&host)))
        .child(ChildSpec::part(&service.intent, intent))
        .child(
            ChildSpec::part(&service.tunnels, move || Tunnels::new(Arc::clone(&tunnels)))
                .grace(tunnels::STOP_GRACE),
        )
        .child(ChildSpec::part(&Address::new("api", MAILBOX), move || {
            Api::new(Arc::clone(&api), Arc::clone(&shown))
        }))
        .child(ChildSpec::part(&Address::new("clients", MAILBOX), move || {
            Clients::new(Arc::clone(&clients), Arc::clone(&sockets))
        }))
}
