//! What an outage of UDP costs under load, measured: whichever direction dies, whoever sends, at whatever moment.

use std::time::{Duration, Instant};

use warren_lab::nat::Kind;

use super::{
    ALL_MAKES, Change, PAIRS, SECOND, Story, engine::Make, happen, is_direct, peer::PeerId, world::World,
};

/// Moments of the cut, from one ping that goes along to the next; no two alike to the packets.
const PHASES: u32 = 8;
const PHASE: Duration = Duration::from_millis(67);
/// The requirement is a median of one second; this is what there is at most, at whichever millisecond.
const LONGEST: Duration = Duration::from_millis(800);
/// The pause between two packets of a stream.
const PAUSE: u64 = 20;
const CUTS: [(&str, bool, bool); 3] = [("both", true, true), ("out", true, false), ("in", false, true)];

/// Who sends, and who answers each packet.
#[derive(Debug, Clone, Copy)]
enum Load {
    Both,
    /// One streams, and nothing comes back.
    Alone(usize),
    /// One streams, and the other answers: a transfer.
    Answered(usize),
}

const LOADS: [Load; 5] = [Load::Both, Load::Alone(0), Load::Alone(1), Load::Answered(0), Load::Answered(1)];

impl Load {
    fn begin(self, makes: [Make; 2], seed: u64) -> World {
        let mut story = Story { seed, ..Story::quiet(makes, [Some(Kind::PortRestricted), None]) };
        let only = |sender: usize| [0, 1].map(|id| (id == sender).then_some(PAUSE));
        story.talk = match self {
            Self::Both => [Some(PAUSE); 2],
            Self::Alone(sender) | Self::Answered(sender) => only(sender),
        };
        let mut world = story.begin();
        if let Self::Answered(sender) = self {
            world.set_answering(PeerId(1 - sender));
        }
        world
    }

    /// Whether whoever sends does so directly.
    fn are_direct(self, world: &World) -> bool {
        let sends = |id: PeerId| !matches!(self, Self::Alone(sender) if sender != id.0);
        PAIRS.into_iter().all(|(from, to)| !sends(from) || is_direct(world, from, to))
    }
}

/// How long packets were lost, in the direction where that took longer: until the last of them was sent.
fn outage(world: &World, since: Instant) -> Duration {
    let until = world.now - Duration::from_millis(100);
    let last_lost = |(from, to): (PeerId, PeerId)| {
        let came = &world.peers[to.0].others[&from].received;
        let sent = (1_u64..).zip(&world.peers[from.0].others[&to].sent);
        let lost = sent.filter(|(number, at)| **at >= since && **at < until && !came.contains(number));
        lost.map(|(_, at)| *at - since).last()
    };
    PAIRS.into_iter().filter_map(last_lost).max().unwrap_or_default()
}

/// Traffic flows both ways again, at each phase, sorted.
fn outages(makes: [Make; 2], load: Load, out: bool, r#in: bool) -> Vec<Duration> {
    let outage_at = |phase: u32| {
        let mut world = load.begin(makes, u64::from(phase));
        world.run(5 * SECOND + PHASE * phase);
        assert!(load.are_direct(&world), "they are direct to begin with");
        let cut_at = world.now;
        happen(&mut world, &Change::Cut { site: 0, out, r#in });
        world.run(9 * SECOND);
        outage(&world, cut_at)
    };
    let mut outages: Vec<Duration> = (0..PHASES).map(outage_at).collect();
    outages.sort_unstable();
    outages
}

#[test]
fn whichever_direction_dies_whoever_sends_traffic_flows_both_ways_again_within_a_second() {
    for makes in ALL_MAKES {
        for ((cut, out, r#in), load) in CUTS.into_iter().flat_map(|cut| LOADS.map(|load| (cut, load))) {
            let outages = outages(makes, load, out, r#in);
            let (median, longest) = (outages[outages.len() / 2], outages[outages.len() - 1]);
            println!("{makes:?} {cut:4} {load:?}: median {median:?}, at most {longest:?}");
            assert!(longest < LONGEST, "{makes:?} {cut} {load:?}: {outages:?}");
        }
    }
}
