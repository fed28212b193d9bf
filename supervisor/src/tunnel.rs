//! The tunnel process: what it is made of, and how long it lives.
//!
//! ```text
//! root        one_for_one  3 in 120 s
//! ├─ session  answers the manager, writes `boot`
//! └─ net      as long as `boot` is set, 5 in 60 s          net.rs builds and ends it
//!    packet_io, (host), registry, relay, pinger, coordinator
//! ```
//!
//! | It ends because | Exit status |
//! |---|---|
//! | the command line, what was handed over, or the handshake is bad | 1 |
//! | a stop was answered, or a signal came | 0 |
//! | the manager is gone | 69 |
//! | a part needed too many restarts | 70 |
//! | the manager broke the protocol | 76 |
//!
//! Whatever the reason, the net ends in order first, within limits: whoever asked for the end does not wait
//! for a part that hangs.

use std::{fmt, io, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use warren_actors::{
    dial::{ClientCertificate, DialOptions, Dialer, SetupError},
    facts::NetworkOwner,
    runtime::{Address, Cell},
    session::{Ended, LogSink, Memory, Session, SessionDeps, Stream},
    speaker::{
        Speaker, SpeakerError,
        descriptors::{DescriptorError, Descriptors},
    },
    udp::{MakeSockets, OwnSockets},
};
use warren_observability::{
    exporter::{Exporter, Process},
    logs::{self, LogError, LogOptions},
};
use warren_proto::header::Role;

use crate::{
    child::{ChildSpec, End, SupervisorSpec},
    link::{self, ServiceSockets, SocketChannel},
    process::hardening::{self, Gains},
    tree::Tree,
};

mod answers;
mod handed;
mod host;
mod manager_log;
mod net;

use answers::Own;

/// How long the manager may take to say who it is (vpn-protocol 2.4).
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long the net may take to end: what is left of it then ends with the process.
const NET_LIMIT: Duration = Duration::from_secs(4);
/// How long the session may take to end after it.
const TREE_LIMIT: Duration = Duration::from_secs(2);
/// How long frames that were accepted may take to leave. Managers that do not read are not waited for.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// How long what blocks a thread, such as a name lookup, may keep the process from ending.
const THREADS_LIMIT: Duration = Duration::from_millis(500);
/// Everything the session hears comes from its own tasks.
const SESSION_MAILBOX: usize = 64;
/// Two are enough for parts that finish in milliseconds; packets have a thread of their own.
const WORKERS: usize = 2;

/// The exit status of a process that gave up.
const GAVE_UP: u8 = 70;

/// How a tunnel process is started.
#[derive(Debug, Clone)]
pub struct TunnelArgs {
    /// The number of the descriptor that the manager is heard from.
    pub read: i64,
    /// The number of the descriptor that the manager is told by.
    pub write: i64,
    /// The number of the private link's descriptor, if our own service started us.
    pub link: Option<i32>,
    /// The number of the descriptor by which our own service is asked for UDP sockets.
    pub sockets: Option<i32>,
    /// Who owns the network where the manager gives no device.
    pub default_network: NetworkOwner,
    /// Whether faults may be forced into parts over the private link.
    pub allow_faults: bool,
    /// Whether each agent has metrics of its own.
    pub agent_metrics: bool,
    /// Certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// What is shown to servers that ask who we are.
    pub client_certificate: Option<ClientCertificate>,
    /// What is logged, and how.
    pub logs: LogOptions,
    /// The program's version.
    pub version: &'static str,
}

/// Why a tunnel process cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The manager's two descriptors are of no use.
    #[error(transparent)]
    Descriptors(#[from] DescriptorError),
    /// What our own service handed over is of no use.
    #[error("what the service handed over as WARREN_{}_FD (fd={number}): {error}", .what.to_uppercase())]
    Handed {
        /// What it was for.
        what: &'static str,
        /// Its number.
        number: i32,
        /// What is wrong with it.
        error: io::Error,
    },
    /// Logs cannot be set up.
    #[error(transparent)]
    Logs(#[from] LogError),
    /// Metrics cannot be set up.
    #[error("cannot set up metrics: {0}")]
    Metrics(String),
    /// The certificates to trust cannot be read.
    #[error(transparent)]
    Dial(#[from] SetupError),
    /// There are no threads or signals to be had.
    #[error("cannot prepare the tunnel process: {0}")]
    Prepare(#[from] io::Error),
    /// There was no handshake.
    #[error("create new tunnel for client: {}", handshake_text(.error, *.read))]
    Handshake {
        /// The descriptor that the manager was expected at.
        read: i64,
        /// Why.
        error: SpeakerError,
    },
}

/// A failed read is told with its descriptor, as deployed tunnels do.
fn handshake_text(error: &SpeakerError, read: i64) -> String {
    let text = error.to_string();
    match error {
        SpeakerError::Read(_) => {
            text.replacen("read header: ", &format!("read header: read from pipe_read (fd={read}): "), 1)
        }
        SpeakerError::Deadline(_)
        | SpeakerError::Write(_)
        | SpeakerError::TooLong(_)
        | SpeakerError::Refused { .. } => text,
    }
}

/// Runs the tunnel until its end, and returns the exit status that says why it ended. Must be called while
/// the process has one thread.
pub fn run(args: TunnelArgs) -> Result<ExitCode, TunnelError> {
    let failed = hardening::harden(Gains::Never);
    let manager = handed::manager(args.read, args.write)?;
    let link = args.link.map(|number| handed::link(number, &args)).transpose()?;
    let sockets = args.sockets.map(|number| handed::sockets(number, &args)).transpose()?;
    let sink = LogSink::default();
    logs::init(&args.logs, Some(manager_log::reader(sink.clone(), &args.logs.filter)))?;
    for (what, error) in failed {
        tracing::warn!(what, %error, "a precaution could not be taken");
    }
    let exporter = Exporter::install(Process::Tunnel, args.version)
        .map_err(|error| TunnelError::Metrics(error.to_string()))?;
    let (ca_file, client) = (args.ca_file.clone(), args.client_certificate.clone());
    let dialer = Arc::new(Dialer::new(DialOptions { ca_file, client })?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let greeted = tokio::select! {
            greeted = greet(manager, args.read) => greeted?,
            () = signals.received() => return Ok(0),
        };
        let sockets = sockets.map(SocketChannel::new).transpose()?;
        Ok(live(Tunnel { stream: greeted, link, sockets, sink, exporter, dialer }, &args, signals).await)
    });
    runtime.shutdown_timeout(THREADS_LIMIT);
    outcome.map(ExitCode::from)
}

async fn greet(manager: Descriptors, read: i64) -> Result<Arc<Stream>, TunnelError> {
    let (from, to) = manager.open()?;
    let (speaker, inbox) = Speaker::connect(from, to, Role::Tunnel, Role::Manager, HANDSHAKE_LIMIT)
        .await
        .map_err(|error| TunnelError::Handshake { read, error })?;
    tracing::debug!(version = ?speaker.negotiated(), "the manager is there");
    Ok(Arc::new(Stream::new(speaker, inbox)))
}

/// What a tunnel is made of once its manager has greeted it.
struct Tunnel {
    stream: Arc<Stream>,
    link: Option<std::os::unix::net::UnixStream>,
    sockets: Option<SocketChannel>,
    sink: LogSink,
    exporter: Exporter,
    dialer: Arc<Dialer>,
}

/// Why a tunnel ends.
enum Cause {
    Stream(Ended),
    Signal,
    Tree(End),
    /// Who builds and ends nets has panicked.
    NoBuilder,
}

impl Cause {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Stream(ended) => ended.exit_code(),
            Self::Signal => 0,
            Self::Tree(_) | Self::NoBuilder => GAVE_UP,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(Ended::Stopped) => f.write_str("the manager stopped it"),
            Self::Stream(Ended::ManagerGone(text)) => write!(f, "the manager is gone: {text}"),
            Self::Stream(Ended::Protocol(text)) => write!(f, "the manager cannot be understood: {text}"),
            Self::Signal => f.write_str("a signal asked for it"),
            Self::Tree(end) => write!(f, "too many faults: {end}"),
            Self::NoBuilder => f.write_str("a defect outside of its parts"),
        }
    }
}

/// Runs until there is a reason to end, ends everything in order, and returns the exit status.
async fn live(tunnel: Tunnel, args: &TunnelArgs, mut signals: Signals) -> u8 {
    let deps = SessionDeps {
        stream: tunnel.stream,
        boot: Cell::new(None),
        net: Cell::new(None),
        memory: Cell::new(Memory::default()),
        default_network: args.default_network,
        logs: tunnel.sink,
    };
    let tree = match Tree::start(root(&deps)).await {
        Ok(tree) => tree,
        Err(end) => {
            tracing::error!(reason = %end, "the tunnel cannot begin");
            return GAVE_UP;
        }
    };
    let stop = CancellationToken::new();
    let sockets: Arc<dyn MakeSockets> = match tunnel.sockets {
        Some(channel) => Arc::new(ServiceSockets::new(channel)),
        None => Arc::new(OwnSockets),
    };
    let means = net::Means { dialer: tunnel.dialer, sockets };
    let mut nets =
        tokio::spawn(net::follow(tree.clone(), deps.boot.view(), deps.net.clone(), means, stop.clone()));
    if let Some(stream) = tunnel.link {
        serve_link(stream, Own::new(tree.clone(), deps.net.clone(), tunnel.exporter, args));
    }
    let cause = tokio::select! {
        ended = deps.stream.ended() => Cause::Stream(ended),
        () = signals.received() => Cause::Signal,
        end = tree.ended() => Cause::Tree(end),
        _ = &mut nets => Cause::NoBuilder,
    };
    tracing::info!(reason = %cause, "the tunnel process ends");
    stop.cancel();
    end(nets, &tree, &deps.stream).await;
    cause.exit_status()
}

/// The tree as it begins; the net is added to it.
fn root(deps: &SessionDeps) -> SupervisorSpec {
    let deps = deps.clone();
    SupervisorSpec::new("root", 3, Duration::from_secs(120))
        .child(ChildSpec::part(&Address::new("session", SESSION_MAILBOX), move || Session::new(deps.clone())))
}

/// Ends with its service, of which leg A tells reliably, or with the process.
fn serve_link(stream: std::os::unix::net::UnixStream, own: Own) {
    tokio::spawn(async move {
        match tokio::net::UnixStream::from_std(stream) {
            Ok(stream) => {
                let end = link::serve(stream, Arc::new(own)).await;
                tracing::debug!(reason = %end, "the private link has ended");
            }
            Err(error) => tracing::warn!(%error, "the private link cannot be used"),
        }
    });
}

async fn end(mut nets: JoinHandle<()>, tree: &Tree, stream: &Stream) {
    if !nets.is_finished() && timeout(NET_LIMIT, &mut nets).await.is_err() {
        tracing::warn!(limit = ?NET_LIMIT, "the net did not end in time");
    }
    if !tree.stop(TREE_LIMIT).await {
        tracing::warn!(limit = ?TREE_LIMIT, "the session did not end in time");
    }
    stream.close(CLOSE_LIMIT).await;
}

/// The signals that ask a process to end.
struct Signals([Signal; 3]);

impl Signals {
    fn listen() -> io::Result<Self> {
        let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
        let [terminate, interrupt, hangup] = kinds.map(signal);
        Ok(Self([terminate?, interrupt?, hangup?]))
    }

    async fn received(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
