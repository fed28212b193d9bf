//! Where a lab keeps its sockets and state, and what is left of labs that were killed. Whoever uses a folder holds a
//! lock on it, which no death leaves behind: a folder without one is nobody's, and the next lab removes it.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use tempfile::TempDir;

const PREFIX: &str = "warren-lab-";

/// The folder of this lab; removed when it is closed or dropped.
pub(super) struct Folder {
    folder: TempDir,
    lock: OwnedFd,
}

impl Folder {
    /// A new one, after those of killed labs are removed.
    pub(super) fn new() -> io::Result<Self> {
        let parent = std::env::temp_dir();
        if let Err(error) = sweep(&parent) {
            eprintln!("warren lab: what killed labs left in {} stays there: {error}", parent.display());
        }
        let only_ours = std::fs::Permissions::from_mode(0o700);
        let folder = tempfile::Builder::new().prefix(PREFIX).permissions(only_ours).tempdir_in(parent)?;
        let lock = take(folder.path())?;
        Ok(Self { folder, lock })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The lock, for a process that uses the folder as well and may outlive us.
    pub(super) fn lock(&self) -> RawFd {
        self.lock.as_raw_fd()
    }

    /// Removes it.
    pub(super) fn close(self) -> io::Result<()> {
        self.folder.close()
    }
}

fn take(folder: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = open(folder, flags, Mode::empty())?;
    flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

/// Removes the folders of labs that are dead. One that is empty may be about to be used.
fn sweep(parent: &Path) -> io::Result<()> {
    let us = rustix::process::geteuid().as_raw();
    for entry in std::fs::read_dir(parent)?.flatten() {
        let is_labs = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        // Of the entry itself: links are not followed.
        let is_ours = || entry.metadata().is_ok_and(|it| it.is_dir() && it.uid() == us);
        let is_used = || std::fs::read_dir(entry.path()).is_ok_and(|mut inside| inside.next().is_some());
        if is_labs
            && is_ours()
            && is_used()
            && let Ok(_lock) = take(&entry.path())
        {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_folders_of_dead_labs_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let folder = parent.path().join(name);
            fs::create_dir(&folder).unwrap();
            folder
        };
        let used = |name: &str| {
            let folder = folder(name);
            fs::write(folder.join("config.toml"), "").unwrap();
            folder
        };
        let (dead, alive) = (used("warren-lab-dead"), used("warren-lab-alive"));
        let (new, others) = (folder("warren-lab-new"), used("others"));
        std::os::unix::fs::symlink(&others, parent.path().join("warren-lab-link")).unwrap();
        let lock = take(&alive).unwrap();
        sweep(parent.path()).unwrap();
        assert!(!dead.exists() && alive.exists() && new.exists() && others.join("config.toml").exists());
        drop(lock);
        sweep(parent.path()).unwrap();
        assert!(!alive.exists());
    }
}
