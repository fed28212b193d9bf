//! The command line: one file a verb, data on stdout, everything else on stderr.

mod api;
mod credentials;
mod debug;
mod down;
mod exit;
#[cfg(feature = "lab")]
mod lab;
mod legb;
mod login;
mod netcheck;
mod ping;
mod service;
mod signals;
mod status;
mod up;
mod vpn_daemon;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use exit::{CliError, Exit, Outcome};

/// The version that `warren version`, `--version` and `warren_build_info` show.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

const AFTER_HELP: &str = "\
Examples:
  warren service &                       run the service in the foreground of any init system
  warren login https://coder.example.com ask for a token, check it, keep it
  warren up --wait                       connect, and wait until the agents answer
  warren status                          addresses ready to paste
  warren lab                             a whole deployment on this machine, to try it all

Exit status: 0 ok, 1 failed, 2 usage, 3 service not running, 4 denied, 5 login needed,
6 unhealthy, 7 timeout, 8 version mismatch.";

#[derive(Parser)]
#[command(name = "warren", version = VERSION, about = "Joins this machine to a Coder deployment's tailnet", after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    reach: Reach,
    #[command(subcommand)]
    verb: Verb,
}

/// How a client reaches its service.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Reach {
    /// Directory with the service's sockets [default: $XDG_RUNTIME_DIR/warren, else /run/warren]
    #[arg(long, global = true, env = "WARREN_RUNTIME_DIR", value_name = "DIR")]
    pub(crate) socket_dir: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Verb {
    /// Keep a session token for a deployment, after checking it there
    Login(login::Args),
    /// Forget the token, here and in the service
    Logout(login::LogoutArgs),
    /// Connect to the deployment of the last login
    Up(up::Args),
    /// Disconnect; the token is kept
    Down(down::Args),
    /// Show the tunnel, the workspaces and how their agents answer
    Status(status::Args),
    /// Ping an agent over the path that is in use
    Ping(ping::Args),
    /// Show how the world sees this machine, and how far the relays are
    Netcheck(netcheck::Args),
    /// Look inside the service
    Debug(debug::Args),
    /// Run the service in the foreground
    Service(service::Args),
    /// Run a whole deployment on this machine and connect to it
    #[cfg(feature = "lab")]
    Lab(lab::Args),
    /// Print the version
    Version,
    /// The tunnel process, as a manager starts it
    #[command(name = "vpn-daemon", hide = true, disable_help_flag = true)]
    VpnDaemon {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// Runs the program and returns its exit status.
pub(crate) fn run() -> ExitCode {
    // The tunnel role has a command line of its own, which clap must not touch (vpn-protocol 1.2).
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|verb| verb == "vpn-daemon") {
        return vpn_daemon::run(arguments.collect());
    }
    let cli = Cli::parse();
    let outcome = match cli.verb {
        Verb::Service(args) => return service::run(args),
        Verb::VpnDaemon { arguments } => return vpn_daemon::run(arguments),
        #[cfg(feature = "lab")]
        Verb::Lab(args) => lab::run(args),
        Verb::Version => version(),
        Verb::Login(args) => block_on(login::login(args)),
        Verb::Logout(args) => block_on(login::logout(cli.reach, args)),
        Verb::Up(args) => block_on(up::run(cli.reach, args)),
        Verb::Down(args) => block_on(down::run(cli.reach, args)),
        Verb::Status(args) => block_on(status::run(cli.reach, args)),
        Verb::Ping(args) => block_on(ping::run(cli.reach, args)),
        Verb::Netcheck(args) => block_on(netcheck::run(cli.reach, args)),
        Verb::Debug(args) => block_on(debug::run(cli.reach, args)),
    };
    outcome.unwrap_or_else(report).into()
}

fn report(error: CliError) -> Exit {
    let text = error.to_string();
    if !text.is_empty() {
        eprintln!("warren: {text}");
    }
    error.exit
}

fn version() -> Outcome {
    println!("warren {VERSION}");
    Ok(Exit::Ok)
}

/// A client needs one thread: it waits most of the time.
fn block_on(command: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(command);
    // A prompt or a name lookup that still blocks must not keep the program from ending.
    runtime.shutdown_background();
    outcome
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_a_person_sees_says_what_it_does() {
        let command = Cli::command();
        let verbs: Vec<_> = command.get_subcommands().filter(|verb| !verb.is_hide_set()).collect();
        assert!(verbs.len() >= 10);
        for verb in verbs {
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
        }
    }
}
