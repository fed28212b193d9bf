//! Relay maps that a deployment is told to read: a file or a URL, in their JSON form (tailnet-control 1.7).

use std::{collections::BTreeMap, io::Read, path::PathBuf, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use url::{Position, Url};
use warren_proto::tailnet::{
    DerpMap,
    derp_map::{HomeParams, Region, region::Node},
};

use super::relay_map::MapError;

/// Bytes of the longest map.
const MAX_TEXT: usize = 1 << 20;
/// How long a URL may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Where a relay map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapSource {
    /// In a file.
    File(PathBuf),
    /// At a URL, by plain HTTP.
    Url(String),
}

/// Reads a map.
pub(crate) async fn load(source: &MapSource) -> Result<DerpMap, MapError> {
    let (place, text) = match source {
        MapSource::File(path) => (path.display().to_string(), read(path)),
        MapSource::Url(url) => (url.clone(), fetch(url).await),
    };
    text.and_then(|text| parse(&text)).map_err(|why| MapError::Unreadable { place, why })
}

fn read(path: &PathBuf) -> Result<Vec<u8>, String> {
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_TEXT as u64 + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
    if text.len() > MAX_TEXT { Err(format!("it is longer than {MAX_TEXT} bytes")) } else { Ok(text) }
}

async fn fetch(url: &str) -> Result<Vec<u8>, String> {
    let url = Url::parse(url).map_err(|error| error.to_string())?;
    match tokio::time::timeout(LIMIT, get(&url)).await {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {LIMIT:?}")),
    }
}

async fn get(url: &Url) -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
    let host = url.host_str().filter(|_| url.scheme() == "http").ok_or("only http:// is read here")?;
    let port = url.port_or_known_default().unwrap_or(80);
    let stream = TcpStream::connect((host.trim_start_matches('[').trim_end_matches(']'), port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(&url[Position::BeforePath..Position::AfterQuery])
        .header(header::HOST, format!("{host}:{port}"))
        .body(Empty::<Bytes>::new())?;
    let answering = async move {
        let answer = sender.send_request(request).await?;
        if answer.status() != StatusCode::OK {
            return Err(format!("the answer is {}", answer.status()).into());
        }
        Ok(Limited::new(answer.into_body(), MAX_TEXT).collect().await?.to_bytes().to_vec())
    };
    // The connection ends with its sender, which the answer takes with it.
    let (text, _) = tokio::join!(answering, connection);
    text
}

fn parse(text: &[u8]) -> Result<DerpMap, String> {
    let map: MapText = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let region_score = map.home_params.and_then(|home| home.region_score).unwrap_or_default();
    let regions = map.regions.unwrap_or_default().into_iter();
    Ok(DerpMap {
        home_params: Some(HomeParams { region_score }),
        regions: regions.map(|(id, region)| (id, region.into_region(id))).collect(),
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct MapText {
    home_params: Option<HomeText>,
    regions: Option<BTreeMap<i64, RegionText>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HomeText {
    region_score: Option<BTreeMap<i64, f64>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RegionText {
    embedded_relay: bool,
    region_code: String,
    region_name: String,
    avoid: bool,
    nodes: Option<Vec<NodeText>>,
}

impl RegionText {
    /// The key is what counts.
    fn into_region(self, id: i64) -> Region {
        let nodes = self.nodes.unwrap_or_default().into_iter();
        Region {
            region_id: id,
            embedded_relay: self.embedded_relay,
            region_code: self.region_code,
            region_name: self.region_name,
            avoid: self.avoid,
            nodes: nodes.map(|node| node.into_node(id)).collect(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct NodeText {
    name: String,
    host_name: String,
    cert_name: String,
    #[serde(rename = "IPv4")]
    ipv4: String,
    #[serde(rename = "IPv6")]
    ipv6: String,
    #[serde(rename = "STUNPort")]
    stun_port: i32,
    #[serde(rename = "STUNOnly")]
    stun_only: bool,
    #[serde(rename = "DERPPort")]
    derp_port: i32,
    insecure_for_tests: bool,
    #[serde(rename = "ForceHTTP")]
    force_http: bool,
    #[serde(rename = "STUNTestIP")]
    stun_test_ip: String,
    can_port_80: bool,
}

impl NodeText {
    fn into_node(self, region_id: i64) -> Node {
        Node {
            region_id,
            name: self.name,
            host_name: self.host_name,
            cert_name: self.cert_name,
            ipv4: self.ipv4,
            ipv6: self.ipv6,
            stun_port: self.stun_port,
            stun_only: self.stun_only,
            derp_port: self.derp_port,
            insecure_for_tests: self.insecure_for_tests,
            force_http: self.force_http,
            stun_test_ip: self.stun_test_ip,
            can_port_80: self.can_port_80,
        }
    }
}
