//! A proxy that connects where it is asked to (HTTP CONNECT), with or without asking who wants that. Whatever
//! the name, it leads to this machine: only through it are such names anything.

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

/// Heads are far shorter.
const MAX_HEAD: usize = 4096;

/// A running proxy. It ends with its runtime.
pub(crate) struct ConnectProxy {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
}

impl ConnectProxy {
    /// Starts one that serves everybody, or who sends this as `Proxy-Authorization`.
    pub(crate) fn start(runtime: &Runtime, authorization: Option<&str>) -> Self {
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (record, authorization) = (Arc::clone(&asked), authorization.map(str::to_owned));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&record), authorization.clone()));
            }
        });
        Self { port, asked }
    }

    /// Host and port.
    pub(crate) fn authority(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The places it has connected to, in order.
    pub(crate) fn connected(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn serve(mut client: TcpStream, record: Arc<Mutex<Vec<String>>>, authorization: Option<String>) {
    let Some(head) = head(&mut client).await else { return };
    let header = |name: &str| {
        let lines = head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
    };
    if authorization.is_some() && header("proxy-authorization") != authorization {
        let answer = "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\n\
                      Content-Length: 0\r\n\r\n";
        let _ = client.write_all(answer.as_bytes()).await;
        return;
    }
    let place = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next());
    let port = place.and_then(|place| place.rsplit_once(':')?.1.parse::<u16>().ok());
    let (Some(place), Some(port)) = (place, port) else { return };
    let Ok(mut server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { return };
    record.lock().unwrap().push(place.to_owned());
    if client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.is_ok() {
        let _ = copy_bidirectional(&mut client, &mut server).await;
    }
}

/// A request up to its empty line. Clients speak only after the answer, so nothing comes behind it.
async fn head(client: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < MAX_HEAD {
        head.push(client.read_u8().await.ok()?);
    }
    String::from_utf8(head).ok()
}
