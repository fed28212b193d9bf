//! Counts what is allocated, and the time of the processor: a find is what makes us hold too much memory, or
//! work too long. The clock on the wall tells nothing on a machine that has other things to do; for what
//! waits for ever libFuzzer has a limit of its own.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    process::abort,
    sync::{
        Once,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

/// Bytes that may be held at a time because of one input.
pub const MEMORY: usize = 64 << 20;
/// What the processor may have to do because of one input.
pub const WORK: Duration = Duration::from_secs(1);

static HELD: AtomicUsize = AtomicUsize::new(0);
/// What was held when the input began; before the first, everything is allowed.
static BEFORE: AtomicUsize = AtomicUsize::new(usize::MAX);
/// The most that any input made us hold.
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

// SAFETY: everything is the system allocator's, but for the counting.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // For a moment there may be both.
        grow(size);
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

fn grow(size: usize) {
    let held = HELD.fetch_add(size, Relaxed).wrapping_add(size);
    let own = held.saturating_sub(BEFORE.load(Relaxed));
    PEAK.fetch_max(own, Relaxed);
    if own > MEMORY {
        eprintln!("MEMORY: this input makes us hold {own} bytes; {MEMORY} are allowed");
        abort();
    }
}

/// What an allocation may take beside what was counted for it, and whatever is no list, no map and no text.
pub const SLACK: usize = 1024;

/// Bytes that are held now.
pub fn held() -> usize {
    HELD.load(Relaxed)
}

/// Runs a target on one input. At the end of the process the peak of all inputs is told.
pub fn within(target: impl FnOnce()) {
    static TOLD: Once = Once::new();
    TOLD.call_once(|| {
        // SAFETY: a function of this program, which needs nothing that ends before it.
        let _ = unsafe { libc::atexit(tell_peak) };
    });
    let begun = processor();
    BEFORE.store(held(), Relaxed);
    target();
    BEFORE.store(usize::MAX, Relaxed);
    let work = processor().saturating_sub(begun);
    assert!(work <= WORK, "WORK: this input takes {work:?}; {WORK:?} are allowed");
}

/// What the processor has done for this thread so far.
fn processor() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a timespec of ours, and the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

extern "C" fn tell_peak() {
    eprintln!("PEAK {}", PEAK.load(Relaxed));
}
