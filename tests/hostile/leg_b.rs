//! What a user of the group can do to the service on its socket for desktop programs.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use warren_proto::{
    frame,
    vpn::{
        ClientMessage, Rpc, ServiceMessage, StartRequest, StatusRequest, StopRequest,
        client_message::Msg as Wish, service_message::Msg, start_request::Header,
    },
};

use super::{LIMIT, ServiceProcess, raise_descriptors, stands};

const OUR_LINE: &[u8] = b"codervpn client 1.3\n";
const ITS_LINE: &[u8] = b"codervpn service 1.3\n";

#[test]
fn garbage_instead_of_a_greeting_is_named_and_ends_that_client_alone() {
    let service = ServiceProcess::start();
    let mut honest = Client::greeted(&service);
    let mut hostile = Client::connect(&service);
    hostile.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    hostile.is_thrown_out();
    assert!(honest.status(1));
    stands(&service, "invalid preamble");
}

#[test]
fn a_greeting_without_an_end_is_cut_off() {
    let service = ServiceProcess::start();
    let mut hostile = Client::connect(&service);
    hostile.send(&[b'c'; 100_000]);
    hostile.is_thrown_out();
    stands(&service, "header malformed or too large");
}

#[test]
fn a_greeting_that_drips_is_not_waited_for() {
    let service = ServiceProcess::start();
    let mut hostile = Client::connect(&service);
    // A byte every 200 ms would take longer than the handshake may.
    for _ in 0..200 {
        if !hostile.try_send(b"c") {
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    hostile.is_thrown_out();
    stands(&service, "handshake failed");
}

#[test]
fn a_frame_longer_than_any_message_is_refused_before_it_comes() {
    let service = ServiceProcess::start();
    for length in [u32::MAX, 16 * 1024 * 1024 + 1] {
        let mut hostile = Client::greeted(&service);
        hostile.send(&length.to_be_bytes());
        hostile.is_thrown_out();
    }
    stands(&service, "a client is turned out");
}

#[test]
fn a_frame_without_sense_ends_that_client() {
    let service = ServiceProcess::start();
    let garbage = [0, 0, 0, 5, 0xff, 0xff, 0xff, 0xff, 0xff];
    let zeros = [0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for frame in [&garbage[..], &zeros] {
        let mut hostile = Client::greeted(&service);
        hostile.send(frame);
        hostile.is_thrown_out();
    }
    stands(&service, "undecodable frame");
}

#[test]
fn a_frame_that_stops_halfway_costs_only_what_came_of_it() {
    let service = ServiceProcess::start();
    let halves: Vec<_> = (0..32)
        .map(|_| {
            let mut hostile = Client::greeted(&service);
            hostile.send(&(512 * 1024_u32).to_be_bytes());
            hostile.send(&[8; 1000]);
            hostile
        })
        .collect();
    assert!(Client::greeted(&service).status(1));
    drop(halves);
    stands(&service, "");
}

#[test]
fn a_client_that_asks_and_never_reads_is_thrown_out() {
    let service = ServiceProcess::start();
    let mut hostile = Client::greeted(&service);
    let request = wish(1, Wish::Status(StatusRequest {}));
    let many: Vec<u8> = request.iter().copied().cycle().take(request.len() * 1000).collect();
    hostile.0.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let begun = Instant::now();
    let end = loop {
        assert!(begun.elapsed() < LIMIT, "it is served for ever");
        match hostile.0.write_all(&many) {
            Ok(()) => {}
            // A service that waits for its reader takes no more for a while.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => break error.kind(),
        }
    };
    assert!(matches!(end, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{end}");
    stands(&service, "does not read its answers");
}

#[test]
fn ten_thousand_connections_are_turned_away_and_leave_the_service_at_work() {
    let service = ServiceProcess::start();
    let room = raise_descriptors().saturating_sub(200).min(10_000);
    let socket = service.socket_dir().join("vpn.sock");
    let mut held = Vec::new();
    for _ in 0..10_000 {
        match UnixStream::connect(&socket) {
            Ok(stream) => held.push(stream),
            // The backlog is full: as good as turned away.
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
        if held.len() as u64 >= room {
            held.clear();
        }
    }
    drop(held);
    stands(&service, "a client too many is turned away");
}

#[test]
fn requests_out_of_order_replayed_and_unknown_are_answered_or_ignored() {
    let service = ServiceProcess::start();
    let mut hostile = Client::greeted(&service);
    // A Stop before any Start, the same number again, an answer to nothing, and what nobody knows.
    hostile.send(&wish(7, Wish::Stop(StopRequest {})));
    hostile.send(&wish(7, Wish::Status(StatusRequest {})));
    let answer = ClientMessage { rpc: Some(Rpc::response(99)), msg: Some(Wish::Stop(StopRequest {})) };
    hostile.send(&frame::encode(&answer).unwrap());
    hostile.send(&[0, 0, 0, 9, 0x0a, 0x02, 0x08, 0x08, 0x9a, 0x06, 0x02, 0x08, 0x01]);
    hostile.send(&wish(8, Wish::Stop(StopRequest {})));
    let mut answered: Vec<_> = (0..3).map(|_| hostile.answer()).collect();
    answered.sort_by_key(|message| message.rpc.as_ref().map(|rpc| rpc.response_to));
    let to: Vec<_> = answered.iter().map(|message| message.rpc.unwrap().response_to).collect();
    assert_eq!(to, [7, 7, 8], "{answered:?}");
    assert!(hostile.status(9));
    stands(&service, "a client asked what this build does not know");
}

#[test]
fn a_start_with_a_crowd_of_headers_is_refused_in_words() {
    let service = ServiceProcess::start();
    let mut hostile = Client::greeted(&service);
    let header = |number: usize| Header { name: format!("X-{number}"), value: "x".repeat(20) };
    let start = StartRequest {
        coder_url: "https://coder.invalid".to_owned(),
        api_token: "AAAAAAAAAA-BBBBBBBBBBBBBBBBBBBBBB".to_owned(),
        headers: (0..20_000).map(header).collect(),
        ..StartRequest::default()
    };
    hostile.send(&wish(1, Wish::Start(start)));
    let Some(Msg::Start(answer)) = hostile.answer().msg else { panic!("no answer to Start") };
    assert!(!answer.success && answer.error_message.contains("headers"), "{answer:?}");
    stands(&service, "");
}

/// A client with no manners.
struct Client(UnixStream);

impl Client {
    fn connect(service: &ServiceProcess) -> Self {
        let stream = UnixStream::connect(service.socket_dir().join("vpn.sock")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    fn greeted(service: &ServiceProcess) -> Self {
        let mut client = Self::connect(service);
        client.send(OUR_LINE);
        let mut line = [0; ITS_LINE.len()];
        client.0.read_exact(&mut line).unwrap();
        assert_eq!(line, ITS_LINE);
        client
    }

    fn send(&mut self, bytes: &[u8]) {
        // Whoever is thrown out in the middle of its own words cannot write the rest.
        let _ = self.try_send(bytes);
    }

    fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).is_ok()
    }

    /// Reads until the end, which must come by itself.
    fn is_thrown_out(&mut self) {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
        }
    }

    /// The next message that answers a request.
    fn answer(&mut self) -> ServiceMessage {
        loop {
            let mut length = [0; 4];
            self.0.read_exact(&mut length).unwrap();
            let mut frame = length.to_vec();
            frame.resize(4 + u32::from_be_bytes(length) as usize, 0);
            self.0.read_exact(&mut frame[4..]).unwrap();
            let mut decoder = frame::Decoder::new(frame::MAX_FRAME);
            decoder.extend(&frame);
            let message: ServiceMessage = decoder.next().unwrap().unwrap();
            if message.rpc.as_ref().is_some_and(|rpc| rpc.response_to != 0) {
                return message;
            }
        }
    }

    /// Whether a Status is answered.
    fn status(&mut self, id: u64) -> bool {
        self.send(&wish(id, Wish::Status(StatusRequest {})));
        matches!(self.answer().msg, Some(Msg::Status(_)))
    }
}

fn wish(id: u64, wish: Wish) -> Vec<u8> {
    frame::encode(&ClientMessage { rpc: Some(Rpc::request(id)), msg: Some(wish) }).unwrap().to_vec()
}
