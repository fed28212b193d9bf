//! A deployment in this process, whose failures a test can ask for.

use tokio::runtime::Runtime;
use warren_lab::{Control, Lab, LabOptions};

/// A control plane, a relay and agents on the loopback.
pub(crate) struct Deployment {
    /// Where it runs.
    pub(crate) runtime: Runtime,
    /// Itself.
    pub(crate) lab: Lab,
}

impl Deployment {
    /// Starts one with so many agents.
    pub(crate) fn start(agents: usize) -> Self {
        Self::with(LabOptions { agents, ..LabOptions::default() })
    }

    /// Starts one with these options.
    pub(crate) fn with(options: LabOptions) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let lab = runtime.block_on(Lab::start(options)).unwrap();
        Self { runtime, lab }
    }

    /// Its URL and the token that it accepts.
    pub(crate) fn access(&self) -> (String, String) {
        (self.lab.url().to_owned(), self.lab.token().to_owned())
    }

    /// Its failures and recordings.
    pub(crate) fn control(&self) -> Control {
        self.lab.control()
    }
}
