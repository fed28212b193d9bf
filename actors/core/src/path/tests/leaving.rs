//! Leaving a dead path (tailnet-data 7.12).

use super::*;

/// Cuts UDP under traffic; the relay answers at once. Returns what was done, from the cut on, in milliseconds.
fn cut(bench: &mut Bench, time: Duration) -> Vec<(Duration, Effect)> {
    let (end, mut done) = (bench.now + time, Vec::new());
    while bench.now < end {
        bench.path.route(bench.now);
        bench.pass(MS);
        for (at, effect) in bench.take() {
            if effect == Effect::ProveRelay {
                bench.path.handle_relay(bench.now, RelayStands::Alive);
            }
            done.push((at, effect));
        }
    }
    done
}

/// When the direct path was left.
fn left_at(done: &[(Duration, Effect)]) -> Option<Duration> {
    done.iter().find(|(_, it)| matches!(it, Effect::Changed { to: None, .. })).map(|(at, _)| *at)
}

#[test]
fn a_dead_path_is_left_after_half_a_second_and_the_peer_is_made_to_leave_it() {
    let mut bench = Bench::direct();
    let start = bench.now - bench.start;
    let done = cut(&mut bench, S);
    let pings: Vec<u128> = pings_at(&done).iter().map(|at| at - start.as_millis()).collect();
    assert_eq!(pings[..3], [200, 300, 400], "200 ms of silence after the last answer, three pings");
    let left = left_at(&done).unwrap() - start;
    assert!((500..=502).contains(&left.as_millis()), "{left:?}");
    let told = calls(&done);
    assert_eq!(
        told.iter().map(|(_, list)| list.clone()).collect::<Vec<_>>()[..3],
        [vec![own(1)], vec![], vec![own(1)]]
    );
    assert_eq!((told[1].0 - told[0].0, told[2].0 - told[1].0), (20, 20));
    assert_eq!(bench.route(), (None, true));
}

/// The reference notices nothing: data comes all the time.
#[test]
fn our_direction_alone_that_dies_while_the_peer_is_heard_is_doubted_within_a_second() {
    let mut bench = Bench::direct();
    let start = bench.now - bench.start;
    for _ in 0..70 {
        bench.path.route(bench.now);
        bench.path.handle_received(bench.now, Via::Direct(peer(1)));
        bench.pass(20 * MS);
        bench.path.handle_relay(bench.now, RelayStands::Alive);
    }
    let done = bench.take();
    let pings: Vec<u128> = pings_at(&done).iter().map(|at| at - start.as_millis()).take(6).collect();
    assert_eq!(
        pings,
        [500, 700, 800, 900, 1000, 1100],
        "half a second after the last answer, and then five more"
    );
    let left = left_at(&done).unwrap() - start;
    assert!((1200..=1220).contains(&left.as_millis()), "{left:?}");
    assert!(calls(&done).iter().any(|(_, list)| list.is_empty()), "the peer is made to leave it too");
}

/// The address that the peer has now is not the one that we send to.
#[test]
fn data_from_another_address_of_the_peer_says_nothing_of_the_path_taken() {
    let mut bench = Bench::direct();
    assert!(bench.hear(peer(2)));
    for _ in 0..10 {
        bench.path.route(bench.now);
        bench.path.handle_received(bench.now, Via::Direct(peer(2)));
        bench.pass(20 * MS);
    }
    bench.pass(20 * MS);
    assert_eq!(bench.route(), (Some(peer(1)), true));
}

#[test]
fn data_from_where_the_path_taken_answers_is_its_life_whichever_address_was_pinged() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.path.route(bench.now);
    for round in 0..50 {
        bench.pass(LATENCY);
        for effect in bench.taken() {
            if let Effect::Ping { txid, .. } = effect {
                bench.path.handle_pong(bench.now, Via::Direct(peer(2)), txid, own(1));
            }
        }
        bench.path.handle_received(bench.now, Via::Direct(peer(2)));
        assert_eq!(bench.route(), (Some(peer(1)), false), "{round}");
        bench.pass(100 * MS);
    }
}

#[test]
fn while_a_path_is_doubted_data_goes_both_ways() {
    let mut bench = Bench::direct();
    bench.shout(160 * MS);
    assert_eq!(bench.route(), (Some(peer(1)), false));
    bench.shout(60 * MS);
    assert_eq!(bench.route(), (Some(peer(1)), true));
}

#[test]
fn an_answer_ends_the_doubt_and_received_data_does_not() {
    let mut bench = Bench::direct();
    bench.shout(250 * MS);
    bench.path.handle_received(bench.now, Via::Direct(peer(1)));
    assert_eq!(bench.route(), (Some(peer(1)), true), "one direction may be dead");
    bench.answer(peer(1));
    assert_eq!(bench.route(), (Some(peer(1)), false));
    assert_eq!(calls(&bench.take()), []);
}

#[test]
fn silence_is_doubted_only_after_we_sent_or_while_the_peer_was_sending() {
    let mut bench = Bench::direct();
    bench.pass(200 * MS);
    assert_eq!(pinged(&bench.taken()), [peer(1)], "the peer was sending");
    bench.pass(20 * MS);
    bench.path.handle_pong(bench.now, Via::Direct(peer(1)), number(bench.txid), own(1));
    bench.pass(400 * MS);
    assert_eq!(pinged(&bench.taken()), [], "a pause costs one ping");
    bench.path.route(bench.now);
    bench.pass(199 * MS);
    assert_eq!(pinged(&bench.taken()), []);
    bench.pass(MS);
    assert_eq!(pinged(&bench.taken()), [peer(1)], "we sent");
}

#[test]
fn a_peer_that_was_sending_is_missed_even_if_it_answered_after_its_last_packet() {
    let mut bench = Bench::direct();
    bench.path.user_ping(bench.now, number(7));
    bench.path.handle_received(bench.now, Via::Direct(peer(1)));
    bench.drain();
    bench.pass(150 * MS);
    assert!(bench.path.handle_pong(bench.now, Via::Direct(peer(1)), number(7), own(1)).is_some());
    bench.take();
    bench.pass(199 * MS);
    assert_eq!(pinged(&bench.taken()), []);
    bench.pass(30 * MS);
    assert_eq!(pinged(&bench.taken()), [peer(1)]);
}

#[test]
fn a_slow_path_gets_one_and_a_half_round_trips_to_answer() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.path.route(bench.now);
    bench.answer_after(peer(1), 400 * MS);
    bench.take();
    let start = bench.now - bench.start;
    let done = cut(&mut bench, 4 * S);
    let pings: Vec<u128> = pings_at(&done).iter().map(|at| at - start.as_millis()).take(3).collect();
    assert_eq!(pings, [600, 700, 800], "the pings need not wait for each other's answers");
    assert_eq!((left_at(&done).unwrap() - start).as_millis(), 1400, "the verdict does");
}

#[test]
fn a_dead_idle_path_is_found_out_by_its_heartbeat() {
    let mut bench = Bench::direct();
    bench.path.handle_pong(bench.now, Via::Direct(peer(1)), number(0), own(1));
    bench.pass(300 * MS);
    bench.answer_all();
    bench.take();
    bench.pass(7 * S);
    let effects = bench.taken();
    assert!(effects.contains(&Effect::ProveRelay), "{effects:?}");
}

#[test]
fn a_path_is_not_left_for_a_relay_that_is_not_alive_and_is_asked_for_again() {
    let mut bench = Bench::direct();
    bench.shout(3 * S);
    bench.path.handle_relay(bench.now, RelayStands::Down);
    assert_eq!(bench.route(), (Some(peer(1)), true));
    let effects = bench.take();
    let proofs = effects.iter().filter(|(_, it)| *it == Effect::ProveRelay).count();
    assert_eq!(proofs, 3, "once a second");
    assert_eq!(calls(&effects), []);
    bench.path.handle_relay(bench.now, RelayStands::Alive);
    assert_eq!(bench.route(), (None, true));
}

#[test]
fn where_neither_way_works_the_relay_is_waited_for_in_the_end() {
    let mut bench = Bench::direct();
    bench.shout(7 * S);
    assert_eq!(bench.route(), (None, true));
    assert!(calls(&bench.take()).iter().all(|(_, list)| !list.is_empty()), "the peer is not made to leave");
}

#[test]
fn a_slower_path_that_answers_is_better_than_a_condemned_one() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.path.route(bench.now);
    bench.answer(peer(1));
    bench.shout(3 * S);
    assert_eq!(bench.route(), (Some(peer(1)), true));
    bench.answer_after(peer(2), 900 * MS);
    assert_eq!(bench.route(), (Some(peer(2)), false));
}

#[test]
fn what_answered_seconds_ago_is_no_better_than_the_relay() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.path.route(bench.now);
    bench.answer(peer(1));
    bench.shout(320 * MS);
    bench.answer_after(peer(2), 50 * MS);
    assert_eq!(bench.best(), Some(peer(1)), "it is slower");
    bench.shout(3 * S);
    bench.path.handle_relay(bench.now, RelayStands::Alive);
    assert_eq!(bench.route(), (None, true));
}

#[test]
fn a_path_that_dies_while_the_peer_is_made_to_leave_another_is_left_as_well() {
    let mut bench = Bench::direct();
    bench.shout(470 * MS);
    bench.path.withdrawal.start(bench.now);
    bench.path.handle_timeout(bench.now);
    bench.path.handle_relay(bench.now, RelayStands::Alive);
    bench.shout(100 * MS);
    assert!(bench.path.standing.is_condemned(), "in the middle of it");
    bench.take();
    let done = cut(&mut bench, S);
    assert!(left_at(&done).is_some());
}

#[test]
fn a_ping_that_could_not_be_sent_is_not_answered() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.drain();
    bench.path.handle_unreachable(bench.now, peer(1));
    assert_eq!(bench.path.handle_pong(bench.now, Via::Direct(peer(1)), number(1), own(1)), None);
}

#[test]
fn a_condemned_path_that_answers_before_the_relay_does_is_kept() {
    let mut bench = Bench::direct();
    bench.shout(600 * MS);
    bench.answer(peer(1));
    bench.path.handle_relay(bench.now, RelayStands::Alive);
    assert_eq!(bench.route(), (Some(peer(1)), false));
    assert_eq!(calls(&bench.take()), []);
}

#[test]
fn an_answer_before_the_peer_is_told_to_leave_spares_it_that_and_one_after_it_does_not() {
    for (time, expected) in [(15 * MS, false), (25 * MS, true)] {
        let mut bench = Bench::direct();
        let mut done = Vec::new();
        while left_at(&done).is_none() {
            done = cut(&mut bench, MS);
        }
        bench.pass(time);
        bench.drain();
        let txid = number(bench.txid_of_ping());
        bench.path.handle_pong(bench.now, Via::Direct(peer(1)), txid, own(1));
        bench.talk(S);
        let told = calls(&bench.take());
        assert_eq!(told.iter().any(|(_, list)| list.is_empty()), expected, "{time:?}: {told:?}");
        assert_eq!(told.last().map(|(_, list)| list.len()), Some(1), "{time:?}");
    }
}

/// Its data may come by the relay, for it has not found the path that we have.
#[test]
fn pings_of_the_peer_do_not_make_up_for_silence() {
    let mut bench = Bench::direct();
    for _ in 0..5 {
        bench.shout(100 * MS);
        assert!(bench.hear(peer(1)));
    }
    assert_eq!(bench.route(), (Some(peer(1)), true), "data goes both ways");
    assert!(pinged(&bench.taken()).len() >= 3);
}

#[test]
fn an_answer_from_another_address_does_not_spare_the_peer_to_leave_the_dead_one() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.path.route(bench.now);
    bench.answer(peer(1));
    bench.hear(peer(1));
    bench.talk(S);
    bench.take();
    let mut done = Vec::new();
    while left_at(&done).is_none() {
        done.extend(cut(&mut bench, MS));
    }
    let other = done.iter().rev().find_map(|(_, it)| match it {
        Effect::Ping { to, txid } if *to == peer(2) => Some(*txid),
        _ => None,
    });
    bench.path.handle_pong(bench.now, Via::Direct(peer(2)), other.unwrap(), own(1));
    assert_eq!(bench.best(), Some(peer(2)));
    bench.pass(100 * MS);
    assert!(calls(&bench.take()).iter().any(|(_, list)| list.is_empty()), "it was made to leave");
}

#[test]
fn the_messages_are_repeated_four_times_ever_later_while_nothing_comes() {
    for is_heard in [false, true] {
        let mut bench = Bench::direct();
        let mut done = cut(&mut bench, 600 * MS);
        if is_heard {
            bench.path.handle_received(bench.now, RELAY);
        }
        done.extend(cut(&mut bench, 9 * S));
        let told = calls(&done);
        let empty: Vec<u128> = told.iter().filter(|(_, list)| list.is_empty()).map(|(at, _)| *at).collect();
        assert_eq!(empty.len(), if is_heard { 1 } else { 5 }, "heard: {is_heard}");
        assert!(is_heard || empty[4] - empty[3] > 2000, "{empty:?}");
    }
}

/// Or that answer would have it return to where we cannot be heard.
#[test]
fn where_there_is_no_route_any_more_the_peer_is_told_where_we_are_once_no_answer_of_ours_is_under_way() {
    let mut bench = Bench::ready(&[peer(1)]);
    bench.path.route(bench.now);
    bench.answer_after(peer(1), 300 * MS);
    bench.take();
    bench.path.handle_unreachable(bench.now, peer(1));
    bench.path.handle_relay(bench.now, RelayStands::Alive);
    bench.pass(200 * MS);
    let told = lists(&bench.take());
    assert!(told.ends_with(&[vec![own(1)], vec![]]), "{told:?}");
    bench.pass(200 * MS);
    let told = lists(&bench.take());
    assert_eq!(told, [vec![own(1)]]);
}

/// Where chance takes a third of everything, an answer comes to one ping in two. The first goes along with the question
/// to the relay.
#[test]
fn a_path_that_is_left_is_pinged_thirteen_times_at_once_in_case_it_was_chance() {
    let mut bench = Bench::direct();
    let done = cut(&mut bench, S);
    let left = left_at(&done).unwrap().as_millis();
    let after: Vec<u128> = pings_at(&done).into_iter().filter_map(|at| at.checked_sub(left)).collect();
    let salvo = (0..12).map(|number| 6 * number);
    assert!(after.iter().copied().eq([0].into_iter().chain(salvo)), "{after:?}");
}

#[test]
fn a_lost_path_is_pinged_four_times_in_three_seconds_and_after_half_a_minute_once_in_five_unless_much_is_sent()
 {
    for (pause, expected) in [(20 * MS, 38..=41), (20 * S, 5..=12)] {
        let mut bench = Bench::direct();
        cut(&mut bench, S);
        bench.path.handle_received(bench.now, RELAY);
        let start = bench.now;
        while bench.now < start + 60 * S {
            bench.path.route(bench.now);
            bench.pass(pause);
        }
        let pings = pings_at(&bench.take());
        let early = pings.iter().filter(|at| **at < 32_000).count();
        assert!((39..=52).contains(&early), "{pings:?}");
        let late = pings.iter().filter(|at| **at >= 33_000 && **at < 62_000).count();
        assert!(expected.contains(&late), "{late}: {pings:?}");
    }
}

#[test]
fn a_path_that_was_lost_long_ago_is_pinged_within_a_second_once_something_is_sent_again() {
    for rest in [3500, 4000, 4500] {
        let mut bench = Bench::direct();
        cut(&mut bench, S);
        bench.path.handle_received(bench.now, RELAY);
        bench.pass(40 * S);
        bench.path.route(bench.now);
        bench.pass(rest * MS);
        bench.take();
        bench.path.route(bench.now);
        bench.pass(S);
        assert!(!pings_at(&bench.take()).is_empty(), "{rest} ms later");
    }
}

#[test]
fn a_lost_path_is_taken_at_its_first_answer_and_the_peer_is_told_all() {
    let mut bench = Bench::direct();
    cut(&mut bench, S);
    bench.path.handle_received(bench.now, RELAY);
    let done = cut(&mut bench, 5500 * MS);
    assert!(!pings_at(&done).is_empty());
    assert!(bench.hear(peer(1)), "a ping from the peer");
    assert_eq!(pinged(&bench.taken()), [peer(1)], "is returned at once");
    bench.path.handle_pong(bench.now, Via::Direct(peer(1)), number(bench.txid_of_ping()), own(1));
    assert_eq!(bench.route(), (Some(peer(1)), false));
    let told = calls(&bench.take());
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].1, [own(1)]);
}

#[test]
fn another_path_that_answers_is_taken_instead_of_the_relay_and_the_peer_still_told() {
    let mut bench = Bench::ready(&[peer(1), peer(2)]);
    bench.path.route(bench.now);
    bench.answer(peer(1));
    bench.talk(S);
    bench.take();
    let (end, mut done) = (bench.now + S, Vec::new());
    while bench.now < end {
        bench.path.route(bench.now);
        bench.pass(MS);
        for (at, effect) in bench.take() {
            match effect {
                Effect::Ping { to, txid } if to == peer(2) => {
                    bench.path.handle_pong(bench.now, Via::Direct(to), txid, own(1));
                }
                Effect::ProveRelay => bench.path.handle_relay(bench.now, RelayStands::Alive),
                _ => {}
            }
            done.push((at, effect));
        }
    }
    assert_eq!(bench.route(), (Some(peer(2)), false));
    assert_eq!(left_at(&done), None, "it never was the relay alone");
    assert!(calls(&done).iter().any(|(_, list)| list.is_empty()));
}

#[test]
fn a_false_alarm_heals_at_the_answer_and_makes_us_careful() {
    let mut bench = Bench::direct();
    let done = cut(&mut bench, 600 * MS);
    assert!(left_at(&done).is_some());
    assert!(bench.hear(peer(1)), "the third message had the peer ping");
    bench.pass(100 * MS);
    bench.answer_all();
    assert_eq!(bench.best(), Some(peer(1)), "direct again");
    bench.talk(70 * S);
    bench.take();
    let start = bench.now - bench.start;
    let done = cut(&mut bench, 2 * S);
    let pings: Vec<u128> = pings_at(&done).iter().map(|at| at - start.as_millis()).take(4).collect();
    assert_eq!(pings, [300, 450, 600, 750]);
    assert!((left_at(&done).unwrap() - start).as_millis() <= 902);
}

/// Each is over in a moment and makes more careful; more than four in a minute are too many all the same.
#[test]
fn false_alarms_bar_direct_paths_only_after_four_in_a_minute_and_cost_ever_more_pings_before() {
    let mut bench = Bench::direct();
    for expected in [3, 4, 6, 6] {
        let start = bench.now - bench.start;
        let done = cut(&mut bench, 1250 * MS);
        let left = left_at(&done).unwrap();
        let before =
            pings_at(&done).into_iter().filter(|at| *at < left.as_millis() && *at > start.as_millis());
        assert_eq!(before.count(), expected);
        assert!(bench.hear(peer(1)));
        bench.pass(100 * MS);
        bench.answer_all();
        bench.talk(5 * S);
        assert_eq!(bench.best(), Some(peer(1)), "direct again");
        bench.take();
    }
    cut(&mut bench, 1250 * MS);
    assert!(bench.path.standing.is_barred());
}

#[test]
fn two_alarms_in_a_minute_bar_direct_paths_for_ten_seconds_then_twenty_up_to_sixty() {
    let mut bench = Bench::direct();
    for expected in [0, 10, 20, 40, 60, 60] {
        let done = cut(&mut bench, 2 * S);
        let left = left_at(&done).unwrap();
        bench.path.handle_received(bench.now, RELAY);
        if expected > 0 {
            let told: Vec<usize> = calls(&done).iter().map(|(_, list)| list.len()).collect();
            assert_eq!(told.last(), Some(&0), "the third message stays out");
            assert!(!bench.hear(peer(1)), "an answer would have the peer come back");
        }
        let mut pinged_at = None;
        while pinged_at.is_none() {
            assert!(bench.now - bench.start < left + 70 * S, "{expected}: never again");
            bench.path.route(bench.now);
            bench.pass(10 * MS);
            pinged_at = pings_at(&bench.effects).first().map(|at| *at - left.as_millis());
            bench.effects.retain(|(_, it)| matches!(it, Effect::Ping { .. }));
        }
        let after = pinged_at.unwrap();
        assert!(
            after.abs_diff(expected * 1000) <= if expected == 0 { 3000 } else { 20 },
            "{expected}: {after}"
        );
        bench.answer_all();
        bench.talk(S);
        bench.take();
    }
}

#[test]
fn alarms_that_are_minutes_apart_bar_nothing() {
    let mut bench = Bench::direct();
    for _ in 0..5 {
        cut(&mut bench, 2 * S);
        bench.talk(100 * S);
        bench.take();
        assert_eq!(bench.best(), Some(peer(1)));
        assert!(!bench.path.standing.is_barred());
    }
}

#[test]
fn a_path_that_cannot_be_reached_is_left_at_once() {
    let mut bench = Bench::direct();
    bench.path.handle_unreachable(bench.now, peer(1));
    assert_eq!(bench.route(), (None, true));
    let effects = bench.taken();
    assert_eq!(effects[0], Effect::Changed { from: Some(peer(1)), to: None, why: Why::Unreachable });
    assert!(effects.contains(&Effect::ProveRelay), "the peer shall leave it too");
    bench.path.handle_unreachable(bench.now, peer(1));
    bench.path.handle_unreachable(bench.now, peer(2));
    assert_eq!(bench.taken(), []);
}

/// The reference tells the peer nothing where its own heartbeat was the last ping.
#[test]
fn the_peer_is_told_of_the_loss_of_the_only_path_however_it_was_lost() {
    for way in ["silence", "unreachable", "expiry"] {
        let mut bench = Bench::direct();
        let mut done = Vec::new();
        match way {
            "silence" => {}
            "unreachable" => bench.path.handle_unreachable(bench.now, peer(1)),
            _ => {
                bench.pass(250 * MS);
                bench.answer_all();
                bench.pass(60 * S);
                done = bench.take();
                done.clear();
            }
        }
        done.extend(cut(&mut bench, 3 * S));
        assert!(calls(&done).iter().any(|(_, list)| *list == [own(1)]), "{way}");
    }
}

impl Bench {
    /// The number of the latest ping that went out.
    fn txid_of_ping(&self) -> u64 {
        // Pings from the peer count the same numbers; ours was drawn after it.
        self.txid
    }
}
