//! The host names of agents (vpn-protocol 7.3). Everything is lower case: look-ups compare that way.
//!
//! | Form | When |
//! |---|---|
//! | `agent.workspace.me.suffix.` | always |
//! | `agent.workspace.user.suffix.` | always |
//! | `workspace.suffix.` | only if it has exactly one agent |

use std::collections::BTreeSet;

/// Bytes of the longest name, without its trailing dot.
const MAX_NAME: usize = 253;
/// Bytes of the longest label.
const MAX_LABEL: usize = 63;

/// What stands for the user in the form that is the same for everybody.
const ME: &str = "me";

/// The first part of the name that programs look up to learn whether the tunnel's resolver answers them.
pub const PROBE: &str = "is.coder--connect--enabled--right--now";

/// The suffix of deployments too old to name theirs.
pub const DEFAULT_SUFFIX: &str = "coder";

/// Whether an agent is the only one of its workspace, and so may be called by the workspace's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnlyAgent {
    /// It is.
    Yes,
    /// There are others.
    No,
}

/// Why an agent cannot have its names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The whole name is too long.
    #[error("the name {0:?} is longer than {MAX_NAME} bytes")]
    TooLong(String),
    /// A part between dots is too long.
    #[error("the label {label:?} of the name {name:?} is longer than {MAX_LABEL} bytes")]
    LabelTooLong {
        /// The name.
        name: String,
        /// The part.
        label: String,
    },
    /// There is nothing between two dots.
    #[error("the name {0:?} has an empty label")]
    EmptyLabel(String),
}

/// All names of an agent with trailing dot, each once, shortest first: managers show the first.
pub fn agent_names(
    agent: &str,
    workspace: &str,
    username: &str,
    suffix: &str,
    only_agent: OnlyAgent,
) -> Result<Vec<String>, NameError> {
    let long = [ME, username].map(|user| format!("{agent}.{workspace}.{user}.{suffix}"));
    let short = (only_agent == OnlyAgent::Yes).then(|| format!("{workspace}.{suffix}"));
    let names = long.into_iter().chain(short).map(|name| host_name(&name));
    // Ties are broken by the alphabet, so that the same names come in the same order every time.
    let sorted: BTreeSet<(usize, String)> =
        names.map(|name| name.map(|name| (name.len(), name))).collect::<Result<_, _>>()?;
    Ok(sorted.into_iter().map(|(_, name)| name).collect())
}

/// The name of the probe under a suffix, with trailing dot.
pub fn probe_name(suffix: &str) -> Result<String, NameError> {
    host_name(&format!("{PROBE}.{suffix}"))
}

fn host_name(name: &str) -> Result<String, NameError> {
    let name = name.to_lowercase();
    if name.len() > MAX_NAME {
        return Err(NameError::TooLong(name));
    }
    for label in name.split('.') {
        if label.is_empty() {
            return Err(NameError::EmptyLabel(name));
        }
        if label.len() > MAX_LABEL {
            return Err(NameError::LabelTooLong { label: label.to_owned(), name: name.clone() });
        }
    }
    Ok(name + ".")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(agent: &str, workspace: &str, only: OnlyAgent) -> Result<Vec<String>, NameError> {
        agent_names(agent, workspace, "Rootbeer", "Corp.Example.com", only)
    }

    #[test]
    fn names_are_lower_case_and_the_shortest_comes_first() {
        let all =
            ["wrk.corp.example.com.", "agnt.wrk.me.corp.example.com.", "agnt.wrk.rootbeer.corp.example.com."];
        assert_eq!(names("Agnt", "WRK", OnlyAgent::Yes).unwrap(), all);
        assert_eq!(names("Agnt", "WRK", OnlyAgent::No).unwrap(), all[1..]);
    }

    #[test]
    fn names_of_one_length_come_in_alphabetical_order_and_equal_ones_once() {
        let ordered = agent_names("a", "w", "ab", "s", OnlyAgent::No).unwrap();
        assert_eq!(ordered, ["a.w.ab.s.", "a.w.me.s."]);
        let once = agent_names("a", "w", "me", "s", OnlyAgent::No).unwrap();
        assert_eq!(once, ["a.w.me.s."]);
    }

    #[test]
    fn labels_have_1_to_63_bytes() {
        assert!(names(&"a".repeat(63), "w", OnlyAgent::Yes).is_ok());
        assert!(matches!(names(&"a".repeat(64), "w", OnlyAgent::Yes), Err(NameError::LabelTooLong { .. })));
        assert!(matches!(names("", "w", OnlyAgent::Yes), Err(NameError::EmptyLabel(_))));
        assert!(matches!(names("a..b", "w", OnlyAgent::Yes), Err(NameError::EmptyLabel(_))));
    }

    #[test]
    fn a_suffix_may_have_dots_but_none_at_its_ends_and_no_two_together() {
        let under = |suffix| agent_names("a", "w", "u", suffix, OnlyAgent::No);
        assert_eq!(under("Dev.Example.Com").unwrap()[0], "a.w.u.dev.example.com.");
        for suffix in ["", ".", ".coder", "coder.", "dev..example"] {
            assert!(matches!(under(suffix), Err(NameError::EmptyLabel(_))), "{suffix:?}");
            assert!(matches!(probe_name(suffix), Err(NameError::EmptyLabel(_))), "{suffix:?}");
        }
    }

    #[test]
    fn lengths_count_bytes_of_the_lower_case_form() {
        assert!(names(&"\u{e4}".repeat(31), "w", OnlyAgent::Yes).is_ok());
        assert!(matches!(
            names(&"\u{e4}".repeat(32), "w", OnlyAgent::Yes),
            Err(NameError::LabelTooLong { .. })
        ));
        // Two bytes that become three.
        let growing = "\u{23a}".repeat(31);
        assert_eq!((growing.len(), growing.to_lowercase().len()), (62, 93));
        assert!(matches!(names(&growing, "w", OnlyAgent::Yes), Err(NameError::LabelTooLong { .. })));
    }

    #[test]
    fn what_is_wrong_with_a_name_is_said_in_words() {
        let empty = names("", "w", OnlyAgent::No).unwrap_err();
        assert_eq!(empty.to_string(), r#"the name ".w.me.corp.example.com" has an empty label"#);
        let long = "x".repeat(64);
        let too_long = names(&long, "w", OnlyAgent::No).unwrap_err().to_string();
        let name = format!("{long}.w.me.corp.example.com");
        assert_eq!(too_long, format!("the label {long:?} of the name {name:?} is longer than 63 bytes"));
        let suffix = ["s"; 130].join(".");
        let whole = agent_names("a", "w", "u", &suffix, OnlyAgent::No).unwrap_err().to_string();
        assert!(whole.ends_with("is longer than 253 bytes"), "{whole}");
    }

    #[test]
    fn a_name_has_at_most_253_bytes_without_its_last_dot() {
        let suffix = |length: usize| ["s".repeat(60).as_str(); 5].join(".")[..length].to_owned();
        let fixed = "a.w.me.".len();
        let longest = agent_names("a", "w", "me", &suffix(253 - fixed), OnlyAgent::No).unwrap();
        assert_eq!(longest[0].len(), 254);
        let too_long = agent_names("a", "w", "me", &suffix(254 - fixed), OnlyAgent::No);
        assert!(matches!(too_long, Err(NameError::TooLong(_))));
    }

    #[test]
    fn the_probe_stands_under_the_suffix() {
        assert_eq!(probe_name(DEFAULT_SUFFIX).unwrap(), "is.coder--connect--enabled--right--now.coder.");
    }

    #[test]
    fn users_workspaces_and_agents_may_be_called_as_the_forms_are() {
        let all = agent_names("dev", "me", "ME", "me.coder", OnlyAgent::Yes).unwrap();
        assert_eq!(all, ["me.me.coder.", "dev.me.me.me.coder."]);
        let dotted = agent_names("a.b", "c.d", "u", "s", OnlyAgent::Yes).unwrap();
        assert_eq!(dotted, ["c.d.s.", "a.b.c.d.u.s.", "a.b.c.d.me.s."]);
    }

    #[test]
    fn one_name_that_cannot_be_is_enough_to_have_none() {
        // Only the form with the user's name is too long, by its label or as a whole.
        let long = "u".repeat(64);
        assert!(matches!(
            agent_names("a", "w", &long, "s", OnlyAgent::Yes),
            Err(NameError::LabelTooLong { label, .. }) if label == long
        ));
        let suffix = vec!["s"; 120].join(".");
        assert!(agent_names("a", "w", "me", &suffix, OnlyAgent::Yes).is_ok());
        assert!(matches!(
            agent_names("a", "w", &"u".repeat(20), &suffix, OnlyAgent::Yes),
            Err(NameError::TooLong(_))
        ));
    }

    /// Texts near every limit: usual ones, such as meet or look like another form, long, dotted and foreign ones.
    fn text() -> impl Strategy<Value = String> {
        let odd =
            vec!["me", "Me", "", ".", "a.b", "a..b", ".a", "a.", "\u{130}", "\u{23a}", "a b", "\0", "\n"];
        prop_oneof![
            4 => "[a-zA-Z0-9-]{1,14}",
            2 => proptest::sample::select(odd).prop_map(str::to_owned),
            1 => (61_usize..66).prop_map(|length| "L".repeat(length)),
            1 => (28_usize..33).prop_map(|length| "\u{e4}".repeat(length)),
            1 => (100_usize..125).prop_map(|labels| vec!["d"; labels].join(".")),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// vpn-protocol 7.3, said once more in other words.
        #[test]
        fn an_agent_has_all_its_names_in_order_or_none(
            (agent, workspace, user, suffix) in (text(), text(), text(), text()),
            is_only: bool,
        ) {
            let only = if is_only { OnlyAgent::Yes } else { OnlyAgent::No };
            let mut expected = vec![
                format!("{agent}.{workspace}.me.{suffix}.").to_lowercase(),
                format!("{agent}.{workspace}.{user}.{suffix}.").to_lowercase(),
            ];
            if is_only {
                expected.push(format!("{workspace}.{suffix}.").to_lowercase());
            }
            expected.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
            expected.dedup();
            let can_be = expected.iter().all(|name| {
                let labels: Vec<&str> = name.split('.').collect();
                let inner = &labels[..labels.len() - 1];
                inner.iter().map(|label| label.len() + 1).sum::<usize>() <= 254
                    && inner.iter().all(|label| !label.is_empty() && label.len() < 64)
            });
            let names = agent_names(&agent, &workspace, &user, &suffix, only);
            prop_assert_eq!(names.ok(), can_be.then_some(expected));
        }

        #[test]
        fn any_names_are_refused_or_keep_to_the_rules(agent: String, workspace in "[a-zA-Z0-9.-]{0,70}", user in "[a-zA-Z]{0,70}") {
            let Ok(all) = agent_names(&agent, &workspace, &user, DEFAULT_SUFFIX, OnlyAgent::Yes) else { return Ok(()) };
            for name in &all {
                let labels = name.strip_suffix('.').unwrap();
                prop_assert!(labels.len() <= MAX_NAME && labels.ends_with(DEFAULT_SUFFIX));
                prop_assert!(labels.split('.').all(|label| (1..=MAX_LABEL).contains(&label.len())));
                prop_assert_eq!(host_name(labels), Ok(name.clone()), "lower case already");
            }
        }
    }
}
