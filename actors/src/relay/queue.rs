//! What waits to be written to a relay link: one buffer of ready frames that packets are sealed into where
//! they will be written from, and a second one that the link's writer empties meanwhile.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use warren_proto::{
    derp::{self, PACKET_HEADER},
    key::NodePublic,
};

/// Bytes of frames that may wait. One batch from the TUN (four superpackets, sealed and framed, are 280 KiB)
/// must find room in an empty queue; more would only be a standing queue. When full, the newest is dropped.
pub(crate) const QUEUE_BYTES: usize = 512 * 1024;
/// Room for frames of the link's own, which data must not crowd out: a few of at most 14 bytes.
const CONTROL_BYTES: usize = 1024;

/// Both buffers of a link: the worst that it holds for writing.
const _: () = assert!(2 * (QUEUE_BYTES + CONTROL_BYTES) <= 2 * 1024 * 1024);

/// The frames that wait for one link's writer.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    frames: Mutex<Frames>,
    wake: Notify,
}

/// A buffer of whole frames.
#[derive(Debug)]
pub(crate) struct Frames {
    buffer: Vec<u8>,
    filled: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self { buffer: vec![0; QUEUE_BYTES + CONTROL_BYTES], filled: 0 }
    }
}

/// There is no room in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

impl Outgoing {
    /// The frames, to add to. Whoever added calls [`Self::wake`] afterwards.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Frames> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the writer that there is something to write.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Adds one frame to a peer.
    pub(crate) fn send(&self, to: &NodePublic, packet: &[u8]) -> Result<(), Full> {
        self.lock().push(to, packet)?;
        self.wake();
        Ok(())
    }

    /// Adds a frame of the link's own.
    pub(crate) fn control(&self, frame: &[u8]) -> Result<(), Full> {
        self.lock().push_control(frame)?;
        self.wake();
        Ok(())
    }

    /// Drops what waits.
    pub(crate) fn clear(&self) {
        self.lock().filled = 0;
    }

    /// Waits until there is something, and swaps it with `empty`.
    pub(crate) async fn take(&self, empty: &mut Frames) {
        empty.filled = 0;
        loop {
            {
                let mut frames = self.lock();
                if frames.filled > 0 {
                    std::mem::swap(&mut *frames, empty);
                    return;
                }
            }
            self.wake.notified().await;
        }
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().filled == 0
    }
}

impl Frames {
    /// Room for a packet of up to `room` bytes, behind its frame's header; [`Self::commit`] makes it a frame.
    pub(crate) fn room(&mut self, room: usize) -> Result<&mut [u8], Full> {
        let start = self.filled + PACKET_HEADER;
        if start + room > QUEUE_BYTES {
            return Err(Full);
        }
        self.buffer.get_mut(start..start + room).ok_or(Full)
    }

    /// Makes the first `len` bytes of the last [`Self::room`] a frame to `to`.
    pub(crate) fn commit(&mut self, to: &NodePublic, len: usize) {
        let Some(header) = self.buffer.get_mut(self.filled..self.filled + PACKET_HEADER) else { return };
        header.copy_from_slice(&derp::send_header(to, len));
        self.filled += PACKET_HEADER + len;
    }

    /// The frames' bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.filled).unwrap_or_default()
    }

    /// Adds one frame to a peer.
    pub(crate) fn push(&mut self, to: &NodePublic, packet: &[u8]) -> Result<(), Full> {
        self.room(packet.len())?.copy_from_slice(packet);
        self.commit(to, packet.len());
        Ok(())
    }

    fn push_control(&mut self, frame: &[u8]) -> Result<(), Full> {
        self.buffer.get_mut(self.filled..self.filled + frame.len()).ok_or(Full)?.copy_from_slice(frame);
        self.filled += frame.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: NodePublic = NodePublic([7; 32]);

    #[tokio::test]
    async fn a_packet_leaves_as_a_frame_behind_37_bytes() {
        let outgoing = Outgoing::default();
        outgoing.send(&TO, &[0xde, 0xad, 0xbe, 0xef]).unwrap();
        let mut taken = Frames::default();
        outgoing.take(&mut taken).await;
        let expected = [[4, 0, 0, 0, 36].as_slice(), &[7; 32], &[0xde, 0xad, 0xbe, 0xef]].concat();
        assert_eq!(taken.bytes(), expected);
        assert!(outgoing.is_empty());
    }

    #[test]
    fn a_full_queue_refuses_the_newest_and_still_takes_control_frames() {
        let outgoing = Outgoing::default();
        let packet = [0; 1312];
        let taken = std::iter::from_fn(|| outgoing.send(&TO, &packet).ok()).count();
        assert_eq!(taken, QUEUE_BYTES / (1312 + PACKET_HEADER));
        assert_eq!(outgoing.send(&TO, &packet), Err(Full));
        assert_eq!(outgoing.control(&[0x13; 13]), Ok(()));
        let frames = std::iter::from_fn(|| outgoing.control(&[0x13; 13]).ok()).count();
        assert!(frames < 200, "bounded as well");
    }

    #[tokio::test]
    async fn a_taker_that_waits_is_woken() {
        let outgoing = std::sync::Arc::new(Outgoing::default());
        let taker = tokio::spawn({
            let outgoing = std::sync::Arc::clone(&outgoing);
            async move {
                let mut frames = Frames::default();
                outgoing.take(&mut frames).await;
                frames.bytes().len()
            }
        });
        tokio::task::yield_now().await;
        outgoing.send(&TO, &[1; 10]).unwrap();
        assert_eq!(taker.await.unwrap(), PACKET_HEADER + 10);
    }
}
