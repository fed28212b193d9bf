//! Metrics, logs, health and redaction. Knows nobody; everyone may use it.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod agents;
pub mod exporter;
pub mod health;
pub mod logs;
pub mod merge;
pub mod names;
pub mod netcheck;
pub mod page;
pub mod redact;
pub mod regions;
