//! Real clients at a real socket; the tunnels part is a double that obeys.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use warren_actors::runtime::CellWriter;
#[cfg(feature = "faults")]
use warren_actors::runtime::FaultKind;
use warren_proto::{
    frame,
    vpn::{ManagerMessage, TunnelMessage},
};

use super::*;
use crate::{
    child::{ChildSpec, SupervisorSpec},
    config::Config,
    facts::{Options, stand_in},
    intent::{Desired, Order},
    process::Spawner,
    sockets,
    tree::Tree,
};

const LIMIT: Duration = Duration::from_secs(20);

type Tester = Speaker<ClientMessage, ServiceMessage>;

/// A tunnels part that obeys at once.
struct Obedient(Arc<Service>);

impl Part for Obedient {
    type Message = tunnels::Message;
    type State = CellWriter<TunnelState>;

    async fn start(&self, _: &Context<tunnels::Message>) -> Result<Self::State, PartError> {
        Ok(self.0.tunnel.claim()?)
    }

    async fn handle(
        &self,
        _: &Context<tunnels::Message>,
        state: &mut Self::State,
        message: tunnels::Message,
    ) -> Result<(), PartError> {
        let shown = TunnelState::clone(&state.get());
        match message {
            tunnels::Message::Start { order, reply, .. } => {
                let (lifecycle, owner) = (Lifecycle::Started, Some(order.owner));
                state.set(TunnelState { lifecycle, owner, ..shown });
                let _ = reply.send(vpn::StartResponse { success: true, error_message: String::new() });
            }
            tunnels::Message::Stop { reply, .. } => {
                state.set(TunnelState { lifecycle: Lifecycle::Stopped, owner: None, ..shown });
                let _ = reply.send(vpn::StopResponse { success: true, error_message: String::new() });
            }
            tunnels::Message::Event(_) => {}
        }
        Ok(())
    }
}

/// A service that nobody runs, and that keeps what it has in `folder`.
fn service(folder: &Path) -> Arc<Service> {
    let options = Options { allow_faults: true, ..stand_in::options() };
    let spawner = Spawner::start(tokio::runtime::Handle::current()).unwrap();
    Arc::new(Service::new(stand_in::paths(folder), Config::default(), options, spawner))
}

struct Bench {
    service: Arc<Service>,
    #[cfg_attr(not(feature = "faults"), expect(dead_code, reason = "held to live"))]
    tree: Tree,
    path: PathBuf,
    _folder: TempDir,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let service = service(folder.path());
        let path = service.paths.vpn_socket();
        let listeners: Arc<[_]> = [sockets::listen(&path, 0o600, None).unwrap()].into();
        let [obeying, serving] = [(); 2].map(|()| Arc::clone(&service));
        let spec = SupervisorSpec::new("root", 3, Duration::from_secs(300))
            .child(ChildSpec::part(&service.tunnels, move || Obedient(Arc::clone(&obeying))))
            .child(ChildSpec::part(&warren_actors::runtime::Address::new("clients", 1), move || {
                Clients::new(Arc::clone(&serving), Arc::clone(&listeners))
            }));
        let tree = Tree::start(spec).await.unwrap();
        Self { service, tree, path, _folder: folder }
    }

    async fn client(&self) -> (Tester, Inbox<ServiceMessage>) {
        let (read, write) = UnixStream::connect(&self.path).await.unwrap().into_split();
        Speaker::connect(read, write, Role::Client, Role::Service, LIMIT).await.unwrap()
    }
}

async fn ask(client: &Tester, request: client_message::Msg) -> service_message::Msg {
    client.request(ClientMessage { rpc: None, msg: Some(request) }, LIMIT).await.unwrap().msg.unwrap()
}

async fn status_of(client: &Tester) -> vpn::Status {
    match ask(client, client_message::Msg::Status(vpn::StatusRequest {})).await {
        service_message::Msg::Status(status) => status,
        other => panic!("{other:?}"),
    }
}

async fn start(client: &Tester, url: &str) -> vpn::StartResponse {
    let start =
        vpn::StartRequest { coder_url: url.into(), api_token: "hunter2".into(), ..Default::default() };
    match ask(client, client_message::Msg::Start(start)).await {
        service_message::Msg::Start(answer) => answer,
        other => panic!("{other:?}"),
    }
}

async fn next_status(inbox: &mut Inbox<ServiceMessage>) -> vpn::Status {
    loop {
        let incoming = tokio::time::timeout(LIMIT, inbox.recv()).await.unwrap().unwrap();
        if let Some(service_message::Msg::Status(status)) = incoming.message.msg {
            return status;
        }
    }
}

#[tokio::test]
async fn every_client_hears_of_every_change_and_a_new_one_of_nothing() {
    let bench = Bench::new().await;
    let (first, mut first_inbox) = bench.client().await;
    let (_second, mut second_inbox) = bench.client().await;
    assert_eq!(status_of(&first).await.lifecycle(), Lifecycle::Stopped);
    assert!(start(&first, "https://coder.example.com").await.success);
    for inbox in [&mut first_inbox, &mut second_inbox] {
        assert_eq!(next_status(inbox).await.lifecycle(), Lifecycle::Started);
    }
    let (third, mut third_inbox) = bench.client().await;
    assert_eq!(status_of(&third).await.lifecycle(), Lifecycle::Started);
    let stop = ask(&third, client_message::Msg::Stop(vpn::StopRequest {})).await;
    assert!(matches!(stop, service_message::Msg::Stop(answer) if answer.success));
    assert_eq!(next_status(&mut third_inbox).await.lifecycle(), Lifecycle::Stopped);
}

/// Conforms: vpn:15.20
#[tokio::test]
async fn a_client_that_never_reads_delays_nobody_and_no_frame_is_cut() {
    let bench = Bench::new().await;
    // Shakes hands and then reads nothing: its socket fills.
    let deaf = UnixStream::connect(&bench.path).await.unwrap();
    deaf.writable().await.unwrap();
    deaf.try_write(b"codervpn client 1.3\n").unwrap();
    let (_other, mut inbox) = bench.client().await;
    let peers = bench.service.peers.claim().unwrap();
    for round in 0..200_u32 {
        let mut update = Peers::default();
        let agent = |number: u32| vpn::Agent {
            id: number.to_be_bytes().to_vec().into(),
            name: format!("agent-{round}-{number}"),
            ..Default::default()
        };
        update
            .apply(vpn::PeerUpdate { upserted_agents: (0..100).map(agent).collect(), ..Default::default() });
        peers.set(update);
        tokio::task::yield_now().await;
    }
    let last = loop {
        let status = next_status(&mut inbox).await;
        let agents = status.peer_update.unwrap().upserted_agents;
        if agents[0].name.starts_with("agent-199-") {
            break agents;
        }
    };
    assert_eq!(last.len(), 100);
    assert!(last.windows(2).all(|pair| pair[0].name <= pair[1].name), "sorted by name");
}

#[tokio::test]
async fn a_wrong_url_is_refused_before_anything_happens() {
    let bench = Bench::new().await;
    let (client, _inbox) = bench.client().await;
    let answer = start(&client, "http://coder.example.com").await;
    assert!(!answer.success);
    assert!(answer.error_message.contains("clear text"), "{}", answer.error_message);
    assert_eq!(status_of(&client).await.lifecycle(), Lifecycle::Stopped);
}

#[tokio::test]
async fn who_speaks_another_protocol_is_turned_away() {
    let bench = Bench::new().await;
    let (read, write) = UnixStream::connect(&bench.path).await.unwrap().into_split();
    let refused =
        Speaker::<ManagerMessage, TunnelMessage>::connect(read, write, Role::Manager, Role::Tunnel, LIMIT);
    assert!(refused.await.is_err());
    let (client, _inbox) = bench.client().await;
    assert_eq!(status_of(&client).await.lifecycle(), Lifecycle::Stopped);
}

#[tokio::test]
async fn a_request_that_is_not_known_has_no_answer_and_the_next_one_has() {
    let bench = Bench::new().await;
    let (client, _inbox) = bench.client().await;
    let unknown = client.request(ClientMessage { rpc: None, msg: None }, Duration::from_millis(200)).await;
    assert!(unknown.is_err());
    assert_eq!(status_of(&client).await.lifecycle(), Lifecycle::Stopped);
}

#[cfg(feature = "faults")]
#[tokio::test]
async fn after_a_panic_clients_connect_again_to_the_same_socket() {
    let bench = Bench::new().await;
    let (client, mut inbox) = bench.client().await;
    assert!(start(&client, "https://coder.example.com").await.success);
    assert!(bench.tree.inject("clients", FaultKind::Panic));
    while inbox.recv().await.is_some() {}
    let (again, _inbox) = bench.client().await;
    assert_eq!(status_of(&again).await.lifecycle(), Lifecycle::Started);
}

/// Conforms: vpn:15.23
#[tokio::test]
async fn a_tunnel_is_its_owners_and_roots() {
    let bench = Bench::new().await;
    let intent = bench.service.desired.claim().unwrap();
    let order = Order { url: "https://x".into(), token: "t".into(), headers: Vec::new(), owner: 4242 };
    intent.set(Desired { up: true, order: Some(Arc::new(order)) });
    let refused = may_control(&Caller { uid: 4243 }, &bench.service).unwrap_err();
    assert!(refused.contains("belongs to user 4242"), "{refused}");
    for uid in [0, 4242, bench.service.options.uid] {
        assert!(may_control(&Caller { uid }, &bench.service).is_ok(), "{uid}");
    }
    intent.set(Desired::default());
    assert!(may_control(&Caller { uid: 4243 }, &bench.service).is_ok());
}

/// A service's end of a connection that holds few bytes, and the bare other end of it.
async fn narrow() -> (Client, Inbox<ClientMessage>, tokio::io::DuplexStream) {
    let (ours, mut theirs) = tokio::io::duplex(64);
    theirs.write_all(b"codervpn client 1.3\n").await.unwrap();
    let (read, write) = tokio::io::split(ours);
    let (client, inbox) = Speaker::connect(read, write, Role::Service, Role::Client, LIMIT).await.unwrap();
    (client, inbox, theirs)
}

#[tokio::test(start_paused = true)]
async fn a_client_that_asks_and_never_reads_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let service = service(folder.path());
    let error = "long enough to fill what lies between the two ends".to_owned();
    service.tunnel.claim().unwrap().set(TunnelState { error, ..TunnelState::default() });
    let (client, inbox, mut deaf) = narrow().await;
    let request = client_message::Msg::Status(vpn::StatusRequest {});
    let request = ClientMessage { rpc: Some(vpn::Rpc::request(1)), msg: Some(request) };
    deaf.write_all(&frame::encode(&request).unwrap()).await.unwrap();
    let session = Session { service, caller: Caller { uid: 1 }, client };
    assert!(timeout(3 * WRITE_LIMIT, session.answer(inbox)).await.is_ok());
}

#[tokio::test]
async fn what_changes_before_the_first_look_is_news() {
    let folder = tempfile::tempdir().unwrap();
    let service = service(folder.path());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let ((read, write), (their_read, their_write)) = (ours.into_split(), theirs.into_split());
    let (client, tester) = tokio::join!(
        Speaker::connect(read, write, Role::Service, Role::Client, LIMIT),
        Tester::connect(their_read, their_write, Role::Client, Role::Service, LIMIT),
    );
    let ((client, _requests), (_tester, mut inbox)): ((Client, _), _) = (client.unwrap(), tester.unwrap());
    let news = News::new(&service);
    service
        .tunnel
        .claim()
        .unwrap()
        .set(TunnelState { lifecycle: Lifecycle::Started, ..TunnelState::default() });
    let told = tokio::select! {
        status = next_status(&mut inbox) => status,
        () = news.tell(&client) => panic!("the client is still there"),
    };
    assert_eq!(told.lifecycle(), Lifecycle::Started);
}
