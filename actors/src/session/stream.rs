//! What of the connection to a manager outlives the session: its two ends, the requests without an answer,
//! and what the manager knows of the peers. Held by the composition and lent to each session in turn.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{self, OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::timeout,
};
use warren_core::roster::Sent;
use warren_proto::{
    correlator::Kind,
    vpn::{ManagerMessage, StopResponse, TunnelMessage, WakeResponse, manager_message, tunnel_message},
};

use super::start;
use crate::{
    facts::Net,
    runtime::View,
    speaker::{End, Inbox, Incoming, Room, Slot, Speaker, SpeakerMessage},
};

/// Requests without an answer at any time. Beyond that nothing is taken from the inbox, and a manager that
/// goes on without reading answers overflows it.
pub(super) const OPEN_REQUESTS: usize = 64;

/// A request that was in the hands of so many sessions when they crashed is what crashes them.
const POISONOUS: u32 = 2;

/// Names one request of one connection; managers may use an id twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// One request of the manager.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) ticket: Ticket,
    pub(super) id: u64,
    pub(super) received_at: Instant,
    /// How many sessions crashed with this request in hand.
    crashes: u32,
    message: ManagerMessage,
}

impl Request {
    pub(super) fn body(&self) -> Option<&manager_message::Msg> {
        self.message.msg.as_ref()
    }

    pub(super) fn method(&self) -> &'static str {
        self.message.method()
    }

    pub(super) fn is_poisonous(&self) -> bool {
        self.crashes >= POISONOUS
    }
}

/// What a request is answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) message: tunnel_message::Msg,
    /// How it came out, as metrics name it.
    pub(super) result: &'static str,
}

/// Why a connection to a manager is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// A stop was answered, or the process closed the connection itself.
    Stopped,
    /// The manager closed the connection or died.
    ManagerGone(String),
    /// The manager broke the protocol.
    Protocol(String),
}

impl Ended {
    /// The exit code that tells a supervisor so.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Stopped => 0,
            Self::ManagerGone(_) => 69,
            Self::Protocol(_) => 76,
        }
    }
}

impl From<End> for Ended {
    fn from(end: End) -> Self {
        let text = end.to_string();
        match end {
            End::Closed => Self::Stopped,
            End::Eof | End::Broken { .. } => Self::ManagerGone(text),
            End::Protocol(_) | End::Overflow => Self::Protocol(text),
        }
    }
}

/// The connection to a manager.
pub struct Stream {
    speaker: Speaker<TunnelMessage, ManagerMessage>,
    inbox: sync::Mutex<Inbox<ManagerMessage>>,
    open: Mutex<Open>,
    places: Arc<Semaphore>,
    sent: sync::Mutex<Sent>,
}

/// The requests without an answer, oldest first.
#[derive(Default)]
struct Open {
    last: u64,
    requests: BTreeMap<Ticket, OpenRequest>,
}

struct OpenRequest {
    request: Arc<Request>,
    /// A session has taken it and will answer it, unless it crashes.
    in_hand: bool,
    _place: OwnedSemaphorePermit,
    _room: Room,
}

impl Stream {
    /// The connection over these two ends.
    pub fn new(speaker: Speaker<TunnelMessage, ManagerMessage>, inbox: Inbox<ManagerMessage>) -> Self {
        Self {
            speaker,
            inbox: sync::Mutex::new(inbox),
            open: Mutex::default(),
            places: Arc::new(Semaphore::new(OPEN_REQUESTS)),
            sent: sync::Mutex::default(),
        }
    }

    /// Waits until the connection is over, and says why.
    pub async fn ended(&self) -> Ended {
        self.speaker.closed().await.into()
    }

    /// Why the connection is over or about to be, if it is.
    pub fn end(&self) -> Option<End> {
        self.speaker.end()
    }

    /// Ends the connection without the manager having asked; frames that were accepted leave first.
    pub async fn close(&self, limit: Duration) {
        self.speaker.close(limit).await;
    }

    /// What sends to the manager.
    pub fn speaker(&self) -> &Speaker<TunnelMessage, ManagerMessage> {
        &self.speaker
    }

    /// What the manager was last told of the peers. Held while a message about peers is made and accepted:
    /// so there is an order between them, even with the last breath of a crashed session.
    pub(super) async fn sent(&self) -> sync::MutexGuard<'_, Sent> {
        self.sent.lock().await
    }

    /// The incoming half, once a predecessor has let go of it.
    pub(super) async fn inbox(&self) -> sync::MutexGuard<'_, Inbox<ManagerMessage>> {
        self.inbox.lock().await
    }

    /// Waits for the next request and keeps it for [`Self::take`]. Cancelled, it loses none. Returns whether
    /// more may come.
    pub(super) async fn admit(&self, inbox: &mut Inbox<ManagerMessage>) -> bool {
        let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return false };
        loop {
            let Some(incoming) = inbox.recv().await else { return false };
            match incoming.kind {
                Kind::Request(id) => {
                    self.keep(id, incoming, place);
                    return true;
                }
                Kind::Response(_) | Kind::Notification | Kind::Stray => {
                    tracing::warn!(method = incoming.message.method(), "a message that is no request");
                }
            }
        }
    }

    fn keep(&self, id: u64, incoming: Incoming<ManagerMessage>, place: OwnedSemaphorePermit) {
        let Incoming { message, kind: _, received_at, room } = incoming;
        let mut open = self.open();
        open.last += 1;
        let ticket = Ticket(open.last);
        let request = Arc::new(Request { ticket, id, received_at, crashes: 0, message });
        open.requests.insert(ticket, OpenRequest { request, in_hand: false, _place: place, _room: room });
    }

    /// The oldest request that no session has in hand.
    pub(super) fn take(&self) -> Option<Arc<Request>> {
        let mut open = self.open();
        let waiting = open.requests.values_mut().find(|open| !open.in_hand)?;
        waiting.in_hand = true;
        Some(waiting.request.clone())
    }

    /// Lets a new session take again what its predecessor had in hand.
    pub(super) fn redeliver(&self) {
        for open in self.open().requests.values_mut().filter(|open| open.in_hand) {
            open.in_hand = false;
            open.request = Arc::new(Request {
                message: open.request.message.clone(),
                crashes: open.request.crashes + 1,
                ..*open.request
            });
        }
    }

    /// The request of this ticket, if it has no answer yet.
    pub(super) fn find(&self, ticket: Ticket) -> Option<Arc<Request>> {
        self.open().requests.get(&ticket).map(|open| open.request.clone())
    }

    /// The requests without an answer that came before this one.
    pub(super) fn before(&self, ticket: Ticket) -> Vec<Arc<Request>> {
        self.open().requests.range(..ticket).map(|(_, open)| open.request.clone()).collect()
    }

    /// The request will have no answer, or has just got the right to one: returns whether it was open. A
    /// dying session and its successor may both hold it; only one of them hears yes.
    pub(super) fn settle(&self, request: &Request) -> bool {
        self.open().requests.remove(&request.ticket).is_some()
    }

    /// Answers, unless somebody has. Nothing is awaited between the right to answer and the answer.
    pub(super) fn answer_in(&self, slot: Slot<TunnelMessage>, request: &Request, answer: Answer) {
        if !self.settle(request) {
            return;
        }
        request.count(answer.result);
        let message = TunnelMessage { rpc: None, msg: Some(answer.message) };
        if let Err(error) = slot.respond(request.id, message) {
            tracing::error!(%error, method = request.method(), "an answer cannot be sent");
        }
    }

    /// Answers, waiting for room.
    pub(super) async fn answer(&self, request: &Request, answer: Answer) {
        match self.speaker.reserve().await {
            Ok(slot) => self.answer_in(slot, request, answer),
            Err(error) => {
                tracing::debug!(%error, method = request.method(), "a request stays without an answer");
                self.settle(request);
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until there is no net, at most [`super::STOP_LIMIT`]. Returns whether there is none.
pub(super) async fn net_gone(mut nets: View<Option<Arc<Net>>>) -> bool {
    timeout(super::STOP_LIMIT, nets.wait_for(Option::is_none)).await.is_ok()
}

/// The end of a connection by Stop.
pub(super) struct Farewell {
    pub(super) stream: Arc<Stream>,
    pub(super) nets: View<Option<Arc<Net>>>,
    /// Ends when what was asked before the stop is answered.
    pub(super) updates: Option<JoinHandle<Option<()>>>,
    /// The start that had failed before the stop came, and why.
    pub(super) failed: Option<(Ticket, String)>,
    pub(super) stop: Arc<Request>,
}

impl Farewell {
    /// Answers what is still to be answered, waits for the net to end, and answers the stop, as the last
    /// frame of all.
    pub(super) async fn say(mut self, stop_limit: Duration, flush_limit: Duration) {
        let stopped = tokio::join!(net_gone(self.nets.clone()), timeout(stop_limit, self.finish())).0;
        let error_message =
            if stopped { String::new() } else { format!("the tunnel did not end within {stop_limit:?}") };
        self.stop.count(if stopped { "ok" } else { "failed" });
        let response = tunnel_message::Msg::Stop(StopResponse { success: stopped, error_message });
        let response = TunnelMessage { rpc: None, msg: Some(response) };
        match self.stream.speaker.close_with(self.stop.id, response, flush_limit).await {
            Ok(true) => {}
            Ok(false) => tracing::warn!("the manager did not read the answer to its stop"),
            Err(error) => tracing::error!(%error, "the answer to a stop cannot be sent"),
        }
    }

    async fn finish(&mut self) {
        for request in self.stream.before(self.stop.ticket) {
            let Some(answer) = self.last_answer(&request) else { continue };
            self.stream.answer(&request, answer).await;
        }
        if let Some(updates) = &mut self.updates {
            let _ = updates.await;
        }
    }

    /// What a request gets that came before the stop; questions for peers are left to their task.
    fn last_answer(&self, request: &Request) -> Option<Answer> {
        let (message, result) = match request.body()? {
            manager_message::Msg::Start(_) => {
                let failed = self.failed.as_ref().filter(|(start, _)| *start == request.ticket);
                let error = failed.map_or(start::CANCELLED, |(_, error)| error);
                (tunnel_message::Msg::Start(start::response(Err(error.to_owned()))), "cancelled")
            }
            manager_message::Msg::Wake(_) => (tunnel_message::Msg::Wake(WakeResponse {}), "ok"),
            manager_message::Msg::GetPeerUpdate(_)
            | manager_message::Msg::NetworkSettings(_)
            | manager_message::Msg::Stop(_) => return None,
        };
        Some(Answer { message, result })
    }
}
