//! What the parts call an error while a world lives on this thread: their events of that level.

use std::{cell::RefCell, fmt, sync::LazyLock, time::Duration};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::clock;

thread_local! {
    /// Each with the age of the world.
    static SEEN: RefCell<Vec<(Duration, String)>> = const { RefCell::new(Vec::new()) };
}

/// A world begins on this thread.
pub(crate) fn begin() {
    static LISTENING: LazyLock<()> = LazyLock::new(|| {
        tracing::subscriber::set_global_default(Listener).unwrap();
    });
    LazyLock::force(&LISTENING);
    SEEN.take();
}

/// The errors since the world was so old, each with its age then.
pub(crate) fn since(age: Duration) -> Vec<(Duration, String)> {
    SEEN.with_borrow(|seen| seen.iter().filter(|(at, _)| *at >= age).cloned().collect())
}

struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn event(&self, event: &Event<'_>) {
        let mut words = Words(format!("{}:", event.metadata().target()));
        event.record(&mut words);
        SEEN.with_borrow_mut(|seen| seen.push((clock::age(), words.0)));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

struct Words(String);

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0 += &format!(" {field}={value:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_seen_where_it_happens_and_nothing_else_is() {
        clock::set(Duration::ZERO);
        begin();
        tracing::error!(code = 7, "early");
        clock::set(Duration::from_secs(1));
        tracing::warn!("no error");
        tracing::error!("late");
        let elsewhere = std::thread::spawn(|| {
            begin();
            since(Duration::ZERO)
        });
        assert_eq!(elsewhere.join().unwrap(), []);
        let late = (Duration::from_secs(1), "simulation::errors::tests: message=late".to_owned());
        assert_eq!(since(Duration::from_secs(1)), [late]);
        assert_eq!(since(Duration::ZERO).len(), 2);
    }
}
