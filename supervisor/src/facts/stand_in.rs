//! What a service that nobody runs is made of: for tests and fuzz targets.

use std::path::Path;

use super::Options;
use crate::paths::{Paths, Scope};

/// Everything in one folder, which need not exist.
pub(crate) fn paths(folder: &Path) -> Paths {
    Paths {
        scope: Scope::User,
        runtime_dir: folder.to_owned(),
        state_dir: folder.to_owned(),
        config: folder.join("config.toml"),
        config_is_named: false,
    }
}

/// Run by whoever asks, without a device, faults and whatever else can be chosen.
pub(crate) fn options() -> Options {
    Options {
        with_device: false,
        allow_faults: false,
        version: "0.0.0",
        uid: rustix::process::geteuid().as_raw(),
        log_filter: "info".into(),
        agent_metrics: false,
        ca_file: None,
        client_certificate: None,
    }
}
