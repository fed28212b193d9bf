//! `warren ping AGENT`.

use serde_json::Value;

use super::{
    Reach,
    api::{Api, Lines},
    exit::{CliError, Exit, Outcome, printable, say},
    signals::Signals,
};

const EXAMPLES: &str = "\
Examples:
  warren ping main.dev                      until Ctrl-C
  warren ping main.dev --until-direct       until an answer comes over a direct path
  warren ping main.dev --tsmp               through WireGuard, as packets go
  warren ping fd60:627a:a42b:1:2:3:4:5 --count 10 --json

AGENT is a name as `warren status` shows it (workspace.agent or agent.workspace), a host name, an
address or an id. Exit status 0 if any ping was answered (with --until-direct: over a direct path),
else 6.";

/// What the service sends for one question.
const BATCH: u32 = 3600;

/// Ping an agent once a second over the path that is in use
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The agent
    agent: String,
    /// How many pings to send; without it, until Ctrl-C
    #[arg(long, short = 'c', value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// Stop at the first answer over a direct path
    #[arg(long)]
    until_direct: bool,
    /// Ask through WireGuard, up to 5 s each time, which shows that packets get there and back, whichever way they go
    #[arg(long, conflicts_with = "until_direct")]
    tsmp: bool,
    /// One JSON object a line, without a summary
    #[arg(long)]
    json: bool,
}

/// Pings, and sums up.
pub(crate) async fn run(reach: Reach, args: Args) -> Outcome {
    let mut signals = Signals::listen()?;
    let mut pings = Pings::new(Api::new(&reach), &args);
    let mut seen = Seen::default();
    let outcome = loop {
        let line = tokio::select! {
            line = pings.next() => line,
            () = signals.received() => break Ok(()),
        };
        let line = match line {
            Ok(Some(line)) => line,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        seen.take(&line);
        if args.json {
            say(&line)?;
        } else {
            say(printable(&describe(&args.agent, seen.sent, &line)))?;
        }
        if args.until_direct && is_direct(&line) {
            break Ok(());
        }
    };
    if !args.json && seen.sent > 0 {
        say(seen.summary(args.tsmp))?;
    }
    outcome?;
    if seen.latencies.count == 0 {
        return Err(CliError::new(Exit::Unhealthy, format!("{} did not answer", args.agent)));
    }
    if args.until_direct && !seen.was_direct {
        let text = format!("there is no direct path to {} yet; its answers came through a relay", args.agent);
        return Err(CliError::new(Exit::Unhealthy, text));
    }
    Ok(Exit::Ok)
}

/// The answers of a service that sends so many for a question.
struct Pings {
    api: Api,
    agent: String,
    tsmp: bool,
    left: Option<u32>,
    lines: Option<Lines>,
}

impl Pings {
    fn new(api: Api, args: &Args) -> Self {
        let agent = url::form_urlencoded::byte_serialize(args.agent.as_bytes()).collect();
        Self { api, agent, tsmp: args.tsmp, left: args.count, lines: None }
    }

    async fn next(&mut self) -> Result<Option<Value>, CliError> {
        loop {
            let lines = match &mut self.lines {
                Some(lines) => lines,
                None if self.left == Some(0) => return Ok(None),
                none => {
                    let batch = self.left.map_or(BATCH, |left| left.min(BATCH));
                    self.left = self.left.map(|left| left - batch);
                    let path = format!("/v1/ping/{}?count={batch}&tsmp={}", self.agent, self.tsmp);
                    none.insert(self.api.stream(&path).await?)
                }
            };
            match lines.next().await? {
                Some(line) => return Ok(Some(line)),
                None => self.lines = None,
            }
        }
    }
}

fn latency(line: &Value) -> Option<f64> {
    line.get("latency_seconds").and_then(Value::as_f64)
}

fn is_direct(line: &Value) -> bool {
    line.get("p2p").and_then(Value::as_bool) == Some(true)
}

fn describe(agent: &str, sequence: u64, line: &Value) -> String {
    let word = |key| line.get(key).and_then(Value::as_str);
    match latency(line) {
        Some(seconds) => {
            let by = match word("region") {
                Some(_) if is_direct(line) => "path=direct".to_owned(),
                Some(region) => format!("path=relay {region}"),
                None => "through WireGuard".to_owned(),
            };
            format!("pong from {agent}: seq={sequence} time={:.2} ms {by}", seconds * 1e3)
        }
        None => {
            format!("no answer from {agent}: seq={sequence}: {}", word("error").unwrap_or("no reason given"))
        }
    }
}

/// What came so far.
#[derive(Default)]
struct Seen {
    sent: u64,
    latencies: Latencies,
    was_direct: bool,
}

/// Sums of seconds, so that a day of pings takes no more memory than one.
#[derive(Default)]
struct Latencies {
    count: u64,
    sum: f64,
    of_squares: f64,
    least: f64,
    most: f64,
}

impl Seen {
    fn take(&mut self, line: &Value) {
        self.sent += 1;
        self.was_direct |= is_direct(line);
        if let Some(latency) = latency(line) {
            self.latencies.take(latency);
        }
    }

    fn summary(&self, are_series: bool) -> String {
        let Latencies { count, sum, of_squares, least, most } = self.latencies;
        let lost = 100.0 * (1.0 - count as f64 / self.sent as f64);
        let answered = match are_series {
            // Of the pings of a series nobody knows how many got lost.
            true => format!("asked {} times, {count} answered", self.sent),
            false => format!("{} sent, {count} answered, {lost:.0} % lost", self.sent),
        };
        if count == 0 {
            return answered;
        }
        let mean = sum / count as f64;
        let deviation = (of_squares / count as f64 - mean * mean).max(0.0).sqrt();
        let [least, mean, most, deviation] = [least, mean, most, deviation].map(|seconds| seconds * 1e3);
        format!("{answered}, min/avg/max/dev = {least:.2}/{mean:.2}/{most:.2}/{deviation:.2} ms")
    }
}

impl Latencies {
    fn take(&mut self, seconds: f64) {
        self.least = if self.count == 0 { seconds } else { self.least.min(seconds) };
        self.most = self.most.max(seconds);
        self.count += 1;
        self.sum += seconds;
        self.of_squares += seconds * seconds;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_summary_of_silence_claims_no_latency() {
        assert_eq!(
            seen(&[json!({"error": "x"}), json!({}), json!({})]).summary(false),
            "3 sent, 0 answered, 100 % lost"
        );
    }

    #[test]
    fn the_summary_counts_what_was_answered() {
        let lines = [json!({"latency_seconds": 0.001}), json!({}), json!({"latency_seconds": 0.003})];
        let expected = "3 sent, 2 answered, 33 % lost, min/avg/max/dev = 1.00/2.00/3.00/1.00 ms";
        assert_eq!(seen(&lines).summary(false), expected);
    }

    #[test]
    fn an_answer_is_told_with_the_path_that_it_came_over() {
        let direct = json!({"latency_seconds": 0.0015, "p2p": true, "region": "Lab"});
        assert_eq!(describe("a", 1, &direct), "pong from a: seq=1 time=1.50 ms path=direct");
        let relayed = json!({"latency_seconds": 0.0015, "p2p": false, "region": "Lab"});
        assert_eq!(describe("a", 2, &relayed), "pong from a: seq=2 time=1.50 ms path=relay Lab");
        assert!(seen(&[direct]).was_direct && !seen(&[relayed]).was_direct);
        let inner = json!({"latency_seconds": 0.0015});
        assert_eq!(describe("a", 3, &inner), "pong from a: seq=3 time=1.50 ms through WireGuard");
    }

    fn seen(lines: &[Value]) -> Seen {
        let mut seen = Seen::default();
        lines.iter().for_each(|line| seen.take(line));
        seen
    }
}
