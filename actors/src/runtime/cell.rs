//! A retained latest value. State that must outlive its writer is a cell, not a message: on (re)start
//! a part reads its cells and reconciles, and never depends on having heard an edge.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::watch;

/// A retained value with at most one writer at a time. The cell itself belongs to the composition.
pub struct Cell<T> {
    sender: Arc<watch::Sender<Versioned<T>>>,
    claimed: Arc<AtomicBool>,
}

struct Versioned<T> {
    generation: u64,
    value: Arc<T>,
}

/// Someone else holds the write half: two writers of one fact are a defect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another writer holds this cell")]
pub struct AlreadyClaimed;

impl<T: Default + Send + Sync + 'static> Default for Cell<T> {
    /// A cell that holds what `T` is by default.
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> Clone for Cell<T> {
    fn clone(&self) -> Self {
        Self { sender: Arc::clone(&self.sender), claimed: Arc::clone(&self.claimed) }
    }
}

impl<T: Send + Sync + 'static> Cell<T> {
    /// A cell that holds `initial`, generation 0.
    pub fn new(initial: T) -> Self {
        let (sender, _) = watch::channel(Versioned { generation: 0, value: Arc::new(initial) });
        Self { sender: Arc::new(sender), claimed: Arc::new(AtomicBool::new(false)) }
    }

    /// The write half. It comes back to the cell when dropped; the value stays.
    pub fn claim(&self) -> Result<CellWriter<T>, AlreadyClaimed> {
        if self.claimed.swap(true, Ordering::AcqRel) {
            return Err(AlreadyClaimed);
        }
        Ok(CellWriter { sender: Arc::clone(&self.sender), claimed: Arc::clone(&self.claimed) })
    }

    /// A read half, which has not seen the present value yet.
    pub fn view(&self) -> View<T> {
        let mut receiver = self.sender.subscribe();
        receiver.mark_changed();
        View { receiver }
    }

    /// The present value.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.sender.borrow().value)
    }
}

/// The write half of a cell. Not `Clone`: one writer per state, as a type.
pub struct CellWriter<T> {
    sender: Arc<watch::Sender<Versioned<T>>>,
    claimed: Arc<AtomicBool>,
}

impl<T> CellWriter<T> {
    /// Replaces the value and tells every reader.
    pub fn set(&self, value: T) {
        self.sender.send_modify(|held| {
            held.generation += 1;
            held.value = Arc::new(value);
        });
    }

    /// The present value.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.sender.borrow().value)
    }
}

impl<T: PartialEq> CellWriter<T> {
    /// Replaces the value if it differs; readers hear only of differences. Returns whether it did.
    pub fn set_if_changed(&self, value: T) -> bool {
        if *self.get() == value {
            return false;
        }
        self.set(value);
        true
    }
}

impl<T> Drop for CellWriter<T> {
    fn drop(&mut self) {
        self.claimed.store(false, Ordering::Release);
    }
}

/// A read half of a cell. Cheap to clone; a clone has not seen the present value yet, and remembers by itself.
pub struct View<T> {
    receiver: watch::Receiver<Versioned<T>>,
}

impl<T> Clone for View<T> {
    fn clone(&self) -> Self {
        let mut receiver = self.receiver.clone();
        receiver.mark_changed();
        Self { receiver }
    }
}

impl<T> View<T> {
    /// The present value, without marking it seen.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.receiver.borrow().value)
    }

    /// How often the value was replaced.
    pub fn generation(&self) -> u64 {
        self.receiver.borrow().generation
    }

    /// Waits until there is a value this view has not seen, and returns it. The first call returns at
    /// once. Ends with `None` when the cell is gone.
    pub async fn changed(&mut self) -> Option<Arc<T>> {
        self.receiver.changed().await.ok()?;
        Some(Arc::clone(&self.receiver.borrow_and_update().value))
    }

    /// Waits until the value satisfies `accept` and returns it; `None` when the cell is gone.
    pub async fn wait_for(&mut self, mut accept: impl FnMut(&T) -> bool) -> Option<Arc<T>> {
        let held = self.receiver.wait_for(|held| accept(&held.value)).await.ok()?;
        Some(Arc::clone(&held.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_has_one_writer_at_a_time_and_outlives_it() {
        let cell = Cell::new(0);
        let writer = cell.claim().unwrap();
        assert_eq!(cell.claim().err(), Some(AlreadyClaimed));
        writer.set(5);
        drop(writer);
        assert_eq!(*cell.get(), 5);
        assert!(cell.claim().is_ok());
    }

    #[tokio::test]
    async fn a_view_sees_the_present_value_first_and_then_only_the_latest() {
        let cell = Cell::new(0);
        let mut view = cell.view();
        assert_eq!(view.changed().await.as_deref(), Some(&0));
        let writer = cell.claim().unwrap();
        writer.set(1);
        writer.set(2);
        assert_eq!(view.changed().await.as_deref(), Some(&2));
        assert_eq!(view.generation(), 2);
        assert_eq!(view.clone().changed().await.as_deref(), Some(&2));
    }

    #[tokio::test(start_paused = true)]
    async fn readers_hear_only_of_differences() {
        let cell = Cell::new("a");
        let mut view = cell.view();
        view.changed().await;
        let writer = cell.claim().unwrap();
        assert!(!writer.set_if_changed("a"));
        let heard = tokio::time::timeout(std::time::Duration::from_secs(1), view.changed()).await;
        assert!(heard.is_err());
        assert!(writer.set_if_changed("b"));
        assert_eq!(view.changed().await.as_deref(), Some(&"b"));
    }

    #[tokio::test]
    async fn waiting_ends_with_an_acceptable_value_or_with_the_cell() {
        let cell = Cell::new(0);
        let mut view = cell.view();
        let waiting = tokio::spawn(async move { (view.wait_for(|value| *value > 1).await, view) });
        let writer = cell.claim().unwrap();
        writer.set(1);
        writer.set(2);
        let (value, mut view) = waiting.await.unwrap();
        assert_eq!(value.as_deref(), Some(&2));
        drop((writer, cell));
        assert!(view.wait_for(|value| *value > 2).await.is_none());
    }
}
