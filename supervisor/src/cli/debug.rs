//! `warren debug`: a look inside the service.

use clap::Subcommand;

use super::{
    Reach,
    api::Api,
    exit::{Exit, Outcome, printable, say},
    status::table,
};

const EXAMPLES: &str = "\
Examples:
  warren debug tree           who runs, since when, how often restarted, and why
  warren debug tree --json | jq '.processes[].pid'
  warren debug logs           the last lines of the tunnel process";

/// Look inside the service
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Who runs, since when, how often restarted, and why
    Tree {
        /// The tree as JSON
        #[arg(long)]
        json: bool,
    },
    /// The last lines of the tunnel process's log
    Logs,
}

/// Shows what was asked for.
pub(crate) async fn run(reach: Reach, args: Args) -> Outcome {
    let api = Api::new(&reach);
    match args.what {
        What::Tree { json: true } => say(api.get("/v1/tree").await?)?,
        What::Tree { json: false } => say(tree_text(&api.get("/v1/tree").await?).trim_end())?,
        What::Logs => {
            let logs = api.get("/v1/logs").await?;
            for line in logs.get("lines").and_then(|lines| lines.as_array()).into_iter().flatten() {
                say(printable(line.as_str().unwrap_or_default()))?;
            }
        }
    }
    Ok(Exit::Ok)
}

/// Lays out `{"processes": [{"process", "pid", "nodes": [...]}]}`.
fn tree_text(tree: &serde_json::Value) -> String {
    let mut rows = Vec::new();
    for process in list(tree, "processes") {
        for (index, node) in list(process, "nodes").enumerate() {
            let name = if index == 0 {
                format!("{} ({})", text(process, "process"), text(process, "pid"))
            } else {
                let depth = node.get("depth").and_then(|depth| depth.as_u64()).unwrap_or(0);
                format!("{}{}", "  ".repeat(usize::try_from(depth).unwrap_or(0).min(16)), text(node, "name"))
            };
            let cells = ["state", "running_seconds", "restarts", "mailbox_depth", "last_reason"];
            rows.push(std::iter::once(name).chain(cells.map(|cell| text(node, cell))).collect());
        }
        if let Some(error) = process.get("error").and_then(|error| error.as_str()) {
            rows.push(vec![text(process, "process"), error.to_owned()]);
        }
    }
    table(&["WHO", "STATE", "FOR (S)", "RESTARTS", "WAITING", "LAST ENDED BECAUSE"], &rows)
}

fn list<'a>(value: &'a serde_json::Value, key: &str) -> impl Iterator<Item = &'a serde_json::Value> {
    value.get(key).and_then(|list| list.as_array()).into_iter().flatten()
}

fn text(value: &serde_json::Value, key: &str) -> String {
    match value.get(key) {
        None | Some(serde_json::Value::Null) => "-".to_owned(),
        Some(serde_json::Value::String(text)) if text.is_empty() => "-".to_owned(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(serde_json::Value::Number(number)) => match number.as_f64() {
            Some(float) if number.is_f64() => format!("{float:.0}"),
            _ => number.to_string(),
        },
        Some(other) => other.to_string(),
    }
}
