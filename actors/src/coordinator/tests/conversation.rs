//! What is said on a connection from its beginning to its end (tailnet-control 12.4).

use std::collections::BTreeSet;

use warren_proto::drpc::ErrorBody;

use super::*;
use crate::coordinator::{peers::now, rpc::CallError};

/// Conforms: control:L1 control:L16
#[tokio::test]
async fn a_destination_of_before_is_asked_for_and_at_the_end_we_leave_wait_and_lose_everybody() {
    let rig = Rig::new().await;
    rig.memory.lock().coordination.set_destinations(now(), &[id(1)].into(), Update::Snapshot);
    let mut rig = rig.start().await;
    let mut connection = rig.deployment.connection().await;
    let mut coordinate = connection.call("Coordinate").await;
    assert_eq!(asked(&mut coordinate).await, id(1), "before any list of workspaces");
    rig.net.home.claim().unwrap().set(Some(RegionId(999)));
    let own = coordinate.next::<CoordinateRequest>().await.unwrap().update_self.unwrap().node.unwrap();
    assert_eq!(own.key.as_ref(), rig.net.identity.node.public().to_binary());
    let _streams = answer(&mut connection, &[1]).await;
    coordinate.send(&about(1, peer_update::Kind::Node)).await;
    coordinate.send(&about(1, peer_update::Kind::ReadyForHandshake)).await;
    rig.programmed(1).await;
    let memory = Arc::clone(&rig.memory);
    assert_eq!(memory.lock().coordination.poll_timeout(), None, "nobody is lost");

    let stopping = tokio::spawn(rig.stop());
    let last = coordinate.next::<CoordinateRequest>().await.unwrap();
    assert!(last.disconnect.is_some() && last.update_self.is_none());
    assert!(!stopping.is_finished(), "the deployment has not ended the call");
    assert_eq!(memory.lock().coordination.poll_timeout(), None);
    coordinate.write(Kind::Close, &[]).await;
    assert_eq!(coordinate.packet().await.unwrap().kind, Kind::Close);
    assert_eq!(coordinate.packet().await, None);
    stopping.await.unwrap();
    let memory = memory.lock();
    let is_given_up = memory.coordination.network_map().peers.is_empty();
    assert!(is_given_up || memory.coordination.poll_timeout().is_some(), "everybody is lost");
}

/// Every workspace is asked for by the one call that there is for it; telemetry is posted by nobody.
///
/// Conforms: vpn:C3 vpn:C6 control:H5 control:H11 control:L10 control:L19 control:D12
#[tokio::test]
async fn our_own_workspaces_are_asked_for_once_and_every_stream_is_closed_once() {
    let mut rig = Rig::started().await;
    let mut connection = rig.deployment.connection().await;
    let mut coordinate = connection.call("Coordinate").await;
    let (mut maps, mut updates) = answer(&mut connection, &[1]).await;
    let asked = updates.next::<WorkspaceUpdatesRequest>().await.unwrap();
    let own = Uuid::parse_str("fe63f96c-0f1a-427a-ac22-9876664914f7").unwrap();
    assert_eq!(asked.workspace_owner_id.as_ref(), own.as_bytes());
    rig.link(|link| matches!(link, LinkState::Up { .. })).await;
    assert!(rig.net.workspaces.get().known);

    let stopping = tokio::spawn(rig.stop());
    assert_eq!(kinds(&mut maps).await, [Kind::Message, Kind::CloseSend, Kind::Close]);
    assert_eq!(kinds(&mut updates).await, [Kind::CloseSend, Kind::Close]);
    while coordinate.next::<CoordinateRequest>().await.unwrap().disconnect.is_none() {}
    coordinate.write(Kind::Close, &[]).await;
    assert_eq!(kinds(&mut coordinate).await, [Kind::Close]);
    assert_eq!(connection.closed().await, Some(1000));
    stopping.await.unwrap();
    assert_eq!(connection.rest().await, ["RefreshResumeToken"], "and no other call was made");
}

/// Conforms: control:L15
#[tokio::test]
async fn the_end_of_the_coordination_loses_everybody_and_the_connection_is_made_anew() {
    let mut rig = Rig::started().await;
    let mut connection = rig.deployment.connection().await;
    let mut coordinate = connection.call("Coordinate").await;
    let _streams = answer(&mut connection, &[1]).await;
    assert_eq!(asked(&mut coordinate).await, id(1));
    coordinate.send(&about(1, peer_update::Kind::Node)).await;
    coordinate.send(&about(1, peer_update::Kind::ReadyForHandshake)).await;
    rig.programmed(1).await;

    coordinate.write(Kind::Close, &[]).await;
    rig.loses_its_peer_and_asks_for_it_again().await;
}

/// Conforms: control:L20
#[tokio::test]
async fn the_end_of_the_workspace_updates_ends_the_connection_and_the_next_is_made_and_a_stop_closes_it() {
    let mut rig = Rig::started().await;
    let mut connection = rig.deployment.connection().await;
    let (_maps, mut updates) = answer(&mut connection, &[]).await;
    updates.write(Kind::Close, &[]).await;
    let has_ended = |link: &LinkState| matches!(link, LinkState::Waiting { error, .. } if error == "the deployment ended WorkspaceUpdates");
    rig.link(has_ended).await;
    assert_eq!(connection.closed().await, Some(1000));

    let mut connection = rig.deployment.connection().await;
    let mut coordinate = connection.call("Coordinate").await;
    let (_maps, mut updates) = answer(&mut connection, &[]).await;
    rig.link(|link| matches!(link, LinkState::Up { .. })).await;
    let stopping = tokio::spawn(rig.stop());
    assert_eq!(kinds(&mut updates).await, [Kind::Message, Kind::CloseSend, Kind::Close]);
    coordinate.write(Kind::Close, &[]).await;
    stopping.await.unwrap();
}

/// The deployment reads the connection, and this stream no more.
///
/// Conforms: control:L5
#[tokio::test(start_paused = true)]
async fn a_tunnel_that_cannot_be_asked_for_or_given_back_ends_the_connection_with_that_error() {
    const MANY: u128 = 16_000;
    let many: BTreeSet<Uuid> = (1..=MANY).map(id).collect();
    for is_known in [false, true] {
        let mut wire = Wire::new().await;
        let mut coordinate = wire.connection.call("Coordinate").await;
        let _streams = answer(&mut wire.connection, &[]).await;
        if is_known {
            wire.shared.peers.set_destinations(&many, Update::Diff);
            for _ in 0..MANY {
                asked(&mut coordinate).await;
            }
        }
        let wanted = if is_known { BTreeSet::new() } else { many.clone() };
        wire.shared.peers.set_destinations(&wanted, Update::Diff);
        let error = wire.ended().await;
        assert!(
            matches!(error, ControlError::Call { call: "Coordinate", source: CallError::Stalled }),
            "{error}"
        );
        assert_eq!(wire.connection.closed().await, Some(1000));
        let mut last = 0;
        while let Some(request) = coordinate.next::<CoordinateRequest>().await {
            let tunnel = if is_known { request.remove_tunnel } else { request.add_tunnel };
            last =
                Uuid::from_slice(&tunnel.expect("nothing but tunnels, and no goodbye").id).unwrap().as_u128();
        }
        assert!((1..MANY).contains(&last), "{last}");
    }
}

/// Conforms: control:L8 control:L9
#[tokio::test]
async fn a_relay_map_is_rewritten_before_anybody_sees_it_and_a_failure_of_its_stream_is_told() {
    let mut rig = Rig::started().await;
    let port = rig.deployment.url.port().unwrap();
    let mut connection = rig.deployment.connection().await;
    let (mut maps, _updates) = answer(&mut connection, &[]).await;
    for name in ["Second", "Third"] {
        let mut map = relay_map();
        name.clone_into(&mut map.regions.get_mut(&999).unwrap().region_name);
        maps.send(&map).await;
        let is_here = |map: &RelayMap| {
            for node in map.regions.values().flat_map(|region| &region.nodes) {
                let place = (node.host_name.as_str(), node.derp_port, node.force_http);
                assert_eq!(place, ("127.0.0.1", port, true));
            }
            map.region_name(Some(RegionId(999))) == name
        };
        let mut view = rig.net.relay_map.view();
        timeout(SOON, view.wait_for(is_here)).await.expect("the map").unwrap();
    }
    let error = ErrorBody { code: 0, text: "no database".to_owned() };
    maps.write(Kind::Error, &error.encode()).await;
    let has_failed = |link: &LinkState| matches!(link, LinkState::Waiting { error, .. } if error == "the control connection failed in StreamDERPMaps: the deployment reports: no database");
    rig.link(has_failed).await;
}

/// Conforms: control:L11
#[tokio::test(start_paused = true)]
async fn a_resume_token_is_asked_for_at_once_and_anew_in_time_and_kept_until_it_expires() {
    let mut wire = Wire::new().await;
    let _streams = answer(&mut wire.connection, &[]).await;
    let begun = Instant::now();
    let wall = SystemTime::now();
    for (token, expires_at) in [("first", wall + SOON * 100), ("second", wall + SOON * 100)] {
        let call = wire.connection.call("RefreshResumeToken").await;
        answer_refresh(call, token, expires_at).await;
    }
    assert_eq!(begun.elapsed().as_secs(), REFRESH_IN.as_secs());
    let call = wire.connection.call("RefreshResumeToken").await;
    assert_eq!(begun.elapsed().as_secs(), 2 * REFRESH_IN.as_secs());
    wire.connection.cut();
    wire.ended().await;
    assert_eq!(wire.next_query(), "resume_token=second&version=2.3");
    drop(call);

    let mut wire = Wire::new().await;
    let _streams = answer(&mut wire.connection, &[]).await;
    let call = wire.connection.call("RefreshResumeToken").await;
    answer_refresh(call, "old", wall - REFRESH_IN).await;
    assert_eq!(wire.next_query(), "version=2.3");
}

/// Conforms: control:L12
#[tokio::test(start_paused = true)]
async fn what_a_superseded_connection_learns_is_not_kept_and_its_refresher_ends_with_it() {
    let mut wire = Wire::new().await;
    let (mut maps, _updates) = answer(&mut wire.connection, &[]).await;
    let call = wire.connection.call("RefreshResumeToken").await;
    wire.shared.memory.lock().attempts += 1;
    answer_refresh(call, "late", SystemTime::now() + SOON).await;
    assert_eq!(wire.next_query(), "version=2.3");
    let mut call = wire.connection.call("RefreshResumeToken").await;
    maps.write(Kind::Close, &[]).await;
    wire.ended().await;
    assert_eq!(kinds(&mut call).await, [Kind::Message, Kind::CloseSend], "and then the end");
}

/// Conforms: control:L18
#[tokio::test]
async fn nobody_dials_after_a_stop() {
    let mut rig = Rig::started().await;
    let connection = rig.deployment.connection().await;
    rig.deployment.refuse(TAILNET, "503 Service Unavailable", r#"{"message":"Not now."}"#);
    connection.cut();
    let is_refused =
        |link: &LinkState| matches!(link, LinkState::Waiting { error, .. } if error.contains("Not now"));
    rig.link(is_refused).await;
    rig.end().await;
    let dials = rig.deployment.requests(TAILNET).len();
    rig.deployment.allow(TAILNET);
    let several_pauses = Duration::from_millis(500);
    assert!(timeout(several_pauses, rig.deployment.connection()).await.is_err());
    assert_eq!(rig.deployment.requests(TAILNET).len(), dials);
}

const REFRESH_IN: Duration = Duration::from_secs(15);

/// Answers, and waits until the answer was taken.
async fn answer_refresh(mut call: Call, token: &str, expires_at: SystemTime) {
    let response = RefreshResumeTokenResponse {
        token: token.to_owned(),
        refresh_in: Some(REFRESH_IN.try_into().unwrap()),
        expires_at: Some(expires_at.into()),
    };
    call.send(&response).await;
    call.write(Kind::CloseSend, &[]).await;
    assert_eq!(kinds(&mut call).await, [Kind::Message, Kind::CloseSend, Kind::Close]);
}

/// The kinds of the packets of a call, up to its end.
async fn kinds(call: &mut Call) -> Vec<Kind> {
    let mut kinds = Vec::new();
    while let Some(packet) = call.packet().await {
        kinds.push(packet.kind);
    }
    kinds
}
