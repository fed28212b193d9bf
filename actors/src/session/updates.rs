//! What the manager is told of the peers (vpn-protocol 7.4, 6.5): the difference between what it was last
//! told and the present, whenever they differ, and everything when it asks. One task makes both, so that an
//! older state never follows a newer one.

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::sleep};
use warren_core::roster::{self, Snapshot};
use warren_proto::vpn::{PeerUpdate, TunnelMessage, tunnel_message};

use super::stream::{Answer, Request, Stream};
use crate::{facts::Net, runtime::View};

/// The pause after a notification: pings answered within it share the next one.
const PAUSE: Duration = Duration::from_millis(50);

/// Tells the manager of peers until `asked` is closed and what was asked is answered.
pub(super) async fn run(
    stream: Arc<Stream>,
    mut nets: View<Option<Arc<Net>>>,
    mut asked: mpsc::Receiver<Arc<Request>>,
) {
    let mut peers = None;
    loop {
        tokio::select! {
            biased;
            // First, so that a successor answers from the net that is there.
            net = nets.changed() => match net {
                Some(net) => peers = net.as_ref().as_ref().map(|net| net.peers.view()),
                None => return,
            },
            request = asked.recv() => match request {
                Some(request) => answer(&stream, peers.as_ref(), &request).await,
                None => return,
            },
            () = changed(&mut peers) => if let Some(peers) = &peers {
                notify(&stream, peers).await;
            },
        }
    }
}

/// Never returns where there is nothing to watch.
async fn changed(peers: &mut Option<View<Snapshot>>) {
    let changed = match peers {
        Some(peers) => peers.changed().await,
        None => None,
    };
    if changed.is_none() {
        std::future::pending().await
    }
}

/// Sends the difference, if there is one, and waits until it is written: a manager that reads slowly gets
/// fewer and larger differences.
async fn notify(stream: &Stream, peers: &View<Snapshot>) {
    let mut sent = stream.sent().await;
    let Ok(slot) = stream.speaker().reserve().await else { return };
    // From here to the acceptance nothing is awaited: a session that ends in between leaves no half truth.
    let present = peers.get();
    let Some(update) = sent.difference(&present) else { return };
    sent.note_difference(present);
    let accepted = slot.notify(message(update));
    drop(sent);
    match accepted {
        Ok(written) => drop(written.wait().await),
        Err(error) => tracing::error!(%error, "a peer update cannot be sent"),
    }
    sleep(PAUSE).await;
}

/// Answers with everything known; with nothing while there is no net.
async fn answer(stream: &Stream, peers: Option<&View<Snapshot>>, request: &Request) {
    let mut sent = stream.sent().await;
    let Ok(slot) = stream.speaker().reserve().await else { return };
    let present = peers.map(View::get).unwrap_or_default();
    let message = tunnel_message::Msg::PeerUpdate(roster::complete(&present));
    sent.note_answer(&present);
    stream.answer_in(slot, request, Answer { message, result: "ok" });
}

fn message(update: PeerUpdate) -> TunnelMessage {
    TunnelMessage { rpc: None, msg: Some(tunnel_message::Msg::PeerUpdate(update)) }
}
