//! `wireguard-go` as a process, told what to do by its own socket.

use std::{
    fmt::Write as _,
    io::{Read, Write},
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    os::unix::net::UnixStream,
    process::{Child, Command, Stdio},
    time::Duration,
};

use warren_proto::key::{NodePrivate, NodePublic};

use super::loopback;
use crate::{
    isolated::{add_address, bring_up},
    support::{LIMIT, eventually},
};

const DEVICE: &str = "wg0";
const SOCKET: &str = "/run/wireguard/wg0.sock";

/// A running `wireguard-go` with a key and an address.
pub(super) struct Guest {
    child: Child,
    key: NodePrivate,
    address: Ipv6Addr,
}

impl Guest {
    pub(super) fn start(address: Ipv6Addr) -> Self {
        let key = NodePrivate::generate();
        let child = Command::new("wireguard-go")
            .args(["--foreground", DEVICE])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let guest = Self { child, key, address };
        eventually("wireguard-go listens", || UnixStream::connect(SOCKET).is_ok());
        guest.set(&format!("private_key={}", hex(&guest.key.to_bytes())));
        configure(address);
        guest
    }

    pub(super) fn private(&self) -> &NodePrivate {
        &self.key
    }

    pub(super) fn key(&self) -> NodePublic {
        self.key.public()
    }

    /// Moves it to a port. Returns where that is.
    pub(super) fn listen(&mut self, port: u16) -> SocketAddr {
        self.set(&format!("listen_port={port}"));
        loopback(port)
    }

    /// Lets it know a peer, and where that is unless it is to find out.
    pub(super) fn know(&mut self, peer: &NodePublic, address: Ipv6Addr, endpoint: Option<SocketAddr>) {
        let mut lines = format!("public_key={}\nallowed_ip={address}/128", peer.to_hex());
        if let Some(endpoint) = endpoint {
            write!(lines, "\nendpoint={endpoint}").unwrap();
        }
        self.set(&lines);
    }

    /// Lets it forget a peer and its sessions.
    pub(super) fn forget(&mut self, peer: &NodePublic) {
        self.set(&format!("public_key={}\nremove=true", peer.to_hex()));
    }

    /// Sends a datagram from the kernel behind it.
    pub(super) fn say(&self, to: Ipv6Addr, payload: &[u8]) {
        let socket = UdpSocket::bind((self.address, 0)).unwrap();
        socket.send_to(payload, (to, 9)).unwrap();
    }

    /// When its last handshake was.
    pub(super) fn last_handshake(&self) -> Duration {
        Duration::new(self.number("last_handshake_time_sec"), self.number("last_handshake_time_nsec") as u32)
    }

    /// Where it believes its peer to be.
    pub(super) fn endpoint(&self) -> SocketAddr {
        self.value("endpoint").parse().unwrap()
    }

    pub(super) fn received(&self) -> u64 {
        self.number("rx_bytes")
    }

    pub(super) fn sent(&self) -> u64 {
        self.number("tx_bytes")
    }

    fn number(&self, key: &str) -> u64 {
        self.value(key).parse().unwrap()
    }

    fn value(&self, key: &str) -> String {
        let answer = self.ask("get=1");
        let mut lines = answer.lines().filter_map(|line| line.split_once('='));
        lines.find(|(name, _)| *name == key).unwrap_or_else(|| panic!("no {key} in {answer}")).1.to_owned()
    }

    fn set(&self, lines: &str) {
        self.ask(&format!("set=1\n{lines}"));
    }

    fn ask(&self, order: &str) -> String {
        let mut stream = UnixStream::connect(SOCKET).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        write!(stream, "{order}\n\n").unwrap();
        let (mut answer, mut piece) = (String::new(), [0; 4096]);
        while !answer.ends_with("\n\n") {
            let length = stream.read(&mut piece).unwrap();
            assert!(length > 0, "wireguard-go did not answer: {answer}");
            answer.push_str(std::str::from_utf8(&piece[..length]).unwrap());
        }
        assert!(answer.ends_with("errno=0\n\n"), "{order}: {answer}");
        answer
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes as its socket wants them.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Brings up the loopback and the device, with its address.
fn configure(address: Ipv6Addr) {
    const PREFIX: u8 = 48;
    add_address(DEVICE, address.into(), PREFIX);
    bring_up("lo");
    bring_up(DEVICE);
}
