//! Words that may be shown. Errors of other programs and libraries can quote what they were given; this
//! keeps secrets out of what people and logs see.

use secrecy::{ExposeSecret, SecretString};

/// What stands where a secret stood.
pub const REDACTED: &str = "[redacted]";

/// A header's value that is shorter is no secret, and may be part of any text.
pub const LEAST_SECRET: usize = 4;

/// `text` without any of `secrets`.
pub fn redact<'a>(text: &str, secrets: impl IntoIterator<Item = &'a SecretString>) -> String {
    without(text, secrets, Ending::Whole)
}

/// As [`redact`], of a text that was cut off: it does not end with the beginning of a secret either.
pub fn redact_cut<'a>(text: &str, secrets: impl IntoIterator<Item = &'a SecretString>) -> String {
    without(text, secrets, Ending::Cut)
}

/// What may be shown of a text of somebody else: one line, nothing that moves a cursor, and at most so many
/// characters.
pub fn one_line(text: &str, most: usize) -> String {
    text.chars().map(|symbol| if symbol.is_control() { ' ' } else { symbol }).take(most).collect()
}

/// Bytes of a part of a secret that is kept back; fewer tell nothing, and may end any word.
const LEAST_PART: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Whole,
    Cut,
}

/// One secret may be part of another: the longest that fits is taken, and what was put in is not looked at again.
fn without<'a>(text: &str, secrets: impl IntoIterator<Item = &'a SecretString>, ending: Ending) -> String {
    let mut secrets: Vec<&str> = secrets.into_iter().map(SecretString::expose_secret).collect();
    secrets.retain(|secret| !secret.is_empty());
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    let may_be_cut = ending == Ending::Cut;
    let (mut shown, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(symbol) = rest.chars().next() {
        if let Some(behind) = secrets.iter().find_map(|secret| rest.strip_prefix(secret)) {
            shown.push_str(REDACTED);
            rest = behind;
        } else if may_be_cut && rest.len() >= LEAST_PART && secrets.iter().any(|it| it.starts_with(rest)) {
            shown.push_str(REDACTED);
            break;
        } else {
            shown.push(symbol);
            rest = rest.get(symbol.len_utf8()..).unwrap_or_default();
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_occurrence_of_a_secret_is_replaced() {
        let secret = SecretString::from("hunter2");
        assert_eq!(redact("hunter2 and hunter2", [&secret]), "[redacted] and [redacted]");
    }

    #[test]
    fn an_empty_secret_changes_nothing() {
        assert_eq!(redact("text", [&SecretString::from("")]), "text");
    }

    #[test]
    fn a_secret_that_begins_with_another_is_replaced_whole() {
        let secrets = ["tok", "tok-and-more", "e"].map(SecretString::from);
        assert_eq!(redact("tok-and-more, tok", &secrets), "[redacted], [redacted]");
    }

    #[test]
    fn a_text_that_was_cut_off_does_not_end_with_a_part_of_a_secret() {
        let secrets = ["hunter2".into()];
        assert_eq!(redact_cut("token=hunt", &secrets), "token=[redacted]");
        assert_eq!(redact_cut("token=hunter2 hunted", &secrets), "token=[redacted] hunted");
        assert_eq!(redact("token=hunt", &secrets), "token=hunt");
    }

    #[test]
    fn a_text_of_somebody_else_is_one_short_line() {
        assert_eq!(one_line("a\u{1b}[2J\nb\u{fc}cd", 8), "a [2J b\u{fc}");
    }
}
