//! The host's network: the device, its address, routes and MTU. Nothing shells out.
//!
//! ```text
//! tunnels ── Device ──> Host ──> Tun::create        the descriptor is handed to the tunnel process
//!         ── Apply ───>      ──> policy.rs ──> netlink.rs
//!         ── Release ─>      ──> the descriptor is closed, and the interface vanishes with what was set
//! ```
//!
//! This part alone writes the cells `device` and `host`. The descriptor lives in the cell: a crash of this
//! part, or of the tunnel process, leaves the interface with its address and routes as it was.

use std::{fs::File, io, os::fd::OwnedFd, sync::Arc};

use warren_actors::{
    facts::InterfaceConfig,
    packet_io::{
        DEVICE_NAME,
        tun::{Tun, TunError},
    },
    runtime::{Cell, CellWriter, Context, Part, PartError, Reply},
};
use warren_proto::vpn;

use crate::facts::Service;

pub mod footprint;
pub mod netlink;
mod policy;

/// What the host's interface was last set to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// What was applied, if anything.
    pub settings: Option<InterfaceConfig>,
}

/// What the host part hears.
#[derive(Debug)]
pub enum Message {
    /// Makes sure that there is a device, and hands it out. One whose interface somebody removed is replaced.
    Device {
        /// The device, or why there is none, in words for a person.
        reply: Reply<Result<Arc<OwnedFd>, String>>,
    },
    /// Sets address, routes and MTU, if the tunnel may ask for these.
    Apply {
        /// What the tunnel asks for.
        settings: Box<vpn::NetworkSettingsRequest>,
        /// Whether it is done, or why not, in words for a person.
        reply: Reply<Result<(), String>>,
    },
    /// No tunnel is wanted: the device goes, and what was set with it.
    Release {
        /// When nothing is left.
        reply: Reply<()>,
    },
}

/// The part.
pub struct Host {
    device: Cell<Option<Arc<OwnedFd>>>,
    applied: Cell<Applied>,
}

/// One incarnation of the part.
pub struct State {
    device: CellWriter<Option<Arc<OwnedFd>>>,
    applied: CellWriter<Applied>,
}

impl Host {
    /// The host's network, for this service.
    pub fn new(service: &Service) -> Self {
        Self { device: service.device.clone(), applied: service.host.clone() }
    }
}

impl Part for Host {
    type Message = Message;
    type State = State;

    async fn start(&self, _: &Context<Message>) -> Result<State, PartError> {
        Ok(State { device: self.device.claim()?, applied: self.applied.claim()? })
    }

    async fn handle(
        &self,
        _: &Context<Message>,
        state: &mut State,
        message: Message,
    ) -> Result<(), PartError> {
        match message {
            Message::Device { reply } => drop(reply.send(state.device())),
            // Here and not in a task: what was asked for first is set first, and a release waits for it.
            Message::Apply { settings, reply } => drop(reply.send(state.apply(&settings).await)),
            Message::Release { reply } => {
                state.release();
                let _ = reply.send(());
            }
        }
        Ok(())
    }
}

impl State {
    fn device(&self) -> Result<Arc<OwnedFd>, String> {
        if let Some(device) = self.device.get().as_ref() {
            if !Tun::is_gone(device) {
                return Ok(Arc::clone(device));
            }
            tracing::warn!(device = DEVICE_NAME, "the interface was removed by somebody; another is made");
            self.release();
        }
        let device = Tun::create(DEVICE_NAME).map_err(|error| device_error(&error))?;
        let device = Arc::new(device);
        tracing::info!(device = DEVICE_NAME, "the device is made");
        self.device.set(Some(Arc::clone(&device)));
        Ok(device)
    }

    async fn apply(&self, request: &vpn::NetworkSettingsRequest) -> Result<(), String> {
        if self.device.get().is_none() {
            return Err(format!("there is no device {DEVICE_NAME} to be set: start the tunnel again"));
        }
        let present = self.applied.get().settings.clone();
        let wanted = policy::judge(request, present.as_ref()).map_err(|refusal| {
            tracing::warn!(%refusal, "the tunnel asks for what it may not have");
            refusal.to_string()
        })?;
        let Some(wanted) = wanted else { return Ok(()) };
        netlink::apply(DEVICE_NAME, &wanted).await.map_err(|error| {
            tracing::error!(device = DEVICE_NAME, %error, "the interface cannot be set");
            error.to_string()
        })?;
        tracing::info!(device = DEVICE_NAME, mtu = wanted.mtu, "the interface is set");
        self.applied.set_if_changed(Applied { settings: Some(wanted) });
        Ok(())
    }

    fn release(&self) {
        if self.device.get().is_some() {
            self.device.set(None);
            tracing::info!(device = DEVICE_NAME, "the device is gone");
        }
        self.applied.set_if_changed(Applied::default());
    }
}

/// Why there is no device, with what to do about it.
fn device_error(error: &TunError) -> String {
    const NODE: &str = "/dev/net/tun";
    let is_denied = || {
        let opened = File::options().read(true).write(true).open(NODE);
        opened.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    match error {
        TunError::Permission if is_denied() => {
            format!("not permitted to open {NODE}: give this user access to it (sudo chmod 0666 {NODE})")
        }
        TunError::Permission => format!(
            "not permitted to make the device {DEVICE_NAME}: run the service with CAP_NET_ADMIN, as root or by its \
             systemd unit, or without a device (--no-tun)"
        ),
        TunError::Busy(name) => format!(
            "the interface {name} belongs to another program, perhaps a second service or a tunnel that runs by \
             itself: stop it, then try again"
        ),
        TunError::Missing | TunError::Name(_) | TunError::Descriptor(_) | TunError::Io { .. } => {
            error.to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    fn state() -> State {
        State {
            device: Cell::new(None).claim().unwrap(),
            applied: Cell::new(Applied::default()).claim().unwrap(),
        }
    }

    fn some_descriptor() -> Arc<OwnedFd> {
        Arc::new(File::open("/dev/null").unwrap().into())
    }

    #[tokio::test]
    async fn nothing_is_set_without_a_device() {
        let request = vpn::NetworkSettingsRequest { mtu: 1280, ..Default::default() };
        assert!(state().apply(&request).await.unwrap_err().contains("no device"));
    }

    #[tokio::test]
    async fn a_refused_request_says_what_was_wrong_and_changes_nothing() {
        let state = state();
        state.device.set(Some(some_descriptor()));
        let request = vpn::NetworkSettingsRequest { mtu: 9000, ..Default::default() };
        assert!(state.apply(&request).await.unwrap_err().contains("9000"));
        assert_eq!(*state.applied.get(), Applied::default());
    }

    #[test]
    fn a_device_that_is_there_is_handed_out_again_and_a_release_closes_it() {
        let state = state();
        let made = some_descriptor();
        state.device.set(Some(Arc::clone(&made)));
        assert!(Arc::ptr_eq(&state.device().unwrap(), &made));

        state.release();

        assert_eq!(Arc::strong_count(&made), 1);
        assert!(state.device.get().is_none());
    }

    #[test]
    fn an_interface_that_somebody_removed_is_made_again_and_set_anew() {
        const NAME: &str = "an_interface_that_somebody_removed_is_made_again_and_set_anew";
        netlink::tests::in_namespace(NAME, [], async |[]| {
            let state = state();
            let made = state.device().unwrap();
            let address = "fd60:627a:a42b::1".parse().unwrap();
            let settings = InterfaceConfig { address, routes: Vec::new(), mtu: 1280 };
            state.applied.set(Applied { settings: Some(settings) });
            assert!(Arc::ptr_eq(&state.device().unwrap(), &made));

            netlink::tests::remove(DEVICE_NAME).await;

            let again = state.device().unwrap();
            assert!(!Arc::ptr_eq(&again, &made) && !Tun::is_gone(&again));
            assert_eq!(*state.applied.get(), Applied::default(), "what was set is gone with it");
        });
    }

    #[tokio::test]
    async fn what_the_cells_hold_outlives_the_part() {
        let (device, applied) = (Cell::new(Some(some_descriptor())), Cell::new(Applied::default()));
        let host = Host { device: device.clone(), applied };
        let (tell, told) = oneshot::channel();
        let context =
            Context { me: warren_actors::runtime::Address::new("host", 1), tasks: Default::default() };
        drop(host.start(&context).await.unwrap());
        let mut state = host.start(&context).await.unwrap();
        host.handle(&context, &mut state, Message::Device { reply: tell }).await.unwrap();
        assert!(told.await.unwrap().is_ok());
    }

    #[test]
    fn every_reason_for_no_device_says_what_to_do() {
        for (error, words) in [
            (TunError::Missing, "kernel module"),
            (TunError::Busy("warren0".into()), "belongs to another program"),
        ] {
            assert!(device_error(&error).contains(words), "{error}");
        }
        let text = device_error(&TunError::Permission);
        assert!(text.contains("CAP_NET_ADMIN") || text.contains("chmod"), "{text}");
    }
}
