//! When there is a session again, where there was no way for one.

use std::time::Duration;

use super::{
    ALL_MAKES, BACK_AFTER, Change, PAIRS, SECOND, Story,
    engine::Make,
    everything_comes_after, happen,
    peer::PeerId,
    relay::Relay,
    world::{READY_AFTER, RELAY_DELAY, World},
};

/// A handshake is repeated after 5 s; then it takes a tick, and a round trip or two.
const REPEATED_AFTER: Duration = Duration::from_millis(5500);
/// A handshake that begins at once takes the ways there, back, and there again.
const AT_ONCE: Duration = Duration::from_millis(100);

/// Two that never had a way to each other, since the link of one to the relay was down for so long.
fn apart(makes: [Make; 2], down: PeerId, span: Duration) -> World {
    let mut world = Story::quiet(makes, [None; 2]).begin();
    happen(&mut world, &Change::Cut { site: 0, out: true, r#in: true });
    world.set_relay(down, Relay::Refuses);
    world.run(span);
    assert_eq!(sessions(&world), 0, "there is no way for one");
    world
}

/// How many ends have one.
fn sessions(world: &World) -> usize {
    PAIRS.into_iter().filter(|(from, to)| world.peers[from.0].others[to].tunnel.has_session()).count()
}

/// Conforms: data:20.2.1
#[test]
fn by_the_relay_a_handshake_is_sent_at_ready_and_done_a_round_trip_later() {
    for makes in ALL_MAKES {
        let mut world = Story { talk: [None; 2], ..Story::quiet(makes, [None; 2]) }.begin();
        happen(&mut world, &Change::Cut { site: 0, out: true, r#in: true });
        world.run(READY_AFTER);
        assert_eq!(sessions(&world), 0);
        // There and back, and the keepalive that confirms it.
        world.run(3 * RELAY_DELAY);
        assert_eq!(sessions(&world), 2, "{makes:?}");
    }
}

/// The second span is one after which a handshake was given up, and begun again for what is sent.
#[test]
fn once_the_relay_is_back_there_is_a_session_at_once_if_it_was_our_link_and_else_when_the_handshake_is_repeated()
 {
    for makes in ALL_MAKES {
        for (down, span) in [0, 1].into_iter().flat_map(|down| [(down, 22 * SECOND), (down, 130 * SECOND)]) {
            let mut world = apart(makes, PeerId(down), span);
            world.set_relay(PeerId(down), Relay::Answers);
            let is_back = (0..BACK_AFTER.as_millis()).any(|_| {
                world.run(Duration::from_millis(1));
                world.peers[down].relay.is_up()
            });
            assert!(is_back);
            let bound = if makes[down] == Make::Ours { AT_ONCE } else { REPEATED_AFTER };
            everything_comes_after(&mut world, bound, 20 * SECOND);
            assert_eq!(sessions(&world), 2, "{makes:?}, {down} was apart");
        }
    }
}
