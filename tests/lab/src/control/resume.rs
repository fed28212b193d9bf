//! Resume tokens: who shows one to a dial becomes that peer again (tailnet-control 9.1).
//!
//! They have the form of a deployment's (a compact JWS that names HS512), and are checked in its order and
//! refused in its words. The signature is 64 random bytes that the lab remembers: its tokens do not outlive
//! it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::Value;
use uuid::Uuid;
use warren_proto::{key::random, tailnet::RefreshResumeTokenResponse};

use super::clock::Clock;

/// How long after its end a token is still taken.
const LEEWAY: u64 = 60;
/// Signatures that are remembered; the oldest is forgotten first.
const REMEMBERED: usize = 65_536;
const HEADER: &str = r#"{"alg":"HS512","kid":"1"}"#;

#[derive(Default)]
pub(crate) struct Tokens {
    pub(crate) clock: Clock,
    /// Signatures by what they sign; the payload begins with its expiry so that the oldest come first.
    issued: Mutex<BTreeMap<(u64, Uuid), String>>,
}

impl Tokens {
    /// A token for a peer. Two within one second are the same.
    pub(crate) fn issue(&self, peer: Uuid, lifetime: Duration) -> RefreshResumeTokenResponse {
        let expires = (self.clock.date() + lifetime).as_secs();
        let mut issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        if issued.len() >= REMEMBERED {
            issued.pop_first();
        }
        let signature =
            issued.entry((expires, peer)).or_insert_with(|| URL_SAFE_NO_PAD.encode(random::<64>()));
        let claims = format!(r#"{{"sub":"{peer}","exp":{expires}}}"#);
        let token =
            format!("{}.{}.{signature}", URL_SAFE_NO_PAD.encode(HEADER), URL_SAFE_NO_PAD.encode(claims));
        let refresh = lifetime / 2;
        RefreshResumeTokenResponse {
            token,
            refresh_in: Some(prost_types::Duration {
                seconds: i64::try_from(refresh.as_secs()).unwrap_or(i64::MAX),
                nanos: i32::try_from(refresh.subsec_nanos()).unwrap_or(0),
            }),
            expires_at: Some(prost_types::Timestamp {
                seconds: i64::try_from(expires).unwrap_or(i64::MAX),
                nanos: 0,
            }),
        }
    }

    /// The peer that a token stands for; `None` is a new one. An error is the detail of the refusal.
    pub(crate) fn verify(&self, token: &str) -> Result<Option<Uuid>, String> {
        let parts: Vec<&str> = token.split('.').collect();
        let [header, claims, signature] = parts.as_slice() else {
            return Err(
                "verify payload: parse JWS: go-jose/go-jose: compact JWS format must have three parts"
                    .to_owned(),
            );
        };
        let header =
            decode(header).ok_or("verify payload: parse JWS: illegal base64 data at input byte 0")?;
        let algorithm = header.get("alg").and_then(Value::as_str).unwrap_or_default();
        if algorithm != "HS512" {
            return Err(format!(
                "verify payload: parse JWS: unexpected signature algorithm {algorithm:?}; expected [\"HS512\"]"
            ));
        }
        match header.get("kid").and_then(Value::as_str).unwrap_or_default() {
            // A token without a key is no error and worth nothing.
            "" => return Ok(None),
            "1" => {}
            kid => return Err(format!("verify payload: key with id {kid:?}: crypto key: key not found")),
        }
        let claims = decode(claims).unwrap_or(Value::Null);
        let expires = claims.get("exp").and_then(Value::as_u64).unwrap_or_default();
        let subject = claims.get("sub").and_then(Value::as_str).unwrap_or_default();
        let peer = Uuid::parse_str(subject)
            .map_err(|_| format!("parse peerID from token: invalid UUID length: {}", subject.len()))?;
        let issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        if issued.get(&(expires, peer)).map(String::as_str) != Some(*signature) {
            return Err("verify payload: verify payload: go-jose/go-jose: error in cryptographic primitive"
                .to_owned());
        }
        if expires.saturating_add(LEEWAY) < self.clock.date().as_secs() {
            return Err(
                "verify payload: go-jose/go-jose/jwt: validation failed, token is expired (exp)".to_owned()
            );
        }
        Ok(Some(peer))
    }

    /// Forgets all tokens, as a deployment does whose keys were replaced.
    pub(crate) fn forget(&self) {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn decode(part: &str) -> Option<Value> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Conforms: control:R10
    #[test]
    fn a_token_leads_back_to_its_peer_any_number_of_times_and_has_a_deployments_length() {
        let tokens = Tokens::default();
        let peer = crate::random_id();
        let before = tokens.clock.date().as_secs() as i64;
        let issued = tokens.issue(peer, Duration::from_secs(86_400));
        assert_eq!(issued.token.len(), 206);
        assert_eq!(issued.refresh_in.unwrap().seconds, 43_200);
        let lifetime = issued.expires_at.unwrap().seconds - before;
        assert!((86_400..86_430).contains(&lifetime), "{lifetime}");
        assert_eq!(tokens.verify(&issued.token), Ok(Some(peer)));
        assert_eq!(tokens.verify(&issued.token), Ok(Some(peer)));
    }

    /// Conforms: control:R11
    #[test]
    fn a_token_that_is_over_garbage_or_signed_by_another_is_worth_nothing() {
        let tokens = Tokens::default();
        let peer = crate::random_id();
        let issued = tokens.issue(peer, Duration::from_secs(600));
        tokens.clock.advance(Duration::from_secs(600));
        assert_eq!(tokens.verify(&issued.token), Ok(Some(peer)), "for a minute more");
        tokens.clock.advance(Duration::from_secs(LEEWAY + 1));
        let over = tokens.verify(&issued.token).unwrap_err();
        assert!(over.ends_with("token is expired (exp)"), "{over}");
        assert!(tokens.verify("garbage").unwrap_err().contains("must have three parts"));
        let foreign = Tokens::default().issue(peer, Duration::from_secs(600));
        assert!(tokens.verify(&foreign.token).unwrap_err().contains("cryptographic primitive"));
    }

    #[test]
    fn tokens_are_refused_in_a_deployments_words() {
        let tokens = Tokens::default();
        let encode = |header: &str| {
            let claims = r#"{"sub":"aaaaaaaa-aaaa-aaaa-aaaa-123456789abc","exp":1795448286}"#;
            format!("{}.{}.c2ln", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims))
        };
        let cases = [
            (
                "garbage".to_owned(),
                "verify payload: parse JWS: go-jose/go-jose: compact JWS format must have three parts",
            ),
            (
                encode(r#"{"alg":"HS256","kid":"1"}"#),
                "verify payload: parse JWS: unexpected signature algorithm \"HS256\"; expected [\"HS512\"]",
            ),
            (
                encode(r#"{"alg":"HS512","kid":"99"}"#),
                "verify payload: key with id \"99\": crypto key: key not found",
            ),
            (
                encode(HEADER),
                "verify payload: verify payload: go-jose/go-jose: error in cryptographic primitive",
            ),
        ];
        for (token, detail) in cases {
            assert_eq!(tokens.verify(&token), Err(detail.to_owned()));
        }
        assert_eq!(tokens.verify(&encode(r#"{"alg":"HS512"}"#)), Ok(None));
        let forgotten = tokens.issue(crate::random_id(), Duration::from_secs(60));
        tokens.forget();
        assert!(tokens.verify(&forgotten.token).is_err());
    }
}
