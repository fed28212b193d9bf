//! Refusals: a status and words, as `{"error": "..."}`.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use serde_json::json;

/// Why a request is not done, in words for a person.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    words: String,
}

impl Refusal {
    pub(super) fn not_found(words: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_FOUND, words: words.into() }
    }

    pub(super) fn forbidden(words: impl Into<String>) -> Self {
        Self { status: StatusCode::FORBIDDEN, words: words.into() }
    }

    pub(super) fn not_allowed(words: impl Into<String>) -> Self {
        Self { status: StatusCode::METHOD_NOT_ALLOWED, words: words.into() }
    }

    pub(super) fn bad_request(words: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, words: words.into() }
    }

    pub(super) fn unavailable(words: impl Into<String>) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, words: words.into() }
    }

    /// The tunnel is a program that does not know this.
    pub(super) fn unsupported(words: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_IMPLEMENTED, words: words.into() }
    }

    pub(super) fn failed(words: impl Into<String>) -> Self {
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, words: words.into() }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.words }))).into_response()
    }
}
