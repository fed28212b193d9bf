//! `warren down`: end the tunnel; the token is kept.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Reach,
    exit::{CliError, Exit, Outcome},
    legb::ServiceClient,
};

/// Above what the service takes at worst.
const LIMIT: Duration = Duration::from_secs(30);

const EXAMPLES: &str = "\
Examples:
  warren down            ends the tunnel; `warren up` needs no new login
  warren logout          also forgets the token, here and in the service";

/// Disconnect; the token is kept
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
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
