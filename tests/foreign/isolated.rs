//! Tests that run in namespaces of their own, where they need no privilege and have a network that is theirs.

use std::{net::IpAddr, process::Command};

use futures::TryStreamExt;

use crate::support::{can_isolate, say};

/// Set for a test's second life, inside namespaces.
const INSIDE: &str = "WARREN_TEST_INSIDE";

/// The name of the test whose body this is: the closure is inside the test, whose path its name begins with, after
/// the target's.
pub(crate) fn test_of<Body>() -> &'static str {
    let name = std::any::type_name::<Body>().trim_end_matches("::{{closure}}");
    name.split_once("::").map_or(name, |(_, path)| path)
}

/// Runs the test's body in namespaces of its own, by starting this test there once more. Says loudly where that
/// is not possible.
pub(crate) fn isolated<Body: FnOnce()>(body: Body) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let name = test_of::<Body>();
    if !can_isolate(name) {
        return;
    }
    // wireguard-go has its socket in a folder that only root may make. A socket that stands for a device holds ten
    // packets unless told otherwise; what it loses is sent again, but that takes time.
    const SHELL: &str = "mount -t tmpfs tmpfs /run && { echo 512 >/proc/sys/net/unix/max_dgram_qlen || true; } && \
                         exec \"$0\" \"$@\"";
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount", "sh", "-c", SHELL])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", name])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("1 passed"), "{name}: {}", text(&output.stdout));
    assert!(!text(&output.stderr).contains("SKIPPED"), "{}", text(&output.stderr));
    for figure in text(&output.stderr).lines().filter(|line| line.starts_with("FIGURE")) {
        say(&format!("\n{figure}"));
    }
}

/// Brings up an interface inside.
pub(crate) fn bring_up(name: &str) {
    with_interface(name, async |handle, index| {
        let up = rtnetlink::LinkUnspec::new_with_index(index).up().build();
        handle.link().set(up).execute().await.unwrap();
    });
}

/// Gives an interface inside one more address, alone in its network.
pub(crate) fn add_address(name: &str, address: IpAddr, prefix: u8) {
    with_interface(name, async |handle, index| {
        handle.address().add(index, address, prefix).execute().await.unwrap();
    });
}

/// Takes that address away.
pub(crate) fn remove_address(name: &str, address: IpAddr) {
    with_interface(name, async |handle, index| {
        let mut all =
            handle.address().get().set_link_index_filter(index).set_address_filter(address).execute();
        let found = all.try_next().await.unwrap().expect("the address");
        handle.address().del(found).execute().await.unwrap();
    });
}

fn with_interface(name: &str, change: impl AsyncFnOnce(&rtnetlink::Handle, u32)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let link = handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        change(&handle, link.unwrap().unwrap().header.index).await;
    });
}
