//! The client's file is the master copy of the token: private to the user, written whole or not at
//! all. Start hands the service a copy.

use std::{
    fs, io,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use url::Url;

use super::exit::{CliError, Exit};

/// Far above any token; keeps a wrong file out of memory.
pub(crate) const MAX_FILE: u64 = 64 * 1024;

/// A deployment and the token it accepted.
#[derive(Debug)]
pub(crate) struct Credentials {
    /// The deployment's access URL.
    pub(crate) url: Url,
    /// The session token.
    pub(crate) token: SecretString,
}

#[derive(Serialize, Deserialize)]
struct File {
    url: Url,
    token: String,
}

/// Where the token is kept.
pub(crate) fn path() -> Result<PathBuf, CliError> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CONFIG_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".config")))
        .map(|base| base.join("warren").join("credentials.json"))
        .ok_or_else(|| {
            CliError::failed(
                "HOME is not set, so there is no place for the token: set HOME or XDG_CONFIG_HOME",
            )
        })
}

/// Reads the token of the last login.
pub(crate) fn load() -> Result<Credentials, CliError> {
    let path = path()?;
    let text = match read_capped(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(CliError::new(Exit::LoginNeeded, "not logged in: run `warren login URL` first"));
        }
        Err(error) => return Err(CliError::failed(format!("cannot read {}: {error}", path.display()))),
    };
    let unreadable = |_| {
        let path = path.display();
        CliError::new(Exit::LoginNeeded, format!("{path} is damaged: run `warren login URL` again"))
    };
    let File { url, token } = serde_json::from_str(&text).map_err(unreadable)?;
    Ok(Credentials { url, token: token.into() })
}

/// Keeps the token, replacing an earlier one.
pub(crate) fn save(credentials: &Credentials) -> Result<PathBuf, CliError> {
    let path = path()?;
    let write = || -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)?;
        // Born with mode 0600 under a random name; the rename makes it visible whole.
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        let url = credentials.url.clone();
        let content = File { url, token: credentials.token.expose_secret().to_owned() };
        serde_json::to_writer(&mut file, &content)?;
        file.flush()?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        Ok(())
    };
    write().map_err(|error| CliError::failed(format!("cannot write {}: {error}", path.display())))?;
    Ok(path)
}

/// Forgets the token. Returns whether there was one.
pub(crate) fn erase() -> Result<bool, CliError> {
    let path = path()?;
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(CliError::failed(format!("cannot remove {}: {error}", path.display()))),
    }
}

/// Reads a text file of at most [`MAX_FILE`] bytes.
pub(crate) fn read_capped(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}
