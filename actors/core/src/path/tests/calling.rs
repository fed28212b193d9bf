//! What the peer is told of our addresses.

use super::*;

#[test]
fn addresses_that_are_too_old_are_collected_before_they_are_told() {
    for (age, is_fresh) in [(27, true), (28, false)] {
        let mut bench = Bench::new();
        bench.path.handle_own_endpoints(bench.now, &[own(1)]);
        bench.path.handle_node(bench.now, &[peer(1)]);
        bench.pass(Duration::from_secs(age));
        bench.path.handle_ready(bench.now);
        let effects = bench.taken();
        let expected = if is_fresh { Effect::CallMeMaybe(vec![own(1)]) } else { Effect::RefreshEndpoints };
        assert_eq!(effects[1..], [expected], "{age} s");
    }
}

#[test]
fn what_was_collected_is_told_and_without_it_the_old_after_a_second() {
    for is_collected in [true, false] {
        let mut bench = Bench::ready(&[peer(1)]);
        bench.pass(30 * S);
        bench.path.handle_ready(bench.now);
        bench.pass(500 * MS);
        bench.take();
        if is_collected {
            bench.path.handle_own_endpoints(bench.now, &[own(2)]);
        }
        bench.pass(S);
        let expected = if is_collected { (30_500, vec![own(2)]) } else { (31_000, vec![own(1)]) };
        assert_eq!(calls(&bench.take()), [expected]);
    }
}

#[test]
fn an_empty_list_is_not_told_of_our_own_accord() {
    let mut bench = Bench::new();
    bench.path.handle_node(bench.now, &[peer(1)]);
    bench.path.handle_ready(bench.now);
    bench.shout(20 * S);
    assert_eq!(calls(&bench.take()), []);
}

#[test]
fn our_own_messages_are_a_second_apart() {
    let mut bench = Bench::ready(&[peer(1)]);
    for n in 0..50 {
        bench.path.route(bench.now);
        bench.path.handle_node(bench.now, &[peer(n)]);
        bench.pass(100 * MS);
    }
    assert!(calls(&bench.take()).len() <= 6);
}

#[test]
fn a_path_that_we_found_and_the_peer_did_not_is_told_to_it() {
    for has_pinged in [false, true] {
        let mut bench = Bench::ready(&[peer(1)]);
        bench.take();
        bench.pass(2 * S);
        if has_pinged {
            bench.hear(peer(1));
        }
        bench.path.handle_call_me_maybe(bench.now, &[]);
        bench.answer(peer(1));
        let told = calls(&bench.take());
        assert_eq!(told.len(), usize::from(!has_pinged), "pinged: {has_pinged}");
    }
}

#[test]
fn all_that_the_peer_may_know_of_us_is_remembered_within_bounds() {
    let mut bench = Bench::direct();
    for n in 0..200 {
        bench.path.handle_own_endpoints(bench.now, &(n..n + 50).map(own).collect::<Vec<_>>());
        bench.path.user_ping(bench.now, number(u64::from(n) + 5000));
        bench.drain();
        let ping = number(u64::from(n) + 5000);
        bench.path.handle_pong(bench.now, Via::Direct(peer(1)), ping, SocketAddr::from(([9, 9, 9, n], 1)));
        bench.drain();
    }
    let all = bench.path.calling.all(bench.now);
    assert!(all.len() <= candidates::MAX_CANDIDATES);
    assert_eq!(bench.path.calling.len(), all.len());
    assert!(all.contains(&own(248)), "now");
    assert!(all.contains(&own(198)), "before");
    assert!(all.contains(&address("9.9.9.199:1")), "as seen by the peer");
}

#[test]
fn of_the_addresses_that_were_ours_few_are_told_and_none_for_long() {
    let mut bench = Bench::direct();
    let tell_all = |bench: &mut Bench| bench.path.calling.all(bench.now);
    for n in 2..40 {
        bench.path.handle_own_endpoints(bench.now, &[own(n)]);
        bench.pass(MS);
    }
    let all = tell_all(&mut bench);
    assert_eq!(all[..2], [own(39), own(1)], "where we are, and are seen");
    assert_eq!(all[2..], (33..39).rev().map(own).collect::<Vec<_>>(), "the latest few before");
    bench.pass(121 * S);
    assert_eq!(tell_all(&mut bench), [own(39), own(1), own(38)]);
}

/// However long nothing was said, the peer keeps to where it saw us last.
#[test]
fn where_the_peer_saw_us_before_is_kept_until_long_after_it_sees_us_elsewhere() {
    let mut calling = Calling::default();
    let start = Instant::now();
    calling.note_observed(start, own(1));
    let then = start + 3600 * S;
    calling.note_observed(then, own(2));
    assert_eq!(calling.all(then + 120 * S), [own(2), own(1)]);
    assert_eq!(calling.all(then + 121 * S), [own(2)]);
}

/// A list that omits what an earlier one had makes the peer leave it.
#[test]
fn where_the_peer_sees_us_is_told_along() {
    let mut bench = Bench::direct();
    bench.path.handle_own_endpoints(bench.now, &[own(2)]);
    bench.take();
    bench.pass(5 * S);
    bench.path.handle_ready(bench.now);
    bench.pass(S);
    assert_eq!(calls(&bench.take()).last().unwrap().1, [own(2), own(1)]);
}
