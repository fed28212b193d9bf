//! `warren up`: hand the token to the service and wait until the tunnel has answered.

use std::time::Duration;

use secrecy::ExposeSecret;
use tokio::time::Instant;
use warren_proto::vpn;

use super::{
    Reach, credentials,
    exit::{CliError, Exit, Outcome, printable},
    legb::ServiceClient,
    status::View,
};

const EXAMPLES: &str = "\
Examples:
  warren up
  warren up --wait --timeout 2m && warren status

Without --wait it returns as soon as the tunnel is connected to the deployment; with it, when every
agent of a running workspace has answered a ping.";

/// Connect to the deployment of the last login
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Also wait until every agent of a running workspace has answered
    #[arg(long)]
    wait: bool,
    /// Give up waiting after this long; the service goes on
    #[arg(long, value_name = "DURATION", default_value = "60s")]
    timeout: humantime::Duration,
}

/// Connects.
pub(crate) async fn run(reach: Reach, args: Args) -> Outcome {
    let credentials = credentials::load()?;
    let deadline = Instant::now() + Duration::from(args.timeout);
    let mut service = ServiceClient::connect(&reach).await?;
    let start = vpn::StartRequest {
        coder_url: credentials.url.to_string(),
        api_token: credentials.token.expose_secret().to_owned(),
        coder_desktop_version: super::VERSION.to_owned(),
        ..Default::default()
    };
    eprintln!("Connecting to {} ...", credentials.url);
    let answer = service.start(start, deadline, |progress| eprintln!("  {progress}")).await?;
    if !answer.success {
        let exit = exit_for(&answer.error_message);
        return Err(CliError::new(exit, answer.error_message));
    }
    if args.wait {
        wait_for_agents(&mut service, deadline).await?;
    }
    eprintln!("Connected.");
    Ok(Exit::Ok)
}

/// The status of a failed start. Leg B has no error codes, only words: the hint that ends a refused
/// token's text is the one thing to recognise it by (vpn-protocol 6.2).
fn exit_for(error: &str) -> Exit {
    let lower = error.to_lowercase();
    if lower.contains("warren login") || lower.contains("coder login") {
        Exit::LoginNeeded
    } else if lower.contains("the tunnel belongs to") {
        Exit::Denied
    } else {
        Exit::Failed
    }
}

/// A tunnel that has just started tells in its next message who there is. One that stays silent for so long
/// knows nobody.
const NOBODY_AFTER: Duration = Duration::from_secs(2);

async fn wait_for_agents(service: &mut ServiceClient, deadline: Instant) -> Result<(), CliError> {
    let mut shown = usize::MAX;
    let mut view = View::new(service.status(deadline).await?);
    let nobody_at = Instant::now() + NOBODY_AFTER;
    loop {
        let waiting = view.silent_agents();
        let is_known = !view.agents().is_empty() || nobody_at <= Instant::now();
        if view.is_started() && waiting.is_empty() && is_known {
            return Ok(());
        }
        if waiting.len() != shown && is_known {
            shown = waiting.len();
            eprintln!("  waiting for {shown} agent(s): {}", printable(&preview(&waiting)));
        }
        let late = || {
            let silent = preview(&view.silent_agents());
            CliError::new(Exit::Timeout, format!("connected, but these agents have not answered: {silent}"))
        };
        let until = if is_known { deadline } else { deadline.min(nobody_at) };
        view = match tokio::time::timeout_at(until, service.next_status()).await {
            Ok(status) => View::new(status?),
            Err(_) if Instant::now() < deadline => continue,
            Err(_) => return Err(late()),
        };
    }
}

fn preview(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(", ...");
    }
    text
}
