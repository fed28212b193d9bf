//! What a header for the deployment may be, whoever gives it: a client with its order, or the program that the
//! configuration names.

use secrecy::SecretString;

/// Headers of one tunnel.
pub(crate) const MAX_HEADERS: usize = 64;
/// Bytes of the longest text of an order.
pub(crate) const MAX_TEXT: usize = 16 * 1024;

/// A header that is sent as one. The value may be a secret: a refusal tells only the name.
pub(crate) fn checked(name: String, value: String) -> Result<(String, SecretString), String> {
    if !name.is_empty() && is_plain(&name) && is_plain(&value) {
        Ok((name, value.into()))
    } else {
        Err(format!(
            "the extra header {name:?} is malformed, or too long: a header has a name, and one line of at most {MAX_TEXT} bytes"
        ))
    }
}

/// Whether a text is one line of bearable length.
pub(crate) fn is_plain(text: &str) -> bool {
    text.len() <= MAX_TEXT && !text.contains(['\r', '\n', '\0'])
}
