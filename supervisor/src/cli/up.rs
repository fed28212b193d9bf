//! `warren up`: hand the token to the service and wait until the tunnel has answered.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

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
        wait_for_packets(&Api::new(&reach), &mut service, agents, deadline).await?;
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

/// Before an agent that did not answer is asked again.
const PAUSE: Duration = Duration::from_millis(500);
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

/// What came of asking an agent once.
enum Asked {
    Reached,
    /// No answer in time.
    Silent,
    /// Another tunnel program cannot be asked; that its agents answer has to do.
    Impossible,
    /// The service could not say: the tunnel may be on its way, or the agent gone.
    Unclear(CliError),
}

/// Waits until packets get to these agents and back (tailnet-data 12.2). That they answer pings does not say it. Each is
/// asked in its turn.
async fn wait_for_packets(
    api: &Api,
    service: &mut ServiceClient,
    agents: Vec<(Uuid, String)>,
    deadline: Instant,
) -> Result<(), CliError> {
    let mut left: BTreeSet<String> = agents.iter().map(|(_, name)| name.clone()).collect();
    let (mut queue, mut asked, mut silent) = (VecDeque::from(agents), JoinSet::new(), BTreeSet::new());
    let mut unclear = None;
    loop {
        while asked.len() < ASKED_AT_ONCE
            && let Some(agent) = queue.pop_front()
        {
            let api = api.clone();
            asked.spawn(async move { (ask(&api, agent.0).await, agent) });
        }
        let (outcome, agent) = match timeout_at(deadline, asked.join_next()).await {
            Ok(None) => return Ok(()),
            Ok(Some(joined)) => joined.map_err(CliError::failed)?,
            Err(_) => {
                let left = preview(&left.into_iter().collect::<Vec<_>>());
                let text = format!("connected, but no packets get to these agents and back: {left}");
                let late = CliError::new(Exit::Timeout, text);
                return Err(unclear.filter(|_| silent.is_empty()).unwrap_or(late));
            }
        };
        match outcome {
            Asked::Reached => drop(left.remove(&agent.1)),
            Asked::Impossible => return Ok(()),
            Asked::Silent => {
                if silent.insert(agent.1.clone()) {
                    eprintln!("  waiting for packets from {}", printable(&agent.1));
                }
                queue.push_back(agent);
            }
            Asked::Unclear(error) => {
                let view = View::new(service.status(deadline).await?);
                if view.is_stopped() {
                    return Err(CliError::new(Exit::Unhealthy, view.error()));
                }
                let expected = view.expected_agents();
                if !view.is_started() || expected.is_empty() || expected.contains(&agent) {
                    unclear = Some(error);
                    queue.push_back(agent);
                } else {
                    left.remove(&agent.1);
                }
            }
        }
    }
}

/// Asks an agent through WireGuard, for some seconds.
async fn ask(api: &Api, id: Uuid) -> Asked {
    let answer = async {
        let mut lines = api.stream(&format!("/v1/ping/{id}?tsmp=true")).await?;
        lines.next().await
    };
    let unclear = match answer.await {
        Ok(Some(line)) if line.get("latency_seconds").is_some() => return Asked::Reached,
        Ok(_) => Asked::Silent,
        Err(error) if error.exit == Exit::VersionMismatch => return Asked::Impossible,
        Err(error) => Asked::Unclear(error),
    };
    // An answer of the service's own may come at once.
    sleep(PAUSE).await;
    unclear
}

fn preview(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(", ...");
    }
    text
}
