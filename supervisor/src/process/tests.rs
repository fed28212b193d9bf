use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

struct Bench {
    folder: TempDir,
    slot: Slot,
    log: LogRing,
    spawner: Spawner,
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            slot: Slot::default(),
            log: LogRing::default(),
            spawner: Spawner::start(Handle::current()).unwrap(),
        }
    }

    /// A shell script in the place of a foreign tunnel.
    fn script(&self, body: &str) -> PathBuf {
        let path = self.folder.path().join("tunnel");
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        path
    }

    async fn run(&self, body: &str) -> (Process, Pipes) {
        self.launch(self.script(body), None).await.unwrap()
    }

    async fn launch(&self, path: PathBuf, device: Option<OwnedFd>) -> Result<(Process, Pipes), SpawnError> {
        let launch =
            Launch { program: Program::Foreign(path), arguments: Vec::new(), device, variables: Vec::new() };
        let slot = self.slot.acquire(LIMIT).await.unwrap();
        Process::spawn(launch, &self.spawner, slot, &self.log, vec!["hunter2".into()]).await
    }
}

#[tokio::test]
async fn a_child_speaks_over_the_descriptors_it_was_told() {
    let bench = Bench::new();
    let (process, mut pipes) = bench.run("read line <&3; echo \"$1 $2 $line\" >&4").await;
    pipes.to_child.write_all(b"hello\n").await.unwrap();
    let mut heard = String::new();
    pipes.from_child.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "vpn-daemon run hello\n");
    assert_eq!(process.exited_within(LIMIT).await, Some(Exit::Code(0)));
}

#[tokio::test]
async fn a_child_has_the_named_descriptors_and_no_others() {
    let bench = Bench::new();
    // Opened without the flag that would close it, as a library might.
    let stray = fs::File::open("/dev/null").unwrap();
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).unwrap();
    super::hardening::harden(super::hardening::Gains::Foreign);
    let device = fs::File::open("/dev/zero").unwrap();
    let script = bench.script("ls /proc/$$/fd >&4");
    let (_process, mut pipes) = bench.launch(script, Some(device.into())).await.unwrap();
    let mut heard = String::new();
    pipes.from_child.read_to_string(&mut heard).await.unwrap();
    let numbers: Vec<i32> = heard.lines().map(|line| line.parse().unwrap()).collect();
    // The shell reads its script from a descriptor above 9.
    let named: Vec<_> = numbers.into_iter().filter(|number| *number < 10).collect();
    assert_eq!(named, [0, 1, 2, READ, WRITE, DEVICE]);
    drop(stray);
}

#[tokio::test]
async fn a_child_knows_only_the_variables_it_needs() {
    let bench = Bench::new();
    let (_process, mut pipes) = bench.run("/usr/bin/env >&4").await;
    let mut heard = String::new();
    pipes.from_child.read_to_string(&mut heard).await.unwrap();
    assert!(heard.contains("CODER_VPN_DAEMON_RPC_READ_HANDLE=3\n"), "{heard}");
    assert!(heard.contains("CODER_VPN_DAEMON_RPC_WRITE_HANDLE=4\n"), "{heard}");
    assert!(!heard.contains("HOME=") && !heard.contains("CARGO"), "{heard}");
}

#[tokio::test]
async fn what_a_child_says_on_stderr_is_kept_without_secrets() {
    let bench = Bench::new();
    let (process, _pipes) = bench.run("echo one >&2; echo token hunter2 >&2; exit 3").await;
    assert_eq!(process.exited_within(LIMIT).await, Some(Exit::Code(3)));
    process.heard_out(LIMIT).await;
    assert_eq!(bench.log.lines().iter().map(|it| &**it).collect::<Vec<_>>(), ["one", "token [redacted]"]);
}

#[tokio::test]
async fn a_child_that_ignores_the_polite_signal_is_killed() {
    let bench = Bench::new();
    let (process, mut pipes) = bench.run("trap '' TERM; echo up >&4; while :; do sleep 1; done").await;
    pipes.from_child.read_u8().await.unwrap();
    assert_eq!(process.end(Duration::from_millis(100)).await, Exit::Signal(9));
}

#[tokio::test]
async fn a_child_that_minds_the_polite_signal_is_not_killed() {
    let bench = Bench::new();
    let (process, mut pipes) =
        bench.run("trap 'exit 7' TERM; echo up >&4; while :; do sleep 0.05; done").await;
    pipes.from_child.read_u8().await.unwrap();
    assert_eq!(process.end(LIMIT).await, Exit::Code(7));
}

#[tokio::test]
async fn the_next_child_waits_until_the_last_is_reaped_and_nobody_needs_to_say_so() {
    let bench = Bench::new();
    let (process, _pipes) = bench.run("while :; do sleep 1; done").await;
    let pid = process.pid();
    assert!(bench.slot.acquire(Duration::from_millis(10)).await.is_none());

    drop(process);

    let _slot = bench.slot.acquire(LIMIT).await.unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test]
async fn a_program_that_is_missing_is_named() {
    let bench = Bench::new();
    let error = bench.launch("/nonexistent/tunnel".into(), None).await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent/tunnel") && error.contains("No such file"), "{error}");
    assert!(bench.slot.acquire(LIMIT).await.is_some());
}
