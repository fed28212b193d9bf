//! Why a connection did not come about, and what a person may do about it.

use std::{io, path::PathBuf, time::Duration};

use http::StatusCode;
use rustls::{AlertDescription, PeerMisbehaved};

use super::{ClientCertificate, Target};

/// Why a dialer could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The CA file cannot be read.
    #[error("cannot read the CA file {}: {reason}", path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file that should hold certificates holds none.
    #[error("the file {} has no certificate in PEM form", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// A file of the client certificate cannot be read.
    #[error("cannot read the file {} of the client certificate: {error}", path.display())]
    ClientFile {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The key's file holds none that can be read.
    #[error(
        "the file {} has no private key in PEM form that can be read; one that is encrypted must be decrypted \
         first", path.display()
    )]
    NoClientKey {
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key are not of one pair.
    #[error(
        "the key in {} is not that of the first certificate in {}", .0.key.display(), .0.certificate.display()
    )]
    ClientMismatch(ClientCertificate),
    /// Certificate or key is of no use.
    #[error(
        "the client certificate {} with the key {} cannot be used: {reason}",
        files.certificate.display(), files.key.display()
    )]
    ClientCertificate {
        /// Both files.
        files: ClientCertificate,
        /// What the TLS library says.
        reason: String,
    },
    /// The TLS library refused its configuration.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// The TLS library refused its roots.
    #[error("TLS cannot be set up: {0}")]
    Verifier(#[from] rustls::client::VerifierBuilderError),
}

/// Which step of connecting took too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Resolving the host name.
    Resolve,
    /// The TCP connection.
    Connect,
    /// The proxy's answer.
    Proxy,
    /// The TLS handshake.
    Tls,
}

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name does not resolve.
    #[error("cannot resolve {host}: {source}; check the host name and this machine's DNS")]
    Resolve {
        /// The host.
        host: String,
        /// What the resolver says.
        source: io::Error,
    },
    /// The host has no address of a family that may be used.
    #[error("{host} has no address that can be used; check the host name and this machine's DNS")]
    NoAddress {
        /// The host.
        host: String,
    },
    /// Nobody listens there.
    #[error("{place} refused the connection; check host and port, and that the server runs")]
    Refused {
        /// Host and port.
        place: String,
    },
    /// The connection failed otherwise.
    #[error("cannot connect to {place}: {source}; check this machine's network")]
    Unreachable {
        /// Host and port.
        place: String,
        /// What the system says.
        source: io::Error,
    },
    /// It took too long.
    #[error("{} within {} seconds", late(place, *step), limit.as_secs_f64())]
    TimedOut {
        /// Host and port.
        place: String,
        /// The step that did not end.
        step: Step,
        /// The limit for all steps together.
        limit: Duration,
    },
    /// TLS failed.
    #[error("no secure connection to {host}: {reason}")]
    Tls {
        /// The host.
        host: String,
        /// Why.
        reason: TlsError,
    },
    /// The proxy cannot be reached or used.
    #[error("the proxy {proxy} of the environment cannot be used: {source}")]
    Proxy {
        /// The proxy, without credentials.
        proxy: String,
        /// Why.
        source: Box<DialError>,
    },
    /// The proxy's kind is not one this program speaks.
    #[error("proxies of the kind {0:?} are not supported; use http or https")]
    ProxyScheme(String),
    /// The proxy refused to connect.
    #[error("the proxy {proxy} refused to connect to {place}: {status}{}", hint(*status))]
    ProxyRefused {
        /// The proxy, without credentials.
        proxy: String,
        /// Host and port it was asked for.
        place: String,
        /// Its answer.
        status: StatusCode,
    },
    /// The proxy hung up, or does not speak HTTP.
    #[error("the proxy {proxy} did not answer as a proxy does: {reason}")]
    ProxyAnswer {
        /// The proxy, without credentials.
        proxy: String,
        /// What was wrong.
        reason: String,
    },
}

/// Why TLS failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// Nobody we trust vouches for the certificate.
    #[error(
        "its certificate is signed by nobody this machine trusts; add the authority to the system's \
         certificates, or name its file (ca_file, --ca-file, SSL_CERT_FILE)"
    )]
    UnknownIssuer,
    /// The certificate is too old, or this machine's clock is wrong.
    #[error("its certificate has expired (or this machine's clock is wrong); who runs it has to renew it")]
    Expired,
    /// The certificate is too new, or this machine's clock is wrong.
    #[error("its certificate is not valid yet (or this machine's clock is wrong); check the clock")]
    NotYetValid,
    /// The certificate is for someone else.
    #[error("its certificate is for another name; use the host name that it was made for")]
    WrongName,
    /// Another fault of the certificate.
    #[error("its certificate is not acceptable: {0}; who runs it has to replace it")]
    Certificate(String),
    /// It insists on HTTP/2, whose connections cannot be upgraded.
    #[error("it insists on HTTP/2; what stands in front of it must let HTTP/1.1 through")]
    OnlyHttp2,
    /// It does not accept who we are.
    #[error(
        "it wants a client certificate that it trusts ({0}); set client_cert_file and client_key_file \
         (--client-cert-file, --client-key-file)"
    )]
    ClientCertificate(String),
    /// The other side does not speak TLS.
    #[error("it does not speak TLS; is the URL perhaps http:// instead of https://?")]
    NotTls,
    /// The host cannot be a TLS server name.
    #[error("{0:?} is no host name")]
    Name(String),
    /// Any other failure.
    #[error("{0}")]
    Other(String),
}

impl DialError {
    pub(super) fn of_connect(target: &Target, source: io::Error) -> Self {
        let place = target.authority();
        match source.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused { place },
            _ => Self::Unreachable { place, source },
        }
    }
}

impl TlsError {
    /// What a server said about our certificate, if that is at the bottom of `error`. With TLS 1.3 it says so
    /// only after our handshake is done: to the first request.
    pub fn of_request(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let chain = std::iter::successors(Some(error), |error| error.source());
        let io = chain.filter_map(|error| error.downcast_ref::<io::Error>()).map(Self::of);
        { io }.find(|error| matches!(error, Self::ClientCertificate(_)))
    }

    pub(super) fn of(error: &io::Error) -> Self {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match inner {
            Some(rustls::Error::AlertReceived(alert)) if is_about_our_certificate(*alert) => {
                Self::ClientCertificate(format!("{alert:?}"))
            }
            Some(rustls::Error::InvalidCertificate(reason)) => Self::of_certificate(reason),
            Some(rustls::Error::InvalidMessage(_)) => Self::NotTls,
            Some(
                rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)
                | rustls::Error::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedApplicationProtocol),
            ) => Self::OnlyHttp2,
            Some(other) => Self::Other(other.to_string()),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                Self::Other("it hung up during the handshake".to_owned())
            }
            None => Self::Other(error.to_string()),
        }
    }

    fn of_certificate(reason: &rustls::CertificateError) -> Self {
        use rustls::CertificateError as Fault;
        match reason {
            // The second: an authority was founded anew under its old name.
            Fault::UnknownIssuer | Fault::BadSignature => Self::UnknownIssuer,
            Fault::Expired | Fault::ExpiredContext { .. } => Self::Expired,
            Fault::NotValidYet | Fault::NotValidYetContext { .. } => Self::NotYetValid,
            Fault::NotValidForName | Fault::NotValidForNameContext { .. } => Self::WrongName,
            // The usual fate of a self-made certificate that is not in the system's store.
            Fault::Other(_) if reason.to_string().contains("CaUsedAsEndEntity") => Self::UnknownIssuer,
            other => Self::Certificate(other.to_string()),
        }
    }
}

/// Servers differ in what they say of a certificate that is missing or not trusted.
fn is_about_our_certificate(alert: AlertDescription) -> bool {
    use AlertDescription as Alert;
    let about = [
        Alert::CertificateRequired,
        Alert::BadCertificate,
        Alert::UnsupportedCertificate,
        Alert::CertificateRevoked,
        Alert::CertificateExpired,
        Alert::CertificateUnknown,
        Alert::UnknownCA,
        Alert::AccessDenied,
    ];
    about.contains(&alert)
}

fn late(place: &str, step: Step) -> String {
    match step {
        Step::Resolve => format!("the name of {place} was not resolved"),
        Step::Connect => format!("{place} did not answer; a firewall may be in between: no connection"),
        Step::Proxy => format!("the proxy did not connect to {place}"),
        Step::Tls => format!("{place} did not finish the TLS handshake"),
    }
}

fn hint(status: StatusCode) -> &'static str {
    match status {
        StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            "; put user and password into the proxy's URL, or the host into NO_PROXY"
        }
        _ => "; if it needs no proxy, put the host into NO_PROXY",
    }
}
