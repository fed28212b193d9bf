//! The last lines that tunnel processes said on stderr: for the log of the service, for the words of a
//! failed start, and for `warren debug logs`. They outlive the process and every part.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use secrecy::SecretString;
use tokio::io::{AsyncRead, AsyncReadExt};
use warren_observability::redact::redact;

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
                    held.push(piece.get(..length).unwrap_or_default(), |line| self.add(line, secrets))
                }
            }
        }
        held.finish(|line| self.add(line, secrets));
    }

    fn add(&self, line: &[u8], secrets: &[SecretString]) {
        let text = redact(String::from_utf8_lossy(line).trim_end(), secrets);
        if text.is_empty() {
            return;
        }
        tracing::info!(target: "tunnel", "{text}");
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

/// Cuts bytes into lines of at most [`LINE`] bytes; what is longer loses its end.
#[derive(Default)]
struct Splitter {
    line: Vec<u8>,
}

impl Splitter {
    fn push(&mut self, bytes: &[u8], mut deliver: impl FnMut(&[u8])) {
        let mut pieces = bytes.split(|&byte| byte == b'\n');
        if let Some(first) = pieces.next() {
            self.extend(first);
        }
        for piece in pieces {
            deliver(&self.line);
            self.line.clear();
            self.extend(piece);
        }
    }

    fn extend(&mut self, piece: &[u8]) {
        let room = LINE.saturating_sub(self.line.len()).min(piece.len());
        self.line.extend_from_slice(piece.get(..room).unwrap_or_default());
    }

    fn finish(self, mut deliver: impl FnMut(&[u8])) {
        deliver(&self.line);
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
    async fn secrets_and_broken_text_are_not_kept() {
        let ring = ring(b"token=hunter2 \xff\n\n", &["hunter2".into()]).await;
        assert_eq!(ring.lines().len(), 1);
        assert_eq!(&*ring.lines()[0], "token=[redacted] \u{fffd}");
    }
}
