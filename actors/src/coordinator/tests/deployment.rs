//! A small deployment for tests: it speaks every layer of the control connection, and says only what a test
//! tells it to.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use tokio::{
    io::{
        AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split,
    },
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message as Frame, protocol::Role},
};
use tokio_util::sync::CancellationToken;
use tokio_yamux::{Config, Session, StreamHandle};
use url::Url;
use warren_proto::{
    drpc::{Decoder, Kind, Packet, PacketWriter},
    frame::Message,
};

use crate::websocket::accept_key;

/// Longer than anything here takes.
const SOON: Duration = Duration::from_secs(20);

pub(crate) const USER: &str = r#"{"id":"fe63f96c-0f1a-427a-ac22-9876664914f7","username":"alice"}"#;
const CONNECTION: &str = r#"{"hostname_suffix":"","derp_map":{"Regions":{"999":{"EmbeddedRelay":true,"RegionID":999,
    "RegionName":"Embedded","Nodes":[{"Name":"999b","HostName":"elsewhere.example"}]}}}}"#;

/// A deployment on loopback.
pub(crate) struct Deployment {
    pub(crate) url: Url,
    shared: Arc<Shared>,
    connections: mpsc::Receiver<Connection>,
}

#[derive(Default)]
struct Shared {
    /// What is answered instead of the usual, by path.
    answers: Mutex<HashMap<String, String>>,
    requests: Mutex<Vec<(Instant, String)>>,
}

impl Deployment {
    pub(crate) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (shared, (tell, connections)) = (Arc::<Shared>::default(), mpsc::channel(16));
        let of_task = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(Arc::clone(&of_task), stream, tell.clone()));
            }
        });
        Self { url, shared, connections }
    }

    /// Answers `path` in this way from now on.
    pub(crate) fn refuse(&self, path: &str, status: &str, body: &str) {
        self.shared.answers.lock().unwrap().insert(path.to_owned(), answer(status, body));
    }

    /// Answers `path` as usual from now on.
    pub(crate) fn allow(&self, path: &str) {
        self.shared.answers.lock().unwrap().remove(path);
    }

    /// The next connection that is opened.
    pub(crate) async fn connection(&mut self) -> Connection {
        timeout(SOON, self.connections.recv()).await.expect("a connection").unwrap()
    }

    /// Heads of the requests for `path`, and when they came.
    pub(crate) fn requests(&self, path: &str) -> Vec<(Instant, String)> {
        let requests = self.shared.requests.lock().unwrap();
        requests.iter().filter(|(_, head)| path_of(head) == path).cloned().collect()
    }
}

async fn serve(shared: Arc<Shared>, mut stream: TcpStream, tell: mpsc::Sender<Connection>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    shared.requests.lock().unwrap().push((Instant::now(), head.clone()));
    let refusal = shared.answers.lock().unwrap().get(path_of(&head)).cloned();
    let answer = match (refusal, path_of(&head)) {
        (Some(refusal), _) => refusal,
        (None, "/api/v2/users/me") => answer("200 OK", USER),
        (None, "/api/v2/workspaceagents/connection") => answer("200 OK", CONNECTION),
        (None, "/api/v2/tailnet") => switch(&head),
        (None, _) => answer("404 Not Found", r#"{"message":"Route not found."}"#),
    };
    stream.write_all(answer.as_bytes()).await.unwrap();
    if answer.starts_with("HTTP/1.1 101") {
        let query = head.split([' ', '?']).nth(2).unwrap_or_default();
        let _ = tell.send(Connection::over(stream, query).await).await;
    }
}

fn path_of(head: &str) -> &str {
    head.split([' ', '?']).nth(1).unwrap_or_default()
}

fn answer(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
}

fn switch(head: &str) -> String {
    let mut lines = head.lines().filter_map(|line| line.split_once(": "));
    let (_, key) = lines.find(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-key")).unwrap();
    let accept = accept_key(key);
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    )
}

/// One control connection.
pub(crate) struct Connection {
    pub(crate) query: String,
    calls: mpsc::Receiver<Call>,
    waiting: Vec<Call>,
    closed: mpsc::Receiver<u16>,
    freeze: CancellationToken,
    cut: CancellationToken,
}

impl Connection {
    /// A deployment's end of a connection that was switched to WebSocket.
    pub(crate) async fn over<S>(stream: S, query: &str) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let web_socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
        let (ours, theirs) = duplex(256 * 1024);
        let (tell_closed, closed) = mpsc::channel(1);
        let (freeze, cut) = (CancellationToken::new(), CancellationToken::new());
        tokio::spawn(cut.clone().run_until_cancelled_owned(pump(
            web_socket,
            theirs,
            freeze.clone(),
            tell_closed,
        )));
        let (query, waiting) = (query.to_owned(), Vec::new());
        Self { query, calls: calls(ours), waiting, closed, freeze, cut }
    }

    /// The next call of a method.
    pub(crate) async fn call(&mut self, method: &str) -> Call {
        if let Some(index) = self.waiting.iter().position(|call| call.method == method) {
            return self.waiting.remove(index);
        }
        loop {
            let call = timeout(SOON, self.calls.recv()).await.expect("a call").expect("a live connection");
            if call.method == method {
                return call;
            }
            self.waiting.push(call);
        }
    }

    /// The methods of the calls that nobody took, in order, when the connection is over.
    pub(crate) async fn rest(&mut self) -> Vec<String> {
        let more = async {
            while let Some(call) = self.calls.recv().await {
                self.waiting.push(call);
            }
        };
        timeout(SOON, more).await.expect("an end");
        self.waiting.drain(..).map(|call| call.method).collect()
    }

    /// Reads and writes nothing any more, and keeps the connection.
    pub(crate) fn freeze(&self) {
        self.freeze.cancel();
    }

    /// Drops the connection.
    pub(crate) fn cut(&self) {
        self.cut.cancel();
    }

    /// The code that the client closed the WebSocket with; `None` if it did without.
    pub(crate) async fn closed(&mut self) -> Option<u16> {
        timeout(SOON, self.closed.recv()).await.expect("an end")
    }
}

async fn pump<S>(
    mut web_socket: WebSocketStream<S>,
    pipe: DuplexStream,
    freeze: CancellationToken,
    closed: mpsc::Sender<u16>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut read, mut write) = split(pipe);
    let mut buffer = [0; 16 * 1024];
    loop {
        tokio::select! {
            () = freeze.cancelled() => std::future::pending().await,
            frame = web_socket.next() => match frame {
                Some(Ok(Frame::Binary(payload))) => write.write_all(&payload).await.unwrap_or_default(),
                Some(Ok(Frame::Close(frame))) => {
                    let _ = closed.send(frame.map_or(1005, |frame| frame.code.into())).await;
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
            count = read.read(&mut buffer) => match count {
                Ok(count) if count > 0 => {
                    let _ = web_socket.send(Frame::Binary(Bytes::copy_from_slice(&buffer[..count]))).await;
                }
                _ => return,
            },
        }
    }
}

/// The calls that a client makes over a byte stream.
pub(crate) fn calls<S>(stream: S) -> mpsc::Receiver<Call>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (tell, calls) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut session = Session::new_server(stream, Config::default());
        while let Some(Ok(stream)) = session.next().await {
            let tell = tell.clone();
            tokio::spawn(async move {
                if let Some(call) = Call::accept(stream).await {
                    let _ = tell.send(call).await;
                }
            });
        }
    });
    calls
}

/// One call, as the deployment sees it. Dropped, it is reset.
pub(crate) struct Call {
    pub(crate) method: String,
    read: ReadHalf<StreamHandle>,
    decoder: Decoder,
    write: WriteHalf<StreamHandle>,
    packets: PacketWriter,
}

impl Call {
    async fn accept(stream: StreamHandle) -> Option<Self> {
        let (read, write) = split(stream);
        let (method, decoder, packets) = (String::new(), Decoder::new(), PacketWriter::new(1));
        let mut call = Self { method, read, decoder, write, packets };
        let invoke = call.packet().await?;
        assert_eq!(invoke.kind, Kind::Invoke);
        let path = String::from_utf8(invoke.data.to_vec()).unwrap();
        call.method = path.strip_prefix("/coder.tailnet.v2.Tailnet/").unwrap().to_owned();
        Some(call)
    }

    /// The next packet; `None` when the client is gone.
    pub(crate) async fn packet(&mut self) -> Option<Packet> {
        loop {
            if let Some(packet) = self.decoder.next().unwrap() {
                return Some(packet);
            }
            let mut bytes = [0; 4096];
            match timeout(SOON, self.read.read(&mut bytes)).await.expect("a packet") {
                Ok(count) if count > 0 => self.decoder.extend(&bytes[..count]),
                Ok(_) | Err(_) => return None,
            }
        }
    }

    /// The next message; `None` when the client ended its side.
    pub(crate) async fn next<M: Message + Default>(&mut self) -> Option<M> {
        let packet = self.packet().await?;
        (packet.kind == Kind::Message).then(|| M::decode(packet.data).unwrap())
    }

    pub(crate) async fn send<M: Message>(&mut self, message: &M) {
        self.write(Kind::Message, &message.encode_to_vec()).await;
    }

    pub(crate) async fn write(&mut self, kind: Kind, data: &[u8]) {
        let mut out = BytesMut::new();
        self.packets.write(kind, data, &mut out);
        self.write.write_all(&out).await.unwrap();
    }
}
