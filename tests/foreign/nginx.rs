//! nginx in front of the lab's control plane and relay, and a proxy on the way there, as companies have them.
//! No privilege needed: the service runs without a device.

mod authority;
mod connect;
mod server;

use std::process::{Command, Output};

use authority::{Authority, trusting};
use base64::{Engine, engine::general_purpose::STANDARD};
use connect::ConnectProxy;
use server::{Front, Nginx, came_through, free_port, has_nginx};
use warren_lab::{AgentInfo, EMBEDDED_REGION, LabOptions};
use warren_proto::tailnet::Node;

use crate::support::{Deployment, ServiceProcess, WARREN, eventually, stderr, stdout, sum};

/// Leads to this machine everywhere.
const HERE: &str = "localhost";
/// A name that nothing but the proxy knows.
const BEHIND_PROXY: &str = "deployment.test";

const GATE: &str = "sesame-8d1f";
const USER: &str = "alice";
const PASSWORD: &str = "p@ss/w0rd-8d1f";

/// Conforms: control:H1
#[test]
fn a_deployment_behind_tls_works_once_the_configuration_names_the_authority() {
    if !has_nginx("TLS in front of a deployment") {
        return;
    }
    let authority = Authority::new("Our Own");
    let scene = Scene::new(|front| front.encrypted(&authority.issue(HERE)), &trusting(&authority.file()));
    scene.is_up();
    scene.deployment.control().read(|seen| {
        for path in ["/api/v2/users/me", "/api/v2/workspaceagents/connection", "/api/v2/tailnet"] {
            let tokens: Vec<_> = seen.requests.iter().filter(|request| request.path == path).collect();
            assert!(!tokens.is_empty(), "{path}");
            for request in tokens {
                let values: Vec<_> = request.header("coder-session-token").collect();
                assert_eq!(values, [scene.deployment.lab.token()], "{path}");
            }
        }
    });
}

#[test]
fn an_authority_that_is_not_the_named_one_is_refused_with_where_to_name_it() {
    if !has_nginx("a wrong authority in front of a deployment") {
        return;
    }
    let authority = Authority::new("Our Own");
    // The second is what is left of one that was founded anew.
    for other in [Authority::new("Another"), Authority::new("Our Own")] {
        let scene = Scene::new(|front| front.encrypted(&authority.issue(HERE)), &trusting(&other.file()));
        scene.is_refused(&["signed by nobody this machine trusts", "ca_file"]);
        assert!(scene.deployment.control().recording().requests.is_empty(), "nothing was said to a stranger");
    }
}

#[test]
fn a_deployment_that_wants_a_client_certificate_works_once_the_configuration_names_one() {
    if !has_nginx("client certificates") {
        return;
    }
    let authority = Authority::new("Our Own");
    let config = trusting(&authority.file()) + &authority.issue("laptop.test").shown();
    wanting_certificates(&authority, &config).is_up();
}

#[test]
fn a_deployment_that_wants_a_client_certificate_that_is_missing_or_a_strangers_says_what_to_set() {
    if !has_nginx("missing client certificates") {
        return;
    }
    let (authority, stranger) = (Authority::new("Our Own"), Authority::new("Another"));
    for shown in [String::new(), stranger.issue("laptop.test").shown()] {
        let scene = wanting_certificates(&authority, &(trusting(&authority.file()) + &shown));
        scene.is_refused(&["SSL certificate", "client certificate", "client_cert_file", "client_key_file"]);
    }
}

#[test]
fn a_deployment_that_speaks_https_where_the_url_says_http_is_named_as_such() {
    if !has_nginx("plain requests to TLS") {
        return;
    }
    let authority = Authority::new("Our Own");
    let scene = Scene::new(|front| front.encrypted(&authority.issue(HERE)), "");
    let url = scene.url.replace("https://", "http://");
    scene.service.pretend_login(&url, scene.deployment.lab.token());
    scene.is_refused(&["400", "https:// instead of http://"]);
}

#[test]
fn a_proxy_that_strips_the_plain_upgrade_is_got_around_once_and_for_all() {
    if !has_nginx("a proxy that strips upgrades") {
        return;
    }
    let scene = Scene::new(Front::stripping, "");
    scene.sticks_to_websockets(426, "DERP requires connection upgrade");
}

/// Conforms: control:D6 data:20.2.2
#[test]
fn a_proxy_that_refuses_the_plain_upgrade_is_got_around_once_and_for_all() {
    if !has_nginx("a proxy that refuses upgrades") {
        return;
    }
    let scene =
        Scene::new(|front| front.with("if ($http_upgrade ~* ^derp$) { return 400 'no such upgrades'; }"), "");
    scene.sticks_to_websockets(400, "no such upgrades");
}

#[test]
fn a_gateway_that_wants_a_header_is_told_in_its_words_and_passed_by_the_header_command() {
    if !has_nginx("a gateway that wants a header") {
        return;
    }
    let gate = format!("if ($http_x_access != '{GATE}') {{ return 403 'no entry without X-Access'; }}");
    let without = Scene::new(|front| front.with(&gate), "");
    without.is_refused(&["403", "no entry without X-Access", "a gateway in front of the deployment"]);

    let folder = tempfile::tempdir().unwrap();
    let headers = folder.path().join("headers");
    std::fs::write(&headers, format!("X-Access={GATE}\n")).unwrap();
    let with = Scene::new(|front| front.with(&gate), &format!("header_command = [\"cat\", {headers:?}]\n"));
    with.is_up();
    let paths = ["/api/v2/users/me", "/api/v2/tailnet", "/derp", "/derp/latency-check"];
    with.deployment.control().read(|seen| {
        for path in paths {
            let mut requests = seen.requests.iter().filter(|request| request.path == path).peekable();
            assert!(requests.peek().is_some(), "{path}");
            assert!(requests.all(|request| request.header("x-access").eq([GATE])), "{path}");
        }
    });
    with.is_not_shown(&[GATE]);
    assert!(!with.nginx.errors().contains(GATE));
}

#[test]
fn a_proxy_of_the_environment_is_used_for_control_plane_and_relay() {
    if !has_nginx("a CONNECT proxy") {
        return;
    }
    let authority = Authority::new("Our Own");
    let (scene, proxy) = Scene::behind_proxy(&authority, None, "");
    scene.is_up();
    let place = format!("{BEHIND_PROXY}:{}", scene.nginx.port());
    let connected = proxy.connected();
    // For the user, the connection information, the control plane and the relay.
    assert!(connected.len() >= 4 && connected.iter().all(|it| *it == place), "{connected:?}");
}

#[test]
fn a_proxy_that_asks_who_we_are_is_told_by_its_url_and_nobody_else_is() {
    if !has_nginx("a CONNECT proxy with authentication") {
        return;
    }
    let authority = Authority::new("Our Own");
    let secret = STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let authorization = format!("Basic {secret}");
    let escaped = PASSWORD.replace('@', "%40").replace('/', "%2F");
    let (scene, proxy) = Scene::behind_proxy(&authority, Some(&authorization), &format!("{USER}:{escaped}@"));
    scene.is_up();
    assert!(proxy.connected().len() >= 4);
    scene.deployment.control().read(|seen| {
        assert!(seen.requests.iter().all(|it| it.header("proxy-authorization").next().is_none()));
    });
    scene.is_not_shown(&[PASSWORD, &escaped, &secret]);
}

#[test]
fn a_proxy_that_does_not_let_us_through_is_named_with_what_to_do_and_without_the_password() {
    if !has_nginx("a CONNECT proxy that refuses") {
        return;
    }
    let authority = Authority::new("Our Own");
    let secret = STANDARD.encode("alice:wr0ng-8d1f");
    for credentials in ["", "alice:wr0ng-8d1f@"] {
        let (scene, proxy) = Scene::behind_proxy(&authority, Some("Basic c2VzYW1l"), credentials);
        let text = scene.is_refused(&["407", &proxy.authority(), "user and password", "NO_PROXY"]);
        assert!(!text.contains("wr0ng"), "{text}");
        scene.is_not_shown(&["wr0ng-8d1f", &secret]);
        assert!(proxy.connected().is_empty());
    }
}

#[test]
fn an_nginx_that_reloads_costs_nothing_but_a_new_connection_whether_it_buffers_or_not() {
    if !has_nginx("reloads") {
        return;
    }
    let mut scene = Scene::new(|front| front.with("proxy_buffering on;"), "");
    scene.is_up();
    scene.hears_of_a_new_agent();
    for buffering in ["off", "on"] {
        let before = scene.connections();
        let front = Front::of(&scene.upstream()).with(&format!("proxy_buffering {buffering};"));
        scene.nginx.reload(&front);
        scene.is_connected_again(before);
        scene.hears_of_a_new_agent();
    }
    scene.has_not_restarted();
}

#[test]
fn an_nginx_that_is_killed_under_a_tunnel_is_found_again_when_it_is_back() {
    if !has_nginx("a killed nginx") {
        return;
    }
    let mut scene = Scene::new(|front| front, "");
    scene.is_up();
    let (before, logged) = (scene.connections(), scene.service.log().len());
    scene.nginx.kill();
    scene.tells(logged, "no control connection", "refused the connection");
    eventually("the metrics say so too", || !scene.has_control());
    scene.nginx.start_again();
    scene.is_connected_again(before);
    scene.hears_of_a_new_agent();
    scene.has_not_restarted();
}

#[test]
fn a_deployment_that_is_away_behind_nginx_is_told_as_such_and_found_again_when_it_is_back() {
    if !has_nginx("an upstream that is away") {
        return;
    }
    let nobody = format!("127.0.0.1:{}", free_port());
    let mut scene = Scene::new(|front| front.to(&nobody), "");
    let (away, there) = (Front::of(&nobody), Front::of(&scene.upstream()));
    scene.is_refused(&["502", "the deployment is in trouble or restarting"]);

    scene.nginx.reload(&there);
    scene.is_up();
    let (before, logged) = (scene.connections(), scene.service.log().len());
    scene.nginx.reload(&away);
    scene.tells(logged, "no control connection", "502");
    scene.tells(logged, "a relay link is down", "502");
    eventually("the metrics say so too", || !scene.has_control());
    scene.nginx.reload(&there);
    scene.is_connected_again(before);
    scene.hears_of_a_new_agent();
    assert_eq!(scene.upgrades("websocket"), 0, "a 502 says nothing about upgrades");
    scene.has_not_restarted();
}

fn wanting_certificates(authority: &Authority, config: &str) -> Scene {
    let wants = format!("ssl_verify_client on; ssl_client_certificate {:?};", authority.file());
    Scene::new(|front| front.encrypted(&authority.issue(HERE)).with(&wants), config)
}

/// A deployment behind nginx, and a service that knows the URL of nginx.
struct Scene {
    deployment: Deployment,
    nginx: Nginx,
    service: ServiceProcess,
    url: String,
}

impl Scene {
    /// With what stands in front, and the service's configuration.
    fn new(shape: impl FnOnce(Front) -> Front, config: &str) -> Self {
        let deployment = Deployment::with(LabOptions { agents: 1, ..LabOptions::default() });
        Self::of(deployment, shape, HERE, Command::new(WARREN), config)
    }

    /// With a proxy on the way, which wants this authorization and whose URL in the environment has these
    /// credentials.
    fn behind_proxy(
        authority: &Authority,
        authorization: Option<&str>,
        credentials: &str,
    ) -> (Self, ConnectProxy) {
        let deployment = Deployment::with(LabOptions { agents: 1, ..LabOptions::default() });
        let proxy = ConnectProxy::start(&deployment.runtime, authorization);
        let mut program = Command::new(WARREN);
        for name in ["https_proxy", "http_proxy", "all_proxy", "no_proxy", "ALL_PROXY", "NO_PROXY"] {
            program.env_remove(name);
        }
        program.env("HTTPS_PROXY", format!("http://{credentials}{}", proxy.authority()));
        let shape = |front: Front| front.encrypted(&authority.issue(BEHIND_PROXY));
        let config = trusting(&authority.file());
        let scene = Self::of(deployment, shape, BEHIND_PROXY, program, &config);
        (scene, proxy)
    }

    fn of(
        deployment: Deployment,
        shape: impl FnOnce(Front) -> Front,
        host: &str,
        program: Command,
        config: &str,
    ) -> Self {
        let front = shape(Front::of(&upstream(&deployment)));
        let nginx = Nginx::start(&front);
        let url = format!("{}://{host}:{}", front.scheme(), nginx.port());
        let service = ServiceProcess::start_by(program, config);
        service.pretend_login(&url, deployment.lab.token());
        Self { deployment, nginx, service, url }
    }

    fn upstream(&self) -> String {
        upstream(&self.deployment)
    }

    /// Brings the tunnel up, and checks that its agents answer and that all went through nginx.
    #[track_caller]
    fn is_up(&self) {
        let up = self.service.warren(&["up", "--wait"]);
        assert!(up.status.success(), "{}\n{}", stderr(&up), self.nginx.errors());
        self.reaches(&self.deployment.lab.agents()[0]);
        self.deployment.control().read(|seen| {
            assert!(seen.requests.iter().any(|request| request.path == "/derp"));
            let around = seen.requests.iter().find(|request| !came_through(request));
            assert!(around.is_none(), "{around:?}");
        });
    }

    /// Checks that the tunnel does not come up, in these words. Returns them all.
    #[track_caller]
    fn is_refused(&self, words: &[&str]) -> String {
        let up: Output = self.service.warren(&["up"]);
        let text = stderr(&up);
        assert!(!up.status.success(), "{text}");
        for word in words {
            assert!(text.contains(word), "{word:?} is missing in: {text}");
        }
        text
    }

    #[track_caller]
    fn reaches(&self, agent: &AgentInfo) {
        let name = format!("{}.{}", agent.name, agent.workspace);
        eventually(&format!("{name} answers"), || {
            self.service.warren(&["ping", &name, "--count", "1"]).status.success()
        });
    }

    /// Checks that plain upgrades were tried once, and that WebSockets carry everything from then on, after
    /// an end of the link too.
    #[track_caller]
    fn sticks_to_websockets(&self, status: u16, body: &str) {
        self.is_up();
        let plain = || -> Vec<u16> {
            let seen = self.nginx.seen().into_iter();
            let tried = seen.filter(|it| it.path == "/derp" && it.upgrade == "DERP");
            tried.map(|it| it.status).collect()
        };
        eventually("nginx has logged the attempt", || !plain().is_empty());
        assert_eq!(plain(), [status]);
        let id = i32::try_from(EMBEDDED_REGION).unwrap();
        let reason = format!(
            "GET failed with status code {status} (a proxy could be disallowing the use of 'Upgrade: derp'): {body}"
        );
        eventually("our node tells why", || {
            let told = self.nodes().last().and_then(|node| node.derp_forced_websocket.get(&id).cloned());
            told.as_deref() == Some(&reason)
        });

        for _ in 0..2 {
            let before = self.upgrades("websocket");
            self.deployment.lab.relay().kill_connections();
            eventually("the link is up again", || self.upgrades("websocket") > before);
            self.reaches(&self.deployment.lab.agents()[0]);
        }
        eventually("nginx has logged the links that ended", || {
            self.nginx.seen().iter().filter(|it| it.path == "/derp" && it.upgrade == "websocket").count() >= 2
        });
        assert_eq!(plain(), [status], "who fell back stays there");
    }

    /// How often relays were asked for an upgrade and could grant it.
    fn upgrades(&self, to: &str) -> usize {
        self.deployment.control().read(|seen| {
            let asked = seen.requests.iter().filter(|request| request.path == "/derp");
            asked.filter(|request| request.header("upgrade").eq([to])).count()
        })
    }

    /// Every node message that was sent, in order.
    fn nodes(&self) -> Vec<Node> {
        self.deployment.control().read(|seen| {
            let requests = seen.connections.iter().flat_map(|connection| &connection.requests);
            requests.filter_map(|request| request.update_self.as_ref()?.node.clone()).collect()
        })
    }

    fn connections(&self) -> usize {
        self.deployment.control().read(|seen| seen.connections.len())
    }

    fn has_control(&self) -> bool {
        sum(&self.service.metrics(), "warren_control_connected", &[]) > 0.0
    }

    /// Waits until an event is logged with a word, after so many bytes of the log.
    #[track_caller]
    fn tells(&self, after: usize, event: &str, word: &str) {
        eventually(&format!("{event} is told with {word}"), || {
            let log = self.service.log().split_off(after);
            log.lines().any(|line| line.contains(event) && line.contains(word))
        });
    }

    /// Waits until there is another control connection than so many.
    #[track_caller]
    fn is_connected_again(&self, before: usize) {
        eventually("there is a control connection", || self.connections() > before && self.has_control());
    }

    /// Checks that what the control plane says arrives, and that the relay carries it.
    #[track_caller]
    fn hears_of_a_new_agent(&self) {
        let lab = &self.deployment.lab;
        let workspace = format!("more-{}", lab.agents().len());
        let agents = self.deployment.runtime.block_on(async { lab.add_workspace(&workspace, &["main"]) });
        self.reaches(&agents[0]);
    }

    #[track_caller]
    fn has_not_restarted(&self) {
        assert!(sum(&self.service.metrics(), "warren_tunnel_restarts_total", &[]).abs() < f64::EPSILON);
    }

    /// Checks that none of the secrets is in what the service shows or in the list of processes.
    #[track_caller]
    fn is_not_shown(&self, secrets: &[&str]) {
        let verbs = [&["status"][..], &["status", "--json"], &["debug", "tree"], &["debug", "logs"]];
        let mut shown: Vec<_> = verbs
            .into_iter()
            .map(|verb| (verb.join(" "), self.service.warren(verb)))
            .map(|(verb, output)| (verb, stdout(&output) + &stderr(&output)))
            .collect();
        for path in ["/metrics", "/v1/status", "/v1/tree", "/v1/logs", "/", "/readyz"] {
            shown.push((path.to_owned(), self.service.api(path)));
        }
        shown.push(("the log".to_owned(), self.service.log()));
        shown.push(("the list of processes".to_owned(), processes()));
        for (place, text) in &shown {
            for secret in secrets {
                let line = text.lines().find(|line| line.contains(secret));
                assert!(line.is_none(), "{secret} is shown in {place}: {}", line.unwrap_or_default());
            }
        }
    }
}

fn upstream(deployment: &Deployment) -> String {
    deployment.lab.url().trim_start_matches("http://").to_owned()
}

/// The command lines of all processes, one a line.
fn processes() -> String {
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    let lines: Vec<String> = lines.collect();
    assert!(lines.iter().any(|line| line.contains("vpn-daemon") || line.contains(" service ")), "{lines:?}");
    lines.join("\n")
}
