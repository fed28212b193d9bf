//! Before there is a direct path: candidates, rounds, back-off.

use super::*;

#[test]
fn nothing_is_probed_before_the_peer_knows_us() {
    let mut bench = Bench::new();
    bench.path.handle_own_endpoints(bench.now, &[own(1)]);
    bench.path.handle_node(bench.now, &[peer(1)]);
    bench.path.handle_call_me_maybe(bench.now, &[peer(2)]);
    bench.path.user_ping(bench.now, number(1));
    assert!(bench.hear(peer(3)), "a ping is answered");
    bench.shout(30 * S);
    let effects = bench.taken();
    assert_eq!(effects, [Effect::Verified(peer(3))]);
}

#[test]
fn at_ready_all_candidates_are_pinged_before_the_peer_is_told_to() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    let effects = bench.taken();
    assert_eq!(pinged(&effects), [peer(1), peer(2)]);
    assert_eq!(effects[2..], [Effect::CallMeMaybe(vec![own(1)])]);
}

#[test]
fn a_ready_that_comes_again_repeats_the_pings_at_once() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.pass(2 * S);
    bench.take();
    bench.path.handle_ready(bench.now);
    assert_eq!(pinged(&bench.taken()), [peer(1)], "the peer may not have known us before");
}

/// tailnet-data 7.2, and "keep a candidate while any of the three sources holds".
#[test]
fn a_candidate_is_kept_while_any_of_its_sources_holds() {
    const ROWS: &[(bool, bool, bool, u64, bool)] = &[
        // listed, called, pinged us; seconds ago; whether it is still pinged
        (true, false, false, 100, true),
        (false, true, false, 100, true),
        (false, false, true, 40, true),
        (false, false, true, 50, false),
        (true, false, true, 50, true),
        (false, true, true, 50, true),
        (false, false, false, 1, false),
    ];
    for row in ROWS {
        let (is_listed, is_called, has_pinged, age, expected) = *row;
        let mut bench = Bench::new();
        let now = bench.now;
        bench.path.handle_node(now, &[peer(1)]);
        bench.path.handle_call_me_maybe(now, &[peer(1)]);
        if has_pinged {
            bench.hear(peer(1));
        }
        bench.path.handle_node(now, &only_if(is_listed));
        bench.path.handle_call_me_maybe(now, &only_if(is_called));
        bench.pass(Duration::from_secs(age));
        bench.path.handle_ready(bench.now);
        assert_eq!(!pinged(&bench.taken()).is_empty(), expected, "{row:?}");
    }
}

#[test]
fn what_names_no_host_is_neither_pinged_nor_listed() {
    const ROWS: &[(&str, bool)] = &[
        ("203.0.113.1:1", true),
        ("127.0.0.1:1", true),
        ("169.254.1.1:1", true),
        ("[2001:db8::1]:1", true),
        ("[fd7a:115c:a1e0::1]:1", true),
        ("[fe80::1]:1", false),
        ("[fd60:627a:a42b::1]:1", false),
        ("203.0.113.1:0", false),
        ("0.0.0.0:1", false),
        ("255.255.255.255:1", false),
        ("224.0.0.1:1", false),
        ("[ff02::1]:1", false),
        ("[::]:1", false),
        ("127.3.3.40:1", false),
    ];
    for (text, expected) in ROWS {
        let mut bench = Bench::new();
        bench.path.handle_own_endpoints(bench.now, &[address(text)]);
        bench.path.handle_node(bench.now, &[address(text)]);
        bench.path.handle_call_me_maybe(bench.now, &[address(text)]);
        assert_eq!(bench.hear(address(text)), *expected, "{text} is answered");
        bench.path.handle_ready(bench.now);
        let effects = bench.take();
        assert_eq!(pings_at(&effects).len() == 1, *expected, "{text} is pinged");
        assert_eq!(calls(&effects).len() == 1, *expected, "{text} is told");
    }
}

#[test]
fn an_ipv4_address_in_ipv6_clothes_is_the_same_address() {
    let mut bench = Bench::ready(&[address("203.0.113.1:1000"), address("[::ffff:203.0.113.1]:1000")]);
    assert_eq!(pinged(&bench.taken()), [peer(1)]);
}

#[test]
fn a_peer_without_a_direct_path_is_probed_ever_more_rarely_while_it_is_talked_to() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.shout(200 * S);
    let effects = bench.take();
    assert_eq!(pings_at(&effects), [0, 1_000, 5_000, 15_000, 35_000, 75_000, 135_000, 195_000]);
    // Our endpoints were collected at the start: they are asked for again, and waited for.
    assert_eq!(calls(&effects).len(), 7);
}

/// Ours before our call may have been stopped by the peer's NAT, which its own pings open: it makes them when it is
/// called. Where ours maps every destination to another port, nothing else opens it.
#[test]
fn pings_that_were_not_answered_are_repeated_once_a_second_after_the_peer_was_called() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.take();
    bench.pass(4 * S);
    let effects = bench.take();
    assert_eq!(pings_at(&effects), [1_000, 1_000]);
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.answer(peer(1));
    bench.take();
    bench.pass(4 * S);
    assert_eq!(pinged(&bench.taken()), [], "one of them answered");
}

#[test]
fn a_peer_that_is_not_talked_to_is_not_probed() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.route();
    bench.take();
    bench.pass(40 * S);
    assert_eq!(pings_at(&bench.take()), [1_000, 5_000, 15_000, 35_000], "a packet is talk for 45 s");
    bench.pass(1000 * S);
    assert_eq!(bench.take(), [], "later it is not");
    assert_eq!(bench.path.poll_timeout(), None);
    bench.route();
    bench.pass(MS);
    assert_eq!(pinged(&bench.taken()), [peer(1)], "the next packet asks again");
}

#[test]
fn a_ping_from_the_peer_is_returned_at_once_and_hurries_nobody_else() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.pass(50 * MS);
    bench.take();
    assert!(bench.hear(peer(1)));
    assert_eq!(bench.taken(), [Effect::Verified(peer(1))], "it was pinged just now");
    bench.pass(50 * MS);
    assert_eq!(pinged(&bench.taken()), [peer(1)]);
    assert!(bench.hear(peer(3)));
    assert_eq!(pinged(&bench.taken()), [peer(3)]);
}

#[test]
fn a_call_me_maybe_has_all_candidates_pinged_and_is_not_answered_by_another() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.pass(2 * S);
    bench.take();
    bench.path.handle_call_me_maybe(bench.now, &[peer(3)]);
    let effects = bench.take();
    assert_eq!(pings_at(&effects).len(), 3, "those pinged 2 s ago too");
    assert_eq!(calls(&effects), []);
}

#[test]
fn call_me_maybes_make_us_no_tool_for_floods() {
    let victims: Vec<SocketAddr> = (0..250).map(peer).collect();
    let mut bench = Bench::ready(&[]);
    bench.take();
    for _ in 0..1000 {
        bench.path.handle_call_me_maybe(bench.now, &victims);
        bench.pass(MS);
    }
    assert_eq!(pinged(&bench.taken()).len(), 2 * candidates::MAX_CANDIDATES, "a second apart");
}

/// What was taken away and comes again counts as new; a forged ping makes an address look like one of the peer's.
#[test]
fn candidates_that_come_and_go_make_us_no_tool_for_floods() {
    let victims: Vec<SocketAddr> = (0..100).map(peer).collect();
    let mut bench = Bench::ready(&[]);
    bench.take();
    for n in 0..1000_usize {
        let called = if n.is_multiple_of(2) { victims.as_slice() } else { &[] };
        bench.path.handle_call_me_maybe(bench.now, called);
        bench.hear(victims[n % victims.len()]);
        bench.pass(10 * MS);
    }
    let pings = pinged(&bench.taken()).len();
    assert!((600..=705).contains(&pings), "{pings} in ten seconds: 200, and fifty a second");
}

/// The peer's firewall lets nobody in before it has asked itself: the way in one network, perhaps.
#[test]
fn an_address_from_which_the_peer_pings_is_tried_although_another_has_answered() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.pass(50 * MS);
    assert!(bench.hear(peer(2)));
    bench.answer_after(peer(1), 60 * MS);
    bench.take();
    bench.pass(100 * MS);
    assert_eq!(pinged(&bench.taken()), [peer(2)]);
}

#[test]
fn too_many_addresses_are_not_kept_and_the_named_ones_stay() {
    let mut bench = Bench::ready(&[peer(1)]);
    for n in 0..500_u16 {
        bench.hear(SocketAddr::from(([203, 0, 113, 200], 1 + n)));
        bench.drain();
    }
    assert_eq!(bench.path.candidates.len(), candidates::MAX_CANDIDATES);
    assert!(bench.path.candidates.contains(&peer(1)));
    let named: Vec<SocketAddr> = (0..200).map(peer).collect();
    bench.path.handle_node(bench.now, &named);
    assert_eq!(bench.path.candidates.len(), candidates::MAX_CANDIDATES);
}

#[test]
fn new_endpoints_of_the_peer_or_of_ours_end_the_back_off() {
    for which in ["peer", "own"] {
        let mut bench = Bench::ready(&[peer(1)]);
        bench.shout(50 * S);
        bench.take();
        match which {
            "peer" => bench.path.handle_node(bench.now, &[peer(1), peer(2)]),
            _ => bench.path.handle_own_endpoints(bench.now, &[own(1), own(2)]),
        }
        assert!(pinged(&bench.taken()).contains(&peer(1)), "{which}");
        bench.shout(6 * S);
        assert!(!pinged(&bench.taken()).is_empty(), "{which}");
    }
}

#[test]
fn a_users_ping_goes_over_the_relay_and_to_candidates_as_far_as_they_were_not_tried_just_now() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.take();
    bench.path.user_ping(bench.now, number(7));
    assert_eq!(bench.taken(), [Effect::RelayPing { txid: number(7) }]);
    bench.pass(10 * S);
    bench.take();
    bench.path.user_ping(bench.now, number(8));
    let effects = bench.taken();
    assert_eq!(effects[0], Effect::RelayPing { txid: number(8) });
    assert_eq!(pinged(&effects), [peer(1)]);
}

#[test]
fn an_idle_relayed_peer_that_is_pinged_for_status_is_hardly_ever_probed() {
    let mut bench = Bench::ready(&[peer(1), peer(2), peer(3)]);
    bench.take();
    for n in 0..120 {
        bench.path.user_ping(bench.now, number(n));
        bench.pass(5 * S);
    }
    let effects = bench.take();
    assert!(pings_at(&effects).len() <= 3 * 14, "in ten minutes: {}", pings_at(&effects).len());
    assert_eq!(effects.iter().filter(|(_, it)| matches!(it, Effect::RelayPing { .. })).count(), 120);
}

#[test]
fn an_answer_is_told_with_its_way_and_who_asked() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.pass(10 * S);
    bench.take();
    bench.path.user_ping(bench.now, number(8));
    bench.drain();
    let later = bench.now + 30 * MS;
    let relayed = bench.path.handle_pong(later, RELAY, number(8), own(1));
    let expected = Answer { via: RELAY, latency: 30 * MS, is_user: true, txid: number(8) };
    assert_eq!(relayed, Some(expected));
    assert_eq!(bench.path.handle_pong(later, RELAY, number(8), own(1)), None, "once");
    let direct = bench.answer(peer(1));
    let expected = Answer { via: Via::Direct(peer(1)), latency: LATENCY, is_user: true, txid: number(8) };
    assert_eq!(direct, Some(expected), "the user's number, not the ping's own");
}

/// It has our answer and trusts the path; then its direction dies before it answers us.
#[test]
fn a_peer_that_pinged_us_and_is_heard_by_no_way_is_made_to_leave_a_path_that_we_do_not_have() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.pass(2 * S);
    bench.take();
    let start = (bench.now - bench.start).as_millis();
    assert!(bench.hear(peer(1)));
    bench.pass(50 * MS);
    bench.path.handle_received(bench.now, RELAY);
    bench.pass(450 * MS);
    bench.path.handle_relay(bench.now, RelayStands::Alive);
    bench.pass(100 * MS);
    let effects = bench.take();
    let pings: Vec<u128> = pings_at(&effects).iter().map(|at| at - start).collect();
    assert_eq!(pings, [0, 100, 200, 300, 400]);
    let told: Vec<_> = calls(&effects).into_iter().map(|(at, list)| (at - start, list.len())).collect();
    assert_eq!(told, [(500, 1), (520, 0), (540, 1)]);
}

#[test]
fn a_peer_that_pinged_us_and_is_heard_or_answers_is_left_alone() {
    for by in ["relay", "udp", "answer"] {
        let mut bench = Bench::ready(&[peer(1)]);
        bench.pass(2 * S);
        bench.take();
        assert!(bench.hear(peer(1)));
        bench.pass(400 * MS);
        match by {
            "relay" => bench.path.handle_received(bench.now, RELAY),
            "udp" => bench.path.handle_received(bench.now, Via::Direct(peer(1))),
            _ => drop(bench.answer(peer(1))),
        }
        bench.pass(2 * S);
        assert!(!bench.taken().contains(&Effect::ProveRelay), "{by}");
    }
}

#[test]
fn a_peer_that_goes_on_pinging_without_a_word_is_told_ever_more_rarely() {
    let mut bench = Bench::ready(&[peer(1)]);
    let mut asked = 0;
    for _ in 0..600 {
        bench.hear(peer(1));
        bench.pass(S);
        asked += bench.take().iter().filter(|(_, it)| *it == Effect::ProveRelay).count();
        bench.path.handle_relay(bench.now, RelayStands::Alive);
    }
    assert!((3..=6).contains(&asked), "{asked}");
}
