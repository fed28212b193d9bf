use std::time::Duration;

use ::http::{HeaderMap, HeaderValue, StatusCode, header::RETRY_AFTER};
use bytes::Bytes;
use ractor::{Actor, ActorRef};
use tokio::{
    io::duplex,
    sync::mpsc,
    time::{advance, sleep},
};
use uuid::Uuid;
use warren_core::relay_map::RegionId;
use warren_proto::{
    drpc::Kind,
    key::{DiscoPrivate, NodePrivate},
    tailnet::{
        Agent, CoordinateRequest, CoordinateResponse, DerpMap, Node, RefreshResumeTokenResponse, Workspace,
        WorkspaceUpdatesRequest,
        coordinate_response::{PeerUpdate, peer_update},
        derp_map,
    },
};

use super::{http::ApiError, upgrade::LIMITS, *};
use crate::{
    facts::{Boot, NetworkOwner},
    relay::tests::net,
    runtime::{
        Running, Tasks,
        ears::{Bystander, ears},
        starter,
    },
    websocket::byte_stream,
};

mod conversation;
pub(crate) mod deployment;

use deployment::{Call, Connection, Deployment};

const SOON: Duration = Duration::from_secs(20);
const TAILNET: &str = "/api/v2/tailnet";

mod connecting {
    use super::*;

    /// Conforms: vpn:C2 control:H2
    #[tokio::test]
    async fn a_connection_leads_from_the_introduction_to_a_programmed_peer() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        assert_eq!(connection.query, "version=2.3");
        let mut coordinate = connection.call("Coordinate").await;
        let _streams = answer(&mut connection, &[1, 2]).await;
        rig.link(|link| matches!(link, LinkState::Up { .. })).await;
        let map = rig.net.relay_map.get();
        let node = &map.regions[&RegionId(999)].nodes[0];
        let here = ("127.0.0.1", rig.deployment.url.port().unwrap(), true);
        assert_eq!((node.host_name.as_str(), node.derp_port, node.force_http), here);
        let workspaces = rig.net.workspaces.get();
        assert_eq!((workspaces.username.as_str(), workspaces.suffix.as_str()), ("alice", "coder"));
        assert!(workspaces.known);

        assert_eq!(asked(&mut coordinate).await, id(1));
        assert_eq!(asked(&mut coordinate).await, id(2));
        rig.net.home.claim().unwrap().set(Some(RegionId(999)));
        let own = coordinate.next::<CoordinateRequest>().await.unwrap().update_self.unwrap().node.unwrap();
        assert_eq!(own.preferred_derp, 999);

        coordinate.send(&about(1, peer_update::Kind::Node)).await;
        coordinate.send(&about(1, peer_update::Kind::ReadyForHandshake)).await;
        rig.programmed(1).await;
    }

    /// Conforms: vpn:C1 vpn:16.2.5 control:H1
    #[tokio::test]
    async fn forced_websockets_are_known_before_the_first_relay_map_and_reasons_found_are_told() {
        let rig = Rig::new().await;
        let info = r#"{"derp_force_websockets":true,"derp_map":{"Regions":{"5":{"RegionID":5}}}}"#;
        rig.deployment.refuse("/api/v2/workspaceagents/connection", "200 OK", info);
        let mut maps = rig.net.relay_map.view();
        let mut rig = rig.start().await;
        maps.wait_for(|map| !map.regions.is_empty()).await.unwrap();
        assert_eq!(*rig.net.upgrades.get(), Upgrades::WebSocketOnly);

        let mut connection = rig.deployment.connection().await;
        let mut coordinate = connection.call("Coordinate").await;
        rig.net.home.claim().unwrap().set(Some(RegionId(5)));
        let own = coordinate.next::<CoordinateRequest>().await.unwrap().update_self.unwrap().node.unwrap();
        assert!(own.derp_forced_websocket.is_empty());
        let reasons = [(RegionId(5), "no upgrade".to_owned())].into();
        rig.net.forced_websocket.claim().unwrap().set(reasons);
        let own = coordinate.next::<CoordinateRequest>().await.unwrap().update_self.unwrap().node.unwrap();
        assert_eq!(own.derp_forced_websocket, [(5, "no upgrade".to_owned())].into());
    }

    #[tokio::test]
    async fn every_request_carries_token_and_telemetry_and_the_introduction_is_made_once() {
        let mut rig = Rig::started().await;
        let connection = rig.deployment.connection().await;
        connection.cut();
        rig.deployment.connection().await;
        let paths = ["/api/v2/users/me", "/api/v2/workspaceagents/connection", TAILNET];
        for (path, times) in paths.into_iter().zip([1, 1, 2]) {
            let requests = rig.deployment.requests(path);
            assert_eq!(requests.len(), times, "{path}");
            for (_, head) in requests {
                let head = head.to_lowercase();
                let names = |name: &str| head.lines().filter(|line| line.starts_with(name)).count();
                assert_eq!(names("coder-session-token:"), 1, "{head}");
                assert_eq!(names("coder-desktop-telemetry:"), 1, "{head}");
                assert!(head.contains("coder-session-token: secret-token\r\n"), "{head}");
                assert!(head.contains("coder-desktop-telemetry: {\"device_id\":\"d\"}\r\n"), "{head}");
            }
        }
    }

    /// Conforms: control:H9
    #[tokio::test]
    async fn a_token_that_is_not_accepted_refuses_the_start_and_says_what_to_do() {
        let rig = Rig::new().await;
        let body = r#"{"message":"You are signed out or your session has expired."}"#;
        rig.deployment.refuse("/api/v2/users/me", "401 Unauthorized", body);
        let rig = rig.start().await;
        let LinkState::Refused { error } = rig.link(is_settled).await else { panic!("not refused") };
        assert!(error.contains("get user") && error.contains("warren login"), "{error}");
    }

    #[tokio::test]
    async fn a_deployment_in_trouble_is_waited_for_with_growing_pauses() {
        let rig = Rig::new().await;
        rig.deployment.refuse(TAILNET, "503 Service Unavailable", r#"{"message":"Not now."}"#);
        let mut rig = rig.start().await;
        let mut longest = Duration::ZERO;
        while longest < Duration::from_millis(200) {
            let waiting =
                |link: &LinkState| matches!(link, LinkState::Waiting { retry_in, .. } if *retry_in > longest);
            let LinkState::Waiting { error, retry_in } = rig.link(waiting).await else {
                panic!("not waiting")
            };
            assert!(error.contains("Not now") && error.contains("in trouble"), "{error}");
            longest = retry_in;
        }
        rig.deployment.allow(TAILNET);
        let mut connection = rig.deployment.connection().await;
        let _streams = answer(&mut connection, &[]).await;
        rig.link(|link| matches!(link, LinkState::Up { .. })).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_deployment_that_accepts_and_stays_silent_is_given_up_in_time() {
        for (has_map, owed) in [(false, "relay map"), (true, "list of workspaces")] {
            let mut wire = Wire::new().await;
            let mut maps = wire.connection.call("StreamDERPMaps").await;
            if has_map {
                maps.send(&DerpMap::default()).await;
            }
            let begun = Instant::now();
            let error = wire.ended().await;
            assert!(begun.elapsed() < Duration::from_secs(11));
            assert!(matches!(error, ControlError::Silent { .. }));
            assert!(error.to_string().contains(&format!("no {owed} within 10 seconds")), "{error}");
        }
    }
}

mod ending {
    use super::*;

    /// Conforms: control:L14
    #[tokio::test]
    async fn the_end_of_the_relay_maps_loses_all_peers_and_the_connection_is_made_anew() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        let mut coordinate = connection.call("Coordinate").await;
        let (mut maps, _updates) = answer(&mut connection, &[1]).await;
        assert_eq!(asked(&mut coordinate).await, id(1));
        coordinate.send(&about(1, peer_update::Kind::Node)).await;
        coordinate.send(&about(1, peer_update::Kind::ReadyForHandshake)).await;
        rig.programmed(1).await;

        maps.write(Kind::Close, &[]).await;
        let waiting = rig.link(|link| matches!(link, LinkState::Waiting { .. })).await;
        let LinkState::Waiting { error, .. } = waiting else { panic!("not waiting") };
        assert_eq!(error, "the deployment ended StreamDERPMaps");
        assert_eq!(coordinate.packet().await, None, "the deployment is not told that we leave");
        rig.loses_its_peer_and_asks_for_it_again().await;
    }

    #[tokio::test]
    async fn what_the_deployment_said_last_about_peers_is_told() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        let mut coordinate = connection.call("Coordinate").await;
        let error = "authorization:\tnot you".to_owned();
        coordinate.send(&CoordinateResponse { error, ..CoordinateResponse::default() }).await;
        coordinate.write(Kind::Close, &[]).await;
        let waiting = rig.link(|link| matches!(link, LinkState::Waiting { .. })).await;
        let LinkState::Waiting { error, .. } = waiting else { panic!("not waiting") };
        assert_eq!(error, "the deployment ended Coordinate: authorization: not you");
    }

    #[tokio::test]
    async fn a_deployment_that_echoes_our_tokens_does_not_get_them_shown() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        give_token(&mut connection, "resume-token").await;
        rig.remembers_a_token().await;
        let mut coordinate = connection.call("Coordinate").await;
        let error = "neither secret-token nor resume-token nor secret-".to_owned();
        coordinate.send(&CoordinateResponse { error, ..CoordinateResponse::default() }).await;
        coordinate.write(Kind::Close, &[]).await;
        let waiting = rig.link(|link| matches!(link, LinkState::Waiting { .. })).await;
        let LinkState::Waiting { error, .. } = waiting else { panic!("not waiting") };
        assert!(error.ends_with("neither [redacted] nor [redacted] nor [redacted]"), "{error}");
    }

    #[tokio::test]
    async fn an_update_that_can_never_be_applied_is_not_asked_for_over_and_over() {
        const DIALS: usize = 5;
        let mut rig = Rig::started().await;
        for _ in 0..DIALS {
            let mut connection = rig.deployment.connection().await;
            let mut bad = snapshot(&[1]);
            bad.upserted_workspaces.clear();
            let mut maps = connection.call("StreamDERPMaps").await;
            maps.send(&relay_map()).await;
            let mut updates = connection.call("WorkspaceUpdates").await;
            updates.send(&bad).await;
            assert_eq!(updates.next::<WorkspaceUpdatesRequest>().await.unwrap().workspace_owner_id.len(), 16);
            while updates.packet().await.is_some() {}
            let is_about_it = |link: &LinkState| matches!(link, LinkState::Waiting { error, .. } if error.contains("cannot be applied"));
            rig.link(is_about_it).await;
        }
        let requests = rig.deployment.requests(TAILNET);
        let (first, last) = (requests[0].0, requests[DIALS - 1].0);
        // 100, 162, 262 and 424 ms, each shortened by at most 30 %.
        assert!(last - first > Duration::from_millis(660), "{:?}", last - first);
    }

    /// Conforms: control:H6 control:H8
    #[tokio::test]
    async fn a_resume_token_is_shown_on_the_next_dial_and_dropped_when_it_is_rejected() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        assert_eq!(connection.query, "version=2.3");
        give_token(&mut connection, "a+b").await;
        rig.remembers_a_token().await;
        let body =
            r#"{"message":"Invalid resume token","validations":[{"field":"resume_token","detail":"x"}]}"#;
        rig.deployment.refuse(TAILNET, "401 Unauthorized", body);
        connection.cut();
        let is_rejected = |link: &LinkState| matches!(link, LinkState::Waiting { error, .. } if error.contains("tried again without"));
        let shown = format!("{:?}", rig.link(is_rejected).await);
        assert!(!shown.contains("a+b") && !shown.contains("a%2Bb"), "{shown}");
        rig.deployment.allow(TAILNET);
        let mut connection = rig.deployment.connection().await;
        assert_eq!(connection.query, "version=2.3");
        let (_, rejected) = &rig.deployment.requests(TAILNET)[1];
        assert!(
            rejected.starts_with("GET /api/v2/tailnet?resume_token=a%2Bb&version=2.3 HTTP"),
            "{rejected}"
        );
        give_token(&mut connection, "second").await;
        rig.remembers_a_token().await;
        connection.cut();
        assert_eq!(rig.deployment.connection().await.query, "resume_token=second&version=2.3");
    }

    /// Conforms: control:H7 control:L13
    #[tokio::test]
    async fn a_deployment_without_resume_tokens_is_none_the_worse() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        let error = warren_proto::drpc::ErrorBody { code: 12, text: "Unimplemented".to_owned() };
        connection.call("RefreshResumeToken").await.write(Kind::Error, &error.encode()).await;
        let _streams = answer(&mut connection, &[]).await;
        rig.link(|link| matches!(link, LinkState::Up { .. })).await;
        connection.cut();
        assert_eq!(rig.deployment.connection().await.query, "version=2.3");
    }
}

mod stopping {
    use super::*;

    #[tokio::test]
    async fn a_stop_says_that_we_leave_waits_for_the_end_of_the_call_and_closes_in_order() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        let mut coordinate = connection.call("Coordinate").await;
        let _streams = answer(&mut connection, &[1]).await;
        assert_eq!(asked(&mut coordinate).await, id(1));
        let stopping = tokio::spawn(rig.stop());
        let last = coordinate.next::<CoordinateRequest>().await.unwrap();
        assert!(last.disconnect.is_some() && last.update_self.is_none());
        assert!(!stopping.is_finished());
        coordinate.write(Kind::Close, &[]).await;
        assert_eq!(coordinate.packet().await.unwrap().kind, Kind::Close);
        assert_eq!(connection.closed().await, Some(1000));
        let net = stopping.await.unwrap();
        assert_eq!(*net.link.get(), LinkState::Connecting, "nobody says any more that it is up");
    }

    #[tokio::test(start_paused = true)]
    async fn a_deployment_that_does_not_end_the_call_is_waited_for_a_second() {
        let mut wire = Wire::new().await;
        let mut coordinate = wire.connection.call("Coordinate").await;
        let _streams = answer(&mut wire.connection, &[]).await;
        let begun = Instant::now();
        wire.shared.stop.cancel();
        assert!(coordinate.next::<CoordinateRequest>().await.unwrap().disconnect.is_some());
        wire.ended().await;
        assert!(begun.elapsed() >= Duration::from_secs(1) && begun.elapsed() < STOP_LIMIT);
        assert_eq!(wire.connection.closed().await, Some(1000));
    }

    #[tokio::test]
    async fn a_stop_while_nobody_is_connected_is_immediate() {
        let rig = Rig::new().await;
        rig.deployment.refuse("/api/v2/users/me", "403 Forbidden", "{}");
        let rig = rig.start().await;
        rig.link(|link| matches!(link, LinkState::Refused { .. })).await;
        let begun = Instant::now();
        rig.stop().await;
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
}

mod waking {
    use super::*;

    /// Conforms: vpn:15.37
    #[tokio::test(start_paused = true)]
    async fn a_dead_connection_is_found_when_the_machine_wakes_up_and_a_live_one_is_kept() {
        let mut wire = Wire::new().await;
        let _streams = answer(&mut wire.connection, &[]).await;
        wire.shared.wake.notify_one();
        sleep(Duration::from_secs(12)).await;
        assert!(!wire.keeping.is_finished());
        wire.connection.freeze();
        let begun = Instant::now();
        wire.shared.wake.notify_one();
        assert!(matches!(wire.ended().await, ControlError::DeadOnWake));
        assert_eq!(begun.elapsed().as_secs(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_dies_while_it_is_in_use_is_noticed_in_under_ten_seconds() {
        let mut wire = Wire::new().await;
        let _streams = answer(&mut wire.connection, &[]).await;
        let home = wire.shared.net.home.claim().unwrap();
        home.set(Some(RegionId(1)));
        sleep(Duration::from_secs(12)).await;
        assert!(!wire.keeping.is_finished(), "one that answers is kept, though it has nothing to say");
        wire.connection.freeze();
        let begun = Instant::now();
        home.set(Some(RegionId(2)));
        assert!(matches!(wire.ended().await, ControlError::Unanswered));
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_wake_ends_a_long_pause_and_is_passed_on_to_the_relay() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        let _streams = answer(&mut connection, &[]).await;
        rig.link(|link| matches!(link, LinkState::Up { .. })).await;
        rig.deployment.refuse(TAILNET, "409 Conflict", r#"{"message":"Browsers only."}"#);
        connection.cut();
        let refused = rig.link(|link| matches!(link, LinkState::Refused { .. })).await;
        assert!(matches!(refused, LinkState::Refused { error } if error.contains("administrator")));
        rig.deployment.allow(TAILNET);
        let mut relay = rig.relay().await;
        rig.net.coordinator.send(Message::Wake(Cause::Manager)).await.unwrap();
        rig.deployment.connection().await;
        assert!(matches!(relay.recv().await, Some(relay::Message::NetworkChanged)));
    }

    #[tokio::test]
    async fn a_waking_that_is_seen_twice_is_one_and_it_is_noted_when_the_connection_works_again() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        let _streams = answer(&mut connection, &[]).await;
        rig.link(|link| matches!(link, LinkState::Up { .. })).await;
        let mut relay = rig.relay().await;
        for cause in [Cause::Manager, Cause::Resumed, Cause::Network, Cause::Resumed, Cause::Manager] {
            rig.net.coordinator.send(Message::Wake(cause)).await.unwrap();
        }
        for _ in 0..2 {
            assert!(matches!(relay.recv().await, Some(relay::Message::NetworkChanged)));
        }
        let works = async {
            while !rig.net.recovery.waits_for().is_empty() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(20), works).await.unwrap();
        assert!(relay.try_recv().is_err());
    }
}

mod crashing {
    use super::*;

    #[tokio::test]
    async fn a_successor_is_the_same_peer_and_nothing_is_unprogrammed_meanwhile() {
        let mut rig = Rig::started().await;
        let mut connection = rig.deployment.connection().await;
        let mut coordinate = connection.call("Coordinate").await;
        let _streams = answer(&mut connection, &[1]).await;
        give_token(&mut connection, "mine").await;
        coordinate.send(&about(1, peer_update::Kind::Node)).await;
        coordinate.send(&about(1, peer_update::Kind::ReadyForHandshake)).await;
        rig.programmed(1).await;
        rig.remembers_a_token().await;
        rig.link(|link| matches!(link, LinkState::Up { .. })).await;

        rig.crash().await;
        assert!(rig.net.network_map.get().peers.contains_key(&id(1)));
        assert_eq!(*rig.net.link.get(), LinkState::Connecting);
        let mut rig = rig.start().await;
        let mut connection = rig.deployment.connection().await;
        assert_eq!(connection.query, "resume_token=mine&version=2.3");
        let mut coordinate = connection.call("Coordinate").await;
        assert_eq!(asked(&mut coordinate).await, id(1));
        assert_eq!(rig.deployment.requests("/api/v2/users/me").len(), 1);
    }
}

mod judging {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_connection_that_was_useful_for_a_while_makes_the_pauses_short_again() {
        let mut setting = Setting::new().await;
        for _ in 0..5 {
            setting.hear(Event::Proven).await;
            setting.hear(Event::Ended(ControlError::HungUp)).await;
        }
        assert!(setting.retry_in() > Duration::from_millis(450));
        setting.hear(Event::Proven).await;
        advance(STEADY_AFTER).await;
        setting.hear(Event::Ended(bad_update())).await;
        assert!(setting.retry_in() > Duration::from_millis(700), "the next one would end in the same way");
        setting.hear(Event::Proven).await;
        advance(STEADY_AFTER).await;
        setting.hear(Event::Ended(ControlError::HungUp)).await;
        assert!(setting.retry_in() <= Duration::from_millis(100));
    }

    /// Conforms: control:H9
    #[tokio::test]
    async fn before_a_connection_was_accepted_a_refusal_is_final_and_later_only_what_a_person_must_change() {
        use StatusCode as S;
        for (status, before, after) in [
            (S::BAD_REQUEST, true, true),
            (S::UNAUTHORIZED, true, true),
            (S::CONFLICT, true, true),
            (S::FORBIDDEN, true, false),
            (S::NOT_FOUND, true, false),
            (S::INTERNAL_SERVER_ERROR, true, false),
            (S::BAD_GATEWAY, false, false),
            (S::TOO_MANY_REQUESTS, false, false),
        ] {
            let mut setting = Setting::new().await;
            setting.hear(Event::Ended(refused(status, None))).await;
            assert_eq!(setting.is_refused(), before, "{status} before");
            setting.hear(Event::Accepted).await;
            setting.hear(Event::Ended(refused(status, None))).await;
            assert_eq!(setting.is_refused(), after, "{status} after");
        }
    }

    #[tokio::test]
    async fn a_deployment_that_asks_to_be_spared_is_spared_within_reason() {
        let mut setting = Setting::new().await;
        setting.hear(Event::Ended(refused(StatusCode::TOO_MANY_REQUESTS, Some(60)))).await;
        assert_eq!(setting.retry_in(), Duration::from_secs(60));
        setting.hear(Event::Ended(refused(StatusCode::TOO_MANY_REQUESTS, Some(u32::MAX)))).await;
        assert_eq!(setting.retry_in(), MAX_RETRY_AFTER);
    }

    /// Before a connection was ever accepted a person waits for the verdict, and is told (see above).
    ///
    /// Conforms: control:L17
    #[tokio::test]
    async fn a_dial_that_ran_out_of_time_is_tried_again() {
        let mut setting = Setting::new().await;
        setting.hear(Event::Accepted).await;
        for _ in 0..20 {
            let (url, limit) = ("http://127.0.0.1:1/api/v2/tailnet".to_owned(), Duration::from_secs(10));
            let deadline = ControlError::Open(ApiError::Deadline { url, limit }.into());
            let before = setting.number();
            setting.hear(Event::Ended(deadline)).await;
            assert_eq!(setting.number(), before + 1, "the next attempt has begun");
            assert!(setting.retry_in() <= Duration::from_secs(10));
        }
    }

    #[tokio::test]
    async fn what_an_earlier_attempt_reports_late_is_ignored() {
        let mut setting = Setting::new().await;
        setting.hear(Event::Accepted).await;
        let late = Message::Report { attempt: setting.number() - 1, event: Event::Proven };
        setting.part.handle(&setting.context, &mut setting.state, late).await.unwrap();
        assert_eq!(*setting.net.link.get(), LinkState::Connecting);
    }

    struct Setting {
        net: Arc<Net>,
        part: Coordinator,
        context: Context<Message>,
        state: State,
    }

    impl Setting {
        /// A part whose attempts nobody hears of but through the test.
        async fn new() -> Self {
            let net = Arc::new(net(NetworkOwner::Nobody));
            let part = Coordinator::new(Arc::clone(&net), Arc::default());
            let context = Context { me: net.coordinator.clone(), tasks: Tasks::default() };
            let state = part.start(&context).await.unwrap();
            Self { net, part, context, state }
        }

        fn number(&self) -> u64 {
            self.part.memory.lock().attempts
        }

        async fn hear(&mut self, event: Event) {
            let message = Message::Report { attempt: self.number(), event };
            self.part.handle(&self.context, &mut self.state, message).await.unwrap();
        }

        fn retry_in(&self) -> Duration {
            match &*self.net.link.get() {
                LinkState::Waiting { retry_in, .. } => *retry_in,
                other => panic!("{other:?}"),
            }
        }

        fn is_refused(&self) -> bool {
            matches!(*self.net.link.get(), LinkState::Refused { .. })
        }
    }

    fn refused(status: StatusCode, retry_after: Option<u32>) -> ControlError {
        let mut headers = HeaderMap::new();
        if let Some(seconds) = retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        let refusal = Refusal::new("http://127.0.0.1:1/api/v2/tailnet".to_owned(), status, &headers, b"");
        ControlError::Open(ApiError::Refused(Box::new(refusal)).into())
    }

    fn bad_update() -> ControlError {
        let mut workspaces = Workspaces::default();
        let mut update = snapshot(&[1]);
        update.upserted_workspaces.clear();
        workspaces.apply(&update, Update::Diff).unwrap_err().into()
    }
}

/// A coordinator and a deployment.
struct Rig {
    deployment: Deployment,
    net: Arc<Net>,
    memory: Arc<ControlMemory>,
    supervisor: ActorRef<()>,
    running: Option<Running>,
}

impl Rig {
    async fn new() -> Self {
        let deployment = Deployment::new().await;
        let mut net = net(NetworkOwner::Nobody);
        net.boot = Arc::new(Boot {
            generation: 1,
            url: deployment.url.clone(),
            token: "secret-token".into(),
            headers: Vec::new(),
            telemetry: Some(r#"{"device_id":"d"}"#.to_owned()),
            network: NetworkOwner::Nobody,
        });
        let (supervisor, _) = Actor::spawn(None, Bystander, ()).await.unwrap();
        Self { deployment, net: Arc::new(net), memory: Arc::default(), supervisor, running: None }
    }

    async fn started() -> Self {
        Self::new().await.start().await
    }

    async fn start(mut self) -> Self {
        let (net, memory) = (Arc::clone(&self.net), Arc::clone(&self.memory));
        let make = move || Coordinator::new(Arc::clone(&net), Arc::clone(&memory));
        let start = starter(self.net.coordinator.clone(), make);
        self.running = Some(start(self.supervisor.get_cell()).await.unwrap());
        self
    }

    async fn crash(&mut self) {
        let running = self.running.take().unwrap();
        running.cell.kill();
        running.join.await.unwrap();
    }

    async fn stop(mut self) -> Arc<Net> {
        self.end().await;
        self.net
    }

    async fn end(&mut self) {
        let running = self.running.take().unwrap();
        running.cell.stop(None);
        running.join.await.unwrap();
    }

    async fn link(&self, accept: impl Fn(&LinkState) -> bool) -> LinkState {
        let mut link = self.net.link.view();
        match timeout(SOON, link.wait_for(&accept)).await {
            Ok(link) => link.unwrap().as_ref().clone(),
            Err(_) => panic!("the link is {:?}", self.net.link.get()),
        }
    }

    async fn programmed(&self, peer: u128) {
        let mut map = self.net.network_map.view();
        let is_there = map.wait_for(|map| map.peers.contains_key(&id(peer)));
        timeout(SOON, is_there).await.expect("a programmed peer").unwrap();
    }

    /// One that never answered a handshake is given up at once; the next connection asks for it again.
    async fn loses_its_peer_and_asks_for_it_again(&mut self) {
        let no_peers = self.net.network_map.view().wait_for(|map| map.peers.is_empty()).await;
        assert!(no_peers.is_some(), "one that never answered a handshake is given up at once");
        let mut connection = self.deployment.connection().await;
        let mut coordinate = connection.call("Coordinate").await;
        assert_eq!(asked(&mut coordinate).await, id(1));
    }

    async fn remembers_a_token(&self) {
        let remembered = async {
            while self.memory.lock().resume.is_none() {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, remembered).await.expect("a remembered token");
    }

    /// What the relay hears from now on.
    async fn relay(&self) -> mpsc::Receiver<relay::Message> {
        ears(&self.net.relay).await
    }
}

/// One connection without HTTP below it, for tests that move the clock.
struct Wire {
    shared: Arc<Shared>,
    connection: Connection,
    keeping: JoinHandle<ControlError>,
}

impl Wire {
    async fn new() -> Self {
        let net = Arc::new(net(NetworkOwner::Nobody));
        let shared = Arc::new(Shared::claim(&net, &Arc::default()).unwrap());
        shared.memory.lock().attempts = 1;
        let attempt = Attempt { shared: Arc::clone(&shared), number: 1, me: net.coordinator.clone() };
        let (ours, theirs) = duplex(64 * 1024);
        let (stream, handle) = byte_stream(ours, LIMITS).await;
        let keeping = tokio::spawn(async move { attempt.keep(id(0), stream, handle).await });
        Self { shared, connection: Connection::over(theirs, "").await, keeping }
    }

    /// What the next connection would be asked for with.
    fn next_query(&self) -> String {
        let me = self.shared.net.coordinator.clone();
        Attempt { shared: Arc::clone(&self.shared), number: 9, me }.query()
    }

    async fn ended(&mut self) -> ControlError {
        timeout(SOON, &mut self.keeping).await.expect("an end").unwrap()
    }
}

fn is_settled(link: &LinkState) -> bool {
    !matches!(link, LinkState::Connecting)
}

/// Sends a relay map and a first list of agents, all in one workspace.
async fn answer(connection: &mut Connection, agents: &[u128]) -> (Call, Call) {
    let mut maps = connection.call("StreamDERPMaps").await;
    maps.send(&relay_map()).await;
    let mut updates = connection.call("WorkspaceUpdates").await;
    updates.send(&snapshot(agents)).await;
    (maps, updates)
}

async fn give_token(connection: &mut Connection, token: &str) {
    let mut call = connection.call("RefreshResumeToken").await;
    call.send(&RefreshResumeTokenResponse { token: token.to_owned(), ..Default::default() }).await;
    call.write(Kind::CloseSend, &[]).await;
}

/// Whom the next request asks a tunnel to.
async fn asked(coordinate: &mut Call) -> Uuid {
    let request = coordinate.next::<CoordinateRequest>().await.unwrap();
    assert!(request.update_self.is_none() && request.ready_for_handshake.is_empty());
    Uuid::from_slice(&request.add_tunnel.unwrap().id).unwrap()
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn raw(number: u128) -> Bytes {
    Bytes::copy_from_slice(id(number).as_bytes())
}

fn snapshot(agents: &[u128]) -> WorkspaceUpdate {
    let workspace = Workspace { id: raw(1000), name: "ws".to_owned(), status: 3 };
    let agent =
        |number: &u128| Agent { id: raw(*number), name: format!("a{number}"), workspace_id: raw(1000) };
    WorkspaceUpdate {
        upserted_workspaces: vec![workspace],
        upserted_agents: agents.iter().map(agent).collect(),
        ..WorkspaceUpdate::default()
    }
}

fn relay_map() -> DerpMap {
    let node = derp_map::region::Node {
        name: "999b".to_owned(),
        host_name: "elsewhere.example".to_owned(),
        ..Default::default()
    };
    let region = derp_map::Region {
        region_id: 999,
        embedded_relay: true,
        region_name: "Embedded".to_owned(),
        nodes: vec![node],
        ..Default::default()
    };
    DerpMap { regions: [(999, region)].into(), ..DerpMap::default() }
}

fn about(number: u128, kind: peer_update::Kind) -> CoordinateResponse {
    let node = Node {
        key: Bytes::from([b"np".as_slice(), &NodePrivate::generate().public().0].concat()),
        disco: DiscoPrivate::generate().public().to_string(),
        preferred_derp: 999,
        ..Node::default()
    };
    let node = (kind == peer_update::Kind::Node).then_some(node);
    let update = PeerUpdate { id: raw(number), node, kind: kind.into(), reason: String::new() };
    CoordinateResponse { peer_updates: vec![update], error: String::new() }
}
