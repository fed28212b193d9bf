//! What a plain manager and the reference tunnel said to each other, byte by byte, said again to our tunnel
//! process: everything the manager wrote is written as it was, and every step of the reference has a verdict
//! in the table below. A step that is not in the table fails the test.
//!
//! What a run cannot repeat is put in its place: a deployment's URL and token, the number of a descriptor, and
//! the number of the request that a response answers. Log lines are left out here as they were in the
//! recordings.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::{collections::BTreeSet, os::unix::net::UnixDatagram, path::Path, sync::Arc};

use hyper::StatusCode;
use serde_json::Value;
use support::{
    LIMIT,
    tunnel::{DESCRIPTOR, Handed, Tunnel, lines, start},
};
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};
use warren_lab::{Endpoint, HttpFault, Lab, LabOptions, Times};
use warren_proto::{
    frame::{self, Decoder, MAX_FRAME, PREFIX},
    vpn::{
        ManagerMessage, PeerUpdate, Rpc, StopResponse, TunnelMessage, WakeRequest, WakeResponse,
        manager_message::Msg as Order, tunnel_message::Msg,
    },
};

use Setting::{Alone, Deployment, Device, Elsewhere};
use Step::{Better, Same, Told};
use Then::{Beside, Fits, Nothing, Open, Refused, Started, Stopped};

/// One transcript, and what our tunnel does at each step of the reference, its line included.
struct Row {
    name: &'static str,
    setting: Setting,
    steps: &'static [Step],
    /// What ours says where nothing more is recorded, because the reference stood still; in whichever order.
    beyond: &'static [fn(&TunnelMessage) -> bool],
    /// Exit status, if the process ends.
    exit: Option<i32>,
}

impl Row {
    const fn new(name: &'static str, setting: Setting, steps: &'static [Step]) -> Self {
        Self { name, setting, steps, beyond: &[], exit: None }
    }

    const fn ends(self, status: i32) -> Self {
        Self { exit: Some(status), ..self }
    }

    const fn beyond(self, beyond: &'static [fn(&TunnelMessage) -> bool]) -> Self {
        Self { beyond, ..self }
    }
}

/// What a transcript needs around the tunnel.
#[derive(Clone, Copy)]
enum Setting {
    /// Nothing.
    Alone,
    /// A deployment with one agent, after this has been done to it.
    Deployment(fn(&Lab)),
    /// A deployment, and a device that the manager owns. Where the recorded tunnel asked for its network of its
    /// own accord, ours is started first, by a request with the id [`PREFACE`].
    Device,
    /// What cannot be had from outside of a process, and what proves it instead.
    Elsewhere(&'static str),
}

/// What our tunnel does where the reference did something.
#[derive(Clone, Copy)]
enum Step {
    /// The same, byte for byte.
    Same,
    /// After this was done to the deployment, it tells of peers like these.
    Told(fn(&Lab), fn(&PeerUpdate) -> bool),
    /// Something better: the row of vpn-protocol 15 that asks for it, or the reason, and what it is.
    Better(&'static str, Then),
}

#[derive(Clone, Copy)]
enum Then {
    /// Nothing.
    Nothing,
    /// A start that succeeds.
    Started,
    /// A start that is refused in words that begin so and hold these.
    Refused(&'static str, &'static [&'static str]),
    /// A message like this.
    Fits(fn(&TunnelMessage) -> bool),
    /// The same, and a message like this before or behind it.
    Beside(fn(&TunnelMessage) -> bool),
    /// No end: it still answers.
    Open,
    /// What is still to be said, last of all the answer to a stop, and the end.
    Stopped,
    /// The end.
    End,
}

/// The id of a start that is not in the transcript.
const PREFACE: u64 = 100;
/// The id of a wake that asks whether the tunnel still answers.
const PROBE: u64 = 4242;

/// Where nobody listens.
const NOBODY: &str = "http://127.0.0.1:1";

const HELLO: Step = Same;
const CONNECTING: &str = "failed to start connection: ";
const UNCHANGED: fn(&Lab) = |_| {};

/// Reasons that the reference's libraries give.
const OWN_WORDS: &str = "the reason is in our own libraries' words";
/// A second attempt in the same process.
const AGAIN: &str = "18, 38: the failed start left nothing behind, so that the next fails for its own reason";
const TOLD: &str = "27: a refusal is told to whoever asked, and is no success";
const ACKNOWLEDGED: &str = "27: a start is a success when the manager has agreed to its settings";
const ONE_REQUEST: &str = "13: one request says all, and is not repeated while nothing changes";
const ABANDONED: &str = "34: what nobody answered is abandoned";

const HEADER: &[Row] = &[
    row("254 bytes before LF", &[HELLO, Better("the recorder killed the process", Open)]),
    row("255 bytes before LF", &[HELLO, Better("the recorder killed the process", Open)]),
    row("256 bytes before LF", &[HELLO, Same]).ends(1),
    row("257 bytes before LF", &[HELLO, Same]).ends(1),
    row("256 bytes, no LF", &[HELLO, Same]).ends(1),
    row("255 bytes, no LF, pipe kept open", &[HELLO]),
    row("768 bytes, no LF", &[HELLO, Same]).ends(1),
    row("one byte every 100 ms", &[HELLO, Same, Better("the recorder killed the process", Open)]),
    row("half a line, 8 s silence, then EOF", &[HELLO, Same]).ends(1),
    row("EOF before any byte", &[HELLO, Same]).ends(1),
    row(
        "line and two frames in one write, before the tunnel has written anything",
        &[HELLO, Same, Same, Same],
    )
    .ends(0),
];

const FRAMES: &[Row] = &[
    row("zero-length frame", &[HELLO, Same]),
    row("ten zero bytes", &[HELLO, Same]).ends(76),
    row("length 0x1000001, no body", &[HELLO, Same]).ends(76),
    row("length 0xffffffff", &[HELLO, Same]).ends(76),
    row(
        "exactly 16 777 216 bytes (wake with padding in an unknown field)",
        &[
            HELLO,
            Better("no manager has so much to say: the limit of what it may is 1 MiB", Then::End),
            Better("the connection is over", Nothing),
        ],
    )
    .ends(76),
    row("EOF inside the length", &[HELLO, Same]).ends(69),
    row("EOF inside the payload", &[HELLO, Same]).ends(69),
    row("EOF between frames", &[HELLO, Same]).ends(69),
    row("one byte at a time", &[HELLO, Same]),
    row("three frames in one write", &[HELLO, Same, Same, Same]),
];

const UNANSWERED: Step = Better("9: an answer without a body is fatal to some managers", Nothing);

const RPC: &[Row] = &[
    row("request without rpc", &[HELLO, Same]),
    row("request with rpc present and both ids 0", &[HELLO, Same]),
    row("stop without msg_id", &[HELLO, Same]),
    row("request with msg_id 5 and an empty oneof", &[HELLO, UNANSWERED, Same]),
    row("request with msg_id 5 and an unknown oneof member (field 999)", &[HELLO, UNANSWERED, Same]),
    row("response to an id never issued", &[HELLO, Same]),
    row("both ids set", &[HELLO, Same]),
    row("both ids set, stop", &[HELLO, Same]),
    row("msg_id 2^64-1", &[HELLO, Same]),
    row("the same msg_id twice", &[HELLO, Same, Same]),
    row("ids not ascending", &[HELLO, Same, Same]),
    row("network_settings as a request", &[HELLO, UNANSWERED, Same]),
    row("two oneof members: wake then stop (last wins)", &[HELLO, Same, Same]).ends(0),
    row("fields in reverse order", &[HELLO, Same]),
    row("rpc given twice (merged, last id wins)", &[HELLO, Same]),
    row("non-minimal varint for msg_id", &[HELLO, Same]),
    row("truncated submessage content (undecodable)", &[HELLO, Same]).ends(76),
    row("unknown field inside wake", &[HELLO, Same, Same]),
    row("invalid UTF-8 in coder_url", &[HELLO, Same]).ends(76),
    row("wake at negotiated 1.0", &[HELLO, Same]),
    row("wake at negotiated 1.1", &[HELLO, Same]),
    row("wake at negotiated 1.2", &[HELLO, Same]),
];

const fn misparsed(beginning: &'static str) -> Step {
    Better(OWN_WORDS, Refused(beginning, &[]))
}

const START: &[Row] = &[
    row(
        "start requests refused before any resource is created",
        &[
            HELLO,
            Same,
            Same,
            Same,
            Same,
            misparsed("parse url \"http://[::1\": parse \"http://[::1\": "),
            misparsed("parse url \"http://a b/\": parse \"http://a b/\": "),
            misparsed("parse url \"%zz\": parse \"%zz\": "),
            misparsed("parse url \"http://x:abc\": parse \"http://x:abc\": "),
            misparsed("parse url \"\\u{7f}\": parse \"\\u{7f}\": invalid control character in URL"),
            misparsed("parse url \"http://ü\\n\": parse \"http://ü\\n\": invalid control character in URL"),
            Same,
            Same,
            Same,
            Same,
        ],
    )
    .ends(0),
    in_deployment(
        "GetPeerUpdate after a failed Start crashes the process",
        |lab| answers(lab, Endpoint::UsersMe, 500, "boom"),
        &[
            HELLO,
            Better("the step and the deployment are named", Refused(CONNECTING, &["boom"])),
            Better("2: always answered", Fits(is_empty_answer)),
        ],
    ),
    Row::new(
        "networking stack fails",
        Elsewhere("tunnel: a_device_that_is_not_open_fails_the_start_before_any_contact_with_the_network"),
        &[HELLO, Same],
    ),
    row(
        "GetPeerUpdate before Start crashes the process",
        &[HELLO, Better("2: always answered", Fits(is_empty_answer))],
    ),
    Row::new(
        "Start, a second Start, Stop (stub network stack)",
        Deployment(UNCHANGED),
        &[
            HELLO,
            Same,
            Better("3: a second start is refused", Refused("tunnel is already running", &[])),
            Same,
            Same,
        ],
    )
    .ends(0),
    Row::new(
        "Stop when closing the connection fails",
        Elsewhere("session: a_net_that_does_not_end_delays_a_stop_by_its_limit_only"),
        &[HELLO, Same, Same, Same],
    ),
    in_deployment(
        "GetPeerUpdate when the state is not available is never answered",
        UNCHANGED,
        &[HELLO, Same, Better("2: always answered", Beside(|it| it.rpc == Some(Rpc::response(2))))],
    ),
    row(
        "relative url \"foo\"",
        &[
            HELLO,
            Better(
                "refused before any contact",
                Refused("parse url \"foo\": ", &["missing protocol scheme"]),
            ),
            Better(AGAIN, Refused("parse url \"foo\": ", &["missing protocol scheme"])),
        ],
    ),
    row(
        "unsupported scheme",
        &[
            HELLO,
            Better(
                "refused before any contact",
                Refused(CONNECTING, &["unsupported protocol scheme \"ftp\""]),
            ),
            Better(AGAIN, Refused(CONNECTING, &["unsupported protocol scheme \"ftp\""])),
        ],
    ),
    in_deployment(
        "connection refused",
        UNCHANGED,
        &[
            HELLO,
            Better(OWN_WORDS, Refused(CONNECTING, &["get user", "refused"])),
            Better(AGAIN, Refused(CONNECTING, &["get user", "refused"])),
        ],
    ),
    refuses("/api/v2/users/me answers 401", |lab| answers(lab, Endpoint::UsersMe, 401, "nope"), REFUSED_401),
    refuses("/api/v2/users/me answers 500", |lab| answers(lab, Endpoint::UsersMe, 500, "nope"), REFUSED),
    in_deployment("/api/v2/users/me answers 200", UNCHANGED, &[HELLO, Same]),
    refuses(
        "/api/v2/workspaceagents/connection answers 401",
        |lab| answers(lab, Endpoint::Connection, 401, "nope"),
        REFUSED_401,
    ),
    refuses(
        "/api/v2/workspaceagents/connection answers 404",
        |lab| answers(lab, Endpoint::Connection, 404, "nope"),
        REFUSED,
    ),
    refuses("/api/v2/tailnet answers 400", |lab| answers(lab, Endpoint::Tailnet, 400, "nope"), REFUSED),
    refuses("/api/v2/tailnet answers 401", |lab| answers(lab, Endpoint::Tailnet, 401, "nope"), REFUSED_401),
    refuses("/api/v2/tailnet answers 403", |lab| answers(lab, Endpoint::Tailnet, 403, "nope"), REFUSED),
    refuses("/api/v2/tailnet answers 404", |lab| answers(lab, Endpoint::Tailnet, 404, "nope"), REFUSED),
    refuses("/api/v2/tailnet answers 409", |lab| answers(lab, Endpoint::Tailnet, 409, "nope"), REFUSED),
    refuses("/api/v2/tailnet answers 500", |lab| answers(lab, Endpoint::Tailnet, 500, "nope"), REFUSED),
    retries("/api/v2/tailnet answers 502", |lab| answers(lab, Endpoint::Tailnet, 502, "nope")),
    retries("/api/v2/tailnet answers 503", |lab| answers(lab, Endpoint::Tailnet, 503, "nope")),
    retries("/api/v2/tailnet answers 429", |lab| answers(lab, Endpoint::Tailnet, 429, "nope")),
    retries("/api/v2/tailnet answers 200", |lab| answers(lab, Endpoint::Tailnet, 200, "nope")),
    Row::new(
        "no CAP_NET_ADMIN",
        Elsewhere("the privilege of a test differs; tunnel: own_network, and the tests of vpn_daemon"),
        &[HELLO, Same],
    ),
    in_deployment("no iptables in PATH", UNCHANGED, &[HELLO, Better("33: no such dependency", Started)]),
    Row::new(
        "whole session with a 1.1 manager, first update already waiting",
        Deployment(UNCHANGED),
        &[
            HELLO,
            Same,
            Told(UNCHANGED, has_agent),
            Told(UNCHANGED, has_ping),
            Told(UNCHANGED, has_ping),
            Same,
            Same,
        ],
    )
    .ends(0),
];

const REFUSED: &[Step] = &[
    HELLO,
    Better("our own order of steps", Refused(CONNECTING, &["nope"])),
    Better(AGAIN, Refused(CONNECTING, &["nope"])),
];
const REFUSED_401: &[Step] = &[
    HELLO,
    Better("our own order of steps", Refused(CONNECTING, &["401", "nope"])),
    Better(AGAIN, Refused(CONNECTING, &["401", "nope"])),
];

const fn refuses(name: &'static str, change: fn(&Lab), steps: &'static [Step]) -> Row {
    in_deployment(name, change, steps)
}

const fn retries(name: &'static str, change: fn(&Lab)) -> Row {
    const STEPS: &[Step] = &[
        HELLO,
        Better(
            "4: tried again, and told at the deadline if it never succeeds",
            Refused(CONNECTING, &["no success within"]),
        ),
    ];
    in_deployment(name, change, STEPS)
}

const NETWORK_SETTINGS: &[Row] = &[
    Row::new(
        "network settings requests and every kind of answer",
        Elsewhere(
            "the recorded tunnel was made to ask; session: what_was_acknowledged_is_not_asked_for_again, \
             settings_that_the_manager_refuses_fail_the_start; speaker: \
             a_call_gets_its_own_response_in_whatever_order_they_come",
        ),
        &[HELLO, Same, Same, Same, Same, Same, Same, Same, Same, Same, Same],
    ),
    Row::new(
        "an answer of another kind crashes the process",
        Device,
        &[
            HELLO,
            Better(ONE_REQUEST, Fits(is_whole_request)),
            Better("8: an error", Refused("network settings failed: ", &["of another kind"])),
        ],
    ),
    Row::new(
        "Stop before Start while a request of the tunnel is pending; then the tunnel tries another",
        Device,
        &[HELLO, Better(ONE_REQUEST, Fits(is_whole_request)), Same, Same],
    )
    .ends(0),
    Row::new(
        "every NetworkSettingsRequest refused: Start succeeds all the same",
        Device,
        &[
            HELLO,
            Better(ONE_REQUEST, Fits(is_whole_request)),
            Better(TOLD, Refused("network settings failed: manager said no", &[])),
            Better(TOLD, Nothing),
            Better(TOLD, Nothing),
            Better("2: always answered", Fits(is_empty_answer)),
            Same,
            Same,
        ],
    )
    .ends(0),
    Row::new(
        "Stop while a NetworkSettingsRequest is outstanding",
        Device,
        &[
            HELLO,
            Better(ONE_REQUEST, Fits(is_whole_request)),
            Better(ACKNOWLEDGED, Nothing),
            Same,
            Same,
            Better(ABANDONED, Stopped),
        ],
    )
    .ends(0),
    Row::new(
        "custom suffix, name too long, agent of an unknown workspace",
        Device,
        &[
            HELLO,
            Better(ONE_REQUEST, Fits(is_whole_request)),
            Same,
            Better(ONE_REQUEST, Nothing),
            Told(UNCHANGED, has_agent),
            Better(ONE_REQUEST, Nothing),
            Better(ONE_REQUEST, Nothing),
            Same,
            Same,
        ],
    )
    .ends(0),
    Row::new(
        "no answer to the first NetworkSettingsRequest: the watchdog ends the process",
        Device,
        &[
            HELLO,
            Better(ACKNOWLEDGED, Nothing),
            Better(ONE_REQUEST, Fits(is_whole_request)),
            Better("16: a limit for each step, and the process lives", Refused("", &["30s"])),
        ],
    ),
    Row::new(
        "Stop while a NetworkSettingsRequest is outstanding: both of the pair must be answered first",
        Device,
        &[
            HELLO,
            Better(ACKNOWLEDGED, Nothing),
            Better(ONE_REQUEST, Fits(is_whole_request)),
            Better(ABANDONED, Stopped),
            Better(ABANDONED, Nothing),
            Better("the connection is over", Nothing),
        ],
    )
    .ends(0),
    Row::new(
        "one queued request behind a slow Start blocks the delivery of responses",
        Device,
        &[HELLO, Better(ONE_REQUEST, Fits(is_whole_request))],
    )
    // 5: responses and requests are not kept waiting.
    .beyond(&[
        |it| is_woken(it) && it.rpc == Some(Rpc::response(2)),
        |it| is_started(it) && it.rpc == Some(Rpc::response(1)),
    ]),
];

const EXCHANGE: &[Row] = &[Row::new(
    "complete exchange, tunnel with network settings and logs over the protocol",
    Device,
    &[
        HELLO,
        Better("log lines are our own", Nothing),
        Better("log lines are our own", Nothing),
        Better("log lines are our own", Nothing),
        Better(ONE_REQUEST, Fits(is_whole_request)),
        Same,
        Better(ONE_REQUEST, Nothing),
        Told(UNCHANGED, has_agent),
        Better(ONE_REQUEST, Nothing),
        Better(ONE_REQUEST, Nothing),
        Told(|lab| drop(lab.add_workspace("two", &[])), |it| has_workspace(it, "two")),
        Told(
            |lab| assert!(lab.control().rename_workspace("two", "renamed")),
            |it| has_workspace(it, "renamed"),
        ),
        Better(ONE_REQUEST, Nothing),
        Better(ONE_REQUEST, Nothing),
        Better(ONE_REQUEST, Nothing),
        Better(ONE_REQUEST, Nothing),
        Told(
            |lab| drop(lab.add_agent("renamed", "second")),
            |it| it.upserted_agents.iter().any(|agent| agent.name == "second"),
        ),
        Told(remove_second, |it| it.deleted_agents.iter().any(|agent| agent.name == "second")),
        Better(ONE_REQUEST, Nothing),
        Better(ONE_REQUEST, Nothing),
        Told(UNCHANGED, has_ping),
        Told(UNCHANGED, has_ping),
        Better("the lab's agents", Fits(is_full_answer)),
        Same,
        Told(|lab| drop(lab.add_workspace("third", &["a"])), |it| has_workspace(it, "third")),
        Better(ONE_REQUEST, Nothing),
        Better(ONE_REQUEST, Nothing),
        Same,
        Same,
    ],
)
.ends(0)];

const fn row(name: &'static str, steps: &'static [Step]) -> Row {
    Row::new(name, Alone, steps)
}

const fn in_deployment(name: &'static str, change: fn(&Lab), steps: &'static [Step]) -> Row {
    Row::new(name, Deployment(change), steps)
}

fn answers(lab: &Lab, endpoint: Endpoint, status: u16, message: &str) {
    let status = StatusCode::from_u16(status).unwrap();
    fails(lab, endpoint, HttpFault::Status(status, message.to_owned()));
}

fn fails(lab: &Lab, endpoint: Endpoint, fault: HttpFault) {
    lab.control().fail(endpoint, fault, Times::Always);
}

fn remove_second(lab: &Lab) {
    let second = lab.agents().into_iter().find(|agent| agent.name.contains("second")).unwrap();
    lab.remove_agent(second.id);
}

fn has_agent(update: &PeerUpdate) -> bool {
    !update.upserted_agents.is_empty()
}

fn has_ping(update: &PeerUpdate) -> bool {
    update.upserted_agents.iter().any(|agent| agent.last_ping.is_some())
}

fn has_workspace(update: &PeerUpdate, name: &str) -> bool {
    update.upserted_workspaces.iter().any(|workspace| workspace.name == name)
}

fn is_started(message: &TunnelMessage) -> bool {
    matches!(&message.msg, Some(Msg::Start(it)) if it.success)
}

fn is_woken(message: &TunnelMessage) -> bool {
    message.msg == Some(Msg::Wake(WakeResponse {}))
}

fn is_empty_answer(message: &TunnelMessage) -> bool {
    message.msg == Some(Msg::PeerUpdate(PeerUpdate::default()))
}

fn is_full_answer(message: &TunnelMessage) -> bool {
    matches!(&message.msg, Some(Msg::PeerUpdate(update)) if has_agent(update) && has_ping(update))
}

/// Address, route and MTU in one request.
fn is_whole_request(message: &TunnelMessage) -> bool {
    let Some(Msg::NetworkSettings(request)) = &message.msg else { return false };
    let ipv6 = request.ipv6_settings.as_ref();
    request.mtu == 1280
        && ipv6.is_some_and(|ipv6| {
            let route = &ipv6.included_routes[0];
            ipv6.addrs[0].starts_with("fd60:627a:a42b:")
                && ipv6.prefix_lengths == [128]
                && (route.destination.as_str(), route.prefix_length) == ("fd60:627a:a42b::", 48)
        })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_recorded_handshake_is_shaken_again() {
    replay_all("header", HEADER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_recorded_odd_frame_is_sent_again() {
    replay_all("frames", FRAMES).await;
}

/// Conforms: vpn:15.9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_recorded_envelope_is_sent_again() {
    replay_all("rpc", RPC).await;
}

/// Conforms: vpn:15.2 vpn:15.3 vpn:15.4
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_recorded_start_is_asked_for_again() {
    replay_all("start", START).await;
}

/// Conforms: vpn:15.5 vpn:15.8 vpn:15.13 vpn:15.34
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_recorded_answer_to_a_question_for_network_settings_is_given_again() {
    replay_all("network-settings", NETWORK_SETTINGS).await;
}

/// Conforms: vpn:16.2.4
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_recorded_life_is_lived_again() {
    replay_all("exchange", EXCHANGE).await;
}

/// Replays every transcript of a file, some at a time.
async fn replay_all(file: &str, table: &'static [Row]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("proto/tests/vectors/vpn/{file}.json"));
    let vectors: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let transcripts = vectors["transcripts"].as_array().unwrap();
    let mut unused: BTreeSet<_> = table.iter().map(|row| row.name).collect();
    let (places, mut replays) = (Arc::new(Semaphore::new(8)), JoinSet::new());
    for transcript in transcripts {
        let name = transcript["name"].as_str().unwrap();
        let row = table.iter().find(|row| row.name == name);
        let row = row.unwrap_or_else(|| panic!("{file}: {name:?} is not in the table"));
        assert!(unused.remove(row.name), "{file}: {name:?} is recorded twice");
        let steps = entries(transcript).filter(|entry| is_step(entry)).count();
        assert_eq!(steps, row.steps.len(), "{file}: {name:?}: steps that are not in the table");
        if let Elsewhere(proof) = row.setting {
            assert!(!proof.is_empty());
            continue;
        }
        let (transcript, places) = (transcript.clone(), Arc::clone(&places));
        replays.spawn(async move {
            let _place = places.acquire_owned().await.unwrap();
            Replay::prepare(row).await.run(&transcript).await;
        });
    }
    assert!(unused.is_empty(), "{file}: in the table, but not recorded: {unused:?}");
    let mut failures = Vec::new();
    while let Some(replayed) = replays.join_next().await {
        failures.extend(replayed.err().map(|failure| failure.to_string()));
    }
    assert!(failures.is_empty(), "{file}: {failures:#?}");
}

fn entries(transcript: &Value) -> impl Iterator<Item = &Value> {
    transcript["entries"].as_array().unwrap().iter()
}

/// Whether the recorded tunnel did it.
fn is_step(entry: &Value) -> bool {
    entry["direction"] == "tunnel->manager"
}

/// One transcript that is being replayed.
struct Replay {
    row: &'static Row,
    tunnel: Tunnel,
    lab: Option<Lab>,
    /// Keeps the device open.
    _device: Option<UnixDatagram>,
    /// Our tunnel's request that has no response.
    asked: Option<u64>,
    is_prefaced: bool,
    was_write_refused: bool,
}

impl Replay {
    async fn prepare(row: &'static Row) -> Self {
        let lab = match row.setting {
            Deployment(_) | Device => {
                Some(Lab::start(LabOptions { agents: 1, ..LabOptions::default() }).await.unwrap())
            }
            Alone | Elsewhere(_) => None,
        };
        if let (Deployment(change), Some(lab)) = (row.setting, &lab) {
            change(lab);
        }
        let (device, handed) = match row.setting {
            Device => {
                let (ours, theirs) = UnixDatagram::pair().unwrap();
                (Some(ours), Handed::Device(theirs))
            }
            Alone | Deployment(_) | Elsewhere(_) => (None, Handed::Nothing),
        };
        let tunnel = Tunnel::spawn(&[], handed).await;
        Self { row, tunnel, lab, _device: device, asked: None, is_prefaced: false, was_write_refused: false }
    }

    async fn run(mut self, transcript: &Value) {
        let mut steps = self.row.steps.iter();
        for entry in entries(transcript) {
            if is_step(entry) {
                self.take(entry, *steps.next().unwrap()).await;
            } else {
                self.give(entry, transcript).await;
            }
        }
        let mut beyond = self.row.beyond.to_vec();
        while !beyond.is_empty() {
            let message = self.answer().await;
            let place = beyond.iter().position(|fits| fits(&message));
            beyond.remove(place.unwrap_or_else(|| panic!("{}: {message:?}", self.row.name)));
        }
        let Some(status) = self.row.exit else { return };
        assert_eq!(self.tunnel.exit().await, status, "{}", self.row.name);
        if let Some(recorded) = transcript["stderr_error"][0].as_str() {
            let said = lines(&self.tunnel.stderr().await);
            assert_eq!(said.last().unwrap(), &recorded.replace("(fd=30)", "(fd=0)"), "{}", self.row.name);
        }
    }

    /// What the manager did, done again.
    async fn give(&mut self, entry: &Value, transcript: &Value) {
        match entry["kind"].as_str().unwrap() {
            "header" => {
                self.write(&hex(entry)).await;
                self.preface(transcript).await;
            }
            "raw" => self.write(&written(entry)).await,
            "frame" => self.say(&hex(entry)).await,
            "manager-closes-write-end" => drop(self.tunnel.stdin.take()),
            "write-refused" => assert!(self.was_write_refused, "{}", self.row.name),
            other => panic!("unknown kind {other}"),
        }
    }

    /// Starts a tunnel that the recording found asking.
    async fn preface(&mut self, transcript: &Value) {
        let is_started = entries(transcript).any(|entry| entry["decoded"]["start"].is_object());
        if !is_started && matches!(self.row.setting, Device) {
            self.is_prefaced = true;
            let lab = self.lab.as_ref().unwrap();
            let start = start(lab, lab.token(), DESCRIPTOR);
            self.put(&ManagerMessage { rpc: Some(Rpc::request(PREFACE)), msg: Some(start) }).await;
        }
    }

    /// A message of the manager, with what this run has in place of what that run had.
    async fn say(&mut self, bytes: &[u8]) {
        let mut message: ManagerMessage = decode(bytes);
        if let (Some(Order::Start(start)), Some(lab)) = (&mut message.msg, &self.lab) {
            let is_refused = start.coder_url.ends_with(":1");
            start.coder_url = if is_refused { NOBODY } else { lab.url() }.to_owned();
            start.api_token = lab.token().to_owned();
            start.tunnel_file_descriptor = if matches!(self.row.setting, Device) { DESCRIPTOR } else { 0 };
        } else if let Some(Rpc { msg_id: 0, response_to: 1.. }) = message.rpc
            && matches!(self.row.setting, Device)
        {
            // The responses to requests that ours does not make have nobody to go to.
            let Some(asked) = self.asked.take() else { return };
            message.rpc = Some(Rpc::response(asked));
        } else {
            return self.write(bytes).await;
        }
        self.put(&message).await;
    }

    async fn put(&mut self, message: &ManagerMessage) {
        self.write(&frame::encode(message).unwrap()).await;
    }

    async fn write(&mut self, bytes: &[u8]) {
        let written = timeout(LIMIT, self.tunnel.try_write(bytes)).await.expect("the tunnel reads");
        self.was_write_refused = written.is_err();
    }

    /// What the reference did, against what ours does.
    async fn take(&mut self, entry: &Value, step: Step) {
        let name = self.row.name;
        match step {
            Same => match entry["kind"].as_str().unwrap() {
                "header" => {
                    let line = hex(entry);
                    assert_eq!(self.tunnel.read_exactly(line.len()).await, line, "{name}");
                }
                "frame" => self.take_the_same(&hex(entry)).await,
                "tunnel-closed" => {
                    let more = self.tunnel.rest().await;
                    assert!(more.iter().all(is_notification), "{name}: {more:?}");
                    if let Some(status) = self.row.exit {
                        assert_eq!(self.tunnel.exit().await, status, "{name}");
                    }
                }
                other => panic!("unknown kind {other}"),
            },
            Told(change, fits) => {
                change(self.lab.as_ref().unwrap());
                while !matches!(self.frame().await.msg, Some(Msg::PeerUpdate(update)) if fits(&update)) {}
            }
            Better(why, then) => self.take_better(entry, why, then).await,
        }
    }

    async fn take_the_same(&mut self, recorded: &[u8]) {
        let message = self.answer().await;
        let bytes = frame::encode(&message).unwrap();
        assert_eq!(bytes, recorded, "{}: {message:?}", self.row.name);
    }

    async fn take_better(&mut self, entry: &Value, why: &str, then: Then) {
        let name = format!("{} ({why})", self.row.name);
        let id = entry["decoded"]["rpc"]["response_to"].as_u64();
        match then {
            Nothing => {}
            Started => {
                let message = self.answer().await;
                assert!(is_started(&message), "{name}: {message:?}");
                assert!(id.is_none() || message.rpc == id.map(Rpc::response), "{name}: {message:?}");
            }
            Refused(beginning, words) => {
                let message = self.start_answer().await;
                let Some(Msg::Start(it)) = &message.msg else { panic!("{name}: {message:?}") };
                assert!(!it.success && it.error_message.starts_with(beginning), "{name}: {it:?}");
                assert!(words.iter().all(|word| it.error_message.contains(word)), "{name}: {it:?}");
                if let (Some(id), false) = (id, self.is_prefaced) {
                    assert_eq!(message.rpc, Some(Rpc::response(id)), "{name}");
                }
            }
            Fits(fits) => {
                let message = self.answer().await;
                assert!(fits(&message), "{name}: {message:?}");
                if let (Some(rpc), Some(Msg::NetworkSettings(_))) = (&message.rpc, &message.msg) {
                    self.asked = Some(rpc.msg_id);
                }
            }
            Beside(fits) => {
                let both = [self.answer().await, self.answer().await];
                let (beside, same): (Vec<_>, Vec<_>) = both.into_iter().partition(fits);
                assert_eq!((beside.len(), same.len()), (1, 1), "{name}: {beside:?} {same:?}");
                assert_eq!(frame::encode(&same[0]).unwrap(), hex(entry), "{name}: {same:?}");
            }
            Open => {
                let probe = Order::Wake(WakeRequest {});
                self.put(&ManagerMessage { rpc: Some(Rpc::request(PROBE)), msg: Some(probe) }).await;
                self.answer_to(PROBE).await;
            }
            Stopped => {
                let last = self.tunnel.rest().await.pop().expect("an answer to the stop");
                let stopped = StopResponse { success: true, error_message: String::new() };
                assert_eq!(last.msg, Some(Msg::Stop(stopped)), "{name}");
            }
            Then::End => assert_eq!(self.tunnel.rest().await, [], "{name}"),
        }
    }

    /// The next answer or question. What is told of peers and of the log comes when it comes, and the answer to
    /// a start that is not in the transcript whenever it likes.
    async fn answer(&mut self) -> TunnelMessage {
        loop {
            let message = self.start_answer().await;
            if message.rpc != Some(Rpc::response(PREFACE)) {
                return message;
            }
        }
    }

    async fn start_answer(&mut self) -> TunnelMessage {
        loop {
            let message = self.frame().await;
            if !is_notification(&message) {
                return message;
            }
        }
    }

    async fn answer_to(&mut self, id: u64) -> TunnelMessage {
        loop {
            let message = self.frame().await;
            if message.rpc == Some(Rpc::response(id)) {
                return message;
            }
        }
    }

    async fn frame(&mut self) -> TunnelMessage {
        let frame = self.tunnel.next().await;
        let frame = frame.unwrap_or_else(|| panic!("{}: the end instead of a frame", self.row.name));
        let has_both_ids = frame.rpc.is_some_and(|rpc| (rpc.msg_id != 0) == (rpc.response_to != 0));
        assert!(frame.msg.is_some() && !has_both_ids, "{}: {frame:?}", self.row.name);
        frame
    }
}

fn is_notification(message: &TunnelMessage) -> bool {
    message.rpc.is_none()
}

fn decode(bytes: &[u8]) -> ManagerMessage {
    let mut decoder = Decoder::new(MAX_FRAME);
    decoder.extend(bytes);
    decoder.next().unwrap().unwrap()
}

fn hex(entry: &Value) -> Vec<u8> {
    let text = entry["hex"].as_str().unwrap();
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digit).collect()
}

/// The one write too long to keep is a wake request padded by zeros in an unknown field.
fn written(entry: &Value) -> Vec<u8> {
    if !entry["hex"].is_null() {
        return hex(entry);
    }
    let length = usize::try_from(entry["length"].as_u64().unwrap()).unwrap();
    let payload = length - PREFIX;
    let mut bytes = u32::try_from(payload).unwrap().to_be_bytes().to_vec();
    // rpc, wake, then field 1000 with a length of four varint bytes.
    bytes.extend([0x0a, 0x02, 0x08, 0x01, 0x32, 0x00, 0xc2, 0x3e]);
    let padding = payload - 12;
    bytes.extend([0, 7, 14].map(|shift| 0x80 | u8::try_from(padding >> shift & 0x7f).unwrap()));
    bytes.push(u8::try_from(padding >> 21).unwrap());
    bytes.resize(length, 0);
    bytes
}
