//! A STUN server: tells whoever asks where it sees them (tailnet-data 6).

use tokio::net::UdpSocket;
use warren_proto::stun::{self, Response};

use crate::work::Work;

/// Bytes of the longest question that is read.
const LONGEST: usize = 1500;

/// Answers at a socket until the lab ends.
pub(crate) fn serve(socket: UdpSocket, work: &Work) {
    work.spawn(async move {
        let mut buffer = [0; LONGEST];
        loop {
            // An error is about an answer that nobody took.
            let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
            let asked = buffer.get(..length).and_then(|packet| stun::read_request(packet).ok());
            if let Some(txid) = asked {
                let _ = socket.send_to(&Response { txid, address: from }.encode(), from).await;
            }
        }
    });
}
