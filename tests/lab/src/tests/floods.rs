//! What no deployment would say, and more of it than one would.

use warren_proto::tailnet::{Agent, CoordinateResponse, WorkspaceUpdate};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_injected_is_told_as_it_is_and_forgotten() {
    let lab = Lab::start(LabOptions { agents: 1, ..LabOptions::default() }).await.unwrap();
    let control = lab.control();
    let mut client = Client::connect(&lab, "").await;
    let mut updates = rpc::workspaces(&mut client, control.user()).await;
    let _: WorkspaceUpdate = updates.hear().await;
    let agent = Agent { id: vec![1; 3].into(), name: "\u{1b}[2J\0".to_owned(), ..Agent::default() };
    let odd = WorkspaceUpdate { upserted_agents: vec![agent.clone(), agent], ..WorkspaceUpdate::default() };
    control.inject_workspaces(odd.clone());
    assert_eq!(updates.hear::<WorkspaceUpdate>().await, odd);
    lab.add_workspace("late", &[]);
    let update: WorkspaceUpdate = updates.hear().await;
    assert_eq!((update.upserted_workspaces.len(), update.deleted_agents.len()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_peers_comes_in_responses_of_1024_and_their_order_is_kept() {
    let lab = Lab::start(LabOptions { agents: 1, ..LabOptions::default() }).await.unwrap();
    let (control, agent) = (lab.control(), lab.agents()[0].id);
    let mut client = Client::connect(&lab, "").await;
    let mut stream = client.ask(Method::Coordinate, &add_tunnel(agent)).await;
    let first: CoordinateResponse = stream.hear().await;
    assert_eq!(first.peer_updates[0].node, control.node(agent));
    control.flood_peers(2500);
    let mut sizes = Vec::new();
    for _ in 0..3 {
        sizes.push(stream.hear::<CoordinateResponse>().await.peer_updates.len());
    }
    assert_eq!(sizes, [1024, 1024, 452]);
    control.inject(&first);
    assert_eq!(stream.hear::<CoordinateResponse>().await, first, "as if it was said twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_yesterday_is_refused_and_a_date_can_be_put_forward() {
    let lab = Lab::start(LabOptions { agents: 0, ..LabOptions::default() }).await.unwrap();
    let token = rpc::refresh(&mut Client::connect(&lab, "").await).await.token;
    let path = format!("/api/v2/tailnet?version=2.3&resume_token={token}");
    assert!(get(&lab, &path, lab.token()).await.starts_with("HTTP/1.1 426"), "all but the upgrade is right");
    lab.control().advance_clock(Duration::from_secs(24 * 60 * 60 + 61));
    let refused = get(&lab, &path, lab.token()).await;
    assert!(refused.starts_with("HTTP/1.1 401") && refused.contains("token is expired (exp)"), "{refused}");
}
