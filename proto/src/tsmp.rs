//! TSMP, what tunnels tell each other inside the tunnel, as the payload of IP protocol 99 (tailnet-data 12.2).

/// The number of the protocol in IP headers.
pub const PROTOCOL: u8 = 99;

const PING: u8 = b'p';
const PONG: u8 = b'o';
const REJECTED: u8 = b'!';
const MAYBE_BROKEN: u8 = 0x01;

/// Tells which ping a pong answers.
pub type Data = [u8; 8];

/// What a payload says. Payloads may be longer than is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Does the tunnel work?
    Ping(Data),
    /// It does, both ways.
    Pong {
        /// Of the ping.
        data: Data,
        /// Where the sender serves its peers; 0 if nowhere.
        port: u16,
    },
    /// A connection was refused.
    Rejected(Rejected),
}

/// Which connection was refused, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejected {
    /// The number of its IP protocol.
    pub protocol: u8,
    /// A letter for the reason.
    pub reason: u8,
    /// The port of the one who is told.
    pub source_port: u16,
    /// The port of the one who tells.
    pub destination_port: u16,
    /// Whether it may be a fault rather than a rule.
    pub is_maybe_broken: bool,
}

impl Message {
    /// Reads a payload; `None` if it is too short, or unknown.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let (kind, body) = payload.split_first()?;
        match *kind {
            PING => body.first_chunk().map(|data| Self::Ping(*data)),
            PONG => {
                let (data, rest) = body.split_first_chunk()?;
                let port = rest.first_chunk().map_or(0, |port| u16::from_be_bytes(*port));
                Some(Self::Pong { data: *data, port })
            }
            REJECTED => decode_rejected(body).map(Self::Rejected),
            _ => None,
        }
    }

    /// The payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Ping(data) => [[PING].as_slice(), data].concat(),
            Self::Pong { data, port } => [[PONG].as_slice(), data, &port.to_be_bytes()].concat(),
            Self::Rejected(it) => {
                let ports = [it.source_port.to_be_bytes(), it.destination_port.to_be_bytes()].concat();
                let flags = it.is_maybe_broken.then_some(MAYBE_BROKEN);
                [[REJECTED, it.protocol, it.reason].as_slice(), &ports, flags.as_slice()].concat()
            }
        }
    }
}

fn decode_rejected(body: &[u8]) -> Option<Rejected> {
    let ([protocol, reason, a, b, c, d], rest) = body.split_first_chunk()?;
    Some(Rejected {
        protocol: *protocol,
        reason: *reason,
        source_port: u16::from_be_bytes([*a, *b]),
        destination_port: u16::from_be_bytes([*c, *d]),
        is_maybe_broken: rest.first().is_some_and(|flags| flags & MAYBE_BROKEN != 0),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_message() -> impl Strategy<Value = Message> {
        prop_oneof![
            any::<Data>().prop_map(Message::Ping),
            any::<(Data, u16)>().prop_map(|(data, port)| Message::Pong { data, port }),
            any::<(u8, u8, u16, u16, bool)>().prop_map(
                |(protocol, reason, source_port, destination_port, is_maybe_broken)| {
                    let rejected =
                        Rejected { protocol, reason, source_port, destination_port, is_maybe_broken };
                    Message::Rejected(rejected)
                }
            ),
        ]
    }

    proptest! {
        #[test]
        fn every_message_reads_back_and_more_bytes_change_nothing(message in any_message(), more: u8) {
            let mut payload = message.encode();
            prop_assert_eq!(Message::decode(&payload), Some(message));
            if !matches!(message, Message::Rejected(_)) {
                payload.push(more);
                prop_assert_eq!(Message::decode(&payload), Some(message));
            }
        }

        #[test]
        fn any_payload_is_read_or_refused(payload: Vec<u8>) {
            let _ = Message::decode(&payload);
        }
    }
}
