use std::{
    collections::BTreeMap,
    net::Ipv6Addr,
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::sync::Notify;
use uuid::Uuid;
use warren_core::{
    relay_map::RegionId,
    roster::{AgentEntry, Snapshot, WorkspaceEntry},
};
use warren_proto::{
    frame::{self, Decoder, MAX_FRAME},
    header::Role,
    key::NodePublic,
    vpn::{ManagerMessage, Rpc, TunnelMessage},
};

use super::*;
use crate::{
    data_plane::{DataPlane, DataPlaneConfig, Events, LinkChange, Pong},
    dial::{DialOptions, Dialer},
    facts::{Addresses, Identity, InterfaceConfig, LinkState},
    runtime::{Running, ears::ears, starter},
    speaker::{CallError, End, SendError, Speaker},
};

mod limits;

const MANAGER_LINE: &[u8] = b"codervpn manager 1.3\n";
const UP: LinkState = LinkState::Up { since: SystemTime::UNIX_EPOCH };
const DESCRIPTOR: i32 = 9;
/// Longer than any limit of the session.
const PATIENCE: Duration = Duration::from_secs(90);

mod starting {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_start_is_answered_when_the_link_is_up_and_not_before() {
        let mut rig = Rig::new().await;
        rig.send(1, start(0)).await;
        let net = rig.net().await;
        rig.expect_silence().await;
        net.link.claim().unwrap().set(UP);
        assert_eq!(rig.frame().await, answer(1, started()));
        assert!(matches!(rig.phase().await, Phase::Running { .. }));
    }

    /// Conforms: vpn:T8
    #[tokio::test(start_paused = true)]
    async fn a_manager_that_owns_the_network_is_asked_and_must_agree_first() {
        let mut rig = Rig::new().await;
        rig.send(1, start(DESCRIPTOR)).await;
        let net = rig.net().await;
        net.link.claim().unwrap().set(UP);
        net.interface.claim().unwrap().set(Some(interface(1280)));
        let (id, request) = rig.settings_request().await;
        assert_eq!((id, request.mtu), (1, 1280));
        assert_eq!(request.ipv6_settings.unwrap().included_routes[0].prefix_length, 48);
        rig.expect_silence().await;
        rig.respond(id, agreed()).await;
        assert_eq!(rig.frame().await, answer(1, started()));
        assert_eq!(net.host.get().applied, Some(interface(1280)));
    }

    /// Conforms: vpn:15.8
    #[tokio::test(start_paused = true)]
    async fn settings_that_the_manager_refuses_fail_the_start() {
        for (reply, error) in [
            (refused("nein"), "network settings failed: nein"),
            (
                manager_message::Msg::Wake(vpn::WakeRequest {}),
                "network settings failed: the manager gave an answer of another kind",
            ),
        ] {
            let mut rig = Rig::new().await;
            rig.send(1, start(DESCRIPTOR)).await;
            let net = rig.net().await;
            net.link.claim().unwrap().set(UP);
            net.interface.claim().unwrap().set(Some(interface(1280)));
            let (id, _) = rig.settings_request().await;
            rig.respond(id, reply).await;
            assert_eq!(rig.frame().await, answer(1, not_started(error)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_bad_start_is_refused_at_once_and_leaves_the_session_idle() {
        let mut rig = Rig::new().await;
        rig.send(1, manager_message::Msg::Start(vpn::StartRequest::default())).await;
        assert_eq!(rig.frame().await, answer(1, not_started("missing coder url")));
        rig.send(2, wake()).await;
        assert_eq!(rig.frame().await, answer(2, woken()));
        assert_eq!(rig.phase().await, Phase::Idle);
        assert!(rig.deps.boot.get().is_none());
    }

    /// Conforms: vpn:15.3
    #[tokio::test(start_paused = true)]
    async fn a_second_start_is_refused_and_does_not_disturb_the_first() {
        let mut rig = Rig::started().await;
        rig.send(2, start(0)).await;
        assert_eq!(rig.frame().await, answer(2, not_started("tunnel is already running")));
        assert!(rig.deps.boot.get().is_some());
        assert!(matches!(rig.phase().await, Phase::Running { .. }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_start_leaves_nothing_and_can_be_tried_again() {
        let mut rig = Rig::new().await;
        rig.send(1, start(0)).await;
        let net = rig.net().await;
        net.link.claim().unwrap().set(LinkState::Refused { error: "log in again".into() });
        assert_eq!(rig.frame().await, answer(1, not_started("failed to start connection: log in again")));
        assert!(rig.deps.boot.get().is_none() && rig.deps.net.get().is_none());

        rig.send(2, start(0)).await;
        let net = rig.net().await;
        assert_eq!(net.boot.generation, 2);
        net.link.claim().unwrap().set(UP);
        assert_eq!(rig.frame().await, answer(2, started()));
    }

    /// Conforms: vpn:15.4 vpn:15.30
    #[tokio::test(start_paused = true)]
    async fn a_start_without_success_tells_at_its_deadline_what_it_waited_for() {
        let mut rig = Rig::new().await;
        let begun = Instant::now();
        rig.send(1, start(0)).await;
        let waiting =
            LinkState::Waiting { error: "no route to host".into(), retry_in: Duration::from_secs(1) };
        rig.net().await.link.claim().unwrap().set(waiting);
        let error = "failed to start connection: no success within 30s: no route to host";
        assert_eq!(rig.frame().await, answer(1, not_started(error)));
        assert!(begun.elapsed() >= START_LIMIT);
    }

    /// Conforms: vpn:15.4
    #[tokio::test(start_paused = true)]
    async fn a_start_is_answered_even_if_nothing_is_ever_built() {
        let mut rig = Rig::without_root().await;
        rig.send(1, start(0)).await;
        let vpn::StartResponse { success, error_message } = rig.start_response(1).await;
        assert!(!success && error_message.contains("did not come up"), "{error_message}");
    }
}

mod stopping {
    use super::*;

    /// Conforms: vpn:D3 vpn:D6
    #[tokio::test(start_paused = true)]
    async fn a_stop_is_valid_before_any_start_and_its_answer_is_the_last_frame() {
        let mut rig = Rig::new().await;
        rig.send(1, stop()).await;
        assert_eq!(rig.frame().await, answer(1, stopped()));
        rig.expect_end().await;
        assert_eq!(rig.deps.stream.ended().await, Ended::Stopped);

        // Nothing that comes later is sent, or waits.
        rig.deps.logs.push(vpn::log::Level::Info, &["vpn"], "late", &[]);
        assert!(!rig.deps.logs.is_open());
        let speaker = rig.deps.stream.speaker();
        let update = tunnel_message::Msg::PeerUpdate(vpn::PeerUpdate::default());
        let late = speaker.notify(TunnelMessage { rpc: None, msg: Some(update) }).await;
        assert_eq!(late, Err(SendError::Ended(End::Closed)));
        let settings = tunnel_message::Msg::NetworkSettings(vpn::NetworkSettingsRequest::default());
        let late = speaker.request(TunnelMessage { rpc: None, msg: Some(settings) }, PATIENCE).await;
        assert_eq!(late, Err(CallError::Ended(End::Closed)));
        assert!(rig.deps.boot.get().is_none() && rig.deps.net.get().is_none());
    }

    /// Conforms: vpn:T2 vpn:D4
    #[tokio::test(start_paused = true)]
    async fn a_stop_is_answered_when_the_net_is_gone() {
        let mut rig = Rig::started().await;
        rig.send(2, stop()).await;
        assert_eq!(rig.frame().await, answer(2, stopped()));
        assert!(rig.deps.boot.get().is_none() && rig.deps.net.get().is_none());
        rig.expect_end().await;
        // What the session runs in is still there.
        assert!(matches!(rig.phase().await, Phase::Stopping { .. }));
    }

    /// Conforms: vpn:D5 vpn:D1 vpn:15.7
    #[tokio::test(start_paused = true)]
    async fn a_stop_releases_everyone_who_waits_for_the_manager_to_read() {
        let mut rig = Rig::agreed().await;
        let net = rig.net().await;
        let (peers, wanted) = (net.peers.claim().unwrap(), net.interface.claim().unwrap());
        // An update, a log line and a request, each behind a pipe that is full, and more behind those.
        for round in 0..3 {
            peers.set(snapshot(400, &format!("round {round}")));
            for _ in 0..50 {
                rig.deps.logs.push(vpn::log::Level::Info, &["vpn"], &"x".repeat(1000), &[]);
            }
            wanted.set(Some(interface(1400 + round)));
            settle().await;
        }
        let begun = Instant::now();
        rig.send(2, stop()).await;
        // The net ends whether or not the manager reads.
        rig.deps.net.view().wait_for(Option::is_none).await;
        assert!(begun.elapsed() < STOP_LIMIT);

        let mut last = None;
        while let Some(message) = rig.next().await {
            last = Some(message);
        }
        assert_eq!(last, Some(answer(2, stopped())));
        assert!(begun.elapsed() < STOP_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_net_that_does_not_end_delays_a_stop_by_its_limit_only() {
        let mut rig = Rig::started_with(Root::NeverEnds).await;
        let begun = Instant::now();
        rig.send(2, stop()).await;
        let answer = rig.frame().await;
        let Some(tunnel_message::Msg::Stop(stop)) = answer.msg else { panic!("{answer:?}") };
        assert!(
            !stop.success && stop.error_message.contains("did not end within 3s"),
            "{}",
            stop.error_message
        );
        assert!(begun.elapsed() < STOP_LIMIT + Duration::from_secs(1));
        rig.expect_end().await;
    }

    /// Conforms: vpn:15.4
    #[tokio::test(start_paused = true)]
    async fn a_stop_cancels_a_start_and_both_are_answered() {
        let mut rig = Rig::new().await;
        let begun = Instant::now();
        rig.send(1, start(0)).await;
        rig.net().await;
        rig.send(2, stop()).await;
        assert_eq!(rig.frame().await, answer(1, not_started("the start was cancelled by a stop")));
        assert_eq!(rig.frame().await, answer(2, stopped()));
        assert!(begun.elapsed() < STOP_LIMIT);
        rig.expect_end().await;
    }

    /// Conforms: vpn:15.34 vpn:D2
    #[tokio::test(start_paused = true)]
    async fn a_stop_abandons_a_settings_request_that_nobody_answers() {
        let mut rig = Rig::new().await;
        rig.send(1, start(DESCRIPTOR)).await;
        rig.net().await.interface.claim().unwrap().set(Some(interface(1280)));
        rig.settings_request().await;
        rig.send(2, stop()).await;
        assert!(!rig.start_response(1).await.success);
        assert_eq!(rig.frame().await, answer(2, stopped()));
        rig.expect_end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_asked_before_a_stop_is_answered_and_what_comes_behind_it_is_not() {
        let mut rig = Rig::started().await;
        let requests = [
            request(2, manager_message::Msg::GetPeerUpdate(vpn::GetPeerUpdate {})),
            request(3, stop()),
            request(4, wake()),
            request(5, stop()),
        ];
        rig.write(&requests.concat()).await;
        assert_eq!(rig.frame().await.rpc, Some(Rpc::response(2)));
        assert_eq!(rig.frame().await, answer(3, stopped()));
        rig.expect_end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_is_answered_behind_a_manager_that_did_not_read_for_a_while() {
        let mut rig = Rig::started().await;
        let peers = rig.net().await.peers.claim().unwrap();
        peers.set(snapshot(400, "a"));
        rig.send(2, stop()).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let update = rig.peer_update(None).await;
        assert_eq!(update.upserted_agents.len(), 400);
        assert_eq!(rig.frame().await, answer(2, stopped()));
        rig.expect_end().await;
    }
}

mod peers {
    use super::*;

    /// Conforms: vpn:16.2.6
    #[tokio::test(start_paused = true)]
    async fn a_manager_that_does_not_read_for_a_minute_piles_up_no_more_than_one_state_and_the_log() {
        let mut rig = Rig::agreed().await;
        let peers = rig.net().await.peers.claim().unwrap();
        for round in 0..70 {
            peers.set(snapshot(300, &format!("round {round}")));
            for line in 0..100 {
                rig.deps.logs.push(vpn::log::Level::Info, &["vpn"], &format!("{round}: {line}"), &[]);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }

        let (mut updates, mut lines, mut lost, mut names) = (0, 0, 0, BTreeMap::new());
        while let Ok(message) = tokio::time::timeout(Duration::from_secs(2), rig.next()).await {
            match message.unwrap().msg.unwrap() {
                tunnel_message::Msg::PeerUpdate(update) => {
                    updates += 1;
                    names.extend(update.upserted_agents.into_iter().map(|agent| (agent.id, agent.name)));
                }
                tunnel_message::Msg::Log(line) => {
                    lines += 1;
                    lost += line.fields.iter().filter_map(|it| it.value.parse::<u64>().ok()).sum::<u64>();
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(updates <= 3, "{updates} updates waited");
        assert!(lines <= 1100, "{lines} lines waited");
        assert!(lost >= 7000 - 1100, "{lost}");
        assert_eq!(names.len(), 300);
        assert!(names.values().all(|name| name == "round 69"));
    }

    /// Conforms: vpn:15.2
    #[tokio::test(start_paused = true)]
    async fn a_question_for_peers_is_always_answered() {
        let mut rig = Rig::new().await;
        rig.send(1, peers_wanted()).await;
        assert_eq!(rig.peer_update(Some(1)).await, vpn::PeerUpdate::default());

        let mut rig = Rig::started().await;
        rig.net().await.peers.claim().unwrap().set(snapshot(2, "a"));
        assert_eq!(rig.peer_update(None).await.upserted_agents.len(), 2);
        rig.send(2, peers_wanted()).await;
        let everything = rig.peer_update(Some(2)).await;
        assert_eq!((everything.upserted_workspaces.len(), everything.upserted_agents.len()), (1, 2));
    }

    /// Conforms: vpn:T6
    #[tokio::test(start_paused = true)]
    async fn only_differences_are_told_and_never_nothing() {
        let mut rig = Rig::started().await;
        let peers = rig.net().await.peers.claim().unwrap();
        peers.set(snapshot(3, "a"));
        assert_eq!(rig.peer_update(None).await.upserted_agents.len(), 3);
        peers.set(snapshot(3, "a"));
        rig.expect_silence().await;

        let mut next = snapshot(3, "a");
        let (gone, _) = next.agents.pop_first().unwrap();
        next.agents.first_entry().unwrap().get_mut().name = "renamed".into();
        peers.set(next);
        let update = rig.peer_update(None).await;
        assert_eq!((update.upserted_agents.len(), update.upserted_workspaces.len()), (1, 0));
        assert_eq!(update.deleted_agents[0].id, gone.as_bytes().as_slice());
    }

    #[tokio::test(start_paused = true)]
    async fn a_manager_that_reads_slowly_gets_fewer_updates_that_add_up() {
        let mut rig = Rig::started().await;
        let peers = rig.net().await.peers.claim().unwrap();
        for round in 0..50 {
            peers.set(snapshot(300, &format!("round {round}")));
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let mut names = BTreeMap::new();
        let mut updates = 0;
        while names.values().any(|name| name != "round 49") || names.is_empty() {
            for agent in rig.peer_update(None).await.upserted_agents {
                names.insert(agent.id, agent.name);
            }
            updates += 1;
        }
        assert!(updates <= 3, "{updates} updates");
        rig.expect_silence().await;
    }

    /// An answer told of it, then nothing could be sent for a while, and then it was gone: no difference to
    /// what was told before ever took it away.
    #[tokio::test(start_paused = true)]
    async fn what_only_an_answer_told_of_is_taken_away_again() {
        let (mut rig, mut shown) = (Rig::started().await, BTreeMap::new());
        let peers = rig.net().await.peers.claim().unwrap();
        let wide = "wide".repeat(200);
        peers.set(snapshot(8, &wide));
        assert!(read(&mut rig, &mut shown, 100).await);
        peers.set(snapshot(9, &wide));
        for id in 2..40 {
            rig.send(id, peers_wanted()).await;
        }
        settle().await;
        peers.set(snapshot(8, &wide));
        while read(&mut rig, &mut shown, 2_000).await {}
        assert_eq!(shown.len(), 8);
    }

    /// What happens to the table, to the session, and to a manager that reads when it likes.
    #[derive(Debug, Clone)]
    enum Turn {
        /// These agents are there, so called.
        Present(u8, u8),
        Read(usize),
        /// The manager asks so often for everything.
        Ask(u64),
        Crash,
        Wait(u64),
    }

    fn turn() -> impl Strategy<Value = Turn> {
        prop_oneof![
            6 => (any::<u8>(), 0_u8..3).prop_map(|(who, name)| Turn::Present(who, name)),
            3 => (1_usize..4).prop_map(Turn::Read),
            2 => prop_oneof![Just(1), 1..30_u64].prop_map(Turn::Ask),
            1 => Just(Turn::Crash),
            2 => (0_u64..200).prop_map(Turn::Wait),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn at_any_pace_what_the_manager_reads_adds_up_to_the_table(
            turns in proptest::collection::vec(turn(), 1..40),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
            runtime.unwrap().block_on(play(&turns));
        }
    }

    async fn play(turns: &[Turn]) {
        let mut rig = Rig::started().await;
        let peers = rig.net().await.peers.claim().unwrap();
        let (mut present, mut shown) = (Snapshot::default(), BTreeMap::new());
        let mut asked = 1;
        for turn in turns {
            match turn {
                Turn::Present(who, name) => {
                    present = snapshot(8, &"wide".repeat(100 + usize::from(*name)));
                    present.agents.retain(|id, _| who >> (id.as_u128() - 1) & 1 == 1);
                    peers.set(present.clone());
                }
                Turn::Read(frames) => {
                    for _ in 0..*frames {
                        read(&mut rig, &mut shown, 100).await;
                    }
                }
                Turn::Ask(times) => {
                    for _ in 0..*times {
                        asked += 1;
                        rig.send(asked, peers_wanted()).await;
                    }
                }
                Turn::Crash => rig.crash().await,
                Turn::Wait(millis) => tokio::time::sleep(Duration::from_millis(*millis)).await,
            }
        }
        while read(&mut rig, &mut shown, 2_000).await {}
        let present: BTreeMap<_, _> =
            present.agents.iter().map(|(id, agent)| (id.as_bytes().to_vec(), agent.name.clone())).collect();
        assert!(shown == present, "{:?} are shown, {:?} are there", shown.keys(), present.keys());
    }

    /// Reads a message if there is one in time, and shows what it says.
    async fn read(rig: &mut Rig, shown: &mut BTreeMap<Vec<u8>, String>, millis: u64) -> bool {
        let within = Duration::from_millis(millis);
        let Ok(message) = tokio::time::timeout(within, rig.next()).await else { return false };
        let Some(tunnel_message::Msg::PeerUpdate(update)) = message.unwrap().msg else { return true };
        update.deleted_agents.iter().for_each(|gone| drop(shown.remove(gone.id.as_ref())));
        shown.extend(update.upserted_agents.into_iter().map(|agent| (agent.id.to_vec(), agent.name)));
        true
    }
}

mod waking {
    use super::*;

    /// Conforms: vpn:T3
    #[tokio::test(start_paused = true)]
    async fn every_wake_is_answered_and_passed_on_once_there_is_a_network() {
        let mut rig = Rig::new().await;
        rig.send(1, wake()).await;
        assert_eq!(rig.frame().await, answer(1, woken()));

        rig.start_up(2).await;
        let mut heard = ears(&rig.net().await.coordinator).await;
        for id in [3, 4] {
            rig.send(id, wake()).await;
            assert_eq!(rig.frame().await, answer(id, woken()));
            settle().await;
            let wake = heard.try_recv();
            assert!(matches!(wake, Ok(coordinator::Message::Wake(coordinator::Cause::Manager))), "wake {id}");
        }
    }
}

mod settings_requests {
    use super::*;

    /// Conforms: vpn:15.13
    #[tokio::test(start_paused = true)]
    async fn what_was_acknowledged_is_not_asked_for_again() {
        let mut rig = Rig::new().await;
        rig.send(1, start(DESCRIPTOR)).await;
        let net = rig.net().await;
        net.link.claim().unwrap().set(UP);
        let wanted = net.interface.claim().unwrap();
        wanted.set(Some(interface(1280)));
        let (id, _) = rig.settings_request().await;
        rig.respond(id, agreed()).await;
        assert!(rig.start_response(1).await.success);

        wanted.set(Some(interface(1280)));
        rig.expect_silence().await;
        wanted.set(Some(interface(1400)));
        let (id, request) = rig.settings_request().await;
        assert_eq!((id, request.mtu), (2, 1400));
        rig.respond(id, refused("later")).await;
        settle().await;
        assert_eq!(net.host.get().error.as_deref(), Some("network settings failed: later"));
        assert_eq!(net.host.get().applied, Some(interface(1280)));

        // After a failure nobody knows what is in force, so even the last acknowledged is asked for.
        wanted.set(Some(interface(1280)));
        let (id, _) = rig.settings_request().await;
        rig.respond(id, agreed()).await;
        settle().await;
        assert_eq!(*net.host.get(), HostState { applied: Some(interface(1280)), error: None });
    }

    /// Conforms: vpn:15.5
    #[tokio::test(start_paused = true)]
    async fn a_start_that_takes_its_time_delays_neither_requests_behind_it_nor_responses() {
        let mut rig = Rig::new().await;
        rig.send(1, start(DESCRIPTOR)).await;
        let net = rig.net().await;
        net.interface.claim().unwrap().set(Some(interface(1280)));
        let (asked, _) = rig.settings_request().await;
        rig.send(2, wake()).await;
        rig.send(3, peers_wanted()).await;
        rig.respond(asked, agreed()).await;
        settle().await;
        assert_eq!(net.host.get().applied, Some(interface(1280)));
        let mut answered = [rig.frame().await, rig.frame().await].map(|it| it.rpc.unwrap().response_to);
        answered.sort_unstable();
        assert_eq!(answered, [2, 3]);
        net.link.claim().unwrap().set(UP);
        assert_eq!(rig.frame().await, answer(1, started()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_manager_that_gave_no_descriptor_is_never_asked() {
        let mut rig = Rig::started().await;
        rig.net().await.interface.claim().unwrap().set(Some(interface(1280)));
        rig.expect_silence().await;
    }
}

mod crashing {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_start_that_waits_for_its_answer_survives_a_crash() {
        let mut rig = Rig::new().await;
        rig.send(1, start(0)).await;
        let net = rig.net().await;
        rig.crash().await;
        rig.expect_silence().await;
        assert_eq!(rig.net().await.boot.generation, 1);
        net.link.claim().unwrap().set(UP);
        assert_eq!(rig.frame().await, answer(1, started()));
        rig.expect_silence().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_that_has_its_answer_is_not_answered_again() {
        let mut rig = Rig::started().await;
        rig.crash().await;
        rig.send(2, start(0)).await;
        assert_eq!(rig.frame().await, answer(2, not_started("tunnel is already running")));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_come_while_no_session_runs_are_answered_by_the_next() {
        let mut rig = Rig::new().await;
        rig.kill().await;
        rig.send(1, wake()).await;
        rig.send(2, peers_wanted()).await;
        rig.expect_silence().await;
        rig.spawn().await;
        let mut ids = [rig.frame().await.rpc, rig.frame().await.rpc].map(|rpc| rpc.unwrap().response_to);
        ids.sort_unstable();
        assert_eq!(ids, [1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn peers_that_were_told_are_not_told_again() {
        let mut rig = Rig::started().await;
        let peers = rig.net().await.peers.claim().unwrap();
        peers.set(snapshot(3, "a"));
        assert_eq!(rig.peer_update(None).await.upserted_agents.len(), 3);
        rig.kill().await;
        let mut next = snapshot(4, "a");
        next.agents.pop_first();
        peers.set(next);
        rig.spawn().await;
        let update = rig.peer_update(None).await;
        assert_eq!((update.upserted_agents.len(), update.deleted_agents.len()), (1, 1));
        rig.expect_silence().await;
    }

    #[tokio::test(start_paused = true)]
    async fn acknowledged_settings_are_not_asked_for_again_and_unanswered_ones_are() {
        let mut rig = Rig::new().await;
        rig.send(1, start(DESCRIPTOR)).await;
        let net = rig.net().await;
        net.link.claim().unwrap().set(UP);
        let wanted = net.interface.claim().unwrap();
        wanted.set(Some(interface(1280)));
        rig.settings_request().await;
        rig.crash().await;
        let (id, _) = rig.settings_request().await;
        rig.respond(id, agreed()).await;
        assert!(rig.start_response(1).await.success);
        rig.crash().await;
        rig.expect_silence().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_that_keeps_crashing_the_session_is_refused() {
        let mut rig = Rig::new().await;
        rig.send(1, start(0)).await;
        rig.net().await;
        for _ in 0..2 {
            rig.crash().await;
        }
        let response = rig.start_response(1).await;
        assert!(response.error_message.contains("repeatedly"), "{}", response.error_message);
        rig.start_up(2).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_from_before_the_crash_is_answered_from_the_net_that_is_there() {
        let mut rig = Rig::started().await;
        rig.net().await.peers.claim().unwrap().set(snapshot(3, "a"));
        rig.peer_update(None).await;
        rig.kill().await;
        rig.send(2, peers_wanted()).await;
        rig.spawn().await;
        assert_eq!(rig.peer_update(Some(2)).await.upserted_agents.len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_that_cancels_a_start_answers_both_even_over_a_crash() {
        let mut rig = Rig::new().await;
        rig.send(1, start(0)).await;
        rig.net().await;
        // Nobody reads, so that neither answer is accepted before the crash.
        let filler = || vpn::TunnelMessage { rpc: None, msg: Some(woken()) };
        while rig.deps.stream.speaker().try_notify(filler()).is_ok() {
            tokio::task::yield_now().await;
        }
        rig.send(2, stop()).await;
        settle().await;
        rig.crash().await;
        let mut frames = Vec::new();
        while let Some(message) = rig.next().await {
            frames.extend(message.rpc.map(|_| message));
        }
        assert_eq!(
            frames,
            [answer(1, not_started("the start was cancelled by a stop")), answer(2, stopped())]
        );
    }

    /// On real threads, where the tasks of a dead session overlap with its successor.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_request_is_answered_exactly_once_however_often_the_session_crashes() {
        const REQUESTS: u64 = 400;
        let mut rig = Rig::new().await;
        let (manager, rest) = duplex(1);
        let (mut read, mut write) = split(std::mem::replace(&mut rig.manager, manager));
        drop(rest);
        let asking = tokio::spawn(async move {
            for id in 1..=REQUESTS {
                let msg = if id % 2 == 0 { wake() } else { peers_wanted() };
                write.write_all(&request(id, msg)).await.unwrap();
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            write
        });
        let answered = tokio::spawn(async move {
            let mut decoder = Decoder::new(MAX_FRAME);
            let (mut ids, mut piece) = (Vec::new(), [0; 512]);
            while ids.len() < REQUESTS as usize {
                let length = read.read(&mut piece).await.unwrap();
                assert_ne!(length, 0);
                decoder.extend(&piece[..length]);
                while let Some(message) = decoder.next::<TunnelMessage>().unwrap() {
                    ids.push(message.rpc.unwrap().response_to);
                }
            }
            ids
        });
        let begun = std::time::Instant::now();
        while !answered.is_finished() {
            assert!(begun.elapsed() < PATIENCE, "requests were lost");
            rig.kill().await;
            rig.spawn().await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let mut ids = answered.await.unwrap();
        ids.sort_unstable();
        let twice: Vec<_> = ids.windows(2).filter(|pair| pair[0] == pair[1]).collect();
        assert!(twice.is_empty(), "answered twice: {twice:?}");
        assert_eq!(ids.last(), Some(&REQUESTS));
        drop(asking.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_survives_a_crash() {
        let mut rig = Rig::started_with(Root::NeverEnds).await;
        rig.send(2, stop()).await;
        settle().await;
        rig.crash().await;
        assert_eq!(rig.frame().await.rpc, Some(Rpc::response(2)));
        rig.expect_end().await;
    }
}

mod the_stream {
    use super::*;

    /// Conforms: vpn:15.31
    #[tokio::test(start_paused = true)]
    async fn a_manager_that_goes_away_is_a_stop_without_an_answer() {
        let rig = Rig::started().await;
        drop(rig.manager);
        let ended = rig.deps.stream.ended().await;
        assert_eq!((ended.exit_code(), ended), (69, Ended::ManagerGone("unexpected EOF".into())));
        rig.deps.net.view().wait_for(Option::is_none).await;
        assert!(rig.deps.boot.get().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_bad_frame_ends_the_session_as_a_protocol_error() {
        let mut rig = Rig::started().await;
        rig.write(&[0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).await;
        rig.expect_end().await;
        assert_eq!(rig.deps.stream.ended().await.exit_code(), 76);
        rig.deps.net.view().wait_for(Option::is_none).await;
    }

    /// Conforms: vpn:15.9
    #[tokio::test(start_paused = true)]
    async fn what_is_no_known_request_gets_no_answer_and_does_no_harm() {
        let mut rig = Rig::new().await;
        let stray = ManagerMessage { rpc: Some(Rpc::default()), msg: Some(stop()) };
        let notification = ManagerMessage { rpc: None, msg: Some(stop()) };
        let bare = ManagerMessage { rpc: Some(Rpc::request(5)), msg: None };
        let late = ManagerMessage { rpc: Some(Rpc::response(77)), msg: Some(agreed()) };
        for message in [stray, notification, bare, late] {
            rig.write(&frame::encode(&message).unwrap()).await;
        }
        rig.write(&[0, 0, 0, 0]).await;
        rig.send(5, agreed()).await;
        rig.send(9, wake()).await;
        assert_eq!(rig.frame().await, answer(9, woken()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_id_that_is_used_twice_is_answered_twice() {
        let mut rig = Rig::new().await;
        rig.write(&[request(1, wake()), request(1, wake())].concat()).await;
        assert_eq!(rig.frame().await, answer(1, woken()));
        assert_eq!(rig.frame().await, answer(1, woken()));
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_manager_that_owns_the_network_is_sent_the_log() {
        let mut rig = Rig::started().await;
        rig.deps.logs.push(vpn::log::Level::Info, &["vpn"], "hello", &[]);
        rig.expect_silence().await;

        let mut rig = Rig::new().await;
        rig.send(1, start(DESCRIPTOR)).await;
        rig.net().await;
        rig.deps.logs.push(vpn::log::Level::Info, &["vpn"], "hello", &[("k", "v".into())]);
        let line = rig.frame().await;
        assert_eq!(line.rpc, None);
        let Some(tunnel_message::Msg::Log(line)) = line.msg else { panic!("{line:?}") };
        assert_eq!((line.level(), line.message.as_str()), (vpn::log::Level::Info, "hello"));
    }
}

/// What stands in for the root.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Root {
    /// Builds a net for each Boot and ends it with it.
    Follows,
    /// Builds a net and cannot end it.
    NeverEnds,
    /// Builds nothing.
    Sleeps,
}

/// A session, and a manager that speaks in bytes.
struct Rig {
    manager: DuplexStream,
    decoder: Decoder,
    deps: SessionDeps,
    address: Address<Message>,
    running: Option<Running>,
    supervisor: ActorRef<()>,
    buried: Arc<Notify>,
}

impl Rig {
    async fn new() -> Self {
        Self::with(Root::Follows).await
    }

    async fn without_root() -> Self {
        Self::with(Root::Sleeps).await
    }

    async fn started() -> Self {
        Self::started_with(Root::Follows).await
    }

    async fn started_with(root: Root) -> Self {
        let mut rig = Self::with(root).await;
        rig.start_up(1).await;
        rig
    }

    /// Started by a manager that owns the network and has agreed to its settings.
    async fn agreed() -> Self {
        let mut rig = Self::new().await;
        rig.send(1, start(DESCRIPTOR)).await;
        let net = rig.net().await;
        net.link.claim().unwrap().set(UP);
        net.interface.claim().unwrap().set(Some(interface(1280)));
        let (id, _) = rig.settings_request().await;
        rig.respond(id, agreed()).await;
        assert_eq!(rig.frame().await, answer(1, started()));
        rig
    }

    async fn with(root: Root) -> Self {
        let (ours, mut manager) = duplex(4096);
        manager.write_all(MANAGER_LINE).await.unwrap();
        let (read, write) = split(ours);
        let limit = Duration::from_secs(5);
        let (speaker, inbox) =
            Speaker::connect(read, write, Role::Tunnel, Role::Manager, limit).await.unwrap();
        manager.read_exact(&mut [0; "codervpn tunnel 1.3\n".len()]).await.unwrap();
        let deps = SessionDeps {
            stream: Arc::new(Stream::new(speaker, inbox)),
            boot: Cell::new(None),
            net: Cell::new(None),
            memory: Cell::new(Memory::default()),
            default_network: NetworkOwner::Nobody,
            logs: LogSink::default(),
        };
        if root != Root::Sleeps {
            tokio::spawn(reconcile(root, deps.clone()));
        }
        let buried = Arc::new(Notify::new());
        let (supervisor, _) = Actor::spawn(None, Undertaker(buried.clone()), ()).await.unwrap();
        let address = Address::new("session", 16);
        let decoder = Decoder::new(MAX_FRAME);
        let mut rig = Self { manager, decoder, deps, address, running: None, supervisor, buried };
        rig.spawn().await;
        rig
    }

    async fn spawn(&mut self) {
        let deps = self.deps.clone();
        let start = starter(self.address.clone(), move || Session::new(deps.clone()));
        self.running = Some(start(self.supervisor.get_cell()).await.unwrap());
    }

    /// As a crash: the state is gone, nothing was put in order.
    async fn kill(&mut self) {
        let running = self.running.take().unwrap();
        running.cell.kill();
        let _ = running.join.await;
        self.buried.notified().await;
    }

    async fn crash(&mut self) {
        self.kill().await;
        self.spawn().await;
        settle().await;
    }

    async fn start_up(&mut self, id: u64) {
        self.send(id, start(0)).await;
        self.net().await.link.claim().unwrap().set(UP);
        assert_eq!(self.frame().await, answer(id, started()));
    }

    async fn net(&self) -> Arc<Net> {
        let net = self.deps.net.view().wait_for(Option::is_some).await.unwrap();
        // The session has heard of it, too.
        settle().await;
        net.as_ref().clone().unwrap()
    }

    async fn phase(&self) -> Phase {
        self.address.ask(Duration::from_secs(1), Message::Phase).await.unwrap()
    }

    async fn write(&mut self, bytes: &[u8]) {
        self.manager.write_all(bytes).await.unwrap();
    }

    async fn send(&mut self, id: u64, msg: manager_message::Msg) {
        self.write(&request(id, msg)).await;
    }

    async fn respond(&mut self, id: u64, msg: manager_message::Msg) {
        let message = ManagerMessage { rpc: Some(Rpc::response(id)), msg: Some(msg) };
        self.write(&frame::encode(&message).unwrap()).await;
    }

    async fn frame(&mut self) -> TunnelMessage {
        let next = tokio::time::timeout(PATIENCE, self.next()).await.expect("a frame in time");
        next.expect("a frame, not the end")
    }

    async fn next(&mut self) -> Option<TunnelMessage> {
        let mut piece = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next().unwrap() {
                return Some(message);
            }
            let length = self.manager.read(&mut piece).await.unwrap();
            if length == 0 {
                assert!(self.decoder.is_between_frames());
                return None;
            }
            self.decoder.extend(&piece[..length]);
        }
    }

    async fn expect_end(&mut self) {
        assert_eq!(tokio::time::timeout(PATIENCE, self.next()).await.expect("the end in time"), None);
    }

    async fn expect_silence(&mut self) {
        let heard = tokio::time::timeout(Duration::from_secs(2), self.next()).await;
        assert!(heard.is_err(), "{heard:?}");
    }

    async fn start_response(&mut self, id: u64) -> vpn::StartResponse {
        let message = self.frame().await;
        assert_eq!(message.rpc, Some(Rpc::response(id)));
        let Some(tunnel_message::Msg::Start(response)) = message.msg else { panic!("{message:?}") };
        response
    }

    async fn settings_request(&mut self) -> (u64, vpn::NetworkSettingsRequest) {
        let message = self.frame().await;
        let Some(tunnel_message::Msg::NetworkSettings(request)) = message.msg else { panic!("{message:?}") };
        (message.rpc.unwrap().msg_id, request)
    }

    async fn peer_update(&mut self, response_to: Option<u64>) -> vpn::PeerUpdate {
        let message = self.frame().await;
        assert_eq!(message.rpc, response_to.map(Rpc::response));
        let Some(tunnel_message::Msg::PeerUpdate(update)) = message.msg else { panic!("{message:?}") };
        update
    }
}

/// Lets everything that can happen at once happen.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn reconcile(root: Root, deps: SessionDeps) {
    let (mut boots, nets) = (deps.boot.view(), deps.net.claim().unwrap());
    while let Some(boot) = boots.changed().await {
        match boot.as_ref() {
            Some(boot) => nets.set(Some(Arc::new(net(boot.clone())))),
            None if root == Root::NeverEnds => {}
            None => nets.set(None),
        }
    }
}

fn net(boot: Arc<Boot>) -> Net {
    let identity = Identity::generate();
    let data_plane = data_plane(&identity);
    Net::new(boot, identity, data_plane, Addresses::default())
}

fn data_plane(identity: &Identity) -> DataPlane {
    static DIALER: LazyLock<Arc<Dialer>> =
        LazyLock::new(|| Arc::new(Dialer::new(DialOptions::default()).unwrap()));
    DataPlane::start(DataPlaneConfig {
        node: identity.node.clone(),
        disco: identity.disco.clone(),
        address: identity.address,
        dialer: DIALER.clone(),
        events: Arc::new(Deaf),
        udp: None,
    })
    .unwrap()
}

/// Nothing happens on the data plane of these tests.
struct Deaf;

impl Events for Deaf {
    fn pong(&self, _: Pong) {}
    fn link_changed(&self, _: RegionId, _: LinkChange) {}
    fn handshake(&self, _: NodePublic) {}
}

/// A supervisor that lets its children die, and tells when one is wholly gone: its state rides in the event.
struct Undertaker(Arc<Notify>);

impl Actor for Undertaker {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<()>,
        event: SupervisionEvent,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        let is_end =
            matches!(event, SupervisionEvent::ActorTerminated(..) | SupervisionEvent::ActorFailed(..));
        drop(event);
        if is_end {
            self.0.notify_one();
        }
        Ok(())
    }
}

fn request(id: u64, msg: manager_message::Msg) -> Vec<u8> {
    let message = ManagerMessage { rpc: Some(Rpc::request(id)), msg: Some(msg) };
    frame::encode(&message).unwrap().to_vec()
}

fn answer(id: u64, msg: tunnel_message::Msg) -> TunnelMessage {
    TunnelMessage { rpc: Some(Rpc::response(id)), msg: Some(msg) }
}

fn start(descriptor: i32) -> manager_message::Msg {
    manager_message::Msg::Start(vpn::StartRequest {
        tunnel_file_descriptor: descriptor,
        coder_url: "https://coder.example.com".into(),
        api_token: "fakeToken".into(),
        ..vpn::StartRequest::default()
    })
}

fn stop() -> manager_message::Msg {
    manager_message::Msg::Stop(vpn::StopRequest {})
}

fn wake() -> manager_message::Msg {
    manager_message::Msg::Wake(vpn::WakeRequest {})
}

fn peers_wanted() -> manager_message::Msg {
    manager_message::Msg::GetPeerUpdate(vpn::GetPeerUpdate {})
}

fn agreed() -> manager_message::Msg {
    let answer = vpn::NetworkSettingsResponse { success: true, error_message: String::new() };
    manager_message::Msg::NetworkSettings(answer)
}

fn refused(why: &str) -> manager_message::Msg {
    let answer = vpn::NetworkSettingsResponse { success: false, error_message: why.into() };
    manager_message::Msg::NetworkSettings(answer)
}

fn started() -> tunnel_message::Msg {
    tunnel_message::Msg::Start(vpn::StartResponse { success: true, error_message: String::new() })
}

fn not_started(why: &str) -> tunnel_message::Msg {
    tunnel_message::Msg::Start(vpn::StartResponse { success: false, error_message: why.into() })
}

fn stopped() -> tunnel_message::Msg {
    tunnel_message::Msg::Stop(vpn::StopResponse { success: true, error_message: String::new() })
}

fn woken() -> tunnel_message::Msg {
    tunnel_message::Msg::Wake(vpn::WakeResponse {})
}

fn interface(mtu: u32) -> InterfaceConfig {
    let (address, prefix) = ("fd60:627a:a42b::7".parse().unwrap(), "fd60:627a:a42b::".parse().unwrap());
    InterfaceConfig { address, routes: vec![(prefix, 48)], mtu }
}

fn snapshot(agents: u128, name: &str) -> Snapshot {
    let workspace_id = Uuid::from_u128(0xa1);
    let agent = |index| {
        let entry = AgentEntry {
            name: name.into(),
            workspace_id,
            fqdn: vec!["w.coder.".into()],
            addresses: vec![Ipv6Addr::LOCALHOST],
            last_handshake: None,
            last_ping: None,
        };
        (Uuid::from_u128(index), entry)
    };
    Snapshot {
        workspaces: BTreeMap::from([(workspace_id, WorkspaceEntry { name: "w".into(), status: 3 })]),
        agents: (1..=agents).map(agent).collect(),
    }
}
