//! What the parts call an error while a world lives on this thread: their events of that level.

use std::{
    cell::RefCell,
    fmt,
    sync::LazyLock,
    time::{Duration, Instant},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

thread_local! {
    static SEEN: RefCell<Option<World>> = const { RefCell::new(None) };
}

struct World {
    began: Instant,
    now: Instant,
    errors: Vec<(Duration, String)>,
}

/// A world begins on this thread.
pub(crate) fn begin(now: Instant) {
    static LISTENING: LazyLock<()> = LazyLock::new(|| {
        tracing::subscriber::set_global_default(Listener).unwrap();
    });
    LazyLock::force(&LISTENING);
    SEEN.set(Some(World { began: now, now, errors: Vec::new() }));
}

/// What happens from now on happens then.
pub(crate) fn pass_to(now: Instant) {
    SEEN.with_borrow_mut(|seen| seen.as_mut().unwrap().now = now);
}

/// The errors since then, each with the age of the world.
pub(crate) fn since(then: Instant) -> Vec<(Duration, String)> {
    SEEN.with_borrow(|seen| {
        let World { began, errors, .. } = seen.as_ref().unwrap();
        errors.iter().filter(|(age, _)| *began + *age >= then).cloned().collect()
    })
}

struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn event(&self, event: &Event<'_>) {
        let mut words = Words(format!("{}:", event.metadata().target()));
        event.record(&mut words);
        SEEN.with_borrow_mut(|seen| {
            if let Some(World { began, now, errors }) = seen {
                errors.push((*now - *began, words.0));
            }
        });
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
        let now = Instant::now();
        begin(now);
        tracing::error!(code = 7, "early");
        pass_to(now + Duration::from_secs(1));
        tracing::warn!("no error");
        tracing::error!("late");
        let elsewhere = std::thread::spawn(move || {
            begin(now);
            since(now)
        });
        assert_eq!(elsewhere.join().unwrap(), []);
        let late = (Duration::from_secs(1), "simulation::errors::tests: message=late".to_owned());
        assert_eq!(since(now + Duration::from_secs(1)), [late]);
        assert_eq!(since(now).len(), 2);
    }
}
