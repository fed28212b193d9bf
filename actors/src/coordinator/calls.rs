//! The calls of one control connection (tailnet-control 4 and 7 to 9). Each is a future of its own, and all are
//! polled by the connection's task at all times: what one has to say never keeps another from reading.

use std::{
    convert::Infallible,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::{
    sync::Notify,
    time::{sleep, sleep_until, timeout_at},
};
use uuid::Uuid;
use warren_core::{
    own_node::{OwnIdentity, OwnNode},
    relay_map::RelayMap,
    roster::Update,
};
use warren_observability::redact::one_line;
use warren_proto::{
    frame::Message,
    tailnet::{
        CoordinateRequest, CoordinateResponse, DerpMap, RefreshResumeTokenRequest, StreamDerpMapsRequest,
        WorkspaceUpdate, WorkspaceUpdatesRequest, coordinate_request::Disconnect,
    },
};

use super::{
    Shared,
    error::ControlError,
    memory::ResumeToken,
    peers::now,
    rpc::{Answers, CallError, MAX_SAID, Method, Requests, Rpc},
};
use crate::facts::Identity;

/// For the first relay map and the first list of workspaces, from the opening of the connection: a
/// deployment sends both at once.
const FIRST_ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// For the answer to a request for a resume token.
const UNARY_LIMIT: Duration = Duration::from_secs(10);

/// The calls of one connection.
pub(super) struct Calls<'a> {
    shared: &'a Shared,
    rpc: Rpc,
    owner: Uuid,
    attempt: u64,
    first_map: Notify,
    first_snapshot: Notify,
}

type Ended = Result<Infallible, ControlError>;

impl<'a> Calls<'a> {
    /// Calls to be made over `rpc` by this attempt, for the workspaces of `owner`.
    pub(super) fn new(shared: &'a Shared, rpc: Rpc, owner: Uuid, attempt: u64) -> Self {
        Self { shared, rpc, owner, attempt, first_map: Notify::new(), first_snapshot: Notify::new() }
    }

    /// Makes all calls, until one ends without which the others are worth nothing. `proven` runs beside them
    /// once the connection has proved useful.
    pub(super) async fn run(&self, proven: impl AsyncFnOnce()) -> Ended {
        tokio::select! {
            biased;
            ended = self.coordinate() => ended,
            ended = self.relay_maps() => ended,
            ended = self.workspace_updates() => ended,
            ended = self.prove(proven) => ended,
            ended = self.resume_tokens() => match ended {},
        }
    }

    async fn prove(&self, proven: impl AsyncFnOnce()) -> Ended {
        let deadline = tokio::time::Instant::now() + FIRST_ANSWER_LIMIT;
        for (first, owed) in [(&self.first_map, "relay map"), (&self.first_snapshot, "list of workspaces")] {
            let silent = |_| ControlError::Silent { owed, limit: FIRST_ANSWER_LIMIT };
            timeout_at(deadline, first.notified()).await.map_err(silent)?;
        }
        proven().await;
        std::future::pending().await
    }

    async fn coordinate(&self) -> Ended {
        let opened = self.rpc.bidirectional(Method::Coordinate).await;
        let (mut requests, mut answers) = opened.map_err(failed(Method::Coordinate))?;
        self.shared.peers.connected();
        let ended = tokio::select! {
            biased;
            ended = self.hear_of_peers(&mut answers) => ended,
            ended = self.tell(&mut requests) => ended,
        };
        if self.shared.stop.is_cancelled() {
            requests.close().await;
        }
        ended
    }

    async fn hear_of_peers(&self, answers: &mut Answers<CoordinateResponse>) -> Ended {
        let mut said = None;
        while let Some(response) = answers.next().await.map_err(failed(Method::Coordinate))? {
            self.shared.note_update();
            if let Some(error) = self.shared.peers.handle_response(&response) {
                let error = self.shared.tellable(&one_line(&error, MAX_SAID));
                tracing::warn!(error, "the deployment reports an error about peers");
                said = Some(error);
            }
        }
        Err(ControlError::Ended { call: Method::Coordinate.name(), said })
    }

    /// Sends what there is to say, and last that we leave; then the deployment ends the call.
    async fn tell(&self, requests: &mut Requests<CoordinateRequest>) -> Ended {
        let Shared { net, peers, stop, .. } = self.shared;
        let (mut home, mut latencies) = (net.home.view(), net.latencies.view());
        let (mut forced_websocket, mut endpoints) = (net.forced_websocket.view(), net.endpoints.view());
        let mut own_node = OwnNode::new(own_identity(&net.identity));
        own_node.connected();
        while !stop.is_cancelled() {
            own_node.set_home(*home.get());
            own_node.set_latencies(latencies.get().as_ref().clone());
            own_node.set_forced_websocket(forced_websocket.get().as_ref().clone());
            own_node.set_endpoints(endpoints.get().as_ref().clone());
            let mut batch = peers.take_outgoing()?;
            batch.extend(own_node.poll_update(now(), SystemTime::now()));
            if !batch.is_empty() {
                requests.send(&batch).await.map_err(failed(Method::Coordinate))?;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = peers.to_send.notified() => {}
                _ = home.changed() => {}
                _ = latencies.changed() => {}
                _ = forced_websocket.changed() => {}
                _ = endpoints.changed() => {}
                () = until(own_node.poll_timeout(now())) => {}
            }
        }
        let farewell = CoordinateRequest { disconnect: Some(Disconnect {}), ..CoordinateRequest::default() };
        requests.send(&[farewell]).await.map_err(failed(Method::Coordinate))?;
        std::future::pending().await
    }

    async fn relay_maps(&self) -> Ended {
        const METHOD: Method = Method::StreamDerpMaps;
        let opened = self.rpc.server_stream::<_, DerpMap>(METHOD, &StreamDerpMapsRequest {}).await;
        let (requests, answers) = opened.map_err(failed(METHOD))?;
        let take = |map: DerpMap| {
            self.shared.take_relay_map(RelayMap::from_proto(&map));
            self.first_map.notify_one();
            Ok(())
        };
        self.hear(METHOD, requests, answers, take).await
    }

    async fn workspace_updates(&self) -> Ended {
        const METHOD: Method = Method::WorkspaceUpdates;
        let request =
            WorkspaceUpdatesRequest { workspace_owner_id: Bytes::copy_from_slice(self.owner.as_bytes()) };
        let opened = self.rpc.server_stream::<_, WorkspaceUpdate>(METHOD, &request).await;
        let (requests, answers) = opened.map_err(failed(METHOD))?;
        let mut update = Update::Snapshot;
        let take = |message: WorkspaceUpdate| {
            self.shared.take_workspaces(&message, update)?;
            self.first_snapshot.notify_one();
            update = Update::Diff;
            Ok(())
        };
        self.hear(METHOD, requests, answers, take).await
    }

    /// Takes what comes until the deployment ends the call. When we leave, it is closed in order and read to its
    /// end: the connection ends with the Coordinate call.
    async fn hear<Q, A>(
        &self,
        method: Method,
        mut requests: Requests<Q>,
        mut answers: Answers<A>,
        mut take: impl FnMut(A) -> Result<(), ControlError>,
    ) -> Ended
    where
        Q: Message,
        A: Message + Default,
    {
        let hearing = async {
            while let Some(message) = answers.next().await.map_err(failed(method))? {
                self.shared.note_update();
                take(message)?;
            }
            Err(ControlError::Ended { call: method.name(), said: None })
        };
        if let Some(ended) = self.shared.stop.run_until_cancelled(hearing).await {
            return ended;
        }
        requests.close().await;
        while let Ok(Some(_)) = answers.next().await {}
        std::future::pending().await
    }

    /// Keeps the newest resume token in memory. A failure costs us the token on a reconnect, nothing else.
    async fn resume_tokens(&self) -> Infallible {
        const METHOD: Method = Method::RefreshResumeToken;
        loop {
            match self.rpc.unary(METHOD, &RefreshResumeTokenRequest {}, UNARY_LIMIT).await {
                Ok(response) => {
                    let (token, refresh_in) = ResumeToken::of(response);
                    self.shared.memory.keep_resume_token(self.attempt, token);
                    sleep(refresh_in).await;
                }
                Err(CallError::Unimplemented) => {
                    tracing::debug!("the deployment has no resume tokens");
                    return std::future::pending().await;
                }
                Err(error) => {
                    let error = self.shared.tellable(&error);
                    tracing::warn!(error, "no resume token for this connection");
                    return std::future::pending().await;
                }
            }
        }
    }
}

fn own_identity(identity: &Identity) -> OwnIdentity {
    OwnIdentity {
        node_id: identity.node_id,
        node_key: identity.node.public(),
        disco_key: identity.disco.public(),
        address: identity.address,
    }
}

fn failed(method: Method) -> impl Fn(CallError) -> ControlError {
    move |source| ControlError::Call { call: method.name(), source }
}

async fn until(due: Option<std::time::Instant>) {
    match due {
        Some(due) => sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
