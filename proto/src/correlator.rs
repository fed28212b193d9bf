//! Which response belongs to which request (vpn-protocol 4).

use std::collections::BTreeMap;

use crate::vpn;

/// What a message is to the end that receives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Wants exactly one response to this id.
    Request(u64),
    /// Answers our request of this id, whatever else it claims to be.
    Response(u64),
    /// Wants no answer.
    Notification,
    /// Carries ids, but none that is set: nobody sends this on purpose.
    Stray,
}

/// Says what a received message is.
pub fn classify(rpc: &Option<vpn::Rpc>) -> Kind {
    match rpc {
        None => Kind::Notification,
        Some(vpn::Rpc { msg_id: 0, response_to: 0 }) => Kind::Stray,
        Some(vpn::Rpc { msg_id, response_to: 0 }) => Kind::Request(*msg_id),
        Some(vpn::Rpc { response_to, .. }) => Kind::Response(*response_to),
    }
}

/// Our requests that wait for a response. Ids are never used twice; each waiter is given out at most once.
#[derive(Debug)]
pub struct Correlator<R> {
    last: u64,
    waiting: BTreeMap<u64, R>,
}

impl<R> Default for Correlator<R> {
    fn default() -> Self {
        Self { last: 0, waiting: BTreeMap::new() }
    }
}

impl<R> Correlator<R> {
    /// The id of the next request: 1, 2, ...
    pub fn next_id(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Lets `waiter` wait for the response to `id`.
    pub fn register(&mut self, id: u64, waiter: R) {
        self.waiting.insert(id, waiter);
    }

    /// Who waits for this response; `None` if nobody does (any more), which is not an error.
    pub fn resolve(&mut self, response_to: u64) -> Option<R> {
        self.waiting.remove(&response_to)
    }

    /// Forgets a request: a late response will find nobody.
    pub fn cancel(&mut self, id: u64) -> Option<R> {
        self.waiting.remove(&id)
    }

    /// Everybody who waits, when no response can come any more.
    pub fn drain(&mut self) -> impl Iterator<Item = R> + use<R> {
        std::mem::take(&mut self.waiting).into_values()
    }

    /// How many requests wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_are_classified_by_their_ids() {
        let rpc = |msg_id, response_to| Some(vpn::Rpc { msg_id, response_to });
        assert_eq!(classify(&None), Kind::Notification);
        assert_eq!(classify(&rpc(0, 0)), Kind::Stray);
        assert_eq!(classify(&rpc(u64::MAX, 0)), Kind::Request(u64::MAX));
        assert_eq!(classify(&rpc(0, 5)), Kind::Response(5));
        assert_eq!(classify(&rpc(9, 1)), Kind::Response(1));
    }

    /// Conforms: vpn:15.6
    #[test]
    fn ids_begin_at_one_and_a_response_is_given_out_once() {
        let mut correlator = Correlator::default();
        assert_eq!(correlator.next_id(), 1);
        correlator.register(1, "waiter");
        assert_eq!(correlator.resolve(2), None);
        assert_eq!(correlator.resolve(1), Some("waiter"));
        assert_eq!(correlator.resolve(1), None);
        assert_eq!(correlator.next_id(), 2);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Call,
        Resolve(u64),
        Cancel(u64),
        End,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Call),
            3 => (0_u64..20).prop_map(Step::Resolve),
            1 => (0_u64..20).prop_map(Step::Cancel),
            1 => Just(Step::End),
        ]
    }

    proptest! {
        #[test]
        fn every_waiter_is_given_out_exactly_once(steps in proptest::collection::vec(step(), 0..60)) {
            let mut correlator = Correlator::default();
            let (mut called, mut given) = (0_u64, Vec::new());
            for step in steps {
                match step {
                    Step::Call => {
                        let id = correlator.next_id();
                        called += 1;
                        prop_assert_eq!(id, called);
                        correlator.register(id, id);
                    }
                    Step::Resolve(id) => given.extend(correlator.resolve(id)),
                    Step::Cancel(id) => given.extend(correlator.cancel(id)),
                    Step::End => given.extend(correlator.drain()),
                }
            }
            given.extend(correlator.drain());
            given.sort_unstable();
            prop_assert!(correlator.is_empty());
            prop_assert_eq!(given, (1..=called).collect::<Vec<_>>());
        }
    }
}
