//! The calls of a control connection, over the wire.

use std::collections::BTreeMap;

use super::*;
use crate::control::coordinator::{CHUNK, Coordinator, Gone, chunked};

type Request = tailnet::CoordinateRequest;
type Response = tailnet::CoordinateResponse;
type Update = tailnet::WorkspaceUpdate;

/// Conforms: control:R1
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_version_of_the_second_api_coordinates_under_an_id_that_the_deployment_gives() {
    let lab = lab(1).await;
    let agent = lab.agents()[0].id;
    assert!(lab.wait_for_agent(agent, LIMIT, |stats| stats.relay_logins > 0).await);
    for (place, version) in ["2.0", "2.3", "2.10"].into_iter().enumerate() {
        let mut client = Client::dial(&lab, &format!("version={version}"), &[]).await;
        let mut stream = client.ask(Method::Coordinate, &add_tunnel(agent)).await;
        let told: Response = stream.hear().await;
        assert_eq!(told.peer_updates[0].kind(), Kind::Node, "{version}");
        let seen = lab.control().recording().connections[place].clone();
        assert_eq!((seen.name.as_str(), seen.requests), ("client", vec![add_tunnel(agent)]));
        assert!(!seen.peer.is_nil() && lab.control().tunnels().contains(&(seen.peer, agent)));
    }
}

/// Conforms: control:R2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_map_is_told_whole_and_at_once() {
    let lab = lab(0).await;
    let mut client = Client::connect(&lab, "").await;
    assert_eq!(maps(&mut client).await.hear::<tailnet::DerpMap>().await, lab.control().relay_map());
}

/// Conforms: control:R3
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn telemetry_is_answered_and_kept_in_order() {
    let lab = lab(0).await;
    let mut client = Client::connect(&lab, "").await;
    post(&mut client, [1, 2]).await;
    post(&mut client, [3]).await;
    let posted = lab.control().recording().telemetry;
    assert_eq!(posted, [1, 2, 3].map(event));
}

/// Conforms: control:R4
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_follow_each_other_on_one_stream_and_run_beside_each_other_on_several() {
    let lab = lab(1).await;
    let mut client = Client::connect(&lab, "").await;
    let mut map = maps(&mut client).await;
    let mut updates = workspaces(&mut client, lab.control().user()).await;
    let mut peers = client.ask(Method::Coordinate, &add_tunnel(lab.agents()[0].id)).await;
    let mut unary = client.ask(Method::RefreshResumeToken, &tailnet::RefreshResumeTokenRequest {}).await;
    let token: tailnet::RefreshResumeTokenResponse = unary.hear().await;
    assert_eq!(unary.packet().await.unwrap().0, drpc::CLOSE_SEND);
    unary.next(Method::PostTelemetry, &tailnet::TelemetryRequest { events: vec![event(1)] }).await;
    assert_eq!(unary.hear::<tailnet::TelemetryResponse>().await, tailnet::TelemetryResponse {});
    assert_eq!(unary.packet().await.unwrap().0, drpc::CLOSE_SEND);
    unary.next(Method::StreamDerpMaps, &tailnet::StreamDerpMapsRequest {}).await;
    let second: tailnet::DerpMap = unary.hear().await;

    // The first three were left alone meanwhile and are all served.
    let told: Response = peers.hear().await;
    assert_eq!(told.peer_updates[0].kind(), Kind::Node);
    assert_eq!(updates.hear::<Update>().await.upserted_agents.len(), 1);
    assert_eq!(map.hear::<tailnet::DerpMap>().await, second);
    assert!(!token.token.is_empty());
    let calls = lab.control().recording().connections[0].calls.clone();
    assert_eq!(calls.len(), 6, "{calls:?}");
}

/// Conforms: control:R6
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn telemetry_is_handed_on_when_a_batch_is_full_and_the_rest_at_the_end() {
    let options = LabOptions { agents: 0, telemetry_batch: 3, ..LabOptions::default() };
    let lab = Lab::start(options).await.unwrap();
    let control = lab.control();
    let mut client = Client::connect(&lab, "").await;
    post(&mut client, [1, 2]).await;
    assert_eq!(control.recording().telemetry_batches.len(), 0, "two wait for a third");
    post(&mut client, [3, 4]).await;
    assert_eq!(control.recording().telemetry_batches, [[1, 2, 3].map(event).to_vec()]);
    lab.stop().await;
    assert_eq!(control.recording().telemetry_batches[1..], [vec![event(4)]]);
}

/// Conforms: control:R6
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn telemetry_that_fills_no_batch_is_handed_on_by_the_timer() {
    let telemetry_interval = Duration::from_millis(20);
    let lab =
        Lab::start(LabOptions { agents: 0, telemetry_interval, ..LabOptions::default() }).await.unwrap();
    let mut client = Client::connect(&lab, "").await;
    post(&mut client, [1]).await;
    let first = |seen: &Recording| seen.telemetry_batches.first().cloned();
    assert_eq!(lab.control().wait(LIMIT, first).await, Some(vec![event(1)]));
}

/// Conforms: control:R7
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_to_an_agent_that_the_user_may_not_reach_ends_the_stream_with_a_reason() {
    let lab = lab(2).await;
    let ids: Vec<Uuid> = lab.agents().iter().map(|agent| agent.id).collect();
    for id in &ids {
        assert!(lab.wait_for_agent(*id, LIMIT, |stats| stats.relay_logins > 0).await);
    }
    lab.control().forbid(ids[1], true);
    let mut client = Client::connect(&lab, "").await;
    let mut stream = client.ask(Method::Coordinate, &add_tunnel(ids[0])).await;
    assert_eq!(stream.hear::<Response>().await.peer_updates[0].kind(), Kind::Node);
    stream.say(&add_tunnel(ids[1])).await;
    let refused: Response = stream.hear().await;
    let reason = "authorization: workspace agent not found or you do not have permission";
    assert_eq!((refused.error.as_str(), refused.peer_updates.len()), (reason, 0));
    assert_eq!(stream.packet().await.unwrap().0, drpc::CLOSE);
}

/// Conforms: control:R8
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workspace_updates_are_those_of_the_owner_who_is_asked_for() {
    let lab = lab(1).await;
    let mut client = Client::connect(&lab, "").await;
    let mut own = workspaces(&mut client, lab.control().user()).await;
    let mut other = workspaces(&mut client, Uuid::from_u128(9)).await;
    assert_eq!(own.hear::<Update>().await.upserted_workspaces[0].name, "lab-1");
    assert_eq!(other.hear::<Update>().await, Update::default());
    lab.add_workspace("late", &["main"]);
    assert_eq!(own.hear::<Update>().await.upserted_workspaces[0].name, "late");
    let nobody = tailnet::WorkspaceUpdatesRequest { workspace_owner_id: Bytes::from_static(b"short") };
    let mut refused = client.ask(Method::WorkspaceUpdates, &nobody).await;
    assert_eq!(refused.packet().await.unwrap().0, drpc::CLOSE);
}

/// Conforms: control:R9
#[test]
fn responses_are_cut_at_1024_updates_and_lose_none() {
    let response = |count: u32| {
        let id = |number: u32| number.to_be_bytes().to_vec().into();
        let update =
            |number| tailnet::coordinate_response::PeerUpdate { id: id(number), ..Default::default() };
        Response { peer_updates: (0..count).map(update).collect(), error: String::new() }
    };
    let sizes =
        [(0, vec![0]), (1024, vec![1024]), (1025, vec![1024, 1]), (3572, vec![1024, 1024, 1024, 500])];
    for (count, sizes) in sizes {
        let chunks = chunked(response(count));
        assert_eq!(chunks.iter().map(|chunk| chunk.peer_updates.len()).collect::<Vec<_>>(), sizes);
        let whole = chunks.into_iter().flat_map(|chunk| chunk.peer_updates).collect::<Vec<_>>();
        assert_eq!(whole, response(count).peer_updates);
    }
}

/// Conforms: control:R9
#[test]
fn a_peer_that_comes_back_to_many_others_hears_of_them_in_chunks() {
    let coordinator = Coordinator::default();
    let (client, mut responses) = coordinator.open(OWN, Auth::Client);
    let mut kept = Vec::new();
    for number in 0..=CHUNK as u128 {
        let agent = Uuid::from_u128(1 << 64 | number);
        coordinator.allow(agent);
        let (place, queue) = coordinator.open(agent, Auth::Agent);
        let update_self = Some(ask::UpdateSelf { node: Some(tailnet::Node::default()) });
        coordinator.handle(place, Request { update_self, ..Default::default() }).unwrap();
        kept.push(queue);
        coordinator.handle(client, add_tunnel(agent)).unwrap();
        assert_eq!(responses.try_recv().unwrap().peer_updates.len(), 1);
    }
    let (again, mut responses) = coordinator.open(OWN, Auth::Client);
    let mut sizes = || responses.try_recv().map(|response| response.peer_updates.len()).ok();
    assert_eq!((sizes(), sizes(), sizes()), (Some(CHUNK), Some(1), None));
    coordinator.leave(again, Gone::Lost);
}

/// Conforms: control:R10
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_to_be_refreshed_after_half_its_life() {
    let lab = lab(0).await;
    lab.control().set_resume_lifetime(Duration::from_secs(601));
    let mut client = Client::connect(&lab, "").await;
    let before = unix_now();
    let token = refresh(&mut client).await;
    let after = unix_now();
    let half = token.refresh_in.unwrap();
    assert_eq!((half.seconds, half.nanos), (300, 500_000_000));
    let issued = token.expires_at.unwrap().seconds - 601;
    assert!((before..=after).contains(&issued), "{before} {issued} {after}");
    let _again = Client::connect(&lab, &format!("&resume_token={}", token.token)).await;
    let peers = |seen: &Recording| Some([seen.connections.first()?.peer, seen.connections.get(1)?.peer]);
    let peers = lab.control().wait(LIMIT, peers).await.unwrap();
    assert_eq!(peers[0], peers[1]);
}

/// Conforms: control:D10
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_hear_of_a_changed_map_and_agents_follow_it_to_another_home() {
    let options = LabOptions { agents: 1, further_regions: 1, agents_follow_map: true, ..Default::default() };
    let lab = Lab::start(options).await.unwrap();
    let (control, agent) = (lab.control(), lab.agents()[0].id);
    let key = lab.agent_key(agent).unwrap();
    assert!(lab.relay().wait_for(&key, true, LIMIT).await);
    let mut clients = [Client::connect(&lab, "").await, Client::connect(&lab, "").await];
    let mut maps = [maps(&mut clients[0]).await, maps(&mut clients[1]).await];
    let whole = control.relay_map();
    for stream in &mut maps {
        assert_eq!(stream.hear::<tailnet::DerpMap>().await, whole);
    }
    let mut peers = clients[0].ask(Method::Coordinate, &add_tunnel(agent)).await;
    assert_eq!(home(&peers.hear().await), EMBEDDED_REGION);

    let mut map = whole.clone();
    map.regions.remove(&EMBEDDED_REGION);
    control.set_relay_map(map.clone());
    for stream in &mut maps {
        assert_eq!(stream.hear::<tailnet::DerpMap>().await, map);
    }
    assert_eq!(home(&peers.hear().await), FIRST_FURTHER_REGION);
    let further = lab.relays()[1].1.clone();
    assert!(further.wait_for(&key, true, LIMIT).await && lab.relay().wait_for(&key, false, LIMIT).await);
}

/// Conforms: control:W8
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_update_tells_of_everything_there_is() {
    let lab = lab(2).await;
    lab.add_workspace("pair", &["cpu", "gpu"]);
    let mut client = Client::connect(&lab, "").await;
    let first: Update = workspaces(&mut client, lab.control().user()).await.hear().await;
    assert!(first.deleted_workspaces.is_empty() && first.deleted_agents.is_empty());
    let mut view = View::default();
    view.apply(&first);
    let running = |agents: &[&str]| (Status::Running, agents.iter().map(|name| (*name).to_owned()).collect());
    let expected = [("lab-1", &["main"][..]), ("lab-2", &["main"]), ("pair", &["cpu", "gpu"])];
    assert_eq!(view.named(), expected.map(|(name, agents)| (name.to_owned(), running(agents))).into());
}

/// Conforms: control:W9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_tells_what_was_gained_changed_and_lost_and_nothing_else() {
    let lab = lab(4).await;
    let control = lab.control();
    let mut client = Client::connect(&lab, "").await;
    let mut stream = workspaces(&mut client, control.user()).await;
    assert_eq!(stream.hear::<Update>().await.upserted_workspaces.len(), 4);
    let id = |name: &str| control.workspaces().find(name).unwrap();
    let (gaining, changing, going) = (id("lab-1"), id("lab-2"), id("lab-3"));
    control.change_workspaces(|all| {
        all.0.get_mut(&gaining).unwrap().agents.insert(Uuid::from_u128(1), "gained".to_owned());
        all.0.get_mut(&changing).unwrap().status = Status::Stopping;
        all.0.remove(&going);
        let agents = [(Uuid::from_u128(2), "fresh".to_owned())].into();
        let new = Workspace { name: "new".to_owned(), status: Status::Starting, agents };
        all.0.insert(Uuid::from_u128(3), new);
    });
    let update: Update = stream.hear().await;
    let workspaces = |list: &[tailnet::Workspace]| -> BTreeMap<String, Status> {
        list.iter().map(|workspace| (workspace.name.clone(), workspace.status())).collect()
    };
    let agents = |list: &[tailnet::Agent]| {
        let mut names: Vec<String> = list.iter().map(|agent| agent.name.clone()).collect();
        names.sort();
        names
    };
    let upserted = [("lab-2".to_owned(), Status::Stopping), ("new".to_owned(), Status::Starting)];
    assert_eq!(workspaces(&update.upserted_workspaces), upserted.into());
    assert_eq!(agents(&update.upserted_agents), ["fresh", "gained"]);
    assert_eq!(workspaces(&update.deleted_workspaces), [("lab-3".to_owned(), Status::Running)].into());
    assert_eq!(agents(&update.deleted_agents), ["main"]);
    assert_eq!(update.deleted_agents[0].workspace_id, going.as_bytes()[..]);
}

/// Conforms: control:W10
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_subscriber_has_a_snapshot_of_its_own() {
    let lab = lab(1).await;
    let mut client = Client::connect(&lab, "").await;
    let mut first = workspaces(&mut client, lab.control().user()).await;
    assert_eq!(first.hear::<Update>().await.upserted_workspaces.len(), 1);
    lab.add_workspace("late", &["main"]);
    assert_eq!(first.hear::<Update>().await.upserted_workspaces.len(), 1);
    let mut second = workspaces(&mut client, lab.control().user()).await;
    let snapshot: Update = second.hear().await;
    assert_eq!((snapshot.upserted_workspaces.len(), snapshot.upserted_agents.len()), (2, 2));
    lab.remove_workspace("late");
    for stream in [&mut first, &mut second] {
        assert_eq!(stream.hear::<Update>().await.deleted_workspaces[0].name, "late");
    }
}

/// Conforms: control:W11
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workspace_is_followed_from_its_start_to_its_deletion() {
    let lab = lab(0).await;
    let control = lab.control();
    let mut client = Client::connect(&lab, "").await;
    let mut stream = workspaces(&mut client, control.user()).await;
    let mut view = View::default();
    view.apply(&stream.hear().await);
    assert!(view.named().is_empty());

    let agent = lab.add_workspace("dev", &["main"])[0].id;
    view.apply(&stream.hear().await);
    let running = (Status::Running, vec!["main".to_owned()]);
    assert_eq!(view.named(), [("dev".to_owned(), running)].into());
    assert!(lab.wait_for_agent(agent, LIMIT, |stats| stats.relay_logins > 0).await);
    let mut peers = client.ask(Method::Coordinate, &add_tunnel(agent)).await;
    assert_eq!(peers.hear::<Response>().await.peer_updates[0].kind(), Kind::Node);

    let id = control.workspaces().find("dev").unwrap();
    lab.stop_agent(agent, End::Graceful);
    control.change_workspaces(|all| {
        let workspace = all.0.get_mut(&id).unwrap();
        (workspace.status, workspace.agents) = (Status::Deleted, BTreeMap::new());
    });
    view.apply(&stream.hear().await);
    assert_eq!(view.named(), [("dev".to_owned(), (Status::Deleted, Vec::new()))].into());
    assert_eq!(peers.hear::<Response>().await.peer_updates[0].kind(), Kind::Disconnected);
}

/// A client's view of the workspaces, made from updates.
#[derive(Default)]
struct View {
    workspaces: BTreeMap<Bytes, (String, Status)>,
    agents: BTreeMap<Bytes, (Bytes, String)>,
}

impl View {
    fn apply(&mut self, update: &Update) {
        for workspace in &update.upserted_workspaces {
            self.workspaces.insert(workspace.id.clone(), (workspace.name.clone(), workspace.status()));
        }
        for agent in &update.deleted_agents {
            assert!(self.agents.remove(&agent.id).is_some(), "{}", agent.name);
        }
        for workspace in &update.deleted_workspaces {
            assert!(self.workspaces.remove(&workspace.id).is_some(), "{}", workspace.name);
        }
        for agent in &update.upserted_agents {
            assert!(self.workspaces.contains_key(&agent.workspace_id), "{}", agent.name);
            self.agents.insert(agent.id.clone(), (agent.workspace_id.clone(), agent.name.clone()));
        }
    }

    /// Status and agents by the workspace's name.
    fn named(&self) -> BTreeMap<String, (Status, Vec<String>)> {
        let agents = |id: &Bytes| {
            let of = self.agents.values().filter(|(workspace, _)| workspace == id);
            let mut names: Vec<String> = of.map(|(_, name)| name.clone()).collect();
            names.sort();
            names
        };
        self.workspaces.iter().map(|(id, (name, status))| (name.clone(), (*status, agents(id)))).collect()
    }
}

async fn lab(agents: usize) -> Lab {
    Lab::start(LabOptions { agents, ..LabOptions::default() }).await.unwrap()
}

/// The home region that a node update tells.
fn home(response: &Response) -> i64 {
    response.peer_updates[0].node.as_ref().unwrap().preferred_derp.into()
}

async fn maps(client: &mut Client) -> Call {
    client.ask(Method::StreamDerpMaps, &tailnet::StreamDerpMapsRequest {}).await
}

pub(super) async fn workspaces(client: &mut Client, owner: Uuid) -> Call {
    let workspace_owner_id = owner.as_bytes().to_vec().into();
    client.ask(Method::WorkspaceUpdates, &tailnet::WorkspaceUpdatesRequest { workspace_owner_id }).await
}

/// Asks for a resume token.
pub(super) async fn refresh(client: &mut Client) -> tailnet::RefreshResumeTokenResponse {
    client.ask(Method::RefreshResumeToken, &tailnet::RefreshResumeTokenRequest {}).await.hear().await
}

/// Posts events in one call, which is answered.
async fn post<const COUNT: usize>(client: &mut Client, numbers: [u8; COUNT]) {
    let events = numbers.map(event).to_vec();
    let mut call = client.ask(Method::PostTelemetry, &tailnet::TelemetryRequest { events }).await;
    assert_eq!(call.hear::<tailnet::TelemetryResponse>().await, tailnet::TelemetryResponse {});
}

fn event(number: u8) -> tailnet::TelemetryEvent {
    tailnet::TelemetryEvent { id: vec![number; 16].into(), ..Default::default() }
}

fn unix_now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}
