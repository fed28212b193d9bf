//! One attempt to start a tunnel process: device, process, greetings, Start. Whatever fails, nothing of the
//! attempt is left.

use std::{
    ffi::OsString,
    future::Future,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use secrecy::{ExposeSecret, SecretString};
use tokio_util::sync::CancellationToken;
use warren_actors::{dial::ClientCertificate, runtime::CellWriter, speaker::Speaker};
use warren_observability::names;
use warren_proto::{
    header::Role,
    vpn::{self, start_request::Header},
};

use super::{
    death::{Death, Failure, Reason},
    header_command, neighbours,
    running::{Greeted, Running, end_mute},
    telemetry,
};
use crate::{
    facts::{Peers, Service},
    intent::Order,
    link::{LinkClient, serve_sockets},
    process::{
        DEVICE, Launch as Spawning, Pipes, Process, Program,
        binary::{self, BinaryError},
    },
};

/// How long the last process may take to be gone: killed processes that hang in the kernel.
const SLOT_LIMIT: Duration = Duration::from_secs(10);
/// How long the tunnel may take to say who it is (vpn-protocol 2.4).
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long a process whose connection broke may take to be seen ending.
const EXIT_LIMIT: Duration = Duration::from_millis(500);
/// How long the last words of a process may take to be read.
const WORDS_LIMIT: Duration = Duration::from_millis(100);

/// How far an attempt has come.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// There is a process.
    Spawned(u32),
    /// It speaks and is asked to start.
    Finalizing,
}

/// One attempt.
pub(super) struct Launch<T> {
    pub(super) service: Arc<Service>,
    pub(super) order: Arc<Order>,
    /// Nobody wants it any more.
    pub(super) cancelled: CancellationToken,
    /// Hears how far it has come.
    pub(super) tell: T,
}

impl<T, F> Launch<T>
where
    T: Fn(Step) -> F + Send,
    F: Future<Output = ()> + Send,
{
    /// Returns a tunnel that has answered its Start, or why there is none.
    pub(super) async fn run(mut self) -> Result<Arc<Running>, Failure> {
        let program = self.unless_cancelled(self.look_at_program()).await?;
        let ordered = Arc::clone(&self.order);
        self.order = self.unless_cancelled(self.completed()).await?;
        let device = timed("device", self.unless_cancelled(self.device())).await?;
        let (process, pipes) = timed("spawn", self.unless_cancelled(self.spawn(program, device))).await?;
        (self.tell)(Step::Spawned(process.pid())).await;
        let greeted = timed("handshake", self.unless_cancelled(self.greet(process.clone(), pipes))).await;
        let (greeted, peers) = match greeted {
            Ok(greeted) => greeted,
            Err(failure) => {
                end_mute(&process).await;
                return Err(failure);
            }
        };
        let secrets = self.order.secrets().cloned().collect();
        let running = Arc::new(Running::new(greeted, Arc::clone(&ordered), secrets, peers, &self.service));
        (self.tell)(Step::Finalizing).await;
        match timed("start", self.unless_cancelled(self.start(&running))).await {
            Ok(()) => {
                neighbours::remember(&self.service, &ordered).await;
                Ok(running)
            }
            Err(failure) => {
                running.end().await;
                Err(failure)
            }
        }
    }

    async fn unless_cancelled<V>(
        &self,
        step: impl Future<Output = Result<V, Failure>>,
    ) -> Result<V, Failure> {
        let cancelled = || Failure::Later("the start was given up for another".to_owned());
        self.cancelled.run_until_cancelled(step).await.unwrap_or_else(|| Err(cancelled()))
    }

    /// The order with the headers of the configured command; what somebody ordered stays what it was.
    async fn completed(&self) -> Result<Arc<Order>, Failure> {
        let Some(command) = &self.service.config.header_command else { return Ok(Arc::clone(&self.order)) };
        let completed = header_command::complete(&self.order, command, &self.service.spawner);
        let completed =
            async { completed.await.map(Arc::new).map_err(|error| Failure::Later(error.to_string())) };
        timed("headers", completed).await
    }

    fn program(&self) -> Program {
        self.service.config.tunnel_binary.clone().map_or(Program::Own, Program::Foreign)
    }

    /// Another program runs with our privileges: it must be one that nobody else can have put there. What is on
    /// the host now is not its own.
    async fn look_at_program(&self) -> Result<Program, Failure> {
        let Program::Foreign(path) = self.program() else { return Ok(Program::Own) };
        let (own, wanted) = (self.service.options.uid, self.service.config.tunnel_version.clone());
        let checked = tokio::task::spawn_blocking(move || binary::check(&path, own));
        let refused = |error: BinaryError| Failure::Person(error.to_string());
        let path = checked.await.map_err(|error| Failure::Later(error.to_string()))?.map_err(refused)?;
        if let Some(wanted) = wanted {
            binary::check_version(&path, &wanted, &self.service.spawner).await.map_err(refused)?;
        }
        self.service.footprint.before().await;
        Ok(Program::Foreign(path))
    }

    /// Another program owns its network itself.
    async fn device(&self) -> Result<Option<OwnedFd>, Failure> {
        if self.program() != Program::Own || !self.service.options.with_device {
            return Ok(None);
        }
        let copy = neighbours::device(&self.service).await.map_err(Failure::Later)?.try_clone();
        copy.map(Some).map_err(|error| Failure::Later(format!("the device cannot be handed over: {error}")))
    }

    async fn spawn(&self, program: Program, device: Option<OwnedFd>) -> Result<(Process, Pipes), Failure> {
        let slot = self.service.slot.acquire(SLOT_LIMIT).await.ok_or_else(|| {
            Failure::Later("the last tunnel process does not end; it may hang in the kernel".to_owned())
        })?;
        let spawning = Spawning { program, arguments: self.arguments(), device, variables: self.variables() };
        let secrets = self.order.secrets().cloned().collect();
        let spawned = Process::spawn(spawning, &self.service.spawner, slot, &self.service.log, secrets).await;
        spawned.map_err(|error| Failure::Died(Death::new(Reason::Spawn, error.to_string())))
    }

    /// Only our own program knows these.
    fn variables(&self) -> Vec<(&'static str, OsString)> {
        match self.program() {
            Program::Own => vec![("WARREN_LOG", OsString::from(&self.service.options.log_filter))],
            Program::Foreign(_) => Vec::new(),
        }
    }

    /// Only our own program knows these.
    fn arguments(&self) -> Vec<OsString> {
        let options = &self.service.options;
        let mut arguments = Vec::new();
        if self.program() != Program::Own {
            return arguments;
        }
        if !options.with_device {
            arguments.push("--no-device".into());
        }
        if options.allow_faults {
            arguments.push("--allow-faults".into());
        }
        if options.agent_metrics {
            arguments.push("--agent-metrics".into());
        }
        if let Some(file) = &options.ca_file {
            arguments.extend(["--ca-file".into(), file.clone().into_os_string()]);
        }
        if let Some(ClientCertificate { certificate, key }) = &options.client_certificate {
            arguments.extend(["--client-cert-file".into(), certificate.clone().into_os_string()]);
            arguments.extend(["--client-key-file".into(), key.clone().into_os_string()]);
        }
        arguments
    }

    async fn greet(&self, process: Process, pipes: Pipes) -> Result<(Greeted, CellWriter<Peers>), Failure> {
        if let Some(channel) = pipes.sockets {
            // Ends with the process.
            tokio::spawn(serve_sockets(channel));
        }
        let peers = claim_peers(&self.service).await?;
        let (from, to) = (pipes.from_child, pipes.to_child);
        let connected = Speaker::connect(from, to, Role::Manager, Role::Tunnel, HANDSHAKE_LIMIT).await;
        let (speaker, inbox) = match connected {
            Ok(connected) => connected,
            Err(error) => return Err(self.mute(&process, &error.to_string()).await),
        };
        let link = match pipes.link {
            None => None,
            Some(stream) => match LinkClient::connect(stream).await {
                Ok(link) => Some(link),
                Err(error) => return Err(self.mute(&process, &error.to_string()).await),
            },
        };
        Ok((Greeted { process, speaker, inbox, link }, peers))
    }

    /// The tunnel did not speak as expected; how it ended says more than that, if it did.
    async fn mute(&self, process: &Process, error: &str) -> Failure {
        let text = match process.exited_within(EXIT_LIMIT).await {
            Some(exit) => format!("the tunnel process {exit} before it said hello"),
            None => format!("the tunnel process does not speak as expected: {error}"),
        };
        process.heard_out(WORDS_LIMIT).await;
        Failure::Died(Death::new(Reason::Handshake, text).with_last_words(&self.service.log))
    }

    async fn start(&self, running: &Running) -> Result<(), Failure> {
        let answer = tokio::select! {
            answer = running.start(self.request()) => answer,
            exit = running.process().exited() => return Err(self.died(running, exit.into()).await),
        };
        match answer {
            Ok(answer) if answer.success => Ok(()),
            Ok(answer) if requires_sign_in(&answer.error_message) => {
                Err(Failure::Person(answer.error_message))
            }
            Ok(answer) if answer.error_message.is_empty() => Err(Failure::Later(
                "the tunnel did not start and did not say why; see `warren debug logs`".to_owned(),
            )),
            Ok(answer) => Err(Failure::Later(answer.error_message)),
            Err(error) => {
                let exit = running.process().exited_within(EXIT_LIMIT).await;
                let silent =
                    || Death::new(Reason::Start, format!("the tunnel process did not start: {error}"));
                Err(self.died(running, exit.map_or_else(silent, Death::from)).await)
            }
        }
    }

    async fn died(&self, running: &Running, death: Death) -> Failure {
        running.process().heard_out(WORDS_LIMIT).await;
        Failure::Died(death.with_last_words(&self.service.log))
    }

    fn request(&self) -> vpn::StartRequest {
        let has_device = self.program() == Program::Own && self.service.options.with_device;
        let header = |(name, value): &(String, SecretString)| Header {
            name: name.clone(),
            value: value.expose_secret().to_owned(),
        };
        vpn::StartRequest {
            tunnel_file_descriptor: if has_device { DEVICE } else { 0 },
            coder_url: self.order.url.clone(),
            api_token: self.order.token.expose_secret().to_owned(),
            headers: self.order.headers.iter().map(header).collect(),
            device_id: telemetry::device_id().to_owned(),
            device_os: telemetry::OS.to_owned(),
            coder_desktop_version: self.service.options.version.to_owned(),
        }
    }
}

/// Leg A has no error codes: the hint that ends a refused token's text is what tells it (vpn-protocol 6.2).
fn requires_sign_in(error: &str) -> bool {
    let error = error.to_lowercase();
    ["warren login", "coder login"].iter().any(|hint| error.contains(hint))
}

/// The last tunnel's task gives the cell back at its next await; nobody tells us when.
async fn claim_peers(service: &Service) -> Result<CellWriter<Peers>, Failure> {
    const TRIES: u32 = 100;
    const PAUSE: Duration = Duration::from_millis(10);
    for _ in 0..TRIES {
        if let Ok(peers) = service.peers.claim() {
            return Ok(peers);
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(Failure::Later("the last tunnel is still being listened to".to_owned()))
}

async fn timed<V>(stage: &'static str, step: impl Future<Output = Result<V, Failure>>) -> Result<V, Failure> {
    let begun = Instant::now();
    let outcome = step.await;
    metrics::histogram!(names::TUNNEL_START_DURATION, "stage" => stage).record(begun.elapsed());
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_token_is_told_by_its_hint() {
        assert!(requires_sign_in("401: You are signed out; sign in again (`warren login`)"));
        assert!(requires_sign_in("unexpected status code 401: Try logging in using 'coder login'."));
        assert!(!requires_sign_in("dial tcp: connection refused"));
    }
}
