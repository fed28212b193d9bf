//! Logs to stderr: text for people, JSON for machines. Standard output belongs to data.

use std::{fmt, io, str::FromStr};

use tracing::{Level, Metadata};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{FilterExt, dynamic_filter_fn, filter_fn},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// How a log line looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("unknown log format {other:?}: use text or json")),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// What is logged, and how.
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// How a line looks.
    pub format: Format,
    /// Directives such as `info` or `info,warren_actors::relay=debug`.
    pub filter: String,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter does not parse.
    #[error(
        "log filter {filter:?} is not valid: {reason}. Use directives such as \"info\" or \"warren_actors=debug\""
    )]
    Filter {
        /// What was given.
        filter: String,
        /// What the parser said.
        reason: String,
    },
    /// Logging was set up before.
    #[error("logging is already set up")]
    AlreadySet,
}

/// A layer beside stderr.
pub type ExtraLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Another reader of log lines than stderr, such as a manager.
pub struct OtherReader {
    /// What takes the lines there.
    pub layer: ExtraLayer,
    /// Whether lines of this target go there at the moment, and so not to stderr.
    pub takes: Box<dyn Fn(&str) -> bool + Send + Sync>,
}

/// Whether a line may be logged at all, whatever the directives say: at the loudest level libraries show whole
/// frames and requests, with all their secrets.
pub fn is_decent(line: &Metadata<'_>) -> bool {
    *line.level() < Level::TRACE || line.target().starts_with("warren")
}

/// What directives let through. boringtun calls it an error that a peer did not answer for 90 s, without saying which:
/// that is counted (`warren_wireguard_handshakes_total`) and told by status, and shown only to who asks for boringtun.
pub fn filter(directives: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(format!("boringtun=off,{directives}"))
        .map_err(|error| LogError::Filter { filter: directives.to_owned(), reason: error.to_string() })
}

/// Sends log lines to stderr, or to `other` while it takes them.
pub fn init(options: &LogOptions, other: Option<OtherReader>) -> Result<(), LogError> {
    let filter = filter(&options.filter)?;
    let (other, takes) = other.map(|other| (other.layer, other.takes)).unzip();
    let stays = dynamic_filter_fn(move |line, _| !takes.as_ref().is_some_and(|takes| takes(line.target())));
    let filter = filter.and(filter_fn(is_decent));
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    let lines: ExtraLayer = match options.format {
        Format::Text => lines.with_target(true).with_filter(filter.and(stays)).boxed(),
        Format::Json => lines.json().flatten_event(true).with_filter(filter.and(stays)).boxed(),
    };
    let layers: Vec<ExtraLayer> = std::iter::once(lines).chain(other).collect();
    Registry::default().with(layers).try_init().map_err(|_| LogError::AlreadySet)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[test]
    fn a_bad_filter_is_named_with_a_remedy() {
        let options = LogOptions { format: Format::Text, filter: "a=b=c".into() };
        let error = init(&options, None).unwrap_err().to_string();
        assert!(error.contains("a=b=c") && error.contains("Use directives"), "{error}");
    }

    #[test]
    fn what_boringtun_calls_an_error_is_shown_to_who_asks_for_it() {
        for (directives, expected) in
            [("info", 0), ("trace", 0), ("info,boringtun=error", 1), ("info,boringtun=debug", 1), ("", 0)]
        {
            let seen = Arc::new(AtomicUsize::new(0));
            let layer = Count(Arc::clone(&seen)).with_filter(filter(directives).unwrap());
            tracing::subscriber::with_default(Registry::default().with(layer), || {
                tracing::error!(target: "boringtun::noise::timers", "CONNECTION_EXPIRED");
            });
            assert_eq!(seen.load(Ordering::Relaxed), expected, "{directives}");
        }
    }

    struct Count(Arc<AtomicUsize>);

    impl Layer<Registry> for Count {
        fn on_event(&self, _: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, Registry>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn formats_parse_back_from_their_names() {
        for format in [Format::Text, Format::Json] {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
        }
        assert!("xml".parse::<Format>().is_err());
    }
}
