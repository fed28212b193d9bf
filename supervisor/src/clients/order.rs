//! What a client may ask the service to start: a deployment's URL, a token, headers, each within limits.

use std::collections::BTreeSet;

use url::{Host, Url};
use warren_proto::vpn;

use crate::{
    headers::{self, MAX_HEADERS, MAX_TEXT, is_plain},
    intent::Order,
};

/// The order of this user, or what is wrong with it, in words for a person.
pub(super) fn order(
    start: vpn::StartRequest,
    owner: u32,
    http_hosts: &BTreeSet<String>,
) -> Result<Order, String> {
    let url = check_url(&start.coder_url, http_hosts)?;
    if start.api_token.is_empty() {
        return Err("there is no session token: run `warren login`".to_owned());
    }
    if !is_plain(&start.api_token) {
        return Err("the session token is malformed: run `warren login` again".to_owned());
    }
    if start.headers.len() > MAX_HEADERS {
        return Err(format!("there are {} extra headers; {MAX_HEADERS} are allowed", start.headers.len()));
    }
    let headers = start.headers.into_iter().map(|header| headers::checked(header.name, header.value));
    let headers = headers.collect::<Result<_, String>>()?;
    Ok(Order { url, token: start.api_token.into(), headers, owner })
}

/// The URL as it was given where that is how we would write it: what a deployment is called is not ours to
/// change. Otherwise as we read it: another program must not read another host.
fn check_url(text: &str, http_hosts: &BTreeSet<String>) -> Result<String, String> {
    if text.len() > MAX_TEXT {
        return Err("the deployment's URL is too long".to_owned());
    }
    let malformed = |reason: &dyn std::fmt::Display| {
        format!(
            "the deployment's URL {text:?} is not understood ({reason}); it looks like https://coder.example.com"
        )
    };
    let url = Url::parse(text).map_err(|error| malformed(&error))?;
    let host = url.host().ok_or_else(|| malformed(&"it has no host"))?;
    match url.scheme() {
        "https" => {}
        "http" if is_loopback(&host) || http_hosts.contains(&host.to_string().to_lowercase()) => {}
        "http" => {
            return Err(format!(
                "{text} would send the session token in clear text: use https://, or list the host {host} in \
                 `allow_http_hosts` of the service's configuration"
            ));
        }
        scheme => return Err(malformed(&format!("the scheme {scheme:?} is not spoken"))),
    }
    let is_as_read = url.as_str().trim_end_matches('/') == text.trim_end_matches('/');
    Ok(if is_as_read { text.to_owned() } else { url.into() })
}

fn is_loopback(host: &Host<&str>) -> bool {
    match host {
        Host::Domain(name) => name.eq_ignore_ascii_case("localhost"),
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
    }
}

#[cfg(test)]
mod tests {
    use warren_proto::vpn::start_request::Header;

    use super::*;

    fn start(url: &str) -> vpn::StartRequest {
        vpn::StartRequest { coder_url: url.into(), api_token: "hunter2".into(), ..Default::default() }
    }

    fn refusal(start: vpn::StartRequest) -> String {
        order(start, 7, &["dev.example".to_owned()].into()).unwrap_err()
    }

    #[test]
    fn clear_text_is_spoken_only_on_this_machine_or_where_it_was_allowed() {
        let allowed = ["dev.example".to_owned()].into();
        for url in [
            "https://x.example",
            "http://localhost:3000",
            "http://127.8.0.1/",
            "http://[::1]:80",
            "http://DEV.example",
        ] {
            assert!(order(start(url), 7, &allowed).is_ok(), "{url}");
        }
        let text = refusal(start("http://x.example"));
        assert!(text.contains("x.example") && text.contains("allow_http_hosts"), "{text}");
    }

    #[test]
    fn a_url_is_left_as_it_was_given_unless_programs_could_read_it_otherwise() {
        let allowed = BTreeSet::new();
        for (given, kept) in [
            ("https://coder.example.com", "https://coder.example.com"),
            ("https://coder.example.com/", "https://coder.example.com/"),
            ("https://x\\@evil.example/", "https://x/@evil.example/"),
            ("HTTPS://X.example", "https://x.example/"),
        ] {
            assert_eq!(order(start(given), 7, &allowed).unwrap().url, kept);
        }
    }

    #[test]
    fn what_is_no_deployment_is_named() {
        for url in ["", "coder.example.com", "ftp://x", "https://"] {
            assert!(refusal(start(url)).contains("https://coder.example.com"), "{url}");
        }
    }

    #[test]
    fn a_header_that_would_be_two_is_refused_without_telling_its_value() {
        for (name, value) in [("X", "sesame\r\nY: 1"), ("X\n", "sesame"), ("", "sesame"), ("X", "sesame\0")] {
            let header = Header { name: name.into(), value: value.into() };
            let text = refusal(vpn::StartRequest { headers: vec![header], ..start("https://x.example") });
            assert!(text.contains("header") && !text.contains("sesame"), "{text}");
        }
    }

    #[test]
    fn without_a_token_the_person_hears_how_to_get_one() {
        let text = refusal(vpn::StartRequest { api_token: String::new(), ..start("https://x.example") });
        assert!(text.contains("warren login"), "{text}");
    }
}
