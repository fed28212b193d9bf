//! Whether the service lives and is ready, with reasons. `/healthz` and `/readyz` answer from here.

/// The health of the service at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Health {
    /// Why the service is not alive; empty when it is.
    pub dead: Vec<String>,
    /// Why the tunnel cannot be used at the moment; empty when it can.
    pub unready: Vec<String>,
}

impl Health {
    /// Whether the service itself works. A tunnel that is down does not make it dead.
    pub fn is_live(&self) -> bool {
        self.dead.is_empty()
    }

    /// Whether traffic to agents can flow.
    pub fn is_ready(&self) -> bool {
        self.is_live() && self.unready.is_empty()
    }
}
