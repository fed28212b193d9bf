//! A peer that keeps to an address at which we are no more (tailnet-data 7.12, step 2).

use super::*;

/// Pings the path taken; the peer answers that and all else, and says that it sees us there. What it is told in this
/// time, the relay being alive.
fn told(bench: &mut Bench, seen_at: SocketAddr, time: Duration) -> Vec<Vec<SocketAddr>> {
    bench.txid += 1;
    bench.path.user_ping(bench.now, number(bench.txid));
    let (end, mut lists) = (bench.now + time, Vec::new());
    while bench.now < end {
        bench.path.handle_timeout(bench.now);
        for effect in bench.taken() {
            match effect {
                Effect::ProveRelay => bench.path.handle_relay(bench.now, RelayStands::Alive),
                Effect::CallMeMaybe(list) => lists.push(list),
                Effect::Ping { to, txid } => {
                    bench.path.handle_pong(bench.now, Via::Direct(to), txid, seen_at);
                }
                _ => {}
            }
        }
        bench.now += 5 * MS;
    }
    lists
}

/// A calm path, with nothing under way.
fn calm() -> Bench {
    let mut bench = Bench::direct();
    bench.pass(200 * MS);
    bench.answer_all();
    bench.take();
    bench
}

#[test]
fn a_peer_that_sees_us_elsewhere_than_before_is_made_to_leave_where_we_were() {
    for (seen_at, expected) in [(own(1), 0), (own(2), 1)] {
        let mut bench = calm();
        bench.path.handle_own_endpoints(bench.now, &[own(9)]);
        let lists = told(&mut bench, seen_at, 200 * MS);
        let [all, none, present] = [vec![own(9), own(2), own(1)], vec![], vec![own(9), own(2)]];
        assert_eq!(lists, [all, none, present][..3 * expected]);
        assert_eq!(bench.route(), (Some(peer(1)), false), "our own direction works");
    }
}

#[test]
fn a_peer_that_sees_us_elsewhere_all_the_time_is_told_ever_more_rarely() {
    let (mut bench, mut empty) = (calm(), 0);
    for address in [own(1), own(2)].into_iter().cycle().take(1200) {
        bench.hear(peer(1));
        empty += told(&mut bench, address, 500 * MS).iter().filter(|it| it.is_empty()).count();
    }
    // Once a minute in the end, and each time again because it is heard only a quarter of a second later.
    assert!((20..=40).contains(&empty), "{empty} in ten minutes");
}

#[test]
fn a_peer_whose_packets_go_on_coming_by_relay_although_it_answers_is_told_again() {
    for (is_heard_directly, expected) in [(false, true), (true, false)] {
        let (mut bench, mut lists) = (calm(), Vec::new());
        for n in 0..90 {
            bench.path.handle_received(bench.now, RELAY);
            if is_heard_directly && n % 10 == 0 {
                bench.path.handle_received(bench.now, Via::Direct(peer(1)));
            }
            lists.extend(told(&mut bench, own(1), 45 * MS));
        }
        assert_eq!(lists.contains(&vec![]), expected, "directly too: {is_heard_directly}");
    }
}

#[test]
fn a_peer_that_sends_by_relay_for_good_is_told_ever_more_rarely() {
    let (mut bench, mut empty) = (calm(), 0);
    for _ in 0..6000 {
        bench.path.handle_received(bench.now, RELAY);
        empty += told(&mut bench, own(1), 100 * MS).iter().filter(|it| it.is_empty()).count();
    }
    assert!((4..=8).contains(&empty), "{empty} in ten minutes");
}

#[test]
fn a_peer_that_pings_us_where_we_are_now_need_not_be_told_again() {
    for (is_heard, expected) in [(true, 1), (false, 5)] {
        let mut bench = calm();
        let mut lists = told(&mut bench, own(2), 100 * MS);
        if is_heard {
            bench.hear(peer(1));
        }
        for _ in 0..100 {
            lists.extend(told(&mut bench, own(2), 100 * MS));
        }
        assert_eq!(lists.iter().filter(|it| it.is_empty()).count(), expected, "heard: {is_heard}");
    }
}
