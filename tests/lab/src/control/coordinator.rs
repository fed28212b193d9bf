//! The coordinator: peers, the tunnels between them, and who must hear what (tailnet-control 4.5 to 4.7).
//!
//! A plain table under one lock. Each peer has a bounded queue of responses; a peer whose queue is full is
//! dropped, as a real coordinator does. The end of a queue means that the stream is closed.

mod authority;
mod replicas;
mod tunnels;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::mpsc::{self, error::TrySendError};
use uuid::Uuid;
use warren_proto::tailnet::{CoordinateRequest, CoordinateResponse, Node, coordinate_response::PeerUpdate};

pub use self::replicas::ReplicaHealth;
use self::{authority::Authority, replicas::Replicas, tunnels::Tunnels};

pub(crate) use warren_proto::tailnet::coordinate_response::peer_update::Kind;

/// Responses that may wait for one peer.
pub(crate) const OUTPUT_QUEUE: usize = 512;
/// Updates of one response.
pub(crate) const CHUNK: usize = 1024;

/// What a peer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Auth {
    /// Opens tunnels to the agents that its user may reach.
    Client,
    /// Is a destination, and says when it is ready.
    Agent,
}

/// Why a peer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// Its stream ended or broke.
    Lost,
    /// It sent what may not be sent.
    Refused(String),
}

/// A peer's place in the table; a later stream with the same ID has another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) id: Uuid,
    stream: u64,
}

/// What a request led to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Handled {
    /// The stream goes on.
    Open,
    /// The peer said goodbye: its stream is to be closed.
    Left,
}

#[derive(Default)]
pub(crate) struct Coordinator {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    peers: BTreeMap<Uuid, Peer>,
    tunnels: Tunnels,
    streams: u64,
    is_closed: bool,
    authority: Authority,
    /// Readiness that is withheld, if it is: agent and client.
    held: Option<Vec<(Uuid, Uuid)>>,
    /// Serve in place of everything but the authority, if there are any.
    replicas: Option<Replicas>,
}

struct Peer {
    stream: u64,
    auth: Auth,
    node: Option<Node>,
    /// `None` on a coordinator that has closed: such a stream stays silent.
    output: mpsc::Sender<CoordinateResponse>,
    /// The node last told about each other peer.
    sent: BTreeMap<Uuid, Node>,
}

impl Coordinator {
    /// A coordinator of several replicas; of none, one that keeps everything to itself.
    pub(crate) fn new(replicas: usize) -> Self {
        let replicas = (replicas > 0).then(|| Replicas::new(replicas));
        Self { inner: Mutex::new(Inner { replicas, ..Inner::default() }) }
    }

    /// Opens a stream for a peer. An older stream of the same peer is displaced.
    pub(crate) fn open(&self, id: Uuid, auth: Auth) -> (Place, mpsc::Receiver<CoordinateResponse>) {
        let mut inner = self.lock();
        if let Some(replicas) = &mut inner.replicas {
            return replicas.open(id, auth);
        }
        let (output, responses) = mpsc::channel(OUTPUT_QUEUE);
        inner.streams += 1;
        let place = Place { id, stream: inner.streams };
        if inner.is_closed {
            // A coordinator that has closed takes new streams and says nothing on them, ever: the queue
            // must not end before the stream does.
            inner
                .peers
                .insert(id, Peer { stream: place.stream, auth, node: None, output, sent: BTreeMap::new() });
            return (place, responses);
        }
        if let Some(old) = inner.peers.remove(&id) {
            let _ = old.output.try_send(error("peer ID overwritten by new connection".to_owned()));
        }
        inner
            .peers
            .insert(id, Peer { stream: place.stream, auth, node: None, output, sent: BTreeMap::new() });
        let known: Vec<Uuid> = inner.tunnels.peers_of(id).into_iter().collect();
        let nodes = known.iter().filter_map(|other| Some((*other, inner.peers.get(other)?.node.clone()?)));
        let updates: Vec<PeerUpdate> = nodes.map(|(other, node)| node_update(other, node, "init")).collect();
        inner.tell(id, updates);
        (place, responses)
    }

    /// Handles one request. An error is fatal for the stream, which is then to be ended with
    /// [`Coordinator::leave`].
    pub(crate) fn handle(&self, place: Place, request: CoordinateRequest) -> Result<Handled, String> {
        let mut inner = self.lock();
        if let Inner { replicas: Some(replicas), authority, .. } = &mut *inner {
            return replicas.handle(authority, place, &request);
        }
        let auth = match inner.peers.get(&place.id) {
            Some(peer) if peer.stream == place.stream => peer.auth,
            // Displaced or dropped: the end of its queue says so.
            _ => return Ok(Handled::Open),
        };
        if inner.is_closed {
            return Ok(Handled::Open);
        }
        inner.authority.check(place.id, auth, &request)?;
        if let Some(update) = request.update_self {
            // A real coordinator does not survive this one.
            let node = update.node.ok_or("update_self without a node")?;
            inner.update_self(place.id, node);
        }
        if let Some(tunnel) = request.add_tunnel {
            inner.add_tunnel(place.id, uuid(&tunnel.id)?);
        }
        if let Some(tunnel) = request.remove_tunnel {
            inner.remove_tunnel(place.id, uuid(&tunnel.id)?);
        }
        if request.disconnect.is_some() {
            inner.remove(place.id, Kind::Disconnected, "graceful disconnect");
            return Ok(Handled::Left);
        }
        for ready in request.ready_for_handshake {
            let other = uuid(&ready.id).map_err(|text| format!("handle ack: {text}"))?;
            inner.ready(place.id, other);
        }
        Ok(Handled::Open)
    }

    /// Ends a stream; nothing if the peer has another by now.
    pub(crate) fn leave(&self, place: Place, gone: Gone) {
        let mut inner = self.lock();
        if let Some(replicas) = &mut inner.replicas {
            return replicas.leave(place, gone);
        }
        let Some(peer) = inner.peers.get(&place.id).filter(|peer| peer.stream == place.stream) else {
            return;
        };
        if let Gone::Refused(text) = gone {
            let _ = peer.output.try_send(error(text));
        }
        inner.remove(place.id, Kind::Lost, "lost");
    }

    /// Opens a tunnel from one peer to another as if it had asked; not where there are replicas.
    pub(crate) fn introduce(&self, from: Uuid, to: Uuid) {
        self.lock().add_tunnel(from, to);
    }

    /// Lets a peer leave in good order, whoever serves its stream.
    pub(crate) fn say_goodbye(&self, id: Uuid) {
        let mut inner = self.lock();
        match &mut inner.replicas {
            Some(replicas) => replicas.say_goodbye(id),
            None => inner.remove(id, Kind::Disconnected, "graceful disconnect"),
        }
    }

    /// Makes an agent known, so that clients may open tunnels to it.
    pub(crate) fn allow(&self, agent: Uuid) {
        self.lock().authority.agents.insert(agent);
    }

    /// Forgets an agent for clients to come.
    pub(crate) fn forget(&self, agent: Uuid) {
        self.lock().authority.agents.remove(&agent);
    }

    /// Whether clients may open tunnels to an agent.
    pub(crate) fn forbid(&self, agent: Uuid, is_forbidden: bool) {
        let forbidden = &mut self.lock().authority.forbidden;
        if is_forbidden {
            forbidden.insert(agent)
        } else {
            forbidden.remove(&agent)
        };
    }

    /// Whether READY_FOR_HANDSHAKE is held back; what was held is sent when it is no more.
    pub(crate) fn hold_ready(&self, hold: bool) {
        let mut inner = self.lock();
        if let Some(replicas) = &mut inner.replicas {
            return replicas.hold_ready(hold);
        }
        if hold {
            inner.held.get_or_insert_default();
        } else {
            for (agent, client) in inner.held.take().unwrap_or_default() {
                inner.tell(client, vec![update(agent, Kind::ReadyForHandshake, "")]);
            }
        }
    }

    /// Sends a response to every client as it is, past all rules.
    pub(crate) fn inject(&self, response: &CoordinateResponse) {
        let inner = self.lock();
        if let Some(replicas) = &inner.replicas {
            return replicas.inject(response);
        }
        for peer in inner.peers.values().filter(|peer| peer.auth == Auth::Client) {
            let _ = peer.output.try_send(response.clone());
        }
    }

    /// Tells every client that knows an agent that it is lost or has left, whatever is true. With the
    /// agent's next node it is back.
    pub(crate) fn pretend_gone(&self, agent: Uuid, kind: Kind, reason: &str) {
        let mut inner = self.lock();
        if let Some(replicas) = &mut inner.replicas {
            return replicas.pretend_gone(agent, kind);
        }
        for other in inner.tunnels.peers_of(agent) {
            inner.tell_gone(other, agent, kind, reason);
        }
    }

    /// Tells an agent's node again to every client that knows it, even if it is the same.
    pub(crate) fn repeat_node(&self, agent: Uuid) {
        let mut inner = self.lock();
        if let Some(replicas) = &inner.replicas {
            return replicas.repeat_node(agent);
        }
        let Some(node) = inner.peers.get(&agent).and_then(|peer| peer.node.clone()) else { return };
        for other in inner.tunnels.peers_of(agent) {
            inner.tell(other, vec![node_update(agent, node.clone(), "node update")]);
        }
    }

    /// Closes the streams of all clients with an error text, or without if it is empty.
    pub(crate) fn drop_clients(&self, text: &str) {
        let mut inner = self.lock();
        if let Some(replicas) = &mut inner.replicas {
            return replicas.drop_clients(text);
        }
        let clients = inner.peers.iter().filter(|(_, peer)| peer.auth == Auth::Client);
        for id in clients.map(|(id, _)| *id).collect::<Vec<_>>() {
            if let Some(peer) = inner.peers.get(&id).filter(|_| !text.is_empty()) {
                let _ = peer.output.try_send(error(text.to_owned()));
            }
            inner.remove(id, Kind::Lost, "lost");
        }
    }

    /// Closes everything; streams opened from now on stay silent until [`Coordinator::reopen`].
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        if let Some(replicas) = &mut inner.replicas {
            return replicas.set_all(ReplicaHealth::Closed);
        }
        for id in inner.peers.keys().copied().collect::<Vec<_>>() {
            if let Some(peer) = inner.peers.get(&id) {
                let _ = peer.output.try_send(error("coordinator closed".to_owned()));
            }
            inner.remove(id, Kind::Lost, "coordinator close");
        }
        inner.tunnels = Tunnels::default();
        inner.is_closed = true;
    }

    /// Ends [`Coordinator::close`]: the silent streams are closed, new ones are served.
    pub(crate) fn reopen(&self) {
        let mut inner = self.lock();
        if let Some(replicas) = &mut inner.replicas {
            return replicas.set_all(ReplicaHealth::Serving);
        }
        inner.peers.clear();
        inner.is_closed = false;
    }

    /// Changes how a replica does; nothing if there is no such replica.
    pub(crate) fn set_replica(&self, number: usize, health: ReplicaHealth) {
        if let Some(replicas) = &mut self.lock().replicas {
            replicas.set_health(number, health);
        }
    }

    /// The clients that are connected.
    pub(crate) fn clients(&self) -> Vec<Uuid> {
        let inner = self.lock();
        if let Some(replicas) = &inner.replicas {
            return replicas.clients();
        }
        inner.peers.iter().filter(|(_, peer)| peer.auth == Auth::Client).map(|(id, _)| *id).collect()
    }

    /// What a connected peer has told of itself.
    pub(crate) fn node(&self, id: Uuid) -> Option<Node> {
        let inner = self.lock();
        match &inner.replicas {
            Some(replicas) => replicas.node(id),
            None => inner.peers.get(&id)?.node.clone(),
        }
    }

    /// The tunnels, each source and destination.
    pub(crate) fn tunnels(&self) -> Vec<(Uuid, Uuid)> {
        let inner = self.lock();
        inner.replicas.as_ref().map_or_else(|| inner.tunnels.iter().collect(), Replicas::tunnels)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn update_self(&mut self, id: Uuid, node: Node) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.node = Some(node.clone());
        }
        for other in self.tunnels.peers_of(id) {
            self.tell_node(other, id, &node, "node update");
        }
    }

    fn add_tunnel(&mut self, source: Uuid, destination: Uuid) {
        self.tunnels.add(source, destination);
        if !self.peers.contains_key(&destination) {
            return;
        }
        for (to, about) in [(source, destination), (destination, source)] {
            if let Some(node) = self.peers.get(&about).and_then(|peer| peer.node.clone()) {
                self.tell_node(to, about, &node, "add tunnel");
            }
        }
    }

    fn remove_tunnel(&mut self, source: Uuid, destination: Uuid) {
        if !self.tunnels.remove(source, destination) {
            return;
        }
        self.tell_gone(source, destination, Kind::Disconnected, "remove tunnel");
        self.tell_gone(destination, source, Kind::Disconnected, "remove tunnel");
    }

    fn ready(&mut self, agent: Uuid, client: Uuid) {
        if !self.tunnels.join(client, agent) {
            self.respond(agent, no_tunnel(client));
            return;
        }
        match &mut self.held {
            Some(held) => held.push((agent, client)),
            None => self.tell(client, vec![update(agent, Kind::ReadyForHandshake, "")]),
        }
    }

    /// Takes a peer out: its tunnel peers hear of it, the tunnels that it opened go, its stream ends.
    fn remove(&mut self, id: Uuid, kind: Kind, reason: &str) {
        if self.peers.remove(&id).is_none() {
            return;
        }
        for other in self.tunnels.peers_of(id) {
            self.tell_gone(other, id, kind, reason);
        }
        self.tunnels.remove_from(id);
    }

    /// The same node is not told twice.
    fn tell_node(&mut self, to: Uuid, about: Uuid, node: &Node, reason: &str) {
        let Some(peer) = self.peers.get_mut(&to) else { return };
        if peer.sent.get(&about) == Some(node) {
            return;
        }
        peer.sent.insert(about, node.clone());
        self.tell(to, vec![node_update(about, node.clone(), reason)]);
    }

    /// The end of a peer is told only to those who knew its node.
    fn tell_gone(&mut self, to: Uuid, about: Uuid, kind: Kind, reason: &str) {
        if self.peers.get_mut(&to).is_some_and(|peer| peer.sent.remove(&about).is_some()) {
            self.tell(to, vec![update(about, kind, reason)]);
        }
    }

    fn tell(&mut self, to: Uuid, updates: Vec<PeerUpdate>) {
        if updates.is_empty() {
            return;
        }
        for response in chunked(CoordinateResponse { peer_updates: updates, error: String::new() }) {
            if let Some(peer) = self.peers.get_mut(&to) {
                for update in &response.peer_updates {
                    if let (Ok(about), Some(node)) = (Uuid::from_slice(&update.id), &update.node) {
                        peer.sent.insert(about, node.clone());
                    }
                }
            }
            self.respond(to, response);
        }
    }

    fn respond(&mut self, to: Uuid, response: CoordinateResponse) {
        let Some(peer) = self.peers.get(&to) else { return };
        match peer.output.try_send(response) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.remove(to, Kind::Disconnected, "failed update"),
            Err(TrySendError::Closed(_)) => self.remove(to, Kind::Lost, "lost"),
        }
    }
}

fn uuid(bytes: &[u8]) -> Result<Uuid, String> {
    let refuse = |_| format!("unable to convert bytes to UUID: invalid UUID (got {} bytes)", bytes.len());
    Uuid::from_slice(bytes).map_err(refuse)
}

fn no_tunnel(other: Uuid) -> CoordinateResponse {
    error(format!("ready for handshake error: you do not share a tunnel with {:?}", other.to_string()))
}

/// Cuts a response so that none holds more than [`CHUNK`] updates; its error comes with the last.
pub(crate) fn chunked(mut response: CoordinateResponse) -> Vec<CoordinateResponse> {
    let mut chunks = Vec::new();
    while response.peer_updates.len() > CHUNK {
        let rest = response.peer_updates.split_off(CHUNK);
        let peer_updates = std::mem::replace(&mut response.peer_updates, rest);
        chunks.push(CoordinateResponse { peer_updates, error: String::new() });
    }
    chunks.push(response);
    chunks
}

fn error(text: String) -> CoordinateResponse {
    CoordinateResponse { peer_updates: Vec::new(), error: text }
}

fn update(about: Uuid, kind: Kind, reason: &str) -> PeerUpdate {
    let id = about.as_bytes().to_vec().into();
    PeerUpdate { id, node: None, kind: kind.into(), reason: reason.to_owned() }
}

fn node_update(about: Uuid, node: Node, reason: &str) -> PeerUpdate {
    PeerUpdate { node: Some(node), ..update(about, Kind::Node, reason) }
}
