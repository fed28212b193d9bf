//! The client's side of leg B: one connection to the service over its Unix socket.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{net::UnixStream, time::Instant};
use warren_actors::speaker::{Inbox, Incoming, Speaker, SpeakerError};
use warren_proto::{
    header::Role,
    vpn::{self, client_message, service_message},
};

use super::{
    Reach, api,
    exit::{CliError, Exit},
    status::service_gone,
};

/// Limit of the handshake (vpn-protocol 16).
const HANDSHAKE: Duration = Duration::from_secs(5);

impl Reach {
    /// The path of one of the service's sockets: the directory that was named, else that of the user's
    /// own service if it is there, else that of the system's.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        let system = || Path::new("/run/warren").join(name);
        if let Some(folder) = &self.socket_dir {
            return folder.join(name);
        }
        let own =
            std::env::var_os("XDG_RUNTIME_DIR").map(|folder| Path::new(&folder).join("warren").join(name));
        own.filter(|path| path.exists()).unwrap_or_else(system)
    }
}

/// One connection to the service.
pub(crate) struct ServiceClient {
    speaker: Speaker<vpn::ClientMessage, vpn::ServiceMessage>,
    inbox: Inbox<vpn::ServiceMessage>,
}

impl ServiceClient {
    /// Connects to the service that `reach` names.
    pub(crate) async fn connect(reach: &Reach) -> Result<Self, CliError> {
        let socket = reach.socket("vpn.sock");
        let stream =
            UnixStream::connect(&socket).await.map_err(|error| api::unreachable_socket(&socket, &error))?;
        let (read, write) = stream.into_split();
        let (speaker, inbox) = Speaker::connect(read, write, Role::Client, Role::Service, HANDSHAKE)
            .await
            .map_err(handshake_error)?;
        Ok(Self { speaker, inbox })
    }

    /// Asks for the status.
    pub(crate) async fn status(&self, deadline: Instant) -> Result<vpn::Status, CliError> {
        let request = client_message::Msg::Status(vpn::StatusRequest {});
        match self.request(request, deadline).await? {
            service_message::Msg::Status(status) => Ok(status),
            _ => Err(unexpected()),
        }
    }

    /// Starts the tunnel, telling `progress` what the service is doing meanwhile.
    pub(crate) async fn start(
        &mut self,
        start: vpn::StartRequest,
        deadline: Instant,
        mut progress: impl FnMut(&str),
    ) -> Result<vpn::StartResponse, CliError> {
        let speaker = self.speaker.clone();
        let answer = request(&speaker, client_message::Msg::Start(start), deadline);
        tokio::pin!(answer);
        loop {
            tokio::select! {
                answer = &mut answer => return match answer? {
                    service_message::Msg::Start(answer) => Ok(answer),
                    _ => Err(unexpected()),
                },
                message = self.inbox.recv() => match message.map(|incoming| incoming.message.msg) {
                    Some(Some(service_message::Msg::StartProgress(stage))) => progress(stage_words(&stage)),
                    Some(_) => {}
                    None => return Err(service_gone()),
                },
            }
        }
    }

    /// Stops the tunnel.
    pub(crate) async fn stop(&mut self, deadline: Instant) -> Result<vpn::StopResponse, CliError> {
        match self.request(client_message::Msg::Stop(vpn::StopRequest {}), deadline).await? {
            service_message::Msg::Stop(answer) => Ok(answer),
            _ => Err(unexpected()),
        }
    }

    /// Waits for the next status that the service broadcasts.
    pub(crate) async fn next_status(&mut self) -> Result<vpn::Status, CliError> {
        loop {
            let Incoming { message, .. } = self.inbox.recv().await.ok_or_else(service_gone)?;
            if let Some(service_message::Msg::Status(status)) = message.msg {
                return Ok(status);
            }
        }
    }

    async fn request(
        &self,
        message: client_message::Msg,
        deadline: Instant,
    ) -> Result<service_message::Msg, CliError> {
        request(&self.speaker, message, deadline).await
    }
}

async fn request(
    speaker: &Speaker<vpn::ClientMessage, vpn::ServiceMessage>,
    message: client_message::Msg,
    deadline: Instant,
) -> Result<service_message::Msg, CliError> {
    let message = vpn::ClientMessage { rpc: None, msg: Some(message) };
    let limit = deadline.saturating_duration_since(Instant::now());
    let answer = speaker.request(message, limit).await.map_err(|error| match error {
        warren_actors::speaker::CallError::Deadline => CliError::new(
            Exit::Timeout,
            "the service did not answer in time; `warren status` shows where it stands",
        ),
        other => CliError::new(Exit::NotRunning, format!("the service ended the connection: {other}")),
    })?;
    answer.msg.ok_or_else(unexpected)
}

fn handshake_error(error: SpeakerError) -> CliError {
    let exit = if error.is_version_mismatch() { Exit::VersionMismatch } else { Exit::Failed };
    CliError::new(exit, format!("the service does not speak as expected: {error}"))
}

fn unexpected() -> CliError {
    CliError::new(
        Exit::VersionMismatch,
        "the service sent another answer than asked for; is it of another version?",
    )
}

fn stage_words(progress: &vpn::StartProgress) -> &'static str {
    match progress.stage() {
        vpn::StartProgressStage::Initializing => "starting the tunnel process",
        vpn::StartProgressStage::Downloading => "downloading",
        vpn::StartProgressStage::Finalizing => "connecting to the control plane",
    }
}
