//! The coordinator: peers, the tunnels between them, and who must hear what (tailnet-control 4.5 to 4.7).
//!
//! A plain table under one lock. Each peer has a bounded queue of responses; a peer whose queue is full is
//! dropped, as a real coordinator does. The end of a queue means that the stream is closed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::mpsc::{self, error::TrySendError};
use uuid::Uuid;
use warren_proto::{
    address::{coder_address, tailscale_address},
    tailnet::{CoordinateRequest, CoordinateResponse, Node, coordinate_response::PeerUpdate},
};

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
    /// Source and destination.
    tunnels: BTreeSet<(Uuid, Uuid)>,
    /// The same tunnels from the destination's side.
    reverse: BTreeSet<(Uuid, Uuid)>,
    streams: u64,
    is_closed: bool,
    agents: BTreeSet<Uuid>,
    forbidden: BTreeSet<Uuid>,
    /// Readiness that is withheld, if it is: agent and client.
    held: Option<Vec<(Uuid, Uuid)>>,
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
    /// Opens a stream for a peer. An older stream of the same peer is displaced.
    pub(crate) fn open(&self, id: Uuid, auth: Auth) -> (Place, mpsc::Receiver<CoordinateResponse>) {
        let (output, responses) = mpsc::channel(OUTPUT_QUEUE);
        let mut inner = self.lock();
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
        let known: Vec<Uuid> = inner.tunnel_peers(id).into_iter().collect();
        let nodes = known.iter().filter_map(|other| Some((*other, inner.peers.get(other)?.node.clone()?)));
        let updates: Vec<PeerUpdate> = nodes.map(|(other, node)| node_update(other, node, "init")).collect();
        inner.tell(id, updates);
        (place, responses)
    }

    /// Handles one request. An error is fatal for the stream, which is then to be ended with
    /// [`Coordinator::leave`].
    pub(crate) fn handle(&self, place: Place, request: CoordinateRequest) -> Result<Handled, String> {
        let mut inner = self.lock();
        let auth = match inner.peers.get(&place.id) {
            Some(peer) if peer.stream == place.stream => peer.auth,
            // Displaced or dropped: the end of its queue says so.
            _ => return Ok(Handled::Open),
        };
        if inner.is_closed {
            return Ok(Handled::Open);
        }
        inner.authorize(place.id, auth, &request)?;
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
        let Some(peer) = inner.peers.get(&place.id).filter(|peer| peer.stream == place.stream) else {
            return;
        };
        if let Gone::Refused(text) = gone {
            let _ = peer.output.try_send(error(text));
        }
        inner.remove(place.id, Kind::Lost, "lost");
    }

    /// Lets a peer leave in good order, whoever serves its stream.
    pub(crate) fn say_goodbye(&self, id: Uuid) {
        self.lock().remove(id, Kind::Disconnected, "graceful disconnect");
    }

    /// Makes an agent known, so that clients may open tunnels to it.
    pub(crate) fn allow(&self, agent: Uuid) {
        self.lock().agents.insert(agent);
    }

    /// Forgets an agent for clients to come.
    pub(crate) fn forget(&self, agent: Uuid) {
        self.lock().agents.remove(&agent);
    }

    /// Whether clients may open tunnels to an agent.
    pub(crate) fn forbid(&self, agent: Uuid, is_forbidden: bool) {
        let forbidden = &mut self.lock().forbidden;
        if is_forbidden {
            forbidden.insert(agent)
        } else {
            forbidden.remove(&agent)
        };
    }

    /// Whether READY_FOR_HANDSHAKE is held back; what was held is sent when it is no more.
    pub(crate) fn hold_ready(&self, hold: bool) {
        let mut inner = self.lock();
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
        for peer in inner.peers.values().filter(|peer| peer.auth == Auth::Client) {
            let _ = peer.output.try_send(response.clone());
        }
    }

    /// Tells every client that knows an agent that it is lost or has left, whatever is true. With the
    /// agent's next node it is back.
    pub(crate) fn pretend_gone(&self, agent: Uuid, kind: Kind, reason: &str) {
        let mut inner = self.lock();
        for other in inner.tunnel_peers(agent) {
            inner.tell_gone(other, agent, kind, reason);
        }
    }

    /// Tells an agent's node again to every client that knows it, even if it is the same.
    pub(crate) fn repeat_node(&self, agent: Uuid) {
        let mut inner = self.lock();
        let Some(node) = inner.peers.get(&agent).and_then(|peer| peer.node.clone()) else { return };
        for other in inner.tunnel_peers(agent) {
            inner.tell(other, vec![node_update(agent, node.clone(), "node update")]);
        }
    }

    /// Closes the streams of all clients with an error text, or without if it is empty.
    pub(crate) fn drop_clients(&self, text: &str) {
        let mut inner = self.lock();
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
        for id in inner.peers.keys().copied().collect::<Vec<_>>() {
            if let Some(peer) = inner.peers.get(&id) {
                let _ = peer.output.try_send(error("coordinator closed".to_owned()));
            }
            inner.remove(id, Kind::Lost, "coordinator close");
        }
        inner.tunnels.clear();
        inner.reverse.clear();
        inner.is_closed = true;
    }

    /// Ends [`Coordinator::close`]: the silent streams are closed, new ones are served.
    pub(crate) fn reopen(&self) {
        let mut inner = self.lock();
        inner.peers.clear();
        inner.is_closed = false;
    }

    /// The clients that are connected.
    pub(crate) fn clients(&self) -> Vec<Uuid> {
        let inner = self.lock();
        inner.peers.iter().filter(|(_, peer)| peer.auth == Auth::Client).map(|(id, _)| *id).collect()
    }

    /// The tunnels, each source and destination.
    pub(crate) fn tunnels(&self) -> Vec<(Uuid, Uuid)> {
        self.lock().tunnels.iter().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn authorize(&self, id: Uuid, auth: Auth, request: &CoordinateRequest) -> Result<(), String> {
        match auth {
            Auth::Client => self.authorize_client(request),
            Auth::Agent => authorize_agent(id, request),
        }
        .map_err(|text| format!("authorization: {text}"))
    }

    fn authorize_client(&self, request: &CoordinateRequest) -> Result<(), String> {
        if let Some(tunnel) = &request.add_tunnel {
            let agent = Uuid::from_slice(&tunnel.id)
                .map_err(|_| format!("parse add tunnel id: invalid UUID (got {} bytes)", tunnel.id.len()))?;
            if !self.agents.contains(&agent) || self.forbidden.contains(&agent) {
                return Err("workspace agent not found or you do not have permission".to_owned());
            }
        }
        for address in node_of(request).map_or(&[][..], |node| &node.addresses) {
            let bits = prefix_bits(address)?;
            if bits != 128 {
                return Err(format!("invalid address bits, expected 128, got {bits}"));
            }
        }
        if !request.ready_for_handshake.is_empty() {
            return Err("clients may not send ready_for_handshake".to_owned());
        }
        Ok(())
    }

    fn update_self(&mut self, id: Uuid, node: Node) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.node = Some(node.clone());
        }
        for other in self.tunnel_peers(id) {
            self.tell_node(other, id, &node, "node update");
        }
    }

    fn add_tunnel(&mut self, source: Uuid, destination: Uuid) {
        self.tunnels.insert((source, destination));
        self.reverse.insert((destination, source));
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
        if !self.tunnels.remove(&(source, destination)) {
            return;
        }
        self.reverse.remove(&(destination, source));
        self.tell_gone(source, destination, Kind::Disconnected, "remove tunnel");
        self.tell_gone(destination, source, Kind::Disconnected, "remove tunnel");
    }

    fn ready(&mut self, agent: Uuid, client: Uuid) {
        if !self.tunnels.contains(&(client, agent)) && !self.tunnels.contains(&(agent, client)) {
            let text =
                format!("ready for handshake error: you do not share a tunnel with {:?}", client.to_string());
            self.respond(agent, error(text));
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
        for other in self.tunnel_peers(id) {
            self.tell_gone(other, id, kind, reason);
        }
        let own: Vec<Uuid> = pairs_of(&self.tunnels, id).collect();
        for destination in own {
            self.tunnels.remove(&(id, destination));
            self.reverse.remove(&(destination, id));
        }
    }

    fn tunnel_peers(&self, id: Uuid) -> BTreeSet<Uuid> {
        pairs_of(&self.tunnels, id).chain(pairs_of(&self.reverse, id)).collect()
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
        for chunk in updates.chunks(CHUNK) {
            if let Some(peer) = self.peers.get_mut(&to) {
                for update in chunk {
                    if let (Ok(about), Some(node)) = (Uuid::from_slice(&update.id), &update.node) {
                        peer.sent.insert(about, node.clone());
                    }
                }
            }
            self.respond(to, CoordinateResponse { peer_updates: chunk.to_vec(), error: String::new() });
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

fn authorize_agent(id: Uuid, request: &CoordinateRequest) -> Result<(), String> {
    if request.add_tunnel.is_some() {
        return Err("agents cannot open tunnels".to_owned());
    }
    let own = [format!("{}/128", coder_address(&id)), format!("{}/128", tailscale_address(&id))];
    let Some(node) = node_of(request) else { return Ok(()) };
    for (field, prefixes) in [("Addresses", &node.addresses), ("AllowedIps", &node.allowed_ips)] {
        for prefix in prefixes {
            let bits = prefix_bits(prefix)?;
            if bits != 128 {
                return Err(format!("{field}: invalid address bits, expected 128, got {bits}"));
            }
            if !own.contains(prefix) {
                let address = prefix.split('/').next().unwrap_or_default();
                return Err(format!("{field}: invalid node address, got {address}"));
            }
        }
    }
    Ok(())
}

fn node_of(request: &CoordinateRequest) -> Option<&Node> {
    request.update_self.as_ref()?.node.as_ref()
}

fn prefix_bits(text: &str) -> Result<u8, String> {
    let parse = |reason: &str| format!("parse node address: netip.ParsePrefix({text:?}): {reason}");
    let (address, bits) = text.split_once('/').ok_or_else(|| parse("no '/'"))?;
    let _: std::net::IpAddr =
        address.parse().map_err(|_| parse(&format!("ParseAddr({address:?}): unable to parse IP")))?;
    bits.parse().map_err(|_| parse(&format!("bad bits after slash: {bits:?}")))
}

fn uuid(bytes: &[u8]) -> Result<Uuid, String> {
    let refuse = |_| format!("unable to convert bytes to UUID: invalid UUID (got {} bytes)", bytes.len());
    Uuid::from_slice(bytes).map_err(refuse)
}

fn pairs_of(pairs: &BTreeSet<(Uuid, Uuid)>, id: Uuid) -> impl Iterator<Item = Uuid> {
    pairs.range((id, Uuid::nil())..=(id, Uuid::max())).map(|(_, other)| *other)
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

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: Uuid = Uuid::from_u128(0xa);
    const CLIENT: Uuid = Uuid::from_u128(0xc);

    #[test]
    fn a_tunnel_tells_both_ends_of_each_other_and_readiness_comes_back() {
        let (coordinator, agent, mut to_agent, client, mut to_client) = pair();
        coordinator.handle(client, add(AGENT)).unwrap();
        assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node)]);
        assert_eq!(kinds(&mut to_agent), [(CLIENT, Kind::Node)]);
        coordinator.handle(agent, ready(CLIENT)).unwrap();
        assert_eq!(kinds(&mut to_client), [(AGENT, Kind::ReadyForHandshake)]);
    }

    #[test]
    fn the_same_node_is_told_once_unless_a_test_repeats_it() {
        let (coordinator, agent, _to_agent, client, mut to_client) = pair();
        coordinator.handle(client, add(AGENT)).unwrap();
        coordinator.handle(client, add(AGENT)).unwrap();
        coordinator.handle(agent, node(AGENT, 1)).unwrap();
        assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node)]);
        coordinator.handle(agent, node(AGENT, 2)).unwrap();
        coordinator.repeat_node(AGENT);
        assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node), (AGENT, Kind::Node)]);
    }

    #[test]
    fn goodbyes_and_losses_are_told_to_who_knew_the_node_and_to_nobody_else() {
        let (coordinator, agent, mut to_agent, client, mut to_client) = pair();
        let (_stranger, mut to_stranger) = coordinator.open(Uuid::from_u128(0xd), Auth::Client);
        coordinator.handle(client, add(AGENT)).unwrap();
        kinds(&mut to_client);
        kinds(&mut to_agent);
        coordinator.leave(agent, Gone::Lost);
        assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Lost)]);
        let goodbye = CoordinateRequest { disconnect: Some(Default::default()), ..Default::default() };
        assert_eq!(coordinator.handle(client, goodbye), Ok(Handled::Left));
        assert!(to_client.try_recv().is_err() && to_client.is_closed());
        assert_eq!(kinds(&mut to_stranger), []);
        assert_eq!(coordinator.tunnels(), []);
    }

    #[test]
    fn an_agent_that_comes_back_hears_at_once_of_the_tunnels_that_lead_to_it() {
        let (coordinator, agent, _to_agent, client, mut to_client) = pair();
        coordinator.handle(client, add(AGENT)).unwrap();
        coordinator.leave(agent, Gone::Lost);
        kinds(&mut to_client);
        let (again, mut to_again) = coordinator.open(AGENT, Auth::Agent);
        coordinator.handle(again, node(AGENT, 1)).unwrap();
        assert_eq!(kinds(&mut to_again), [(CLIENT, Kind::Node)]);
        assert_eq!(kinds(&mut to_client), [(AGENT, Kind::Node)]);
    }

    #[test]
    fn a_newer_stream_displaces_the_older_one_with_a_word() {
        let (coordinator, _agent, _to_agent, old, mut to_old) = pair();
        let (_new, mut to_new) = coordinator.open(CLIENT, Auth::Client);
        assert_eq!(errors(&mut to_old), ["peer ID overwritten by new connection"]);
        coordinator.leave(old, Gone::Lost);
        assert_eq!(coordinator.clients(), [CLIENT]);
        assert!(to_new.try_recv().is_err() && !to_new.is_closed());
    }

    #[test]
    fn what_a_client_may_not_do_is_fatal_in_a_deployments_words() {
        let (coordinator, _agent, _to_agent, client, _to_client) = pair();
        let refused = "authorization: workspace agent not found or you do not have permission";
        assert_eq!(coordinator.handle(client, add(Uuid::from_u128(9))), Err(refused.to_owned()));
        coordinator.forbid(AGENT, true);
        assert_eq!(coordinator.handle(client, add(AGENT)), Err(refused.to_owned()));
        let early = Err("authorization: clients may not send ready_for_handshake".to_owned());
        assert_eq!(coordinator.handle(client, ready(AGENT)), early);
        let nothing = CoordinateRequest { update_self: Some(Default::default()), ..Default::default() };
        assert!(coordinator.handle(client, nothing).is_err());
    }

    #[test]
    fn an_agent_has_its_own_addresses_and_opens_no_tunnels() {
        let (coordinator, agent, _to_agent, _client, _to_client) = pair();
        let opened = coordinator.handle(agent, add(CLIENT));
        assert_eq!(opened, Err("authorization: agents cannot open tunnels".to_owned()));
        let mut foreign = node(AGENT, 1);
        if let Some(node) = foreign.update_self.as_mut().and_then(|update| update.node.as_mut()) {
            node.addresses = vec!["fd60:627a:a42b::1/128".to_owned()];
        }
        let refused = "authorization: Addresses: invalid node address, got fd60:627a:a42b::1";
        assert_eq!(coordinator.handle(agent, foreign), Err(refused.to_owned()));
    }

    #[test]
    fn held_readiness_is_told_when_it_is_released() {
        let (coordinator, agent, _to_agent, client, mut to_client) = pair();
        coordinator.handle(client, add(AGENT)).unwrap();
        kinds(&mut to_client);
        coordinator.hold_ready(true);
        coordinator.handle(agent, ready(CLIENT)).unwrap();
        assert_eq!(kinds(&mut to_client), []);
        coordinator.hold_ready(false);
        assert_eq!(kinds(&mut to_client), [(AGENT, Kind::ReadyForHandshake)]);
    }

    #[test]
    fn a_closed_coordinator_says_so_and_stays_silent_on_new_streams() {
        let (coordinator, _agent, _to_agent, _client, mut to_client) = pair();
        coordinator.close();
        assert_eq!(errors(&mut to_client), ["coordinator closed"]);
        let (silent, mut to_silent) = coordinator.open(CLIENT, Auth::Client);
        assert_eq!(coordinator.handle(silent, add(AGENT)), Ok(Handled::Open));
        assert!(to_silent.try_recv().is_err() && !to_silent.is_closed());
        coordinator.reopen();
        assert!(to_silent.is_closed());
    }

    #[test]
    fn a_peer_that_does_not_read_is_dropped_and_the_others_hear_of_it() {
        let (coordinator, agent, mut to_agent, client, to_client) = pair();
        coordinator.handle(client, add(AGENT)).unwrap();
        kinds(&mut to_agent);
        for version in 0..=OUTPUT_QUEUE as u64 {
            coordinator.handle(agent, node(AGENT, version)).unwrap();
        }
        assert!(to_client.is_closed());
        assert_eq!(to_client.len(), OUTPUT_QUEUE);
        assert_eq!(kinds(&mut to_agent), [(CLIENT, Kind::Disconnected)]);
    }

    type Responses = mpsc::Receiver<CoordinateResponse>;

    /// An agent and a client that have told their nodes.
    fn pair() -> (Coordinator, Place, Responses, Place, Responses) {
        let coordinator = Coordinator::default();
        coordinator.allow(AGENT);
        let (agent, to_agent) = coordinator.open(AGENT, Auth::Agent);
        coordinator.handle(agent, node(AGENT, 1)).unwrap();
        let (client, to_client) = coordinator.open(CLIENT, Auth::Client);
        coordinator.handle(client, node(CLIENT, 1)).unwrap();
        (coordinator, agent, to_agent, client, to_client)
    }

    fn node(of: Uuid, version: u64) -> CoordinateRequest {
        let addresses = vec![format!("{}/128", coder_address(&of))];
        let derp_latency = [(version.to_string(), 0.1)].into();
        let node = Node { addresses, derp_latency, ..Node::default() };
        let update_self = warren_proto::tailnet::coordinate_request::UpdateSelf { node: Some(node) };
        CoordinateRequest { update_self: Some(update_self), ..CoordinateRequest::default() }
    }

    fn add(agent: Uuid) -> CoordinateRequest {
        let id = agent.as_bytes().to_vec().into();
        let add_tunnel = Some(warren_proto::tailnet::coordinate_request::Tunnel { id });
        CoordinateRequest { add_tunnel, ..CoordinateRequest::default() }
    }

    fn ready(client: Uuid) -> CoordinateRequest {
        let id = client.as_bytes().to_vec().into();
        let ready_for_handshake = vec![warren_proto::tailnet::coordinate_request::ReadyForHandshake { id }];
        CoordinateRequest { ready_for_handshake, ..CoordinateRequest::default() }
    }

    fn kinds(responses: &mut Responses) -> Vec<(Uuid, Kind)> {
        let mut kinds = Vec::new();
        while let Ok(response) = responses.try_recv() {
            let told = response.peer_updates.iter();
            kinds.extend(told.map(|update| (Uuid::from_slice(&update.id).unwrap(), update.kind())));
        }
        kinds
    }

    fn errors(responses: &mut Responses) -> Vec<String> {
        std::iter::from_fn(|| responses.try_recv().ok()).map(|response| response.error).collect()
    }
}
