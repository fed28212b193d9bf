//! The part with real processes: this test program itself plays the tunnel, started by a small script.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration};

use tempfile::TempDir;
use tokio::runtime::Handle;
use warren_actors::{
    runtime::Cell,
    speaker::{Speaker, descriptors::Descriptors},
};
use warren_proto::{
    correlator::Kind,
    header::Role,
    vpn::{ManagerMessage, TunnelMessage, manager_message, tunnel_message},
};

use super::*;
use crate::{
    child::{ChildSpec, SupervisorSpec},
    config::Config,
    facts::stand_in,
    host,
    intent::{Desired, Intent},
    process::Spawner,
    tree::Tree,
};

/// Generous: a loaded machine is no failure.
const LIMIT: Duration = Duration::from_secs(30);

const ROOT: Caller = Caller { uid: 0 };

/// How the tunnel of a test behaves.
const MODE: &str = "WARREN_TEST_TUNNEL";

/// Not a test: the tunnel of the others, in a process of its own.
#[test]
#[ignore = "the tunnel process of other tests"]
fn double() {
    let Ok(mode) = std::env::var(MODE) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let status = runtime.block_on(play(&mode));
    runtime.shutdown_background();
    #[expect(clippy::disallowed_methods, reason = "the exit status is what the test is about")]
    std::process::exit(status);
}

async fn play(mode: &str) -> i32 {
    if mode == "mute" {
        eprintln!("I know nothing; my token is hunter2");
        return 1;
    }
    // SAFETY: the script leaves these two descriptors to this process, and nobody else here knows them.
    let ends = unsafe { Descriptors::adopt(3, 4) }.unwrap().open().unwrap();
    let connected =
        Speaker::<TunnelMessage, ManagerMessage>::connect(ends.0, ends.1, Role::Tunnel, Role::Manager, LIMIT);
    let (speaker, mut inbox) = connected.await.unwrap();
    while let Some(incoming) = inbox.recv().await {
        let Kind::Request(id) = incoming.kind else { continue };
        match incoming.message.msg {
            Some(manager_message::Msg::Start(start)) => match mode {
                "die" => return 101,
                "silent" => {}
                _ => answer_start(&speaker, id, &start).await,
            },
            Some(manager_message::Msg::Stop(_)) if mode == "stubborn" => {}
            Some(manager_message::Msg::Stop(_)) => {
                let answer = vpn::StopResponse { success: true, error_message: String::new() };
                let message = tunnel(tunnel_message::Msg::Stop(answer));
                speaker.close_with(id, message, LIMIT).await.unwrap();
                return 0;
            }
            Some(manager_message::Msg::Wake(_)) => eprintln!("woken"),
            _ => {}
        }
    }
    if mode == "stubborn" {
        std::future::pending::<()>().await;
    }
    69
}

async fn answer_start(speaker: &Speaker<TunnelMessage, ManagerMessage>, id: u64, start: &vpn::StartRequest) {
    let settings = vpn::NetworkSettingsRequest { mtu: 1280, ..Default::default() };
    let asked = speaker.request(tunnel(tunnel_message::Msg::NetworkSettings(settings)), LIMIT).await.unwrap();
    let is_set = matches!(asked.msg, Some(manager_message::Msg::NetworkSettings(answer)) if answer.success);
    let update = vpn::PeerUpdate {
        upserted_agents: vec![vpn::Agent {
            id: vec![7; 16].into(),
            name: "main".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    speaker.notify(tunnel(tunnel_message::Msg::PeerUpdate(update))).await.unwrap();
    let error = match start.coder_url.as_str() {
        "https://refused" => "no way in with hunter2",
        "https://signed-out" => "sign in again (`warren login`)",
        _ if !is_set => "the network was not set",
        _ => "",
    };
    let answer = vpn::StartResponse { success: error.is_empty(), error_message: error.to_owned() };
    speaker.respond(id, tunnel(tunnel_message::Msg::Start(answer))).await.unwrap();
}

fn tunnel(message: tunnel_message::Msg) -> TunnelMessage {
    TunnelMessage { rpc: None, msg: Some(message) }
}

/// A host that grants everything and counts.
struct FakeHost(Cell<u32>);

impl Part for FakeHost {
    type Message = host::Message;
    type State = CellWriter<u32>;

    async fn start(&self, _: &Context<host::Message>) -> Result<CellWriter<u32>, PartError> {
        Ok(self.0.claim()?)
    }

    async fn handle(
        &self,
        _: &Context<host::Message>,
        releases: &mut CellWriter<u32>,
        message: host::Message,
    ) -> Result<(), PartError> {
        match message {
            host::Message::Device { reply } => drop(reply.send(Err("no device here".into()))),
            host::Message::Apply { reply, .. } => drop(reply.send(Ok(()))),
            host::Message::Release { reply } => {
                releases.set(*releases.get() + 1);
                let _ = reply.send(());
            }
        }
        Ok(())
    }
}

struct Bench {
    service: Arc<Service>,
    releases: Cell<u32>,
    tree: Tree,
    folder: TempDir,
}

impl Bench {
    /// A service whose tunnel behaves so.
    async fn new(mode: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::in_folder(mode, folder).await
    }

    async fn in_folder(mode: &str, folder: TempDir) -> Self {
        let program = script(folder.path(), mode);
        let service = Arc::new(service(folder.path(), program));
        let releases = Cell::new(0);
        let (fake, desired, state_dir) =
            (releases.clone(), service.desired.clone(), service.paths.state_dir.clone());
        let lent = Arc::clone(&service);
        let spec = SupervisorSpec::new("root", 3, Duration::from_secs(300))
            .child(ChildSpec::part(&service.host_part, move || FakeHost(fake.clone())))
            .child(ChildSpec::part(&service.intent, move || Intent::new(state_dir.clone(), desired.clone())))
            .child(
                ChildSpec::part(&service.tunnels, move || Tunnels::new(Arc::clone(&lent))).grace(STOP_GRACE),
            );
        let tree = Tree::start(spec).await.unwrap();
        Self { service, releases, tree, folder }
    }

    async fn start(&self, url: &str) -> vpn::StartResponse {
        let order = order(url);
        self.service.tunnels.ask(LIMIT, |reply| Message::Start { order, caller: ROOT, reply }).await.unwrap()
    }

    async fn stop(&self) -> vpn::StopResponse {
        self.service.tunnels.ask(LIMIT, |reply| Message::Stop { caller: ROOT, reply }).await.unwrap()
    }

    async fn until(&self, accept: impl FnMut(&TunnelState) -> bool) -> Arc<TunnelState> {
        let mut view = self.service.tunnel.view();
        tokio::time::timeout(LIMIT, view.wait_for(accept)).await.unwrap().unwrap()
    }

    async fn until_started_again(&self, old: u32) -> u32 {
        let shown = self
            .until(|shown| shown.lifecycle == Lifecycle::Started && shown.pid.is_some_and(|pid| pid != old))
            .await;
        shown.pid.unwrap()
    }

    fn pid(&self) -> u32 {
        self.service.running.get().as_ref().as_ref().unwrap().process().pid()
    }

    /// Makes the next process behave so.
    fn change_mode(&self, mode: &str) {
        script(self.folder.path(), mode);
    }
}

fn order(url: &str) -> Arc<Order> {
    Arc::new(Order { url: url.into(), token: "hunter2".into(), headers: Vec::new(), owner: 1000 })
}

fn script(folder: &Path, mode: &str) -> std::path::PathBuf {
    let (path, new) = (folder.join("tunnel"), folder.join("tunnel.new"));
    let double = std::env::current_exe().unwrap();
    let body = format!(
        "#!/bin/sh\nexport {MODE}={mode}\nexec {} --ignored --exact --nocapture tunnels::tests::double\n",
        double.display()
    );
    fs::write(&new, body).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o700)).unwrap();
    fs::rename(&new, &path).unwrap();
    path
}

pub(super) fn service(folder: &Path, program: std::path::PathBuf) -> Service {
    let config = Config { tunnel_binary: Some(program), ..Config::default() };
    let spawner = Spawner::start(Handle::current()).unwrap();
    Service::new(stand_in::paths(folder), config, stand_in::options(), spawner)
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_is_started_and_stopped_and_the_intent_and_the_peers_follow() {
    let bench = Bench::new("good").await;
    let answer = bench.start("https://a").await;
    assert!(answer.success, "{}", answer.error_message);
    let pid = bench.pid();
    assert_eq!(bench.service.tunnel.get().lifecycle, Lifecycle::Started);
    assert_eq!(bench.service.tunnel.get().pid, Some(pid));
    assert_eq!(bench.service.desired.get().wanted(), Some(&order("https://a")));
    assert_eq!(bench.service.peers.get().agents().count(), 1);
    assert!(bench.start("https://a").await.success);
    assert_eq!(bench.pid(), pid, "the same order changes nothing");

    assert!(bench.stop().await.success);

    assert!(!is_alive(pid));
    assert_eq!(bench.service.tunnel.get().lifecycle, Lifecycle::Stopped);
    assert!(!bench.service.desired.get().up && bench.service.running.get().is_none());
    assert_eq!(bench.service.peers.get().agents().count(), 0);
    assert_eq!(*bench.releases.get(), 1);
    assert!(bench.stop().await.success, "stopping nothing succeeds");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_order_replaces_the_tunnel() {
    let bench = Bench::new("good").await;
    assert!(bench.start("https://a").await.success);
    let pid = bench.pid();
    assert!(bench.start("https://b").await.success);
    assert!(!is_alive(pid) && is_alive(bench.pid()));
    assert_eq!(*bench.releases.get(), 0, "the device stays");
    assert_eq!(bench.service.desired.get().wanted(), Some(&order("https://b")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_says_why_without_secrets_and_leaves_nothing_and_the_next_works() {
    let bench = Bench::new("good").await;
    let answer = bench.start("https://refused").await;
    assert!(!answer.success);
    assert_eq!(answer.error_message, "no way in with [redacted]");
    let shown = bench.service.tunnel.get();
    assert_eq!((shown.lifecycle, shown.error.as_str()), (Lifecycle::Stopped, "no way in with [redacted]"));
    assert!(!bench.service.desired.get().up);
    assert!(bench.service.slot.acquire(Duration::ZERO).await.is_some(), "a process is left");
    assert_eq!(*bench.releases.get(), 1);
    assert!(bench.start("https://a").await.success);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_never_speaks_is_told_with_its_last_words() {
    let bench = Bench::new("mute").await;
    let text = bench.start("https://a").await.error_message;
    assert!(text.contains("exit status 1") && text.contains("I know nothing"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_dies_at_its_start_is_told_at_once() {
    let bench = Bench::new("die").await;
    let text = bench.start("https://a").await.error_message;
    assert!(text.contains("has panicked"), "{text}");
    assert_eq!(bench.service.tunnel.get().lifecycle, Lifecycle::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_missing_is_named() {
    let bench = Bench::new("good").await;
    fs::remove_file(bench.folder.path().join("tunnel")).unwrap();
    let text = bench.start("https://a").await.error_message;
    assert!(text.contains("No such file"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_tunnel_is_seen_at_once_and_replaced() {
    let bench = Bench::new("good").await;
    assert!(bench.start("https://a").await.success);
    let (pid, killed_at) = (bench.pid(), Instant::now());

    kill(pid);

    let shown = bench.until(|shown| shown.lifecycle == Lifecycle::Starting).await;
    let seen_after = killed_at.elapsed();
    assert!(shown.error.contains("signal 9"), "{}", shown.error);
    let next = bench.until_started_again(pid).await;
    assert!(is_alive(next) && seen_after < Duration::from_secs(2), "{seen_after:?}");
    let shown = bench.service.tunnel.get();
    assert_eq!((shown.restarts, shown.error.as_str()), (1, ""));
    assert!(shown.last_reason.as_ref().unwrap().contains("signal 9"));
    assert_eq!(*bench.releases.get(), 0, "the device stays");
}

/// Conforms: vpn:15.19 vpn:15.29
#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_whose_restarts_all_fail_is_given_up_with_the_reason() {
    let bench = Bench::new("good").await;
    assert!(bench.start("https://a").await.success);
    bench.change_mode("die");

    kill(bench.pid());

    let shown = bench.until(|shown| shown.circuit_open).await;
    assert_eq!(shown.lifecycle, Lifecycle::Stopped);
    assert!(shown.error.contains("has panicked") && shown.error.contains("`warren up`"), "{}", shown.error);
    assert!(bench.service.desired.get().up, "it is still wanted");
    bench.change_mode("good");
    assert!(bench.start("https://a").await.success);
    assert!(!bench.service.tunnel.get().circuit_open);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_operation_is_refused_while_the_first_takes_its_time() {
    let bench = Bench::new("silent").await;
    let service = Arc::clone(&bench.service);
    let first = tokio::spawn(async move {
        service
            .tunnels
            .ask(LIMIT, |reply| Message::Start { order: order("https://a"), caller: ROOT, reply })
            .await
    });
    bench.until(|shown| shown.progress == Some(vpn::StartProgressStage::Finalizing)).await;
    let second = bench.stop().await;
    assert!(!second.success);
    assert_eq!(
        second.error_message,
        "Could not acquire tunnel operation lock, another operation is in progress"
    );
    first.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_minds_nothing_is_killed_in_the_end() {
    let bench = Bench::new("stubborn").await;
    assert!(bench.start("https://a").await.success);
    let pid = bench.pid();
    assert!(bench.stop().await.success);
    assert!(!is_alive(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_part_does_not_touch_the_tunnel_and_its_successor_watches_it() {
    let bench = Bench::new("good").await;
    assert!(bench.start("https://a").await.success);
    let pid = bench.pid();

    bench.service.tunnels.send(Report::Fault.into()).await.unwrap();

    let restarted = || bench.tree.snapshot().iter().any(|node| node.name == "tunnels" && node.restarts == 1);
    tokio::time::timeout(LIMIT, async {
        while !restarted() || bench.service.running.claim().is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert!(bench.start("https://a").await.success, "the same tunnel");
    assert_eq!(bench.pid(), pid);
    assert_eq!(bench.service.peers.get().agents().count(), 1);
    kill(pid);
    bench.until_started_again(pid).await;
}

/// Conforms: vpn:W25
#[tokio::test(flavor = "multi_thread")]
async fn after_a_sleep_of_the_machine_the_tunnel_is_told_once_and_without_one_nobody() {
    let bench = Bench::new("good").await;
    bench.service.tunnels.send(Report::Awake(Cause::Logind).into()).await.unwrap();
    assert!(bench.start("https://a").await.success, "nothing happens without a tunnel");
    let words = || bench.service.log.lines().iter().filter(|line| &***line == "woken").count();
    assert_eq!(words(), 0);

    for cause in [Cause::Resumed, Cause::Logind, Cause::Resumed] {
        bench.service.tunnels.send(Report::Awake(cause).into()).await.unwrap();
    }

    let told = async {
        while words() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, told).await.unwrap();
    assert!(bench.stop().await.success, "that it does not answer is no trouble");
    assert_eq!(words(), 1);
}

/// Conforms: vpn:15.19
#[tokio::test(flavor = "multi_thread")]
async fn the_next_service_resumes_what_the_last_one_was_told() {
    let bench = Bench::new("good").await;
    assert!(bench.start("https://a").await.success);
    let pid = bench.pid();

    assert!(bench.tree.stop(LIMIT).await);

    assert!(!is_alive(pid));
    let shown = bench.service.tunnel.get();
    assert_eq!((shown.lifecycle, shown.error.as_str()), (Lifecycle::Stopped, "the service is ending"));
    assert!(bench.service.desired.get().up);
    let next = Bench::in_folder("good", bench.folder).await;
    next.until(|shown| shown.lifecycle == Lifecycle::Started).await;
    assert_eq!(next.service.tunnel.get().owner, Some(1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_token_ends_a_resume_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let desired = Desired { up: true, order: Some(order("https://signed-out")) };
    crate::intent::store(folder.path(), &desired).unwrap();
    let bench = Bench::in_folder("good", folder).await;
    let shown = bench.until(|shown| shown.lifecycle == Lifecycle::Stopped && !shown.error.is_empty()).await;
    assert!(shown.error.contains("warren login"), "{}", shown.error);
    assert!(bench.service.desired.get().up);
}
