//! Which peers have a tunnel between them, from either side. A tunnel belongs to its source.

use std::collections::BTreeSet;

use uuid::Uuid;

/// Tunnels, each from a source to a destination.
#[derive(Default)]
pub(super) struct Tunnels {
    forward: BTreeSet<(Uuid, Uuid)>,
    /// The same tunnels from the destination's side.
    backward: BTreeSet<(Uuid, Uuid)>,
}

impl Tunnels {
    pub(super) fn add(&mut self, source: Uuid, destination: Uuid) {
        self.forward.insert((source, destination));
        self.backward.insert((destination, source));
    }

    /// Forgets a tunnel. Returns whether there was one.
    pub(super) fn remove(&mut self, source: Uuid, destination: Uuid) -> bool {
        self.backward.remove(&(destination, source));
        self.forward.remove(&(source, destination))
    }

    /// Forgets the tunnels that a peer has opened; those that lead to it stay.
    pub(super) fn remove_from(&mut self, source: Uuid) {
        let own: Vec<Uuid> = others(&self.forward, source).collect();
        for destination in own {
            self.remove(source, destination);
        }
    }

    /// The other ends of the tunnels from and to a peer.
    pub(super) fn peers_of(&self, id: Uuid) -> BTreeSet<Uuid> {
        others(&self.forward, id).chain(others(&self.backward, id)).collect()
    }

    /// Whether two peers share a tunnel, whoever has opened it.
    pub(super) fn join(&self, one: Uuid, other: Uuid) -> bool {
        self.forward.contains(&(one, other)) || self.forward.contains(&(other, one))
    }

    /// Each source and destination.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Uuid, Uuid)> {
        self.forward.iter().copied()
    }
}

fn others(pairs: &BTreeSet<(Uuid, Uuid)>, id: Uuid) -> impl Iterator<Item = Uuid> {
    pairs.range((id, Uuid::nil())..=(id, Uuid::max())).map(|(_, other)| *other)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Uuid = Uuid::from_u128(1);
    const TWO: Uuid = Uuid::from_u128(2);
    const THREE: Uuid = Uuid::from_u128(3);

    /// Conforms: control:K13
    #[test]
    fn tunnels_are_found_from_both_ends_until_they_are_removed() {
        let mut tunnels = tunnels(&[(ONE, TWO), (ONE, THREE), (TWO, THREE)]);
        assert_eq!(tunnels.peers_of(ONE), [TWO, THREE].into());
        assert_eq!(tunnels.peers_of(THREE), [ONE, TWO].into());
        assert!(tunnels.remove(ONE, TWO));
        assert!(!tunnels.remove(ONE, TWO) && !tunnels.remove(THREE, TWO));
        assert_eq!(tunnels.peers_of(ONE), [THREE].into());
        assert_eq!(tunnels.peers_of(TWO), [THREE].into());
        assert_eq!(tunnels.iter().collect::<Vec<_>>(), [(ONE, THREE), (TWO, THREE)]);
    }

    /// Conforms: control:K13
    #[test]
    fn all_that_a_peer_has_opened_goes_at_once_and_what_leads_to_it_stays() {
        let mut tunnels = tunnels(&[(ONE, TWO), (ONE, THREE), (TWO, ONE)]);
        tunnels.remove_from(ONE);
        assert_eq!(tunnels.iter().collect::<Vec<_>>(), [(TWO, ONE)]);
        assert_eq!(tunnels.peers_of(ONE), [TWO].into());
        assert_eq!(tunnels.peers_of(TWO), [ONE].into());
        assert_eq!(tunnels.peers_of(THREE), [].into());
    }

    /// Conforms: control:K13
    #[test]
    fn a_tunnel_joins_its_ends_whichever_is_named_first() {
        let mut tunnels = tunnels(&[(ONE, TWO)]);
        assert!(tunnels.join(ONE, TWO) && tunnels.join(TWO, ONE));
        assert!(!tunnels.join(ONE, THREE) && !tunnels.join(THREE, ONE) && !tunnels.join(ONE, ONE));
        tunnels.remove(ONE, TWO);
        assert!(!tunnels.join(ONE, TWO) && !tunnels.join(TWO, ONE));
    }

    fn tunnels(pairs: &[(Uuid, Uuid)]) -> Tunnels {
        let mut tunnels = Tunnels::default();
        pairs.iter().for_each(|(source, destination)| tunnels.add(*source, *destination));
        tunnels
    }
}
