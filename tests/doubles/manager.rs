//! A manager as deployed ones are (vpn-protocol 1.3, 11.6, 12): it spawns `vpn-daemon run`, with two anonymous pipes
//! under whatever numbers they have, and ends it in its own way.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{net::UnixDatagram, process::CommandExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::{io::FdFlags, pipe::PipeFlags};
use warren_proto::vpn::{
    ManagerMessage, NetworkSettingsResponse, Rpc, StartRequest, StartResponse, StopRequest, StopResponse,
    TunnelMessage, manager_message::Msg as Order, tunnel_message::Msg,
};

use super::codec::{Greeting, Heard, Peer, greet};
use crate::support::{LIMIT, WARREN};

/// Whose manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    /// The service of Windows, and of Linux: numbers in the environment, output redirected, killed after a stop.
    Service,
    /// The helper of macOS: numbers on the command line, a device of its own, a signal after a stop.
    Helper,
}

/// A manager and its tunnel.
pub(crate) struct Manager {
    make: Make,
    child: Child,
    peer: Peer<TunnelMessage>,
    stderr: Arc<Mutex<Vec<String>>>,
    device: Option<UnixDatagram>,
    descriptor: i32,
    /// What the tunnel said it is.
    pub(crate) line: String,
    /// How many network settings it has answered.
    pub(crate) settings: usize,
    /// Whether it answers them.
    pub(crate) answers_settings: bool,
}

/// How a tunnel ended.
pub(crate) struct Ended {
    pub(crate) answer: StopResponse,
    pub(crate) status: ExitStatus,
    /// Whether anything came after the answer.
    pub(crate) is_last: bool,
}

impl Manager {
    /// Spawns the tunnel and shakes hands.
    pub(crate) fn launch(make: Make, versions: &str, greeting: Greeting) -> Self {
        let (its_read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (read, its_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (device, its_device) = match make {
            Make::Service => (None, None),
            Make::Helper => UnixDatagram::pair().map(|(ours, theirs)| (Some(ours), Some(theirs))).unwrap(),
        };
        let numbers = [its_read.as_raw_fd(), its_write.as_raw_fd()];
        let handed: Vec<RawFd> =
            numbers.into_iter().chain(its_device.as_ref().map(AsRawFd::as_raw_fd)).collect();
        let mut command = Command::new(WARREN);
        command.args(["vpn-daemon", "run"]).stdin(Stdio::null());
        match make {
            Make::Service => {
                command.env("CODER_VPN_DAEMON_RPC_READ_HANDLE", numbers[0].to_string());
                command.env("CODER_VPN_DAEMON_RPC_WRITE_HANDLE", numbers[1].to_string());
                // Only a test without privileges needs this.
                command.arg("--no-device").stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            Make::Helper => {
                command.env_clear();
                command.args(["--rpc-read-handle", &numbers[0].to_string()]);
                command.args(["--rpc-write-handle", &numbers[1].to_string()]);
                command.stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        let inherit = move || {
            for &number in &handed {
                // SAFETY: the parent holds it open until the child is spawned.
                let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
                rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only.
        let mut child = unsafe { command.pre_exec(inherit) }.spawn().unwrap();
        let descriptor = its_device.as_ref().map_or(0, AsRawFd::as_raw_fd);
        drop((its_read, its_write, its_device));
        let stderr = Arc::default();
        if let Some(out) = child.stdout.take() {
            follow(out, Arc::clone(&stderr), "stdout");
        }
        if let Some(err) = child.stderr.take() {
            follow(err, Arc::clone(&stderr), "stderr");
        }
        let (mut read, mut write) = (File::from(read), File::from(write));
        let own = format!("codervpn manager {versions}\n");
        let line = greet(&mut read, &mut write, &own, greeting).unwrap();
        let peer = Peer::new(read, write);
        Self { make, child, peer, stderr, device, descriptor, line, settings: 0, answers_settings: true }
    }

    /// What goes over the wire, by hand.
    pub(crate) fn peer(&mut self) -> &mut Peer<TunnelMessage> {
        &mut self.peer
    }

    /// Everything the tunnel has said on its standard streams.
    pub(crate) fn said(&self) -> Vec<String> {
        self.stderr.lock().unwrap().clone()
    }

    /// The device that it gave the tunnel, which carries bare packets.
    pub(crate) fn device(&self) -> Option<&UnixDatagram> {
        self.device.as_ref()
    }

    /// Sends a request. Returns its id.
    pub(crate) fn ask(&mut self, order: Order) -> u64 {
        let id = self.peer.next_id();
        self.peer.send(&ManagerMessage { rpc: Some(Rpc { msg_id: id, response_to: 0 }), msg: Some(order) });
        id
    }

    /// Waits for the answer to a request, doing meanwhile what the make does with what else comes.
    pub(crate) fn answer_to(&mut self, id: u64) -> Msg {
        loop {
            let heard =
                self.peer.next().unwrap_or_else(|| panic!("the end, not an answer: {:#?}", self.said()));
            if heard.ids == Some((0, id)) {
                return heard.message.msg.unwrap();
            }
            self.hear(heard);
        }
    }

    /// Waits for something that the tunnel says by itself.
    pub(crate) fn wait_for(&mut self, accept: impl Fn(&TunnelMessage) -> bool) {
        loop {
            let heard = self.peer.next().unwrap_or_else(|| panic!("the end: {:#?}", self.said()));
            let is_it = accept(&heard.message);
            self.hear(heard);
            if is_it {
                return;
            }
        }
    }

    fn hear(&mut self, heard: Heard<TunnelMessage>) {
        if let (Some(Msg::NetworkSettings(_)), Some((id, 0))) = (&heard.message.msg, heard.ids) {
            self.settings += 1;
            // The helper acknowledges whatever came of it, the service never answers.
            if self.make == Make::Helper && self.answers_settings {
                let done = NetworkSettingsResponse { success: true, error_message: String::new() };
                self.peer.send(&ManagerMessage {
                    rpc: Some(Rpc { msg_id: 0, response_to: id }),
                    msg: Some(Order::NetworkSettings(done)),
                });
            }
        }
        self.peer.told.push(heard);
    }

    /// What the make sends as a start.
    pub(crate) fn start_request(&self, url: &str, token: &str) -> StartRequest {
        StartRequest {
            tunnel_file_descriptor: self.descriptor,
            coder_url: url.to_owned(),
            api_token: token.to_owned(),
            device_id: "d".to_owned(),
            device_os: "Windows".to_owned(),
            coder_desktop_version: "0.8.2.0".to_owned(),
            ..StartRequest::default()
        }
    }

    /// Starts the tunnel.
    pub(crate) fn start(&mut self, url: &str, token: &str) -> StartResponse {
        let request = self.start_request(url, token);
        let id = self.ask(Order::Start(request));
        match self.answer_to(id) {
            Msg::Start(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// Stops the tunnel as the make does, and waits for the end of the process.
    pub(crate) fn stop(mut self) -> Ended {
        let id = self.ask(Order::Stop(StopRequest {}));
        let answer = match self.answer_to(id) {
            Msg::Stop(answer) => answer,
            other => panic!("{other:?}"),
        };
        let is_last = self.peer.next().is_none();
        self.peer.close();
        if self.make == Make::Helper {
            // At once; most tunnels are gone by then, and that is no error.
            let _ = Command::new("kill")
                .args(["-TERM", &self.child.id().to_string()])
                .stderr(Stdio::null())
                .status();
        }
        Ended { answer, status: self.exit(), is_last }
    }

    /// Ends as a manager that is killed does: everything is closed at once.
    pub(crate) fn vanish(mut self) -> ExitStatus {
        self.peer.close();
        self.device = None;
        self.exit()
    }

    /// How the process ended.
    pub(crate) fn exit(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < LIMIT, "the tunnel does not end: {:#?}", self.said());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Keeps each line that is not blank, as the service's log does.
fn follow(out: impl Into<OwnedFd>, lines: Arc<Mutex<Vec<String>>>, name: &'static str) {
    let out = File::from(out.into());
    thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok).filter(|line| !line.trim().is_empty()) {
            lines.lock().unwrap().push(format!("{name}: {line}"));
        }
    });
}
