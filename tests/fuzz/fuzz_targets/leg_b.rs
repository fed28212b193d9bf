//! Clients of leg B: what they order, and whole conversations. Who may not start a tunnel does not, whatever
//! they say, and no secret comes back.
#![no_main]

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock},
    time::Duration,
};

use url::{Host, Url};
use warren_fuzz::{
    Input,
    peer::{MAX_STEPS, Manners, Step, meet},
};
use warren_proto::{
    frame,
    header::{Role, SUPPORTED, line},
    vpn::{
        self, ClientMessage, Rpc, ServiceMessage, client_message::Msg, service_message, start_request::Header,
    },
};
use warren_supervisor::{clients::fuzzing, facts::Service};

warren_fuzz::target!(check);

/// Whose tunnel it is, in this service.
const OWNER: u32 = 7;
const STRANGER: u32 = 8;
const TOKEN: &str = "TOKEN-5f1c";
const VALUE: &str = "VALUE-5f1c";

static SERVICE: LazyLock<Arc<Service>> = LazyLock::new(|| fuzzing::service(OWNER, hosts()));

fn hosts() -> BTreeSet<String> {
    ["dev.example".to_owned()].into()
}

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() & 1 {
        0 => order(start(&mut input)),
        _ => conversation(input),
    }
}

fn start(input: &mut Input<'_>) -> vpn::StartRequest {
    let what = input.byte();
    let coder_url = input.text();
    let api_token = if what & 1 == 0 { format!("{TOKEN}{}", input.text()) } else { String::new() };
    let count = usize::from(what >> 1);
    let header = |_| Header { name: input.text(), value: format!("{VALUE}{}", input.text()) };
    let headers = (0..count).map(header).collect();
    vpn::StartRequest { coder_url, api_token, headers, ..vpn::StartRequest::default() }
}

fn order(start: vpn::StartRequest) {
    let names: Vec<_> = start.headers.iter().map(|header| header.name.clone()).collect();
    let token = start.api_token.clone();
    let order = match fuzzing::check(start.clone(), OWNER, &hosts()) {
        Ok(order) => order,
        Err(words) => {
            let is_told = |secret| words.contains(secret) && !start.coder_url.contains(secret);
            let is_name = names.iter().any(|name| name.contains(TOKEN) || name.contains(VALUE));
            return assert!(is_name || !(is_told(TOKEN) || is_told(VALUE)), "{words}");
        }
    };
    let url = Url::parse(&order.url).expect("what is ordered is a URL");
    let is_near = match url.host().expect("with a host") {
        Host::Domain(name) => name == "localhost" || hosts().contains(name),
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
    };
    assert!(url.scheme() == "https" || url.scheme() == "http" && is_near, "{url}");
    assert!(!token.is_empty() && !token.contains(['\r', '\n', '\0']));
    assert!(names.iter().all(|name| !name.is_empty() && !name.contains(['\r', '\n', '\0'])));
    let again = fuzzing::check(vpn::StartRequest { coder_url: order.url.clone(), ..start }, OWNER, &hosts());
    assert_eq!(again.map(|again| again.url), Ok(order.url.clone()), "what was accepted is accepted as it is");
    let debug = format!("{order:?}");
    assert!(!debug.contains(TOKEN) || order.url.contains(TOKEN) || names.iter().any(|it| it.contains(TOKEN)));
}

fn conversation(mut input: Input<'_>) {
    // A client may say nothing for days; it is gone some time.
    let manners = Manners { closes: true, ..Manners::of(input.byte()) };
    let what = input.byte();
    let uid = if what & 1 == 0 { STRANGER } else { OWNER };
    let mut script = Vec::new();
    if what & 2 == 0 {
        script.push(Step::Write(line(Role::Client, &SUPPORTED).into_bytes()));
    }
    while !input.is_empty() && script.len() < MAX_STEPS {
        script.push(step(&mut input));
    }
    let service = Arc::clone(&SERVICE);
    let (_, said) = meet(script, manners, async |near| {
        let (read, write) = tokio::io::split(near);
        fuzzing::serve(service, uid, read, write).await;
    });
    let Some(frames) = said.strip_prefix(line(Role::Service, &SUPPORTED).as_bytes()) else {
        return assert!(!manners.reads, "the service says who it is");
    };
    answers(frames, uid);
}

fn step(input: &mut Input<'_>) -> Step {
    let what = input.byte();
    let rpc = Some(Rpc { msg_id: u64::from(input.byte()), response_to: u64::from(what >> 6) });
    let msg = match what & 7 {
        0 => return Step::Write(input.chunk().to_vec()),
        1 => {
            let payload = input.chunk();
            let length = u32::try_from(payload.len()).expect("not more than there was input").to_be_bytes();
            return Step::Write([length.as_slice(), payload].concat());
        }
        2 => return Step::Wait(Duration::from_secs(u64::from(input.byte()))),
        3 => Msg::Stop(vpn::StopRequest::default()),
        4 | 5 => Msg::Status(vpn::StatusRequest::default()),
        _ => Msg::Start(start(input)),
    };
    let frame = frame::encode(&ClientMessage { rpc, msg: Some(msg) }).expect("a frame");
    Step::Write(frame.to_vec())
}

/// The last frame may be cut off where the client broke the protocol, or did not read in time.
fn answers(frames: &[u8], uid: u32) {
    let mut decoder = frame::Decoder::new(frame::MAX_FRAME);
    decoder.extend(frames);
    while let Some(answer) = decoder.next::<ServiceMessage>().expect("a frame of ours") {
        assert!(answer.rpc.is_none_or(|rpc| rpc.msg_id == 0 && rpc.response_to != 0));
        match answer.msg.expect("an answer with a body") {
            service_message::Msg::Start(it) => refused(uid, it.success, &it.error_message),
            service_message::Msg::Stop(it) => refused(uid, it.success, &it.error_message),
            service_message::Msg::Status(it) => assert_eq!(it.error_message, ""),
            service_message::Msg::StartProgress(_) => panic!("nothing is started"),
        }
    }
}

/// Nothing is done: not for strangers, and not for the owner, since there is nobody here to do it.
fn refused(uid: u32, success: bool, words: &str) {
    assert!(!success && !words.is_empty());
    assert!(uid != STRANGER || words.contains("the tunnel belongs to"), "{words}");
}
