//! Address translators: what a router at a site's edge does to the datagrams that pass it (RFC 4787). The rules
//! alone: the simulation has them on a virtual clock, the [internet](crate::internet) in front of real hosts.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::{Duration, Instant},
};

/// What nobody used for so long is forgotten; RFC 4787 asks for two minutes, many routers take 30 s.
const IDLE: Duration = Duration::from_secs(30);

/// Which outer address a source gets, and whose datagrams are let in to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One for each source; open to everybody.
    FullCone,
    /// One for each source; open to whoever has the address of one that was written to.
    Restricted,
    /// One for each source; open to those alone that were written to.
    PortRestricted,
    /// One for each pair of source and destination; open to that destination alone.
    Symmetric,
}

/// The router of a site.
#[derive(Clone, Debug)]
pub struct Nat {
    kind: Kind,
    outer: Ipv4Addr,
    idle: Duration,
    mappings: BTreeMap<u16, Mapping>,
}

#[derive(Clone, Debug)]
struct Mapping {
    inner: SocketAddr,
    /// Who was written to, and when last.
    remotes: BTreeMap<SocketAddr, Instant>,
}

impl Nat {
    /// One that has this address in the world.
    #[must_use]
    pub fn new(kind: Kind, outer: Ipv4Addr) -> Self {
        Self { kind, outer, idle: IDLE, mappings: BTreeMap::new() }
    }

    /// The same that forgets what was idle for so long, as translators do that know connections.
    #[must_use]
    pub fn forgetting_after(self, idle: Duration) -> Self {
        Self { idle, ..self }
    }

    /// The source that the world sees of a datagram that leaves. `port` gives a number to try.
    pub fn leave(
        &mut self,
        now: Instant,
        inner: SocketAddr,
        to: SocketAddr,
        port: impl FnMut() -> u16,
    ) -> SocketAddr {
        self.forget_idle(now);
        let is_symmetric = self.kind == Kind::Symmetric;
        let fits = |mapping: &Mapping| {
            mapping.inner == inner && (!is_symmetric || mapping.remotes.contains_key(&to))
        };
        let known = self.mappings.iter().find(|(_, mapping)| fits(mapping)).map(|(port, _)| *port);
        let port = known.unwrap_or_else(|| self.free_port(inner, port));
        let mapping =
            self.mappings.entry(port).or_insert_with(|| Mapping { inner, remotes: BTreeMap::new() });
        mapping.remotes.insert(to, now);
        SocketAddrV4::new(self.outer, port).into()
    }

    /// Whom a datagram that arrives is for; nobody if it is not let in.
    pub fn enter(&mut self, now: Instant, from: SocketAddr, port: u16) -> Option<SocketAddr> {
        self.forget_idle(now);
        let mapping = self.mappings.get(&port)?;
        let is_open = match self.kind {
            Kind::FullCone => true,
            Kind::Restricted => mapping.remotes.keys().any(|remote| remote.ip() == from.ip()),
            Kind::PortRestricted | Kind::Symmetric => mapping.remotes.contains_key(&from),
        };
        is_open.then_some(mapping.inner)
    }

    /// Starts anew, as after a power cut.
    pub fn restart(&mut self) {
        self.mappings.clear();
    }

    fn forget_idle(&mut self, now: Instant) {
        let idle = self.idle;
        self.mappings.retain(|_, mapping| {
            mapping.remotes.retain(|_, at| now.saturating_duration_since(*at) < idle);
            !mapping.remotes.is_empty()
        });
    }

    /// Routers keep the port where they can; symmetric ones do not even try.
    fn free_port(&self, inner: SocketAddr, mut port: impl FnMut() -> u16) -> u16 {
        let mut wanted = if self.kind == Kind::Symmetric { port() } else { inner.port() };
        while wanted < 1024 || self.mappings.contains_key(&wanted) {
            wanted = port();
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Kind; 4] = [Kind::FullCone, Kind::Restricted, Kind::PortRestricted, Kind::Symmetric];

    #[test]
    fn who_was_written_to_may_answer() {
        for kind in ALL {
            let mut router = Router::new(kind);
            let outer = router.leave("198.51.100.9:3478");
            assert_eq!(router.enter("198.51.100.9:3478", outer), Some(INNER), "{kind:?}");
        }
    }

    #[test]
    fn cones_show_one_address_to_all_and_symmetric_ones_another_to_each() {
        for kind in ALL {
            let mut router = Router::new(kind);
            let [first, second] = ["198.51.100.9:1", "198.51.100.8:1"].map(|to| router.leave(to));
            assert_eq!(first == second, kind != Kind::Symmetric, "{kind:?}");
            assert_eq!(router.leave("198.51.100.9:1"), first, "{kind:?}");
        }
    }

    #[test]
    fn strangers_are_let_in_as_each_kind_has_it() {
        let strangers = ["198.51.100.9:2", "198.51.100.8:1"];
        let expected = [[true, true], [true, false], [false, false], [false, false]];
        for (kind, expected) in ALL.into_iter().zip(expected) {
            let mut router = Router::new(kind);
            let outer = router.leave("198.51.100.9:1");
            let are_let_in = strangers.map(|from| router.enter(from, outer).is_some());
            assert_eq!(are_let_in, expected, "{kind:?}");
        }
    }

    #[test]
    fn what_is_idle_for_half_a_minute_is_closed_again() {
        let mut router = Router::new(Kind::FullCone);
        let outer = router.leave("198.51.100.9:1");
        router.now += IDLE;
        assert_eq!(router.enter("198.51.100.9:1", outer), None);
    }

    const INNER: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 2), 41641));

    struct Router {
        nat: Nat,
        now: Instant,
        port: u16,
    }

    impl Router {
        fn new(kind: Kind) -> Self {
            Self { nat: Nat::new(kind, Ipv4Addr::new(203, 0, 113, 1)), now: Instant::now(), port: 5000 }
        }

        fn leave(&mut self, to: &str) -> SocketAddr {
            let port = &mut self.port;
            self.nat.leave(self.now, INNER, to.parse().unwrap(), || {
                *port += 1;
                *port
            })
        }

        fn enter(&mut self, from: &str, outer: SocketAddr) -> Option<SocketAddr> {
            self.nat.enter(self.now, from.parse().unwrap(), outer.port())
        }
    }
}
