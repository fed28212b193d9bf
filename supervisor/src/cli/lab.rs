//! `warren lab`: a whole deployment on this machine, and warren connected to it.
//!
//! ```text
//! warren lab            opens the metrics listener, makes the namespaces, waits, cleans up
//! └─ warren lab         inside: control plane, relay and agents on loopback; the display
//!    └─ warren service  the manager: device, routes, supervision
//!       └─ tunnel       WireGuard, relay, pings
//! ```
//! Without namespaces (refused by the kernel, or `--no-tun`) the second level runs where it is and the
//! service has no device: status and pings, no pages.

mod display;
mod folder;
mod inside;
mod namespace;
mod probe;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::PathBuf,
    time::Duration,
};

use folder::Folder;
use tokio::process::Command;
use warren_lab::{Lab, LabOptions, Sending};

use super::{
    exit::{CliError, Exit, Outcome},
    signals::Signals,
};

const EXAMPLES: &str = "\
Examples:
  warren lab
  warren lab --agents 3 --duration 30s --json
  warren lab --relay-only        as where no UDP gets through
  warren lab --serve --json      a deployment only, for any tunnel or service to connect to

Every agent is pinged; pages and echoes are asked of the first 16.
Exit status with --duration: 0 if every agent was pinged, else 6.";

/// Agents that are reached directly: each has a socket, all in one process, and every path costs both ends probes.
const MAX_DIRECT: u32 = 256;

/// How long everything may take to end before it is killed.
const END_LIMIT: Duration = Duration::from_secs(15);

/// Run a whole deployment on this machine and connect to it
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// How many workspaces with an agent each
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=5000))]
    agents: u32,
    /// End after this long instead of on Ctrl-C
    #[arg(long, value_name = "DURATION")]
    duration: Option<humantime::Duration>,
    /// One JSON object a line on stdout
    #[arg(long)]
    json: bool,
    /// No namespaces and no device: status and pings only
    #[arg(long)]
    no_tun: bool,
    /// Control plane, relay and agents only, on the loopback of where this runs
    #[arg(long, conflicts_with_all = ["no_tun", "metrics_listen", "logs"])]
    serve: bool,
    /// A deployment that allows no direct paths: all goes through its relay, as for more than 256 agents
    #[arg(long)]
    relay_only: bool,
    /// Agents send datagrams one by one, as the reference's do
    #[arg(long, hide = true)]
    send_singly: bool,
    /// Where metrics and health are served, outside of the lab's network
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    metrics_listen: SocketAddr,
    /// Show the service's log on stderr instead of keeping it in a file
    #[arg(long)]
    logs: bool,
    /// Set by the outer lab: where sockets and state are kept
    #[arg(long, hide = true, value_name = "DIR")]
    inside: Option<PathBuf>,
    /// Set by the outer lab: the metrics listener
    #[arg(long, hide = true, value_name = "DESCRIPTOR")]
    metrics_fd: Option<RawFd>,
}

/// Runs the lab.
pub(crate) fn run(args: Args) -> Outcome {
    if args.inside.is_some() || args.serve {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        return runtime
            .block_on(async { if args.serve { serve(args).await } else { inside::run(args).await } });
    }
    // One thread: the inner lab must get the death signal of a thread that lives as long as we do.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(outside(args))
}

async fn outside(args: Args) -> Outcome {
    if !args.metrics_listen.ip().is_loopback() {
        return Err(CliError::new(
            Exit::Usage,
            "--metrics-listen must be a loopback address: there is no authentication",
        ));
    }
    let mut signals = Signals::listen()?;
    let listener = TcpListener::bind(args.metrics_listen)
        .map_err(|error| CliError::failed(format!("cannot listen at {}: {error}", args.metrics_listen)))?;
    let folder = Folder::new()?;
    let outcome = match device_problem(args.no_tun) {
        None => match spawn(&args, &folder, &listener, Isolation::Namespaces) {
            Ok(child) => supervise(child, &mut signals).await,
            Err(error) => {
                eprintln!(
                    "warren lab: the kernel allows no user namespace here ({error}): {}.",
                    namespace::REMEDY
                );
                without_device(&args, &folder, &listener, &mut signals).await
            }
        },
        Some(problem) => {
            eprintln!("warren lab: {problem}.");
            without_device(&args, &folder, &listener, &mut signals).await
        }
    };
    folder.close()?;
    outcome
}

/// Why there can be no device here, if so: asked for, or not permitted.
fn device_problem(no_tun: bool) -> Option<String> {
    if no_tun {
        return Some("no device, as asked".to_owned());
    }
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let error = opened.err()?;
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => "load the module with `sudo modprobe tun`",
        _ => {
            "give it the mode that Debian's udev gives it: `sudo chmod 0666 /dev/net/tun` \
              (it lets nobody touch the host's network: making a device still needs the privilege)"
        }
    };
    Some(format!("/dev/net/tun cannot be opened ({error}): {remedy}"))
}

async fn without_device(
    args: &Args,
    folder: &Folder,
    listener: &TcpListener,
    signals: &mut Signals,
) -> Outcome {
    eprintln!(
        "warren lab: going on without a device: status and pings are real, pages and echoes are left out."
    );
    let child = spawn(args, folder, listener, Isolation::None)?;
    supervise(child, signals).await
}

enum Isolation {
    Namespaces,
    None,
}

fn spawn(
    args: &Args,
    folder: &Folder,
    listener: &TcpListener,
    isolation: Isolation,
) -> io::Result<tokio::process::Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("lab").arg("--inside").arg(folder.path());
    command.args(["--agents", &args.agents.to_string()]);
    command.args(["--metrics-fd", &listener.as_raw_fd().to_string()]);
    if let Some(duration) = args.duration {
        command.args(["--duration", &duration.to_string()]);
    }
    command.args(args.json.then_some("--json")).args(args.logs.then_some("--logs"));
    command.args(args.relay_only.then_some("--relay-only"));
    command.args(args.send_singly.then_some("--send-singly"));
    let inherited = vec![listener.as_raw_fd(), folder.lock()];
    match isolation {
        Isolation::Namespaces => namespace::isolate(&mut command, inherited)?,
        Isolation::None => {
            command.arg("--no-tun");
            namespace::inherit(&mut command, inherited);
        }
    }
    command.spawn()
}

/// Waits for the inner lab. A signal that only we got is handed on, and the inner lab ends in order.
async fn supervise(mut child: tokio::process::Child, signals: &mut Signals) -> Outcome {
    let status = tokio::select! {
        status = child.wait() => status?,
        () = signals.received() => {
            if let Some(pid) = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            match tokio::time::timeout(END_LIMIT, child.wait()).await {
                Ok(status) => status?,
                Err(_) => {
                    child.kill().await?;
                    return Err(CliError::failed("the lab did not end in time and was killed"));
                }
            }
        }
    };
    match status.code() {
        Some(0) => Ok(Exit::Ok),
        Some(code) if code == Exit::Unhealthy as i32 => Ok(Exit::Unhealthy),
        Some(code) if code == Exit::Timeout as i32 => Ok(Exit::Timeout),
        _ => Ok(Exit::Failed),
    }
}

/// Control plane, relay and agents only.
async fn serve(args: Args) -> Outcome {
    let mut signals = Signals::listen()?;
    let lab = Lab::start(options(&args)).await.map_err(CliError::failed)?;
    display::serving(&lab, args.json)?;
    tokio::select! {
        () = signals.received() => {}
        () = elapsed(args.duration) => {}
    }
    lab.stop().await;
    Ok(Exit::Ok)
}

/// The deployment as asked for.
fn options(args: &Args) -> LabOptions {
    LabOptions {
        agents: args.agents as usize,
        direct: !args.relay_only && args.agents <= MAX_DIRECT,
        disable_direct: args.relay_only,
        direct_sending: if args.send_singly { Sending::Singly } else { Sending::Runs },
        ..LabOptions::default()
    }
}

/// Waits for the end of `duration`, for ever if there is none.
async fn elapsed(duration: Option<humantime::Duration>) {
    match duration {
        Some(duration) => tokio::time::sleep(duration.into()).await,
        None => std::future::pending().await,
    }
}

/// Where metrics are served, as seen from outside.
fn metrics_url(listener: &OwnedFd) -> Result<String, CliError> {
    let address = rustix::net::getsockname(listener).map_err(CliError::failed)?;
    let address =
        SocketAddr::try_from(address).unwrap_or_else(|_| SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    Ok(format!("http://{address}/metrics"))
}
