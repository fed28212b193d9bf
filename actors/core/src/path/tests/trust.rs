//! With a direct path: trust, heartbeats, better paths.

use super::*;

#[test]
fn the_first_answer_is_a_direct_path_and_ends_the_duplication() {
    let mut bench = Bench::ready(&[peer(1)]);
    assert_eq!(bench.route(), (None, true));
    bench.answer(peer(1));
    assert_eq!(bench.route(), (Some(peer(1)), false));
    let best = bench.path.best().unwrap();
    assert_eq!((best.address, best.latency), (peer(1), LATENCY));
    let changed = Effect::Changed { from: None, to: Some(peer(1)), why: Why::Found };
    assert!(bench.taken().contains(&changed));
}

#[test]
fn a_path_is_trusted_for_six_and_a_half_seconds_after_an_answer() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.answer(peer(1));
    bench.pass(6499 * MS);
    assert_eq!(bench.route(), (Some(peer(1)), false));
    bench.pass(MS);
    assert_eq!(bench.route(), (Some(peer(1)), true), "twice, until it answers again");
    bench.pass(MS);
    bench.answer(peer(1));
    assert_eq!(bench.route(), (Some(peer(1)), false));
}

#[test]
fn the_path_taken_is_pinged_every_three_seconds_while_the_peer_is_talked_to() {
    let mut bench = Bench::direct();
    bench.route();
    for _ in 0..14 {
        bench.pass(3 * S);
        bench.answer_all();
        assert_eq!(bench.best(), Some(peer(1)));
    }
    bench.take();
    bench.pass(30 * S);
    bench.answer_all();
    bench.take();
    bench.pass(1000 * S);
    assert_eq!(bench.take(), [], "later it is not");
}

/// The reference pings such a path every 3 s besides.
#[test]
fn the_path_of_a_peer_that_only_users_ping_gets_no_pings_besides() {
    let mut bench = Bench::direct();
    let mut pings = 0;
    for second in 0..300 {
        if second % 25 == 0 {
            // WireGuard's keepalive.
            bench.path.route(bench.now);
            bench.path.handle_received(bench.now, Via::Direct(peer(1)));
        }
        if second % 5 == 0 {
            bench.path.user_ping(bench.now, number(1 << 40 | second));
        }
        for _ in 0..100 {
            bench.pass(S / 100);
            pings += pinged(&bench.effects.iter().map(|(_, it)| it.clone()).collect::<Vec<_>>()).len();
            bench.answer_all();
        }
        assert!(bench.path.best().unwrap().trusted_until > bench.now);
    }
    assert_eq!(pings, 60 + 12, "a user's every 5 s, and one where a keepalive was all that was heard");
}

#[test]
fn a_better_path_is_looked_for_once_a_minute_unless_this_one_is_good_enough() {
    for (latency, expected) in [(5 * MS, 0), (6 * MS, 4)] {
        let mut bench = Bench::ready(&[peer(1), peer(2)]);
        bench.answer_after(peer(1), latency);
        bench.take();
        let mut to_the_other = 0;
        for _ in 0..(4 * 64 * 10) {
            bench.path.route(bench.now);
            bench.path.handle_received(bench.now, Via::Direct(peer(1)));
            bench.pass(100 * MS);
            let pings = pinged(&bench.effects.iter().map(|(_, it)| it.clone()).collect::<Vec<_>>());
            if pings.contains(&peer(1)) {
                bench.answer_after(peer(1), latency);
            }
            to_the_other += pings.iter().filter(|it| **it == peer(2)).count();
            bench.take();
        }
        assert_eq!(to_the_other, expected, "{latency:?}");
    }
}

#[test]
fn a_better_path_replaces_one_that_works_and_a_worse_one_does_not() {
    for (latency, expected) in [(5 * MS, 2), (20 * MS, 1)] {
        let mut bench = Bench::ready(&[peer(1), peer(2)]);
        bench.answer(peer(1));
        bench.pass(2 * S);
        bench.path.handle_call_me_maybe(bench.now, &[]);
        bench.answer_after(peer(2), latency);
        assert_eq!(bench.best(), Some(peer(expected)), "{latency:?}");
    }
}

/// The reference keeps comparing with what a dead path once was.
#[test]
fn a_path_that_was_fast_and_is_dead_does_not_win_against_a_slow_one_that_works() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.answer_after(peer(1), MS);
    bench.pass(6500 * MS + 5001 * MS);
    bench.route();
    bench.pass(MS);
    bench.answer_after(peer(2), 300 * MS);
    assert_eq!(bench.best(), Some(peer(2)));
}

#[test]
fn a_path_that_has_just_lost_its_trust_still_competes() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.answer_after(peer(1), MS);
    bench.pass(9 * S);
    bench.route();
    bench.pass(MS);
    bench.answer_after(peer(2), 60 * MS);
    assert_eq!(bench.best(), Some(peer(1)));
}

#[test]
fn a_path_that_answers_stays_although_no_source_names_it_any_more() {
    let mut bench = Bench::direct();
    bench.path.handle_node(bench.now, &[]);
    bench.talk(60 * S);
    bench.path.handle_node(bench.now, &[]);
    assert_eq!(bench.route(), (Some(peer(1)), false), "not even its own ping keeps it any more");
}

#[test]
fn a_path_that_the_peer_takes_back_is_left_at_once_and_doubted_if_it_stays_listed() {
    for (is_listed, expected) in [(false, (None, true)), (true, (Some(peer(1)), true))] {
        let mut bench = Bench::direct();
        bench.path.handle_call_me_maybe(bench.now, &[peer(1)]);
        bench.path.handle_node(bench.now, &only_if(is_listed));
        bench.pass(200 * MS);
        bench.answer_all();
        bench.talk(S);
        bench.pass(60 * S);
        bench.answer_all();
        bench.talk(MS);
        bench.path.handle_call_me_maybe(bench.now, &[peer(9)]);
        let route = bench.route();
        // A ping keeps an address as well, for 45 s: none came for a minute.
        assert_eq!(route, expected, "listed: {is_listed}");
    }
}

#[test]
fn a_users_ping_goes_over_the_path_there_is_and_keeps_it() {
    let mut bench = Bench::direct();
    for n in 0..100 {
        bench.path.user_ping(bench.now, number(1000 + n));
        let effects = bench.taken();
        assert_eq!(effects, [Effect::Ping { to: peer(1), txid: number(1000 + n) }]);
        let answer = bench.path.handle_pong(bench.now + MS, Via::Direct(peer(1)), number(1000 + n), own(1));
        assert!(answer.unwrap().is_user);
        bench.pass(5 * S);
        bench.answer_all();
        bench.take();
    }
}

#[test]
fn an_answer_that_is_late_from_elsewhere_or_to_nothing_is_none() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.drain();
    let ping = |n| number(n);
    assert_eq!(bench.path.handle_pong(bench.now, Via::Direct(peer(1)), ping(99), own(1)), None);
    assert_eq!(bench.path.handle_pong(bench.now, RELAY, ping(1), own(1)), None, "the relay is another way");
    let mut bench = Bench::ready(&[peer(1)]);
    bench.drain();
    assert_eq!(bench.path.handle_pong(bench.now + 5001 * MS, Via::Direct(peer(1)), ping(1), own(1)), None);
    let mut bench = Bench::ready(&[peer(1)]);
    bench.drain();
    bench.path.handle_node(bench.now, &[]);
    assert_eq!(
        bench.path.handle_pong(bench.now, Via::Direct(peer(1)), ping(1), own(1)),
        None,
        "no candidate"
    );
    assert_eq!(bench.best(), None);
}

/// tailnet-data 7.4: a host with several addresses answers from another one.
#[test]
fn the_address_that_was_pinged_is_taken_and_the_one_that_answered_is_verified() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.take();
    assert!(bench.path.handle_pong(bench.now, Via::Direct(peer(2)), number(1), own(1)).is_some());
    assert_eq!(bench.best(), Some(peer(1)));
    assert!(bench.taken().contains(&Effect::Verified(peer(2))));
}

#[test]
fn a_peer_that_moves_is_followed_in_less_than_a_second() {
    let mut bench = Bench::direct();
    assert!(bench.hear(peer(2)));
    assert_eq!(pinged(&bench.taken()), [peer(2)], "a new address is tried though the old one is trusted");
    bench.path.user_ping(bench.now, number(1));
    bench.pass(LATENCY);
    let moved = bench.now;
    let mut elapsed = Duration::ZERO;
    while bench.best() == Some(peer(1)) && elapsed < 2 * S {
        bench.path.route(bench.now);
        bench.pass(20 * MS);
        let pings = bench.taken();
        for ping in pings {
            match ping {
                Effect::Ping { to, txid } if to == peer(2) => {
                    bench.path.handle_pong(bench.now, Via::Direct(to), txid, own(1));
                }
                Effect::ProveRelay => bench.path.handle_relay(bench.now, RelayStands::Alive),
                _ => {}
            }
        }
        elapsed = bench.now - moved;
    }
    assert_eq!(bench.best(), Some(peer(2)));
    assert!(elapsed < S, "{elapsed:?}");
}
