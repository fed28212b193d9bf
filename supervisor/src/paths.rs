//! Where the service keeps its sockets, its state and its configuration: one table for a system service,
//! one for an ordinary user's own. Flags come first, then what systemd says, then the defaults.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

/// Whose service it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The machine's: run by root or by systemd, used by a group.
    System,
    /// An ordinary user's own.
    User,
}

impl Scope {
    /// The mode of the sockets, from their first moment on.
    pub fn socket_mode(self) -> u32 {
        match self {
            Self::System => 0o660,
            Self::User => 0o600,
        }
    }

    fn directory_mode(self) -> u32 {
        match self {
            Self::System => 0o755,
            Self::User => 0o700,
        }
    }
}

/// What the command line said about places.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Directory for the sockets.
    pub runtime_dir: Option<PathBuf>,
    /// Directory for what outlives a restart.
    pub state_dir: Option<PathBuf>,
    /// Configuration file.
    pub config: Option<PathBuf>,
}

/// The places of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Whose service it is.
    pub scope: Scope,
    /// Directory for the sockets.
    pub runtime_dir: PathBuf,
    /// Directory for what outlives a restart.
    pub state_dir: PathBuf,
    /// Configuration file.
    pub config: PathBuf,
    /// Whether the configuration file was named, and must exist.
    pub config_is_named: bool,
}

/// Why there is no place.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// A variable that says where is missing.
    #[error("{variable} is not set, so there is no place for the {what}: set it, or give {flag} DIR")]
    Unset {
        /// The variable.
        variable: &'static str,
        /// What it would hold.
        what: &'static str,
        /// What to give instead.
        flag: &'static str,
    },
    /// A directory cannot be made or looked at.
    #[error("cannot use the directory {}: {error}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Others could put their own sockets or state there.
    #[error(
        "the directory {} can be changed by others (owner {owner}, mode {mode:o}): give it to this user and take away \
         the write permission of group and others",
        path.display()
    )]
    Exposed {
        /// Which.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
}

impl Paths {
    /// The places for a process of user `uid` with these variables.
    pub fn resolve(
        overrides: &Overrides,
        uid: u32,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, PathError> {
        let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        // systemd may name several, joined by colons; the first is the main one.
        let systemd = |name: &str| {
            let first = variable(name)?.to_str()?.split(':').next()?.to_owned();
            Some(PathBuf::from(first)).filter(|path| path.is_absolute())
        };
        let scope =
            if uid == 0 || systemd("RUNTIME_DIRECTORY").is_some() { Scope::System } else { Scope::User };
        let below = |name: &str, home: &str| {
            absolute(name).or_else(|| absolute("HOME").map(|it| it.join(home))).map(|it| it.join("warren"))
        };
        let default = |what, flag, system: &str, named: Option<PathBuf>, variable, user: Option<PathBuf>| {
            let found = named.or_else(|| match scope {
                Scope::System => Some(PathBuf::from(system)),
                Scope::User => user,
            });
            found.ok_or(PathError::Unset { variable, what, flag })
        };
        Ok(Self {
            scope,
            runtime_dir: default(
                "sockets",
                "--runtime-dir",
                "/run/warren",
                overrides.runtime_dir.clone().or_else(|| systemd("RUNTIME_DIRECTORY")),
                "XDG_RUNTIME_DIR",
                absolute("XDG_RUNTIME_DIR").map(|it| it.join("warren")),
            )?,
            state_dir: default(
                "state",
                "--state-dir",
                "/var/lib/warren",
                overrides.state_dir.clone().or_else(|| systemd("STATE_DIRECTORY")),
                "HOME",
                below("XDG_STATE_HOME", ".local/state"),
            )?,
            config: default(
                "configuration",
                "--config",
                "/etc/warren/config.toml",
                overrides.config.clone(),
                "HOME",
                below("XDG_CONFIG_HOME", ".config").map(|it| it.join("config.toml")),
            )?,
            config_is_named: overrides.config.is_some(),
        })
    }

    /// Makes the directories, and refuses any that others can change.
    pub fn prepare(&self) -> Result<(), PathError> {
        prepare(&self.runtime_dir, self.scope.directory_mode())?;
        prepare(&self.state_dir, 0o700)
    }

    /// The socket of leg B.
    pub fn vpn_socket(&self) -> PathBuf {
        self.runtime_dir.join("vpn.sock")
    }

    /// The socket of the local API.
    pub fn api_socket(&self) -> PathBuf {
        self.runtime_dir.join("api.sock")
    }
}

fn prepare(path: &Path, mode: u32) -> Result<(), PathError> {
    let failed = |error| PathError::Directory { path: path.to_owned(), error };
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed)?;
    let metadata = fs::metadata(path).map_err(failed)?;
    let ours = rustix::process::geteuid().as_raw();
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if (owner != ours && owner != 0) || mode & 0o022 != 0 {
        return Err(PathError::Exposed { path: path.to_owned(), owner, mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn resolve(uid: u32, variables: &[(&str, &str)]) -> Result<Paths, PathError> {
        Paths::resolve(&Overrides::default(), uid, |name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn root_uses_the_places_of_the_system() {
        let paths = resolve(0, &[("XDG_RUNTIME_DIR", "/run/user/0"), ("HOME", "/root")]).unwrap();
        assert_eq!(paths.vpn_socket(), Path::new("/run/warren/vpn.sock"));
        assert_eq!(paths.state_dir, Path::new("/var/lib/warren"));
        assert_eq!(paths.config, Path::new("/etc/warren/config.toml"));
        assert_eq!(paths.scope.socket_mode(), 0o660);
    }

    #[test]
    fn a_user_uses_their_own_places() {
        let variables =
            [("XDG_RUNTIME_DIR", "/run/user/7"), ("HOME", "/home/a"), ("XDG_STATE_HOME", "/home/s")];
        let paths = resolve(7, &variables).unwrap();
        assert_eq!(paths.api_socket(), Path::new("/run/user/7/warren/api.sock"));
        assert_eq!(paths.state_dir, Path::new("/home/s/warren"));
        assert_eq!(paths.config, Path::new("/home/a/.config/warren/config.toml"));
        assert_eq!(paths.scope.socket_mode(), 0o600);
    }

    #[test]
    fn under_systemd_a_user_of_its_own_still_serves_the_system() {
        let variables =
            [("RUNTIME_DIRECTORY", "/run/warren:/run/other"), ("STATE_DIRECTORY", "/var/lib/warren")];
        let paths = resolve(990, &variables).unwrap();
        assert_eq!(paths.scope, Scope::System);
        assert_eq!(paths.runtime_dir, Path::new("/run/warren"));
    }

    #[test]
    fn a_missing_variable_is_named_with_a_remedy() {
        let error = resolve(7, &[("HOME", "/home/a")]).unwrap_err().to_string();
        assert!(error.contains("XDG_RUNTIME_DIR") && error.contains("--runtime-dir"), "{error}");
    }

    #[test]
    fn flags_come_before_everything() {
        let overrides = Overrides {
            runtime_dir: Some("/a".into()),
            state_dir: Some("/b".into()),
            config: Some("/c".into()),
        };
        let paths = Paths::resolve(&overrides, 7, |_| None).unwrap();
        assert_eq!(
            [&paths.runtime_dir, &paths.state_dir, &paths.config].map(|it| it.to_str().unwrap()),
            ["/a", "/b", "/c"]
        );
        assert!(paths.config_is_named);
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let open = folder.path().join("open");
        prepare(&open, 0o700).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(prepare(&open, 0o700), Err(PathError::Exposed { mode: 0o777, .. })));
    }
}
