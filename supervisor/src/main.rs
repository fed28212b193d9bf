//! The program `warren`: parse the command line, choose a role, run it, and say how it ended.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
