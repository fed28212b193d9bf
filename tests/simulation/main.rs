//! Whole peers that meet on a virtual clock across a virtual network: translators of every kind, loss, delay,
//! reordering, duplicates, small packets, partitions. What happens is generated; a failing case is replayed
//! and made smaller by proptest, and its seed is printed.
//!
//! Without `WARREN_SEEDS` the same 2,000 cases are run each time, half of them against a model of the reference, so
//! that a change is judged by what it changes; with it so many others, which the printed `WARREN_SEED` brings back.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod clock;
mod control;
mod engine;
mod errors;
mod expected;
mod loss;
mod network;
mod outages;
mod peer;
mod promises;
mod relay;
mod sessions;
mod tunnel;
mod world;

use std::{sync::LazyLock, time::Duration};

use engine::Make;
use expected::{Expected, everything_is_accounted_for};
use network::Families;
use peer::{Peer, PeerId};
use proptest::{
    prelude::*,
    test_runner::{Config, RngSeed},
};
use relay::Relay;
use warren_core::path::Direct;
use warren_lab::nat::Kind;
use world::{READY_AFTER, World};

/// How long everything works at the end: longer than any back-off.
const PEACE: Duration = Duration::from_secs(100);
/// Of that, how long direct paths may take: those that were let be because they flapped, for a minute at most, and those
/// that were looked for in vain for so long that they are once a minute. Nearly all take no second.
const FOUND_AFTER: Duration = Duration::from_secs(75);
/// Of that, how long packets are looked at.
const LOOKED_AT: Duration = Duration::from_secs(5);
/// When a change is noticed at the latest, where packets come as rarely as here.
const NOTICED_AFTER: Duration = Duration::from_secs(4);
/// A path is trusted for 6.5 s after its last pong, which may have been under way when it died.
const TRUST: Duration = Duration::from_secs(7);
/// Where there was no session, there is one by then. A handshake is repeated after 5 s, and was perhaps sent by a
/// path that was dead: that is known at the next time, when trust ends, or at the one after.
const SHAKEN_AFTER: Duration = Duration::from_secs(15);
/// The relay works again: a link that waits for its next attempt, or hangs in one, is logged in by then.
const BACK_AFTER: Duration = Duration::from_secs(10);
/// A packet is under way for less.
const UNDER_WAY: Duration = Duration::from_millis(1500);
/// Between two packets.
const PACE: Duration = Duration::from_millis(50);
/// Messages besides data that one peer may send another in a second. A suspicion takes some pings, and a path that is
/// left a dozen; answers to each of the other's, the lists that make it leave, and pings to all candidates after each
/// of those come to it.
const MOST_PER_SECOND: u64 = 128;
/// A reference peer pings all candidates for each list that it is sent; of these there are up to ten in a second,
/// with all addresses that we ever had, tens where translators restart and sockets move.
const MOST_OF_REFERENCE_PER_SECOND: u64 = 400;
/// Characters that a peer's paths to another take to be written down, and that the rest of it takes, as a measure of what
/// it holds.
const MOST_HELD: usize = 64 * 1024;

const SECOND: Duration = Duration::from_secs(1);
const WITH_REFERENCE: [[Make; 2]; 2] = [[Make::Ours, Make::Reference], [Make::Reference, Make::Ours]];
const ALL_MAKES: [[Make; 2]; 3] = [[Make::Ours; 2], WITH_REFERENCE[0], WITH_REFERENCE[1]];
const PAIRS: [(PeerId, PeerId); 2] = [(PeerId(0), PeerId(1)), (PeerId(1), PeerId(0))];

/// Something that happens.
#[derive(Debug, Clone)]
enum Change {
    Cut { site: usize, out: bool, r#in: bool },
    Route { site: usize, is_there: bool },
    Loss { site: usize, per_thousand: u32 },
    Duplicates { site: usize, per_thousand: u32 },
    Delay { site: usize, delay: u64, jitter: u64 },
    Mtu { site: usize, mtu: usize },
    RestartNat { site: usize },
    Rebind { peer: usize, port: u16 },
    Relay { peer: usize, relay: Relay },
    Policy { peer: usize, is_blocked: bool },
    Traffic { peer: usize, pause: Option<u64> },
    Heal,
}

/// A world, and what happens in it.
#[derive(Debug, Clone)]
struct Story {
    seed: u64,
    makes: [Make; 2],
    nats: [Option<Kind>; 2],
    families: [Families; 2],
    are_neighbours: bool,
    /// Another one like the second, in its network.
    has_third: bool,
    /// The pause between two packets of each from the beginning, if it talks.
    talk: [Option<u64>; 2],
    /// By how many milliseconds timers are late, where nothing else happens before.
    late: u64,
    /// Whether hosts say by ICMP that nobody listens at a port.
    complains: bool,
    /// Each after so many milliseconds.
    changes: Vec<(u64, Change)>,
}

impl Story {
    /// Two peers of IPv4 at two sites where nothing happens, each with a packet every 20 ms.
    fn quiet(makes: [Make; 2], nats: [Option<Kind>; 2]) -> Self {
        let families = [Families::V4; 2];
        Self {
            seed: 1,
            makes,
            nats,
            families,
            are_neighbours: false,
            has_third: false,
            talk: [Some(20); 2],
            late: 0,
            complains: false,
            changes: Vec::new(),
        }
    }

    fn begin(&self) -> World {
        let ([one, other], place) = (self.families, usize::from(!self.are_neighbours));
        let places = [(self.makes[0], 0, one), (self.makes[1], place, other), (self.makes[1], place, other)];
        let mut world = World::new(self.seed, &self.nats, &places[..2 + usize::from(self.has_third)]);
        (world.late, world.complains) = (Duration::from_millis(self.late), self.complains);
        for (id, pause) in world.ids().zip(self.talk.into_iter().chain([self.talk[1]])) {
            world.set_traffic(id, pause.map(Duration::from_millis));
        }
        world
    }

    /// Whether two can find each other without the relay.
    fn can_be_direct(&self, (from, to): (PeerId, PeerId)) -> bool {
        if from.0.min(to.0) > 0 {
            return true;
        }
        let both = |family| self.families.iter().all(|it| *it == family || *it == Families::Both);
        let is_hard = |nat: &Option<Kind>| matches!(nat, Some(Kind::PortRestricted | Kind::Symmetric));
        let are_too_hard = self.nats.contains(&Some(Kind::Symmetric)) && self.nats.iter().all(is_hard);
        both(Families::V6) || (both(Families::V4) && (self.are_neighbours || !are_too_hard))
    }
}

fn change(peers: usize) -> impl Strategy<Value = Change> {
    let (site, peer) = (0..2_usize, 0..peers);
    let relay = proptest::sample::select(&[Relay::Answers, Relay::Refuses, Relay::Swallows][..]);
    prop_oneof![
        3 => (site.clone(), any::<bool>(), any::<bool>()).prop_map(|(site, out, r#in)| Change::Cut { site, out, r#in }),
        1 => (site.clone(), any::<bool>()).prop_map(|(site, is_there)| Change::Route { site, is_there }),
        2 => (site.clone(), 0..300_u32).prop_map(|(site, per_thousand)| Change::Loss { site, per_thousand }),
        1 => (site.clone(), 0..300_u32).prop_map(|(site, per_thousand)| Change::Duplicates { site, per_thousand }),
        1 => (site.clone(), 1..200_u64, 0..100_u64).prop_map(|(site, delay, jitter)| Change::Delay { site, delay, jitter }),
        1 => (site.clone(), prop_oneof![Just(1300_usize), Just(1500)]).prop_map(|(site, mtu)| Change::Mtu { site, mtu }),
        1 => site.prop_map(|site| Change::RestartNat { site }),
        1 => (peer.clone(), 1024..u16::MAX).prop_map(|(peer, port)| Change::Rebind { peer, port }),
        1 => (peer.clone(), relay).prop_map(|(peer, relay)| Change::Relay { peer, relay }),
        1 => (peer.clone(), any::<bool>()).prop_map(|(peer, is_blocked)| Change::Policy { peer, is_blocked }),
        2 => (peer, proptest::option::of(5..2000_u64)).prop_map(|(peer, pause)| Change::Traffic { peer, pause }),
        1 => Just(Change::Heal),
    ]
}

fn story(makes: impl Strategy<Value = [Make; 2]>, has_third: bool) -> impl Strategy<Value = Story> {
    let nat = proptest::option::of(prop_oneof![
        Just(Kind::FullCone),
        Just(Kind::Restricted),
        Just(Kind::PortRestricted),
        Just(Kind::Symmetric)
    ]);
    let families = prop_oneof![4 => Just(Families::V4), 1 => Just(Families::V6), 2 => Just(Families::Both)];
    let changes = proptest::collection::vec((0..20_000_u64, change(2 + usize::from(has_third))), 0..10);
    let places = ([nat.clone(), nat], [families.clone(), families], proptest::bool::weighted(0.2));
    let talk = proptest::option::of(5..2000_u64);
    (any::<u64>(), makes, places, [talk.clone(), talk], (0..4_u64, any::<bool>()), changes).prop_map(
        move |(seed, makes, (nats, families, are_neighbours), talk, (late, complains), changes)| Story {
            seed,
            makes,
            nats,
            families,
            are_neighbours,
            has_third,
            talk,
            late,
            complains,
            changes,
        },
    )
}

fn one_of_each() -> impl Strategy<Value = [Make; 2]> {
    proptest::sample::select(&WITH_REFERENCE)
}

/// Whether a reference peer keeps to an address that is dead, and sends by relay as well. It does so for good if no
/// other is faster (tailnet-data 7.4), unless it hears the calls that make it leave.
fn is_stuck(world: &World, from: PeerId, to: PeerId) -> bool {
    let dead = world.peers[from.0].others[&to].path.distrusted(world.now);
    dead.is_some_and(|address| !world.is_at(to, address))
}

/// Everything that happens in a story, and its end.
fn tell(story: &Story) {
    let mut world = story.begin();
    let mut expected = Vec::new();
    for (pause, change) in &story.changes {
        expected.extend(pass(&mut world, Duration::from_millis(*pause)));
        world.changed_at = world.now;
        happen(&mut world, change);
        nothing_grows(&world, false);
    }
    ends_well(&mut world, story);
    expected.into_iter().for_each(|expected| expected.have_come(&world));
}

fn happen(world: &mut World, change: &Change) {
    match *change {
        Change::Cut { site, out, r#in } => {
            let conditions = world.network.conditions(site);
            (conditions.is_cut_out, conditions.is_cut_in) = (out, r#in);
        }
        Change::Route { site, is_there } => world.network.conditions(site).has_no_route = !is_there,
        Change::Loss { site, per_thousand } => world.network.conditions(site).loss = per_thousand,
        Change::Duplicates { site, per_thousand } => world.network.conditions(site).duplicates = per_thousand,
        Change::Delay { site, delay, jitter } => {
            let conditions = world.network.conditions(site);
            [conditions.delay, conditions.jitter] = [delay, jitter].map(Duration::from_millis);
        }
        Change::Mtu { site, mtu } => world.network.conditions(site).mtu = mtu,
        Change::RestartNat { site } => world.restart_nat(site),
        Change::Rebind { peer, port } => world.rebind(PeerId(peer), port),
        Change::Relay { peer, relay } => world.set_relay(PeerId(peer), relay),
        Change::Policy { peer, is_blocked } => {
            let policy = if is_blocked { Direct::Blocked } else { Direct::Allowed };
            world.set_policy(PeerId(peer), policy);
        }
        Change::Traffic { peer, pause } => {
            world.set_traffic(PeerId(peer), pause.map(Duration::from_millis));
        }
        Change::Heal => world.heal(),
    }
}

/// Lets the time between two changes pass. Once peers had the time to notice what does not work any more, every
/// packet that the relay could carry arrives, whatever has become of UDP; for some time without those that had no
/// session. Those that chance may take are not looked at, nor those that the next change may meet on their way.
fn pass(world: &mut World, span: Duration) -> Vec<Expected> {
    let begin = world.now;
    world.run(span);
    if !world.is_certain() || span < UNDER_WAY {
        return Vec::new();
    }
    let until = world.now - UNDER_WAY;
    // What a link to the relay that was down meanwhile has cost does not count.
    let in_session = world.changed_at.max(world.logged_in_at) + SHAKEN_AFTER;
    let expected = |(from, to)| {
        let after = begin.max(world.logged_in_at) + noticed_after(world, from, to);
        Expected::sent(world, from, to, after, until).but_for_sessions_until(world, in_session)
    };
    world.pairs().into_iter().map(expected).collect()
}

/// A reference peer takes no notice of silence. That we do on its behalf shows only where we send as well: from its
/// sparse packets alone nobody can tell that they are lost, and it keeps to a dead path as long as it trusts it.
fn noticed_after(world: &World, from: PeerId, to: PeerId) -> Duration {
    let is_left_to_trust = world.peers[from.0].make == Make::Reference && !world.is_talking(to);
    if is_left_to_trust { TRUST } else { NOTICED_AFTER }
}

/// Peace: everything works, both talk. Then every packet arrives, and directly where that can be.
fn ends_well(world: &mut World, story: &Story) {
    world.heal();
    let begin = world.now;
    world.ids().for_each(|id| world.set_traffic(id, Some(PACE)));
    world.changed_at = begin;
    world.run(FOUND_AFTER);
    ways_are_as_they_can_be(world, story);
    world.run(PEACE - FOUND_AFTER);
    let expected = pass(world, NOTICED_AFTER + LOOKED_AT + UNDER_WAY);
    assert!(world.logged_in_at <= begin + BACK_AFTER, "a link to the relay was down in peace");
    assert_eq!(expected.len(), world.pairs().len());
    expected.into_iter().for_each(|expected| expected.have_come(world));
    everything_is_accounted_for(world, world.began);
    ways_are_as_they_can_be(world, story);
    for (from, to) in world.pairs() {
        let waiting = world.peers[from.0].others[&to].tunnel.waiting();
        assert!(waiting.is_empty(), "still wait though there is a session: {waiting:?}");
    }
    for (peer, busiest) in world.peers.iter().zip(&world.seen.busiest_second) {
        let is_of_before = peer.gave_up_at.is_none_or(|at| at <= begin + BACK_AFTER + SHAKEN_AFTER);
        assert!(is_of_before, "a handshake came to nothing in peace");
        let most = match peer.make {
            Make::Ours => MOST_PER_SECOND,
            Make::Reference => MOST_OF_REFERENCE_PER_SECOND,
        };
        let most = most * (world.peers.len() as u64 - 1);
        assert!(*busiest <= most, "{busiest} from {:?} in one second", peer.make);
    }
    nothing_grows(world, true);
    // boringtun calls it an error that a peer does not answer for 90 s, as in such stories one may not.
    let of_ours = |(_, error): &(Duration, String)| !error.starts_with("boringtun");
    assert_eq!(errors::since(Duration::ZERO).into_iter().filter(of_ours).collect::<Vec<_>>(), []);
    assert_eq!(errors::since(begin - world.began + BACK_AFTER + SHAKEN_AFTER), [], "in peace");
}

fn ways_are_as_they_can_be(world: &mut World, story: &Story) {
    for (from, to) in world.pairs() {
        let (is_direct, can_be_direct) = (is_direct(world, from, to), story.can_be_direct((from, to)));
        if is_direct && !can_be_direct {
            // By chance a symmetric translator may take just the port that the other one lets in.
            let now = world.now;
            let address = world.peers[from.0].other(to).path.route(now).direct;
            let answers = address.and_then(|address| world.who_answers(from, address));
            assert_eq!(answers, Some(to), "{address:?}");
        } else {
            assert_eq!(is_direct, can_be_direct, "from {from:?} to {to:?}");
        }
    }
}

/// What a peer holds of its paths, and at the end of all else.
fn nothing_grows(world: &World, is_end: bool) {
    for peer in &world.peers {
        let paths: usize = peer.others.values().map(|other| format!("{:?}", other.path).len()).sum();
        assert!(
            paths < MOST_HELD * peer.others.len(),
            "its paths take {paths} characters to be written down"
        );
        if is_end {
            let Peer { member, sources, relay, endpoints, .. } = peer;
            let rest = format!("{member:?}{sources:?}{relay:?}{endpoints:?}").len();
            assert!(rest < MOST_HELD, "the rest takes {rest} characters to be written down");
        }
    }
}

fn is_direct(world: &World, from: PeerId, to: PeerId) -> bool {
    world.peers[from.0].others[&to].path.is_direct(world.now)
}

fn are_direct(world: &World) -> bool {
    PAIRS.into_iter().all(|(from, to)| is_direct(world, from, to))
}

/// How many packets came over UDP, either way.
fn came_directly(world: &World) -> [u64; 2] {
    PAIRS.map(|(from, to)| world.peers[to.0].others[&from].came_directly)
}

/// Lets so much time pass; what is sent after `notice` arrives.
fn everything_comes_after(world: &mut World, notice: Duration, span: Duration) {
    let begin = world.now;
    world.run(span);
    everything_is_accounted_for(world, begin);
    for (from, to) in world.pairs() {
        let until = world.now - Duration::from_millis(100);
        Expected::sent(world, from, to, begin + notice, until).have_come(world);
    }
}

/// How many stories, and from which seed.
fn config() -> Config {
    static SEED: LazyLock<u64> = LazyLock::new(rand::random);
    let number = |name: &str| std::env::var(name).ok().map(|it| it.parse::<u64>().unwrap());
    let (cases, seed) = match (number("WARREN_SEEDS"), number("WARREN_SEED")) {
        (None, seed) => (2000, seed.unwrap_or(1)),
        (Some(cases), seed) => (cases, seed.unwrap_or(*SEED)),
    };
    println!("WARREN_SEEDS={cases} WARREN_SEED={seed} tells these stories again");
    let (cases, rng_seed) = (cases.div_ceil(2) as u32, RngSeed::Fixed(seed));
    Config { cases, rng_seed, failure_persistence: None, ..Config::default() }
}

#[test]
fn a_path_that_dies_under_load_is_left_within_a_second_and_taken_again_within_another() {
    for makes in ALL_MAKES {
        for (out, r#in) in [(true, true), (true, false), (false, true)] {
            let mut world = Story::quiet(makes, [Some(Kind::PortRestricted), None]).begin();
            // Where our direction alone dies, what comes regardless hides it, see below; answers end with it.
            match (makes, out, r#in) {
                ([Make::Ours, Make::Reference], true, false) => world.set_answering(PeerId(1)),
                ([Make::Reference, Make::Ours], false, true) => world.set_answering(PeerId(0)),
                _ => {}
            }
            world.run(Duration::from_secs(20));
            assert!(are_direct(&world), "they are direct to begin with");
            happen(&mut world, &Change::Cut { site: 0, out, r#in });
            everything_comes_after(&mut world, SECOND, Duration::from_secs(20));
            world.heal();
            world.run(SECOND);
            assert!(are_direct(&world), "{makes:?} cut out {out}, in {}", r#in);
        }
    }
}

/// Data comes all the time, so there is no silence; that our own pings are not answered has to tell. The reference itself
/// notices only when trust ends.
#[test]
fn our_direction_alone_that_dies_costs_a_second_though_a_reference_peer_is_heard() {
    let mut world = Story::quiet(WITH_REFERENCE[0], [None; 2]).begin();
    world.run(Duration::from_secs(20));
    assert!(are_direct(&world));
    happen(&mut world, &Change::Cut { site: 0, out: true, r#in: false });
    everything_comes_after(&mut world, SECOND, Duration::from_secs(20));
}

/// Who moved hears nothing and pings; the pong comes, since it goes to where the ping came from, and names another
/// address than those before: that has to tell. Who is to follow, if it is ours, hears data from the new address, and
/// has to miss that from the one that it sends to.
#[test]
fn a_translator_that_starts_anew_and_shows_a_peer_elsewhere_costs_a_second() {
    for makes in [[Make::Ours; 2], WITH_REFERENCE[1]] {
        let mut world = Story::quiet(makes, [None, Some(Kind::Symmetric)]).begin();
        world.run(Duration::from_secs(20));
        assert!(are_direct(&world));
        happen(&mut world, &Change::RestartNat { site: 1 });
        everything_comes_after(&mut world, SECOND, Duration::from_secs(20));
    }
}

/// The address that both had inside is outside the one's who sends first after their translator started anew.
#[test]
fn of_two_neighbours_each_is_heard_again_at_an_address_that_the_other_had_meanwhile() {
    let neighbours = Story { has_third: true, ..Story::quiet([Make::Ours; 2], [None, Some(Kind::FullCone)]) };
    let mut world = neighbours.begin();
    world.run(Duration::from_secs(20));
    for first in [1, 2, 1, 2, 1] {
        world.ids().for_each(|id| world.set_traffic(id, (id.0 == first).then_some(PACE)));
        world.restart_nat(1);
        world.run(SECOND);
        world.ids().for_each(|id| world.set_traffic(id, Some(PACE)));
        everything_comes_after(&mut world, SECOND, Duration::from_secs(20));
        for (from, to) in world.pairs() {
            assert!(is_direct(&world, from, to), "{from:?} to {to:?}, {first} came first");
        }
    }
}

/// A reference peer keeps to an address of ours that is dead, since no other is faster (tailnet-data 7.4). Calls could
/// make it leave; but they were lost. That its packets come by relay although we are direct shows that it should.
#[test]
fn a_reference_peer_that_missed_the_calls_about_a_new_port_is_told_when_its_relay_is_back() {
    let mut world = Story { are_neighbours: true, ..Story::quiet(WITH_REFERENCE[1], [None; 2]) }.begin();
    world.run(Duration::from_secs(20));
    assert!(are_direct(&world));
    world.set_relay(PeerId(0), Relay::Refuses);
    world.rebind(PeerId(1), 50_000);
    world.run(Duration::from_secs(7));
    world.set_relay(PeerId(0), Relay::Answers);
    world.run(PEACE);
    assert!(is_direct(&world, PeerId(1), PeerId(0)), "ours has found the new way");
    assert!(!is_stuck(&world, PeerId(0), PeerId(1)));
}

/// The reference takes no notice; ours has to, although false alarms have made it careful and the path is slow.
#[test]
fn with_a_reference_peer_a_slow_path_that_dies_is_left_within_the_time_that_all_have() {
    for seed in (0..10).chain([16_361_005_446_267_957_689]) {
        let makes = WITH_REFERENCE[1];
        let story = Story {
            seed,
            talk: [Some(173), Some(741)],
            ..Story::quiet(makes, [Some(Kind::Symmetric), None])
        };
        let changes = vec![
            (17_325, Change::Delay { site: 0, delay: 169, jitter: 69 }),
            (10_045, Change::Cut { site: 1, out: false, r#in: true }),
            (5_616, Change::Heal),
        ];
        tell(&Story { changes, ..story });
    }
}

/// The reference has our answer and trusts the path; its direction dies before it has answered us.
#[test]
fn a_reference_peer_that_has_found_us_and_then_dies_to_us_is_made_to_leave_a_path_that_we_never_had() {
    for after in 100..180 {
        let nats = [None, Some(Kind::Restricted)];
        let story = Story { talk: [Some(5), Some(19)], ..Story::quiet(WITH_REFERENCE[0], nats) };
        let mut world = story.begin();
        world.run(Duration::from_millis(after));
        happen(&mut world, &Change::Cut { site: 1, out: true, r#in: false });
        everything_comes_after(&mut world, SECOND, Duration::from_secs(5));
    }
}

/// The messages that make the peer leave go by the relay: that our sockets are others meanwhile changes nothing.
#[test]
fn a_reference_peer_leaves_a_dead_path_although_our_port_changes_while_it_is_told_to() {
    for after in (0..800).step_by(10) {
        let mut world = Story::quiet(WITH_REFERENCE[1], [None; 2]).begin();
        world.run(Duration::from_secs(20));
        assert!(are_direct(&world));
        happen(&mut world, &Change::Cut { site: 1, out: false, r#in: true });
        world.run(Duration::from_millis(after));
        world.rebind(PeerId(1), 50_000);
        everything_comes_after(&mut world, SECOND, Duration::from_secs(5));
    }
}

#[test]
fn with_a_reference_peer_a_network_is_direct_within_a_second_of_ready_and_two_cones_within_three() {
    let cones = [Kind::FullCone, Kind::Restricted, Kind::PortRestricted].map(Some);
    for makes in WITH_REFERENCE {
        let mut world = Story { are_neighbours: true, ..Story::quiet(makes, [cones[2], None]) }.begin();
        world.run(READY_AFTER + SECOND);
        assert!(are_direct(&world), "{makes:?} in one network");
        for nats in cones.iter().flat_map(|one| cones.map(|other| [*one, other])) {
            let mut world = Story::quiet(makes, nats).begin();
            world.run(READY_AFTER + 3 * SECOND);
            assert!(are_direct(&world), "{makes:?} behind {nats:?}");
        }
    }
}

#[test]
fn with_a_reference_peer_either_side_that_blocks_direct_connections_keeps_both_on_the_relay() {
    for (makes, blocked) in WITH_REFERENCE.into_iter().flat_map(|makes| [(makes, 0), (makes, 1)]) {
        let mut world = Story::quiet(makes, [None; 2]).begin();
        world.set_policy(PeerId(blocked), Direct::Blocked);
        everything_comes_after(&mut world, READY_AFTER, Duration::from_secs(60));
        assert_eq!(came_directly(&world), [0, 0], "{makes:?}, {blocked} blocks");
    }
}

/// Whatever the reference has found by then.
#[test]
fn a_reference_peer_leaves_us_wherever_in_its_search_we_block_direct_connections() {
    let nats = [None, Some(Kind::Restricted)];
    for (nat, after) in nats.into_iter().flat_map(|nat| (0..100).map(move |after| (nat, after))) {
        let story = Story { talk: [Some(5); 2], ..Story::quiet(WITH_REFERENCE[0], [None, nat]) };
        let mut world = story.begin();
        world.run(READY_AFTER + Duration::from_millis(after));
        world.set_policy(PeerId(0), Direct::Blocked);
        everything_comes_after(&mut world, Duration::from_millis(200), Duration::from_secs(8));
    }
}

#[test]
fn with_a_reference_peer_a_way_for_small_packets_alone_is_never_taken_and_swallows_nothing() {
    for (makes, site) in WITH_REFERENCE.into_iter().flat_map(|makes| [(makes, 0), (makes, 1)]) {
        let mut world = Story::quiet(makes, [None; 2]).begin();
        world.network.conditions(site).mtu = 1300;
        everything_comes_after(&mut world, READY_AFTER, Duration::from_secs(60));
        assert_eq!(came_directly(&world), [0, 0], "{makes:?}, small at {site}");
    }
}

#[test]
fn with_a_reference_peer_a_way_that_shrinks_under_load_is_left_within_a_second() {
    for (makes, site) in WITH_REFERENCE.into_iter().flat_map(|makes| [(makes, 0), (makes, 1)]) {
        let mut world = Story::quiet(makes, [None; 2]).begin();
        world.run(Duration::from_secs(20));
        assert!(are_direct(&world));
        world.network.conditions(site).mtu = 1300;
        everything_comes_after(&mut world, SECOND, Duration::from_secs(60));
    }
}

/// Who sends is told that there is no way; and has the peer leave, which is not.
#[test]
fn with_a_reference_peer_a_route_of_ours_that_is_gone_costs_a_quarter_of_a_second() {
    for (ours, makes) in WITH_REFERENCE.into_iter().enumerate() {
        for nat in [None, Some(Kind::PortRestricted)] {
            let mut world = Story::quiet(makes, [nat, None]).begin();
            world.run(Duration::from_secs(20));
            assert!(are_direct(&world));
            happen(&mut world, &Change::Route { site: ours, is_there: false });
            everything_comes_after(&mut world, Duration::from_millis(250), Duration::from_secs(60));
            world.heal();
            everything_comes_after(&mut world, Duration::ZERO, SECOND);
            assert!(are_direct(&world), "{makes:?}");
        }
    }
}

#[test]
fn with_a_reference_peer_a_new_port_of_either_side_costs_a_second_and_at_most_seven_on_the_relay() {
    for (makes, moved) in WITH_REFERENCE.into_iter().flat_map(|makes| [(makes, 0), (makes, 1)]) {
        for nat in [None, Some(Kind::PortRestricted), Some(Kind::Symmetric)] {
            let mut world = Story::quiet(makes, [nat, None]).begin();
            world.run(Duration::from_secs(20));
            assert!(are_direct(&world));
            world.rebind(PeerId(moved), 50_000);
            everything_comes_after(&mut world, SECOND, Duration::from_secs(7));
            assert!(are_direct(&world), "{makes:?}, {moved} moves, behind {nat:?}");
        }
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whatever_happens_peers_find_each_other_again_and_every_packet_arrives(story in story(Just([Make::Ours; 2]), false)) {
        tell(&story);
    }

    #[test]
    fn whatever_happens_a_reference_peer_is_found_again_and_every_packet_arrives(story in story(one_of_each(), false)) {
        tell(&story);
    }
}

proptest! {
    #![proptest_config(Config { cases: config().cases / 4, ..config() })]

    /// What one of two neighbours had is the other's by turns: addresses that their translator gives, above all.
    #[test]
    fn whatever_happens_to_neighbours_each_keeps_apart_from_the_other_what_it_is_sent(
        story in story(proptest::sample::select(&ALL_MAKES), true),
    ) {
        tell(&story);
    }
}
