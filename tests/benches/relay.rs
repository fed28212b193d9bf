//! What warren costs: throughput, CPU and memory through `warren0` both ways, through the relay and directly, beside
//! the same transfer without a tunnel in the same run; idle latency; the time to the first ping; CPU and memory at 3,
//! 100 and 1000 agents. Everything shares this machine: read ratios, not single figures.
//!
//! ```sh
//! cargo bench --bench relay                                  # about three minutes
//! cargo bench --bench relay -- --quick                       # a look
//! cargo bench --bench relay -- --rounds 9 --megabytes 500 --agents 3,1000 --seconds 60
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a bench"
)]

mod figures;
#[path = "../support/mod.rs"]
mod support;

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use figures::{cpu_seconds, memory, spread};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto};
use support::{Event, LabProcess, can_isolate};

/// What is measured, and how long.
struct Plan {
    rounds: usize,
    bytes: u64,
    agents: Vec<u32>,
    idle: Duration,
    echoes: usize,
    starts: usize,
}

impl Plan {
    fn parse(arguments: &[String]) -> Self {
        let quick = arguments.iter().any(|argument| argument == "--quick");
        let mut plan = match quick {
            true => Self {
                rounds: 1,
                bytes: 20,
                agents: vec![3, 100],
                idle: Duration::from_secs(10),
                echoes: 100,
                starts: 1,
            },
            false => Self {
                rounds: 5,
                bytes: 200,
                agents: vec![3, 100, 1000],
                idle: Duration::from_secs(20),
                echoes: 1000,
                starts: 5,
            },
        };
        for pair in arguments.windows(2) {
            let value = pair[1].as_str();
            match pair[0].as_str() {
                "--rounds" => plan.rounds = value.parse().unwrap(),
                "--megabytes" => plan.bytes = value.parse().unwrap(),
                "--agents" => plan.agents = value.split(',').map(|count| count.parse().unwrap()).collect(),
                "--seconds" => plan.idle = Duration::from_secs(value.parse().unwrap()),
                _ => {}
            }
        }
        plan.bytes <<= 20;
        plan
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Called again inside of a lab's network.
    match arguments.first().map(String::as_str) {
        Some("--transfer") => return transfer_here(&arguments[1..]),
        Some("--baseline") => return baseline_here(arguments[1].parse().unwrap()),
        Some("--echo") => return echo_here(&arguments[1..]),
        _ => {}
    }
    if !can_isolate("the bench") {
        return;
    }
    let plan = Plan::parse(&arguments);
    println!("median [min-max]; the tunnel, its peers, the relay and both ends share this machine");
    transfers(&plan);
    starts(&plan);
    for agents in &plan.agents {
        idle(*agents, plan.idle);
    }
}

/// One way through the tunnel, measured several times.
#[derive(Default)]
struct Way {
    speed: Vec<f64>,
    tunnel: Vec<f64>,
    lab: Vec<f64>,
}

impl Way {
    fn print(&mut self, name: &str) {
        println!(
            "  {name:<24}{} Mbit/s; CPU s/GB: tunnel {}, agent and relay {}",
            spread(&mut self.speed, 0),
            spread(&mut self.tunnel, 2),
            spread(&mut self.lab, 2)
        );
    }
}

/// How the agent is reached: what the rows are called, the lab's argument for it, and the path as metrics name it.
const KINDS: [(&str, Option<&str>, &str); 3] = [
    ("relayed", Some("--relay-only"), "derp"),
    ("direct", None, "direct"),
    ("direct, agent singly", Some("--send-singly"), "direct"),
];

/// A lab, and what was measured through its tunnel.
struct Line {
    name: &'static str,
    path: &'static str,
    lab: LabProcess,
    echoes: Vec<f64>,
    before: [String; 2],
    down: Way,
    up: Way,
}

impl Line {
    fn start((name, argument, path): (&'static str, Option<&str>, &'static str), plan: &Plan) -> Self {
        let mut lab = LabProcess::start(&[argument.as_slice(), &["--agents", "1"]].concat());
        lab.wait(|event| event["event"] == "fetch" && event["ok"] == true);
        if path == "direct" {
            let ping = lab.warren(&["ping", &lab.agents()[0], "--until-direct", "--count", "20"]);
            assert!(ping.status.success(), "there is no direct path: {}", support::stderr(&ping));
        }
        let echoes = echo(&lab, &lab.address(), plan.echoes);
        let before = memories(&lab);
        Self { name, path, lab, echoes, before, down: Way::default(), up: Way::default() }
    }

    fn transfer(&mut self, direction: &str, bytes: u64) {
        let inner = u32::try_from(self.lab.ready["namespace_pid"].as_u64().unwrap()).unwrap();
        let (_, tunnel) = self.lab.pids();
        let begun = (cpu_seconds(tunnel), cpu_seconds(inner));
        let arguments = ["--transfer", direction, &self.lab.address(), &bytes.to_string()];
        let speed = number(again(&self.lab, &arguments));
        let way = if direction == "down" { &mut self.down } else { &mut self.up };
        way.speed.push(speed);
        way.tunnel.push((cpu_seconds(tunnel) - begun.0) / (bytes as f64 / 1e9));
        way.lab.push((cpu_seconds(inner) - begun.1) / (bytes as f64 / 1e9));
    }

    /// Fails unless everything went the way that is to be measured.
    fn check(&self, plan: &Plan) {
        let payload = plan.bytes as f64 * plan.rounds as f64;
        for family in ["warren_receive_bytes_total", "warren_transmit_bytes_total"] {
            support::eventually(&format!("{family} of what was {}", self.name), || {
                self.lab.sum(family, &[&format!("path=\"{}\"", self.path)]) >= payload
            });
            let all = self.lab.sum(family, &[]);
            let other = all - self.lab.sum(family, &[&format!("path=\"{}\"", self.path)]);
            assert!(other < all / 100.0, "{family}: {other} of {all} bytes were not {}", self.name);
        }
    }
}

/// Of the tunnel, then of the service.
fn memories(lab: &LabProcess) -> [String; 2] {
    let (service, tunnel) = lab.pids();
    [memory(tunnel), memory(service)]
}

fn transfers(plan: &Plan) {
    let mut lines = KINDS.map(|kind| Line::start(kind, plan));
    let mut none = Vec::new();
    for _ in 0..plan.rounds {
        none.push(number(again(&lines[0].lab, &["--baseline", &plan.bytes.to_string()])));
        for line in &mut lines {
            line.transfer("down", plan.bytes);
            line.transfer("up", plan.bytes);
        }
    }
    lines.iter().for_each(|line| line.check(plan));
    println!("\n{} MB a transfer, one TCP stream, {} alternating rounds", plan.bytes >> 20, plan.rounds);
    println!("  {:<24}{} Mbit/s", "no tunnel (loopback)", spread(&mut none, 0));
    for Line { name, lab, echoes, before, down, up, .. } in &mut lines {
        println!("\nthrough warren0, {name}");
        down.print("down");
        up.print("up");
        println!("  {:<24}{}", "echo (ICMPv6), idle", percentiles(echoes));
        let after = memories(lab);
        println!("  {:<24}tunnel {}; service {}", "memory before", before[0], before[1]);
        println!("  {:<24}tunnel {}; service {}", "memory after", after[0], after[1]);
    }
    lines.into_iter().for_each(|line| line.lab.end());
}

fn starts(plan: &Plan) {
    let mut first: Vec<f64> = Vec::new();
    for _ in 0..plan.starts {
        let mut lab = LabProcess::start(&["--relay-only", "--agents", "3"]);
        first.push(lab.wait(is_ping)["since_start_seconds"].as_f64().unwrap() * 1e3);
        lab.end();
    }
    println!(
        "\n  {:<24}{} ms after StartResponse, {} starts",
        "first ping reported",
        spread(&mut first, 1),
        plan.starts
    );
}

fn idle(agents: u32, span: Duration) {
    let begun = Instant::now();
    let mut lab = LabProcess::start(&["--relay-only", "--agents", &agents.to_string()]);
    let (service, tunnel) = lab.pids();
    let (ready, mut missing) = (lab.ready.at, BTreeSet::from_iter(lab.agents()));
    let mut last = ready;
    while !missing.is_empty() {
        let ping = lab.wait(is_ping);
        missing.remove(ping["agent"].as_str().unwrap());
        last = ping.at;
    }
    let until_then = (cpu_seconds(tunnel), cpu_seconds(service));
    // Handshakes of the start are over; what follows is the idle cost.
    thread::sleep(Duration::from_secs(5));
    let (tunnel_before, service_before) = (cpu_seconds(tunnel), cpu_seconds(service));
    let measured = Instant::now();
    thread::sleep(span);
    let share = |pid, before: f64| 100.0 * (cpu_seconds(pid) - before) / measured.elapsed().as_secs_f64();
    let (tunnel_share, service_share) = (share(tunnel, tunnel_before), share(service, service_before));
    let seen = lab.seen();
    let since = seen.iter().filter(|event| is_ping(event) && event.at >= measured);
    let mut latencies: Vec<f64> = since.filter_map(|ping| ping["latency_seconds"].as_f64()).collect();
    let each = latencies.len() as f64 / f64::from(agents) / span.as_secs_f64() * 5.0;
    println!(
        "\n{agents} agents, each pinged every 5 s ({each:.2} reported each in 5 s)\n  \
         all pinged {:.2} s after the tunnel was up ({:.2} s after the lab was started)",
        last.saturating_duration_since(ready).as_secs_f64(),
        last.duration_since(begun).as_secs_f64(),
    );
    println!("  pings    {}", percentiles(&mut latencies));
    for (name, share, cpu, pid) in
        [("tunnel", tunnel_share, until_then.0, tunnel), ("service", service_share, until_then.1, service)]
    {
        println!("  {name:<8} {share:.2} % of a core, {}; {cpu:.2} CPU s until all were pinged", memory(pid));
    }
    lab.end();
}

fn is_ping(event: &Event) -> bool {
    event["event"] == "ping"
}

/// Runs this program again, inside of the lab's network. Returns what it prints.
fn again(lab: &LabProcess, arguments: &[&str]) -> String {
    let program = std::env::current_exe().unwrap();
    let mut command = lab.enter(program.to_str().unwrap());
    let output = command.args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

fn number(text: String) -> f64 {
    text.trim().parse().unwrap()
}

/// Inside: one transfer from or to an agent.
fn transfer_here(arguments: &[String]) {
    let [direction, address, bytes] = arguments else { panic!("direction, address, bytes") };
    let bytes: u64 = bytes.parse().unwrap();
    let mut stream = TcpStream::connect((address.as_str(), 80)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let begun = Instant::now();
    let head = |line: String| format!("{line} HTTP/1.1\r\nHost: [{address}]\r\nConnection: close\r\n");
    if direction == "down" {
        write!(stream, "{}\r\n", head(format!("GET /bytes/{bytes}"))).unwrap();
        assert!(drain(&mut stream) >= bytes);
    } else {
        write!(stream, "{}Content-Length: {bytes}\r\n\r\n", head("POST /sink".to_owned())).unwrap();
        pour(&mut stream, bytes);
        assert!(drain(&mut stream) > 0);
    }
    println!("{}", megabits(bytes, begun.elapsed()));
}

/// Inside: the same transfer over the loopback, without a tunnel.
fn baseline_here(bytes: u64) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let begun = Instant::now();
    let sender = thread::spawn(move || pour(&mut listener.accept().unwrap().0, bytes));
    assert_eq!(drain(&mut TcpStream::connect(address).unwrap()), bytes);
    sender.join().unwrap();
    println!("{}", megabits(bytes, begun.elapsed()));
}

fn drain(stream: &mut TcpStream) -> u64 {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => return total,
            got => total += got as u64,
        }
    }
}

fn pour(stream: &mut TcpStream, bytes: u64) {
    let block = vec![0x5a; 256 << 10];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(block.len() as u64) as usize;
        stream.write_all(&block[..part]).unwrap();
        left -= part as u64;
    }
}

fn megabits(bytes: u64, took: Duration) -> f64 {
    bytes as f64 * 8.0 / 1e6 / took.as_secs_f64()
}

/// Round trips of echo requests to an agent, in seconds.
fn echo(lab: &LabProcess, address: &str, count: usize) -> Vec<f64> {
    let text = again(lab, &["--echo", address, &count.to_string()]);
    text.lines().map(|line| line.parse().unwrap()).collect()
}

/// Inside: one round trip a line, in seconds.
fn echo_here(arguments: &[String]) {
    let [address, count] = arguments else { panic!("address, count") };
    let destination = SocketAddrV6::new(address.parse::<Ipv6Addr>().unwrap(), 0, 0, 0);
    let socket = rustix::net::socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6)).unwrap();
    for sequence in 0..count.parse::<u16>().unwrap() {
        let identifier = (std::process::id() as u16).to_be_bytes();
        // The kernel fills in the checksum.
        let request = [[128, 0, 0, 0].as_slice(), &identifier, &sequence.to_be_bytes(), &[0x5a; 56]].concat();
        let begun = Instant::now();
        rustix::net::sendto(&socket, &request, SendFlags::empty(), &destination).unwrap();
        let mut buffer = [0; 2048];
        loop {
            let (got, _) = rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty()).unwrap();
            if buffer[0] == 129 && buffer[4..got] == request[4..] {
                break;
            }
        }
        println!("{}", begun.elapsed().as_secs_f64());
        thread::sleep(Duration::from_millis(10));
    }
}

fn percentiles(seconds: &mut [f64]) -> String {
    seconds.sort_by(f64::total_cmp);
    let at =
        |share: f64| seconds.get((seconds.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN) * 1e6;
    format!("p50 {:.0} us, p99 {:.0} us, {} samples", at(0.5), at(0.99), seconds.len())
}
