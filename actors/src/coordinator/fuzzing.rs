//! How fuzz targets reach the control connection: over any stream, with what any peer says on it.

use std::{
    io,
    sync::{Arc, OnceLock},
    time::{Instant, SystemTime},
};

use secrecy::SecretString;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio_util::sync::CancellationToken;
use url::Url;
use warren_core::{
    coordination::Coordination,
    relay_map::RelayMap,
    roster::{Update, Workspaces},
};
use warren_proto::{
    frame::Message,
    tailnet::{
        CoordinateRequest, CoordinateResponse, DerpMap, RefreshResumeTokenRequest,
        RefreshResumeTokenResponse, StreamDerpMapsRequest, WorkspaceUpdate, WorkspaceUpdatesRequest,
    },
};

use super::{
    connection::{CLOSE_LIMIT, FLUSH_LIMIT},
    http::{ApiClient, REQUEST_LIMIT},
    memory::ResumeToken,
    rpc::{self, Answers, CallError, Method},
    upgrade::LIMITS,
};
use crate::{
    dial::{DialOptions, Dialer},
    websocket,
};

/// The key of the handshake, which is random otherwise.
const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAA==";

/// What a server that switches must say of [`KEY`].
pub fn accept() -> String {
    websocket::accept_key(KEY)
}

/// Asks for a WebSocket over `stream` and reads what comes until it ends. Returns what was read, and the error if
/// it did not end in order.
pub async fn hand_off<S>(stream: S) -> (Vec<u8>, Option<String>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut read = Vec::new();
    let switched = match client()
        .upgrade_over(stream, "/", websocket::request_headers(KEY, None), REQUEST_LIMIT)
        .await
    {
        Ok(switched) => switched,
        Err(error) => return (read, Some(error.to_string())),
    };
    if let Err(error) = websocket::check_response(&switched.headers, KEY, None) {
        return (read, Some(error.to_string()));
    }
    let (mut stream, handle) = websocket::byte_stream(switched.stream, LIMITS).await;
    let error = stream.read_to_end(&mut read).await.err();
    drop(stream);
    handle.close(CLOSE_LIMIT).await;
    (read, error.map(|error| error.to_string()))
}

/// Nothing is dialled, so one serves all inputs.
fn client() -> &'static ApiClient {
    static CLIENT: OnceLock<ApiClient> = OnceLock::new();
    #[expect(clippy::expect_used, reason = "a fuzz target that cannot begin")]
    CLIENT.get_or_init(|| {
        let dialer = Dialer::new(DialOptions::default()).expect("a dialer");
        let url = Url::parse("http://deployment.example").expect("a URL");
        ApiClient::new(Arc::new(dialer), url, Some(SecretString::from("token")), Vec::new())
    })
}

/// Makes every call that a connection makes, over an established WebSocket, and takes the answers as the parts
/// do. Returns how the connection and each call ended.
pub async fn talk<S>(stream: S) -> Vec<String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (stream, handle) = websocket::byte_stream(stream, LIMITS).await;
    let (rpc, driver) = rpc::client(stream);
    let has_ended = CancellationToken::new();
    let ends = {
        let driving = driver.run(has_ended.clone());
        let calling = async {
            let calls = (coordinate(&rpc), relay_maps(&rpc), workspaces(&rpc), resume_token(&rpc));
            let ends = tokio::join!(calls.0, calls.1, calls.2, calls.3);
            <[String; 4]>::from(ends).into()
        };
        tokio::pin!(driving, calling);
        tokio::select! {
            biased;
            ends = &mut calling => {
                has_ended.cancel();
                let _ = tokio::time::timeout(FLUSH_LIMIT, driving).await;
                ends
            }
            end = &mut driving => vec![driven(end)],
        }
    };
    handle.close(CLOSE_LIMIT).await;
    ends
}

fn driven(end: io::Result<()>) -> String {
    end.map_or_else(|error| error.to_string(), |()| "hung up".to_owned())
}

async fn coordinate(rpc: &rpc::Rpc) -> String {
    let mut coordination = Coordination::default();
    let now = Instant::now();
    let calling = async {
        let call = rpc.bidirectional::<CoordinateRequest, CoordinateResponse>(Method::Coordinate).await;
        let (mut requests, answers) = call?;
        requests.send(&coordination.connected(now)).await?;
        let ended = hear(answers, |response| {
            drop(coordination.handle_response(now, &response, |_| None));
        });
        let ended = ended.await;
        requests.close().await;
        ended
    };
    said(calling.await)
}

async fn relay_maps(rpc: &rpc::Rpc) -> String {
    let mut latest = RelayMap::default();
    let calling = async {
        let call = rpc.server_stream::<_, DerpMap>(Method::StreamDerpMaps, &StreamDerpMapsRequest {}).await;
        let (_requests, answers) = call?;
        let ended = hear(answers, |map| {
            let newer = RelayMap::from_proto(&map);
            let _ = latest.difference(&newer);
            latest = newer;
        });
        ended.await
    };
    said(calling.await)
}

async fn workspaces(rpc: &rpc::Rpc) -> String {
    let (mut workspaces, mut update) = (Workspaces::default(), Update::Snapshot);
    let calling = async {
        let request = WorkspaceUpdatesRequest::default();
        let call = rpc.server_stream::<_, WorkspaceUpdate>(Method::WorkspaceUpdates, &request).await;
        let (_requests, answers) = call?;
        let ended = hear(answers, |message| {
            let _ = workspaces.apply(&message, std::mem::replace(&mut update, Update::Diff));
        });
        ended.await
    };
    said(calling.await)
}

async fn resume_token(rpc: &rpc::Rpc) -> String {
    let answer = rpc.unary(Method::RefreshResumeToken, &RefreshResumeTokenRequest {}, REQUEST_LIMIT).await;
    said(answer.map(|response: RefreshResumeTokenResponse| {
        let (token, _) = ResumeToken::of(response);
        let _ = token.is_some_and(|token| token.is_usable(SystemTime::UNIX_EPOCH));
    }))
}

async fn hear<A: Message + Default>(
    mut answers: Answers<A>,
    mut take: impl FnMut(A),
) -> Result<(), CallError> {
    while let Some(answer) = answers.next().await? {
        take(answer);
    }
    Ok(())
}

fn said(end: Result<(), CallError>) -> String {
    end.map_or_else(|error| error.to_string(), |()| String::new())
}
