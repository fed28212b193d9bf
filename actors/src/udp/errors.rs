//! The error queue of a UDP socket: which destinations the network says cannot be reached.
//!
//! This is one of the files that may hold unsafe code: `recvmsg` with a control message that nobody else reads.
//! quinn-udp reads the queue as well and tells who complained, a router perhaps, but not about whom.

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::{AsRawFd, BorrowedFd},
};

/// One error and its address fit in a fraction of this.
const CONTROL: usize = 256;

/// Room for control messages, aligned as the kernel's structures are.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// An entry of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Complaint {
    /// Where the datagram was going; `None` for what cannot be read.
    pub(super) to: Option<SocketAddr>,
    /// What is wrong there.
    pub(super) errno: i32,
}

/// Takes the next entry; `WouldBlock` when there is none.
pub(super) fn next(socket: BorrowedFd<'_>) -> io::Result<Complaint> {
    // SAFETY: both structures are plain data, for which all zeros are valid.
    let (mut name, mut message): (libc::sockaddr_storage, libc::msghdr) = unsafe { mem::zeroed() };
    let mut control = Control([0; CONTROL]);
    let mut returned = [0; 1];
    let mut piece = libc::iovec { iov_base: returned.as_mut_ptr().cast(), iov_len: returned.len() };
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = length(size_of::<libc::sockaddr_storage>());
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL as _;
    // SAFETY: every pointer in `message` leads to a local that outlives the call and has the length given.
    let read = unsafe {
        libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
    };
    if read < 0 {
        return Err(io::Error::last_os_error());
    }
    let to = (message.msg_namelen > 0).then(|| address(&name)).flatten();
    Ok(Complaint { to, errno: errno(&message).unwrap_or(0) })
}

fn errno(message: &libc::msghdr) -> Option<i32> {
    // SAFETY: the kernel has filled the control buffer that `message` describes, which is still alive; the walk
    // stays inside of it by CMSG_NXTHDR, and only a message as long as the structure is read as one.
    unsafe {
        let least = libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as u32) as usize;
        let mut at = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = at.as_ref() {
            let kind = (header.cmsg_level, header.cmsg_type);
            let is_error = kind == (libc::IPPROTO_IP, libc::IP_RECVERR)
                || kind == (libc::IPPROTO_IPV6, libc::IPV6_RECVERR);
            if is_error && header.cmsg_len >= least {
                let error: libc::sock_extended_err =
                    libc::CMSG_DATA(header).cast::<libc::sock_extended_err>().read_unaligned();
                return i32::try_from(error.ee_errno).ok();
            }
            at = libc::CMSG_NXTHDR(message, header);
        }
    }
    None
}

fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which structure this is; the storage is larger and aligned for all of them.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from_bits(u32::from_be(name.sin_addr.s_addr));
            Some((ip, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(name.sin6_port), 0, name.sin6_scope_id).into())
        }
        _ => None,
    }
}

fn length(bytes: usize) -> libc::socklen_t {
    bytes as libc::socklen_t
}
