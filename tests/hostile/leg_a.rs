//! What a manager can do to a tunnel.

use std::time::Duration;

use rustix::process::Signal;
use tokio::{
    io::AsyncWriteExt,
    time::{sleep, timeout},
};
use warren_proto::{
    frame,
    vpn::{
        GetPeerUpdate, ManagerMessage, NetworkSettingsResponse, Rpc, StartRequest, StopRequest, WakeRequest,
        manager_message::Msg as Order, start_request::Header,
    },
};

use super::{
    LIMIT, Mebibytes, TUNNEL_CEILING,
    support::{
        peak_memory,
        tunnel::{Handed, Tunnel},
    },
};

/// The tunnel's word for a manager that broke the protocol.
const PROTOCOL: i32 = 76;

#[tokio::test]
async fn a_greeting_that_drips_is_not_waited_for() {
    let mut tunnel = Tunnel::spawn(&[], Handed::Nothing).await;
    for _ in 0..100 {
        if tunnel.try_write(b"c").await.is_err() {
            break;
        }
        sleep(Duration::from_millis(200)).await;
    }
    ends(tunnel, 1, "handshake failed").await;
}

#[tokio::test]
async fn a_frame_longer_than_any_message_is_refused_with_its_length() {
    let mut tunnel = Tunnel::greeted().await;
    tunnel.write(&u32::MAX.to_be_bytes()).await;
    ends(tunnel, PROTOCOL, "4294967295").await;
}

#[tokio::test]
async fn a_frame_of_garbage_ends_the_tunnel_in_order() {
    let mut tunnel = Tunnel::greeted().await;
    tunnel.write(&[0, 0, 0, 5, 0xff, 0xff, 0xff, 0xff, 0xff]).await;
    ends(tunnel, PROTOCOL, "undecodable frame").await;
}

#[tokio::test]
async fn a_manager_that_leaves_in_the_middle_of_a_frame_ends_the_tunnel() {
    let mut tunnel = Tunnel::greeted().await;
    tunnel.write(&[0, 0, 1, 0, 8]).await;
    drop(tunnel.stdin.take());
    let status = tunnel.exit().await;
    assert!([69, PROTOCOL].contains(&status), "{status}");
}

#[tokio::test]
async fn a_frame_that_drips_keeps_nobody_from_anything() {
    let mut tunnel = Tunnel::greeted().await;
    for byte in request(1, Order::GetPeerUpdate(GetPeerUpdate {})) {
        tunnel.write(&[byte]).await;
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(answered(&mut tunnel).await, 1);
    tunnel.send(2, Order::Stop(StopRequest {})).await;
    ends(tunnel, 0, "").await;
}

#[tokio::test]
async fn a_message_that_unpacks_to_far_more_than_it_is_costs_no_memory() {
    // Empty headers: two bytes each on the wire, dozens in memory.
    let headers = vec![Header::default(); 400_000];
    let start = StartRequest { headers, ..StartRequest::default() };
    let mut tunnel = Tunnel::greeted().await;
    for id in 1..20 {
        if tunnel.try_write(&request(id, Order::Start(start.clone()))).await.is_err() {
            break;
        }
    }
    drop(tunnel.stdin.take());
    let pid = tunnel.child.id().unwrap();
    let watching = async {
        while timeout(Duration::from_millis(5), tunnel.child.wait()).await.is_err() {
            let took = Mebibytes(peak_memory(pid).unwrap_or_default() >> 20);
            assert!(took < TUNNEL_CEILING, "{took:?}");
        }
    };
    timeout(LIMIT, watching).await.expect("an end in time");
    let status = tunnel.exit().await;
    assert!([69, PROTOCOL].contains(&status), "{status}");
}

#[tokio::test]
async fn a_hundred_thousand_requests_from_who_never_reads_cost_no_memory() {
    let mut tunnel = Tunnel::greeted().await;
    // Its output is not read from here on.
    let many: Vec<u8> =
        (1..1000).flat_map(|id| request(id, Order::GetPeerUpdate(GetPeerUpdate {}))).collect();
    let mut input = tunnel.stdin.take().unwrap();
    let writer = tokio::spawn(async move {
        for _ in 0..100 {
            if input.write_all(&many).await.is_err() {
                return;
            }
        }
    });
    sleep(Duration::from_secs(2)).await;
    let took = Mebibytes(tunnel.peak_memory() >> 20);
    assert!(took < TUNNEL_CEILING, "{took:?}");
    tunnel.signal(Signal::TERM);
    let status = tunnel.exit().await;
    assert!([0, PROTOCOL].contains(&status), "{status}");
    writer.await.unwrap();
}

#[tokio::test]
async fn orders_out_of_turn_and_answers_to_nothing_are_answered_or_ignored() {
    let mut tunnel = Tunnel::greeted().await;
    let answer = NetworkSettingsResponse { success: true, error_message: String::new() };
    for id in [0, 7, u64::MAX] {
        tunnel.respond(id, Order::NetworkSettings(answer.clone())).await;
    }
    tunnel.send(5, Order::Wake(WakeRequest {})).await;
    assert_eq!(answered(&mut tunnel).await, 5);
    // The same number again is another request.
    tunnel.send(5, Order::GetPeerUpdate(GetPeerUpdate {})).await;
    assert_eq!(answered(&mut tunnel).await, 5);
    tunnel.send(6, Order::Stop(StopRequest {})).await;
    ends(tunnel, 0, "").await;
}

fn request(id: u64, order: Order) -> Vec<u8> {
    frame::encode(&ManagerMessage { rpc: Some(Rpc::request(id)), msg: Some(order) }).unwrap().to_vec()
}

/// The number of the request that the next response answers.
async fn answered(tunnel: &mut Tunnel) -> u64 {
    loop {
        if let Some(Rpc { response_to: id @ 1.., .. }) = tunnel.frame().await.rpc {
            return id;
        }
    }
}

/// Waits for an end with this status and this word about it.
async fn ends(mut tunnel: Tunnel, status: i32, word: &str) {
    let found = tunnel.exit().await;
    let said = String::from_utf8_lossy(&tunnel.stderr().await).into_owned();
    assert_eq!(found, status, "{said}");
    assert!(said.contains(word), "{word:?} is not in: {said}");
}
