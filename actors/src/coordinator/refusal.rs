//! What a deployment means when it refuses, and what a person can do about it (tailnet-control 1.8 to 1.11).

use std::fmt;

use http::{HeaderMap, StatusCode, header};
use secrecy::SecretString;
use serde::Deserialize;
use url::Url;
use warren_observability::redact::redact_cut;

/// Of a body that is not JSON this much is told.
const MAX_FOREIGN: usize = 2048;
/// Of a JSON body without a message this much is told.
const MAX_WORDLESS: usize = 1024;

/// A refusal by the deployment, or by something in front of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What was asked for, without query.
    pub url: String,
    /// The status.
    pub status: StatusCode,
    /// What the server says.
    pub message: String,
    /// More of it; may be empty.
    pub detail: String,
    /// Which fields were wrong.
    pub validations: Vec<Validation>,
    /// After how many seconds to try again, if it says so.
    pub retry_after: Option<u32>,
}

/// One field that was wrong.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Validation {
    /// Its name.
    #[serde(default)]
    pub field: String,
    /// What is wrong with it.
    #[serde(default)]
    pub detail: String,
}

#[derive(Deserialize, Default)]
struct Body {
    #[serde(default)]
    message: String,
    #[serde(default)]
    detail: String,
    #[serde(default)]
    validations: Vec<Validation>,
}

const SIGNED_OUT: &str = "sign in again (`warren login`)";
const VERSION: &str = "Unknown or unsupported API version";
const DATABASE: &str = "database not reachable";

impl Refusal {
    pub(super) fn new(url: String, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let parsed = parse(status, headers, body);
        let retry_after =
            headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        Self {
            url,
            status,
            message: printable(&parsed.message, MAX_FOREIGN),
            detail: printable(&parsed.detail, MAX_FOREIGN),
            validations: parsed.validations,
            retry_after,
        }
    }

    /// The same in words without our own secrets, which some gateways echo.
    pub(super) fn without(mut self, secrets: &[SecretString]) -> Self {
        let details = self.validations.iter_mut().map(|it| &mut it.detail);
        for text in details.chain([&mut self.message, &mut self.detail]) {
            *text = redact_cut(text, secrets);
        }
        self
    }

    /// Whether the session token is not accepted (any more).
    pub fn requires_sign_in(&self) -> bool {
        self.status == StatusCode::UNAUTHORIZED && !self.is_about_resume_token()
    }

    /// Whether only the resume token was not accepted: without it the next attempt may succeed.
    pub fn is_about_resume_token(&self) -> bool {
        self.status == StatusCode::UNAUTHORIZED
            && self.validations.iter().any(|it| it.field == "resume_token")
    }

    /// Whether trying again soon is pointless: somebody has to act first.
    pub fn requires_action(&self) -> bool {
        let by_somebody = [StatusCode::BAD_REQUEST, StatusCode::UNAUTHORIZED, StatusCode::CONFLICT];
        by_somebody.contains(&self.status) && !self.is_about_resume_token()
    }

    /// Whether a first attempt that meets it has failed for good.
    pub fn fails_start(&self) -> bool {
        let for_good = [
            StatusCode::BAD_REQUEST,
            StatusCode::UNAUTHORIZED,
            StatusCode::FORBIDDEN,
            StatusCode::NOT_FOUND,
            StatusCode::CONFLICT,
            StatusCode::INTERNAL_SERVER_ERROR,
        ];
        for_good.contains(&self.status) && !self.is_about_resume_token()
    }

    /// What to do about it.
    fn hint(&self) -> Option<&'static str> {
        Some(match self.status {
            StatusCode::UNAUTHORIZED if self.is_about_resume_token() => "it is tried again without",
            // The server's own words name who can help.
            StatusCode::UNAUTHORIZED if self.message.starts_with("User is not active") => return None,
            StatusCode::UNAUTHORIZED => SIGNED_OUT,
            StatusCode::BAD_REQUEST if self.message == VERSION => {
                "this program and the deployment do not match; install matching releases"
            }
            // The words of nginx, which lets such clients in to tell them.
            StatusCode::BAD_REQUEST if self.detail.contains("SSL certificate") => {
                "it wants a client certificate that it trusts; set client_cert_file and client_key_file \
                 (--client-cert-file, --client-key-file)"
            }
            StatusCode::BAD_REQUEST if self.detail.contains("plain HTTP request was sent to HTTPS port") => {
                "the URL must be https:// instead of http://"
            }
            StatusCode::BAD_REQUEST => {
                "something between here and the deployment may have changed the request"
            }
            StatusCode::FORBIDDEN => {
                "you may lack the permission, or a gateway in front of the deployment refuses"
            }
            StatusCode::NOT_FOUND => "check that the URL is that of a Coder deployment, v2.18 or later",
            StatusCode::CONFLICT => "only an administrator of the deployment can change that",
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => "a proxy wants to be authenticated to",
            StatusCode::UPGRADE_REQUIRED => {
                "a proxy in front of the deployment may not let WebSockets through"
            }
            StatusCode::TOO_MANY_REQUESTS => "it is tried again later",
            StatusCode::OK => {
                "the server does not switch to WebSocket; a proxy in front may not let it through"
            }
            StatusCode::INTERNAL_SERVER_ERROR if self.message == DATABASE => {
                "the deployment has lost its database; its administrator has to look"
            }
            StatusCode::PRECONDITION_REQUIRED => {
                "an extra header asks for what only owners of the deployment may have; leave it out"
            }
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "the extra headers are too long or too many",
            status if status.is_server_error() => "the deployment is in trouble or restarting",
            status if status.is_success() => {
                "the server does not answer as a deployment does; check the URL, and what is in front of it"
            }
            _ => "a gateway in front of the deployment may refuse; who runs it can say why",
        })
    }
}

impl fmt::Display for Refusal {
    /// In the form that deployed tunnels use, since people search for it, with our own advice.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, status, message, detail, .. } = self;
        write!(
            f,
            "GET {url}: unexpected status code {}: {}",
            status.as_u16(),
            message.trim_end_matches('.')
        )?;
        if let Some(hint) = self.hint() {
            write!(f, ": {hint}")?;
        }
        let mut reasons = Vec::from_iter((!detail.is_empty()).then_some(detail.as_str()));
        for validation in &self.validations {
            if !reasons.contains(&validation.detail.as_str()) {
                reasons.push(&validation.detail);
            }
        }
        for reason in reasons {
            write!(f, "\n\tError: {}", printable(reason, MAX_FOREIGN))?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

/// The server says that the deployment is elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    url: String,
    status: StatusCode,
    /// Origin, or what stands there if it has none.
    to: Option<String>,
}

impl Redirect {
    pub(super) fn new(url: String, base: &Url, status: StatusCode, headers: &HeaderMap) -> Self {
        let location = headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
        let target = location.and_then(|location| base.join(location).ok());
        // Path and query of a sign-in page help nobody and may hold secrets.
        let to = target.map(|target| target.origin()).filter(url::Origin::is_tuple);
        Self { url, status, to: to.map(|origin| origin.ascii_serialization()) }
    }
}

impl fmt::Display for Redirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, status, to } = self;
        write!(f, "GET {url}: wrong URL: the server redirects ({})", status.as_u16())?;
        match to {
            Some(to) if url.starts_with(&format!("{to}/")) => {
                write!(
                    f,
                    " to another page of itself; a sign-in page of a gateway may be in front of the deployment"
                )
            }
            Some(to) => write!(f, " to {to}; use that as the deployment's URL if you trust it"),
            None => write!(f, "; check that the URL is that of a Coder deployment"),
        }
    }
}

impl std::error::Error for Redirect {}

fn parse(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Body {
    let kind =
        headers.get(header::CONTENT_TYPE).map(|it| String::from_utf8_lossy(it.as_bytes()).into_owned());
    let kind = kind.unwrap_or_default();
    if !is_json(&kind) {
        let message = format!("unexpected non-JSON response {kind:?}");
        let detail = cut(body, MAX_FOREIGN);
        let detail = if essence(&kind).eq_ignore_ascii_case("text/html") { words(&detail) } else { detail };
        return Body { message, detail, ..Body::default() };
    }
    if body.is_empty() {
        return Body { message: "empty response body".to_owned(), ..Body::default() };
    }
    match serde_json::from_slice::<Body>(body) {
        Ok(parsed) if !parsed.message.is_empty() => parsed,
        Ok(_) | Err(_) => Body {
            message: format!("unexpected status code {}, response has no message", status.as_u16()),
            detail: cut(body, MAX_WORDLESS),
            ..Body::default()
        },
    }
}

fn is_json(content_type: &str) -> bool {
    essence(content_type).eq_ignore_ascii_case("application/json")
}

fn essence(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or_default().trim()
}

/// What a person would read of a page: the texts between its tags, repeated ones once.
fn words(page: &str) -> String {
    let mut texts: Vec<&str> = Vec::new();
    let mut hidden_by: Option<&str> = None;
    // Behind each `<` there is a tag, and the text that follows it.
    for (tag, text) in page.split('<').map(|piece| piece.split_once('>').unwrap_or(("", piece))) {
        hidden_by = match hidden_by {
            Some(element) if !is_tag(tag.strip_prefix('/').unwrap_or_default(), element) => Some(element),
            _ => ["script", "style"].into_iter().find(|element| is_tag(tag, element)),
        };
        if hidden_by.is_none() && !texts.contains(&text.trim()) {
            texts.push(text.trim());
        }
    }
    texts.join(" ")
}

fn is_tag(tag: &str, element: &str) -> bool {
    tag.split_ascii_whitespace().next().is_some_and(|name| name.eq_ignore_ascii_case(element))
}

fn cut(body: &[u8], limit: usize) -> String {
    String::from_utf8_lossy(body.get(..limit).unwrap_or(body)).into_owned()
}

/// What may be shown: a server must not write to people's terminals.
fn printable(text: &str, limit: usize) -> String {
    let harmless = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut shown = String::new();
    for c in harmless {
        if shown.len() + c.len_utf8() > limit {
            break;
        }
        if c != ' ' || !(shown.is_empty() || shown.ends_with(' ')) {
            shown.push(c);
        }
    }
    shown
}

#[cfg(test)]
mod tests;
