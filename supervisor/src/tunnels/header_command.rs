//! The program of the configuration that prints headers for the deployment: run before each Start, so that
//! what it prints may be short-lived. Nobody but the configuration can name it.

use std::time::Duration;

use secrecy::SecretString;
use tokio::process::Command;

use crate::{
    headers::{self, MAX_HEADERS},
    intent::Order,
    process::{
        Spawner,
        output::{self, OutputError},
    },
};

/// For the whole run: a person waits for the tunnel.
const LIMIT: Duration = Duration::from_secs(10);
/// Of its output.
const MOST: usize = 64 * 1024;

/// Why there are no headers. Arguments and output may be secrets: only the program is told.
#[derive(Debug, thiserror::Error)]
#[error("the header command {program}: {reason}; see `header_command` in the service's configuration")]
pub(super) struct HeaderCommandError {
    program: String,
    reason: Reason,
}

#[derive(Debug, thiserror::Error)]
enum Reason {
    #[error("nothing is configured")]
    Empty,
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("what it prints is not UTF-8")]
    Encoding,
    #[error("line {0} of what it prints is no header: it prints lines like Name=value or Name: value")]
    Line(usize),
    #[error("line {line} of what it prints: {reason}")]
    Header { line: usize, reason: String },
    #[error("together with the client's there would be {0} headers; {MAX_HEADERS} are allowed")]
    TooMany(usize),
}

type Headers = Vec<(String, SecretString)>;

/// The order with the headers that `command` prints on top; on a name that both have, the command wins.
pub(super) async fn complete(
    order: &Order,
    command: &[String],
    spawner: &Spawner,
) -> Result<Order, HeaderCommandError> {
    let printed = run(order, command, spawner).await;
    let headers = printed.and_then(|headers| merged(&order.headers, headers));
    match headers {
        Ok(headers) => Ok(Order { headers, ..order.clone() }),
        Err(reason) => {
            Err(HeaderCommandError { program: command.first().cloned().unwrap_or_default(), reason })
        }
    }
}

async fn run(order: &Order, command: &[String], spawner: &Spawner) -> Result<Headers, Reason> {
    let (program, arguments) = command.split_first().ok_or(Reason::Empty)?;
    let mut prepared = Command::new(program);
    // Which deployment the headers are for, as other programs of this kind are told.
    prepared.args(arguments).env("CODER_URL", &order.url);
    let bytes = output::of(prepared, spawner, LIMIT, MOST).await?;
    parse(&String::from_utf8(bytes).map_err(|_| Reason::Encoding)?)
}

fn parse(text: &str) -> Result<Headers, Reason> {
    let numbered = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    numbered
        .map(|(number, line)| {
            let (name, value) = line.split_once(['=', ':']).ok_or(Reason::Line(number))?;
            let name = name.trim();
            if name.is_empty() || !name.bytes().all(is_name_symbol) {
                return Err(Reason::Line(number));
            }
            headers::checked(name.to_owned(), value.trim().to_owned())
                .map_err(|reason| Reason::Header { line: number, reason })
        })
        .collect()
}

/// What names of headers consist of (RFC 9110, 5.6.2).
fn is_name_symbol(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn merged(theirs: &Headers, printed: Headers) -> Result<Headers, Reason> {
    let is_printed = |name: &str| printed.iter().any(|(other, _)| other.eq_ignore_ascii_case(name));
    let kept = theirs.iter().filter(|(name, _)| !is_printed(name)).cloned();
    let all: Headers = kept.chain(printed.iter().cloned()).collect();
    if all.len() > MAX_HEADERS { Err(Reason::TooMany(all.len())) } else { Ok(all) }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;
    use tokio::runtime::Handle;

    use super::*;

    #[tokio::test]
    async fn what_the_command_prints_is_merged_and_wins_over_the_clients() {
        let script =
            r#"printf 'X-Gate=%s\n\nAuthorization: Basic a2V5Og==\r\nx-for: %s\n' "$1" "$CODER_URL""#;
        let completed = printed(&["X-GATE", "X-Other"], &["sh", "-c", script, "_", "a b=c"]).await.unwrap();
        let headers: Vec<_> =
            completed.headers.iter().map(|(name, value)| (name.as_str(), value.expose_secret())).collect();
        let expected = [
            ("X-Other", "client"),
            ("X-Gate", "a b=c"),
            ("Authorization", "Basic a2V5Og=="),
            ("x-for", "https://h"),
        ];
        assert_eq!(headers, expected);
        assert_eq!(completed.secrets().count(), 5, "all of them are kept from being shown");
    }

    #[tokio::test]
    async fn a_command_that_fails_is_named_with_the_reason_and_without_what_it_printed() {
        for (script, words) in [
            ("echo X=sesame; exit 3", "exit status: 3"),
            ("echo sesame", "line 1 of what it prints is no header"),
            ("echo; echo 'a b: sesame'", "line 2 of what it prints is no header"),
            ("printf '=sesame'", "line 1"),
            ("printf 'X=ses\\0ame'", "the extra header \"X\" is malformed"),
            ("printf 'X=\\377sesame'", "not UTF-8"),
            ("head -c 70000 /dev/zero", "more than 65536 bytes"),
            ("for i in $(seq 65); do echo \"X-$i=sesame\"; done", "65 headers; 64 are allowed"),
        ] {
            let error = printed(&[], &["sh", "-c", script]).await.unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with("the header command sh: ") && text.contains(words), "{text}");
            assert!(text.contains("header_command"), "{text}");
            assert!(!text.contains("sesame") && !format!("{error:?}").contains("sesame"), "{text}");
        }
        let missing = printed(&[], &["/nonexistent/program", "sesame"]).await.unwrap_err().to_string();
        assert!(missing.contains("/nonexistent/program: it cannot be started"), "{missing}");
        assert!(!missing.contains("sesame"), "{missing}");
    }

    #[tokio::test]
    async fn a_command_that_does_not_end_is_killed_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("pid");
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 600 & echo $! > \"$0\"; wait"]).arg(&note);
        let spawner = Spawner::start(Handle::current()).unwrap();
        let limit = Duration::from_secs(1);
        let error = output::of(command, &spawner, limit, MOST).await.unwrap_err();
        assert!(matches!(error, OutputError::Late(_)), "{error}");
        gone(&note).await;
    }

    #[tokio::test]
    async fn a_command_whose_tunnel_is_not_wanted_any_more_is_killed_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("pid");
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 600 & echo $! > \"$0.new\"; mv \"$0.new\" \"$0\"; wait"]).arg(&note);
        let spawner = Spawner::start(Handle::current()).unwrap();
        let has_begun = async {
            while !note.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            ended = output::of(command, &spawner, 10 * LIMIT, MOST) => panic!("{ended:?}"),
            () = has_begun => {}
        }
        gone(&note).await;
    }

    /// Waits until the process whose number stands there is gone.
    async fn gone(note: &std::path::Path) {
        let pid = std::fs::read_to_string(note).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        let gone = async {
            // Reaped, or a zombie that nobody reaps in a container without an init.
            let lives = || std::fs::read_to_string(&stat).is_ok_and(|it| !it.contains(") Z"));
            while lives() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
    }

    async fn printed(theirs: &[&str], command: &[&str]) -> Result<Order, HeaderCommandError> {
        let headers = theirs.iter().map(|name| ((*name).to_owned(), "client".into())).collect();
        let order = Order { url: "https://h".into(), token: "hunter2".into(), headers, owner: 1 };
        let command: Vec<String> = command.iter().map(|it| (*it).to_owned()).collect();
        complete(&order, &command, &Spawner::start(Handle::current()).unwrap()).await
    }
}
