//! The tunnel as the owner of its network: sets address, routes and MTU of the device that packet I/O made.
//! Nothing needs to be undone: what was set vanishes with the device.
//!
//! Writes the cell `host`. A successor sets everything again, which changes nothing.

use std::sync::Arc;

use warren_actors::{
    facts::{HostState, InterfaceConfig, Net},
    packet_io::DEVICE_NAME,
    runtime::{CellWriter, Context, Part, PartError},
};

use crate::host::netlink;

/// What the host part hears.
#[derive(Debug)]
pub(super) enum Message {
    /// How setting the interface came out.
    Set(InterfaceConfig, Result<(), String>),
}

/// The part.
pub(super) struct Host {
    net: Arc<Net>,
}

impl Host {
    /// For one Boot.
    pub(super) fn new(net: Arc<Net>) -> Self {
        Self { net }
    }
}

impl Part for Host {
    type Message = Message;
    type State = CellWriter<HostState>;

    async fn start(&self, context: &Context<Message>) -> Result<Self::State, PartError> {
        let state = self.net.host.claim()?;
        let (mut wanted, me) = (self.net.interface.view(), context.me.clone());
        // One after the other: two that set the same route at the same time would refuse each other.
        context.tasks.spawn(async move {
            while let Some(config) = wanted.changed().await {
                let Some(config) = config.as_ref().clone() else { continue };
                let outcome = netlink::apply(DEVICE_NAME, &config).await.map_err(|error| error.to_string());
                if me.send(Message::Set(config, outcome)).await.is_err() {
                    return;
                }
            }
        });
        Ok(state)
    }

    async fn handle(
        &self,
        _: &Context<Message>,
        state: &mut Self::State,
        message: Message,
    ) -> Result<(), PartError> {
        match message {
            Message::Set(config, Ok(())) => {
                tracing::info!(device = DEVICE_NAME, mtu = config.mtu, "the interface is set");
                state.set_if_changed(HostState { applied: Some(config), error: None });
            }
            Message::Set(_, Err(error)) => {
                tracing::error!(device = DEVICE_NAME, %error, "the interface cannot be set");
                state.set_if_changed(HostState { applied: state.get().applied.clone(), error: Some(error) });
            }
        }
        Ok(())
    }
}
