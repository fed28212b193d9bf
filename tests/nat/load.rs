//! What goes on while networks change: echo requests at a steady pace, and one TCP connection that is asked again and
//! again.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};
use warren_lab::{AgentInfo, internet::Namespace};

use crate::support::{LIMIT, eventually};

/// From one echo request to the next.
const PACE: Duration = Duration::from_millis(20);
/// How often those who wait for packets look whether it is over.
const LOOK: Duration = Duration::from_millis(50);
/// So many answers show that a connection lives.
const FEW: u64 = 10;
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
/// Bytes of one answer over TCP.
const ANSWER: usize = 2000;

/// Both, until it is dropped.
pub(crate) struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    is_over: AtomicBool,
    /// By number: when each request was sent, and when it was answered.
    echoes: Mutex<Vec<(Instant, Option<Instant>)>>,
    /// Answers of the TCP connection.
    answers: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl Load {
    /// Begins between a host and an agent.
    pub(crate) fn begin(namespace: &Namespace, agent: &AgentInfo) -> Self {
        let shared = Arc::new(Shared::default());
        let (to, at) = (agent.address, SocketAddr::from((agent.address, agent.http_port)));
        let (socket, stream) =
            namespace.enter(|| (raw_socket(), TcpStream::connect_timeout(&at, LIMIT).unwrap())).unwrap();
        let receiving = socket.try_clone().unwrap();
        let [sender, receiver, asker] = [(); 3].map(|()| Arc::clone(&shared));
        let threads = vec![
            thread::spawn(move || sender.send(&socket, to)),
            thread::spawn(move || receiver.receive(&receiving)),
            thread::spawn(move || asker.ask(stream)),
        ];
        Self { shared, threads }
    }

    /// Waits for the first answer to a request that was sent after a moment. Returns how long after it that came.
    #[track_caller]
    pub(crate) fn recovers(&self, since: Instant) -> Duration {
        eventually("data flows again", || self.recovered(since).is_some());
        self.recovered(since).unwrap()
    }

    fn recovered(&self, since: Instant) -> Option<Duration> {
        let echoes = self.shared.echoes.lock().unwrap();
        let later = echoes.iter().filter(|(sent, _)| *sent >= since);
        later.filter_map(|(_, answered)| *answered).min().map(|answered| answered.duration_since(since))
    }

    /// Whether the TCP connection has been answered a few times more since this was called.
    pub(crate) fn goes_on(&self) -> impl Fn() -> bool {
        let before = self.answers();
        move || self.answers() > before + FEW
    }

    /// How often the TCP connection was answered so far; it must live.
    fn answers(&self) -> u64 {
        let failure = self.shared.failure.lock().unwrap();
        assert!(failure.is_none(), "the TCP connection: {}", failure.clone().unwrap_or_default());
        self.shared.answers.load(Ordering::Relaxed)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    fn send(&self, socket: &UdpSocket, to: Ipv6Addr) {
        while !self.is_over() {
            let number = {
                let mut echoes = self.echoes.lock().unwrap();
                echoes.push((Instant::now(), None));
                u32::try_from(echoes.len() - 1).unwrap()
            };
            let mut request = vec![ECHO_REQUEST, 0, 0, 0];
            request.extend(number.to_be_bytes());
            // Without a route nothing is sent, which is what a silence is.
            let _ = socket.send_to(&request, SocketAddr::from((to, 0)));
            thread::sleep(PACE);
        }
    }

    fn receive(&self, socket: &UdpSocket) {
        socket.set_read_timeout(Some(LOOK)).unwrap();
        let mut buffer = [0; 128];
        while !self.is_over() {
            let Ok(length) = socket.recv(&mut buffer) else { continue };
            let &[ECHO_REPLY, _, _, _, a, b, c, d, ..] = &buffer[..length] else { continue };
            let number = u32::from_be_bytes([a, b, c, d]) as usize;
            if let Some((_, answered)) = self.echoes.lock().unwrap().get_mut(number) {
                answered.get_or_insert_with(Instant::now);
            }
        }
    }

    fn ask(&self, stream: TcpStream) {
        if let Err(error) = self.try_ask(stream) {
            *self.failure.lock().unwrap() = Some(error.to_string());
        }
    }

    fn try_ask(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(LIMIT))?;
        let mut answers = BufReader::new(stream.try_clone()?);
        while !self.is_over() {
            stream.write_all(format!("GET /bytes/{ANSWER} HTTP/1.1\r\nHost: lab\r\n\r\n").as_bytes())?;
            let mut line = String::new();
            while line != "\r\n" {
                line.clear();
                if answers.read_line(&mut line)? == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
            }
            answers.read_exact(&mut [0; ANSWER])?;
            self.answers.fetch_add(1, Ordering::Relaxed);
            thread::sleep(PACE);
        }
        Ok(())
    }
}

fn raw_socket() -> UdpSocket {
    let flags = SocketFlags::CLOEXEC;
    // A raw socket moves datagrams, too; the kernel fills in the checksum.
    rustix::net::socket_with(AddressFamily::INET6, SocketType::RAW, flags, Some(ipproto::ICMPV6))
        .unwrap()
        .into()
}
