//! The messages of the private link between a service and its own tunnel process.

#![allow(missing_docs, reason = "generated code; the schema is the documentation")]
#![allow(clippy::large_enum_variant, reason = "generated code; a message is never kept in numbers")]

include!(concat!(env!("OUT_DIR"), "/warren.link.rs"));
