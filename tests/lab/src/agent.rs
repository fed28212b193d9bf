//! Agents: what runs in a workspace, seen from the tailnet. Each has keys and a WireGuard peer of its own,
//! is logged in to its home relay, answers probes, pings and echo requests, and serves HTTP over a TCP stack
//! of its own.
//!
//! An agent is one task that sleeps until something arrives; WireGuard's time passes in one task for all of
//! them. Its relay connection is a pipe in memory instead of a socket: a thousand agents need no descriptors.
//! One that talks directly has a task for its sockets besides; whichever of the two takes something in wakes the
//! other for what is to go out there.

pub(crate) mod core;
pub(crate) mod direct;
pub(crate) mod faults;
mod page;
pub(crate) mod small;
mod stack;
pub(crate) mod udp;

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::{Notify, mpsc, watch},
    time::sleep_until,
};
use uuid::Uuid;
use warren_proto::{
    key::NodePublic,
    tailnet::{
        CoordinateRequest, CoordinateResponse,
        coordinate_request::{ReadyForHandshake, UpdateSelf},
    },
};

pub(crate) use self::stack::HTTP_PORT;
use self::{
    core::{Core, Counters},
    direct::{AgentPath, Direct, DirectCore},
    faults::UdpFaults,
    udp::{Sending, UdpBinder},
};
use crate::{
    control::coordinator::{Auth, Coordinator, Gone, Place},
    relay::{Relay, wire},
    work::Work,
};

/// Bytes in flight each way between an agent and its relay.
const PIPE: usize = 256 * 1024;
/// Least and most room for one read; idle agents have the least.
const READ: std::ops::RangeInclusive<usize> = 2048..=64 * 1024;
/// After a relay or the coordinator hung up.
const PAUSE: Duration = Duration::from_millis(100);
/// How often WireGuard's time passes, in steps of all agents.
const TICK: Duration = Duration::from_millis(250);
const TICKS_PER_SECOND: u32 = 4;

/// What an agent needs of the lab.
pub(crate) struct Home {
    pub(crate) region: u16,
    pub(crate) relay: Relay,
    pub(crate) coordinator: Arc<Coordinator>,
    pub(crate) wild: Option<Wild>,
}

/// What an agent that talks directly needs of it besides.
pub(crate) struct Wild {
    /// Where its sockets are bound.
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) binder: UdpBinder,
    pub(crate) stun: Vec<SocketAddr>,
    pub(crate) direct: Direct,
    pub(crate) faults: Arc<UdpFaults>,
    pub(crate) sending: Sending,
}

/// A running agent.
pub(crate) struct Agent {
    core: Arc<Shared>,
    homes: watch::Sender<(u16, Relay)>,
    work: Work,
}

struct Shared {
    core: Mutex<Core>,
    /// Wakes the task of the relay,
    wake: Notify,
    /// and that of the sockets.
    udp_wake: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_both(&self) {
        self.wake.notify_one();
        self.udp_wake.notify_one();
    }
}

/// How an agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// In order: the coordinator is told, peers see it disconnected.
    Graceful,
    /// As by a power cut: peers see it lost.
    Crash,
}

/// What has happened to an agent so far, over all its lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgentStats {
    /// Path probes that were answered.
    pub disco_pings: u64,
    /// TSMP pings that were answered.
    pub tsmp_pings: u64,
    /// ICMPv6 echo requests that were answered.
    pub echo_requests: u64,
    /// Answers to echo requests of its own.
    pub echo_replies: u64,
    /// Pings of its own, made for a person, that were answered.
    pub user_pongs: u64,
    /// WireGuard sessions that became usable.
    pub handshakes: u64,
    /// HTTP requests.
    pub http_requests: u64,
    /// Bytes of inner packets that came in.
    pub received_bytes: u64,
    /// Bytes of inner packets that went out.
    pub sent_bytes: u64,
    /// Logins at the relay.
    pub relay_logins: u64,
    /// Datagrams of peers that came over UDP.
    pub direct_datagrams: u64,
}

impl Agent {
    pub(crate) fn start(id: Uuid, title: String, home: Home, work: &Work, counters: Arc<Counters>) -> Self {
        let work = work.child();
        let Home { region, relay, coordinator, wild } = home;
        let direct = wild.as_ref().map(|wild| DirectCore::new(wild.stun.clone(), wild.direct));
        let core = Mutex::new(Core::new(id, title, region, direct, Arc::clone(&counters)));
        let core = Arc::new(Shared { core, wake: Notify::new(), udp_wake: Notify::new() });
        if let Some(wild) = wild {
            work.spawn(udp::run(Arc::clone(&core), wild));
        }
        let (homes, moves) = watch::channel((region, relay));
        let (shared, inner) = (Arc::clone(&core), work.clone());
        work.spawn(async move { run(id, shared, coordinator, moves, inner, counters).await });
        Self { core, homes, work }
    }

    /// Moves to another home; peers hear of it once the agent is there.
    pub(crate) fn move_to(&self, region: u16, relay: Relay) {
        self.homes.send_replace((region, relay));
    }

    /// The node key of this life.
    pub(crate) fn key(&self) -> NodePublic {
        self.core.lock().public()
    }

    pub(crate) fn shut(&self, is_shut: bool) {
        self.core.lock().shut(is_shut);
    }

    pub(crate) fn mute(&self, is_mute: bool) {
        self.core.lock().mute(is_mute);
    }

    /// Ends this life.
    pub(crate) fn end(self, id: Uuid, coordinator: &Coordinator, end: End) {
        if end == End::Graceful {
            coordinator.say_goodbye(id);
        }
        self.work.cancel();
    }

    /// Which ways its packets take.
    pub(crate) fn path(&self) -> AgentPath {
        self.core.lock().path(Instant::now())
    }

    /// Sends an echo request. Returns whether that node is a peer.
    pub(crate) fn send_echo(&self, to: Ipv6Addr) -> bool {
        let is_peer = self.core.lock().send_echo(to, Instant::now());
        self.core.wake_both();
        is_peer
    }

    /// Pings a node for a person. Returns whether that node is a peer.
    pub(crate) fn user_ping(&self, to: Ipv6Addr) -> bool {
        let is_peer = self.core.lock().user_ping(to, Instant::now());
        self.core.wake_both();
        is_peer
    }

    /// Gets other sockets.
    pub(crate) fn rebind(&self) {
        self.core.lock().want_rebind();
        self.core.wake_both();
    }

    pub(crate) fn set_direct(&self, direct: Direct) {
        self.core.lock().set_direct(Instant::now(), direct);
        self.core.wake_both();
    }

    fn tick(&self, now: Instant, is_whole_second: bool) {
        if self.core.lock().tick(now, is_whole_second) {
            self.core.wake_both();
        }
    }
}

pub(crate) fn stats(counters: &Counters) -> AgentStats {
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    AgentStats {
        disco_pings: read(&counters.disco_pings),
        tsmp_pings: read(&counters.tsmp_pings),
        echo_requests: read(&counters.echo_requests),
        echo_replies: read(&counters.echo_replies),
        user_pongs: read(&counters.user_pongs),
        handshakes: read(&counters.handshakes),
        http_requests: read(&counters.http_requests),
        received_bytes: read(&counters.received_bytes),
        sent_bytes: read(&counters.sent_bytes),
        relay_logins: read(&counters.relay_logins),
        direct_datagrams: read(&counters.direct_datagrams),
    }
}

/// Lets time pass for all agents.
pub(crate) async fn tick_all(agents: impl Fn(&mut dyn FnMut(&Agent))) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for count in 0_u32.. {
        interval.tick().await;
        let now = Instant::now();
        agents(&mut |agent| agent.tick(now, count.is_multiple_of(TICKS_PER_SECOND)));
    }
}

/// A place at the coordinator, given up with the agent.
struct Membership {
    coordinator: Arc<Coordinator>,
    place: Place,
    responses: mpsc::Receiver<CoordinateResponse>,
    /// The home region and the endpoints that the coordinator knows.
    told: Option<(u16, Vec<SocketAddr>)>,
}

impl Membership {
    fn join(id: Uuid, coordinator: &Arc<Coordinator>, core: &Core) -> Self {
        let coordinator = Arc::clone(coordinator);
        let (place, responses) = coordinator.open(id, Auth::Agent);
        let mut member = Self { coordinator, place, responses, told: None };
        member.say_home(core);
        member
    }

    /// Tells the node, unless its home and its endpoints have been told.
    fn say_home(&mut self, core: &Core) {
        let home = (core.region(), core.endpoints().to_vec());
        if self.told.as_ref() != Some(&home) {
            self.told = Some(home);
            let update_self = Some(UpdateSelf { node: Some(core.node_message()) });
            self.say(CoordinateRequest { update_self, ..CoordinateRequest::default() });
        }
    }

    fn say(&self, request: CoordinateRequest) {
        if let Err(text) = self.coordinator.handle(self.place, request) {
            self.coordinator.leave(self.place, Gone::Refused(text));
        }
    }

    fn say_ready(&self, peers: Vec<Uuid>) {
        let ready = |id: Uuid| ReadyForHandshake { id: id.as_bytes().to_vec().into() };
        let ready_for_handshake = peers.into_iter().map(ready).collect::<Vec<_>>();
        if !ready_for_handshake.is_empty() {
            self.say(CoordinateRequest { ready_for_handshake, ..CoordinateRequest::default() });
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.coordinator.leave(self.place, Gone::Lost);
    }
}

async fn run(
    id: Uuid,
    shared: Arc<Shared>,
    coordinator: Arc<Coordinator>,
    mut homes: watch::Receiver<(u16, Relay)>,
    work: Work,
    counters: Arc<Counters>,
) {
    let mut member = None;
    loop {
        let (region, relay) = homes.borrow_and_update().clone();
        shared.lock().move_to(region);
        let at_home = async {
            let mut pipe = connect(&relay, &work);
            if let Some(buffer) = log_in(&shared, &mut pipe).await {
                core::count(&counters.relay_logins, 1);
                // Only who can be reached says where.
                let join = || Membership::join(id, &coordinator, &shared.lock());
                let member = member.get_or_insert_with(join);
                member.say_home(&shared.lock());
                serve(id, &shared, member, pipe, buffer).await;
            }
            tokio::time::sleep(PAUSE).await;
        };
        tokio::select! {
            () = at_home => {}
            Ok(()) = homes.changed() => {}
        }
    }
}

fn connect(relay: &Relay, work: &Work) -> DuplexStream {
    let (near, far) = tokio::io::duplex(PIPE);
    let (relay, inner) = (relay.clone(), work.clone());
    work.spawn(async move { relay.serve(&inner, far).await });
    near
}

async fn log_in(shared: &Shared, pipe: &mut DuplexStream) -> Option<BytesMut> {
    let mut buffer = BytesMut::new();
    let mut server = None;
    loop {
        while let Some((kind, body)) = wire::take(&mut buffer).ok()? {
            match (kind, server) {
                (wire::SERVER_KEY, None) => {
                    let key = wire::open_server_key(&body)?;
                    let info = {
                        let core = shared.lock();
                        wire::client_info(core.private(), &core.public(), &key)
                    };
                    pipe.write_all(&info).await.ok()?;
                    pipe.write_all(&wire::frame(wire::NOTE_PREFERRED, &[&[1]])).await.ok()?;
                    server = Some(key);
                }
                (wire::SERVER_INFO, Some(key)) => {
                    return wire::open_server_info(shared.lock().private(), &key, &body).then_some(buffer);
                }
                _ => {}
            }
        }
        if pipe.read_buf(&mut buffer).await.ok()? == 0 {
            return None;
        }
    }
}

/// One connection to the relay, until it ends.
async fn serve(
    id: Uuid,
    shared: &Shared,
    member: &mut Membership,
    mut pipe: DuplexStream,
    mut buffer: BytesMut,
) {
    let mut room = *READ.start();
    let mut out = BytesMut::new();
    let mut due = None;
    loop {
        buffer.reserve(room);
        tokio::select! {
            read = pipe.read_buf(&mut buffer) => match read {
                Ok(0) | Err(_) => return,
                Ok(got) if got >= room => room = (room * 2).min(*READ.end()),
                Ok(got) if got < room / 8 => room = (room / 2).max(*READ.start()),
                Ok(_) => {}
            },
            response = member.responses.recv() => match response {
                Some(response) => {
                    let ready = shared.lock().coordinated(&response, Instant::now());
                    member.say_ready(ready);
                }
                None => {
                    // Displaced, or the coordinator has closed.
                    tokio::time::sleep(PAUSE).await;
                    let coordinator = Arc::clone(&member.coordinator);
                    *member = Membership::join(id, &coordinator, &shared.lock());
                }
            },
            () = shared.wake.notified() => {}
            () = at(due) => {}
        }
        let needs_shell = {
            let mut core = shared.lock();
            let now = Instant::now();
            while let Ok(Some((kind, body))) = wire::take(&mut buffer) {
                core.frame(kind, &body, now);
            }
            core.poll(now);
            due = core.due(now);
            out.clear();
            core.take_output(&mut out);
            member.say_home(&core);
            core.needs_shell()
        };
        if needs_shell {
            shared.udp_wake.notify_one();
        }
        if !out.is_empty() && pipe.write_all(&out).await.is_err() {
            return;
        }
        if out.capacity() > *READ.end() {
            out = BytesMut::new();
        }
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
