use proptest::prelude::*;

use super::*;
use crate::relay_map::Node;

#[test]
fn the_only_relay_is_home_before_anything_is_measured() {
    let mut homes = Homes::new(None, 7);
    assert_eq!(homes.handle_map(&map(&[(999, Kind::Relay), (1000, Kind::StunOnly)])), Some(RegionId(999)));
}

#[test]
fn a_map_without_relays_gives_no_home() {
    let mut homes = Homes::new(None, 7);
    let map = map(&[(1000, Kind::StunOnly)]);
    assert_eq!(homes.handle_map(&map), None);
    let report = report(&[(1000, 1)]);
    assert_eq!(homes.handle_report(Instant::now(), &map, &report, HomeLink::Unhealthy), None);
}

#[test]
fn the_fastest_relay_becomes_home() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay), (3, Kind::StunOnly)]);
    assert_eq!(measure(&mut Homes::new(None, 7), &map, &[(1, 80), (2, 20), (3, 1)]), Some(RegionId(2)));
}

/// tailnet-data 8.6: at least 10 ms, and a third, faster.
#[test]
fn the_home_moves_only_for_a_gain_that_is_worthwhile() {
    const ROWS: &[(u64, u64, u16, &str)] = &[
        (12, 4, 1, "8 ms are too few"),
        (12, 3, 1, "9 ms are too few"),
        (12, 2, 2, "10 ms are enough"),
        (200, 180, 1, "a tenth is too little"),
        (200, 134, 1, "less than a third is too little"),
        (300, 199, 2, "a third is enough"),
        (200, 100, 2, "a half is enough"),
        (20, 20, 1, "no gain"),
        (20, 90, 1, "a loss"),
    ];
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    for (current, other, home, why) in ROWS {
        let mut homes = Homes::new(Some(RegionId(1)), 7);
        let chosen = measure(&mut homes, &map, &[(1, *current), (2, *other)]);
        assert_eq!(chosen, Some(RegionId(*home)), "{current} ms here, {other} ms there: {why}");
    }
}

#[test]
fn two_relays_of_about_the_same_speed_do_not_take_turns() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    let mut homes = Homes::new(None, 7);
    let first = measure(&mut homes, &map, &[(1, 20), (2, 21)]);
    for round in 0..20 {
        let noise = round % 5;
        assert_eq!(measure(&mut homes, &map, &[(1, 20 + noise), (2, 24 - noise)]), first);
    }
}

#[test]
fn the_smaller_of_both_families_counts_and_a_region_without_either_did_not_answer() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay), (3, Kind::Relay)]);
    let ms = |millis| Some(Duration::from_millis(millis));
    let report = Report::from([
        (RegionId(1), RegionLatency { v4: ms(50), v6: None }),
        (RegionId(2), RegionLatency { v4: ms(90), v6: ms(20) }),
        (RegionId(3), RegionLatency::default()),
    ]);
    let home = Homes::new(None, 7).handle_report(Instant::now(), &map, &report, HomeLink::Unhealthy);
    assert_eq!(home, Some(RegionId(2)));
}

#[test]
fn a_measured_region_that_the_map_does_not_have_is_no_home() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    assert_eq!(measure(&mut Homes::new(None, 7), &map, &[(1, 90), (2, 50), (8, 1)]), Some(RegionId(2)));
}

#[test]
fn one_slow_measurement_of_another_region_is_forgiven_for_five_minutes() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    let mut homes = Homes::new(None, 7);
    let start = Instant::now();
    homes.handle_report(start, &map, &report(&[(1, 50), (2, 200)]), HomeLink::Healthy);
    let later = start + Duration::from_secs(20);
    let home = homes.handle_report(later, &map, &report(&[(1, 300), (2, 90)]), HomeLink::Healthy);
    assert_eq!(home, Some(RegionId(1)), "its best of five minutes is still the best");
    let much_later = later + MEMORY + Duration::from_secs(1);
    let home = homes.handle_report(much_later, &map, &report(&[(1, 300), (2, 90)]), HomeLink::Healthy);
    assert_eq!(home, Some(RegionId(2)));
}

#[test]
fn scores_multiply_latency() {
    let mut map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    map.scores.insert(RegionId(1), 0.1);
    map.scores.insert(RegionId(2), -3.0);
    assert_eq!(measure(&mut Homes::new(None, 7), &map, &[(1, 100), (2, 20)]), Some(RegionId(1)));
}

#[test]
fn a_region_to_avoid_is_home_only_where_nothing_else_answers() {
    let map = map(&[(1, Kind::Avoided), (2, Kind::Relay)]);
    let mut homes = Homes::new(Some(RegionId(1)), 7);
    assert_eq!(measure(&mut homes, &map, &[(1, 5), (2, 80)]), Some(RegionId(2)));
    assert_eq!(measure(&mut Homes::new(None, 7), &map, &[(1, 5)]), Some(RegionId(1)));
}

#[test]
fn a_healthy_home_survives_two_missed_reports_and_no_third() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    let mut homes = Homes::new(Some(RegionId(1)), 7);
    assert_eq!(measure(&mut homes, &map, &[(2, 5)]), Some(RegionId(1)));
    assert_eq!(measure(&mut homes, &map, &[(2, 5)]), Some(RegionId(1)));
    assert_eq!(measure(&mut homes, &map, &[(2, 5)]), Some(RegionId(2)));
}

#[test]
fn an_answer_ends_the_count_of_missed_reports() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    let mut homes = Homes::new(Some(RegionId(1)), 7);
    for _ in 0..3 {
        assert_eq!(measure(&mut homes, &map, &[(2, 5)]), Some(RegionId(1)));
        assert_eq!(measure(&mut homes, &map, &[]), Some(RegionId(1)));
        assert_eq!(measure(&mut homes, &map, &[(1, 9), (2, 5)]), Some(RegionId(1)));
    }
}

#[test]
fn an_unhealthy_home_is_left_for_one_that_answers() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    let mut homes = Homes::new(Some(RegionId(1)), 7);
    let report = report(&[(2, 5)]);
    let home = homes.handle_report(Instant::now(), &map, &report, HomeLink::Unhealthy);
    assert_eq!(home, Some(RegionId(2)));
}

#[test]
fn without_any_answer_the_home_stays_and_a_missing_one_is_chosen_by_the_seed() {
    let map = map(&[(1, Kind::Relay), (2, Kind::Relay), (3, Kind::Avoided)]);
    assert_eq!(measure(&mut Homes::new(Some(RegionId(3)), 7), &map, &[]), Some(RegionId(3)));
    assert_eq!(measure(&mut Homes::new(None, 4), &map, &[]), Some(RegionId(1)));
    assert_eq!(measure(&mut Homes::new(None, 5), &map, &[]), Some(RegionId(2)));
}

#[test]
fn a_home_that_vanished_is_replaced_by_what_was_measured_last() {
    let mut homes = Homes::new(None, 7);
    let three = map(&[(1, Kind::Relay), (2, Kind::Relay), (3, Kind::Relay)]);
    assert_eq!(measure(&mut homes, &three, &[(1, 5), (2, 90), (3, 30)]), Some(RegionId(1)));
    let two = map(&[(2, Kind::Relay), (3, Kind::Relay)]);
    assert_eq!(homes.handle_map(&two), Some(RegionId(3)));
}

#[test]
fn a_new_map_moves_no_home_that_is_still_a_relay() {
    let map = map(&[(1, Kind::Avoided), (2, Kind::Relay), (3, Kind::StunOnly)]);
    let mut homes = Homes::new(None, 7);
    assert_eq!(measure(&mut homes, &map, &[(1, 5)]), Some(RegionId(1)), "nothing else answers");
    assert_eq!(homes.handle_map(&map), Some(RegionId(1)), "the only other one was not heard of");
}

#[test]
fn a_home_that_is_no_relay_any_more_is_left() {
    let mut homes = Homes::new(Some(RegionId(1)), 7);
    assert_eq!(homes.handle_map(&map(&[(1, Kind::StunOnly), (2, Kind::Relay)])), Some(RegionId(2)));
    assert_eq!(homes.handle_map(&RelayMap::default()), None);
    assert_eq!(homes.home(), None);
}

#[test]
fn an_absurd_score_is_no_panic() {
    let mut map = map(&[(1, Kind::Relay), (2, Kind::Relay)]);
    map.scores.insert(RegionId(1), f64::MAX);
    assert_eq!(measure(&mut Homes::new(None, 7), &map, &[(1, 1), (2, 900)]), Some(RegionId(2)));
}

proptest! {
    #[test]
    fn the_home_is_always_a_relay_of_the_map_and_there_is_one_after_any_report_if_there_are_relays(
        rounds in proptest::collection::vec(any_round(), 1..40),
    ) {
        let (mut homes, mut now) = (Homes::new(None, 7), Instant::now());
        for (map, report, link, pause) in rounds {
            now += Duration::from_secs(pause);
            let is_relay = |home: Option<RegionId>| {
                home.is_none_or(|home| map.relay_regions().any(|region| region.id == home))
            };
            prop_assert!(is_relay(homes.handle_map(&map)));
            let home = homes.handle_report(now, &map, &report, link);
            prop_assert!(is_relay(home));
            prop_assert_eq!(home.is_some(), map.relay_regions().next().is_some());
            prop_assert!(homes.reports.len() <= MAX_REPORTS);
        }
    }
}

fn any_round() -> impl Strategy<Value = (RelayMap, Report, HomeLink, u64)> {
    let kind = prop_oneof![Just(Kind::Relay), Just(Kind::Avoided), Just(Kind::StunOnly)];
    let regions = proptest::collection::btree_map(1_u16..6, kind, 0..5);
    let latencies = proptest::collection::btree_map(1_u16..7, 0_u64..400, 0..6);
    let link = prop_oneof![Just(HomeLink::Healthy), Just(HomeLink::Unhealthy)];
    (regions, latencies, link, 0_u64..200).prop_map(|(regions, latencies, link, pause)| {
        let regions: Vec<_> = regions.into_iter().collect();
        let latencies: Vec<_> = latencies.into_iter().collect();
        (map(&regions), report(&latencies), link, pause)
    })
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Relay,
    Avoided,
    StunOnly,
}

fn map(regions: &[(u16, Kind)]) -> RelayMap {
    let region = |(id, kind): &(u16, Kind)| {
        let node = Node { stun_only: *kind == Kind::StunOnly, ..Node::default() };
        let (code, name) = (String::new(), format!("Region {id}"));
        let id = RegionId(*id);
        (id, Region { id, code, name, embedded: false, avoid: *kind == Kind::Avoided, nodes: vec![node] })
    };
    RelayMap { regions: regions.iter().map(region).collect(), scores: BTreeMap::new() }
}

fn report(millis: &[(u16, u64)]) -> Report {
    let latency = |millis| RegionLatency { v4: Some(Duration::from_millis(millis)), v6: None };
    millis.iter().map(|(id, millis)| (RegionId(*id), latency(*millis))).collect()
}

fn measure(homes: &mut Homes, map: &RelayMap, millis: &[(u16, u64)]) -> Option<RegionId> {
    homes.handle_report(Instant::now(), map, &report(millis), HomeLink::Healthy)
}
