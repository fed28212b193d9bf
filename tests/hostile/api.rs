//! What a user can do to the local API and to the metrics on loopback.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use super::{LIMIT, ServiceProcess, stands, support::unix_get};

fn api(service: &ServiceProcess) -> UnixStream {
    let stream = UnixStream::connect(service.socket_dir().join("api.sock")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn is_up(service: &ServiceProcess) -> bool {
    unix_get(&service.socket_dir().join("api.sock"), "/healthz").is_some_and(|it| it.contains("200 OK"))
}

#[test]
fn what_is_no_http_is_refused_with_a_status() {
    let service = ServiceProcess::start();
    for garbage in [&b"codervpn client 1.3\n\n"[..], &[0xff; 64], b"GET /\x00 HTTP/9.9\r\n\r\n"] {
        let mut hostile = api(&service);
        hostile.write_all(garbage).unwrap();
        hostile.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = hostile.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
    }
    assert!(is_up(&service));
    stands(&service, "a connection of the local API ended early");
}

#[test]
fn a_head_without_an_end_is_refused_and_one_that_drips_is_given_up() {
    let service = ServiceProcess::start();
    let mut endless = api(&service);
    let _ = endless.write_all(b"GET / HTTP/1.1\r\n");
    for _ in 0..10_000 {
        if endless.write_all(&[b'x'; 100]).is_err() {
            break;
        }
    }
    let mut answer = String::new();
    let _ = endless.read_to_string(&mut answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");

    let mut dripping = api(&service);
    for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\nX: y\r\n".iter().cycle().take(100) {
        if dripping.write_all(&[*byte]).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(150));
    }
    let _ = dripping.read_to_end(&mut Vec::new());
    assert!(is_up(&service));
    stands(&service, "");
}

#[test]
fn a_body_that_is_too_large_is_refused_before_it_is_read() {
    let service = ServiceProcess::start();
    let mut hostile = api(&service);
    let head = "DELETE /v1/credentials HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1099511627776\r\n\r\n";
    hostile.write_all(head.as_bytes()).unwrap();
    let chunk = vec![b'x'; 64 * 1024];
    for _ in 0..1000 {
        if hostile.write_all(&chunk).is_err() {
            break;
        }
    }
    drop(hostile);
    assert!(is_up(&service));
    stands(&service, "");
}

#[test]
fn scrapers_that_never_read_take_no_place_for_ever() {
    let service = ServiceProcess::start();
    let log = service.log();
    let address = log.split("metrics=Some(").nth(1).map(str::to_owned);
    let Some(address) = address.and_then(|rest| address_in(&rest)) else {
        panic!("the log does not say where metrics are: {log}")
    };
    // More than there is room for, each with more questions than any buffer has room for answers.
    let hostile: Vec<_> = (0..80)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
            let ask = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\n\r\n").repeat(1000);
            let _ = stream.write_all(ask.as_bytes());
            stream
        })
        .collect();
    let served = super::support::get(&format!("http://{address}/healthz"));
    assert!(served.is_some_and(|answer| answer.contains("200 OK")));
    drop(hostile);
    stands(&service, "");
}

/// The first socket address in a text.
fn address_in(text: &str) -> Option<String> {
    let words = text.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == ':'));
    words.map(str::to_owned).find(|word| word.parse::<std::net::SocketAddr>().is_ok())
}
