//! Pings on demand, one line each as it is answered: over the path that is in use, or through WireGuard.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Bytes,
    extract::{Path, Query, State, rejection::QueryRejection},
    response::Response,
};
use futures::stream;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;
use warren_proto::vpn::status::Lifecycle;

use super::{
    Shared,
    answer::Refusal,
    look::{line, lines},
    resolve::resolve,
};
use crate::{facts::TunnelState, link::PingBy};

/// How long one answer is waited for.
const LIMIT: Duration = Duration::from_secs(5);
/// From one ping to the next.
const PERIOD: Duration = Duration::from_secs(1);
/// The most that one request asks for.
const MAX_COUNT: u32 = 3600;

/// How often, and by what.
#[derive(serde::Deserialize)]
pub(super) struct Times {
    #[serde(default = "once")]
    count: u32,
    /// Through WireGuard.
    #[serde(default)]
    tsmp: bool,
}

fn once() -> u32 {
    1
}

/// Pings an agent.
pub(super) async fn ping(
    State(shared): State<Arc<Shared>>,
    Path(called): Path<String>,
    times: Result<Query<Times>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(times) = times.map_err(|error| Refusal::bad_request(error.body_text()))?;
    if shared.service.link.get().is_none() {
        return Err(why_not(&shared));
    }
    let agent = resolve(&shared.service.peers.get(), &called).map_err(Refusal::not_found)?;
    let left = times.count.clamp(1, MAX_COUNT);
    let by = if times.tsmp { PingBy::Tsmp } else { PingBy::Disco };
    let series = Series { shared, agent, by, left, next: Instant::now() };
    Ok(lines(stream::unfold(series, async |mut series| {
        let answer = series.next().await?;
        Some((Ok::<Bytes, Infallible>(line(&answer)), series))
    })))
}

/// Why no tunnel can be asked.
pub(super) fn why_not(shared: &Shared) -> Refusal {
    let running = shared.service.running.get();
    let is_foreign = running.as_ref().as_ref().is_some_and(|running| running.link().is_none());
    refusal(&shared.service.tunnel.get(), is_foreign)
}

/// The same of a tunnel, which may be another program's.
pub(super) fn refusal(tunnel: &TunnelState, is_foreign: bool) -> Refusal {
    let words = match tunnel.lifecycle {
        _ if !tunnel.error.is_empty() => format!("there is no tunnel: {}", tunnel.error),
        Lifecycle::Starting => "the tunnel is only starting; try again in a moment".to_owned(),
        Lifecycle::Stopping => "the tunnel is being stopped".to_owned(),
        Lifecycle::Started if is_foreign => {
            return Refusal::unsupported("the tunnel cannot be asked: it is another program than ours");
        }
        Lifecycle::Started => "the tunnel did not answer in time; try again in a moment".to_owned(),
        Lifecycle::Stopped | Lifecycle::Unknown => "there is no tunnel: run `warren up` first".to_owned(),
    };
    Refusal::unavailable(words)
}

/// The pings that are left. Ends with its reader.
struct Series {
    shared: Arc<Shared>,
    agent: Uuid,
    by: PingBy,
    left: u32,
    next: Instant,
}

impl Series {
    async fn next(&mut self) -> Option<Value> {
        self.left = self.left.checked_sub(1)?;
        sleep_until(self.next).await;
        self.next = Instant::now() + PERIOD;
        Some(self.ping().await.unwrap_or_else(|error| json!({ "error": error })))
    }

    /// Each by the tunnel that runs by then.
    async fn ping(&self) -> Result<Value, String> {
        let link = self.shared.service.link.get().as_ref().clone();
        let link = link.ok_or_else(|| "the tunnel is being restarted".to_owned())?;
        let answer =
            link.ping_agent(self.agent, self.by, LIMIT).await.map_err(|error| error.to_string())??;
        let latency = answer.latency.as_secs_f64();
        Ok(match self.by {
            PingBy::Disco => {
                json!({ "latency_seconds": latency, "p2p": answer.direct, "region": answer.region })
            }
            PingBy::Tsmp => json!({ "latency_seconds": latency }),
        })
    }
}
