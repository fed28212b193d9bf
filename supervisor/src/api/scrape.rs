//! One exposition of both processes.

use std::{sync::Arc, time::Duration};

use axum::{extract::State, response::IntoResponse};
use http::header::CONTENT_TYPE;
use warren_observability::{merge::merge, names};

use super::Shared;

/// How long the tunnel may take to tell its metrics; then a scrape is without them.
const LIMIT: Duration = Duration::from_secs(1);
/// Prometheus' own name for its text format.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The metrics of this process and of its tunnel.
pub(super) async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let link = shared.service.link.get().as_ref().clone();
    let tunnel = match link {
        Some(link) => link
            .scrape(LIMIT)
            .await
            .inspect_err(|error| tracing::warn!(%error, "no metrics of the tunnel"))
            .ok(),
        None => None,
    };
    metrics::gauge!(names::TUNNEL_SCRAPE_SUCCESS).set(if tunnel.is_some() { 1.0 } else { 0.0 });
    if let Some(tree) = shared.surface.tree.get() {
        tree.measure();
    }
    ([(CONTENT_TYPE, FORMAT)], merge(&shared.surface.exporter.render(), tunnel.as_deref()))
}
