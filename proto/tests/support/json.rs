//! How recorded bytes and their meaning are read from the files of `tests/vectors`.

#![allow(dead_code, reason = "not every test binary needs all of it")]

use std::path::Path;

use serde_json::{Map, Value, json};

/// A file of a folder of vectors.
pub(crate) fn load(folder: &str, file: &str) -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(folder);
    serde_json::from_slice(&std::fs::read(folder.join(file).with_extension("json")).unwrap()).unwrap()
}

/// The members of a list; none if there is no such list.
pub(crate) fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// A text; empty if there is none.
pub(crate) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// Bytes that stand there as hex.
pub(crate) fn hex(value: &Value, key: &str) -> Vec<u8> {
    let digits = text(value, key).as_bytes();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// As many bytes as a key or a nonce has.
pub(crate) fn array<const N: usize>(value: &Value, key: &str) -> [u8; N] {
    hex(value, key).try_into().unwrap()
}

/// Bytes as hex.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Collects the fields of a message that are there.
#[derive(Default)]
pub(crate) struct Fields(Map<String, Value>);

/// None so far.
pub(crate) fn fields() -> Fields {
    Fields::default()
}

impl Fields {
    pub(crate) fn set(mut self, name: &str, value: Value) -> Self {
        self.0.insert(name.to_owned(), value);
        self
    }

    pub(crate) fn optional<T>(self, name: &str, value: &Option<T>, form: impl Fn(&T) -> Value) -> Self {
        match value {
            Some(value) => self.set(name, form(value)),
            None => self,
        }
    }

    pub(crate) fn text(self, name: &str, value: &str) -> Self {
        if value.is_empty() { self } else { self.set(name, json!(value)) }
    }

    pub(crate) fn number(self, name: &str, value: impl Into<i128>) -> Self {
        match value.into() {
            0 => self,
            value => self
                .set(name, i64::try_from(value).map_or_else(|_| json!(value as u64), |value| json!(value))),
        }
    }

    pub(crate) fn flag(self, name: &str, value: bool) -> Self {
        if value { self.set(name, json!(true)) } else { self }
    }

    pub(crate) fn list<T>(self, name: &str, values: &[T], form: impl Fn(&T) -> Value) -> Self {
        if values.is_empty() { self } else { self.set(name, values.iter().map(form).collect()) }
    }

    pub(crate) fn texts(self, name: &str, values: &[String]) -> Self {
        self.list(name, values, |value| json!(value))
    }

    pub(crate) fn bytes(self, name: &str, value: &[u8]) -> Self {
        self.text(name, &to_hex(value))
    }

    /// An enum: the name the schema has for the number, or the number.
    pub(crate) fn named(self, name: &str, value: i32, known: Option<&str>) -> Self {
        match (value, known) {
            (0, _) => self,
            (_, Some(known)) => self.set(name, json!(known)),
            (value, None) => self.set(name, json!(value)),
        }
    }

    pub(crate) fn done(self) -> Value {
        Value::Object(self.0)
    }
}
