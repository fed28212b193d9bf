//! One attempt to keep a control connection: pause, introduction, WebSocket, calls, orderly end
//! (tailnet-control 1.5, 2.1, 4.8, 4.9).
//!
//! ```text
//! Begin -> users/me, connection info (once) -> WebSocket -> yamux -> calls -> Event::Ended
//!                                                 Event::Accepted    Event::Proven
//! ```
//! The data plane, our keys, the peer table and the cells outlive it.

use std::{sync::Arc, task::Poll, time::Duration};

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use url::form_urlencoded;
use uuid::Uuid;
use warren_core::relay_map::ConnectionInfo;

use super::{
    Event, Message, Shared,
    calls::Calls,
    error::ControlError,
    http::{ApiClient, REQUEST_LIMIT},
    peers::now,
    rpc, upgrade,
};
use crate::{
    facts::Boot,
    recovery::Plane,
    runtime::Address,
    websocket::{ByteStream, Handle},
};

/// What the deployment does, told in the way it asks for; the lowest version with all our calls.
const VERSION: &str = "version=2.3";
/// For a sign of life that was asked for.
const LIFE_LIMIT: Duration = Duration::from_secs(3);
/// What was said for so long without hearing anything makes us ask: a connection that dies silently while it
/// is in use is noticed within this and [`LIFE_LIMIT`].
const UNANSWERED: Duration = Duration::from_secs(5);
/// For the deployment to hear that we leave, and to end the call (tailnet-control 4.8).
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);
/// For the last bytes of an end in order.
pub(super) const FLUSH_LIMIT: Duration = Duration::from_millis(100);
/// For the answer to our close frame. Deployments wait longer for ours; a part that is stopped cannot.
pub(super) const CLOSE_LIMIT: Duration = Duration::from_millis(400);
/// What [`Attempt::run`] takes at most from a stop to its end.
pub(super) const STOP_LIMIT: Duration = Duration::from_millis(1600);

/// When to dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    AtOnce,
    /// After this time, or when the machine wakes up.
    After(Duration),
    /// After this time: the deployment asked for it.
    NotBefore(Duration),
    /// When the machine wakes up: time alone changes nothing.
    OnWake,
}

/// One attempt; reports under its number what becomes of it.
pub(super) struct Attempt {
    pub(super) shared: Arc<Shared>,
    pub(super) number: u64,
    pub(super) me: Address<Message>,
}

/// An open connection.
struct Opened {
    owner: Uuid,
    stream: ByteStream<TokioIo<Upgraded>>,
    handle: Handle<TokioIo<Upgraded>>,
}

impl Attempt {
    /// Dials and keeps the connection until it ends, or until the coordinator stops.
    pub(super) async fn run(self, begin: Begin) {
        let opened = self.shared.stop.run_until_cancelled(async {
            self.pause(begin).await;
            self.open().await
        });
        let error = match opened.await {
            Some(Ok(Opened { owner, stream, handle })) => self.keep(owner, stream, handle).await,
            Some(Err(error)) => error,
            None => return,
        };
        if self.shared.stop.is_cancelled() {
            tracing::debug!(%error, "the control connection ended by our will");
        } else {
            self.report(Event::Ended(error)).await;
        }
    }

    async fn pause(&self, begin: Begin) {
        match begin {
            Begin::AtOnce => {}
            Begin::After(pause) => drop(timeout(pause, self.shared.wake.notified()).await),
            Begin::NotBefore(pause) => sleep(pause).await,
            Begin::OnWake => self.shared.wake.notified().await,
        }
    }

    async fn open(&self) -> Result<Opened, ControlError> {
        let net = &self.shared.net;
        let client = client(&net.boot, Arc::clone(net.data_plane.dialer()));
        let owner = self.introduce(&client).await?;
        let opened = upgrade::open(&client, "/api/v2/tailnet", &self.query(), REQUEST_LIMIT).await;
        let (stream, handle) = opened?;
        Ok(Opened { owner, stream, handle })
    }

    /// Asks who we are and what the deployment says about connecting; once for a Boot.
    async fn introduce(&self, client: &ApiClient) -> Result<Uuid, ControlError> {
        let known = self.shared.memory.lock().owner;
        if let Some(owner) = known {
            return Ok(owner);
        }
        let user = client.current_user().await.map_err(ControlError::User)?;
        let body = client.get("/api/v2/workspaceagents/connection", REQUEST_LIMIT).await;
        let info = ConnectionInfo::from_json(&body.map_err(ControlError::ConnectionInfo)?)?;
        self.shared.take_introduction(user.username, info);
        self.shared.memory.lock().owner = Some(user.id);
        Ok(user.id)
    }

    pub(super) fn query(&self) -> String {
        let memory = self.shared.memory.lock();
        let usable = memory.resume.as_ref().filter(|resume| resume.is_usable(std::time::SystemTime::now()));
        let Some(resume) = usable else { return VERSION.to_owned() };
        let token = form_urlencoded::byte_serialize(resume.token.expose_secret().as_bytes());
        format!("resume_token={}&{VERSION}", token.collect::<String>())
    }

    /// Makes the calls over an open connection until it ends, and says why it did.
    pub(super) async fn keep<S>(&self, owner: Uuid, stream: ByteStream<S>, handle: Handle<S>) -> ControlError
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.report(Event::Accepted).await;
        let (rpc, driver) = rpc::client(stream);
        let has_ended = CancellationToken::new();
        let error = {
            let driving = driver.run(has_ended.clone());
            let talking = self.talk(owner, rpc, &handle);
            tokio::pin!(driving, talking);
            tokio::select! {
                biased;
                error = &mut talking => {
                    has_ended.cancel();
                    let _ = timeout(FLUSH_LIMIT, driving).await;
                    error
                }
                driven = &mut driving => match futures::poll!(talking) {
                    // What was said just before the end tells more than the end.
                    Poll::Ready(error @ ControlError::Ended { said: Some(_), .. }) => error,
                    _ => driven.map_or_else(ControlError::Broken, |()| ControlError::HungUp),
                },
            }
        };
        self.shared.peers.disconnected();
        if !error.is_broken() {
            handle.close(CLOSE_LIMIT).await;
        }
        error
    }

    async fn talk<S>(&self, owner: Uuid, rpc: rpc::Rpc, handle: &Handle<S>) -> ControlError
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let calls = Calls::new(&self.shared, rpc, owner, self.number);
        let Err(error) = tokio::select! {
            biased;
            ended = calls.run(async || self.report(Event::Proven).await) => ended,
            error = self.watch_for_death(handle) => Err(error),
            () = self.farewell_is_over() => Err(ControlError::Stalled),
        };
        error
    }

    async fn watch_for_death<S: AsyncRead + AsyncWrite + Unpin>(&self, handle: &Handle<S>) -> ControlError {
        loop {
            let dead = tokio::select! {
                () = self.shared.wake.notified() => ControlError::DeadOnWake,
                () = handle.goes_unanswered(UNANSWERED) => ControlError::Unanswered,
            };
            let asked = now();
            if !handle.is_alive(LIFE_LIMIT).await {
                return dead;
            }
            self.shared.net.recovery.works(Plane::Control, asked, now());
        }
    }

    async fn farewell_is_over(&self) {
        self.shared.stop.cancelled().await;
        sleep(FAREWELL_LIMIT).await;
    }

    async fn report(&self, event: Event) {
        // A coordinator that is down begins anew when it is back.
        let _ = self.me.send(Message::Report { attempt: self.number, event }).await;
    }
}

/// Asks as the user that Start named, with the headers that came with it.
fn client(boot: &Boot, dialer: Arc<crate::dial::Dialer>) -> ApiClient {
    let telemetry =
        boot.telemetry.as_deref().map(|it| ("Coder-Desktop-Telemetry".to_owned(), SecretString::from(it)));
    let headers = boot.headers.iter().cloned().chain(telemetry).collect();
    ApiClient::new(dialer, boot.url.clone(), Some(boot.token.clone()), headers)
}
