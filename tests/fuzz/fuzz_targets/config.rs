//! The configuration: any text is understood, or refused in words that name the file.
#![no_main]

use std::{collections::BTreeSet, path::Path};

use warren_supervisor::config::{MetricsListen, log_options, metrics_flag, parse};

warren_fuzz::target!(check);

const FILE: &str = "/etc/warren/config.toml";

fn check(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let config = match parse(Path::new(FILE), &text) {
        Ok(config) => config,
        Err(error) => {
            let words = error.to_string();
            assert!(words.contains(FILE), "{words}");
            return assert!(words.len() <= 8 * text.len() + 1024, "more words than there was text");
        }
    };
    if let MetricsListen::Address(address) = config.metrics_listen {
        assert!(address.ip().is_loopback());
        assert_eq!(metrics_flag(&address.to_string()).ok(), Some(config.metrics_listen));
    }
    let lower: BTreeSet<_> = config.allow_http_hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
    assert_eq!(config.allow_http_hosts, lower);
    for path in [&config.extra_socket, &config.ca_file, &config.tunnel_binary].into_iter().flatten() {
        assert!(path.is_absolute(), "{path:?}");
    }
    assert!(config.tunnel_version.is_none() || config.tunnel_binary.is_some());
    assert!(!log_options(None, None, &config).filter.is_empty() || config.log_filter.as_deref() == Some(""));
}
