//! A tunnel as the deployed one is on Linux (vpn-protocol 1.2, 6, 15): it owns its network, handles one request at a
//! time, fails a second Start, answers what it does not know with nothing, survives its Stop and its manager, and
//! never ends by itself. A process of its own: this test program again, by way of a small script.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::{
        fd::{FromRawFd, RawFd},
        unix::fs::PermissionsExt,
    },
    path::PathBuf,
    process::Command,
    thread,
};

use prost::Message;
use serde_json::{Value, json};
use warren_proto::vpn::{
    self, ManagerMessage, Rpc, TunnelMessage, manager_message::Msg as Order, tunnel_message::Msg,
};

use super::codec::{Greeting, greet, put, take};

const MODE: &str = "FOREIGN_TUNNEL";
const RECORD: &str = "FOREIGN_TUNNEL_RECORD";
const ARGUMENTS: &str = "FOREIGN_TUNNEL_ARGUMENTS";
/// The test that is the process.
const ENTRY: &str = "the_foreign_tunnel";

/// A program to be named in `tunnel.binary`, and what its processes have done.
pub(crate) struct ForeignTunnel {
    folder: tempfile::TempDir,
}

impl ForeignTunnel {
    /// A program that behaves so.
    pub(crate) fn new(mode: &str) -> Self {
        let tunnel = Self { folder: tempfile::tempdir().unwrap() };
        tunnel.change_mode(mode);
        tunnel
    }

    /// Makes its next process behave so.
    pub(crate) fn change_mode(&self, mode: &str) {
        let (new, source) = (self.folder.path().join("new"), self.folder.path().join("source"));
        let body = format!(
            "#!/bin/sh\n\
             if [ \"$1\" = version ]; then echo '{{\"version\":\"v2.31.1+foreign\"}}'; exit; fi\n\
             export {MODE}={mode} {RECORD}={} {ARGUMENTS}=\"$*\"\n\
             exec {} --ignored --exact --nocapture {ENTRY}\n",
            self.folder.path().join("record").display(),
            std::env::current_exe().unwrap().display()
        );
        fs::write(&source, body).unwrap();
        // By another process: what somebody has open for writing cannot be run.
        assert!(Command::new("cp").args([&source, &new]).status().unwrap().success());
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, self.path()).unwrap();
    }

    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("coder-vpn")
    }

    /// The configuration of a service that runs it.
    pub(crate) fn config(&self) -> String {
        format!("[tunnel]\nbinary = \"{}\"\n", self.path().display())
    }

    /// Everything its processes have done, in order.
    pub(crate) fn record(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.path().join("record")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// What they have heard and done, as words.
    pub(crate) fn events(&self) -> Vec<String> {
        self.record().iter().map(|entry| entry["event"].as_str().unwrap().to_owned()).collect()
    }

    /// Their process ids, in the order of their begin.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let begins = self.record().into_iter().filter(|entry| entry["event"] == "begin");
        begins.map(|entry| entry["pid"].as_u64().unwrap() as u32).collect()
    }
}

/// Lives as the process; returns only where this is not one.
pub(crate) fn play() {
    let Ok(mode) = std::env::var(MODE) else { return };
    let descriptors: Vec<RawFd> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    let record = Record { path: std::env::var_os(RECORD).unwrap().into() };
    let is_own = |name: &str| name.starts_with(MODE);
    let variables: Vec<String> =
        std::env::vars().map(|(name, _)| name).filter(|name| !is_own(name)).collect();
    record.note(json!({
        "event": "begin", "arguments": std::env::var(ARGUMENTS).unwrap(),
        "variables": variables, "descriptors": descriptors,
    }));
    let number = |name: &str| std::env::var(name).unwrap().parse::<RawFd>().unwrap();
    // SAFETY: this process was given both, and nobody else in it knows them.
    let mut read = unsafe { File::from_raw_fd(number("CODER_VPN_DAEMON_RPC_READ_HANDLE")) };
    // SAFETY: as above.
    let mut write = unsafe { File::from_raw_fd(number("CODER_VPN_DAEMON_RPC_WRITE_HANDLE")) };
    match mode.as_str() {
        "mute" => {}
        "closes-at-once" => drop((read, write)),
        _ => {
            let version = if mode == "old" { "1.1" } else { "1.3" };
            let own = format!("codervpn tunnel {version}\n");
            let theirs = greet(&mut read, &mut write, &own, Greeting::Speaks).unwrap();
            record.note(json!({ "event": "greeted", "line": theirs }));
            Tunnel { mode, record, write, starts: 0 }.serve(read);
        }
    }
    // Nobody ends it but a signal.
    loop {
        thread::park();
    }
}

struct Record {
    path: PathBuf,
}

impl Record {
    fn note(&self, mut entry: Value) {
        entry["pid"] = json!(std::process::id());
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path).unwrap();
        file.write_all(format!("{entry}\n").as_bytes()).unwrap();
    }

    /// Whether this is the first call of any process.
    fn is_first(&self, what: &str) -> bool {
        File::create_new(self.path.with_file_name(what)).is_ok()
    }
}

struct Tunnel {
    mode: String,
    record: Record,
    write: File,
    starts: u32,
}

impl Tunnel {
    fn serve(mut self, mut read: File) {
        while let Ok(Some(payload)) = take(&mut read) {
            let message = ManagerMessage::decode(&payload[..]).unwrap();
            let rpc = message.rpc.unwrap_or_default();
            let id = rpc.msg_id;
            match message.msg {
                Some(Order::Start(start)) => self.start(id, &start),
                Some(Order::GetPeerUpdate(_)) => self.tell_everything(id),
                Some(Order::Wake(_)) => self.respond(id, Some(Msg::Wake(vpn::WakeResponse {}))),
                Some(Order::Stop(_)) => {
                    self.record.note(json!({ "event": "stop" }));
                    let stopped = vpn::StopResponse { success: true, error_message: String::new() };
                    if self.mode != "deaf-to-stop" {
                        self.respond(id, Some(Msg::Stop(stopped)));
                        // The write end at once; the other one with whoever is blocked on it.
                        return;
                    }
                }
                Some(Order::NetworkSettings(answer)) => {
                    let (success, error) = (answer.success, answer.error_message);
                    self.record.note(json!({ "event": "settings", "success": success, "error": error }));
                }
                None => self.respond(id, None),
            }
        }
        self.record.note(json!({ "event": "eof" }));
    }

    fn start(&mut self, id: u64, start: &vpn::StartRequest) {
        self.starts += 1;
        self.record.note(json!({
            "event": "start", "url": start.coder_url, "token": start.api_token,
            "descriptor": start.tunnel_file_descriptor, "device_id": start.device_id,
            "device_os": start.device_os, "version": start.coder_desktop_version,
        }));
        let answer =
            |error: &str| vpn::StartResponse { success: error.is_empty(), error_message: error.into() };
        if self.starts > 1 {
            let text =
                "failed to create networking stack dependencies: create tun device: device or resource busy";
            return self.respond(id, Some(Msg::Start(answer(text))));
        }
        match self.mode.clone().as_str() {
            "fails-once" if self.record.is_first("failed") => {
                self.respond(id, Some(Msg::Start(answer("failed to start connection: get user: nope"))));
            }
            "closes-at-start" => self.write = File::open("/dev/null").unwrap(),
            "half-a-frame" => {
                self.write.write_all(&[0, 0, 0, 9, 10]).unwrap();
                self.write = File::open("/dev/null").unwrap();
            }
            "too-large" => self.write.write_all(&[1, 0, 0, 1]).unwrap(),
            "silent" => {}
            mode => {
                let (is_chatty, leaves, has_gap) = (mode == "chatty", mode == "leaves", mode == "gap");
                if is_chatty {
                    self.chat();
                }
                if leaves {
                    self.leave_things();
                }
                self.tell(None, workspaces(1));
                self.respond(id, Some(Msg::Start(answer(""))));
                if has_gap {
                    let stray = vpn::Agent { workspace_id: vec![99; 16].into(), ..agent(7, "stray") };
                    let update = vpn::PeerUpdate { upserted_agents: vec![stray], ..Default::default() };
                    self.tell(None, update);
                }
                if mode == "in-order" {
                    self.rename_often();
                }
            }
        }
    }

    /// Everything that a manager must bear: log lines, answers that nobody waits for, requests that make no
    /// sense here, and a message without content.
    fn chat(&mut self) {
        let line =
            vpn::Log { message: "hello".into(), logger_names: vec!["vpn".into()], ..Default::default() };
        self.put(&TunnelMessage { rpc: None, msg: Some(Msg::Log(line)) });
        let stopped = vpn::StopResponse { success: true, error_message: String::new() };
        self.respond(4711, Some(Msg::Stop(stopped)));
        self.respond(4711, None);
        self.put(&TunnelMessage { rpc: Some(Rpc { msg_id: 1, response_to: 0 }), msg: None });
        self.put(&TunnelMessage { rpc: Some(Rpc::default()), msg: Some(Msg::Wake(vpn::WakeResponse {})) });
        let settings = vpn::NetworkSettingsRequest { mtu: 1280, ..Default::default() };
        let rpc = Some(Rpc { msg_id: 2, response_to: 0 });
        self.put(&TunnelMessage { rpc, msg: Some(Msg::NetworkSettings(settings)) });
    }

    /// What a tunnel of this make puts on the host, and in some cases leaves there.
    fn leave_things(&self) {
        for line in [
            "tuntap add dev coder0 mode tun",
            "-6 addr add fd60:627a:a42b::7/128 dev coder0",
            "link set coder0 up",
            "rule add priority 5270 table 52",
            "-6 rule add priority 5210 table 52",
        ] {
            let done = Command::new("ip").args(line.split(' ')).output().unwrap();
            let error = String::from_utf8_lossy(&done.stderr).into_owned();
            self.record
                .note(json!({ "event": "ip", "line": line, "done": done.status.success(), "error": error }));
        }
    }

    /// One agent that is renamed and renamed; the last name counts.
    fn rename_often(&mut self) {
        for number in 0..500 {
            let renamed = agent(1, &format!("name-{number}"));
            self.tell(None, vpn::PeerUpdate { upserted_agents: vec![renamed], ..Default::default() });
        }
    }

    fn tell_everything(&mut self, id: u64) {
        self.record.note(json!({ "event": "get-peer-update" }));
        if self.starts == 0 {
            // The reference dereferences a connection that is not there.
            std::process::abort();
        }
        self.tell(Some(id), workspaces(2));
    }

    fn tell(&mut self, id: Option<u64>, update: vpn::PeerUpdate) {
        let rpc = id.map(|id| Rpc { msg_id: 0, response_to: id });
        self.put(&TunnelMessage { rpc, msg: Some(Msg::PeerUpdate(update)) });
    }

    fn respond(&mut self, id: u64, msg: Option<Msg>) {
        self.put(&TunnelMessage { rpc: Some(Rpc { msg_id: 0, response_to: id }), msg });
    }

    /// A manager that is gone is not noticed.
    fn put(&mut self, message: &TunnelMessage) {
        let _ = put(&mut self.write, message);
    }
}

/// So many workspaces with one agent each.
fn workspaces(count: u8) -> vpn::PeerUpdate {
    let workspace = |number: u8| vpn::Workspace {
        id: vec![number; 16].into(),
        name: format!("dev{number}"),
        status: vpn::workspace::Status::Running.into(),
    };
    vpn::PeerUpdate {
        upserted_workspaces: (1..=count).map(workspace).collect(),
        upserted_agents: (1..=count).map(|number| agent(number, "main")).collect(),
        ..Default::default()
    }
}

fn agent(number: u8, name: &str) -> vpn::Agent {
    vpn::Agent {
        id: vec![number + 100; 16].into(),
        name: name.to_owned(),
        workspace_id: vec![number; 16].into(),
        fqdn: vec![format!("{name}.dev{number}.me.coder.")],
        ip_addrs: vec![format!("fd60:627a:a42b::{number}")],
        ..Default::default()
    }
}
