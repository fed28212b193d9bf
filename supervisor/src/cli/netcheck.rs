//! `warren netcheck`.

use serde_json::Value;

use super::{
    Reach,
    api::Api,
    exit::{Exit, Outcome, printable, say},
    status::table,
};

const EXAMPLES: &str = "\
Examples:
  warren netcheck
  warren netcheck --json | jq '.regions[] | select(.home)'

The tunnel looks about every 20 s while it is in use, and whenever the network changes; this shows its
last look. Exit status 6 if UDP does not get out and back: then agents beyond this network are relayed.";

/// Show how the world sees this machine, and how far the relays are
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The whole look as JSON; durations in seconds
    #[arg(long)]
    json: bool,
}

/// Shows the last look.
pub(crate) async fn run(reach: Reach, args: Args) -> Outcome {
    let look = Api::new(&reach).get("/v1/netcheck").await?;
    if args.json {
        say(&look)?;
    } else {
        say(printable(text(&look).trim_end()))?;
    }
    let is_blocked = look.get("udp").and_then(Value::as_bool) == Some(false);
    Ok(if is_blocked { Exit::Unhealthy } else { Exit::Ok })
}

fn text(look: &Value) -> String {
    let word = |key| look.get(key).and_then(Value::as_str);
    let mapped = |key| word(key).unwrap_or("nobody answered").to_owned();
    let answer =
        |is_so: Option<bool>| is_so.map_or("not known", |is_so| if is_so { "yes" } else { "no" }).to_owned();
    let flag = |key| answer(look.get(key).and_then(Value::as_bool));
    let age = look.get("age_seconds").and_then(Value::as_f64).unwrap_or_default();
    let endpoints: Vec<&str> = list(look, "endpoints").filter_map(Value::as_str).collect();
    let facts = [
        ("looked", format!("{age:.0} s ago")),
        ("UDP gets out and back", flag("udp")),
        ("seen by IPv4 as", mapped("mapped_v4")),
        ("seen by IPv6 as", mapped("mapped_v6")),
        ("differs by whom one asks", flag("varies_by_destination")),
        ("direct paths are allowed", flag("direct_allowed")),
        ("told to peers", if endpoints.is_empty() { "nothing".to_owned() } else { endpoints.join(", ") }),
    ];
    let facts = facts.map(|(what, value)| format!("{what:24}  {value}\n")).concat();
    let regions: Vec<Vec<String>> = list(look, "regions").map(row).collect();
    format!("{facts}\n{}", table(&["RELAY REGION", "HOME", "IPV4", "IPV6"], &regions))
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn row(region: &Value) -> Vec<String> {
    let latency = |key| match region.get(key).and_then(Value::as_f64) {
        Some(seconds) => format!("{:.1} ms", seconds * 1e3),
        None => "-".to_owned(),
    };
    let is_home = region.get("home").and_then(Value::as_bool) == Some(true);
    let name = region.get("name").and_then(Value::as_str).unwrap_or("?").to_owned();
    let home = if is_home { "yes" } else { "" }.to_owned();
    vec![name, home, latency("latency_v4_seconds"), latency("latency_v6_seconds")]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_look_is_shown_in_words_and_the_regions_as_a_table() {
        let look = json!({
            "age_seconds": 3.2, "udp": true, "mapped_v4": "203.0.113.9:41641", "mapped_v6": null,
            "varies_by_destination": null, "direct_allowed": true,
            "endpoints": ["203.0.113.9:41641", "10.0.0.2:41641"],
            "regions": [
                {"name": "Lab", "home": true, "latency_v4_seconds": 0.0123, "latency_v6_seconds": null},
                {"name": "Far", "home": false},
            ],
        });
        let text = text(&look);
        for line in [
            "looked                    3 s ago",
            "UDP gets out and back     yes",
            "seen by IPv6 as           nobody answered",
            "differs by whom one asks  not known",
            "told to peers             203.0.113.9:41641, 10.0.0.2:41641",
            "Lab           yes   12.3 ms  -",
            "Far                 -        -",
        ] {
            assert!(text.lines().any(|it| it == line), "{line:?} is missing in\n{text}");
        }
    }
}
