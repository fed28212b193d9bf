//! How parts reach each other, keep facts and run work. Five small tools, and ractor is at home here.
//!
//! * [`Address`]: how a part is reached; survives the part's restart and bounds its mailbox by credits.
//! * [`Cell`]: a retained latest value with one writer and many readers; survives its writer.
//! * [`Alarm`]: wakes a part when something is due.
//! * [`Tasks`]: the work of one actor or process; ends with its owner.
//! * [`Part`]: what a part is, and how it becomes an actor.

mod address;
mod alarm;
mod cell;
#[cfg(test)]
pub(crate) mod ears;
mod part;
mod tasks;

pub use address::{Address, AskError, SendError, TrySendError};
pub use alarm::Alarm;
pub use cell::{AlreadyClaimed, Cell, CellWriter, View};
#[cfg(feature = "faults")]
pub use part::FaultKind;
pub use part::{Context, HandlerError, Hooks, Part, PartError, Running, StartFn, starter};
pub use tasks::Tasks;

/// Where the answer to a question goes. Dropped without an answer, the asker learns so at once.
pub type Reply<T> = tokio::sync::oneshot::Sender<T>;
