//! Which changes of paths are told to people: the first at once, and an agent whose path goes on changing once in a
//! while, with how often it did. What is told last is how things are.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use uuid::Uuid;

use crate::path::Why;

/// From one word about an agent to the next.
const PAUSE: Duration = Duration::from_secs(10);

/// Another path is taken to an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathEvent {
    /// The agent.
    pub agent: Uuid,
    /// The address before; `None` for the relay.
    pub from: Option<SocketAddr>,
    /// The address now; `None` for the relay.
    pub to: Option<SocketAddr>,
    /// Why, at the last change.
    pub why: Why,
    /// How many changes this is about.
    pub changes: u32,
}

/// What was told, and what waits to be.
#[derive(Debug, Default)]
pub struct PathNews {
    agents: BTreeMap<Uuid, Told>,
}

#[derive(Debug)]
struct Told {
    at: Instant,
    held: Option<PathEvent>,
}

impl PathNews {
    /// Takes a change. Returns what is to be told now.
    pub fn handle_change(&mut self, now: Instant, change: PathEvent) -> Option<PathEvent> {
        let told = self.agents.get_mut(&change.agent);
        let Some(told) = told.filter(|told| now.saturating_duration_since(told.at) < PAUSE) else {
            let held = self.agents.insert(change.agent, Told { at: now, held: None }).and_then(|it| it.held);
            return Some(after(held, change));
        };
        told.held = Some(after(told.held, change));
        None
    }

    /// Lets time pass. Returns what is to be told now.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<PathEvent> {
        let mut due = Vec::new();
        self.agents.retain(|_, told| {
            if now.saturating_duration_since(told.at) < PAUSE {
                return true;
            }
            told.at = now;
            let held = told.held.take();
            due.extend(held);
            held.is_some()
        });
        due
    }
}

/// A change as one with those before it that were not told.
fn after(held: Option<PathEvent>, change: PathEvent) -> PathEvent {
    held.map_or(change, |held| PathEvent {
        from: held.from,
        changes: held.changes.saturating_add(change.changes),
        ..change
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_at_once_and_what_follows_soon_is_told_together_with_how_it_ended() {
        let (mut news, start) = (PathNews::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let found = change(None, Some(1), Why::Found);
        assert_eq!(news.handle_change(at(0), found), Some(found));
        assert_eq!(news.handle_change(at(1), change(Some(1), None, Why::Dead)), None);
        assert_eq!(news.handle_change(at(2), change(None, Some(2), Why::Found)), None);
        assert_eq!(news.handle_timeout(at(5)), []);
        let both = PathEvent { changes: 2, ..change(Some(1), Some(2), Why::Found) };
        assert_eq!(news.handle_timeout(at(10)), [both]);
        assert_eq!(
            news.handle_change(at(19), change(Some(2), None, Why::Dead)),
            None,
            "it was told just before"
        );
        let later = news.handle_change(at(20), change(None, Some(2), Why::Found));
        assert_eq!(later, Some(PathEvent { changes: 2, ..change(Some(2), Some(2), Why::Found) }));
    }

    #[test]
    fn agents_do_not_wait_for_each_other_and_who_is_quiet_is_forgotten() {
        let (mut news, start) = (PathNews::default(), Instant::now());
        for id in 0..100 {
            let change = PathEvent { agent: Uuid::from_u128(id), ..change(None, Some(1), Why::Found) };
            assert_eq!(news.handle_change(start, change), Some(change));
        }
        assert_eq!(news.handle_timeout(start + PAUSE), []);
        assert!(news.agents.is_empty());
    }

    fn change(from: Option<u16>, to: Option<u16>, why: Why) -> PathEvent {
        let address = |port| SocketAddr::from(([192, 0, 2, 1], port));
        PathEvent { agent: Uuid::nil(), from: from.map(address), to: to.map(address), why, changes: 1 }
    }
}
