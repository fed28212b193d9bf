//! The control plane's messages, package `coder.tailnet.v2` (tailnet-control 3).

#![allow(missing_docs, clippy::doc_markdown, reason = "generated code; the schema is the documentation")]

use std::fmt;

include!(concat!(env!("OUT_DIR"), "/coder.tailnet.v2.rs"));

impl fmt::Debug for RefreshResumeTokenResponse {
    /// Without the token: whoever has it may become this peer.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RefreshResumeTokenResponse")
            .field("token", &"[redacted]")
            .field("refresh_in", &self.refresh_in)
            .field("expires_at", &self.expires_at)
            .finish()
    }
}
