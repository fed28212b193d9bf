//! Exit codes, and errors that carry one. Data goes to stdout; what went wrong, with what to do about
//! it, goes to stderr as one line.

use std::{fmt, io::Write, process::ExitCode};

/// What the exit status of a command says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It was done.
    Ok = 0,
    /// It failed for a reason that stderr names.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The service does not run.
    NotRunning = 3,
    /// The service refused: the tunnel or the socket belongs to someone else.
    Denied = 4,
    /// There is no token, or the deployment does not accept it.
    LoginNeeded = 5,
    /// It runs, but agents cannot be reached.
    Unhealthy = 6,
    /// A deadline passed.
    Timeout = 7,
    /// The other side speaks another version.
    VersionMismatch = 8,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Writes one line of data.
pub(crate) fn say(line: impl fmt::Display) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{line}")
}

/// Text as a terminal may be shown it: names and errors can come from elsewhere, and must not move the cursor,
/// turn the text around or hide in it.
pub(crate) fn printable(text: &str) -> String {
    let is_harmful = |c: char| c.is_control() && !matches!(c, '\n' | '\t') || is_format(c);
    text.chars().map(|c| if is_harmful(c) { '?' } else { c }).collect()
}

/// The marks of Unicode that have no shape: directions, joiners, the byte order mark.
fn is_format(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Why a command failed, in words, and the exit status that says so.
#[derive(Debug)]
pub(crate) struct CliError {
    /// The exit status.
    pub(crate) exit: Exit,
    message: String,
}

impl CliError {
    /// An error that ends the command with `exit`.
    pub(crate) fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: printable(&message.to_string()) }
    }

    /// A plain failure.
    pub(crate) fn failed(message: impl fmt::Display) -> Self {
        Self::new(Exit::Failed, message)
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CliError {}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        // A reader that went away (`warren status | head`) has seen what it wanted.
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self { exit: Exit::Ok, message: String::new() };
        }
        Self::failed(error)
    }
}

/// What every command returns.
pub(crate) type Outcome = Result<Exit, CliError>;
