//! Log lines on their way to a manager that wants them (vpn-protocol 10), instead of to stderr; only the lines
//! about sending lines stay there. The [`LogSink`] queues, and drops where the manager reads too slowly.

use std::fmt::{self, Write};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    filter::{FilterExt, filter_fn},
    layer::Context,
};
use warren_actors::session::LogSink;
use warren_observability::logs::{self, OtherReader, is_decent};
use warren_proto::vpn::log;

/// Feeds `sink`, while it is open, with what `filter` lets through. A filter that does not parse is refused
/// where stderr is set up.
pub(super) fn reader(sink: LogSink, filter: &str) -> OtherReader {
    let takes = sink.clone();
    let filter = logs::filter(filter).unwrap_or_default().and(filter_fn(is_decent));
    OtherReader {
        layer: ManagerLog(sink).with_filter(filter).boxed(),
        takes: Box::new(move |target| takes.is_open() && LogSink::accepts(target)),
    }
}

struct ManagerLog(LogSink);

impl<S: Subscriber> Layer<S> for ManagerLog {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let target = event.metadata().target();
        if !self.0.is_open() || !LogSink::accepts(target) {
            return;
        }
        let mut line = Line::default();
        event.record(&mut line);
        let names: Vec<&str> = target.split("::").collect();
        self.0.push(level(event.metadata().level()), &names, &line.message, &line.fields);
    }
}

fn level(level: &Level) -> log::Level {
    match *level {
        Level::TRACE | Level::DEBUG => log::Level::Debug,
        Level::INFO => log::Level::Info,
        Level::WARN => log::Level::Warn,
        Level::ERROR => log::Level::Error,
    }
}

/// The text and the fields of an event.
#[derive(Default)]
struct Line {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Line {
    /// Where a library's line stands in its source, as the `log` crate tells it, is no news.
    fn push(&mut self, name: &'static str, value: String) {
        if !name.starts_with("log.") {
            self.fields.push((name, value));
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            // A string takes whatever is written.
            "message" => drop(write!(self.message, "{value:?}")),
            name => self.push(name, format!("{value:?}")),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            name => self.push(name, value.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// Takes the place of the sink, which shows nothing.
    struct Ear(std::sync::Arc<std::sync::Mutex<Vec<Line>>>);

    impl<S: Subscriber> Layer<S> for Ear {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut line = Line::default();
            event.record(&mut line);
            self.0.lock().unwrap().push(line);
        }
    }

    #[test]
    fn an_event_becomes_a_text_and_its_fields_in_order() {
        let heard = std::sync::Arc::<std::sync::Mutex<Vec<Line>>>::default();
        let subscriber = tracing_subscriber::registry().with(Ear(heard.clone()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(generation = 3, who = "me", error = %"no route", "starting {}", "it");
        });
        let lines = heard.lock().unwrap();
        assert_eq!(lines[0].message, "starting it");
        let fields: Vec<_> = lines[0].fields.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!(fields, [("generation", "3"), ("who", "me"), ("error", "no route")]);
    }
}
