//! The last lines that tunnel processes said on stderr: for the log of the service, for the words of a
//! failed start, and for `warren debug logs`. They outlive the process and every part.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use secrecy::SecretString;
use tokio::io::{AsyncRead, AsyncReadExt};
use tracing::Level;
use warren_observability::redact::{one_line, redact, redact_cut};

/// Lines kept; older ones are forgotten.
const LINES: usize = 200;

/// Longest line that is kept whole, in bytes; the rest of it is left out.
const LINE: usize = 1024;

/// Bytes kept at worst.
const BYTES: usize = LINES * (LINE + 3);
const _: () = assert!(BYTES <= 256 << 10, "a ring of lines must stay small");

/// The last lines. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct LogRing {
    lines: Arc<Mutex<VecDeque<Arc<str>>>>,
}

impl LogRing {
    /// The lines that are kept, oldest first.
    pub fn lines(&self) -> Vec<Arc<str>> {
        self.lock().iter().cloned().collect()
    }

    /// The last `count` lines, oldest first.
    pub fn last(&self, count: usize) -> Vec<Arc<str>> {
        let lines = self.lock();
        lines.iter().skip(lines.len().saturating_sub(count)).cloned().collect()
    }

    /// Forgets everything: the next words are about another process.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Reads until the end, keeping and logging each line without `secrets`.
    pub async fn follow(&self, mut from: impl AsyncRead + Unpin, secrets: &[SecretString]) {
        let mut held = Splitter::default();
        let mut piece = [0; 4096];
        loop {
            match from.read(&mut piece).await {
                Ok(0) | Err(_) => break,
                Ok(length) => {
                    let piece = piece.get(..length).unwrap_or_default();
                    held.push(piece, |line, is_whole| self.add(line, is_whole, secrets));
                }
            }
        }
        held.finish(|line, is_whole| self.add(line, is_whole, secrets));
    }

    fn add(&self, line: &[u8], is_whole: bool, secrets: &[SecretString]) {
        let text = String::from_utf8_lossy(line);
        let text = if is_whole { redact(&text, secrets) } else { redact_cut(&text, secrets) };
        let text = one_line(text.trim_end(), LINE);
        if text.is_empty() {
            return;
        }
        let (level, words) = level_of(&text);
        match level {
            Level::ERROR => tracing::error!(target: "tunnel", "{words}"),
            Level::WARN => tracing::warn!(target: "tunnel", "{words}"),
            Level::INFO => tracing::info!(target: "tunnel", "{words}"),
            Level::DEBUG | Level::TRACE => tracing::debug!(target: "tunnel", "{words}"),
        }
        self.keep(&text);
    }

    /// Keeps a line that came another way and holds no secret.
    pub fn keep(&self, line: &str) {
        let line = line.get(..line.floor_char_boundary(LINE)).unwrap_or(line);
        let mut lines = self.lock();
        if lines.len() >= LINES {
            lines.pop_front();
        }
        lines.push_back(line.into());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<str>>> {
        // No guard is held where anything can panic.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What our own program says has its time and level before it: the line in our log has its own time, and the same
/// level. Anything else is as it is.
fn level_of(text: &str) -> (Level, &str) {
    let parsed = || {
        let (time, rest) = text.split_once(' ')?;
        let (level, words) = rest.trim_start().split_once(' ')?;
        let is_time =
            time.ends_with('Z') && time.contains('T') && time.starts_with(|c: char| c.is_ascii_digit());
        Some((level.parse().ok().filter(|_| is_time)?, words))
    };
    parsed().unwrap_or((Level::INFO, text))
}

/// Cuts bytes into lines of at most [`LINE`] bytes; what is longer loses its end.
#[derive(Default)]
struct Splitter {
    line: Vec<u8>,
    is_cut: bool,
}

impl Splitter {
    /// Delivers each line, and whether it is whole.
    fn push(&mut self, bytes: &[u8], mut deliver: impl FnMut(&[u8], bool)) {
        let mut pieces = bytes.split(|&byte| byte == b'\n');
        if let Some(first) = pieces.next() {
            self.extend(first);
        }
        for piece in pieces {
            deliver(&self.line, !self.is_cut);
            *self = Self::default();
            self.extend(piece);
        }
    }

    fn extend(&mut self, piece: &[u8]) {
        let room = LINE.saturating_sub(self.line.len()).min(piece.len());
        self.is_cut |= room < piece.len();
        self.line.extend_from_slice(piece.get(..room).unwrap_or_default());
    }

    /// The last line may go on where nobody reads.
    fn finish(self, mut deliver: impl FnMut(&[u8], bool)) {
        deliver(&self.line, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ring(bytes: &[u8], secrets: &[SecretString]) -> LogRing {
        let ring = LogRing::default();
        ring.follow(bytes, secrets).await;
        ring
    }

    #[tokio::test]
    async fn the_last_lines_are_kept_in_order() {
        let text: String = (0..LINES + 50).map(|line| format!("line {line}\n")).collect();
        let ring = ring(text.as_bytes(), &[]).await;
        assert_eq!(ring.lines().len(), LINES);
        assert_eq!(&*ring.lines()[0], "line 50");
        assert_eq!(ring.last(2).iter().map(|it| &**it).collect::<Vec<_>>(), ["line 248", "line 249"]);
    }

    #[tokio::test]
    async fn an_endless_line_takes_no_more_memory_than_a_long_one() {
        let mut bytes = vec![b'x'; LINE * 10];
        bytes.extend(b"\nnext");
        let ring = ring(&bytes, &[]).await;
        assert_eq!(ring.lines()[0].len(), LINE);
        assert_eq!(&*ring.lines()[1], "next");
    }

    #[tokio::test]
    async fn a_secret_that_a_line_is_cut_in_is_not_kept_in_part() {
        let secret = "s".repeat(2 * LINE);
        for line in [format!("token={secret}"), format!("{}{secret}", "x".repeat(LINE - 8))] {
            let ring = ring(format!("{line}\n").as_bytes(), &[secret.as_str().into()]).await;
            assert!(!ring.lines()[0].contains("sss"), "{}", ring.lines()[0]);
        }
    }

    #[tokio::test]
    async fn nothing_that_moves_a_cursor_is_kept() {
        let ring = ring(b"a\x1b[2Jb\rc\n", &[]).await;
        assert_eq!(&*ring.lines()[0], "a [2Jb c");
    }

    #[test]
    fn a_line_of_our_own_program_keeps_its_level_and_any_other_is_information() {
        let line = "2026-11-26T16:53:42.123456Z  WARN warren_actors::relay: it is gone region=1";
        assert_eq!(level_of(line), (Level::WARN, "warren_actors::relay: it is gone region=1"));
        for other in ["", "WARN", "error: x y", "2026-11-26T16:53:42Z it ERROR", "panicked at ERROR x"] {
            assert_eq!(level_of(other), (Level::INFO, other));
        }
    }

    #[tokio::test]
    async fn secrets_and_broken_text_are_not_kept() {
        let ring = ring(b"token=hunter2 \xff\n\n", &["hunter2".into()]).await;
        assert_eq!(ring.lines().len(), 1);
        assert_eq!(&*ring.lines()[0], "token=[redacted] \u{fffd}");
    }
}
