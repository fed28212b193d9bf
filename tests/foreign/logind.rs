//! A bus as distributions have it, and logind on it as far as our service is concerned: it says that a sleep is over.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde::Serialize;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use zbus::{Connection, Message, connection::Builder, zvariant::DynamicType};

use crate::{
    isolated::{bring_up, isolated},
    support::{Deployment, ServiceProcess, WARREN, eventually, skipped},
};

const NAME: &str = "org.freedesktop.login1";
/// What the service logs once it listens, and when it is said what it does not know.
const LISTENS: &str = "what logind says of sleep is heard";
const NONSENSE: &str = "logind says something else of sleep";

#[test]
fn the_end_of_a_sleep_is_heard_from_logind_and_from_nobody_else_and_by_a_bus_that_was_started_anew() {
    if Command::new("dbus-daemon").arg("--version").output().is_err() {
        return skipped("what logind says over a real bus", "dbus-daemon is missing");
    }
    isolated(|| {
        bring_up("lo");
        let mut bus = Bus::start();
        let deployment = Deployment::start(1);
        let mut warren = Command::new(WARREN);
        warren.env("DBUS_SYSTEM_BUS_ADDRESS", bus.address());
        let service = ServiceProcess::start_by(warren, "");
        service.connect(&deployment);
        let count = |what: &str| service.log().matches(what).count();
        let told = || count("the machine has slept; the tunnel is told");
        eventually("the service listens", || count(LISTENS) == 1);

        let (logind, stranger) = (bus.visitor(Some(NAME)), bus.visitor(None));
        bus.say(&stranger, None, &false);
        for everybody in bus.everybody() {
            bus.say(&stranger, Some(&everybody), &false);
        }
        bus.say(&logind, None, &true);
        bus.say(&logind, None, &"good night");
        eventually("all of that has passed", || count(NONSENSE) == 1);
        assert_eq!(count("somebody who is not logind speaks of sleep"), 1, "{}", service.log());
        assert_eq!(told(), 0, "{}", service.log());

        bus.say(&logind, None, &false);
        eventually("the end of a sleep is told", || told() == 1);
        eventually("the tunnel has heard it", || count("every connection has to show that it is alive") == 1);

        bus.start_anew();
        let logind = bus.visitor(Some(NAME));
        eventually("the service listens again", || count(LISTENS) == 2);
        bus.say(&logind, None, &"good night");
        eventually("logind is heard again", || count(NONSENSE) == 2);
    });
}

/// The system's bus of a small system.
struct Bus {
    daemon: Child,
    folder: TempDir,
    runtime: Runtime,
}

impl Bus {
    fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("warren-bus-").tempdir().unwrap();
        let config = format!(
            "<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>\
             <policy context=\"default\"><allow own=\"*\"/><allow send_type=\"signal\"/>\
             <allow send_destination=\"*\"/><allow receive_sender=\"*\"/></policy></busconfig>",
            socket(folder.path()).display()
        );
        std::fs::write(folder.path().join("bus.conf"), config).unwrap();
        let runtime = Runtime::new().unwrap();
        Self { daemon: daemon(folder.path()), folder, runtime }
    }

    fn start_anew(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
        std::fs::remove_file(socket(self.folder.path())).unwrap();
        self.daemon = daemon(self.folder.path());
    }

    fn address(&self) -> String {
        format!("unix:path={}", socket(self.folder.path()).display())
    }

    /// Somebody on the bus, with a name or without.
    fn visitor(&self, name: Option<&'static str>) -> Connection {
        let mut visitor = Builder::address(self.address().as_str());
        if let Some(name) = name {
            visitor = visitor.name(name);
        }
        self.runtime.block_on(visitor.build()).unwrap()
    }

    /// By what the bus itself calls them.
    fn everybody(&self) -> Vec<String> {
        let visitor = self.visitor(None);
        let all = self.runtime.block_on(ask(&visitor, "ListNames")).body().deserialize::<Vec<String>>();
        all.unwrap().into_iter().filter(|name| name.starts_with(':')).collect()
    }

    /// What logind says of sleep, to all or to one, whoever says it. It has passed the bus by then.
    fn say(&self, visitor: &Connection, to: Option<&str>, what: &(impl Serialize + DynamicType + Sync)) {
        let (path, interface) = ("/org/freedesktop/login1", "org.freedesktop.login1.Manager");
        self.runtime.block_on(async {
            visitor.emit_signal(to, path, interface, "PrepareForSleep", what).await.unwrap();
            ask(visitor, "GetId").await;
        });
    }
}

/// What the bus itself is asked without anything more to say.
async fn ask(visitor: &Connection, what: &str) -> Message {
    let (bus, itself) = (Some("org.freedesktop.DBus"), "/org/freedesktop/DBus");
    visitor.call_method(bus, itself, bus, what, &()).await.unwrap()
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("bus.sock")
}

/// Starts the daemon, and waits until it listens.
fn daemon(folder: &Path) -> Child {
    let mut daemon = Command::new("dbus-daemon")
        .args(["--nofork", "--nopidfile", "--nosyslog", "--config-file"])
        .arg(folder.join("bus.conf"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the bus listens", || {
        assert!(daemon.try_wait().unwrap().is_none(), "the bus has ended");
        std::os::unix::net::UnixStream::connect(socket(folder)).is_ok()
    });
    daemon
}
