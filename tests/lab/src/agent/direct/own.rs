//! An agent's own endpoints: what STUN servers say, then the addresses of its sockets (8.1, 9).

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_proto::{key::random, stun};

use super::{TxId, jittered};

/// A run takes no longer; what is answered by then counts.
const LIMIT: Duration = Duration::from_secs(2);
/// The least pause between runs; the longest is 26 s.
const PERIOD: Duration = Duration::from_secs(20);
/// Without a packet for so long there are no periodic runs.
pub(super) const ACTIVE: Duration = Duration::from_secs(45);
/// What a STUN server said is told for so long although it is not said again.
const REMEMBERED: Duration = Duration::from_secs(310);
/// Questions to a server in one run, all at once.
const TRIES: usize = 3;

/// Asks, and keeps what was said.
pub(super) struct Collector {
    servers: Vec<SocketAddr>,
    is_wanted: bool,
    run: Option<Run>,
    /// As last said, by family.
    mapped: BTreeMap<Family, (SocketAddr, Instant)>,
    next: Option<Instant>,
}

struct Run {
    /// Servers by the questions that are out.
    asked: BTreeMap<TxId, SocketAddr>,
    until: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    V4,
    V6,
}

fn family(of: &SocketAddr) -> Family {
    if of.is_ipv4() { Family::V4 } else { Family::V6 }
}

impl Collector {
    pub(super) fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers, is_wanted: false, run: None, mapped: BTreeMap::new(), next: None }
    }

    /// Asks for a run; during one, for another after it.
    pub(super) fn want(&mut self) {
        self.is_wanted = true;
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted && self.run.is_none()
    }

    /// Forgets what was said about other sockets.
    pub(super) fn forget(&mut self) {
        self.run = None;
        self.mapped.clear();
    }

    /// Begins a run if one is due. Returns what is to be asked.
    pub(super) fn questions(
        &mut self,
        now: Instant,
        can_ask: impl Fn(&SocketAddr) -> bool,
    ) -> Vec<(SocketAddr, Vec<u8>)> {
        let is_periodic = self.next.is_some_and(|next| next <= now);
        if self.run.is_some() || !(self.is_wanted || is_periodic) {
            return Vec::new();
        }
        (self.is_wanted, self.next) = (false, None);
        let servers = self.servers.iter().filter(|server| can_ask(server));
        let asked: BTreeMap<TxId, SocketAddr> =
            servers.flat_map(|server| [*server; TRIES]).map(|server| (random(), server)).collect();
        let questions = asked.iter().map(|(txid, server)| (*server, stun::request(txid))).collect();
        self.run = Some(Run { asked, until: now + LIMIT });
        questions
    }

    /// Takes an answer. The first of a server is enough.
    pub(super) fn handle_answer(&mut self, now: Instant, packet: &[u8]) {
        let (Some(run), Ok(answer)) = (&mut self.run, stun::Response::decode(packet)) else { return };
        let stun::Response { txid, address } = answer;
        if let Some(server) = run.asked.remove(&txid) {
            run.asked.retain(|_, other| *other != server);
            self.mapped.insert(family(&address), (address, now));
        }
    }

    /// What a run led to, once it is over.
    pub(super) fn collected(
        &mut self,
        now: Instant,
        is_active: bool,
        locals: &[SocketAddr],
    ) -> Option<Vec<SocketAddr>> {
        self.run.take_if(|run| run.asked.is_empty() || run.until <= now)?;
        self.next = is_active.then(|| now + jittered(PERIOD));
        self.mapped.retain(|_, (_, said)| now.duration_since(*said) < REMEMBERED);
        let mut all: Vec<SocketAddr> = self.mapped.values().map(|(address, _)| *address).collect();
        // Local addresses are told with the port of the IPv4 socket, all of them (7.11).
        let mut locals: Vec<SocketAddr> =
            locals.iter().copied().filter(|local| !local.ip().is_unspecified()).collect();
        locals.sort();
        let port = locals.first().map(SocketAddr::port);
        for mut local in locals {
            local.set_port(port.unwrap_or_default());
            if !all.contains(&local) {
                all.push(local);
            }
        }
        Some(all)
    }

    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        match &self.run {
            Some(run) => Some(run.until),
            None if self.is_wanted => Some(now),
            None => self.next,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(txid: TxId, address: &str) -> Vec<u8> {
        stun::Response { txid, address: self::address(address) }.encode()
    }

    const SERVER: &str = "192.0.2.1:3478";

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn locals() -> Vec<SocketAddr> {
        vec![address("[2001:db8::1]:6000"), address("10.0.0.1:4000"), address("0.0.0.0:1")]
    }

    #[test]
    fn what_stun_says_comes_first_then_local_addresses_with_the_port_of_ipv4() {
        let (mut own, now) = (Collector::new(vec![address(SERVER), address("[::1]:1")]), Instant::now());
        own.want();
        let questions = own.questions(now, SocketAddr::is_ipv4);
        assert_eq!(questions.len(), TRIES);
        assert_eq!(own.collected(now, false, &locals()), None);
        let txid = stun::read_request(&questions[0].1).unwrap();
        own.handle_answer(now, &answer([9; 12], "203.0.113.9:9"));
        own.handle_answer(now, &answer(txid, "203.0.113.1:5"));
        let told = ["203.0.113.1:5", "10.0.0.1:4000", "[2001:db8::1]:4000"].map(address);
        assert_eq!(own.collected(now, false, &locals()), Some(told.to_vec()));
        assert_eq!(own.due(now), None, "an idle agent asks no more");
    }

    #[test]
    fn silent_servers_end_a_run_after_two_seconds_and_what_they_said_is_remembered_for_a_while() {
        let (mut own, start) = (Collector::new(vec![address(SERVER)]), Instant::now());
        own.want();
        let txid = stun::read_request(&own.questions(start, |_| true)[0].1).unwrap();
        own.handle_answer(start, &answer(txid, "203.0.113.1:5"));
        assert_eq!(own.collected(start, true, &[]), Some(vec![address("203.0.113.1:5")]));
        let next = own.due(start).unwrap().duration_since(start);
        assert!((20.0..=26.0).contains(&next.as_secs_f64()));
        for (after, told) in [(300, vec![address("203.0.113.1:5")]), (320, vec![])] {
            let now = start + Duration::from_secs(after);
            assert_eq!(own.questions(now, |_| true).len(), TRIES);
            own.want();
            assert_eq!(own.collected(now + LIMIT / 2, true, &[]), None);
            assert_eq!(own.collected(now + LIMIT, true, &[]), Some(told));
        }
    }
}
