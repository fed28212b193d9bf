//! UDP sockets that the service makes for its tunnel: only the service may raise their buffers over what the host
//! allows everybody. A channel of their own beside the private link, since descriptors do not travel in a
//! stream of frames: one packet asks, one answers, and the descriptors come with it.
//!
//! ```text
//! tunnel                                       service
//! ServiceSockets ── SocketsRequest{port} ──>   serve_sockets ── UdpSockets::bind
//!                <── SocketsReply, v4, v6 ──
//! ```

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use prost::Message;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Mutex,
    time::timeout,
};
use warren_actors::{
    udp::{MakeSockets, SocketsFuture, UdpError, UdpSockets},
    watched::watched,
};
use warren_proto::link::{SocketsReply, SocketsRequest};

/// Bytes of the largest packet.
const MAX_PACKET: usize = 512;
/// Descriptors that come with an answer at most: one a family.
const FAMILIES: usize = 2;
/// How long the tunnel waits for its service before it makes sockets itself: packets wait as long.
const ANSWER_LIMIT: Duration = Duration::from_millis(250);
/// How long an answer may take to be taken.
const SEND_LIMIT: Duration = Duration::from_secs(1);
/// The service makes no sockets faster than that, whatever it is asked.
const PAUSE: Duration = Duration::from_millis(50);

/// One end of the channel.
#[derive(Debug)]
pub struct SocketChannel(AsyncFd<OwnedFd>);

impl SocketChannel {
    /// Our end, and the end to be handed over.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self::new(ours)?, theirs))
    }

    /// The end that was handed over.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self(watched(descriptor, Interest::READABLE | Interest::WRITABLE)?))
    }

    async fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.0.async_io(Interest::WRITABLE, |channel| send(channel.as_fd(), packet, descriptors)).await
    }

    /// The next packet, and what came with it.
    async fn receive(&self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        self.0.async_io(Interest::READABLE, |channel| receive(channel.as_fd())).await
    }
}

fn send(channel: BorrowedFd<'_>, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FAMILIES))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !with.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors"));
    }
    rustix::net::sendmsg(channel, &[IoSlice::new(packet)], &mut with, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(channel: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut packet = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FAMILIES))];
    let mut with = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut packet)];
    let received = rustix::net::recvmsg(channel, &mut into, &mut with, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = with.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    // No packet is empty: this is the end.
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    packet.truncate(received.bytes);
    Ok((packet, descriptors))
}

/// Makes sockets for a tunnel until it has ended.
pub async fn serve_sockets(channel: SocketChannel) {
    while let Ok((packet, _)) = channel.receive().await {
        // What is no request has no number that an answer could repeat.
        let Ok(SocketsRequest { id, port }) = SocketsRequest::decode(packet.as_slice()) else { continue };
        let made = u16::try_from(port).map_err(|_| format!("{port} is no port")).and_then(|port| {
            UdpSockets::bind(port).map(UdpSockets::into_owned).map_err(|error| error.to_string())
        });
        let error = made.as_ref().err().cloned().unwrap_or_default();
        let answer = SocketsReply { id, error }.encode_to_vec();
        let descriptors = made.iter().flat_map(|(v4, v6)| std::iter::once(v4).chain(v6));
        let descriptors = descriptors.map(AsFd::as_fd).collect::<Vec<_>>();
        if !matches!(timeout(SEND_LIMIT, channel.send(&answer, &descriptors)).await, Ok(Ok(()))) {
            tracing::warn!("a tunnel asks for UDP sockets and does not take them");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The service, as its tunnel asks it. Where it does not answer, the tunnel makes the sockets itself.
#[derive(Debug)]
pub struct ServiceSockets(Mutex<Asking>);

#[derive(Debug)]
struct Asking {
    channel: SocketChannel,
    last_id: u64,
}

impl ServiceSockets {
    /// Behind the channel that was handed over.
    pub fn new(channel: SocketChannel) -> Self {
        Self(Mutex::new(Asking { channel, last_id: 0 }))
    }

    async fn ask(&self, port: u16) -> Result<UdpSockets, Unmade> {
        let mut asking = self.0.lock().await;
        asking.last_id += 1;
        let (id, channel) = (asking.last_id, &asking.channel);
        channel.send(&SocketsRequest { id, port: port.into() }.encode_to_vec(), &[]).await?;
        loop {
            let (packet, descriptors) = channel.receive().await?;
            let answer = SocketsReply::decode(packet.as_slice()).map_err(io::Error::other)?;
            // An earlier answer that came too late.
            if answer.id != id {
                continue;
            }
            let mut descriptors = descriptors.into_iter();
            let v4 = descriptors.next().ok_or(Unmade::Refused(answer.error))?;
            return Ok(UdpSockets::from_owned(v4, descriptors.next())?);
        }
    }
}

/// Why the service made none.
#[derive(Debug, thiserror::Error)]
enum Unmade {
    #[error("the service says: {0}")]
    Refused(String),
    #[error("the service cannot be asked: {0}")]
    Channel(#[from] io::Error),
    #[error(transparent)]
    Unusable(#[from] UdpError),
    #[error("the service did not answer within {ANSWER_LIMIT:?}")]
    Deadline,
}

impl MakeSockets for ServiceSockets {
    fn make(self: Arc<Self>, port: u16) -> SocketsFuture {
        Box::pin(async move {
            let asked = timeout(ANSWER_LIMIT, self.ask(port)).await.unwrap_or(Err(Unmade::Deadline));
            let made = asked.or_else(|error| {
                tracing::warn!(%error, "the tunnel makes its UDP sockets itself, with the buffers that the host allows");
                UdpSockets::bind(port)
            });
            made.map(|made| made.made_by(self))
        })
    }
}

#[cfg(test)]
mod tests;
