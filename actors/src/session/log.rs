//! Log lines for a manager that owns the network (vpn-protocol 10): queued, never waited for. A manager that
//! reads slowly loses lines, the least important first, and is told how many.
//!
//! The composition feeds [`LogSink::push`] from its log layer, except with what [`LogSink::accepts`] refuses:
//! lines about sending lines would never end.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::Notify;
use warren_observability::names;
use warren_proto::vpn::{
    ManagerMessage, TunnelMessage,
    log::{Field, Level},
    tunnel_message,
};

use crate::speaker::Speaker;

/// Lines that wait. Overflow drops the oldest line of the lowest level, and counts it.
const QUEUE: usize = 1024;
/// Bytes of the longest text in a line; the rest is cut off.
const MAX_TEXT: usize = 2048;
/// Texts in a line beyond its message: logger names and fields.
const MAX_PARTS: usize = 16;
/// Bytes that the queue can hold at worst: a field is two texts.
const QUEUE_BYTES: usize = QUEUE * MAX_TEXT * (1 + MAX_PARTS + 2 * MAX_PARTS);
const _: () = assert!(QUEUE_BYTES <= 128 << 20, "log lines that wait must not exhaust a small machine");

/// Levels, lowest first.
const LEVELS: usize = 6;

/// The modules whose lines come from sending lines.
const OWN_PATH: &[&str] = &["warren_actors::speaker", "warren_actors::session::log", "warren_proto::frame"];

/// Takes log lines for the manager. Cheap to clone; all clones are one queue.
#[derive(Clone, Default)]
pub struct LogSink {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    is_open: AtomicBool,
    queue: Mutex<Queue>,
    filled: Notify,
}

/// Lines by level, each with its place in the common order.
#[derive(Default)]
struct Queue {
    next: u64,
    lines: [VecDeque<(u64, warren_proto::vpn::Log)>; LEVELS],
    /// Lines lost since the manager was last told.
    dropped: u64,
}

impl LogSink {
    /// Whether lines are wanted at all: between Start and Stop, by a manager that owns the network.
    pub fn is_open(&self) -> bool {
        self.shared.is_open.load(Ordering::Relaxed)
    }

    /// Whether lines of this module may be sent.
    pub fn accepts(target: &str) -> bool {
        !OWN_PATH.iter().any(|own| target.starts_with(own))
    }

    /// Queues a line, logger names outermost first; never waits. Does nothing while no lines are wanted.
    pub fn push(&self, level: Level, names: &[&str], message: &str, fields: &[(&str, String)]) {
        if !self.is_open() {
            return;
        }
        let field = |(name, value): &(&str, String)| Field { name: cut(name), value: cut(value) };
        let line = warren_proto::vpn::Log {
            level: level.into(),
            message: cut(message),
            logger_names: names.iter().take(MAX_PARTS).map(|name| cut(name)).collect(),
            fields: fields.iter().take(MAX_PARTS).map(field).collect(),
        };
        let dropped = self.queue().push(level, line);
        if dropped {
            metrics::counter!(names::LOGS_DROPPED).increment(1);
        }
        self.shared.filled.notify_one();
    }

    pub(super) fn open(&self) {
        self.shared.is_open.store(true, Ordering::Relaxed);
    }

    /// Takes no more lines and forgets those that wait.
    pub(super) fn close(&self) {
        self.shared.is_open.store(false, Ordering::Relaxed);
        *self.queue() = Queue::default();
    }

    /// Sends lines in the order they came, each when the one before has been written: what piles up, piles
    /// up here. Ends with the connection.
    pub(super) async fn send_to(self, speaker: Speaker<TunnelMessage, ManagerMessage>) {
        loop {
            let filled = self.shared.filled.notified();
            if self.queue().is_empty() {
                filled.await;
                continue;
            }
            let Ok(slot) = speaker.reserve().await else { return };
            let Some(line) = self.queue().pop() else { continue };
            let message = TunnelMessage { rpc: None, msg: Some(tunnel_message::Msg::Log(line)) };
            if let Ok(written) = slot.notify(message) {
                written.wait().await;
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Takes a line; returns whether one was lost, be it this one.
    fn push(&mut self, level: Level, line: warren_proto::vpn::Log) -> bool {
        let rank = rank(level);
        let is_full = self.lines.iter().map(VecDeque::len).sum::<usize>() >= QUEUE;
        if is_full {
            self.dropped += 1;
            let lowest = self.lines.iter_mut().take(rank + 1).find(|lines| !lines.is_empty());
            // Nothing that waits is less important: the new line is the one to lose.
            let Some(lowest) = lowest else { return true };
            lowest.pop_front();
        }
        let place = self.next;
        self.next += 1;
        if let Some(lines) = self.lines.get_mut(rank) {
            lines.push_back((place, line));
        }
        is_full
    }

    /// The oldest line; before it, if lines were lost, one that says so.
    fn pop(&mut self) -> Option<warren_proto::vpn::Log> {
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            return Some(loss(dropped));
        }
        let oldest =
            self.lines.iter_mut().filter(|lines| !lines.is_empty()).min_by_key(|lines| first(lines))?;
        oldest.pop_front().map(|(_, line)| line)
    }

    fn is_empty(&self) -> bool {
        self.dropped == 0 && self.lines.iter().all(VecDeque::is_empty)
    }
}

fn first(lines: &VecDeque<(u64, warren_proto::vpn::Log)>) -> u64 {
    lines.front().map_or(u64::MAX, |(place, _)| *place)
}

fn rank(level: Level) -> usize {
    match level {
        Level::Debug => 0,
        Level::Info => 1,
        Level::Warn => 2,
        Level::Error => 3,
        Level::Critical => 4,
        Level::Fatal => 5,
    }
}

fn loss(dropped: u64) -> warren_proto::vpn::Log {
    warren_proto::vpn::Log {
        level: Level::Warn.into(),
        message: "log lines were dropped because the manager reads too slowly".to_owned(),
        logger_names: vec!["log".to_owned()],
        fields: vec![Field { name: "count".to_owned(), value: dropped.to_string() }],
    }
}

/// The text, or as much of it as a line may hold.
fn cut(text: &str) -> String {
    text.get(..text.floor_char_boundary(MAX_TEXT)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_sink() -> LogSink {
        let sink = LogSink::default();
        sink.open();
        sink
    }

    fn drain(sink: &LogSink) -> Vec<(Level, String)> {
        let pop = || sink.queue().pop().map(|line| (line.level(), line.message));
        std::iter::from_fn(pop).collect()
    }

    #[test]
    fn lines_come_out_in_the_order_they_went_in() {
        let sink = open_sink();
        for (level, text) in
            [(Level::Info, "a"), (Level::Debug, "b"), (Level::Error, "c"), (Level::Debug, "d")]
        {
            sink.push(level, &["vpn"], text, &[]);
        }
        let texts: Vec<_> = drain(&sink).into_iter().map(|(_, text)| text).collect();
        assert_eq!(texts, ["a", "b", "c", "d"]);
    }

    /// Conforms: vpn:15.14
    #[test]
    fn the_least_important_lines_are_lost_first_and_the_loss_is_told() {
        let sink = open_sink();
        for index in 0..QUEUE {
            let level = if index % 2 == 0 { Level::Debug } else { Level::Error };
            sink.push(level, &[], &index.to_string(), &[]);
        }
        sink.push(Level::Fatal, &[], "worst", &[]);
        sink.push(Level::Debug, &[], "least", &[]);
        let lines = drain(&sink);
        assert_eq!(lines[0].0, Level::Warn);
        assert!(lines[0].1.contains("dropped"));
        assert_eq!(lines.len(), QUEUE + 1);
        let has = |text: &str| lines.iter().any(|(_, line)| line == text);
        assert!(!has("0") && !has("2") && has("1") && has("4") && has("worst") && has("least"));
    }

    #[test]
    fn a_line_below_everything_that_waits_is_the_one_that_is_lost() {
        let sink = open_sink();
        for index in 0..QUEUE {
            sink.push(Level::Error, &[], &index.to_string(), &[]);
        }
        sink.push(Level::Debug, &[], "least", &[]);
        assert!(drain(&sink).iter().all(|(_, line)| line != "least"));
    }

    #[test]
    fn nothing_is_kept_while_nothing_is_wanted() {
        let sink = LogSink::default();
        sink.push(Level::Fatal, &[], "early", &[]);
        sink.open();
        sink.push(Level::Fatal, &[], "forgotten", &[]);
        sink.close();
        sink.push(Level::Fatal, &[], "late", &[]);
        assert!(sink.queue().is_empty());
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let sink = open_sink();
        let long = "ü".repeat(MAX_TEXT);
        sink.push(Level::Info, &[&long], &format!("x{long}"), &[("k", long.clone())]);
        let line = sink.queue().pop().unwrap();
        assert!(line.message.len() <= MAX_TEXT && line.message.starts_with("xü"));
        assert!(line.logger_names[0].len() <= MAX_TEXT && line.fields[0].value.len() <= MAX_TEXT);
    }

    #[test]
    fn lines_about_sending_lines_are_not_sent() {
        assert!(LogSink::accepts("warren_actors::coordinator"));
        assert!(LogSink::accepts("warren_actors::session"));
        assert!(!LogSink::accepts("warren_actors::session::log"));
        assert!(!LogSink::accepts("warren_actors::speaker::handshake"));
    }
}
