//! The other end of a connection, which does what an input says, on a clock that does not wait.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex},
    runtime::Builder,
    time::{sleep, timeout},
};

/// Bytes on their way in one direction.
const BUFFER: usize = 16 * 1024;
/// What no peer may keep us waiting for. The longest script waits for some minutes of it.
const PATIENCE: Duration = Duration::from_secs(6 * 3600);
/// Of a script this many steps count, so that time is used for many scripts.
pub const MAX_STEPS: usize = 64;

/// What the peer does next.
#[derive(Debug, Clone)]
pub enum Step {
    /// Writes.
    Write(Vec<u8>),
    /// Does nothing for a time.
    Wait(Duration),
}

/// What the peer does besides its script.
#[derive(Debug, Clone, Copy)]
pub struct Manners {
    /// Whether it reads what it is sent.
    pub reads: bool,
    /// Whether it closes the connection after its script, and not only says nothing any more.
    pub closes: bool,
    /// How its writes are cut.
    pub cut: u8,
}

impl Manners {
    /// The manners that a byte says.
    pub fn of(byte: u8) -> Self {
        Self { reads: byte & 1 == 0, closes: byte & 2 == 0, cut: byte >> 2 }
    }
}

/// Runs `ours` against a peer with this script. Returns what ours says and what the peer has read. Fails if
/// ours does not end.
pub fn meet<T, F: Future<Output = T>>(
    script: Vec<Step>,
    manners: Manners,
    ours: impl FnOnce(DuplexStream) -> F,
) -> (T, Vec<u8>) {
    // Without I/O: with it, the clock would not know when everybody waits.
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let (near, far) = duplex(BUFFER);
        let (read, write) = tokio::io::split(far);
        // A peer that does not read is there all the same, and takes nothing.
        let (unread, reading) = if manners.reads { (None, Some(read)) } else { (Some(read), None) };
        let reading = tokio::spawn(read_all(reading));
        let writing = tokio::spawn(play(script, manners, write));
        let said = timeout(PATIENCE, ours(near)).await.expect("it waits for its peer without a limit");
        writing.abort();
        let _ = writing.await;
        drop(unread);
        (said, reading.await.expect("the peer reads until the end"))
    })
}

async fn read_all(read: Option<ReadHalf<DuplexStream>>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(mut read) = read {
        let _ = read.read_to_end(&mut all).await;
    }
    all
}

async fn play(script: Vec<Step>, manners: Manners, mut write: WriteHalf<DuplexStream>) {
    let mut length = crate::lengths(manners.cut);
    // Ours begins: a peer that is faster than that is in the other targets.
    sleep(Duration::from_millis(1)).await;
    for step in script {
        match step {
            Step::Wait(pause) => sleep(pause).await,
            Step::Write(bytes) => {
                let mut rest = bytes.as_slice();
                while !rest.is_empty() {
                    let (piece, later) = rest.split_at(length().min(rest.len()));
                    if write.write_all(piece).await.is_err() {
                        return;
                    }
                    tokio::task::yield_now().await;
                    rest = later;
                }
            }
        }
    }
    if manners.closes {
        let _ = write.shutdown().await;
    }
    // Kept: what is dropped here would close the direction that is read, too.
    std::future::pending::<()>().await;
}
