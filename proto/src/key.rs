//! Node and disco keys: their text and binary forms, and the NaCl boxes made between two of them
//! (tailnet-data 0.1).
//!
//! Private keys live for one process, are cleared when dropped, and have no text form here.

use std::{fmt, str::FromStr};

use crypto_box::{
    SalsaBox,
    aead::{AeadInPlace, generic_array::GenericArray},
};
use thiserror::Error;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::ZeroizeOnDrop;

/// Bytes of a key, public or private.
pub const KEY_LEN: usize = 32;
/// Bytes of a box's nonce.
pub const NONCE_LEN: usize = 24;
/// Bytes that a box adds in front of its plaintext.
pub const TAG_LEN: usize = 16;
/// Bytes that a sealed message (nonce, then box) adds in front of its plaintext.
pub const SEAL_LEN: usize = NONCE_LEN + TAG_LEN;
/// Bytes of the form in which a node key stands in a node message: `np`, then the key.
pub const NODE_BINARY_LEN: usize = 2 + KEY_LEN;

const NODE_BINARY_PREFIX: &[u8; 2] = b"np";

/// A nonce, to be used once for a pair of keys.
pub type Nonce = [u8; NONCE_LEN];

/// Why a key could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The text or the bytes start with something else.
    #[error("the key does not start with {expected:?}")]
    Prefix {
        /// How it should start.
        expected: &'static str,
    },
    /// Not exactly 32 bytes, or 64 digits.
    #[error("the key has the wrong length")]
    Length,
    /// A character that is no hexadecimal digit.
    #[error("the key has a character that is no hexadecimal digit")]
    Digit,
}

/// Fills an array from the operating system's generator.
#[must_use]
#[expect(
    clippy::expect_used,
    reason = "without randomness there is no safe way on; Linux fails only without the call"
)]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system's random generator failed");
    bytes
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        ///
        /// `Display` and `FromStr` are the text form, `Debug` is the short form of logs.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; KEY_LEN]);

        impl $name {
            /// What the text form starts with.
            pub const TEXT_PREFIX: &'static str = $prefix;

            /// Reads exactly 32 raw bytes.
            #[must_use]
            pub fn from_slice(raw: &[u8]) -> Option<Self> {
                raw.try_into().ok().map(Self)
            }

            /// The raw bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
                &self.0
            }

            /// Whether this is the all-zero key, which stands for "absent".
            #[must_use]
            pub fn is_zero(&self) -> bool {
                self.0 == [0; KEY_LEN]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($prefix)?;
                write_hex(f, &self.0)
            }
        }

        impl FromStr for $name {
            type Err = KeyError;

            fn from_str(text: &str) -> Result<Self, KeyError> {
                let digits = text.strip_prefix($prefix).ok_or(KeyError::Prefix { expected: $prefix })?;
                Ok(Self(parse_hex(digits)?))
            }
        }
    };
}

public_key! {
    /// A node's public key: its WireGuard static key, and its name at a relay. A relay's own key is of this kind too.
    NodePublic, "nodekey:"
}

public_key! {
    /// The public key with which a node signs its path probes.
    DiscoPublic, "discokey:"
}

impl NodePublic {
    /// Reads the 34-byte form of a node message.
    pub fn from_binary(bytes: &[u8]) -> Result<Self, KeyError> {
        let raw = bytes.strip_prefix(NODE_BINARY_PREFIX).ok_or(KeyError::Prefix { expected: "np" })?;
        Self::from_slice(raw).ok_or(KeyError::Length)
    }

    /// The 34-byte form of a node message.
    #[must_use]
    pub fn to_binary(&self) -> [u8; NODE_BINARY_LEN] {
        let mut bytes = [0; NODE_BINARY_LEN];
        let (prefix, raw) = bytes.split_at_mut(NODE_BINARY_PREFIX.len());
        prefix.copy_from_slice(NODE_BINARY_PREFIX);
        raw.copy_from_slice(&self.0);
        bytes
    }

    /// Reads 64 digits without a prefix: the form of a relay's key in an HTTP header.
    pub fn from_hex(digits: &str) -> Result<Self, KeyError> {
        parse_hex(digits).map(Self)
    }

    /// 64 lower-case digits without a prefix.
    #[must_use]
    pub fn to_hex(&self) -> String {
        let mut text = self.to_string();
        text.split_off(Self::TEXT_PREFIX.len())
    }
}

impl fmt::Debug for NodePublic {
    /// `[`, the first five characters of the key's base64 form, `]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let [a, b, c, d, ..] = self.0;
        let bits = u32::from_be_bytes([a, b, c, d]);
        f.write_str("[")?;
        for shift in [26, 20, 14, 8, 2] {
            // INVARIANT: six bits index 64 characters.
            write!(f, "{}", char::from(ALPHABET[((bits >> shift) & 0x3f) as usize]))?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for DiscoPublic {
    /// `d:` and the first eight bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [start @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = &self.0;
        f.write_str("d:")?;
        write_hex(f, start)
    }
}

macro_rules! private_key {
    ($(#[$doc:meta])* $name:ident, $public:ident) => {
        $(#[$doc])*
        ///
        /// `Debug` tells nothing, and the bytes are cleared on drop.
        #[derive(Clone, ZeroizeOnDrop)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// Makes a new key from the operating system's randomness.
            #[must_use]
            pub fn generate() -> Self {
                Self::from_bytes(random())
            }

            /// Takes any 32 bytes and clamps them.
            #[must_use]
            pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(clamp(bytes))
            }

            /// The clamped bytes; who takes them answers for clearing them.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; KEY_LEN] {
                self.0
            }

            /// The public half. Costs a scalar multiplication: keep the result.
            #[must_use]
            pub fn public(&self) -> $public {
                $public(PublicKey::from(&StaticSecret::from(self.0)).to_bytes())
            }

            /// The boxes between this key and another's public half. Costs a scalar multiplication: keep the result.
            #[must_use]
            pub fn shared(&self, other: &$public) -> BoxShared {
                BoxShared::new(&self.0, &other.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "([redacted])"))
            }
        }
    };
}

private_key! {
    /// A node's private key.
    NodePrivate, NodePublic
}

private_key! {
    /// The private key for path probes.
    DiscoPrivate, DiscoPublic
}

/// The NaCl boxes between two keys, with the costly part done; either side computes the same.
pub struct BoxShared(SalsaBox);

impl BoxShared {
    fn new(private: &[u8; KEY_LEN], public: &[u8; KEY_LEN]) -> Self {
        let private = crypto_box::SecretKey::from(*private);
        Self(SalsaBox::new(&crypto_box::PublicKey::from(*public), &private))
    }

    /// Encrypts `buffer` where it stands and returns the tag that goes in front of it.
    #[expect(
        clippy::expect_used,
        reason = "the cipher refuses only associated data and more bytes than memory holds"
    )]
    pub fn seal_in_place(&self, nonce: &Nonce, buffer: &mut [u8]) -> [u8; TAG_LEN] {
        let nonce = GenericArray::from_slice(nonce);
        self.0.encrypt_in_place_detached(nonce, &[], buffer).expect("a box of any length in memory").into()
    }

    /// Decrypts `buffer` where it stands; if it was not made with these keys, that nonce and that tag, it stays as it was.
    #[must_use]
    pub fn open_in_place(&self, nonce: &Nonce, tag: &[u8; TAG_LEN], buffer: &mut [u8]) -> bool {
        let (nonce, tag) = (GenericArray::from_slice(nonce), GenericArray::from_slice(tag));
        self.0.decrypt_in_place_detached(nonce, &[], buffer, tag).is_ok()
    }

    /// A box: tag, then ciphertext.
    #[must_use]
    pub fn seal(&self, nonce: &Nonce, plaintext: &[u8]) -> Vec<u8> {
        let mut ciphertext = plaintext.to_vec();
        let tag = self.seal_in_place(nonce, &mut ciphertext);
        [tag.as_slice(), &ciphertext].concat()
    }

    /// The plaintext of a box, unless it was made with other keys, another nonce, or was changed on its way.
    #[must_use]
    pub fn open(&self, nonce: &Nonce, boxed: &[u8]) -> Option<Vec<u8>> {
        let (tag, ciphertext) = boxed.split_first_chunk()?;
        let mut plaintext = ciphertext.to_vec();
        self.open_in_place(nonce, tag, &mut plaintext).then_some(plaintext)
    }

    /// A sealed message: the nonce, then the box.
    #[must_use]
    pub fn seal_with_nonce(&self, nonce: &Nonce, plaintext: &[u8]) -> Vec<u8> {
        [nonce.as_slice(), &self.seal(nonce, plaintext)].concat()
    }

    /// The plaintext of a sealed message, under the same conditions as [`BoxShared::open`].
    #[must_use]
    pub fn open_with_nonce(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, boxed) = sealed.split_first_chunk()?;
        self.open(nonce, boxed)
    }
}

impl fmt::Debug for BoxShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoxShared([redacted])")
    }
}

fn clamp(mut bytes: [u8; KEY_LEN]) -> [u8; KEY_LEN] {
    let [first, .., last] = &mut bytes;
    *first &= 248;
    *last = (*last & 127) | 64;
    bytes
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex(digits: &str) -> Result<[u8; KEY_LEN], KeyError> {
    let (pairs, []) = digits.as_bytes().as_chunks::<2>() else { return Err(KeyError::Length) };
    let pairs: &[[u8; 2]; KEY_LEN] = pairs.try_into().map_err(|_| KeyError::Length)?;
    let mut key = [0; KEY_LEN];
    for (byte, [high, low]) in key.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Ok(key)
}

fn digit(character: u8) -> Result<u8, KeyError> {
    match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        b'A'..=b'F' => Ok(character - b'A' + 10),
        _ => Err(KeyError::Digit),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn debug_of_private_keys_and_shared_boxes_tells_nothing() {
        let node = NodePrivate::from_bytes([1; 32]);
        let shared = node.shared(&NodePrivate::from_bytes([2; 32]).public());
        let disco = DiscoPrivate::from_bytes([1; 32]);
        assert_eq!(
            format!("{node:?} {disco:?} {shared:?}"),
            "NodePrivate([redacted]) DiscoPrivate([redacted]) BoxShared([redacted])"
        );
    }

    #[test]
    fn two_generated_keys_differ() {
        assert_ne!(NodePrivate::generate().public(), NodePrivate::generate().public());
    }

    #[test]
    fn a_private_key_is_clamped() {
        assert_eq!(NodePrivate::from_bytes([0xff; 32]).to_bytes()[0], 0xf8);
        assert_eq!(NodePrivate::from_bytes([0xff; 32]).to_bytes()[31], 0x7f);
        assert_eq!(NodePrivate::from_bytes([0; 32]).to_bytes()[31], 0x40);
    }

    #[test]
    fn a_key_text_with_a_character_of_two_bytes_is_refused() {
        assert_eq!(NodePublic::from_hex(&"é".repeat(32)), Err(KeyError::Digit));
    }

    proptest! {
        #[test]
        fn every_form_of_a_public_key_reads_back(raw: [u8; 32]) {
            let (node, disco) = (NodePublic(raw), DiscoPublic(raw));
            prop_assert_eq!(node.to_string().parse(), Ok(node));
            prop_assert_eq!(disco.to_string().parse(), Ok(disco));
            prop_assert_eq!(NodePublic::from_hex(&node.to_hex().to_uppercase()), Ok(node));
            prop_assert_eq!(NodePublic::from_binary(&node.to_binary()), Ok(node));
        }

        #[test]
        fn any_text_and_any_bytes_are_read_or_refused(text: String, bytes: Vec<u8>) {
            let _ = text.parse::<NodePublic>();
            let _ = format!("nodekey:{text}").parse::<NodePublic>();
            let _ = text.parse::<DiscoPublic>();
            let _ = NodePublic::from_binary(&bytes);
            let _ = NodePublic::from_slice(&bytes);
        }

        #[test]
        fn a_box_opens_at_the_other_side_and_nowhere_else(a: [u8; 32], b: [u8; 32], nonce: [u8; 24], plain: Vec<u8>) {
            let (a, b) = (NodePrivate::from_bytes(a), NodePrivate::from_bytes(b));
            let sealed = a.shared(&b.public()).seal_with_nonce(&nonce, &plain);
            prop_assert_eq!(sealed.len(), plain.len() + SEAL_LEN);
            prop_assert_eq!(b.shared(&a.public()).open_with_nonce(&sealed), Some(plain));
            prop_assert_eq!(NodePrivate::generate().shared(&a.public()).open_with_nonce(&sealed), None);
        }

        #[test]
        fn any_bytes_are_opened_or_refused(bytes: Vec<u8>) {
            let shared = NodePrivate::from_bytes([1; 32]).shared(&NodePublic([2; 32]));
            prop_assert_eq!(shared.open_with_nonce(&bytes), None);
        }
    }
}
