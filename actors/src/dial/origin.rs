//! Connections whose own address this machine has lost, as by a move to another network: nothing ever comes
//! through them again, and the kernel keeps quiet about it for minutes. Whoever reads or writes is told at once.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::Context,
};

use futures::task::AtomicWaker;

/// Where the connections of a dialer are made from, for as long as they are open.
#[derive(Default)]
pub(super) struct Origins(Mutex<Vec<Weak<Origin>>>);

/// Where one connection was made from.
#[derive(Debug)]
pub(super) struct Origin {
    address: IpAddr,
    is_lost: AtomicBool,
    reader: AtomicWaker,
}

impl Origins {
    /// Keeps an eye on a connection that was made from there.
    pub(super) fn add(&self, address: IpAddr) -> Arc<Origin> {
        let origin = Arc::new(Origin::new(address));
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|origin| origin.strong_count() > 0);
        all.push(Arc::downgrade(&origin));
        origin
    }

    /// Fails every connection whose address is not `kept`.
    pub(super) fn fail_lost(&self, kept: impl Fn(IpAddr) -> bool) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for origin in all.iter().filter_map(Weak::upgrade).filter(|origin| !kept(origin.address)) {
            origin.is_lost.store(true, Ordering::Release);
            origin.reader.wake();
        }
    }
}

impl Origin {
    fn new(address: IpAddr) -> Self {
        Self { address, is_lost: AtomicBool::new(false), reader: AtomicWaker::new() }
    }

    /// Fails if the address is lost, and wakes the reader when that happens.
    pub(super) fn check_read(&self, cx: &Context<'_>) -> io::Result<()> {
        self.reader.register(cx.waker());
        self.check()
    }

    /// Fails if the address is lost.
    pub(super) fn check(&self) -> io::Result<()> {
        if self.is_lost.load(Ordering::Acquire) {
            let text = "this machine has lost the address that the connection was made from";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, text));
        }
        Ok(())
    }
}

/// Whether an address is one of this machine's. Where that cannot be told it is.
pub(super) fn is_ours(address: IpAddr) -> bool {
    let bound = UdpSocket::bind((address, 0));
    !bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_machine_are_told_from_those_of_nobody() {
        assert!(is_ours([127, 0, 0, 1].into()));
        assert!(!is_ours([192, 0, 2, 77].into()));
    }

    #[test]
    fn connections_that_are_closed_are_forgotten() {
        let origins = Origins::default();
        for _ in 0..100 {
            drop(origins.add([127, 0, 0, 1].into()));
        }
        assert_eq!(origins.0.lock().unwrap().len(), 1);
    }
}
