//! The handshake: each end writes its line at once and reads the other's meanwhile (vpn-protocol 2.2).

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use warren_proto::header::{self, HeaderError, LineReader, Role, SUPPORTED, Version};

/// How long our own line may still take to leave after the peer's was refused: the peer should see it.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum SpeakerError {
    /// The peer's line did not come, or ours did not leave, in time.
    #[error("handshake failed: no answer within {0:?}")]
    Deadline(Duration),
    /// Our line could not be written.
    #[error("handshake failed: write header: {0}")]
    Write(io::Error),
    /// The peer's line could not be read.
    #[error("handshake failed: read header: {}", reading(.0))]
    Read(io::Error),
    /// The peer's line does not end.
    #[error("handshake failed: {0}")]
    TooLong(HeaderError),
    /// The peer's line is refused.
    #[error("handshake failed: validate header ({line}): {reason}")]
    Refused {
        /// The line.
        line: String,
        /// What is wrong with it.
        reason: HeaderError,
    },
}

impl SpeakerError {
    /// Whether the peer speaks the protocol, but no version that this program does.
    pub fn is_version_mismatch(&self) -> bool {
        matches!(self, Self::Refused { reason: HeaderError::Incompatible { .. }, .. })
    }
}

fn reading(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::UnexpectedEof { "EOF".to_owned() } else { error.to_string() }
}

/// Exchanges lines and returns the version to speak. Nothing behind the peer's line is read.
pub(super) async fn shake<R, W>(
    read: &mut R,
    write: &mut W,
    local: Role,
    peer: Role,
) -> Result<Version, SpeakerError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let line = header::line(local, &SUPPORTED);
    let ours = async {
        write.write_all(line.as_bytes()).await.map_err(SpeakerError::Write)?;
        write.flush().await.map_err(SpeakerError::Write)
    };
    let theirs = read_line(read, peer);
    tokio::pin!(ours, theirs);
    tokio::select! {
        biased;
        written = &mut ours => {
            written?;
            theirs.await
        }
        negotiated = &mut theirs => match negotiated {
            Ok(version) => ours.await.map(|()| version),
            Err(error) => {
                let _ = timeout(FAREWELL, ours).await;
                Err(error)
            }
        },
    }
}

async fn read_line<R: AsyncRead + Unpin>(read: &mut R, peer: Role) -> Result<Version, SpeakerError> {
    let mut reader = LineReader::default();
    loop {
        let byte = read.read_u8().await.map_err(SpeakerError::Read)?;
        if let Some(line) = reader.push(byte).map_err(SpeakerError::TooLong)? {
            return judge(&line, peer);
        }
    }
}

fn judge(line: &[u8], peer: Role) -> Result<Version, SpeakerError> {
    let versions = header::parse_line(line, peer);
    versions
        .and_then(|theirs| SUPPORTED.negotiate(&theirs))
        .map_err(|reason| SpeakerError::Refused { line: String::from_utf8_lossy(line).into_owned(), reason })
}
