//! The checklist of tailnet-data 20.2 against the lab's agents, which follow the reference's rules: a tunnel process, a
//! machine behind its device, and traffic both ways all the time. No privilege needed. What is measured is said; what is
//! asserted leaves room for a loaded machine.
//!
//! Rows 2, 3 and 8 with a whole service and several relays: `relays.rs`. Rows 5 and 7 behind translators: `nat/`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::{
    cell::Cell,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::{SocketAddr, UdpSocket},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixDatagram,
    },
    thread,
    time::{Duration, Instant},
};

use prost::Message;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType,
};
use support::{
    Deployment, LIMIT, figure,
    host::{Host, Transfer},
    tunnel::{Handed, Tunnel},
};
use tokio::{io::AsyncWriteExt, process::ChildStdin};
use warren_lab::{AgentInfo, Cut, Direct, End, LabOptions, PeerPath};
use warren_proto::{
    frame,
    link::{SocketsReply, SocketsRequest},
    vpn::{ManagerMessage, Rpc, WakeRequest, manager_message::Msg as Order},
};

/// Between two echoes of each direction.
const PACE: Duration = Duration::from_millis(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);
/// Without a packet through the relay for so long, packets go directly.
const QUIET: Duration = Duration::from_millis(400);
const SECOND: Duration = Duration::from_secs(1);
/// Bytes a second of each transfer: busy, and little enough for two debug builds on one machine.
const RATE: u64 = 200_000;
/// What a loaded machine may take where the promise is a second.
const GENEROUS: Duration = Duration::from_secs(3);

struct Scene {
    deployment: Deployment,
    host: Host,
    manager: ChildStdin,
    wakes: u64,
}

impl Scene {
    fn up(options: LabOptions) -> Self {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        Self::with(options, ours, Handed::Device(theirs))
    }

    /// One whose sockets get another port each time that they are bound.
    fn that_moves(options: LabOptions) -> Self {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        Self::with(options, ours, Handed::DeviceAndSockets(theirs, sockets_elsewhere()))
    }

    fn with(options: LabOptions, device: UnixDatagram, handed: Handed) -> Self {
        let deployment = Deployment::with(options);
        let starting = Tunnel::with_device(&deployment.lab, handed);
        let (mut tunnel, address) = deployment.runtime.block_on(starting);
        let manager = tunnel.stdin.take().unwrap();
        deployment.runtime.spawn(async move { while tunnel.next().await.is_some() {} });
        Self { deployment, host: Host::start(device, address), manager, wakes: 0 }
    }

    fn agents(&self) -> Vec<AgentInfo> {
        self.deployment.lab.agents()
    }

    /// How often relays were dialled.
    fn relay_logins(&self) -> usize {
        let requests = self.deployment.control().recording().requests;
        requests.iter().filter(|request| request.path == "/derp").count()
    }

    /// At which ports peers are told that we are.
    fn told_ports(&self) -> Vec<u16> {
        let control = self.deployment.control();
        let [client] = *control.clients() else { panic!("one client") };
        let told = control.node(client).map(|node| node.endpoints).unwrap_or_default();
        told.iter().map(|endpoint| endpoint.parse::<SocketAddr>().unwrap().port()).collect()
    }

    /// How many datagrams came to an agent from where it knew nobody.
    fn unknown(&self, agent: &AgentInfo) -> u64 {
        self.deployment.lab.agent_path(agent.id).unknown
    }

    /// What a loaded machine adds is what the host's own thread was late.
    fn has_no_stall(&self, begun: Instant, stall: Duration, seconds: u64) {
        let overslept = self.host.take_overslept();
        figure(&format!(
            "load both ways for {seconds} s ({:.0?}): longest stall {stall:.2?}, this machine's own {overslept:.2?}",
            begun.elapsed()
        ));
        assert!(stall < SECOND + 4 * overslept, "{stall:?} and {overslept:?}");
    }

    fn wake(&mut self) {
        self.wakes += 1;
        let message = ManagerMessage {
            rpc: Some(Rpc::request(100 + self.wakes)),
            msg: Some(Order::Wake(WakeRequest {})),
        };
        let frame = frame::encode(&message).unwrap();
        self.deployment.runtime.block_on(self.manager.write_all(&frame)).unwrap();
    }
}

/// An agent under load in both directions: echoes each way, a download and an upload.
struct Load<'a> {
    scene: &'a Scene,
    agent: AgentInfo,
    length: u64,
    transfers: [Transfer; 2],
    asked_at: Cell<Instant>,
}

impl<'a> Load<'a> {
    fn start(scene: &'a Scene, agent: &AgentInfo, seconds: u64) -> Self {
        let (host, to) = (&scene.host, agent.address);
        host.ask(to, PACE);
        let length = RATE * seconds;
        let transfers = [host.download(to, length, RATE), host.upload(to, length, RATE)];
        let asked_at = Cell::new(Instant::now());
        let load = Self { scene, agent: agent.clone(), length, transfers, asked_at };
        load.both_ways_after(Instant::now());
        load
    }

    /// Looks until there is an answer, while the agent asks, too.
    #[track_caller]
    fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(begun.elapsed() < LIMIT, "waited in vain until {what}: {:?}", self.path());
            if self.asked_at.get().elapsed() >= PACE {
                self.asked_at.set(Instant::now());
                self.scene.deployment.lab.send_echo(self.agent.id, self.scene.host.address);
            }
            thread::sleep(LOOK);
        }
    }

    fn pass(&self, span: Duration) {
        let begun = Instant::now();
        self.until("time has passed", || (begun.elapsed() >= span).then_some(()));
    }

    /// How long after `moment` the first echo came of those asked for since.
    fn both_ways_after(&self, moment: Instant) -> Duration {
        let at = self.until("an echo comes", || self.scene.host.first_echo_after(moment));
        self.until("the agent is heard", || self.scene.host.first_heard_after(moment));
        at - moment
    }

    /// How long after `moment` packets of both directions went through no relay any more.
    fn direct_after(&self, moment: Instant) -> Duration {
        let relayed = || self.path().map_or(0, |path| path.sent.relay + path.received.relay);
        let straight = || self.path().map_or((0, 0), |path| (path.sent.udp, path.received.udp));
        let (mut last, mut at, mut before) = (relayed(), Instant::now(), straight());
        self.until("packets go directly", || {
            if relayed() != last {
                (last, at, before) = (relayed(), Instant::now(), straight());
            }
            let now = straight();
            (at.elapsed() >= QUIET && now.0 > before.0 && now.1 > before.1).then_some(())
        });
        at.saturating_duration_since(moment)
    }

    fn path(&self) -> Option<PeerPath> {
        self.scene.deployment.lab.agent_path(self.agent.id).only().copied()
    }

    /// Waits for the transfers, and checks every byte. Returns the longest time in which one of them stood still.
    fn finish(self) -> Duration {
        let longest = self.finish_after(Instant::now());
        self.scene.host.rest();
        longest
    }

    /// The same, of whatever stands still: an echo, a request, or a transfer.
    fn finish_after(&self, moment: Instant) -> Duration {
        let length = Duration::from_secs(self.length / RATE);
        while !self.transfers.iter().all(Transfer::has_ended) {
            let late = moment.elapsed().saturating_sub(length);
            assert!(
                late < LIMIT,
                "{:?} of {} bytes",
                self.transfers.each_ref().map(Transfer::moved),
                self.length
            );
            self.pass(PACE);
        }
        // To check what has come takes its time, in which nobody asks.
        let silence = self.scene.host.longest_silence_since(moment);
        self.transfers.iter().map(Transfer::check).fold(silence, Duration::max)
    }
}

fn median(figures: &mut [Duration]) -> Duration {
    figures.sort();
    figures[figures.len() / 2]
}

fn direct(agents: usize) -> LabOptions {
    LabOptions { agents, direct: true, ..LabOptions::default() }
}

mod relayed {
    use super::*;

    /// What a client may wait between two attempts, and what a login takes.
    const BACK_OFF: Duration = Duration::from_secs(5);
    /// While it is in use, a relay that went silent is noticed within this (tailnet-data 4).
    const NOTICED: Duration = Duration::from_secs(10);
    const HEALTH: u8 = 0x14;
    const RESTARTING: u8 = 0x15;
    const UNKNOWN: u8 = 0x77;

    fn one() -> LabOptions {
        LabOptions { agents: 1, ..LabOptions::default() }
    }

    /// Conforms: data:20.2.1
    #[test]
    fn an_agent_shakes_hands_once_and_answers_echoes_and_tsmp() {
        let scene = Scene::up(one());
        let agent = &scene.agents()[0];
        let load = Load::start(&scene, agent, 1);
        // Whoever starts too early is not heard, and tries again.
        assert_eq!(scene.deployment.lab.agent_stats(agent.id).handshakes, 1);
        // The pong is for the tunnel itself, not for the machine behind it.
        scene.host.tsmp_ping(agent.address);
        let is_answered = || scene.deployment.lab.agent_stats(agent.id).tsmp_pings == 1;
        load.until("the agent has answered", || is_answered().then_some(()));
        load.finish();
    }

    /// Conforms: data:20.2.3
    #[test]
    fn what_a_newer_relay_may_say_costs_an_agent_no_echo_and_a_restart_no_transfer() {
        let scene = Scene::up(one());
        let load = Load::start(&scene, &scene.agents()[0], 6);
        load.pass(SECOND);
        let (begun, logins) = (Instant::now(), scene.relay_logins());
        for (kind, body) in [(HEALTH, b"overloaded".as_slice()), (HEALTH, b""), (UNKNOWN, &[7; 1000])] {
            scene.deployment.lab.relay().inject(kind, body);
            load.pass(SECOND / 2);
        }
        let silence = scene.host.longest_silence_since(begun);
        assert!(silence < GENEROUS, "{silence:?}");
        assert_eq!(scene.relay_logins(), logins, "the link is the same");
        // It wants us back in 200 ms, and to be tried for 2 s. Then its greeting is a newer one, too, and comes in one
        // segment with the answer to the upgrade.
        scene.deployment.lab.relay().greet_at_length(true);
        scene.deployment.lab.relay().greet_at_once(true);
        let at = Instant::now();
        scene.deployment.lab.relay().inject(RESTARTING, &[0, 0, 0, 200, 0, 0, 7, 208]);
        load.until("it is dialled again", || (scene.relay_logins() > logins).then_some(()));
        load.both_ways_after(at);
        load.finish();
    }

    /// Conforms: data:20.2.4
    #[test]
    fn a_relay_that_is_killed_in_the_middle_of_transfers_or_stalls_is_met_again_and_no_transfer_is_lost() {
        let scene = Scene::up(one());
        let (relay, load) = (scene.deployment.lab.relay(), Load::start(&scene, &scene.agents()[0], 30));
        let mut gone = Vec::new();
        for _ in 0..3 {
            load.pass(SECOND);
            let at = Instant::now();
            relay.kill_connections();
            gone.push(load.both_ways_after(at + PACE));
        }
        // It accepts, and says nothing any more.
        load.pass(SECOND);
        let (at, logins) = (Instant::now(), scene.relay_logins());
        relay.stall(true);
        load.until("it is dialled again", || (scene.relay_logins() > logins).then_some(()));
        let noticed = at.elapsed();
        let at = Instant::now();
        relay.stall(false);
        let back = load.both_ways_after(at);
        let stall = load.finish();
        let killed = median(&mut gone);
        figure(&format!(
            "relay killed under load: both ways again after {killed:.2?}; stalled: noticed after {noticed:.2?}, both \
             ways {back:.2?} after it is back, TCP stood still for {stall:.2?}"
        ));
        assert!(gone.iter().all(|gone| *gone < BACK_OFF + GENEROUS), "{gone:?}");
        assert!(noticed < NOTICED, "{noticed:?}");
        // An attempt may wait for the answer to its login before it is followed by another.
        assert!(back < NOTICED + BACK_OFF, "{back:?}");
    }

    /// Conforms: data:20.2.11
    #[test]
    fn an_agent_that_blocks_endpoints_is_relayed_and_direct_once_it_allows_them() {
        let scene = Scene::up(direct(1));
        let agent = &scene.agents()[0];
        scene.deployment.lab.set_direct(agent.id, Direct::Blocked);
        let load = Load::start(&scene, agent, 12);
        load.pass(GENEROUS);
        let [before, after] = [(); 2].map(|()| {
            load.pass(GENEROUS);
            load.path().unwrap()
        });
        assert_eq!(before.sent.udp + before.received.udp, after.sent.udp + after.received.udp);
        assert!(after.sent.relay > before.sent.relay && after.received.relay > before.received.relay);
        assert_eq!(after.best, None);
        scene.deployment.lab.set_direct(agent.id, Direct::Allowed);
        load.direct_after(Instant::now());
        load.finish();
    }

    /// Conforms: data:20.2.11
    #[test]
    fn where_the_deployment_blocks_endpoints_no_packet_goes_directly_though_the_agent_would_have_it() {
        for agents in [Direct::Blocked, Direct::Allowed] {
            let scene = Scene::up(LabOptions { disable_direct: true, ..direct(1) });
            let agent = &scene.agents()[0];
            scene.deployment.lab.set_direct(agent.id, agents);
            let load = Load::start(&scene, agent, 4);
            load.pass(GENEROUS);
            let path = load.path().unwrap();
            // An agent that would have it pings where it is told that we are, which is nowhere.
            assert_eq!((path.sent.udp, path.received.udp, path.best), (0, 0, None), "agents: {agents:?}");
            load.finish();
        }
    }
}

mod straight {
    use super::*;

    /// Row 9: nothing is relayed any more within this.
    const LEFT: Duration = Duration::from_secs(7);
    /// Row 6: a path that died is taken again within this.
    const BACK: Duration = Duration::from_secs(6);
    /// Wakes that are closer than this are one.
    const BETWEEN_WAKES: Duration = Duration::from_millis(5500);

    #[test]
    fn an_agent_in_the_same_network_is_direct_at_once() {
        let begun = Instant::now();
        let scene = Scene::up(direct(1));
        let (started, agent) = (Instant::now(), &scene.agents()[0]);
        let load = Load::start(&scene, agent, 2);
        let direct = load.direct_after(started);
        load.finish();
        figure(&format!(
            "same network: nothing is relayed any more {direct:.2?} after the start was answered ({:.2?} after it \
             began; goal 1 s after READY)",
            started - begun + direct
        ));
        assert!(direct < GENEROUS + GENEROUS, "{direct:?}");
    }

    /// Conforms: data:20.2.6
    #[test]
    fn udp_that_is_cut_under_load_costs_a_moment_and_no_transfer_and_is_used_again_when_it_is_back() {
        const THEIRS: Cut = Cut { sent: true, received: false };
        const OURS: Cut = Cut { sent: false, received: true };
        const TIMES: usize = 3;
        // An agent for each: a path that is cut again and again is let be for a while.
        let scene = Scene::up(direct(3 * TIMES));
        let (agents, mut all) = (scene.agents(), Vec::new());
        let rows = [("both directions", Cut::BOTH), ("theirs", THEIRS), ("ours", OURS)];
        for ((what, cut), agents) in rows.into_iter().zip(agents.chunks(TIMES)) {
            let (mut gone, mut back, mut stalls) = (Vec::new(), Vec::new(), Vec::new());
            for (agent, hold) in agents.iter().zip([700, 1000, 1300].map(Duration::from_millis)) {
                let load = Load::start(&scene, agent, 6);
                load.direct_after(Instant::now());
                load.pass(hold);
                let at = Instant::now();
                scene.deployment.lab.cut_udp(agent.id, cut);
                gone.push(load.both_ways_after(at));
                load.pass(hold);
                let at = Instant::now();
                scene.deployment.lab.heal_udp(agent.id);
                back.push(load.direct_after(at));
                stalls.push(load.finish());
            }
            all.extend_from_slice(&gone);
            let slowest = *back.iter().max().unwrap();
            let (gone, back, stall) = (median(&mut gone), median(&mut back), median(&mut stalls));
            figure(&format!(
                "UDP cut under load, {what}: both ways again after {gone:.2?}, TCP stood still for {stall:.2?}, \
                 direct again {back:.2?} after UDP is back, {slowest:.2?} at most (goal 1 s)"
            ));
            assert!(gone < GENEROUS, "{what}: {gone:?}");
            assert!(slowest < BACK, "{what}: {slowest:?}");
        }
        let gone = median(&mut all);
        figure(&format!("UDP cut under load: both ways again after {gone:.2?}, median of 9 cuts (goal 1 s)"));
        assert!(gone < GENEROUS, "{gone:?}");
    }

    #[test]
    fn an_agent_that_starts_anew_under_load_is_met_under_its_new_keys_and_directly() {
        for end in [End::Crash, End::Graceful] {
            let scene = Scene::up(direct(1));
            let (lab, agent) = (&scene.deployment.lab, &scene.agents()[0]);
            let load = Load::start(&scene, agent, 2);
            load.direct_after(Instant::now());
            let old = lab.agent_key(agent.id);
            let at = Instant::now();
            scene.deployment.runtime.block_on(async { lab.start_agent(agent.id, end) });
            let gone = load.both_ways_after(at + PACE);
            let direct = load.direct_after(at);
            assert!(lab.agent_key(agent.id).is_some_and(|key| Some(key) != old));
            figure(&format!(
                "agent started anew ({end:?}): answers after {gone:.2?}, directly after {direct:.2?}"
            ));
            // What was under way to the old one is lost with it; the new one serves others.
            scene.host.download(agent.address, 1000, RATE);
            let again = Load::start(&scene, agent, 1);
            again.finish();
        }
    }

    /// Conforms: data:20.2.9
    #[test]
    fn sockets_of_ours_at_another_port_ask_before_they_send_and_are_relayed_for_a_moment() {
        let mut scene = Scene::that_moves(direct(1));
        let agent = scene.agents()[0].clone();
        let (mut silences, mut relayed) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let load = Load::start(&scene, &agent, 2);
            load.direct_after(Instant::now());
            load.pass(BETWEEN_WAKES);
            load.finish();
            let (before, unknown) = (scene.told_ports(), scene.unknown(&agent));
            let at = Instant::now();
            scene.wake();
            let load = Load::start(&scene, &agent, 4);
            load.until("the new port is told", || {
                let now = scene.told_ports();
                (!now.is_empty() && now.iter().all(|port| !before.contains(port))).then_some(())
            });
            relayed.push(load.direct_after(at));
            silences.push(scene.host.longest_silence_since(at));
            load.finish();
            assert_eq!(scene.unknown(&agent), unknown, "data came before a ping");
        }
        let slowest = *relayed.iter().max().unwrap();
        let (silence, relayed) = (median(&mut silences), median(&mut relayed));
        figure(&format!(
            "our sockets at another port: longest silence {silence:.2?}, direct again after {relayed:.2?}, \
             {slowest:.2?} at most (at most 7 s)"
        ));
        assert!(slowest < LEFT, "{slowest:?}");
        assert!(silence < GENEROUS, "{silence:?}");
    }

    /// Conforms: data:20.2.9
    #[test]
    fn an_agents_sockets_at_another_port_are_followed_and_relayed_for_a_moment() {
        let scene = Scene::up(direct(3));
        let (mut silences, mut relayed) = (Vec::new(), Vec::new());
        for agent in scene.agents() {
            let load = Load::start(&scene, &agent, 6);
            load.direct_after(Instant::now());
            let told = || scene.deployment.lab.agent_path(agent.id).endpoints;
            let (at, before) = (Instant::now(), told());
            scene.deployment.lab.rebind_udp(agent.id);
            load.until("it is elsewhere", || (told() != before && !told().is_empty()).then_some(()));
            relayed.push(load.direct_after(at));
            silences.push(scene.host.longest_silence_since(at));
            load.finish();
        }
        let slowest = *relayed.iter().max().unwrap();
        let (silence, relayed) = (median(&mut silences), median(&mut relayed));
        figure(&format!(
            "an agent's sockets at another port: longest silence {silence:.2?}, direct again after {relayed:.2?}, \
             {slowest:.2?} at most (at most 7 s)"
        ));
        assert!(slowest < LEFT, "{slowest:?}");
        assert!(silence < GENEROUS, "{silence:?}");
    }

    /// In real time: WireGuard's clock renews keys after 120 s. With `WARREN_SOAK` so many seconds instead, then a
    /// sixth of them idle, and a burst: 3600 is the checklist's hour with its ten minutes.
    ///
    /// Conforms: data:20.2.10
    #[test]
    fn keys_are_renewed_under_load_in_both_directions_without_a_stall() {
        let soak = std::env::var("WARREN_SOAK").ok().map(|seconds| seconds.parse::<u64>().unwrap());
        let seconds = soak.unwrap_or(130);
        let scene = Scene::up(direct(1));
        let agent = &scene.agents()[0];
        let load = Load::start(&scene, agent, seconds);
        load.direct_after(Instant::now());
        let handshakes = || scene.deployment.lab.agent_stats(agent.id).handshakes;
        let (begun, before) = (Instant::now(), handshakes());
        scene.host.take_overslept();
        let stall = load.finish_after(begun);
        scene.has_no_stall(begun, stall, seconds);
        let renewed = handshakes() - before;
        assert!(
            renewed >= seconds / 125 && renewed <= seconds / 115 + 1,
            "keys were renewed {renewed} times"
        );
        let Some(seconds) = soak else { return };
        thread::sleep(Duration::from_secs(seconds / 6));
        let begun = Instant::now();
        scene.host.take_overslept();
        let load = Load::start(&scene, agent, 10);
        let stall = load.finish_after(begun);
        scene.has_no_stall(begun, stall, 10);
    }
}

/// A maker of UDP sockets that gives them another port each time, whatever it is asked for.
fn sockets_elsewhere() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    thread::spawn(move || while answer_elsewhere(&ours).is_some() {});
    theirs
}

fn answer_elsewhere(channel: &OwnedFd) -> Option<()> {
    let (mut packet, mut nothing) = ([0; 512], RecvAncillaryBuffer::default());
    let mut into = [IoSliceMut::new(&mut packet)];
    let length = rustix::net::recvmsg(channel, &mut into, &mut nothing, RecvFlags::empty()).ok()?.bytes;
    let SocketsRequest { id, .. } =
        SocketsRequest::decode(packet.get(..length).filter(|it| !it.is_empty())?).ok()?;
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    let answer = SocketsReply { id, error: String::new() }.encode_to_vec();
    let descriptors = [socket.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    with.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(channel, &[IoSlice::new(&answer)], &mut with, SendFlags::NOSIGNAL).ok()?;
    Some(())
}
