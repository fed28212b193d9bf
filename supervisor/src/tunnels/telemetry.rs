//! What a deployment is told of this machine: its system, and an id by which it is counted once.
//!
//! The machine's own id is known to every program here and must not leave it. The id that is told is made from
//! it with a key of ours: always the same, of use to nobody else, and not to be turned back.

use std::{fs, sync::LazyLock};

use ring::hmac;

/// What the telemetry calls this system.
pub(super) const OS: &str = "Linux";

/// Where the machine's id is.
const MACHINE_ID: &str = "/etc/machine-id";
/// What makes the id ours; changing it makes every machine a new one.
const PURPOSE: &[u8] = b"warren device id 1";
/// Hexadecimal digits of a machine's id.
const DIGITS: usize = 32;

/// This machine's id, or nothing where the machine has none.
pub(super) fn device_id() -> &'static str {
    static ID: LazyLock<String> =
        LazyLock::new(|| derive(&fs::read_to_string(MACHINE_ID).unwrap_or_default()).unwrap_or_default());
    &ID
}

/// `None` for what is no machine's id: a machine that has not started yet says `uninitialized`.
fn derive(machine_id: &str) -> Option<String> {
    let machine_id = machine_id.trim();
    if machine_id.len() != DIGITS || !machine_id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let key = hmac::Key::new(hmac::HMAC_SHA256, machine_id.as_bytes());
    let tag = hmac::sign(&key, PURPOSE);
    let bytes = tag.as_ref().first_chunk()?;
    Some(uuid::Builder::from_random_bytes(*bytes).into_uuid().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_is_stable_and_does_not_tell_the_machines_own() {
        let machine = "0123456789abcdef0123456789abcdef";
        let id = derive(&format!("{machine}\n")).unwrap();
        assert_eq!(Some(id.clone()), derive(machine));
        assert_ne!(Some(id.clone()), derive("0123456789abcdef0123456789abcdee"));
        assert!(!id.replace('-', "").contains(&machine[..8]), "{id}");
    }

    #[test]
    fn a_machine_without_an_id_has_none_here_either() {
        for text in ["", "uninitialized", "0123456789abcdef0123456789abcdeg"] {
            assert_eq!(derive(text), None, "{text}");
        }
    }
}
