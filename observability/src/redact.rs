//! Words that may be shown. Errors of other programs and libraries can quote what they were given; this
//! keeps secrets out of what people and logs see.

use secrecy::{ExposeSecret, SecretString};

/// What stands where a secret stood.
pub const REDACTED: &str = "[redacted]";

/// `text` without any of `secrets`.
pub fn redact<'a>(text: &str, secrets: impl IntoIterator<Item = &'a SecretString>) -> String {
    secrets
        .into_iter()
        .filter(|secret| !secret.expose_secret().is_empty())
        .fold(text.to_owned(), |text, secret| text.replace(secret.expose_secret(), REDACTED))
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
}
