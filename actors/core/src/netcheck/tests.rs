use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use proptest::{collection::vec, prelude::*};
use warren_proto::stun;

use super::*;
use crate::relay_map::{Node, NodeAddress, Region};

const BOTH: Families = Families { v4: true, v6: true };
const ONLY_V4: Families = Families { v4: true, v6: false };
const HERE: &str = "198.51.100.9:41641";
const HERE_V6: &str = "[2001:db8::9]:41641";

mod plan {
    use super::{super::plan::*, *};

    #[test]
    fn a_full_run_asks_every_region_three_times_at_once_in_each_family_its_servers_in_turn() {
        let map = map([region(1, &[server("a"), server("b")]), region(2, &[server("c")])]);
        let probes = probes(Kind::Full, &map, BOTH, &nothing());
        assert!(probes.iter().all(|probe| probe.after == Duration::ZERO));
        let asked = probes.iter().map(|probe| (probe.to.region.0, probe.to.family, name(probe)));
        let expected = [
            (1, Family::V4, ["a", "b", "a"]),
            (1, Family::V6, ["a", "b", "a"]),
            (2, Family::V4, ["c", "c", "c"]),
            (2, Family::V6, ["c", "c", "c"]),
        ];
        let expected = expected.into_iter().flat_map(|(id, family, names)| names.map(|it| (id, family, it)));
        assert_eq!(asked.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    }

    #[test]
    fn a_family_that_the_machine_lacks_is_not_asked() {
        let map = map([region(1, &[server("a")])]);
        for (families, count) in [(ONLY_V4, 3), (BOTH, 6), (Families { v4: false, v6: true }, 3)] {
            assert_eq!(probes(Kind::Full, &map, families, &nothing()).len(), count, "{families:?}");
        }
    }

    #[test]
    fn a_server_is_asked_where_the_map_says_and_in_the_families_that_it_allows() {
        let v4 = |text: &str| Some(StunHost::Address(text.parse().unwrap()));
        let by_name = || Some(StunHost::Name("a".to_owned()));
        let rows: [(Node, Option<StunHost>, Option<StunHost>); 9] = [
            (server("a"), by_name(), by_name()),
            (Node { stun_port: None, ..server("a") }, None, None),
            (
                Node { ipv4: NodeAddress::Fixed(Ipv4Addr::new(192, 0, 2, 1)), ..server("a") },
                v4("192.0.2.1"),
                by_name(),
            ),
            (Node { ipv6: NodeAddress::Disabled, ..server("a") }, by_name(), None),
            (Node { stun_test_ip: Some("192.0.2.7".parse().unwrap()), ..server("a") }, v4("192.0.2.7"), None),
            (server("192.0.2.8"), v4("192.0.2.8"), None),
            (server("2001:db8::8"), None, v4("2001:db8::8")),
            (server(""), None, None),
            (server("fd60:627a:a42b::9"), None, None),
        ];
        for (node, expected_v4, expected_v6) in rows {
            let planned =
                probes(Kind::Full, &map([region(1, std::slice::from_ref(&node))]), BOTH, &nothing());
            let host = |family| {
                planned.iter().find(|probe| probe.to.family == family).map(|probe| probe.to.host.clone())
            };
            assert_eq!((host(Family::V4), host(Family::V6)), (expected_v4, expected_v6), "{node:?}");
        }
    }

    #[test]
    fn addresses_of_many_or_of_none_are_not_asked() {
        for text in ["0.0.0.0", "255.255.255.255", "224.0.0.1", "::", "ff02::1", "::ffff:192.0.2.1"] {
            let probes = probes(Kind::Full, &map([region(1, &[server(text)])]), BOTH, &nothing());
            assert_eq!(probes, [], "{text}");
        }
    }

    #[test]
    fn an_incremental_run_asks_the_three_nearest_and_the_nearest_two_twice() {
        let regions = (1..=5).map(|id| region(id, &[server("a")]));
        let report = report(&[(5, 10), (4, 20), (2, 30), (1, 40)]);
        let planned =
            probes(Kind::Incremental, &map(regions), ONLY_V4, &Past { report: Some(&report), ..nothing() });
        assert_eq!(schedule(&planned), [(5, 0), (4, 0), (2, 0), (5, 12), (4, 24)]);
    }

    #[test]
    fn regions_of_unknown_distance_come_last_and_wait_a_fifth_of_a_second() {
        let regions = [region(1, &[server("a")]), region(2, &[server("a")])];
        let report = report(&[(2, 100)]);
        let past = Past { report: Some(&report), ..nothing() };
        let planned = probes(Kind::Incremental, &map(regions), ONLY_V4, &past);
        assert_eq!(schedule(&planned), [(2, 0), (1, 0), (2, 120), (1, 200)]);
    }

    #[test]
    fn the_home_is_asked_four_times_and_later_repetitions_wait_longer() {
        let report = report(&[(1, 100)]);
        let past = Past { report: Some(&report), home: Some(RegionId(1)), ..nothing() };
        let planned = probes(Kind::Incremental, &map([region(1, &[server("a")])]), ONLY_V4, &past);
        assert_eq!(schedule(&planned), [(1, 0), (1, 120), (1, 340), (1, 510)]);
    }

    #[test]
    fn regions_to_avoid_and_those_without_a_server_do_not_count_among_the_nearest() {
        let avoided = Region { avoid: true, ..region(1, &[server("a")]) };
        let silent = region(2, &[Node { stun_port: None, ..server("a") }]);
        let others = (3..=6).map(|id| region(id, &[server("a")]));
        let map = map([avoided, silent].into_iter().chain(others));
        let planned = probes(Kind::Incremental, &map, ONLY_V4, &nothing());
        let first: Vec<u16> = schedule(&planned).iter().filter(|it| it.1 == 0).map(|it| it.0).collect();
        assert_eq!(first, [3, 4, 5]);
    }

    #[test]
    fn the_third_is_asked_in_one_family_by_turns_where_both_work() {
        let map = map((1..=3).map(|id| region(id, &[server("a")])));
        let mut both = report(&[(1, 10), (2, 20), (3, 30)]);
        both.mappings.v6 = HERE_V6.parse().ok();
        let only_v4 = report(&[(1, 10), (2, 20), (3, 30)]);
        let rows = [
            (&both, BOTH, 1, Family::V4),
            (&both, BOTH, 2, Family::V6),
            (&both, ONLY_V4, 2, Family::V4),
            (&only_v4, BOTH, 2, Family::V4),
            (&only_v4, Families { v4: false, v6: true }, 1, Family::V6),
        ];
        for (report, families, turn, expected) in rows {
            let planned =
                probes(Kind::Incremental, &map, families, &Past { report: Some(report), turn, ..nothing() });
            let third: Vec<Family> =
                planned.iter().filter(|it| it.to.region == RegionId(3)).map(|it| it.to.family).collect();
            assert_eq!(third, [expected], "{families:?}, turn {turn}");
        }
    }

    #[test]
    fn ipv6_is_asked_again_only_where_it_worked_last_time() {
        let map = map([region(1, &[server("a")])]);
        let mut report = report(&[(1, 10)]);
        let of_v6 = |report: &Report| {
            let past = Past { report: Some(report), home: Some(RegionId(1)), ..nothing() };
            let planned = probes(Kind::Incremental, &map, BOTH, &past);
            planned.iter().filter(|probe| probe.to.family == Family::V6).count()
        };
        assert_eq!(of_v6(&report), 1);
        report.mappings.v6 = HERE_V6.parse().ok();
        assert_eq!(of_v6(&report), 4);
    }

    #[test]
    fn others_are_asked_where_nobody_answered() {
        let map = map((1..=7).map(|id| region(id, &[server("a")])));
        let asked = |unanswered| {
            let planned = probes(Kind::Incremental, &map, ONLY_V4, &Past { unanswered, ..nothing() });
            schedule(&planned).iter().filter(|it| it.1 == 0).map(|it| it.0).collect::<Vec<_>>()
        };
        assert_eq!(asked(0), [1, 2, 3]);
        assert_eq!(asked(1), [4, 5, 6]);
        assert_eq!(asked(2), [7, 1, 2]);
    }

    #[test]
    fn no_map_makes_a_run_ask_more_than_its_bound() {
        let map = map((1..=300).map(|id| region(id, &[server("a"), server("b"), server("c"), server("d")])));
        for kind in [Kind::Full, Kind::Incremental] {
            assert!(probes(kind, &map, BOTH, &nothing()).len() <= MAX_PROBES);
        }
        assert_eq!(probes(Kind::Full, &map, BOTH, &nothing()).len(), MAX_PROBES);
    }

    fn nothing() -> Past<'static> {
        Past { report: None, home: None, unanswered: 0, turn: 1 }
    }

    fn name(probe: &Probe) -> &str {
        match &probe.to.host {
            StunHost::Name(name) => name,
            StunHost::Address(_) => "",
        }
    }

    /// Regions and milliseconds.
    fn schedule(probes: &[Probe]) -> Vec<(u16, u128)> {
        probes.iter().map(|probe| (probe.to.region.0, probe.after.as_millis())).collect()
    }
}

/// STUN answers as recorded, with the transaction id that the first question of a [`Setting`] has.
#[test]
fn the_answers_that_were_recorded_are_understood() {
    let rows = [
        ("0101000c2112a442000102030405060708090a0b00200008000183bbe721c04b", HERE, "192.0.2.1:3478"),
        (
            "010100182112a442000102030405060708090a0b00200014000283bb0113a9fa000102030405060708090a02",
            HERE_V6,
            "[2001:db8::1]:3478",
        ),
    ];
    for (packet, expected, server) in rows {
        let from: SocketAddr = server.parse().unwrap();
        let families = Families { v4: from.is_ipv4(), v6: from.is_ipv6() };
        let mut it = Setting::new(families, [region(1, &[self::server("a")])]);
        it.pass(0);
        let packet: Vec<u8> = (0..packet.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&packet[at..at + 2], 16).unwrap())
            .collect();
        let stun::Response { txid, address } = stun::Response::decode(&packet).unwrap();
        assert!(it.netcheck.handle_stun_answer(from, &txid, address));
        it.pass(300);
        let expected: SocketAddr = expected.parse().unwrap();
        assert_eq!(it.finished().mappings.v4.map(SocketAddr::V4), Some(expected).filter(SocketAddr::is_ipv4));
        assert_eq!(it.finished().mappings.v6.map(SocketAddr::V6), Some(expected).filter(SocketAddr::is_ipv6));
    }
}

#[test]
fn nothing_is_asked_without_a_map_or_without_a_network() {
    let now = Instant::now();
    let mut netcheck = Netcheck::new();
    netcheck.handle_trigger(now, Trigger::Refresh);
    netcheck.handle_timeout(now, |_| {});
    assert_eq!((netcheck.poll_timeout(), netcheck.poll_effect()), (None, None));
    netcheck.set_map(now, Arc::new(map([region(1, &[server("a")])])));
    netcheck.handle_timeout(now, |_| {});
    assert_eq!((netcheck.poll_timeout(), netcheck.poll_effect()), (None, None));
    netcheck.set_families(now, ONLY_V4);
    netcheck.handle_timeout(now, |_| {});
    assert!(netcheck.is_running());
}

#[test]
fn a_map_that_is_the_same_wants_no_run() {
    let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
    it.run_unanswered();
    let map = it.netcheck.map.clone();
    it.netcheck.set_map(it.now(), Arc::new(RelayMap::clone(&map)));
    assert_eq!(it.netcheck.poll_timeout(), None);
    it.netcheck.set_map(it.now(), Arc::default());
    assert!(it.netcheck.poll_timeout().is_some());
}

#[test]
fn what_is_wanted_during_a_run_makes_one_more_and_no_others() {
    let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
    it.pass(0);
    for _ in 0..25 {
        it.netcheck.handle_trigger(it.now(), Trigger::Refresh);
        it.pass(10);
    }
    assert_eq!(it.runs_finished(), 0);
    it.pass(10_000);
    assert_eq!(it.runs_finished(), 2);
    assert_eq!(it.netcheck.poll_timeout(), None);
}

#[test]
fn a_change_of_the_network_abandons_the_run_and_begins_another() {
    let mut it = Setting::new(ONLY_V4, [relay(1, &[server("a")])]);
    it.pass(0);
    let before = it.sent();
    let old = it.measured_run();
    it.netcheck.handle_trigger(it.now(), Trigger::NetworkChanged);
    it.pass(0);
    assert_eq!(it.sent().len(), 2 * before.len());
    it.netcheck.handle_latency(old, RegionId(1), latency(5));
    it.netcheck.handle_measured(old);
    assert!(!it.netcheck.handle_stun_answer(addr("192.0.2.1:3478"), &before[0].1, addr(HERE)));
    it.netcheck.handle_measured(it.measured_run());
    it.pass(2000);
    assert_eq!(it.runs_finished(), 1);
    assert_eq!(it.finished().latencies, BTreeMap::new(), "the old run's latency is not the new one's");
}

#[test]
fn a_network_that_changes_all_the_time_is_looked_at_to_the_end_now_and_then() {
    let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
    for _ in 0..240 {
        it.netcheck.handle_trigger(it.now(), Trigger::NetworkChanged);
        it.pass(250);
    }
    assert!(it.runs_finished() >= 4, "{} runs", it.runs_finished());
}

#[test]
fn a_run_that_is_abandoned_before_its_questions_left_takes_them_back() {
    let now = Instant::now();
    let mut netcheck = Netcheck::new();
    netcheck.set_map(now, Arc::new(map([relay(1, &[server("a")])])));
    netcheck.set_families(now, ONLY_V4);
    netcheck.handle_timeout(now, |_| {});
    netcheck.handle_trigger(now, Trigger::NetworkChanged);
    assert_eq!(netcheck.poll_effect(), None);
}

#[test]
fn the_first_peer_wants_a_run_and_the_second_does_not() {
    let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
    it.run_unanswered();
    it.netcheck.set_usage(it.now(), Usage { peers: 1, last_packet: None });
    assert_eq!(it.netcheck.poll_timeout(), Some(it.now()));
    it.run_unanswered();
    it.netcheck.set_usage(it.now(), Usage { peers: 2, last_packet: None });
    assert_eq!(it.netcheck.poll_timeout(), None);
}

#[test]
fn a_tunnel_in_use_is_looked_at_every_20_to_26_seconds_and_an_idle_one_is_not() {
    let rows = [
        (1, Some(44), 0x00, Some(20_000)),
        (1, Some(44), 0xff, Some(26_000)),
        (1, Some(46), 0x00, None),
        (1, None, 0x00, None),
        (0, Some(0), 0x00, None),
    ];
    for (peers, idle, random, expected) in rows {
        let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
        it.pass(60_000);
        let last_packet = idle.map(|seconds: u64| it.now() - Duration::from_secs(seconds));
        it.netcheck.set_usage(it.now(), Usage { peers, last_packet });
        it.netcheck.handle_trigger(it.now(), Trigger::Refresh);
        it.netcheck.handle_timeout(it.now(), |bytes| bytes.fill(random));
        let end = it.now() + run_end();
        it.netcheck.handle_timeout(end, |bytes| bytes.fill(random));
        assert!(!it.netcheck.is_running());
        let due = it.netcheck.poll_timeout().map(|due| (due - end).as_millis());
        assert_eq!(due, expected, "{peers} peers, idle for {idle:?} s");
    }
}

#[test]
fn everybody_is_asked_every_five_minutes_and_where_no_relay_answered_last_time() {
    let mut it = Setting::new(ONLY_V4, (1..=5).map(|id| relay(id, &[server("a")])));
    let mut asks = |seconds: u64, answering: &[u16]| {
        it.pass(seconds * 1000);
        it.netcheck.handle_trigger(it.now(), Trigger::Refresh);
        let before = it.sent().len();
        it.pass(0);
        let asked = it.sent().len() - before;
        let run = it.measured_run();
        for region in answering {
            it.netcheck.handle_latency(run, RegionId(*region), latency(20));
        }
        it.netcheck.handle_measured(run);
        it.pass(3000);
        asked
    };
    let (all, three) = (15, 3);
    assert_eq!(asks(30, &[1, 2]), all, "nobody has answered so far");
    assert_eq!(asks(30, &[1, 2]), three);
    assert_eq!(asks(30, &[]), three);
    assert_eq!(asks(30, &[1]), all, "nobody answered");
    assert_eq!(asks(30, &[1]), three);
    assert_eq!(asks(270, &[1]), all, "five minutes have passed");
}

#[test]
fn the_first_answer_is_our_mapping_and_a_second_server_tells_whether_it_varies() {
    // Answering server, what it sees, and what is known then.
    type Row = (&'static [(&'static str, &'static str)], &'static str, Option<bool>);
    let rows: [Row; 6] = [
        (&[("192.0.2.1:3478", HERE)], HERE, None),
        (&[("192.0.2.1:3478", HERE), ("192.0.2.1:3478", HERE)], HERE, None),
        (&[("192.0.2.1:3478", HERE), ("192.0.2.2:3478", HERE)], HERE, Some(false)),
        (&[("192.0.2.1:3478", HERE), ("192.0.2.2:3478", "198.51.100.9:2")], HERE, Some(true)),
        (&[("192.0.2.1:3478", HERE), ("192.0.2.2:3478", "198.51.100.8:41641")], HERE, Some(true)),
        (
            &[("192.0.2.1:3478", HERE), ("192.0.2.2:3478", "198.51.100.9:2"), ("192.0.2.3:3478", HERE)],
            HERE,
            Some(true),
        ),
    ];
    for (answers, expected, varies) in rows {
        let mut it = Setting::new(ONLY_V4, (1..=3).map(|id| region(id, &[server("a")])));
        it.pass(0);
        for (index, (from, mapped)) in answers.iter().enumerate() {
            let (_, txid) = it.sent()[index * 3];
            assert!(it.netcheck.handle_stun_answer(addr(from), &txid, addr(mapped)));
        }
        it.pass(2000);
        let mappings = it.finished().mappings;
        assert_eq!(mappings.v4.map(SocketAddr::V4), Some(addr(expected)), "{answers:?}");
        assert_eq!(mappings.varies_by_destination, varies, "{answers:?}");
        assert_eq!(it.finished().latencies, BTreeMap::new(), "the time of an answer is no latency");
    }
}

#[test]
fn an_answer_that_cannot_be_true_is_not_believed() {
    let rows = [
        ("192.0.2.1:3478", "0.0.0.0:5"),
        ("192.0.2.1:3478", "224.0.0.5:5"),
        ("192.0.2.1:3478", "198.51.100.9:0"),
        ("192.0.2.1:3478", "127.0.0.1:5"),
        ("192.0.2.1:3478", HERE_V6),
        ("[2001:db8::1]:3478", HERE),
    ];
    for (from, mapped) in rows {
        let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
        it.pass(0);
        let (_, txid) = it.sent()[0];
        it.netcheck.handle_stun_answer(addr(from), &txid, addr(mapped));
        it.pass(2000);
        assert!(!it.finished().has_udp(), "{from} sees {mapped}");
    }
    let mut it = Setting::new(ONLY_V4, [region(1, &[server("127.0.0.1")])]);
    it.pass(0);
    let (_, txid) = it.sent()[0];
    it.netcheck.handle_stun_answer(addr("127.0.0.1:3478"), &txid, addr("127.0.0.1:5"));
    it.pass(2000);
    assert!(it.finished().has_udp(), "a server on this machine sees us here");
}

#[test]
fn an_answer_counts_once_and_only_to_a_question() {
    let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
    it.pass(0);
    let (_, txid) = it.sent()[0];
    let from = addr("192.0.2.1:3478");
    assert!(!it.netcheck.handle_stun_answer(from, &[0xee; 12], addr(HERE)));
    assert!(it.netcheck.handle_stun_answer(from, &txid, addr(HERE)));
    assert!(!it.netcheck.handle_stun_answer(from, &txid, addr(HERE)));
}

#[test]
fn a_region_that_answered_is_not_asked_again_in_that_family() {
    let mut it = Setting::new(BOTH, [relay(1, &[server("a")])]);
    it.measure_all(&[1]);
    it.netcheck.set_home(Some(RegionId(1)));
    // Four questions by IPv4 are planned, and one by IPv6.
    it.netcheck.handle_trigger(it.now(), Trigger::Refresh);
    let before = it.sent().len();
    it.pass(0);
    let (to, txid) = it.sent()[before].clone();
    assert_eq!((to.family, it.sent().len()), (Family::V4, before + 2));
    assert!(it.netcheck.handle_stun_answer(addr("192.0.2.1:3478"), &txid, addr(HERE)));
    it.pass(2000);
    assert_eq!(it.sent().len(), before + 2);
}

#[test]
fn the_mappings_are_told_as_soon_as_they_are_known_and_again_when_a_late_answer_adds_to_them() {
    let mut it = Setting::new(BOTH, [relay(1, &[server("a")]), region(2, &[server("b")])]);
    it.pass(0);
    let sent = it.sent();
    let ask = |region, family| {
        let is_it = |to: &StunTarget| (to.region, to.family) == (RegionId(region), family);
        sent.iter().find(|(to, _)| is_it(to)).unwrap().1
    };
    it.netcheck.handle_stun_answer(addr("192.0.2.1:3478"), &ask(1, Family::V4), addr(HERE));
    it.pass(0);
    assert_eq!(it.mapped(), [], "the other family and the other server have not answered");
    it.netcheck.handle_stun_answer(addr("192.0.2.2:3478"), &ask(2, Family::V4), addr(HERE));
    it.pass(300);
    let known = Mappings { v4: HERE.parse().ok(), v6: None, varies_by_destination: Some(false) };
    assert_eq!(it.mapped(), [known], "IPv6 had its moment");
    it.netcheck.handle_stun_answer(addr("[2001:db8::2]:3478"), &ask(2, Family::V6), addr(HERE_V6));
    it.pass(0);
    let all = Mappings { v6: HERE_V6.parse().ok(), ..known };
    assert_eq!(it.mapped(), [known, all]);
    assert_eq!(it.runs_finished(), 0, "the relays are not measured yet");
    it.netcheck.handle_measured(it.measured_run());
    it.pass(0);
    assert_eq!(it.finished().mappings, all);
    assert_eq!(it.mapped(), [known, all]);
}

#[test]
fn nothing_is_waited_for_where_there_is_nobody_to_ask() {
    let mut it = Setting::new(ONLY_V4, [relay(1, &[Node { stun_port: None, ..server("a") }])]);
    it.pass(0);
    assert_eq!(it.mapped(), [Mappings::default()]);
    it.netcheck.handle_latency(it.measured_run(), RegionId(1), latency(7));
    it.netcheck.handle_measured(it.measured_run());
    it.pass(0);
    assert_eq!(it.finished().latencies, BTreeMap::from([(RegionId(1), latency(7))]));
    assert_eq!(it.finished().can_send_v4, None);
}

#[test]
fn relays_that_are_slow_have_no_latency_after_two_seconds() {
    let mut it = Setting::new(ONLY_V4, [relay(1, &[server("a")]), relay(2, &[server("b")])]);
    it.pass(0);
    let run = it.measured_run();
    it.netcheck.handle_latency(run, RegionId(1), latency(30));
    it.netcheck.handle_latency(run, RegionId(3), latency(30));
    it.pass(1999);
    assert!(it.netcheck.is_running());
    it.pass(1);
    it.netcheck.handle_latency(run, RegionId(2), latency(30));
    assert_eq!(it.finished().latencies, BTreeMap::from([(RegionId(1), latency(30))]));
}

#[test]
fn a_region_keeps_the_smaller_latency_of_each_family() {
    let mut it = Setting::new(ONLY_V4, [relay(1, &[server("a")])]);
    it.pass(0);
    let run = it.measured_run();
    let ms = Duration::from_millis;
    it.netcheck.handle_latency(run, RegionId(1), latency(30));
    it.netcheck.handle_latency(run, RegionId(1), RegionLatency { v4: Some(ms(40)), v6: Some(ms(50)) });
    it.netcheck.handle_latency(run, RegionId(1), RegionLatency::default());
    it.netcheck.handle_measured(run);
    it.pass(2000);
    let known = RegionLatency { v4: Some(ms(30)), v6: Some(ms(50)) };
    assert_eq!(it.finished().latencies, BTreeMap::from([(RegionId(1), known)]));
    assert!(it.finished().has_ipv4() && it.finished().has_ipv6() && !it.finished().has_udp());
}

#[test]
fn a_socket_that_refuses_everything_cannot_send_and_a_name_without_address_says_nothing_of_it() {
    let rows = [
        (vec![Some(Unsent::Refused); 3], Some(false)),
        (vec![Some(Unsent::Refused), Some(Unsent::Refused), None], Some(true)),
        (vec![Some(Unsent::NoAddress); 3], None),
        (vec![Some(Unsent::NoAddress), Some(Unsent::Refused), Some(Unsent::Refused)], Some(false)),
    ];
    for (outcomes, can_send) in rows {
        let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
        it.pass(0);
        for ((_, txid), outcome) in it.sent().iter().zip(&outcomes) {
            if let Some(why) = outcome {
                it.netcheck.handle_unsent(txid, *why);
            }
        }
        it.pass(if outcomes.contains(&None) { 300 } else { 0 });
        assert_eq!(it.finished().can_send_v4, can_send, "{outcomes:?}");
    }
}

#[test]
fn triggers_without_end_are_answered_by_a_run_a_second_on_average() {
    let mut it = Setting::new(ONLY_V4, [region(1, &[server("a")])]);
    for _ in 0..6000 {
        it.netcheck.handle_trigger(it.now(), Trigger::NetworkChanged);
        it.pass(10);
    }
    let runs = it.sent().len() / 3;
    assert!((50..=72).contains(&runs), "{runs} runs in a minute");
}

/// What may happen to a netcheck.
#[derive(Debug, Clone)]
enum Event {
    Trigger(Trigger),
    Families(Families),
    Regions(u16),
    Usage(usize, bool),
    Answer(usize, u8, u16),
    Unsent(usize),
    Latency(u16, u64),
    Measured,
    Pass(u64),
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        prop_oneof![Just(Trigger::Refresh), Just(Trigger::NetworkChanged)].prop_map(Event::Trigger),
        any::<(bool, bool)>().prop_map(|(v4, v6)| Event::Families(Families { v4, v6 })),
        (0_u16..60).prop_map(Event::Regions),
        (0_usize..3, any::<bool>()).prop_map(|(peers, is_busy)| Event::Usage(peers, is_busy)),
        (0_usize..50, 1_u8..4, 1_u16..3).prop_map(|(which, host, port)| Event::Answer(which, host, port)),
        (0_usize..50).prop_map(Event::Unsent),
        (0_u16..10, 0_u64..500).prop_map(|(region, millis)| Event::Latency(region, millis)),
        Just(Event::Measured),
        prop_oneof![0_u64..5, 0_u64..500, 0_u64..30_000].prop_map(Event::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_runs_end_and_questions_are_bounded(events in vec(any_event(), 1..150)) {
        let mut it = Setting::new(BOTH, [relay(1, &[server("a")])]);
        for event in events {
            let now = it.now();
            match event {
                Event::Trigger(trigger) => it.netcheck.handle_trigger(now, trigger),
                Event::Families(families) => it.netcheck.set_families(now, families),
                Event::Regions(count) => {
                    let regions = (1..=count).map(|id| relay(id, &[server("a"), server("b")]));
                    it.netcheck.set_map(now, Arc::new(map(regions)));
                }
                Event::Usage(peers, is_busy) => {
                    it.netcheck.set_usage(now, Usage { peers, last_packet: is_busy.then_some(now) });
                }
                Event::Answer(which, host, port) => {
                    if let Some((to, txid)) = it.sent().iter().rev().nth(which) {
                        let ip = match to.family {
                            Family::V4 => IpAddr::V4(Ipv4Addr::new(192, 0, 2, host)),
                            Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into())),
                        };
                        let mapped = SocketAddr::new(ip, port);
                        it.netcheck.handle_stun_answer(SocketAddr::new(ip, 3478), txid, mapped);
                    }
                }
                Event::Unsent(which) => {
                    if let Some((_, txid)) = it.sent().iter().rev().nth(which) {
                        it.netcheck.handle_unsent(txid, Unsent::Refused);
                    }
                }
                Event::Latency(region, millis) => {
                    if let Some(run) = it.last_measured_run() {
                        it.netcheck.handle_latency(run, RegionId(region), latency(millis));
                    }
                }
                Event::Measured => {
                    if let Some(run) = it.last_measured_run() {
                        it.netcheck.handle_measured(run);
                    }
                }
                Event::Pass(millis) => it.pass(millis),
            }
        }
        // Left alone, it ends.
        it.netcheck.set_usage(it.now(), Usage::default());
        it.pass(60_000);
        prop_assert!(!it.netcheck.is_running());
        prop_assert_eq!(it.netcheck.poll_timeout(), None);
        for window in it.sent_at.windows(MOST_RUNS * MAX_PROBES + 1) {
            prop_assert!(*window.last().unwrap() - window[0] >= PACE_WINDOW - RUN_LIMIT);
        }
        for window in it.begun_at.windows(MOST_RUNS + 1) {
            prop_assert!(window[MOST_RUNS] - window[0] >= PACE_WINDOW);
        }
    }
}

/// A netcheck on a clock of its own, with all that it ever wanted.
struct Setting {
    netcheck: Netcheck,
    start: Instant,
    passed: Duration,
    random: u8,
    effects: Vec<Effect>,
    sent_at: Vec<Instant>,
    begun_at: Vec<Instant>,
}

impl Setting {
    fn new(families: Families, regions: impl IntoIterator<Item = Region>) -> Self {
        // Leaves room for moments before it.
        let start = Instant::now() + Duration::from_secs(3600);
        let mut netcheck = Netcheck::new();
        netcheck.set_families(start, families);
        netcheck.set_map(start, Arc::new(map(regions)));
        Self {
            netcheck,
            start,
            passed: Duration::ZERO,
            random: 0,
            effects: Vec::new(),
            sent_at: Vec::new(),
            begun_at: Vec::new(),
        }
    }

    fn now(&self) -> Instant {
        self.start + self.passed
    }

    /// Lets time pass as an owner does, from deadline to deadline.
    fn pass(&mut self, millis: u64) {
        let end = self.passed + Duration::from_millis(millis);
        loop {
            let due = self.netcheck.poll_timeout().map(|due| due.saturating_duration_since(self.start));
            let due = due.map(|due| due.max(self.passed)).filter(|due| *due <= end);
            let Some(due) = due else { break };
            self.passed = due;
            self.step();
            let next = self.netcheck.poll_timeout();
            assert!(next.is_none_or(|next| next > self.now()), "a deadline that never passes");
        }
        self.passed = end;
        self.drain();
    }

    fn step(&mut self) {
        let now = self.now();
        let was = self.netcheck.generation;
        let random = &mut self.random;
        self.netcheck.handle_timeout(now, |bytes| {
            bytes.iter_mut().for_each(|byte| {
                *byte = *random;
                *random = random.wrapping_add(1);
            });
            // Ids repeat only after all were used.
            *random = random.wrapping_add(1);
        });
        if self.netcheck.generation != was {
            self.begun_at.push(now);
        }
        self.drain();
    }

    fn drain(&mut self) {
        let now = self.now();
        while let Some(effect) = self.netcheck.poll_effect() {
            if matches!(effect, Effect::SendStun { .. }) {
                self.sent_at.push(now);
            }
            self.effects.push(effect);
        }
    }

    fn run_unanswered(&mut self) {
        self.pass(run_end().as_millis().try_into().unwrap());
        assert!(!self.netcheck.is_running());
    }

    /// One run in which these regions answer and no STUN server does.
    fn measure_all(&mut self, regions: &[u16]) {
        self.pass(0);
        let run = self.measured_run();
        for region in regions {
            self.netcheck.handle_latency(run, RegionId(*region), latency(20));
        }
        self.netcheck.handle_measured(run);
        self.pass(2000);
    }

    fn sent(&self) -> Vec<(StunTarget, TxId)> {
        let sent = |effect: &Effect| match effect {
            Effect::SendStun { to, txid } => Some((to.clone(), *txid)),
            _ => None,
        };
        self.effects.iter().filter_map(sent).collect()
    }

    fn mapped(&self) -> Vec<Mappings> {
        let mapped = |effect: &Effect| match effect {
            Effect::Mapped(mappings) => Some(*mappings),
            _ => None,
        };
        self.effects.iter().filter_map(mapped).collect()
    }

    fn last_measured_run(&self) -> Option<RunId> {
        self.effects.iter().rev().find_map(|effect| match effect {
            Effect::MeasureLatencies { run } => Some(*run),
            _ => None,
        })
    }

    fn measured_run(&self) -> RunId {
        self.last_measured_run().unwrap()
    }

    fn runs_finished(&self) -> usize {
        self.effects.iter().filter(|effect| matches!(effect, Effect::Finished(_))).count()
    }

    fn finished(&self) -> Report {
        let report = self.effects.iter().rev().find_map(|effect| match effect {
            Effect::Finished(report) => Some(report.clone()),
            _ => None,
        });
        report.unwrap()
    }
}

/// When a run without answers and without relays is over.
fn run_end() -> Duration {
    Duration::from_millis(300)
}

fn map(regions: impl IntoIterator<Item = Region>) -> RelayMap {
    let regions = regions.into_iter().map(|region| (region.id, region)).collect();
    RelayMap { regions, scores: BTreeMap::new() }
}

/// A region for STUN alone.
fn region(id: u16, nodes: &[Node]) -> Region {
    let nodes = nodes.iter().map(|node| Node { stun_only: true, ..node.clone() }).collect();
    Region {
        id: RegionId(id),
        code: String::new(),
        name: String::new(),
        embedded: false,
        avoid: false,
        nodes,
    }
}

/// A region whose servers are relays too.
fn relay(id: u16, nodes: &[Node]) -> Region {
    Region { nodes: nodes.to_vec(), ..region(id, &[]) }
}

fn server(host_name: &str) -> Node {
    Node { host_name: host_name.to_owned(), stun_port: Some(3478), ..Node::default() }
}

fn latency(millis: u64) -> RegionLatency {
    RegionLatency { v4: Some(Duration::from_millis(millis)), v6: None }
}

fn report(latencies: &[(u16, u64)]) -> Report {
    let latencies = latencies.iter().map(|(id, millis)| (RegionId(*id), latency(*millis))).collect();
    Report { latencies, ..Report::default() }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
