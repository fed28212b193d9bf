//! The configuration: a TOML file under the flags of the command line. Every error names the file, the
//! key, and what to do.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use warren_actors::dial::ClientCertificate;
use warren_observability::logs::{Format, LogOptions};

use crate::process::binary;

/// Where metrics and health are served unless configured otherwise.
pub const METRICS_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9420);

/// The group that may talk to a system service, if it exists.
pub const DEFAULT_GROUP: &str = "warren";

/// Far above any configuration; keeps a wrong file out of memory.
const MAX_FILE: u64 = 1 << 20;

/// Where metrics and health are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricsListen {
    /// Nowhere.
    Off,
    /// At this loopback address.
    Address(SocketAddr),
}

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where metrics and health are served.
    pub metrics_listen: MetricsListen,
    /// Whether each agent has metrics of its own.
    pub metrics_per_agent: bool,
    /// Hosts that clients may name in `http://` URLs, besides loopback.
    pub allow_http_hosts: BTreeSet<String>,
    /// A second socket for leg B, for programs that expect it elsewhere.
    pub extra_socket: Option<PathBuf>,
    /// Certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// What is shown to servers that ask who this machine is.
    pub client_certificate: Option<ClientCertificate>,
    /// A program and its arguments that print more headers for the deployment, run before each start.
    pub header_command: Option<Vec<String>>,
    /// The group that may talk to a system service.
    pub group: Option<String>,
    /// How log lines look, if the file says so.
    pub log_format: Option<Format>,
    /// What is logged, if the file says so.
    pub log_filter: Option<String>,
    /// Another tunnel program than our own.
    pub tunnel_binary: Option<PathBuf>,
    /// The version that program must say it has.
    pub tunnel_version: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            metrics_listen: MetricsListen::Address(METRICS_LISTEN),
            metrics_per_agent: false,
            allow_http_hosts: BTreeSet::new(),
            extra_socket: None,
            ca_file: None,
            client_certificate: None,
            header_command: None,
            group: None,
            log_format: None,
            log_filter: None,
            tunnel_binary: None,
            tunnel_version: None,
        }
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is no TOML, or has a key or a type that is not known.
    #[error("the configuration {} is not understood: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what, from the parser.
        reason: String,
    },
    /// A value is not allowed.
    #[error("{source_name}: {key} = {value:?} {remedy}")]
    Value {
        /// The file or the command line.
        source_name: String,
        /// The key or flag.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// Why not, and what to do.
        remedy: &'static str,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    metrics_listen: Option<String>,
    metrics_per_agent: bool,
    allow_http_hosts: Vec<String>,
    extra_socket: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    client_cert_file: Option<PathBuf>,
    client_key_file: Option<PathBuf>,
    header_command: Option<Vec<String>>,
    group: Option<String>,
    log: Log,
    tunnel: Tunnel,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Log {
    format: Option<String>,
    filter: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tunnel {
    binary: Option<PathBuf>,
    version: Option<String>,
}

/// Reads a configuration. A file that is missing is empty, unless it was named.
pub fn load(path: &Path, is_named: bool) -> Result<Config, ConfigError> {
    match read(path) {
        Ok(text) => parse(path, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !is_named => Ok(Config::default()),
        Err(error) => Err(ConfigError::Unreadable { path: path.to_owned(), error }),
    }
}

fn read(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.len() > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB"));
    }
    fs::read_to_string(path)
}

/// Understands the text of a configuration; errors name `path`.
pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
    let file: File = toml::from_str(text)
        .map_err(|error| ConfigError::Malformed { path: path.to_owned(), reason: error.to_string() })?;
    let source_name = path.display().to_string();
    let refused = |key, value: &dyn AsRef<Path>, remedy| ConfigError::Value {
        source_name: source_name.clone(),
        key,
        value: value.as_ref().display().to_string(),
        remedy,
    };
    let absolute = |key, value: Option<PathBuf>| match value {
        Some(relative) if !relative.is_absolute() => {
            Err(refused(key, &relative, "is relative: write the path from the root, with a leading slash"))
        }
        value => Ok(value),
    };
    let metrics_listen = match &file.metrics_listen {
        Some(text) => metrics_listen(text).map_err(|remedy| refused("metrics_listen", text, remedy))?,
        None => MetricsListen::Address(METRICS_LISTEN),
    };
    let log_format = match &file.log.format {
        Some(text) => {
            Some(text.parse().map_err(|_| refused("log.format", text, "is not known: use text or json"))?)
        }
        None => None,
    };
    if let Some(version) = &file.tunnel.version {
        if !binary::is_version(version) {
            return Err(refused("tunnel.version", version, "is no version: write it as 2.31.1 or 2.31"));
        }
        if file.tunnel.binary.is_none() {
            return Err(refused(
                "tunnel.version",
                version,
                "is that of a foreign tunnel: name it in tunnel.binary",
            ));
        }
    }
    let mut allow_http_hosts = BTreeSet::new();
    for host in &file.allow_http_hosts {
        if host.is_empty() || host.contains(['/', '*', ' ', '@']) {
            return Err(refused(
                "allow_http_hosts",
                host,
                "is no host: write names or addresses, without scheme, path or wildcard",
            ));
        }
        allow_http_hosts.insert(host.to_ascii_lowercase());
    }
    let client_cert = absolute("client_cert_file", file.client_cert_file)?;
    let client_key = absolute("client_key_file", file.client_key_file)?;
    let client_certificate = match (client_cert, client_key) {
        (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
        (None, None) => None,
        (Some(certificate), None) => {
            let remedy = "needs its private key: set client_key_file too";
            return Err(refused("client_cert_file", &certificate, remedy));
        }
        (None, Some(key)) => {
            return Err(refused("client_key_file", &key, "needs its certificate: set client_cert_file too"));
        }
    };
    if let Some(command) = &file.header_command {
        let program = command.first().map(String::as_str).unwrap_or_default();
        let is_program = Path::new(program).is_absolute() || (!program.is_empty() && !program.contains('/'));
        let is_understood = is_program && command.iter().all(|it| !it.contains('\0'));
        if !is_understood {
            // Arguments may be secrets: only the program is told.
            let remedy = "is no command: write the program's path from the root and its arguments, such as \
                          [\"/usr/local/bin/headers\", \"--for\", \"coder\"]; there is no shell";
            return Err(refused("header_command", &program, remedy));
        }
    }
    Ok(Config {
        metrics_listen,
        metrics_per_agent: file.metrics_per_agent,
        allow_http_hosts,
        extra_socket: absolute("extra_socket", file.extra_socket)?,
        ca_file: absolute("ca_file", file.ca_file)?,
        client_certificate,
        header_command: file.header_command,
        group: file.group,
        log_format,
        log_filter: file.log.filter,
        tunnel_binary: absolute("tunnel.binary", file.tunnel.binary)?,
        tunnel_version: file.tunnel.version,
    })
}

/// Understands the flag `--metrics-listen`.
pub fn metrics_flag(text: &str) -> Result<MetricsListen, ConfigError> {
    metrics_listen(text).map_err(|remedy| ConfigError::Value {
        source_name: "the command line".to_owned(),
        key: "--metrics-listen",
        value: text.to_owned(),
        remedy,
    })
}

fn metrics_listen(text: &str) -> Result<MetricsListen, &'static str> {
    if text == "off" {
        return Ok(MetricsListen::Off);
    }
    let address: SocketAddr =
        text.parse().map_err(|_| "is no address: use ADDRESS:PORT such as 127.0.0.1:9420, or off")?;
    if !address.ip().is_loopback() {
        return Err("is not a loopback address, and there is no authentication: use 127.0.0.1 or [::1], \
                    and let a proxy that authenticates stand in front");
    }
    Ok(MetricsListen::Address(address))
}

/// What is logged and how: the command line first, then the file.
pub fn log_options(format: Option<Format>, filter: Option<String>, config: &Config) -> LogOptions {
    const DEFAULT_FILTER: &str = "info";
    let filter = filter.filter(|filter| !filter.is_empty()).or_else(|| config.log_filter.clone());
    LogOptions {
        format: format.or(config.log_format).unwrap_or_default(),
        filter: filter.unwrap_or_else(|| DEFAULT_FILTER.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, ConfigError> {
        parse(Path::new("/etc/warren/config.toml"), text)
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parsed("").unwrap(), Config::default());
    }

    #[test]
    fn every_key_is_understood() {
        let config = parsed(
            "metrics_listen = \"[::1]:1\"\nmetrics_per_agent = true\nallow_http_hosts = [\"Dev.Example\"]\nextra_socket = \"/run/x.sock\"\n\
             ca_file = \"/ca.pem\"\nclient_cert_file = \"/c.pem\"\nclient_key_file = \"/k.pem\"\n\
             header_command = [\"/bin/h\", \"a b\"]\ngroup = \"g\"\n[log]\nformat = \"json\"\nfilter = \"debug\"\n\
             [tunnel]\nbinary = \"/bin/tunnel\"\nversion = \"2.31.1\"\n",
        )
        .unwrap();
        let expected = Config {
            metrics_listen: MetricsListen::Address("[::1]:1".parse().unwrap()),
            metrics_per_agent: true,
            allow_http_hosts: ["dev.example".to_owned()].into(),
            extra_socket: Some("/run/x.sock".into()),
            ca_file: Some("/ca.pem".into()),
            client_certificate: Some(ClientCertificate {
                certificate: "/c.pem".into(),
                key: "/k.pem".into(),
            }),
            header_command: Some(vec!["/bin/h".into(), "a b".into()]),
            group: Some("g".into()),
            log_format: Some(Format::Json),
            log_filter: Some("debug".into()),
            tunnel_binary: Some("/bin/tunnel".into()),
            tunnel_version: Some("2.31.1".into()),
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn errors_name_the_file_the_key_and_what_to_do() {
        for (text, words) in [
            ("metrics_listen = \"0.0.0.0:9420\"", ["metrics_listen", "loopback"]),
            ("metrics_listen = \"here\"", ["metrics_listen", "ADDRESS:PORT"]),
            ("metrics_liste = \"off\"", ["metrics_liste", "expected one of"]),
            ("allow_http_hosts = [\"http://x/\"]", ["allow_http_hosts", "without scheme"]),
            ("extra_socket = \"x.sock\"", ["extra_socket", "leading slash"]),
            ("client_cert_file = \"/c\"", ["client_cert_file", "client_key_file"]),
            ("client_key_file = \"/k\"", ["client_key_file", "client_cert_file"]),
            ("client_key_file = \"k\"", ["client_key_file", "leading slash"]),
            ("header_command = []", ["header_command", "no shell"]),
            ("header_command = [\"./sh\", \"-c\"]", ["header_command", "from the root"]),
            ("header_command = \"/bin/h\"", ["header_command", "sequence"]),
            ("[log]\nformat = \"xml\"", ["log.format", "text or json"]),
            ("[tunnel]\nversion = \"2.31\"", ["tunnel.version", "tunnel.binary"]),
            ("[tunnel]\nbinary = \"/t\"\nversion = \"new\"", ["tunnel.version", "2.31.1"]),
            ("group = 7", ["group", "string"]),
            ("group", ["line 1", "column"]),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.contains("/etc/warren/config.toml"), "{error}");
            assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
        }
    }

    #[test]
    fn only_a_file_that_was_named_must_exist() {
        let missing = Path::new("/nonexistent/config.toml");
        assert_eq!(load(missing, false).unwrap(), Config::default());
        assert!(load(missing, true).unwrap_err().to_string().contains("/nonexistent/config.toml"));
    }

    #[test]
    fn the_command_line_comes_before_the_file() {
        let config =
            Config { log_filter: Some("warn".into()), log_format: Some(Format::Json), ..Config::default() };
        let options = |format, filter: Option<&str>, config: &Config| {
            let options = log_options(format, filter.map(str::to_owned), config);
            (options.format, options.filter)
        };
        assert_eq!(options(None, None, &config), (Format::Json, "warn".to_owned()));
        assert_eq!(options(Some(Format::Text), Some("info"), &config), (Format::Text, "info".to_owned()));
        assert_eq!(options(None, None, &Config::default()), (Format::Text, "info".to_owned()));
    }
}
