//! What both processes take away from themselves at their start, and the service from a child before it runs. Unsafe
//! code of the service is here, in `sockets.rs` and in `tunnel/handed.rs`.

use std::io;

use rustix::{
    io::Errno,
    process::{DumpableBehavior, Resource, Rlimit, Signal},
    thread::{CapabilitySet, CapabilitySets},
};
use tokio::process::Command;

use super::Program;

/// First descriptor that is not a standard stream.
const FIRST: libc::c_uint = 3;

/// Takes away what this process never needs: core dumps, being read by a debugger of the same user, and
/// gaining privileges (unless a foreign tunnel, which may need its own, is to be started). Must be called
/// while there is one thread. What fails is logged later: none of it is a reason not to go on.
pub fn harden(gains: Gains) -> Vec<(&'static str, io::Error)> {
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    let mut steps = vec![
        ("no core dumps", rustix::process::setrlimit(Resource::Core, no_core)),
        ("not dumpable", rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)),
        ("no stray descriptors", close_on_exec_from(FIRST)),
    ];
    if gains == Gains::Never {
        steps.push(("no new privileges", rustix::thread::set_no_new_privs(true)));
    }
    steps.into_iter().filter_map(|(what, result)| Some((what, result.err()?.into()))).collect()
}

/// Whether programs that the service starts may gain privileges of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gains {
    /// Never: it starts only itself.
    Never,
    /// A foreign program may have file capabilities.
    Foreign,
}

/// Marks every descriptor that we inherited beyond the standard streams: a child gets the named ones and
/// no others.
fn close_on_exec_from(first: libc::c_uint) -> Result<(), Errno> {
    // SAFETY: `close_range` with this flag closes nothing: it sets a flag on whatever is open.
    let answer =
        unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if answer < 0 {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::NOSYS))
    } else {
        Ok(())
    }
}

/// Makes a child end with us, and our own program start without any privilege.
pub(super) fn confine(command: &mut Command, program: &Program) {
    let is_own = *program == Program::Own;
    let confined = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        if is_own {
            rustix::thread::set_no_new_privs(true)?;
            // With no new privileges this holds across exec, for root too.
            let none = CapabilitySet::empty();
            rustix::thread::set_capabilities(
                None,
                CapabilitySets { effective: none, permitted: none, inheritable: none },
            )?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: it neither allocates nor takes locks.
    unsafe { command.pre_exec(confined) };
}
