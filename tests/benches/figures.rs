//! What benches measure of processes, and how they say it.
#![allow(dead_code, reason = "each bench uses a part of it")]

use std::fs;

/// CPU seconds that a process has used, user and system.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    // USER_HZ is 100 on every Linux that warren supports.
    ticks / 100.0
}

/// Memory of a process.
pub(crate) fn memory(pid: u32) -> String {
    let field = |file: &str, key: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).map(str::to_owned);
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
    };
    let show =
        |kilobytes: Option<f64>| kilobytes.map_or("?".to_owned(), |it| format!("{:.1} MB", it / 1024.0));
    format!("RSS {} (PSS {})", show(field("status", "VmRSS:")), show(field("smaps_rollup", "Pss:")))
}

/// Median, least and most.
pub(crate) fn spread(values: &mut [f64], digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (least, most) = (values[0], values[values.len() - 1]);
    format!("{:.digits$} [{least:.digits$}-{most:.digits$}]", values[values.len() / 2])
}
