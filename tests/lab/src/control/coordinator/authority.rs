//! What a peer may ask of the coordinator (tailnet-control 4.7). Each request is judged by what its own sender
//! may do, whoever is at the other end.

use std::collections::BTreeSet;

use uuid::Uuid;
use warren_proto::{
    address::{coder_address, tailscale_address},
    tailnet::{CoordinateRequest, Node},
};

use super::Auth;

/// The address that all agents once had.
const LEGACY_AGENT: &str = "fd7a:115c:a1e0:49d6:b259:b7ac:b1b2:48f4";

/// Which agents clients may reach.
#[derive(Default)]
pub(super) struct Authority {
    pub(super) agents: BTreeSet<Uuid>,
    pub(super) forbidden: BTreeSet<Uuid>,
}

impl Authority {
    /// Whether a peer may ask for something; the refusal is in a deployment's words.
    pub(super) fn check(&self, id: Uuid, auth: Auth, request: &CoordinateRequest) -> Result<(), String> {
        match auth {
            Auth::Client => self.authorize_client(request),
            Auth::Agent => authorize_agent(id, request),
        }
        .map_err(|text| format!("authorization: {text}"))
    }

    fn authorize_client(&self, request: &CoordinateRequest) -> Result<(), String> {
        if let Some(tunnel) = &request.add_tunnel {
            let agent = Uuid::from_slice(&tunnel.id)
                .map_err(|_| format!("parse add tunnel id: invalid UUID (got {} bytes)", tunnel.id.len()))?;
            if !self.agents.contains(&agent) || self.forbidden.contains(&agent) {
                return Err("workspace agent not found or you do not have permission".to_owned());
            }
        }
        for address in node_of(request).map_or(&[][..], |node| &node.addresses) {
            let bits = prefix_bits(address)?;
            if bits != 128 {
                return Err(format!("invalid address bits, expected 128, got {bits}"));
            }
        }
        if !request.ready_for_handshake.is_empty() {
            return Err("clients may not send ready_for_handshake".to_owned());
        }
        Ok(())
    }
}

fn authorize_agent(id: Uuid, request: &CoordinateRequest) -> Result<(), String> {
    if request.add_tunnel.is_some() {
        return Err("agents cannot open tunnels".to_owned());
    }
    let own = [
        format!("{}/128", coder_address(&id)),
        format!("{}/128", tailscale_address(&id)),
        format!("{LEGACY_AGENT}/128"),
    ];
    let Some(node) = node_of(request) else { return Ok(()) };
    for (field, prefixes) in [("Addresses", &node.addresses), ("AllowedIps", &node.allowed_ips)] {
        for prefix in prefixes {
            let bits = prefix_bits(prefix)?;
            if bits != 128 {
                return Err(format!("{field}: invalid address bits, expected 128, got {bits}"));
            }
            if !own.contains(prefix) {
                let address = prefix.split('/').next().unwrap_or_default();
                return Err(format!("{field}: invalid node address, got {address}"));
            }
        }
    }
    Ok(())
}

fn node_of(request: &CoordinateRequest) -> Option<&Node> {
    request.update_self.as_ref()?.node.as_ref()
}

fn prefix_bits(text: &str) -> Result<u8, String> {
    let parse = |reason: &str| format!("parse node address: netip.ParsePrefix({text:?}): {reason}");
    let (address, bits) = text.split_once('/').ok_or_else(|| parse("no '/'"))?;
    let _: std::net::IpAddr =
        address.parse().map_err(|_| parse(&format!("ParseAddr({address:?}): unable to parse IP")))?;
    bits.parse().map_err(|_| parse(&format!("bad bits after slash: {bits:?}")))
}
