//! An agent's place at the coordinator, for an agent that the lab does not play.

use std::sync::Arc;

use tokio::sync::mpsc;
use warren_proto::tailnet::{CoordinateRequest, CoordinateResponse};

use crate::control::coordinator::{Auth, Coordinator, Gone, Place};

/// Speaks to the coordinator as one agent, which is lost to its peers when this is dropped.
pub struct Seat {
    coordinator: Arc<Coordinator>,
    place: Place,
}

impl Seat {
    /// Takes an agent's place, and what the coordinator says there.
    pub(crate) fn take(
        id: uuid::Uuid,
        coordinator: &Arc<Coordinator>,
    ) -> (Self, mpsc::Receiver<CoordinateResponse>) {
        let coordinator = Arc::clone(coordinator);
        let (place, responses) = coordinator.open(id, Auth::Agent);
        (Self { coordinator, place }, responses)
    }

    /// Says something. What an agent may not say costs the place.
    pub fn say(&self, request: CoordinateRequest) {
        if let Err(text) = self.coordinator.handle(self.place, request) {
            self.coordinator.leave(self.place, Gone::Refused(text));
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.coordinator.leave(self.place, Gone::Lost);
    }
}
