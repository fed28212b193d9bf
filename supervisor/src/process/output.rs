//! A program that is run once for what it prints, within a limit of time and size. It runs as the service does,
//! with its environment, and without its privileges.

use std::{io, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal};
use tokio::{
    io::AsyncReadExt,
    process::{Child, Command},
    time::timeout,
};

use super::{Program, Spawner, hardening};

/// Why there is no output.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The program cannot be run.
    #[error("it cannot be started: {0}")]
    Spawn(io::Error),
    /// Its output cannot be read.
    #[error("what it prints cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It took too long, or something that it started holds its output.
    #[error("it did not end within {} seconds", .0.as_secs())]
    Late(Duration),
    /// It printed too much.
    #[error("it prints more than {0} bytes")]
    TooMuch(usize),
    /// It failed.
    #[error("it failed ({0}); run it by hand as the service's user to see why")]
    Status(std::process::ExitStatus),
}

/// What `command` prints on stdout until it ends well.
pub async fn of(
    mut command: Command,
    spawner: &Spawner,
    limit: Duration,
    most: usize,
) -> Result<Vec<u8>, OutputError> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.kill_on_drop(true).process_group(0);
    hardening::confine(&mut command, &Program::Own);
    let mut group = Group(spawner.spawn(command).await.map_err(OutputError::Spawn)?);
    timeout(limit, finish(&mut group.0, most)).await.unwrap_or(Err(OutputError::Late(limit)))
}

async fn finish(child: &mut Child, most: usize) -> Result<Vec<u8>, OutputError> {
    let mut bytes = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let room = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
        stdout.take(room).read_to_end(&mut bytes).await?;
    }
    if bytes.len() > most {
        return Err(OutputError::TooMuch(most));
    }
    let status = child.wait().await?;
    if status.success() { Ok(bytes) } else { Err(OutputError::Status(status)) }
}

/// A child that ends with all that it started, however it is left: unless it was reaped, since later the number
/// may be another's.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
}
