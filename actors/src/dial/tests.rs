use std::{io::Write, sync::Arc};

use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, pki_types::PrivateKeyDer},
};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_plain_target_is_reached_and_its_address_is_known() {
    let port = echo().await;
    let mut stream = dialer().connect(&plain("127.0.0.1", port), LIMIT).await.unwrap();
    assert_eq!(stream.peer_ip(), Some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    assert_eq!(said_back(&mut stream).await, *b"hello");
}

#[tokio::test]
async fn who_waits_on_a_connection_from_an_address_that_is_lost_is_told_at_once() {
    let (dialer, port) = (dialer(), echo().await);
    let mut stream = dialer.connect(&plain("127.0.0.1", port), LIMIT).await.unwrap();
    dialer.fail_lost();
    assert_eq!(said_back(&mut stream).await, *b"hello", "the loopback's address is there");
    let waiting = tokio::spawn(async move {
        let read = stream.read(&mut [0; 1]).await;
        (read, stream.write(b"more").await)
    });
    // It waits by now: there is one thread.
    tokio::task::yield_now().await;
    dialer.origins.fail_lost(|_| false);
    let (read, written) = tokio::time::timeout(LIMIT, waiting).await.unwrap().unwrap();
    for error in [read.unwrap_err(), written.unwrap_err()] {
        assert!(error.to_string().starts_with("this machine has lost the address"), "{error}");
    }
}

#[tokio::test]
async fn a_fixed_address_stands_for_the_host_name() {
    let port = echo().await;
    let fixed = Target { ipv4: NodeAddress::Fixed(Ipv4Addr::LOCALHOST), ..plain("nowhere.invalid", port) };
    assert!(dialer().connect(&fixed, LIMIT).await.is_ok());
}

#[tokio::test]
async fn a_host_whose_families_are_all_disabled_has_no_address() {
    let target =
        Target { ipv4: NodeAddress::Disabled, ipv6: NodeAddress::Disabled, ..plain("relay.test", 1) };
    let error = dialer().connect(&target, LIMIT).await.unwrap_err();
    assert!(error.to_string().starts_with("relay.test has no address that can be used; check"), "{error}");
}

#[tokio::test]
async fn a_refused_connection_says_where_and_what_to_check() {
    let port = closed_port().await;
    let error = dialer().connect(&plain("127.0.0.1", port), LIMIT).await.unwrap_err();
    let expected =
        format!("127.0.0.1:{port} refused the connection; check host and port, and that the server runs");
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_named() {
    let name = "x".repeat(300);
    let error = dialer().connect(&plain(&name, 1), LIMIT).await.unwrap_err();
    assert!(matches!(&error, DialError::Resolve { host, .. } if *host == name), "{error}");
}

#[tokio::test]
async fn a_name_that_resolves_no_more_is_reached_at_its_last_good_address() {
    let port = echo().await;
    let (dialer, name) = (dialer(), "x".repeat(300));
    let fixed = Target { ipv4: NodeAddress::Fixed(Ipv4Addr::LOCALHOST), ..plain(&name, port) };
    dialer.connect(&fixed, LIMIT).await.unwrap();
    assert!(dialer.connect(&plain(&name, port), LIMIT).await.is_ok());
}

#[tokio::test]
async fn a_server_that_never_finishes_the_handshake_is_given_up_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = https("127.0.0.1", listener.local_addr().unwrap().port());
    let error = dialer().connect(&target, Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, DialError::TimedOut { step: Step::Tls, .. }), "{error}");
    assert!(error.to_string().ends_with("did not finish the TLS handshake within 0.3 seconds"), "{error}");
}

#[tokio::test]
async fn a_certificate_of_the_ca_file_is_trusted_and_only_http_1_is_spoken() {
    let rig = TlsRig::new("deployment.test");
    let stream = rig.dialer().connect(&rig.target("deployment.test").await, LIMIT).await.unwrap();
    let Stream::Tls(tls) = &stream else { panic!("plain") };
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
}

#[tokio::test]
async fn a_certificate_of_a_stranger_is_refused_with_what_to_do() {
    let rig = TlsRig::new("deployment.test");
    let error = dialer().connect(&rig.target("deployment.test").await, LIMIT).await.unwrap_err();
    assert!(matches!(error, DialError::Tls { reason: TlsError::UnknownIssuer, .. }), "{error}");
    assert!(error.to_string().contains("--ca-file"), "{error}");
}

#[tokio::test]
async fn a_certificate_of_an_authority_that_was_founded_anew_is_one_of_a_stranger() {
    let (before, now) = (TlsRig::new("deployment.test"), TlsRig::new("deployment.test"));
    let error = before.dialer().connect(&now.target("deployment.test").await, LIMIT).await.unwrap_err();
    assert!(matches!(error, DialError::Tls { reason: TlsError::UnknownIssuer, .. }), "{error}");
    assert!(error.to_string().contains("ca_file"), "{error}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused_unless_the_target_expects_that_name() {
    let rig = TlsRig::new("certified.test");
    let target = rig.target("host.test").await;
    let error = rig.dialer().connect(&target, LIMIT).await.unwrap_err();
    assert!(matches!(error, DialError::Tls { reason: TlsError::WrongName, .. }), "{error}");
    let renamed = Target { server_name: Some("certified.test".to_owned()), ..target };
    assert!(rig.dialer().connect(&renamed, LIMIT).await.is_ok());
}

#[tokio::test]
async fn verification_is_skipped_only_where_the_target_says_so() {
    let rig = TlsRig::new("certified.test");
    let target = Target { verify: Verify::SkipForTests, ..rig.target("host.test").await };
    assert!(dialer().connect(&target, LIMIT).await.is_ok());
}

#[tokio::test]
async fn an_expired_certificate_is_called_expired() {
    let mut rig = TlsRig::new("deployment.test");
    rig.params.not_before = rcgen::date_time_ymd(2001, 1, 1);
    rig.params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    let error = rig.dialer().connect(&rig.target("deployment.test").await, LIMIT).await.unwrap_err();
    assert!(matches!(error, DialError::Tls { reason: TlsError::Expired, .. }), "{error}");
}

#[tokio::test]
async fn a_server_without_tls_is_recognised() {
    let port = answers(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    let error = dialer().connect(&https("127.0.0.1", port), LIMIT).await.unwrap_err();
    assert!(matches!(error, DialError::Tls { reason: TlsError::NotTls, .. }), "{error}");
}

#[tokio::test]
async fn a_ca_file_without_a_certificate_is_refused_with_its_name() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"nothing").unwrap();
    let error = Dialer::new(DialOptions { ca_file: Some(file.path().to_owned()), ..DialOptions::default() })
        .unwrap_err();
    assert!(error.to_string().contains(&file.path().display().to_string()), "{error}");
    let missing =
        Dialer::new(DialOptions { ca_file: Some("/does/not/exist".into()), ..DialOptions::default() })
            .unwrap_err();
    assert!(missing.to_string().starts_with("cannot read the CA file /does/not/exist: "), "{missing}");
}

#[tokio::test]
async fn a_server_that_insists_on_http2_is_recognised_and_reached_by_announcing_nothing() {
    let mut rig = TlsRig::new("deployment.test");
    rig.alpn = &["h2"];
    let target = rig.target("deployment.test").await;
    let error = rig.dialer().connect(&target, LIMIT).await.unwrap_err();
    assert!(matches!(error, DialError::Tls { reason: TlsError::OnlyHttp2, .. }), "{error}");
    let silent = Target { alpn: Alpn::Nothing, ..target };
    let stream = rig.dialer().connect(&silent, LIMIT).await.unwrap();
    let Stream::Tls(tls) = &stream else { panic!("plain") };
    assert_eq!(tls.get_ref().1.alpn_protocol(), None);
}

#[tokio::test]
async fn a_server_that_asks_is_shown_the_client_certificate_also_where_a_target_has_its_own_rules() {
    let mut rig = TlsRig::new("deployment.test");
    rig.asks_who_we_are = true;
    let (_folder, files) = rig.client();
    let dialer = Arc::new(rig.dialer_as(Some(files)));
    let target = rig.target("deployment.test").await;
    let renamed = Target { server_name: Some("deployment.test".to_owned()), ..rig.target("x.test").await };
    let unverified = Target { verify: Verify::SkipForTests, ..target.clone() };
    for target in [target, renamed, unverified] {
        let mut stream = dialer.connect(&target, LIMIT).await.unwrap();
        assert!(asked(&mut stream).await.unwrap().contains("X-You: known"));
    }
}

#[tokio::test]
async fn a_server_that_misses_a_client_certificate_is_told_apart_with_what_to_set() {
    const OLD: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12];
    const NEW: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
    for versions in [OLD, NEW] {
        let mut rig = TlsRig::new("deployment.test");
        (rig.asks_who_we_are, rig.versions) = (true, versions);
        let stream = rig.dialer().connect(&rig.target("deployment.test").await, LIMIT).await;
        let text = match stream {
            Err(error) => error.to_string(),
            Ok(mut stream) => {
                TlsError::of_request(&asked(&mut stream).await.unwrap_err()).unwrap().to_string()
            }
        };
        assert!(text.contains("client_cert_file"), "{text}");
    }
}

#[tokio::test]
async fn a_client_certificate_of_no_use_is_refused_with_the_file_and_without_the_key() {
    let rig = TlsRig::new("deployment.test");
    let (folder, good) = rig.client();
    let (_other, stranger) = rig.client();
    let nothing = folder.path().join("nothing");
    std::fs::write(&nothing, "-----BEGIN sesame-----\nsesame\n").unwrap();
    for (certificate, key, words) in [
        (&good.certificate, &stranger.key, "is not that of the first certificate in"),
        (&good.certificate, &nothing, "has no private key"),
        (&nothing, &good.key, "has no certificate"),
        (&good.key, &good.key, "has no certificate"),
        (&good.certificate, &folder.path().join("missing"), "cannot read"),
    ] {
        let client = Some(ClientCertificate { certificate: certificate.clone(), key: key.clone() });
        let error = Dialer::new(DialOptions { client, ..DialOptions::default() }).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(words), "{text}");
        assert!(text.contains(&folder.path().display().to_string()), "{text}");
        let key_text = std::fs::read_to_string(&good.key).unwrap();
        let shown = format!("{text} {error:?}");
        assert!(!shown.contains("sesame") && !shown.contains(key_text.lines().nth(1).unwrap()), "{shown}");
    }
}

#[tokio::test]
async fn a_proxy_is_asked_for_the_real_port_with_the_credentials_of_its_url() {
    let proxy = FakeProxy::start("HTTP/1.1 200 Connection established\r\n\r\n").await;
    let dialer = proxied(&format!("http://user:pa%20ss@127.0.0.1:{}", proxy.port));
    let mut stream = dialer.connect(&plain("deployment.test", 4443), LIMIT).await.unwrap();
    assert_eq!(said_back(&mut stream).await, *b"hello");
    let request = proxy.request.await.unwrap();
    assert!(request.starts_with("CONNECT deployment.test:4443 HTTP/1.1\r\n"), "{request}");
    let lower = request.to_ascii_lowercase();
    assert!(lower.contains("\r\nhost: deployment.test:4443\r\n"), "{request}");
    assert!(request.contains("Basic dXNlcjpwYSBzcw=="), "{request}");
}

#[tokio::test]
async fn a_proxy_that_wants_credentials_and_gets_none_says_where_to_put_them() {
    let proxy =
        FakeProxy::start("HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n").await;
    let dialer = proxied(&format!("http://127.0.0.1:{}", proxy.port));
    let error = dialer.connect(&https("deployment.test", 443), LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("put user and password into the proxy's URL"), "{error}");
    let request = proxy.request.await.unwrap().to_ascii_lowercase();
    assert!(!request.contains("proxy-authorization"), "{request}");
}

#[tokio::test]
async fn a_proxy_is_not_followed_elsewhere_and_its_credentials_are_not_the_targets() {
    let answer = "HTTP/1.1 302 Found\r\nLocation: http://sign-in.test/\r\ncontent-length: 0\r\n\r\n";
    let proxy = FakeProxy::start(answer).await;
    let dialer = proxied(&format!("http://user:sesame@127.0.0.1:{}", proxy.port));
    let error = dialer.connect(&plain("deployment.test", 80), LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("302 Found; if it needs no proxy"), "{error}");
    assert!(!format!("{error} {error:?} {dialer:?}").contains("sesame"));
    let request = proxy.request.await.unwrap().to_ascii_lowercase();
    assert!(!request.contains("\r\nauthorization"), "{request}");
}

#[tokio::test]
async fn a_proxy_that_refuses_is_named_with_its_status_and_without_its_password() {
    let proxy =
        FakeProxy::start("HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n").await;
    let dialer = proxied(&format!("http://user:sesame@127.0.0.1:{}", proxy.port));
    let error = dialer.connect(&plain("deployment.test", 80), LIMIT).await.unwrap_err();
    assert!(matches!(
        error,
        DialError::ProxyRefused { status: http::StatusCode::PROXY_AUTHENTICATION_REQUIRED, .. }
    ));
    let text = format!("{error} {error:?}");
    assert!(text.contains("407") && text.contains("put user and password"), "{text}");
    assert!(!text.contains("sesame"), "{text}");
}

#[tokio::test]
async fn a_proxy_that_is_not_there_or_of_another_kind_is_blamed() {
    let port = closed_port().await;
    let gone = proxied(&format!("http://127.0.0.1:{port}"));
    let error = gone.connect(&plain("deployment.test", 80), LIMIT).await.unwrap_err();
    assert!(
        error.to_string().starts_with(&format!("the proxy 127.0.0.1:{port} of the environment")),
        "{error}"
    );
    let socks = proxied("socks5://127.0.0.1:1080");
    let error = socks.connect(&plain("deployment.test", 80), LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("\"socks5\" are not supported"), "{error}");
}

#[tokio::test]
async fn this_machine_is_never_reached_through_a_proxy() {
    let closed = closed_port().await;
    let dialer = proxied(&format!("http://127.0.0.1:{closed}"));
    let port = echo().await;
    for host in ["127.0.0.1", "localhost"] {
        assert!(dialer.connect(&plain(host, port), LIMIT).await.is_ok(), "{host}");
    }
}

#[tokio::test]
async fn an_address_that_refuses_does_not_keep_the_next_one_from_being_tried() {
    let (closed, open) = (closed_port().await, echo().await);
    let addresses = [closed, open].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let stream = race::connect(&addresses).await.unwrap();
    assert_eq!(stream.peer_addr().unwrap().port(), open);
}

#[test]
fn families_alternate_beginning_with_the_resolvers_choice() {
    let addresses: Vec<IpAddr> =
        ["2001:db8::1", "2001:db8::2", "192.0.2.1"].iter().map(|text| text.parse().unwrap()).collect();
    let order: Vec<_> = race::interleave(&addresses, 7).iter().map(ToString::to_string).collect();
    assert_eq!(order, ["[2001:db8::1]:7", "192.0.2.1:7", "[2001:db8::2]:7"]);
}

#[test]
fn a_url_names_its_target_without_brackets() {
    let target = Target::of_url(&Url::parse("https://[2001:db8::1]/x").unwrap()).unwrap();
    assert_eq!((target.host.as_str(), target.port), ("2001:db8::1", 443));
    assert_eq!(target.authority(), "[2001:db8::1]:443");
    assert_eq!(Target::of_url(&Url::parse("http://h:3000").unwrap()).unwrap().port, 3000);
    assert_eq!(Target::of_url(&Url::parse("ftp://h").unwrap()), None);
}

fn dialer() -> Dialer {
    Dialer::with_proxies(&DialOptions::default(), Proxies::all("")).unwrap()
}

fn proxied(proxy: &str) -> Dialer {
    Dialer::with_proxies(&DialOptions::default(), Proxies::all(proxy)).unwrap()
}

fn plain(host: &str, port: u16) -> Target {
    Target {
        scheme: Scheme::Http,
        host: host.to_owned(),
        port,
        ipv4: NodeAddress::Resolve,
        ipv6: NodeAddress::Resolve,
        server_name: None,
        verify: Verify::Yes,
        alpn: Alpn::Http1,
    }
}

fn https(host: &str, port: u16) -> Target {
    Target { scheme: Scheme::Https, ..plain(host, port) }
}

async fn said_back(stream: &mut Stream) -> [u8; 5] {
    stream.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    stream.read_exact(&mut back).await.unwrap();
    back
}

/// The answer to a small request.
async fn asked(stream: &mut Stream) -> io::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

async fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

async fn answers(bytes: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    });
    port
}

/// A server whose certificate comes from an authority of its own.
struct TlsRig {
    authority: CertifiedIssuer<'static, KeyPair>,
    params: CertificateParams,
    ca_file: tempfile::NamedTempFile,
    alpn: &'static [&'static str],
    versions: &'static [&'static rustls::SupportedProtocolVersion],
    asks_who_we_are: bool,
}

impl TlsRig {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let mut ca_file = tempfile::NamedTempFile::new().unwrap();
        ca_file.write_all(authority.pem().as_bytes()).unwrap();
        Self {
            authority,
            params: CertificateParams::new(vec![name.to_owned()]).unwrap(),
            ca_file,
            alpn: &["h2", "http/1.1"],
            versions: rustls::ALL_VERSIONS,
            asks_who_we_are: false,
        }
    }

    /// The two files of a client certificate of this authority.
    fn client(&self) -> (tempfile::TempDir, ClientCertificate) {
        let (folder, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
        let params = CertificateParams::new(vec!["client.test".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        let files = ClientCertificate {
            certificate: folder.path().join("client.pem"),
            key: folder.path().join("client-key.pem"),
        };
        std::fs::write(&files.certificate, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        (folder, files)
    }

    fn who_may_come(
        &self,
        builder: rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>,
        provider: Arc<rustls::crypto::CryptoProvider>,
    ) -> rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert> {
        if !self.asks_who_we_are {
            return builder.with_no_client_auth();
        }
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.authority.der().clone()).unwrap();
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
        builder.with_client_cert_verifier(verifier.unwrap())
    }

    fn dialer(&self) -> Dialer {
        self.dialer_as(None)
    }

    fn dialer_as(&self, client: Option<ClientCertificate>) -> Dialer {
        let options = DialOptions { ca_file: Some(self.ca_file.path().to_owned()), client };
        Dialer::with_proxies(&options, Proxies::all("")).unwrap()
    }

    async fn target(&self, host: &str) -> Target {
        let key = KeyPair::generate().unwrap();
        let certificate = self.params.signed_by(&key, &self.authority).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let builder = builder.with_protocol_versions(self.versions).unwrap();
        let mut config = self
            .who_may_come(builder, provider)
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = self.alpn.iter().map(|it| it.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // The ends of those that are not let in are their own to notice.
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = stream.read_u8().await else { return };
                        head.push(byte);
                    }
                    let is_known = stream.get_ref().1.peer_certificates().is_some();
                    let answer = if is_known { "known" } else { "unknown" };
                    let answer = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nX-You: {answer}\r\n\r\n");
                    let _ = stream.write_all(answer.as_bytes()).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Target { ipv4: NodeAddress::Fixed(Ipv4Addr::LOCALHOST), ..https(host, port) }
    }
}

/// A proxy that answers one request, and says back what comes through the tunnel.
struct FakeProxy {
    port: u16,
    request: tokio::task::JoinHandle<String>,
}

impl FakeProxy {
    async fn start(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let request = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
            String::from_utf8(head).unwrap()
        });
        Self { port, request }
    }
}
