//! The metrics of how the world sees the tunnel. They are made anew for each scrape: what is not known has no series,
//! which no gauge of the recorder can say.

use std::{
    fmt::Write,
    time::{Duration, SystemTime},
};

use crate::{
    exporter::{Process, head},
    names,
};

/// What the tunnel knows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Netcheck {
    /// Whether direct paths are tried.
    pub direct_allowed: bool,
    /// When it was looked last.
    pub at: Option<SystemTime>,
    /// Whether UDP gets out and back.
    pub udp: Option<bool>,
    /// Whether others see us at an address that depends on who they are.
    pub varies: Option<bool>,
}

/// The exposition of it, Prometheus text format.
pub fn render(netcheck: &Netcheck) -> String {
    let mut text = String::new();
    let mut family = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            head(&mut text, name);
            let _ = writeln!(text, "{name}{{process=\"{}\"}} {value}", Process::Tunnel.label());
        }
    };
    let truth = |it: bool| if it { 1.0 } else { 0.0 };
    let since_epoch = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).ok();
    family(names::DIRECT_ALLOWED, Some(truth(netcheck.direct_allowed)));
    family(names::NETCHECK_LAST, netcheck.at.and_then(since_epoch).as_ref().map(Duration::as_secs_f64));
    family(names::NETCHECK_UDP, netcheck.udp.map(truth));
    family(names::NETCHECK_MAPPING_VARIES, netcheck.varies.map(truth));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::merge;

    #[test]
    fn what_is_known_is_told_and_passes_the_service_and_what_is_not_is_left_out() {
        let at = Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1500));
        let known = Netcheck { direct_allowed: true, at, udp: Some(true), varies: Some(false) };
        assert_eq!(
            series(&known),
            [
                "warren_direct_allowed{process=\"tunnel\"} 1",
                "warren_netcheck_last_timestamp_seconds{process=\"tunnel\"} 1.5",
                "warren_netcheck_mapping_varies{process=\"tunnel\"} 0",
                "warren_netcheck_udp{process=\"tunnel\"} 1",
            ]
        );
        assert_eq!(series(&Netcheck::default()), ["warren_direct_allowed{process=\"tunnel\"} 0"]);
    }

    fn series(netcheck: &Netcheck) -> Vec<String> {
        let text = merge("", Some(&render(netcheck)));
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }
}
