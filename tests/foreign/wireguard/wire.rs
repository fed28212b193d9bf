//! What carries datagrams between our engine and `wireguard-go`: UDP, or a relay with a bridge behind it.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use warren_proto::{
    derp::{ClientInfo, Frame, HEADER, Header},
    key::{NodePrivate, NodePublic, random},
};

use super::free_socket;
use crate::support::LIMIT;

/// The largest datagram.
const LARGEST: usize = 64 << 10;

/// A way to the peer.
pub(super) trait Wire {
    fn send(&mut self, datagram: &[u8]);
    /// The next datagram, if one comes in time.
    fn receive(&mut self, limit: Duration) -> Option<Vec<u8>>;
}

/// A socket of ours, and where the peer was last heard.
pub(super) struct UdpWire {
    socket: UdpSocket,
    pub(super) peer: SocketAddr,
}

impl UdpWire {
    pub(super) fn to(peer: SocketAddr) -> Self {
        Self { socket: free_socket(), peer }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// Leaves for another port.
    pub(super) fn move_away(&mut self) {
        self.socket = free_socket();
    }
}

impl Wire for UdpWire {
    fn send(&mut self, datagram: &[u8]) {
        // Where nobody listens for a moment, UDP loses.
        let _ = self.socket.send_to(datagram, self.peer);
    }

    fn receive(&mut self, limit: Duration) -> Option<Vec<u8>> {
        let mut buffer = vec![0; LARGEST];
        self.socket.set_read_timeout(Some(limit.max(Duration::from_millis(1)))).unwrap();
        let (length, from) = self.socket.recv_from(&mut buffer).ok()?;
        self.peer = from;
        buffer.truncate(length);
        Some(buffer)
    }
}

/// A login at a relay, for the traffic with one peer.
pub(super) struct RelayWire {
    stream: TcpStream,
    unread: Vec<u8>,
    peer: NodePublic,
}

impl RelayWire {
    pub(super) fn log_in(relay: SocketAddr, private: &NodePrivate, peer: NodePublic) -> Self {
        let mut stream = TcpStream::connect(relay).unwrap();
        stream.set_nodelay(true).unwrap();
        write!(stream, "GET /derp HTTP/1.1\r\nHost: {relay}\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n")
            .unwrap();
        let mut wire = Self { stream, unread: Vec::new(), peer };
        let head = wire.head();
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        let greeting = wire.frame(LIMIT).expect("a greeting");
        let Ok(Frame::ServerKey(server)) = Frame::read(&greeting.0, &greeting.1) else {
            panic!("no greeting: {greeting:?}")
        };
        let shared = private.shared(&server);
        let info = ClientInfo::OURS.seal(&shared, &random());
        wire.write(&Frame::ClientInfo(private.public(), &info).encode());
        let answer = wire.frame(LIMIT).expect("an answer to the login");
        assert!(matches!(Frame::read(&answer.0, &answer.1), Ok(Frame::ServerInfo(_))), "{answer:?}");
        wire
    }

    /// The head of the answer; what follows stays unread.
    fn head(&mut self) -> String {
        const END: &[u8] = b"\r\n\r\n";
        loop {
            if let Some(at) = self.unread.windows(END.len()).position(|window| window == END) {
                let rest = self.unread.split_off(at + END.len());
                let head = std::mem::replace(&mut self.unread, rest);
                return String::from_utf8(head).unwrap();
            }
            assert!(self.fill(LIMIT), "the relay did not answer");
        }
    }

    fn frame(&mut self, limit: Duration) -> Option<(Header, Vec<u8>)> {
        loop {
            if let Some(header) = Header::read(&self.unread).unwrap()
                && self.unread.len() >= HEADER + header.length
            {
                let rest = self.unread.split_off(HEADER + header.length);
                let frame = std::mem::replace(&mut self.unread, rest);
                return Some((header, frame[HEADER..].to_vec()));
            }
            if !self.fill(limit) {
                return None;
            }
        }
    }

    /// Reads more. `false` if nothing came in time.
    fn fill(&mut self, limit: Duration) -> bool {
        let mut piece = vec![0; LARGEST];
        self.stream.set_read_timeout(Some(limit.max(Duration::from_millis(1)))).unwrap();
        match self.stream.read(&mut piece) {
            Ok(0) => panic!("the relay closed the connection"),
            Ok(length) => {
                self.unread.extend(&piece[..length]);
                true
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The same connection, for sending only.
    fn sender(&self) -> Self {
        Self { stream: self.stream.try_clone().unwrap(), unread: Vec::new(), peer: self.peer }
    }
}

impl Wire for RelayWire {
    fn send(&mut self, datagram: &[u8]) {
        self.write(&Frame::SendPacket(self.peer, datagram).encode());
    }

    fn receive(&mut self, limit: Duration) -> Option<Vec<u8>> {
        loop {
            let (header, body) = self.frame(limit)?;
            if let Ok(Frame::RecvPacket(from, packet)) = Frame::read(&header, &body) {
                assert_eq!(from, self.peer);
                return Some(packet.to_vec());
            }
        }
    }
}

/// Joins a login at a relay with what listens for UDP here. Returns where that has its peer. Ends with the
/// process.
pub(super) fn bridge(mut from: RelayWire, to: SocketAddr) -> SocketAddr {
    let socket = free_socket();
    let address = socket.local_addr().unwrap();
    let (mut back, inward) = (from.sender(), socket.try_clone().unwrap());
    thread::spawn(move || {
        loop {
            if let Some(datagram) = from.receive(LIMIT) {
                let _ = inward.send_to(&datagram, to);
            }
        }
    });
    thread::spawn(move || {
        let mut buffer = vec![0; LARGEST];
        loop {
            if let Ok((length, _)) = socket.recv_from(&mut buffer) {
                back.send(&buffer[..length]);
            }
        }
    });
    address
}
