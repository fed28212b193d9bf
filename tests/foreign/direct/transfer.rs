//! A TCP stream through the tunnel that lasts: everything it sends must come back as it was.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::support::LIMIT;

/// Bytes of a round, which are back before the next: some dozens of packets.
const ROUND: usize = 32 << 10;
/// Between rounds, so that the machine has time for others.
const PACE: Duration = Duration::from_millis(10);

/// A transfer, from the kernel's TCP to the agent's and back.
pub(super) struct Transfer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    progress: Mutex<Progress>,
    moved: Condvar,
}

#[derive(Default)]
struct Progress {
    /// Rounds that have begun.
    rounds: usize,
    /// When the bytes that are awaited were last heard of, while some are.
    awaited: Option<Instant>,
    silence: Duration,
    is_over: bool,
}

impl Progress {
    /// Something came back, or is awaited from now on.
    fn stir(&mut self, awaited: Option<Instant>) {
        let silence = self.awaited.map_or(Duration::ZERO, |since| since.elapsed());
        self.silence = self.silence.max(silence);
        self.awaited = awaited;
    }
}

impl Transfer {
    pub(super) fn start(to: SocketAddr) -> Self {
        let shared = Arc::new(Shared::default());
        let work = Arc::clone(&shared);
        let stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        let thread = thread::spawn(move || work.run(stream));
        Self { shared, thread: Some(thread) }
    }

    /// Waits until a round is over that began after this.
    pub(super) fn has_moved_on(&self) {
        let progress = self.shared.progress.lock().unwrap();
        let goal = progress.rounds + 2;
        let is_waiting = |progress: &mut Progress| progress.rounds < goal && !progress.is_over;
        let (progress, _) = self.shared.moved.wait_timeout_while(progress, LIMIT, is_waiting).unwrap();
        assert!(progress.rounds >= goal, "the transfer stands still");
    }

    /// How many rounds have begun.
    pub(super) fn rounds(&self) -> usize {
        self.shared.progress.lock().unwrap().rounds
    }

    /// The longest time in which nothing came back that was awaited, since this was last asked.
    pub(super) fn silence(&self) -> Duration {
        let mut progress = self.shared.progress.lock().unwrap();
        let now = progress.awaited.map(|_| Instant::now());
        progress.stir(now);
        std::mem::take(&mut progress.silence)
    }
}

impl Shared {
    fn run(&self, mut stream: TcpStream) {
        let mut back = vec![0; ROUND];
        for number in 0_usize.. {
            let sent: Vec<u8> = (0..ROUND).map(|at| ((at ^ number) % 251) as u8).collect();
            let begin = |progress: &mut Progress| {
                progress.rounds += 1;
                progress.stir(Some(Instant::now()));
            };
            if self.change(begin) {
                return;
            }
            stream.write_all(&sent).unwrap();
            let mut filled = 0;
            while filled < ROUND {
                let length = stream.read(&mut back[filled..]).unwrap();
                assert!(length > 0, "the agent hung up");
                filled += length;
                let awaited = (filled < ROUND).then(Instant::now);
                self.change(|progress| progress.stir(awaited));
            }
            assert!(back == sent, "round {number} came back changed");
            thread::sleep(PACE);
        }
    }

    /// Returns whether it is over.
    fn change(&self, change: impl FnOnce(&mut Progress)) -> bool {
        let mut progress = self.progress.lock().unwrap();
        change(&mut progress);
        self.moved.notify_all();
        progress.is_over
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.shared.change(|progress| progress.is_over = true);
        let ended = self.thread.take().unwrap().join();
        if !thread::panicking() {
            ended.expect("everything came back");
        }
    }
}
