//! The service's end of the private link: asks its tunnel, within a deadline each, and believes no more of
//! the answers than it must.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;
use warren_observability::redact::one_line;
use warren_proto::{
    correlator::Correlator,
    link::{
        Fault, Frame, Netcheck, PathEvents, PathEventsRequest, Ping, PingAgent, PingResult, Scrape,
        StatusRequest, TreeRequest, TunnelStatus, frame::Body, tree::Node,
    },
};

use super::{AgentPing, LinkError, PingBy, QUEUE, Reader, Writer};

/// Questions that wait for an answer at the same time.
const MAX_OPEN: usize = 128;
/// Characters of the longest text that is taken over.
const MAX_TEXT: usize = 256;
/// Lines of the longest tree that is taken over.
const MAX_NODES: usize = 256;
/// Relays of the longest list that is taken over.
const MAX_RELAYS: usize = 64;
/// Own addresses of the longest list that is taken over.
const MAX_ENDPOINTS: usize = 64;
/// Changes of paths that are taken over at a time.
const MAX_EVENTS: usize = 256;
/// What a tunnel can lack at most.
const MAX_ABSENT: usize = 32;

/// Asks a tunnel process. Cheap to clone; the link ends with the last clone.
#[derive(Clone)]
pub struct LinkClient {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Frame>,
    _life: Arc<DropGuard>,
}

struct Shared {
    /// `None` once no answer can come any more.
    open: Mutex<Option<Correlator<oneshot::Sender<Body>>>>,
    end: OnceLock<LinkError>,
    over: CancellationToken,
}

impl LinkClient {
    /// Greets the tunnel and starts to listen.
    pub async fn connect(stream: UnixStream) -> Result<Self, LinkError> {
        let (read, write) = stream.into_split();
        let (mut reader, mut writer) = (Reader::new(read), Writer { half: write });
        tokio::try_join!(writer.hello(), reader.hello())?;
        let (queue, frames) = mpsc::channel(QUEUE);
        let life = CancellationToken::new();
        let shared = Arc::new(Shared {
            open: Mutex::new(Some(Correlator::default())),
            end: OnceLock::new(),
            over: CancellationToken::new(),
        });
        tokio::spawn(Arc::clone(&shared).run(reader, writer, frames, life.clone()));
        Ok(Self { shared, queue, _life: Arc::new(life.drop_guard()) })
    }

    /// Whether the tunnel's tasks still get their turn.
    pub async fn liveness(&self, limit: Duration) -> Result<(), LinkError> {
        match self.ask(Body::Ping(Ping {}), limit).await? {
            Body::Pong(_) => Ok(()),
            _ => Err(LinkError::Unfitting),
        }
    }

    /// The tunnel's exposition, unchecked but for its size.
    pub async fn scrape(&self, limit: Duration) -> Result<String, LinkError> {
        match self.ask(Body::Scrape(Scrape {}), limit).await? {
            Body::Exposition(exposition) => Ok(exposition.text),
            _ => Err(LinkError::Unfitting),
        }
    }

    /// The tunnel's supervision tree, depth first.
    pub async fn tree(&self, limit: Duration) -> Result<Vec<Node>, LinkError> {
        match self.ask(Body::TreeRequest(TreeRequest {}), limit).await? {
            Body::Tree(tree) => Ok(tree.nodes.into_iter().take(MAX_NODES).map(tame_node).collect()),
            _ => Err(LinkError::Unfitting),
        }
    }

    /// What leg A cannot say.
    pub async fn status(&self, limit: Duration) -> Result<TunnelStatus, LinkError> {
        match self.ask(Body::StatusRequest(StatusRequest {}), limit).await? {
            Body::TunnelStatus(status) => Ok(tame_status(status)),
            _ => Err(LinkError::Unfitting),
        }
    }

    /// Which paths changed after the event of this number.
    pub async fn path_events(&self, after: u64, limit: Duration) -> Result<PathEvents, LinkError> {
        match self.ask(Body::PathEventsRequest(PathEventsRequest { after }), limit).await? {
            Body::PathEvents(events) => Ok(tame_events(events)),
            _ => Err(LinkError::Unfitting),
        }
    }

    /// Pings an agent once. The inner error is in words for a person.
    pub async fn ping_agent(
        &self,
        agent: Uuid,
        by: PingBy,
        limit: Duration,
    ) -> Result<Result<AgentPing, String>, LinkError> {
        let agent_id = agent.as_bytes().to_vec().into();
        let tsmp = by == PingBy::Tsmp;
        let question = Body::PingAgent(PingAgent { agent_id, limit: limit.try_into().ok(), tsmp });
        // The tunnel counts the limit itself; its word that there was no answer should still arrive.
        match self.ask(question, limit + Duration::from_secs(1)).await? {
            Body::PingResult(result) => ping(result),
            _ => Err(LinkError::Unfitting),
        }
    }

    /// Forces a fault into a part of the tunnel, if the tunnel allows that. There is no answer.
    pub async fn fault(&self, actor: &str, kind: &str, limit: Duration) -> Result<(), LinkError> {
        let fault = Fault { actor: actor.to_owned(), kind: kind.to_owned() };
        let sending = self.queue.send(Frame { id: 0, body: Some(Body::Fault(fault)) });
        timeout(limit, sending).await.map_err(|_| LinkError::Deadline)?.map_err(|_| self.shared.reason())
    }

    /// Waits until the link is over, and says why.
    pub async fn closed(&self) -> LinkError {
        self.shared.over.cancelled().await;
        self.shared.reason()
    }

    async fn ask(&self, question: Body, limit: Duration) -> Result<Body, LinkError> {
        let (waiter, answer) = oneshot::channel();
        let id = self.shared.register(waiter)?;
        let _forget = Forget { shared: &self.shared, id };
        let conversation = async {
            let frame = Frame { id, body: Some(question) };
            self.queue.send(frame).await.map_err(|_| self.shared.reason())?;
            answer.await.map_err(|_| self.shared.reason())
        };
        timeout(limit, conversation).await.unwrap_or(Err(LinkError::Deadline))
    }
}

/// A question that nobody waits for any more; a late answer is ignored.
struct Forget<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(open) = self.shared.open().as_mut() {
            open.cancel(self.id);
        }
    }
}

impl Shared {
    fn register(&self, waiter: oneshot::Sender<Body>) -> Result<u64, LinkError> {
        let mut open = self.open();
        let Some(open) = open.as_mut() else { return Err(self.reason()) };
        if open.len() >= MAX_OPEN {
            return Err(LinkError::Busy);
        }
        let id = open.next_id();
        open.register(id, waiter);
        Ok(id)
    }

    async fn run(
        self: Arc<Self>,
        reader: Reader,
        writer: Writer,
        frames: mpsc::Receiver<Frame>,
        life: CancellationToken,
    ) {
        let end = tokio::select! {
            error = self.read(reader) => error,
            error = write(writer, frames) => error,
            () = life.cancelled() => LinkError::Closed,
        };
        let _ = self.end.set(end);
        *self.open() = None;
        self.over.cancel();
    }

    async fn read(&self, mut reader: Reader) -> LinkError {
        loop {
            match reader.next().await {
                Ok(Frame { id, body: Some(body) }) => {
                    let waiter = self.open().as_mut().and_then(|open| open.resolve(id));
                    if let Some(waiter) = waiter {
                        let _ = waiter.send(body);
                    }
                }
                Ok(Frame { body: None, .. }) => {}
                Err(error) => return error,
            }
        }
    }

    fn reason(&self) -> LinkError {
        self.end.get().cloned().unwrap_or(LinkError::Closed)
    }

    fn open(&self) -> MutexGuard<'_, Option<Correlator<oneshot::Sender<Body>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn write(mut writer: Writer, mut frames: mpsc::Receiver<Frame>) -> LinkError {
    while let Some(frame) = frames.recv().await {
        if let Err(error) = writer.send(&frame).await {
            return error;
        }
    }
    LinkError::Closed
}

fn ping(result: PingResult) -> Result<Result<AgentPing, String>, LinkError> {
    let Some(latency) = result.latency else { return Ok(Err(tame(result.error))) };
    let latency = latency.try_into().map_err(|_| LinkError::Unfitting)?;
    Ok(Ok(AgentPing { latency, direct: result.direct, region: tame(result.region) }))
}

fn tame_node(node: Node) -> Node {
    Node {
        name: tame(node.name),
        kind: tame(node.kind),
        state: tame(node.state),
        last_reason: tame(node.last_reason),
        ..node
    }
}

fn tame_status(mut status: TunnelStatus) -> TunnelStatus {
    status.relays.truncate(MAX_RELAYS);
    for relay in &mut status.relays {
        for text in [&mut relay.region, &mut relay.state, &mut relay.error] {
            *text = tame(std::mem::take(text));
        }
    }
    status.absent.truncate(MAX_ABSENT);
    if let Some(netcheck) = &mut status.netcheck {
        tame_netcheck(netcheck);
    }
    TunnelStatus {
        control: tame(status.control),
        control_error: tame(status.control_error),
        home_region: tame(status.home_region),
        absent: status.absent.into_iter().map(tame).collect(),
        ..status
    }
}

fn tame_events(mut events: PathEvents) -> PathEvents {
    events.events.truncate(MAX_EVENTS);
    for event in &mut events.events {
        for text in [&mut event.from, &mut event.to, &mut event.reason] {
            *text = tame(std::mem::take(text));
        }
    }
    events
}

fn tame_netcheck(netcheck: &mut Netcheck) {
    netcheck.endpoints.truncate(MAX_ENDPOINTS);
    netcheck.regions.truncate(MAX_RELAYS);
    let names = netcheck.regions.iter_mut().map(|region| &mut region.name);
    let own = [&mut netcheck.mapped_v4, &mut netcheck.mapped_v6];
    for text in names.chain(own).chain(&mut netcheck.endpoints) {
        *text = tame(std::mem::take(text));
    }
}

/// Texts from the tunnel are shown on terminals: short, and without control characters.
fn tame(text: String) -> String {
    one_line(&text, MAX_TEXT)
}
