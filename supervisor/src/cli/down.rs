//! `warren down`: end the tunnel; the token is kept.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Reach,
    exit::{CliError, Exit, Outcome},
    legb::ServiceClient,
};

/// Above the whole stop ladder of the service.
const LIMIT: Duration = Duration::from_secs(20);

/// Disconnect; the token is kept
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Disconnects.
pub(crate) async fn run(reach: Reach, _args: Args) -> Outcome {
    let mut service = ServiceClient::connect(&reach).await?;
    let answer = service.stop(Instant::now() + LIMIT).await?;
    if !answer.success {
        return Err(CliError::failed(answer.error_message));
    }
    eprintln!("Disconnected.");
    Ok(Exit::Ok)
}
