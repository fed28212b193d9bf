//! Whose a datagram is.

use warren_proto::key::NodePublic;

use super::*;

const A: NodePublic = NodePublic([1; 32]);
const B: NodePublic = NodePublic([2; 32]);
const C: NodePublic = NodePublic([3; 32]);

/// tailnet-data 5.2, rules a, b and c.
#[test]
fn a_ping_is_from_the_peer_that_the_relay_names_or_itself_or_that_alone_can_be() {
    type Row = (&'static [NodePublic], Arrival, Option<NodePublic>, Option<NodePublic>);
    let direct = Arrival::Direct;
    let rows: &[Row] = &[
        (&[A, B], Arrival::Relayed(A), Some(B), Some(A)),
        (&[A, B], Arrival::Relayed(C), Some(A), None),
        (&[A, B], direct, Some(B), Some(B)),
        (&[A, B], direct, Some(C), None),
        (&[A, B], direct, None, None),
        (&[A], direct, None, Some(A)),
        (&[A], direct, Some(C), Some(A)),
        (&[], direct, Some(A), None),
    ];
    for row in rows {
        let (peers, arrival, named, expected) = *row;
        assert_eq!(identify(peers, arrival, named), expected, "{row:?}");
    }
}

#[test]
fn an_address_is_whose_it_was_last() {
    let mut map = ReceiveMap::default();
    assert!(map.insert(peer(1), A) && map.insert(peer(2), A));
    assert!(map.insert(peer(1), B));
    map.remove(&peer(1), &A);
    assert_eq!((map.get(&peer(1)), map.get(&peer(2)), map.get(&peer(3))), (Some(&B), Some(&A), None));
    map.forget(&A);
    assert_eq!((map.get(&peer(2)), map.len()), (None, 1));
    map.remove(&peer(1), &B);
    assert!(map.is_empty());
}

#[test]
fn the_receive_map_is_bounded_and_what_is_in_it_can_still_change_hands() {
    let mut map = ReceiveMap::default();
    for n in 0..u32::try_from(MAX_SOURCES).unwrap() {
        assert!(map.insert(SocketAddr::from((n.to_be_bytes(), 1)), A));
    }
    assert!(!map.insert(SocketAddr::from(([9; 4], 9)), A));
    assert!(map.insert(SocketAddr::from(([0; 4], 1)), B));
}

#[test]
fn an_address_is_the_peers_each_time_and_too_many_push_out_the_oldest() {
    let mut bench = Bench::ready(&[]);
    bench.take();
    let source = |n: usize| SocketAddr::from(([9, 9, 9, 9], 1 + u16::try_from(n).unwrap()));
    for n in 0..=MAX_VERIFIED {
        bench.hear(source(n));
        bench.hear(source(n));
    }
    let effects = bench.taken();
    let verified = effects.iter().filter(|it| matches!(it, Effect::Verified(_))).count();
    assert_eq!(verified, 2 * (MAX_VERIFIED + 1), "another peer may have been there meanwhile");
    let forgotten: Vec<_> = effects.iter().filter(|it| matches!(it, Effect::Forgotten(_))).collect();
    assert_eq!(forgotten, [&Effect::Forgotten(source(0))]);
}

/// tailnet-data 5.2: peers with a raw socket too see a ping twice, and so may we.
#[test]
fn a_ping_that_comes_twice_is_answered_once() {
    let mut bench = Bench::ready(&[]);
    for via in [Via::Direct(peer(1)), RELAY] {
        let rows = [(1, true), (1, false), (2, true), (1, true), (1, false)];
        for (txid, expected) in rows {
            assert_eq!(bench.path.handle_ping(bench.now, via, number(txid)), expected, "{via:?} {txid}");
        }
    }
}
