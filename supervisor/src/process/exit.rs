//! How a child process ended, in words.

use std::{fmt, os::unix::process::ExitStatusExt, process::ExitStatus};

/// How a child process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It is gone, or cannot be waited for.
    Unknown,
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Unknown,
        }
    }
}

impl fmt::Display for Exit {
    /// Continues "the tunnel process ...".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => match meaning(code) {
                Some(meaning) => write!(f, "{meaning} (exit status {code})"),
                None => write!(f, "ended with exit status {code}"),
            },
            Self::Signal(number) => match name(number) {
                Some(name) => write!(f, "was ended by signal {number} ({name})"),
                None => write!(f, "was ended by signal {number}"),
            },
            Self::Unknown => f.write_str("is gone, nobody knows how"),
        }
    }
}

/// What our own tunnel says by its exit status.
fn meaning(code: i32) -> Option<&'static str> {
    Some(match code {
        0 => "has stopped",
        1 => "could not be started",
        69 => "lost its connection to the service",
        70 => "gave up after too many faults of one of its parts",
        76 => "could not understand the service",
        101 => "has panicked",
        _ => return None,
    })
}

fn name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGTERM => "SIGTERM",
        libc::SIGSYS => "SIGSYS",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_end_has_words() {
        for (exit, words) in [
            (Exit::Code(0), "has stopped (exit status 0)"),
            (Exit::Code(42), "ended with exit status 42"),
            (Exit::Code(70), "gave up after too many faults of one of its parts (exit status 70)"),
            (Exit::Signal(9), "was ended by signal 9 (SIGKILL)"),
            (Exit::Signal(33), "was ended by signal 33"),
        ] {
            assert_eq!(exit.to_string(), words);
        }
    }
}
