//! `warren ping AGENT`.

use super::{
    Reach,
    api::Api,
    exit::{CliError, Exit, Outcome, printable, say},
};

const EXAMPLES: &str = "\
Examples:
  warren ping main.dev
  warren ping fd60:627a:a42b:1:2:3:4:5 --count 10 --json

AGENT is a name as `warren status` shows it (workspace.agent or agent.workspace), a host name, an
address or an id. Exit status 0 if any ping was answered, else 6.";

/// Ping an agent over the path that is in use
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The agent
    agent: String,
    /// How many pings to send, one a second
    #[arg(long, short = 'c', default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=3600))]
    count: u32,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Pings, and sums up.
pub(crate) async fn run(reach: Reach, args: Args) -> Outcome {
    let agent: String = url::form_urlencoded::byte_serialize(args.agent.as_bytes()).collect();
    let mut lines = Api::new(&reach).stream(&format!("/v1/ping/{agent}?count={}", args.count)).await?;
    let mut latencies = Vec::new();
    let mut sent = 0_u32;
    while let Some(line) = lines.next().await? {
        sent += 1;
        let latency = line.get("latency_seconds").and_then(|latency| latency.as_f64());
        latencies.extend(latency);
        if args.json {
            say(&line)?;
        } else {
            say(printable(&describe(&args.agent, sent, &line)))?;
        }
    }
    if !args.json {
        say(summary(sent, &latencies))?;
    }
    if latencies.is_empty() {
        return Err(CliError::new(Exit::Unhealthy, format!("{} did not answer", args.agent)));
    }
    Ok(Exit::Ok)
}

fn describe(agent: &str, sequence: u32, line: &serde_json::Value) -> String {
    let word = |key| line.get(key).and_then(|value| value.as_str());
    match line.get("latency_seconds").and_then(|latency| latency.as_f64()) {
        Some(seconds) => {
            let direct = line.get("p2p").and_then(|p2p| p2p.as_bool()) == Some(true);
            let path =
                if direct { "direct".to_owned() } else { format!("relay {}", word("region").unwrap_or("?")) };
            format!("pong from {agent}: seq={sequence} time={:.2} ms path={path}", seconds * 1e3)
        }
        None => {
            format!("no answer from {agent}: seq={sequence}: {}", word("error").unwrap_or("no reason given"))
        }
    }
}

fn summary(sent: u32, latencies: &[f64]) -> String {
    let answered = latencies.len();
    let Some(least) = latencies.iter().copied().reduce(f64::min) else {
        return format!("{sent} sent, 0 answered");
    };
    let most = latencies.iter().copied().fold(least, f64::max);
    let mean = latencies.iter().sum::<f64>() / answered as f64;
    format!(
        "{sent} sent, {answered} answered, min/avg/max = {:.2}/{:.2}/{:.2} ms",
        least * 1e3,
        mean * 1e3,
        most * 1e3
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_silence_claims_no_latency() {
        assert_eq!(summary(3, &[]), "3 sent, 0 answered");
    }

    #[test]
    fn the_summary_counts_what_was_answered() {
        assert_eq!(summary(3, &[0.001, 0.003]), "3 sent, 2 answered, min/avg/max = 1.00/2.00/3.00 ms");
    }
}
