//! The control plane: what a deployment tells its clients, and the handle that makes it fail and says what
//! it heard.

mod answer;
mod clock;
pub(crate) mod coordinator;
mod cork;
pub(crate) mod drpc;
mod fault;
pub(crate) mod listener;
pub(crate) mod map_source;
mod raw;
mod record;
pub(crate) mod relay_map;
mod resume;
pub(crate) mod rpc;
mod telemetry;
mod version;
mod websocket;
mod workspaces;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{broadcast, mpsc, watch};
use uuid::Uuid;
use warren_proto::{
    address::coder_address,
    tailnet::{self, CoordinateResponse, Node, coordinate_response::PeerUpdate},
};

pub use self::{
    answer::BUILD_VERSION,
    coordinator::ReplicaHealth,
    fault::{CallFault, Check, Endpoint, HttpFault, Method, Times},
    map_source::MapSource,
    raw::{Layer, Raw, Then},
    record::{Connection, Ended, Recording, Report, Reported, Request},
    relay_map::{EMBEDDED_REGION, FIRST_FURTHER_REGION, MapError},
    telemetry::Device,
    workspaces::{Status, Workspace, Workspaces},
};
use self::{
    coordinator::{CHUNK, Coordinator, Kind},
    fault::Faults,
    record::Recorder,
    resume::Tokens,
    telemetry::Batcher,
};
use crate::{LabOptions, relay::Relay, work::Work};

/// Injected updates that may wait for a stream; one that is further behind misses some.
const INJECTED: usize = 256;
/// Where the IDs of peers begin that there are not.
const FLOOD: u128 = 0xf100d << 64;

/// Everything of the control plane.
pub(crate) struct State {
    pub(crate) options: LabOptions,
    pub(crate) user: Uuid,
    pub(crate) deployment: Uuid,
    pub(crate) relay: Relay,
    pub(crate) coordinator: Arc<Coordinator>,
    pub(crate) workspaces: watch::Sender<Workspaces>,
    pub(crate) relay_map: watch::Sender<tailnet::DerpMap>,
    url: String,
    token: Mutex<String>,
    resume_lifetime: Mutex<Duration>,
    tokens: Tokens,
    faults: Faults,
    recorder: Recorder,
    telemetry: Mutex<Batcher>,
    live: Mutex<BTreeMap<usize, Live>>,
    cut_maps: watch::Sender<()>,
    cut_updates: watch::Sender<()>,
    /// Updates of workspaces that are told as they are.
    injected: broadcast::Sender<tailnet::WorkspaceUpdate>,
}

/// A connection that lives.
struct Live {
    work: Work,
    close: mpsc::Sender<websocket::Close>,
}

impl State {
    pub(crate) fn new(
        options: LabOptions,
        url: String,
        token: String,
        relay: Relay,
        map: tailnet::DerpMap,
    ) -> Self {
        Self {
            user: crate::random_id(),
            deployment: crate::random_id(),
            relay,
            coordinator: Arc::new(Coordinator::new(options.replicas)),
            workspaces: watch::Sender::default(),
            relay_map: watch::Sender::new(map),
            url,
            token: Mutex::new(token),
            resume_lifetime: Mutex::new(options.resume_lifetime),
            tokens: Tokens::default(),
            faults: Faults::default(),
            recorder: Recorder::default(),
            telemetry: Mutex::new(Batcher::new(options.telemetry_batch)),
            live: Mutex::default(),
            cut_maps: watch::Sender::new(()),
            cut_updates: watch::Sender::new(()),
            injected: broadcast::Sender::new(INJECTED),
            options,
        }
    }

    fn url(&self) -> String {
        self.url.clone()
    }

    fn token(&self) -> String {
        self.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn resume_lifetime(&self) -> Duration {
        *self.resume_lifetime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post_telemetry(&self, events: Vec<tailnet::TelemetryEvent>) {
        let mut batcher = self.telemetry.lock().unwrap_or_else(PoisonError::into_inner);
        self.recorder.telemetry(events.clone());
        batcher.post(events).into_iter().for_each(|batch| self.recorder.telemetry_batch(batch));
    }

    /// Hands on what telemetry waits.
    pub(crate) fn flush_telemetry(&self) {
        let mut batcher = self.telemetry.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(batch) = batcher.flush() {
            self.recorder.telemetry_batch(batch);
        }
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<usize, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The handle of the control plane: faults and recordings. Clones are the same.
#[derive(Clone)]
pub struct Control(pub(crate) Arc<State>);

impl Control {
    // What is recorded.

    /// A copy of everything recorded so far.
    #[must_use]
    pub fn recording(&self) -> Recording {
        self.0.recorder.read(Clone::clone)
    }

    /// Looks at the recording without copying it.
    pub fn read<T>(&self, look: impl FnOnce(&Recording) -> T) -> T {
        self.0.recorder.read(look)
    }

    /// Waits until the recording holds something, at most `limit`.
    pub async fn wait<T>(&self, limit: Duration, find: impl FnMut(&Recording) -> Option<T>) -> Option<T> {
        self.0.recorder.wait(limit, find).await
    }

    /// The peer IDs of the clients that coordinate now.
    #[must_use]
    pub fn clients(&self) -> Vec<Uuid> {
        self.0.coordinator.clients()
    }

    /// The tunnels that are open: source and destination.
    #[must_use]
    pub fn tunnels(&self) -> Vec<(Uuid, Uuid)> {
        self.0.coordinator.tunnels()
    }

    /// What a peer, client or agent, has told of itself.
    #[must_use]
    pub fn node(&self, peer: Uuid) -> Option<Node> {
        self.0.coordinator.node(peer)
    }

    /// How many control connections live.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.live().len()
    }

    /// The ID of the lab's user.
    #[must_use]
    pub fn user(&self) -> Uuid {
        self.0.user
    }

    // Faults of the HTTP layer.

    /// Makes an endpoint fail.
    pub fn fail(&self, endpoint: Endpoint, fault: HttpFault, times: Times) {
        self.0.faults.http().arm(endpoint, fault, times);
    }

    /// Makes a check of the tailnet endpoint fail.
    pub fn fail_check(&self, check: Check, times: Times) {
        self.0.faults.checks().arm(check, (), times);
    }

    /// Makes a call fail.
    pub fn fail_call(&self, method: Method, fault: CallFault, times: Times) {
        self.0.faults.calls().arm(method, fault, times);
    }

    /// Spoils connections: up to a layer all is in order, and in its place come these bytes.
    pub fn fail_layer(&self, layer: Layer, raw: Raw, times: Times) {
        self.0.faults.layers().arm(layer, raw, times);
    }

    /// Ends the faults of one endpoint.
    pub fn heal_endpoint(&self, endpoint: Endpoint) {
        self.0.faults.http().disarm(&endpoint);
    }

    /// Ends the faults of one call.
    pub fn heal_call(&self, method: Method) {
        self.0.faults.calls().disarm(&method);
    }

    /// Ends the failing of one check.
    pub fn heal_check(&self, check: Check) {
        self.0.faults.checks().disarm(&check);
    }

    /// Ends all faults of endpoints, checks, calls and layers.
    pub fn heal(&self) {
        self.0.faults.heal();
    }

    /// Accepts another token from now on: the one before is signed out.
    pub fn set_token(&self, token: &str) {
        token.clone_into(&mut self.0.token.lock().unwrap_or_else(PoisonError::into_inner));
    }

    // Faults of connections and streams.

    /// Cuts every control connection without a word.
    pub fn drop_connections(&self) {
        for (connection, live) in std::mem::take(&mut *self.0.live()) {
            live.work.cancel();
            self.0.recorder.ended(connection, Ended::ByLab);
        }
    }

    /// Closes every control connection with a close frame.
    pub fn close_connections(&self, code: u16, reason: &str) {
        for live in self.0.live().values() {
            let _ = live.close.try_send((code, reason.to_owned()));
        }
    }

    /// Closes the stream of a method on every connection; unary calls have none.
    pub fn close_stream(&self, method: Method) {
        match method {
            Method::Coordinate => self.0.coordinator.drop_clients(""),
            Method::StreamDerpMaps => {
                self.0.cut_maps.send_replace(());
            }
            Method::WorkspaceUpdates => {
                self.0.cut_updates.send_replace(());
            }
            Method::RefreshResumeToken | Method::PostTelemetry => {}
        }
    }

    // Faults of coordination.

    /// Sends an error text to every client; the streams stay.
    pub fn send_error(&self, text: &str) {
        let error = tailnet::CoordinateResponse { error: text.to_owned(), ..Default::default() };
        self.0.coordinator.inject(&error);
    }

    /// Sends any response to every client, as it is.
    pub fn inject(&self, response: &tailnet::CoordinateResponse) {
        self.0.coordinator.inject(response);
    }

    /// Tells every client of so many peers that there are not, in responses as long as any.
    pub fn flood_peers(&self, count: u32) {
        let ids: Vec<Uuid> = (0..count).map(|number| Uuid::from_u128(FLOOD | u128::from(number))).collect();
        for some in ids.chunks(CHUNK) {
            let peer_updates = some.iter().map(flooding).collect();
            self.inject(&CoordinateResponse { peer_updates, error: String::new() });
        }
    }

    /// Tells every stream of workspaces this, as it is; what is told later does not know of it.
    pub fn inject_workspaces(&self, update: tailnet::WorkspaceUpdate) {
        // Without a stream there is nobody to tell.
        let _ = self.0.injected.send(update);
    }

    /// Sends an error text to every client and closes the coordination streams.
    pub fn refuse_clients(&self, text: &str) {
        self.0.coordinator.drop_clients(text);
    }

    /// Says that an agent is lost, though it is not.
    pub fn pretend_lost(&self, agent: Uuid) {
        self.0.coordinator.pretend_gone(agent, Kind::Lost, "lost");
    }

    /// Says that an agent has left, though it has not.
    pub fn pretend_disconnected(&self, agent: Uuid) {
        self.0.coordinator.pretend_gone(agent, Kind::Disconnected, "graceful disconnect");
    }

    /// Tells an agent's node once more, as after [`Control::pretend_lost`] or as a duplicate. The agent
    /// learns nothing of it.
    pub fn repeat_node(&self, agent: Uuid) {
        self.0.coordinator.repeat_node(agent);
    }

    /// Holds back that agents are ready; `false` tells what was held and ends it.
    pub fn hold_ready(&self, hold: bool) {
        self.0.coordinator.hold_ready(hold);
    }

    /// Refuses tunnels to an agent, or no more.
    pub fn forbid(&self, agent: Uuid, is_forbidden: bool) {
        self.0.coordinator.forbid(agent, is_forbidden);
    }

    /// Closes the coordinator: every stream ends, and new ones stay silent.
    pub fn close_coordinator(&self) {
        self.0.coordinator.close();
    }

    /// Ends [`Control::close_coordinator`].
    pub fn reopen_coordinator(&self) {
        self.0.coordinator.reopen();
    }

    /// Changes how one of [`LabOptions::replicas`] does, counted from 0.
    pub fn set_replica(&self, number: usize, health: ReplicaHealth) {
        self.0.coordinator.set_replica(number, health);
    }

    // What the deployment says.

    /// The relay map as it is told now.
    #[must_use]
    pub fn relay_map(&self) -> tailnet::DerpMap {
        self.0.relay_map.borrow().clone()
    }

    /// Tells another relay map.
    pub fn set_relay_map(&self, map: tailnet::DerpMap) {
        self.0.relay_map.send_replace(map);
    }

    /// The workspaces as they are told now.
    #[must_use]
    pub fn workspaces(&self) -> Workspaces {
        self.0.workspaces.borrow().clone()
    }

    /// Changes the workspaces in any way; agents that nobody runs may be told of. Changes made together
    /// are told together.
    pub fn change_workspaces(&self, change: impl FnOnce(&mut Workspaces)) {
        self.0.workspaces.send_modify(change);
        let known: Vec<Uuid> = self
            .0
            .workspaces
            .borrow()
            .0
            .values()
            .flat_map(|workspace| workspace.agents.keys().copied())
            .collect();
        known.into_iter().for_each(|agent| self.0.coordinator.allow(agent));
    }

    /// Renames a workspace. Returns whether there is one.
    pub fn rename_workspace(&self, name: &str, new_name: &str) -> bool {
        let id = self.0.workspaces.borrow().find(name);
        self.change_workspaces(|all| {
            if let Some(workspace) = id.and_then(|id| all.0.get_mut(&id)) {
                new_name.clone_into(&mut workspace.name);
            }
        });
        id.is_some()
    }

    /// Sets the status of a workspace. Returns whether there is one.
    pub fn set_workspace_status(&self, name: &str, status: Status) -> bool {
        let id = self.0.workspaces.borrow().find(name);
        self.change_workspaces(|all| {
            if let Some(workspace) = id.and_then(|id| all.0.get_mut(&id)) {
                workspace.status = status;
            }
        });
        id.is_some()
    }

    /// Sets how long resume tokens are good that are issued from now on.
    pub fn set_resume_lifetime(&self, lifetime: Duration) {
        *self.0.resume_lifetime.lock().unwrap_or_else(PoisonError::into_inner) = lifetime;
    }

    /// Makes every resume token worthless that was issued so far.
    pub fn forget_resume_tokens(&self) {
        self.0.tokens.forget();
    }

    /// Puts the deployment's date forward, by which tokens expire.
    pub fn advance_clock(&self, by: Duration) {
        self.0.tokens.clock.advance(by);
    }
}

fn flooding(id: &Uuid) -> PeerUpdate {
    let prefix = vec![format!("{}/128", coder_address(id))];
    let key = [id.as_bytes().as_slice(), id.as_bytes().as_slice()].concat();
    let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let node = Node {
        key: [b"np".as_slice(), &key].concat().into(),
        disco: format!("discokey:{digits}"),
        preferred_derp: 999,
        addresses: prefix.clone(),
        allowed_ips: prefix,
        ..Node::default()
    };
    PeerUpdate {
        id: id.as_bytes().to_vec().into(),
        node: Some(node),
        kind: Kind::Node.into(),
        reason: "update".to_owned(),
    }
}
