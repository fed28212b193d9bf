use super::*;

const URL: &str = "https://h/api/v2/users/me";

/// Conforms: control:H10 control:H12
#[test]
fn every_refusal_of_a_deployment_says_what_is_wrong_and_what_to_do() {
    let signed_out = r#"{"message":"You are signed out or your session has expired. Please sign in again to continue.","detail":"API key is invalid."}"#;
    let suspended = r#"{"message":"User is not active (status = \"suspended\"). Contact an admin to reactivate your account."}"#;
    let browser_only = r#"{"message":"Non-browser connections are disabled for your deployment."}"#;
    let version = r#"{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":"server is at version 2.2, behind requested minor version 2.3"}]}"#;
    let resume = r#"{"message":"Invalid resume token","detail":"verify payload: expired","validations":[{"field":"resume_token","detail":"Invalid resume token"}]}"#;
    let limited = r#"{"message":"You've been rate limited for sending more than 512 requests in 1m0s."}"#;
    let prepare = r#"{"message":"Internal error preparing sql filter."}"#;
    let database = r#"{"message":"database not reachable"}"#;
    let missing = r#"{"message":"Route not found."}"#;
    for (status, body, says, advises) in [
        (401, signed_out, "You are signed out", "warren login"),
        (401, suspended, "Contact an admin", ""),
        (409, browser_only, "Non-browser connections", "administrator"),
        (400, version, "behind requested minor version 2.3", "install matching releases"),
        (401, resume, "Invalid resume token", "tried again without"),
        (429, limited, "rate limited", "later"),
        (500, prepare, "preparing sql filter", "in trouble"),
        (500, database, "database not reachable", "its administrator has to look"),
        (404, missing, "Route not found", "v2.18 or later"),
        (403, r#"{"message":"Forbidden."}"#, "Forbidden", "permission"),
        (503, r#"{"message":"x"}"#, "status code 503", "restarting"),
        (502, "{}", "response has no message", "restarting"),
        (504, "", "empty response body", "restarting"),
        (407, "{}", "407", "a proxy wants to be authenticated to"),
        (428, r#"{"message":"No."}"#, "No", "leave it out"),
        (431, "{}", "431", "too long or too many"),
        (418, "{}", "418", "a gateway in front"),
        (204, "{}", "204", "check the URL"),
        (200, "{}", "200", "does not switch to WebSocket"),
    ] {
        let text = json(status, body).to_string();
        assert!(text.starts_with(&format!("GET {URL}: unexpected status code {status}: ")), "{text}");
        assert!(text.contains(says) && text.contains(advises), "{text}");
    }
}

#[test]
fn each_way_in_which_versions_do_not_match_is_told_with_what_to_install() {
    for detail in [
        "server is at version 2.10, behind requested minor version 2.99",
        "server is at version 2.10, behind requested major version 3.0",
        "version 1.0 is no longer supported",
        "invalid version string: x",
    ] {
        let body = serde_json::json!({
            "message": "Unknown or unsupported API version",
            "validations": [{ "field": "version", "detail": detail }],
        });
        let text = json(400, &body.to_string()).to_string();
        assert!(text.contains(detail) && text.contains("install matching releases"), "{text}");
    }
}

#[test]
fn a_refused_websocket_handshake_is_told_with_the_servers_reason_though_it_is_no_json() {
    let reason = "WebSocket protocol violation: Connection header \"close\" does not contain Upgrade";
    let body = format!("{reason}\n{{\n\t\"message\": \"Failed to accept websocket.\"\n}}\n");
    for (status, advises) in [
        (426, "may not let WebSockets through"),
        (400, "may have changed the request"),
        (403, "a gateway in front of the deployment refuses"),
    ] {
        let text = answer(status, Some("text/plain; charset=utf-8"), body.as_bytes()).to_string();
        assert!(text.contains(reason) && text.contains(advises), "{text}");
    }
}

#[test]
fn what_nginx_says_of_tls_is_told_with_what_to_set() {
    for (title, advises) in [
        ("400 No required SSL certificate was sent", "set client_cert_file and client_key_file"),
        ("400 The SSL certificate error", "set client_cert_file and client_key_file"),
        ("400 The plain HTTP request was sent to HTTPS port", "https:// instead of http://"),
    ] {
        let page = format!("<html>\r\n<head><title>{title}</title></head>\r\n<body></body>\r\n</html>\r\n");
        let text = answer(400, Some("text/html"), page.as_bytes()).to_string();
        assert!(text.contains(title) && text.contains(advises), "{text}");
    }
}

#[test]
fn a_refusal_is_told_in_the_form_that_people_search_for() {
    let body = r#"{"message":"You are signed out.","detail":"API key is invalid."}"#;
    let expected = "GET https://h/api/v2/users/me: unexpected status code 401: You are signed out: \
                    sign in again (`warren login`)\n\tError: API key is invalid.";
    assert_eq!(json(401, body).to_string(), expected);
}

#[test]
fn an_answer_that_is_not_json_is_told_by_its_type_and_cut() {
    let refusal = answer(502, Some("text/html"), "a".repeat(5000).as_bytes());
    assert_eq!(refusal.message, r#"unexpected non-JSON response "text/html""#);
    assert_eq!(refusal.detail.len(), 2048);
    assert_eq!(answer(502, None, b"").message, r#"unexpected non-JSON response """#);
}

#[test]
fn of_a_page_its_words_are_told() {
    let page = "<html>\r\n<head><title>502 Bad Gateway</title><style>a > b { color: red }</style></head>\r\n\
                <body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n<script src=\"x\">if (a < b) { c > d }</script>\
                <hr><center>nginx/1.22.1</center>\r\n</body>\r\n</html>\r\n";
    let told = |page: &str| answer(502, Some("text/html; charset=utf-8"), page.as_bytes()).detail;
    assert_eq!(told(page), "502 Bad Gateway nginx/1.22.1");
    assert_eq!(told("cut off in <a title"), "cut off in a title");
    assert_eq!(told("a < b <script> c"), "a b");
}

#[test]
fn json_without_words_is_told_as_such() {
    assert_eq!(json(403, "").message, "empty response body");
    for body in [r#"{"error":"x"}"#, "[]", "{", "\u{1}"] {
        let refusal = json(403, body);
        assert_eq!(refusal.message, "unexpected status code 403, response has no message");
    }
    assert_eq!(json(403, &format!("[{}]", "1,".repeat(3000))).detail.len(), 1024);
}

#[test]
fn a_server_cannot_write_to_a_terminal() {
    let refusal = json(403, r#"{"message":"\u001b[2Jgone\r\nFake: line","detail":"\u0007x"}"#);
    let text = refusal.to_string();
    assert!(text.chars().all(|c| !c.is_control() || "\n\t".contains(c)), "{text:?}");
    assert_eq!(refusal.message, "[2Jgone Fake: line");
}

#[test]
fn what_fails_a_start_and_what_needs_a_person_follows_the_status() {
    for status in [400, 401, 403, 404, 409, 500] {
        assert!(json(status, "{}").fails_start(), "{status}");
    }
    for status in [200, 302, 426, 429, 502, 503, 504] {
        assert!(!json(status, "{}").fails_start(), "{status}");
    }
    for (status, requires) in
        [(400, true), (401, true), (409, true), (403, false), (500, false), (503, false)]
    {
        assert_eq!(json(status, "{}").requires_action(), requires, "{status}");
    }
}

#[test]
fn a_rejected_resume_token_does_not_ask_anybody_to_sign_in() {
    let body = r#"{"message":"Invalid resume token","validations":[{"field":"resume_token","detail":"x"}]}"#;
    let refusal = json(401, body);
    assert!(refusal.is_about_resume_token());
    assert!(!refusal.requires_sign_in() && !refusal.fails_start() && !refusal.requires_action());
    assert!(json(401, "{}").requires_sign_in());
}

#[test]
fn a_redirect_names_the_origin_and_nothing_else() {
    let to = |location: &str| {
        let headers = HeaderMap::from_iter([(header::LOCATION, location.parse().unwrap())]);
        let base = Url::parse("https://h").unwrap();
        Redirect::new(URL.to_owned(), &base, StatusCode::TEMPORARY_REDIRECT, &headers).to_string()
    };
    let elsewhere = to("https://coder.example.com/login?state=sesame");
    assert!(
        elsewhere.contains("wrong URL: the server redirects (307) to https://coder.example.com;"),
        "{elsewhere}"
    );
    assert!(!elsewhere.contains("sesame"), "{elsewhere}");
    assert!(to("/login?x=sesame").contains("sign-in page of a gateway"));
    assert!(to("mailto:x").contains("check that the URL"));
}

fn json(status: u16, body: &str) -> Refusal {
    answer(status, Some("application/json; charset=utf-8"), body.as_bytes())
}

fn answer(status: u16, content_type: Option<&str>, body: &[u8]) -> Refusal {
    let headers = content_type.map(|kind| (header::CONTENT_TYPE, kind.parse().unwrap()));
    Refusal::new(URL.to_owned(), StatusCode::from_u16(status).unwrap(), &headers.into_iter().collect(), body)
}
