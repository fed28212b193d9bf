//! A coordinator of several replicas behind one address (tailnet-control appendix B).
//!
//! The replicas share a table of what each peer last said at which of them. Nothing is told as it happens:
//! after each change every stream is told how what it knows differs from what the table says now. A peer
//! that is lost keeps its row and its tunnels; only a goodbye removes them.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::mpsc;
use uuid::Uuid;
use warren_proto::tailnet::{
    CoordinateRequest, CoordinateResponse, Node,
    coordinate_request::ReadyForHandshake,
    coordinate_response::{PeerUpdate, peer_update::Kind},
};

use super::{
    Auth, Authority, CHUNK, Gone, Handled, OUTPUT_QUEUE, Place, Tunnels, error, no_tunnel, node_update,
    update, uuid,
};

/// How a replica of the coordinator does. New streams go to the best one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReplicaHealth {
    /// It serves.
    #[default]
    Serving,
    /// Its heartbeats are missing: the others think that its peers are lost.
    Stalled,
    /// It ends every stream with an error.
    Unhealthy,
    /// It has ended every stream, and stays silent on new ones.
    Closed,
}

/// The replicas and what they share.
pub(super) struct Replicas {
    replicas: Vec<Replica>,
    /// By their number.
    streams: BTreeMap<u64, Stream>,
    /// By peer and replica.
    rows: BTreeMap<(Uuid, usize), Row>,
    /// Counts streams and writes.
    count: u64,
    /// Readiness that is withheld, if it is: agent and client.
    held: Option<Vec<(Uuid, Uuid)>>,
}

#[derive(Default)]
struct Replica {
    health: ReplicaHealth,
    /// The tunnels that were opened here.
    tunnels: Tunnels,
}

struct Stream {
    id: Uuid,
    auth: Auth,
    replica: usize,
    output: mpsc::Sender<CoordinateResponse>,
    /// What it was last told about each other peer.
    told: BTreeMap<Uuid, Told>,
}

/// What a peer last said at a replica.
struct Row {
    node: Node,
    is_lost: bool,
    written: u64,
}

#[derive(Clone, PartialEq)]
struct Told {
    node: Node,
    is_lost: bool,
}

impl Replicas {
    pub(super) fn new(count: usize) -> Self {
        let replicas = (0..count).map(|_| Replica::default()).collect();
        Self { replicas, streams: BTreeMap::new(), rows: BTreeMap::new(), count: 0, held: None }
    }

    /// Opens a stream at the replica that does best and has the fewest.
    pub(super) fn open(&mut self, id: Uuid, auth: Auth) -> (Place, mpsc::Receiver<CoordinateResponse>) {
        let load = |at: usize| self.streams.values().filter(|stream| stream.replica == at).count();
        let replicas = (0..self.replicas.len()).min_by_key(|at| (self.health(*at), load(*at)));
        self.open_at(replicas.unwrap_or_default(), id, auth)
    }

    /// Opens a stream at a replica. An older stream of the same peer there is displaced without a word.
    pub(super) fn open_at(
        &mut self,
        replica: usize,
        id: Uuid,
        auth: Auth,
    ) -> (Place, mpsc::Receiver<CoordinateResponse>) {
        let (output, responses) = mpsc::channel(OUTPUT_QUEUE);
        let place = Place { id, stream: self.next() };
        if self.health(replica) == ReplicaHealth::Unhealthy {
            let _ = output.try_send(error("coordinator unhealthy".to_owned()));
            return (place, responses);
        }
        let older = self.streams.iter().find(|(_, old)| (old.id, old.replica) == (id, replica));
        if let Some(older) = older.map(|(number, _)| *number) {
            self.lose(older);
            self.settle();
        }
        self.streams.insert(place.stream, Stream { id, auth, replica, output, told: BTreeMap::new() });
        self.settle();
        (place, responses)
    }

    /// As [`super::Coordinator::handle`].
    pub(super) fn handle(
        &mut self,
        authority: &Authority,
        place: Place,
        request: &CoordinateRequest,
    ) -> Result<Handled, String> {
        let Some(stream) = self.streams.get(&place.stream) else { return Ok(Handled::Open) };
        let (auth, replica) = (stream.auth, stream.replica);
        if self.health(replica) == ReplicaHealth::Closed {
            return Ok(Handled::Open);
        }
        authority.check(place.id, auth, request)?;
        let handled = self.change(place, replica, request);
        self.settle();
        if handled == Ok(Handled::Open) {
            self.ready(place, &request.ready_for_handshake)?;
        }
        handled
    }

    /// Ends a stream. Its peer is lost, and may come back.
    pub(super) fn leave(&mut self, place: Place, gone: Gone) {
        if let (Gone::Refused(text), Some(stream)) = (gone, self.streams.get(&place.stream)) {
            let _ = stream.output.try_send(error(text));
        }
        self.lose(place.stream);
        self.settle();
    }

    /// Lets a peer leave in good order, at every replica.
    pub(super) fn say_goodbye(&mut self, id: Uuid) {
        for number in self.numbers(|stream| stream.id == id) {
            self.part(number);
        }
        self.settle();
    }

    /// Changes how a replica does.
    pub(super) fn set_health(&mut self, at: usize, health: ReplicaHealth) {
        let Some(replica) = self.replicas.get_mut(at).filter(|replica| replica.health != health) else {
            return;
        };
        let was_closed = std::mem::replace(&mut replica.health, health) == ReplicaHealth::Closed;
        let text = match health {
            ReplicaHealth::Serving | ReplicaHealth::Stalled => None,
            ReplicaHealth::Unhealthy => Some("coordinator unhealthy"),
            ReplicaHealth::Closed => Some("coordinator closed"),
        };
        if text.is_some() || was_closed {
            self.end(text.filter(|_| !was_closed), |stream| stream.replica == at);
        }
        self.settle();
    }

    /// Changes how all replicas do.
    pub(super) fn set_all(&mut self, health: ReplicaHealth) {
        (0..self.replicas.len()).for_each(|at| self.set_health(at, health));
    }

    /// Ends the streams of all clients with an error text, or without if it is empty.
    pub(super) fn drop_clients(&mut self, text: &str) {
        self.end(Some(text).filter(|text| !text.is_empty()), |stream| stream.auth == Auth::Client);
        self.settle();
    }

    /// As [`super::Coordinator::inject`].
    pub(super) fn inject(&self, response: &CoordinateResponse) {
        for stream in self.streams.values().filter(|stream| stream.auth == Auth::Client) {
            let _ = stream.output.try_send(response.clone());
        }
    }

    /// As [`super::Coordinator::hold_ready`].
    pub(super) fn hold_ready(&mut self, hold: bool) {
        if hold {
            self.held.get_or_insert_default();
        } else {
            let held = self.held.take().unwrap_or_default();
            held.into_iter().for_each(|(agent, client)| self.pass_ready(agent, client));
        }
    }

    /// As [`super::Coordinator::pretend_gone`], until anything changes at any replica: then streams are told
    /// what is true.
    pub(super) fn pretend_gone(&mut self, agent: Uuid, kind: Kind) {
        for stream in self.streams.values_mut() {
            let Some(told) = stream.told.get_mut(&agent).filter(|told| !told.is_lost) else { continue };
            told.is_lost = true;
            let node = Some(told.node.clone()).filter(|_| kind == Kind::Lost);
            if kind == Kind::Disconnected {
                stream.told.remove(&agent);
            }
            let reason = if kind == Kind::Lost { "lost" } else { "disconnected" };
            let _ = stream.output.try_send(one(PeerUpdate { node, ..update(agent, kind, reason) }));
        }
    }

    /// As [`super::Coordinator::repeat_node`].
    pub(super) fn repeat_node(&self, agent: Uuid) {
        for stream in self.streams.values() {
            let Some(told) = stream.told.get(&agent).filter(|told| !told.is_lost) else { continue };
            let _ = stream.output.try_send(one(node_update(agent, told.node.clone(), "update")));
        }
    }

    /// What a connected peer has told of itself.
    pub(super) fn node(&self, id: Uuid) -> Option<Node> {
        let rows = self.rows.range((id, 0)..=(id, usize::MAX)).map(|(_, row)| row);
        let newest = rows.filter(|row| !row.is_lost).max_by_key(|row| row.written)?;
        Some(newest.node.clone())
    }

    /// The clients that are connected.
    pub(super) fn clients(&self) -> Vec<Uuid> {
        let clients = self.streams.values().filter(|stream| stream.auth == Auth::Client);
        clients.map(|stream| stream.id).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The tunnels of all replicas, each source and destination.
    pub(super) fn tunnels(&self) -> Vec<(Uuid, Uuid)> {
        let tunnels = self.replicas.iter().flat_map(|replica| replica.tunnels.iter());
        tunnels.collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn change(&mut self, place: Place, at: usize, request: &CoordinateRequest) -> Result<Handled, String> {
        if let Some(update) = &request.update_self {
            let node = update.node.clone().ok_or("update_self without a node")?;
            let written = self.next();
            self.rows.insert((place.id, at), Row { node, is_lost: false, written });
        }
        let Some(replica) = self.replicas.get_mut(at) else { return Ok(Handled::Open) };
        if let Some(tunnel) = &request.add_tunnel {
            replica.tunnels.add(place.id, uuid(&tunnel.id)?);
        }
        if let Some(tunnel) = &request.remove_tunnel {
            replica.tunnels.remove(place.id, uuid(&tunnel.id)?);
        }
        if request.disconnect.is_some() {
            self.part(place.stream);
            return Ok(Handled::Left);
        }
        Ok(Handled::Open)
    }

    /// Passes readiness on, up to the first peer that the stream has not heard of.
    fn ready(&mut self, place: Place, ready: &[ReadyForHandshake]) -> Result<(), String> {
        for ready in ready {
            let other = uuid(&ready.id).map_err(|text| format!("handle ack: {text}"))?;
            let Some(own) = self.streams.get(&place.stream) else { break };
            if !own.told.contains_key(&other) {
                let _ = own.output.try_send(no_tunnel(other));
                break;
            }
            match &mut self.held {
                Some(held) => held.push((place.id, other)),
                None => self.pass_ready(place.id, other),
            }
        }
        Ok(())
    }

    fn pass_ready(&self, agent: Uuid, client: Uuid) {
        for stream in self.streams.values().filter(|stream| stream.id == client) {
            let _ = stream.output.try_send(one(update(agent, Kind::ReadyForHandshake, "")));
        }
    }

    /// Takes a stream out after a goodbye: nothing of it is kept.
    fn part(&mut self, number: u64) {
        let Some(stream) = self.streams.remove(&number) else { return };
        self.rows.remove(&(stream.id, stream.replica));
        if let Some(replica) = self.replicas.get_mut(stream.replica) {
            replica.tunnels.remove_from(stream.id);
        }
    }

    /// Takes a stream out that has ended in another way: its row and its tunnels are kept.
    fn lose(&mut self, number: u64) {
        let Some(stream) = self.streams.remove(&number) else { return };
        if let Some(row) = self.rows.get_mut(&(stream.id, stream.replica)) {
            row.is_lost = true;
        }
    }

    fn end(&mut self, text: Option<&str>, is_ended: impl Fn(&Stream) -> bool) {
        for number in self.numbers(is_ended) {
            if let (Some(text), Some(stream)) = (text, self.streams.get(&number)) {
                let _ = stream.output.try_send(error(text.to_owned()));
            }
            self.lose(number);
        }
    }

    /// Tells every stream what is new for it, until there is nothing new. Who does not read is lost.
    fn settle(&mut self) {
        loop {
            let streams = self.numbers(|_| true).into_iter();
            let deaf: Vec<u64> = streams.filter(|number| !self.tell_news(*number)).collect();
            if deaf.is_empty() {
                return;
            }
            deaf.into_iter().for_each(|number| self.lose(number));
        }
    }

    /// Whether the stream has taken all that is new for it.
    fn tell_news(&mut self, number: u64) -> bool {
        let Some(mut told) = self.streams.get_mut(&number).map(|stream| std::mem::take(&mut stream.told))
        else {
            return true;
        };
        let news = self.news(number, &mut told);
        let Some(stream) = self.streams.get_mut(&number) else { return true };
        stream.told = told;
        news.chunks(CHUNK).all(|chunk| {
            let response = CoordinateResponse { peer_updates: chunk.to_vec(), error: String::new() };
            stream.output.try_send(response).is_ok()
        })
    }

    fn news(&self, number: u64, told: &mut BTreeMap<Uuid, Told>) -> Vec<PeerUpdate> {
        let Some(stream) = self.streams.get(&number) else { return Vec::new() };
        if self.health(stream.replica) == ReplicaHealth::Closed {
            return Vec::new();
        }
        let peers = self.tunnel_peers(stream.id);
        let known = told.keys().copied().collect::<BTreeSet<_>>();
        let mut news = Vec::new();
        for about in peers.union(&known) {
            let now = if peers.contains(about) { self.view(stream.replica, *about) } else { None };
            let Some(change) = change(*about, told.get(about), now.as_ref()) else { continue };
            news.push(change);
            match now {
                Some(now) => told.insert(*about, now),
                None => told.remove(about),
            };
        }
        news
    }

    /// A peer as a replica sees it: the newest row that lives, else the newest.
    fn view(&self, from: usize, about: Uuid) -> Option<Told> {
        let rows = self.rows.range((about, 0)..=(about, usize::MAX));
        let seen = rows.map(|((_, at), row)| {
            let is_unheard = *at != from && self.health(*at) == ReplicaHealth::Stalled;
            (row.is_lost || is_unheard, row)
        });
        let (is_lost, row) = seen.max_by_key(|(is_lost, row)| (!is_lost, row.written))?;
        Some(Told { node: row.node.clone(), is_lost })
    }

    fn tunnel_peers(&self, id: Uuid) -> BTreeSet<Uuid> {
        self.replicas.iter().flat_map(|replica| replica.tunnels.peers_of(id)).collect()
    }

    fn numbers(&self, is_meant: impl Fn(&Stream) -> bool) -> Vec<u64> {
        let streams = self.streams.iter().filter(|(_, stream)| is_meant(stream));
        streams.map(|(number, _)| *number).collect()
    }

    fn health(&self, replica: usize) -> ReplicaHealth {
        self.replicas.get(replica).map_or(ReplicaHealth::Closed, |replica| replica.health)
    }

    fn next(&mut self) -> u64 {
        self.count += 1;
        self.count
    }
}

fn one(update: PeerUpdate) -> CoordinateResponse {
    CoordinateResponse { peer_updates: vec![update], error: String::new() }
}

/// What is to be told of a peer, if it is other than before.
fn change(about: Uuid, before: Option<&Told>, now: Option<&Told>) -> Option<PeerUpdate> {
    match (before, now) {
        (None, None) => None,
        (Some(_), None) => Some(update(about, Kind::Disconnected, "disconnected")),
        (None, Some(now)) => (!now.is_lost).then(|| node_update(about, now.node.clone(), "new")),
        (Some(before), Some(now)) if now.is_lost => (!before.is_lost)
            .then(|| PeerUpdate { node: Some(now.node.clone()), ..update(about, Kind::Lost, "lost") }),
        (Some(before), Some(now)) if before.is_lost => Some(node_update(about, now.node.clone(), "found")),
        (Some(before), Some(now)) => {
            (before.node != now.node).then(|| node_update(about, now.node.clone(), "update"))
        }
    }
}

#[cfg(test)]
mod tests;
