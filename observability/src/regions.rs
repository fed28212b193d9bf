//! The metrics of relay regions. They are made anew for each scrape from what is known by then, so that a region
//! that has left the relay map leaves nothing behind, and a map that changes all the time adds nothing up.

use std::{fmt::Write, time::Duration};

use crate::{
    exporter::{Process, head},
    names,
};

/// Regions with series of their own; deployments have a handful.
pub const MAX_REGIONS: usize = 256;

/// One region of the relay map.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// Its number.
    pub id: u16,
    /// Whether the link to it is up; `None` where none is wanted.
    pub is_connected: Option<bool>,
    /// How far its relay was at the last measurement.
    pub latency: Option<Duration>,
}

/// The exposition of these regions, Prometheus text format.
pub fn render(regions: impl Iterator<Item = Region>) -> String {
    let regions: Vec<Region> = regions.take(MAX_REGIONS).collect();
    let mut text = String::new();
    let mut family = |name: &str, value: &dyn Fn(&Region) -> Option<f64>| {
        head(&mut text, name);
        for region in &regions {
            if let Some(value) = value(region) {
                let (process, id) = (Process::Tunnel.label(), region.id);
                let _ = writeln!(text, "{name}{{process=\"{process}\",region=\"{id}\"}} {value}");
            }
        }
    };
    family(names::DERP_CONNECTED, &|region| Some(if region.is_connected? { 1.0 } else { 0.0 }));
    family(names::DERP_LATENCY, &|region| Some(region.latency?.as_secs_f64()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::merge;

    #[test]
    fn every_region_tells_what_is_known_of_it_and_it_passes_the_service() {
        let latency = Some(Duration::from_millis(250));
        let regions = [
            Region { id: 1, is_connected: Some(true), latency },
            Region { id: 2, is_connected: Some(false), latency: None },
            Region { id: 3, is_connected: None, latency },
        ];
        let text = merge("", Some(&render(regions.into_iter())));
        let series: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            series,
            [
                "warren_derp_connected{process=\"tunnel\",region=\"1\"} 1",
                "warren_derp_connected{process=\"tunnel\",region=\"2\"} 0",
                "warren_derp_latency_seconds{process=\"tunnel\",region=\"1\"} 0.25",
                "warren_derp_latency_seconds{process=\"tunnel\",region=\"3\"} 0.25",
            ]
        );
    }

    #[test]
    fn a_map_of_all_numbers_does_not_fill_the_scrape() {
        let text = render((1..=u16::MAX).map(|id| Region { id, is_connected: Some(true), latency: None }));
        assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), MAX_REGIONS);
    }
}
