//! `warren login` and `warren logout`.

use std::{
    io::{self, BufRead, IsTerminal, Read},
    path::PathBuf,
};

use secrecy::SecretString;
use url::Url;
use warren_actors::{
    coordinator::http::ApiClient,
    dial::{ClientCertificate, DialOptions, Dialer},
};

use super::{
    Reach, api,
    credentials::{self, Credentials},
    exit::{CliError, Exit, Outcome},
};

const EXAMPLES: &str = "\
Examples:
  warren login https://coder.example.com
  warren login https://coder.example.com --token-file ~/token
  echo \"$TOKEN\" | warren login https://coder.example.com

A token is made at <URL>/cli-auth. It is never taken from the command line, where others could read it.";

/// Keep a session token for a deployment, after checking it there
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The deployment's access URL, as in the browser
    url: String,
    /// Read the token from this file instead of asking
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// A file with certificates to trust besides the system's
    #[arg(long, value_name = "PEM")]
    ca_file: Option<PathBuf>,
    /// A file with the certificate to show to a deployment that asks for one
    #[arg(long, value_name = "PEM", requires = "client_key_file")]
    client_cert_file: Option<PathBuf>,
    /// The private key of that certificate
    #[arg(long, value_name = "PEM", requires = "client_cert_file")]
    client_key_file: Option<PathBuf>,
}

const LOGOUT_EXAMPLES: &str = "\
Examples:
  warren logout          ends the tunnel, and forgets the token here and in the service";

/// Forget the token, here and in the service
#[derive(clap::Args)]
#[command(after_help = LOGOUT_EXAMPLES)]
pub(crate) struct LogoutArgs {}

/// Checks the token with the deployment and keeps it.
pub(crate) async fn login(args: Args) -> Outcome {
    let url = parse_url(&args.url)?;
    let token = read_token(&url, args.token_file)?;
    let client = args.client_cert_file.zip(args.client_key_file);
    let client = client.map(|(certificate, key)| ClientCertificate { certificate, key });
    let dialer = Dialer::new(DialOptions { ca_file: args.ca_file, client }).map_err(CliError::failed)?;
    let client = ApiClient::new(dialer, url.clone(), Some(token.clone()), Vec::new());
    // Both at once; the first that fails ends the other, and is the one that is told.
    let asked = tokio::try_join!(client.current_user(), client.build_info());
    let (user, _) = asked.map_err(|error| {
        let exit = if error.requires_sign_in() { Exit::LoginNeeded } else { Exit::Failed };
        CliError::new(exit, error)
    })?;
    let path = credentials::save(&Credentials { url: url.clone(), token })?;
    eprintln!("Logged in to {url} as {}; the token is in {}.", user.username, path.display());
    Ok(Exit::Ok)
}

/// Forgets the token, here and in the service.
pub(crate) async fn logout(reach: Reach, _args: LogoutArgs) -> Outcome {
    let had_token = credentials::erase()?;
    match api::Api::new(&reach).erase_credentials().await {
        Ok(()) => {}
        // A service that does not run holds its copy on disk: say so instead of claiming success.
        Err(error) if error.exit == Exit::NotRunning => {
            eprintln!(
                "warren: the service does not run; if it keeps a copy of the token, log out again once it runs"
            );
        }
        Err(error) => return Err(error),
    }
    eprintln!("{}", if had_token { "Logged out." } else { "There was no token." });
    Ok(Exit::Ok)
}

fn parse_url(text: &str) -> Result<Url, CliError> {
    let usage =
        |what: &str| CliError::new(Exit::Usage, format!("{text:?} is not the URL of a deployment: {what}"));
    let text_with_scheme = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let mut url = Url::parse(&text_with_scheme).map_err(|error| usage(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(usage("use https://HOST or http://HOST"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(usage("leave user and password out"));
    }
    if url.path() != "/" {
        return Err(usage("deployments live at the root of their host, without a path"));
    }
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

fn read_token(url: &Url, file: Option<PathBuf>) -> Result<SecretString, CliError> {
    let text = match file {
        Some(path) => credentials::read_capped(&path).map_err(|error| {
            CliError::failed(format!("cannot read the token file {}: {error}", path.display()))
        })?,
        None if io::stdin().is_terminal() => {
            eprintln!("Open {}, copy the token, and paste it here (it stays hidden).", cli_auth(url));
            rpassword::prompt_password("Token: ")?
        }
        None => {
            let mut line = String::new();
            io::stdin().lock().take(credentials::MAX_FILE).read_line(&mut line)?;
            line
        }
    };
    let token = text.trim();
    if token.is_empty() {
        return Err(CliError::new(
            Exit::LoginNeeded,
            format!("no token was given; make one at {}", cli_auth(url)),
        ));
    }
    if token.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(CliError::new(Exit::Usage, "that is not a token: it has spaces or line breaks inside"));
    }
    Ok(token.into())
}

fn cli_auth(url: &Url) -> String {
    url.join("/cli-auth").map_or_else(|_| url.to_string(), |page| page.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_host_means_https() {
        assert_eq!(parse_url("coder.example.com").unwrap().as_str(), "https://coder.example.com/");
    }

    #[test]
    fn urls_that_cannot_be_deployments_are_refused_with_a_reason() {
        for (text, reason) in [
            ("ftp://h", "use https://HOST"),
            ("https://h/sub/path", "without a path"),
            ("https://user:pw@h", "leave user and password out"),
            ("https://", "empty host"),
        ] {
            let error = parse_url(text).unwrap_err();
            assert_eq!(error.exit, Exit::Usage);
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}
