//! The cases, what must come of each, and the table of both in `tests/NAT.md` with what was measured last.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

/// A line of the table.
pub(crate) struct Case {
    /// The test's name.
    pub(crate) test: &'static str,
    /// What is between the two.
    pub(crate) what: &'static str,
    /// The path that must result, and by when.
    pub(crate) expected: &'static str,
}

const fn case(test: &'static str, what: &'static str, expected: &'static str) -> Case {
    Case { test, what, expected }
}

/// In the table's order.
pub(crate) const CASES: &[Case] = &[
    case("neighbours_on_one_lan_meet_directly", "the same LAN, both behind one translator", "direct, < 1 s"),
    case(
        "hosts_of_the_open_world_meet_directly",
        "nothing: both have addresses of the world",
        "direct, < 3 s",
    ),
    case("full_cones_are_passed", "full cone on both sides", "direct, < 3 s"),
    case("restricted_cones_are_passed", "restricted cone (by address) on both sides", "direct, < 3 s"),
    case(
        "cones_that_restrict_ports_are_passed",
        "restricted cone (by address and port) on both sides",
        "direct, < 3 s",
    ),
    case(
        "a_symmetric_translator_of_ours_is_passed",
        "symmetric on our side, restricted cone on theirs",
        "direct, < 3 s",
    ),
    case(
        "a_symmetric_translator_of_theirs_is_passed",
        "restricted cone on our side, symmetric on theirs",
        "direct, < 3 s",
    ),
    case(
        "symmetric_translators_on_both_sides_keep_everything_on_the_relay",
        "symmetric on both sides",
        "relayed, < 3 s",
    ),
    case("where_udp_is_blocked_everything_is_relayed", "a firewall that drops UDP", "relayed, < 3 s"),
    case("hosts_with_ipv6_only_meet_directly", "IPv6 only, the servers too", "direct, < 3 s"),
    case(
        "a_path_too_small_for_us_stays_relayed_if_we_are_told",
        "path MTU 1300, told by ICMP",
        "relayed, < 3 s, no black hole",
    ),
    case(
        "a_path_too_small_for_us_stays_relayed_if_nobody_tells",
        "path MTU 1300, larger packets vanish",
        "relayed, < 3 s, no black hole",
    ),
    case(
        "a_proxy_that_strips_upgrades_hinders_nobody",
        "nginx that strips `Upgrade` before the relay",
        "WebSocket to the relay, reason told; direct, < 3 s",
    ),
    case("a_line_that_loses_some_is_used_all_the_same", "5 % loss each way", "direct, < 3 s"),
    case(
        "udp_that_is_cut_off_under_load_is_left_and_taken_again",
        "a firewall that begins to drop UDP, and ends it",
        "relayed, < 1 s, and direct again, < 1 s; TCP lives",
    ),
    case(
        "what_we_send_by_udp_and_is_cut_off_under_load_is_noticed_as_soon",
        "the same, but it drops only what we send",
        "relayed, < 1 s, and direct again, < 1 s; TCP lives",
    ),
    case(
        "what_we_are_sent_by_udp_and_is_cut_off_under_load_is_noticed_as_soon",
        "the same, but it drops only what we are sent",
        "relayed, < 1 s, and direct again, < 1 s; TCP lives",
    ),
    case(
        "networks_change_under_load",
        "another network six times, under load",
        "data < 1 s, control plane < 2 s, direct again; TCP lives",
    ),
];

/// What a test has measured, as the table shows it.
pub(crate) const MEASURED: &str = "FIGURE nat, ";

const COMMAND: &str = "BLESS=1 cargo test --test nat";

/// The measured cell of each test, as the file has it.
fn measured(text: &str) -> BTreeMap<String, String> {
    let rows = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let cells = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
    cells
        .filter_map(|cells| match cells[..] {
            [_, _, measured, test] => Some((test.trim_matches('`').to_owned(), measured.to_owned())),
            _ => None,
        })
        .collect()
}

/// Writes a measured cell into the file.
pub(crate) fn note(test: &str, figure: &str) {
    static FILE: Mutex<()> = Mutex::new(());
    let _alone = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut cells = measured(&fs::read_to_string(path()).unwrap_or_default());
    cells.insert(test.to_owned(), figure.to_owned());
    fs::write(path(), table(&cells)).unwrap();
}

/// What is wrong with the file.
pub(crate) fn problems() -> Vec<String> {
    let text = fs::read_to_string(path()).unwrap_or_default();
    let cells = measured(&text);
    let mut wrong = Vec::new();
    for Case { test, what, expected } in CASES {
        match cells.get(*test) {
            Some(cell) if !cell.is_empty() && text.contains(&row(what, expected, cell, test)) => {}
            _ => wrong.push(format!("tests/NAT.md does not show {test}: {COMMAND} {test}")),
        }
    }
    let stale = cells.keys().filter(|test| *test != "test" && CASES.iter().all(|case| case.test != *test));
    wrong.extend(
        stale
            .filter(|test| !test.starts_with('-'))
            .map(|test| format!("tests/NAT.md shows {test}, which is no case")),
    );
    wrong
}

fn table(cells: &BTreeMap<String, String>) -> String {
    let day = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let day = day.split('T').next().unwrap_or_default();
    let mut table = format!(
        "# NAT lab\n\n\
         A service with its device and an agent, each on a host of its own, meet across translators, firewalls and bad \
         lines (`tests/nat/`; the internet in between is `tests/lab/src/internet.rs`, and needs no root). The agent \
         follows the reference's rules. A site is 5 ms from the world. The time counts from the start of the agent \
         to the first ping that is answered on the path that must result, the best of up to three agents; the reference \
         counts from READY, which is later. Where networks change every second or two, a direct path may \
         have to wait for the next look around; data does not.\n\n\
         Last measured {day} on {}, debug build, by `{COMMAND}`.\n\n\
         | between the two | must result | measured | test |\n|---|---|---|---|\n",
        machine(),
    );
    for Case { test, what, expected } in CASES {
        let cell = cells.get(*test).map_or("", String::as_str);
        writeln!(table, "{}", row(what, expected, cell, test)).unwrap();
    }
    table
}

fn row(what: &str, expected: &str, cell: &str, test: &str) -> String {
    format!("| {what} | {expected} | {cell} | `{test}` |")
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("an unknown processor", |(_, model)| model.trim());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores of {model}, Linux {}", kernel.trim())
}

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/NAT.md")
}
