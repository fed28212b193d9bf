//! What the fuzz targets share: how an input is taken apart, how streams are cut, a clock that does not
//! wait, and a limit for memory.
//!
//! A target asserts what must be true of any input: what was read is written and read again as the same, a
//! stream means the same however it is cut, exactly what belongs to a message is consumed, and no peer
//! makes us wait, or hold memory, without a bound. A panic, a second of work, or 64 MiB is a find.

mod input;
pub mod limits;
pub mod peer;

pub use input::{Input, lengths};

/// Makes a fuzz target of a function of bytes.
#[macro_export]
macro_rules! target {
    ($check:path) => {
        libfuzzer_sys::fuzz_target!(|data: &[u8]| $crate::limits::within(|| $check(data)));
    };
}
