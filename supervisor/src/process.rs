//! The tunnel as a child process: how it is started, heard, told to stop, killed and reaped.
//!
//! ```text
//!  service                               tunnel
//!  Pipes::to_child   ──── pipe ────>  descriptor 3   leg A
//!  Pipes::from_child <─── pipe ─────  descriptor 4
//!  Pipes::link       <─ socketpair ─> descriptor 5   our own program only
//!  device            ── inherited ──> descriptor 6   where the service owns the network
//!  Pipes::sockets    <─ socketpair ─> descriptor 7   our own program only
//!  LogRing           <─── pipe ─────  descriptor 2
//! ```
//!
//! The reaper task alone waits for the child, and alone signals it: a number is never signalled after it
//! was reaped. It belongs to nobody who can crash. Whoever holds a [`Process`] holds the child: with the
//! last clone it is killed. There is one [`Slot`], so that two children never read one device.

use std::{
    ffi::OsString,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, mpsc::SyncSender},
    thread,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal};
use secrecy::SecretString;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use warren_actors::speaker::descriptors::{Descriptors, ReadEnd, WriteEnd};

use crate::link::SocketChannel;

pub mod binary;
mod exit;
pub mod hardening;
mod log_ring;
pub mod output;

pub use exit::Exit;
pub use log_ring::LogRing;

/// What the child reads leg A from.
const READ: i32 = 3;
/// What the child writes leg A to.
const WRITE: i32 = 4;
/// The child's end of the private link.
const LINK: i32 = 5;
/// The device, and what `StartRequest` says of it.
pub const DEVICE: i32 = 6;
/// The child's end of the channel by which it asks for UDP sockets.
const SOCKETS: i32 = 7;

/// Variables that any child may know: proxies and certificates.
const KEPT_VARIABLES: &[&str] = &[
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];
/// Variables that mean something to our own program only.
const OWN_VARIABLES: &[&str] = &["RUST_BACKTRACE", "WARREN_LOG"];

/// How long a killed child may take to be gone; one that is stuck in the kernel can take longer.
const KILLED: Duration = Duration::from_secs(5);

/// Which program the child is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// This program in its tunnel role: no privileges, and a private link.
    Own,
    /// Another tunnel program, which owns the network and keeps our privileges.
    Foreign(PathBuf),
}

/// How to start one child.
#[derive(Debug)]
pub struct Launch {
    /// Which program.
    pub program: Program,
    /// What follows `vpn-daemon run` on its command line.
    pub arguments: Vec<OsString>,
    /// The device it is given.
    pub device: Option<OwnedFd>,
    /// Variables besides the kept ones.
    pub variables: Vec<(&'static str, OsString)>,
}

/// Our ends of what joins us to a child.
#[derive(Debug)]
pub struct Pipes {
    /// Leg A, from the child.
    pub from_child: ReadEnd,
    /// Leg A, to the child.
    pub to_child: WriteEnd,
    /// The private link.
    pub link: Option<UnixStream>,
    /// Where it asks for UDP sockets.
    pub sockets: Option<SocketChannel>,
}

/// Why there is no child.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The program cannot be run.
    #[error("cannot start the tunnel program {program}: {error}")]
    Exec {
        /// Which.
        program: String,
        /// What the system said.
        error: io::Error,
    },
    /// There are no descriptors, no memory or no thread to do it.
    #[error("cannot prepare the tunnel process: {0}")]
    Prepare(#[from] io::Error),
}

/// The right to have a child. There is one.
#[derive(Debug, Clone)]
pub struct Slot(Arc<Semaphore>);

impl Default for Slot {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl Slot {
    /// Waits until the last child has been reaped. `None` if that takes longer than `limit`.
    pub async fn acquire(&self, limit: Duration) -> Option<OwnedSemaphorePermit> {
        timeout(limit, Arc::clone(&self.0).acquire_owned()).await.ok()?.ok()
    }
}

/// A thread that lives as long as the service and starts every child: the signal that a child gets when
/// its parent dies follows the thread that started it, and a runtime's threads come and go.
#[derive(Debug, Clone)]
pub struct Spawner {
    jobs: SyncSender<Job>,
}

#[derive(Debug)]
struct Job {
    command: Command,
    done: oneshot::Sender<io::Result<Child>>,
}

impl Spawner {
    /// Starts the thread. Children are waited for on `runtime`.
    pub fn start(runtime: Handle) -> io::Result<Self> {
        // One at a time is all that the slot allows.
        let (jobs, queue) = std::sync::mpsc::sync_channel::<Job>(1);
        thread::Builder::new().name("spawner".into()).spawn(move || {
            let _runtime = runtime.enter();
            while let Ok(mut job) = queue.recv() {
                let _ = job.done.send(job.command.spawn());
            }
        })?;
        Ok(Self { jobs })
    }

    async fn spawn(&self, command: Command) -> io::Result<Child> {
        let gone = || io::Error::other("the thread that starts processes is busy or gone");
        let (done, spawned) = oneshot::channel();
        self.jobs.try_send(Job { command, done }).map_err(|_| gone())?;
        spawned.await.map_err(|_| gone())?
    }
}

/// A child process. The last clone takes it with it.
#[derive(Debug, Clone)]
pub struct Process {
    pid: u32,
    exit: watch::Receiver<Option<Exit>>,
    signals: mpsc::Sender<Signal>,
    heard_out: CancellationToken,
    _life: Arc<DropGuard>,
}

impl Process {
    /// Starts a child, which keeps `slot` until it is reaped. What it says on stderr goes to `log`,
    /// without `secrets`.
    pub async fn spawn(
        launch: Launch,
        spawner: &Spawner,
        slot: OwnedSemaphorePermit,
        log: &LogRing,
        secrets: Vec<SecretString>,
    ) -> Result<(Self, Pipes), SpawnError> {
        let program = launch.program.clone();
        let (command, pipes) = prepare(launch)?;
        let mut child = spawner.spawn(command).await.map_err(|error| SpawnError::Exec {
            program: match program {
                Program::Own => "(this one)".to_owned(),
                Program::Foreign(path) => path.display().to_string(),
            },
            error,
        })?;
        let heard_out = CancellationToken::new();
        if let Some(stderr) = child.stderr.take() {
            let (log, guard) = (log.clone(), heard_out.clone().drop_guard());
            tokio::spawn(async move {
                log.follow(stderr, &secrets).await;
                drop(guard);
            });
        }
        let pid = child.id().unwrap_or_default();
        let (signals, orders) = mpsc::channel(4);
        let (exited, exit) = watch::channel(None);
        let life = CancellationToken::new();
        tokio::spawn(reap(child, orders, life.clone(), exited, slot));
        Ok((Self { pid, exit, signals, heard_out, _life: Arc::new(life.drop_guard()) }, pipes))
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits until it has ended and was reaped.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::Unknown),
            Err(_) => Exit::Unknown,
        }
    }

    /// As [`Self::exited`], at most for `limit`.
    pub async fn exited_within(&self, limit: Duration) -> Option<Exit> {
        timeout(limit, self.exited()).await.ok()
    }

    /// Waits until everything it said on stderr has been read. A grandchild that holds the descriptor
    /// would make that never: at most for `limit`.
    pub async fn heard_out(&self, limit: Duration) {
        let _ = timeout(limit, self.heard_out.cancelled()).await;
    }

    /// Ends it for certain: SIGTERM, `grace`, SIGKILL. Returns how it ended.
    pub async fn end(&self, grace: Duration) -> Exit {
        for (signal, limit) in [(Signal::TERM, grace), (Signal::KILL, KILLED)] {
            if self.exit().is_none() {
                let _ = self.signals.try_send(signal);
            }
            if let Some(exit) = self.exited_within(limit).await {
                return exit;
            }
            tracing::warn!(pid = self.pid, ?signal, "the tunnel process did not end in time");
        }
        Exit::Unknown
    }

    /// Kills it at once. Returns how it ended.
    pub async fn kill(&self) -> Exit {
        let _ = self.signals.try_send(Signal::KILL);
        self.exited_within(KILLED).await.unwrap_or(Exit::Unknown)
    }
}

async fn reap(
    mut child: Child,
    mut orders: mpsc::Receiver<Signal>,
    life: CancellationToken,
    exited: watch::Sender<Option<Exit>>,
    slot: OwnedSemaphorePermit,
) {
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Some(signal) = orders.recv() => {
                // A pid only as long as it is not reaped, and only this task reaps.
                if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
                    let _ = rustix::process::kill_process(pid, signal);
                }
            }
            () = life.cancelled() => {
                let _ = child.start_kill();
                break child.wait().await;
            }
        }
    };
    let exit = status.map_or(Exit::Unknown, Exit::from);
    drop(slot);
    exited.send_replace(Some(exit));
}

fn prepare(launch: Launch) -> io::Result<(Command, Pipes)> {
    let (child_reads, we_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (we_read, child_writes) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let mut mappings = vec![
        FdMapping { parent_fd: child_reads, child_fd: READ },
        FdMapping { parent_fd: child_writes, child_fd: WRITE },
    ];
    let mut command = match &launch.program {
        Program::Own => Command::new("/proc/self/exe"),
        Program::Foreign(path) => Command::new(path),
    };
    command.args(["vpn-daemon", "run"]).args(&launch.arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    command.env_clear();
    let own: &[_] = if launch.program == Program::Own { OWN_VARIABLES } else { &[] };
    for name in KEPT_VARIABLES.iter().chain(own) {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.envs(launch.variables);
    command.env("CODER_VPN_DAEMON_RPC_READ_HANDLE", READ.to_string());
    command.env("CODER_VPN_DAEMON_RPC_WRITE_HANDLE", WRITE.to_string());
    let (link, sockets) = match launch.program {
        Program::Own => {
            let (link, theirs) = std::os::unix::net::UnixStream::pair()?;
            link.set_nonblocking(true)?;
            mappings.push(FdMapping { parent_fd: theirs.into(), child_fd: LINK });
            command.env("WARREN_LINK_FD", LINK.to_string());
            let (sockets, theirs) = SocketChannel::pair()?;
            mappings.push(FdMapping { parent_fd: theirs, child_fd: SOCKETS });
            command.env("WARREN_SOCKETS_FD", SOCKETS.to_string());
            (Some(UnixStream::from_std(link)?), Some(sockets))
        }
        Program::Foreign(_) => {
            // It looks for the tools of the host's network.
            command.env(
                "PATH",
                std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()),
            );
            (None, None)
        }
    };
    if let Some(device) = launch.device {
        mappings.push(FdMapping { parent_fd: device, child_fd: DEVICE });
    }
    command.fd_mappings(mappings).map_err(io::Error::other)?;
    hardening::confine(&mut command, &launch.program);
    let ends = Descriptors::from((we_read, we_write)).open().map_err(io::Error::other)?;
    Ok((command, Pipes { from_child: ends.0, to_child: ends.1, link, sockets }))
}

#[cfg(test)]
mod tests;
