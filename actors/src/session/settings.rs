//! Asking a manager that owns the network to configure it (vpn-protocol 9.1): only what it has not
//! acknowledged yet, one request at a time, each with a limit.

use std::{future::Future, net::IpAddr, time::Duration};

use warren_proto::{
    network::Router,
    vpn::{ManagerMessage, NetworkSettingsRequest, TunnelMessage, manager_message, tunnel_message},
};

use crate::{
    facts::{HostState, InterfaceConfig},
    runtime::View,
    speaker::Speaker,
};

/// How long a manager may take to apply settings.
const LIMIT: Duration = Duration::from_secs(30);

/// The conversation about one net's settings. Dropped, it abandons the request that is outstanding.
pub(super) struct Conversation {
    pub(super) speaker: Speaker<TunnelMessage, ManagerMessage>,
    pub(super) wanted: View<Option<InterfaceConfig>>,
    pub(super) acknowledged: Option<InterfaceConfig>,
}

impl Conversation {
    /// Asks whenever something else is wanted than was acknowledged, and reports what became of it. Ends
    /// when nothing more can be wanted, or nobody takes the reports.
    pub(super) async fn hold<F>(mut self, report: impl Fn(HostState) -> F)
    where
        F: Future<Output = bool>,
    {
        let mut is_settled = true;
        while let Some(wanted) = self.wanted.changed().await {
            let Some(wanted) = wanted.as_ref().clone() else { continue };
            if is_settled && self.acknowledged.as_ref() == Some(&wanted) {
                continue;
            }
            let outcome = ask(&self.speaker, &wanted).await;
            is_settled = outcome.is_ok();
            if is_settled {
                self.acknowledged = Some(wanted);
            }
            let host = HostState { applied: self.acknowledged.clone(), error: outcome.err() };
            if !report(host).await {
                return;
            }
        }
    }
}

async fn ask(
    speaker: &Speaker<TunnelMessage, ManagerMessage>,
    wanted: &InterfaceConfig,
) -> Result<(), String> {
    let message =
        TunnelMessage { rpc: None, msg: Some(tunnel_message::Msg::NetworkSettings(request(wanted))) };
    let answer = speaker.request(message, LIMIT).await.map_err(|error| format!("rpc failure: {error}"))?;
    match answer.msg {
        Some(manager_message::Msg::NetworkSettings(answer)) if answer.success => Ok(()),
        Some(manager_message::Msg::NetworkSettings(answer)) => {
            Err(format!("network settings failed: {}", answer.error_message))
        }
        _ => Err("network settings failed: the manager gave an answer of another kind".to_owned()),
    }
}

/// The settings as a request: one address, the routes, the MTU. What is absent stays as it is.
fn request(wanted: &InterfaceConfig) -> NetworkSettingsRequest {
    let included = wanted.routes.iter().map(|(network, length)| (IpAddr::from(*network), *length));
    NetworkSettingsRequest::from(&Router {
        mtu: wanted.mtu,
        addresses: vec![(wanted.address.into(), 128)],
        included: included.collect(),
        excluded: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use warren_proto::{frame, vpn};

    use super::*;

    #[test]
    fn settings_are_the_bytes_that_deployed_managers_know() {
        let wanted = InterfaceConfig {
            address: "fd60:627a:a42b:1:2:3:4:5".parse().unwrap(),
            routes: vec![("fd60:627a:a42b::".parse().unwrap(), 48)],
            mtu: 0,
        };
        let message = TunnelMessage {
            rpc: Some(vpn::Rpc::request(1)),
            msg: Some(tunnel_message::Msg::NetworkSettings(request(&wanted))),
        };
        let bytes: String =
            frame::encode(&message).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "0000003c0a020801223632340a18666436303a363237613a613432623a313a323a333a343a35120280011a140a1\
                        0666436303a363237613a613432623a3a1030";
        assert_eq!(bytes, expected);
    }
}
