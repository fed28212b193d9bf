//! The TUN device: made by us or inherited, with segmentation offload where the kernel has it, read and
//! written without waiting. The descriptor belongs to the data plane; dropping the last [`Tun`] closes it.
//!
//! This is one of the files that may hold unsafe code: ioctls, and the borrowing of a descriptor.

use std::{
    io::{self, IoSlice},
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use tokio::io::{Interest, unix::AsyncFd};

use super::batch::{Coalescer, MAX_FRAME, MAX_PIECES, SLACK, VIRTIO_LEN, Virtio};

const DEVICE: &str = "/dev/net/tun";
/// Flags and protocol in front of each packet of a device made without `IFF_NO_PI`.
const PACKET_INFO_LEN: usize = 4;
/// The protocol in the packet information of IPv6: ETH_P_IPV6, in network order.
const PACKET_INFO_IPV6: [u8; PACKET_INFO_LEN] = [0, 0, 0x86, 0xdd];
const MAX_PREFIX: usize = PACKET_INFO_LEN + VIRTIO_LEN;
/// After so many invalid superpackets in a row none is tried any more: some kernels (6.10, 6.11) refuse all.
const MAX_REFUSALS: u32 = 8;
/// Room that [`Tun::read`] needs: what the kernel puts in front, its largest packet, and what splitting needs.
pub const READ_ROOM: usize = MAX_PREFIX + MAX_FRAME + SLACK;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;
/// What the kernel may hand us unsegmented, best first. It takes the two USO flags only together, from
/// 6.2 on; the TSO flags stand for both versions as other programs ask for them.
const OFFLOADS: [libc::c_ulong; 3] =
    [TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6, 0];

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The name is empty, too long, or has a character that interface names cannot have.
    #[error("{0:?} is no name for a network interface (1 to 15 characters without slash or blank)")]
    Name(String),
    /// The system has no TUN devices.
    #[error("{DEVICE} does not exist: load the kernel module `tun`, or give the container the device")]
    Missing,
    /// We may not make one.
    #[error("not permitted to make a TUN device: run as root or with CAP_NET_ADMIN")]
    Permission,
    /// Another program holds the interface.
    #[error("the interface {0} is in use: stop the program that holds it, or choose another name")]
    Busy(String),
    /// The descriptor number is not an open descriptor of this process.
    #[error("descriptor {0} is not open in this process")]
    Descriptor(RawFd),
    /// Anything else.
    #[error("{action}: {error}")]
    Io {
        /// What failed.
        action: &'static str,
        /// How.
        error: io::Error,
    },
}

/// What the kernel puts in front of each packet, and expects there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Framing {
    packet_info: bool,
    virtio: bool,
}

/// A packet that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// How the kernel wants it segmented.
    pub virtio: Virtio,
    /// Where in the buffer it begins.
    pub start: usize,
    /// Its length.
    pub len: usize,
}

/// An open TUN device.
#[derive(Debug)]
pub struct Tun {
    descriptor: OwnedFd,
    framing: Framing,
    has_offload: bool,
    /// Superpackets that the kernel called invalid, one after the other.
    refusals: AtomicU32,
}

impl Tun {
    /// Makes the interface `name` and returns its descriptor, to be given to a tunnel. Offload is on. The
    /// interface is down and has no addresses; it vanishes with the last copy of the descriptor.
    pub fn create(name: &str) -> Result<OwnedFd, TunError> {
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        let opened =
            rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty());
        let descriptor = opened.map_err(|error| match error {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => TunError::Missing,
            Errno::PERM | Errno::ACCESS => TunError::Permission,
            error => TunError::Io { action: "cannot open /dev/net/tun", error: error.into() },
        })?;
        // SAFETY: TUNSETIFF reads a whole ifreq, which `request` is, and keeps no pointer to it.
        let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), TUNSETIFF as _, &request) };
        check(answer).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => TunError::Permission,
            Some(libc::EBUSY) => TunError::Busy(name.to_owned()),
            _ => TunError::Io { action: "cannot make the interface", error },
        })?;
        Ok(descriptor)
    }

    /// Whether the interface behind a descriptor of [`Self::create`] is gone: somebody has removed it. What is
    /// no TUN device has none that could be.
    pub fn is_gone(descriptor: &OwnedFd) -> bool {
        interface(descriptor).is_err_and(|error| error.raw_os_error() == Some(libc::EBADFD))
    }

    /// What the interface is called now; `None` if it is gone, and for what is no TUN device.
    pub fn name(&self) -> Option<String> {
        let request = interface(&self.descriptor).ok()?;
        let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8);
        String::from_utf8(name.collect()).ok()
    }

    /// Takes over a descriptor that some other part of the process owns, under a number of its own.
    pub fn from_fd(number: RawFd) -> Result<Self, TunError> {
        if number < 0 {
            return Err(TunError::Descriptor(number));
        }
        // SAFETY: the borrow ends in this function; a number that is not open makes the call below fail
        // with EBADF and touches nothing.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        let copy = rustix::io::fcntl_dupfd_cloexec(borrowed, 3).map_err(|error| match error {
            Errno::BADF => TunError::Descriptor(number),
            error => TunError::Io { action: "cannot copy the TUN descriptor", error: error.into() },
        })?;
        Self::from_owned(copy)
    }

    /// Takes a descriptor. One that is no TUN device is taken for a socket that carries bare packets.
    pub fn from_owned(descriptor: OwnedFd) -> Result<Self, TunError> {
        rustix::io::ioctl_fionbio(&descriptor, true).map_err(|error| TunError::Io {
            action: "cannot make the TUN descriptor non-blocking",
            error: error.into(),
        })?;
        let framing = framing(&descriptor)?;
        let has_offload = framing.virtio && enable_offload(&descriptor)?;
        Ok(Self { descriptor, framing, has_offload, refusals: AtomicU32::new(0) })
    }

    /// Tells when there is something to read, on the runtime that it is called on.
    pub fn readiness(&self) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
        // SAFETY: the borrow keeps the descriptor open and the same for as long as the `AsyncFd` lives.
        Ok(unsafe { AsyncFd::register_with_interest(self.as_fd(), Interest::READABLE) }?)
    }

    /// Reads one packet or superpacket. `buffer` has [`READ_ROOM`].
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Frame> {
        let prefix = self.framing.prefix();
        let room = prefix + MAX_FRAME;
        let room = buffer.get_mut(..room).ok_or(io::ErrorKind::InvalidInput)?;
        let read = rustix::io::read(&self.descriptor, &mut *room)?;
        if read == 0 {
            // No device: a socket or a pipe whose other end is closed.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let len = read.checked_sub(prefix).ok_or(io::ErrorKind::InvalidData)?;
        let header = room.get(prefix.saturating_sub(VIRTIO_LEN)..).and_then(<[u8]>::first_chunk);
        let virtio = header.filter(|_| self.framing.virtio).map(Virtio::decode).unwrap_or_default();
        Ok(Frame { virtio, start: prefix, len })
    }

    /// Writes a batch of packets, as superpackets where it can. Returns how many the kernel did not take.
    pub fn write(&self, buffer: &mut [u8], packets: &[Range<usize>], coalescer: &mut Coalescer) -> u64 {
        if !self.has_offload || self.refusals.load(Ordering::Relaxed) >= MAX_REFUSALS {
            let singly = packets.iter().filter(|range| self.write_single(buffer, range).is_err());
            return singly.count() as u64;
        }
        coalescer.plan(buffer, packets.iter().cloned());
        (0..coalescer.len()).map(|write| self.write_planned(buffer, coalescer, write)).sum()
    }

    fn write_planned(&self, buffer: &mut [u8], coalescer: &mut Coalescer, write: usize) -> u64 {
        let pieces = coalescer.pieces(write).filter_map(|range| buffer.get(range));
        let virtio = coalescer.virtio(write);
        match self.write_pieces(&virtio.encode(), pieces) {
            Err(_) if virtio == Virtio::default() => 1,
            Ok(()) => {
                if virtio.needs_checksum {
                    self.refusals.store(0, Ordering::Relaxed);
                }
                0
            }
            Err(error) => {
                if error.kind() == io::ErrorKind::InvalidInput {
                    self.note_refusal();
                }
                let singles: Vec<Range<usize>> = coalescer.undo(buffer, write).collect();
                singles.iter().filter(|range| self.write_single(buffer, range).is_err()).count() as u64
            }
        }
    }

    fn note_refusal(&self) {
        if self.refusals.fetch_add(1, Ordering::Relaxed) + 1 == MAX_REFUSALS {
            tracing::warn!("the kernel refuses superpackets; packets are written singly from now on");
        }
    }

    fn write_single(&self, buffer: &[u8], range: &Range<usize>) -> io::Result<()> {
        self.write_pieces(&Virtio::default().encode(), buffer.get(range.clone()).into_iter())
    }

    fn write_pieces<'a>(
        &self,
        virtio: &'a [u8; VIRTIO_LEN],
        pieces: impl Iterator<Item = &'a [u8]>,
    ) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); MAX_PIECES + 2];
        let info = PACKET_INFO_IPV6.as_slice();
        let prefix = [(self.framing.packet_info, info), (self.framing.virtio, virtio.as_slice())];
        let prefix = prefix.into_iter().filter_map(|(is_wanted, bytes)| is_wanted.then_some(bytes));
        let mut used = 0;
        for (slot, bytes) in slices.iter_mut().zip(prefix.chain(pieces)) {
            *slot = IoSlice::new(bytes);
            used += 1;
        }
        rustix::io::writev(&self.descriptor, slices.get(..used).unwrap_or_default())?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Framing {
    fn prefix(self) -> usize {
        let info = if self.packet_info { PACKET_INFO_LEN } else { 0 };
        let virtio = if self.virtio { VIRTIO_LEN } else { 0 };
        info + virtio
    }
}

fn interface_request(name: &str) -> Result<libc::ifreq, TunError> {
    let is_valid = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(is_valid) {
        return Err(TunError::Name(name.to_owned()));
    }
    let mut request = empty_request();
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    Ok(request)
}

fn empty_request() -> libc::ifreq {
    // SAFETY: ifreq is plain data (a name and a union of numbers and addresses) for which all zero is a value.
    unsafe { std::mem::zeroed() }
}

/// The interface behind a descriptor: its name and flags.
fn interface(descriptor: &OwnedFd) -> io::Result<libc::ifreq> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes at most one ifreq, which `request` is, and keeps no pointer to it. On a
    // descriptor that is no TUN device the call fails and writes nothing.
    let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), TUNGETIFF as _, &mut request) };
    check(answer).map(|()| request)
}

fn framing(descriptor: &OwnedFd) -> Result<Framing, TunError> {
    let Ok(request) = interface(descriptor) else {
        return Ok(Framing { packet_info: false, virtio: false });
    };
    // SAFETY: TUNGETIFF has filled in the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let virtio = flags & libc::IFF_VNET_HDR != 0;
    if virtio {
        let len = VIRTIO_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which `len` is.
        let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), TUNSETVNETHDRSZ as _, &len) };
        check(answer)
            .map_err(|error| TunError::Io { action: "cannot set the offload header's size", error })?;
    }
    Ok(Framing { packet_info: flags & libc::IFF_NO_PI == 0, virtio })
}

/// Asks for as much offload as the kernel has; returns whether there is any.
fn enable_offload(descriptor: &OwnedFd) -> Result<bool, TunError> {
    for offload in OFFLOADS {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), TUNSETOFFLOAD as _, offload) };
        match check(answer) {
            Ok(()) => return Ok(offload != 0),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(TunError::Io { action: "cannot set the TUN device's offload", error }),
        }
    }
    Ok(false)
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{fs::OpenOptions, os::unix::net::UnixDatagram, process::Command};

    use super::*;
    use crate::apart::{Apart, is_apart, skipped};

    #[test]
    fn a_name_that_no_interface_can_have_is_refused() {
        for name in ["", "sixteen-letters-", "a/b", "a b", "a:b", "ü"] {
            assert!(matches!(Tun::create(name), Err(TunError::Name(_))), "{name}");
        }
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_named() {
        const BEYOND_ANY_LIMIT: RawFd = RawFd::MAX;
        for number in [-1, BEYOND_ANY_LIMIT] {
            assert!(matches!(Tun::from_fd(number), Err(TunError::Descriptor(named)) if named == number));
        }
    }

    #[test]
    fn a_socket_stands_in_for_a_device_and_carries_bare_packets() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let tun = Tun::from_fd(ours.as_raw_fd()).unwrap();
        theirs.send(&[0x60; 100]).unwrap();
        let mut buffer = vec![0; READ_ROOM];
        let frame = tun.read(&mut buffer).unwrap();
        assert_eq!(frame, Frame { virtio: Virtio::default(), start: 0, len: 100 });
        assert_eq!(tun.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let refused = tun.write(&mut buffer, &[0..40, 40..100], &mut Coalescer::default());
        assert_eq!(refused, 0);
        let mut packet = [0; 200];
        assert_eq!(theirs.recv(&mut packet).unwrap(), 40);
        assert_eq!(theirs.recv(&mut packet).unwrap(), 60);
    }

    #[test]
    fn headers_stand_in_front_of_what_is_written_and_are_cut_from_what_is_read() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let mut tun = Tun::from_owned(ours.into()).unwrap();
        tun.framing = Framing { packet_info: true, virtio: true };
        let mut sent = vec![0, 0, 0x86, 0xdd];
        let virtio =
            Virtio { needs_checksum: true, checksum_start: 40, checksum_offset: 16, ..Virtio::default() };
        sent.extend(virtio.encode());
        sent.extend([0x60; 60]);
        theirs.send(&sent).unwrap();
        let mut buffer = vec![0; READ_ROOM];
        let frame = tun.read(&mut buffer).unwrap();
        assert_eq!(frame, Frame { virtio, start: 14, len: 60 });
        tun.write(&mut buffer, &[14..44, 44..74], &mut Coalescer::default());
        let mut packet = [0; 200];
        assert_eq!(theirs.recv(&mut packet).unwrap(), 44);
        assert_eq!(packet[..14], [0, 0, 0x86, 0xdd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_packet_that_the_device_refuses_is_counted_and_the_others_are_written() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let tun = Tun::from_owned(ours.into()).unwrap();
        drop(theirs);
        let mut buffer = vec![0; 100];
        assert_eq!(tun.write(&mut buffer, &[0..40, 40..100], &mut Coalescer::default()), 2);
    }

    /// A kernel that is still setting the interface up drops its only answer.
    const TRIES: u32 = 30;

    /// In a network namespace of its own: the kernel takes a superpacket that we made of two segments, and
    /// answers with a packet whose checksum it leaves to us.
    ///
    /// Conforms: data:20.2.12
    #[test]
    fn the_kernel_takes_our_superpackets_and_we_finish_its_checksums() {
        let test = "packet_io::tun::tests::the_kernel_takes_our_superpackets_and_we_finish_its_checksums";
        if let Err(why) = can_have_a_device() {
            return skipped(test, &why);
        }
        if !is_apart(test, Apart::InANetworkOfItsOwn) {
            return;
        }
        let tun = device();
        assert!(tun.has_offload);
        let reset = (0..TRIES).find_map(|_| {
            write_superpacket(&tun);
            std::iter::from_fn(|| read_packet(&tun)).find(|packet| packet.get(6) == Some(&6))
        });
        let reset = reset.expect("an answer");
        assert_eq!(reset[53] & 4, 4, "nobody listens there");
        let words =
            reset[8..].chunks(2).map(|word| u32::from_be_bytes([0, 0, word[0], *word.get(1).unwrap_or(&0)]));
        let sum = words.sum::<u32>() + 6 + u32::try_from(reset.len() - 40).unwrap();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    /// Anybody may open it on Debian, and make devices in a network of his own.
    fn can_have_a_device() -> Result<(), String> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        file.map_err(|error| format!("/dev/net/tun cannot be opened: {error}"))?;
        let ip = Command::new("ip").arg("-V").output();
        ip.map_err(|error| format!("ip (iproute2) is missing: {error}")).map(drop)
    }

    fn device() -> Tun {
        let tun = Tun::from_owned(Tun::create("warren-test").unwrap()).unwrap();
        let set_up = "ip address add fd60::1/64 dev warren-test nodad && ip link set warren-test up";
        assert!(Command::new("sh").args(["-c", set_up]).status().unwrap().success());
        tun
    }

    fn write_superpacket(tun: &Tun) {
        let (first, second) = (segment(1000), segment(1100));
        let mut buffer = [first.as_slice(), &second].concat();
        let mut coalescer = Coalescer::default();
        let refused = tun.write(&mut buffer, &[0..first.len(), first.len()..2 * first.len()], &mut coalescer);
        assert_eq!((refused, coalescer.len()), (0, 1));
        assert_eq!(tun.refusals.load(Ordering::Relaxed), 0);
    }

    /// 100 bytes of a TCP flow to the device's address.
    fn segment(sequence: u32) -> Vec<u8> {
        let mut packet = vec![0; 160];
        packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 120, 6, 64]);
        packet[8..24].copy_from_slice(&"fd60::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
        packet[24..40].copy_from_slice(&"fd60::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
        packet[40..44].copy_from_slice(&[0x30, 0x39, 0, 9]);
        packet[44..48].copy_from_slice(&sequence.to_be_bytes());
        packet[52..56].copy_from_slice(&[5 << 4, 0x10, 1, 0]);
        let words = packet[8..].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum = words.sum::<u32>() + 6 + 120;
        let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        packet[56..58].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    /// `None` when nothing comes for a while.
    fn read_packet(tun: &Tun) -> Option<Vec<u8>> {
        let mut buffer = vec![0; READ_ROOM];
        let mut poll = [rustix::event::PollFd::new(tun, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 2, tv_nsec: 0 };
        if rustix::event::poll(&mut poll, Some(&limit)).unwrap() == 0 {
            return None;
        }
        let frame = tun.read(&mut buffer).unwrap();
        let mut packet = Vec::new();
        let take =
            |segment: crate::packet_io::batch::Segment<'_>| packet = segment.padded[..segment.len].to_vec();
        crate::packet_io::batch::split(&frame.virtio, &mut buffer[frame.start..], frame.len, take).unwrap();
        Some(packet)
    }
}
