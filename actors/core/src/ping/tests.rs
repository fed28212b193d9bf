use std::collections::BTreeSet;

use proptest::prelude::*;
use warren_proto::key::DiscoPublic;

use super::*;
use crate::{
    home::RegionLatency,
    relay_map::{Node, Region},
};

/// Conforms: vpn:15.36
#[test]
fn a_new_peer_is_pinged_at_once_and_then_on_every_tick() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let first = sent(&mut pings, begin);
    assert_eq!(first.len(), 1);
    let answer = pings.handle_pong(&first[0].txid, &first[0].peer, begin + MS * 30).unwrap();
    assert_eq!(answer.latency, MS * 30);
    assert_eq!(pings.poll_timeout(), begin + TICK);
    assert_eq!(sent(&mut pings, begin + TICK).len(), 1);
}

#[test]
fn a_ping_that_could_not_be_sent_is_sent_as_soon_as_there_is_a_path() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let first = sent(&mut pings, begin);
    pings.unsent(&first[0].txid);
    pings.handle_path_up(begin + MS);
    assert_eq!(sent(&mut pings, begin + MS).len(), 1);
}

#[test]
fn a_silent_peer_is_asked_quickly_and_times_out_once_a_tick() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let mut at = Vec::new();
    while pings.poll_timeout() < begin + TICK {
        let due = pings.poll_timeout();
        at.extend(sent(&mut pings, due).iter().map(|_| due.duration_since(begin)));
    }
    assert_eq!(at, [Duration::ZERO, MS * 250, MS * 750, MS * 1750, MS * 3750]);
    assert_eq!(pings.handle_timeout(begin + TICK, txid).timed_out.len(), 1);
}

#[test]
fn many_peers_are_pinged_in_bursts_within_a_fraction_of_the_tick() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1000);
    let (mut bursts, mut last) = (Vec::new(), begin);
    while bursts.iter().sum::<usize>() < 1000 {
        last = pings.poll_timeout().max(begin);
        bursts.push(sent(&mut pings, last).len());
    }
    assert!(bursts.iter().all(|burst| *burst <= BURST), "{bursts:?}");
    assert!(last.duration_since(begin) <= MS * 160, "{:?}", last.duration_since(begin));
}

#[test]
fn a_late_or_foreign_or_repeated_answer_counts_for_nothing() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 2);
    let first = sent(&mut pings, begin);
    assert_eq!(pings.handle_pong(&first[0].txid, &first[1].peer, begin + MS), None);
    assert_eq!(pings.handle_pong(&first[0].txid, &first[0].peer, begin + TIMEOUT + MS), None);
    assert!(pings.handle_pong(&first[1].txid, &first[1].peer, begin + MS).is_some());
    assert_eq!(pings.handle_pong(&first[1].txid, &first[1].peer, begin + MS), None);
}

#[test]
fn who_asks_gets_the_next_answer_or_is_told_that_there_was_none() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let first = sent(&mut pings, begin);
    pings.ping_now(begin, Uuid::from_u128(0), begin + MS * 10, 'a').unwrap();
    pings.ping_now(begin, Uuid::from_u128(0), begin + MS * 90, 'b').unwrap();
    assert_eq!(pings.handle_timeout(begin + MS * 10, txid).gave_up, ['a']);
    let answer = pings.handle_pong(&first[0].txid, &first[0].peer, begin + MS * 20).unwrap();
    assert_eq!(answer.waiters, ['b']);
    let unknown = pings.ping_now(begin, Uuid::from_u128(9), begin, 'c');
    assert_eq!(unknown, Err((PingRefused::NoPeer, 'c')));
}

/// Ticks stay on their grid; those missed in a stall are lost.
#[test]
fn the_grid_outlives_a_stall_with_one_late_tick() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let first = sent(&mut pings, begin);
    answer(&mut pings, &first[0], begin);
    assert_eq!(sent(&mut pings, begin + MS * 17_300).len(), 1, "one late tick");
    assert_eq!(sent(&mut pings, begin + MS * 17_301), [], "and no second");
    let next = pings.next_tick;
    assert_eq!(next, begin + TICK * 4);
    assert_eq!(sent(&mut pings, next).len(), 1);
}

#[test]
fn the_first_answer_ends_the_quick_pings_and_any_ping_of_the_round_may_be_answered() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let first = sent(&mut pings, begin);
    let second = sent(&mut pings, begin + MS * 250);
    assert_eq!(second.len(), 1);
    let late = pings.handle_pong(&first[0].txid, &first[0].peer, begin + MS * 300).unwrap();
    assert_eq!(late.latency, MS * 300, "measured from the ping that it answers");
    assert_eq!(pings.handle_pong(&second[0].txid, &second[0].peer, begin + MS * 301), None, "one a round");
    assert_eq!(pings.poll_timeout(), begin + TICK);
    assert!(pings.outstanding.is_empty());
}

#[test]
fn an_answer_after_the_round_timed_out_counts_for_nothing() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let first = sent(&mut pings, begin);
    let due = pings.handle_timeout(begin + TICK, txid);
    assert_eq!((due.timed_out.len(), due.pings.len()), (1, 1));
    assert_eq!(pings.handle_pong(&first[0].txid, &first[0].peer, begin + TICK), None);
    assert!(answer(&mut pings, &due.pings[0], begin + TICK).waiters.is_empty());
}

#[test]
fn an_answer_counts_for_five_seconds() {
    let begin = Instant::now();
    for (after, counts) in [(TIMEOUT, true), (TIMEOUT + MS, false)] {
        let mut pings = with_peers(begin, 1);
        let first = sent(&mut pings, begin);
        let answered = pings.handle_pong(&first[0].txid, &first[0].peer, begin + after);
        assert_eq!(answered.is_some(), counts, "{after:?}");
    }
}

#[test]
fn a_round_that_began_between_two_ticks_has_its_five_seconds() {
    let begin = Instant::now();
    let mut pings = Pings::new(begin);
    set_peers(&mut pings, begin + MS * 3000, &[(0, 1)]);
    let first = sent(&mut pings, begin + MS * 3000);
    let due = pings.handle_timeout(begin + TICK, txid);
    assert_eq!((due.timed_out.len(), due.pings.len()), (0, 1), "pinged with all others");
    assert_eq!(answer(&mut pings, &first[0], begin + MS * 7000).latency, MS * 4000);
    let due = pings.handle_timeout(begin + TICK * 2, txid);
    assert_eq!(due.timed_out.len(), 0);
}

#[test]
fn a_peer_with_a_new_key_is_pinged_anew_and_its_old_answers_are_forgotten() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let old = sent(&mut pings, begin);
    pings.ping_now(begin, id(0), begin + TICK, 'a').unwrap();
    assert_eq!(set_peers(&mut pings, begin + MS, &[(0, 9)]), NOBODY, "whoever waits goes on waiting");
    assert_eq!(pings.handle_pong(&old[0].txid, &old[0].peer, begin + MS), None);
    assert_eq!(pings.handle_pong(&old[0].txid, &key(9), begin + MS), None);
    let new = sent(&mut pings, begin + MS);
    assert_eq!(new.iter().map(|ping| ping.peer).collect::<Vec<_>>(), [key(9)]);
    assert_eq!(answer(&mut pings, &new[0], begin + MS * 2).waiters, ['a']);
    assert_eq!(set_peers(&mut pings, begin + MS * 3, &[(0, 9)]), NOBODY);
    assert_eq!(sent(&mut pings, begin + MS * 3), [], "the same again is no news");
}

#[test]
fn who_waits_for_an_agent_that_is_gone_is_told_and_nothing_of_it_is_left() {
    let begin = Instant::now();
    let mut pings = Pings::new(begin);
    set_peers(&mut pings, begin, &[(0, 1), (1, 1)]);
    sent(&mut pings, begin);
    pings.ping_now(begin, id(0), begin + TICK, 'a').unwrap();
    pings.ping_now(begin, id(1), begin + TICK, 'b').unwrap();
    assert_eq!(set_peers(&mut pings, begin, &[(1, 1)]), ['a']);
    assert_eq!(pings.outstanding.len(), 1);
    assert_eq!(set_peers(&mut pings, begin, &[]), ['b']);
    assert!(pings.outstanding.is_empty() && pings.quick.is_empty() && pings.queue.is_empty());
    assert_eq!(
        pings.handle_timeout(begin + TICK, txid),
        Due { pings: vec![], timed_out: vec![], gave_up: vec![] }
    );
}

#[test]
fn a_ping_on_demand_is_sent_at_once_or_a_moment_after_the_last() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let first = sent(&mut pings, begin);
    answer(&mut pings, &first[0], begin);
    pings.ping_now(begin + MS * 100, id(0), begin + TICK, 'a').unwrap();
    let second = sent(&mut pings, begin + MS * 100);
    assert_eq!(second.len(), 1, "nothing is outstanding");
    pings.ping_now(begin + MS * 150, id(0), begin + TICK, 'b').unwrap();
    assert_eq!(pings.poll_timeout(), begin + MS * 350, "a quarter of a second after the last");
    assert_eq!(
        answer(&mut pings, &second[0], begin + MS * 160).waiters,
        ['a', 'b'],
        "one answer serves both"
    );
    assert_eq!(pings.poll_timeout(), begin + TICK);
}

#[test]
fn only_so_many_may_wait_and_the_refusals_say_why() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    for _ in 0..MAX_WAITERS {
        pings.ping_now(begin, id(0), begin + MS, 'a').unwrap();
    }
    let (refused, reply) = pings.ping_now(begin, id(0), begin + MS, 'b').unwrap_err();
    assert_eq!((refused.to_string().as_str(), reply), ("too many pings are waited for", 'b'));
    assert_eq!(pings.handle_timeout(begin + MS, txid).gave_up.len(), MAX_WAITERS);
    assert!(pings.ping_now(begin + MS, id(0), begin + MS, 'c').is_ok());
    assert_eq!(PingRefused::NoPeer.to_string(), "no matching peer");
}

#[test]
fn a_peer_that_no_ping_reached_does_not_time_out() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let mut due = begin;
    while due < begin + TICK {
        sent(&mut pings, due).iter().for_each(|ping| pings.unsent(&ping.txid));
        due = pings.poll_timeout();
    }
    assert!(pings.handle_timeout(begin + TICK, txid).timed_out.is_empty());
}

#[test]
fn a_path_that_comes_up_hurries_only_those_that_do_not_answer() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 2);
    let first = sent(&mut pings, begin);
    answer(&mut pings, &first[0], begin);
    pings.handle_path_up(begin + MS * 400);
    let again: Vec<_> = sent(&mut pings, begin + MS * 400).iter().map(|ping| ping.agent).collect();
    assert_eq!(again, [first[1].agent]);
}

#[test]
fn after_a_wake_everybody_is_pinged_at_once_and_quickly_until_they_answer() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 2);
    for ping in sent(&mut pings, begin) {
        answer(&mut pings, &ping, begin);
    }
    pings.handle_wake(begin + MS * 1000);
    let again = sent(&mut pings, begin + MS * 1000);
    assert_eq!(again.len(), 2);
    answer(&mut pings, &again[0], begin + MS * 1000);
    let more = sent(&mut pings, begin + MS * 1300);
    assert_eq!(more.iter().map(|ping| ping.agent).collect::<Vec<_>>(), [again[1].agent]);
}

#[test]
fn who_answered_once_and_then_fell_silent_is_hurried_by_a_path_again() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1);
    let first = sent(&mut pings, begin);
    answer(&mut pings, &first[0], begin);
    sent(&mut pings, begin + TICK);
    let due = pings.handle_timeout(begin + TICK * 2, txid);
    assert_eq!((due.timed_out.len(), due.pings.len()), (1, 1));
    pings.handle_path_up(begin + TICK * 2 + MS * 300);
    assert_eq!(sent(&mut pings, begin + TICK * 2 + MS * 300).len(), 1);
}

#[test]
fn who_is_gone_before_its_burst_takes_no_place_in_it() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 300);
    assert_eq!(sent(&mut pings, begin).len(), BURST, "the others wait for the next burst");
    assert_eq!(set_peers(&mut pings, begin, &[(299, 1)]), NOBODY);
    let next = sent(&mut pings, begin + BURST_PAUSE);
    assert_eq!(next.iter().map(|ping| ping.agent).collect::<Vec<_>>(), [id(299)]);
}

#[test]
fn an_agent_whose_ping_is_due_is_not_pinged_twice_for_whoever_hurries_it() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 1000);
    let mut all = sent(&mut pings, begin);
    for ms in 1..20 {
        pings.handle_path_up(begin + MS * ms);
        pings.ping_now(begin + MS * ms, id(900), begin + TICK, 'a').unwrap();
        all.extend(sent(&mut pings, begin + MS * ms));
    }
    for burst in 1..8 {
        all.extend(sent(&mut pings, begin + BURST_PAUSE * burst));
    }
    let agents: BTreeSet<_> = all.iter().map(|ping| ping.agent).collect();
    assert_eq!((all.len(), agents.len()), (1000, 1000));
}

#[test]
fn peers_that_come_one_by_one_are_pinged_in_bursts_too() {
    let begin = Instant::now();
    let mut pings = Pings::new(begin);
    let mut peers = Vec::new();
    let mut all = 0;
    for number in 0..300 {
        peers.push((number, 1));
        set_peers(&mut pings, begin, &peers);
        all += sent(&mut pings, begin).len();
    }
    assert_eq!(all, BURST);
    assert_eq!(pings.poll_timeout(), begin + BURST_PAUSE);
    assert_eq!(sent(&mut pings, begin + BURST_PAUSE).len(), BURST);
}

/// One ping an agent and tick where all answer, and as many wake-ups as there are bursts.
///
/// Conforms: vpn:15.35
#[test]
fn the_cost_is_linear_in_agents_and_ticks() {
    const TICKS: u32 = 10;
    for agents in [3_usize, 100, 1000] {
        let begin = Instant::now();
        let mut pings = with_peers(begin, agents as u128);
        let (mut count, mut wakes, mut most) = (0, 0, 0);
        loop {
            let due = pings.poll_timeout();
            if due >= begin + TICK * TICKS {
                break;
            }
            wakes += 1;
            let burst = sent(&mut pings, due);
            count += burst.len();
            most = most.max(pings.outstanding.len());
            burst.iter().for_each(|ping| drop(answer(&mut pings, ping, due)));
        }
        assert_eq!(count, agents * TICKS as usize);
        assert_eq!(wakes, agents.div_ceil(BURST) * TICKS as usize);
        assert!(most <= BURST && pings.outstanding.is_empty());
    }
}

/// Where nobody answers the quick pings add a few a round, and what is outstanding is that of one round.
#[test]
fn silence_costs_a_few_pings_a_tick() {
    let begin = Instant::now();
    let mut pings = with_peers(begin, 100);
    let mut count = 0;
    while pings.poll_timeout() < begin + TICK * 10 {
        let due = pings.poll_timeout();
        count += sent(&mut pings, due).len();
        assert!(pings.outstanding.len() <= 500);
    }
    assert_eq!(count, 100 * (5 + 9), "five in the first round, one in each later one");
}

/// Conforms: control:D4
#[test]
fn the_region_of_a_report_is_the_pings_or_else_our_home() {
    let region = |id: u16, name: &str| {
        let (code, name, nodes) = (String::new(), name.to_owned(), vec![Node::default()]);
        (RegionId(id), Region { id: RegionId(id), code, name, embedded: false, avoid: false, nodes })
    };
    let regions = [region(1, "One"), region(2, "Two"), region(3, "Same"), region(4, "Same")].into();
    let map = RelayMap { regions, ..RelayMap::default() };
    let latency = |(id, v4, v6)| (RegionId(id), RegionLatency { v4: Some(MS * v4), v6: Some(MS * v6) });
    let latencies: Report = [(1, 9, 4), (2, 5, 6), (3, 8, 8), (4, 7, 9)].into_iter().map(latency).collect();
    let rows = [
        (Some(2), Some(1), false, "Two", Some(5)),
        (Some(3), Some(1), false, "Same", Some(7)),
        (None, Some(1), true, "One", Some(4)),
        (Some(7), Some(1), false, "Unnamed 7", None),
        (None, Some(8), true, "Unnamed 8", None),
        (None, None, true, "Unnamed 0", None),
    ];
    for (through, home, direct, region_name, region_latency) in rows {
        let told = report(MS * 30, through.map(RegionId), &map, home.map(RegionId), &latencies);
        let region_latency = region_latency.map(|millis| MS * millis);
        let expected =
            PingReport { latency: MS * 30, direct, region_name: region_name.to_owned(), region_latency };
        assert_eq!(told, expected, "{through:?} {home:?}");
    }
}

proptest! {
    /// Whatever happens and in whatever order: nothing outstanding is without its round, nobody waits for ever,
    /// nobody is asked too often, and time never stands still.
    #[test]
    fn the_books_are_always_in_order(actions in proptest::collection::vec(any_action(), 1..150)) {
        let begin = Instant::now();
        let (mut pings, mut now) = (Pings::new(begin), begin);
        let (mut last_sent, mut next, mut waiting) = (Vec::<Ping>::new(), 0_usize, BTreeSet::new());
        for action in actions {
            let mut done = Vec::new();
            match action {
                Action::Peers(peers) => {
                    let map = map_of(&peers);
                    done = pings.set_peers(now, &map);
                    prop_assert!(pings.agents.keys().eq(map.peers.keys()));
                }
                Action::PathUp => pings.handle_path_up(now),
                Action::PingNow(agent, ms) => {
                    next += 1;
                    let asked = pings.ping_now(now, id(agent), now + MS * ms, next);
                    prop_assert_eq!(asked.is_ok(), pings.agents.contains_key(&id(agent)));
                    waiting.extend(asked.is_ok().then_some(next));
                }
                Action::Unsent(pick) => {
                    if let Some(ping) = picked(&last_sent, pick) {
                        pings.unsent(&ping.txid);
                    }
                }
                Action::Pong(pick, is_from_peer) => {
                    if let Some(ping) = picked(&last_sent, pick) {
                        let peer = if is_from_peer { ping.peer } else { key(77) };
                        let answer = pings.handle_pong(&ping.txid, &peer, now);
                        prop_assert!(is_from_peer || answer.is_none());
                        if let Some(answer) = answer {
                            prop_assert!(answer.agent == ping.agent && answer.latency <= TIMEOUT);
                            prop_assert_eq!(pings.handle_pong(&ping.txid, &peer, now), None, "once");
                            done = answer.waiters;
                        }
                    }
                }
                Action::Pass(ms) => {
                    let until = now + MS * ms;
                    while pings.poll_timeout() <= until {
                        now = now.max(pings.poll_timeout());
                        let due = pings.handle_timeout(now, txid);
                        prop_assert!(pings.poll_timeout() > now, "it wants to be woken at once again");
                        done.extend(due.gave_up);
                        last_sent.extend(due.pings);
                        check_books(&pings)?;
                    }
                    now = until;
                }
            }
            for waiter in done {
                prop_assert!(waiting.remove(&waiter), "everybody is answered once");
            }
            prop_assert_eq!(pings.waiters.len(), waiting.len());
            check_books(&pings)?;
        }
        prop_assert_eq!(pings.set_peers(now, &NetworkMap::default()).len(), waiting.len());
        prop_assert!(pings.outstanding.is_empty() && pings.quick.is_empty() && pings.queue.is_empty());
    }
}

/// What is outstanding is exactly what the rounds hold, and each agent is scheduled at most once.
fn check_books<W>(pings: &Pings<W>) -> Result<(), TestCaseError> {
    let rounds = pings.agents.iter().filter_map(|(id, agent)| Some((id, agent.round.as_ref()?)));
    let held: BTreeSet<_> =
        rounds.clone().flat_map(|(id, round)| round.pings.iter().map(|it| (*it, *id))).collect();
    let outstanding: BTreeSet<_> = pings.outstanding.iter().map(|(txid, sent)| (*txid, sent.agent)).collect();
    prop_assert_eq!(held, outstanding);
    for (id, round) in rounds {
        // Five quick pings, a tick, and one each quarter of a second for those who ask.
        prop_assert!(round.pings.len() <= 48, "{} pings in one round", round.pings.len());
        prop_assert_eq!(round.pings.is_empty(), round.last_sent.is_none());
        prop_assert!(pings.quick.iter().filter(|(_, it)| it == id).count() <= 1);
    }
    let planned: BTreeSet<_> =
        pings.agents.iter().filter_map(|(id, agent)| Some((agent.round.as_ref()?.quick?.due, *id))).collect();
    prop_assert!(pings.quick.is_subset(&planned));
    prop_assert!(pings.queue.iter().all(|id| pings.agents.contains_key(id)));
    Ok(())
}

#[derive(Debug, Clone)]
enum Action {
    Peers(Vec<(u128, u8)>),
    PathUp,
    PingNow(u128, u32),
    Unsent(usize),
    Pong(usize, bool),
    Pass(u32),
}

fn any_action() -> impl Strategy<Value = Action> {
    prop_oneof![
        2 => proptest::collection::vec((0_u128..6, 1_u8..3), 0..6).prop_map(Action::Peers),
        1 => Just(Action::PathUp),
        3 => (0_u128..6, 0_u32..8000).prop_map(|(agent, ms)| Action::PingNow(agent, ms)),
        2 => (0_usize..20).prop_map(Action::Unsent),
        6 => (0_usize..20, any::<bool>()).prop_map(|(pick, is_from_peer)| Action::Pong(pick, is_from_peer)),
        6 => (0_u32..400).prop_map(Action::Pass),
        2 => (0_u32..9000).prop_map(Action::Pass),
    ]
}

/// One of the pings sent lately.
fn picked(sent: &[Ping], pick: usize) -> Option<Ping> {
    sent.iter().rev().nth(pick).copied()
}

const NOBODY: [char; 0] = [];

const MS: Duration = Duration::from_millis(1);

fn with_peers(now: Instant, count: u128) -> Pings<char> {
    let mut pings = Pings::new(now);
    let map = NetworkMap { peers: (0..count).map(|number| (id(number), peer(number_key(number)))).collect() };
    assert!(pings.set_peers(now, &map).is_empty());
    pings
}

/// Programs exactly these agents, each with a key.
fn set_peers(pings: &mut Pings<char>, now: Instant, peers: &[(u128, u8)]) -> Vec<char> {
    pings.set_peers(now, &map_of(peers))
}

fn map_of(peers: &[(u128, u8)]) -> NetworkMap {
    NetworkMap { peers: peers.iter().map(|(number, of)| (id(*number), peer(key(*of)))).collect() }
}

fn peer(node_key: NodePublic) -> Peer {
    Peer {
        node_key,
        disco_key: DiscoPublic([1; 32]),
        home: RegionId(1),
        addresses: Vec::new(),
        keepalive: true,
        endpoints: Vec::new(),
        announcements: 1,
    }
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn key(of: u8) -> NodePublic {
    NodePublic([of; 32])
}

fn number_key(number: u128) -> NodePublic {
    NodePublic(std::array::from_fn(|at| number.to_be_bytes()[at % 16]))
}

fn sent(pings: &mut Pings<char>, now: Instant) -> Vec<Ping> {
    pings.handle_timeout(now, txid).pings
}

fn answer(pings: &mut Pings<char>, ping: &Ping, now: Instant) -> Answer<char> {
    pings.handle_pong(&ping.txid, &ping.peer, now).expect("an answer that is waited for")
}

fn txid() -> TxId {
    warren_proto::key::random()
}
