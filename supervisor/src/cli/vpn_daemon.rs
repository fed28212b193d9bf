//! `warren vpn-daemon run`: the tunnel process, as managers start it (vpn-protocol 1.2). Managers look at
//! the exit status and show the end of stderr, so both are those of deployed tunnels, word by word. Nothing
//! but help goes to stdout: it may be the descriptor that the manager listens at.

use std::{
    ffi::OsString,
    fmt,
    io::{self, Write},
    num::{IntErrorKind, ParseIntError},
    path::PathBuf,
    process::ExitCode,
};

use warren_actors::{dial::ClientCertificate, facts::NetworkOwner};
use warren_observability::logs::{Format, LogOptions};
use warren_supervisor::tunnel::{self, TunnelArgs};

const PARENT: &str = "vpn-daemon";
const COMMAND: &str = "vpn-daemon run";

const READ_VARIABLE: &str = "CODER_VPN_DAEMON_RPC_READ_HANDLE";
const WRITE_VARIABLE: &str = "CODER_VPN_DAEMON_RPC_WRITE_HANDLE";

const PARENT_HELP: &str = "\
USAGE:
  warren vpn-daemon [subcommand]

  The tunnel process of a manager.

SUBCOMMANDS:
    run    Run the tunnel until its manager stops it
";

const HELP: &str = "\
USAGE:
  warren vpn-daemon run --rpc-read-handle int --rpc-write-handle int

  Run the tunnel until its manager stops it. Managers start this; people start `warren service`.

OPTIONS:
      --rpc-read-handle int, $CODER_VPN_DAEMON_RPC_READ_HANDLE
          The number of the descriptor to hear the manager from.

      --rpc-write-handle int, $CODER_VPN_DAEMON_RPC_WRITE_HANDLE
          The number of the descriptor to tell the manager by.

ENVIRONMENT:
  WARREN_LOG    what to log on stderr, such as \"info\" or \"info,warren_actors=debug\"

Exit status: 0 stopped, 1 bad command line or handshake, 69 the manager is gone, 70 a part needed too many
restarts, 76 the manager broke the protocol.
";

/// Runs the tunnel role with what follows `vpn-daemon` on the command line.
pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    let arguments: Vec<String> =
        arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
    match parse(&arguments, |name| std::env::var_os(name)) {
        Ok(Order::Help(text)) => {
            // Whoever asked for help and went away has missed nothing.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Order::Run(args)) => {
            tunnel::run(*args).unwrap_or_else(|error| report(&Refusal::command(COMMAND, error)))
        }
        Err(refusal) => report(&refusal),
    }
}

fn report(refusal: &Refusal) -> ExitCode {
    // The exit status says it too, where nobody reads stderr any more.
    let _ = writeln!(io::stderr(), "{refusal}");
    ExitCode::FAILURE
}

/// What a command line asks for.
#[derive(Debug)]
enum Order {
    Help(&'static str),
    Run(Box<TunnelArgs>),
}

/// Why a command line, or what it names, is refused.
#[derive(Debug)]
enum Refusal {
    /// The parser's text, which stands alone.
    Parser(String),
    /// The command's, which ends with two lines.
    Command { command: &'static str, error: String },
    /// There is no such command.
    Subcommand(String),
}

impl Refusal {
    fn command(command: &'static str, error: impl fmt::Display) -> Self {
        Self::Command { command, error: error.to_string() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parser(text) => f.write_str(text),
            Self::Command { command, error } => write!(
                f,
                "Encountered an error running \"warren {command}\", see \"warren {command} --help\" for more \
                 information\nerror: {error}"
            ),
            Self::Subcommand(name) => {
                let error = format!("unrecognized subcommand {name:?}");
                write!(f, "---\nerror: {error}\n{}", Self::command(PARENT, &error))
            }
        }
    }
}

/// What the flags say. A flag that is given twice counts as it was given last.
#[derive(Debug, Default)]
struct Flags {
    help: bool,
    read: Option<i64>,
    write: Option<i64>,
    no_device: bool,
    allow_faults: bool,
    agent_metrics: bool,
    ca_file: Option<PathBuf>,
    client_cert_file: Option<PathBuf>,
    client_key_file: Option<PathBuf>,
    format: Format,
    positional: Vec<String>,
}

fn parse(arguments: &[String], variable: impl Fn(&str) -> Option<OsString>) -> Result<Order, Refusal> {
    let run = match arguments.split_first() {
        None => return Ok(Order::Help(PARENT_HELP)),
        Some((first, rest)) if first == "run" => rest,
        Some((first, _)) if first == "--help" || first == "-h" => return Ok(Order::Help(PARENT_HELP)),
        Some((first, _)) if first.starts_with('-') => {
            return Err(bad_flags(arguments, PARENT, &unknown(first)));
        }
        Some((first, _)) => return Err(Refusal::Subcommand(first.clone())),
    };
    let from_environment = environment(&variable)?;
    let flags = flags(run).map_err(|reason| bad_flags(arguments, COMMAND, &reason))?;
    if flags.help {
        return Ok(Order::Help(HELP));
    }
    let handles = (flags.read.or(from_environment.read), flags.write.or(from_environment.write));
    let (Some(read), Some(write)) = handles else {
        return Err(Refusal::Parser(missing(handles)));
    };
    if !flags.positional.is_empty() {
        let (count, given) = (flags.positional.len(), flags.positional.join(" "));
        return Err(Refusal::command(COMMAND, format!("wanted no args but got {count} [{given}]")));
    }
    let client_certificate = match (flags.client_cert_file, flags.client_key_file) {
        (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => {
            let reason = "--client-cert-file and --client-key-file go together";
            return Err(bad_flags(arguments, COMMAND, reason));
        }
    };
    let filter = variable("WARREN_LOG").filter(|filter| !filter.is_empty());
    let filter = filter.map_or("info".to_owned(), |filter| filter.to_string_lossy().into_owned());
    Ok(Order::Run(Box::new(TunnelArgs {
        read,
        write,
        link: from_environment.link,
        sockets: from_environment.sockets,
        default_network: if flags.no_device { NetworkOwner::Nobody } else { NetworkOwner::Tunnel },
        allow_faults: flags.allow_faults,
        agent_metrics: flags.agent_metrics,
        ca_file: flags.ca_file,
        client_certificate,
        logs: LogOptions { format: flags.format, filter },
        version: super::VERSION,
    })))
}

/// The numbers that the environment names.
struct Environment {
    read: Option<i64>,
    write: Option<i64>,
    link: Option<i32>,
    sockets: Option<i32>,
}

fn environment(variable: impl Fn(&str) -> Option<OsString>) -> Result<Environment, Refusal> {
    let mut errors = Vec::new();
    let mut handle = |name: &str, flag: &str| {
        let text = variable(name)?;
        number(&text.to_string_lossy()).map_err(|error| errors.push(format!("parse {flag:?}: {error}"))).ok()
    };
    let (read, write) =
        (handle(READ_VARIABLE, "rpc-read-handle"), handle(WRITE_VARIABLE, "rpc-write-handle"));
    let [link, sockets] = ["WARREN_LINK_FD", "WARREN_SOCKETS_FD"]
        .map(|name| handle(name, name).map(|number| i32::try_from(number).unwrap_or(-1)));
    if errors.is_empty() {
        return Ok(Environment { read, write, link, sockets });
    }
    let noun = if errors.len() == 1 { "error" } else { "errors" };
    let list = errors.iter().map(|error| format!("\n\t* {error}")).collect::<String>();
    Err(Refusal::Parser(format!("parsing env: {} {noun} occurred:{list}", errors.len())))
}

fn flags(arguments: &[String]) -> Result<Flags, String> {
    let mut flags = Flags::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            flags.positional.extend(rest.cloned());
            break;
        }
        if !argument.starts_with('-') || argument == "-" {
            flags.positional.push(argument.clone());
            continue;
        }
        let (name, given) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (argument.as_str(), None),
        };
        let mut value = || {
            let value = given.or_else(|| rest.next().map(String::as_str));
            value.ok_or_else(|| format!("flag needs an argument: {name}"))
        };
        match name {
            "--help" | "-h" => flags.help = switch(name, given)?,
            "--rpc-read-handle" => flags.read = Some(handle(name, value()?)?),
            "--rpc-write-handle" => flags.write = Some(handle(name, value()?)?),
            "--no-device" => flags.no_device = switch(name, given)?,
            #[cfg(feature = "lab")]
            "--allow-faults" => flags.allow_faults = switch(name, given)?,
            "--agent-metrics" => flags.agent_metrics = switch(name, given)?,
            "--ca-file" => flags.ca_file = Some(value()?.into()),
            "--client-cert-file" => flags.client_cert_file = Some(value()?.into()),
            "--client-key-file" => flags.client_key_file = Some(value()?.into()),
            "--log-format" => {
                let value = value()?;
                flags.format = value.parse().map_err(|error: String| invalid(name, value, error))?;
            }
            _ => return Err(unknown(name)),
        }
    }
    Ok(flags)
}

fn switch(name: &str, given: Option<&str>) -> Result<bool, String> {
    let Some(value) = given else { return Ok(true) };
    value.parse().map_err(|_| invalid(name, value, "use true or false"))
}

fn handle(name: &str, value: &str) -> Result<i64, String> {
    number(value).map_err(|error| invalid(name, value, error))
}

/// A decimal number, or why it is none in the words of deployed tunnels.
fn number(text: &str) -> Result<i64, String> {
    text.parse().map_err(|error: ParseIntError| {
        let reason = match error.kind() {
            IntErrorKind::PosOverflow | IntErrorKind::NegOverflow => "value out of range",
            _ => "invalid syntax",
        };
        format!("strconv.ParseInt: parsing {text:?}: {reason}")
    })
}

fn invalid(name: &str, value: &str, reason: impl fmt::Display) -> String {
    format!("invalid argument {value:?} for {name:?} flag: {reason}")
}

fn unknown(argument: &str) -> String {
    match argument.strip_prefix('-').and_then(|flag| flag.chars().next()) {
        Some('-') | None => format!("unknown flag: {}", argument.split('=').next().unwrap_or(argument)),
        Some(letter) => format!("unknown shorthand flag: {letter:?} in {argument}"),
    }
}

fn missing((read, write): (Option<i64>, Option<i64>)) -> String {
    let names = [(read, "rpc-read-handle"), (write, "rpc-write-handle")];
    let names: Vec<_> = names.iter().filter(|(given, _)| given.is_none()).map(|(_, name)| *name).collect();
    format!("Missing values for the required flags: {}", names.join(", "))
}

fn bad_flags(arguments: &[String], command: &str, reason: &str) -> Refusal {
    let all =
        std::iter::once(PARENT).chain(arguments.iter().map(String::as_str)).collect::<Vec<_>>().join(" ");
    Refusal::Parser(format!("parsing flags ([{all}]) for \"warren {command}\": {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The recorded vectors are run against the program itself, in `tests/tunnel.rs`.
    fn parsed(line: &str, variables: &[(&str, &str)]) -> Result<Order, Refusal> {
        let arguments: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        parse(&arguments, |name| find(name).map(|(_, value)| OsString::from(value)))
    }

    fn run(line: &str, variables: &[(&str, &str)]) -> TunnelArgs {
        match parsed(line, variables) {
            Ok(Order::Run(args)) => *args,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn refusal(line: &str, variables: &[(&str, &str)]) -> String {
        parsed(line, variables).unwrap_err().to_string()
    }

    #[test]
    fn a_flag_has_its_value_behind_it_or_after_an_equals_sign_and_the_last_one_counts() {
        let args = run("run --rpc-read-handle=3 --rpc-write-handle 4 --rpc-read-handle 5", &[]);
        assert_eq!((args.read, args.write), (5, 4));
    }

    #[test]
    fn a_flag_wins_over_the_environment_and_each_may_stand_for_one_handle() {
        let variables = [
            (READ_VARIABLE, "7"),
            (WRITE_VARIABLE, "8"),
            ("WARREN_LINK_FD", "9"),
            ("WARREN_SOCKETS_FD", "10"),
        ];
        let args = run("run --rpc-write-handle 4", &variables);
        assert_eq!((args.read, args.write, args.link, args.sockets), (7, 4, Some(9), Some(10)));
    }

    #[test]
    fn what_is_not_said_is_the_tunnels_own_network_and_a_log_for_people() {
        let args = run("run --rpc-read-handle 3 --rpc-write-handle 4", &[("WARREN_LOG", "")]);
        assert_eq!(args.default_network, NetworkOwner::Tunnel);
        assert_eq!((args.logs.format, args.logs.filter.as_str()), (Format::Text, "info"));
        assert!(
            !args.allow_faults && args.ca_file.is_none() && args.link.is_none() && args.sockets.is_none()
        );
    }

    #[test]
    fn hidden_flags_are_for_our_own_service() {
        let line = "run --rpc-read-handle 3 --rpc-write-handle 4 --no-device --agent-metrics --ca-file /ca.pem --client-cert-file /c --client-key-file /k --log-format=json";
        let args = run(line, &[("WARREN_LOG", "debug")]);
        assert_eq!(args.default_network, NetworkOwner::Nobody);
        assert!(args.agent_metrics);
        assert_eq!(args.ca_file, Some(PathBuf::from("/ca.pem")));
        let files = ClientCertificate { certificate: "/c".into(), key: "/k".into() };
        assert_eq!(args.client_certificate, Some(files));
        assert_eq!((args.logs.format, args.logs.filter.as_str()), (Format::Json, "debug"));
        for word in
            ["no-device", "ca-file", "client-cert", "client-key", "allow-faults", "agent-metrics", "LINK"]
        {
            assert!(!HELP.contains(word), "{word}");
        }
    }

    #[test]
    fn parser_errors_name_the_whole_command_line() {
        let begin =
            |line: &str| format!("parsing flags ([vpn-daemon {line}]) for \"warren vpn-daemon run\": ");
        for (line, reason) in [
            ("run --rpc-read-handle", "flag needs an argument: --rpc-read-handle"),
            (
                "run --rpc-read-handle 3 --rpc-write-handle 4 --client-key-file /k",
                "--client-cert-file and --client-key-file go together",
            ),
            ("run -x", "unknown shorthand flag: 'x' in -x"),
            ("run --bogus=1", "unknown flag: --bogus"),
            (
                "run --no-device=maybe",
                "invalid argument \"maybe\" for \"--no-device\" flag: use true or false",
            ),
        ] {
            assert_eq!(refusal(line, &[]), begin(line) + reason);
        }
    }

    #[test]
    fn everything_wrong_with_the_environment_is_told_at_once() {
        let text = refusal("run", &[(READ_VARIABLE, ""), (WRITE_VARIABLE, "0x4")]);
        let expected = "parsing env: 2 errors occurred:\
             \n\t* parse \"rpc-read-handle\": strconv.ParseInt: parsing \"\": invalid syntax\
             \n\t* parse \"rpc-write-handle\": strconv.ParseInt: parsing \"0x4\": invalid syntax";
        assert_eq!(text, expected);
    }

    #[test]
    fn arguments_behind_two_dashes_are_positional() {
        let text = refusal("run --rpc-read-handle 3 --rpc-write-handle 4 -- --help x", &[]);
        assert!(text.ends_with("\nerror: wanted no args but got 2 [--help x]"), "{text}");
    }
}
