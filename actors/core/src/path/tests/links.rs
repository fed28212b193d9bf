//! Changes of our own link, and of what is allowed.

use super::*;

#[test]
fn after_a_link_change_the_path_is_kept_and_has_to_answer_again() {
    let mut bench = Bench::direct();
    bench.path.handle_link_change(bench.now);
    assert_eq!(bench.route(), (Some(peer(1)), true));
    let effects = bench.taken();
    assert_eq!(pinged(&effects), [peer(1)], "at once");
    assert!(effects.contains(&Effect::RefreshEndpoints));
    bench.path.handle_pong(bench.now, Via::Direct(peer(1)), number(bench.txid), own(1));
    assert_eq!(bench.route(), (Some(peer(1)), false));
}

/// tailnet-data 7.6: else it would drop the packet, whose source it does not know.
#[test]
fn where_nothing_was_sent_for_a_while_a_link_change_is_followed_by_a_ping_just_before_the_next_packet() {
    let mut bench = Bench::direct();
    for _ in 0..600 {
        bench.pass(100 * MS);
        bench.answer_all();
    }
    bench.take();
    bench.path.handle_link_change(bench.now);
    assert_eq!(pinged(&bench.taken()), [], "nobody asks");
    assert_eq!(bench.route(), (Some(peer(1)), true));
    assert_eq!(pinged(&bench.taken()), [peer(1)]);
}

#[test]
fn when_our_address_changed_the_peer_is_made_to_leave_the_old_one() {
    for (new, expected) in [(own(2), true), (own(1), false)] {
        let mut bench = Bench::direct();
        bench.path.handle_link_change(bench.now);
        bench.path.handle_own_endpoints(bench.now, &[new]);
        let mut done = bench.take();
        assert_eq!(done.iter().any(|(_, it)| *it == Effect::ProveRelay), expected);
        bench.path.handle_relay(bench.now, RelayStands::Alive);
        if expected {
            bench.pass(100 * MS)
        } else {
            bench.talk(2 * S)
        }
        done.extend(bench.take());
        let lists = lists(&done);
        if expected {
            assert!(lists.ends_with(&[vec![own(2), own(1)], vec![], vec![own(2), own(1)]]), "{lists:?}");
        } else {
            assert_eq!(lists.len(), 1, "nothing changed for the peer");
        }
        assert_eq!(bench.best(), Some(peer(1)), "our own direction stays");
    }
}

#[test]
fn each_of_several_link_changes_makes_the_peer_leave_where_it_saw_us_before() {
    let mut bench = Bench::direct();
    for seen in [own(2), own(3), own(4)] {
        bench.path.handle_link_change(bench.now);
        // Where we were is told still: it is remembered for a while.
        bench.path.handle_own_endpoints(bench.now, &[own(4), own(3), own(2), own(1)]);
        let pinged = bench.taken().into_iter().find_map(|effect| match effect {
            Effect::Ping { to, txid } if to == peer(1) => Some(txid),
            _ => None,
        });
        bench.path.handle_pong(bench.now, Via::Direct(peer(1)), pinged.unwrap(), seen).unwrap();
        assert!(bench.taken().contains(&Effect::ProveRelay), "{seen}");
        bench.path.handle_relay(bench.now, RelayStands::Alive);
        bench.pass(100 * MS);
        assert!(calls(&bench.take()).iter().any(|(_, list)| list.is_empty()), "{seen}");
    }
}

#[test]
fn a_peer_that_is_being_told_to_leave_a_dead_path_is_told_so_although_our_link_changes() {
    let mut bench = Bench::direct();
    while bench.best().is_some() {
        bench.shout(20 * MS);
        bench.path.handle_relay(bench.now, RelayStands::Alive);
    }
    bench.path.handle_link_change(bench.now);
    bench.path.handle_own_endpoints(bench.now, &[own(2)]);
    bench.pass(100 * MS);
    let lists = lists(&bench.take());
    assert!(lists.contains(&Vec::new()), "{lists:?}");
    assert!(lists.last().is_some_and(|list| list.contains(&own(2))), "{lists:?}");
}

#[test]
fn a_peer_that_goes_on_directly_after_a_link_change_is_told_once() {
    let mut bench = Bench::direct();
    bench.path.handle_link_change(bench.now);
    bench.path.handle_own_endpoints(bench.now, &[own(2)]);
    bench.path.handle_relay(bench.now, RelayStands::Alive);
    bench.talk(3 * S);
    let empty = calls(&bench.take()).iter().filter(|(_, list)| list.is_empty()).count();
    assert_eq!(empty, 1, "it need not be heard over the relay");
}

#[test]
fn an_answer_to_what_went_over_the_old_link_says_nothing_of_the_new_one() {
    let mut bench = Bench::direct();
    bench.path.user_ping(bench.now, number(7));
    bench.drain();
    bench.path.handle_link_change(bench.now);
    assert_eq!(bench.path.handle_pong(bench.now, Via::Direct(peer(1)), number(7), own(1)), None);
    assert_eq!(bench.route(), (Some(peer(1)), true));
}

#[test]
fn a_link_change_ends_a_bar_and_what_alarms_taught() {
    let mut bench = Bench::direct();
    bench.path.standing = Standing::Barred { address: peer(1), until: bench.now + 60 * S };
    bench.path.route(bench.now);
    bench.path.handle_link_change(bench.now);
    assert_eq!(pinged(&bench.taken()), [peer(1)]);
}

/// Conforms: control:P12
#[test]
fn where_direct_paths_are_blocked_all_is_relayed_and_nothing_is_answered_over_udp() {
    let mut bench = Bench::direct();
    bench.path.set_policy(bench.now, Direct::Blocked);
    let effects = bench.taken();
    assert!(effects.contains(&Effect::Changed { from: Some(peer(1)), to: None, why: Why::Forbidden }));
    assert!(effects.contains(&Effect::CallMeMaybe(vec![])), "the peer is told at once");
    assert!(effects.contains(&Effect::Forgotten(peer(1))));
    assert!(effects.contains(&Effect::CallMeMaybe(vec![own(1)])));
    bench.pass(100 * MS);
    let told = lists(&bench.take());
    assert_eq!(told, [vec![]], "and again, after all addresses: so it forgets also what it was never told");
    bench.path.set_policy(bench.now, Direct::Blocked);
    assert_eq!(bench.taken(), [], "the same again is nothing");
    assert_eq!(bench.route(), (None, true));
    assert!(!bench.hear(peer(1)));
    assert!(bench.path.handle_ping(bench.now, RELAY, number(1)), "over the relay it is answered");
    bench.path.handle_node(bench.now, &[peer(2)]);
    bench.path.handle_call_me_maybe(bench.now, &[peer(3)]);
    bench.path.handle_ready(bench.now);
    bench.path.user_ping(bench.now, number(7));
    bench.shout(100 * S);
    assert_eq!(bench.taken(), [Effect::RelayPing { txid: number(7) }]);
}

/// It has our answer, and trusts a path that we have not yet.
#[test]
fn a_peer_that_was_answered_is_told_that_direct_paths_are_blocked_though_we_had_none() {
    for (is_answered, told) in [(true, 3), (false, 0)] {
        let mut bench = Bench::ready(&[peer(1)]);
        bench.path.route(bench.now);
        assert!(!is_answered || bench.hear(peer(1)));
        bench.pass(20 * MS);
        bench.take();
        bench.path.set_policy(bench.now, Direct::Blocked);
        bench.pass(100 * MS);
        assert_eq!(calls(&bench.take()).len(), told, "answered: {is_answered}");
    }
}

#[test]
fn when_direct_paths_are_allowed_again_the_latest_node_message_counts() {
    let mut bench = Bench::direct();
    bench.path.set_policy(bench.now, Direct::Blocked);
    bench.path.handle_node(bench.now, &[peer(2)]);
    bench.take();
    bench.path.set_policy(bench.now, Direct::Allowed);
    bench.answer(peer(2));
    assert_eq!(bench.best(), Some(peer(2)));
    assert_eq!(pinged(&bench.taken()), [peer(2)], "and no other");
    bench.path.set_policy(bench.now, Direct::Allowed);
    assert_eq!(bench.taken(), [], "the same again is nothing");
}
