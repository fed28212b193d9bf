//! The service's listening sockets: Unix sockets that have their final mode and group before anybody can
//! reach them, one service for a directory, and the loopback listener for metrics.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::unistd::Group;
use rustix::{
    fs::{FlockOperation, Gid, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use crate::{
    config::{Config, DEFAULT_GROUP, MetricsListen},
    paths::{Paths, Scope},
};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another service is at work.
    #[error(
        "another warren service is running (it holds {}): stop it, or give --runtime-dir and --state-dir",
        path.display()
    )]
    Running {
        /// What it holds.
        path: PathBuf,
    },
    /// A Unix socket cannot be made.
    #[error("cannot listen at {}: {error}", path.display())]
    Unix {
        /// Where.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The group that was configured does not exist.
    #[error(
        "there is no group {group:?}: make it with `groupadd {group}`, or correct `group` in the configuration"
    )]
    Group {
        /// Its name.
        group: String,
    },
    /// The metrics listener cannot be made.
    #[error(
        "cannot listen at {address} for metrics: {error}; choose another with --metrics-listen, or \"off\""
    )]
    Metrics {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The metrics listener that was handed over is none.
    #[error("--metrics-fd {number} is no listening socket: {error}")]
    Inherited {
        /// Its number.
        number: RawFd,
        /// What the system said.
        error: io::Error,
    },
}

/// The right to be the service of a directory; given back with the process, however it ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held open, never read")] fs::File);

impl Lock {
    /// Takes it, unless another service has it.
    pub fn take(directory: &Path) -> Result<Self, SocketError> {
        let path = directory.join("service.lock");
        let failed = |error| SocketError::Unix { path: path.clone(), error };
        let file =
            fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(Errno::WOULDBLOCK) => Err(SocketError::Running { path }),
            Err(error) => Err(failed(error.into())),
        }
    }
}

/// The group that may talk to the service: none but in the system's scope.
pub fn group(paths: &Paths, config: &Config) -> Result<Option<Gid>, SocketError> {
    if paths.scope == Scope::User {
        return Ok(None);
    }
    let name = config.group.as_deref().unwrap_or(DEFAULT_GROUP);
    let found = Group::from_name(name).ok().flatten();
    match found {
        Some(group) => Ok(Some(Gid::from_raw(group.gid.as_raw()))),
        // The one that packages make may be missing; the one that somebody named may not.
        None if config.group.is_none() => Ok(None),
        None => Err(SocketError::Group { group: name.to_owned() }),
    }
}

/// Listens at `path`. The socket is made where nobody else can reach it, and takes its name, in the place
/// of what a dead service has left there, when it has its final mode and group.
pub fn listen(path: &Path, mode: u32, group: Option<Gid>) -> Result<UnixListener, SocketError> {
    let failed = |error| SocketError::Unix { path: path.to_owned(), error };
    if is_served(path).map_err(failed)? {
        return Err(SocketError::Running { path: path.to_owned() });
    }
    bind(path, mode, group).map_err(failed)
}

/// Whether somebody listens at `path`. What is no socket is nobody's to replace.
fn is_served(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.file_type().is_socket() => {}
        Ok(_) => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is there"));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    }
    // Without waiting: one that has no room for more clients is there, too.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn bind(path: &Path, mode: u32, group: Option<Gid>) -> io::Result<UnixListener> {
    let parent = path.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // A second socket may be wanted where nobody has made a place yet, as after a reboot.
    fs::DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    let only_ours = fs::Permissions::from_mode(0o700);
    let private = tempfile::Builder::new().prefix(".sock-").permissions(only_ours).tempdir_in(parent)?;
    let new = private.path().join("s");
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    if group.is_some() {
        rustix::fs::chown(&new, None, group)?;
    }
    fs::rename(&new, path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Where metrics and health are served, if anywhere: at an inherited socket, or at an address.
pub fn metrics(
    inherited: Option<OwnedFd>,
    listen: MetricsListen,
) -> Result<Option<TcpListener>, SocketError> {
    let listener = match (inherited, listen) {
        (Some(inherited), _) => TcpListener::from(inherited),
        (None, MetricsListen::Off) => return Ok(None),
        (None, MetricsListen::Address(address)) => {
            TcpListener::bind(address).map_err(|error| SocketError::Metrics { address, error })?
        }
    };
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    listener.set_nonblocking(true).map_err(|error| SocketError::Metrics { address, error })?;
    Ok(Some(listener))
}

/// The metrics listener that was handed over under this number.
pub fn inherited(number: RawFd) -> Result<OwnedFd, SocketError> {
    let failed = |error| SocketError::Inherited { number, error };
    // SAFETY: only asks about a number; one that is not open is an error.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number.max(0)) };
    if number < 3
        || !rustix::net::sockopt::socket_acceptconn(borrowed).map_err(|error| failed(error.into()))?
    {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    // SAFETY: it is open, and whoever started us left it to us: nobody else here uses its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::MetadataExt, net::UnixStream};

    use super::*;

    #[test]
    fn a_socket_has_its_final_mode_and_nothing_else_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vpn.sock");
        let _listener = listen(&path, 0o600, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_socket_of_a_dead_service_is_replaced_and_that_of_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vpn.sock");
        drop(listen(&path, 0o600, None).unwrap());
        let _alive = listen(&path, 0o600, None).unwrap();
        assert!(matches!(listen(&path, 0o600, None), Err(SocketError::Running { .. })));
    }

    #[test]
    fn what_is_no_socket_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "words").unwrap();
        let error = listen(&path, 0o600, None).unwrap_err().to_string();
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "words");
    }

    #[test]
    fn the_place_of_a_socket_is_made_where_it_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/vpn.sock");
        let _listener = listen(&path, 0o600, None).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_directory_has_one_service() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Lock::take(folder.path()).unwrap();
        let error = Lock::take(folder.path()).unwrap_err().to_string();
        assert!(error.contains("another warren service"), "{error}");
        drop(lock);
        assert!(Lock::take(folder.path()).is_ok());
    }

    #[test]
    fn a_metrics_address_in_use_is_named_with_a_remedy() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = metrics(None, MetricsListen::Address(address)).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("--metrics-listen"), "{error}");
        assert!(metrics(None, MetricsListen::Off).unwrap().is_none());
    }

    #[test]
    fn a_descriptor_that_is_no_listener_is_refused() {
        for number in [-1, 0, 2, 1000] {
            assert!(matches!(inherited(number), Err(SocketError::Inherited { .. })), "{number}");
        }
    }
}
