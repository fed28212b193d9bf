//! What a speaker needs to know of the messages it carries.

use warren_proto::{
    frame::{MAX_FRAME, Message},
    vpn::{self, client_message, manager_message, service_message, tunnel_message},
    weight::{self, Shape},
};

/// What one end accepts of the messages it is sent.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of the largest frame.
    pub frame: usize,
    /// Bytes that the largest message may take once it is unpacked, its frame included.
    pub unpacked: usize,
    /// Bytes that all messages may take that have been read and are not dealt with.
    pub in_flight: usize,
    /// Whether a frame may be empty.
    pub may_be_empty: bool,
}

/// From those who ask. The largest thing they can say is a start with its headers, of which deployments use a
/// few hundred bytes; what one is in hand must leave room for the next. Tunnels have always put up with empty
/// frames.
const ASKED: Limits = Limits { frame: 1 << 20, unpacked: 16 << 20, in_flight: 32 << 20, may_be_empty: true };

/// From those who answer: all that the protocol allows of peers, which is some 90 000 agents in a frame, half of
/// them at a time.
const ANSWERED: Limits =
    Limits { frame: MAX_FRAME, unpacked: 64 << 20, in_flight: 64 << 20, may_be_empty: false };

const _: () = assert!(ASKED.frame <= MAX_FRAME && ASKED.unpacked * 2 <= ASKED.in_flight);
const _: () = assert!(ANSWERED.unpacked <= ANSWERED.in_flight, "any single message must fit");

/// A top-level message of one leg and direction.
pub trait SpeakerMessage: Message + Default + Send + Sync + 'static {
    /// What is accepted of it.
    const LIMITS: Limits;
    /// How it unpacks.
    const SHAPE: Shape;

    /// What makes it a request or a response.
    fn rpc(&self) -> &Option<vpn::Rpc>;
    /// Makes it a request, a response or a notification.
    fn set_rpc(&mut self, rpc: Option<vpn::Rpc>);
    /// Its kind, as metrics name it; `none` if it has no body, or one that this build does not know.
    fn method(&self) -> &'static str;
    /// Whether it has no body.
    fn is_bare(&self) -> bool;
}

macro_rules! speaker_message {
    ($message:ty, $limits:ident, $shape:path, $kinds:ident { $($kind:ident => $name:literal),+ $(,)? }) => {
        impl SpeakerMessage for $message {
            const LIMITS: Limits = $limits;
            const SHAPE: Shape = $shape;

            fn rpc(&self) -> &Option<vpn::Rpc> {
                &self.rpc
            }

            fn set_rpc(&mut self, rpc: Option<vpn::Rpc>) {
                self.rpc = rpc;
            }

            fn method(&self) -> &'static str {
                match &self.msg {
                    $(Some($kinds::Msg::$kind(_)) => $name,)+
                    None => "none",
                }
            }

            fn is_bare(&self) -> bool {
                self.msg.is_none()
            }
        }
    };
}

speaker_message!(vpn::ManagerMessage, ASKED, weight::MANAGER_MESSAGE, manager_message {
    GetPeerUpdate => "get_peer_update",
    NetworkSettings => "network_settings",
    Start => "start",
    Stop => "stop",
    Wake => "wake",
});

speaker_message!(vpn::TunnelMessage, ANSWERED, weight::TUNNEL_MESSAGE, tunnel_message {
    Log => "log",
    PeerUpdate => "peer_update",
    NetworkSettings => "network_settings",
    Start => "start",
    Stop => "stop",
    Wake => "wake",
});

speaker_message!(vpn::ClientMessage, ASKED, weight::CLIENT_MESSAGE, client_message {
    Start => "start",
    Stop => "stop",
    Status => "status",
});

speaker_message!(vpn::ServiceMessage, ANSWERED, weight::SERVICE_MESSAGE, service_message {
    Start => "start",
    Stop => "stop",
    Status => "status",
    StartProgress => "start_progress",
});
