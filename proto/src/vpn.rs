//! The messages of the CoderVPN protocol (vpn-protocol 5).

#![allow(missing_docs, reason = "generated code; the schema is the documentation")]
#![allow(clippy::large_enum_variant, reason = "generated code; a message is never kept in numbers")]

use std::fmt;

include!(concat!(env!("OUT_DIR"), "/vpn.rs"));

impl fmt::Debug for StartRequest {
    /// Without the token and the values of headers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StartRequest")
            .field("tunnel_file_descriptor", &self.tunnel_file_descriptor)
            .field("coder_url", &self.coder_url)
            .field("api_token", &redacted(&self.api_token))
            .field("headers", &self.headers)
            .field("device_id", &self.device_id)
            .field("device_os", &self.device_os)
            .field("coder_desktop_version", &self.coder_desktop_version)
            .finish()
    }
}

impl fmt::Debug for start_request::Header {
    /// Without the value: deployments behind a proxy pass secrets in headers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Header").field("name", &self.name).field("value", &redacted(&self.value)).finish()
    }
}

/// Says only whether there is a secret.
fn redacted(secret: &str) -> &'static str {
    if secret.is_empty() { "" } else { "[redacted]" }
}

impl Rpc {
    /// Marks a request.
    pub const fn request(id: u64) -> Self {
        Self { msg_id: id, response_to: 0 }
    }

    /// Marks the response to a request.
    pub const fn response(to: u64) -> Self {
        Self { msg_id: 0, response_to: to }
    }
}

impl status::Lifecycle {
    /// Its name as people, programs and metrics are shown it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Starting => "starting",
            Self::Started => "started",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

impl workspace::Status {
    /// Its name as people, programs and metrics are shown it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Canceling => "canceling",
            Self::Canceled => "canceled",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debug_form_of_a_start_holds_no_secret() {
        let header = start_request::Header { name: "X-Gate".into(), value: "open sesame".into() };
        let start = StartRequest { api_token: "hunter2".into(), headers: vec![header], ..Default::default() };
        let message = ManagerMessage { rpc: None, msg: Some(manager_message::Msg::Start(start)) };
        let text = format!("{message:?}");
        assert!(!text.contains("hunter2") && !text.contains("sesame"), "{text}");
        assert!(text.contains("X-Gate"), "{text}");
    }
}
