//! A user and network namespace for one child process. A threaded process cannot unshare its user
//! namespace, so the child does it between fork and exec, where it has one thread. The only unsafe
//! code of the lab is here.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::RawFd,
};

use tokio::process::Command;

/// What a person can do where the kernel refuses a user namespace.
pub(crate) const REMEDY: &str = "allow them with `sudo sysctl -w user.max_user_namespaces=10000` \
    (on kernels that have it also `kernel.unprivileged_userns_clone=1`, and on Ubuntu \
    `kernel.apparmor_restrict_unprivileged_userns=0`), or run it as root";

/// Makes `command` start in a user and network namespace of its own, as root of that namespace, with
/// `inherited` left open, and end when the thread that spawns it ends.
///
/// Spawning then fails with the kernel's error where it allows no such namespace; see [`REMEDY`].
pub(crate) fn isolate(command: &mut Command, inherited: Vec<RawFd>) -> io::Result<()> {
    let uid_map = CString::new(format!("0 {} 1", rustix::process::geteuid().as_raw()))?;
    let gid_map = CString::new(format!("0 {} 1", rustix::process::getegid().as_raw()))?;
    let enter = move || {
        for &descriptor in &inherited {
            keep_open(descriptor)?;
        }
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
        // SAFETY: `unshare` takes flags only, and the child has a single thread here.
        check(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) })?;
        write_file(c"/proc/self/setgroups", c"deny")?;
        write_file(c"/proc/self/uid_map", &uid_map)?;
        write_file(c"/proc/self/gid_map", &gid_map)
    };
    // SAFETY: between fork and exec the closure makes system calls only: it neither allocates nor takes
    // locks; what it needs was built before the fork.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

/// Makes `command` start where we are, with `inherited` left open, and end when the thread that spawns
/// it ends.
pub(crate) fn inherit(command: &mut Command, inherited: Vec<RawFd>) {
    let prepare = move || {
        for &descriptor in &inherited {
            keep_open(descriptor)?;
        }
        Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?)
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(prepare) };
}

fn keep_open(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: clears the flags of a descriptor number; a stale number is an error, not undefined.
    check(unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) })
}

fn write_file(path: &CStr, content: &CStr) -> io::Result<()> {
    // SAFETY: both strings end in NUL and live through the calls; the descriptor is ours and is closed.
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(file)?;
        let length = content.count_bytes();
        let written = libc::write(file, content.as_ptr().cast(), length);
        let outcome = if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        libc::close(file);
        outcome
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
