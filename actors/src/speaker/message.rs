//! What a speaker needs to know of the messages it carries.

use warren_proto::{
    frame::Message,
    vpn::{self, client_message, manager_message, service_message, tunnel_message},
};

/// A top-level message of one leg and direction.
pub trait SpeakerMessage: Message + Default + Send + Sync + 'static {
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
    ($message:ty, $kinds:ident { $($kind:ident => $name:literal),+ $(,)? }) => {
        impl SpeakerMessage for $message {
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

speaker_message!(vpn::ManagerMessage, manager_message {
    GetPeerUpdate => "get_peer_update",
    NetworkSettings => "network_settings",
    Start => "start",
    Stop => "stop",
    Wake => "wake",
});

speaker_message!(vpn::TunnelMessage, tunnel_message {
    Log => "log",
    PeerUpdate => "peer_update",
    NetworkSettings => "network_settings",
    Start => "start",
    Stop => "stop",
    Wake => "wake",
});

speaker_message!(vpn::ClientMessage, client_message {
    Start => "start",
    Stop => "stop",
    Status => "status",
});

speaker_message!(vpn::ServiceMessage, service_message {
    Start => "start",
    Stop => "stop",
    Status => "status",
    StartProgress => "start_progress",
});
