//! The certificate by which this machine shows who it is, for deployments that ask for one. The key never
//! leaves this file but as what signs.

use std::{fs, io, path::Path, path::PathBuf, sync::Arc};

use rustls::{
    client::ResolvesClientCert,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::{CertifiedKey, SingleCertAndKey},
};
use secrecy::{ExposeSecret, SecretString};

use super::SetupError;

/// Far above any chain or key; keeps a wrong file out of memory.
const MAX_FILE: u64 = 1 << 20;

/// The two files of a client certificate: one is of no use without the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// A PEM file with the certificate, and those that lead to its authority.
    pub certificate: PathBuf,
    /// A PEM file with its private key, not encrypted.
    pub key: PathBuf,
}

impl ClientCertificate {
    /// Reads both files and checks that they belong together.
    pub(super) fn load(&self, provider: &CryptoProvider) -> Result<Arc<dyn ResolvesClientCert>, SetupError> {
        let key = read(&self.key)?;
        // The parser's own words may quote the file.
        let key = PrivateKeyDer::from_pem_slice(key.expose_secret().as_bytes())
            .map_err(|_| SetupError::NoClientKey { path: self.key.clone() })?;
        let chain = read(&self.certificate)?;
        let chain: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(chain.expose_secret().as_bytes()).collect();
        let chain = chain.ok().filter(|chain| !chain.is_empty());
        let chain = chain.ok_or_else(|| SetupError::NoCertificate { path: self.certificate.clone() })?;
        let certified = CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => SetupError::ClientMismatch(self.clone()),
            error => SetupError::ClientCertificate { files: self.clone(), reason: error.to_string() },
        })?;
        Ok(Arc::new(SingleCertAndKey::from(certified)))
    }
}

/// Either file: people swap them, so neither may be shown.
fn read(path: &Path) -> Result<SecretString, SetupError> {
    let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB");
    let text = fs::metadata(path).and_then(|metadata| {
        if metadata.len() > MAX_FILE { Err(too_large()) } else { fs::read_to_string(path) }
    });
    text.map(SecretString::from).map_err(|error| SetupError::ClientFile { path: path.to_owned(), error })
}
