//! For tests that need a process or a network of their own, and for those that say what they cannot test here.

use std::{env, fs::OpenOptions, io::Write, process::Command};

/// Where a test runs that would disturb others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Apart {
    /// In a process of its own.
    InAProcess,
    /// There, and in a network of its own, as its root.
    InANetworkOfItsOwn,
}

const IS_APART: &str = "WARREN_TEST_IS_APART";

/// Whether we are there already; if not, runs the test of this name there.
pub(crate) fn is_apart(test: &str, apart: Apart) -> bool {
    if env::var_os(IS_APART).is_some() {
        return true;
    }
    if apart == Apart::InANetworkOfItsOwn
        && let Err(why) = try_namespace()
    {
        skipped(test, &why);
        return false;
    }
    let this = env::current_exe().unwrap();
    let mut command = match apart {
        Apart::InAProcess => Command::new(this),
        Apart::InANetworkOfItsOwn => {
            let mut unshare = unshare();
            unshare.arg(this);
            unshare
        }
    };
    let output = command.args(["--exact", test, "--nocapture"]).env(IS_APART, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}\n{complaints}");
    false
}

/// A threaded process cannot enter a user namespace by itself.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net"]);
    command
}

fn try_namespace() -> Result<(), String> {
    match unshare().arg("true").output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("no user namespace: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("unshare (util-linux) is missing: {error}")),
    }
}

/// Says past the harness's capture that something was not tested.
pub(crate) fn skipped(what: &str, why: &str) {
    let err = OpenOptions::new().append(true).open("/dev/stderr");
    let _ = err.and_then(|mut err| writeln!(err, "\nSKIPPED {what}: {why}"));
}
