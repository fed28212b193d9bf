//! The tunnel's end of the private link: answers what its service asks.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    net::UnixStream,
    sync::{Semaphore, mpsc},
};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;
use warren_proto::link::{
    Exposition, Fault, Frame, PathEvents, PingAgent, PingResult, Pong, Tree, TunnelStatus, frame::Body,
    tree::Node,
};

use super::{AgentPing, LinkError, MAX_FRAME, PingBy, QUEUE, Reader, Writer};
use crate::tree::NodeInfo;

/// Pings of agents at the same time.
const MAX_PINGS: usize = 32;
/// The longest that a ping may be waited for.
const MAX_PING_LIMIT: Duration = Duration::from_secs(30);
/// Room for a frame around an exposition.
const FRAME_OVERHEAD: usize = 64;

/// Where the answers come from. None of them but the ping may wait.
pub trait Answers: Send + Sync + 'static {
    /// This process's metrics, Prometheus text format.
    fn exposition(&self) -> String;

    /// The supervision tree, depth first.
    fn tree(&self) -> Vec<NodeInfo>;

    /// What leg A cannot say.
    fn status(&self) -> TunnelStatus;

    /// Which paths changed after the event of this number.
    fn path_events(&self, after: u64) -> PathEvents;

    /// Pings an agent once; the error is in words for a person.
    fn ping(
        &self,
        agent: Uuid,
        by: PingBy,
        limit: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<AgentPing, String>> + Send>>;

    /// Forces a fault into a part, if this process allows that.
    fn fault(&self, actor: &str, kind: &str);
}

/// Answers until the link ends, and says why it did.
pub async fn serve(stream: UnixStream, answers: Arc<dyn Answers>) -> LinkError {
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (Reader::new(read), Writer { half: write });
    let greeted = tokio::try_join!(writer.hello(), reader.hello());
    if let Err(error) = greeted {
        return error;
    }
    let (outgoing, frames) = mpsc::channel(QUEUE);
    let server = Server { answers, outgoing, pings: Arc::new(Semaphore::new(MAX_PINGS)) };
    tokio::select! {
        error = server.read(reader) => error,
        error = write_all(writer, frames) => error,
    }
}

async fn write_all(mut writer: Writer, mut frames: mpsc::Receiver<Frame>) -> LinkError {
    while let Some(frame) = frames.recv().await {
        if let Err(error) = writer.send(&frame).await {
            return error;
        }
    }
    LinkError::Closed
}

struct Server {
    answers: Arc<dyn Answers>,
    outgoing: mpsc::Sender<Frame>,
    pings: Arc<Semaphore>,
}

impl Server {
    /// A service that asks without reading the answers is not read any further.
    async fn read(self, mut reader: Reader) -> LinkError {
        let mut running: Vec<AbortOnDropHandle<()>> = Vec::new();
        loop {
            let frame = match reader.next().await {
                Ok(frame) => frame,
                Err(error) => return error,
            };
            running.retain(|ping| !ping.is_finished());
            let answer = match frame.body {
                Some(Body::Ping(_)) => Body::Pong(Pong {}),
                Some(Body::Scrape(_)) => Body::Exposition(Exposition { text: self.exposition() }),
                Some(Body::TreeRequest(_)) => Body::Tree(tree(self.answers.tree())),
                Some(Body::StatusRequest(_)) => Body::TunnelStatus(self.answers.status()),
                Some(Body::PathEventsRequest(request)) => {
                    Body::PathEvents(self.answers.path_events(request.after))
                }
                Some(Body::PingAgent(request)) => match self.ping(frame.id, request) {
                    Ok(ping) => {
                        running.push(ping);
                        continue;
                    }
                    Err(reason) => Body::PingResult(PingResult { error: reason, ..PingResult::default() }),
                },
                Some(Body::Fault(Fault { actor, kind })) => {
                    self.answers.fault(&actor, &kind);
                    continue;
                }
                Some(
                    Body::Hello(_)
                    | Body::Pong(_)
                    | Body::Exposition(_)
                    | Body::Tree(_)
                    | Body::PingResult(_)
                    | Body::TunnelStatus(_)
                    | Body::PathEvents(_),
                )
                | None => {
                    // A newer service may ask what we do not know; it has deadlines.
                    tracing::debug!(id = frame.id, "a frame that is no question");
                    continue;
                }
            };
            if self.outgoing.send(Frame { id: frame.id, body: Some(answer) }).await.is_err() {
                return LinkError::Closed;
            }
        }
    }

    fn exposition(&self) -> String {
        let text = self.answers.exposition();
        if text.len() + FRAME_OVERHEAD > MAX_FRAME {
            tracing::error!(bytes = text.len(), "the exposition does not fit into a frame and is left out");
            return String::new();
        }
        text
    }

    fn ping(&self, id: u64, request: PingAgent) -> Result<AbortOnDropHandle<()>, String> {
        let agent =
            Uuid::from_slice(&request.agent_id).map_err(|_| "the agent's id is malformed".to_owned())?;
        let by = if request.tsmp { PingBy::Tsmp } else { PingBy::Disco };
        let permit = Arc::clone(&self.pings).try_acquire_owned();
        let permit = permit.map_err(|_| "too many pings at the same time".to_owned())?;
        let limit = request.limit.and_then(|limit| Duration::try_from(limit).ok());
        let limit = limit.unwrap_or(MAX_PING_LIMIT).min(MAX_PING_LIMIT);
        let (ping, outgoing) = (self.answers.ping(agent, by, limit), self.outgoing.clone());
        Ok(AbortOnDropHandle::new(tokio::spawn(async move {
            let _permit = permit;
            let outcome =
                tokio::time::timeout(limit, ping).await.unwrap_or(Err("no answer in time".to_owned()));
            let body = Body::PingResult(result(outcome));
            let _ = outgoing.send(Frame { id, body: Some(body) }).await;
        })))
    }
}

fn result(outcome: Result<AgentPing, String>) -> PingResult {
    match outcome {
        Ok(ping) => PingResult {
            latency: ping.latency.try_into().ok(),
            direct: ping.direct,
            region: ping.region,
            error: String::new(),
        },
        Err(error) => PingResult { error, ..PingResult::default() },
    }
}

fn tree(nodes: Vec<NodeInfo>) -> Tree {
    let node = |node: NodeInfo| Node {
        depth: node.depth,
        name: node.name.to_owned(),
        kind: node.kind.as_str().to_owned(),
        state: node.state.as_str().to_owned(),
        since: Some(node.since.into()),
        restarts: node.restarts,
        last_reason: node.last_reason.unwrap_or_default(),
        mailbox_depth: u64::try_from(node.mailbox_depth).unwrap_or(u64::MAX),
    };
    Tree { nodes: nodes.into_iter().map(node).collect() }
}
