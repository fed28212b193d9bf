//! A machine with warren and a deployment's agents, each somewhere on a small internet: the service with its device
//! on a host of its own, the agents' sockets on another, control plane, relay and STUN server in the world.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::unix::fs::MetadataExt,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;
use warren_lab::{
    AgentInfo, LabOptions, PeerPath,
    internet::{Fate, HostId, Internet, Line, Namespace, SiteId},
    nat::Kind,
    payload,
};

use crate::support::{Deployment, LIMIT, ServiceProcess, body, eventually, stderr, unix_get};

/// How far a site is from the world.
const DELAY: Duration = Duration::from_millis(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);

/// What a site has between its hosts and the world.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Edge {
    /// A translator.
    Home(Kind),
    /// Nothing: its hosts have addresses of the world.
    Open,
    /// The same site as the other's.
    Shared,
}

/// What all addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// What a scene is like.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) family: Family,
    pub(crate) ours: Edge,
    pub(crate) agents: Edge,
    /// Our site's; theirs is a good one.
    pub(crate) line: Line,
}

impl Shape {
    /// With good lines and IPv4.
    pub(crate) fn of(ours: Edge, agents: Edge) -> Self {
        Self { family: Family::V4, ours, agents, line: good_line() }
    }
}

/// A line on which nothing goes wrong.
pub(crate) fn good_line() -> Line {
    Line { delay: DELAY, ..Line::default() }
}

/// The agent that is looked at, and how long it took.
pub(crate) struct Met {
    pub(crate) agent: AgentInfo,
    pub(crate) took: Duration,
}

/// All of it. What runs on the internet ends before it does.
pub(crate) struct Scene {
    pub(crate) service: ServiceProcess,
    pub(crate) deployment: Deployment,
    pub(crate) internet: Internet,
    /// The host with warren, and its first site.
    pub(crate) host: HostId,
    pub(crate) site: SiteId,
    family: Family,
}

impl Scene {
    /// Sets the scene, and has the tunnel come up with nobody to talk to yet.
    pub(crate) fn up(shape: &Shape) -> Self {
        let scene = Self::set(shape);
        scene.log_in(scene.deployment.lab.url());
        scene
    }

    /// Sets the scene, with a service that is logged in nowhere.
    pub(crate) fn set(shape: &Shape) -> Self {
        let Shape { family, ours, agents, line } = shape;
        let mut internet = Internet::start().unwrap();
        let world = internet.add_site();
        internet.add_ourselves(world, &[family.world()]).unwrap();
        let site = add_site(&internet, *ours, [203, 0, 113, 1]);
        let their_site = match agents {
            Edge::Shared => site,
            _ => add_site(&internet, *agents, [203, 0, 113, 2]),
        };
        let (own, theirs) = (family.address(1, *ours), family.address(2, *agents));
        let host = internet.add_host(site, &[own]).unwrap();
        let their_host = internet.add_host(their_site, &[theirs]).unwrap();
        internet.set_line(their_site, good_line());
        internet.set_line(site, line.clone());
        let deployment = Deployment::with(LabOptions {
            agents: 0,
            listen: family.world(),
            direct: true,
            direct_addresses: vec![theirs],
            direct_binder: internet.binder(their_host),
            ..LabOptions::default()
        });
        let config = format!("allow_http_hosts = [\"{}\"]\n", family.host());
        let start = || ServiceProcess::start_configured(&config);
        let service = internet.namespace(host).enter(start).unwrap();
        Self { service, deployment, internet, host, site, family: *family }
    }

    /// Logs in at a URL, brings the tunnel up and waits until it has looked around.
    #[track_caller]
    pub(crate) fn log_in(&self, url: &str) {
        self.service.pretend_login(url, self.deployment.lab.token());
        let up = self.service.warren(&["up", "--wait"]);
        assert!(up.status.success(), "{}\n{}", stderr(&up), self.service.log());
        eventually("it has looked around", || self.ask("/v1/netcheck").is_some());
    }

    /// Where warren's host is.
    pub(crate) fn namespace(&self) -> Arc<Namespace> {
        self.internet.namespace(self.host)
    }

    /// Starts an agent, and waits for the first answer that came straight. What it takes an agent to start and to be
    /// told of counts: it is told to be ready after that.
    #[track_caller]
    pub(crate) fn meet(&self) -> Met {
        self.meet_by("answers directly", |ping| ping["p2p"] == true)
    }

    /// Starts an agent, and waits for the first answer, whichever way it came.
    #[track_caller]
    pub(crate) fn hear(&self) -> Met {
        self.meet_by("answers", |ping| ping["latency_seconds"].is_f64())
    }

    #[track_caller]
    fn meet_by(&self, what: &str, is_met: impl Fn(&Value) -> bool) -> Met {
        let lab = &self.deployment.lab;
        let begun = Instant::now();
        let name = format!("lab-{}", lab.agents().len() + 1);
        let agent = self.deployment.runtime.block_on(async { lab.add_workspace(&name, &["main"]) }).remove(0);
        while !self.ping(&agent).is_some_and(|answer| is_met(&answer)) {
            assert!(begun.elapsed() < LIMIT, "no agent that {what}\n{}", self.told(&agent));
            std::thread::sleep(LOOK);
        }
        Met { agent, took: begun.elapsed() }
    }

    /// The quickest of so many agents: the machine may have other things to do.
    #[track_caller]
    pub(crate) fn meet_within(&self, bar: Duration, attempts: usize) -> Met {
        let mut best = self.meet();
        for _ in 1..attempts {
            if best.took <= bar {
                break;
            }
            let next = self.meet();
            if next.took < best.took {
                best = next;
            }
        }
        assert!(best.took <= bar, "took {:?} at best\n{}", best.took, self.told(&best.agent));
        best
    }

    /// One ping over the path that is in use; `None` while there is nobody to ask.
    pub(crate) fn ping(&self, agent: &AgentInfo) -> Option<Value> {
        self.ask(&format!("/v1/ping/{}?count=1", agent.id))
    }

    /// What the local API says in one line of JSON.
    pub(crate) fn ask(&self, path: &str) -> Option<Value> {
        let answer = unix_get(&self.service.socket_dir().join("api.sock"), path)?;
        if !answer.starts_with("HTTP/1.1 200") {
            return None;
        }
        let body = body(&answer);
        // In chunks, or as it is.
        let line = body.lines().find(|line| line.starts_with('{'))?;
        serde_json::from_str(line).ok()
    }

    /// An agent's path to us.
    pub(crate) fn path(&self, agent: &AgentInfo) -> PeerPath {
        self.deployment.lab.agent_path(agent.id).only().copied().unwrap_or_default()
    }

    /// How many packets had this fate so far.
    pub(crate) fn fate(&self, fate: Fate) -> u64 {
        self.internet.fates().get(&fate).copied().unwrap_or_default()
    }

    /// Carries so many bytes each way through the tunnel and checks them. Returns how many datagrams of the agent went
    /// straight for it, and how many by the relay.
    #[track_caller]
    pub(crate) fn carries(&self, agent: &AgentInfo, bytes: u64) -> (u64, u64) {
        let before = self.path(agent).sent;
        let at = SocketAddr::from((agent.address, agent.http_port));
        let (down, up) = self.namespace().enter(|| (fetch(at, bytes), post(at, bytes))).unwrap();
        let expected = payload::checksum(bytes);
        assert_eq!(down, expected, "down");
        assert!(up.contains(&format!("{expected:016x}")), "up: {up}");
        let after = self.path(agent).sent;
        (after.udp - before.udp, after.relay - before.relay)
    }

    /// What is known, for whoever reads a failure.
    pub(crate) fn told(&self, agent: &AgentInfo) -> String {
        format!(
            "path: {:#?}\nfates: {:?}\nnetcheck: {:?}\nping: {:?}\n{}",
            self.deployment.lab.agent_path(agent.id),
            self.internet.fates(),
            self.ask("/v1/netcheck"),
            self.ping(agent),
            self.service.log(),
        )
    }

    /// Plugs warren's host in at a new site.
    pub(crate) fn roam(&self, number: u8, edge: Edge) {
        let site = add_site(&self.internet, edge, [203, 0, 113, 100 + number]);
        self.internet.set_line(site, good_line());
        self.internet.move_host(self.host, site, &[self.family.address(100 + number, edge)]).unwrap();
    }
}

impl Family {
    pub(crate) fn world(self) -> IpAddr {
        match self {
            Self::V4 => [198, 51, 100, 1].into(),
            Self::V6 => [0x2001, 0xdb8, 0xff, 0, 0, 0, 0, 1].into(),
        }
    }

    /// The same as URLs have it.
    fn host(self) -> String {
        match self.world() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        }
    }

    /// The address of a host by its number.
    fn address(self, number: u8, edge: Edge) -> IpAddr {
        match (self, edge) {
            (Self::V6, _) => [0x2001, 0xdb8, number.into(), 0, 0, 0, 0, 10].into(),
            (Self::V4, Edge::Open) => [192, 0, 2, number].into(),
            (Self::V4, Edge::Home(_)) => [192, 168, number, 10].into(),
            (Self::V4, Edge::Shared) => [192, 168, 1, 20].into(),
        }
    }
}

fn add_site(internet: &Internet, edge: Edge, outer: [u8; 4]) -> SiteId {
    match edge {
        Edge::Home(kind) => internet.add_home(kind, outer.into()),
        Edge::Open | Edge::Shared => internet.add_site(),
    }
}

/// The checksum of what an agent hands out.
fn fetch(at: SocketAddr, bytes: u64) -> u64 {
    let answer = exchange(at, format!("GET /bytes/{bytes} HTTP/1.1\r\n"), &[]);
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    assert_eq!(answer.len() - head, usize::try_from(bytes).unwrap());
    let mut sum = payload::Checksum::default();
    sum.update(&answer[head..]);
    sum.finish()
}

/// What an agent says of what it took in.
fn post(at: SocketAddr, bytes: u64) -> String {
    let mut sent = vec![0; usize::try_from(bytes).unwrap()];
    payload::fill(0, &mut sent);
    let answer = exchange(at, format!("POST /sink HTTP/1.1\r\nContent-Length: {bytes}\r\n"), &sent);
    String::from_utf8(answer).unwrap()
}

fn exchange(at: SocketAddr, head: String, sent: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect_timeout(&at, LIMIT).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream.write_all(format!("{head}Host: lab\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    stream.write_all(sent).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

/// The processes of this user namespace besides us.
pub(crate) fn left_behind() -> Vec<String> {
    let own = std::fs::metadata("/proc/self/ns/user").unwrap().ino();
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let is_here = |pid: &String| {
        let user = std::fs::metadata(format!("/proc/{pid}/ns/user"));
        pid.parse() != Ok(std::process::id()) && user.is_ok_and(|user| user.ino() == own)
    };
    pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit())).filter(is_here).collect()
}
