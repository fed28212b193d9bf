//! A crook on the way between a tunnel and its deployment: passes everything on, except upgraded connections of
//! the kind that it was told to spoil.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

/// What is spoilt.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prey {
    /// The control connection.
    Control,
    /// Connections to the relay.
    Relay,
}

/// How the answers of an upgraded connection are spoilt: what it does until one side ends it.
pub(crate) type Deed = Arc<dyn Fn(&mut TcpStream, &mut TcpStream) + Send + Sync>;

/// The crook.
pub(crate) struct Crook {
    url: String,
    plan: Arc<Mutex<Option<(Prey, Deed)>>>,
}

impl Crook {
    /// Stands before the deployment at `host`.
    pub(crate) fn before(host: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (host, plan) = (host.to_owned(), Arc::<Mutex<Option<(Prey, Deed)>>>::default());
        let plans = Arc::clone(&plan);
        // Ends with the process: nobody waits for it.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (host, plans) = (host.clone(), Arc::clone(&plans));
                thread::spawn(move || serve(client, &host, &plans));
            }
        });
        Self { url, plan }
    }

    /// What the deployment is called on this side.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// From now on new connections of this kind are spoilt so.
    pub(crate) fn spoil(
        &self,
        prey: Prey,
        deed: impl Fn(&mut TcpStream, &mut TcpStream) + Send + Sync + 'static,
    ) {
        *self.plan.lock().unwrap() = Some((prey, Arc::new(deed)));
    }

    /// From now on new connections are passed on.
    pub(crate) fn repent(&self) {
        *self.plan.lock().unwrap() = None;
    }
}

fn serve(mut client: TcpStream, host: &str, plan: &Mutex<Option<(Prey, Deed)>>) {
    let Some(head) = head(&mut client) else { return };
    let Ok(mut server) = TcpStream::connect(host) else { return };
    if server.write_all(&head).is_err() {
        return;
    }
    let prey = match head.as_slice() {
        head if head.starts_with(b"GET /api/v2/tailnet") => Some(Prey::Control),
        head if head.starts_with(b"GET /derp ") => Some(Prey::Relay),
        _ => None,
    };
    let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || pass(&mut from, &mut to));
    let deed = plan.lock().unwrap().clone();
    if let Some((wanted, deed)) = deed
        && Some(wanted) == prey
    {
        let Some(answer) = self::head(&mut server) else { return };
        if client.write_all(&answer).is_ok() {
            deed(&mut client, &mut server);
        }
        let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
    } else {
        pass(&mut server, &mut client);
    }
}

/// Bytes up to and with the empty line, one by one: what follows belongs to somebody else.
fn head(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) if head.len() < 64 * 1024 => head.push(byte[0]),
            _ => return None,
        }
    }
    Some(head)
}

/// Passes bytes on until either side ends.
pub(crate) fn pass(from: &mut TcpStream, to: &mut TcpStream) {
    let mut piece = [0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut piece) {
        if to.write_all(&piece[..read]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Read), to.shutdown(Shutdown::Write));
}

/// Passes so many bytes on.
pub(crate) fn pass_only(from: &mut TcpStream, to: &mut TcpStream, count: u64) {
    let _ = std::io::copy(&mut from.take(count), to);
}

/// Passes everything on, a byte at a time.
pub(crate) fn drip(from: &mut TcpStream, to: &mut TcpStream, pause: Duration) {
    let mut byte = [0];
    while let Ok(1) = from.read(&mut byte) {
        if to.write_all(&byte).is_err() {
            return;
        }
        thread::sleep(pause);
    }
}

/// Passes everything on twice.
pub(crate) fn repeat(from: &mut TcpStream, to: &mut TcpStream) {
    let mut piece = [0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut piece) {
        if to.write_all(&piece[..read]).is_err() || to.write_all(&piece[..read]).is_err() {
            return;
        }
    }
}

/// Keeps the connection and says nothing, for longer than anybody waits.
pub(crate) fn hold() {
    thread::sleep(Duration::from_secs(120));
}

/// Writes these bytes again and again until the other side ends, at most so many megabytes.
pub(crate) fn flood(client: &mut TcpStream, bytes: &[u8], megabytes: usize) {
    let block: Vec<u8> =
        bytes.iter().copied().cycle().take(1024 * 1024 / bytes.len() * bytes.len()).collect();
    for _ in 0..megabytes {
        if client.write_all(&block).is_err() {
            return;
        }
    }
}
