//! The time of WireGuard. boringtun asks the system for it and takes it from nobody: `clock_gettime` with
//! `CLOCK_BOOTTIME`, and no other clock in a place that decides anything. So this binary has a `clock_gettime` of its
//! own, which answers that one question with the time of the world that lives on the asking thread, and hands on all
//! others to the system.

use std::{cell::Cell, time::Duration};

/// When worlds begin, by that clock. Any time will do, and zero would hide a mistake.
const BEGIN: Duration = Duration::from_secs(1_000_000);

thread_local! {
    static NOW: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// So old is the world of this thread from now on.
pub(crate) fn set(age: Duration) {
    NOW.set(Some(BEGIN + age));
}

/// How old the world of this thread is.
pub(crate) fn age() -> Duration {
    NOW.get().unwrap_or(BEGIN) - BEGIN
}

/// Takes the place of the C library's function of that name, for this whole binary.
///
/// # Safety
///
/// As for that function: `time` is null, or may be written to.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    let now = NOW.get().filter(|_| clock == libc::CLOCK_BOOTTIME && !time.is_null());
    let Some(now) = now else {
        // SAFETY: the arguments are those of the function, and so is the promise about `time`.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as libc::c_int;
    };
    let now = libc::timespec { tv_sec: now.as_secs() as libc::time_t, tv_nsec: now.subsec_nanos().into() };
    // SAFETY: `time` is not null, and the caller promises that it may be written to.
    unsafe { time.write(now) };
    0
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use warren_actors::wireguard::{Engines, Ticked};
    use warren_proto::key::NodePrivate;

    use super::*;

    #[test]
    fn a_handshake_is_repeated_after_five_seconds_of_the_worlds_time_in_none_of_ours() {
        let began = Instant::now();
        set(Duration::ZERO);
        let peer = NodePrivate::generate().public();
        let mut engine = Engines::new(&NodePrivate::generate()).engine(&peer, 1, began);
        let mut out = [0; 148];
        assert_eq!(engine.initiate(began, &mut out), Some(148));
        let mut tick = |millis| {
            set(Duration::from_millis(millis));
            engine.tick(began + Duration::from_millis(millis), &mut out)
        };
        assert_eq!(tick(4_999), Ticked::Nothing);
        assert_eq!(tick(5_000), Ticked::Send(148));
        assert!(began.elapsed() < Duration::from_secs(4), "other clocks are as they were");
    }

    #[test]
    fn a_thread_without_a_world_has_the_systems_time() {
        let boot_time = || {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: `time` may be written to.
            assert_eq!(unsafe { clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) }, 0);
            time.tv_sec
        };
        set(Duration::from_secs(7));
        assert_eq!(boot_time(), 1_000_007);
        let elsewhere = std::thread::spawn(boot_time).join().unwrap();
        let up_time = std::fs::read_to_string("/proc/uptime").unwrap();
        let up_time: f64 = up_time.split(' ').next().unwrap().parse().unwrap();
        assert!((elsewhere as f64 - up_time).abs() < 60.0, "{elsewhere} and {up_time}");
    }
}
