use std::sync::Arc;

use warren_proto::stun::TxId;

use super::*;
use crate::{
    endpoints::{Endpoints, Ports},
    home::RegionLatency,
    netcheck::{Effect, Families, Netcheck, Trigger},
    relay_map::{Node as RelayNode, Region, RelayMap},
};

const MS: Duration = Duration::from_millis(1);

/// Something that changes of us.
type Change = (&'static str, fn(&mut OwnNode));

/// tailnet-control 12.7 N1 to N4, N6: each of these is news.
const NEWS: &[Change] = &[
    ("another home", |node| node.set_home(region(2))),
    ("a relay reached by WebSocket", |node| node.set_forced_websocket(reasons("no upgrade"))),
    ("another reason for it", |node| node.set_forced_websocket(reasons("HTTP/2"))),
    ("endpoints", |node| node.set_endpoints(endpoints(&["192.0.2.1:1", "[2001:db8::1]:2"]))),
    ("endpoints in another order", |node| node.set_endpoints(endpoints(&["[2001:db8::1]:2", "192.0.2.1:1"]))),
    ("endpoints that are blocked", |node| node.set_endpoints(Vec::new())),
    ("endpoints that are allowed again", |node| node.set_endpoints(endpoints(&["192.0.2.1:1"]))),
];

/// Conforms: control:N1 control:N2 control:N6
#[test]
fn each_change_is_told_once_and_the_same_again_is_no_news() {
    let mut own = Own::at_home();
    for (what, change) in NEWS {
        change(&mut own.node);
        assert!(own.node.poll_timeout(own.now).is_some(), "{what}");
        let told = own.tell_after(PAUSE).unwrap_or_else(|| panic!("{what}"));
        assert_eq!(told.key.as_ref(), NodePublic([1; 32]).to_binary(), "{what}");
        assert_eq!(told.endpoints, own.endpoints(), "{what}");
        change(&mut own.node);
        assert_eq!(own.node.poll_timeout(own.now), None, "the same: {what}");
        assert_eq!(own.tell_after(PAUSE), None, "the same: {what}");
    }
}

/// From an answer of a STUN server to the message, through all that is between them.
///
/// Conforms: control:N3
#[test]
fn endpoints_are_told_as_they_are_seen_and_the_same_none_nonsense_or_answers_of_an_old_look_are_no_news() {
    let (mut own, mut sight) = (Own::at_home(), Sight::new());
    let mut tell = |sight: &mut Sight| {
        sight.now += 10 * PAUSE;
        own.node.set_endpoints(sight.list.list(sight.now));
        own.tell_after(10 * PAUSE).map(|node| node.endpoints)
    };
    let txid = sight.ask(Trigger::NetworkChanged);
    sight.answer(txid, "198.51.100.9:1111");
    assert_eq!(tell(&mut sight), Some(vec!["198.51.100.9:1111".to_owned()]));

    let txid = sight.ask(Trigger::Refresh);
    sight.answer(txid, "198.51.100.9:1111");
    assert_eq!(tell(&mut sight), None, "the same");

    let txid = sight.ask(Trigger::Refresh);
    sight.answer(txid, "0.0.0.0:7");
    assert_eq!(tell(&mut sight), None, "nonsense");

    sight.ask(Trigger::Refresh);
    assert_eq!(tell(&mut sight), None, "nobody answered");

    let old = sight.ask(Trigger::Refresh);
    let txid = sight.ask(Trigger::NetworkChanged);
    sight.answer(old, "198.51.100.9:2222");
    assert_eq!(tell(&mut sight), None, "an answer of before");
    sight.answer(txid, "198.51.100.9:3333");
    let told = tell(&mut sight).unwrap();
    assert_eq!(told[0], "198.51.100.9:3333", "what is new is told");
}

/// Conforms: control:N7
#[test]
fn nothing_is_told_before_a_home_is_known() {
    let mut own = Own::connected();
    NEWS[1..].iter().for_each(|(_, change)| change(&mut own.node));
    assert_eq!(own.node.poll_timeout(own.now), None);
    assert_eq!(own.tell_after(PAUSE), None);
    own.node.set_home(region(1));
    assert_eq!(own.node.poll_timeout(own.now), Some(own.now), "the first message waits for nothing");
    assert_eq!(own.tell_after(Duration::ZERO).map(|node| node.preferred_derp), Some(1));
}

#[test]
fn a_home_that_is_lost_is_not_told_and_one_that_comes_back_is_no_news() {
    let mut own = Own::at_home();
    own.node.set_home(None);
    assert_eq!(own.tell_after(PAUSE), None);
    own.node.set_home(region(1));
    assert_eq!(own.tell_after(PAUSE), None);
}

/// Conforms: control:N5
#[test]
fn each_stream_is_told_once_whatever_the_one_before_was_told() {
    let mut own = Own::at_home();
    assert_eq!(own.tell_after(PAUSE), None);
    own.node.disconnected();
    own.node.set_home(region(2));
    assert_eq!(own.node.poll_timeout(own.now), None);
    assert_eq!(own.tell_after(PAUSE), None, "there is nobody to tell it to");
    own.node.connected();
    assert_eq!(own.tell_after(Duration::ZERO).map(|node| node.preferred_derp), Some(2));
    own.node.connected();
    assert_eq!(own.tell_after(Duration::ZERO).map(|node| node.preferred_derp), Some(2));
    assert_eq!(own.tell_after(PAUSE), None);
}

/// Changes while a message is on its way, or just after one, are gathered into one further message.
///
/// Conforms: control:N1
#[test]
fn changes_within_a_second_are_gathered_into_one_message() {
    let mut own = Own::at_home();
    for number in 2..9 {
        own.node.set_home(region(number));
        assert_eq!(own.tell_after(100 * MS), None);
    }
    assert_eq!(own.node.poll_timeout(own.now), Some(own.now + 300 * MS));
    assert_eq!(own.tell_after(299 * MS), None);
    assert_eq!(own.tell_after(MS).map(|node| node.preferred_derp), Some(8));
    assert_eq!(own.tell_after(PAUSE), None);
}

#[test]
fn a_change_that_is_taken_back_in_time_is_not_told() {
    let mut own = Own::at_home();
    own.node.set_home(region(2));
    own.node.set_home(region(1));
    assert_eq!(own.tell_after(PAUSE), None);
}

#[test]
fn latencies_ride_along_and_cause_nothing() {
    let mut own = Own::at_home();
    let latency = RegionLatency { v4: Some(25 * MS), v6: Some(1500 * MS) };
    let only_v6 = RegionLatency { v4: None, v6: Some(MS) };
    let none = RegionLatency::default();
    own.node.set_latencies([(RegionId(1), latency), (RegionId(999), only_v6), (RegionId(7), none)].into());
    assert_eq!(own.tell_after(PAUSE), None);
    own.node.set_home(region(2));
    let told = own.tell_after(PAUSE).unwrap().derp_latency;
    let expected = [("1-v4", 0.025), ("1-v6", 1.5), ("999-v6", 0.001)];
    assert_eq!(told, expected.map(|(key, seconds)| (key.to_owned(), seconds)).into());
}

/// Our address is one for the life of a start.
///
/// Conforms: control:N4
#[test]
fn a_message_holds_all_that_is_known_of_us_and_nothing_but_our_node() {
    let mut own = Own::connected();
    own.node.set_home(region(999));
    own.node.set_forced_websocket(reasons("no upgrade"));
    own.node.set_endpoints(endpoints(&["192.0.2.1:41641", "[2001:db8::1]:41641"]));
    let wall = SystemTime::UNIX_EPOCH + Duration::new(1_704_629_594, 123_456_789);
    let request = own.node.poll_update(own.now, wall).unwrap();
    let address = vec!["fd60:627a:a42b:1111:2222::5/128".to_owned()];
    let node = Node {
        id: 5,
        as_of: Some(prost_types::Timestamp { seconds: 1_704_629_594, nanos: 123_456_000 }),
        key: [b"np".as_slice(), &[1; 32]].concat().into(),
        disco: format!("discokey:{}", "02".repeat(32)),
        preferred_derp: 999,
        derp_latency: BTreeMap::new(),
        derp_forced_websocket: [(1, "no upgrade".to_owned())].into(),
        addresses: address.clone(),
        allowed_ips: address,
        endpoints: vec!["192.0.2.1:41641".to_owned(), "[2001:db8::1]:41641".to_owned()],
    };
    let update_self = Some(UpdateSelf { node: Some(node) });
    assert_eq!(request, CoordinateRequest { update_self, ..CoordinateRequest::default() });
}

#[test]
fn a_clock_before_1970_is_told_as_1970() {
    let mut own = Own::connected();
    own.node.set_home(region(1));
    let request = own.node.poll_update(own.now, SystemTime::UNIX_EPOCH - PAUSE).unwrap();
    assert_eq!(request.update_self.unwrap().node.unwrap().as_of, Some(prost_types::Timestamp::default()));
}

struct Own {
    node: OwnNode,
    now: Instant,
}

impl Own {
    fn connected() -> Self {
        let mut node = OwnNode::new(OwnIdentity {
            node_id: 5,
            node_key: NodePublic([1; 32]),
            disco_key: DiscoPublic([2; 32]),
            address: "fd60:627a:a42b:1111:2222::5".parse().unwrap(),
        });
        node.connected();
        Self { node, now: Instant::now() }
    }

    /// In region 1, and that was told.
    fn at_home() -> Self {
        let mut own = Self::connected();
        own.node.set_home(region(1));
        assert!(own.tell_after(Duration::ZERO).is_some());
        own
    }

    fn endpoints(&self) -> Vec<String> {
        self.node.news.endpoints.iter().map(ToString::to_string).collect()
    }

    fn tell_after(&mut self, span: Duration) -> Option<Node> {
        self.now += span;
        let request = self.node.poll_update(self.now, SystemTime::now())?;
        Some(request.update_self.and_then(|update| update.node).expect("a message always has a node"))
    }
}

/// What looks at how the world sees us, with one server to ask, and what is made of it.
struct Sight {
    look: Netcheck,
    list: Endpoints,
    now: Instant,
    random: u8,
}

impl Sight {
    const SERVER: &str = "192.0.2.1";

    fn new() -> Self {
        let (mut look, mut list, now) = (Netcheck::new(), Endpoints::new(), Instant::now());
        list.set_ports(Ports { v4: Some(41641), v6: None });
        let node = RelayNode {
            host_name: Self::SERVER.to_owned(),
            stun_port: Some(3478),
            stun_only: true,
            ..RelayNode::default()
        };
        let (id, text) = (RegionId(1), String::new());
        let region =
            Region { id, code: text.clone(), name: text, embedded: false, avoid: false, nodes: vec![node] };
        look.set_families(now, Families { v4: true, v6: false });
        look.set_map(now, Arc::new(RelayMap { regions: [(id, region)].into(), scores: BTreeMap::new() }));
        Self { look, list, now, random: 0 }
    }

    /// Begins a look. Returns its first question.
    fn ask(&mut self, trigger: Trigger) -> TxId {
        self.look.handle_trigger(self.now, trigger);
        self.work().expect("a question")
    }

    fn answer(&mut self, txid: TxId, mapped: &str) {
        let from = format!("{}:3478", Self::SERVER).parse().unwrap();
        self.look.handle_stun_answer(from, &txid, mapped.parse().unwrap());
        self.work();
    }

    /// Does what is due, and takes what was seen. Returns the first question.
    fn work(&mut self) -> Option<TxId> {
        let (mut asked, random) = (None, &mut self.random);
        self.look.handle_timeout(self.now, |bytes| {
            *random = random.wrapping_add(1);
            bytes.fill(*random);
        });
        while let Some(effect) = self.look.poll_effect() {
            match effect {
                Effect::SendStun { txid, .. } => asked = asked.or(Some(txid)),
                Effect::Mapped(mappings) => self.list.handle_mappings(self.now, &mappings),
                Effect::Finished(report) => self.list.handle_mappings(self.now, &report.mappings),
                Effect::MeasureLatencies { .. } => {}
            }
        }
        asked
    }
}

fn region(number: u16) -> Option<RegionId> {
    Some(RegionId(number))
}

fn reasons(text: &str) -> BTreeMap<RegionId, String> {
    [(RegionId(1), text.to_owned())].into()
}

fn endpoints(texts: &[&str]) -> Vec<SocketAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}
