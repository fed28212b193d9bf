//! What waits for one client of the relay (tailnet-data 3.3).

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use warren_proto::key::NodePublic;

use super::wire;

/// Packets that wait in each of the two queues; the oldest is dropped for a new one.
pub(crate) const PACKETS: usize = 512;
/// Frames of the relay itself that wait; more are dropped.
const CONTROL: usize = 1024;
/// The most that is written at once, but for one frame.
const WRITE: usize = 64 * 1024;

/// The queues of one client.
#[derive(Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Default)]
struct Waiting {
    data: VecDeque<(NodePublic, Bytes)>,
    disco: VecDeque<(NodePublic, Bytes)>,
    control: VecDeque<Bytes>,
    pong: Option<[u8; 8]>,
    dropped: u64,
}

impl Queue {
    pub(crate) fn packet(&self, from: NodePublic, packet: Bytes) {
        let mut waiting = self.lock();
        let is_disco = wire::is_disco(&packet);
        let queue = if is_disco { &mut waiting.disco } else { &mut waiting.data };
        let is_full = queue.len() >= PACKETS;
        if is_full {
            queue.pop_front();
        }
        queue.push_back((from, packet));
        waiting.dropped += u64::from(is_full);
        drop(waiting);
        self.wake.notify_one();
    }

    pub(crate) fn control(&self, frame: Bytes) {
        let mut waiting = self.lock();
        if waiting.control.len() < CONTROL {
            waiting.control.push_back(frame);
        }
        drop(waiting);
        self.wake.notify_one();
    }

    /// Answers a ping, unless an answer still waits.
    pub(crate) fn pong(&self, data: [u8; 8]) {
        self.lock().pong.get_or_insert(data);
        self.wake.notify_one();
    }

    /// Packets that were dropped for newer ones.
    pub(crate) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Waits until there is something, and moves as much of it to `buffer` as is written at once.
    pub(crate) async fn next(&self, buffer: &mut BytesMut) {
        loop {
            if self.take(buffer) {
                return;
            }
            self.wake.notified().await;
        }
    }

    fn take(&self, buffer: &mut BytesMut) -> bool {
        let mut waiting = self.lock();
        while let Some(frame) = waiting.control.pop_front() {
            buffer.extend_from_slice(&frame);
        }
        if let Some(data) = waiting.pong.take() {
            wire::put(buffer, wire::PONG, &[&data]);
        }
        while buffer.len() < WRITE {
            // In turn: neither kind goes before the other.
            let taken = [waiting.disco.pop_front(), waiting.data.pop_front()];
            if taken.iter().all(Option::is_none) {
                break;
            }
            for (from, packet) in taken.into_iter().flatten() {
                wire::put(buffer, wire::RECV_PACKET, &[&from.0, &packet]);
            }
        }
        !buffer.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_keeps_the_newest_packets_in_order() {
        let queue = Queue::default();
        for number in 0..600_u32 {
            queue.packet(NodePublic([1; 32]), Bytes::copy_from_slice(&number.to_be_bytes()));
        }
        let mut written = BytesMut::new();
        queue.next(&mut written).await;
        let mut numbers = Vec::new();
        while let Some((kind, body)) = wire::take(&mut written).unwrap() {
            assert_eq!(kind, wire::RECV_PACKET);
            numbers.push(u32::from_be_bytes(body[32..].try_into().unwrap()));
        }
        assert_eq!(numbers, (88..600).collect::<Vec<_>>());
        assert_eq!(queue.dropped(), 88);
    }

    #[tokio::test]
    async fn a_second_ping_is_not_answered_while_an_answer_waits() {
        let queue = Queue::default();
        queue.pong([1; 8]);
        queue.pong([2; 8]);
        let mut written = BytesMut::new();
        queue.next(&mut written).await;
        assert_eq!(written, wire::frame(wire::PONG, &[&[1; 8]]));
    }
}
