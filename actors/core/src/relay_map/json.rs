//! The relay map's JSON form, and the connection information it comes in (tailnet-control 1.7). Keys
//! are read without regard to case, as the reference reads them; unknown keys and values of the wrong
//! shape in a node leave defaults, so that a newer deployment stays readable.

use serde_json::{Map, Value};
use warren_proto::name::DEFAULT_SUFFIX;

use super::{HTTPS_PORT, Node, NodeAddress, Region, RegionId, RelayMap, STUN_PORT, port};

/// What the deployment says about connecting to it, besides the streams.
#[derive(Debug, Clone, PartialEq)]
pub struct ConnectionInfo {
    /// The relay map, not rewritten yet; empty if the deployment gave none.
    pub relay_map: RelayMap,
    /// Relays are to be reached by WebSocket only.
    pub force_websockets: bool,
    /// Direct paths are forbidden: advertise no endpoints, ignore those of peers.
    pub disable_direct: bool,
    /// The host name suffix, never empty.
    pub hostname_suffix: String,
}

/// Why a JSON text could not be read.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// It is no JSON.
    #[error("not JSON: {0}")]
    Syntax(#[from] serde_json::Error),
    /// It is JSON, but no object where one must be.
    #[error("{0} is not an object")]
    NotAnObject(&'static str),
}

impl ConnectionInfo {
    /// Reads the body of `GET /api/v2/workspaceagents/connection`.
    pub fn from_json(body: &[u8]) -> Result<Self, JsonError> {
        let body = serde_json::from_slice(body)?;
        let info = Object::require("connection information", &body)?;
        let relay_map = info.get("derp_map").filter(|map| !map.is_null());
        let suffix = info.text("hostname_suffix").trim_matches('.').to_owned();
        Ok(Self {
            relay_map: relay_map.map(RelayMap::from_value).transpose()?.unwrap_or_default(),
            force_websockets: info.flag("derp_force_websockets"),
            disable_direct: info.flag("disable_direct_connections"),
            hostname_suffix: if suffix.is_empty() { DEFAULT_SUFFIX.to_owned() } else { suffix },
        })
    }
}

impl RelayMap {
    /// Reads the map's own JSON form.
    pub fn from_json(text: &[u8]) -> Result<Self, JsonError> {
        Self::from_value(&serde_json::from_slice(text)?)
    }

    fn from_value(value: &Value) -> Result<Self, JsonError> {
        let map = Object::require("derp_map", value)?;
        let regions = map.object("Regions").entries().filter_map(|(key, value)| {
            let id = RegionId::new(key.parse().ok()?)?;
            Some((id, Region::from_value(id, value)?))
        });
        let params = map.object("HomeParams").object("RegionScore");
        let scores = params
            .entries()
            .filter_map(|(key, score)| Some((RegionId::new(key.parse().ok()?)?, score.as_f64()?)));
        Ok(Self { regions: regions.collect(), scores: scores.collect() })
    }
}

impl Region {
    fn from_value(id: RegionId, value: &Value) -> Option<Self> {
        let region = Object(Some(value.as_object()?));
        let nodes = region.get("Nodes").and_then(Value::as_array);
        Some(Self {
            id,
            code: region.text("RegionCode").to_owned(),
            name: region.text("RegionName").to_owned(),
            embedded: region.flag("EmbeddedRelay"),
            avoid: region.flag("Avoid"),
            nodes: nodes.into_iter().flatten().filter_map(Node::from_value).collect(),
        })
    }
}

impl Node {
    fn from_value(value: &Value) -> Option<Self> {
        let node = Object(Some(value.as_object()?));
        Some(Self {
            name: node.text("Name").to_owned(),
            host_name: node.text("HostName").to_owned(),
            cert_name: Some(node.text("CertName").to_owned()).filter(|name| !name.is_empty()),
            ipv4: NodeAddress::parse(node.text("IPv4")),
            ipv6: NodeAddress::parse(node.text("IPv6")),
            derp_port: port(node.number("DERPPort"), HTTPS_PORT)?,
            stun_only: node.flag("STUNOnly"),
            stun_port: port(node.number("STUNPort"), STUN_PORT),
            stun_test_ip: node.text("STUNTestIP").parse().ok(),
            force_http: node.flag("ForceHTTP"),
            insecure_for_tests: node.flag("InsecureForTests"),
        })
    }
}

/// A JSON object whose keys are found without regard to case, an exact match first; or none, which has
/// no keys.
#[derive(Clone, Copy)]
struct Object<'a>(Option<&'a Map<String, Value>>);

impl<'a> Object<'a> {
    fn require(what: &'static str, value: &'a Value) -> Result<Self, JsonError> {
        value.as_object().map(|map| Self(Some(map))).ok_or(JsonError::NotAnObject(what))
    }

    fn get(self, key: &str) -> Option<&'a Value> {
        let map = self.0?;
        let alike = || map.iter().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| value);
        map.get(key).or_else(alike)
    }

    fn object(self, key: &str) -> Self {
        Self(self.get(key).and_then(Value::as_object))
    }

    fn entries(self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.0.into_iter().flatten()
    }

    fn text(self, key: &str) -> &'a str {
        self.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    fn number(self, key: &str) -> i64 {
        self.get(key).and_then(Value::as_i64).unwrap_or_default()
    }

    fn flag(self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or_default()
    }
}
