use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};

use super::*;
use crate::dial::DialOptions;

mod vectors;

const USER: &str =
    r#"{"id":"fe63f96c-0f1a-427a-ac22-9876664914f7","username":"alice","email":"alice@example.com"}"#;

#[tokio::test]
async fn a_request_carries_the_token_once_and_each_header_once() {
    let server = Server::answering(&ok(USER)).await;
    let headers = [("X-Gate", "sesame"), ("Coder-Session-Token", "other"), ("x-many", "1"), ("X-Many", "2")];
    let user = server.client(Some("tok"), &headers).current_user().await.unwrap();
    assert_eq!(
        (user.username.as_str(), user.id.to_string().as_str()),
        ("alice", "fe63f96c-0f1a-427a-ac22-9876664914f7")
    );
    let request = server.request.await.unwrap();
    assert!(request.starts_with("GET /api/v2/users/me HTTP/1.1\r\n"), "{request}");
    assert_eq!(values(&request, "coder-session-token"), ["tok"]);
    assert_eq!(values(&request, "x-gate"), ["sesame"]);
    assert_eq!(values(&request, "x-many"), ["1", "2"]);
    assert_eq!(values(&request, "host"), [format!("127.0.0.1:{}", server.port)]);
    assert!(values(&request, "user-agent")[0].starts_with("warren/"));
    for absent in ["cookie", "origin", "accept-encoding"] {
        assert!(values(&request, absent).is_empty(), "{absent}");
    }
}

#[tokio::test]
async fn a_gateway_that_echoes_what_it_was_sent_does_not_show_our_secrets_to_anybody() {
    let body =
        r#"{"message":"bad tok","detail":"X-Gate: sesame","validations":[{"field":"f","detail":"no tok"}]}"#;
    let json = ok(body).replacen("200 OK", "400 Bad Request", 1);
    let page = "HTTP/1.1 400 Bad Request\r\nContent-Length: 22\r\n\r\ntok, X-Gate: sesame, 1\r\n";
    for answer in [json.as_str(), page] {
        let server = Server::answering(answer).await;
        let client = server.client(Some("tok"), &[("X-Gate", "sesame"), ("X-One", "1")]);
        let text = client.current_user().await.unwrap_err().to_string();
        assert!(!text.contains("tok") && !text.contains("sesame"), "{text}");
        assert!(text.contains("X-Gate: [redacted]"), "{text}");
    }
}

/// Conforms: vpn:W18
#[tokio::test]
async fn a_deployment_that_is_too_old_is_told_from_any_of_its_answers() {
    let answer = ok(USER).replacen("\r\n", "\r\nX-Coder-Build-Version: v2.19.0\r\n", 1);
    let server = Server::answering(&answer).await;
    let error = server.client(Some("tok"), &[]).current_user().await.unwrap_err();
    assert!(error.to_string().contains("v2.19.0"), "{error}");
    let answer = ok(r#"{"version":"v2.19.0"}"#);
    let error = Server::answering(&answer).await.client(None, &[]).build_info().await.unwrap_err();
    assert!(error.to_string().contains("2.20.0 or newer"), "{error}");
    let silent = Server::answering(&ok("{}")).await;
    assert!(silent.client(None, &[]).build_info().await.is_err(), "no version is none");
}

/// Conforms: vpn:15.12
#[tokio::test]
async fn an_upgrade_carries_the_token_once_and_each_header_once() {
    let server = Server::answering("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n").await;
    let asked = crate::websocket::request_headers("k", None);
    let client = server.client(Some("tok"), &[("X-Gate", "sesame"), ("Coder-Session-Token", "other")]);
    client.upgrade("/x", "a=b", asked, LIMIT).await.unwrap();
    let request = server.request.await.unwrap();
    assert_eq!(values(&request, "coder-session-token"), ["tok"]);
    assert_eq!(values(&request, "x-gate"), ["sesame"]);
    for name in ["connection", "upgrade", "sec-websocket-key", "sec-websocket-version", "host"] {
        assert_eq!(values(&request, name).len(), 1, "{name}");
    }
}

#[tokio::test]
async fn headers_of_the_connection_cannot_be_set_by_others() {
    let server = Server::answering(&ok(USER)).await;
    let headers = [
        ("Host", "evil"),
        ("Connection", "keep-alive"),
        ("Upgrade", "h2c"),
        ("Transfer-Encoding", "chunked"),
        ("Content-Length", "5"),
        ("Cookie", "coder_session_token=other"),
        ("Sec-WebSocket-Key", "x"),
        ("User-Agent", "mine/1"),
    ];
    server.client(None, &headers).current_user().await.unwrap();
    let request = server.request.await.unwrap();
    assert!(!request.contains("evil") && !request.contains("other"), "{request}");
    assert_eq!(values(&request, "connection"), ["close"]);
    assert_eq!(values(&request, "user-agent"), ["mine/1"]);
    for absent in
        ["upgrade", "transfer-encoding", "content-length", "sec-websocket-key", "coder-session-token"]
    {
        assert!(values(&request, absent).is_empty(), "{absent}");
    }
}

#[tokio::test]
async fn a_redirect_is_told_and_not_followed() {
    let other = Server::answering(&ok(USER)).await;
    let location =
        format!("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:{}/\r\n\r\n", other.port);
    let server = Server::answering(&location).await;
    let error = server.client(Some("tok"), &[]).current_user().await.unwrap_err();
    assert!(matches!(error, ApiError::Redirect(_)), "{error}");
    assert!(
        error.to_string().contains(&format!("redirects (307) to http://127.0.0.1:{}", other.port)),
        "{error}"
    );
    assert!(!other.request.is_finished());
}

#[tokio::test]
async fn a_refusal_comes_with_the_whole_words_of_the_server() {
    let body = format!(r#"{{"message":"Only on Tuesdays.","detail":"{}"}}"#, "x".repeat(1500));
    let server = Server::answering(&with_status("403 Forbidden", &body)).await;
    let error = server.client(Some("tok"), &[]).current_user().await.unwrap_err();
    let refusal = error.refusal().unwrap();
    assert_eq!((refusal.message.as_str(), refusal.detail.len()), ("Only on Tuesdays.", 1500));
    assert!(!error.requires_sign_in());
    let server = Server::answering(&with_status("401 Unauthorized", "{}")).await;
    let error = server.client(Some("tok"), &[]).current_user().await.unwrap_err();
    assert!(error.requires_sign_in());
}

#[tokio::test]
async fn a_refused_upgrade_comes_with_its_body_though_it_follows_later() {
    let server =
        Server::answering_slowly(&with_status("409 Conflict", r#"{"message":"Browsers only."}"#)).await;
    let error = server.client(None, &[]).upgrade("/x", "a=b", HeaderMap::new(), LIMIT).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().message, "Browsers only.");
}

#[tokio::test]
async fn a_silent_server_is_given_up_with_a_word_about_it() {
    let server = Server::answering("").await;
    let error =
        server.client(None, &[]).get("/api/v2/users/me", Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(error, ApiError::Deadline { .. }));
    assert!(error.to_string().contains("did not answer"), "{error}");
}

#[tokio::test]
async fn what_is_no_deployment_is_recognised_by_its_answer() {
    let speaks_ssh = Server::answering("SSH-2.0-dropbear\r\n\r\n").await;
    let error = speaks_ssh.client(None, &[]).current_user().await.unwrap_err();
    assert!(matches!(error, ApiError::NotHttp { .. }), "{error}");
    let page = Server::answering(&ok("<html>")).await;
    let error = page.client(None, &[]).current_user().await.unwrap_err();
    assert!(error.to_string().contains("not that of a Coder deployment"), "{error}");
}

#[tokio::test]
async fn a_body_that_never_ends_is_cut_off() {
    let endless = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(MAX_BODY + 1));
    let server = Server::answering(&endless).await;
    let error = server.client(None, &[]).get("/x", LIMIT).await.unwrap_err();
    assert!(matches!(error, ApiError::TooLarge { .. }), "{error}");
    let endless = format!("HTTP/1.1 403 Forbidden\r\n\r\n{}", "x".repeat(MAX_REFUSAL * 2));
    let server = Server::answering(&endless).await;
    let error = server.client(None, &[]).get("/x", LIMIT).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().detail.len(), 2048);
}

#[tokio::test]
async fn a_base_path_and_credentials_in_the_url_are_not_used_and_not_shown() {
    let server = Server::answering(&with_status("404 Not Found", "{}")).await;
    let url = Url::parse(&format!("http://user:sesame@127.0.0.1:{}/prefix?q", server.port)).unwrap();
    let client = ApiClient::new(dialer(), url, None, Vec::new());
    let error = client.current_user().await.unwrap_err();
    assert!(!format!("{error} {error:?} {client:?}").contains("sesame"));
    assert!(server.request.await.unwrap().starts_with("GET /api/v2/users/me HTTP/1.1\r\n"));
}

#[tokio::test]
async fn a_token_that_cannot_be_sent_asks_for_a_sign_in_without_telling_it() {
    let client = ApiClient::new(
        dialer(),
        Url::parse("http://127.0.0.1:1").unwrap(),
        Some("se\nsame".into()),
        Vec::new(),
    );
    let error = client.current_user().await.unwrap_err();
    assert!(error.requires_sign_in());
    assert!(!error.to_string().contains("same"));
}

const LIMIT: Duration = Duration::from_secs(20);

fn dialer() -> Dialer {
    Dialer::new(DialOptions::default()).unwrap()
}

fn ok(body: &str) -> String {
    with_status("200 OK", body)
}

fn with_status(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
}

fn values(request: &str, name: &str) -> Vec<String> {
    let lines = request.lines().filter_map(|line| line.split_once(": "));
    lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).collect()
}

/// Answers one request with given bytes, and keeps the connection.
struct Server {
    port: u16,
    request: JoinHandle<String>,
}

impl Server {
    async fn answering(answer: &str) -> Self {
        Self::start(vec![answer.to_owned()]).await
    }

    /// The head first, the rest when the head has surely been read.
    async fn answering_slowly(answer: &str) -> Self {
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        Self::start(vec![format!("{head}\r\n\r\n"), body.to_owned()]).await
    }

    async fn start(parts: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let request = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            tokio::spawn(async move {
                for part in parts {
                    let _ = stream.write_all(part.as_bytes()).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
            });
            String::from_utf8(head).unwrap()
        });
        Self { port, request }
    }

    fn client(&self, token: Option<&str>, headers: &[(&str, &str)]) -> ApiClient {
        let url = Url::parse(&format!("http://127.0.0.1:{}", self.port)).unwrap();
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        ApiClient::new(dialer(), url, token.map(Into::into), headers)
    }
}
