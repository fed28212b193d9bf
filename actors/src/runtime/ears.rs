//! For the tests of those who tell a part something: one that only hears.

use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::mpsc;

use super::{Address, Context, Part, PartError, starter};

/// Everything that is sent to this address from now on.
pub(crate) async fn ears<M: Send + 'static>(address: &Address<M>) -> mpsc::Receiver<M> {
    let (tell, heard) = mpsc::channel(8);
    let start = starter(address.clone(), move || Ears(tell.clone()));
    let (supervisor, _) = Actor::spawn(None, Bystander, ()).await.unwrap();
    start(supervisor.get_cell()).await.unwrap();
    heard
}

struct Ears<M>(mpsc::Sender<M>);

impl<M: Send + 'static> Part for Ears<M> {
    type Message = M;
    type State = ();

    async fn start(&self, _: &Context<M>) -> Result<(), PartError> {
        Ok(())
    }

    async fn handle(&self, _: &Context<M>, (): &mut (), message: M) -> Result<(), PartError> {
        self.0.try_send(message).map_err(|error| error.to_string().into())
    }
}

/// A supervisor that lets its children die.
pub(crate) struct Bystander;

impl Actor for Bystander {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<()>,
        _: SupervisionEvent,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}
