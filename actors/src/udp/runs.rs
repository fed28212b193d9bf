//! What a batch sends over UDP: datagrams side by side in one buffer, those of one destination and size as runs
//! that the kernel cuts (tailnet-data 14).

use std::net::SocketAddr;

use super::{
    Sockets, Unsent,
    socket::{MAX_RUN_BYTES, Run},
};

/// Bytes of datagrams of one batch: four superpackets, sealed, are 280 KiB; small segments take more.
pub(crate) const RUNS_BYTES: usize = 512 * 1024;
/// Datagrams of one run: the kernel's limit.
const MAX_RUN: usize = 64;
/// Runs of one batch, in a burst of small datagrams to many peers.
const MAX_RUNS: usize = 1024;

/// There is no room for another datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// The datagrams of one batch; keeps its memory from batch to batch.
#[derive(Debug)]
pub(crate) struct Runs {
    buffer: Vec<u8>,
    filled: usize,
    spans: Vec<Span>,
}

/// Where a run is in the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    to: SocketAddr,
    start: usize,
    end: usize,
    size: usize,
}

impl Default for Runs {
    fn default() -> Self {
        Self { buffer: vec![0; RUNS_BYTES], filled: 0, spans: Vec::with_capacity(MAX_RUNS) }
    }
}

impl Runs {
    /// Room for a datagram of up to `room` bytes; [`Self::commit`] makes it one.
    pub(crate) fn room(&mut self, room: usize) -> Result<&mut [u8], Full> {
        if self.spans.len() >= MAX_RUNS {
            return Err(Full);
        }
        self.buffer.get_mut(self.filled..self.filled + room).ok_or(Full)
    }

    /// Makes the first `len` bytes of the last [`Self::room`] a datagram to `to`, and returns it.
    pub(crate) fn commit(&mut self, to: SocketAddr, len: usize) -> &[u8] {
        let (start, end) = (self.filled, self.filled + len);
        match self.spans.last_mut() {
            Some(last) if last.takes(to, len) => last.end = end,
            _ => self.spans.push(Span { to, start, end, size: len }),
        }
        self.filled = end;
        self.buffer.get(start..end).unwrap_or_default()
    }

    /// Adds a datagram.
    pub(crate) fn push(&mut self, to: SocketAddr, datagram: &[u8]) -> Result<(), Full> {
        self.room(datagram.len())?.copy_from_slice(datagram);
        self.commit(to, datagram.len());
        Ok(())
    }

    /// Whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Sends everything, waiting where a socket takes nothing more. Tells `lost` what could not be sent, and how
    /// many datagrams that were.
    pub(crate) async fn send(&mut self, sockets: &Sockets, mut lost: impl FnMut(SocketAddr, Unsent, u64)) {
        // One wait in vain is enough for a batch.
        let mut may_wait = true;
        for span in &self.spans {
            match sockets.of(span.to) {
                Some(socket) if may_wait => {
                    may_wait = socket.send_run(span.of(&self.buffer), &mut lost).await;
                }
                Some(socket) => socket.send_run_now(span.of(&self.buffer), &mut lost),
                None => lost(span.to, Unsent::Unreachable, span.len() as u64),
            }
        }
        self.clear();
    }

    /// Sends what the sockets take now. Tells `lost` what could not be sent, and how many datagrams that were.
    pub(crate) fn send_now(&mut self, sockets: &Sockets, mut lost: impl FnMut(SocketAddr, Unsent, u64)) {
        for span in &self.spans {
            match sockets.of(span.to) {
                Some(socket) => socket.send_run_now(span.of(&self.buffer), &mut lost),
                None => lost(span.to, Unsent::Unreachable, span.len() as u64),
            }
        }
        self.clear();
    }

    /// Forgets everything. Returns how many datagrams that were.
    pub(crate) fn clear(&mut self) -> u64 {
        let forgotten = self.spans.iter().map(|span| span.len() as u64).sum();
        self.spans.clear();
        self.filled = 0;
        forgotten
    }
}

impl Span {
    fn of<'a>(&self, buffer: &'a [u8]) -> Run<'a> {
        Run { to: self.to, bytes: buffer.get(self.start..self.end).unwrap_or_default(), size: self.size }
    }

    fn len(&self) -> usize {
        (self.end - self.start).div_ceil(self.size.max(1))
    }

    fn takes(&self, to: SocketAddr, len: usize) -> bool {
        let filled = self.end - self.start;
        let is_open = filled.is_multiple_of(self.size.max(1));
        let has_room = self.len() < MAX_RUN && filled + self.size <= MAX_RUN_BYTES;
        self.to == to && len > 0 && len <= self.size && is_open && has_room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_of_one_size_and_destination_make_one_run_and_a_shorter_one_ends_it() {
        let (mut runs, a, b) = (Runs::default(), to(1), to(2));
        for len in [1312, 1312, 100, 1312] {
            add(&mut runs, a, len);
        }
        add(&mut runs, b, 1312);
        add(&mut runs, b, 1313);
        let expected =
            [(a, 0, 2724, 1312), (a, 2724, 4036, 1312), (b, 4036, 5348, 1312), (b, 5348, 6661, 1313)];
        assert_eq!(shape(&runs), expected);
        assert_eq!(runs.clear(), 6);
        assert!(runs.is_empty());
    }

    #[test]
    fn a_run_is_as_long_as_the_kernel_takes() {
        let mut runs = Runs::default();
        (0..100).for_each(|_| add(&mut runs, to(1), 1312));
        (0..100).for_each(|_| add(&mut runs, to(2), 32));
        let lengths: Vec<usize> = runs.spans.iter().map(Span::len).collect();
        assert_eq!(lengths, [49, 49, 2, 64, 36], "floor(65507 / 1312), and 64");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut runs = Runs::default();
        let taken = std::iter::from_fn(|| {
            runs.room(1312).ok()?;
            Some(runs.commit(to(1), 1312).len())
        });
        assert_eq!(taken.count(), RUNS_BYTES / 1312);
        assert_eq!(runs.room(1312), Err(Full));
        runs.clear();
        (0..MAX_RUNS).for_each(|index| add(&mut runs, to(index as u16), 100));
        assert_eq!(runs.room(100), Err(Full));
    }

    fn add(runs: &mut Runs, to: SocketAddr, len: usize) {
        runs.room(len).unwrap().fill(7);
        assert_eq!(runs.commit(to, len).len(), len);
    }

    fn shape(runs: &Runs) -> Vec<(SocketAddr, usize, usize, usize)> {
        runs.spans.iter().map(|it| (it.to, it.start, it.end, it.size)).collect()
    }

    fn to(port: u16) -> SocketAddr {
        ([192, 0, 2, 1], port).into()
    }
}
