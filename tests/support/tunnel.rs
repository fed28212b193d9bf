//! A tunnel process and its manager's ends.
#![allow(clippy::expect_used, reason = "tests")]

use std::{
    io,
    net::Ipv6Addr,
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixStream},
    },
    process::Stdio,
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};
use warren_lab::{Lab, LabOptions};
use warren_proto::{
    frame::{self, Decoder, MAX_FRAME},
    vpn::{
        ManagerMessage, NetworkSettingsResponse, Rpc, StartRequest, StartResponse, TunnelMessage,
        manager_message::Msg as Order, tunnel_message::Msg,
    },
};
use warren_supervisor::link::LinkClient;

use super::{LIMIT, WARREN, peak_memory};

const OUR_LINE: &[u8] = b"codervpn manager 1.3\n";
const ITS_LINE: &[u8] = b"codervpn tunnel 1.3\n";

/// Which descriptor of the tunnel is what is handed over.
pub(crate) const DESCRIPTOR: i32 = 7;
/// Where the channel is, if there is one.
const SOCKETS: i32 = 8;

/// What a tunnel process is handed besides the manager's two descriptors.
pub(crate) enum Handed {
    /// Nothing.
    Nothing,
    /// What stands for the device.
    Device(UnixDatagram),
    /// The service's private link.
    Link(UnixStream),
    /// What stands for the device, and the channel to whoever makes UDP sockets.
    DeviceAndSockets(UnixDatagram, OwnedFd),
}

/// A tunnel process, and its manager's ends. The manager is on standard input and output: whatever else is
/// written there breaks the frames.
pub(crate) struct Tunnel {
    /// The process.
    pub(crate) child: Child,
    /// Where the manager writes; dropped, it has closed its end.
    pub(crate) stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    decoder: Decoder,
}

impl Tunnel {
    /// With what is handed over as number [`DESCRIPTOR`], at the cost of what it says on stderr.
    pub(crate) async fn spawn(arguments: &[&str], handed: Handed) -> Self {
        let mut command = Command::new(WARREN);
        let mut mappings = Vec::new();
        let mut hand = |parent_fd: OwnedFd, child_fd| mappings.push(FdMapping { parent_fd, child_fd });
        let stderr = if matches!(handed, Handed::Nothing) { Stdio::piped() } else { Stdio::null() };
        match handed {
            Handed::Nothing => {}
            Handed::Device(device) => hand(device.into(), DESCRIPTOR),
            Handed::Link(link) => {
                command.env("WARREN_LINK_FD", DESCRIPTOR.to_string());
                hand(link.into(), DESCRIPTOR);
            }
            Handed::DeviceAndSockets(device, sockets) => {
                command.env("WARREN_SOCKETS_FD", SOCKETS.to_string());
                hand(device.into(), DESCRIPTOR);
                hand(sockets, SOCKETS);
            }
        }
        let mut child = command
            .args(["vpn-daemon", "run", "--rpc-read-handle", "0", "--rpc-write-handle=1", "--no-device"])
            .args(arguments)
            .env("WARREN_LOG", "debug")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .fd_mappings(mappings)
            .unwrap()
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        Self { child, stdin, stdout, decoder: Decoder::new(MAX_FRAME) }
    }

    /// One that has shaken hands.
    pub(crate) async fn greeted() -> Self {
        Self::spawn(&[], Handed::Nothing).await.greet().await
    }

    /// One with the private link of a service.
    pub(crate) async fn linked(arguments: &[&str]) -> (Self, LinkClient) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let tunnel = Self::spawn(arguments, Handed::Link(theirs)).await.greet().await;
        let link = tokio::net::UnixStream::from_std(ours).unwrap();
        (tunnel, LinkClient::connect(link).await.unwrap())
    }

    /// One that is started.
    pub(crate) async fn started(lab: &Lab) -> Self {
        let mut tunnel = Self::greeted().await;
        tunnel.start(lab).await;
        tunnel
    }

    /// One that is started in the lab with a device. Returns its address inside, too.
    pub(crate) async fn with_device(lab: &Lab, handed: Handed) -> (Self, Ipv6Addr) {
        let mut tunnel = Self::spawn(&[], handed).await.greet().await;
        tunnel.send(1, start(lab, lab.token(), DESCRIPTOR)).await;
        let mut address = None;
        loop {
            let message = tunnel.frame().await;
            match message.msg {
                Some(Msg::NetworkSettings(settings)) => {
                    let agreed = NetworkSettingsResponse { success: true, error_message: String::new() };
                    let id = message.rpc.unwrap().msg_id;
                    tunnel.respond(id, Order::NetworkSettings(agreed)).await;
                    let addresses = settings.ipv6_settings.unwrap().addrs;
                    address = Some(addresses[0].split('/').next().unwrap().parse().unwrap());
                }
                Some(Msg::Start(response)) => {
                    assert!(response.success, "{response:?}");
                    return (tunnel, address.expect("settings before the answer"));
                }
                _ => {}
            }
        }
    }

    /// Starts it in the lab.
    pub(crate) async fn start(&mut self, lab: &Lab) {
        self.send(1, start(lab, lab.token(), 0)).await;
        let response = self.start_response(1).await;
        assert!(response.success, "{response:?}");
    }

    /// Shakes hands.
    pub(crate) async fn greet(mut self) -> Self {
        self.write(OUR_LINE).await;
        assert_eq!(self.read_exactly(ITS_LINE.len()).await, ITS_LINE);
        self
    }

    /// So many bytes as they come; only before the first message.
    pub(crate) async fn read_exactly(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        timeout(LIMIT, self.stdout.read_exact(&mut bytes)).await.unwrap().unwrap();
        bytes
    }

    /// Its peak memory so far, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        peak_memory(self.child.id().unwrap()).unwrap()
    }

    /// Writes bytes as they are.
    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).await.unwrap();
    }

    /// Writes bytes as they are, to a tunnel that may be gone.
    pub(crate) async fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(stdin) = &mut self.stdin else { return Err(io::ErrorKind::NotConnected.into()) };
        stdin.write_all(bytes).await
    }

    /// Sends a request.
    pub(crate) async fn send(&mut self, id: u64, order: Order) {
        self.put(ManagerMessage { rpc: Some(Rpc::request(id)), msg: Some(order) }).await;
    }

    /// Sends a response.
    pub(crate) async fn respond(&mut self, id: u64, order: Order) {
        self.put(ManagerMessage { rpc: Some(Rpc::response(id)), msg: Some(order) }).await;
    }

    /// Sends a message.
    pub(crate) async fn put(&mut self, message: ManagerMessage) {
        self.write(&frame::encode(&message).unwrap()).await;
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<TunnelMessage> {
        let mut piece = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next().unwrap() {
                return Some(message);
            }
            let length =
                timeout(LIMIT, self.stdout.read(&mut piece)).await.expect("a frame in time").unwrap();
            if length == 0 {
                assert!(self.decoder.is_between_frames());
                return None;
            }
            self.decoder.extend(&piece[..length]);
        }
    }

    /// The next message.
    pub(crate) async fn frame(&mut self) -> TunnelMessage {
        self.next().await.expect("a frame, not the end")
    }

    /// Every frame up to the end of the stream.
    pub(crate) async fn rest(&mut self) -> Vec<TunnelMessage> {
        let mut frames = Vec::new();
        while let Some(frame) = self.next().await {
            frames.push(frame);
        }
        frames
    }

    /// The answer to a start, past everything that is told meanwhile.
    pub(crate) async fn start_response(&mut self, id: u64) -> StartResponse {
        loop {
            let message = self.frame().await;
            if let Some(Msg::Start(response)) = message.msg {
                assert_eq!(message.rpc, Some(Rpc::response(id)));
                return response;
            }
        }
    }

    /// Waits until an agent has answered a ping.
    pub(crate) async fn pinged(&mut self) {
        let is_ping = |message: TunnelMessage| match message.msg {
            Some(Msg::PeerUpdate(update)) => {
                update.upserted_agents.iter().any(|agent| agent.last_ping.is_some())
            }
            _ => false,
        };
        while !is_ping(self.frame().await) {}
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end; returns its exit status.
    pub(crate) async fn exit(&mut self) -> i32 {
        let status = timeout(LIMIT, self.child.wait()).await.expect("an end in time").unwrap();
        status.code().unwrap_or_else(|| panic!("{status}"))
    }

    /// Everything it said on stderr.
    pub(crate) async fn stderr(&mut self) -> Vec<u8> {
        let mut text = Vec::new();
        self.child.stderr.take().unwrap().read_to_end(&mut text).await.unwrap();
        text
    }
}

/// A deployment with one agent.
pub(crate) async fn lab() -> Lab {
    Lab::start(LabOptions { agents: 1, ..LabOptions::default() }).await.unwrap()
}

/// What starts a tunnel in the lab.
pub(crate) fn start(lab: &Lab, token: &str, descriptor: i32) -> Order {
    Order::Start(StartRequest {
        coder_url: lab.url().to_owned(),
        api_token: token.to_owned(),
        tunnel_file_descriptor: descriptor,
        ..StartRequest::default()
    })
}

/// The answer to a request.
pub(crate) fn answer(id: u64, msg: Msg) -> TunnelMessage {
    TunnelMessage { rpc: Some(Rpc::response(id)), msg: Some(msg) }
}

/// The lines of a text.
pub(crate) fn lines(text: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(text).lines().map(str::to_owned).collect()
}
