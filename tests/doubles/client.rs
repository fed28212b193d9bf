//! A desktop program as a client of the service (vpn-protocol 11.2, 11.10).

use std::{os::unix::net::UnixStream, path::Path};

use warren_proto::vpn::{
    self, ClientMessage, Rpc, ServiceMessage, client_message::Msg as Order, service_message::Msg,
    status::Lifecycle,
};

use super::codec::{Greeting, Heard, Peer, greet};

/// One client.
pub(crate) struct Gui {
    peer: Peer<ServiceMessage>,
    /// What the service said it is.
    pub(crate) line: String,
}

impl Gui {
    /// Connects, and shakes hands.
    pub(crate) fn connect(socket: &Path, versions: &str, greeting: Greeting) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        let mut read = stream.try_clone().unwrap();
        let own = format!("codervpn client {versions}\n");
        let line = greet(&mut read, &mut stream, &own, greeting).unwrap();
        Self { peer: Peer::new(read, stream), line }
    }

    /// What goes over the wire, by hand.
    pub(crate) fn peer(&mut self) -> &mut Peer<ServiceMessage> {
        &mut self.peer
    }

    /// Sends a request. Returns its id.
    pub(crate) fn ask(&mut self, order: Order) -> u64 {
        let id = self.peer.next_id();
        self.peer.send(&ClientMessage { rpc: Some(Rpc { msg_id: id, response_to: 0 }), msg: Some(order) });
        id
    }

    /// The status, asked for.
    pub(crate) fn status(&mut self) -> vpn::Status {
        let id = self.peer.next_id();
        self.status_by(id)
    }

    /// As [`Self::status`], under this id.
    pub(crate) fn status_by(&mut self, id: u64) -> vpn::Status {
        let order = Order::Status(vpn::StatusRequest {});
        self.peer.send(&ClientMessage { rpc: Some(Rpc { msg_id: id, response_to: 0 }), msg: Some(order) });
        match self.peer.answer_to(id).msg {
            Some(Msg::Status(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Starts with URL and token, and nothing else.
    pub(crate) fn start(&mut self, url: &str, token: &str) -> vpn::StartResponse {
        let start =
            vpn::StartRequest { coder_url: url.into(), api_token: token.into(), ..Default::default() };
        let id = self.ask(Order::Start(start));
        self.started(id)
    }

    /// The answer to a start.
    pub(crate) fn started(&mut self, id: u64) -> vpn::StartResponse {
        match self.peer.answer_to(id).msg {
            Some(Msg::Start(answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// Stops.
    pub(crate) fn stop(&mut self) -> vpn::StopResponse {
        let id = self.ask(Order::Stop(vpn::StopRequest {}));
        match self.peer.answer_to(id).msg {
            Some(Msg::Stop(answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for a broadcast, as a program does that only shows what it is told. One that came before an answer
    /// counts.
    pub(crate) fn wait_for(&mut self, accept: impl Fn(&vpn::Status) -> bool) -> vpn::Status {
        let status = |heard: &Heard<ServiceMessage>| match &heard.message.msg {
            Some(Msg::Status(status)) if heard.ids.is_none() => Some(status.clone()),
            _ => None,
        };
        let mut seen = 0;
        loop {
            let accepted = self.peer.told[seen..].iter().filter_map(status).find(&accept);
            if let Some(status) = accepted {
                return status;
            }
            seen = self.peer.told.len();
            let heard = self.peer.next().unwrap_or_else(|| panic!("the end; before: {:#?}", self.peer.told));
            self.peer.told.push(heard);
        }
    }

    /// What it has been told without asking, in order: lifecycles and stages.
    pub(crate) fn story(&self) -> Vec<String> {
        let told = self.peer.told.iter().filter(|heard| heard.ids.is_none());
        let mut story: Vec<_> = told
            .map(|heard| match heard.message.msg.as_ref() {
                Some(Msg::Status(status)) => lifecycle(status),
                Some(Msg::StartProgress(progress)) => format!("{:?}", progress.stage()),
                other => format!("{other:?}"),
            })
            .collect();
        story.dedup();
        story
    }
}

fn lifecycle(status: &vpn::Status) -> String {
    match status.lifecycle() {
        Lifecycle::Starting => "STARTING".to_owned(),
        Lifecycle::Started => "STARTED".to_owned(),
        Lifecycle::Stopping => "STOPPING".to_owned(),
        Lifecycle::Stopped => "STOPPED".to_owned(),
        Lifecycle::Unknown => "UNKNOWN".to_owned(),
    }
}
