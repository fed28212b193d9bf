//! The recorder of one process and its exposition. Both processes install one, each with its own value
//! of the `process` label; the service serves the two as one.

use std::{fmt::Write, time::Duration};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::names::{self, Kind};

/// Which of the two processes a series comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// The service.
    Service,
    /// The tunnel.
    Tunnel,
}

impl Process {
    /// The value of the `process` label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Tunnel => "tunnel",
        }
    }
}

/// From a loopback ping to a start that waits for its deadline.
const SECONDS_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Handlers are meant to finish in milliseconds: finer at the low end.
const HANDLER_BUCKETS: &[f64] = &[0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0];

/// Renders what this process has recorded.
#[derive(Clone)]
pub struct Exporter {
    handle: PrometheusHandle,
    process: metrics_process::Collector,
}

impl Exporter {
    /// Installs the recorder of this process. Fails if one is installed already.
    pub fn install(process: Process, version: &'static str) -> Result<Self, BuildError> {
        let handle = builder(process)?.install_recorder()?;
        names::describe_all();
        let collector = metrics_process::Collector::default();
        collector.describe();
        metrics::gauge!(names::BUILD_INFO, "version" => version).set(1.0);
        Ok(Self { handle, process: collector })
    }

    /// The exposition of this process, Prometheus text format.
    pub fn render(&self) -> String {
        self.process.collect();
        self.handle.run_upkeep();
        self.handle.render()
    }
}

fn builder(process: Process) -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new()
        .add_global_label("process", process.label())
        .set_bucket_duration(Duration::from_secs(60))?
        .set_buckets_for_metric(Matcher::Full(names::ACTOR_HANDLE_DURATION.into()), HANDLER_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS_BUCKETS)
}

/// Begins a family in an exposition that is written by hand.
pub(crate) fn head(text: &mut String, name: &str) {
    let Some(family) = names::family(name) else { return };
    let kind = match family.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", family.help.trim());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_rendered_with_buckets_help_and_process() {
        let recorder = builder(Process::Tunnel).unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            names::describe_all();
            metrics::histogram!(names::PING_DURATION, "connection_type" => "derp").record(0.02);
        });

        let text = handle.render();

        assert!(text.contains("# HELP warren_ping_duration_seconds Round trip of answered pings."), "{text}");
        assert!(text.contains("# TYPE warren_ping_duration_seconds histogram"), "{text}");
        let bucket =
            r#"warren_ping_duration_seconds_bucket{process="tunnel",connection_type="derp",le="0.025"} 1"#;
        assert!(text.contains(bucket), "{text}");
    }
}
