//! `warren service`: the service in the foreground, so that any init system can hold it.

use std::{path::PathBuf, process::ExitCode};

use warren_observability::logs::Format;
use warren_supervisor::service::{ServiceArgs, run_service};

const EXAMPLES: &str = "\
Examples:
  warren service
  warren service --log-format json --metrics-listen 127.0.0.1:9420
  sudo systemd-run --unit=warren -p RuntimeDirectory=warren -p StateDirectory=warren warren service

It makes the device warren0, so it needs CAP_NET_ADMIN; the tunnel process it starts needs nothing.";

/// Run the service in the foreground
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Configuration file [default: /etc/warren/config.toml as root, else $XDG_CONFIG_HOME/warren/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory for the sockets [default: /run/warren as root, else $XDG_RUNTIME_DIR/warren]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// Directory for what outlives a restart [default: /var/lib/warren as root, else $XDG_STATE_HOME/warren]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where metrics and health are served; loopback only
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_listen: Option<String>,
    /// An inherited, listening socket for metrics and health
    #[arg(long, value_name = "DESCRIPTOR", hide = true)]
    metrics_fd: Option<i32>,
    /// Log lines as text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<Format>,
    /// What to log, such as "info" or "info,warren_actors=debug" [default: info]
    #[arg(long, value_name = "DIRECTIVES", env = "WARREN_LOG")]
    log_filter: Option<String>,
    /// Run without a device: status and pings only
    #[arg(long)]
    no_tun: bool,
    /// Let the local API force faults into parts
    #[cfg(feature = "lab")]
    #[arg(long, hide = true)]
    allow_faults: bool,
}

/// Runs the service until it is told to end.
pub(crate) fn run(args: Args) -> ExitCode {
    run_service(ServiceArgs {
        config: args.config,
        runtime_dir: args.runtime_dir,
        state_dir: args.state_dir,
        metrics_listen: args.metrics_listen,
        metrics_fd: args.metrics_fd,
        log_format: args.log_format,
        log_filter: args.log_filter,
        no_tun: args.no_tun,
        #[cfg(feature = "lab")]
        allow_faults: args.allow_faults,
        #[cfg(not(feature = "lab"))]
        allow_faults: false,
        version: super::VERSION,
    })
}
