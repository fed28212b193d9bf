//! `warren up`: hand the token to the service and wait until the tunnel has answered.

use std::time::Duration;

use secrecy::ExposeSecret;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};
use uuid::Uuid;
use warren_proto::vpn;

use super::{
    Reach,
    api::Api,
    credentials,
    exit::{CliError, Exit, Outcome, printable},
    legb::ServiceClient,
    status::View,
};

const EXAMPLES: &str = "\
Examples:
  warren up
  warren up --wait --timeout 2m && warren status

Without --wait it returns as soon as the tunnel is connected to the deployment; with it, when packets
get to every agent of a running workspace and back.";

/// Connect to the deployment of the last login
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Also wait until packets get to every agent of a running workspace and back
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
        let agents = wait_for_agents(&mut service, deadline).await?;
        wait_for_packets(&Api::new(&reach), agents, deadline).await?;
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

/// Between two tries to ask.
const PAUSE: Duration = Duration::from_millis(100);
/// Agents that are asked at the same time whether packets get through: fewer than a tunnel serves.
const ASKED_AT_ONCE: usize = 16;

/// Waits until all agents that are expected answer pings. Returns their ids and names.
async fn wait_for_agents(
    service: &mut ServiceClient,
    deadline: Instant,
) -> Result<Vec<(Uuid, String)>, CliError> {
    let mut shown = usize::MAX;
    let mut view = View::new(service.status(deadline).await?);
    let nobody_at = Instant::now() + NOBODY_AFTER;
    loop {
        let waiting = view.silent_agents();
        let is_known = !view.agents().is_empty() || nobody_at <= Instant::now();
        if view.is_started() && waiting.is_empty() && is_known {
            return Ok(view.expected_agents());
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

/// Waits until packets get to these agents and back (tailnet-data 12.2). That they answer pings does not say it.
async fn wait_for_packets(api: &Api, agents: Vec<(Uuid, String)>, deadline: Instant) -> Result<(), CliError> {
    let (mut left, mut asked) = (agents.into_iter(), JoinSet::new());
    let mut unreached = Vec::new();
    loop {
        while asked.len() < ASKED_AT_ONCE
            && let Some((id, name)) = left.next()
        {
            let api = api.clone();
            asked.spawn(async move {
                let reached = timeout_at(deadline, get_through(&api, id)).await;
                (name, reached.unwrap_or(Ok(false)))
            });
        }
        match asked.join_next().await {
            None => break,
            Some(Ok((_, Ok(true)))) => {}
            Some(Ok((name, Ok(false)))) => unreached.push(name),
            Some(Ok((_, Err(error)))) => return Err(error),
            Some(Err(error)) => return Err(CliError::failed(error)),
        }
    }
    if unreached.is_empty() {
        return Ok(());
    }
    unreached.sort();
    let unreached = preview(&unreached);
    let text = format!("connected, but no packets get to these agents and back: {unreached}");
    Err(CliError::new(Exit::Timeout, text))
}

/// Asks an agent through WireGuard until it answers, or is none any more. Returns whether it did.
async fn get_through(api: &Api, id: Uuid) -> Result<bool, CliError> {
    loop {
        let mut lines = match api.stream(&format!("/v1/ping/{id}?tsmp=true")).await {
            Ok(lines) => lines,
            Err(error) => match error.exit {
                // Another tunnel program cannot be asked; that its agents answer has to do.
                Exit::VersionMismatch => return Ok(true),
                // The agent is gone: nobody to wait for.
                Exit::Failed => return Ok(true),
                // The tunnel is being restarted.
                Exit::Unhealthy => {
                    sleep(PAUSE).await;
                    continue;
                }
                _ => return Err(error),
            },
        };
        while let Some(line) = lines.next().await? {
            if line.get("latency_seconds").is_some() {
                return Ok(true);
            }
        }
        sleep(PAUSE).await;
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
