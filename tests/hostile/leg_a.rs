//! What a manager can do to a tunnel.

use std::{
    io::{ErrorKind, Read, Write},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use warren_proto::{
    frame,
    vpn::{
        GetPeerUpdate, ManagerMessage, NetworkSettingsResponse, Rpc, StartRequest, StopRequest, WakeRequest,
        manager_message::Msg as Order, start_request::Header,
    },
};

use super::{LIMIT, TUNNEL_CEILING, peak, support::WARREN};

const OUR_LINE: &[u8] = b"codervpn manager 1.3\n";
/// The tunnel's word for a manager that broke the protocol.
const PROTOCOL: i32 = 76;

#[test]
fn a_greeting_that_drips_is_not_waited_for() {
    let mut tunnel = Tunnel::spawn();
    for _ in 0..100 {
        if !tunnel.try_write(b"c") {
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    tunnel.ends(1, "handshake failed");
}

#[test]
fn a_frame_longer_than_any_message_is_refused_with_both_numbers() {
    let mut tunnel = Tunnel::greeted();
    tunnel.try_write(&u32::MAX.to_be_bytes());
    tunnel.ends(PROTOCOL, "4294967295");
}

#[test]
fn a_frame_of_garbage_ends_the_tunnel_in_order() {
    let mut tunnel = Tunnel::greeted();
    tunnel.try_write(&[0, 0, 0, 5, 0xff, 0xff, 0xff, 0xff, 0xff]);
    tunnel.ends(PROTOCOL, "undecodable frame");
}

#[test]
fn a_manager_that_leaves_in_the_middle_of_a_frame_is_told_from_one_that_just_leaves() {
    let mut tunnel = Tunnel::greeted();
    tunnel.try_write(&[0, 0, 1, 0, 8]);
    drop(tunnel.input.take());
    let status = tunnel.exit();
    assert!([69, PROTOCOL].contains(&status), "{status}");
}

#[test]
fn a_frame_that_drips_keeps_nobody_from_anything() {
    let mut tunnel = Tunnel::greeted();
    let request = request(1, Order::GetPeerUpdate(GetPeerUpdate {}));
    for byte in &request {
        tunnel.try_write(&[*byte]);
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(tunnel.answered(), 1);
    tunnel.try_write(&self::request(2, Order::Stop(StopRequest {})));
    tunnel.ends(0, "");
}

#[test]
fn a_message_that_unpacks_to_far_more_than_it_is_costs_no_memory() {
    // Empty headers: two bytes each on the wire, dozens in memory.
    let headers = vec![Header::default(); 400_000];
    let start = StartRequest { headers, ..StartRequest::default() };
    let mut tunnel = Tunnel::greeted();
    for id in 1..20 {
        if !tunnel.try_write(&request(id, Order::Start(start.clone()))) {
            break;
        }
    }
    drop(tunnel.input.take());
    let status = tunnel.exit_within_ceiling();
    assert!([69, PROTOCOL].contains(&status), "{status}");
}

#[test]
fn a_hundred_thousand_requests_from_who_never_reads_cost_no_memory() {
    let mut tunnel = Tunnel::greeted();
    // Its output is not read from here on.
    let many: Vec<u8> =
        (1..1000).flat_map(|id| request(id, Order::GetPeerUpdate(GetPeerUpdate {}))).collect();
    let input = tunnel.input.take().unwrap();
    let writer = thread::spawn(move || {
        let mut input = input;
        (0..100).all(|_| input.write_all(&many).is_ok())
    });
    thread::sleep(Duration::from_secs(2));
    tunnel.is_within_ceiling();
    signal(&tunnel.child, "TERM");
    let status = tunnel.exit();
    assert!([0, PROTOCOL].contains(&status), "{status}");
    let _ = writer.join();
}

#[test]
fn orders_out_of_turn_and_answers_to_nothing_are_answered_or_ignored() {
    let mut tunnel = Tunnel::greeted();
    let answer = NetworkSettingsResponse { success: true, error_message: String::new() };
    for id in [0, 7, u64::MAX] {
        let stray = ManagerMessage {
            rpc: Some(Rpc::response(id)),
            msg: Some(Order::NetworkSettings(answer.clone())),
        };
        tunnel.try_write(&frame::encode(&stray).unwrap());
    }
    tunnel.try_write(&request(5, Order::Wake(WakeRequest {})));
    assert_eq!(tunnel.answered(), 5);
    // The same number again is another request.
    tunnel.try_write(&request(5, Order::GetPeerUpdate(GetPeerUpdate {})));
    assert_eq!(tunnel.answered(), 5);
    tunnel.try_write(&request(6, Order::Stop(StopRequest {})));
    tunnel.ends(0, "");
}

fn request(id: u64, order: Order) -> Vec<u8> {
    frame::encode(&ManagerMessage { rpc: Some(Rpc::request(id)), msg: Some(order) }).unwrap().to_vec()
}

/// A tunnel under a manager with no manners.
struct Tunnel {
    child: Child,
    input: Option<ChildStdin>,
}

impl Tunnel {
    fn spawn() -> Self {
        let mut child = Command::new(WARREN)
            .args(["vpn-daemon", "run", "--rpc-read-handle", "0", "--rpc-write-handle", "1", "--no-device"])
            .env("WARREN_LOG", "debug")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        Self { child, input }
    }

    fn greeted() -> Self {
        let mut tunnel = Self::spawn();
        tunnel.try_write(OUR_LINE);
        let mut line = [0; 20];
        tunnel.child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        assert_eq!(&line, b"codervpn tunnel 1.3\n");
        tunnel
    }

    fn try_write(&mut self, bytes: &[u8]) -> bool {
        match self.input.as_mut().unwrap().write_all(bytes) {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::BrokenPipe, "{error}");
                false
            }
        }
    }

    /// The number of the request that the next frame answers.
    fn answered(&mut self) -> u64 {
        let output = self.child.stdout.as_mut().unwrap();
        loop {
            let mut length = [0; 4];
            output.read_exact(&mut length).unwrap();
            let mut frame = length.to_vec();
            frame.resize(4 + u32::from_be_bytes(length) as usize, 0);
            output.read_exact(&mut frame[4..]).unwrap();
            let mut decoder = frame::Decoder::new(frame::MAX_FRAME);
            decoder.extend(&frame);
            let message: warren_proto::vpn::TunnelMessage = decoder.next().unwrap().unwrap();
            if let Some(Rpc { response_to: id @ 1.., .. }) = message.rpc {
                return id;
            }
        }
    }

    fn is_within_ceiling(&self) {
        let took = peak(self.child.id());
        assert!(took < TUNNEL_CEILING, "{took:?}");
    }

    fn exit(&mut self) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| panic!("{status}"));
            }
            assert!(begun.elapsed() < LIMIT, "it does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the end, looking at its memory until then.
    fn exit_within_ceiling(&mut self) -> i32 {
        let begun = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < LIMIT, "it does not end");
            let status =
                std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
            if status.contains("VmHWM") {
                self.is_within_ceiling();
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.exit()
    }

    /// Waits for an end with this status and this word about it.
    fn ends(&mut self, status: i32, word: &str) {
        let found = self.exit();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(found, status, "{said}");
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn signal(child: &Child, name: &str) {
    super::support::signal(child.id(), name);
}
