//! How far the relays are: the time of one small request to each region, over a fresh connection
//! (tailnet-data 8.4). By that request alone: for ICMP echoes, which the reference sends as well, a process without
//! capabilities has no socket.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use http::{HeaderValue, header};
use tokio::time::timeout;
use warren_core::{
    home::{RegionLatency, Report},
    netcheck::RUN_LIMIT,
    relay_map::{Node, RegionId},
};

use super::request::{self, Headers, RequestError};
use crate::dial::{Dialer, race::first};

/// For all regions together, from dialling to the first byte of the last answer: within a run of netcheck.
const LIMIT: Duration = Duration::from_millis(1900);
const _: () = assert!(LIMIT.as_millis() < RUN_LIMIT.as_millis());
/// Regions measured at the same time: more would measure each other.
const AT_ONCE: usize = 16;
/// A relay that has not answered by then may be gone: the region's next one is asked as well.
const NEXT_AFTER: Duration = Duration::from_millis(600);
/// After the first answer others get half as long as that took, within these bounds, to be considered
/// for a first choice of home.
const LEAST_GRACE: Duration = Duration::from_millis(20);
const MOST_GRACE: Duration = Duration::from_millis(200);

/// One region to measure.
#[derive(Clone)]
pub(super) struct Probe {
    /// The region.
    pub(super) region: RegionId,
    /// Its relays.
    pub(super) nodes: Vec<Node>,
    /// Extra headers for them.
    pub(super) headers: Headers,
}

/// How much of a round a report holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The fastest regions.
    First,
    /// Every region that answered in time.
    Complete,
}

/// Measures regions; hands over a first report soon after the first answer, and the complete one at last.
pub(super) async fn measure<F>(
    dialer: &Dialer,
    probes: Vec<Probe>,
    mut hand_over: impl FnMut(Stage, Report) -> F,
) where
    F: Future<Output = ()>,
{
    let begun = Instant::now();
    let mut answers = stream::iter(probes)
        .map(|probe| async move { (probe.region, measure_region(dialer, &probe).await) })
        .buffer_unordered(AT_ONCE);
    let mut report = Report::new();
    let mut first_due: Option<tokio::time::Instant> = None;
    let over = tokio::time::sleep(LIMIT);
    tokio::pin!(over);
    loop {
        let is_due = first_due.is_some();
        let due = first_due.unwrap_or_else(tokio::time::Instant::now);
        tokio::select! {
            answer = answers.next() => match answer {
                Some((region, Some(latency))) => {
                    if report.insert(region, latency).is_none() && report.len() == 1 {
                        let grace = (begun.elapsed() / 2).clamp(LEAST_GRACE, MOST_GRACE);
                        first_due = Some(tokio::time::Instant::now() + grace);
                    }
                }
                Some((_, None)) => {}
                None => return hand_over(Stage::Complete, report).await,
            },
            () = &mut over => return hand_over(Stage::Complete, report).await,
            () = tokio::time::sleep_until(due), if is_due => {
                first_due = None;
                hand_over(Stage::First, report.clone()).await;
            }
        }
    }
}

/// By the first of its relays that answers.
async fn measure_region(dialer: &Dialer, probe: &Probe) -> Option<RegionLatency> {
    let attempts = probe.nodes.iter().map(|node| async move {
        let measured = measure_node(dialer, node, &probe.headers).await;
        let measured = measured.inspect_err(|error| {
            tracing::debug!(region = %probe.region, %error, "a relay was not measured");
        });
        measured.ok().flatten().ok_or(())
    });
    let attempts = attempts.collect();
    timeout(LIMIT, first(attempts, NEXT_AFTER)).await.ok()??.ok()
}

async fn measure_node(
    dialer: &Dialer,
    node: &Node,
    headers: &Headers,
) -> Result<Option<RegionLatency>, RequestError> {
    let stream = dialer.connect(&request::target(node), LIMIT).await?;
    let address = stream.peer_ip();
    let mut request = request::get(node, "/derp/latency-check", headers)?;
    request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    let asked = Instant::now();
    let response = request::send(stream, request).await?;
    let latency = asked.elapsed();
    Ok(response.status().is_success().then(|| of_family(address, latency)))
}

fn of_family(address: Option<IpAddr>, latency: Duration) -> RegionLatency {
    match address {
        Some(IpAddr::V6(_)) => RegionLatency { v4: None, v6: Some(latency) },
        Some(IpAddr::V4(_)) | None => RegionLatency { v4: Some(latency), v6: None },
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        sync::{mpsc, oneshot},
    };

    use super::*;
    use crate::dial::DialOptions;

    #[tokio::test]
    async fn a_first_report_comes_before_the_slow_regions_have_answered() {
        let (release, hold) = oneshot::channel();
        let fast = server("HTTP/1.1 200 OK\r\n\r\n", None).await;
        let slow = server("HTTP/1.1 200 OK\r\n\r\n", Some(hold)).await;
        let (sender, mut reports) = mpsc::channel(4);
        tokio::spawn(async move {
            let dialer = Dialer::new(DialOptions::default()).unwrap();
            let probes = vec![probe(1, fast), probe(2, slow)];
            measure(&dialer, probes, |stage, report| {
                let sender = sender.clone();
                async move { sender.send((stage, report)).await.unwrap() }
            })
            .await;
        });
        let (stage, report) = reports.recv().await.unwrap();
        assert_eq!(stage, Stage::First);
        assert_eq!(report.keys().collect::<Vec<_>>(), [&RegionId(1)]);
        release.send(()).unwrap();
        let (stage, report) = reports.recv().await.unwrap();
        assert_eq!(stage, Stage::Complete);
        assert_eq!(report.keys().collect::<Vec<_>>(), [&RegionId(1), &RegionId(2)]);
        assert!(report[&RegionId(1)].v4.is_some() && report[&RegionId(1)].v6.is_none());
        assert!(reports.recv().await.is_none());
    }

    #[tokio::test]
    async fn regions_that_refuse_or_do_not_exist_have_no_latency() {
        let refusing = server("HTTP/1.1 404 Not Found\r\n\r\n", None).await;
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let nonsense = server("SSH-2.0-dropbear\r\n\r\n", None).await;
        let dialer = Dialer::new(DialOptions::default()).unwrap();
        let (sender, mut reports) = mpsc::channel(4);
        measure(&dialer, vec![probe(1, refusing), probe(2, gone), probe(3, nonsense)], |stage, report| {
            let sender = sender.clone();
            async move { sender.send((stage, report)).await.unwrap() }
        })
        .await;
        assert_eq!(reports.recv().await.unwrap(), (Stage::Complete, Report::new()));
    }

    #[tokio::test]
    async fn the_second_node_of_a_region_is_measured_where_the_first_is_gone() {
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let there = server("HTTP/1.1 200 OK\r\n\r\n", None).await;
        let mut both = probe(1, gone);
        both.nodes.extend(probe(1, there).nodes);
        let dialer = Dialer::new(DialOptions::default()).unwrap();
        assert!(measure_region(&dialer, &both).await.is_some());
    }

    #[tokio::test]
    async fn the_second_node_of_a_region_is_measured_where_the_first_swallows_everything() {
        let (_never, hold) = oneshot::channel();
        let silent = server("", Some(hold)).await;
        let there = server("HTTP/1.1 200 OK\r\n\r\n", None).await;
        let mut both = probe(1, silent);
        both.nodes.extend(probe(1, there).nodes);
        let dialer = Dialer::new(DialOptions::default()).unwrap();
        assert!(measure_region(&dialer, &both).await.is_some());
    }

    async fn server(answer: &'static str, mut hold: Option<oneshot::Receiver<()>>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                assert!(request.starts_with(b"GET /derp/latency-check HTTP/1.1\r\n"));
                if let Some(hold) = hold.take() {
                    hold.await.unwrap();
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        port
    }

    fn probe(region: u16, port: u16) -> Probe {
        let node =
            Node { host_name: "127.0.0.1".to_owned(), derp_port: port, force_http: true, ..Node::default() };
        Probe { region: RegionId(region), nodes: vec![node], headers: Headers::new() }
    }
}
