//! Which deployments are spoken to: those of version 2.20.0 and newer, their pre-releases included
//! (vpn-protocol 11.3).

/// The oldest version whose deployments have all that a tunnel needs.
pub const OLDEST: [u64; 3] = [2, 20, 0];

/// Why a deployment is not spoken to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// What it says is no version.
    #[error(
        "the deployment says that its version is {0:?}, which is none; check that the URL is that of a Coder deployment"
    )]
    NoVersion(String),
    /// It is too old.
    #[error(
        "the deployment runs Coder {0}, and warren needs 2.20.0 or newer; ask whoever runs the deployment to upgrade it"
    )]
    TooOld(String),
}

/// Whether a deployment of this version is spoken to: a semantic version, with or without a leading `v`,
/// that is not older than [`OLDEST`]. A build from source that was given no version calls itself 0.0.0-devel: it
/// is let in, for nobody can tell how old it is.
pub fn check(text: &str) -> Result<(), VersionError> {
    if text.trim_start_matches('v').starts_with(UNVERSIONED) {
        return Ok(());
    }
    let numbers = numbers(text).ok_or_else(|| VersionError::NoVersion(text.chars().take(SHOWN).collect()))?;
    // Pre-releases of the oldest are let in too, so that these three numbers decide.
    if numbers < OLDEST { Err(VersionError::TooOld(text.chars().take(SHOWN).collect())) } else { Ok(()) }
}

const UNVERSIONED: &str = "0.0.0-devel";
/// Characters of a version that are shown: it comes from elsewhere.
const SHOWN: usize = 64;

/// The three numbers of a semantic version.
fn numbers(text: &str) -> Option<[u64; 3]> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let (text, build) = text.split_once('+').map_or((text, None), |(text, build)| (text, Some(build)));
    let (text, before) = text.split_once('-').map_or((text, None), |(text, before)| (text, Some(before)));
    if ![build, before].into_iter().flatten().all(are_identifiers) {
        return None;
    }
    let mut parts = text.split('.').map(number);
    let numbers = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(numbers)
}

fn are_identifiers(text: &str) -> bool {
    let is_identifier = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    text.split('.').all(is_identifier)
}

/// Digits only, and no zero in front.
fn number(text: &str) -> Option<u64> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    is_plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Conforms: vpn:W18
    #[test]
    fn deployments_from_2_20_0_on_are_spoken_to_and_what_is_older_or_no_version_is_not() {
        for text in
            ["", " ", "v", "1", "1.2", "1.2.3.4", "v1.2.3.4", "2..0", "2.20.x", "02.20.0", "2.20.0-", "+"]
        {
            assert_eq!(check(text), Err(VersionError::NoVersion(text.to_owned())), "{text:?}");
        }
        for text in ["1.2.3", "v1.2.3", "2.19.0-devel", "v2.19.0-devel", "2.19.9", "0.0.0"] {
            assert_eq!(check(text), Err(VersionError::TooOld(text.to_owned())), "{text:?}");
        }
        for text in ["2.20.0-devel+17f8e93d0", "2.20.0", "2.21.3", "3.0.0", "2.31.1-lab", "0.0.0-devel+1"] {
            assert_eq!((check(text), check(&format!("v{text}"))), (Ok(()), Ok(())), "{text:?}");
        }
    }

    #[test]
    fn the_words_name_the_version_and_what_to_do() {
        let text = check("v2.19.0").unwrap_err().to_string();
        assert!(
            text.contains("v2.19.0") && text.contains("2.20.0 or newer") && text.contains("upgrade"),
            "{text}"
        );
        assert!(check(&"9".repeat(1000)).unwrap_err().to_string().len() < 300);
    }
}
