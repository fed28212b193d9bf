//! How a tunnel process came to its end, or never came to life, in words and in labels.

use crate::process::{Exit, LogRing};

/// Why a tunnel process died, as metrics name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// A signal ended it.
    Killed,
    /// It ended by itself.
    Exit,
    /// It panicked.
    Panic,
    /// One of its parts needed too many restarts.
    Budget,
    /// It did not answer.
    Hung,
    /// It closed its connection, and lives.
    Lost,
    /// It could not be spawned.
    Spawn,
    /// It did not speak as expected.
    Handshake,
    /// It did not answer its Start.
    Start,
}

impl Reason {
    /// The value of the label `reason`.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::Exit => "exit",
            Self::Panic => "panic",
            Self::Budget => "budget",
            Self::Hung => "hung",
            Self::Lost => "lost",
            Self::Spawn => "spawn",
            Self::Handshake => "handshake",
            Self::Start => "start",
        }
    }
}

/// One death.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Death {
    /// Its kind.
    pub(super) reason: Reason,
    /// What there is to say, for a person.
    pub(super) text: String,
}

impl Death {
    pub(super) fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self { reason, text: text.into() }
    }

    /// The same death with the process's last words.
    pub(super) fn with_last_words(mut self, log: &LogRing) -> Self {
        let words = log.last(LAST_WORDS);
        if !words.is_empty() {
            self.text.push_str("; its last words: ");
            self.text.push_str(&words.join(" | "));
        }
        self
    }
}

/// Lines that explain a death; panics and refusals take two or three.
pub(super) const LAST_WORDS: usize = 6;

impl From<Exit> for Death {
    fn from(exit: Exit) -> Self {
        let reason = match exit {
            Exit::Code(70) => Reason::Budget,
            Exit::Code(101) => Reason::Panic,
            Exit::Code(_) | Exit::Unknown => Reason::Exit,
            Exit::Signal(_) => Reason::Killed,
        };
        Self::new(reason, format!("the tunnel process {exit}"))
    }
}

/// Why a start led to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// The process died.
    Died(Death),
    /// It could not be done now; later it may.
    Later(String),
    /// It cannot be done until a person acts.
    Person(String),
}

impl Failure {
    /// What there is to say, for a person.
    pub(super) fn into_text(self) -> String {
        match self {
            Self::Died(death) => death.text,
            Self::Later(text) | Self::Person(text) => text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_has_its_reason() {
        for (exit, label) in [
            (Exit::Signal(9), "killed"),
            (Exit::Code(0), "exit"),
            (Exit::Code(69), "exit"),
            (Exit::Code(70), "budget"),
            (Exit::Code(101), "panic"),
            (Exit::Unknown, "exit"),
        ] {
            assert_eq!(Death::from(exit).reason.label(), label, "{exit}");
        }
        assert!(Death::from(Exit::Signal(9)).text.contains("signal 9"));
    }
}
