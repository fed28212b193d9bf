//! The line with which each end of a CoderVPN connection begins (vpn-protocol 2):
//!
//! ```text
//! codervpn SP role SP version{,version} LF
//! ```
//!
//! Both ends write theirs at once and read the other's meanwhile. Error texts are those that deployed
//! tunnels print, since managers show them.

use std::{borrow::Cow, fmt, str::FromStr};

const PREAMBLE: &str = "codervpn";

/// Bytes of the longest line, its LF included.
pub const MAX_LINE: usize = 256;

/// The versions this program speaks.
pub const SUPPORTED: VersionList = VersionList(Cow::Borrowed(&[Version { major: 1, minor: 3 }]));

/// Which end of which leg a line speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Starts the tunnel process and owns it.
    Manager,
    /// The tunnel process.
    Tunnel,
    /// Serves clients; the same program as the manager.
    Service,
    /// A user interface.
    Client,
}

impl Role {
    /// The role as the line spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Manager => "manager",
            Self::Tunnel => "tunnel",
            Self::Service => "service",
            Self::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One version of the protocol. Minors of one major understand each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Changes what older peers cannot understand; at least 1.
    pub major: u64,
    /// Adds what older peers can ignore.
    pub minor: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The text is not a version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid version string: {0}")]
pub struct VersionError(pub String);

impl FromStr for Version {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        parse_version(text).ok_or_else(|| VersionError(text.to_owned()))
    }
}

fn parse_version(text: &str) -> Option<Version> {
    let (major, minor) = text.split_once('.')?;
    let version = Version { major: parse_decimal(major)?, minor: parse_decimal(minor)? };
    (version.major > 0).then_some(version)
}

/// Digits only: the standard parser would let a sign through.
fn parse_decimal(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The versions one end speaks: not empty, ascending, no major twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionList(Cow<'static, [Version]>);

/// Why versions do not make a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionListError {
    /// A part of the text is not a version.
    #[error("invalid version list: {0}")]
    Syntax(String),
    /// The text parses, but not to a valid list.
    #[error("invalid parsed version list \"{list}\": {reason}")]
    Invalid {
        /// The text.
        list: String,
        /// What is wrong with it.
        reason: ListDefect,
    },
}

/// What is wrong with a list of versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ListDefect {
    /// There is none.
    #[error("no versions")]
    Empty,
    /// A major is 0.
    #[error("invalid version: {0}")]
    ZeroMajor(Version),
    /// A major comes twice.
    #[error("duplicate major version: {0}")]
    DuplicateMajor(u64),
    /// The majors do not ascend.
    #[error("versions are not sorted")]
    Unsorted,
}

impl VersionList {
    /// The list of these versions, if they make one.
    pub fn new(versions: Vec<Version>) -> Result<Self, ListDefect> {
        validate(&versions)?;
        Ok(Self(Cow::Owned(versions)))
    }

    /// The versions, ascending.
    pub fn versions(&self) -> &[Version] {
        &self.0
    }

    /// The best version that both ends speak: the highest common major with the lower of the two minors.
    /// Both ends come to the same result.
    pub fn negotiate(&self, peer: &Self) -> Result<Version, HeaderError> {
        let ours = self.0.iter();
        let common = ours.flat_map(|our| peer.0.iter().map(move |their| (our, their)));
        let candidates =
            common.filter(|(our, their)| our.major == their.major).map(|(our, their)| *our.min(their));
        candidates.max().ok_or_else(|| HeaderError::Incompatible { ours: self.clone(), theirs: peer.clone() })
    }
}

fn validate(versions: &[Version]) -> Result<(), ListDefect> {
    if versions.is_empty() {
        return Err(ListDefect::Empty);
    }
    if let Some(zero) = versions.iter().find(|version| version.major == 0) {
        return Err(ListDefect::ZeroMajor(*zero));
    }
    for (version, next) in versions.iter().zip(versions.iter().skip(1)) {
        if version.major == next.major {
            return Err(ListDefect::DuplicateMajor(version.major));
        }
        if version.major > next.major {
            return Err(ListDefect::Unsorted);
        }
    }
    Ok(())
}

impl fmt::Display for VersionList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, version) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{version}")?;
        }
        Ok(())
    }
}

impl FromStr for VersionList {
    type Err = VersionListError;

    fn from_str(text: &str) -> Result<Self, VersionListError> {
        let versions: Option<Vec<_>> = text.split(',').map(parse_version).collect();
        let versions = versions.ok_or_else(|| VersionListError::Syntax(text.to_owned()))?;
        Self::new(versions).map_err(|reason| VersionListError::Invalid { list: text.to_owned(), reason })
    }
}

/// Why a peer's line is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// More than the longest line came without an LF.
    #[error("header malformed or too large: {}", String::from_utf8_lossy(.0))]
    TooLong(Vec<u8>),
    /// Not three parts with one space between each.
    #[error("wrong number of parts")]
    Parts,
    /// Another protocol.
    #[error("invalid preamble")]
    Preamble,
    /// Not the role that was expected.
    #[error("unexpected role")]
    Role,
    /// The list of versions does not parse.
    #[error("parse version list {list:?}: {reason}")]
    Versions {
        /// The list as it came.
        list: String,
        /// What is wrong with it.
        reason: VersionListError,
    },
    /// No version is common to both.
    #[error("current supported versions \"{ours}\" is not compatible with peer versions \"{theirs}\"")]
    Incompatible {
        /// What this end speaks.
        ours: VersionList,
        /// What the peer speaks.
        theirs: VersionList,
    },
}

/// The line of an end with this role, its LF included.
pub fn line(role: Role, versions: &VersionList) -> String {
    format!("{PREAMBLE} {role} {versions}\n")
}

/// Reads a peer's line (without its LF), which must be of the `expected` role.
pub fn parse_line(line: &[u8], expected: Role) -> Result<VersionList, HeaderError> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(preamble), Some(role), Some(list), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(HeaderError::Parts);
    };
    if preamble != PREAMBLE.as_bytes() {
        return Err(HeaderError::Preamble);
    }
    if role != expected.as_str().as_bytes() {
        return Err(HeaderError::Role);
    }
    let list = String::from_utf8_lossy(list);
    list.parse().map_err(|reason| HeaderError::Versions { list: list.into_owned(), reason })
}

/// Collects a line byte by byte, so that what follows it stays unread: the first frame may be in the
/// same segment.
#[derive(Debug, Default)]
pub struct LineReader {
    line: Vec<u8>,
}

impl LineReader {
    /// Takes one byte; returns the line, without its LF, when it is complete.
    pub fn push(&mut self, byte: u8) -> Result<Option<Vec<u8>>, HeaderError> {
        if byte == b'\n' {
            return Ok(Some(std::mem::take(&mut self.line)));
        }
        self.line.push(byte);
        if self.line.len() >= MAX_LINE {
            return Err(HeaderError::TooLong(std::mem::take(&mut self.line)));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(text: &str) -> VersionList {
        text.parse().unwrap()
    }

    /// Conforms: vpn:V1
    #[test]
    fn the_supported_versions_are_themselves_a_valid_list() {
        assert_eq!(validate(SUPPORTED.versions()), Ok(()));
        assert_eq!(line(Role::Tunnel, &SUPPORTED), "codervpn tunnel 1.3\n");
    }

    /// Conforms: vpn:V2 vpn:V3 vpn:W16
    #[test]
    fn a_version_is_two_unsigned_decimals_and_its_major_is_not_zero() {
        for text in ["1.0", "12.34", "1.18446744073709551615"] {
            assert_eq!(text.parse::<Version>().unwrap().to_string(), text);
        }
        for text in
            ["", "1", "1.0.0", "0.1", "a.1", "1.a", "+1.0", "1. 0", ".", "1.", "1.18446744073709551616"]
        {
            assert_eq!(text.parse::<Version>(), Err(VersionError(text.to_owned())));
        }
    }

    /// Conforms: vpn:V5
    #[test]
    fn a_list_renders_as_it_was_written() {
        for text in ["1.0", "1.1,2.3,3.2"] {
            assert_eq!(list(text).to_string(), text);
        }
    }

    /// Conforms: vpn:V6 vpn:V7
    #[test]
    fn a_bad_list_is_refused_with_its_defect() {
        let cases = [
            ("", "invalid version list: "),
            ("1.0,invalid", "invalid version list: 1.0,invalid"),
            ("1.0,1.0", "invalid parsed version list \"1.0,1.0\": duplicate major version: 1"),
            ("1.0,1.2", "invalid parsed version list \"1.0,1.2\": duplicate major version: 1"),
            ("2.0,1.0", "invalid parsed version list \"2.0,1.0\": versions are not sorted"),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<VersionList>().unwrap_err().to_string(), error);
        }
        let of = |versions: &[(u64, u64)]| {
            VersionList::new(versions.iter().map(|&(major, minor)| Version { major, minor }).collect())
                .map(|list| list.to_string())
        };
        assert_eq!(of(&[(1, 0), (2, 4)]), Ok("1.0,2.4".to_owned()));
        assert_eq!(of(&[]), Err(ListDefect::Empty));
        assert_eq!(of(&[(1, 0), (1, 0)]), Err(ListDefect::DuplicateMajor(1)));
        assert_eq!(of(&[(1, 0), (1, 2)]), Err(ListDefect::DuplicateMajor(1)));
        assert_eq!(of(&[(2, 0), (1, 0)]), Err(ListDefect::Unsorted));
        let zero = Version { major: 0, minor: 4 };
        assert_eq!(VersionList::new(vec![zero]), Err(ListDefect::ZeroMajor(zero)));
    }

    /// Conforms: vpn:V4 vpn:W17
    #[test]
    fn both_ends_agree_on_the_highest_common_major_and_the_lower_minor() {
        let cases = [
            ("1.0", "1.0", Some("1.0")),
            ("1.2", "1.3", Some("1.2")),
            ("2.1", "2.2", Some("2.1")),
            ("2.1", "2.0", Some("2.0")),
            ("2.1", "3.1", None),
            ("2.1", "1.1", None),
            ("1.0", "2.0", None),
            ("1.2,2.4,3.2", "1.2,2.4,3.2", Some("3.2")),
            ("1.2,2.4,3.2", "4.1,5.2", None),
            ("1.2,2.4,3.2", "1.2,2.3", Some("2.3")),
            ("1.2,2.4,3.2", "2.3,3.3", Some("3.2")),
            ("1.7,2.1", "1.7", Some("1.7")),
            ("1.8", "2.8", None),
        ];
        for (ours, theirs, expected) in cases {
            for (a, b) in [(ours, theirs), (theirs, ours)] {
                let negotiated = list(a).negotiate(&list(b)).ok().map(|version| version.to_string());
                assert_eq!(negotiated.as_deref(), expected, "{a} with {b}");
            }
        }
    }

    /// Conforms: vpn:W14 vpn:W15
    #[test]
    fn a_line_is_read_back_for_each_role_and_refused_with_its_defect_otherwise() {
        let roles = [Role::Manager, Role::Tunnel, Role::Service, Role::Client];
        assert_eq!(roles.map(Role::as_str), ["manager", "tunnel", "service", "client"]);
        for role in roles {
            for versions in ["1.3,2.1", "1.0"] {
                let text = line(role, &list(versions));
                assert_eq!(text, format!("codervpn {role} {versions}\n"));
                assert_eq!(parse_line(text.trim_end().as_bytes(), role), Ok(list(versions)));
            }
        }
        let refused = |text: &str| parse_line(text.as_bytes(), Role::Tunnel).unwrap_err().to_string();
        for text in ["codervpn", "codervpn tunnel", "codervpn tunnel 1.0 2.0", "codervpn tunnel 1.0 "] {
            assert_eq!(refused(text), "wrong number of parts", "{text}");
        }
        assert_eq!(refused("cats tunnel 1.0"), "invalid preamble");
        for text in ["codervpn  1.0", "codervpn cats 1.0", "codervpn manager 1.0"] {
            assert_eq!(refused(text), "unexpected role", "{text}");
        }
    }

    #[test]
    fn a_line_of_255_bytes_is_read_and_256_bytes_without_its_end_are_not() {
        let mut reader = LineReader::default();
        for _ in 0..255 {
            assert_eq!(reader.push(b'x'), Ok(None));
        }
        assert_eq!(reader.push(b'\n'), Ok(Some(vec![b'x'; 255])));
        for _ in 0..255 {
            assert_eq!(reader.push(b'x'), Ok(None));
        }
        assert_eq!(reader.push(b'x'), Err(HeaderError::TooLong(vec![b'x'; 256])));
    }

    fn any_list() -> impl Strategy<Value = VersionList> {
        let versions = proptest::collection::btree_map(1_u64.., any::<u64>(), 1..5);
        versions.prop_map(|versions| {
            let versions = versions.into_iter().map(|(major, minor)| Version { major, minor }).collect();
            VersionList::new(versions).unwrap()
        })
    }

    proptest! {
        #[test]
        fn every_line_parses_back(versions in any_list()) {
            let line = line(Role::Service, &versions);
            let parsed = parse_line(line.trim_end_matches('\n').as_bytes(), Role::Service);
            prop_assert_eq!(parsed, Ok(versions));
        }

        #[test]
        fn negotiation_is_symmetric(a in any_list(), b in any_list()) {
            prop_assert_eq!(a.negotiate(&b).ok(), b.negotiate(&a).ok());
        }

        #[test]
        fn no_line_breaks_the_parser(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_line(&line, Role::Manager);
        }
    }
}
