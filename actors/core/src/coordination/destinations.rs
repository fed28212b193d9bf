//! Which destinations are wanted, and which of them may be asked for.
//!
//! One refused destination ends the whole stream, without saying which one it was, and loses what was
//! asked behind it (tailnet-control 4.7, appendix D 9). So what was asked lately and not heard of is held
//! back, in groups, until a snapshot lists it again. Then the groups are asked for one after the other; the
//! one that is refused is split again and waits behind the others, until the refused destination stands
//! alone. After a few chances (it may have been asked for too early) that one is not asked for again while
//! it is wanted.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use uuid::Uuid;

use crate::roster::Update;

/// A refusal comes within a round trip and a millisecond per destination asked before it; what was asked
/// longer ago than this was granted.
const GRANTED_AFTER: Duration = Duration::from_secs(10);
/// The pause between two groups on trial; a refusal within it is blamed on the last one.
const TRIAL_PAUSE: Duration = Duration::from_secs(2);
/// How many groups the suspects of one refusal are tried in: a thousand take four refusals, and a minute.
const TRIAL_GROUPS: usize = 8;
/// How often a destination may be refused alone until it is not asked for any more.
const CHANCES: u8 = 3;

#[derive(Debug, Default)]
pub(super) struct Destinations {
    wanted: BTreeSet<Uuid>,
    is_connected: bool,
    /// Asked for on the present stream, and nothing heard since.
    asked: BTreeMap<Uuid, Instant>,
    /// Perhaps refused, in the groups that are to be asked for together; the longest blameless first.
    held_back: VecDeque<BTreeSet<Uuid>>,
    /// Whether a snapshot has listed what is held back.
    is_listed: bool,
    next_trial: Option<Instant>,
    /// How often each was refused alone.
    refusals: BTreeMap<Uuid, u8>,
    refused: BTreeSet<Uuid>,
}

/// What a new set of wanted destinations leads to.
#[derive(Debug, Default)]
pub(super) struct Change {
    /// Wanted now and not before.
    pub(super) new: Vec<Uuid>,
    /// Wanted before and not now.
    pub(super) removed: Vec<Uuid>,
    /// To be asked for on the stream.
    pub(super) asked: Vec<Uuid>,
    /// To be given back on the stream.
    pub(super) given_back: Vec<Uuid>,
}

impl Destinations {
    pub(super) fn contains(&self, id: &Uuid) -> bool {
        self.wanted.contains(id)
    }

    pub(super) fn refused(&self) -> &BTreeSet<Uuid> {
        &self.refused
    }

    /// A stream began; returns what to ask for.
    pub(super) fn connected(&mut self, now: Instant) -> Vec<Uuid> {
        self.is_connected = true;
        let held_back: BTreeSet<&Uuid> = self.held_back.iter().flatten().collect();
        let free = |id: &&Uuid| !held_back.contains(*id) && !self.refused.contains(*id);
        let asked = self.wanted.iter().filter(free).copied().collect();
        let mut asked = self.ask(now, asked);
        asked.extend(self.begin_trial(now));
        asked
    }

    pub(super) fn disconnected(&mut self) {
        self.is_connected = false;
        self.asked.clear();
        self.end_trial();
    }

    pub(super) fn set(&mut self, now: Instant, wanted: &BTreeSet<Uuid>, update: Update) -> Change {
        let new: Vec<Uuid> = wanted.difference(&self.wanted).copied().collect();
        let removed: Vec<Uuid> = self.wanted.difference(wanted).copied().collect();
        removed.iter().for_each(|id| self.forget(id));
        self.wanted.clone_from(wanted);
        // A snapshot may come before the stream that asks: then the trial begins with that one.
        self.is_listed |= update == Update::Snapshot;
        if !self.is_connected {
            return Change { new, removed, ..Change::default() };
        }
        let mut asked = self.ask(now, new.clone());
        if update == Update::Snapshot {
            asked.extend(self.begin_trial(now));
        }
        Change { given_back: removed.clone(), new, removed, asked }
    }

    /// Something was said about a destination: it was not refused.
    pub(super) fn hear_of(&mut self, id: &Uuid) {
        self.asked.remove(id);
        self.refusals.remove(id);
    }

    /// One of those asked for lately was refused. The stream is about to end: nothing else is tried on it.
    pub(super) fn handle_refusal(&mut self, now: Instant) {
        self.end_trial();
        self.forgive_granted(now, GRANTED_AFTER);
        let suspects: Vec<Uuid> = std::mem::take(&mut self.asked).into_keys().collect();
        match *suspects {
            [only] if self.has_no_chance_left(only) => drop(self.refused.insert(only)),
            _ => {
                let size = suspects.len().div_ceil(TRIAL_GROUPS).max(1);
                self.held_back.extend(suspects.chunks(size).map(|group| group.iter().copied().collect()));
            }
        }
    }

    fn has_no_chance_left(&mut self, id: Uuid) -> bool {
        let refusals = self.refusals.entry(id).or_default();
        *refusals += 1;
        *refusals >= CHANCES
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.next_trial
    }

    /// Returns what to ask for now.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Vec<Uuid> {
        match self.next_trial {
            Some(due) if due <= now => self.try_group(now),
            _ => Vec::new(),
        }
    }

    /// Asks for the first group at once, or as soon as what was asked just now cannot be blamed for it.
    fn begin_trial(&mut self, now: Instant) -> Vec<Uuid> {
        if !self.is_listed || self.held_back.is_empty() {
            return Vec::new();
        }
        self.forgive_granted(now, TRIAL_PAUSE);
        if self.asked.is_empty() {
            return self.try_group(now);
        }
        self.next_trial = Some(now + TRIAL_PAUSE);
        Vec::new()
    }

    fn try_group(&mut self, now: Instant) -> Vec<Uuid> {
        self.forgive_granted(now, TRIAL_PAUSE);
        let group = self.held_back.pop_front().unwrap_or_default();
        self.next_trial = (!self.held_back.is_empty()).then(|| now + TRIAL_PAUSE);
        self.ask(now, group.into_iter().collect())
    }

    fn end_trial(&mut self) {
        self.is_listed = false;
        self.next_trial = None;
    }

    fn ask(&mut self, now: Instant, ids: Vec<Uuid>) -> Vec<Uuid> {
        self.asked.extend(ids.iter().map(|id| (*id, now)));
        ids
    }

    fn forgive_granted(&mut self, now: Instant, after: Duration) {
        self.asked.retain(|_, at| now.saturating_duration_since(*at) < after);
    }

    fn forget(&mut self, id: &Uuid) {
        self.asked.remove(id);
        self.held_back.retain_mut(|group| {
            group.remove(id);
            !group.is_empty()
        });
        self.refusals.remove(id);
        self.refused.remove(id);
    }
}
