//! What is promised of a path to a reference peer over minutes and hours: how it bears loss, flapping, load and rest.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_lab::nat::Kind;

use super::{
    ALL_MAKES, Change, PAIRS, SECOND, Story, WITH_REFERENCE, are_direct, engine::Make,
    everything_comes_after, happen, peer::PeerId, relay::Relay, world::World,
};

const MS: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_secs(60);
/// Longer than a path needs to be found.
const MEETING: Duration = Duration::from_secs(20);
/// What sparse traffic is: the only packet of a second is lost as often as any other.
const SPARSE: u64 = 1000;
const BUSY: u64 = 20;
const SEEDS: u64 = 4;
/// Two alarms within a minute bar the direct way, for so long at most (tailnet-data 7.12).
pub(crate) const LONGEST_BAR: Duration = Duration::from_secs(60);

/// Ten minutes in which chance takes so many of a thousand datagrams in each direction, again and again.
fn lossy_worlds(per_thousand: u32, pause: u64) -> impl Iterator<Item = World> {
    let stories = (0..SEEDS).flat_map(|seed| ALL_MAKES.map(|makes| (seed, makes)));
    stories.map(move |(seed, makes)| {
        let talk = [Some(pause); 2];
        let mut world = Story { seed, talk, ..Story::quiet(makes, [None; 2]) }.begin();
        meet(&mut world);
        happen(&mut world, &Change::Loss { site: 0, per_thousand });
        world.run(10 * MINUTE);
        world
    })
}

/// Lets them become direct, and forgets how.
fn meet(world: &mut World) {
    world.run(MEETING);
    assert!(are_direct(world), "they are direct to begin with");
    world.seen.changes.clear();
}

/// When a peer left a path for the relay, and after how long it was taken again, in order.
fn alarms(world: &World, id: PeerId) -> Vec<(Instant, Option<Duration>)> {
    let changes = world.seen.changes.iter().filter(|(_, peer, _)| *peer == id);
    let changes: Vec<&(Instant, PeerId, Option<SocketAddr>)> = changes.collect();
    let places = changes.iter().enumerate().filter(|(_, (.., to))| to.is_none());
    let healed_after = |place: usize, at: Instant| {
        let mut later = changes[place..].iter().filter(|(.., to)| to.is_some());
        later.next().map(|(back, ..)| *back - at)
    };
    places.map(|(place, (at, ..))| (*at, healed_after(place, *at))).collect()
}

#[test]
fn of_a_path_that_loses_a_twentieth_of_everything_nothing_is_thought_for_ten_minutes() {
    for world in [BUSY, SPARSE].into_iter().flat_map(|pause| lossy_worlds(50, pause)) {
        world.ids().for_each(|id| assert_eq!(alarms(&world, id), []));
    }
}

#[test]
fn a_path_that_loses_a_third_is_left_a_few_times_a_minute_and_taken_again_in_a_tenth_of_a_second() {
    let mut healed = Vec::new();
    for world in [BUSY, SPARSE].into_iter().flat_map(|pause| lossy_worlds(300, pause)) {
        for alarms in world.ids().map(|id| alarms(&world, id)) {
            let within = |at: Instant| alarms.iter().filter(|(it, _)| *it >= at && *it < at + MINUTE).count();
            let most = alarms.iter().map(|(at, _)| within(*at)).max().unwrap_or_default();
            println!("{} alarms in ten minutes, at most {most} in one", alarms.len());
            assert!(most <= 4, "{most} alarms in a minute: {alarms:?}");
            let is_over =
                |(at, after): &(Instant, Option<Duration>)| after.is_some() || *at + 2 * SECOND > world.now;
            assert!(alarms.iter().all(is_over), "a path did not come back: {alarms:?}");
            healed.extend(alarms.iter().filter_map(|(_, after)| *after));
        }
    }
    println!("{} in all, the longest {:?}", healed.len(), healed.iter().max());
    assert!(healed.len() >= 20 && healed.iter().all(|after| *after <= 100 * MS), "{healed:?}");
}

#[test]
fn a_path_that_dies_and_lives_by_turns_is_let_be_for_longer_each_time_and_taken_when_it_stays() {
    for makes in WITH_REFERENCE {
        let mut world = Story::quiet(makes, [None; 2]).begin();
        meet(&mut world);
        for _ in 0..120 {
            happen(&mut world, &Change::Cut { site: 0, out: true, r#in: true });
            everything_comes_after(&mut world, SECOND, 2 * SECOND);
            world.heal();
            everything_comes_after(&mut world, Duration::ZERO, 3 * SECOND);
        }
        let ours = PeerId(usize::from(makes[0] != Make::Ours));
        let left: Vec<Instant> = alarms(&world, ours).into_iter().map(|(at, _)| at).collect();
        let pauses: Vec<Duration> = left.windows(2).map(|two| two[1] - two[0]).collect();
        for (pause, bar) in pauses[1..].iter().zip([10, 20, 40].into_iter().chain(std::iter::repeat(60))) {
            assert!(*pause >= bar * SECOND, "{makes:?}: {pauses:?}");
        }
        assert!(left.len() >= 5, "{makes:?}: {pauses:?}");
        world.run(LONGEST_BAR + 6 * SECOND);
        assert!(are_direct(&world), "{makes:?}");
    }
}

#[test]
fn direct_paths_are_taken_again_within_a_second_after_udp_is_back_however_long_it_was_gone() {
    for makes in WITH_REFERENCE {
        for gone in [2_300, 7_150, 13_900, 28_650, 45_400, 300_000] {
            let mut world = Story::quiet(makes, [None; 2]).begin();
            meet(&mut world);
            happen(&mut world, &Change::Cut { site: 0, out: true, r#in: true });
            everything_comes_after(&mut world, SECOND, gone * MS);
            world.heal();
            everything_comes_after(&mut world, Duration::ZERO, SECOND);
            assert!(are_direct(&world), "{makes:?}: UDP was gone for {gone} ms");
        }
    }
}

/// The requirement is less than ten seconds. The longest pause before an attempt is five.
#[test]
fn a_relay_that_dies_silently_while_it_is_used_is_given_up_in_six_seconds_and_dialled_until_it_answers() {
    for gone in [6, 9, 13, 30, 300] {
        let mut world = Story::quiet([Make::Ours; 2], [None; 2]).begin();
        happen(&mut world, &Change::Cut { site: 0, out: true, r#in: true });
        everything_comes_after(&mut world, SECOND, MEETING);
        world.set_relay(PeerId(0), Relay::Swallows);
        world.run(6 * SECOND);
        assert!(!world.peers[0].relay.is_up(), "it does not answer");
        world.run((gone - 6) * SECOND);
        world.set_relay(PeerId(0), Relay::Answers);
        everything_comes_after(&mut world, 5500 * MS, 10 * SECOND);
    }
}

/// The path's part of it: that keys are renewed without a stall is a test of the data plane's, in real time.
#[test]
fn an_hour_of_load_ten_idle_minutes_and_a_burst_cost_no_packet_and_leave_the_path_alone() {
    for makes in ALL_MAKES {
        let nats = [Some(Kind::PortRestricted), None];
        let mut world = Story { talk: [Some(50); 2], ..Story::quiet(makes, nats) }.begin();
        meet(&mut world);
        everything_comes_after(&mut world, Duration::ZERO, 60 * MINUTE);
        assert_eq!(world.seen.changes, [], "{makes:?}: the path is the same all the time");
        assert!(are_direct(&world));
        world.ids().for_each(|id| world.set_traffic(id, None));
        world.run(10 * MINUTE);
        world.ids().for_each(|id| world.set_traffic(id, Some(MS)));
        everything_comes_after(&mut world, Duration::ZERO, 10 * SECOND);
        assert!(are_direct(&world), "{makes:?}: direct again after the rest");
        for (from, to) in PAIRS {
            assert!(world.peers[to.0].others[&from].received.len() > 80_000, "{makes:?}");
        }
    }
}
