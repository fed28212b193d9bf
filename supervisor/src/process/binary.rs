//! A foreign tunnel's program, looked at before it is run with our privileges. Nothing is ever downloaded: it
//! is what an administrator has put there, where nobody else can change it.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::Access;
use serde::Deserialize;
use tokio::process::Command;

use super::{Spawner, output};

/// How long the program may take to say its version.
const VERSION_LIMIT: Duration = Duration::from_secs(10);
/// The most that is read of what it says then.
const MAX_ANSWER: usize = 64 * 1024;
/// Characters of it that are shown.
const SHOWN: usize = 64;
/// The bit that lets everybody put files in a directory, and nobody take away those of others.
const STICKY: u32 = 0o1000;
const WRITABLE_BY_GROUP: u32 = 0o020;
const WRITABLE_BY_OTHERS: u32 = 0o002;
/// Who may have written a program that we run, besides ourselves.
const ROOT: u32 = 0;

/// Why a program is not run.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// It is not there, or cannot be looked at.
    #[error(
        "the tunnel program {} cannot be used: {error}; put it there, or take tunnel.binary out of the configuration",
        path.display()
    )]
    Missing {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is a directory, or something else that cannot be run.
    #[error("the tunnel program {} is no file: name the program itself in tunnel.binary", path.display())]
    NoFile {
        /// Which.
        path: PathBuf,
    },
    /// It may not be run.
    #[error("the tunnel program {0} is not executable: sudo chmod 0755 {0}", path.display())]
    NotExecutable {
        /// Which.
        path: PathBuf,
    },
    /// Others could change what we would run.
    #[error(
        "the tunnel program {} is not run: {} can be changed by others than root (owner {owner}, mode {mode:o}): {}",
        path.display(), exposed.display(), remedy(exposed)
    )]
    Exposed {
        /// The program.
        path: PathBuf,
        /// Itself, or a directory above it.
        exposed: PathBuf,
        /// Whose that is.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// It does not say its version.
    #[error(
        "the tunnel program {} is not run: `version --output=json` {said}; put version {wanted} there, or take \
         tunnel.version out of the configuration",
        path.display()
    )]
    NoVersion {
        /// Which.
        path: PathBuf,
        /// What it did instead.
        said: String,
        /// What it should have said.
        wanted: String,
    },
    /// It has another version.
    #[error(
        "the tunnel program {} is not run: its version is {found:?}, and tunnel.version in the configuration says \
         {wanted}; correct one of them",
        path.display()
    )]
    OtherVersion {
        /// Which.
        path: PathBuf,
        /// What it has.
        found: String,
        /// What it should have.
        wanted: String,
    },
}

/// Whether the program may be run: it is there, a file, executable, and neither it nor a directory above it can
/// be changed by anybody but root and `own`, the service's user. Returns where it is without links, which is
/// what was looked at.
pub fn check(path: &Path, own: u32) -> Result<PathBuf, BinaryError> {
    let missing = |error| BinaryError::Missing { path: path.to_owned(), error };
    let real = fs::canonicalize(path).map_err(missing)?;
    if !fs::metadata(&real).map_err(missing)?.is_file() {
        return Err(BinaryError::NoFile { path: path.to_owned() });
    }
    let trusted = Trusted { own, unmapped: unmapped() };
    // What it is called, and what that leads to: either may be somebody's.
    for exposed in real.ancestors().chain(path.ancestors().skip(1)) {
        let there = fs::metadata(exposed).map_err(missing)?;
        if trusted.is_exposed(&there) {
            let (path, exposed) = (path.to_owned(), exposed.to_owned());
            let mode = there.permissions().mode() & 0o7777;
            return Err(BinaryError::Exposed { path, exposed, owner: there.uid(), mode });
        }
    }
    let may_run = rustix::fs::access(&real, Access::EXEC_OK);
    may_run.map_err(|_| BinaryError::NotExecutable { path: path.to_owned() })?;
    Ok(real)
}

/// A directory may be somebody's home, and is not ours to give away.
fn remedy(exposed: &Path) -> String {
    if exposed.is_dir() {
        "put the program where only root can change anything, such as /usr/local/libexec".to_owned()
    } else {
        format!("sudo chown root:root {0}; sudo chmod go-w {0}", exposed.display())
    }
}

/// Who may have put a program there.
struct Trusted {
    own: u32,
    /// Whose files seem to be root's of outside, in a user namespace.
    unmapped: Option<u32>,
}

impl Trusted {
    fn is_exposed(&self, there: &fs::Metadata) -> bool {
        let mode = there.permissions().mode();
        let is_writable =
            mode & WRITABLE_BY_OTHERS != 0 || mode & WRITABLE_BY_GROUP != 0 && !self.is_root(there.gid());
        let is_sticky = there.is_dir() && mode & STICKY != 0;
        let is_ours = self.is_root(there.uid()) || there.uid() == self.own;
        !is_ours || is_writable && !is_sticky
    }

    fn is_root(&self, id: u32) -> bool {
        id == ROOT || Some(id) == self.unmapped
    }
}

/// The id that the kernel shows for users without one in our user namespace, root of outside among them; `None`
/// where every user has one. Users and groups share it unless somebody has changed that.
fn unmapped() -> Option<u32> {
    let map = fs::read_to_string("/proc/self/uid_map").ok()?;
    let ids = map.lines().filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok());
    if ids.sum::<u64>() >= u64::from(u32::MAX) {
        return None;
    }
    fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?.trim().parse().ok()
}

/// Whether this is a version as a configuration may name it: two to four numbers, joined by dots.
pub fn is_version(text: &str) -> bool {
    numbers(text).is_some_and(|numbers| (2..=4).contains(&numbers.len()))
}

/// Asks the program for its version, and whether it is `wanted`: every number that is named must be the same.
pub async fn check_version(path: &Path, wanted: &str, spawner: &Spawner) -> Result<(), BinaryError> {
    let refused =
        |said: String| BinaryError::NoVersion { path: path.to_owned(), said, wanted: wanted.to_owned() };
    // Without any secret, and without what a tunnel is given.
    let mut command = Command::new(path);
    command.args(["version", "--output=json"]).env_clear();
    let said = output::of(command, spawner, VERSION_LIMIT, MAX_ANSWER).await;
    let said = said.map_err(|error| refused(format!("does not say its version ({error})")))?;
    #[derive(Deserialize)]
    struct Said {
        version: String,
    }
    let said: Said =
        serde_json::from_slice(&said).map_err(|_| refused("does not say its version".to_owned()))?;
    let shown: String = said.version.chars().take(SHOWN).collect();
    // What follows the numbers names a build; which one it is does not matter to us.
    let found = said.version.split(['-', '+']).next().and_then(numbers);
    let found = found.ok_or_else(|| refused(format!("says {shown:?}, which is no version")))?;
    let named = numbers(wanted).unwrap_or_default();
    let is_wanted = !named.is_empty() && named.iter().zip(&found).all(|(named, found)| named == found);
    let is_known = found.len() >= named.len().min(3);
    if is_wanted && is_known {
        Ok(())
    } else {
        Err(BinaryError::OtherVersion { path: path.to_owned(), found: shown, wanted: wanted.to_owned() })
    }
}

fn numbers(text: &str) -> Option<Vec<u64>> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let digits =
        |part: &str| part.bytes().all(|byte| byte.is_ascii_digit()).then(|| part.parse().ok()).flatten();
    text.split('.').map(digits).collect()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const NOBODY: u32 = 12345;

    fn program(mode: u32, says: &str) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (source, path) = (folder.path().join("source"), folder.path().join("tunnel"));
        fs::write(&source, format!("#!/bin/sh\n[ \"$*\" = 'version --output=json' ] && {says}\n")).unwrap();
        // By another process: nothing that is open for writing here, and in whatever is forked meanwhile, can run.
        let copied = std::process::Command::new("cp").args([&source, &path]).status();
        assert!(copied.unwrap().success());
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (folder, path)
    }

    fn own() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    /// Deployed managers run what they have downloaded if its signature is right, on one system, and unseen
    /// on another. We never download: what runs is a file that only root, or the service's user, can have put
    /// there.
    ///
    /// Conforms: vpn:W20 vpn:15.23
    #[test]
    fn a_program_that_others_could_change_is_not_run() {
        for mode in [0o777, 0o757, 0o702] {
            let (_folder, path) = program(mode, "true");
            let error = check(&path, own()).unwrap_err();
            assert!(matches!(error, BinaryError::Exposed { .. }), "{mode:o}: {error}");
            assert!(error.to_string().contains("chmod go-w"), "{error}");
        }
        let (_folder, path) = program(0o755, "true");
        assert_eq!(check(&path, own()).unwrap(), fs::canonicalize(&path).unwrap());
    }

    #[test]
    fn a_program_of_another_user_or_in_a_folder_that_others_can_change_is_not_run() {
        let (folder, path) = program(0o755, "true");
        if own() == ROOT {
            std::os::unix::fs::chown(&path, Some(NOBODY), None).unwrap();
            assert!(matches!(check(&path, own()), Err(BinaryError::Exposed { owner: NOBODY, .. })));
            check(&path, NOBODY).unwrap();
            std::os::unix::fs::chown(&path, Some(ROOT), None).unwrap();
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = check(&path, own()).unwrap_err();
        assert!(
            matches!(&error, BinaryError::Exposed { exposed, .. } if exposed == folder.path()),
            "{error}"
        );
        assert!(
            error.to_string().contains("where only root") && !error.to_string().contains("chown"),
            "{error}"
        );
        let elsewhere = tempfile::tempdir().unwrap();
        let link = elsewhere.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(check(&link, own()), Err(BinaryError::Exposed { .. })), "by another name");
    }

    #[test]
    fn in_a_user_namespace_what_belongs_to_nobody_may_be_roots() {
        let there = fs::metadata("/").unwrap();
        let outside = Trusted { own: NOBODY, unmapped: None };
        let inside = Trusted { own: NOBODY, unmapped: Some(there.uid()) };
        assert!(!inside.is_exposed(&there));
        assert_eq!(outside.is_exposed(&there), there.uid() != ROOT);
    }

    #[test]
    fn what_is_missing_or_cannot_be_run_is_named_with_what_to_do() {
        let (folder, path) = program(0o644, "true");
        assert!(check(&path, own()).unwrap_err().to_string().contains("chmod 0755"));
        assert!(check(folder.path(), own()).unwrap_err().to_string().contains("no file"));
        let text = check(&folder.path().join("gone"), own()).unwrap_err().to_string();
        assert!(text.contains("No such file") && text.contains("tunnel.binary"), "{text}");
    }

    /// Conforms: vpn:W21
    #[tokio::test]
    async fn the_version_that_the_administrator_names_must_be_the_programs() {
        let spawner = Spawner::start(tokio::runtime::Handle::current()).unwrap();
        let says = |version: &str| format!("echo '{{\"version\": \"{version}\"}}'");
        for (version, wanted, is_right) in [
            ("v2.31.1", "2.31.1", true),
            ("v2.31.1+abc", "2.31", true),
            ("2.31.1-devel+abc", "v2.31.1", true),
            ("2.31.1.0", "2.31.1", true),
            ("2.31.1", "2.31.1.7", true),
            ("2.31", "2.31.1", false),
            ("3.31.1", "2.31.1", false),
            ("2.30.1", "2.31.1", false),
            ("2.31.2", "2.31.1", false),
            ("2.31.2", "2.31.1.0", false),
            ("", "2.31.1", false),
            ("new", "2.31.1", false),
        ] {
            let (_folder, path) = program(0o755, &says(version));
            let checked = check_version(&path, wanted, &spawner).await;
            assert_eq!(checked.is_ok(), is_right, "{version} for {wanted}: {checked:?}");
        }
        for silent in ["false", "true", "echo v2.31.1", "exit 1"] {
            let (_folder, path) = program(0o755, silent);
            let error = check_version(&path, "2.31.1", &spawner).await.unwrap_err();
            assert!(matches!(error, BinaryError::NoVersion { .. }), "{silent}: {error}");
        }
    }

    #[test]
    fn a_version_is_two_to_four_numbers() {
        assert!(["2.31", "v2.31.1", "2.31.1.0"].iter().all(|text| is_version(text)));
        assert!(!["", "2", "2.x", "2.31.1.0.0", "2..1", "latest"].iter().any(|text| is_version(text)));
    }
}
