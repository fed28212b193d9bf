//! What the user wants: up or down, to which deployment, with which token. Kept on disk, so that a
//! service that is started again, or was killed, goes on with it.
//!
//! This part alone writes the cell and the file. The file is private to the service's user and replaced
//! whole: a reader finds the old intent or the new one, never half of one.

use std::{
    fmt, fs, io,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use warren_actors::runtime::{Cell, CellWriter, Context, Part, PartError, Reply};

/// The file in the state directory.
const FILE: &str = "intent.json";

/// Largest file that is read, in bytes: what a client may send of headers, with room.
const MAX_FILE: u64 = 1 << 20;

/// Which tunnel somebody asked for.
#[derive(Clone)]
pub struct Order {
    /// The deployment's access URL, as given.
    pub url: String,
    /// The session token.
    pub token: SecretString,
    /// Extra HTTP headers, in order.
    pub headers: Vec<(String, SecretString)>,
    /// The user who asked; the tunnel is theirs.
    pub owner: u32,
}

impl Order {
    /// Everything in it that must not be shown.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretString> {
        std::iter::once(&self.token).chain(self.headers.iter().map(|(_, value)| value))
    }
}

impl PartialEq for Order {
    /// Whether both ask for the same tunnel, whoever asks.
    fn eq(&self, other: &Self) -> bool {
        let same = |a: &SecretString, b: &SecretString| a.expose_secret() == b.expose_secret();
        let headers = || self.headers.iter().zip(&other.headers);
        self.url.trim_end_matches('/') == other.url.trim_end_matches('/')
            && same(&self.token, &other.token)
            && self.headers.len() == other.headers.len()
            && headers().all(|(a, b)| a.0 == b.0 && same(&a.1, &b.1))
    }
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Order").field("url", &self.url).field("owner", &self.owner).finish_non_exhaustive()
    }
}

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Desired {
    /// Whether there should be a tunnel.
    pub up: bool,
    /// The last order that worked; `down` keeps it, `logout` does not.
    pub order: Option<Arc<Order>>,
}

impl Desired {
    /// The tunnel there should be.
    pub fn wanted(&self) -> Option<&Arc<Order>> {
        self.order.as_ref().filter(|_| self.up)
    }
}

/// What the intent hears. The answer comes when it is on the disk, or cannot be put there; the service
/// goes by it either way.
#[derive(Debug)]
pub enum Message {
    /// This tunnel is wanted.
    Up {
        /// Which.
        order: Arc<Order>,
        /// Whether it will be remembered.
        reply: Reply<Result<(), IntentError>>,
    },
    /// No tunnel is wanted; the token is kept.
    Down {
        /// Whether it will be remembered.
        reply: Reply<Result<(), IntentError>>,
    },
    /// No tunnel is wanted, and nothing is to be known of the last one.
    Forget {
        /// Whether it is gone from the disk.
        reply: Reply<Result<(), IntentError>>,
    },
}

/// Why an intent was not written.
#[derive(Debug, thiserror::Error)]
pub enum IntentError {
    /// The file cannot be replaced.
    #[error("cannot write {}: {error}; make room or correct its permissions", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// The part.
pub struct Intent {
    state_dir: PathBuf,
    desired: Cell<Desired>,
}

impl Intent {
    /// The intent kept in `state_dir`.
    pub fn new(state_dir: PathBuf, desired: Cell<Desired>) -> Self {
        Self { state_dir, desired }
    }
}

impl Part for Intent {
    type Message = Message;
    type State = CellWriter<Desired>;

    async fn start(&self, _: &Context<Message>) -> Result<Self::State, PartError> {
        let writer = self.desired.claim()?;
        // The cell outlives us: a successor finds it filled, and the file no newer.
        if *writer.get() == Desired::default() {
            let state_dir = self.state_dir.clone();
            writer.set_if_changed(tokio::task::spawn_blocking(move || load(&state_dir)).await?);
        }
        Ok(writer)
    }

    async fn handle(
        &self,
        _: &Context<Message>,
        state: &mut Self::State,
        message: Message,
    ) -> Result<(), PartError> {
        let kept = state.get().order.clone();
        let (desired, reply) = match message {
            Message::Up { order, reply } => (Desired { up: true, order: Some(order) }, reply),
            Message::Down { reply } => (Desired { up: false, order: kept }, reply),
            Message::Forget { reply } => (Desired::default(), reply),
        };
        let (state_dir, on_disk) = (self.state_dir.clone(), desired.clone());
        state.set_if_changed(desired);
        let stored = tokio::task::spawn_blocking(move || store(&state_dir, &on_disk)).await?;
        if let Err(error) = &stored {
            tracing::warn!(%error, "the intent will not survive a restart of the service");
        }
        let _ = reply.send(stored);
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    up: bool,
    owner: u32,
    url: String,
    token: String,
    headers: Vec<(String, String)>,
}

const VERSION: u32 = 1;

/// Reads the intent. One that cannot be understood is set aside, and nothing is wanted.
pub fn load(state_dir: &Path) -> Desired {
    let path = state_dir.join(FILE);
    match read(&path) {
        Ok(Some(file)) => {
            let secret = |(name, value): (String, String)| (name, value.into());
            let headers = file.headers.into_iter().map(secret).collect();
            let order = Order { url: file.url, token: file.token.into(), headers, owner: file.owner };
            Desired { up: file.up, order: Some(Arc::new(order)) }
        }
        Ok(None) => Desired::default(),
        Err(error) if !matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::FileTooLarge) => {
            tracing::error!(%error, path = %path.display(), "the stored intent cannot be read; nothing is started, and the file is left as it is");
            Desired::default()
        }
        Err(error) => {
            let aside = path.with_extension("json.bad");
            tracing::warn!(%error, path = %path.display(), "the stored intent is not understood; it is set aside, and nothing is started");
            let _ = fs::rename(&path, aside);
            Desired::default()
        }
    }
}

fn read(path: &Path) -> io::Result<Option<File>> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is too large"));
    }
    // The parser's own words could quote the token.
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "it is no intent of this version");
    let file: File = serde_json::from_slice(&text).map_err(|_| malformed())?;
    if file.version == VERSION { Ok(Some(file)) } else { Err(malformed()) }
}

/// Writes the intent: complete, private and on the disk before it takes its name.
pub fn store(state_dir: &Path, desired: &Desired) -> Result<(), IntentError> {
    let path = state_dir.join(FILE);
    let stored = match &desired.order {
        Some(order) => replace(state_dir, &path, desired.up, order),
        None => remove(&path),
    };
    stored.and_then(|()| sync(state_dir)).map_err(|error| IntentError::Write { path, error })
}

fn replace(state_dir: &Path, path: &Path, up: bool, order: &Order) -> io::Result<()> {
    let plain = |(name, value): &(String, SecretString)| (name.clone(), value.expose_secret().to_owned());
    let content = serde_json::to_vec(&File {
        version: VERSION,
        up,
        owner: order.owner,
        url: order.url.clone(),
        token: order.token.expose_secret().to_owned(),
        headers: order.headers.iter().map(plain).collect(),
    })?;
    let private = fs::Permissions::from_mode(0o600);
    let mut file = tempfile::Builder::new().prefix(".intent-").permissions(private).tempfile_in(state_dir)?;
    file.write_all(&content)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    // A copy that was set aside may hold the token too.
    for path in [path.to_owned(), path.with_extension("json.bad")] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Without this a crash of the machine could still undo the change of the name.
fn sync(directory: &Path) -> io::Result<()> {
    fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(up: bool) -> Desired {
        let order = Order {
            url: "https://coder.example.com/".into(),
            token: "hunter2".into(),
            headers: vec![("X-Gate".into(), "sesame".into())],
            owner: 1000,
        };
        Desired { up, order: Some(Arc::new(order)) }
    }

    #[test]
    fn what_was_stored_is_read_back_by_the_next_service() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(load(folder.path()), Desired::default());
        for desired in [wanted(true), wanted(false)] {
            store(folder.path(), &desired).unwrap();
            let read = load(folder.path());
            assert_eq!(read, desired);
            assert_eq!(read.order.unwrap().owner, 1000);
        }
    }

    #[test]
    fn the_file_is_private_and_nothing_else_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        store(folder.path(), &wanted(true)).unwrap();
        store(folder.path(), &wanted(false)).unwrap();
        let files: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|it| it.unwrap().path()).collect();
        assert_eq!(files, [folder.path().join(FILE)]);
        assert_eq!(fs::metadata(&files[0]).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn forgetting_leaves_no_token_on_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        store(folder.path(), &wanted(true)).unwrap();
        fs::write(folder.path().join("intent.json.bad"), "hunter2").unwrap();
        store(folder.path(), &Desired::default()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_is_no_intent_is_set_aside_and_nothing_is_wanted() {
        for content in ["", "{", "{\"version\":2}", "[]", "{\"version\":1,\"up\":true,\"token\":7}"] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join(FILE), content).unwrap();
            assert_eq!(load(folder.path()), Desired::default(), "{content}");
            assert!(folder.path().join("intent.json.bad").exists());
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_intent() {
        let folder = tempfile::tempdir().unwrap();
        store(folder.path(), &wanted(true)).unwrap();
        let gone = folder.path().join("gone");
        assert!(store(&gone, &wanted(false)).is_err());
        assert_eq!(load(folder.path()), wanted(true));
    }

    #[test]
    fn the_debug_form_of_an_intent_shows_no_secret() {
        let text = format!("{:?}", wanted(true));
        assert!(!text.contains("hunter2") && !text.contains("sesame"), "{text}");
    }
}
