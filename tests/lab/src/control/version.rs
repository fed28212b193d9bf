//! Which API versions a server takes, and its words for those it does not (tailnet-control 1.8).

/// Whether a server of `(major, minor)` takes a requested version; an error is the detail that it tells.
pub(crate) fn check((major, minor): (i64, i64), requested: &str) -> Result<(), String> {
    let parts: Vec<&str> = requested.split('.').collect();
    let [wanted_major, wanted_minor] = parts.as_slice() else {
        return Err(format!("invalid version string: {requested}"));
    };
    let wanted_major: i64 =
        wanted_major.parse().map_err(|_| format!("invalid major version: {requested}"))?;
    let wanted_minor: i64 =
        wanted_minor.parse().map_err(|_| format!("invalid minor version: {requested}"))?;
    if wanted_major > major {
        return Err(format!(
            "server is at version {major}.{minor}, behind requested major version {wanted_major}.{wanted_minor}"
        ));
    }
    if wanted_major < major {
        return Err(format!("version {wanted_major}.{wanted_minor} is no longer supported"));
    }
    if wanted_minor > minor {
        return Err(format!(
            "server is at version {major}.{minor}, behind requested minor version {wanted_major}.{wanted_minor}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Conforms: control:H13
    #[test]
    fn versions_are_taken_and_refused_in_a_deployments_words() {
        for taken in ["2.0", "2.3", "2.10", "+2.3", "2.-1"] {
            assert_eq!(check((2, 10), taken), Ok(()), "{taken}");
        }
        let refused = [
            ("2.11", "server is at version 2.10, behind requested minor version 2.11"),
            ("3.0", "server is at version 2.10, behind requested major version 3.0"),
            ("1.0", "version 1.0 is no longer supported"),
            ("-2.3", "version -2.3 is no longer supported"),
            ("x", "invalid version string: x"),
            ("2.", "invalid minor version: 2."),
            ("2.3.1", "invalid version string: 2.3.1"),
            ("a.3", "invalid major version: a.3"),
            (" 2.3", "invalid major version:  2.3"),
        ];
        for (version, detail) in refused {
            assert_eq!(check((2, 10), version), Err(detail.to_owned()), "{version}");
        }
    }
}
