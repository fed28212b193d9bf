//! What an agent serves over HTTP inside the tunnel.
//!
//! | Request | Answer |
//! |---|---|
//! | `GET /` | a small page that names the agent |
//! | `GET /bytes/N` | the first N bytes of [`crate::payload`] |
//! | `GET /checksum/N` | a line: N and the checksum of those bytes, as 16 digits |
//! | `POST /sink` | takes what comes; a line: how many bytes, and their checksum |

use std::collections::VecDeque;

use crate::payload::{self, Checksum};

/// Longest request head, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Bytes that are summed before others get their turn.
const SUM_STEP: usize = 256 * 1024;

/// One connection: bytes go in, bytes come out.
pub(super) struct Exchange {
    title: String,
    head: Vec<u8>,
    out: VecDeque<u8>,
    job: Job,
    /// After the current answer nothing follows.
    is_last: bool,
    requests: u64,
}

enum Job {
    /// A request's head is awaited.
    Head,
    /// This part of the stream is still to be sent.
    Send { offset: u64, end: u64 },
    /// This part of the stream is still to be summed.
    Sum { offset: u64, end: u64, sum: Checksum },
    /// So many bytes are still to come.
    Sink { left: u64, total: u64, sum: Checksum },
    /// The connection ends.
    Over,
}

impl Exchange {
    pub(super) fn new(title: String) -> Self {
        Self { title, head: Vec::new(), out: VecDeque::new(), job: Job::Head, is_last: false, requests: 0 }
    }

    /// Takes what arrived. Returns how much of it.
    pub(super) fn receive(&mut self, mut bytes: &[u8]) -> usize {
        let before = bytes.len();
        while !bytes.is_empty() {
            match &mut self.job {
                Job::Head => {
                    let Some(byte) = bytes.split_off_first() else { break };
                    self.head.push(*byte);
                    if self.head.ends_with(b"\r\n\r\n") {
                        self.begin();
                    } else if self.head.len() > MAX_HEAD {
                        self.refuse("431 Request Header Fields Too Large");
                    }
                }
                Job::Sink { left, sum, .. } => {
                    let part = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    let (now, later) = bytes.split_at(part);
                    sum.update(now);
                    *left -= part as u64;
                    bytes = later;
                    self.finish_sink();
                }
                // What follows waits for its turn; after the end it is dropped.
                Job::Send { .. } | Job::Sum { .. } => break,
                Job::Over => return before,
            }
        }
        before - bytes.len()
    }

    /// Writes what is to be sent next. Returns how much of `buffer` was filled.
    pub(super) fn send(&mut self, buffer: &mut [u8]) -> usize {
        let ready = self.out.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(self.out.drain(..ready)) {
            *to = from;
        }
        let rest = buffer.get_mut(ready..).unwrap_or_default();
        let Job::Send { offset, end } = &mut self.job else { return ready };
        let part = usize::try_from(*end - *offset).unwrap_or(usize::MAX).min(rest.len());
        payload::fill(*offset, rest.get_mut(..part).unwrap_or_default());
        *offset += part as u64;
        if offset == end {
            self.next();
        }
        ready + part
    }

    /// Does a piece of what takes long. Returns whether there is more of it.
    pub(super) fn work(&mut self) -> bool {
        let Job::Sum { offset, end, sum } = &mut self.job else { return false };
        let part = usize::try_from(*end - *offset).unwrap_or(usize::MAX).min(SUM_STEP);
        let mut buffer = vec![0; part];
        payload::fill(*offset, &mut buffer);
        sum.update(&buffer);
        *offset += part as u64;
        if offset == end {
            let line = line(*end, sum);
            self.answer("200 OK", "text/plain", line.as_bytes());
            self.next();
            return false;
        }
        true
    }

    /// Whether there is anything to send.
    pub(super) fn has_output(&self) -> bool {
        !self.out.is_empty() || matches!(self.job, Job::Send { .. })
    }

    /// Whether nothing happens before more arrives.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.job, Job::Head | Job::Sink { .. }) && self.out.is_empty()
    }

    /// Whether everything was said and the connection may be closed.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.job, Job::Over) && self.out.is_empty()
    }

    /// Requests since the last time this was asked.
    pub(super) fn take_requests(&mut self) -> u64 {
        std::mem::take(&mut self.requests)
    }

    fn begin(&mut self) {
        self.requests += 1;
        let head = String::from_utf8_lossy(&std::mem::take(&mut self.head)).into_owned();
        let Some(request) = Request::parse(&head) else { return self.refuse("400 Bad Request") };
        self.is_last = request.is_last;
        let (bytes, checksum) = (number(request.path, "/bytes/"), number(request.path, "/checksum/"));
        match (request.method, request.path, bytes.or(checksum)) {
            ("GET", "/", _) => {
                let page = format!(
                    "<!doctype html>\n<html><head><title>{0}</title></head>\n<body><h1>{0}</h1>\n\
                     <p>This page came through the tunnel.</p></body></html>\n",
                    self.title
                );
                self.answer("200 OK", "text/html; charset=utf-8", page.as_bytes());
                self.next();
            }
            ("GET", _, Some(end)) if bytes.is_some() => {
                self.head("200 OK", "application/octet-stream", end);
                self.job = Job::Send { offset: 0, end };
                if end == 0 {
                    self.next();
                }
            }
            ("GET", _, Some(end)) => self.job = Job::Sum { offset: 0, end, sum: Checksum::default() },
            ("POST" | "PUT", "/sink", _) => match request.length {
                None => self.refuse("411 Length Required"),
                Some(left) => {
                    if request.expects_continue {
                        self.out.extend(b"HTTP/1.1 100 Continue\r\n\r\n");
                    }
                    self.job = Job::Sink { left, total: left, sum: Checksum::default() };
                    self.finish_sink();
                }
            },
            ("GET", ..) => {
                self.answer("404 Not Found", "text/plain", b"There is nothing here.\n");
                self.next();
            }
            _ => self.refuse("405 Method Not Allowed"),
        }
    }

    fn finish_sink(&mut self) {
        let Job::Sink { left: 0, total, sum } = &self.job else { return };
        let line = line(*total, sum);
        self.answer("200 OK", "text/plain", line.as_bytes());
        self.next();
    }

    fn next(&mut self) {
        self.job = if self.is_last { Job::Over } else { Job::Head };
    }

    fn refuse(&mut self, status: &str) {
        self.is_last = true;
        self.answer(status, "text/plain", format!("{status}\n").as_bytes());
        self.job = Job::Over;
    }

    fn answer(&mut self, status: &str, kind: &str, body: &[u8]) {
        self.head(status, kind, body.len() as u64);
        self.out.extend(body);
    }

    fn head(&mut self, status: &str, kind: &str, length: u64) {
        let connection = if self.is_last { "close" } else { "keep-alive" };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
             Connection: {connection}\r\nServer: warren-lab\r\n\r\n"
        );
        self.out.extend(head.as_bytes());
    }
}

fn line(count: u64, sum: &Checksum) -> String {
    format!("{count} {:016x}\n", sum.finish())
}

fn number(path: &str, prefix: &str) -> Option<u64> {
    path.strip_prefix(prefix)?.parse().ok()
}

struct Request<'a> {
    method: &'a str,
    path: &'a str,
    length: Option<u64>,
    is_last: bool,
    expects_continue: bool,
}

impl<'a> Request<'a> {
    fn parse(head: &'a str) -> Option<Self> {
        let mut lines = head.split("\r\n");
        let mut first = lines.next()?.split(' ');
        let (method, path, version) = (first.next()?, first.next()?, first.next()?);
        let mut request = Self {
            method,
            path: path.split('?').next().unwrap_or_default(),
            length: None,
            is_last: version == "HTTP/1.0",
            expects_continue: false,
        };
        for header in lines.take_while(|line| !line.is_empty()) {
            let (name, value) = header.split_once(':')?;
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => request.length = Some(value.parse().ok()?),
                "connection" => request.is_last |= value.eq_ignore_ascii_case("close"),
                "expect" => request.expects_continue = value.eq_ignore_ascii_case("100-continue"),
                _ => {}
            }
        }
        version.starts_with("HTTP/1.").then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(exchange: &mut Exchange) -> Vec<u8> {
        let mut out = Vec::new();
        let mut buffer = [0; 1000];
        loop {
            while exchange.work() {}
            match exchange.send(&mut buffer) {
                0 => return out,
                got => out.extend(&buffer[..got]),
            }
        }
    }

    fn ask(request: &str) -> String {
        let mut exchange = Exchange::new("main.lab-1".to_owned());
        assert_eq!(exchange.receive(request.as_bytes()), request.len());
        String::from_utf8(all(&mut exchange)).unwrap()
    }

    #[test]
    fn the_page_names_the_agent() {
        let answer = ask("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("<h1>main.lab-1</h1>"),
            "{answer}"
        );
    }

    #[test]
    fn bytes_come_in_the_length_that_was_asked_for_and_as_they_were_summed() {
        let mut exchange = Exchange::new(String::new());
        exchange.receive(b"GET /bytes/100000 HTTP/1.1\r\nConnection: close\r\n\r\n");
        let answer = all(&mut exchange);
        let body = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        let mut sum = Checksum::default();
        sum.update(&answer[body..]);
        assert_eq!(answer.len() - body, 100_000);
        let line = ask("GET /checksum/100000 HTTP/1.0\r\n\r\n");
        assert!(line.ends_with(&format!("\r\n\r\n100000 {:016x}\n", sum.finish())), "{line}");
        assert!(exchange.is_over());
    }

    #[test]
    fn a_sink_counts_and_sums_and_the_next_request_follows_on_the_same_connection() {
        let mut exchange = Exchange::new("x".to_owned());
        let mut body = vec![0; 5000];
        payload::fill(0, &mut body);
        let head = b"POST /sink HTTP/1.1\r\nContent-Length: 5000\r\nExpect: 100-continue\r\n\r\n";
        let input = [head.as_slice(), &body, b"GET /nowhere HTTP/1.1\r\n\r\n"].concat();
        for piece in input.chunks(700) {
            assert_eq!(exchange.receive(piece), piece.len());
        }
        let answer = String::from_utf8(all(&mut exchange)).unwrap();
        assert!(answer.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200"), "{answer}");
        assert!(answer.contains(&format!("5000 {:016x}\n", payload::checksum(5000))), "{answer}");
        assert!(answer.contains("404 Not Found"), "{answer}");
        assert_eq!(exchange.take_requests(), 2);
    }

    #[test]
    fn nonsense_is_refused_and_the_connection_closed() {
        for request in [
            "nonsense\r\n\r\n",
            "DELETE / HTTP/1.1\r\n\r\n",
            "POST /sink HTTP/1.1\r\n\r\n",
            "GET / SPDY/3\r\n\r\n",
        ] {
            let answer = ask(request);
            assert!(
                answer.starts_with("HTTP/1.1 4") && answer.contains("Connection: close"),
                "{request}: {answer}"
            );
        }
    }
}
