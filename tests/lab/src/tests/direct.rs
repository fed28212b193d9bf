//! Agents that talk directly, two of the lab with each other, and what goes wrong on demand.

use std::{fs::OpenOptions, io::Write, net::SocketAddr};

use super::*;

/// Two agents that know each other, and their lab.
struct Two {
    lab: Lab,
    asking: AgentInfo,
    asked: AgentInfo,
}

impl Two {
    async fn start(options: LabOptions) -> Self {
        let lab = Lab::start(LabOptions { agents: 2, direct: true, ..options }).await.unwrap();
        let [asking, asked] = <[AgentInfo; 2]>::try_from(lab.agents()).unwrap();
        let two = Self { lab, asking, asked };
        for id in [two.asking.id, two.asked.id] {
            assert!(two.lab.wait_for_agent(id, LIMIT, |stats| stats.relay_logins > 0).await);
        }
        two
    }

    /// Lets the two meet once they have said where they are.
    async fn meet(&self) {
        self.lab.introduce(self.asking.id, self.asked.id);
        for id in [self.asking.id, self.asked.id] {
            assert!(self.lab.wait_for_path(id, LIMIT, |path| path.only().is_some()).await);
        }
    }

    async fn know_endpoints(&self) {
        for id in [self.asking.id, self.asked.id] {
            let is_told = || !self.told(id).is_empty();
            let waiting = async {
                while !is_told() {
                    tokio::time::sleep(LOOK).await;
                }
            };
            timeout(LIMIT, waiting).await.unwrap();
        }
    }

    /// The endpoints that the coordinator tells of an agent.
    fn told(&self, id: Uuid) -> Vec<SocketAddr> {
        let node = self.lab.control().node(id).unwrap_or_default();
        node.endpoints.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// Met and on the direct path, both ways.
    async fn direct(options: LabOptions) -> Self {
        let two = Self::start(options).await;
        two.know_endpoints().await;
        two.meet().await;
        two.until_direct().await;
        two
    }

    async fn until_direct(&self) {
        let both = async {
            while !self.is_direct(self.asking.id) || !self.is_direct(self.asked.id) {
                self.echo().await;
            }
        };
        timeout(LIMIT, both).await.unwrap();
    }

    fn is_direct(&self, id: Uuid) -> bool {
        self.path(id).last_sent == Some(Taken::Udp)
    }

    fn path(&self, id: Uuid) -> PeerPath {
        *self.lab.agent_path(id).only().unwrap()
    }

    fn replies(&self) -> u64 {
        self.lab.agent_stats(self.asking.id).echo_replies
    }

    /// Asks until there is an answer.
    async fn echo(&self) {
        const PATIENCE: Duration = Duration::from_millis(250);
        let before = self.replies();
        let is_there = |stats: &AgentStats| stats.echo_replies > before;
        let asking = async {
            self.ask();
            while !self.lab.wait_for_agent(self.asking.id, PATIENCE, is_there).await {
                self.ask();
            }
        };
        timeout(LIMIT, asking).await.unwrap();
    }

    fn ask(&self) {
        assert!(self.lab.send_echo(self.asking.id, self.asked.address));
    }

    /// Asks until the faults of `id` have dropped some datagrams more.
    async fn ask_until_dropped(&self, id: Uuid) {
        let before = self.lab.agent_path(id).dropped;
        let asking = async {
            while self.lab.agent_path(id).dropped < before + 5 {
                self.ask();
                tokio::time::sleep(LOOK).await;
            }
        };
        timeout(LIMIT, asking).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_that_meet_are_direct_at_once_and_their_first_packets_were_relayed() {
    let two = Two::start(LabOptions::default()).await;
    two.know_endpoints().await;
    two.meet().await;
    let began = std::time::Instant::now();
    two.until_direct().await;
    // The issue asks for less than a second; a loaded machine gets more.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    for (id, other) in [(two.asking.id, two.asked.id), (two.asked.id, two.asking.id)] {
        let path = two.path(id);
        assert!(path.sent.udp > 0 && path.received.udp > 0, "{path:?}");
        assert!(path.sent.relay > 0 && path.received.relay > 0, "{path:?}");
        let best = path.best.unwrap();
        assert!(best.is_trusted && two.told(other).contains(&best.address));
        assert!(path.probes_sent.pings > 0 && path.probes_received.pongs > 0, "{path:?}");
    }
    assert!(two.path(two.asking.id).probes_sent.calls > 0, "the first ping came with a call");
    let relayed = two.path(two.asking.id).sent.relay;
    two.echo().await;
    assert_eq!(two.path(two.asking.id).sent.relay, relayed, "nothing is doubled any more");
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_tell_where_they_are_and_the_relay_map_names_who_told_them() {
    let two = Two::start(LabOptions::default()).await;
    two.know_endpoints().await;
    let map = two.lab.control().relay_map();
    assert!(map.regions.values().flat_map(|region| &region.nodes).any(|node| node.stun_port > 0));
    let told = two.told(two.asking.id);
    assert!(told.len() == 1 && told[0].ip().is_loopback(), "{told:?}");
    assert_eq!(two.lab.agent_path(two.asking.id).endpoints, told);
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ipv6_endpoints_are_told_with_the_port_of_ipv4_as_the_reference_does() {
    if std::net::UdpSocket::bind("[::1]:0").is_err() {
        // Past the harness's capture.
        let err = OpenOptions::new().append(true).open("/dev/stderr");
        let skipped = "\nSKIPPED ipv6_endpoints_are_told_with_the_port_of_ipv4: this machine has no IPv6";
        let _ = err.and_then(|mut err| writeln!(err, "{skipped}"));
        return;
    }
    let both = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let two = Two::start(LabOptions { direct_addresses: both, ..LabOptions::default() }).await;
    two.know_endpoints().await;
    let told = two.told(two.asking.id);
    assert!(told.len() == 2 && told[0].port() == told[1].port() && told[1].is_ipv6(), "{told:?}");
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_leave_agents_have_no_sockets_and_say_nothing_of_them() {
    let lab = Lab::start(LabOptions { agents: 1, ..LabOptions::default() }).await.unwrap();
    let id = lab.agents()[0].id;
    assert!(lab.wait_for_agent(id, LIMIT, |stats| stats.relay_logins > 0).await);
    assert_eq!(lab.agent_path(id), AgentPath::default());
    assert!(lab.control().relay_map().regions[&EMBEDDED_REGION].nodes[0].stun_port == -1);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_direct_connections_are_disabled_agents_stay_relayed() {
    let two = Two::start(LabOptions { disable_direct: true, ..LabOptions::default() }).await;
    two.meet().await;
    for _ in 0..3 {
        two.echo().await;
    }
    let path = two.path(two.asking.id);
    assert_eq!((path.sent.udp, path.received.udp, path.best), (0, 0, None));
    assert!(two.told(two.asking.id).is_empty());
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_path_swallows_datagrams_of_its_direction_until_it_is_healed() {
    let two = Two::direct(LabOptions::default()).await;
    for (received, sent) in [(true, false), (false, true), (true, true)] {
        let cut = Cut { sent, received };
        two.lab.cut_udp(two.asked.id, cut);
        let arrived = || (two.path(two.asked.id).received.udp, two.path(two.asking.id).received.udp);
        let before = arrived();
        two.ask_until_dropped(two.asked.id).await;
        let after = arrived();
        assert_eq!(before.0 == after.0, cut.received, "to the one that is cut: {cut:?}");
        assert_eq!(before.1, after.1, "nothing is answered: {cut:?}");
        two.lab.heal_udp(two.asked.id);
        two.until_direct().await;
    }
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_packets_are_relayed_if_udp_never_works() {
    let two = Two::start(LabOptions::default()).await;
    two.know_endpoints().await;
    two.lab.cut_udp(two.asked.id, Cut::BOTH);
    two.meet().await;
    for _ in 0..3 {
        two.echo().await;
    }
    let path = two.path(two.asking.id);
    assert_eq!((path.last_sent, path.sent.udp, path.best), (Some(Taken::Relay), 0, None));
    assert!(path.probes_sent.pings > 0);
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lossy_path_carries_some_datagrams() {
    let two = Two::direct(LabOptions::default()).await;
    two.lab.lose_udp(two.asking.id, 40, 7);
    let received = two.path(two.asking.id).received.udp;
    two.ask_until_dropped(two.asking.id).await;
    let is_more = |path: &AgentPath| path.only().is_some_and(|path| path.received.udp > received);
    let some_arrive = async {
        while !two.lab.wait_for_path(two.asking.id, LOOK, is_more).await {
            two.ask();
        }
    };
    timeout(LIMIT, some_arrive).await.unwrap();
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delayed_datagrams_make_a_round_trip_longer() {
    let two = Two::direct(LabOptions::default()).await;
    two.lab.delay_udp(two.asked.id, Duration::from_millis(80));
    let before = std::time::Instant::now();
    two.echo().await;
    assert!(before.elapsed() >= Duration::from_millis(80), "{:?}", before.elapsed());
    assert!(two.is_direct(two.asking.id));
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocked_agent_is_relayed_at_once_and_direct_again_when_it_is_allowed() {
    let two = Two::direct(LabOptions::default()).await;
    two.lab.set_direct(two.asked.id, Direct::Blocked);
    let is_silent = |path: &AgentPath| path.endpoints.is_empty();
    assert!(two.lab.wait_for_path(two.asked.id, LIMIT, is_silent).await);
    assert_eq!(two.path(two.asked.id).best, None);
    let is_told = async {
        while !two.told(two.asked.id).is_empty() {
            tokio::time::sleep(LOOK).await;
        }
    };
    timeout(LIMIT, is_told).await.unwrap();
    // The other's candidate goes with the node message, and with it the path.
    let is_left = |path: &AgentPath| path.only().is_some_and(|path| path.best.is_none());
    let is_relayed = async {
        while !two.lab.wait_for_path(two.asking.id, LOOK, is_left).await {}
        two.echo().await;
    };
    timeout(LIMIT, is_relayed).await.unwrap();
    assert_eq!(two.path(two.asking.id).last_sent, Some(Taken::Relay));
    assert_eq!(two.path(two.asked.id).last_sent, Some(Taken::Relay));
    two.lab.set_direct(two.asked.id, Direct::Allowed);
    two.know_endpoints().await;
    two.until_direct().await;
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_sockets_are_told_to_peers_and_wireguard_from_them_is_dropped_before_a_ping() {
    let two = Two::direct(LabOptions::default()).await;
    let before = two.told(two.asking.id);
    two.lab.rebind_udp(two.asking.id);
    let is_other = async {
        while two.told(two.asking.id) == before || two.told(two.asking.id).is_empty() {
            tokio::time::sleep(LOOK).await;
        }
    };
    timeout(LIMIT, is_other).await.unwrap();
    // Trust is gone: packets go both ways, and the other does not know the new source of the direct ones.
    two.ask();
    assert_eq!(two.path(two.asking.id).last_sent, Some(Taken::Both));
    assert!(two.lab.wait_for_path(two.asked.id, LIMIT, |path| path.unknown > 0).await);
    // A ping of the next heartbeat makes it known. The other may keep its dead best, and send both ways.
    let is_back = async {
        while !two.is_direct(two.asking.id) {
            two.echo().await;
        }
    };
    timeout(LIMIT, is_back).await.unwrap();
    two.lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ping_for_a_person_is_answered_by_the_direct_path_and_a_dead_relay_stops_no_packet() {
    let two = Two::direct(LabOptions::default()).await;
    assert!(two.lab.user_ping(two.asking.id, two.asked.address));
    assert!(two.lab.wait_for_agent(two.asking.id, LIMIT, |stats| stats.user_pongs == 1).await);
    assert_eq!(two.path(two.asking.id).probes_sent.relayed_pings, 0);
    two.lab.relay().stall(true);
    two.echo().await;
    two.lab.stop().await;
}
