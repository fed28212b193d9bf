//! TLS to servers: the system's roots and those of a file, HTTP/1.1 only, and the two exceptions that a
//! relay map may ask for (another certificate name; no verification in tests).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{Alpn, ClientCertificate, DialError, SetupError, Target, TlsError, Verify};

/// See [`Alpn::Http1`].
const ALPN: &[u8] = b"http/1.1";

pub(super) struct Tls {
    provider: Arc<CryptoProvider>,
    /// `None` where there is not a single root: nothing is trusted then.
    verifier: Option<Arc<WebPkiServerVerifier>>,
    strict: Arc<ClientConfig>,
    /// Who we are, if we can say so.
    client: Option<Arc<dyn ResolvesClientCert>>,
}

impl Tls {
    pub(super) fn new(
        ca_file: Option<&Path>,
        client: Option<&ClientCertificate>,
    ) -> Result<Self, SetupError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = client.map(|client| client.load(&provider)).transpose()?;
        let mut roots = system_roots();
        if let Some(path) = ca_file {
            add_file(&mut roots, path)?;
        }
        if roots.is_empty() {
            tracing::warn!("no certificates to trust were found on this system; https will not work");
            let strict = config(&provider, client.as_ref(), |it| it.with_root_certificates(roots))?;
            return Ok(Self { provider, verifier: None, strict, client });
        }
        let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let verifier = builder.build()?;
        let strict = config(&provider, client.as_ref(), |it| it.with_webpki_verifier(Arc::clone(&verifier)))?;
        Ok(Self { provider, verifier: Some(verifier), strict, client })
    }

    /// Does the TLS handshake with a target over an established connection.
    pub(super) async fn wrap<S>(&self, target: &Target, stream: S) -> Result<TlsStream<S>, DialError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let failed = |reason| DialError::Tls { host: target.host.clone(), reason };
        let name = server_name(&target.host).map_err(failed)?;
        let connector = TlsConnector::from(self.config_for(target).map_err(failed)?);
        connector.connect(name, stream).await.map_err(|error| failed(TlsError::of(&error)))
    }

    fn config_for(&self, target: &Target) -> Result<Arc<ClientConfig>, TlsError> {
        let mut config = self.verifying(target)?;
        if target.alpn == Alpn::Nothing {
            Arc::make_mut(&mut config).alpn_protocols.clear();
        }
        Ok(config)
    }

    fn verifying(&self, target: &Target) -> Result<Arc<ClientConfig>, TlsError> {
        let verifier: Arc<dyn ServerCertVerifier> = match (target.verify, &target.server_name, &self.verifier)
        {
            (Verify::SkipForTests, _, _) => Arc::new(Unverified(Arc::clone(&self.provider))),
            (Verify::Yes, Some(name), Some(verifier)) => {
                Arc::new(Renamed { verifier: Arc::clone(verifier), name: server_name(name)? })
            }
            (Verify::Yes, None, _) | (Verify::Yes, Some(_), None) => return Ok(Arc::clone(&self.strict)),
        };
        let built = config(&self.provider, self.client.as_ref(), |it| {
            it.dangerous().with_custom_certificate_verifier(verifier)
        });
        built.map_err(|error| TlsError::Other(error.to_string()))
    }
}

type WantsVerifier = rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>;
type WantsClient = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn config(
    provider: &Arc<CryptoProvider>,
    client: Option<&Arc<dyn ResolvesClientCert>>,
    verified: impl FnOnce(WantsVerifier) -> WantsClient,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let builder =
        ClientConfig::builder_with_provider(Arc::clone(provider)).with_safe_default_protocol_versions()?;
    let mut config = match client {
        Some(client) => verified(builder).with_client_cert_resolver(Arc::clone(client)),
        None => verified(builder).with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

fn server_name(host: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(host.trim_end_matches('.').to_owned()).map_err(|_| TlsError::Name(host.to_owned()))
}

/// The system's certificates, or those that `SSL_CERT_FILE` and `SSL_CERT_DIR` name instead.
fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "some of the system's certificates cannot be read");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), SetupError> {
    let found = rustls_native_certs::load_certs_from_paths(Some(path), None);
    if let Some(error) = found.errors.first() {
        return Err(SetupError::CaFile { path: PathBuf::from(path), reason: error.to_string() });
    }
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        return Err(SetupError::NoCertificate { path: PathBuf::from(path) });
    }
    Ok(())
}

/// Verifies the certificate for another name than the one in the handshake (tailnet-data 2.2).
#[derive(Debug)]
struct Renamed {
    verifier: Arc<WebPkiServerVerifier>,
    name: ServerName<'static>,
}

impl ServerCertVerifier for Renamed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verifier.verify_server_cert(end_entity, intermediates, &self.name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// Takes any certificate, but still checks that the server holds its key.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
